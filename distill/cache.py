"""Training data as training reads them: latents and text embeddings, computed once.

A cache is a folder (`encoding.make_cache` writes it): numbered shards of safetensors, each with the
samples of a run of records, the empty caption's embeddings, and `cache.json`. Shards are mapped
into memory, not read: a cache may be larger than that. In a shard, for each size of latents:

    latents.HxW (n, C, H, W)   caption.HxW (n,) row in states   time_ids.HxW (n, 6), SDXL only

and for all of them `states` (m, tokens, width) and, SDXL only, `pooled` (m, width): one row for
each different caption. The metadata hold the samples' ids and what was skipped.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from laptop.distill.buckets import Size
from laptop.distill.sources import Broken
from laptop.errors import BadInput
from laptop.fields import Name, Range
from laptop.files import exists, inside, open_file, reason, sha256, shown
from laptop.models import locating
from laptop.models.shapes import pooled_width, text_width
from laptop.records import Record, built

INFO = "cache.json"
AGAIN = "Make the cache again."
EMPTY = "empty.safetensors"  # embeddings of the empty caption
ENCODERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
Array = NDArray[np.generic]


def size_name(size: Size) -> str:
    """A size as the tensors of a shard are called: `64x64`, height first."""
    return f"{size[0]}x{size[1]}"


@dataclass(frozen=True, kw_only=True)
class Bucket(Record):
    """How many samples have latents of a size."""

    LEFT_OUT = frozenset({"count"})

    height: Annotated[int, Range(1, 8192)]
    width: Annotated[int, Range(1, 8192)]
    count: Annotated[int, Range(0)] | None = None

    @property
    def size(self) -> Size:
        """Height and width."""
        return self.height, self.width


@dataclass(frozen=True, kw_only=True)
class CachePrecision(Record):
    """Data types by their names in torch."""

    computed: Name | None = None  # by the networks
    stored: Name | None = None


@dataclass(frozen=True, kw_only=True)
class CacheInfo(Record):
    """A cache.json: the sources of a cache of training data, and its content."""

    SCHEMA = "laptop.cache/1"
    REMEDY = AGAIN

    model: Name  # whose VAE and text encoders made it
    encoders: Mapping[str, str]  # sha256 of each component's folder
    widths: Mapping[str, Annotated[int, Range(1)] | None]  # that the U-Net must take, by name
    source: str | None = None  # the training data, as --data names it
    data: Mapping[str, str] | None = None  # the source's identity
    config: Mapping[str, object] | None = None  # the settings [data]
    count: Annotated[int, Range(1)]  # samples
    buckets: tuple[Bucket, ...]  # by the size of latents
    skipped: tuple[Broken, ...] = ()  # records of the data
    precision: CachePrecision | None = None
    shards: tuple[Name, ...]  # files

    @classmethod
    def of_folder(cls, folder: Path) -> "CacheInfo":
        """The cache.json of a cache; `BadInput` also where shards are missing or named twice."""
        info = cls.read(folder / INFO)
        if not info.shards or len({*info.shards}) < len(info.shards):
            raise BadInput(f"{folder / INFO} names no shard, or one twice. {AGAIN}")
        return info


@dataclass(frozen=True, kw_only=True)
class ShardMetadata(Record):
    """What a shard's header says of its samples."""

    LEFT_OUT = frozenset({"precision"})

    ids: Mapping[str, tuple[str, ...]]  # by the name of their size
    skipped: tuple[tuple[str, str], ...]  # id and reason
    precision: Name | None = None  # in which the empty caption was computed; in its file only

    @classmethod
    def of_shard(cls, path: Path) -> "ShardMetadata":
        """The metadata of a shard."""
        open_file(path).close()  # a pipe would never end
        try:
            with safe_open(path, framework="np") as file:
                content = json.loads((file.metadata() or {}).get("laptop", "null"))
        except (OSError, SafetensorError, ValueError, RecursionError) as e:
            raise BadInput(f"{path} cannot be read ({reason(e)}). {AGAIN}") from None
        return built(content, cls, str(path), AGAIN)


