"""Whether the components of a pipeline fit together: channels, widths of text, tokens.

Read from their configs alone. What does not fit would end in an error of torch hours later, or in
pictures of noise.
"""

from collections.abc import Mapping

from laptop.errors import BadInput, Unsupported
from laptop.files import shown
from laptop.models.component_classes import TASKS, Config, Configs, components

UNET, VAE = "unet/config.json", "vae/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
CLIP = {  # transformers' defaults, which its files leave out
    "hidden_size": 512,
    "max_position_embeddings": 77,
    "projection_dim": 512,
    "vocab_size": 49408,
}
CROSS_LEVELS = ("CrossAttn",) * 3 + ("Down",)  # diffusers' default of down_block_types, in short
LEARNED = ("learned", "learned_range")  # the U-Net predicts a variance with the noise
OTHER_TASKS = {9: "inpainting", 8: "editing (InstructPix2Pix)", 7: "upscaling", 5: "depth"}
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def check_fit(index: Config, configs: Configs, where: str) -> None:
    """Raise `BadInput` or `Unsupported` unless the components of a checked index fit together."""
    pipeline, present = index["_class_name"], components(index)
    unet = configs(UNET) or {}
    if TASKS[pipeline] == "unconditional":
        channels = _number(unet, UNET, "in_channels", 3, where)
        _check_output(unet, channels, configs(SCHEDULER) or {}, pipeline, where)
        return
    vae = configs(VAE) or {}
    latents = _number(vae, VAE, "latent_channels", 4, where)
    _check_input(unet, latents, pipeline, where)
    _check_output(unet, latents, configs(SCHEDULER) or {}, pipeline, where)
    encoders = {
        name: configs(f"{name}/config.json") or {} for name in TOKENIZERS if name in present
    }
    _check_text_width(unet, encoders, where)
    _check_sizes(unet, encoders, pipeline, bool(index.get("requires_aesthetics_score")), where)
    lengths = {n: _check_tokens(n, config, configs, where) for n, config in encoders.items()}
    if len({length for length in lengths.values() if length}) > 1:
        raise BadInput(
            f"{where}: the tokenizers differ in model_max_length ({lengths}), and their texts are "
            "joined token by token. Set the same in both tokenizer_config.json."
        )


def _check_input(unet: Config, latents: int, pipeline: str, where: str) -> None:
    channels = _number(unet, UNET, "in_channels", 4, where)
    needed = (latents, 2 * latents + 1) if TASKS[pipeline] == "inpainting" else (latents,)
    if channels not in needed:
        other = OTHER_TASKS.get(channels)
        kind = f", as U-Nets for {other} have" if other else ""
        raise BadInput(
            f"{where}: {UNET}: in_channels is {channels}{kind}; a {pipeline} with the VAE's "
            f"latent_channels {latents} needs {' or '.join(map(str, needed))}. Pass a model whose "
            "U-Net, VAE and pipeline belong together."
        )


def _check_output(
    unet: Config, channels: int, scheduler: Config, pipeline: str, where: str
) -> None:
    """Raise unless the U-Net predicts one value for each it denoises, or DDPM's variances too."""
    default = 3 if TASKS[pipeline] == "unconditional" else 4
    out = _number(unet, UNET, "out_channels", default, where)
    variance = scheduler.get("variance_type")
    if variance in LEARNED and pipeline == "DDPMPipeline" and out == 2 * channels:
        return
    if out == 2 * channels or variance in LEARNED:
        raise Unsupported(
            f"{where}: {UNET}: out_channels is {out}, for {channels} channels, and {SCHEDULER}: "
            f"variance_type is {shown(variance)}. A variance that is learned goes with twice the "
            "channels, and is supported with a DDPMPipeline only."
        )
    if out != channels:
        raise BadInput(
            f"{where}: {UNET}: out_channels is {out}; needed is {channels}, the channels of what "
            "is denoised. Pass a model whose U-Net, VAE and pipeline belong together."
        )


def _check_text_width(unet: Config, encoders: Mapping[str, Config], where: str) -> None:
    """Raise unless the joined states of the text encoders are as wide as the U-Net's text."""
    key = "encoder_hid_dim" if unet.get("encoder_hid_dim") is not None else "cross_attention_dim"
    value = unet.get(key, 1280)
    for width in value if isinstance(value, list) else [value]:
        _number({key: width}, UNET, key, 1280, where)
    widths = text_widths(unet)
    by_encoder = {
        name: _number(config, f"{name}/config.json", "hidden_size", CLIP["hidden_size"], where)
        for name, config in encoders.items()
    }
    if widths and widths != {sum(by_encoder.values())}:
        parts = " + ".join(f"{width} ({name})" for name, width in by_encoder.items())
        raise BadInput(
            f"{where}: {UNET}: {key} is {shown(value)}; the text is {parts} wide, by hidden_size "
            "in the config.json of the text encoders. Pass a model whose U-Net and text encoders "
            "belong together."
        )


