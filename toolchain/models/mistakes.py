"""Paths passed by mistake for a model, a run or a result, and what to pass instead.

People pass a whole run where a command needs its scores, a subfolder of a model, one checkpoint
file, or the address of a web page. A refusal says what the path holds and names the right one.
"""

import json
import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path, PurePosixPath

from laptop.console import say
from laptop.errors import BadInput
from laptop.files import shown

SIGNS = {  # the file that marks a folder of each kind
    "run": "laptop.json",
    "model": "model_index.json",
    "artifacts": "artifacts.json",
    "scores": "scores.json",
    "cache": "cache.json",
    "judgement": "eval.json",
    "parity": "report.json",
    "data": "metadata.jsonl",
}
HOLDS = {
    "run": "a whole run of `laptop compress`",
    "model": "a diffusers pipeline",
    "artifacts": "a folder of artifacts (`laptop export`)",
    "scores": "a folder of scores (`laptop score`)",
    "cache": "a training cache (`laptop cache`)",
    "judgement": "a folder of `laptop eval`",
    "parity": "a folder of `laptop verify`",
    "data": "a folder of pictures with captions",
}
NEEDED = {
    "run": "a run folder, which `laptop compress -o RUN` makes: it holds laptop.json, plan.json "
    "and a folder for each stage",
    "model": "a diffusers folder with model_index.json, which `pipe.save_pretrained()` writes",
    "artifacts": "the folder that `laptop export MODEL --to TARGETS -o DIR` made",
    "scores": "the folder that `laptop score` made, or its scores.json",
    "plan": "the .json file that `laptop plan` made",
    "cache": "a training cache or a folder of pictures with metadata.jsonl",
}
FIRST = ("model", "pruned")  # of the models in a run, the student is what most commands mean
HUB = re.compile(
    r"(?:hf:(?://)?|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)(?:models/)?"
    r"([\w.-]+/[\w.-]+)(/.*)?"
)
CHECKPOINTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
WEIGHTS = re.compile(r"(diffusion_)?(pytorch_)?model\b.*")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
LORA = re.compile(r"(pytorch_lora_weights|adapter_model)\.\w+|.*\blora\b.*\.safetensors", re.I)


