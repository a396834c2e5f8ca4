"""What is to be timed: the components of models and of artifacts' folders, as workloads.

Inputs have the shapes that were recorded when an artifact was made, where it says so, and else
those that the components' own `config.json` gives.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
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

CLIP_TOKENS = 77  # what SD and SDXL take; used where no text encoder lies beside the U-Net
FIXED = ("executorch", "tensorrt", "coreml")  # runtimes of artifacts that may take one shape only
EXTRAS = {"onnxruntime": "onnx", "executorch": "executorch"}  # of ours, which install a runtime
Places = str | Path | Sequence[str | Path]


def workloads(
    subjects: Mapping[str, Places],
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

    Of the labels in `unet_only` no other component is timed, of targets in `refused` none.
    `runtimes` are those asked for; none: all that the device has, on its processor. Raises
    `BadInput` for subjects that cannot be compared, `MissingExtra` where no runtime is there,
    `UnknownModel` for what is no model.
    """
    if not components or (unknown := set(components) - set(COMPONENTS)):
        named = ", ".join(sorted(unknown)) if components else "nothing"
        raise BadInput(f"cannot bench {shown(named)}; components are {', '.join(COMPONENTS)}.")
    found: dict[tuple[str, str, str, str], TimedComponent] = {}
    for label, places in subjects.items():
        wanted = [c for c in components if c == "unet" or label not in unet_only]
        if not wanted:
            say(f"bench: {label} is left out: of it, only the U-Net is timed.")
            continue
        for place in [places] if isinstance(places, str | Path) else places:
            there = [c for c in timed_components(place, wanted) if _kind(c.target) not in refused]
            for one in _on_device(place, there, facts, runtimes):
                key = (label, one.component, one.runtime, one.target)
                if (other := found.setdefault(key, one)) != one:
                    raise BadInput(
                        f"{label!r} names two models for {one.runtime}: {other.source} and "
                        f"{one.source}."
                    )
    _check_asked(subjects, components, runtimes, list(found.values()), {k[0] for k in found})
    tokens = next((t for one in found.values() if (t := read_tokens(one))), CLIP_TOKENS)
    pixels = size or next((one.picture for one in found.values() if one.picture), None)
    made = [
        Workload(
            label=label,
            component=one.component,
            runtime=one.runtime,
            target=one.target,
            source=one.source,
            shapes=_guided(one, one.shapes, guidance)
            if one.shapes
            else shapes_of(one, guidance, tokens, pixels),
            precision=one.precision,
            threads=threads or facts.cores or 1,
            seed=seed,
            pixels_per_latent=one.pixels_per_latent,
            params=one.params,
        )
        for (label, *_), one in found.items()
    ]
    check_same_shapes(made)
    return made


def _check_asked(
    subjects: Collection[str],
    components: Sequence[str],
    runtimes: Sequence[str],
    found: Sequence[TimedComponent],
    labels: Collection[str],
) -> None:
    """Raise `BadInput` for what was asked for by name and is not there."""
    if runtimes and (without := [label for label in subjects if label not in labels]):
        raise BadInput(
            f"{', '.join(without)} has nothing that runs in {', '.join(runtimes)}: export it for "
            "that runtime first, or leave --runtime out."
        )
    there = {one.component for one in found}
    if tuple(components) != IMAGE and (missing := [c for c in components if c not in there]):
        raise BadInput(f"there is no {', '.join(missing)} to bench; there are {sorted(there)}.")


def _kind(folder: str) -> str:
    """The target of its folder, which has the precision: onnx of onnx-fp16."""
    return folder.partition("-")[0]


def _on_device(
    place: str | Path, found: Sequence[TimedComponent], facts: Facts, runtimes: Sequence[str]
) -> Iterator[TimedComponent]:
    """Those that can run on the device, by the runtimes that are asked for."""
    there = facts.runtimes
    if missing := [r for r in runtimes if r not in there]:
        raise BadInput(f"{', '.join(missing)} is not on {facts.name}; there are {_listed(there)}.")
    made = []
    lost = set()
    for one in found:
        asked = [r for r in runtimes if r.partition(":")[0] == one.runtime]
        for runtime in asked if runtimes else [one.runtime]:
            if runtime in there:
                made.append(TimedComponent(**{**vars(one), "runtime": runtime}))
            else:
                lost.add(runtime)
    for runtime in sorted(lost):
        needed = f"{place} needs {runtime}, which is not installed on {facts.name}"
        if facts.how_to:
            needed += f": {facts.how_to}"
        elif runtime in EXTRAS:
            needed += f": pip install 'laptop-diff[{EXTRAS[runtime]}]'"
        if not made:
            raise MissingExtra(f"{needed}. There are {_listed(there)}.")
        say(f"bench: {needed}. It is left out.")
    if not made and not runtimes:
        raise BadInput(
            f"{place} holds nothing that can be timed: no component for {', '.join(RUNS)}."
        )
    yield from made


def _listed(runtimes: Mapping[str, str]) -> str:
    return ", ".join(f"{k} {v}" for k, v in runtimes.items()) or "none"


def _guided(one: TimedComponent, recorded: Shapes, guidance: bool) -> Shapes:
    """Recorded shapes, with two rows for guidance, and one without it or where it is embedded."""
    batch, rows = (recorded.get("sample") or (0,))[0], 2 if guidance else 1
    is_embedded = "timestep_cond" in recorded
    if one.component != "unet" or batch == rows or one.runtime in FIXED or is_embedded:
        return recorded
    return {
        k: (rows, *shape[1:]) if shape[:1] == (batch,) else shape for k, shape in recorded.items()
    }


def check_same_shapes(made: Sequence[Workload]) -> None:
    """Raise `BadInput` unless all subjects take the same inputs, but for programs of fixed ones."""
    first: dict[tuple[str, str | None], Workload] = {}
    for one in made:
        fixed = one.target if one.runtime in FIXED else None
        other = first.setdefault((one.component, fixed), one)
        if one.shapes != other.shapes:
            raise BadInput(
                f"{other.label} ({other.runtime}) takes {json.dumps(other.shapes)}, {one.label} "
                f"({one.runtime}) takes {json.dumps(one.shapes)}: their latencies cannot be "
                "compared. Bench models of one resolution and kind."
            )
