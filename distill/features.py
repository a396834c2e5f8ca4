"""The modules whose outputs a student imitates, and hooks that collect these feature maps.

`blocks` (default): the outputs of the down, mid and up blocks. They exist whatever was removed
inside a block. Where a student lacks whole blocks (no mid block, no innermost level), the blocks
that remain pair, counted from the outside; the student's innermost down block does not pair then,
since it has no level below it.
`attentions`: the outputs of self-attentions (KOALA, 2312.04005). `layers`: the outputs of every
resnet and transformer block. Both pair by name the layers that the student still has.
"""

from collections.abc import Callable, Mapping

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from laptop.errors import BadInput
from laptop.pruning.units import layers

Pairs = dict[str, str]  # the student's module by the teacher's


def _blocks(teacher: UNet2DConditionModel, student: UNet2DConditionModel) -> Pairs:
    levels = len(student.down_blocks)
    missing = len(teacher.down_blocks) - levels
    pairs = {f"down_blocks.{i}": f"down_blocks.{i}" for i in range(levels - (missing > 0))}
    if teacher.mid_block is not None and student.mid_block is not None:
        pairs["mid_block"] = "mid_block"
    return pairs | {f"up_blocks.{i + missing}": f"up_blocks.{i}" for i in range(levels)}


def _attentions(teacher: nn.Module, student: nn.Module) -> Pairs:
    return _common(layers(teacher, "sublayer"), layers(student, "sublayer"), ("attn1",))


def _layers(teacher: nn.Module, student: nn.Module) -> Pairs:
    kinds = ("resnet", "transformer_block")
    return _common(layers(teacher, "fine"), layers(student, "fine"), kinds)


def _common(
    teacher: Mapping[str, str], student: Mapping[str, str], kinds: tuple[str, ...]
) -> Pairs:
    return {n: n for n, kind in teacher.items() if kind in kinds and student.get(n) == kind}


PAIRINGS: dict[str, Callable[[UNet2DConditionModel, UNet2DConditionModel], Pairs]] = {
    "blocks": _blocks,
    "attentions": _attentions,
    "layers": _layers,
}


def module_pairs(
    teacher: UNet2DConditionModel, student: UNet2DConditionModel, features: str = "blocks"
) -> Pairs:
    """The student's module for each of the teacher's that has one, in the order of the network.

    `features` is a key of `PAIRINGS`. Raises `BadInput` where nothing pairs.
    """
    pairs = PAIRINGS[features](teacher, student)
    if not pairs:
        raise BadInput(
            f"the student has none of the teacher's {features} left to compare features at. Choose "
            "features = 'blocks' in the recipe's [distill]."
        )
    return pairs


class Features:
    """Collects the outputs of some modules in a forward: (B, C, H, W), or tokens (B, T, C)."""

    def __init__(self, unet: nn.Module, modules: Mapping[str, str]):
        """Add hooks to `unet`; `modules` maps the keys of the collected maps to module names."""
        self.keys = list(modules)
        self._maps: dict[str, Tensor] | None = None
        for key, name in modules.items():
            unet.get_submodule(name).register_forward_hook(
                lambda _module, _args, output, key=key: self._keep(key, output)
            )

    def collect(self) -> None:
        """Collect until `take`: not when gradient checkpointing computes a forward again."""
        self._maps = {}

    def take(self) -> dict[str, Tensor]:
        """The collected maps, in the order of the keys; none is kept here."""
        maps, self._maps = self._maps, None
        assert maps is not None
        return {key: maps[key] for key in self.keys}

    def _keep(self, key: str, output: Tensor | tuple[Tensor, object]) -> None:
        if self._maps is not None:
            # A down block returns (hidden states, residuals for the up path).
            self._maps[key] = output[0] if isinstance(output, tuple) else output