def is_file(path: Path) -> bool:
    """Whether `path` is a file; False, without an error, where a folder may not be looked into."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(name: str) -> bool:
    """Whether `name` is a folder; False, without an error, for what can be no path."""
    return os.path.isdir(name)  # noqa: PTH112


def kind_of(folder: Path) -> str | None:
    """The key of `SIGNS` that a folder is, or None."""
    return next((kind for kind, sign in SIGNS.items() if is_file(folder / sign)), None)


def refusal(path: Path, wanted: str) -> str:
    """A message: what `path` is, what is needed (a key of `NEEDED`), and the path to pass."""
    return f"{path} {_holds(path)}; needed is {NEEDED[wanted]}.{_hint(path, wanted)}"


def _holds(path: Path) -> str:
    if not os.path.lexists(path):
        return "does not exist"
    if not path.is_dir():
        return "is no folder"
    if is_graphs(path):
        return "holds ONNX graphs, without the weights of PyTorch"
    if kind := kind_of(path):
        return f"is {HOLDS[kind]}"
    if name := component_class(path):
        return f"holds one component of a pipeline ({shown(name)})"
    try:
        names = sorted(p.name for p in path.iterdir())
    except OSError as e:
        return f"cannot be read ({e.strerror})"
    if any(name.endswith(".onnx") for name in names):
        return "holds an ONNX graph, without the weights of PyTorch"
    more = ", …" if len(names) > 3 else ""
    return f"holds {', '.join(map(shown, names[:3]))}{more}" if names else "is an empty folder"


def component_class(folder: Path) -> str | None:
    """The class that a config.json of diffusers or transformers in `folder` names, if it does."""
    file = folder / "config.json"
    try:
        if not file.is_file() or file.stat().st_size > 1 << 20:
            return None
        config = json.loads(file.read_bytes())
        name = config.get("_class_name") or (config.get("architectures") or [None])[0]
    except (OSError, ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def instead(path: Path, wanted: str) -> Path | None:
    """The path nearby that is of the kind `wanted`: below `path`, or one or two folders above."""
    if wanted == "plan":
        return next((p for p in (path / "plan.json",) if is_file(p)), None)
    try:
        below = sorted(path.iterdir()) if path.is_dir() else []
    except OSError:
        below = []
    below.sort(key=lambda p: FIRST.index(p.name) if p.name in FIRST else len(FIRST))
    above = [path.absolute().parent, path.absolute().parent.parent]
    near = [*below[:100], *(above if wanted in ("run", "model") else [])]
    return next((_short(p) for p in near if is_file(p / SIGNS[wanted]) and not is_graphs(p)), None)


def is_graphs(folder: Path) -> bool:
    """Whether a folder is laid out as a model, but holds ONNX graphs."""
    return is_file(folder / "unet" / "model.onnx")


def _short(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) and path != here else path


def _hint(path: Path, wanted: str) -> str:
    other = instead(path, wanted)
    return f" Pass {other}." if other else ""


def model_advice(name: str) -> str:
    """Return advice about a `name` that is no model, folder or Hub id; "" if there is none.

    Sees addresses, checkpoint files, archives, and paths in the manner of another system.
    """
    if hub := HUB.fullmatch(name.strip().rstrip("/")):
        if (hub[2] or "").endswith(CHECKPOINTS):
            return f" It is one file of the Hub. {_convert(hub[2].rpartition('/')[2])}"
        return f" It is the address of a model on the Hub: pass {hub[1]!r}."
    if "://" in name:
        return (
            " Models are fetched from the Hub only. Download the file; if it is one checkpoint, "
            f"convert it. {_convert('FILE.safetensors')}"
        )
    if "\\" in name:
        return (
            " It looks like a path of Windows: write it with '/' (on WSL C:\\models is "
            "/mnt/c/models)."
        )
    if name.startswith("~"):
        whole = Path(name).expanduser()
        return f" '~' stands for your home only where a word begins with it: pass {whole}."
    return _file_advice(Path(name)) or _tidied(name)


def _tidied(name: str) -> str:
    tidy = name.strip().rstrip("/")
    is_name = tidy.count("/") <= 1 and not tidy.startswith(("/", "."))
    return f" Did you mean {tidy!r}?" if tidy and tidy != name and is_name else ""


def _file_advice(path: Path) -> str:
    """Return advice about a name that ends like a file; "" if there is none."""
    ending = path.suffix.lower()
    if path.name == SIGNS["model"]:
        return f" Pass its folder: {path.parent}."
    if LORA.fullmatch(path.name):
        return f" It looks like a LoRA. {FUSE}"
    if ending in CHECKPOINTS:
        return f" Single checkpoint files are not read yet. {_convert(path.name)}"
    if ending == ".gguf":
        return (
            " GGUF files hold quantized weights, which cannot be retrained: pass the diffusers "
            "folder or the Hub id of the model that it was made from."
        )
    if ending in (".onnx", ".ort", ".mlpackage", ".pte", ".engine"):
        return (
            " It is an exported artifact, without the weights of PyTorch: pass the model that it "
            "was made from."
        )
    if ending in ARCHIVES:
        return " It is an archive: unpack it, and pass the folder in it that has model_index.json."
    return ""


FUSE = (
    "A LoRA is used once it is part of the weights, which diffusers does: "
    "`pipe.load_lora_weights(FILE); pipe.fuse_lora(); pipe.unload_lora_weights(); "
    "pipe.save_pretrained(FOLDER)`; then pass that folder."
)


def _convert(file: str) -> str:
    trust = ""
    if file.endswith(PICKLES):
        trust = " Such a file is a pickle, which can run code: do that only if you trust it."
    return (
        "Convert it with diffusers: "
        f"`StableDiffusionXLPipeline.from_single_file({file!r}).save_pretrained('FOLDER')` "
        "(StableDiffusionPipeline for SD 1.5), and pass FOLDER." + trust
    )


def need_safetensors(names: Iterable[str], where: str) -> None:
    """Raise `BadInput` for a component whose weights are in pickles only; `names` are its files.

    Pickles are never read here, because they can run code.
    """
    endings: dict[str, dict[str, str]] = {}
    for name in map(PurePosixPath, names):
        if len(name.parts) == 2 and WEIGHTS.fullmatch(name.name):
            endings.setdefault(name.parts[0], {})[name.suffix] = name.name
    for part, of_part in endings.items():
        pickles = [name for ending, name in of_part.items() if ending in PICKLES]
        if pickles and ".safetensors" not in of_part:
            raise BadInput(
                f"{where}: the weights of {part}/ are in {shown(pickles[0])} only, a pickle, which "
                "can run code when it is read; needed is .safetensors. If you trust the model, "
                "convert it with diffusers: `DiffusionPipeline.from_pretrained"
                f"({where!r}, use_safetensors=False).save_pretrained('FOLDER')`, and pass FOLDER."
            )


def check_files(folder: Path) -> None:
    """Refuse a pipeline's folder with pickled weights only; warn of LoRA files in it."""
    names = [path.relative_to(folder).as_posix() for path in folder.glob("*/*")]
    need_safetensors(names, str(folder))
    for file in _lora_files(folder):
        _warn_of(file)


@cache
def _warn_of(lora: Path) -> None:
    say(f"{lora} is not used: a LoRA file in a model's folder is no part of its weights. {FUSE}")


def _lora_files(folder: Path) -> list[Path]:
    """LoRA files in a pipeline's folder, which no pipeline loads by itself."""
    places = (folder, folder / "unet", folder / "text_encoder", folder / "text_encoder_2")
    return [
        file
        for place in places
        if place.is_dir()
        for file in sorted(place.iterdir())
        if LORA.fullmatch(file.name)
    ]
