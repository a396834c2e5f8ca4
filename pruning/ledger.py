"""What scoring has found so far, in a file to which each finding is added: a killed run goes on."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from laptop.files import whole_lines
from laptop.pruning.units import Unit
from laptop.records import read_lines

Values = NDArray[np.float64]  # (units, rows), NaN where nothing was found
Race = Callable[[Values], NDArray[np.bool_]]  # which units go on, after what was found


class Ledger:
    """Values of units on rows, by batch; a line is [first row of the batch, unit, values].

    It knows what all processes have written into `folder`, and writes a file of its own there.
    """

    def __init__(
        self,
        folder: Path,
        units: Sequence[Unit],
        rows: int,
        batch_size: int,
        found: Callable[[], None] = lambda: None,
        race: Race | None = None,
        process: int = 0,
    ):
        self.units, self.found, self.race = units, found, race
        self.path = folder / f"values-{process}.jsonl"
        self.place = {u.name: i for i, u in enumerate(units)}
        self.batches = {i: slice(i, i + batch_size) for i in range(0, rows, batch_size)}
        self.values: Values = np.full((len(units), rows), np.nan)
        if self.path.exists():
            self.path.write_text("".join(whole_lines(self.path)), encoding="utf-8")
        for path in folder.glob("values-*.jsonl"):
            for start, name, values in read_lines(path, tuple[int, str, list[float]]):
                if name in self.place and start in self.batches:
                    self._set(start, name, values)

    def todo(self, start: int = 0) -> list[Unit]:
        """The units without a finding for the batch that begins at row `start`.

        With a race, only those that it lets go on after all batches before.
        """
        missing = np.isnan(self.values[:, start])
        if self.race is not None and start > 0:
            missing &= self.race(self.values[:, :start])
        return [u for u, is_missing in zip(self.units, missing, strict=True) if is_missing]

    def note(self, start: int, name: str, values: Sequence[float]) -> None:
        """Keep what was found: a value for each row of the batch, or one for the whole model."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([start, name, list(values)]) + "\n")
        self._set(start, name, values)

    def _set(self, start: int, name: str, values: Sequence[float]) -> None:
        self.values[self.place[name], self.batches[start]] = values
        self.found()
