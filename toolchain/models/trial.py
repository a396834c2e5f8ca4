"""A model's networks, run once before anything expensive.

Configs that are right value by value may still describe a network that cannot run. It runs on
PyTorch's meta device, which computes shapes and no values.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from laptop.models.shapes import input_shapes, latent_pixels

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from torch import Tensor, nn

LATENTS = 8  # a side


def try_network(part: str, network: "nn.Module") -> None:
    """Run a component that is on the meta device once.

    Raises whatever the network does, and `ValueError` for an output of another shape than its
    config states.
    """
    import torch

    with torch.no_grad():
        for name, (tensor, shape) in _outputs(part, network).items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has the shape {list(tensor.shape)}, not {list(shape)}")


def _outputs(part: str, network: "ModelMixin") -> "dict[str, tuple[Tensor, tuple[int, ...]]]":
    """The outputs of a component, with the shapes that they must have."""
    config = network.config
    if part == "unet":
        shapes = input_shapes(config, tokens=7, batch=1)
        batch, _, *size = shapes["sample"]
        return {"its output": (_unet(network, shapes), (batch, config["out_channels"], *size))}
    if part == "vae":
        side = LATENTS * latent_pixels(config)
        picture = empty(1, config["in_channels"], side, side)
        latents = empty(1, config["latent_channels"], LATENTS, LATENTS)
        encoded = network.encode(picture)
        coded = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
        decoded = network.decode(latents).sample
        return {
            "its encoding": (coded, tuple(latents.shape)),
            "its decoding": (decoded, tuple(picture.shape)),
        }
    if part.startswith("text_encoder"):
        import torch

        tokens = config.max_position_embeddings
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        states = network(ids, output_hidden_states=True).hidden_states[-2]
        return {"its text": (states, (1, tokens, config.hidden_size))}
    return {}


def _unet(network: "ModelMixin", shapes: "Mapping[str, tuple[int, ...]]") -> "Tensor":
    inputs = {name: empty(*shape) for name, shape in shapes.items()}
    added = {k: inputs.pop(k) for k in ("text_embeds", "time_ids") if k in inputs}
    output: Tensor = network(**inputs, **({"added_cond_kwargs": added} if added else {})).sample
    return output


def empty(*shape: int) -> "Tensor":
    import torch

    return torch.empty(shape, device="meta")
