"""Workloads: the components of models and of artifacts' folders that are to be timed.

Inputs have the shapes that an artifact's list records, else those of the components' `config.json`.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from laptop.benchmarks.devices.device import Facts, Shapes, Workload
from laptop.benchmarks.latency.timed_components import (
    RUNS,
    TimedComponent,
    read_tokens,
    shapes_of,
    timed_components,
)
from laptop.benchmarks.settings import IMAGE
from laptop.console import say
from laptop.errors import BadInput, MissingExtra
from laptop.export.settings import COMPONENTS
from laptop.files import shown
from laptop.models.shapes import Size

CLIP_TOKENS = 77  # of SD and SDXL; used where a U-Net comes without a text encoder
FIXED = ("executorch", "tensorrt", "coreml")  # runtimes of artifacts that may take one shape only
EXTRAS = {"onnxruntime": "onnx", "executorch": "executorch"}  # our extras that install runtimes
Sources = str | Path | Sequence[str | Path]


def workloads(
    subjects: Mapping[str, Sources],
    components: Sequence[str],
    facts: Facts,
    *,
    unet_only: Collection[str] = (),
    refused: Collection[str] = (),
    runtimes: Sequence[str] = (),
    guidance: bool = True,
    size: Size | None = None,
    threads: int | None = None,
    seed: int = 0,
) -> list[Workload]:
    """One workload for each component of each subject and runtime, checked before anything runs.

    Labels in `unet_only` have no other component timed, targets in `refused` are left out. Without
    `runtimes`, all that the device has are used, on its processor. Raises `BadInput` for subjects
    that cannot be compared, `MissingExtra` if the device has no runtime for them, `UnknownModel`
    for a source that is no model.
    """
    if not components or (unknown := set(components) - set(COMPONENTS)):
        named = ", ".join(sorted(unknown)) if components else "nothing"
        raise BadInput(f"cannot bench {shown(named)}; components are {', '.join(COMPONENTS)}.")
    timed = _timed(subjects, components, facts, unet_only, refused, runtimes)
    parts = list(timed.values())
    _check_asked(subjects, components, runtimes, parts, {label for label, *_ in timed})
    tokens = next((count for part in parts if (count := read_tokens(part))), CLIP_TOKENS)
    pixels = size or next((part.picture for part in parts if part.picture), None)
    all_workloads = [
        Workload(
            label=label,
            component=part.component,
            runtime=part.runtime,
            target=part.target,
            source=part.source,
            shapes=_shapes(part, guidance, tokens, pixels),
            precision=part.precision,
            threads=threads or facts.cores or 1,
            seed=seed,
            pixels_per_latent=part.pixels_per_latent,
            params=part.params,
        )
        for (label, *_), part in timed.items()
    ]
    check_same_shapes(all_workloads)
    return all_workloads


def _timed(
    subjects: Mapping[str, Sources],
    components: Sequence[str],
    facts: Facts,
    unet_only: Collection[str],
    refused: Collection[str],
    runtimes: Sequence[str],
) -> dict[tuple[str, str, str, str], TimedComponent]:
    """What is timed, by label, component, runtime and target."""
    timed: dict[tuple[str, str, str, str], TimedComponent] = {}
    for label, sources in subjects.items():
        wanted = [c for c in components if c == "unet" or label not in unet_only]
        if not wanted:
            say(f"bench: {label} is left out: only its U-Net is timed, which is not asked for.")
            continue
        for source in [sources] if isinstance(sources, str | Path) else sources:
            parts = [p for p in timed_components(source, wanted) if _kind(p.target) not in refused]
            for part in _on_device(source, parts, facts, runtimes):
                key = (label, part.component, part.runtime, part.target)
                if (other := timed.setdefault(key, part)) != part:
                    raise BadInput(
                        f"{label!r} names two models for {part.runtime}: {other.source} and "
                        f"{part.source}."
                    )
    return timed


def _check_asked(
    subjects: Collection[str],
    components: Sequence[str],
    runtimes: Sequence[str],
    parts: Sequence[TimedComponent],
    labels: Collection[str],
) -> None:
    """Raise `BadInput` for a runtime or a component that was asked for and that a subject lacks."""
    if runtimes and (without := [label for label in subjects if label not in labels]):
        raise BadInput(
            f"{', '.join(without)} has nothing that runs in {', '.join(runtimes)}: export it for "
            "that runtime first, or leave --runtime out."
        )
    timed = {part.component for part in parts}
    if tuple(components) != IMAGE and (missing := [c for c in components if c not in timed]):
        raise BadInput(f"there is no {', '.join(missing)} to bench; there are {sorted(timed)}.")


def _kind(folder: str) -> str:
    """The target in a folder's name, which may end with a precision: onnx for onnx-fp16."""
    return folder.partition("-")[0]


