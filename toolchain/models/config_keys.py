"""Every config key of the classes that this version accepts, and what it does with each of them.

A key is honoured (where), irrelevant (because), or refused with a message unless it has one of the
listed values. A test holds the table against the signatures of the installed diffusers; a key that
the table lacks is refused unless it has the default of the installed class.
"""

import inspect
from dataclasses import dataclass

from laptop.errors import Unsupported
from laptop.files import QUOTED, shown
from laptop.models.component_classes import SCHEDULERS, SHIPPED_UNETS, TASKS, Config

OFF = (None, False)


@dataclass(frozen=True)
class Honoured:
    """A key that changes results; `where` names the stages."""

    where: str


@dataclass(frozen=True)
class Irrelevant:
    """A key that changes no result of this package."""

    because: str


@dataclass(frozen=True)
class Refused:
    """A key that this version cannot honour, but for some values."""

    because: str
    unless: tuple[object, ...] = (
        OFF  # values that are honoured: diffusers builds or draws with them
    )


Rule = Honoured | Irrelevant | Refused

NETWORK = Honoured("diffusers builds the network from it, and every stage runs that network")
SCHEDULE = Honoured("drawing; pruning/noising.py adds noise by it in training and in calibration")
DRAWING = Honoured("drawing: every stage draws with the model's own scheduler")
CLASS_LABELS = "the U-Net takes class labels, which calibration has not"
NO_LABELS = Irrelevant("only where the U-Net takes class labels, which is refused")
SIZES = Honoured("conditions of SDXL: drawn by its pipelines, computed by distill, exported")
UNET_2D: dict[str, Rule] = {  # of both U-Nets
    "sample_size": Honoured("height and width of latents: drawn, trained, exported, timed"),
    "in_channels": Honoured("component_fit.py holds it against the pipeline and the VAE"),
    "out_channels": Honoured("component_fit.py holds it against the pipeline and in_channels"),
    "act_fn": NETWORK,
    "attention_head_dim": NETWORK,
    "block_out_channels": NETWORK,
    "center_input_sample": NETWORK,
    "down_block_types": NETWORK,
    "downsample_padding": NETWORK,
    "dropout": NETWORK,
    "flip_sin_to_cos": NETWORK,
    "freq_shift": NETWORK,
    "layers_per_block": NETWORK,
    "mid_block_scale_factor": NETWORK,
    "mid_block_type": NETWORK,
    "norm_eps": NETWORK,
    "norm_num_groups": NETWORK,
    "resnet_time_scale_shift": NETWORK,
    "time_embedding_dim": NETWORK,
    "time_embedding_type": NETWORK,
    "up_block_types": NETWORK,
    "class_embed_type": Refused(CLASS_LABELS),
    "num_class_embeds": Refused(CLASS_LABELS),
}
TABLE: dict[str, dict[str, Rule]] = {
    "UNet2DConditionModel": {
        **UNET_2D,
        "addition_embed_type": Refused(
            "it takes conditions other than text, or text and SDXL's sizes", (None, "text_time")
        ),
        "addition_embed_type_num_heads": Irrelevant("only where addition_embed_type is 'text'"),
        "addition_time_embed_dim": SIZES,
        "attention_type": Refused("it takes boxes (GLIGEN), which no stage has", ("default",)),
        "class_embeddings_concat": NO_LABELS,
        "conv_in_kernel": NETWORK,
        "conv_out_kernel": NETWORK,
        "cross_attention_dim": NETWORK,
        "cross_attention_norm": NETWORK,
        "dual_cross_attention": Refused("it takes two prompts (Versatile Diffusion)"),
        "encoder_hid_dim": Honoured("width of the text that calibration, distill and export pass"),
        "encoder_hid_dim_type": Refused(
            "it takes pictures beside the text (Kandinsky, IP-Adapter)", (None, "text_proj")
        ),
        "mid_block_only_cross_attention": NETWORK,
        "num_attention_heads": Refused(
            "diffusers does not build it; it reads the number of heads in attention_head_dim", OFF
        ),
        "only_cross_attention": NETWORK,
        "projection_class_embeddings_input_dim": SIZES,
        "resnet_out_scale_factor": NETWORK,
        "resnet_skip_time_act": NETWORK,
        "reverse_transformer_layers_per_block": NETWORK,
        "time_cond_proj_dim": Honoured(
            "embedded guidance: drawing, distill, an input of exported graphs"
        ),
        "time_embedding_act_fn": NETWORK,
        "timestep_post_act": NETWORK,
        "transformer_layers_per_block": NETWORK,
        "upcast_attention": NETWORK,
        "use_linear_projection": NETWORK,
    },
    "UNet2DModel": {
        **UNET_2D,
        "add_attention": NETWORK,
        "attn_norm_num_groups": NETWORK,
        "downsample_type": NETWORK,
        "num_train_timesteps": NETWORK,
        "upsample_type": NETWORK,
    },
    "AutoencoderKL": {
        "act_fn": NETWORK,
        "block_out_channels": Honoured("NETWORK, and pixels of a latent: description.py"),
        "down_block_types": NETWORK,
        "force_upcast": Honoured("drawing: the VAE decodes in float32; caches are made in float32"),
        "in_channels": Refused("pictures have three channels here", (3,)),
        "latent_channels": Honoured("component_fit.py holds it against the U-Net's channels"),
        "latents_mean": Honoured("description.py: cached latents, and pipelines that apply it"),
        "latents_std": Honoured("description.py: cached latents, and pipelines that apply it"),
        "layers_per_block": NETWORK,
        "mid_block_add_attention": NETWORK,
        "norm_num_groups": NETWORK,
        "out_channels": Refused("pictures have three channels here", (3,)),
        "sample_size": Irrelevant("only the size of tiles, and nothing is computed in tiles"),
        "scaling_factor": Honoured("description.py: cached latents; drawing; export"),
        "shift_factor": Honoured("description.py refuses it where the pipeline does not apply it"),
        "up_block_types": NETWORK,
        "use_post_quant_conv": NETWORK,
        "use_quant_conv": NETWORK,
    },
    "AutoencoderTiny": {
        "act_fn": NETWORK,
        "block_out_channels": Irrelevant("a copy of decoder_block_out_channels"),
        "decoder_block_out_channels": Honoured("NETWORK, and pixels of a latent: description.py"),
        "encoder_block_out_channels": NETWORK,
        "force_upcast": Irrelevant("it has none"),
        "in_channels": Refused("pictures have three channels here", (3,)),
        "latent_channels": Honoured("component_fit.py holds it against the U-Net's channels"),
        "latent_magnitude": Irrelevant("only where latents are stored in 8 bits"),
        "latent_shift": Irrelevant("only where latents are stored in 8 bits"),
        "num_decoder_blocks": NETWORK,
        "num_encoder_blocks": NETWORK,
        "out_channels": Refused("pictures have three channels here", (3,)),
        "scaling_factor": Honoured("drawing"),
        "shift_factor": Honoured("description.py refuses it where the pipeline does not apply it"),
        "upsample_fn": NETWORK,
        "upsampling_scaling_factor": Refused("a block doubles the sides here", (2,)),
    },
    # Schedulers share their files: each reads the keys that it has, so all have one table.
    "Scheduler": {
        "algorithm_type": DRAWING,
        "beta_end": SCHEDULE,
        "beta_schedule": SCHEDULE,
        "beta_start": SCHEDULE,
        "clip_sample": DRAWING,
        "clip_sample_range": DRAWING,
        "corrector_order": DRAWING,
        "disable_corrector": DRAWING,
        "dynamic_thresholding_ratio": DRAWING,
        "euler_at_final": DRAWING,
        "final_sigmas_type": DRAWING,
        "flow_shift": SCHEDULE,
        "interpolation_type": DRAWING,
        "lambda_min_clipped": DRAWING,
        "lower_order_final": DRAWING,
        "noise_sampler_seed": DRAWING,
        "num_train_timesteps": SCHEDULE,
        "original_inference_steps": DRAWING,
        "predict_epsilon": Refused(
            "diffusers reads prediction_type in its place; set that to 'sample'", (None, True)
        ),
        "predict_x0": DRAWING,
        "prediction_type": SCHEDULE,
        "predictor_order": DRAWING,
        "rescale_betas_zero_snr": SCHEDULE,
        "rho": SCHEDULE,
        "s_noise": DRAWING,
        "sample_max_value": DRAWING,
        "set_alpha_to_one": DRAWING,
        "shift_terminal": Refused("training does not shift its times so"),
        "sigma_data": SCHEDULE,
        "sigma_max": SCHEDULE,
        "sigma_min": SCHEDULE,
        "sigma_schedule": SCHEDULE,
        "skip_prk_steps": DRAWING,
        "solver_order": DRAWING,
        "solver_p": Refused("it is another scheduler, which no file can hold"),
        "solver_type": DRAWING,
        "steps_offset": DRAWING,
        "tau_func": Refused("it is a function, which no file can hold"),
        "tensor_format": Irrelevant("of diffusers before 0.3, and only how arrays were held"),
        "thresholding": DRAWING,
        "time_shift_type": Irrelevant("only where use_dynamic_shifting is set, which is refused"),
        "timestep_scaling": DRAWING,
        "timestep_spacing": DRAWING,
        "timestep_type": SCHEDULE,
        "timestep_values": Irrelevant("of diffusers before 0.3, and always null"),
        "trained_betas": SCHEDULE,
        "use_beta_sigmas": DRAWING,
        "use_dynamic_shifting": Refused("the pipelines of this version pass it no shift"),
        "use_exponential_sigmas": DRAWING,
        "use_flow_sigmas": SCHEDULE,
        "use_karras_sigmas": DRAWING,
        "use_lu_lambdas": DRAWING,
        "variance_type": Honoured("drawing; component_fit.py holds it against out_channels"),
    },
    "Pipeline": {
        "add_watermarker": Irrelevant(
            "it is no key of the files; drawing marks pictures if it can"
        ),
        "force_zeros_for_empty_prompt": Honoured("drawing; distill: the empty caption"),
        "requires_aesthetics_score": Honoured("drawing; component_fit.py: the refiner's sizes"),
        "requires_safety_checker": Irrelevant("diffusers only warns by it"),
    },
}
for _shipped in SHIPPED_UNETS:  # has the keys of its stock class, and which layers are gone
    TABLE[_shipped] = {
        **TABLE[_shipped.removeprefix("Laptop")],
        "removed": Honoured("laptop_unet_v1.py builds the network without these layers"),
        "healed": Honoured("laptop_unet_v1.py builds the stand-ins of these layers"),
    }


