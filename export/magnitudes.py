"""Whether the values inside a network fit half precision, which ends at 65504.

A runtime may compute a half-precision graph in float32, as ONNX Runtime does on a CPU, and then
nothing overflows that does on every device. So while PyTorch computes the references in float32,
the largest magnitude of each operator's result is noted with the module that it belongs to.

Attention scores are noted apart, because a graph may keep them in float32: in half precision it
does where the model's config says so (`upcast_attention` of a U-Net, `upcast_softmax` of a VAE).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

LARGEST = 65504.0  # of half precision
MASKED = -1e38  # masks of attention hold less: float32's lowest, in half precision its own lowest
SCORES, SQUARES, VALUES = "attention scores", "squares in its norm", "values"
PRODUCTS = ("aten::bmm", "aten::baddbmm")  # of two activations, so of attention only


class Origin(NamedTuple):
    """The module that computed a magnitude, and of what it is one."""

    module: str
    kind: str  # SCORES, SQUARES or VALUES


Peaks = dict[Origin, float]  # the largest magnitudes; overflows in the order in which they happen


@contextmanager
def watched(module: nn.Module) -> Iterator[Peaks]:
    """Note the magnitudes of whatever `module` computes inside the block, by its modules' names."""
    names = {inner: name for name, inner in module.named_modules()}
    inside, peaks = [""], Peaks()

    def enter(inner: nn.Module, _: object) -> None:
        inside.append(names.get(inner, inside[-1]))

    def leave(*_: object) -> None:
        inside.pop()

    handles = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    ]
    try:
        with _Recorder(inside, peaks):
            yield peaks
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the result of every operator, also inside functions such as attention."""

    def __init__(self, inside: list[str], peaks: Peaks):
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside, self.peaks = inside, peaks

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        operator = func.name().partition(".")[0]
        first = result[0] if isinstance(result, tuple) else result
        if "scaled_dot_product" in operator:
            query, key = args[:2]
            self._note(SCORES, _largest_score(query, key, (kwargs or {}).get("scale")))
        elif operator == "aten::native_group_norm":
            self._note(SQUARES, _largest_square(args[0], result[1]))
        if isinstance(first, Tensor) and first.is_floating_point() and first.numel():
            self._note(SCORES if operator in PRODUCTS else VALUES, magnitude(first))
        return result

    def _note(self, kind: str, value: float) -> None:
        origin = Origin(self.inside[-1], kind)
        before = self.peaks.get(origin, 0.0)
        if before <= LARGEST and not value <= LARGEST:  # NaN, too
            self.peaks.pop(origin, None)  # so that the first overflow comes first
        if not value <= before:
            self.peaks[origin] = value


def magnitude(values: Tensor) -> float:
    """The largest absolute value; masked values do not count."""
    low, high = (float(end) for end in torch.aminmax(values))
    if low < MASKED:
        low = float(torch.where(values < MASKED, 0, values).amin())
    return max(-low, high)


def _largest_score(query: Tensor, key: Tensor, scale: float | None) -> float:
    """The largest score of queries (…, S, C) and keys (…, T, C), a head at a time."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    heads = zip(query.flatten(0, -3), key.flatten(0, -3), strict=True)
    return max(magnitude(q * factor @ k.T) for q, k in heads)


def _largest_square(values: Tensor, means: Tensor) -> float:
    """The largest square that a norm takes of (B, C, *S) minus its means (B, groups)."""
    low, high = torch.aminmax(values.reshape(*means.shape, -1), dim=-1)
    return float(torch.maximum(high - means, means - low).amax() ** 2)


def overflow(peaks: Peaks, keeps: Callable[[str], bool], *, squares: bool) -> str | None:
    """A message that names the module whose values exceed half precision; None where none do.

    `keeps` says of an attention module whether the artifact computes its scores in float32, and
    `squares` whether it computes the squares of group norms in half precision.
    """
    over = [
        (origin, value)
        for origin, value in peaks.items()
        if not value <= LARGEST
        and (squares or origin.kind != SQUARES)
        and not (origin.kind == SCORES and keeps(origin.module))
    ]
    if not over:
        return None
    (module, kind), value = over[0]
    others = len({origin.module for origin, _ in over} - {module})
    more = f", and {others} more modules overflow" if others else ""
    return (
        f"{module or 'the network'} overflows in half precision: {kind} reach {value:.3g}, the "
        f"most is 65504{more}. Export it in fp32"
    )


def keep_scores_wide_(module: nn.Module) -> None:
    """Let attention that its config upcasts compute scores and softmax in float32, when traced.

    These are the modules that diffusers made with `upcast_attention` or `upcast_softmax`. Its
    default processor ignores both, because the fused kernels on a GPU need no help.
    """
    from diffusers.models.attention_processor import AttnProcessor

    for attention in filter(is_upcast, module.modules()):
        attention.get_attention_scores = _wide_scores(attention)
        attention.set_processor(AttnProcessor())


def is_upcast(module: nn.Module) -> "TypeGuard[Attention]":
    """Whether the scores of an attention module are to be computed in float32."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    return (
        isinstance(module, Attention)
        and isinstance(module.processor, AttnProcessor2_0)
        and bool(module.upcast_attention or module.upcast_softmax)
    )


def _wide_scores(attn: "Attention") -> Callable[..., Tensor]:
    """softmax(QKᵀ / √d + mask) of a diffusers module, in float32 from float16."""

    def scores(query: Tensor, key: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        values = (query.float() * attn.scale) @ key.float().transpose(-1, -2)
        values = values if attention_mask is None else values + attention_mask
        weights: Tensor = values.softmax(-1).to(query.dtype)
        return weights

    return scores