@dataclass(frozen=True)
class _Shard:
    tensors: Mapping[str, Array]  # of the file, mapped
    ids: Mapping[str, Sequence[str]]  # of the samples, by the size's name


class CachedSamples(NamedTuple):
    """Some samples of one bucket, in float32 on the CPU."""

    latents: Tensor  # (B, C, h, w)
    conditions: dict[str, Tensor]  # (B, ...) each, as the U-Net takes them


class Cache:
    """Random access to all samples; `BadInput` when files are missing or cut off."""

    def __init__(self, folder: Path):
        self.info = CacheInfo.of_folder(folder)
        self._empty = _open(folder / EMPTY).tensors
        has_pooled = self.info.widths.get("pooled text embeddings") is not None
        for name in ("states", *(["pooled"] if has_pooled else [])):
            if name not in self._empty:
                raise BadInput(f"{folder / EMPTY} holds no {name}. {AGAIN}")
        paths = [inside(folder, name, str(folder / INFO)) for name in self.info.shards]
        self._shards = [_open(path) for path in paths]
        channels = self.info.widths.get("latents")
        for path, shard in zip(paths, self._shards, strict=True):
            _check_shard(shard, self._empty, channels, str(path))
        self._sizes = [bucket.size for bucket in self.info.buckets]
        positions = [
            (number, size, row)
            for number, shard in enumerate(self._shards)
            for size, name in enumerate(map(size_name, self._sizes))
            for row in range(len(shard.ids.get(name, ())))
        ]
        if len(positions) != self.info.count or not positions:
            raise BadInput(
                f"{folder} holds {len(positions)} samples, its {INFO} says {self.info.count}. "
                f"{AGAIN}"
            )
        # (samples, 3): shard, size, and the row among the shard's samples of that size
        self._positions = np.array(positions, dtype=np.int64)
        self.ids: Sequence[str] = [
            self._shards[shard].ids[size_name(self._sizes[size])][row]
            for shard, size, row in positions
        ]
        self.buckets: dict[Size, Tensor] = {
            size: torch.from_numpy(np.flatnonzero(self._positions[:, 1] == i))
            for i, size in enumerate(self._sizes)
        }

    def __len__(self) -> int:
        return len(self.ids)

    def samples(self, index: Tensor, keep: Tensor) -> CachedSamples:
        """The samples `index` (B,), which must be of one bucket.

        Conditions are `encoder_hidden_states` (B, tokens, width) and, for SDXL, `text_embeds`
        (B, width) and `time_ids` (B, 6); of the empty caption where not `keep` (B,).
        """
        positions = self._positions[index.numpy()]
        if (positions[:, 1] != positions[0, 1]).any():
            raise ValueError("samples of several buckets do not make one batch")
        name = size_name(self._sizes[positions[0, 1]])
        rows = [(self._shards[shard].tensors, i) for shard, i in positions[:, [0, 2]].tolist()]
        captions = [
            (tensors, int(tensors[f"caption.{name}"][i])) if is_kept else (self._empty, 0)
            for (tensors, i), is_kept in zip(rows, keep.tolist(), strict=True)
        ]
        conditions = {"encoder_hidden_states": _stack([t["states"][i] for t, i in captions])}
        if "pooled" in self._empty:
            conditions["text_embeds"] = _stack([t["pooled"][i] for t, i in captions])
            conditions["time_ids"] = _stack([t[f"time_ids.{name}"][i] for t, i in rows])
        return CachedSamples(_stack([t[f"latents.{name}"][i] for t, i in rows]), conditions)


def _stack(rows: Sequence[Array]) -> Tensor:
    """Rows as one float32 tensor; numpy, since it goes through small arrays faster than torch."""
    return torch.from_numpy(np.stack(rows)).float()


