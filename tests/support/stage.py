"""A stage of a run whose work may die half-way."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Config:
    steps: int = 3
    seed: int = 0


class Work:
    """A stage's work that writes one file and counts its calls; it may die half-way."""

    def __init__(self, name: str = "result.txt", dies: BaseException | None = None):
        self.name, self.dies = name, dies
        self.calls = 0
        self.leftovers: list[str] = []

    def __call__(self, folder: Path) -> dict[str, object]:
        self.calls += 1
        self.leftovers = sorted(p.name for p in folder.iterdir() if p.name != ".resume")
        (folder / "half.txt").write_text("half")
        if self.dies:
            raise self.dies
        (folder / self.name).write_text("whole")
        return {"samples": 7}
