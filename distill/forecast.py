"""What a distillation will cost, before it starts: parameters, memory, disk, and hours to go.

The student's activations are counted, not guessed: its forward runs on the meta device, and what
autograd would keep for the backward pass is added up.
"""

from collections import deque
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from laptop.distill.optimizer import BYTES
from laptop.distill.session import HALVES
from laptop.distill.settings import DistillConfig, TrainConfig
from laptop.machine import available_memory_bytes
from laptop.models import loading
from laptop.models.description import context_length
from laptop.processes import count
from laptop.pruning.units import example_inputs

WARM_UP_STEPS = 2  # at the start, which are slower than all others
FIRST_STEPS = 5  # after them, whose median is the first estimate of the speed
RECENT_STEPS = 100  # whose mean corrects it, saves and measurements included
CHECK_EVERY = 10  # steps
FAR_OFF = 1.5  # times what was said

WEIGHT = 4  # bytes: master weights, gradients and averages are float32


@dataclass(frozen=True)
class Forecast:
    """Numbers of one run; memory is that of one process."""

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
        """Of one process; what the teacher's forward needs for a moment is not in it."""
        return self.weights_bytes + self.activations_bytes

    def text(self) -> str:
        """For people."""
        return (
            f"teacher {self.teacher_params:,} parameters, student {self.student_params:,}; "
            f"{self.steps:,} steps, {self.images:,} images, {self.processes} process"
            f"{'es' * (self.processes > 1)}; about {self.memory_bytes / 1e9:.2f} GB each "
            f"({self.weights_bytes / 1e9:.2f} weights and optimizer, "
            f"{self.activations_bytes / 1e9:.2f} activations); "
            f"checkpoints of {self.checkpoint_bytes / 1e9:.2f} GB"
        )

    def speed(self, seconds: float, steps_left: int) -> str:
        """A line about a training that takes `seconds` a step."""
        rate, left = self.images / self.steps / seconds, steps_left * seconds
        to_go = f"{left / 3600:.1f} hours" if left > 5400 else f"{left / 60:.1f} minutes"
        return f"{seconds:.3g} s a step, {rate:.3g} images a second, {to_go} to go"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"memory_bytes": self.memory_bytes}


class Pace:
    """How long a training still takes, from its own steps; corrected when that was far off."""

    def __init__(self, expected: Forecast, steps_left: int, now: float):
        self.expected, self.left, self.last = expected, steps_left, now
        self.warming = WARM_UP_STEPS
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)  # seconds a step
        self.said: float | None = None  # seconds a step, as they were last said

    def after_step(self, now: float) -> str | None:
        """A line to print, if there is something new; `now` in seconds, at the end of each step."""
        taken, self.last, self.left = now - self.last, now, self.left - 1
        if self.warming:  # compiles, allocates, reads for the first time
            self.warming -= 1
            return None
        self.recent.append(taken)
        if len(self.recent) < FIRST_STEPS or not self.left:
            return None
        if self.said is None:
            self.said = median(self.recent)
            return self.expected.speed(self.said, self.left)
        seconds = mean(self.recent)
        is_near = self.said / FAR_OFF < seconds < self.said * FAR_OFF
        if is_near or self.left % CHECK_EVERY:
            return None
        self.said = seconds
        return f"corrected: {self.expected.speed(seconds, self.left)}"


def forecast(teacher: str, student: str, config: DistillConfig, how: TrainConfig) -> Forecast:
    """From both models' configs; no weight is read. FSDP's sharding is not counted in."""
    unets = loading.empty_unet(teacher), loading.empty_unet(student)
    return of_unets(*unets, context_length(teacher), config, how)


def of_unets(
    teacher: Any, student: Any, tokens: int, config: DistillConfig, how: TrainConfig
) -> Forecast:
    """The same for U-Nets on the meta device, with prompts of so many tokens."""
    params_a, params_b = (sum(p.numel() for p in unet.parameters()) for unet in (teacher, student))
    is_half = how.mixed_precision in HALVES
    averages = WEIGHT if config.ema_decay > 0 else 0
    state = WEIGHT + BYTES[how.optimizer] + averages  # what a checkpoint holds of a parameter
    each = state + WEIGHT + (2 if is_half else 0)  # gradients, and autocast's copies
    micro = micro_batch(config, how)
    kept = activation_bytes(student, tokens, how.gradient_checkpointing) * micro
    return Forecast(
        teacher_params=params_a,
        student_params=params_b,
        steps=config.steps,
        images=config.steps * config.batch_size,
        processes=count(),
        weights_bytes=params_a * (2 if is_half else WEIGHT) + params_b * each,
        activations_bytes=kept // (2 if is_half else 1),
        checkpoint_bytes=params_b * state,
    )


def micro_batch(config: DistillConfig, how: TrainConfig) -> int:
    """Samples of one forward of one process."""
    share = config.batch_size // count()
    return min(how.micro_batch or share, share)


def available_bytes() -> int:
    """Free memory of this process's device."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return available_memory_bytes()


def activation_bytes(unet: Any, tokens: int, checkpointing: bool) -> int:
    """What autograd keeps of a forward of one sample at the native size, in float32.

    `unet` is on the meta device.
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
    """What a fused attention keeps for its backward pass: its inputs and its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Shapes only: (B, heads, T, width)."""
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


class _FusedAttention(TorchFunctionMode):
    """On the meta device torch would compute attention by its formula, with all its weights."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])  # type: ignore[no-untyped-call]
        return function(*args, **(kwargs or {}))
