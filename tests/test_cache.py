"""Caches: what they hold is what the model computes; they survive, and know their model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from laptop import models
from laptop.distill import encoding
from laptop.distill.buckets import fit
from laptop.distill.cache import Cache, check_cache
from laptop.distill.encoder import Encoder
from laptop.distill.encoding import DataConfig, make_cache
from laptop.distill.sources import Folder
from laptop.errors import BadInput
from laptop.run import sha256
from laptop.tiny.scenes import write_folder

CONFIG = DataConfig(seed=0)
HALF = {"rtol": 1e-3, "atol": 1e-4}  # what float16 keeps


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_folder(folder, 10, seed=0)
    return folder


@pytest.fixture(scope="module")
def made(tiny_folder: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(
        str(tiny_folder), Folder(pictures), tmp_path_factory.mktemp("cache") / "c", CONFIG
    )


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of three pictures, shards of two records."""
    monkeypatch.setattr("laptop.distill.sources.PART", 3)
    monkeypatch.setattr(encoding, "RUN", 2)


def everything(folder: Path) -> dict[str, tuple[torch.Tensor, ...]]:
    """By id, what training gets of a sample: latents and conditions."""
    cache = Cache(folder)
    found = {}
    for samples in cache.buckets.values():
        for i in samples:
            latents, rows = cache.rows(i[None], torch.ones(1, dtype=torch.bool))
            found[cache.ids[int(i)]] = (latents[0], *(row[0] for row in rows.values()))
    return found


def test_a_cache_holds_what_the_model_computes(tiny_folder, pictures, made) -> None:
    pipe = models.load_pipeline(str(tiny_folder))
    cache = Cache(made)
    assert len(cache) == 10
    assert list(cache.buckets) == [(8, 8)]
    keep = torch.tensor([True, False, True])
    latents, rows = cache.rows(torch.tensor([3, 4, 9]), keep)
    lines = [json.loads(x) for x in (pictures / "metadata.jsonl").read_text().splitlines()]
    for at, i in enumerate((3, 4, 9)):
        assert cache.ids[i] == lines[i]["file_name"]
        with Image.open(pictures / lines[i]["file_name"]) as image:
            pixels, time_ids = fit(image, (64, 64))
        seed = int(np.random.SeedSequence([0, 0, 0]).generate_state(10, np.uint64)[i])
        noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            found = pipe.vae.encode(pixels[None]).latent_dist
            states, _, pooled, _ = pipe.encode_prompt(
                lines[i]["text"], do_classifier_free_guidance=False
            )
        wanted = (found.mean[0] + found.std[0] * noise) * pipe.vae.config.scaling_factor
        torch.testing.assert_close(latents[at], wanted, **HALF)
        assert rows["time_ids"][at].equal(time_ids)
        kept = float(keep[at])  # without its caption, zeros: as the pipeline has it
        torch.testing.assert_close(rows["encoder_hidden_states"][at], kept * states[0], **HALF)
        torch.testing.assert_close(rows["text_embeds"][at], kept * pooled[0], **HALF)


def test_a_cache_of_another_model_is_refused(made, tiny_folder, tmp_path) -> None:
    check_cache(made, str(tiny_folder))
    with pytest.raises(BadInput, match=r"vae is another than that of tiny-sdxl.*laptop cache"):
        check_cache(made, "tiny-sdxl")
    with pytest.raises(BadInput, match="text states are 128 wide, the U-Net of random:sd15 takes"):
        check_cache(made, "random:sd15")


def test_a_killed_cache_goes_on_and_ends_like_an_unbroken_one(
    tiny_folder, pictures, tmp_path, monkeypatch, small_parts
) -> None:
    whole = make_cache(str(tiny_folder), Folder(pictures), tmp_path / "whole", CONFIG)
    assert len(list(whole.glob("0*.safetensors"))) == 7, "two shards a part, one of the last"
    encode, calls = Encoder.encode, []

    def killed(self, records, seeds):
        calls.append(len(records))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(self, records, seeds)

    monkeypatch.setattr(Encoder, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        make_cache(str(tiny_folder), Folder(pictures), tmp_path / "broken", CONFIG)
    assert not (tmp_path / "broken").exists()
    make_cache(str(tiny_folder), Folder(pictures), tmp_path / "broken", CONFIG)
    assert calls == [2, 1, 2, 1, 1, 2, 1, 1][: len(calls)], "what was finished is not done again"
    assert sha256(tmp_path / "broken") == sha256(whole)
