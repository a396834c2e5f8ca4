"""Names of models: the folder or Hub repository behind a name, its checks and its identity.

A model is a known name, a local diffusers folder, or a Hub id. Everything that can be wrong with it
is found in its small files, before any weight is read.
"""

import inspect
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from laptop.errors import UnknownModel, Unsupported
from laptop.files import read_json, reason, shown
from laptop.models import (
    component_classes,
    component_fit,
    hub,
    mistakes,
    stored_weights,
    tokenizer_trial,
)
from laptop.models.architectures import PIPELINES, UNETS, unet_class_name
from laptop.models.model_checks import check_configs, check_folder, check_unet
from laptop.models.unet_classes import empty_network

# The commands that need a VAE's encoder.
ENCODING = ("cache", "distill", "compress", "export", "verify")
WHOLE_CHAIN = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")  # of all stages


@dataclass(frozen=True)
class NamedModel:
    """A model with a short name."""

    source: str  # a Hub id, or a folder of this package
    title: str
    unet_params: int
    resolution: int  # pixels


EMBEDDED = Path(__file__).parents[1] / "tiny" / "model"
MODELS = {
    "tiny-sdxl": NamedModel(str(EMBEDDED), "SDXL in miniature, ships with laptop", 2_551_300, 64),
    "sdxl": NamedModel("stabilityai/stable-diffusion-xl-base-1.0", "SDXL 1.0", 2_567_463_684, 1024),
    "sd15": NamedModel("stable-diffusion-v1-5/stable-diffusion-v1-5", "SD 1.5", 859_520_964, 512),
}


def locate(model: str) -> str:
    """The folder or Hub id behind a name; `UnknownModel` or `Unsupported` when it cannot be used.

    Reads JSON files only. A Hub id is looked up in the local cache and then on the Hub.
    """
    if name := random_name(model):
        from laptop.models import random_weights

        return str(random_weights.cached_folder(name))
    source = MODELS[model].source if model in MODELS else model
    if mistakes.is_folder(source):
        _check_local(Path(source))
        return source
    hint = mistakes.model_advice(source)
    is_hub_id = source.count("/") == 1 and not source.startswith(("/", ".", "~"))
    if hint or not is_hub_id or mistakes.is_file(Path(source)):
        if near := get_close_matches(model, MODELS, n=1):
            hint = f" Did you mean {near[0]!r}?"
        raise UnknownModel(
            f"{shown(model)} is no known model ({', '.join(MODELS)}), no folder, and no Hub id "
            f"(owner/name).{hint}"
        )
    _check_hub(source)
    return source


def need_models(*models: str | Path) -> None:
    """Raise `UnknownModel` or `Unsupported` for a model that cannot be used."""
    for model in map(str, models):
        if not random_name(model):  # to locate that would make its weights
            locate(model)


def random_name(model: str) -> str | None:
    """The architecture of `random:NAME`, None for other models; `UnknownModel` if it is none."""
    prefix, _, name = model.partition(":")
    if prefix != "random":
        return None
    if name not in UNETS:
        raise UnknownModel(
            f"there are no random weights for {name!r}; known architectures are {', '.join(UNETS)}."
        )
    return name


def _check_local(folder: Path) -> None:
    """Check everything of a folder that can be checked without reading a tensor.

    The same files are checked once: stages ask for a model a hundred times in one run.
    """
    is_model = (folder / "model_index.json").is_file()
    _check_state(folder, _state(folder) if is_model else ())


