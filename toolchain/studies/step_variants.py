"""One step of distillation in several variants, to be compared on the same batch and weights.

| variant | what it does |
| --- | --- |
| `ours` | `Session.step`: EMA, clipping, all logged values; not the gradient norms of each term |
| `floor` | teacher forward, student forward, backward through one squared error; nothing else |
| `plain` | the loop of BK-SDM's public script as it stands |
| `plain-2023` | `plain` with attention by its formula, as in the versions that the script pins |
| `plain-autograd` | `plain` without the line that freezes the teacher: autograd records it |

The script is Nota-NetsPresso/BK-SDM, `src/kd_train_text_to_image.py`. The student runs first, then
the teacher, in half precision where training is mixed. The teacher is called outside `no_grad`; but
as its weights are frozen and its input needs no gradient, autograd records nothing. Hooks keep the
whole outputs of all down and up blocks, residuals too, from one step to the next. The loss is a
plain sum of mean squared errors, each of which waits for its logged number. The optimizer is
torch's AdamW with its defaults, then comes diffusers' EMA with its own. It asks for torch below 2,
so without fused attention. Pictures and captions are encoded within the step: left out here, for
all variants start from latents. Segmind's script (segmind/distill-sd) does not freeze its teacher,
but runs it in `no_grad`.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from laptop.distill.batches import Batch
from laptop.distill.session import Session, accelerator
from laptop.distill.settings import DistillConfig, TrainConfig
from laptop.pruning.noising import Noising
from laptop.pruning.units import ADDED

CONFIG = DistillConfig(learning_rate=1e-5)
Step = Callable[[int], object]
UNets = tuple[UNet2DConditionModel, UNet2DConditionModel]  # teacher and student
BlockOutput = Tensor | tuple[Tensor, object]  # hidden states, of a down block also its residuals


@dataclass(frozen=True)
class Pair:
    """What all variants share: weights, and one batch."""

    teacher: UNet2DConditionModel
    student: UNet2DConditionModel  # float32
    batch: Batch
    train_config: TrainConfig

    def twins(self) -> UNets:
        """Modules for one variant (hooks, gradients) on the shared weights."""
        return _twin(self.teacher), _twin(self.student)


def _twin(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy that shares the weights' memory."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach()) for p in unet.parameters()}
    return copy.deepcopy(unet, memo)


def ours(pair: Pair) -> Step:
    """The trainer's step, with the line that it logs."""
    noising = Noising(DDPMScheduler().config)
    session = Session(*pair.twins(), noising, lambda _step: [pair.batch], CONFIG, pair.train_config)
    return lambda step: json.dumps(session.step(step).as_json())


def floor(pair: Pair) -> Step:
    """Two forwards and a backward, the least that a step can do."""
    teacher, student = _prepared(pair)
    inputs = _Inputs(pair, teacher)

    def step(_number: int) -> None:
        with torch.inference_mode():
            target = teacher(**inputs.halves, return_dict=False)[0].float()
        output = student(**inputs.wholes, return_dict=False)[0]
        (output - target).square().mean().backward()
        student.zero_grad()

    return step


def plain(pair: Pair) -> Step:
    """BK-SDM's loop, see above."""
    return _plain(pair, *_prepared(pair))


def plain_2023(pair: Pair) -> Step:
    """BK-SDM's loop without fused attention."""
    unets = _prepared(pair)
    for unet in unets:
        unet.set_attn_processor(AttnProcessor())
    return _plain(pair, *unets)


def plain_autograd(pair: Pair) -> Step:
    """BK-SDM's loop with a teacher that is not frozen."""
    teacher, student = _prepared(pair)
    return _plain(pair, teacher.requires_grad_(True), student)


VARIANTS: dict[str, Callable[[Pair], Step]] = {
    "ours": ours,
    "floor": floor,
    "plain": plain,
    "plain-2023": plain_2023,
    "plain-autograd": plain_autograd,
}


def _plain(pair: Pair, teacher: UNet2DConditionModel, student: UNet2DConditionModel) -> Step:
    tool, inputs = accelerator(pair.train_config), _Inputs(pair, teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=CONFIG.learning_rate)
    average = EMAModel(student.parameters())
    student, optimizer = tool.prepare(student, optimizer)
    schedule = tool.prepare(get_scheduler("constant", optimizer))
    of_teacher, of_student = _hooked(teacher), _hooked(student)

    def step(_number: int) -> str:
        predicted = student(**inputs.wholes).sample.float()
        task = F.mse_loss(predicted, inputs.target)
        output = F.mse_loss(predicted, teacher(**inputs.halves).sample.float())
        feature = torch.stack(
            [F.mse_loss(_map(of_student[k]), _map(of_teacher[k]).detach()) for k in of_teacher]
        ).sum()
        loss = task + output + feature
        for value in (loss, task, output, feature):
            tool.gather(value.repeat(len(pair.batch.ids))).mean().item()
        tool.backward(loss)
        tool.clip_grad_norm_(student.parameters(), CONFIG.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step(student.parameters())
        return json.dumps([value.item() for value in (loss, task, output, feature)])

    return step


def _prepared(pair: Pair) -> UNets:
    """Twins, the student as accelerate runs it."""
    teacher, student = pair.twins()
    teacher.requires_grad_(False).eval()
    student.train()
    if pair.train_config.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    if pair.train_config.compile:
        teacher.compile_repeated_blocks()
        student.compile_repeated_blocks()
    return teacher, accelerator(pair.train_config).prepare_model(student)


def _hooked(unet: nn.Module) -> dict[str, BlockOutput]:
    """A mapping that every forward fills with the outputs of the down and up blocks."""
    outputs: dict[str, BlockOutput] = {}
    for name, module in unet.named_modules():
        parent, _, number = name.rpartition(".")
        if parent in ("down_blocks", "up_blocks") and number:
            module.register_forward_hook(
                lambda _module, _args, output, name=name: outputs.update({name: output})
            )
    return outputs


def _map(output: BlockOutput) -> Tensor:
    return (output[0] if isinstance(output, tuple) else output).float()


class _Inputs:
    """A batch on the device, in the precision of the student's inputs and of the teacher's."""

    def __init__(self, pair: Pair, teacher: UNet2DConditionModel):
        batch, device = pair.batch, teacher.device
        noised = Noising(DDPMScheduler().config)(batch.latents, batch.noise, batch.level)
        self.target = noised.target.to(device)
        values = batch.conditions | {"sample": noised.sample, "timestep": noised.timestep}
        self.wholes = _grouped({k: v.to(device) for k, v in values.items()})
        halves = {k: v.to(device, teacher.dtype) for k, v in values.items() if k != "timestep"}
        self.halves = _grouped(halves | {"timestep": noised.timestep.to(device)})


def _grouped(inputs: Mapping[str, Tensor]) -> dict[str, object]:
    """The inputs as a U-Net's forward takes them."""
    added = {k: v for k, v in inputs.items() if k in ADDED}
    others = {k: v for k, v in inputs.items() if k not in ADDED}
    return {**others, "added_cond_kwargs": added} if added else {**others}
