"""U-Nets of published models by name, as keyword arguments of their class in diffusers.

An argument that is left out has diffusers' default, which for `UNet2DConditionModel` is Stable
Diffusion 1's. These are facts of the published `unet/config.json` files, so that a model of full
size can be built without a download. Every one is checked by its number of parameters
(`tests/models/test_architectures.py`).
"""

UNETS: dict[str, dict[str, object]] = {
    # stable-diffusion-v1-5/stable-diffusion-v1-5
    "sd15": {"sample_size": 64, "cross_attention_dim": 768},
    # stable-diffusion-v1-5/stable-diffusion-inpainting: the mask and the masked picture's latents
    # come in with the noisy latents.
    "sd15-inpainting": {"sample_size": 64, "cross_attention_dim": 768, "in_channels": 9},
    # SimianLuo/LCM_Dreamshaper_v7: the guidance scale is an input. It draws 768 x 768; that its
    # config says so is from memory.
    "lcm-sd15": {"sample_size": 96, "cross_attention_dim": 768, "time_cond_proj_dim": 256},
    # stabilityai/stable-diffusion-2-1, 768 x 768. Its scheduler states that it predicts v.
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
    # google/ddpm-cifar10-32, from memory; the paper has its 35.7 M parameters (appendix B).
    "ddpm-cifar10": {
        "sample_size": 32,
        "center_input_sample": False,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
}

PIPELINES = {
    "sd15": "StableDiffusionPipeline",
    "sd15-inpainting": "StableDiffusionInpaintPipeline",
    "lcm-sd15": "LatentConsistencyModelPipeline",
    "sd21": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
    "ddpm-cifar10": "DDPMPipeline",
}


def unet_class_name(name: str) -> str:
    """Name of the diffusers class of a known architecture's U-Net."""
    return "UNet2DModel" if name.startswith("ddpm-") else "UNet2DConditionModel"
