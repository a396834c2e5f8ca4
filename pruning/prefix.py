"""Exact prefix reuse: what runs before a removed layer is the same with and without it.

The U-Net is walked once. Where a set of layers to remove begins, the walk pauses inside that
layer's call and the U-Net is called again: whatever has finished by then hands back its output
without computing, the removed layers are passed by, and the rest is computed. So each set costs its
suffix only (docs/explanation/design.md), no U-Net's forward is written anew, and the values are
those of plain removal.

The walk keeps weak references: an output that the paused forward no longer holds cannot be needed
after the pause either, and is handed back as NaN, so that a mistake could not pass as a number.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from laptop.models import unet_classes
from laptop.pruning.units import blocks, listed


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
    """What has finished on the main path, and the set that is being left out, if any."""

    def __init__(
        self,
        waiting: set[frozenset[str]],
        forward: Callable[[], Tensor],
        visit: Callable[[frozenset[str], Tensor], None],
    ):
        self.waiting, self.forward, self.visit = waiting, forward, visit
        self.entered: dict[str, Any] = {}  # arguments of what is running
        self.finished: dict[str, Any] = {}  # outputs of what has run
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

    def reroute(self, name: str, module: nn.Module, passed_by: nn.Module | None, keep: bool) -> Any:
        """A forward for `module` that obeys this walk; `keep`: later branches take its output."""
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.removed is None:
                self.entered[name] = args, kwargs
                self.branch(name)
                output = original(*args, **kwargs)
                del self.entered[name]
                if keep:
                    self.finished[name] = _weak(output)
                return output
            if name in self.finished:
                return _strong(self.finished[name])
            args, kwargs = self.entered.get(name, (args, kwargs))  # the pause lies inside it
            layer = passed_by if name in self.removed and passed_by is not None else original
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


def _kept(unet: nn.Module) -> dict[str, Any]:
    """The modules whose outputs a branch takes over: blocks, their layers, transformer blocks.

    Nothing deeper, and no embeddings: there, outputs go at once into sums outside of any module, so
    that what the paused forward holds would not do. They cost little to compute again.
    """
    kept = {"conv_in": unet.get_submodule("conv_in")} | blocks(unet)
    for block_name, block in blocks(unet).items():
        for name, layer in listed(block_name, block):
            kept[name] = layer
            if isinstance(layer, Transformer2DModel):
                kept |= dict(listed(name, layer))
    return kept


def _weak(output: Any) -> Any:
    """`output`, a tensor or nested tuples of tensors, without keeping it alive."""
    if isinstance(output, tuple):
        return tuple(_weak(part) for part in output)
    return weakref.ref(output), output.shape, output.dtype, output.device


def _strong(kept: Any) -> Any:
    """What `_weak` was given; NaN in the place of a tensor that is gone."""
    if not isinstance(kept[0], weakref.ref):
        return tuple(_strong(part) for part in kept)
    reference, shape, dtype, device = kept
    tensor = reference()
    if tensor is None:
        return torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)
    return tensor
