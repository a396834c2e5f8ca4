"""Checks of stored weights: the headers of their files against the component's config.

diffusers makes up tensors that are missing and drops those that it does not know; both would be a
model that nobody trained. Only headers are read here, and networks are built without memory.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from laptop.errors import BadInput
from laptop.files import open_file, read_json, reason, shown
from laptop.models.trial import try_network

if TYPE_CHECKING:
    from torch import nn

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # dtype, in safetensors' words, and shape by name
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2", "safety_checker")
WEIGHTS = re.compile(  # shards are numbered before the variant or after it
    r"(?P<part>\w+)/(diffusion_pytorch_)?model(-\d+-of-\d+)?(\.(?P<variant>\w+?))?(-\d+-of-\d+)?"
    r"\.(safetensors|bin)"
)
INDEX = re.compile(r".*\.safetensors\.index(\.(?P<variant>\w+))?\.json")
SHARD = re.compile(r"-\d+-of-\d+\.")
POINTER = b"version https://git-lfs"
FLOATS = ("F64", "F32", "F16", "BF16")
LORA = re.compile(r"(^|[._])(lora|base_layer)([._]|$)", re.I)
BUFFERS = re.compile(r"(^|\.)position_ids$")  # old transformers stored them
OLD_PREFIX = "text_model."  # transformers 5 reads it and does not write it; 4 needs it
CLIP_REST = re.compile(r"^(vision_model|visual_projection|text_projection|logit_scale)\b")
FUSE = (
    "Load the model with the LoRA in diffusers, call `pipe.fuse_lora()` and "
    "`pipe.unload_lora_weights()`, and save it again."
)


def weight_files(folder: Path, part: str = "unet") -> list[Path]:
    """The safetensors files of a component, in the U-Net's variant if it has that one."""
    variants = {name for _, name in _files(folder, "unet")}
    usual = None if None in variants else min(map(str, variants), default=None)
    files = _files(folder, part)
    variant = usual if usual in {name for _, name in files} else None
    return [path for path, name in files if name == variant]


def _files(folder: Path, part: str) -> list[tuple[Path, str | None]]:
    paths = sorted((folder / part).glob("*.safetensors"))
    matches = ((path, WEIGHTS.fullmatch(f"{part}/{path.name}")) for path in paths)
    return [(path, match["variant"]) for path, match in matches if match]


def header(path: Path) -> Tensors:
    """The tensors of a safetensors file; `BadInput` for one that is cut off or none."""
    from safetensors import SafetensorError, safe_open

    with open_file(path) as file:
        if file.read(len(POINTER)) == POINTER:
            raise BadInput(
                f"{path} is a pointer of git-lfs, not the weights. Run `git lfs pull` in the "
                "folder that was cloned."
            )
    try:
        with safe_open(path, framework="np") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {n: (str(s.get_dtype()), tuple(s.get_shape())) for n, s in slices.items()}
    except SafetensorError as e:
        raise BadInput(
            f"{path} cannot be read ({reason(e)}); it may be cut off. Fetch it again."
        ) from None


_checked: set[tuple[object, ...]] = set()  # states of components; a command asks many times


def check_weights(folder: Path, part: str, empty: "Callable[[], nn.Module]") -> None:
    """Raise `BadInput` unless the files of a component hold the tensors that its config asks for.

    `empty` builds the component from its config on the meta device, where it must run.
    """
    files = weight_files(folder, part)
    paths = [folder / part / "config.json", *files, *_shard_indices(folder / part)]
    for path in paths:
        open_file(path).close()  # refuses a link to nothing, for example
    state = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in paths)
    if state in _checked:
        return
    where = f"{folder}: the weights of {part}/"
    if not files:
        raise BadInput(
            f"{where} are missing: it holds no file such as {_usual_name(part)}. Fetch or save the "
            "whole model."
        )
    _check_once(folder / part, files)
    _check_shards(folder / part, files)
    tensors: Tensors = {}
    for file in files:
        tensors |= header(file)
    check_kinds(tensors, where)
    try:
        network = empty()
    except Exception as e:  # noqa: BLE001 - whatever a foreign config makes diffusers raise
        raise BadInput(
            f"{folder}: {part}/config.json describes no network that can be built: {reason(e)}. "
            "Correct it, or fetch it again."
        ) from None
    _compare(tensors, network, where)
    try:
        try_network(part, network)
    except Exception as e:  # noqa: BLE001 - as above
        raise BadInput(
            f"{folder}: {part}/config.json describes a network that does not run: {reason(e)}. "
            "Correct it, or fetch it again."
        ) from None
    _checked.add(state)


def _usual_name(part: str) -> str:
    is_transformers = part.startswith("text_") or part == "safety_checker"
    return "model.safetensors" if is_transformers else "diffusion_pytorch_model.safetensors"


