"""How latency is measured, as the table `[bench]` of a recipe says it."""

from dataclasses import dataclass
from typing import Annotated

from laptop.benchmarks.latency.validity import NEEDED_S, NEEDED_SAMPLES
from laptop.benchmarks.latency.workloads import IMAGE
from laptop.export.settings import COMPONENTS
from laptop.fields import Length, Name, OneOf, Plain, Range, Seconds, Seed, Steps, check_fields

MOST_THREADS = 1024


RUNTIMES = ("pytorch", "onnxruntime", "executorch", "tensorrt", "coreml")


class Runtime:
    """A runtime, or one with a place where it runs, such as "onnxruntime:cuda"."""

    def refusal(self, value: str) -> str | None:
        """How the text must be instead; None where it is right."""
        name, colon, place = value.partition(":")
        if name in RUNTIMES and (place.isidentifier() or not colon):
            return None
        return f"known are {', '.join(RUNTIMES)}, alone or with a place as in onnxruntime:cuda"


@dataclass(frozen=True)
class BenchConfig:
    """How latency is measured."""

    components: Annotated[tuple[Annotated[str, OneOf(*COMPONENTS)], ...], Length(100)] = IMAGE
    # such as "onnxruntime:cuda"; (): all there are, on processors
    runtimes: Annotated[tuple[Annotated[str, Runtime()], ...], Length(100)] = ()
    guidance: bool | None = None  # the U-Net runs on two rows a picture; None: as [sampling] says
    steps: Steps | None = None  # U-Net calls of a whole image; None: as [sampling] says, or 20
    threads: Annotated[int, Range(1, MOST_THREADS)] | None = None  # None: one a core
    rounds: Annotated[int, Range(1, 100_000)] = 10  # turns of each model
    # at least, a component, over all rounds
    iterations: Annotated[int, Range(0, 10_000_000)] = NEEDED_SAMPLES
    seconds: Seconds = NEEDED_S  # at least, a component, over all rounds
    warmup_iterations: Annotated[int, Range(0, 1_000_000)] = 3  # at least
    warmup_s: Seconds = 2.0  # at least
    cv_bound: Annotated[float, Range(0, 100)] = 0.10  # largest stdev / mean of a valid row
    sustained_s: Seconds = 0  # more than 0: one model after the other, so long, by the minute
    cool_down_s: Seconds = 300  # at most, to wait for a device that is hot
    python: Name = "python3"  # on a board: one that can import the runtime
    # Apple's, that signs what measures on an iPhone
    team: Annotated[str, Plain(empty=True)] = ""
    devices: Annotated[tuple[Name, ...], Length(100)] = ("local",)  # of `laptop compress`
    seed: Seed = 0  # of the inputs and of the bootstrap

    def __post_init__(self) -> None:
        check_fields(self, "bench")
