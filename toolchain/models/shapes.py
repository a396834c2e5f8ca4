"""Shapes of the inputs and outputs of networks, by their configs alone."""

from laptop.models.component_classes import Config
from laptop.models.component_fit import text_widths

Shapes = dict[str, tuple[int, ...]]
Size = tuple[int, int]  # height, width
VAE_LEVELS = 4  # of Stable Diffusion's VAEs, and of a U-Net whose config leaves its levels out
TIME_IDS = 6  # SDXL's sizes; the refiner has 5 and a longer embedding, and they are joined anyway


def latent_pixels(vae: Config) -> int:
    """Pixels of a picture on the side of one latent, from the VAE's config."""
    channels = vae.get("block_out_channels") or vae.get("decoder_block_out_channels")
    return int(2 ** ((len(channels) if channels else VAE_LEVELS) - 1))


def native_size(unet: Config) -> Size:
    """Height and width of the latents that a U-Net was trained for, from its config."""
    size = unet["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def text_width(unet: Config) -> int | None:
    """Width of `encoder_hidden_states`; None for a U-Net that takes no text."""
    if unet.get("cross_attention_dim") is None:
        return None
    return int(max(text_widths(unet), default=1280))  # one, or no block takes the text


def pooled_width(unet: Config) -> int | None:
    """Width of SDXL's `text_embeds`; None for other U-Nets."""
    if unet.get("addition_embed_type") != "text_time":
        return None
    times = TIME_IDS * unet["addition_time_embed_dim"]
    return int(unet["projection_class_embeddings_input_dim"] - times)


def input_shapes(unet: Config, tokens: int, batch: int) -> Shapes:
    """Shapes of all tensors that a U-Net takes, by the names of exported graphs.

    `timestep` is (): pipelines pass one for the whole batch.
    """
    shapes: Shapes = {
        "sample": (batch, unet["in_channels"], *native_size(unet)),
        "timestep": (),
    }
    if (width := text_width(unet)) is not None:
        shapes["encoder_hidden_states"] = (batch, tokens, width)
    if unet.get("time_cond_proj_dim"):
        shapes["timestep_cond"] = (batch, unet["time_cond_proj_dim"])
    if (pooled := pooled_width(unet)) is not None:
        shapes |= {"text_embeds": (batch, pooled), "time_ids": (batch, TIME_IDS)}
    return shapes
