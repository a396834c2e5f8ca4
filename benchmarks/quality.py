"""Image quality of models that draw the same prompts from the same noise.

The first model is the teacher. Every picture is made by the pipeline's own call from noise that
depends on the seed and the prompt's number only, so that pictures of different models, batches and
runs can be compared one by one.
"""

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from laptop.benchmarks.eval_report import EvalReport, EvaluatedModel
from laptop.benchmarks.frechet import FEATURE_SPACE, frechet_distance, latent_features
from laptop.benchmarks.settings import EvalConfig
from laptop.console import track
from laptop.errors import BadInput
from laptop.files import open_file
from laptop.models import loading, locating
from laptop.models.description import of_pipeline
from laptop.pruning.sampling_choice import choose_sampling, picture_size, set_scheduler_
from laptop.pruning.sampling_config import Sampling, SamplingConfig
from laptop.run import Overwrite, run_stage
from laptop.unfinished import resume_folder

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PSNR_CAP_DB = 100.0  # of identical pictures, whose PSNR is infinite
BLACK_LEVEL = 5  # of 255: a picture with no brighter value is black
Images = NDArray[np.uint8]  # (N, H, W, 3)
Pixels = NDArray[np.float32] | NDArray[np.float64]
Judge = Callable[[Images, Sequence[str]], Mapping[str, float]]


def evaluate(
    models: Mapping[str, str | Path],
    out: Path,
    config: EvalConfig,
    prompts: Sequence[str],
    *,
    sampling: SamplingConfig | None = None,
    judge: Judge | None = None,
    reference: Images | None = None,
    overwrite: Overwrite = False,
) -> Path:
    """Draw `prompts` with each of `models` (label to name or folder) and write `out/eval.json`.

    `judge` gives accuracies by attribute, among them "prompt_accuracy"; the Fréchet distance is
    taken to the pictures `reference`, or to the teacher's. If a call is killed, the next one keeps
    the pictures that were drawn. All models draw alike, as `sampling`, their folders and the first
    one's configs say. Raises `BadInput` when there is no prompt, a label is no file name, or the
    folders disagree.
    """
    chosen = _check(models, config, prompts)
    for model in models.values():
        locating.need_whole_chain(str(model), "eval")
    sources = {label: locating.locate(str(model)) for label, model in models.items()}
    first, *others = (str(model) for model in models.values())
    wanted = SamplingConfig(guidance=config.guidance).over(sampling or SamplingConfig())
    chosen_sampling = choose_sampling(first, wanted, *others, steps=config.steps)
    settings = asdict(config) | {
        "sampling": asdict(chosen_sampling),
        "models": [f"{label}: {source}" for label, source in sources.items()],
        "prompts_sha256": hashlib.sha256("\n".join(chosen).encode()).hexdigest(),
        "judge": f"{judge.__module__}.{judge.__name__}" if judge else None,
        "reference_sha256": None if reference is None else _digest(reference),
    }
    inputs = {label: Path(s) for label, s in sources.items() if Path(s).is_dir()}

    def work(folder: Path) -> None:
        pictures = draw_all(sources, folder, config, chosen_sampling, chosen)
        report = EvalReport(
            prompts=len(chosen),
            steps=chosen_sampling.steps,
            guidance=chosen_sampling.guidance,
            sampling=asdict(chosen_sampling),
            seed=config.seed,
            feature_space=FEATURE_SPACE,
            reference="the teacher's pictures"
            if reference is None
            else f"{len(reference)} reference pictures given by the caller",
            psnr_cap_db=PSNR_CAP_DB,
            captions=tuple(chosen[: config.images_kept]),
            models=_measure(sources, pictures, chosen, judge, reference),
        )
        for label, (images, _) in pictures.items():
            _keep(images[: config.images_kept], folder / "images" / label)
        report.write(folder / "eval.json")

    return run_stage("eval", out, settings, inputs, work, overwrite=overwrite)


def _check(
    models: Mapping[str, str | Path], config: EvalConfig, prompts: Sequence[str]
) -> list[str]:
    for label in models:
        if not re.fullmatch(r"[\w.-]+", label):
            raise BadInput(f"label {label!r} must be letters, digits, '-', '_' and '.' only.")
    if not models or not prompts:
        raise BadInput("at least one model and one prompt are needed.")
    return list(prompts[: config.prompts])


def _digest(images: Images) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()


