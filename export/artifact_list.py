"""The list of artifacts in their folder, artifacts.json, which may come from a stranger."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NotRequired, Self, TypedDict

from laptop.errors import BadInput
from laptop.export.settings import COMPONENTS
from laptop.export.targets import TARGETS
from laptop.fields import Length, Name, OneOf, Pixels, Plain, Range
from laptop.files import inside, plain_name, shown
from laptop.models import mistakes
from laptop.models.shapes import Size
from laptop.pruning.sampling_config import SamplingConfig, of_values
from laptop.records import Record, read_record

LIST = "artifacts.json"
Text = Annotated[str, Plain(empty=True)]
Side = Annotated[int, Range(0, 2**31 - 1)]  # of an input
InputShapes = Mapping[str, tuple[Side, ...]]


@dataclass(frozen=True, kw_only=True)
class Artifact(Record):
    """One component of a model in the format of one target."""

    target: Annotated[str, OneOf(*TARGETS)]
    component: Annotated[str, OneOf(*COMPONENTS)]
    file: Name  # relative to the artifacts' folder
    bytes: Annotated[int, Range(0, 10**18)] | None = None
    sha256: Name | None = None
    precision: Name
    chunks: tuple[Name, ...] = ()  # packages that hold the same in parts, for Core ML
    shapes: InputShapes | None = None  # of the recorded inputs
    params: Annotated[int, Range(0, 10**18)] | None = None  # None for halves of the VAE
    seconds: float | None = None  # of the process that exported it
    peak_memory_bytes: int | None = None  # likewise

    @property
    def folder(self) -> str:
        """The target's folder among the artifacts: `onnx`, or `onnx-fp16`."""
        return self.file.partition("/")[0]


@dataclass(frozen=True, kw_only=True)
class FailedExport(Record):
    """A component that a target could not export, or "all" of them."""

    target: Text
    precision: Text
    component: Text
    error: str


@dataclass(frozen=True, kw_only=True)
class Artifacts(Record):
    """All artifacts of one export, and what could not be exported."""

    SCHEMA = "laptop.artifacts/1"
    REMEDY = "Export again with --overwrite."

    resolution: Pixels | None = None  # a side of the pictures; None: the model's own
    sampling: Mapping[str, object] = field(default_factory=dict)  # as the model states it
    pixels_per_latent: Annotated[int, Range(1, 1024)] | None = None  # a side; None: unknown
    artifacts: tuple[Artifact, ...]
    left_out: tuple[str, ...] = ()  # components that no target exports
    failed: tuple[FailedExport, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Self:
        """The list in `path`, whose files have the names that `laptop export` gives."""
        listed = super().read(path)
        of_values(listed.sampling, str(path))
        for artifact in listed.artifacts:
            _check_names(artifact, path)
        return listed

    @property
    def sampling_config(self) -> SamplingConfig:
        """The stated sampling of the exported model."""
        return of_values(self.sampling, LIST)

    @property
    def picture_size(self) -> Size | None:
        """Height and width in pixels that the export was made for; None: the model's own."""
        if self.resolution:
            return self.resolution, self.resolution
        stated = self.sampling_config
        return (stated.height, stated.width) if stated.height and stated.width else None


def read_list(folder: Path) -> Artifacts:
    """The list of artifacts in their folder; `BadInput` when it or one of them is missing."""
    if not (folder / LIST).is_file():
        raise BadInput(mistakes.refusal(folder, "artifacts"))
    listed = Artifacts.read(folder / LIST)
    for artifact in listed.artifacts:
        if not (folder / artifact.file).exists():
            raise BadInput(
                f"{folder / artifact.file} ({artifact.target} of {artifact.component}) is "
                f"missing, though {LIST} names it. {Artifacts.REMEDY}"
            )
    return listed


def _check_names(artifact: Artifact, path: Path) -> None:
    """Raise `BadInput` unless an artifact's files have the names that `laptop export` gives."""
    where, target = str(path), artifact.target
    file = TARGETS[target].file.format(component=artifact.component)
    if artifact.file.partition("/")[2] != file or artifact.folder.partition("-")[0] != target:
        raise BadInput(
            f"{where} names {shown(artifact.file)} as {target} of {artifact.component}; `laptop "
            f"export` names it {target}/{file}, or {target}-PRECISION/…. {Artifacts.REMEDY}"
        )
    plain_name(artifact.folder, where)
    for name in (artifact.file, *artifact.chunks):
        plain_name(inside(path.parent, name, where).name, where)


class VaeLevels(TypedDict):
    """The part of a VAE's config.json that says how many pixels become one latent."""

    block_out_channels: NotRequired[Annotated[list[int], Length(10)] | None]


def pixels_per_latent(vae: Path) -> int | None:
    """The pixels on the side of one latent, from the folder of a VAE; None without one."""
    config = vae / "config.json"
    levels = read_record(config, VaeLevels).get("block_out_channels") if config.is_file() else None
    return 2 ** (len(levels) - 1) if levels else None
