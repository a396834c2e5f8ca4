"""What to export and how, as the table `[export]` of a recipe says it."""

from dataclasses import dataclass, field

from laptop.errors import BadInput

COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "vae_encoder", "vae_decoder")
COMPUTE_UNITS = ("all", "cpu_only", "cpu_and_gpu", "cpu_and_ne")
DEPLOYMENT = ("iOS16", "iOS17", "iOS18")  # or macOS 13, 14, 15; older ones have no fp16 inputs


@dataclass(frozen=True)
class OnnxConfig:
    """The table `[export.onnx]`, of the target `ort` too; `BadInput` for what cannot be."""

    shapes: str = "dynamic"  # of batch, picture and tokens; "static": those that were sampled
    clean_up: bool = False  # by onnxslim: half of the nodes; kept where outputs stay as they were
    calibration_prompts: int = 4  # for the ranges of precision "int8-qdq"
    calibration_steps: int | None = None  # of each; None: as [sampling] says, at most 8

    def __post_init__(self) -> None:
        if self.shapes not in ("dynamic", "static"):
            raise BadInput(f"export.onnx.shapes = {self.shapes!r}; choose dynamic, static.")
        steps = self.calibration_steps
        if self.calibration_prompts < 1 or (steps is not None and steps < 1):
            raise BadInput(
                f"export.onnx: {self.calibration_prompts} calibration_prompts of "
                f"{self.calibration_steps} calibration_steps show no range; needed is 1 or more."
            )


@dataclass(frozen=True)
class CoremlConfig:
    """The table `[export.coreml]`; `BadInput` for a word that is not among the choices."""

    compute_units: str = "all"  # what a load on macOS uses; a key of COMPUTE_UNITS
    minimum_deployment_target: str = "iOS17"  # the oldest system that can load it; DEPLOYMENT
    attention: str = "original"  # or "split-einsum": of the U-Net, as the neural engine wants it
    chunk: str = "auto"  # U-Net in two packages: "auto" above 1 GB, "always" or "never"
    mixed_floor_db: float = 35.0  # PSNR that precision "mixed" keeps; 35 is Apple's own floor

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("compute_units", self.compute_units, COMPUTE_UNITS),
            ("minimum_deployment_target", self.minimum_deployment_target, DEPLOYMENT),
            ("attention", self.attention, ("original", "split-einsum")),
            ("chunk", self.chunk, ("auto", "always", "never")),
        ):
            if value not in choices:
                raise BadInput(f"export.coreml.{name} = {value!r}; choose {', '.join(choices)}.")


@dataclass(frozen=True)
class TensorrtConfig:
    """The table `[export.tensorrt]`; `BadInput` for what cannot be.

    Engines with static shapes are smaller and faster.
    """

    batch: tuple[int, ...] = ()  # pictures at once: min, opt, max; (): one, static
    resolution: tuple[int, ...] = ()  # pixels a side: min, opt, max; (): as sampled, static
    optimization_level: int | None = None  # of the builder, 0 to 5; None: TensorRT's own, 3
    workspace_mib: int | None = None  # most scratch memory of a layer; None: what the device has

    def __post_init__(self) -> None:
        for name, given in (("batch", self.batch), ("resolution", self.resolution)):
            if given and (len(given) != 3 or list(given) != sorted(given) or given[0] < 1):
                raise BadInput(
                    f"export.tensorrt.{name} = {list(given)}: needed are three ascending numbers, "
                    "the smallest, the usual and the largest, or none for static shapes."
                )
        if self.optimization_level not in (None, *range(6)):
            raise BadInput(
                f"export.tensorrt.optimization_level = {self.optimization_level}; choose 0 to 5."
            )
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise BadInput(
                f"export.tensorrt.workspace_mib = {self.workspace_mib}; needed is 1 or more."
            )


@dataclass(frozen=True)
class ExportConfig:
    """What to export, and the sampling that gives the example inputs."""

    targets: tuple[str, ...] = ("onnx",)  # TARGET or TARGET:PRECISION, such as "onnx:fp16"
    components: tuple[str, ...] = COMPONENTS  # those that model and target have are exported
    seed: int = 0  # of the noise
    steps: int | None = None  # of sampling; None: as [sampling] says, at most 2
    resolution: int | None = None  # pixels of the sampled pictures; None: as [sampling] says
    vae_precision: str = "fp32"  # whatever the rest has: SDXL's VAE overflows in fp16
    onnx: OnnxConfig = field(default_factory=OnnxConfig)
    coreml: CoremlConfig = field(default_factory=CoremlConfig)
    tensorrt: TensorrtConfig = field(default_factory=TensorrtConfig)
