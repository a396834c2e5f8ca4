"""What the JSON files of an export hold, as types that `records` checks before a value is used."""

from typing import Annotated, Any, NotRequired, TypedDict

from laptop.export.settings import COMPONENTS
from laptop.export.targets import TARGETS
from laptop.fields import Length, Name, OneOf, Pixels, Plain, Range

Text = Annotated[str, Plain(empty=True)]
Amount = Annotated[float, Range(0, 1e18)]
Side = Annotated[int, Range(0, 2**31 - 1)]  # of an input
Shapes = dict[str, list[Side]]


class ArtifactRow(TypedDict):
    """One artifact in a list."""

    target: Annotated[str, OneOf(*TARGETS)]
    component: Annotated[str, OneOf(*COMPONENTS)]
    file: Name
    precision: Name
    bytes: NotRequired[Amount]
    sha256: NotRequired[Name]
    chunks: NotRequired[list[Name]]
    shapes: NotRequired[Shapes | None]
    params: NotRequired[Annotated[int, Range(0, 10**18)] | None]


class FailedRow(TypedDict):
    """A target that could not be exported."""

    target: Text
    precision: Text
    component: Text
    error: str


class ArtifactList(TypedDict):
    """artifacts.json."""

    artifacts: list[ArtifactRow]
    resolution: NotRequired[Pixels | None]
    sampling: NotRequired[dict[str, Any]]  # checked by `sampling_config`
    pixels_per_latent: NotRequired[Annotated[int, Range(1, 1024)] | None]
    failed: NotRequired[list[FailedRow]]


class VaeConfig(TypedDict):
    """config.json of a VAE, as far as it says how many pixels become one latent."""

    block_out_channels: NotRequired[Annotated[list[int], Length(10)] | None]
    decoder_block_out_channels: NotRequired[Annotated[list[int], Length(10)] | None]


class ExportedFacts(TypedDict):
    """What the process that exported a component took."""

    shapes: Shapes
    params: int | None


class PlannedTensor(TypedDict):
    """An input or output in plan.json of a TensorRT artifact; -1: a side that is dynamic."""

    dtype: Name
    shape: list[Annotated[int, Range(-1, 2**31 - 1)]]


class PlannedBuild(TypedDict):
    """What a TensorRT engine is built from."""

    precision: Name
    inputs: dict[str, PlannedTensor]
    outputs: dict[str, PlannedTensor]
    profile: dict[str, tuple[list[Side], list[Side], list[Side]]]
    optimization_level: NotRequired[Annotated[int, Range(0, 5)] | None]
    workspace_mib: NotRequired[Annotated[int, Range(1, 1 << 30)] | None]


class TensorrtPlan(TypedDict):
    """The plan beside an ONNX file for TensorRT."""

    plan: PlannedBuild
    operators: dict[str, list[str]]


class ParityRow(TypedDict):
    """How near one artifact is."""

    target: Text
    component: Text
    precision: Text
    state: Text
    psnr_db: float | None
    floor_db: float | None
    artifact: NotRequired[Text]
    sha256: NotRequired[Text]
    identical: NotRequired[bool]
    reason: NotRequired[str | None]


class ParityReport(TypedDict):
    """report.json of `laptop verify`."""

    results: list[ParityRow]
