"""What to export and how, as the table `[export]` of a recipe says it."""

from dataclasses import dataclass, field
from typing import Annotated

from laptop.errors import BadInput
from laptop.fields import (
    Length,
    Name,
    OneOf,
    Pixels,
    Range,
    Samples,
    Seed,
    Steps,
    check_fields,
)

COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "vae_encoder", "vae_decoder")
COMPUTE_UNITS = ("all", "cpu_only", "cpu_and_gpu", "cpu_and_ne")
DEPLOYMENT = ("iOS16", "iOS17", "iOS18")  # or macOS 13, 14, 15; older ones have no fp16 inputs


@dataclass(frozen=True)
class OnnxConfig:
    """The table `[export.onnx]`, of the target `ort` too; `BadInput` for what cannot be."""

    # of batch, picture and tokens; "static": those that were sampled
    shapes: Annotated[str, OneOf("dynamic", "static")] = "dynamic"
    clean_up: bool = False  # by onnxslim: half of the nodes; kept where outputs stay as they were
    calibration_prompts: Samples = 4  # for the ranges of precision "int8-qdq"
    calibration_steps: Steps | None = None  # of each; None: as [sampling] says, at most 8

    def __post_init__(self) -> None:
        check_fields(self, "export.onnx")


@dataclass(frozen=True)
class CoremlConfig:
    """The table `[export.coreml]`; `BadInput` for a word that is not among the choices."""

    compute_units: Annotated[str, OneOf(*COMPUTE_UNITS)] = "all"  # what a load on macOS uses
    # the oldest system that can load it
    minimum_deployment_target: Annotated[str, OneOf(*DEPLOYMENT)] = "iOS17"
    # or "split-einsum": of the U-Net, as the neural engine wants it
    attention: Annotated[str, OneOf("original", "split-einsum")] = "original"
    # U-Net in two packages: "auto" above 1 GB
    chunk: Annotated[str, OneOf("auto", "always", "never")] = "auto"
    # PSNR that precision "mixed" keeps; 35 is Apple's own floor
    mixed_floor_db: Annotated[float, Range(0, 200)] = 35.0

    def __post_init__(self) -> None:
        check_fields(self, "export.coreml")


@dataclass(frozen=True)
class TensorrtConfig:
    """The table `[export.tensorrt]`; `BadInput` for what cannot be.

    Engines with static shapes are smaller and faster.
    """

    # pictures at once: min, opt, max; (): one, static
    batch: Annotated[tuple[Annotated[int, Range(1, 4096)], ...], Length(3)] = ()
    # a side: min, opt, max; (): as sampled, static
    resolution: Annotated[tuple[Pixels, ...], Length(3)] = ()
    # of the builder; None: TensorRT's own, 3
    optimization_level: Annotated[int, Range(0, 5)] | None = None
    # most scratch memory of a layer; None: what the device has
    workspace_mib: Annotated[int, Range(1, 1 << 30)] | None = None

    def __post_init__(self) -> None:
        check_fields(self, "export.tensorrt")
        for name, given in (("batch", self.batch), ("resolution", self.resolution)):
            if given and (len(given) != 3 or list(given) != sorted(given)):
                raise BadInput(
                    f"[export.tensorrt] {name} is {list(given)}: needed are three ascending "
                    "numbers, the smallest, the usual and the largest, or none for static shapes."
                )


@dataclass(frozen=True)
class ExportConfig:
    """What to export, and the sampling that gives the example inputs."""

    # TARGET or TARGET:PRECISION, such as "onnx:fp16"
    targets: Annotated[tuple[Name, ...], Length(100)] = ("onnx",)
    # those that model and target have are exported
    components: Annotated[tuple[Annotated[str, OneOf(*COMPONENTS)], ...], Length(100)] = COMPONENTS
    seed: Seed = 0  # of the noise
    steps: Steps | None = None  # of sampling; None: as [sampling] says, at most 2
    resolution: Pixels | None = None  # of the sampled pictures; None: as [sampling] says
    vae_precision: Name = "fp32"  # whatever the rest has: SDXL's VAE overflows in fp16
    onnx: OnnxConfig = field(default_factory=OnnxConfig)
    coreml: CoremlConfig = field(default_factory=CoremlConfig)
    tensorrt: TensorrtConfig = field(default_factory=TensorrtConfig)

    def __post_init__(self) -> None:
        check_fields(self, "export")
