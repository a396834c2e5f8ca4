"""Pictures drawn by artifacts: a PyTorch pipeline whose networks are replaced by them.

So sampler, guidance and noise are the very same, and whatever differs comes from the artifacts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from laptop.export.arrays import Array, ArrayFunction
from laptop.export.components import Graph
from laptop.export.inputs import unet_inputs

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Network = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@contextmanager
def replaced(
    pipe: "DiffusionPipeline", functions: Mapping[str, tuple[Graph, ArrayFunction]]
) -> Iterator[None]:
    """Let artifacts compute in place of the networks of `pipe` that `functions` names."""
    calls = {name: _network(*pair) for name, pair in functions.items()}
    owners = []
    for name, call in calls.items():
        if name == "vae_encoder":
            continue  # no picture goes in
        owner, method = _method(pipe, name)
        setattr(owner, method, _as(name, call))  # on the instance, above its class's
        owners.append((owner, method))
    try:
        yield
    finally:
        for owner, method in owners:
            delattr(owner, method)


def _method(pipe: "DiffusionPipeline", component: str) -> tuple[nn.Module, str]:
    """The network of a component, and the method that its pipeline calls."""
    return (
        (pipe.vae, "decode")
        if component == "vae_decoder"
        else (getattr(pipe, component), "forward")
    )


def _network(graph: Graph, function: ArrayFunction) -> Network:
    """An artifact as a function of tensors."""

    def call(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = function({name: inputs[name].detach().numpy() for name in graph.inputs})
        return {
            name: torch.from_numpy(np.asarray(outputs[name], np.float32)) for name in graph.outputs
        }

    return call


def _as(component: str, call: Network) -> Callable[..., object]:
    """The artifact with the signature of the network that it replaces."""
    match component:
        case "unet":
            return lambda *args, **kwargs: (call(unet_inputs(args, kwargs))["out_sample"],)
        case "vae_decoder":
            return lambda latents, *_, **__: (call({"latent_sample": latents})["sample"],)
        case _:
            return lambda ids, *_, **__: text_output(call({"input_ids": ids}))


def text_output(outputs: Mapping[str, Tensor]) -> BaseModelOutputWithPooling | CLIPTextModelOutput:
    """The outputs of a text encoder as transformers has them."""
    numbered = [name for name in outputs if name.startswith("hidden_states.")]
    states = tuple(outputs[f"hidden_states.{i}"] for i in range(len(numbered)))
    others = {name: value for name, value in outputs.items() if name not in numbered}
    kind = CLIPTextModelOutput if "text_embeds" in outputs else BaseModelOutputWithPooling
    return kind(**others, hidden_states=states or None)


def save_png(picture: Array, path: Path) -> None:
    """Save a picture (1, 3, H, W) in [0, 1]; NaN becomes black."""
    pixels = np.nan_to_num(picture[0]).clip(0, 1).transpose(1, 2, 0)
    Image.fromarray((pixels * 255).round().astype(np.uint8)).save(path)


def as_pictures(decoded: Sequence[Mapping[str, Tensor]]) -> list[Array]:
    """The recorded inputs of the VAE encoder, in [-1, 1], as pictures in [0, 1]."""
    return [(row["sample"].numpy() + 1) / 2 for row in decoded]
