"""A model's tokenizers, tried on a few prompts before anything expensive.

Files that are right one by one may still cut a text into tokens that the text encoder lacks, or
into letters, because the merges of a byte-pair encoding do not go with its vocabulary.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from laptop.errors import BadInput
from laptop.files import lines, read_json, read_text, reason, shown
from laptop.models.component_fit import CLIP

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PROMPTS = ("", "a", "a large red circle on white " * 100)
MOST_TOKENS = 100_000  # of a prompt; transformers gives 10^30 where a tokenizer states none
MOST_REPLACED = 64  # times that normalizers may lengthen a letter; CLIP's do not
MOST_MERGES = 49152 - 256 - 2  # that CLIP's tokenizer reads of its file
LETTERS = 2 * 256  # a byte each, within a word and at its end
END = "</w>"  # of a piece that ends a word

_tried: set[tuple[object, ...]] = set()  # states of tokenizers; a command asks many times


def check_tokenizer(folder: Path, class_name: str, encoder: Path) -> None:
    """Raise `BadInput` unless a tokenizer goes with the text encoder in the folder `encoder`."""
    if not folder.is_dir():
        raise BadInput(f"{folder} is missing, which model_index.json names. Save the whole model.")
    paths = sorted(path for path in (*folder.iterdir(), encoder / "config.json") if path.is_file())
    times = ((path, path.stat().st_mtime_ns, path.stat().st_size) for path in paths)
    state = (class_name, *times)
    if state not in _tried:
        size = read_json(encoder / "config.json").get("vocab_size", CLIP["vocab_size"])
        try_tokenizer(folder, class_name, size)
        _tried.add(state)


def try_tokenizer(folder: Path, class_name: str, vocab_size: int) -> None:
    """Raise `BadInput` unless a tokenizer pads each text to its length, with valid tokens.

    Valid are those below `vocab_size`, which the text encoder states.
    """
    fast = folder / "tokenizer.json"
    if not (class_name.endswith("Fast") and fast.is_file()):
        _check_merges(folder)
    ids, size = _tokens(folder, class_name, fast)
    is_known = ids.dtype.kind == "i" and ids.min() >= 0 and ids.max() < vocab_size
    if ids.shape[0] != len(PROMPTS) or size > vocab_size or not is_known:
        raise BadInput(
            f"{folder} holds {size} tokens; the text encoder's vocab_size is {vocab_size}. Fetch "
            "it again, correct the tokens of tokenizer_config.json, or save the text encoder after "
            "`resize_token_embeddings(len(tokenizer))`."
        )


def _tokens(folder: Path, class_name: str, fast: Path) -> "tuple[NDArray[np.int64], int]":
    """The tokens of `PROMPTS`, a row each, and the size of the vocabulary."""
    import transformers

    try:
        if fast.is_file():
            _check_replacements(read_json(fast), fast)
        tokenizer = getattr(transformers, class_name).from_pretrained(folder)
        length = tokenizer.model_max_length
        if length > MOST_TOKENS:
            raise BadInput(
                f"{folder}/tokenizer_config.json has no model_max_length. Set it to the text "
                "encoder's max_position_embeddings, such as 77."
            )
        padding = {"padding": "max_length", "truncation": True, "max_length": length}
        ids = tokenizer(list(PROMPTS), **padding, return_tensors="np").input_ids
        if ids.shape[-1] != length:
            raise ValueError(f"a prompt becomes {ids.shape[-1]} tokens, not {length}")
        return ids, len(tokenizer)
    except (BadInput, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # noqa: BLE001 - foreign files make tokenizers panic, too
        raise BadInput(
            f"{folder} holds no tokenizer that works: {reason(e)}. Fetch it again."
        ) from None


def _check_replacements(tokenizer: object, where: Path) -> None:
    """Raise `BadInput` for normalizers by which a text grows beyond memory, match by match."""
    lengths = list(_replacements(tokenizer))
    if math.prod(lengths) > MOST_REPLACED:
        raise BadInput(
            f"{where} replaces letters with {max(lengths)} characters, {len(lengths)} times; a "
            "text may grow beyond memory. Fetch it again."
        )


def _replacements(value: object) -> Iterator[int]:
    """The characters that each Replace in a tokenizer.json puts in place of a match, at least 1."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict) and value.get("type") == "Replace":
        yield max(1, len(str(value.get("content"))))
    for part in parts:
        yield from _replacements(part)


def _check_merges(folder: Path) -> None:
    """Raise `BadInput` unless merges.txt makes just the pieces of words that vocab.json has.

    A vocabulary without most letters is a toy, made by hand, and is not judged.
    """
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        return
    tokens = read_json(vocabulary).keys()
    pieces = {token for token in tokens if len(token.removesuffix(END)) > 1}
    letters = len(tokens - pieces)
    if letters < LETTERS // 2:
        return
    if letters < LETTERS:
        raise BadInput(
            f"{vocabulary} has {letters} letters, needed are {LETTERS}: each byte within a word "
            "and at its end. Fetch it again."
        )
    merged = {"".join(pair.split()) for pair in lines(read_text(merges))[1 : MOST_MERGES + 1]}
    marks = {piece for piece in pieces if piece.startswith("<") and piece.endswith(">")}
    if unmade := pieces - marks - merged:
        raise BadInput(
            f"{merges} does not make {len(unmade)} of the {len(pieces - marks)} pieces of words in "
            f"vocab.json, such as {shown(min(unmade))}; it may be cut off. Fetch it again, or add "
            "tokens by the tokenizer's add_tokens."
        )
    if unknown := merged - tokens:
        raise BadInput(
            f"{vocabulary} lacks {len(unknown)} pieces that merges.txt makes, such as "
            f"{shown(min(unknown))}. Fetch it again."
        )
