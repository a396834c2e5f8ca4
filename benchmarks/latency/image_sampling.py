"""The sampling of the models that are timed: U-Net calls and rows of a whole image, its size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from laptop.benchmarks.latency.timed_components import GRAPH
from laptop.benchmarks.latency.workloads import Sources
from laptop.errors import BadInput
from laptop.export.artifact_list import LIST, read_list
from laptop.models.description import describe
from laptop.models.shapes import Size
from laptop.pruning.sampling_choice import picture_size, rows_each, settle
from laptop.pruning.sampling_config import SamplingConfig

if TYPE_CHECKING:
    from laptop.benchmarks.settings import BenchConfig

STEPS = 20  # unless something else is stated


@dataclass(frozen=True)
class ImageSampling:
    """The work for a whole image."""

    steps: int  # U-Net calls
    guidance: bool  # each on a conditional and an unconditional row
    size: Size | None = None  # pixels, where they are set; None: the models' own


def image_sampling(
    subjects: Mapping[str, Sources],
    sampling: SamplingConfig | None,
    steps: int | None,
    guidance: bool | None,
) -> ImageSampling:
    """How all `subjects` draw.

    `steps` and `guidance`, the keys of `[bench]`, come first; then `sampling`, what the folders of
    models and the lists of artifacts state, and the models' configs. Raises `BadInput` if these
    disagree.
    """
    config = sampling or SamplingConfig()
    sources = list(dict.fromkeys(str(s) for listed in subjects.values() for s in _each(listed)))
    stated = {source: _stated(source, config) for source in sources}
    rows = {source: count for source, (_, count) in stated.items() if count is not None}
    calls = {source: own.steps for source, (own, _) in stated.items() if own.steps is not None}
    if guidance is None:
        _need_same("guidance", {name: f"{count} rows" for name, count in rows.items()})
    if steps is None:
        _need_same("steps", {name: f"{count} steps" for name, count in calls.items()})
    models = [source for source in sources if not _is_artifacts(source)]
    size = None
    if models and (config.height or config.width):
        size = picture_size(describe(models[0]), config.height, config.width)
    return ImageSampling(
        steps or next(iter(calls.values()), STEPS),
        next(iter(rows.values()), 2) == 2 if guidance is None else guidance,
        size,
    )


def with_sampling(
    subjects: Mapping[str, Sources], config: "BenchConfig", sampling: SamplingConfig | None
) -> tuple["BenchConfig", Size | None]:
    """`config` with the steps and the guidance that the subjects draw with, and their size."""
    image = image_sampling(subjects, sampling, config.steps, config.guidance)
    return replace(config, steps=image.steps, guidance=image.guidance), image.size


def _each(sources: Sources) -> Sequence[str | Path]:
    return [sources] if isinstance(sources, str | Path) else sources


def _is_artifacts(source: str) -> bool:
    folder = Path(source)
    patterns = (LIST, f"*/{GRAPH}", f"onnx/*/{GRAPH}")
    return any(path.is_file() for pattern in patterns for path in folder.glob(pattern))


def _stated(source: str, config: SamplingConfig) -> tuple[SamplingConfig, int | None]:
    """Settings of a model or of artifacts, and the U-Net's rows a picture; None: not known."""
    if (Path(source) / LIST).is_file():
        listed = read_list(Path(source))
        stated = config.over(listed.sampling_config)
        shapes = next((a.shapes for a in listed.artifacts if a.component == "unet"), None)
        if config.guidance is not None and shapes and "timestep_cond" not in shapes:
            return stated, 2 if config.guidance > 1 else 1
        return stated, (shapes.get("sample") or (None,))[0] if shapes else None
    if _is_artifacts(source):  # of another tool
        rows = None if config.guidance is None else 2 if config.guidance > 1 else 1
        return config, rows
    stated = settle(source, config)
    return stated, rows_each(describe(source), stated.guidance)


def _need_same(key: str, stated: Mapping[str, str]) -> None:
    if len(set(stated.values())) > 1:
        each = ", ".join(f"{name}: {value}" for name, value in stated.items())
        raise BadInput(
            f"the models draw with different {key} ({each}), so their images cannot be compared. "
            f"Set {key} in the recipe's [bench] or [sampling]."
        )
