"""Names to models: find, check, load and save diffusers pipelines.

A model is a known name, a local diffusers folder, or a Hub id. Everything that can be wrong with it
is found from its small files, before any weight is read.
"""

import importlib.util
import inspect
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laptop import mistakes
from laptop.errors import BadInput, UnknownModel, Unsupported
from laptop.files import read_json, reason, shown
from laptop.models import component_classes, component_fit, hub, stored_weights, tokenizer_trial
from laptop.models.architectures import PIPELINES, UNETS, unet_class_name
from laptop.models.model_checks import check_configs, check_folder, check_unet

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

SHIPPED_CLASS = Path(__file__).parent / "laptop_unet_v1.py"
STOCK_UNETS, SHIPPED_UNETS = component_classes.STOCK_UNETS, component_classes.SHIPPED_UNETS
TASKS = component_classes.TASKS
SAFE = {"use_safetensors": True}  # the other format, pickles, can run code when it is read
UNLOADABLE = (  # what diffusers and transformers raise for foreign values in configs
    *(OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, ImportError),
    RuntimeError,  # also for tensors of a wrong shape, and RecursionError
)
ENCODING = (
    "cache",
    "distill",
    "compress",
    "export",
    "verify",
)  # stages that need what a VAE's encoder gives
WHOLE_CHAIN = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")  # the later stages, too


@dataclass(frozen=True)
class Known:
    """A model with a short name."""

    source: str  # a Hub id, or a folder of this package
    title: str
    unet_params: int
    resolution: int  # pixels


EMBEDDED = Path(__file__).parents[1] / "tiny" / "model"
KNOWN = {
    "tiny-sdxl": Known(str(EMBEDDED), "SDXL in miniature, ships with laptop", 2_551_300, 64),
    "sdxl": Known("stabilityai/stable-diffusion-xl-base-1.0", "SDXL 1.0", 2_567_463_684, 1024),
    "sd15": Known("stable-diffusion-v1-5/stable-diffusion-v1-5", "SD 1.5", 859_520_964, 512),
}


def locate(model: str) -> str:
    """The folder or Hub id behind a name; `UnknownModel` or `Unsupported` when it cannot be used.

    Reads JSON files only. A Hub id is looked up in the local cache and then on the Hub.
    """
    if name := random_name(model):
        from laptop.models import random_weights

        return str(random_weights.cached_folder(name))
    source = KNOWN[model].source if model in KNOWN else model
    if mistakes.is_folder(source):
        _check_local(Path(source))
        return source
    hint = mistakes.model_advice(source)
    is_hub_id = source.count("/") == 1 and not source.startswith(("/", ".", "~"))
    if hint or not is_hub_id or mistakes.is_file(Path(source)):
        if near := get_close_matches(model, KNOWN, n=1):
            hint = f" Did you mean {near[0]!r}?"
        raise UnknownModel(
            f"{shown(model)} is no known model ({', '.join(KNOWN)}), no folder, and no Hub id "
            f"(owner/name).{hint}"
        )
    _check_hub(source)
    return source


def random_name(model: str) -> str | None:
    """The architecture of `random:NAME`, or None for other models; `UnknownModel` for no such."""
    prefix, _, name = model.partition(":")
    if prefix != "random":
        return None
    if name not in UNETS:
        raise UnknownModel(
            f"there are no random weights for {name!r}; known architectures are {', '.join(UNETS)}."
        )
    return name


def _check_local(folder: Path) -> None:
    """Check everything of a folder that can be checked without reading a tensor."""
    check_folder(folder)
    parts = component_classes.components(read_json(folder / "model_index.json"))
    for part in stored_weights.NETWORKS:
        if part in parts:
            stored_weights.check_weights(folder, part, partial(_empty, folder, part, parts[part]))
    for encoder, tokenizer in component_fit.TOKENIZERS.items():
        if tokenizer in parts:
            tokenizer_trial.check_tokenizer(folder / tokenizer, parts[tokenizer], folder / encoder)


