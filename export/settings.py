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
    """The table `[export.tensorrt]`."""


@dataclass(frozen=True)
class ExecutorchConfig:
    """The table `[export.executorch]`."""

    backend: str = "xnnpack"  # that computes on the device: xnnpack (CPU) or coreml (Apple)


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
