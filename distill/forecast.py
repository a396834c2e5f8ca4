"""Forecast the cost of a distillation before it starts: parameters, memory, disk, and hours to go.

The student's activations are counted, not guessed: its forward runs on the meta device, and the
tensors that autograd would keep for the backward pass are added up.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

from laptop.distill.optimizer import STATE_BYTES
from laptop.distill.session import HALVES
from laptop.distill.settings import DistillConfig, TrainConfig
from laptop.machine import available_memory_bytes
from laptop.models import loading
from laptop.models.description import context_length
from laptop.processes import count
from laptop.pruning.units import example_inputs
from laptop.records import Record

WARM_UP_STEPS = 2  # at the start, which are slower than all others
FIRST_STEPS = 5  # after them, whose median is the first estimate of the speed
RECENT_STEPS = 100  # whose mean corrects it, saves and measurements included
CHECK_EVERY = 10  # steps
FAR_OFF = 1.5  # times the last estimate: it is corrected

WEIGHT = 4  # bytes: master weights, gradients and averages are float32


@dataclass(frozen=True)
class Forecast(Record):
    """The cost of a run; memory is that of one process."""

    teacher_params: int
    student_params: int
    steps: int
    images: int  # of all steps
    processes: int
    weights_bytes: int  # teacher, student, gradients, optimizer, average
    activations_bytes: int  # of the student's, kept for the backward pass
    checkpoint_bytes: int

    @property
    def memory_bytes(self) -> int:
        """The memory of one process, without what the teacher's forward needs for a moment."""
        return self.weights_bytes + self.activations_bytes

    def text(self) -> str:
        """A summary of one line for the terminal."""
        return (
            f"teacher {self.teacher_params:,} parameters, student {self.student_params:,}; "
            f"{self.steps:,} steps, {self.images:,} images, {self.processes} process"
            f"{'es' * (self.processes > 1)}; about {self.memory_bytes / 1e9:.2f} GB each "
            f"({self.weights_bytes / 1e9:.2f} weights and optimizer, "
            f"{self.activations_bytes / 1e9:.2f} activations); "
            f"checkpoints of {self.checkpoint_bytes / 1e9:.2f} GB"
        )

    def speed(self, seconds: float, steps_left: int) -> str:
        """A line for the terminal about a training that takes `seconds` a step."""
        rate, left = self.images / self.steps / seconds, steps_left * seconds
        to_go = f"{left / 3600:.1f} hours" if left > 5400 else f"{left / 60:.1f} minutes"
        return f"{seconds:.3g} s a step, {rate:.3g} images a second, {to_go} to go"

    def as_json(self) -> dict[str, object]:
        """The fields, and the memory in total."""
        return super().as_json() | {"memory_bytes": self.memory_bytes}


class Pace:
    """The time that a training still takes, from its own steps; corrected where it is far off."""

    def __init__(self, forecast: Forecast, steps_left: int, now: float):
        self.forecast, self.left, self.last = forecast, steps_left, now
        self.warming = WARM_UP_STEPS
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)  # seconds a step
        self.printed: float | None = None  # seconds a step, of the last line

    def after_step(self, now: float) -> str | None:
        """A line to print, if the estimate is new; `now` in seconds, at the end of each step."""
        taken, self.last, self.left = now - self.last, now, self.left - 1
        if self.warming:  # compiles, allocates, reads for the first time
            self.warming -= 1
            return None
        self.recent.append(taken)
        if len(self.recent) < FIRST_STEPS or not self.left:
            return None
        if self.printed is None:
            self.printed = median(self.recent)
            return self.forecast.speed(self.printed, self.left)
        seconds = mean(self.recent)
        is_near = self.printed / FAR_OFF < seconds < self.printed * FAR_OFF
        if is_near or self.left % CHECK_EVERY:
            return None
        self.printed = seconds
        return f"corrected: {self.forecast.speed(seconds, self.left)}"


def forecast(
    teacher: str, student: str, config: DistillConfig, train_config: TrainConfig
) -> Forecast:
    """Forecast from both models' configs; no weight is read. FSDP's sharding is not counted in."""
    unets = loading.empty_unet(teacher), loading.empty_unet(student)
    return forecast_unets(*unets, context_length(teacher), config, train_config)


def forecast_unets(
    teacher: UNet2DConditionModel,
    student: UNet2DConditionModel,
    tokens: int,
    config: DistillConfig,
    train_config: TrainConfig,
) -> Forecast:
    """Forecast for U-Nets on the meta device, with prompts of `tokens` tokens."""
    teacher_params, student_params = (
        sum(p.numel() for p in unet.parameters()) for unet in (teacher, student)
    )
    is_half = train_config.mixed_precision in HALVES
    averages = WEIGHT if config.ema_decay > 0 else 0
    # Bytes of one parameter: in a checkpoint, and with gradients and autocast's copies.
    saved = WEIGHT + STATE_BYTES[train_config.optimizer] + averages
    trained = saved + WEIGHT + (2 if is_half else 0)
    sample = activation_bytes(student, tokens, train_config.gradient_checkpointing)
    activations = sample * micro_batch(config, train_config)
    return Forecast(
        teacher_params=teacher_params,
        student_params=student_params,
        steps=config.steps,
        images=config.steps * config.batch_size,
        processes=count(),
        weights_bytes=teacher_params * (2 if is_half else WEIGHT) + student_params * trained,
        activations_bytes=activations // (2 if is_half else 1),
        checkpoint_bytes=student_params * saved,
    )


def micro_batch(config: DistillConfig, train_config: TrainConfig) -> int:
    """The samples of one forward of one process."""
    of_process = config.batch_size // count()
    return min(train_config.micro_batch or of_process, of_process)


def available_bytes() -> int:
    """The free memory of this process's device."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return available_memory_bytes()


def activation_bytes(unet: UNet2DConditionModel, tokens: int, checkpointing: bool) -> int:
    """The bytes that autograd keeps of a forward of one sample at the native size, in float32.

    `unet` must be on the meta device.
    """
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    own = {p.untyped_storage()._cdata for p in unet.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in own:
            kept[storage] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, _FusedAttention():
        unet(**example_inputs(unet.config, tokens))
    return sum(t.untyped_storage().nbytes() for t in kept.values())


class _Attention(torch.autograd.Function):
    """A fused attention on the meta device: keeps inputs and output for its backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return a tensor of the output's shape (B, heads, T, width)."""
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


class _FusedAttention(TorchFunctionMode):
    """Counts attention as fused: on the meta device torch would keep all attention weights."""

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: Sequence[type],
        args: Sequence[Tensor] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if function is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])  # type: ignore[no-untyped-call]
        return function(*args, **(kwargs or {}))
