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
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from laptop.distill.buckets import Size
from laptop.errors import BadInput
from laptop.fields import Name, Range
from laptop.files import exists, inside, open_file, reason, sha256, shown
from laptop.models import locating
from laptop.models.shapes import pooled_width, text_width
from laptop.records import checked, read_record

SCHEMA = "laptop.cache/1"
INFO = "cache.json"
AGAIN = "Make the cache again."
EMPTY = "empty.safetensors"  # embeddings of the empty caption
ENCODERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
Array = NDArray[np.generic]


def size_name(size: Size) -> str:
    """As tensors of a shard are called: `64x64`, height first."""
    return f"{size[0]}x{size[1]}"


class Bucket(TypedDict):
    """How many samples have latents of a size."""

    height: Annotated[int, Range(1, 8192)]
    width: Annotated[int, Range(1, 8192)]
    count: NotRequired[Annotated[int, Range(0)]]


class Info(TypedDict):
    """What is read of a cache.json."""

    model: Name
    widths: dict[str, Annotated[int, Range(1)] | None]
    encoders: dict[str, str]
    shards: list[Name]
    buckets: list[Bucket]
    count: Annotated[int, Range(1)]


class Metadata(TypedDict):
    """What a shard says of itself."""

    ids: dict[str, list[str]]  # by the name of their size
    skipped: list[tuple[str, str]]  # id and reason
    precision: NotRequired[Name]


@dataclass(frozen=True)
class _Shard:
    tensors: Mapping[str, Array]  # of the file, mapped
    ids: Mapping[str, Sequence[str]]  # of the samples, by the size's name


class Cache:
    """Random access to all samples; `BadInput` when files are missing or cut off."""

    def __init__(self, folder: Path):
        self.info = _info(folder)
        self._empty = _open(folder / EMPTY).tensors
        has_pooled = self.info["widths"].get("pooled text embeddings") is not None
        for name in ("states", *(["pooled"] if has_pooled else [])):
            if name not in self._empty:
                raise BadInput(f"{folder / EMPTY} holds no {name}. {AGAIN}")
        shards = [inside(folder, name, str(folder / INFO)) for name in self.info["shards"]]
        self._shards = [_open(path) for path in shards]
        channels = self.info["widths"].get("latents")
        for path, shard in zip(shards, self._shards, strict=True):
            _check_shard(shard, self._empty, channels, str(path))
        self._sizes: list[Size] = [(b["height"], b["width"]) for b in self.info["buckets"]]
        places = [
            (shard, size, row)
            for shard, opened in enumerate(self._shards)
            for size, name in enumerate(map(size_name, self._sizes))
            for row in range(len(opened.ids.get(name, ())))
        ]
        if len(places) != self.info["count"] or not places:
            raise BadInput(
                f"{folder} holds {len(places)} samples, its {INFO} says {self.info['count']}. Make "
                "the cache anew."
            )
        self._places = np.array(places, dtype=np.int64)  # (samples, 3): shard, size, row in it
        self.ids: Sequence[str] = [
            self._shards[shard].ids[size_name(self._sizes[size])][row]
            for shard, size, row in places
        ]
        self.buckets: dict[Size, Tensor] = {
            size: torch.from_numpy(np.flatnonzero(self._places[:, 1] == i))
            for i, size in enumerate(self._sizes)
        }

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: Tensor, keep: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents (B, C, h, w) and conditions of the samples `index` (B,), which are of one bucket.

        Conditions, as the U-Net takes them: `encoder_hidden_states` (B, tokens, width) and, for
        SDXL, `text_embeds` (B, width) and `time_ids` (B, 6); of the empty caption where not `keep`
        (B,). Float32, on the CPU.
        """
        places = self._places[index.numpy()]
        if (places[:, 1] != places[0, 1]).any():
            raise ValueError("rows of several buckets do not make one batch")
        name = size_name(self._sizes[places[0, 1]])
        at = [(self._shards[shard].tensors, row) for shard, row in places[:, [0, 2]].tolist()]
        captions = [
            (tensors, int(tensors[f"caption.{name}"][row])) if is_kept else (self._empty, 0)
            for (tensors, row), is_kept in zip(at, keep.tolist(), strict=True)
        ]
        conditions = {"encoder_hidden_states": _stack([t["states"][i] for t, i in captions])}
        if "pooled" in self._empty:
            conditions["text_embeds"] = _stack([t["pooled"][i] for t, i in captions])
            conditions["time_ids"] = _stack([t[f"time_ids.{name}"][i] for t, i in at])
        return _stack([t[f"latents.{name}"][i] for t, i in at]), conditions


def _stack(rows: Sequence[Array]) -> Tensor:
    """Rows as one float32 tensor; numpy, since it goes through small arrays faster than torch."""
    return torch.from_numpy(np.stack(rows)).float()


def _info(folder: Path) -> dict[str, Any]:
    info = read_record(folder / INFO, Info, SCHEMA, AGAIN)
    if not info["shards"] or len({*info["shards"]}) < len(info["shards"]):
        raise BadInput(f"{folder / INFO} names no shard, or one twice. {AGAIN}")
    return {**info}


def _open(path: Path) -> _Shard:
    ids = metadata(path)["ids"]
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
        at = np.zeros(0) if captions is None else captions.astype(np.int64)
        if not ((at >= 0) & (at < rows)).all():
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


def metadata(path: Path) -> dict[str, Any]:
    """What a shard says of itself: `ids` by size, and `skipped`, pairs of id and reason."""
    open_file(path).close()  # a pipe would never end
    try:
        with safe_open(path, framework="np") as file:
            content = json.loads((file.metadata() or {}).get("laptop", "null"))
    except (OSError, SafetensorError, ValueError, RecursionError) as e:
        raise BadInput(f"{path} cannot be read ({reason(e)}). {AGAIN}") from None
    return {**checked(content, Metadata, str(path), AGAIN)}


def is_cache(folder: Path) -> bool:
    """Whether `folder` is a cache rather than anything else that training data come from."""
    return exists(folder / INFO)


def encoders(model: str) -> dict[str, Path]:
    """The folders of all that a cache depends on; a model on the Hub is fetched."""
    folder = locating.folder(model)
    return {name: folder / name for name in ENCODERS if (folder / name).is_dir()}


def check_cache(folder: Path, model: str) -> None:
    """Raise `BadInput` unless the cache was made with the VAE and text encoders of `model`."""
    info = _info(folder)
    remedy = f"Make one with `laptop cache --model {model}`."
    found, needed = info["widths"], widths(model)
    for what in needed:
        if (width := found.get(what)) != needed[what]:
            raise BadInput(
                f"{folder} was cached with {shown(info['model'])}: its {what} are {width} wide, "
                f"the U-Net of {model} takes {needed[what]}. {remedy}"
            )
    for name, path in encoders(model).items():
        if info["encoders"].get(name) != sha256(path):
            raise BadInput(
                f"{folder} was cached with {shown(info['model'])}, whose {name} is another "
                f"than that of {model}. {remedy}"
            )


def widths(model: str) -> dict[str, int | None]:
    """What a model's U-Net takes: channels of latents, widths of the text's embeddings."""
    unet = locating.unet_config(model)
    return {
        "latents": unet["in_channels"],
        "text states": text_width(unet),
        "pooled text embeddings": pooled_width(unet),
    }
