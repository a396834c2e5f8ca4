"""Score every removable layer by output loss: the first stage (paper, section 3.2).

    v_i = E || eps({i}) - eps ||^2

the mean squared change of the U-Net's output when layer i alone is gone, over calibration samples
that are the same for every layer. For a layer that can go only together with others (a
transformer's shell), the change that it makes once those are gone.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from laptop import models
from laptop.errors import BadInput
from laptop.pruning import calibration
from laptop.pruning.prefix import walk
from laptop.pruning.units import Anatomy, Unit, anatomy, forward_rows, removed
from laptop.run import Overwrite, progress, run_stage, write_json

SCHEMA = "laptop.scores/1"
NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ScoreConfig:
    granularity: str = "fine"
    criterion: str = "output-loss"
    samples: int = 64  # calibration rows
    steps: int = 25  # of the sampling that gives the rows
    batch_size: int = 64  # rows a forward
    seed: int = 0


def output_loss(
    unet: nn.Module,
    names: Sequence[str],
    rows: dict[str, Tensor],
    output: Tensor,
    batch_size: int = 64,
) -> float:
    """Mean over samples and elements of (output without `names` - `output`)^2, in float32."""
    with removed(unet, names):
        changed = forward_rows(unet, rows, batch_size)
    return float((changed - output).square().mean())


def output_losses(
    unet: nn.Module,
    units: Iterable[Unit],
    rows: dict[str, Tensor],
    output: Tensor,
    note: Callable[[str, list[float]], None],
) -> None:
    """`note(name, losses)` for each unit: its output loss on each row, all rows in one batch.

    One walk over the U-Net (`prefix`); the units come as they run.
    """
    waiting = {u.name: (frozenset([u.name, *u.needs]), frozenset(u.needs)) for u in units}
    changed = {NOTHING: output}

    def visit(names: frozenset[str], without: Tensor) -> None:
        changed[names] = without
        for unit, (gone, needed) in list(waiting.items()):
            if gone in changed and needed in changed:
                note(unit, (changed[gone] - changed[needed]).square().flatten(1).mean(1).tolist())
                del waiting[unit]
        for names in changed.keys() - {s for pair in waiting.values() for s in pair} - {NOTHING}:
            del changed[names]

    sets = {names for pair in waiting.values() for names in pair} - {NOTHING}
    walk(unet, sets, lambda: forward_rows(unet, rows, len(output)), visit)


def score(
    model: str,
    out: Path,
    config: ScoreConfig,
    prompts: Sequence[str],
    *,
    overwrite: Overwrite = False,
) -> Path:
    """Write scores.json, calibration.safetensors and, for each unit and row, losses.safetensors.

    A killed run keeps each unit that it has finished on a batch of rows.
    """
    if config.criterion != "output-loss":
        raise BadInput(f"criterion {config.criterion!r} is not in this version; use 'output-loss'.")
    known = anatomy(models.empty_unet(model), models.context_length(model), config.granularity)
    inputs, which = models.identity("model", model)

    def work(folder: Path) -> dict[str, Any]:
        rows, output, unet = _calibrated(model, folder, config, prompts)
        losses = _all_losses(unet, known, rows, output, config.batch_size, folder / "losses.jsonl")
        write_json(folder / "scores.json", _document(model, config, known, losses))
        save_file({"losses": losses}, folder / "losses.safetensors")
        (folder / "losses.jsonl").unlink()
        return {"units": len(known.units)}

    settings = asdict(config) | which | {"prompts": list(prompts)}
    return run_stage("score", out, settings, inputs, work, overwrite=overwrite)


def _all_losses(
    unet: nn.Module,
    known: Anatomy,
    rows: dict[str, Tensor],
    output: Tensor,
    batch_size: int,
    log_path: Path,
) -> Tensor:
    """Output loss of each unit on each row (U, N); what stands in the log is not done again."""
    done = _losses_so_far(log_path)
    starts = range(0, len(output), batch_size)
    with (
        log_path.open("a", encoding="utf-8") as log,
        progress("score", len(known.units) * len(starts), len(done)) as advance,
    ):

        def note(name: str, values: list[float]) -> None:
            done[start, name] = values
            log.write(json.dumps([start, name, values]) + "\n")
            log.flush()
            advance()

        for start in starts:
            batch = slice(start, start + batch_size)
            part = {k: v[batch] for k, v in rows.items()}
            todo = [u for u in known.units if (start, u.name) not in done]
            if todo:
                output_losses(unet, todo, part, output[batch], note)
    return torch.tensor([[x for start in starts for x in done[start, u.name]] for u in known.units])


def _document(model: str, config: ScoreConfig, known: Anatomy, losses: Tensor) -> dict[str, Any]:
    """The content of scores.json."""
    scores, spent = losses.double().mean(1).tolist(), forwards_spent(known, known.units)
    return {
        "schema": SCHEMA,
        "model": model,
        "granularity": config.granularity,
        "criterion": config.criterion,
        "samples": config.samples,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "units": [asdict(u) | {"score": v} for u, v in zip(known.units, scores, strict=True)],
        "base": {"params": known.params, "macs": known.macs},
        "forwards": {
            "naive": len(known.units) + 1,
            "spent": round(spent, 3),
        },
    }


def forwards_spent(known: Anatomy, units: Sequence[Unit]) -> float:
    """Forwards of the whole U-Net that one walk for `units` costs, by multiply-accumulates."""
    sets = {frozenset([u.name, *u.needs]) for u in units}
    sets |= {frozenset(u.needs) for u in units if u.needs}
    macs = {u.name: u.macs for u in known.units}
    suffixes = (
        known.macs - min(known.macs_before[n] for n in names) - sum(macs[n] for n in names)
        for names in sets
    )
    return 1 + sum(suffixes) / known.macs


def _calibrated(
    model: str, folder: Path, config: ScoreConfig, prompts: Sequence[str]
) -> tuple[dict[str, Tensor], Tensor, nn.Module]:
    """Rows, the U-Net's output on them, and the U-Net; recorded once a stage."""
    path = folder / "calibration.safetensors"
    if path.exists():
        return *calibration.load(path), models.load_unet(model)
    pipe = models.load_pipeline(model)
    with torch.inference_mode():
        rows = calibration.record(
            pipe,
            prompts,
            samples=config.samples,
            steps=config.steps,
            seed=config.seed,
            batch_size=max(1, config.batch_size // 2),  # guidance doubles it
        )
    output = forward_rows(pipe.unet, rows, config.batch_size)
    beside = path.with_suffix(".tmp")
    calibration.save(beside, rows, output)
    beside.replace(path)
    return rows, output, pipe.unet


def _losses_so_far(path: Path) -> dict[tuple[int, str], list[float]]:
    """What a killed run found, by batch and unit; a line that was cut off does not count."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) != len(lines):
        path.write_text("".join(whole), encoding="utf-8")
    return {(start, name): values for start, name, values in map(json.loads, whole)}
