"""Types and sizes of the values in a model's configs, checked before a network is built from them.

A folder may come from a stranger: a width of a billion channels or a million layers must be refused
before anything is allocated. The bounds are far above every published model. The meaning of a
value is checked in `config_keys`, and whether components fit together in `component_fit`.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NotRequired, TypedDict

from laptop.errors import BadInput
from laptop.fields import Length, Plain, Range
from laptop.files import shown
from laptop.models.component_classes import Config, Configs, components, config_file
from laptop.records import checked

REMEDY = "Correct it, or fetch the model again."
MOST_BLOCKS = 2000  # of a U-Net; SDXL has 79
MOST_SIDE = 4096  # of what is denoised: latents of 32,768 pixels

Word = Annotated[str, Plain()] | None
Flag = bool | None  # diffusers takes null for false
Width = Annotated[int, Range(1, 65_536)]  # channels, features
Channels = Annotated[int, Range(1, 4096)]  # in and out of a network
Side = Annotated[int, Range(1, MOST_SIDE)]
Heads = Annotated[int, Range(1, 1024)]  # or their width
Layers = Annotated[int, Range(1, 100)]
Depth = Annotated[int, Range(0, 100)]  # transformer blocks of a layer; or of every layer in a list
Kernel = Annotated[int, Range(1, 31)]
Positive = Annotated[float, Range(above=0, most=1_000_000)]
Epsilon = Annotated[float, Range(0, 1)]
Dropout = Annotated[float, Range(0, below=1)]
Number = Annotated[float, Range(-1_000_000, 1_000_000)]
FEW = Length(16, least=1)  # levels of a network
Widths = Annotated[list[Width], FEW]
Types = Annotated[list[Annotated[str, Plain()]], FEW]
Depths = Depth | Annotated[list[Depth | Annotated[list[Depth], FEW]], FEW]


class UnetValues(TypedDict, total=False):
    """The config of a U-Net of diffusers, or of this package's own class."""

    sample_size: Side | tuple[Side, Side] | None
    in_channels: Channels
    out_channels: Channels
    act_fn: Annotated[str, Plain()]
    add_attention: Flag
    addition_embed_type: Word
    addition_embed_type_num_heads: Heads | None
    addition_time_embed_dim: Width | None
    attention_head_dim: Heads | Annotated[list[Heads], FEW] | None
    attn_norm_num_groups: Heads | None
    block_out_channels: Widths
    center_input_sample: Flag
    conv_in_kernel: Kernel
    conv_out_kernel: Kernel
    cross_attention_dim: Width | Widths | None
    cross_attention_norm: Word
    down_block_types: Types
    downsample_padding: Annotated[int, Range(0, 16)] | None
    downsample_type: Word
    dropout: Dropout
    encoder_hid_dim: Width | None
    encoder_hid_dim_type: Word
    flip_sin_to_cos: Flag
    freq_shift: Number
    healed: list[Annotated[str, Plain()]]
    layers_per_block: Layers | Annotated[list[Layers], FEW]
    mid_block_only_cross_attention: Flag
    mid_block_scale_factor: Positive
    mid_block_type: Word
    norm_eps: Epsilon
    norm_num_groups: Heads | None
    num_attention_heads: Heads | Annotated[list[Heads], FEW] | None
    num_train_timesteps: Annotated[int, Range(1, 1_000_000)] | None
    only_cross_attention: Flag | Annotated[list[bool], FEW]
    projection_class_embeddings_input_dim: Width | None
    removed: list[Annotated[str, Plain()]]
    resnet_out_scale_factor: Positive
    resnet_skip_time_act: Flag
    resnet_time_scale_shift: Annotated[str, Plain()]
    reverse_transformer_layers_per_block: Depths | None
    time_cond_proj_dim: Width | None
    time_embedding_act_fn: Word
    time_embedding_dim: Width | None
    time_embedding_type: Annotated[str, Plain()]
    timestep_post_act: Word
    transformer_layers_per_block: Depths
    up_block_types: Types
    upcast_attention: Flag
    upsample_type: Word
    use_linear_projection: Flag


