"""What scoring has found so far, in a file to which each finding is added: a killed run goes on."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from laptop.pruning.units import Unit


class Ledger:
    """Values of units by batch of rows; a line is [first row of the batch, unit, values]."""

    def __init__(
        self, path: Path, units: Sequence[Unit], starts: Sequence[int], found: Callable[[], None]
    ):
        self.path, self.units, self.starts, self.found = path, units, starts, found
        lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a kill may cut the last one off
        path.write_text("".join(whole), encoding="utf-8")
        self.values = {(start, name): v for start, name, v in map(json.loads, whole)}

    def todo(self, start: int = 0) -> list[Unit]:
        """The units without a finding for the batch that begins at row `start`."""
        return [u for u in self.units if (start, u.name) not in self.values]

    def note(self, start: int, name: str, values: Sequence[float]) -> None:
        """Keep what was found: a value for each row of the batch, or one for the whole model."""
        self.values[start, name] = list(values)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([start, name, self.values[start, name]]) + "\n")
        self.found()

    def matrix(self) -> Tensor:
        """All values (units, rows)."""
        return torch.tensor(
            [[x for s in self.starts for x in self.values[s, u.name]] for u in self.units]
        )
