"""The targets by name, and how a request such as "coreml:palette6" is read.

The module of a target is imported on demand. It has

    export(job: Job) -> None             one component to its file, in a process of its own
    complete(model, folder) -> None      what belongs beside all components; left out where nothing
    load(path) -> ArrayFunction                 the artifact as a function on arrays
    wide_scores(path) -> Callable        whether a half-precision artifact computes the scores of
                                         the attention module with this name in float32
    checked(precision) -> str | None     what a parity report says of an artifact that `load` ran
                                         here well: VERIFIED; None where it cannot run here
"""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from laptop.errors import BadInput, MissingExtra
from laptop.export.settings import COMPONENTS, ExportConfig

CALIBRATED = "int8-qdq"  # the precision that needs the ranges of activations


@dataclass(frozen=True)
class Target:
    """How one kind of artifact is made."""

    module: str
    extra: str  # of pip install 'laptop-diff[extra]'
    packages: tuple[str, ...]  # what the extra must have brought
    components: tuple[str, ...]  # what the target covers
    file: str  # of a component, in the target's folder
    # the first one is the default; with the memory of the process that exports, in bytes a weight
    precisions: Mapping[str, float]  # (measured: docs/explanation/log.md)


TARGETS = {
    "onnx": Target(
        module="laptop.export.to_onnx.target",
        extra="onnx",
        packages=("onnx", "onnxruntime"),
        components=COMPONENTS,
        file="{component}/model.onnx",
        precisions={"fp32": 6, "fp16": 6, "int8": 6, CALIBRATED: 14},
    ),
    "ort": Target(
        module="laptop.export.to_onnx.ort",
        extra="onnx",
        packages=("onnx", "onnxruntime"),
        components=COMPONENTS,
        file="{component}.ort",
        precisions={"fp32": 14, "int8": 14, CALIBRATED: 14},
    ),
    "coreml": Target(
        module="laptop.export.to_coreml.target",
        extra="coreml",
        packages=("coremltools",),
        components=COMPONENTS,
        file="{component}.mlpackage",
        precisions=dict.fromkeys(("fp16", "fp32", "palette8", "palette6", "palette4", "mixed"), 14),
    ),
    "tensorrt": Target(
        module="laptop.export.to_tensorrt.target",
        extra="tensorrt",
        packages=("onnx", "onnxruntime"),
        components=COMPONENTS,
        file="{component}/model.onnx",
        precisions={"fp16": 8, "fp32": 8},
    ),
    "executorch": Target(
        module="laptop.export.to_executorch.target",
        extra="executorch",
        packages=("executorch", "torchao"),
        components=COMPONENTS,
        file="{component}.pte",
        precisions=dict.fromkeys(("fp32", "int8", "coreml-fp16", "coreml-fp32"), 24),
    ),
}
HALF = ("fp16", "coreml-fp16", "palette8", "palette6", "palette4", "mixed")  # computed in fp16
VERIFIED, NOT_RUN = "verified", "converted, not run here"  # in a parity report
BYTES = {
    **{"fp32": 4.0, "fp16": 2.0, "int8": 1.0, CALIBRATED: 1.0},
    **{"coreml-fp32": 4.0, "coreml-fp16": 2.0},
    **{"palette8": 1.0, "palette6": 0.75, "palette4": 0.5, "mixed": 0.75},
}  # of a stored weight, by precision


@dataclass(frozen=True)
class Request:
    """One entry of `--to`."""

    target: str
    precision: str

    @property
    def folder(self) -> str:
        """Its folder among the artifacts: `onnx`, and `onnx-fp16` where that is not the default."""
        is_default = self.precision == next(iter(TARGETS[self.target].precisions))
        return self.target if is_default else f"{self.target}-{self.precision}"

    def precision_of(self, component: str, config: ExportConfig) -> str:
        """The VAE has a precision of its own, in the library that computes the rest."""
        if not component.startswith("vae_"):
            return self.precision
        library = "coreml-" if self.precision.startswith("coreml-") else ""
        return f"{library}{config.vae_precision}"

    def file(self, component: str) -> str:
        """Of a component, relative to the artifacts' folder."""
        return f"{self.folder}/{TARGETS[self.target].file.format(component=component)}"


def requests(config: ExportConfig) -> list[Request]:
    """The targets of `config`; `BadInput` for what is unknown, twice there, or covers nothing."""
    if not config.targets or not config.components:
        raise BadInput(
            f"export needs at least one target and component; got {config.targets}, "
            f"{config.components}."
        )
    found = [_request(text) for text in config.targets]
    if config.resolution is not None and (config.resolution < 8 or config.resolution % 8):
        raise BadInput(
            f"[export] resolution is {config.resolution} pixels; needed is a multiple of 8, for a "
            "latent stands for 8 x 8 of them."
        )
    if config.onnx.clean_up and importlib.util.find_spec("onnxslim") is None:
        raise MissingExtra("clean_up needs onnxslim: pip install 'laptop-diff[onnx]'")
    if len(set(found)) < len(found):
        raise BadInput(f"a target is named twice in {', '.join(config.targets)}.")
    for name in config.components:
        if name not in COMPONENTS:
            raise BadInput(f"unknown component {name!r}; known: {', '.join(COMPONENTS)}.")
    for request in found:
        covered = TARGETS[request.target].components
        if not set(covered) & set(config.components):
            raise BadInput(
                f"target {request.target} covers {', '.join(covered)}, none of which is "
                f"among the components asked for ({', '.join(config.components)})."
            )
        is_known = request.precision_of("vae_decoder", config) in TARGETS[request.target].precisions
        if not is_known and _has_vae(request, config.components):
            raise BadInput(
                f"vae_precision {config.vae_precision!r} is none of {request.target}'s "
                f"({', '.join(TARGETS[request.target].precisions)})."
            )
    return found


def _has_vae(request: Request, components: Sequence[str]) -> bool:
    covered = set(TARGETS[request.target].components) & set(components)
    return any(name.startswith("vae_") for name in covered)


def _request(text: str) -> Request:
    name, _, precision = text.partition(":")
    known = ", ".join(TARGETS)
    if name not in TARGETS:
        near = get_close_matches(name, TARGETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise BadInput(f"unknown target {name!r}; known: {known}.{hint}")
    choices = TARGETS[name].precisions
    if precision and precision not in choices:
        raise BadInput(f"{text}: {name} has no {precision!r}; choose {', '.join(choices)}.")
    need_packages(name)
    return Request(name, precision or next(iter(choices)))


def need_packages(target: str) -> None:
    """Raise `MissingExtra` unless the packages of a target are installed."""
    wanted = TARGETS[target]
    missing = [name for name in wanted.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"target {target} needs {', '.join(missing)}: pip install 'laptop-diff[{wanted.extra}]'"
        )


def module_of(target: str) -> Any:
    """The target's module; importing it may take seconds."""
    return importlib.import_module(TARGETS[target].module)