def noise(seed: int, index: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """The initial noise (C, h, w) of prompt `index`, which does not depend on the batch."""
    return np.random.default_rng([seed, index]).standard_normal(tuple(shape), np.float32)


def draw_all(
    sources: Mapping[str, str],
    folder: Path,
    config: EvalConfig,
    sampling: Sampling,
    prompts: Sequence[str],
) -> dict[str, tuple[Images, NDArray[np.bool_]]]:
    """The pictures of each model, and which of them are black or hold a NaN."""
    starts = range(0, len(prompts), config.batch)
    numbers = [range(i, min(i + config.batch, len(prompts))) for i in starts]
    total = len(numbers) * len(sources)
    folder = resume_folder(folder) / "drawn"
    batches = _batches(sources, folder, sampling, config.seed, prompts, numbers)
    images, bad = defaultdict(list), defaultdict(list)
    for label, pictures, is_bad in track(batches, "eval", total):
        images[label].append(pictures)
        bad[label].append(is_bad)
    return {k: (np.concatenate(images[k]), np.concatenate(bad[k])) for k in sources}


def _kept(
    path: Path, count: int, size: tuple[int | None, int | None]
) -> tuple[Images, NDArray[np.bool_]] | None:
    """The pictures of a batch that an earlier call drew, and which of them are bad.

    Returns None unless the file exists and is whole: `count` pictures of `size`, which is height
    and width; None stands for any.
    """
    if not path.exists():
        return None
    height, width = size
    try:
        with open_file(path) as file, np.load(file) as arrays:
            images, bad = arrays["images"], arrays["bad"]
        shape = (count, height or images.shape[1], width or images.shape[2], 3)
        is_whole = (images.shape, bad.shape) == (shape, (count,))
        return (images, bad) if is_whole and (images.dtype, bad.dtype) == (np.uint8, bool) else None
    except BadInput:
        raise
    except Exception:  # noqa: BLE001 - whatever foreign bytes make numpy raise
        return None


def _chunk(folder: Path, label: str, numbers: Sequence[int]) -> Path:
    return folder / label / f"{numbers[0]:06d}.npz"


def _batches(
    sources: Mapping[str, str],
    folder: Path,
    sampling: Sampling,
    seed: int,
    prompts: Sequence[str],
    numbers: Sequence[Sequence[int]],
) -> Iterator[tuple[str, Images, NDArray[np.bool_]]]:
    """Label, pictures and bad pictures of each batch; batches that `folder` lacks are drawn."""
    for label, source in sources.items():
        pipe = None  # loaded only when a picture is missing, and one model at a time
        (folder / label).mkdir(parents=True, exist_ok=True)
        for chunk in numbers:
            path = _chunk(folder, label, chunk)
            batch = _kept(path, len(chunk), (sampling.height, sampling.width))
            if batch is None:
                pipe = pipe or _load(source, sampling)
                batch = images, bad = draw(pipe, prompts, chunk, sampling, seed)
                partial = path.with_suffix(".tmp.npz")
                np.savez(partial, images=images, bad=bad)
                partial.replace(path)
            yield label, *batch


def _load(source: str, sampling: Sampling) -> "DiffusionPipeline":
    pipe = loading.load_pipeline(source)
    set_scheduler_(pipe, sampling)
    return pipe


def draw(
    pipe: "DiffusionPipeline",
    prompts: Sequence[str],
    numbers: Sequence[int],
    sampling: Sampling,
    seed: int,
) -> tuple[Images, NDArray[np.bool_]]:
    """Pictures of the prompts with these numbers, and which are black or hold a NaN."""
    import torch

    description = of_pipeline(pipe)
    size = picture_size(description, sampling.height, sampling.width)
    shape = (pipe.unet.config.in_channels, *(side // description.latents.pixels for side in size))
    latents = np.stack([noise(seed, i, shape) for i in numbers])
    pixels = pipe(
        [prompts[i] for i in numbers],
        **sampling.arguments,
        height=size[0],
        width=size[1],
        latents=torch.from_numpy(latents).to(pipe.unet.dtype),
        output_type="np",
    ).images  # (B, H, W, 3) in 0..1
    return to_uint8(pixels)


def to_uint8(pixels: Pixels) -> tuple[Images, NDArray[np.bool_]]:
    """Pictures (N, H, W, 3) from values in 0..1, and which of them are black or hold a NaN."""
    images = np.rint(255 * np.nan_to_num(pixels, nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1))
    finite = np.isfinite(pixels).all(axis=(1, 2, 3))
    bad = ~finite | (images.max(axis=(1, 2, 3)) <= BLACK_LEVEL)
    # C order, as a file gives them back: sums over pictures depend on it in their last digits
    return images.astype(np.uint8, order="C"), bad


def psnr_db(a: Images, b: Images) -> float:
    """Mean over pictures of 10 log10(255^2 / MSE), at most `PSNR_CAP_DB` each."""
    difference = a.astype(np.float64) - b
    mse = (difference**2).mean(axis=(1, 2, 3))
    floor = 255**2 / 10 ** (PSNR_CAP_DB / 10)
    return float(np.mean([10 * math.log10(255**2 / max(m, floor)) for m in mse]))


def _measure(
    sources: Mapping[str, str],
    pictures: Mapping[str, tuple[Images, NDArray[np.bool_]]],
    prompts: Sequence[str],
    judge: Judge | None,
    reference: Images | None,
) -> tuple[EvaluatedModel, ...]:
    """One entry for each label; the teacher has no PSNR to itself."""
    teacher = next(iter(sources))
    teacher_images = pictures[teacher][0]
    vae = loading.load_pipeline(sources[teacher]).vae
    aim = latent_features(vae, teacher_images if reference is None else reference)
    rows = []
    for label, source in sources.items():
        images, bad = pictures[label]
        accuracy = dict(judge(images, prompts)) if judge else {}
        rows.append(
            EvaluatedModel(
                label=label,
                path=source,
                prompt_accuracy=accuracy.pop("prompt_accuracy", None),
                accuracy=accuracy,
                frechet=frechet_distance(latent_features(vae, images), aim),
                psnr_to_teacher_db=None if label == teacher else psnr_db(images, teacher_images),
                black_or_nan=int(bad.sum()),
            )
        )
    return tuple(rows)


def _keep(images: Images, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
