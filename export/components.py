"""A pipeline's networks as plain graphs: tensors in, tensors out, under optimum's names.

Every target exports these graphs and parity runs the same ones in PyTorch, so that reference and
artifact can never mean different things. Components are named as optimum's folders are; the VAE is
two of them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from laptop.errors import Unsupported
from laptop.export.settings import COMPONENTS
from laptop.models import loading

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
    from transformers import PreTrainedModel

ALL = COMPONENTS
FP32_INPUTS = ("timestep", "time_ids")  # up to 1000 and more, with fractions: too fine for fp16
# Layers that stay in float where the rest gets 8 bits: all others depend on the embeddings of time
# and sizes, and the picture on the outermost ones, for less than a hundredth of the work.
# docs/explanation/log.md has what 8 bits would cost there.
SENSITIVE = ("time_embedding", "add_embedding", "time_emb_proj", "conv_in", "conv_out")
PROCESS_BYTES = 1 << 30  # of a process that has imported torch, diffusers and a target's library


@dataclass(frozen=True)
class Graph:
    """One component: `module(*inputs)` returns a tuple of tensors, one a name in `outputs`."""

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def present(pipe: "DiffusionPipeline") -> tuple[str, ...]:
    """The components that this pipeline has, in the order of `ALL`."""
    missing = () if getattr(pipe, "text_encoder_2", None) is not None else ("text_encoder_2",)
    return tuple(name for name in ALL if name not in missing)


def folder_of(component: str) -> str:
    """The folder of a diffusers pipeline that holds a component's weights."""
    return "vae" if component.startswith("vae_") else component


def load(model: str, component: str, dtype: torch.dtype | None = None) -> Graph:
    """One component of `model` alone, in `dtype` (float32 when None), on the CPU."""
    if component == "unet":
        return _unet(loading.load_unet(model, dtype))
    return graph(loading.load_encoders(model, dtype, only=folder_of(component)), component)


def empty(model: str) -> Graph:
    """The U-Net from its config alone, on the meta device: no weight is read."""
    return _unet(loading.empty_unet(model))


def graph(pipe: "DiffusionPipeline", component: str) -> Graph:
    """One component, sharing the pipeline's weights; `Unsupported` for other U-Net conditions."""
    match component:
        case "unet":
            return _unet(pipe.unet)
        case "text_encoder" | "text_encoder_2":
            # the XL pipelines read hidden_states[-2], the older ones the last state
            is_xl = "XL" in type(pipe).__name__
            return _text_encoder(getattr(pipe, component), is_xl)
        case "vae_encoder":
            return Graph(VaeEncoder(pipe.vae).eval(), ("sample",), ("latent_parameters",))
        case "vae_decoder":
            return Graph(VaeDecoder(pipe.vae).eval(), ("latent_sample",), ("sample",))
    raise AssertionError(component)


def _unet(unet: "UNet2DConditionModel") -> Graph:
    kind = unet.config.addition_embed_type
    if kind not in (None, "text_time") or unet.config.class_embed_type:
        raise Unsupported(
            f"the U-Net is conditioned by addition_embed_type={kind!r}, "
            f"class_embed_type={unet.config.class_embed_type!r}; export covers Stable Diffusion "
            "1.x, 2.x and XL (None or 'text_time', None)."
        )
    added = () if kind is None else ("text_embeds", "time_ids")
    inputs = ("encoder_hidden_states", *added)
    if unet.config.time_cond_proj_dim is not None:
        inputs = ("timestep_cond", *inputs)
        return Graph(GuidedUnet(unet).eval(), ("sample", "timestep", *inputs), ("out_sample",))
    return Graph(Unet(unet).eval(), ("sample", "timestep", *inputs), ("out_sample",))


def _text_encoder(encoder: "PreTrainedModel", all_states: bool) -> Graph:
    projects = hasattr(encoder, "text_projection")
    names: tuple[str, ...] = (
        ("text_embeds", "last_hidden_state") if projects else ("last_hidden_state", "pooler_output")
    )
    if all_states:
        layers = encoder.config.num_hidden_layers
        names = (*names, *(f"hidden_states.{i}" for i in range(layers + 1)))
    return Graph(TextEncoder(encoder, names).eval(), ("input_ids",), names)


class Unet(nn.Module):
    """Latents, scalar timestep and text states to the predicted noise or velocity."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,  # (B, C, H, W)
        timestep: Tensor,  # () or (1,), float
        encoder_hidden_states: Tensor,  # (B, tokens, width)
        text_embeds: Tensor | None = None,  # (B, width)
        time_ids: Tensor | None = None,  # (B, 6)
        timestep_cond: Tensor | None = None,  # (B, width), the guidance scale embedded
    ) -> tuple[Tensor]:
        added = None
        if text_embeds is not None:
            added = {"text_embeds": text_embeds, "time_ids": time_ids}
        out = self.unet(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added,
            return_dict=False,
        )
        return (out[0],)


class GuidedUnet(Unet):
    """A U-Net with the embedded guidance scale before inputs that may be missing.

    Inputs of graphs are positional.
    """

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor,
        timestep_cond: Tensor,  # (B, width)
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor]:
        return super().forward(
            sample, timestep, encoder_hidden_states, text_embeds, time_ids, timestep_cond
        )


class TextEncoder(nn.Module):
    """Token ids (B, tokens) to the states that `names` lists."""

    def __init__(self, encoder: nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.encoder = encoder
        self.names = names

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        result = self.encoder(input_ids, output_hidden_states=True)
        states = {f"hidden_states.{i}": state for i, state in enumerate(result.hidden_states)}
        return tuple(states[name] if name in states else result[name] for name in self.names)


class VaeEncoder(nn.Module):
    """Image (B, 3, 8H, 8W) in [-1, 1] to mean and log variance, (B, 2C, H, W)."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> tuple[Tensor]:
        return (vae_of(self).encode(sample).latent_dist.parameters,)


class VaeDecoder(nn.Module):
    """Latents divided by the scaling factor (B, C, H, W) to an image (B, 3, 8H, 8W)."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> tuple[Tensor]:
        return (vae_of(self).decode(latent_sample, return_dict=False)[0],)


def vae_of(module: nn.Module) -> "AutoencoderKL":
    """The VAE of which a graph's module is one half."""
    return cast("AutoencoderKL", module.vae)


@torch.no_grad()
def run(graph: Graph, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of one call by name."""
    values = graph.module(*(inputs[name] for name in graph.inputs))
    return dict(zip(graph.outputs, values, strict=True))
