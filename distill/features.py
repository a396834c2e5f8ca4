"""Where a student's feature maps are compared with its teacher's, and how they are collected.

`blocks` (default): the outputs of the down, mid and up blocks. They exist whatever was removed
inside a block. Where a student lacks whole blocks (no mid block, no innermost level), those that
are left pair, counted from the outside; not the innermost down block of the student then, which has
nowhere further down to go.
`attentions`: the outputs of self-attentions (KOALA, 2312.04005). `layers`: of every resnet and
transformer block. Both at the layers that the student still has, paired by name.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from laptop.errors import BadInput
from laptop.pruning.units import layers


def _blocks(teacher: Any, student: Any) -> dict[str, str]:
    levels = len(student.down_blocks)
    less = len(teacher.down_blocks) - levels
    found = {f"down_blocks.{i}": f"down_blocks.{i}" for i in range(levels - (less > 0))}
    if teacher.mid_block is not None and student.mid_block is not None:
        found["mid_block"] = "mid_block"
    return found | {f"up_blocks.{i + less}": f"up_blocks.{i}" for i in range(levels)}


def _attentions(teacher: Any, student: Any) -> dict[str, str]:
    return _common(layers(teacher, "sublayer"), layers(student, "sublayer"), ("attn1",))


def _layers(teacher: Any, student: Any) -> dict[str, str]:
    kinds = ("resnet", "transformer_block")
    return _common(layers(teacher, "fine"), layers(student, "fine"), kinds)


def _common(
    teacher: Mapping[str, str], student: Mapping[str, str], kinds: tuple[str, ...]
) -> dict[str, str]:
    return {n: n for n, kind in teacher.items() if kind in kinds and student.get(n) == kind}


PLACES: dict[str, Callable[[Any, Any], dict[str, str]]] = {
    "blocks": _blocks,
    "attentions": _attentions,
    "layers": _layers,
}


def pairs(teacher: Any, student: Any, where: str = "blocks") -> dict[str, str]:
    """The student's module for each of the teacher's that has one, in the order of the network.

    Raises `BadInput` where nothing pairs.
    """
    found = PLACES[where](teacher, student)
    if not found:
        raise BadInput(
            f"the student has none of the teacher's {where} left to compare features at. Choose "
            "features = 'blocks' in the recipe's [distill]."
        )
    return found


class Features:
    """The outputs of some modules in the next forward: (B, C, H, W), or tokens (B, T, C)."""

    def __init__(self, unet: nn.Module, places: Mapping[str, str]):
        self.places = places
        self._maps: dict[str, Tensor] | None = None
        for key, name in places.items():
            unet.get_submodule(name).register_forward_hook(
                lambda _module, _args, output, key=key: self._keep(key, output)
            )

    def collect(self) -> None:
        """From here to `take`: not when gradient checkpointing computes a forward again."""
        self._maps = {}

    def take(self) -> dict[str, Tensor]:
        """What was collected, by the keys of `places`, in their order; nothing is held on to."""
        found, self._maps = self._maps, None
        assert found is not None
        return {key: found[key] for key in self.places}

    def _keep(self, key: str, output: Tensor | tuple[Tensor, Any]) -> None:
        if self._maps is not None:
            # A down block returns (hidden states, residuals for the up path).
            self._maps[key] = output[0] if isinstance(output, tuple) else output
