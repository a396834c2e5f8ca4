"""Healing without training: a removed layer leaves a closed-form map of its channels.

Our addition to the method (closed-form stand-ins are known from depth pruning of language
models, arXiv 2407.16286). Layer by layer, in running order, with all layers removed and those
before already healed in the student: x is the residual stream there, y the teacher's stream at the
same layer, on the same calibration rows. Least squares give y = x + scale x + shift by channel. A
local fit need not help the output, so a correction stays only if the joint output loss falls, and
they all stay only if it falls on rows that nothing was fitted to.

Where a linear layer is right next to a correction, it is folded into it: the `conv_shortcut` of
a removed resnet, or the `proj_out` of a transformer whose last blocks are gone. The student shares
the teacher's weights all along.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import ModelMixin
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from laptop.console import say, track
from laptop.errors import BadInput
from laptop.pruning.calibration import Calibration
from laptop.pruning.expressible import without
from laptop.pruning.units import SUBLAYERS, listed

HEALING = ("unhealed_loss", "healed_loss", "corrections", "folded")  # facts of the manifest
RIDGE = 1e-6  # of the mean square of x; a channel without variance is shifted only
HELD_OUT = 4  # each fourth row: they are sorted by time step, so the last quarter would be of few


@dataclass(frozen=True)
class Correction:
    """A correction of the stream x, which becomes x + scale x + shift; by channel (C,)."""

    scale: Tensor
    shift: Tensor


def check_samples(unet: ModelMixin, samples: Calibration, where: str) -> None:
    """Raise `BadInput` unless the samples fit `unet`, which may be empty, and are enough."""
    samples.check_shapes(unet, where)
    if len(samples.output) < HELD_OUT:
        raise BadInput(
            f"{where} has {len(samples.output)} rows; healing needs {HELD_OUT} or more. Score with "
            f"--samples {HELD_OUT} at least."
        )


def fit(
    unet: ModelMixin, names: Sequence[str], samples: Calibration
) -> tuple[dict[str, Correction], dict[str, float]]:
    """Corrections by layer for `unet` without the layers `names`, and facts of how they do.

    `names` come in the order in which they run, as in a plan. The facts (`HEALING`): the joint
    output loss on held-out rows without and with healing, the number of corrections, which is 0
    where that loss does not fall, and how many of them fold.
    """
    held_out = torch.arange(len(samples.output)) % HELD_OUT == HELD_OUT - 1
    learning, judging = samples.part(~held_out), samples.part(held_out)
    layers = corrected_layers(unet, names)
    student = with_corrections(unet, names, _nothing(unet, names, layers))
    unhealed, best = judging.loss(student), learning.loss(student)
    corrections: dict[str, Correction] = {}
    for name in track(layers, "heal", len(layers)):
        correction = _regressed(unet, student, name, learning)
        before = _exchange_(student, name, correction)
        if (loss := learning.loss(student)) < best:
            best, corrections[name] = loss, correction
        else:
            _exchange_(student, name, before)
    healed = judging.loss(student)
    losses = f"output loss on held-out rows {unhealed:.3e}, with it {healed:.3e}"
    if healed < unhealed:
        say(f"healing at {len(corrections)} layers: {losses}")
    else:
        say(f"healing is given up: {losses}")
        corrections, healed = {}, unhealed
    folded = len(corrections) - len(fold(unet, names, corrections)[1])
    facts = (unhealed, healed, len(corrections), folded)
    return corrections, dict(zip(HEALING, facts, strict=True))


def corrected_layers(unet: nn.Module, names: Sequence[str]) -> list[str]:
    """The layers of `names` that get a correction: of neighbours in a transformer, the last."""
    gone = set(names)
    inner = {n for n in names if any(n.startswith(f"{other}.") for other in gone)}
    followed = {
        step
        for path, module in unet.named_modules()
        if isinstance(module, Transformer2DModel)
        for step, following in pairwise(_steps(path, module, gone))
        if {step, following} <= gone
    }
    return [n for n in names if n not in inner | followed]


def _steps(path: str, transformer: nn.Module, gone: Set[str]) -> list[str]:
    """The steps inside a transformer: removed blocks, and the sublayers of the others.

    What was removed before and not healed (its `scale` is None) does nothing and is left out.
    """
    steps = []
    for name, block in listed(path, transformer):
        parts = {f"{name}.{part}": getattr(block, part, None) for part in SUBLAYERS}
        whole = name in gone or not any(parts.values())
        steps += [
            step
            for step, module in ({name: block} if whole else parts).items()
            if module is not None and getattr(module, "scale", module) is not None
        ]
    return steps


def with_corrections(
    unet: ModelMixin, names: Sequence[str], corrections: Mapping[str, Correction]
) -> ModelMixin:
    """`unet` without `names`, in the shipped class, with the corrections in its stand-ins.

    It shares the surviving weights with `unet`.
    """
    student = without(unet, names, list(corrections))
    weights = unet.state_dict() | {
        f"{name}.{key}": value.to(unet.dtype)
        for name, correction in corrections.items()
        for key, value in vars(correction).items()
    }
    student.load_state_dict({k: weights[k] for k in student.state_dict()}, assign=True)
    return student.train(unet.training)


def _nothing(
    unet: ModelMixin, names: Sequence[str], layers: Sequence[str]
) -> dict[str, Correction]:
    """Corrections that change nothing."""
    empty = without(unet, names, layers)
    widths = {name: empty.get_submodule(name).scale.shape for name in layers}
    return {n: Correction(torch.zeros(w), torch.zeros(w)) for n, w in widths.items()}


def _exchange_(student: nn.Module, name: str, correction: Correction) -> Correction:
    """Put the correction into the stand-in at `name`; returns the one before it."""
    scale, shift = (student.get_parameter(f"{name}.{key}") for key in ("scale", "shift"))
    before = Correction(scale.detach().clone(), shift.detach().clone())
    with torch.no_grad():
        scale.copy_(correction.scale)
        shift.copy_(correction.shift)
    return before


def _regressed(unet: nn.Module, student: nn.Module, name: str, samples: Calibration) -> Correction:
    """The least squares of the teacher's stream after the layer `name`, given the student's.

    Sums over samples and positions in float64, batch by batch.
    """
    sums, count = torch.zeros(()), 0
    for batch in samples.batches():
        x = _stream(student, name, batch)  # (N, C)
        d = _stream(unet, name, batch) - x
        sums = sums + torch.stack([x.sum(0), d.sum(0), (x * x).sum(0), (x * d).sum(0)])
        count += len(x)
    x, d, xx, xd = sums / count  # means (C,)
    ridge = RIDGE * xx.mean() + torch.finfo(xx.dtype).tiny
    scale = (xd - x * d) / ((xx - x * x).clamp(min=0) + ridge)
    return Correction(scale, d - scale * x)


class _Reached(Exception):
    """Ends a forward once the stream after a layer has been computed."""


def _stream(unet: nn.Module, name: str, batch: Calibration) -> Tensor:
    """The residual stream right after a layer or its stand-in (N, C): all samples, all positions.

    What follows the layer is not computed. A sublayer's output is added to what its norm is given.
    """
    block, _, part = name.rpartition(".")
    parts: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        parts.append(output if isinstance(output, Tensor) else output[0])
        raise _Reached

    hooks = [unet.get_submodule(name).register_forward_hook(keep)]
    if part in SUBLAYERS:
        norm = unet.get_submodule(f"{block}.{SUBLAYERS[part]}")
        hooks.append(norm.register_forward_pre_hook(lambda _, args: parts.append(args[0])))
    try:
        batch.forward(unet)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    stream = torch.stack(parts).double().sum(0)
    channels_last = stream.movedim(1, -1) if stream.ndim == 4 else stream
    return channels_last.flatten(0, -2)


def fold(
    unet: nn.Module, names: Sequence[str], corrections: Mapping[str, Correction]
) -> tuple[dict[str, Tensor], dict[str, Correction]]:
    """New weights by name, which hold all corrections that can be folded; and the other ones.

    A conv_shortcut (out, in, 1, 1) is followed by its correction, a proj_out preceded.
    """
    weights = unet.state_dict()
    last = {
        steps[-1]: f"{path}.proj_out"
        for path, module in unet.named_modules()
        if isinstance(module, Transformer2DModel)
        if (steps := _steps(path, module, set(names)))
    }
    new: dict[str, Tensor] = {}
    left: dict[str, Correction] = {}
    for name, correction in corrections.items():
        is_last, factor = name in last, 1 + correction.scale.double()
        path = last.get(name, f"{name}.conv_shortcut")
        if f"{path}.bias" not in weights:
            left[name] = correction
            continue
        weight, bias = (weights[f"{path}.{k}"].double() for k in ("weight", "bias"))
        rest = (1,) * (weight.ndim - 2)
        if is_last:
            bias = bias + weight.flatten(1) @ correction.shift.double()
            weight = weight * factor.view(1, -1, *rest)
        else:
            bias = bias * factor + correction.shift.double()
            weight = weight * factor.view(-1, 1, *rest)
        new |= {f"{path}.weight": weight, f"{path}.bias": bias}
    return {k: v.to(weights[k].dtype) for k, v in new.items()}, left
