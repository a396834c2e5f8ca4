"""Caches: what they hold is what the model computes; they survive, and know their model."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import small_sd15
from laptop.cli import main
from laptop.distill import encoding
from laptop.distill.buckets import fit
from laptop.distill.cache import Cache, check_cache
from laptop.distill.encoder import Encoder, NotFinite
from laptop.distill.encoding import make_cache
from laptop.distill.settings import DataConfig
from laptop.distill.sources import Example, Folder, Prompts
from laptop.errors import BadInput
from laptop.files import sha256
from laptop.models import loading
from laptop.pruning.sampling_config import Sampling
from laptop.training_data import Scenes

CONFIG = DataConfig(seed=0)
HALF = {"rtol": 1e-3, "atol": 1e-4}  # what float16 keeps


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten scenes as a folder."""
    folder, lines = tmp_path_factory.mktemp("pictures"), []
    for i, scene in enumerate(Scenes(10, seed=0).read(0)):
        assert isinstance(scene, Example)
        (folder / f"{i:06}.png").write_bytes(scene.picture or b"")
        lines.append(json.dumps({"file_name": f"{i:06}.png", "text": scene.caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
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


def write_shards(folder: Path, pictures: Path) -> str:
    """The ten pictures in four tars; the pattern that names them."""
    lines = [json.loads(x) for x in (pictures / "metadata.jsonl").read_text().splitlines()]
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for line in lines[shard::4]:
                tar.add(pictures / line["file_name"], line["file_name"])
                text = line["text"].encode()
                info = tarfile.TarInfo(line["file_name"].replace(".png", ".txt"))
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text))
    return str(folder / "{0..3}.tar")


def test_two_processes_make_what_one_makes(tiny_folder, pictures, tmp_path) -> None:
    """Of four tars, each with an OpenMP of one thread, as rounding depends on their number."""
    options = ["cache", "--model", str(tiny_folder), "--json"]
    options += ["--data", write_shards(tmp_path, pictures), "-o"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    two = subprocess.run(
        [*launch, "-m", "laptop", *options, str(tmp_path / "two")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert two.returncode == 0, two.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = CliRunner().invoke(main, [*options, str(tmp_path / "one")])
    torch.set_num_threads(threads)
    assert one.exit_code == 0, one.output
    assert json.loads(one.stdout)["count"] == json.loads(two.stdout)["count"] == 10
    assert sha256(tmp_path / "one") == sha256(tmp_path / "two")
    assert len(list((tmp_path / "two").glob("0*.safetensors"))) == 4


def test_a_cache_holds_what_the_model_computes(tiny_folder, pictures, made) -> None:
    pipe = loading.load_pipeline(str(tiny_folder))
    cache = Cache(made)
    assert len(cache) == 10
    assert list(cache.buckets) == [(8, 8)]
    keep = torch.tensor([True, False, True])
    latents, rows = cache.samples(torch.tensor([3, 4, 9]), keep)
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


def test_broken_pictures_are_skipped_named_and_too_many_of_them_are_an_error(
    tiny_folder, pictures, tmp_path, capsys
) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "f"))
    whole = (folder / "000002.png").read_bytes()
    (folder / "000002.png").write_bytes(whole[: len(whole) // 2])
    (folder / "000005.png").write_bytes(b"no picture")
    (folder / "000007.png").write_bytes(b"")
    names = ["000002.png", "000005.png", "000007.png"]
    config = replace(CONFIG, corrupt_allowed=2)
    with pytest.raises(BadInput, match=r"3 records .* corrupt_allowed is 2: 000002.*; 000005"):
        make_cache(str(tiny_folder), Folder(folder), tmp_path / "c", config)
    made = make_cache(str(tiny_folder), Folder(folder), tmp_path / "c", CONFIG)
    cache = Cache(made)
    assert len(cache) == cache.info.count == 7
    assert not {*names} & {*cache.ids}
    assert [broken.id for broken in cache.info.skipped] == names
    assert all("not a readable picture" in broken.reason for broken in cache.info.skipped)
    told = capsys.readouterr().err
    assert "3 records were skipped: 000002.png" in told


def test_nothing_but_broken_pictures_is_an_error(tiny_folder, tmp_path) -> None:
    (tmp_path / "0.png").write_bytes(b"")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}')
    with pytest.raises(BadInput, match="holds nothing to train on"):
        make_cache(str(tiny_folder), Folder(tmp_path), tmp_path / "c", CONFIG)


def test_buckets_keep_ratios_and_say_what_was_done(tiny_folder, tmp_path) -> None:
    shapes = [(300, 200), (200, 300), (250, 250), (320, 200), (640, 100)]  # width, height
    lines = []
    for i, shape in enumerate(shapes):
        Image.new("RGB", shape, "green").save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": "a"}))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees: upright it is 200 x 300
    Image.new("RGB", (300, 200)).save(tmp_path / "5.jpg", exif=turned)
    lines.append(json.dumps({"file_name": "5.jpg", "text": "a"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    config = replace(CONFIG, resolution=128, buckets=True)
    cache = Cache(make_cache(str(tiny_folder), Folder(tmp_path), tmp_path / "c", config))
    found = {size: [cache.ids[int(i)] for i in some] for size, some in cache.buckets.items()}
    assert found == {
        (12, 20): ["0.png", "3.png"],
        (12, 24): ["4.png"],
        (16, 16): ["2.png"],
        (20, 12): ["1.png", "5.jpg"],
    }
    latents, rows = cache.samples(cache.buckets[20, 12], torch.ones(2, dtype=torch.bool))
    assert latents.shape == (2, 4, 20, 12)
    assert rows["time_ids"].tolist() == [[300, 200, 0, 5, 160, 96]] * 2
    _, rows = cache.samples(cache.buckets[12, 24], torch.ones(1, dtype=torch.bool))
    assert rows["time_ids"].tolist() == [[100, 640, 0, 211, 96, 192]]
    with pytest.raises(ValueError, match="several buckets"):
        cache.samples(torch.arange(6), torch.ones(6, dtype=torch.bool))


def test_prompts_are_drawn_as_the_pipeline_draws_whatever_the_batch(
    tiny_folder, tmp_path, monkeypatch
) -> None:
    source = Prompts(["a large red circle on white", "a small blue cross on black"], 5)
    config = replace(CONFIG, steps=3)
    many = Cache(make_cache(str(tiny_folder), source, tmp_path / "many", config))
    again = make_cache(str(tiny_folder), source, tmp_path / "again", config)
    assert sha256(again) == sha256(tmp_path / "many")
    monkeypatch.setattr("laptop.distill.encoder.PIXELS", 2 * 64**2)
    few = Cache(make_cache(str(tiny_folder), source, tmp_path / "few", config))
    keep = torch.ones(5, dtype=torch.bool)
    latents, rows = many.samples(torch.arange(5), keep)
    torch.testing.assert_close(few.samples(torch.arange(5), keep)[0], latents, rtol=5e-3, atol=5e-3)
    assert rows["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 5
    assert many.ids[4] == "prompt 2 picture 3"
    assert (latents[0] - latents[1]).abs().max() > 0.1, "each picture has a seed of its own"
    seed = int(np.random.SeedSequence([0, 0, 0]).generate_state(5, np.uint64)[4])
    own = loading.load_pipeline(str(tiny_folder))(
        "a small blue cross on black",
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images
    torch.testing.assert_close(latents[4], own[0], rtol=5e-3, atol=5e-3)


def test_a_model_with_one_text_encoder_gets_its_own_empty_caption(tmp_path, pictures) -> None:
    pipe = small_sd15()
    pipe.save_pretrained(tmp_path / "sd")
    cache = Cache(make_cache(str(tmp_path / "sd"), Folder(pictures), tmp_path / "c", CONFIG))
    latents, rows = cache.samples(torch.arange(2), torch.tensor([False, True]))
    assert latents.shape == (2, 4, 8, 8)
    assert list(rows) == ["encoder_hidden_states"]
    with torch.inference_mode():
        empty = pipe.encode_prompt(
            "", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
    torch.testing.assert_close(rows["encoder_hidden_states"][:1], empty, **HALF)
    assert (rows["encoder_hidden_states"][1] - empty[0]).abs().max() > 0.1


def test_settings_that_cannot_be_are_refused(tiny_folder, pictures, tmp_path) -> None:
    for change, message in [
        ({"resolution": 100}, "multiple of 32"),
        ({"count": 0}, "count is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"corrupt_allowed": -1}, "corrupt_allowed is -1"),
    ]:
        with pytest.raises(BadInput, match=message):
            make_cache(
                str(tiny_folder), Folder(pictures), tmp_path / "c", replace(CONFIG, **change)
            )


def test_a_shard_that_is_cut_off_is_named(made, tmp_path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "c"))
    shard = folder / "00000-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:500])
    with pytest.raises(BadInput, match=r"00000-00000\.safetensors cannot be read"):
        Cache(folder)
    shard.unlink()
    with pytest.raises(BadInput, match=r"00000-00000\.safetensors does not exist"):
        Cache(folder)


def test_a_vae_that_computes_what_is_not_finite_is_refused(tiny_pipe, pictures, tmp_path) -> None:
    tiny_pipe.save_pretrained(tmp_path / "m")
    weights = next((tmp_path / "m" / "vae").glob("*.safetensors"))
    save_file({k: v * 1e30 for k, v in load_file(weights).items()}, weights)
    with pytest.raises(NotFinite, match=r"latents of 000000\.png to 000009\.png"):
        make_cache(str(tmp_path / "m"), Folder(pictures), tmp_path / "c", CONFIG)


@pytest.mark.parametrize("statistics", [False, True])
def test_a_model_of_oblong_pictures_gets_them_with_its_own_statistics(
    tiny_folder: Path, tmp_path: Path, statistics: bool
) -> None:
    """Pictures and drawn data have the model's height and width; mean and deviation apply."""
    model = tmp_path / "oblong"
    shutil.copytree(tiny_folder, model)
    change_config(model / "unet", sample_size=[12, 8])
    stated = {"latents_mean": [1.0, -1.0, 0.0, 2.0], "latents_std": [2.0, 3.0, 4.0, 5.0]}
    if statistics:
        change_config(model / "vae", **stated)
    encoder = Encoder(str(model), Sampling(1), has_buckets=False, is_drawn=False)
    assert encoder.sizes == [(96, 64)]
    pixels = torch.rand(3, 96, 64) * 2 - 1
    picture = io.BytesIO()
    Image.fromarray(((pixels + 1) * 127.5).byte().permute(1, 2, 0).numpy()).save(picture, "PNG")
    samples, _ = encoder.encode([Example("a", "a caption", picture.getvalue())], [0])
    latents = samples[12, 8][0].latents.float()
    encoder.latents = replace(encoder.latents, mean=None, std=None)
    plain = encoder.encode([Example("a", "a caption", picture.getvalue())], [0])[0][12, 8][0]
    wanted = plain.latents.float()
    if statistics:
        mean, std = (torch.tensor(values).view(4, 1, 1) for values in stated.values())
        wanted = (wanted - mean * encoder.latents.scaling_factor) / std
    assert torch.allclose(latents, wanted, atol=2e-3, rtol=2e-3)


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
