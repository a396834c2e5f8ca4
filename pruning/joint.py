"""The output loss of removing sets of layers together, measured.

Many sets at once take one walk over the U-Net (`prefix`). What has been measured is kept in a file,
so that a search that was killed measures nothing twice.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor, nn

from laptop.files import whole_lines
from laptop.pruning.prefix import walk
from laptop.pruning.units import forward_rows
from laptop.records import read_lines

AT_ONCE = 12  # sets a walk
Names = frozenset[str]


class JointLoss:
    """E of (output without all layers of a set - output)^2, for sets of names, in float32.

    `rows` and `output` (N, C, H, W) are calibration samples; `path` is where losses are kept.
    """

    def __init__(
        self,
        unet: nn.Module,
        rows: dict[str, Tensor],
        output: Tensor,
        batch_size: int,
        path: Path,
    ):
        self.unet, self.rows, self.output, self.batch_size = unet, rows, output, batch_size
        self.path, self.known = path, {frozenset[str](): 0.0}
        whole = whole_lines(path) if path.exists() else []
        path.write_text("".join(whole), encoding="utf-8")
        for names, loss in read_lines(path, tuple[list[str], float]):
            self.known[frozenset(names)] = loss

    def __call__(
        self, sets: Iterable[Names], found: Callable[[], None] = lambda: None
    ) -> dict[Names, float]:
        """The loss of each set; `found` is called after each one."""
        wanted = list(dict.fromkeys(sets))
        new = [names for names in wanted if names not in self.known]
        for _ in range(len(wanted) - len(new)):
            found()
        for i in range(0, len(new), AT_ONCE):
            for names, loss in self._measure(new[i : i + AT_ONCE]).items():
                self.known[names] = loss
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([sorted(names), loss]) + "\n")
                found()
        return {names: self.known[names] for names in wanted}

    def _measure(self, sets: Iterable[Names]) -> dict[Names, float]:
        losses = dict.fromkeys(sets, 0.0)
        for start in range(0, len(self.output), self.batch_size):
            batch = slice(start, start + self.batch_size)
            self._add_(losses, {k: v[batch] for k, v in self.rows.items()}, self.output[batch])
        return losses

    def _add_(self, losses: dict[Names, float], rows: dict[str, Tensor], wanted: Tensor) -> None:
        share = len(wanted) / len(self.output)

        def visit(names: Names, changed: Tensor) -> None:
            losses[names] += share * float((changed - wanted).square().mean())

        walk(self.unet, losses, lambda: forward_rows(self.unet, rows, len(wanted)), visit)
