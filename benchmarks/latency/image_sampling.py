"""How the models that are timed draw: U-Net calls and rows of a whole image, and its size."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from laptop.benchmarks.latency.timed_components import GRAPH
from laptop.benchmarks.latency.workloads import Places
from laptop.errors import BadInput
from laptop.export.artifact_list import LIST, read_list
from laptop.models.description import describe
from laptop.models.shapes import Size
from laptop.pruning.sampling_choice import picture_size, rows_each, settle
from laptop.pruning.sampling_config import SamplingConfig

if TYPE_CHECKING:
    from laptop.benchmarks.settings import BenchConfig

STEPS = 20  # where nothing says more


@dataclass(frozen=True)
class ImageSampling:
    """What a whole image takes."""

    steps: int  # U-Net calls
    guidance: bool  # each on a conditional and an unconditional row
    size: Size | None = None  # pixels, where they are set; None: the models' own


def image_sampling(
    subjects: Mapping[str, Places],
    sampling: SamplingConfig | None,
    steps: int | None,
    guidance: bool | None,
) -> ImageSampling:
    """How all `subjects` draw; `steps` and `guidance` are the keys of `[bench]`, which go first.

    Then `sampling`, what the folders of models and lists of artifacts state, and models' configs.
    Raises `BadInput` where they say different things.
    """
    config = sampling or SamplingConfig()
    named = {str(p): p for places in subjects.values() for p in _each(places)}
    drawn = {name: _of_place(place, config) for name, place in named.items()}
    rows = {name: count for name, (_, count) in drawn.items() if count is not None}
    calls = {name: one.steps for name, (one, _) in drawn.items() if one.steps is not None}
    if guidance is None:
        _need_same("guidance", {name: f"{count} rows" for name, count in rows.items()})
    if steps is None:
        _need_same("steps", {name: f"{count} steps" for name, count in calls.items()})
    models = [p for p in named.values() if not _is_artifacts(p)]
    size = None
    if models and (config.height or config.width):
        size = picture_size(describe(str(models[0])), config.height, config.width)
    return ImageSampling(
        steps or next(iter(calls.values()), STEPS),
        next(iter(rows.values()), 2) == 2 if guidance is None else guidance,
        size,
    )


def with_sampling(
    subjects: Mapping[str, Places], config: "BenchConfig", sampling: SamplingConfig | None
) -> tuple["BenchConfig", Size | None]:
    """`config` with the steps and the guidance that the subjects draw with, and their size."""
    how = image_sampling(subjects, sampling, config.steps, config.guidance)
    return replace(config, steps=how.steps, guidance=how.guidance), how.size


def _each(places: Places) -> Iterator[str | Path]:
    yield from [places] if isinstance(places, str | Path) else places


def _is_artifacts(place: str | Path) -> bool:
    folder = Path(place)
    patterns = (LIST, f"*/{GRAPH}", f"onnx/*/{GRAPH}")
    return any(path.is_file() for pattern in patterns for path in folder.glob(pattern))


def _of_place(place: str | Path, config: SamplingConfig) -> tuple[SamplingConfig, int | None]:
    """Settings of a model or of artifacts, and the U-Net's rows a picture; None: not known."""
    if (Path(place) / LIST).is_file():
        listed = read_list(Path(place))
        stated = config.over(listed.sampling_config)
        shapes = next((a.shapes for a in listed.artifacts if a.component == "unet"), None)
        if config.guidance is not None and shapes and "timestep_cond" not in shapes:
            return stated, 2 if config.guidance > 1 else 1
        return stated, (shapes.get("sample") or (None,))[0] if shapes else None
    if _is_artifacts(place):  # of another tool
        rows = None if config.guidance is None else 2 if config.guidance > 1 else 1
        return config, rows
    stated = settle(str(place), config)
    return stated, rows_each(describe(str(place)), stated.guidance)


def _need_same(key: str, said: Mapping[str, str]) -> None:
    if len(set(said.values())) > 1:
        each = ", ".join(f"{name}: {value}" for name, value in said.items())
        raise BadInput(
            f"the models draw with different {key} ({each}), so their images cannot be compared. "
            f"Set {key} in the recipe's [bench] or [sampling]."
        )
