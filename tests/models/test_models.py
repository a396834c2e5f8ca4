"""Names to models: bad ones are refused from small files; pruned ones load here and elsewhere."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import REMOVED
from laptop.errors import BadInput, UnknownModel, Unsupported
from laptop.models import loading, locating
from support.elsewhere import check_elsewhere, draw


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def change_json(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_an_unknown_name_comes_with_a_suggestion_and_the_known_ones() -> None:
    with pytest.raises(UnknownModel, match=r"tiny-sdxl, sdxl, sd15.*Did you mean 'tiny-sdxl'"):
        locating.locate("tiny-sdlx")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "a/b/c", "~/model"])
def test_what_is_neither_name_nor_folder_nor_hub_id_is_refused_without_network(name: str) -> None:
    with pytest.raises(UnknownModel, match="no known model"):
        locating.locate(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnknownModel, match="no folder"):
        locating.locate(str(tmp_path / "model.safetensors"))


def test_a_folder_that_is_no_pipeline_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"is an empty folder; needed .* with model_index\.json"):
        locating.locate(str(tmp_path))


OFFLINE = """
import sys, time
from laptop.models import locating
from laptop.errors import UnknownModel
import diffusers.pipelines.pipeline_utils
start = time.perf_counter()
try:
    locating.locate("some-owner/some-model")
except UnknownModel as e:
    print(f"{time.perf_counter() - start:.1f} {e}")
"""


def test_a_hub_id_without_network_is_refused_in_seconds(tmp_path: Path) -> None:
    """The Hub's address is one that nobody answers at, as when the network is down."""
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, _, message = done.stdout.partition(" ")
    assert float(seconds) < 5
    assert "some-owner/some-model" in message
    assert "Check the name and the network" in message
    assert "local diffusers folder" in message


def test_a_denoiser_that_is_no_unet_is_refused_by_its_class(folder: Path) -> None:
    def to_transformer(index: dict[str, object]) -> None:
        del index["unet"]
        index["transformer"] = ["diffusers", "FluxTransformer2DModel"]

    change_json(folder / "model_index.json", to_transformer)
    with pytest.raises(Unsupported, match="FluxTransformer2DModel; supported is UNet2DCondition"):
        locating.locate(str(folder))


def test_another_unet_class_is_refused_by_its_name(folder: Path) -> None:
    entry = ["diffusers", "UNet3DConditionModel"]
    change_json(folder / "model_index.json", lambda index: index.update(unet=entry))
    with pytest.raises(Unsupported, match="UNet3DConditionModel"):
        locating.locate(str(folder))


def test_a_missing_component_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(BadInput, match="lacks text_encoder_2/"):
        locating.locate(str(folder))


def test_missing_weights_are_one_message(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BadInput, match="vae"):
        loading.load_pipeline(str(folder))


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.9])
def test_truncated_weights_are_named_before_anything_is_loaded(
    folder: Path, component: str, share: float
) -> None:
    weights = next((folder / component).glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[: int(share * len(content))])
    start = time.perf_counter()
    with pytest.raises(BadInput, match=rf"{weights.name} cannot be read.*cut off"):
        locating.locate(str(folder))
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json"])
def test_a_truncated_config_is_one_message(folder: Path, name: str) -> None:
    (folder / name).write_text((folder / name).read_text()[:50])
    with pytest.raises(BadInput, match="not valid JSON"):
        locating.locate(str(folder))


def test_a_pipeline_is_loaded_in_float32_whatever_lies_on_disk(tiny_folder: Path) -> None:
    pipe = loading.load_pipeline(str(tiny_folder))
    parts = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    assert not pipe.unet.training


def test_a_pruned_folder_loads_with_its_layers_gone(tiny_folder: Path, pruned_folder: Path) -> None:
    whole, pruned = loading.load_unet(str(tiny_folder)), loading.load_unet(str(pruned_folder))
    assert type(pruned).__name__ == "LaptopUNet2DConditionModel"
    assert pruned.config.removed == REMOVED
    kept, had = pruned.state_dict(), whole.state_dict()
    assert set(kept) < set(had), "what stays keeps its name"
    for name in set(had) - set(kept):
        assert any(name.startswith(f"{removed}.") for removed in REMOVED)
    assert all(torch.equal(kept[name], had[name]) for name in kept)


def test_saving_and_loading_a_pruned_model_again_changes_no_picture(
    pruned_folder: Path, tmp_path: Path
) -> None:
    pipe = loading.load_pipeline(str(pruned_folder))
    pipe.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["unet"] == ["laptop_unet_v1", "LaptopUNet2DConditionModel"]
    again = loading.load_pipeline(str(tmp_path / "again"))
    assert np.array_equal(draw(again), draw(pipe))


def test_no_code_is_run_from_the_folder_of_a_model(pruned_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pruned_folder, tmp_path / "model")
    trap = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    (folder / "unet" / "laptop_unet_v1.py").write_text(trap)
    loading.load_pipeline(str(folder))
    assert not (tmp_path / "ran").exists()


def test_stock_diffusers_draws_the_same_picture_without_this_package(
    pruned_folder: Path, tmp_path: Path
) -> None:
    check_elsewhere(pruned_folder, tmp_path)


def test_weights_that_are_pickles_are_not_read(tiny_pipe, tmp_path: Path) -> None:
    tiny_pipe.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(BadInput, match="safetensors"):
        loading.load_unet(str(tmp_path))
    with pytest.raises(BadInput, match="safetensors"):
        loading.load_encoders(str(tmp_path))
