"""A model's networks and tokenizers, tried before anything expensive.

Configs that are right value by value may still describe a network that cannot run, or a tokenizer
whose tokens the text encoder lacks. Networks are tried on PyTorch's meta device, which computes
shapes and no values.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laptop.errors import BadInput
from laptop.files import lines, read_json, read_text, reason, shown
from laptop.models.component_fit import CLIP
from laptop.models.shapes import input_shapes, latent_pixels

if TYPE_CHECKING:
    from torch import Tensor, nn

LATENTS = 8  # a side
PROMPTS = ("", "a", "a large red circle on white " * 100)
MOST_TOKENS = 100_000  # of a prompt; transformers gives 10^30 where a tokenizer states none
MOST_REPLACED = 8  # characters in place of each match; CLIP's has one
MOST_MERGES = 49152 - 256 - 2  # that CLIP's tokenizer reads of its file
LETTERS = 2 * 256  # a byte each, within a word and at its end
END = "</w>"  # of a piece that ends a word


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


def _outputs(part: str, network: Any) -> "dict[str, tuple[Tensor, tuple[int, ...]]]":
    """What a component computes, with the shape that it must have."""
    config = network.config
    if part == "unet":
        shapes = input_shapes(config, tokens=7, batch=1)
        batch, _, *size = shapes["sample"]
        return {"its output": (_unet(network, shapes), (batch, config["out_channels"], *size))}
    if part == "vae":
        side = LATENTS * latent_pixels(config)
        picture = _empty(1, config["in_channels"], side, side)
        latents = _empty(1, config["latent_channels"], LATENTS, LATENTS)
        encoded = network.encode(picture)
        found = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
        decoded = (network.decode(latents).sample, tuple(picture.shape))
        return {"what it encodes": (found, tuple(latents.shape)), "what it decodes": decoded}
    if part.startswith("text_encoder"):
        import torch

        tokens = config.max_position_embeddings
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        states = network(ids, output_hidden_states=True).hidden_states[-2]
        return {"its text": (states, (1, tokens, config.hidden_size))}
    return {}


def _unet(network: Any, shapes: "Mapping[str, tuple[int, ...]]") -> "Tensor":
    inputs = {name: _empty(*shape) for name, shape in shapes.items()}
    added = {k: inputs.pop(k) for k in ("text_embeds", "time_ids") if k in inputs}
    output: Tensor = network(**inputs, **({"added_cond_kwargs": added} if added else {})).sample
    return output


def _empty(*shape: int) -> "Tensor":
    import torch

    return torch.empty(shape, device="meta")


_tried: set[tuple[object, ...]] = set()  # states of tokenizers; a command asks many times


def check_tokenizer(folder: Path, class_name: str, encoder: Path) -> None:
    """Raise `BadInput` unless a tokenizer goes with the text encoder in the folder `encoder`."""
    paths = sorted(path for path in (*folder.iterdir(), encoder / "config.json") if path.is_file())
    state = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in paths)
    if state not in _tried:
        known = read_json(encoder / "config.json").get("vocab_size", CLIP["vocab_size"])
        try_tokenizer(folder, class_name, known)
        _tried.add(state)


def try_tokenizer(folder: Path, class_name: str, known: int) -> None:
    """Raise `BadInput` unless a tokenizer cuts texts into tokens below `known`, as many each time.

    `known` is the vocab_size of its text encoder.
    """
    import transformers

    _check_merges(folder)
    try:
        if (fast := folder / "tokenizer.json").is_file():
            _check_replacements(read_json(fast), fast)
        tokenizer = getattr(transformers, class_name).from_pretrained(folder)
        length = tokenizer.model_max_length
        if length > MOST_TOKENS:
            raise BadInput(
                f"{folder}/tokenizer_config.json has no model_max_length. Set it to what the text "
                "encoder's max_position_embeddings is, such as 77."
            )
        how = {"padding": "max_length", "truncation": True, "max_length": length}
        ids = tokenizer(list(PROMPTS), **how, return_tensors="np").input_ids
        size, is_right = len(tokenizer), ids.min() >= 0 and ids.max() < known
    except BadInput:
        raise
    except Exception as e:  # noqa: BLE001 - whatever foreign files make transformers raise
        raise BadInput(
            f"{folder} holds no tokenizer that works: {reason(e)}. Fetch it again."
        ) from None
    if ids.shape != (len(PROMPTS), length) or size > known or not is_right:
        raise BadInput(
            f"{folder} holds {size} tokens, and makes a prompt a row of {ids.shape[-1]}; the text "
            f"encoder's vocab_size is {known}. Save the text encoder after "
            "`resize_token_embeddings(len(tokenizer))`, or correct the tokens of "
            "tokenizer_config.json."
        )


def _check_replacements(value: object, where: Path) -> None:
    """Raise `BadInput` for a normalizer that makes a text longer at each of its matches."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict) and value.get("type") == "Replace":
        content = value.get("content")
        if not isinstance(content, str) or len(content) > MOST_REPLACED:
            raise BadInput(
                f"{where} replaces with {shown(content)}; at most {MOST_REPLACED} characters are "
                "taken, as a text may grow beyond memory. Fetch it again."
            )
    for part in parts:
        if isinstance(part, dict | list):
            _check_replacements(part, where)


def _check_merges(folder: Path) -> None:
    """Raise `BadInput` unless merges.txt makes just the pieces of words that vocab.json has."""
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        return
    made = {"".join(pair.split()) for pair in lines(read_text(merges))[1 : MOST_MERGES + 1]}
    known = read_json(vocabulary).keys()
    longer = {piece for piece in known if len(piece.removesuffix(END)) > 1}
    pieces = {piece for piece in longer if not (piece.startswith("<") and piece.endswith(">"))}
    if lacking := pieces - made:
        raise BadInput(
            f"{merges} does not make {len(lacking)} of the {len(pieces)} pieces of words in "
            "vocab.json; it may be cut off. Fetch it again."
        )
    if known and (len(known - longer) < LETTERS or made - known):
        raise BadInput(
            f"{vocabulary} lacks {len(made - known)} pieces that merges.txt makes, and has "
            f"{len(known - longer)} letters; needed are {LETTERS}. Fetch it again."
        )
