"""Score every removable layer by output loss: the first stage (paper, section 3.2).

    v_i = E || eps({i}) - eps ||^2

the mean squared change of the U-Net's output when layer i alone is gone, over calibration samples
that are the same for every layer.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laptop import models
from laptop.errors import BadInput
from laptop.pruning import calibration
from laptop.pruning.units import anatomy, forward_rows, removed
from laptop.run import Overwrite, run_stage, track, write_json

SCHEMA = "laptop.scores/1"


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


def score(
    model: str,
    out: Path,
    config: ScoreConfig,
    prompts: Sequence[str],
    *,
    overwrite: Overwrite = False,
) -> Path:
    """Write DIR/scores.json and DIR/calibration.safetensors; a killed run keeps finished units."""
    if (config.granularity, config.criterion) != ("fine", "output-loss"):
        raise BadInput(
            f"granularity {config.granularity!r} with criterion {config.criterion!r} is not in "
            "this version; use 'fine' and 'output-loss'."
        )
    inputs, which = models.identity("model", model)

    def work(folder: Path) -> dict[str, Any]:
        rows, output, unet = _calibrated(model, folder, config, prompts)
        known = anatomy(unet, models.context_length(model))
        done = _scores_so_far(folder / "units.jsonl")
        todo = [u.name for u in known.units if u.name not in done]
        with (folder / "units.jsonl").open("a", encoding="utf-8") as log:
            for name in track(todo, "score", len(known.units), len(done)):
                done[name] = output_loss(unet, [name], rows, output, config.batch_size)
                log.write(json.dumps([name, done[name]]) + "\n")
                log.flush()
        forwards = len(known.units) + 1
        write_json(
            folder / "scores.json",
            {
                "schema": SCHEMA,
                "model": model,
                "granularity": config.granularity,
                "criterion": config.criterion,
                "samples": config.samples,
                "batch_size": config.batch_size,
                "seed": config.seed,
                "units": [asdict(u) | {"score": done[u.name]} for u in known.units],
                "base": {"params": known.params, "macs": known.macs},
                "forwards": {"naive": forwards, "spent": forwards},
            },
        )
        (folder / "units.jsonl").unlink()
        return {"units": len(known.units)}

    settings = asdict(config) | which | {"prompts": list(prompts)}
    return run_stage("score", out, settings, inputs, work, overwrite=overwrite)


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


def _scores_so_far(path: Path) -> dict[str, float]:
    """Finished units of a killed run; a last line that was cut off does not count."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) != len(lines):
        path.write_text("".join(whole), encoding="utf-8")
    return dict(json.loads(line) for line in whole)