def _on_device(
    source: str | Path, parts: Sequence[TimedComponent], facts: Facts, runtimes: Sequence[str]
) -> list[TimedComponent]:
    """The components that can run on the device, once for each runtime that is asked for."""
    if missing := [runtime for runtime in runtimes if runtime not in facts.runtimes]:
        raise BadInput(
            f"{', '.join(missing)} is not on {facts.name}; there are {_listed(facts.runtimes)}."
        )
    timed = []
    lost = set()
    for part in parts:
        own = [runtime for runtime in runtimes if runtime.partition(":")[0] == part.runtime]
        for runtime in own if runtimes else [part.runtime]:
            if runtime in facts.runtimes:
                timed.append(replace(part, runtime=runtime))
            else:
                lost.add(runtime)
    for runtime in sorted(lost):
        needed = f"{source} needs {runtime}, which is not installed on {facts.name}"
        if facts.how_to:
            needed += f": {facts.how_to}"
        elif runtime in EXTRAS:
            needed += f": pip install 'laptop-diff[{EXTRAS[runtime]}]'"
        if not timed:
            raise MissingExtra(f"{needed}. There are {_listed(facts.runtimes)}.")
        say(f"bench: {needed}. It is left out.")
    if not timed and not runtimes:
        raise BadInput(
            f"{source} holds nothing that can be timed: no component for {', '.join(RUNS)}."
        )
    return timed


def _listed(runtimes: Mapping[str, str]) -> str:
    return ", ".join(f"{k} {v}" for k, v in runtimes.items()) or "none"


def _shapes(part: TimedComponent, guidance: bool, tokens: int, pixels: Size | None) -> Shapes:
    """Recorded shapes, with two rows for guidance, and one without it; else those of the config.

    A program of one shape, and a U-Net in which guidance is embedded, keep what was recorded.
    """
    if not (recorded := part.shapes):
        return shapes_of(part, guidance, tokens, pixels)
    batch, rows = (recorded.get("sample") or (0,))[0], 2 if guidance else 1
    is_embedded = "timestep_cond" in recorded
    if part.component != "unet" or batch == rows or part.runtime in FIXED or is_embedded:
        return recorded
    return {
        k: (rows, *shape[1:]) if shape[:1] == (batch,) else shape for k, shape in recorded.items()
    }


def check_same_shapes(timed: Sequence[Workload]) -> None:
    """Raise `BadInput` unless all subjects take the same inputs, but for programs of one shape."""
    first: dict[tuple[str, str | None], Workload] = {}
    for workload in timed:
        fixed = workload.target if workload.runtime in FIXED else None
        other = first.setdefault((workload.component, fixed), workload)
        if workload.shapes != other.shapes:
            raise BadInput(
                f"{other.label} ({other.runtime}) takes {json.dumps(other.shapes)}, "
                f"{workload.label} ({workload.runtime}) takes {json.dumps(workload.shapes)}: their "
                "latencies cannot be compared. Bench models of one resolution and kind."
            )
