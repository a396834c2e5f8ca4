"""Make a cache: the VAE and the text encoders see each training example once.

Records are encoded in runs, each into a shard that is renamed when it is whole: finished shards are
kept when the job is killed. A shard's content depends on the seed and on its position in the
source, not on batches or processes; each process encodes some of the source's parts.
"""

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from laptop import processes
from laptop.console import progress, say
from laptop.distill.buckets import Size
from laptop.distill.cache import (
    EMPTY,
    INFO,
    Bucket,
    CacheInfo,
    CachePrecision,
    ShardMetadata,
    encoders,
    size_name,
    widths,
)
from laptop.distill.encoder import STORED, Encoder, Sample
from laptop.distill.settings import DataConfig
from laptop.distill.sources import Broken, Source
from laptop.errors import BadInput
from laptop.files import sha256
from laptop.models import locating
from laptop.parallel_stage import run_together
from laptop.pruning.sampling_choice import choose_sampling
from laptop.pruning.sampling_config import Sampling, SamplingConfig
from laptop.run import Overwrite
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
    drawing = choose_drawing(model, config, sampling)
    settings = {k: v for k, v in asdict(config).items() if k not in ("source", "corrupt_allowed")}
    settings |= {"data": source.identity, "size": [drawing.height, drawing.width]}
    inputs = encoders(model)
    if source.is_drawn:
        files, identity = locating.identity("model", model)
        inputs |= files
        settings |= identity | {"sampling": asdict(drawing)}

    def encode(folder: Path) -> None:
        _encode_own_parts(model, source, folder, config, drawing)

    def finish(folder: Path, _: None) -> dict[str, object]:
        info = _info(model, source, folder, config)
        info.write(folder / INFO)
        return {"samples": info.count}

    return run_together("cache", out, settings, inputs, encode, finish, overwrite=overwrite)


def choose_drawing(
    model: str, config: DataConfig, sampling: SamplingConfig | None = None
) -> Sampling:
    """How pictures are drawn, and their size; `BadInput` for a model that cannot make a cache."""
    locating.need_whole_chain(model, "cache")
    return choose_sampling(model, sampling, steps=config.steps, resolution=config.resolution)


def _encode_own_parts(
    model: str, source: Source, folder: Path, config: DataConfig, sampling: Sampling
) -> None:
    """Encode this process's parts, and wait until the marks of the others' parts exist.

    Parts differ in length, and a process that waits at a barrier is given up after minutes.
    """
    marks = [resume_folder(folder) / f"part-{part:05}" for part in range(len(source.parts))]
    own = [part for part in processes.own_items(range(len(marks))) if not marks[part].exists()]
    if own or (processes.is_main() and not (folder / EMPTY).exists()):
        encoder = Encoder(model, sampling, has_buckets=config.buckets, is_drawn=source.is_drawn)
        if processes.is_main():
            metadata = ShardMetadata(ids={}, skipped=(), precision=encoder.precision)
            _write(folder / EMPTY, encoder.embed_nothing(), metadata)
        broken: list[Broken] = []
        with progress("cache", len(own)) as advance:
            for part in own:
                for skipped in _encode_part(encoder, source, part, folder, config.seed):
                    broken += skipped
                    _check_broken(broken, source, config)
                marks[part].touch()
                advance()
    while not all(mark.exists() for mark in marks):
        time.sleep(0.2)


def _encode_part(
    encoder: Encoder, source: Source, part: int, folder: Path, seed: int
) -> Iterator[list[Broken]]:
    """Write the shards of a part that do not exist yet; give the records that each shard skips."""
    records = source.read(part)
    for run in itertools.count():
        path = folder / f"{part:05}-{run:05}.safetensors"
        batch = list(itertools.islice(records, RUN))
        if not batch:
            return
        if not path.exists():
            sequence = np.random.SeedSequence([seed, part, run])
            seeds = sequence.generate_state(len(batch), np.uint64).tolist()
            _write(path, *_shard(encoder, *encoder.encode(batch, seeds)))
        yield [Broken(*pair) for pair in ShardMetadata.of_shard(path).skipped]


def _shard(
    encoder: Encoder, samples: Mapping[Size, Sequence[Sample]], broken: Sequence[Broken]
) -> tuple[dict[str, Tensor], ShardMetadata]:
    """The tensors and metadata of a shard, see `cache`."""
    captions = dict.fromkeys(s.caption for bucket in samples.values() for s in bucket)
    row = {caption: i for i, caption in enumerate(captions)}
    tensors = encoder.embed(list(captions)) if captions else {}
    ids = {}
    for size, bucket in samples.items():
        name = size_name(size)
        ids[name] = tuple(sample.id for sample in bucket)
        tensors[f"latents.{name}"] = torch.stack([sample.latents for sample in bucket])
        tensors[f"caption.{name}"] = torch.tensor([row[sample.caption] for sample in bucket])
        if "pooled" in tensors:
            tensors[f"time_ids.{name}"] = torch.stack([sample.time_ids for sample in bucket])
    return tensors, ShardMetadata(ids=ids, skipped=tuple((b.id, b.reason) for b in broken))


def _write(path: Path, tensors: dict[str, Tensor], metadata: ShardMetadata) -> None:
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, {"laptop": json.dumps(metadata.as_json())})
    temporary.replace(path)


def _check_broken(broken: Sequence[Broken], source: Source, config: DataConfig) -> None:
    if len(broken) > config.corrupt_allowed:
        raise BadInput(
            f"{source.name}: {len(broken)} records cannot be used, corrupt_allowed is "
            f"{config.corrupt_allowed}: {named(broken)}. Mend them, or raise corrupt_allowed in "
            "the recipe's [data]; the same command then goes on."
        )


def named(broken: Sequence[Broken]) -> str:
    """Name the first few records, with reasons."""
    first = "; ".join(f"{b.id}: {b.reason}" for b in broken[:NAMED])
    return first + f"; and {len(broken) - NAMED} more" * (len(broken) > NAMED)


def _info(model: str, source: Source, folder: Path, config: DataConfig) -> CacheInfo:
    """The record of a cache whose shards are all written."""
    shards = sorted(path.name for path in folder.glob("*-*.safetensors"))
    metadata = [ShardMetadata.of_shard(folder / name) for name in shards]
    broken = [Broken(*pair) for shard in metadata for pair in shard.skipped]
    _check_broken(broken, source, config)
    if broken:
        say(f"cache: {len(broken)} records were skipped: {named(broken)}")
    counts: Counter[str] = Counter()
    for shard in metadata:
        counts.update({size: len(ids) for size, ids in shard.ids.items()})
    if not counts:
        raise BadInput(f"{source.name} holds nothing to train on.")
    sizes = sorted(tuple(map(int, name.split("x"))) for name in counts)
    return CacheInfo(
        model=model,
        encoders={name: sha256(path) for name, path in encoders(model).items()},
        widths=widths(model),
        source=source.name,
        data=source.identity,
        config=asdict(config),
        count=counts.total(),
        buckets=tuple(Bucket(height=h, width=w, count=counts[size_name((h, w))]) for h, w in sizes),
        skipped=tuple(broken),
        precision=CachePrecision(
            computed=ShardMetadata.of_shard(folder / EMPTY).precision,
            stored=str(STORED).removeprefix("torch."),
        ),
        shards=tuple(shards),
    )
