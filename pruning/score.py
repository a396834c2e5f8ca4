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

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from laptop import processes
from laptop.console import progress
from laptop.errors import BadInput, Unsupported
from laptop.models import loading, locating
from laptop.models.description import context_length, describe
from laptop.parallel_stage import run_together
from laptop.pruning import calibration, noising
from laptop.pruning.calibration import CALIBRATION, Calibration
from laptop.pruning.criteria import CRITERIA, ScoredModel
from laptop.pruning.ledger import Ledger, Race, Values, undecided
from laptop.pruning.sampling_choice import choose_sampling, of_folders, set_scheduler_
from laptop.pruning.sampling_config import Sampling, SamplingConfig
from laptop.pruning.scores import Anatomy, Costs, Forwards, ScoredUnit, Scores, Unit
from laptop.pruning.settings import OF_TASK, PER_ROW, ScoreConfig
from laptop.pruning.units import anatomy_of, forward_rows
from laptop.run import Overwrite
from laptop.unfinished import resume_folder

RACE_BATCHES = 16  # at least; after each one, units whose fate is certain are spared the rest


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
    anatomy = anatomy_of(loading.empty_unet(model), context_length(model), config.granularity)
    described = describe(model)
    if config.timestep_weighting == "x0" or config.criterion in OF_TASK:
        noising.noising(described.scheduler)  # refuses an unknown one
    if not anatomy.units:
        raise Unsupported(f"the U-Net of {model} has no layer left that can be removed.")
    chosen = choose_sampling(model, sampling, steps=config.steps, resolution=config.resolution)
    stated = of_folders(sampling or SamplingConfig(), model).stated
    if config.race is not None and processes.count() > 1:
        raise BadInput("a race runs in one process: each batch decides who goes on to the next.")

    def share(folder: Path) -> None:
        if processes.is_main():
            _record(model, folder / CALIBRATION, config, chosen, prompts)
        processes.wait_for_all()
        _evaluate(model, anatomy, folder, config, chosen, prompts)

    def finish(folder: Path, _: None) -> dict[str, int]:
        ledger = _ledger(folder, anatomy.units, config)  # of all processes
        timesteps = Calibration.read(folder / CALIBRATION).rows["timestep"]
        weights = _row_weights(model, config, timesteps).numpy()
        scores = _scores(model, config, anatomy, ledger, weights)
        replace(scores, sampling=stated).write(folder / "scores.json")
        save_file({"values": ledger.values}, folder / "values.safetensors")
        return {"units": len(anatomy.units)}

    inputs, identity = locating.identity("model", model)
    settings = asdict(config) | identity | {"prompts": list(prompts), "sampling": asdict(chosen)}
    return run_together("score", out, settings, inputs, share, finish, overwrite=overwrite)


def prompts_needed(model: str, config: ScoreConfig, sampling: SamplingConfig) -> int:
    """The number of prompts for the samples: few steps without guidance make few rows of each."""
    chosen = choose_sampling(model, sampling, steps=config.steps)
    return math.ceil(config.samples / (chosen.steps * chosen.rows))


def _evaluate(
    model: str,
    anatomy: Anatomy,
    folder: Path,
    config: ScoreConfig,
    sampling: Sampling,
    prompts: Sequence[str],
) -> None:
    """Evaluate the criterion for the units of this process, by its ledger's missing values."""
    unet = loading.load_unet(model, getattr(torch, config.dtype))
    scored = ScoredModel(
        model=model,
        unet=nn.Module.to(unet, processes.device()),
        anatomy=anatomy,
        calibration=Calibration.read(folder / CALIBRATION, config.batch_size),
        prompts=prompts,
        sampling=sampling,
        seed=config.seed,
        clip_model=config.clip_model,
        folder=folder,
    )
    own, race = processes.own_items(anatomy.units), None
    if config.race is not None:
        race = partial(undecided, anatomy.units, least=config.race * anatomy.params)
    count, size = _rows_and_batch(config)
    with progress("score", len(own) * math.ceil(count / size)) as advance:
        CRITERIA[config.criterion](scored, _ledger(folder, own, config, advance, race))


def _rows_and_batch(config: ScoreConfig) -> tuple[int, int]:
    """Rows that a criterion has a value for, and rows a forward."""
    count, size = (config.samples if config.criterion in PER_ROW else 1), config.batch_size
    return count, size if config.race is None else min(size, max(1, count // RACE_BATCHES))


def _ledger(
    folder: Path,
    units: Sequence[Unit],
    config: ScoreConfig,
    advance: Callable[[], None] = lambda: None,
    race: Race | None = None,
) -> Ledger:
    count, size = _rows_and_batch(config)
    number = processes.rank()
    return Ledger(resume_folder(folder), units, count, size, advance, race, number)


def _row_weights(model: str, config: ScoreConfig, timesteps: Tensor) -> Tensor:
    """The weight of each row in a score (rows,), or one for the whole model; they sum to 1."""
    if config.criterion not in PER_ROW:
        return torch.ones(1)
    weights = torch.ones(len(timesteps))
    if config.timestep_weighting == "x0":
        weights = noising.of_model(model).picture_errors(timesteps)
    return weights / weights.sum()


def _scores(
    model: str, config: ScoreConfig, anatomy: Anatomy, ledger: Ledger, weights: Values
) -> Scores:
    """The scores of all units, from their values on each row."""
    seen = ~np.isnan(ledger.values)
    if not seen.any(1).all():
        raise RuntimeError("a layer has no value, though all processes are done")
    values = (np.nan_to_num(ledger.values) * weights).sum(1) / (seen * weights).sum(1)
    scored = zip(anatomy.units, values.tolist(), strict=True)
    spent = forwards_in_all(anatomy, ledger.values, ledger.batches.values())
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
        base=Costs(params=anatomy.params, macs=anatomy.macs),
        forwards=Forwards(naive=len(_sets(anatomy.units)) + 1, spent=round(spent, 3)),
    )


def forwards_in_all(anatomy: Anatomy, values: Values, batches: Iterable[slice]) -> float:
    """The forwards that scoring cost: a walk of each batch for the units that were not spared."""
    rows, total = values.shape[1], 0.0
    for batch in batches:
        part = values[:, batch]
        units = [u for u, row in zip(anatomy.units, part, strict=True) if not np.isnan(row[0])]
        if units:
            total += part.shape[1] / rows * forwards_spent(anatomy, units)
    return total


def forwards_spent(anatomy: Anatomy, units: Sequence[Unit]) -> float:
    """Forwards of the whole U-Net that one walk for `units` costs, by multiply-accumulates."""
    macs = {u.name: u.macs for u in anatomy.units}
    suffixes = (
        anatomy.macs - min(anatomy.macs_before[n] for n in names) - sum(macs[n] for n in names)
        for names in _sets(units)
    )
    return 1 + sum(suffixes) / anatomy.macs


def _sets(units: Sequence[Unit]) -> set[frozenset[str]]:
    """The sets of layers that are removed to value `units`."""
    sets = {frozenset([u.name, *u.needs]) for u in units}
    return sets | {frozenset(u.needs) for u in units if u.needs}


def _record(
    model: str, path: Path, config: ScoreConfig, sampling: Sampling, prompts: Sequence[str]
) -> None:
    """Write calibration rows and the U-Net's output on them to `path`, unless it exists."""
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
    Calibration(rows, forward_rows(pipe.unet, rows, config.batch_size)).write(path)
