"""The criteria by which layers are valued: the paper's and its rivals, one function each.

Each takes a `ScoredModel` and a `Ledger` and notes a value for every unit that the ledger lacks; a
layer with a small value goes first. The first three give a value for every calibration row.

| criterion | a unit's value | source |
| --- | --- | --- |
| `output-loss` | E of (output without it - output)^2 | LAPTOP-Diff, arXiv 2404.11098 |
| `task-loss` | what its removal adds to the denoising loss | |
| `block-influence` | 1 - cos(residual stream before it, after it) | ShortGPT, arXiv 2403.03853 |
| `magnitude` | E over output neurons of sum abs(W) | BK-SDM, arXiv 2305.15798 |
| `taylor` | E over output neurons of sum abs(dL/dW W), L the denoising loss | BK-SDM |
| `latent-statistics` | change of the final latents' mean and deviation | LD-Pruner, 2404.11936 |
| `clip` | what its removal takes from the CLIP score | BK-SDM |
| `random` | nothing: the control | |
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from laptop import processes
from laptop.errors import BadInput
from laptop.files import reason
from laptop.models import loading, unet_classes
from laptop.models.foreign_code import check_component
from laptop.pruning import calibration
from laptop.pruning.calibration import Calibration
from laptop.pruning.ledger import Ledger
from laptop.pruning.prefix import walk
from laptop.pruning.sampling import draw, starts
from laptop.pruning.sampling_choice import set_scheduler_
from laptop.pruning.sampling_config import Sampling
from laptop.pruning.scores import Anatomy, Unit
from laptop.pruning.units import SUBLAYERS, call, forward_rows, removed

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor

CLIP_FILES = ["*.json", "*.txt", "*.safetensors"]  # of a Hub id
NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ScoredModel:
    """Everything a criterion can read: the model, its calibration, the sampling settings."""

    model: str
    unet: nn.Module
    anatomy: Anatomy
    calibration: Calibration
    prompts: Sequence[str]
    sampling: Sampling
    seed: int
    clip_model: str | None
    folder: Path  # for what should outlive a kill

    @cached_property
    def pipeline(self) -> DiffusionPipeline:
        """The whole model, around the same U-Net."""
        dtype = next(self.unet.parameters()).dtype
        pipe = loading.load_pipeline(self.model, dtype)
        pipe.register_modules(unet=self.unet)
        set_scheduler_(pipe, self.sampling)
        return pipe.to(processes.device())

    def denoising(self) -> Calibration:
        """Noised pictures of the teacher's own as rows, and the outputs that the U-Net learned."""
        path, size = self.folder / "denoising.safetensors", self.calibration.batch_size
        if not path.exists():
            calibration.denoising(
                self.pipeline,
                self.prompts,
                self.sampling,
                samples=len(self.calibration.output),
                seed=self.seed,
                batch_size=size,
            ).write(path)
        return Calibration.read(path, size)


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().flatten(1).mean(1)


def walked(
    unet: nn.Module,
    units: Sequence[Unit],
    rows: Mapping[str, Tensor],
    output: Tensor,
    note: Callable[[str, Tensor, Tensor], None],
) -> None:
    """`note(name, output without what the unit needs, output without the unit too)` for each unit.

    One walk over the U-Net (`prefix`), all rows in one batch; the units come as they run.
    """
    waiting = {u.name: (frozenset(u.needs), frozenset([u.name, *u.needs])) for u in units}
    outputs = {NOTHING: output}

    def visit(gone: frozenset[str], changed: Tensor) -> None:
        _check_finite(unet, gone, rows, changed)
        outputs[gone] = changed
        for unit, (before, after) in list(waiting.items()):
            if before in outputs and after in outputs:
                note(unit, outputs[before], outputs[after])
                del waiting[unit]
        wanted = {NOTHING, *(names for pair in waiting.values() for names in pair)}
        for names in outputs.keys() - wanted:
            del outputs[names]

    sets = {names for pair in waiting.values() for names in pair} - {NOTHING}
    walk(unet, sets, lambda: forward_rows(unet, rows, len(output)), visit)


def _check_finite(
    unet: nn.Module, gone: frozenset[str], rows: Mapping[str, Tensor], output: Tensor
) -> None:
    """Raise unless the output is finite; it is our bug if plain removal gives finite values."""
    if output.isfinite().all():
        return
    with removed(unet, gone):
        plain = forward_rows(unet, rows, len(output))
    if plain.isfinite().all():
        raise RuntimeError(f"prefix reuse went wrong without {', '.join(sorted(gone))}")
    raise BadInput(
        f"without {', '.join(sorted(gone))} the U-Net's output is not finite. Is the model whole? "
        "Try other prompts, or a criterion that removes nothing, such as magnitude."
    )