def _open(path: Path) -> _Shard:
    ids = ShardMetadata.of_shard(path).ids
    try:
        tensors = {k: v.numpy() for k, v in load_file(path).items()}
    except (OSError, SafetensorError, TypeError) as e:  # TypeError: a precision that numpy lacks
        raise BadInput(f"{path} cannot be read ({reason(e)}). {AGAIN}") from None
    return _Shard(tensors, ids)


def _check_shard(
    shard: _Shard, empty: Mapping[str, Array], channels: int | None, where: str
) -> None:
    """Raise `BadInput` unless the tensors of a shard have the shapes that its ids ask for."""
    states, pooled = shard.tensors.get("states"), shard.tensors.get("pooled")
    rows = 0 if states is None else len(states)
    for key in ("states", "pooled"):
        needed = (rows, *empty[key].shape[1:]) if key in empty else None
        if shard.ids:
            _need_shape(shard.tensors.get(key), needed, "f", f"{where}: {key}")
    for name, ids in shard.ids.items():
        height, width = _size(name, where)
        captions = shard.tensors.get(f"caption.{name}")
        for key, needed, kind in (
            ("latents", (len(ids), channels, height, width), "f"),
            ("caption", (len(ids),), "i"),
            ("time_ids", (len(ids), 6) if pooled is not None else None, "f"),
        ):
            _need_shape(shard.tensors.get(f"{key}.{name}"), needed, kind, f"{where}: {key}.{name}")
        row = np.zeros(0) if captions is None else captions.astype(np.int64)
        if not ((row >= 0) & (row < rows)).all():
            raise BadInput(f"{where}: caption.{name} has rows that states lacks. {AGAIN}")


def _size(name: str, where: str) -> Size:
    if not (match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", name)):
        raise BadInput(f"{where}: {shown(name)} is no size of latents, such as 64x64. {AGAIN}")
    return int(match[1]), int(match[2])


def _need_shape(
    tensor: Array | None, shape: tuple[int | None, ...] | None, kind: str, where: str
) -> None:
    """Raise unless a tensor has the shape and kind ("f": floats, "i": whole numbers) needed."""
    if shape is None:
        return
    if tensor is None:
        raise BadInput(f"{where} is missing. {AGAIN}")
    if tensor.shape != shape or tensor.dtype.kind != kind:
        raise BadInput(
            f"{where} is {tensor.dtype} {[*tensor.shape]}; needed are "
            f"{'floats' if kind == 'f' else 'whole numbers'} {[*shape]}. {AGAIN}"
        )


def is_cache(folder: Path) -> bool:
    """Whether `folder` is a cache rather than anything else that training data come from."""
    return exists(folder / INFO)


def encoders(model: str) -> dict[str, Path]:
    """The folders of the components that a cache depends on; a model on the Hub is fetched."""
    folder = locating.folder(model)
    return {name: folder / name for name in ENCODERS if (folder / name).is_dir()}


def check_cache(folder: Path, model: str) -> None:
    """Raise `BadInput` unless the cache was made with the VAE and text encoders of `model`."""
    info = CacheInfo.of_folder(folder)
    remedy = f"Make one with `laptop cache --model {model}`."
    for tensor, needed in widths(model).items():
        if (width := info.widths.get(tensor)) != needed:
            raise BadInput(
                f"{folder} was cached with {shown(info.model)}: its {tensor} are {width} wide, "
                f"the U-Net of {model} takes {needed}. {remedy}"
            )
    for name, path in encoders(model).items():
        if info.encoders.get(name) != sha256(path):
            raise BadInput(
                f"{folder} was cached with {shown(info.model)}, whose {name} is another "
                f"than that of {model}. {remedy}"
            )


def widths(model: str) -> dict[str, int | None]:
    """The channels of latents and widths of text embeddings that a model's U-Net takes."""
    unet = locating.unet_config(model)
    return {
        "latents": unet["in_channels"],
        "text states": text_width(unet),
        "pooled text embeddings": pooled_width(unet),
    }
