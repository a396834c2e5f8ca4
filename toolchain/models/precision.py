"""The stored precision of each tensor of a U-Net, and rounding to it."""

from collections.abc import Mapping
from functools import reduce
from typing import TYPE_CHECKING

from laptop.errors import Unsupported
from laptop.models import locating

if TYPE_CHECKING:
    import torch
    from torch import nn

NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def stored_dtypes(model: str) -> dict[str, "torch.dtype"]:
    """The precision of each tensor of the U-Net, by its name; empty if no weights are stored.

    Reads the headers of its safetensors files. Raises `Unsupported` for integers and 8-bit floats.
    """
    import torch
    from safetensors import safe_open

    dtypes = {}
    for path in locating.weight_files(model):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            for name in names:
                stored = file.get_slice(name).get_dtype()
                if stored not in NAMES:
                    raise Unsupported(
                        f"{path} stores {name} as {stored}; U-Nets are read in "
                        f"{', '.join(NAMES.values())}. Convert the weights to float16 first."
                    )
                dtypes[name] = getattr(torch, NAMES[stored])
    return dtypes


def stored_dtype(model: str) -> "torch.dtype":
    """The precision that holds every tensor of the U-Net exactly; float32 if none is stored."""
    import torch

    dtypes = set(stored_dtypes(model).values())
    return reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def round_to_(
    unet: "nn.Module", dtypes: Mapping[str, "torch.dtype"], others: "torch.dtype"
) -> None:
    """Round each parameter and buffer of `unet` to its precision in `dtypes`, else to `others`."""
    for name, tensor in (*unet.named_parameters(), *unet.named_buffers()):
        tensor.data = tensor.data.to(dtypes.get(name, others))
