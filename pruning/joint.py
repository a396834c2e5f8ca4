"""Joint losses: the measured output loss of removing sets of layers together.

Many sets at once take one walk over the U-Net (`prefix`). Measured losses are kept in a file, so
that a search that was killed measures nothing twice.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor, nn

from laptop.files import whole_lines
from laptop.pruning.calibration import Calibration
from laptop.pruning.prefix import walk
from laptop.records import read_lines

AT_ONCE = 12  # sets a walk
Names = frozenset[str]


class JointLoss:
    """E of (output without all layers of a set - output)^2, for sets of names, in float32.

    Measured losses are kept in the file `path`.
    """

    def __init__(self, unet: nn.Module, samples: Calibration, path: Path):
        self.unet, self.samples, self.path = unet, samples, path
        self.losses = {frozenset[str](): 0.0}
        lines = whole_lines(path) if path.exists() else []
        path.write_text("".join(lines), encoding="utf-8")
        for names, loss in read_lines(path, tuple[list[str], float]):
            self.losses[frozenset(names)] = loss

    def __call__(
        self, sets: Iterable[Names], advance: Callable[[], None] = lambda: None
    ) -> dict[Names, float]:
        """The loss of each set; `advance` is called after each one."""
        wanted = list(dict.fromkeys(sets))
        new = [names for names in wanted if names not in self.losses]
        for _ in range(len(wanted) - len(new)):
            advance()
        for i in range(0, len(new), AT_ONCE):
            for names, loss in self._measure(new[i : i + AT_ONCE]).items():
                self.losses[names] = loss
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([sorted(names), loss]) + "\n")
                advance()
        return {names: self.losses[names] for names in wanted}

    def _measure(self, sets: Iterable[Names]) -> dict[Names, float]:
        losses = dict.fromkeys(sets, 0.0)
        for batch in self.samples.batches():
            self._add_(losses, batch)
        return losses

    def _add_(self, losses: dict[Names, float], batch: Calibration) -> None:
        weight = len(batch.output) / len(self.samples.output)

        def visit(names: Names, changed: Tensor) -> None:
            losses[names] += weight * float((changed - batch.output).square().mean())

        walk(self.unet, losses, lambda: batch.forward(self.unet), visit)
