"""Image quality: formulas against closed forms, pictures against themselves."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.linalg import sqrtm

from laptop.benchmarks import quality
from laptop.benchmarks.frechet import frechet_distance, gaussian_distance
from laptop.benchmarks.quality import PSNR_CAP_DB, evaluate, psnr_db, to_uint8
from laptop.benchmarks.settings import EvalConfig
from laptop.errors import BadInput
from laptop.models import loading
from laptop.pruning.sampling_config import Sampling
from laptop.tiny.scenes import held_out_prompts

PROMPTS = held_out_prompts(6)
QUICK = EvalConfig(prompts=6, steps=2, batch=3, images_kept=2)


def share_of_red(images, prompts):
    assert len(images) == len(prompts)
    return {"prompt_accuracy": 0.5, "red": float((images[..., 0] > 127).mean())}


@pytest.fixture(scope="module")
def evaluated(tiny_folder: Path, pruned_folder: Path, tmp_path_factory) -> Path:
    given = {"teacher": tiny_folder, "same": str(tiny_folder), "pruned": pruned_folder}
    out = tmp_path_factory.mktemp("quality") / "eval"
    return evaluate(given, out, QUICK, PROMPTS, judge=share_of_red)


def test_the_distance_of_gaussians_is_the_closed_form() -> None:
    # diagonal covariances: |m|^2 + sum (s_a - s_b)^2 over standard deviations
    mean, s_a, s_b = np.array([1.0, -2.0, 0.5]), np.array([1.0, 2.0, 0.1]), np.array([3.0, 2.0, 0])
    found = gaussian_distance(mean, np.diag(s_a**2), 0 * mean, np.diag(s_b**2))
    assert found == pytest.approx(mean @ mean + ((s_a - s_b) ** 2).sum(), abs=1e-12)


def test_the_distance_agrees_with_the_matrix_square_root() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 6)), rng.normal(size=(70, 6)) @ rng.normal(size=(6, 6)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = a.mean(0) - b.mean(0)
    slow = shift @ shift + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(slow, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a[:1], b) is None


def test_psnr_is_its_formula_and_capped_for_identical_pictures() -> None:
    a = np.full((2, 4, 4, 3), 100, np.uint8)
    b = a.copy()
    b[1] += 51  # a fifth of the peak: 20 log10(5) dB
    assert psnr_db(a, a) == PSNR_CAP_DB
    assert psnr_db(a, b) == pytest.approx((PSNR_CAP_DB + 13.979) / 2, abs=1e-3)


def test_black_and_nan_pictures_are_found_and_dark_scenes_are_not() -> None:
    pixels = np.zeros((4, 8, 8, 3), np.float32)
    pixels[1:] = 0.5
    pixels[2, 0, 0, 0] = np.nan
    pixels[3] = 0
    pixels[3, 4, 4] = 1
    images, bad = to_uint8(pixels)
    assert bad.tolist() == [True, False, True, False]
    assert images[2, 0, 0, 0] == 0


def test_the_noise_of_a_prompt_does_not_depend_on_the_batch(tiny_folder: Path) -> None:
    pipe = loading.load_pipeline(str(tiny_folder))
    together, _ = quality.draw(pipe, PROMPTS, range(3), Sampling(2), 0)
    alone, _ = quality.draw(pipe, PROMPTS, [2], Sampling(2), 0)
    assert np.abs(together[2].astype(int) - alone[0]).max() <= 1  # the order of a sum may differ
    assert np.abs(together[2].astype(int) - together[1]).max() > 10


def test_identical_models_draw_identical_pictures_and_a_pruned_one_does_not(
    evaluated: Path,
) -> None:
    found = json.loads((evaluated / "eval.json").read_text())
    assert found["schema"] == "laptop.eval/1"
    assert found["reference"] == "the teacher's pictures"
    teacher, same, pruned = found["models"]
    assert teacher["psnr_to_teacher_db"] is None
    assert same["psnr_to_teacher_db"] == PSNR_CAP_DB
    assert same["frechet"] == pytest.approx(0, abs=1e-9)
    assert pruned["psnr_to_teacher_db"] < 60
    assert pruned["frechet"] > 0
    assert (pruned["prompt_accuracy"], list(pruned["accuracy"])) == (0.5, ["red"])
    assert pruned["black_or_nan"] == 0


def test_a_few_pictures_are_kept_and_nothing_else(evaluated: Path) -> None:
    files = sorted(str(p.relative_to(evaluated)) for p in evaluated.rglob("*") if p.is_file())
    kept = [f"images/{m}/{i:03d}.png" for m in ("pruned", "same", "teacher") for i in range(2)]
    assert files == ["eval.json", *kept, "manifest.json"]
    with Image.open(evaluated / "images" / "teacher" / "000.png") as picture:
        assert picture.size == (64, 64)


def test_a_killed_evaluation_goes_on_where_it_stopped(
    evaluated: Path, tiny_folder: Path, pruned_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    drawn: list[list[int]] = []
    real = quality.draw

    def draw_then_die(pipe, prompts, numbers, *how):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(list(numbers))
        return real(pipe, prompts, numbers, *how)

    given = {"teacher": tiny_folder, "same": tiny_folder, "pruned": pruned_folder}
    out = tmp_path / "eval"
    monkeypatch.setattr(quality, "draw", draw_then_die)
    with pytest.raises(KeyboardInterrupt):
        evaluate(given, out, QUICK, PROMPTS, judge=share_of_red)
    assert not out.exists()
    monkeypatch.setattr(quality, "draw", lambda *a: drawn.append(list(a[2])) or real(*a))
    evaluate(given, out, QUICK, PROMPTS, judge=share_of_red)
    assert len(drawn) == 6, "three models of two batches, none twice"
    resumed, whole = (json.loads((f / "eval.json").read_text()) for f in (out, evaluated))
    assert resumed == whole


def test_given_reference_pictures_are_used_and_said(tiny_folder: Path, tmp_path: Path) -> None:
    reference = np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), np.uint8)
    config = EvalConfig(prompts=3, steps=1, batch=3, images_kept=0)
    out = evaluate({"t": tiny_folder}, tmp_path / "e", config, PROMPTS, reference=reference)
    found = json.loads((out / "eval.json").read_text())
    assert found["reference"] == "5 reference pictures given by the caller"
    assert found["models"][0]["frechet"] > 0
    assert found["models"][0]["prompt_accuracy"] is None


def test_no_prompts_and_bad_labels_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="one prompt"):
        evaluate({"t": tiny_folder}, tmp_path / "e", EvalConfig(), [])
    with pytest.raises(BadInput, match="label"):
        evaluate({"../t": tiny_folder}, tmp_path / "e", QUICK, PROMPTS)
    assert not any(tmp_path.iterdir())