def by_output_loss(scored: ScoredModel, ledger: Ledger) -> None:
    """Mean squared change of the output, a value a row (LAPTOP-Diff, section 3.2)."""

    def note(start: int, name: str, before: Tensor, after: Tensor) -> None:
        ledger.note(start, name, _mean_square(after - before).tolist())

    for start, index in ledger.batches.items():
        if todo := ledger.todo(start):
            batch = scored.calibration.part(index)
            walked(scored.unet, todo, batch.rows, batch.output, partial(note, start))


def by_task_loss(scored: ScoredModel, ledger: Ledger) -> None:
    """The increase of the denoising loss on the teacher's own pictures, a value a row."""
    samples = scored.denoising()

    def note(start: int, name: str, before: Tensor, after: Tensor) -> None:
        target = samples.output[ledger.batches[start]]
        losses = [_mean_square(_predicted(out, target) - target) for out in (before, after)]
        ledger.note(start, name, (losses[1] - losses[0]).tolist())

    for start, index in ledger.batches.items():
        if todo := ledger.todo(start):
            rows = samples.part(index).rows
            output = forward_rows(scored.unet, rows, len(rows["sample"]))
            walked(scored.unet, todo, rows, output, partial(note, start))


def _predicted(output: Tensor, target: Tensor) -> Tensor:
    """The part of an output (B, C, H, W) that is compared with `target`: no learned variance.

    A learned variance is in the second half of the channels, and has its own loss (2102.09672,
    eq. 16).
    """
    return output[:, : target.shape[1]]


def by_block_influence(scored: ScoredModel, ledger: Ledger) -> None:
    """1 - cos of the residual stream before and after the layer, a value a row (ShortGPT)."""
    for start, index in ledger.batches.items():
        rows, todo = scored.calibration.part(index).rows, ledger.todo(start)
        alone = [u for u in todo if not u.needs]
        for units in [alone, *([u] for u in todo if u.needs)]:
            if units:
                with removed(scored.unet, units[0].needs):
                    influences = _influences(scored.unet, [u.name for u in units], rows)
                for name, values in influences.items():
                    ledger.note(start, name, values)


def _influences(
    unet: nn.Module, names: Sequence[str], rows: Mapping[str, Tensor]
) -> dict[str, list[float]]:
    """1 - cos of the stream before and after each layer (B,), mean over positions."""
    influences: dict[str, list[float]] = {}
    streams: dict[str, Tensor] = {}

    def compare(name: str, before: Tensor, after: Tensor) -> None:
        channels = 1 if after.ndim == 4 else -1  # (B, C, H, W) or (B, T, C)
        cosine = F.cosine_similarity(before.float(), after.float(), dim=channels)
        influences[name] = (1 - cosine).flatten(1).mean(1).tolist()

    def hooks_of(name: str) -> Iterator[RemovableHandle]:
        layer, (block, _, part) = unet.get_submodule(name), name.rpartition(".")
        if part in SUBLAYERS:  # its norm gets the stream, to which its output is added
            norm = unet.get_submodule(f"{block}.{SUBLAYERS[part]}")
            yield norm.register_forward_pre_hook(lambda _, a: streams.update({name: a[0]}))
            yield layer.register_forward_hook(
                lambda _m, _a, out: compare(name, streams[name], streams.pop(name) + out)
            )
        else:
            without = unet_classes.shipped_module().stand_in(layer)
            yield layer.register_forward_hook(
                lambda _, a, kw, out: compare(name, _first(without(*a, **kw)), _first(out)),
                with_kwargs=True,
            )

    hooks = [hook for name in names for hook in hooks_of(name)]
    try:
        forward_rows(unet, rows, len(rows["sample"]))
    finally:
        for hook in hooks:
            hook.remove()
    return influences


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def by_magnitude(scored: ScoredModel, ledger: Ledger) -> None:
    """Mean over output neurons of the sum of absolute weights (BK-SDM's form)."""
    for unit in ledger.todo():
        ledger.note(0, unit.name, [_per_neuron(_weights(scored.unet, unit))])


def by_taylor(scored: ScoredModel, ledger: Ledger) -> None:
    """Mean over output neurons of the sum of abs(gradient x weight) (BK-SDM's form)."""
    samples = scored.denoising()
    unet, trained = scored.unet, [p.requires_grad for p in scored.unet.parameters()]
    unet.requires_grad_(True)
    for batch in samples.batches():
        output = call(unet, batch.rows)
        target = batch.output.to(output.device)
        error = _predicted(output, target) - target
        loss = error.square().mean() * len(error) / len(samples.output)
        loss.backward()  # type: ignore[no-untyped-call]
    for unit in ledger.todo():
        products = [w.grad * w for w in _weights(unet, unit) if w.grad is not None]
        ledger.note(0, unit.name, [_per_neuron(products)])
    for parameter, flag in zip(unet.parameters(), trained, strict=True):
        parameter.grad = None
        parameter.requires_grad_(flag)


