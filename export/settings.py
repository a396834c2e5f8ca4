"""What to export and how, as the table `[export]` of a recipe says it."""

from dataclasses import dataclass, field

COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "vae_encoder", "vae_decoder")


@dataclass(frozen=True)
class OnnxConfig:
    """The table `[export.onnx]`."""


@dataclass(frozen=True)
class CoremlConfig:
    """The table `[export.coreml]`."""


@dataclass(frozen=True)
class TensorrtConfig:
    """The table `[export.tensorrt]`. Engines with static shapes are smaller and faster."""

    batch: tuple[int, ...] = ()  # pictures at once: min, opt, max; (): one, static
    resolution: tuple[int, ...] = ()  # pixels a side: min, opt, max; (): as sampled, static
    optimization_level: int | None = None  # of the builder, 0 to 5; None: TensorRT's own, 3
    workspace_mib: int | None = None  # most scratch memory of a layer; None: what the device has


@dataclass(frozen=True)
class ExecutorchConfig:
    """The table `[export.executorch]`."""


@dataclass(frozen=True)
class ExportConfig:
    """What to export, and the sampling that gives the example inputs."""

    targets: tuple[str, ...] = ("onnx",)  # TARGET or TARGET:PRECISION, such as "onnx:fp16"
    components: tuple[str, ...] = COMPONENTS  # those that model and target have are exported
    seed: int = 0  # of the noise
    steps: int = 2  # sampling steps, so as many inputs of the U-Net
    resolution: int | None = None  # pixels of the sampled pictures; None: the model's own
    vae_precision: str = "fp32"  # whatever the rest has: SDXL's VAE overflows in fp16
    onnx: OnnxConfig = field(default_factory=OnnxConfig)
    coreml: CoremlConfig = field(default_factory=CoremlConfig)
    tensorrt: TensorrtConfig = field(default_factory=TensorrtConfig)
    executorch: ExecutorchConfig = field(default_factory=ExecutorchConfig)
