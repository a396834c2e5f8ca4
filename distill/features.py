"""Feature maps of a U-Net: the outputs of its down, mid and up blocks.

They exist whatever was removed inside a block, so teacher and student always pair.
"""

from typing import Any

from torch import Tensor, nn


def block_names(unet: Any) -> list[str]:
    """Module paths of the blocks whose outputs are compared, in the order in which they run."""
    down = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
    mid = ["mid_block"] if unet.mid_block is not None else []
    return [*down, *mid, *(f"up_blocks.{i}" for i in range(len(unet.up_blocks)))]


class Features:
    """Collects the blocks' outputs (B, C, H, W) of the latest forward of `unet`."""

    def __init__(self, unet: nn.Module):
        self.maps: dict[str, Tensor] = {}
        for name in block_names(unet):
            unet.get_submodule(name).register_forward_hook(
                lambda _module, _args, output, name=name: self._keep(name, output)
            )

    def _keep(self, name: str, output: Tensor | tuple[Tensor, Any]) -> None:
        # A down block returns (hidden states, residuals for the up path).
        self.maps[name] = output[0] if isinstance(output, tuple) else output