def _empty(folder: Path, part: str, class_name: str) -> Any:
    """A component of a checked folder from its config alone, on the meta device."""
    import torch

    config = read_json(folder / part / "config.json")
    with torch.device("meta"):
        if part in ("unet", "vae"):
            return _unet_class(config).from_config(config)
        import transformers
        from diffusers.pipelines.stable_diffusion import safety_checker

        if part == "safety_checker":
            parsed = transformers.CLIPConfig.from_dict(config)
            return safety_checker.StableDiffusionSafetyChecker(parsed)
        return getattr(transformers, class_name)(transformers.CLIPTextConfig.from_dict(config))


def _check_hub(source: str) -> None:
    """Find a Hub id's small files in the local cache or on the Hub, and check them."""
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

    def config(name: str) -> dict[str, Any] | None:
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


def need_whole_chain(model: str, what: str) -> None:
    """Raise `Unsupported` for a model that can be scored, planned and pruned, but no more yet."""
    found = pipeline_class(model)
    if found not in WHOLE_CHAIN:
        raise Unsupported(
            f"{model} is a {found}; {what} takes {' and '.join(WHOLE_CHAIN)} in this version. "
            "`laptop score`, `plan` and `prune` take it."
        )
    if what in ENCODING and vae_class(model) != "AutoencoderKL":
        raise Unsupported(
            f"{model}: its VAE is an {vae_class(model)}, which encodes to no distribution; {what} "
            "takes an AutoencoderKL. Put the VAE of the base model into vae/ and model_index.json. "
            "`laptop score`, `plan`, `prune`, `generate` and `eval` take it."
        )


def vae_class(model: str) -> str:
    """Name of the class of the VAE of a `model` that has one."""
    if random_name(model):
        return "AutoencoderKL"
    index = find_file(locate(model), "model_index.json")
    assert index is not None  # or `locate` had raised
    return component_classes.components(read_json(index))["vae"]


def find_file(source: str, name: str) -> Path | None:
    """A file of a folder or a Hub repository; None where it has none of that name."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name))
    except EntryNotFoundError:
        return None


def shipped_module() -> Any:
    """`laptop_unet_v1.py`, imported under the name that diffusers records for its class."""
    name = SHIPPED_CLASS.stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, SHIPPED_CLASS)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def shipped_class(unet: Any) -> Any:
    """The class of a U-Net of `unet`'s kind without some of its layers."""
    name = type(unet).__name__
    return getattr(shipped_module(), name if name in SHIPPED_UNETS else f"Laptop{name}")


def _unet_class(config: dict[str, Any]) -> Any:
    import diffusers

    name = config["_class_name"]
    return getattr(shipped_module() if name in SHIPPED_UNETS else diffusers, name)


def load_unet(model: str, dtype: "torch.dtype | None" = None) -> Any:
    """The U-Net of `model` in `dtype` (float32 when None), in evaluation mode, on the CPU."""
    import torch

    kwargs = {"torch_dtype": dtype or torch.float32, "variant": variant(model), **SAFE}
    cls = _unet_class(unet_config(model))
    try:
        unet = cls.from_pretrained(folder(model), subfolder="unet", **kwargs)
    except UNLOADABLE as e:
        raise BadInput(f"the U-Net of {model} cannot be loaded ({reason(e)}).") from None
    stored_weights.check_finite({"unet": unet}, model)
    return unet.eval()


def empty_unet(model: str) -> Any:
    """The U-Net of `model` from its config alone, on the meta device: no weight is read."""
    import torch

    config = unet_config(model)
    with torch.device("meta"):
        return _unet_class(config).from_config(config).eval()


