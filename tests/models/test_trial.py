"""Networks, tokenizers and schedulers that cannot run are refused before anything expensive."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from laptop.cli import failures
from laptop.errors import BadInput
from laptop.models import loading, locating, trial
from laptop.models.architectures import UNETS
from laptop.pruning.sampling_choice import choose_sampling

UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
WORDS, SCHEDULER = "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"


@pytest.fixture
def folder(small_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small pipeline that a test may damage."""
    return Path(shutil.copytree(small_folder, tmp_path / "model"))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("name", sorted(UNETS))
def test_published_architectures_run(name: str) -> None:
    trial.try_network("unet", loading.empty_unet(f"random:{name}"))


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        (UNET, {"downsample_padding": 5}, "unet/config.json describes a network that does not run"),
        (
            UNET,
            {"down_block_types": ["AttnSkipDownBlock2D", "DownBlock2D"]},
            "weights of unet/ do not fit|network that",
        ),
        (TEXT, {"eos_token_id": None}, "text_encoder/config.json describes a network that does"),
        (TEXT, {"eos_token_id": [1, 2]}, "text_encoder/config.json describes a network that"),
        (TEXT, {"return_dict": False}, "text_encoder/config.json describes a network that does"),
        (TEXT, {"num_labels": 10**9}, "num_labels is 1000000000; it must be at most 10_000"),
        (WORDS, {"pad_token": "<nope>"}, "tokenizer holds 5.* tokens"),
        (WORDS, {"eos_token": "<nope>"}, "tokenizer holds 5.* tokens"),
        (WORDS, {"extra_special_tokens": {"foo_token": "<foo>"}}, "tokenizer holds 5.* tokens"),
        (WORDS, {"model_input_names": ["a"]}, "holds no tokenizer that works"),
    ],
)
def test_a_config_of_what_cannot_run_is_refused(
    folder: Path, file: str, values: dict[str, Any], said: str
) -> None:
    change(folder / file, **values)
    with pytest.raises(BadInput, match=said):
        locating.locate(str(folder))


def halved(folder: Path) -> None:
    merges = folder / "tokenizer" / "merges.txt"
    merges.write_bytes(merges.read_bytes()[: merges.stat().st_size // 2])


def without_a_letter(folder: Path) -> None:
    path = folder / "tokenizer" / "vocab.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "q"}))


def without_a_piece(folder: Path) -> None:
    path = folder / "tokenizer" / "vocab.json"
    ids = json.loads(path.read_text())
    piece = next(k for k in ids if len(k) == 2)
    path.write_text(json.dumps({k: v for k, v in ids.items() if k != piece}))


def emptied(folder: Path) -> None:
    (folder / "tokenizer" / "vocab.json").write_text("{}")


def twice(folder: Path) -> None:
    (weights,) = (folder / "unet").glob("*.safetensors")
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model-00001-of-00001.safetensors"))


def unlisted(folder: Path) -> None:
    (weights,) = (folder / "unet").glob("*.safetensors")
    weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-00001.safetensors"))
    weights.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {}})
    )


def listed_twice(folder: Path) -> None:
    (weights,) = (folder / "unet").glob("*.safetensors")
    index = {"metadata": {}, "weight_map": {"conv_in.bias": weights.name}}
    weights.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps(index)
    )


def piped(folder: Path) -> None:
    os.mkfifo(folder / "unet" / "x.safetensors")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (piped, "x.safetensors is a pipe"),
        (halved, r"merges.txt does not make \d+ of the \d+ pieces"),
        (without_a_letter, "has 511 letters, needed are 512: each byte"),
        (without_a_piece, "lacks 1 pieces that merges.txt makes"),
        (emptied, "tokenizer holds 2 tokens"),
        (twice, "holds its weights more than once"),
        (unlisted, "holds shards that no index lists"),
        (listed_twice, "holds its weights more than once"),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    folder: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(folder)
    with pytest.raises(BadInput, match=said):
        locating.locate(str(folder))


@pytest.mark.parametrize(
    "values",
    [
        {"beta_start": 0.9, "beta_end": 0.999, "beta_schedule": "linear"},
        {"num_train_timesteps": 3},
    ],
)
def test_a_schedule_that_ends_in_no_number_is_refused(folder: Path, values: dict[str, Any]) -> None:
    change(folder / SCHEDULER, **values)
    with pytest.raises(BadInput, match="does not draw in 25 steps"):
        choose_sampling(str(folder))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300),
            "File name too long. Check",
        ),
        (OSError(errno.ENOTDIR, "Not a directory", "a/b"), "'a/b': Not a directory. Check"),
        (MemoryError(), "memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory ran out"),
        (OSError("no file"), None),
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), None),
        (RuntimeError("shapes differ"), None),
    ],
)
def test_what_is_the_machines_is_told_and_what_is_a_bug_is_not(
    error: Exception, said: str | None
) -> None:
    text = failures.message(error)
    assert (text is None) == (said is None)
    assert said is None or (text is not None and said in text)


def fast_tokenizer(folder: Path, **changes: object) -> None:
    """Make the tokenizer a fast one, changed."""
    from transformers import CLIPTokenizerFast

    place = folder / "tokenizer"
    CLIPTokenizerFast.from_pretrained(place).save_pretrained(place)
    change(folder / "model_index.json", tokenizer=["transformers", "CLIPTokenizerFast"])
    change(place / "tokenizer.json", **changes)


def test_a_fast_tokenizer_is_tried_too(folder: Path) -> None:
    fast_tokenizer(folder)
    assert locating.locate(str(folder)) == str(folder)
    growing = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 8}
    for changes, said in (
        ({"normalizer": {"type": "Sequence", "normalizers": [growing] * 10}}, "replaces"),
        ({"model": None}, "holds no tokenizer that works"),
        ({"added_tokens": [{"id": 10**6, "content": "<new>", "special": True, "single_word": False,
          "lstrip": False, "rstrip": False, "normalized": False}]}, "tokenizer holds"),
    ):  # fmt: skip
        fast_tokenizer(folder, **changes)
        with pytest.raises(BadInput, match=said):
            locating.locate(str(folder))
        (folder / "tokenizer" / "tokenizer.json").unlink()