def _shard_indices(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors.index*.json"))


def _check_once(folder: Path, files: Sequence[Path]) -> None:
    """Raise `BadInput` for weights that are there twice: libraries differ in which they take."""
    whole = [file for file in files if not SHARD.search(file.name)]
    variants = {m["variant"] for f in whole if (m := WEIGHTS.fullmatch(f"{folder.name}/{f.name}"))}
    matches = {path: INDEX.fullmatch(path.name) for path in _shard_indices(folder)}
    rivals = [path for path, m in matches.items() if m and m["variant"] in variants]
    if whole and len(files) + len(rivals) > 1:
        raise BadInput(
            f"{folder} holds its weights more than once: "
            f"{_first([path.name for path in (*rivals, *files)])}; it is not clear which of them "
            "count. Remove all but one file, or all but the shards and their index."
        )


def _check_shards(folder: Path, files: Sequence[Path]) -> None:
    """Raise `BadInput` where an index lists files that are missing, or a shard is in no index."""
    names, listed = {file.name for file in files}, set[str]()
    for path in _shard_indices(folder):
        weight_map = read_json(path).get("weight_map")
        shards = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        listed |= shards
        if shards & names and (missing := sorted(shards - names)):
            raise BadInput(
                f"{path} lists {len(shards)} files, of which {len(missing)} are missing: "
                f"{_first(missing)}. Fetch or save the whole model."
            )
    if unlisted := sorted(name for name in names - listed if SHARD.search(name)):
        raise BadInput(
            f"{folder} holds shards that no index lists: {_first(unlisted)}. Fetch or save the "
            "whole model."
        )


def check_kinds(tensors: Tensors, where: str) -> None:
    """Raise `BadInput` for tensors of a LoRA that is not fused, and for tensors not in floats."""
    if lora := [name for name in tensors if LORA.search(name)]:
        raise BadInput(
            f"{where} hold {len(lora)} tensors of a LoRA that is not fused: {_first(lora)}. {FUSE}"
        )
    coded = [n for n, (dtype, _) in tensors.items() if dtype not in FLOATS]
    if coded := [name for name in coded if not BUFFERS.search(name)]:
        kinds = sorted({tensors[name][0] for name in coded})
        raise BadInput(
            f"{where} hold {len(coded)} tensors in {', '.join(kinds)}: {_first(coded)}; needed are "
            f"{', '.join(FLOATS)}. A quantized model cannot be retrained: pass the one that it was "
            "made from."
        )


def _compare(tensors: Tensors, network: "nn.Module", where: str) -> None:
    """Raise `BadInput` unless a network's tensors are stored, and no others but ignored ones."""
    needed = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    stored = _as_loaded({name: shape for name, (_, shape) in tensors.items()}, network)
    missing = [name for name in needed if name not in stored and not BUFFERS.search(name)]
    shared = needed.keys() & stored.keys()
    other = [n for n in needed if n in shared and needed[n] != stored[n] and not BUFFERS.search(n)]
    unknown = [name for name in stored if name not in needed and not _ignored(name, network)]
    shapes = [f"{n} is {list(stored[n])}, needed is {list(needed[n])}" for n in other]
    parts = (
        f"{len(missing)} tensors are missing: {_first(missing)}" if missing else "",
        f"{len(other)} have another shape: {_first(shapes)}" if other else "",
        f"{len(unknown)} are no part of it: {_first(unknown)}" if unknown else "",
    )
    if any(parts):
        raise BadInput(
            f"{where} do not fit its config.json: {'; '.join(filter(None, parts))}. Correct the "
            "config, or fetch or save the whole model again."
        )


def _as_loaded(
    shapes: dict[str, tuple[int, ...]], network: "nn.Module"
) -> dict[str, tuple[int, ...]]:
    """Stored tensors under the names that diffusers and transformers give old ones."""
    fix_keys_ = getattr(network, "_fix_state_dict_keys_on_load", None)  # of diffusers
    if fix_keys_ is not None:
        fix_keys_(shapes)
    if any(name.startswith(OLD_PREFIX) for name in network.state_dict()):
        return shapes
    return {name.removeprefix(OLD_PREFIX): shape for name, shape in shapes.items()}


def _ignored(name: str, network: "nn.Module") -> bool:
    """Whether the library ignores a stored tensor that is no part of the network."""
    patterns: Iterable[str] = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()
    is_clip = type(network).__name__.startswith("CLIP")  # of whole CLIPs, one half is read
    return bool(
        BUFFERS.search(name)
        or (is_clip and CLIP_REST.search(name))
        or any(re.search(pattern, name) for pattern in patterns)
    )


def check_finite(networks: "Mapping[str, nn.Module]", where: str) -> None:
    """Raise `BadInput` for loaded weights that are NaN or infinite, by component."""
    import torch

    for part, network in networks.items():
        bad = [
            name
            for name, tensor in network.named_parameters()
            if tensor.numel() and not all(v.isfinite() for v in torch.aminmax(tensor.detach()))
        ]
        if bad:
            dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
            raise BadInput(
                f"{where}: {len(bad)} tensors of {part}/ hold values that are not finite in "
                f"{dtype}: {_first(bad)}. The file is damaged, or was saved from a training that "
                "diverged: fetch it again, or take an earlier checkpoint."
            )


def _first(names: Sequence[str]) -> str:
    more = ", …" if len(names) > 3 else ""
    return ", ".join(shown(name).strip("'") for name in names[:3]) + more