class VaeValues(TypedDict, total=False):
    """The config of an AutoencoderKL or AutoencoderTiny."""

    act_fn: Annotated[str, Plain()]
    block_out_channels: Widths
    decoder_block_out_channels: Widths
    down_block_types: Types
    encoder_block_out_channels: Widths
    force_upcast: Flag
    latent_channels: Channels
    latents_mean: list[Number] | None
    latents_std: list[Positive] | None
    layers_per_block: Layers
    mid_block_add_attention: Flag
    norm_num_groups: Heads
    num_decoder_blocks: Annotated[list[Layers], FEW]
    num_encoder_blocks: Annotated[list[Layers], FEW]
    sample_size: Annotated[int, Range(1, 65_536)] | list[Annotated[int, Range(1, 65_536)]] | None
    scaling_factor: Positive
    shift_factor: Number | None
    up_block_types: Types
    upsample_fn: Word
    use_post_quant_conv: Flag
    use_quant_conv: Flag


class SchedulerValues(TypedDict, total=False):
    """The config of a scheduler; lambda_min_clipped, which may be -Infinity, is not bounded."""

    algorithm_type: Literal[
        "data_prediction",
        "noise_prediction",
        "deis",
        "dpmsolver",
        "dpmsolver++",
        "sde-dpmsolver",
        "sde-dpmsolver++",
    ]
    beta_end: Annotated[float, Range(above=0, below=1)]
    beta_schedule: Literal[
        "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"
    ]
    beta_start: Annotated[float, Range(above=0, below=1)]
    clip_sample: Flag
    clip_sample_range: Positive
    corrector_order: Annotated[int, Range(1, 10)]
    disable_corrector: list[Annotated[int, Range(0, 1000)]]
    dynamic_thresholding_ratio: Annotated[float, Range(0, 1)]
    euler_at_final: Flag
    final_sigmas_type: Literal["zero", "sigma_min"]
    flow_shift: Positive
    interpolation_type: Literal["linear", "log_linear"]
    lower_order_final: Flag
    noise_sampler_seed: Annotated[int, Range(0, 2**63 - 1)] | None
    num_train_timesteps: Annotated[int, Range(1, 100_000)]
    original_inference_steps: Annotated[int, Range(1, 100_000)]
    predict_x0: Flag
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
    predictor_order: Annotated[int, Range(1, 10)]
    rescale_betas_zero_snr: Flag
    rho: Positive
    s_noise: Number
    sample_max_value: Positive
    set_alpha_to_one: Flag
    sigma_data: Positive
    sigma_max: Positive | None
    sigma_min: Positive | None
    sigma_schedule: Literal["karras", "exponential"]
    skip_prk_steps: Flag
    solver_order: Annotated[int, Range(1, 3)]
    solver_type: Literal["midpoint", "heun", "bh1", "bh2", "logrho"]
    steps_offset: Annotated[int, Range(0, 1000)]
    thresholding: Flag
    timestep_scaling: Positive
    timestep_spacing: Literal["leading", "trailing", "linspace"]
    timestep_type: Literal["discrete", "continuous"]
    trained_betas: (
        Annotated[list[Annotated[float, Range(0, below=1)]], Length(100_000, least=1)] | None
    )
    use_beta_sigmas: Flag
    use_exponential_sigmas: Flag
    use_flow_sigmas: Flag
    use_karras_sigmas: Flag
    use_lu_lambdas: Flag
    variance_type: (
        Literal[
            "fixed_small",
            "fixed_small_log",
            "fixed_large",
            "fixed_large_log",
            "learned",
            "learned_range",
        ]
        | None
    )


class ClipValues(TypedDict, total=False):
    """The config of a CLIP network of transformers, or of one of the two in a safety checker."""

    attention_dropout: Dropout
    bos_token_id: int | None
    dropout: Dropout
    eos_token_id: int | list[int] | None
    hidden_act: Annotated[str, Plain()]
    hidden_size: Width
    image_size: Annotated[int, Range(1, 8192)]
    intermediate_size: Annotated[int, Range(1, 262_144)]
    layer_norm_eps: Epsilon
    max_position_embeddings: Annotated[int, Range(1, 65_536)]
    num_attention_heads: Heads
    num_channels: Channels
    num_hidden_layers: Layers
    num_labels: Annotated[int, Range(0, 10_000)]  # transformers makes a table of them
    pad_token_id: int | None
    patch_size: Annotated[int, Range(1, 8192)]
    projection_dim: Width
    vocab_size: Annotated[int, Range(1, 4_000_000)]


