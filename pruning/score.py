"""Score every removable layer: the first stage (paper, section 3.2).

    v_i = E || eps({i}) - eps ||^2

by default: the mean squared change of the U-Net's output when layer i alone is gone, over
calibration samples that are the same for every layer (`criteria` has the others). For a layer that
can go only together with others (a transformer's shell), the change that it makes once those are
gone.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from laptop import processes
from laptop.console import progress
from laptop.errors import BadInput, Unsupported
from laptop.models import loading, locating
from laptop.models.description import context_length, describe
from laptop.pruning import calibration, noising
from laptop.pruning.criteria import CRITERIA, Subject
from laptop.pruning.ledger import Ledger, Race, Values, undecided
from laptop.pruning.sampling_choice import choose_sampling, of_folders, set_scheduler_
from laptop.pruning.sampling_config import Sampling, SamplingConfig
from laptop.pruning.scores import Anatomy, Costs, Forwards, ScoredUnit, Scores, Unit
from laptop.pruning.settings import OF_TASK, PER_ROW, ScoreConfig
from laptop.pruning.units import anatomy, forward_rows
from laptop.run import Overwrite
from laptop.teamwork import run_together
from laptop.unfinished import resume_folder

CALIBRATION = "calibration.safetensors"
RACE_BATCHES = 16  # at least so many looks at what is certain by then


def score(
    model: str,
    out: Path,
    config: ScoreConfig,
    prompts: Sequence[str],
    *,
    sampling: SamplingConfig | None = None,
    overwrite: Overwrite = False,
) -> Path:
    """Write scores.json, calibration.safetensors, and each unit's values in values.safetensors.

    A killed run keeps each unit that it has finished on a batch of rows.
    """
    known = anatomy(loading.empty_unet(model), context_length(model), config.granularity)
    described = describe(model)
    if config.timestep_weighting == "x0" or config.criterion in OF_TASK:
        noising.noising(described.scheduler)  # or it is refused
    if not known.units:
        raise Unsupported(f"the U-Net of {model} has no layer left that can be removed.")
    how = choose_sampling(model, sampling, steps=config.steps, resolution=config.resolution)
    stated = of_folders(sampling or SamplingConfig(), model).stated
    if config.race is not None and processes.count() > 1:
        raise BadInput("a race runs in one process: each batch decides who goes on to the next.")

    def share(folder: Path) -> None:
        if processes.is_main():
            _record(model, folder / CALIBRATION, config, how, prompts)
        processes.wait_for_all()
        _find(model, known, folder, config, how, prompts)

    def finish(folder: Path) -> dict[str, Any]:
        found = _ledger(folder, known.units, config)  # of all processes
        weights = _row_weights(model, config, calibration.load(folder / CALIBRATION)[0]["timestep"])
        scores = _scores(model, config, known, found, weights.numpy())
        replace(scores, sampling=stated).write(folder / "scores.json")
        save_file({"values": found.values}, folder / "values.safetensors")
        return {"units": len(known.units)}

    inputs, which = locating.identity("model", model)
    settings = asdict(config) | which | {"prompts": list(prompts), "sampling": asdict(how)}
    return run_together("score", out, settings, inputs, share, finish, overwrite=overwrite)


def prompts_needed(model: str, config: ScoreConfig, sampling: SamplingConfig) -> int:
    """How many prompts give the samples: few steps without guidance make few rows of each."""
    how = choose_sampling(model, sampling, steps=config.steps)
    return math.ceil(config.samples / (how.steps * how.rows))


def _find(
    model: str,
    known: Anatomy,
    folder: Path,
    config: ScoreConfig,
    sampling: Sampling,
    prompts: Sequence[str],
) -> None:
    """Find this process's share of the values, and wait for the others'."""
    rows, output = calibration.load(folder / CALIBRATION)
    unet = loading.load_unet(model, getattr(torch, config.dtype))
    subject = Subject(
        model=model,
        unet=nn.Module.to(unet, processes.device()),
        known=known,
        rows=rows,
        output=output,
        prompts=prompts,
        sampling=sampling,
        batch_size=config.batch_size,
        seed=config.seed,
        clip_model=config.clip_model,
        folder=folder,
    )
    own, race = processes.share(known.units), None
    if config.race is not None:
        race = partial(undecided, known.units, least=config.race * known.params)
    count, size = _rows_and_batch(config)
    with progress("score", len(own) * math.ceil(count / size)) as advance:
        CRITERIA[config.criterion](subject, _ledger(folder, own, config, advance, race))


def _rows_and_batch(config: ScoreConfig) -> tuple[int, int]:
    """Rows that a criterion has a value for, and rows a forward."""
    count, size = (config.samples if config.criterion in PER_ROW else 1), config.batch_size
    return count, size if config.race is None else min(size, max(1, count // RACE_BATCHES))


def _ledger(
    folder: Path,
    units: Sequence[Unit],
    config: ScoreConfig,
    found: Callable[[], None] = lambda: None,
    race: Race | None = None,
) -> Ledger:
    count, size = _rows_and_batch(config)
    number = processes.number()
    return Ledger(resume_folder(folder), units, count, size, found, race, number)


def _row_weights(model: str, config: ScoreConfig, timesteps: Tensor) -> Tensor:
    """The share of each row in a score (rows,), or one for the whole model; they sum to 1."""
    if config.criterion not in PER_ROW:
        return torch.ones(1)
    weights = torch.ones(len(timesteps))
    if config.timestep_weighting == "x0":
        weights = noising.of_model(model).picture_errors(timesteps)
    return weights / weights.sum()


def _scores(
    model: str, config: ScoreConfig, known: Anatomy, ledger: Ledger, weights: Values
) -> Scores:
    """The scores of all units, from their values on each row."""
    seen = ~np.isnan(ledger.values)
    if not seen.any(1).all():
        raise RuntimeError("a layer has no value, though all processes are done")
    values = (np.nan_to_num(ledger.values) * weights).sum(1) / (seen * weights).sum(1)
    scored = zip(known.units, values.tolist(), strict=True)
    spent = forwards_in_all(known, ledger.values, ledger.batches.values())
    return Scores(
        model=model,
        granularity=config.granularity,
        criterion=config.criterion,
        timestep_weighting=config.timestep_weighting,
        race=config.race,
        samples=config.samples,
        batch_size=config.batch_size,
        dtype=config.dtype,
        seed=config.seed,
        units=tuple(ScoredUnit(**vars(unit), score=score) for unit, score in scored),
        base=Costs(params=known.params, macs=known.macs),
        forwards=Forwards(naive=len(_sets(known.units)) + 1, spent=round(spent, 3)),
    )


def forwards_in_all(known: Anatomy, values: Values, batches: Iterable[slice]) -> float:
    """Forwards of all rows: a walk of each batch for the units that were not spared."""
    rows, total = values.shape[1], 0.0
    for batch in batches:
        part = values[:, batch]
        units = [u for u, row in zip(known.units, part, strict=True) if not np.isnan(row[0])]
        if units:
            total += part.shape[1] / rows * forwards_spent(known, units)
    return total


def forwards_spent(known: Anatomy, units: Sequence[Unit]) -> float:
    """Forwards of the whole U-Net that one walk for `units` costs, by multiply-accumulates."""
    macs = {u.name: u.macs for u in known.units}
    suffixes = (
        known.macs - min(known.macs_before[n] for n in names) - sum(macs[n] for n in names)
        for names in _sets(units)
    )
    return 1 + sum(suffixes) / known.macs


def _sets(units: Sequence[Unit]) -> set[frozenset[str]]:
    """The sets of layers that are removed to value `units`."""
    sets = {frozenset([u.name, *u.needs]) for u in units}
    return sets | {frozenset(u.needs) for u in units if u.needs}


def _record(
    model: str, path: Path, config: ScoreConfig, sampling: Sampling, prompts: Sequence[str]
) -> None:
    """Write calibration rows and the U-Net's output on them to `path`, unless they are there."""
    if path.exists():
        return
    pipe = loading.load_pipeline(model, getattr(torch, config.dtype)).to(processes.device())
    set_scheduler_(pipe, sampling)
    with torch.inference_mode():
        rows = calibration.record(
            pipe,
            prompts,
            sampling,
            samples=config.samples,
            seed=config.seed,
            batch_size=max(1, config.batch_size // sampling.rows),
        )
    output = forward_rows(pipe.unet, rows, config.batch_size)
    beside = path.with_suffix(".tmp")
    calibration.save(beside, rows, output)
    beside.replace(path)
