"""Feature maps of U-Nets: the outputs of their down, mid and up blocks.

They exist whatever was removed inside a block, so teacher and student pair. Where a student lacks
whole blocks (no mid block, no innermost level), those that are left pair, counted from the outside;
not the innermost down block of the student then, which has nowhere further down to go.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def pairs(teacher: Any, student: Any) -> dict[str, str]:
    """The student's block for each of the teacher's that has one, as they run."""
    levels = len(student.down_blocks)
    less = len(teacher.down_blocks) - levels
    found = {f"down_blocks.{i}": f"down_blocks.{i}" for i in range(levels - (less > 0))}
    if teacher.mid_block is not None and student.mid_block is not None:
        found["mid_block"] = "mid_block"
    return found | {f"up_blocks.{i + less}": f"up_blocks.{i}" for i in range(levels)}


class Features:
    """Collects outputs (B, C, H, W) of the latest forward of `unet`, by the keys of `blocks`."""

    def __init__(self, unet: nn.Module, blocks: Mapping[str, str]):
        self.maps: dict[str, Tensor] = {}
        for key, name in blocks.items():
            unet.get_submodule(name).register_forward_hook(
                lambda _module, _args, output, key=key: self._keep(key, output)
            )

    def _keep(self, key: str, output: Tensor | tuple[Tensor, Any]) -> None:
        # A down block returns (hidden states, residuals for the up path).
        self.maps[key] = output[0] if isinstance(output, tuple) else output
