"""The classes that the components of a pipeline may have, checked before anything is imported.

diffusers imports the module and the class that `model_index.json` names for each component. That
file may come from a stranger, so every entry is looked up here first. A class in its list still
needs configs that this version honours (`config_keys`).
"""

from collections.abc import Callable, Mapping
from typing import Any

from laptop.errors import BadInput, Unsupported
from laptop.files import QUOTED, shown

Config = Mapping[str, Any]  # a JSON file of the model, of a component or model_index.json
Configs = Callable[[str], Config | None]  # the JSON of a file of the model, None if it has no such
TASKS = {  # of the pipelines that can be scored and pruned
    "StableDiffusionPipeline": "text-to-image",
    "StableDiffusionXLPipeline": "text-to-image",
    "LatentConsistencyModelPipeline": "text-to-image",
    "StableDiffusionImg2ImgPipeline": "image-to-image",
    "StableDiffusionXLImg2ImgPipeline": "image-to-image",
    "StableDiffusionInpaintPipeline": "inpainting",
    "StableDiffusionXLInpaintPipeline": "inpainting",
    "DDPMPipeline": "unconditional",
    "DDIMPipeline": "unconditional",
}
SHIPPED_LIBRARY = "laptop_unet_v1"  # the class file that comes with pruned weights
STOCK_UNETS = ("UNet2DConditionModel", "UNet2DModel")
SHIPPED_UNETS = tuple(f"Laptop{name}" for name in STOCK_UNETS)
SCHEDULERS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
CLASSES: dict[str, dict[str, tuple[str, ...]]] = {  # component: library: classes
    "unet": {"diffusers": STOCK_UNETS, SHIPPED_LIBRARY: SHIPPED_UNETS},
    "vae": {"diffusers": ("AutoencoderKL", "AutoencoderTiny")},
    "scheduler": {"diffusers": SCHEDULERS},
    "text_encoder": {"transformers": ("CLIPTextModel",)},
    "text_encoder_2": {"transformers": ("CLIPTextModelWithProjection",)},
    "tokenizer": {"transformers": TOKENIZERS},
    "tokenizer_2": {"transformers": TOKENIZERS},
    "safety_checker": {"stable_diffusion": ("StableDiffusionSafetyChecker",)},
    "feature_extractor": {"transformers": ("CLIPImageProcessor", "CLIPFeatureExtractor")},
    "image_encoder": {},  # takes an IP-Adapter's pictures, which no stage has
}
_SD = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
_SD_MAY = ("safety_checker", "feature_extractor", "image_encoder")
_XL = ("vae", "text_encoder_2", "tokenizer_2", "unet", "scheduler")
_XL_MAY = ("text_encoder", "tokenizer", "feature_extractor", "image_encoder")


def needed(pipeline: str) -> tuple[str, ...]:
    """The components without which a pipeline of this class cannot run."""
    if TASKS[pipeline] == "unconditional":
        return ("unet", "scheduler")
    return _XL if "XL" in pipeline else _SD


def optional(pipeline: str) -> tuple[str, ...]:
    """The components that a pipeline of this class may have or lack."""
    if TASKS[pipeline] == "unconditional":
        return ()
    return _XL_MAY if "XL" in pipeline else _SD_MAY


def unet_classes(pipeline: str) -> tuple[str, str]:
    """The stock and the shipped class of the U-Net that a pipeline of this class calls."""
    i = int(TASKS[pipeline] == "unconditional")
    return STOCK_UNETS[i], SHIPPED_UNETS[i]


def components(index: Config) -> dict[str, str]:
    """Class by name of the components that a model has, from its checked `model_index.json`."""
    entries = {k: v for k, v in index.items() if isinstance(v, list)}
    return {name: entry[1] for name, entry in entries.items() if entry[1] is not None}


