"""Refusal of files by which the libraries that load a model would run code or read elsewhere.

diffusers and transformers obey more of a component's files than laptop reads: a module of the
library's name, an implementation of attention that comes from the Hub, an adapter's base model, the
path of a vocabulary. None of it is part of a model that laptop takes.
"""

from collections.abc import Iterator
from pathlib import Path

from laptop.errors import Unsupported
from laptop.files import files_in, read_json, shown
from laptop.models.component_classes import CLASSES, SHIPPED_LIBRARY, Config

LIBRARIES = {library for classes in CLASSES.values() for library in classes} - {SHIPPED_LIBRARY}
CONFIGS = (
    *("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"),
    "scheduler_config.json",
)
ATTENTION = (None, "eager", "sdpa")  # others are packages, or kernels that the Hub sends
PATHS = "a path that is read wherever it leads"
# key of a config: what it would do, and the values that do nothing
REFUSED: dict[str, tuple[str, tuple[object, ...]]] = {
    "auto_map": ("code from elsewhere, which laptop never runs", (None, {})),
    "_attn_implementation": ("code from a package or the Hub", ATTENTION),
    "_attn_implementation_internal": ("code from a package or the Hub", ATTENTION),
    "attn_implementation": ("code from a package or the Hub", ATTENTION),
    "quantization_config": ("weights for a package that is not asked for", (None,)),
    "vocab_file": (PATHS, (None,)),
    "merges_file": (PATHS, (None,)),
    "tokenizer_file": (PATHS, (None,)),
}


def check_component(folder: Path) -> None:
    """Raise `Unsupported` for a file of a component that its library would run or follow."""
    for file in files_in(folder):
        if file.suffix == ".py" and file.stem in LIBRARIES:
            raise Unsupported(
                f"{file} would run in place of {file.stem}, and laptop runs no code of a model. "
                "Remove it."
            )
        if file.name == "adapter_config.json":
            raise Unsupported(
                f"{file} is of an adapter (LoRA), by which transformers would load another model. "
                "Fuse the adapter and save the model again, or remove it."
            )
        if file.name in CONFIGS:
            check_config(read_json(file), str(file))


def check_config(config: Config, where: str) -> None:
    """Raise `Unsupported` for a config that names code or files elsewhere, however deep."""
    for key, value in _entries(config):
        why, harmless = REFUSED.get(key, ("", (value,)))
        if value not in harmless:
            raise Unsupported(
                f"{where}: {key} is {shown(value)}: {why}. Remove the key if the component does "
                "without."
            )


def _entries(config: Config) -> Iterator[tuple[str, object]]:
    """Keys and values, also those of dicts in dicts."""
    todo = [config]
    while todo:
        for key, value in todo.pop().items():
            yield key, value
            todo += [value] if isinstance(value, dict) else []
