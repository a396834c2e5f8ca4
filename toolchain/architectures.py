"""U-Nets of published models by known name, as keyword arguments of `UNet2DConditionModel`.

What is not named is diffusers' default, which is Stable Diffusion 1's U-Net. These are facts of the
published `unet/config.json` files, so that a model of full size can be built without a download.
Every one is checked by its number of parameters (`tests/test_architectures.py`).
"""

from typing import Any

UNETS: dict[str, dict[str, Any]] = {
    # stable-diffusion-v1-5/stable-diffusion-v1-5
    "sd15": {"sample_size": 64, "cross_attention_dim": 768},
    # stable-diffusion-v1-5/stable-diffusion-inpainting: the mask and the masked picture's latents
    # come in with the noisy latents.
    "sd15-inpainting": {"sample_size": 64, "cross_attention_dim": 768, "in_channels": 9},
    # SimianLuo/LCM_Dreamshaper_v7: the guidance scale is an input. It draws 768 x 768; that its
    # config says so is from memory.
    "lcm-sd15": {"sample_size": 96, "cross_attention_dim": 768, "time_cond_proj_dim": 256},
    # stabilityai/stable-diffusion-2-1, 768 x 768. That it predicts v stands in the scheduler.
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    # stabilityai/stable-diffusion-xl-base-1.0
    "sdxl": {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    # stabilityai/stable-diffusion-xl-refiner-1.0: one text encoder, and 5 time ids, the last an
    # aesthetic score: 5 * 256 + 1280 = 2560.
    "sdxl-refiner": {
        "sample_size": 128,
        "down_block_types": (
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (384, 768, 1536, 1536),
        "transformer_layers_per_block": 4,
        "attention_head_dim": (6, 12, 24, 24),
        "cross_attention_dim": 1280,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560,
    },
}
