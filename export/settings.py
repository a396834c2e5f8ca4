"""Settings of `export` and `verify`, as a recipe has them in `[export]` and `[verify]`."""

from dataclasses import dataclass, field
from typing import Annotated

from laptop.errors import BadInput
from laptop.fields import Length, Name, OneOf, Pixels, Range, Samples, Seed, Steps, check_fields

COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "vae_encoder", "vae_decoder")
COMPUTE_UNITS = ("all", "cpu_only", "cpu_and_gpu", "cpu_and_ne")
DEPLOYMENT = ("iOS16", "iOS17", "iOS18")  # or macOS 13, 14, 15; older ones have no fp16 inputs


@dataclass(frozen=True)
class OnnxConfig:
    """The table `[export.onnx]`, of the target `ort` too; `BadInput` for what cannot be."""

    # sizes of batch and picture in the graph; static: those of the sampling
    shapes: Annotated[str, OneOf("dynamic", "static")] = "dynamic"
    clean_up: bool = False  # halve the nodes by onnxslim; kept only where outputs stay the same
    calibration_prompts: Samples = 4  # prompts whose sampling gives the ranges of int8-qdq
    # denoising steps of that sampling; None: as [sampling] says, at most 8
    calibration_steps: Steps | None = None

    def __post_init__(self) -> None:
        check_fields(self, "export.onnx")


@dataclass(frozen=True)
class CoremlConfig:
    """The table `[export.coreml]`; `BadInput` for a word that is not among the choices."""

    compute_units: Annotated[str, OneOf(*COMPUTE_UNITS)] = "all"  # units that a load on macOS uses
    # the oldest system that can load the packages
    minimum_deployment_target: Annotated[str, OneOf(*DEPLOYMENT)] = "iOS17"
    # form of the U-Net's attention; split-einsum: the one for the neural engine
    attention: Annotated[str, OneOf("original", "split-einsum")] = "original"
    # cut the U-Net into two packages; auto: above 1 GB
    chunk: Annotated[str, OneOf("auto", "always", "never")] = "auto"
    # PSNR in dB that precision mixed keeps; 35 is Apple's own floor
    mixed_floor_db: Annotated[float, Range(0, 200)] = 35.0

    def __post_init__(self) -> None:
        check_fields(self, "export.coreml")


@dataclass(frozen=True)
class TensorrtConfig:
    """The table `[export.tensorrt]`; `BadInput` for what cannot be.

    Engines with static shapes are smaller and faster.
    """

    # pictures at once: smallest, usual, largest; empty: one, static
    batch: Annotated[tuple[Annotated[int, Range(1, 4096)], ...], Length(3)] = ()
    # pixels a side: smallest, usual, largest; empty: as sampled, static
    resolution: Annotated[tuple[Pixels, ...], Length(3)] = ()
    # level of TensorRT's builder; None: its own default, 3
    optimization_level: Annotated[int, Range(0, 5)] | None = None
    # MiB of scratch memory of a layer, at most; None: what the device has
    workspace_mib: Annotated[int, Range(1, 1 << 30)] | None = None

    def __post_init__(self) -> None:
        check_fields(self, "export.tensorrt")
        for name, sizes in (("batch", self.batch), ("resolution", self.resolution)):
            if sizes and (len(sizes) != 3 or list(sizes) != sorted(sizes)):
                raise BadInput(
                    f"[export.tensorrt] {name} is {list(sizes)}: needed are three ascending "
                    "numbers, the smallest, the usual and the largest, or none for static shapes."
                )


@dataclass(frozen=True)
class ExportConfig:
    """The formats and components to export, and the sampling that gives the example inputs."""

    # formats to export, as TARGET or TARGET:PRECISION, such as "onnx:fp16"
    targets: Annotated[tuple[Name, ...], Length(100)] = ("onnx",)
    # networks to export; those that the model or the target lacks are left out
    components: Annotated[tuple[Annotated[str, OneOf(*COMPONENTS)], ...], Length(100)] = COMPONENTS
    seed: Seed = 0  # seed of the sampling's noise
    # denoising steps of the sampling that gives example inputs; None: as [sampling] says, at most 2
    steps: Steps | None = None
    resolution: Pixels | None = None  # pixels a side of its pictures; None: as [sampling] says
    vae_precision: Name = "fp32"  # precision of the VAE in every target: SDXL's overflows in fp16
    onnx: OnnxConfig = field(default_factory=OnnxConfig)
    coreml: CoremlConfig = field(default_factory=CoremlConfig)
    tensorrt: TensorrtConfig = field(default_factory=TensorrtConfig)

    def __post_init__(self) -> None:
        check_fields(self, "export")


@dataclass(frozen=True)
class VerifyConfig:
    """The sampling that gives the inputs, and what counts as equal."""

    seed: Seed = 0  # seed of the sampling's noise
    # denoising steps of the sampling that gives inputs; None: as [sampling] says, at most 8
    steps: Steps | None = None
    prompts: Samples = 2  # prompts that are sampled
    # least PSNR in dB; None: by precision, from 20 for 4 bits to 60 for fp32
    floor_db: Annotated[float, Range(-200, 200)] | None = None
    pictures: bool = True  # also draw whole pictures with the artifacts

    def __post_init__(self) -> None:
        check_fields(self, "verify")