def table_of(class_name: str) -> dict[str, Rule]:
    """The rules for the config of an accepted class."""
    if class_name in TASKS:
        return TABLE["Pipeline"]
    return TABLE["Scheduler" if class_name in SCHEDULERS else class_name]


def check_keys(class_name: str, config: Config, where: str) -> None:
    """Raise `Unsupported` for a key of a config that this version cannot honour.

    `where` is the config's path. Imports diffusers only for a key that the table lacks.
    """
    rules = table_of(class_name)
    for key, value in config.items():
        if key.startswith("_"):  # who wrote the file
            continue
        rule = rules.get(key)
        if isinstance(rule, Refused) and not any(_same(value, v) for v in rule.unless):
            raise Unsupported(f"{where}: {key} is {shown(value)}: {rule.because}. {_advice(rule)}")
        if rule is None:
            _check_unknown(class_name, key, value, where)


def _same(value: object, other: object) -> bool:
    return type(value) is type(other) and value == other


def _advice(rule: Refused) -> str:
    values = " or ".join("null" if v is None else shown(v) for v in rule.unless if v is not False)
    return f"Supported is {values}: use a model of that kind."


def _check_unknown(class_name: str, key: str, value: object, where: str) -> None:
    """Raise unless the installed class does the same without the key."""
    if value is None or value is False:  # off
        return
    default = _default(class_name, key)
    if value == default or (isinstance(default, tuple) and value == list(default)):
        return
    usual = (
        f"diffusers has {shown(default)} there"
        if default is not inspect.Parameter.empty
        else f"the installed diffusers has no such key for a {class_name}"
    )
    name = key if key.isidentifier() and len(key) <= QUOTED else shown(key)
    raise Unsupported(
        f"{where}: {name} is {shown(value)}, which this version of laptop does not know ({usual}); "
        "it must not be ignored. Remove the key if the model does without, or update laptop."
    )


def _default(class_name: str, key: str) -> object:
    """The default of the installed class for a key; `Parameter.empty` where it has none."""
    import diffusers

    cls = getattr(diffusers, class_name.removeprefix("Laptop"))
    parameter = inspect.signature(cls.__init__).parameters.get(key)
    return inspect.Parameter.empty if parameter is None else parameter.default
