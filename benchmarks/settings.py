"""Settings of a recipe's tables [devices], [bench] and [eval]: latency and image quality."""

from dataclasses import dataclass
from typing import Annotated

from laptop.export.settings import COMPONENTS
from laptop.fields import (
    Length,
    Name,
    OneOf,
    Plain,
    Range,
    Samples,
    Seconds,
    Seed,
    Steps,
    check_fields,
)

MOST_THREADS = 1024
RUNTIMES = ("pytorch", "onnxruntime", "executorch", "tensorrt", "coreml")
NEEDED_SAMPLES = 20  # with fewer, or in less time, no row is valid; the config cannot change it
NEEDED_S = 10.0
IMAGE = ("text_encoder", "text_encoder_2", "unet", "vae_decoder")  # what an image needs


@dataclass(frozen=True)
class EvalConfig:
    """Settings of the pictures that are drawn to judge image quality."""

    prompts: Samples = 500  # prompts, at most; the first of the list
    steps: Steps | None = None  # denoising steps of a picture; None: as [sampling] says, or 25
    # classifier-free guidance scale; None: as [sampling] says, or the pipeline's
    guidance: Annotated[float, Range(0, 100)] | None = None
    batch: Annotated[int, Range(1, 100_000)] = (
        50  # pictures drawn at once; changes time and memory only
    )
    seed: Seed = 0  # seed of the noise
    images_kept: Annotated[int, Range(0, 1_000_000)] = 8  # pictures of each model kept as PNG

    def __post_init__(self) -> None:
        check_fields(self, "eval")


class Runtime:
    """A runtime, alone or with a processor, such as "onnxruntime:cuda"."""

    def refusal(self, value: str) -> str | None:
        """The form that the text must have; None if it has it."""
        name, colon, processor = value.partition(":")
        if name in RUNTIMES and (processor.isidentifier() or not colon):
            return None
        return f"known are {', '.join(RUNTIMES)}, alone or with a processor: onnxruntime:cuda"


@dataclass(frozen=True)
class DevicesConfig:
    """The devices on which latency is measured, and how they are reached."""

    # where `laptop compress` measures: local, ssh://[user@]host[:port], adb://SERIAL, ios://UDID
    addresses: Annotated[tuple[Name, ...], Length(100)] = ("local",)
    python: Name = "python3"  # Python on a board, which imports the runtime
    # Apple development team that signs the app that measures on an iPhone
    team: Annotated[str, Plain(empty=True)] = ""

    def __post_init__(self) -> None:
        check_fields(self, "devices")


@dataclass(frozen=True)
class BenchConfig:
    """The protocol by which latency is measured."""

    # networks to time
    components: Annotated[tuple[Annotated[str, OneOf(*COMPONENTS)], ...], Length(100)] = IMAGE
    # runtimes to time, such as "onnxruntime:cuda"; empty: all that the device has, on its processor
    runtimes: Annotated[tuple[Annotated[str, Runtime()], ...], Length(100)] = ()
    guidance: bool | None = None  # time the U-Net with two rows a picture; None: as [sampling] says
    steps: Steps | None = None  # U-Net calls of a whole picture; None: as [sampling] says, or 20
    threads: Annotated[int, Range(1, MOST_THREADS)] | None = None  # threads; None: one a core
    rounds: Annotated[int, Range(1, 100_000)] = 10  # turns of each model; below 6 no row is valid
    # inferences of a component over all rounds, at least; below 20 no row is valid
    iterations: Annotated[int, Range(0, 10_000_000)] = NEEDED_SAMPLES
    # seconds of a component over all rounds, at least; below 10 no row is valid
    seconds: Seconds = NEEDED_S
    warmup_iterations: Annotated[int, Range(0, 1_000_000)] = 3  # untimed inferences, at least
    warmup_s: Seconds = 2.0  # seconds of untimed inferences, at least
    # largest standard deviation of a valid row, as a share of its mean
    cv_bound: Annotated[float, Range(0, 100)] = 0.10
    # seconds without a pause for each component, with the median of every minute; 0: rounds instead
    sustained_s: Seconds = 0
    cool_down_s: Seconds = 300  # seconds to wait for a hot device, at most
    seed: Seed = 0  # seed of the inputs, and of the bootstrap that gives intervals

    def __post_init__(self) -> None:
        check_fields(self, "bench")
