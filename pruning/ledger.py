"""The values that scoring has measured so far, kept in a file, and the race that needs fewer.

A killed run goes on from the file. Racing spares a unit whose fate at the asked ratio is certain
all further samples. After each batch of rows the plan is redrawn for bootstrap resamples of the
rows seen so far, the same rows for every unit, so that what all units have in common cancels. It is
the knapsack's relaxation: the least loss per parameter first. A unit is decided when all resamples
drop it even at somewhat less than the ratio, or none does at somewhat more; the others go on to the
next batch. A bootstrap in place of Hoeffding's bounds, since output losses have long tails and no
known range.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from laptop.files import whole_lines
from laptop.pruning.scores import Unit
from laptop.records import read_lines

Values = NDArray[np.float64]  # (units, rows), NaN where nothing was measured
Race = Callable[[Values], NDArray[np.bool_]]  # which units go on, by their values so far
RESAMPLES = 200
FIRST_ROWS = 8  # no unit is decided on fewer
SLACK = 0.2  # of the ratio: near its bound the exact plan may differ from the relaxation's


class Ledger:
    """Values of units on rows, by batch; a line is [first row of the batch, unit, values].

    It reads the files of all processes in `folder`, and writes one of its own there.
    """

    def __init__(
        self,
        folder: Path,
        units: Sequence[Unit],
        rows: int,
        batch_size: int,
        advance: Callable[[], None] = lambda: None,
        race: Race | None = None,
        process: int = 0,
    ):
        self.units, self.advance, self.race = units, advance, race
        self.path = folder / f"values-{process}.jsonl"
        self.number = {u.name: i for i, u in enumerate(units)}
        self.batches = {i: slice(i, i + batch_size) for i in range(0, rows, batch_size)}
        self.values: Values = np.full((len(units), rows), np.nan)
        if self.path.exists():
            self.path.write_text("".join(whole_lines(self.path)), encoding="utf-8")
        for path in folder.glob("values-*.jsonl"):
            for start, name, values in read_lines(path, tuple[int, str, list[float]]):
                if name in self.number and start in self.batches:
                    self._set(start, name, values)

    def todo(self, start: int = 0) -> list[Unit]:
        """The units without values for the batch that begins at row `start`.

        With a race, only those that it lets go on after all batches before.
        """
        missing = np.isnan(self.values[:, start])
        if self.race is not None and start > 0:
            missing &= self.race(self.values[:, :start])
        return [u for u, is_missing in zip(self.units, missing, strict=True) if is_missing]

    def note(self, start: int, name: str, values: Sequence[float]) -> None:
        """Keep values: one for each row of the batch, or one for the whole model."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([start, name, list(values)]) + "\n")
        self._set(start, name, values)

    def _set(self, start: int, name: str, values: Sequence[float]) -> None:
        self.values[self.number[name], self.batches[start]] = values
        self.advance()


def undecided(units: Sequence[Unit], values: Values, least: float) -> NDArray[np.bool_]:
    """The units (U,) that could still go or stay when `least` parameters are to go."""
    rows = values.shape[1]
    if rows < FIRST_ROWS:
        return np.ones(len(units), bool)
    sampled = ~np.isnan(values[:, -1])
    picked = np.random.default_rng(0).integers(rows, size=(RESAMPLES, rows))
    scores = np.where(sampled, values[:, picked].mean(2).T, np.nanmean(values, axis=1))
    always = _dropped(scores, units, (1 - SLACK) * least).all(0)
    never = ~_dropped(scores, units, (1 + SLACK) * least).any(0)
    return sampled & ~always & ~never


def _dropped(scores: Values, units: Sequence[Unit], least: float) -> NDArray[np.bool_]:
    """The units (B, U) that go when the least score per parameter goes first."""
    params = np.array([u.params for u in units], float)
    order = np.argsort(scores / np.maximum(params, 1), axis=1)
    before = np.cumsum(params[order], axis=1) - params[order]
    dropped = np.zeros(scores.shape, bool)
    np.put_along_axis(dropped, order, before < least, axis=1)
    return dropped


def replay(units: Sequence[Unit], values: Values, least: float, batch: int) -> Values:
    """The values that a race over measured rows would have seen; NaN for those it spares."""
    seen = np.full_like(values, np.nan)
    running = np.ones(len(units), bool)
    for start in range(0, values.shape[1], batch):
        rows = slice(start, start + batch)
        seen[running, rows] = values[running, rows]
        running &= undecided(units, seen[:, : rows.stop], least)
        if not running.any():
            break
    return seen
