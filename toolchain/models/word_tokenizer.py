"""A CLIP tokenizer for a list of words, made without a download."""

import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.models.clip.tokenization_clip import bytes_to_unicode


def word_tokenizer(words: Sequence[str], length: int) -> CLIPTokenizer:
    """CLIP's byte-level BPE with just the merges that make one token of each of `words`.

    A prompt is padded or cut to `length` tokens.
    """
    letters = list(bytes_to_unicode().values())
    tokens = letters + [f"{c}</w>" for c in letters]
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:  # the oldest merge that applies, as BPE does, or else a new one
            pairs = list(itertools.pairwise(parts))
            pair = next((m for m in merges if m in pairs), pairs[0])
            merges[pair] = None
            parts[(i := pairs.index(pair)) : i + 2] = ["".join(pair)]
    vocabulary = [*tokens, *("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(
            json.dumps({t: i for i, t in enumerate(dict.fromkeys(vocabulary))}), encoding="utf-8"
        )
        lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer(
            str(folder / "vocab.json"),
            str(folder / "merges.txt"),
            pad_token="<|endoftext|>",
            model_max_length=length,
        )
