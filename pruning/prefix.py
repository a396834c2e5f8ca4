"""Exact prefix reuse: whatever runs before a removed layer is the same with and without it.

The U-Net is walked once. Where a set of layers to remove begins, the walk pauses inside that
layer's call and the U-Net is called again: whatever has finished by then hands back its output
without computing, the removed layers are passed by, and the rest is computed. So each set costs its
suffix only (docs/explanation/design.md), no U-Net's forward is rewritten, and the values are
equal to plain removal.

The walk keeps weak references: an output that the paused forward no longer holds cannot be needed
after the pause either, and is handed back as NaN, so that a mistake could not pass as a number.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from laptop.models import unet_classes
from laptop.pruning.units import blocks, listed

Output = Tensor | tuple["Output", ...]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a module's call


@dataclass(frozen=True)
class _WeakTensor:
    """A tensor that may be freed."""

    reference: weakref.ref[Tensor]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


Weak = _WeakTensor | tuple["Weak", ...]


def walk(
    unet: nn.Module,
    sets: Iterable[frozenset[str]],
    forward: Callable[[], Tensor],
    visit: Callable[[frozenset[str], Tensor], None],
) -> Tensor:
    """`forward()`'s output; on the way, for each set of layers, `visit(set, output without them)`.

    `forward` calls `unet` once, with the same inputs each time. The sets, none of them empty, are
    visited in the order in which their first layers run. Memory: the live activations of one more
    forward.
    """
    state = _Walk(set(sets), forward, visit)
    with _rerouted(unet, state):
        return forward()


class _Walk:
    """The state of a walk: finished modules, and the set that is being left out, if any."""

    def __init__(
        self,
        waiting: set[frozenset[str]],
        forward: Callable[[], Tensor],
        visit: Callable[[frozenset[str], Tensor], None],
    ):
        self.waiting, self.forward, self.visit = waiting, forward, visit
        self.entered: dict[str, Arguments] = {}  # arguments of running modules
        self.finished: dict[str, Weak] = {}  # outputs of finished modules
        self.removed: frozenset[str] | None = None

    def branch(self, name: str) -> None:
        """Visit every set that begins with the layer `name`, which is about to run."""
        begins = {names for names in self.waiting if name in names}
        self.waiting -= begins
        for names in begins:
            self.removed = names
            try:
                output = self.forward()
            finally:
                self.removed = None
            self.visit(names, output)

    def reroute(
        self, name: str, module: nn.Module, passed_by: nn.Module | None, keep: bool
    ) -> Callable[..., Output]:
        """A forward for `module` that obeys this walk; `keep`: later branches take its output."""
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Output:
            if self.removed is None:
                self.entered[name] = args, kwargs
                self.branch(name)
                output: Output = original(*args, **kwargs)
                del self.entered[name]
                if keep:
                    self.finished[name] = _weak(output)
                return output
            if name in self.finished:
                return _strong(self.finished[name])
            args, kwargs = self.entered.get(name, (args, kwargs))  # the pause is inside it
            layer: Callable[..., Output] = original
            if name in self.removed and passed_by is not None:
                layer = passed_by
            return layer(*args, **kwargs)

        return forward


@contextmanager
def _rerouted(unet: nn.Module, state: _Walk) -> Iterator[None]:
    stand_in = unet_classes.shipped_module().stand_in
    targets = {name: unet.get_submodule(name) for name in set().union(*state.waiting)}
    kept = _kept(unet)
    rerouted = kept | targets
    own = {m: vars(m)["forward"] for m in rerouted.values() if "forward" in vars(m)}
    try:
        for name, module in rerouted.items():
            passed_by = stand_in(module) if name in targets else None
            module.forward = state.reroute(name, module, passed_by, name in kept)
        yield
    finally:
        for module in rerouted.values():
            vars(module).pop("forward", None)
            vars(module).update({"forward": own[module]} if module in own else {})


def _kept(unet: nn.Module) -> dict[str, nn.Module]:
    """The modules whose outputs a branch takes over: blocks, their layers, transformer blocks.

    Nothing deeper, and no embeddings: these outputs go at once into sums outside of any module, so
    that the paused forward no longer holds them. They cost little to compute again.
    """
    kept = {"conv_in": unet.get_submodule("conv_in")} | blocks(unet)
    for block_name, block in blocks(unet).items():
        for name, layer in listed(block_name, block):
            kept[name] = layer
            if isinstance(layer, Transformer2DModel):
                kept |= dict(listed(name, layer))
    return kept


def _weak(output: Output) -> Weak:
    """`output`, a tensor or nested tuples of tensors, without keeping it alive."""
    if isinstance(output, tuple):
        return tuple(_weak(part) for part in output)
    return _WeakTensor(weakref.ref(output), output.shape, output.dtype, output.device)


def _strong(kept: Weak) -> Output:
    """The output that `_weak` took; NaN in the place of a tensor that is gone."""
    if not isinstance(kept, _WeakTensor):
        return tuple(_strong(part) for part in kept)
    if (tensor := kept.reference()) is not None:
        return tensor
    return torch.full((), torch.nan, dtype=kept.dtype, device=kept.device).expand(kept.shape)