def _weights(unet: nn.Module, unit: Unit) -> list[Tensor]:
    """The matrices and kernels (out, in, ...) of a unit, without those of the layers it needs."""
    inside = (f"{unit.name}.conv_shortcut.", *(f"{name}." for name in unit.needs))
    return [
        weight
        for name, weight in unet.named_parameters()
        if name.startswith(f"{unit.name}.") and not name.startswith(inside) and weight.ndim > 1
    ]


def _per_neuron(weights: Sequence[Tensor]) -> float:
    """Mean over output neurons of the sum of absolute values."""
    return float(torch.cat([w.detach().float().abs().flatten(1).sum(1) for w in weights]).mean())


def by_latent_statistics(scored: ScoredModel, ledger: Ledger) -> None:
    """Change of the final latents' mean and deviation, as L2 norms (LD-Pruner)."""
    mean, deviation = _statistics(scored)
    for unit in ledger.todo():
        with removed(scored.unet, [unit.name, *unit.needs]):
            changed = _statistics(scored)
        change = torch.linalg.norm(changed[0] - mean) + torch.linalg.norm(changed[1] - deviation)
        ledger.note(0, unit.name, [float(change)])


def _statistics(scored: ScoredModel) -> tuple[Tensor, Tensor]:
    """Mean and deviation (C,) of the latents of sampled pictures."""
    latents = _sampled(scored, "latent")
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3))


@torch.inference_mode()
def _sampled(scored: ScoredModel, kind: str) -> Tensor:
    """Latents or pictures (N, C, H, W) for all prompts, from the same noise each time."""
    generator = torch.Generator().manual_seed(scored.seed)
    size = max(1, scored.calibration.batch_size // scored.sampling.rows)
    batches = [scored.prompts[i : i + size] for i in range(0, len(scored.prompts), size)]
    pipe, sampling = scored.pipeline, scored.sampling
    begun = starts(pipe, batches, sampling, generator)
    pictures = [
        draw(pipe, batch, sampling, generator, start, kind)
        for batch, start in zip(batches, begun, strict=True)
    ]
    return torch.cat(pictures).float().cpu()


def _clip(source: str) -> "tuple[CLIPModel, CLIPProcessor]":
    """A CLIP model and its processor; `BadInput` where it has no safetensors."""
    from huggingface_hub import snapshot_download
    from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    try:  # by their own classes: an automatic one could run code of the folder
        folder = (
            source
            if Path(source).is_dir()
            else snapshot_download(source, allow_patterns=CLIP_FILES)
        )
        check_component(Path(folder))
        clip = CLIPModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
        pictures = CLIPImageProcessor.from_pretrained(folder)
        tokenizer = CLIPTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as e:
        raise BadInput(
            f"clip_model {source} cannot be loaded ({reason(e)}). Needed is a CLIP model of "
            "transformers with its weights as safetensors; pickles (.bin) are never read."
        ) from None
    return clip.eval(), CLIPProcessor(image_processor=pictures, tokenizer=tokenizer)


def by_clip(scored: ScoredModel, ledger: Ledger) -> None:
    """The decrease of the CLIP score, 100 x the mean cosine of picture and prompt."""
    clip, processor = _clip(str(scored.clip_model))

    def clip_score() -> float:
        pictures = _sampled(scored, "pt").mul(255).round().byte()
        inputs = processor(
            text=list(scored.prompts),
            images=list(pictures),
            return_tensors="pt",
            padding=True,
            truncation=True,
        )
        with torch.inference_mode():
            out = clip(**inputs)
        return 100 * float(F.cosine_similarity(out.image_embeds, out.text_embeds).mean())

    whole = clip_score()
    for unit in ledger.todo():
        with removed(scored.unet, [unit.name, *unit.needs]):
            ledger.note(0, unit.name, [whole - clip_score()])


def by_chance(scored: ScoredModel, ledger: Ledger) -> None:
    """A uniform random number from the seed: the control."""
    values = np.random.default_rng(scored.seed).random(len(scored.anatomy.units))
    for unit, value in zip(scored.anatomy.units, values, strict=True):
        if unit in ledger.todo():
            ledger.note(0, unit.name, [float(value)])


CRITERIA: dict[str, Callable[[ScoredModel, Ledger], None]] = {
    "output-loss": by_output_loss,
    "task-loss": by_task_loss,
    "block-influence": by_block_influence,
    "magnitude": by_magnitude,
    "taylor": by_taylor,
    "latent-statistics": by_latent_statistics,
    "clip": by_clip,
    "random": by_chance,
}