def _state(folder: Path) -> tuple[tuple[object, ...], ...]:
    """Everything below a folder, as values that differ once a file is written or exchanged."""
    paths = [(path, path.lstat()) for path in sorted(folder.rglob("*"))]
    return tuple((p, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in paths)


@lru_cache(maxsize=32)
def _check_state(folder: Path, _state: tuple[tuple[object, ...], ...]) -> None:
    """Check a folder whose files are in this state; what is refused is checked again next time."""
    check_folder(folder)
    parts = component_classes.components(read_json(folder / "model_index.json"))
    for part in stored_weights.NETWORKS:
        if part in parts:
            stored_weights.check_weights(
                folder, part, partial(empty_network, folder, part, parts[part])
            )
    for encoder, tokenizer in component_fit.TOKENIZERS.items():
        if tokenizer in parts:
            tokenizer_trial.check_tokenizer(folder / tokenizer, parts[tokenizer], folder / encoder)


def _check_hub(source: str) -> None:
    """Check a Hub id's small files, from the local cache or the Hub."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        index = read_json(hub.small_file(source, "model_index.json"))
    except (OSError, HfHubHTTPError, HFValidationError) as e:
        raise UnknownModel(
            f"{source!r} is neither in the local Hub cache nor can it be fetched "
            f"({reason(e)}). Check the name and the network (for a gated model: "
            "`hf auth login`), or pass the path of a local diffusers folder."
        ) from None
    component_classes.check_index(index, source)

    def config(name: str) -> component_classes.Config | None:
        try:
            return read_json(hub.small_file(source, name))
        except (OSError, HfHubHTTPError):
            return None  # `folder` misses it where it is needed

    check_configs(index, config, source)


def pipeline_class(model: str) -> str:
    """Name of the diffusers pipeline class of `model`."""
    if name := random_name(model):
        return PIPELINES[name]
    index = find_file(locate(model), "model_index.json")
    assert index is not None  # or `locate` had raised
    return str(read_json(index)["_class_name"])


def need_whole_chain(model: str, command: str) -> None:
    """Raise `Unsupported` for a model that can be scored, planned and pruned, but not more."""
    pipeline = pipeline_class(model)
    if pipeline not in WHOLE_CHAIN:
        raise Unsupported(
            f"{model} is a {pipeline}; {command} takes {' and '.join(WHOLE_CHAIN)} in this "
            "version. `laptop score`, `plan` and `prune` take it."
        )
    if command in ENCODING and vae_class(model) != "AutoencoderKL":
        raise Unsupported(
            f"{model}: its VAE is an {vae_class(model)}, which encodes to no distribution; "
            f"{command} takes an AutoencoderKL. Put the VAE of the base model into vae/ "
            "and model_index.json. `laptop score`, `plan`, `prune`, `generate` and `eval` take it."
        )


def vae_class(model: str) -> str:
    """Name of the class of the VAE of a `model` that has one."""
    if random_name(model):
        return "AutoencoderKL"
    index = find_file(locate(model), "model_index.json")
    assert index is not None  # or `locate` had raised
    return component_classes.components(read_json(index))["vae"]


def find_file(source: str, name: str) -> Path | None:
    """A file of a folder or a Hub repository; None if it does not exist."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name))
    except EntryNotFoundError:
        return None


def unet_config(model: str) -> dict[str, Any]:
    """The U-Net's config.json, with its class's defaults for the keys that it leaves out."""
    import diffusers

    if name := random_name(model):
        config = {"_class_name": unet_class_name(name), **UNETS[name]}
    else:
        config = dict(diffusers.UNet2DModel.load_config(locate(model), subfolder="unet"))
    whole = with_defaults(config)
    check_unet(whole, model)
    return whole


def with_defaults(config: component_classes.Config) -> dict[str, Any]:
    """A component's config with the defaults of its diffusers class for keys that it leaves out."""
    import diffusers

    stock = getattr(diffusers, config["_class_name"].removeprefix("Laptop"))
    parameters = inspect.signature(stock.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {**defaults, **config}


def variant(model: str) -> str | None:
    """The variant, such as "fp16", if the U-Net's weights exist in variants only."""
    if random_name(model):
        return None
    mistakes.need_safetensors(names := _files(locate(model)), model)
    weights = [m for name in names if (m := stored_weights.WEIGHTS.fullmatch(name))]
    variants = {m["variant"] for m in weights if m["part"] == "unet"}
    return None if None in variants else min(variants, default=None)


def _files(source: str) -> list[str]:
    """The names of a folder's or a Hub repository's files, from the local cache if possible."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    root = Path(source)
    if not (is_local := root.is_dir()):
        root = Path(str(try_to_load_from_cache(source, "model_index.json"))).parent
    names = [p.relative_to(root).as_posix() for p in root.glob("unet/*")]
    if is_local or any(name.endswith(".safetensors") for name in names):
        return names
    return list(HfApi().list_repo_files(source))


def folder(model: str) -> Path:
    """The diffusers folder of `model`; a Hub id is downloaded, or taken from the local cache."""
    from diffusers import DiffusionPipeline

    source = locate(model)
    if Path(source).is_dir():
        return Path(source)
    downloaded = Path(DiffusionPipeline.download(source, variant=variant(model)))
    _check_local(downloaded)
    return downloaded


def weight_files(model: str, part: str = "unet") -> list[Path]:
    """The safetensors files of a component, in the U-Net's variant if it has that one."""
    return stored_weights.weight_files(folder(model), part)


def identity(role: str, model: str) -> tuple[dict[str, Path], dict[str, str]]:
    """Inputs and settings that identify the bytes of `model`: a folder, or a Hub commit."""
    from huggingface_hub import try_to_load_from_cache

    if random_name(model):
        return {}, {role: model}
    source = locate(model)
    if Path(source).is_dir():
        return {role: Path(source)}, {}
    index = try_to_load_from_cache(source, "model_index.json")
    commit = Path(index).parent.name if isinstance(index, str) else "unknown"
    return {}, {role: f"{source}@{commit}"}
