"""Load the networks and pipelines of checked models; weights are read from safetensors only."""

from typing import TYPE_CHECKING

from laptop.errors import BadInput
from laptop.files import read_json, reason
from laptop.models import stored_weights
from laptop.models.component_classes import Config
from laptop.models.locating import folder, unet_config, variant
from laptop.models.unet_classes import unet_class

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, ModelMixin

SAFE = {"use_safetensors": True}  # the other format, pickles, can run code when it is read
UNLOADABLE = (  # what diffusers and transformers raise for foreign values in configs
    *(OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, ImportError),
    RuntimeError,  # also for tensors of a wrong shape, and RecursionError
)


def load_unet(model: str, dtype: "torch.dtype | None" = None) -> "ModelMixin":
    """The U-Net of `model` in `dtype` (float32 when None), in evaluation mode, on the CPU."""
    import torch

    kwargs = {"torch_dtype": dtype or torch.float32, "variant": variant(model), **SAFE}
    cls = unet_class(unet_config(model))
    try:
        unet = cls.from_pretrained(folder(model), subfolder="unet", **kwargs)
    except UNLOADABLE as e:
        raise BadInput(f"the U-Net of {model} cannot be loaded ({reason(e)}).") from None
    stored_weights.check_finite({"unet": unet}, model)
    return unet.eval()


def empty_unet(model: str) -> "ModelMixin":
    """The U-Net of `model` from its config alone, on the meta device: no weight is read."""
    import torch

    config = unet_config(model)
    with torch.device("meta"):
        return unet_class(config).from_config(config).eval()


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
    # The constructors of the pipelines (XL's, and SD's) read these off a U-Net, and had none.
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
    """A pipeline without its U-Net: the networks that encode and decode pictures and captions.

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


def _unchecked(index: Config) -> dict[str, bool | None]:
    """Arguments by which a pipeline class leaves out its safety checker or watermark."""
    if "safety_checker" in index:
        return {"safety_checker": None, "requires_safety_checker": False}
    return {"add_watermarker": False} if "XL" in index["_class_name"] else {}
