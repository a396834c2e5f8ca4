"""SDXL in miniature: the same component classes and the same wiring, three million weights.

Smaller: 64 x 64 images, 8 x 8 latents (the VAE's factor 8 is SDXL's), 16 tokens. As in SDXL: two
text encoders whose penultimate states are joined, the second with a projection;
`text_time` micro-conditioning; a first level without attention. The schedule has zero terminal SNR
with v-prediction (arXiv 2305.08891), because plain backgrounds are what SD's schedule cannot draw.
"""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers import StableDiffusionXLPipeline as Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from laptop.models.word_tokenizer import word_tokenizer
from laptop.tiny.scenes import BACKGROUNDS, COLOURS, IMAGE_SIZE, RELATIONS, SHAPES, SIZES

MAX_TOKENS = 16  # the longest caption has 12 words, and the two marks
TEXT_WIDTH = 64
WORDS = sorted({*SIZES, *COLOURS, *SHAPES, *BACKGROUNDS, *" ".join(RELATIONS).split(), "a", "on"})


def tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with one token for each word of a caption."""
    return word_tokenizer(WORDS, MAX_TOKENS)


def _text_config(tokens: CLIPTokenizer, **changes: object) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        **changes,
    )


def vae() -> AutoencoderKL:
    """The autoencoder: 64 x 64 x 3 pixels to 8 x 8 x 4 latents."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
    )


def unet() -> UNet2DConditionModel:
    """The U-Net, with 33 removable layers of `fine` granularity.

    The innermost level is the narrowest, unlike SDXL's: at 2 x 2 latents there is little to
    compute, and weights that do nothing would make pruning look free
    (docs/explanation/log.md, 2026-11-22).
    """
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 64, 16),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 1),
        attention_head_dim=(2, 2, 2),  # numbers of heads, as in SDXL's config
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + TEXT_WIDTH,
        norm_num_groups=8,
    )


def scheduler() -> DDIMScheduler:
    """The schedule: SD's betas rescaled to zero terminal SNR, v-prediction, trailing steps."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def pipeline(seed: int) -> Pipeline:
    """The whole model with untrained weights, reproducible from `seed`."""
    torch.manual_seed(seed)
    tokens = tokenizer()
    return Pipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(_text_config(tokens)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokens, hidden_act="gelu")),
        tokenizer=tokens,
        tokenizer_2=tokenizer(),
        unet=unet(),
        scheduler=scheduler(),
        add_watermarker=False,
    )
