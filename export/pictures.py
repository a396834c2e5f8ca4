"""Pictures drawn by artifacts: a PyTorch pipeline whose networks are replaced by them.

So sampler, guidance and noise are the very same, and whatever differs comes from the artifacts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from laptop.export.arrays import Array, ArrayFunction
from laptop.export.components import Graph
from laptop.export.inputs import unet_inputs

Network = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@contextmanager
def replaced(pipe: Any, runners: Mapping[str, tuple[Graph, ArrayFunction]]) -> Iterator[None]:
    """`pipe` with artifacts in place of those of its networks that `runners` names."""
    calls = {name: _network(*given) for name, given in runners.items()}
    owners = []
    for name, call in calls.items():
        if name == "vae_encoder":
            continue  # no picture goes in
        owner, method = _place(pipe, name)
        setattr(owner, method, _as(name, call))  # on the instance, above its class's
        owners.append((owner, method))
    try:
        yield
    finally:
        for owner, method in owners:
            delattr(owner, method)


def _place(pipe: Any, component: str) -> tuple[Any, str]:
    return (
        (pipe.vae, "decode")
        if component == "vae_decoder"
        else (getattr(pipe, component), "forward")
    )


def _network(graph: Graph, runner: ArrayFunction) -> Network:
    """An artifact from tensors to tensors."""

    def call(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        got = runner({name: given[name].detach().numpy() for name in graph.inputs})
        return {name: torch.from_numpy(np.asarray(got[name], np.float32)) for name in graph.outputs}

    return call


def _as(component: str, call: Network) -> Callable[..., Any]:
    """The artifact with the signature of the network that it replaces."""
    match component:
        case "unet":
            return lambda *args, **kwargs: (call(unet_inputs(args, kwargs))["out_sample"],)
        case "vae_decoder":
            return lambda latents, *_, **__: (call({"latent_sample": latents})["sample"],)
        case _:
            return lambda ids, *_, **__: text_output(call({"input_ids": ids}))


def text_output(found: Mapping[str, Tensor]) -> Any:
    """Outputs of a text encoder as transformers has them."""
    numbered = [name for name in found if name.startswith("hidden_states.")]
    states = tuple(found[f"hidden_states.{i}"] for i in range(len(numbered)))
    others = {name: value for name, value in found.items() if name not in numbered}
    kind = CLIPTextModelOutput if "text_embeds" in found else BaseModelOutputWithPooling
    return kind(**others, hidden_states=states or None)


def save_png(picture: Array, path: Path) -> None:
    """A picture (1, 3, H, W) in [0, 1]; what is no number is black."""
    pixels = np.nan_to_num(picture[0]).clip(0, 1).transpose(1, 2, 0)
    Image.fromarray((pixels * 255).round().astype(np.uint8)).save(path)


def as_pictures(decoded: Sequence[Mapping[str, Tensor]]) -> list[Array]:
    """What was recorded of the VAE encoder, in [-1, 1], as pictures in [0, 1]."""
    return [(row["sample"].numpy() + 1) / 2 for row in decoded]