def unet_config(model: str) -> dict[str, Any]:
    """The U-Net's config.json, with its class's defaults for the keys that it leaves out."""
    import diffusers

    if name := random_name(model):
        config = {"_class_name": unet_class_name(name), **UNETS[name]}
    else:
        config = dict(diffusers.UNet2DModel.load_config(locate(model), subfolder="unet"))
    config = with_defaults(config)
    check_unet(config, model)
    return config


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A component's config with the defaults of its diffusers class for keys that it leaves out."""
    import diffusers

    stock = getattr(diffusers, config["_class_name"].removeprefix("Laptop"))
    parameters = inspect.signature(stock.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return defaults | config


def variant(model: str) -> str | None:
    """The variant, such as "fp16", where the U-Net's weights have names of variants only."""
    if random_name(model):
        return None
    mistakes.need_safetensors(names := _files(locate(model)), model)
    weights = [m for name in names if (m := stored_weights.WEIGHTS.fullmatch(name))]
    found = {m["variant"] for m in weights if m["part"] == "unet"}
    return None if None in found else min(found, default=None)


def _files(source: str) -> list[str]:
    """Names of a folder's or a Hub repository's files; of the local cache if this has weights."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    root = Path(source)
    if not (is_local := root.is_dir()):
        root = Path(str(try_to_load_from_cache(source, "model_index.json"))).parent
    found = [p.relative_to(root).as_posix() for p in root.glob("unet/*")]
    if is_local or any(name.endswith(".safetensors") for name in found):
        return found
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
    """The safetensors files of a component, in the U-Net's variant where it has that one."""
    return stored_weights.weight_files(folder(model), part)


def identity(role: str, model: str) -> tuple[dict[str, Path], dict[str, str]]:
    """Inputs and settings that say which bytes `model` is: a folder's content, or a Hub commit."""
    from huggingface_hub import try_to_load_from_cache

    if random_name(model):
        return {}, {role: model}
    source = locate(model)
    if Path(source).is_dir():
        return {role: Path(source)}, {}
    index = try_to_load_from_cache(source, "model_index.json")
    commit = Path(index).parent.name if isinstance(index, str) else "unknown"
    return {}, {role: f"{source}@{commit}"}


def load_pipeline(
    model: str, dtype: "torch.dtype | None" = None, *, checked: bool = False
) -> "DiffusionPipeline":
    """The whole pipeline in `dtype` (float32 when None), on the CPU, without its progress bar.

    Safety checker and watermark are left out, because pictures that are compared, judged or learned
    from must be those of the networks; with `checked` they are as in the model.
    The U-Net class shipped with pruned weights is never run from the model's folder: this package
    brings its own copy, so nothing remote is trusted.
    """
    pipe = load_encoders(model, dtype, checked=checked)
    unet = load_unet(model, dtype)
    pipe.register_modules(unet=unet)
    # What the pipelines' constructors read off the U-Net, which was not there yet: XL's, and SD's.
    pipe.default_sample_size = unet.config.sample_size
    pipe._is_unet_config_sample_size_int = isinstance(unet.config.sample_size, int)
    return pipe


def load_encoders(
    model: str,
    dtype: "torch.dtype | None" = None,
    *,
    only: str | None = None,
    checked: bool = False,
) -> "DiffusionPipeline":
    """A pipeline without its U-Net: what encodes and decodes pictures and captions.

    With `only`, such as "vae", that network alone; `checked` is as in `load_pipeline`.
    """
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    parts = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder", "safety_checker")
    index = read_json(folder(model) / "model_index.json")
    left_out = [name for name in parts if name in index and name != only]
    without = {} if checked else _unchecked(index)
    try:
        pipe = DiffusionPipeline.from_pretrained(
            folder(model),
            **(dict.fromkeys(left_out if only else ["unet"]) | without),
            torch_dtype=dtype or torch.float32,
            variant=variant(model),
            **SAFE,
        )
    except UNLOADABLE as e:
        raise BadInput(
            f"{model} cannot be loaded ({reason(e)}). Correct its configs and tokenizers, or fetch "
            "it again."
        ) from None
    networks = {n: p for n, p in pipe.components.items() if isinstance(p, torch.nn.Module)}
    stored_weights.check_finite(networks, model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unchecked(index: dict[str, Any]) -> dict[str, Any]:
    """Arguments by which a pipeline class leaves out its safety checker or watermark."""
    if "safety_checker" in index:
        return {"safety_checker": None, "requires_safety_checker": False}
    return {"add_watermarker": False} if "XL" in index["_class_name"] else {}
