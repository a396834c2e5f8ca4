"""Make a cache: the VAE and the text encoders see each training example once.

Work is done in runs of records, a shard for each, written beside and renamed: what is finished is
kept when the job is killed. What a shard holds depends on the seed and on its place in the source,
not on batches or processes; these share out the source's parts.
"""

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from laptop import processes
from laptop.console import progress, say
from laptop.distill import cache
from laptop.distill.buckets import Size
from laptop.distill.encoder import STORED, Encoder, Sample
from laptop.distill.settings import DataConfig
from laptop.distill.sources import Broken, Source
from laptop.errors import BadInput
from laptop.files import sha256, write_json
from laptop.models import locating
from laptop.pruning.sampling_choice import choose_sampling
from laptop.pruning.sampling_config import Sampling, SamplingConfig
from laptop.run import Overwrite
from laptop.teamwork import run_together
from laptop.unfinished import resume_folder

RUN = 256  # records of a shard
NAMED = 10  # skipped records that a message names


def make_cache(
    model: str,
    source: Source,
    out: Path,
    config: DataConfig,
    *,
    sampling: SamplingConfig | None = None,
    overwrite: Overwrite = False,
) -> Path:
    """Encode all examples of `source` for `model` and its students into the folder `out`."""
    how = check_config(model, config, sampling)
    settings = {k: v for k, v in asdict(config).items() if k not in ("source", "corrupt_allowed")}
    settings |= {"data": source.identity, "size": [how.height, how.width]}
    inputs = cache.encoders(model)
    if source.is_drawn:
        files, which = locating.identity("model", model)
        inputs |= files
        settings |= which | {"sampling": asdict(how)}

    def finish(folder: Path) -> dict[str, Any]:
        info = _info(model, source, folder, config)
        write_json(folder / cache.INFO, info)
        return {"samples": info["count"]}

    return run_together(
        "cache",
        out,
        settings,
        inputs,
        lambda folder: _encode_share(model, source, folder, config, how),
        finish,
        overwrite=overwrite,
    )


def check_config(
    model: str, config: DataConfig, sampling: SamplingConfig | None = None
) -> Sampling:
    """How pictures are drawn, and their size; `BadInput` for what nothing can be cached with."""
    locating.need_whole_chain(model, "cache")
    return choose_sampling(model, sampling, steps=config.steps, resolution=config.resolution)


def _encode_share(
    model: str, source: Source, folder: Path, config: DataConfig, sampling: Sampling
) -> None:
    """Encode this process's parts, and wait until the marks of the others' are there.

    At a mere barrier the others would be given up after minutes; shares are of unlike length.
    """
    marks = [resume_folder(folder) / f"part-{part:05}" for part in range(len(source.parts))]
    own = [part for part in processes.share(range(len(marks))) if not marks[part].exists()]
    if own or (processes.is_main() and not (folder / cache.EMPTY).exists()):
        encoder = Encoder(
            model,
            sampling,
            has_buckets=config.buckets,
            is_drawn=source.is_drawn,
        )
        if processes.is_main():
            facts = {"ids": {}, "skipped": [], "precision": encoder.precision}
            _write(folder / cache.EMPTY, encoder.embed_nothing(), facts)
        broken: list[Broken] = []
        with progress("cache", len(own)) as advance:
            for part in own:
                for found in _encode_part(encoder, source, part, folder, config.seed):
                    broken += found
                    _check_broken(broken, source, config)
                marks[part].touch()
                advance()
    while not all(mark.exists() for mark in marks):
        time.sleep(0.2)


def _encode_part(
    encoder: Encoder, source: Source, part: int, folder: Path, seed: int
) -> Iterator[list[Broken]]:
    """Write the shards of a part, but for those that are there; gives what each one skips."""
    records = source.read(part)
    for run in itertools.count():
        path = folder / f"{part:05}-{run:05}.safetensors"
        some = list(itertools.islice(records, RUN))
        if not some:
            return
        if not path.exists():
            sequence = np.random.SeedSequence([seed, part, run])
            seeds = sequence.generate_state(len(some), np.uint64).tolist()
            _write(path, *_shard(encoder, *encoder.encode(some, seeds)))
        yield [Broken(*pair) for pair in cache.metadata(path)["skipped"]]


def _shard(
    encoder: Encoder, samples: Mapping[Size, Sequence[Sample]], broken: Sequence[Broken]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a shard, see `cache`."""
    captions = dict.fromkeys(sample.caption for some in samples.values() for sample in some)
    row = {caption: i for i, caption in enumerate(captions)}
    tensors = encoder.embed(list(captions)) if captions else {}
    for size, some in samples.items():
        name = cache.size_name(size)
        tensors[f"latents.{name}"] = torch.stack([sample.latents for sample in some])
        tensors[f"caption.{name}"] = torch.tensor([row[sample.caption] for sample in some])
        if "pooled" in tensors:
            tensors[f"time_ids.{name}"] = torch.stack([sample.time_ids for sample in some])
    ids = {cache.size_name(size): [sample.id for sample in some] for size, some in samples.items()}
    return tensors, {"ids": ids, "skipped": [(b.id, b.reason) for b in broken]}


def _write(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, Any]) -> None:
    beside = path.with_suffix(".tmp")
    save_file(tensors, beside, {"laptop": json.dumps(metadata)})
    beside.replace(path)


def _check_broken(broken: Sequence[Broken], source: Source, config: DataConfig) -> None:
    if len(broken) > config.corrupt_allowed:
        raise BadInput(
            f"{source.name}: {len(broken)} records cannot be used, corrupt_allowed is "
            f"{config.corrupt_allowed}: {named(broken)}. Mend them, or raise corrupt_allowed in "
            "the recipe's [data]; the same command then goes on."
        )


def named(broken: Sequence[Broken]) -> str:
    """The first few records, with reasons."""
    first = "; ".join(f"{b.id}: {b.reason}" for b in broken[:NAMED])
    return first + f"; and {len(broken) - NAMED} more" * (len(broken) > NAMED)


def _info(model: str, source: Source, folder: Path, config: DataConfig) -> dict[str, Any]:
    """The content of cache.json."""
    shards = sorted(path.name for path in folder.glob("*-*.safetensors"))
    facts = [cache.metadata(folder / name) for name in shards]
    broken = [Broken(*pair) for found in facts for pair in found["skipped"]]
    _check_broken(broken, source, config)
    if broken:
        say(f"cache: {len(broken)} records were skipped: {named(broken)}")
    counts: Counter[str] = Counter()
    for found in facts:
        counts.update({size: len(ids) for size, ids in found["ids"].items()})
    if not counts:
        raise BadInput(f"{source.name} holds nothing to train on.")
    sizes = sorted(tuple(map(int, name.split("x"))) for name in counts)
    return {
        "schema": cache.SCHEMA,
        "model": model,
        "encoders": {name: sha256(path) for name, path in cache.encoders(model).items()},
        "widths": cache.widths(model),
        "source": source.name,
        "data": source.identity,
        "config": asdict(config),
        "count": counts.total(),
        "buckets": [
            {"height": h, "width": w, "count": counts[cache.size_name((h, w))]} for h, w in sizes
        ],
        "skipped": [asdict(b) for b in broken],
        "precision": {
            "computed": cache.metadata(folder / cache.EMPTY)["precision"],
            "stored": str(STORED).removeprefix("torch."),
        },
        "shards": shards,
    }
