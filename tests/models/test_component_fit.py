"""Components that do not belong together are refused with file, key, what is there and needed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from laptop.errors import BadInput, LaptopError
from laptop.models.model_checks import check_configs, check_folder

UNET, VAE = "unet/config.json", "vae/config.json"
TEXT, SECOND = "text_encoder/config.json", "text_encoder_2/config.json"
SCHEDULER, WORDS = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
Files = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def xl(tiny_folder: Path) -> Files:
    """The JSON files of a model of SDXL's kind."""
    return read(tiny_folder)


@pytest.fixture(scope="module")
def sd(small_folder: Path) -> Files:
    """The JSON files of a model of Stable Diffusion 1.5's kind."""
    return read(small_folder)


def read(folder: Path) -> Files:
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*.json")}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items()}


def check(files: Files, changes: Files) -> None:
    changed = {name: {**files.get(name, {}), **change} for name, change in changes.items()}
    every = files | changed
    check_configs(every["model_index.json"], every.get, "the model")


def test_models_that_fit_are_taken(xl: Files, sd: Files) -> None:
    check(xl, {})
    check(sd, {})


INPAINTING = {"_class_name": "StableDiffusionInpaintPipeline"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({UNET: {"in_channels": 9}}, "in_channels is 9, as U-Nets for inpainting"),
        ({UNET: {"in_channels": 8}}, r"in_channels is 8.*editing"),
        ({UNET: {"in_channels": 5}, "model_index.json": INPAINTING}, "needs 4 or 9"),
        ({VAE: {"latent_channels": 16}}, "latent_channels 16 needs 16"),
        ({UNET: {"out_channels": 8}}, "out_channels is 8.*variance"),
        ({UNET: {"out_channels": 5}}, "out_channels is 5; needed is 4"),
        ({SCHEDULER: {"variance_type": "learned_range"}}, "variance_type is 'learned_range'"),
        ({UNET: {"cross_attention_dim": 64}}, r"cross_attention_dim is 64.*32 \(text_encoder\)"),
        ({UNET: {"encoder_hid_dim": 48}}, "encoder_hid_dim is 48; the text is 32"),
        ({TEXT: {"hidden_size": 48}}, r"48 \(text_encoder\)"),
        ({UNET: {"addition_embed_type": "text_time"}}, "does not go with"),
        ({TEXT: {"vocab_size": 3}}, r"vocab_size is 3\. .*resize_token_embeddings"),
        ({WORDS: {"model_max_length": 512}}, "model_max_length is 512"),
        ({WORDS: {"model_max_length": 10**30}}, r"model_max_length is 10+;"),
        ({WORDS: {"added_tokens_decoder": {"49408": {"content": "x"}}}}, "token 49408"),
        ({TEXT: {"max_position_embeddings": 4}}, "max_position_embeddings is 4"),
        ({UNET: {"in_channels": "four"}}, "must be a whole number"),
        ({UNET: {"in_channels": -4}}, "must be at least 1"),
        ({VAE: {"latent_channels": True}}, "must be a whole number"),
    ],
)
def test_what_does_not_fit_is_named_with_its_file(sd: Files, changes: Files, said: str) -> None:
    with pytest.raises(LaptopError, match=said) as e:
        check(sd, changes)
    assert str(e.value).startswith("the model: ")
    assert re.search(r"\w+/\w+\.json", str(e.value))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({TEXT: {"hidden_size": 48}}, r"48 \(text_encoder\) \+ "),
        ({SECOND: {"hidden_size": 48}}, r"48 \(text_encoder_2\)"),
        ({SECOND: {"projection_dim": 7}}, r"projection_dim of text_encoder_2/config.json \(7\)"),
        ({UNET: {"addition_time_embed_dim": 7}}, r"addition_time_embed_dim \(7\)"),
        ({"model_index.json": {"requires_aesthetics_score": True}}, "score is true"),
        ({UNET: {"addition_embed_type": None}}, "addition_embed_type is None"),
        ({WORDS: {"model_max_length": 3}}, "tokenizers differ"),
    ],
)
def test_sdxl_needs_both_text_encoders_and_the_sizes(xl: Files, changes: Files, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        check(xl, changes)


def test_a_learned_variance_goes_with_twice_the_channels() -> None:
    files: Files = {
        "model_index.json": {
            "_class_name": "DDPMPipeline",
            "unet": ["diffusers", "UNet2DModel"],
            "scheduler": ["diffusers", "DDPMScheduler"],
        },
        UNET: {"_class_name": "UNet2DModel", "sample_size": 8, "out_channels": 6},
        SCHEDULER: {"_class_name": "DDPMScheduler", "variance_type": "learned_range"},
    }
    check(files, {})
    for changes in (
        {SCHEDULER: {"variance_type": "fixed_small"}},
        {UNET: {"out_channels": 3}},
        {"model_index.json": {"_class_name": "DDIMPipeline"}},
    ):
        with pytest.raises(LaptopError, match="twice the channels"):
            check(files, changes)


DOWN, CROSS = "DownBlock2D", "CrossAttnDownBlock2D"


@pytest.mark.parametrize(
    ("widths", "types", "fits"),
    [
        ([32, 32], [CROSS, CROSS], True),
        ([32, 64], [CROSS, CROSS], False),
        ([64, 32], [DOWN, CROSS], True),
        ([64, 32], [CROSS, DOWN], False),
        ([64, 64], [CROSS, CROSS], False),
        ([{}, []], [CROSS, CROSS], False),
        ({"a": 1}, [CROSS, CROSS], False),
    ],
)
def test_a_width_of_text_for_each_level_counts_where_a_level_takes_text(
    sd: Files, widths: Any, types: list[str], fits: bool
) -> None:
    changes: Files = {UNET: {"cross_attention_dim": widths, "down_block_types": types}}
    if fits:
        check(sd, changes)
        return
    with pytest.raises(BadInput, match="cross_attention_dim"):
        check(sd, changes)


def test_a_folder_is_checked_so_when_it_is_named(small_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_folder, tmp_path / "model"))
    config: dict[str, Any] = json.loads((folder / UNET).read_text())
    (folder / UNET).write_text(json.dumps(config | {"in_channels": 9}))
    with pytest.raises(BadInput, match="inpainting"):
        check_folder(folder)