def check_index(index: Config, where: str) -> None:
    """Raise `Unsupported` or `BadInput` unless a `model_index.json` names known components only.

    Nothing is imported. `where` names the model in messages.
    """
    entry = index.get("unet")
    unet = _pair(entry)[1] if entry is not None else None
    if unet not in STOCK_UNETS + SHIPPED_UNETS:
        other = index.get("transformer", entry)
        raise Unsupported(
            f"{where}: the denoiser is {_class_name(other)}; supported is "
            f"{' or '.join(STOCK_UNETS)} under the name 'unet'."
        )
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in TASKS:
        raise Unsupported(f"{where} is a {_plain(pipeline)}; supported are {', '.join(TASKS)}.")
    for name, value in index.items():
        if isinstance(value, list) or name in CLASSES:
            check_entry(name, value, pipeline, where)
    if unet not in unet_classes(pipeline):
        raise Unsupported(
            f"{where}: its unet is a {unet}, and a {pipeline} calls a {unet_classes(pipeline)[0]}. "
            "Correct model_index.json, or save the model with the pipeline that it belongs to."
        )
    _check_presence(index, pipeline, where)


def check_entry(name: str, value: object, pipeline: str, where: str) -> None:
    """Raise unless the component `name` may be of the library and class in `value`."""
    names = (*needed(pipeline), *optional(pipeline))
    if name not in names:
        raise Unsupported(
            f"{where}: model_index.json names a component {shown(name)}; a {pipeline} has "
            f"{', '.join(names)}."
        )
    library, class_name = _pair(value)
    if (library, class_name) == (None, None):
        return
    classes = CLASSES[name]
    if library not in classes or class_name not in classes[library]:
        choices = [f"{lib}.{cls}" for lib, names in classes.items() for cls in names]
        raise Unsupported(
            f"{where}: model_index.json has {shown(value)} as {name}; supported is "
            f"{', '.join(choices) or 'a model without it ([null, null])'}."
        )


def _check_presence(index: Config, pipeline: str, where: str) -> None:
    """Raise `BadInput` unless the pipeline has all components that it needs, in pairs."""
    present = components(index)
    if missing := [name for name in needed(pipeline) if name not in present]:
        raise BadInput(
            f"{where}: model_index.json has no {', '.join(missing)}, and a {pipeline} needs "
            f"{', '.join(needed(pipeline))}. Save the whole pipeline."
        )
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if (encoder in present) != (tokenizer in present):
            has, lacks = sorted((encoder, tokenizer), key=lambda name: name not in present)
            raise BadInput(
                f"{where}: model_index.json has {has} but no {lacks}; they go together. Save the "
                "whole pipeline."
            )


def check_agreement(index: Config, configs: Configs, where: str) -> None:
    """Raise `BadInput` where a component's own config names another class than the index."""
    for name, class_name in components(index).items():
        path = config_file(name)
        config = configs(path) if path else None
        if config is None:
            continue
        stated = config.get("_class_name")
        if stated is None and isinstance(config.get("architectures"), list):
            stated = (config["architectures"] or [None])[0]
        if stated is None and name in ("unet", "vae", "scheduler"):
            raise BadInput(f"{where}: {path} has no _class_name. Set it to {class_name!r}.")
        if stated is not None and stated != class_name:
            raise BadInput(
                f"{where}: {path} says that it is of a {shown(stated)}, model_index.json that "
                f"{name} is a {class_name}. Correct the one that is wrong."
            )


def config_file(component: str) -> str | None:
    """The file, by its path in the model's folder, in which a component states its class."""
    if component.startswith("tokenizer") or component == "feature_extractor":
        return None  # an older class or a faster one reads the same files
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    return f"{component}/{name}"


def _pair(value: object) -> tuple[str | None, str | None]:
    """Library and class of an entry; two empty texts, which are in no list, for a broken one."""
    if value is None:
        return None, None
    match value:
        case [None, None]:
            return None, None
        case [str(library), str(class_name)]:
            return library, class_name
    return "", ""


def _class_name(entry: object) -> str:
    return _plain(entry[1]) if isinstance(entry, list) and len(entry) == 2 else "missing"


def _plain(value: object) -> str:
    """A class's name without quotes, anything else as `shown` has it."""
    is_name = isinstance(value, str) and value.isidentifier() and len(value) <= QUOTED
    return str(value) if is_name else shown(value)