class PipelineValues(TypedDict, total=False):
    """The settings in model_index.json, besides its components."""

    add_watermarker: Flag
    force_zeros_for_empty_prompt: Flag
    requires_aesthetics_score: Flag
    requires_safety_checker: Flag


class SafetyCheckerValues(TypedDict, total=False):
    """The config of a safety checker: two networks of CLIP."""

    projection_dim: Width
    text_config: ClipValues | None
    vision_config: ClipValues | None


class AddedToken(TypedDict):
    """A token with how it is cut out of a text."""

    content: Annotated[str, Plain()]
    lstrip: NotRequired[Flag]
    normalized: NotRequired[Flag]
    rstrip: NotRequired[Flag]
    single_word: NotRequired[Flag]
    special: NotRequired[Flag]


Token = Word | AddedToken


class TokenizerValues(TypedDict, total=False):
    """The tokenizer_config.json of CLIP's tokenizers."""

    add_prefix_space: Flag
    added_tokens_decoder: dict[str, AddedToken] | None
    bos_token: Token
    clean_up_tokenization_spaces: Flag
    do_lower_case: Flag
    eos_token: Token
    extra_special_tokens: dict[str, Token] | list[Token] | None
    errors: Literal["replace", "strict", "ignore"]
    pad_token: Token
    tokenizer_class: Word
    unk_token: Token


KINDS: dict[str, type[Mapping[str, object]]] = {
    "unet": UnetValues,
    "vae": VaeValues,
    "scheduler": SchedulerValues,
    "text_encoder": ClipValues,
    "text_encoder_2": ClipValues,
    "safety_checker": SafetyCheckerValues,
}
TokenNumbers = dict[str, Annotated[int, Range(0, 4_000_000)]]


def check_values(index: Config, configs: Configs, where: str) -> None:
    """Raise `BadInput` for a value of a wrong kind or an absurd size in a model's configs.

    `index` is the model's `model_index.json`, which `check_index` has checked.
    """
    checked(index, PipelineValues, f"{where}: model_index.json", REMEDY)
    for name in components(index):
        if name.startswith("tokenizer"):
            _check_tokenizer(name, configs, where)
        elif name in KINDS and (path := config_file(name)) and (config := configs(path)):
            checked(config, KINDS[name], f"{where}: {path}", REMEDY)
    check_blocks(configs("unet/config.json") or {}, f"{where}: unet/config.json")
    _check_times(configs("scheduler/scheduler_config.json") or {}, where)


def _check_tokenizer(name: str, configs: Configs, where: str) -> None:
    for file, kind in (
        ("tokenizer_config.json", TokenizerValues),
        ("special_tokens_map.json", dict[str, Token | list[Token]]),
        ("vocab.json", TokenNumbers),
        ("added_tokens.json", TokenNumbers),
    ):
        if (content := configs(f"{name}/{file}")) is not None:
            checked(content, kind, f"{where}: {name}/{file}", REMEDY)


def check_blocks(unet: Config, where: str) -> None:
    """Raise `BadInput` for the config of a U-Net, right value by value, that is too large in all.

    Counted are the transformer blocks of one way, as if each level had the layers of the largest.
    """
    depths, layers = unet.get("transformer_layers_per_block", 1), unet.get("layers_per_block", 2)
    levels = len(unet.get("block_out_channels", range(4)))
    all_depths = _sum(depths) if isinstance(depths, list | tuple) else depths * levels
    blocks = all_depths * (max(layers) if isinstance(layers, list | tuple) else layers)
    if blocks > MOST_BLOCKS:
        raise BadInput(
            f"{where} asks for {blocks} transformer_layers_per_block or more in all; at most "
            f"{MOST_BLOCKS} are built. {REMEDY}"
        )


def _sum(depths: int | Sequence[int] | Sequence[Sequence[int]]) -> int:
    return depths if isinstance(depths, int) else sum(map(_sum, depths))


def _check_times(scheduler: Config, where: str) -> None:
    """Raise `BadInput` unless there are as many betas as timesteps."""
    betas, times = scheduler.get("trained_betas"), scheduler.get("num_train_timesteps", 1000)
    if betas is not None and len(betas) != times:
        raise BadInput(
            f"{where}: scheduler/scheduler_config.json has {len(betas)} trained_betas and "
            f"num_train_timesteps {shown(times)}; they must be as many. {REMEDY}"
        )
