"""The embedded text-to-image model `tiny-sdxl`, the scenes it draws, and its training."""

from pathlib import Path

from laptop.models import locating


def draws_scenes(model: str) -> bool:
    """Whether `model` is tiny-sdxl or a descendant of it: it reads the same few words."""
    words = Path("tokenizer") / "vocab.json"
    own, other = locating.EMBEDDED / words, Path(locating.locate(model)) / words
    return own.is_file() and other.is_file() and own.read_bytes() == other.read_bytes()