def text_widths(unet: Config) -> set[int]:
    """Widths of the text that the blocks of a U-Net take, by its config; one for a whole model.

    `cross_attention_dim` may be one number or one for each level, of which levels without
    cross-attention use none. `encoder_hid_dim` comes before it, where the text is projected first.
    """
    if unet.get("encoder_hid_dim") is not None:
        return {unet["encoder_hid_dim"]}
    width = unet.get("cross_attention_dim", 1280)
    if not isinstance(width, list | tuple):
        return {width}
    types = unet.get("down_block_types", CROSS_LEVELS)
    used = {w for w, kind in zip(width, types, strict=False) if "CrossAttn" in str(kind)}
    if "CrossAttn" in str(unet.get("mid_block_type", "CrossAttn")):
        used |= set(width[-1:])
    return used


def _check_sizes(
    unet: Config, encoders: Mapping[str, Config], pipeline: str, aesthetics: bool, where: str
) -> None:
    """Raise unless the U-Net takes pooled text and sizes just where the pipeline passes them."""
    kind = unet.get("addition_embed_type")
    if (kind == "text_time") != ("XL" in pipeline):
        raise BadInput(
            f"{where}: {UNET}: addition_embed_type is {shown(kind)}, which a {pipeline} does not "
            "go with. Correct model_index.json: U-Nets of SDXL ('text_time') need an XL pipeline, "
            "others another one."
        )
    if kind != "text_time":
        return
    times = _number(unet, UNET, "addition_time_embed_dim", 0, where)
    width = _number(unet, UNET, "projection_class_embeddings_input_dim", 0, where)
    file = "text_encoder_2/config.json"
    pooled = _number(
        encoders["text_encoder_2"], file, "projection_dim", CLIP["projection_dim"], where
    )
    ids = 5 if aesthetics else 6  # sizes, and an aesthetic score in place of two of them
    if width != pooled + ids * times:
        raise BadInput(
            f"{where}: {UNET}: projection_class_embeddings_input_dim is {width}; needed is "
            f"{pooled + ids * times}: projection_dim of {file} ({pooled}) + {ids} x "
            f"addition_time_embed_dim ({times}); {ids} because requires_aesthetics_score is "
            f"{str(aesthetics).lower()} in model_index.json."
        )


def _check_tokens(encoder: str, config: Config, configs: Configs, where: str) -> int | None:
    """Raise for tokens that the text encoder lacks; returns the number of tokens of a prompt."""
    folder, file = TOKENIZERS[encoder], f"{encoder}/config.json"
    size = _number(config, file, "vocab_size", CLIP["vocab_size"], where)
    settings = configs(f"{folder}/tokenizer_config.json") or {}
    added = settings.get("added_tokens_decoder")
    ids = [int(i) for i in added if i.isdecimal()] if isinstance(added, dict) else []
    for name in ("vocab.json", "added_tokens.json"):
        values = (configs(f"{folder}/{name}") or {}).values()
        ids += [i for i in values if isinstance(i, int)]
    if ids and max(ids) >= size:
        raise BadInput(
            f"{where}: {folder}/ has a token {max(ids)}, and {file}: vocab_size is {size}. Save "
            "the text encoder after `resize_token_embeddings(len(tokenizer))`, or remove the "
            "tokens that were added."
        )
    length = settings.get("model_max_length")
    if length is None:
        return None
    positions = _number(
        config, file, "max_position_embeddings", CLIP["max_position_embeddings"], where
    )
    if not isinstance(length, int) or not 0 < length <= positions:
        raise BadInput(
            f"{where}: {folder}/tokenizer_config.json: model_max_length is {shown(length)}; "
            f"{file}: max_position_embeddings is {positions}. Set model_max_length to at most that."
        )
    return length


def _number(config: Config, file: str, key: str, default: int, where: str) -> int:
    """A whole number above zero of a config; `BadInput` for anything else."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadInput(
            f"{where}: {file}: {key} is {shown(value)}; needed is a whole number above 0."
        )
    return value
