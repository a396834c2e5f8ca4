"""The targets by name, and how a request such as "coreml:palette6" is read.

A target is a folder `to_NAME/` whose `target.py` holds the functions of `job.TargetModule`, and a
row in `TARGETS`.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from laptop.errors import BadInput, MissingExtra
from laptop.export.settings import COMPONENTS, ExportConfig

CALIBRATED = "int8-qdq"  # the precision that needs the ranges of activations
VERIFIED, NOT_RUN = "verified", "converted, not run here"  # in a parity report


@dataclass(frozen=True)
class Precision:
    """The form of stored weights, and how near its outputs must be to PyTorch's."""

    weight_bytes: float
    floor_db: float  # least PSNR of an artifact's outputs
    picture_floor_db: float | None = None  # likewise after all steps; None: it is shown only
    is_half: bool = False  # computed in half precision


PRECISIONS = {
    "fp32": Precision(4, 60, 40),
    "fp16": Precision(2, 40, 25, is_half=True),
    "int8": Precision(1, 30),
    CALIBRATED: Precision(1, 30),
    "coreml-fp32": Precision(4, 60),
    "coreml-fp16": Precision(2, 40, is_half=True),
    "palette8": Precision(1, 30, is_half=True),
    "palette6": Precision(0.75, 30, is_half=True),
    "palette4": Precision(0.5, 20, is_half=True),
    "mixed": Precision(0.75, 30, is_half=True),
}


@dataclass(frozen=True)
class Target:
    """One kind of artifact: what it covers, in which files and precisions, and who runs it."""

    module: str
    extra: str  # of pip install 'laptop-diff[extra]'
    packages: tuple[str, ...]  # what the extra must have brought
    file: str  # of a component, in the target's folder
    # the first one is the default; with the memory of the process that exports, in bytes a weight
    precisions: Mapping[str, float]  # (measured: docs/explanation/log.md)
    runtime: str | None = None  # that `laptop bench` times it in; None: it is not timed
    components: tuple[str, ...] = COMPONENTS  # what the target covers


TARGETS = {
    "onnx": Target(
        module="laptop.export.to_onnx.target",
        extra="onnx",
        packages=("onnx", "onnxruntime"),
        file="{component}/model.onnx",
        precisions={"fp32": 6, "fp16": 6, "int8": 6, CALIBRATED: 14},
        runtime="onnxruntime",
    ),
    "ort": Target(
        module="laptop.export.to_onnx.ort",
        extra="onnx",
        packages=("onnx", "onnxruntime"),
        file="{component}.ort",
        precisions={"fp32": 14, "int8": 14, CALIBRATED: 14},
        runtime="onnxruntime",
    ),
    "coreml": Target(
        module="laptop.export.to_coreml.target",
        extra="coreml",
        packages=("coremltools",),
        file="{component}.mlpackage",
        precisions=dict.fromkeys(("fp16", "fp32", "palette8", "palette6", "palette4", "mixed"), 14),
        runtime="coreml",
    ),
    "tensorrt": Target(
        module="laptop.export.to_tensorrt.target",
        extra="tensorrt",
        packages=("onnx", "onnxruntime"),
        file="{component}/model.onnx",
        precisions={"fp16": 8, "fp32": 8},
        runtime="tensorrt",
    ),
    "executorch": Target(
        module="laptop.export.to_executorch.target",
        extra="executorch",
        packages=("executorch", "torchao"),
        file="{component}.pte",
        precisions=dict.fromkeys(("fp32", "int8", "coreml-fp16", "coreml-fp32"), 24),
        runtime="executorch",
    ),
}


@dataclass(frozen=True)
class Request:
    """One entry of `--to`."""

    target: str
    precision: str

    @property
    def folder(self) -> str:
        """The target's folder: `onnx`, or `onnx-fp16` where that is not the default precision."""
        is_default = self.precision == next(iter(TARGETS[self.target].precisions))
        return self.target if is_default else f"{self.target}-{self.precision}"

    def precision_of(self, component: str, config: ExportConfig) -> str:
        """A component's precision: the VAE has its own, in the library that computes the rest."""
        if not component.startswith("vae_"):
            return self.precision
        library = "coreml-" if self.precision.startswith("coreml-") else ""
        return f"{library}{config.vae_precision}"

    def file(self, component: str) -> str:
        """The file of a component, relative to the artifacts' folder."""
        return f"{self.folder}/{TARGETS[self.target].file.format(component=component)}"


def requests(config: ExportConfig) -> list[Request]:
    """The targets of `config`; `BadInput` for one that is unknown or given twice, or for none."""
    if not config.targets or not config.components:
        raise BadInput(
            f"export needs at least one target and component; got {config.targets}, "
            f"{config.components}."
        )
    wanted = [_request(text) for text in config.targets]
    if config.resolution is not None and (config.resolution < 8 or config.resolution % 8):
        raise BadInput(
            f"[export] resolution is {config.resolution} pixels; needed is a multiple of 8, for a "
            "latent stands for 8 x 8 of them."
        )
    if config.onnx.clean_up and importlib.util.find_spec("onnxslim") is None:
        raise MissingExtra("clean_up needs onnxslim: pip install 'laptop-diff[onnx]'")
    if len(set(wanted)) < len(wanted):
        raise BadInput(f"a target is named twice in {', '.join(config.targets)}.")
    for name in config.components:
        if name not in COMPONENTS:
            raise BadInput(f"unknown component {name!r}; known: {', '.join(COMPONENTS)}.")
    for request in wanted:
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
    return wanted


def _has_vae(request: Request, components: Sequence[str]) -> bool:
    covered = set(TARGETS[request.target].components) & set(components)
    return any(name.startswith("vae_") for name in covered)


def _request(text: str) -> Request:
    name, _, precision = text.partition(":")
    if name not in TARGETS:
        near = get_close_matches(name, TARGETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise BadInput(f"unknown target {name!r}; known: {', '.join(TARGETS)}.{hint}")
    choices = TARGETS[name].precisions
    if precision and precision not in choices:
        raise BadInput(f"{text}: {name} has no {precision!r}; choose {', '.join(choices)}.")
    need_packages(name)
    return Request(name, precision or next(iter(choices)))


def need_packages(target: str) -> None:
    """Raise `MissingExtra` unless the packages of a target are installed."""
    needed = TARGETS[target]
    missing = [name for name in needed.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"target {target} needs {', '.join(missing)}: pip install 'laptop-diff[{needed.extra}]'"
        )
