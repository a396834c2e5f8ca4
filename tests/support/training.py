"""A distillation in a process of its own, for tests that kill it or start several of it.

python tests/support/training.py TEACHER STUDENT CACHE OUT '{"steps": 6}' \
    '{"log_every": 2}' [fsdp] [stop]

With `stop` it ends before step 4.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard

from laptop.distill.log_lines import LogLine
from laptop.distill.session import Session
from laptop.distill.settings import DistillConfig, TrainConfig
from laptop.distill.trainer import distill


def _sharded(_self: Any, model: Any, optimizer: Any) -> tuple[Any, Any]:
    """What accelerate's `prepare` does with FSDP 2, which it has for GPUs only."""
    fully_shard(model)
    settings = {name: optimizer.defaults[name] for name in ("lr", "betas", "fused")}
    sharded = torch.optim.AdamW(model.parameters(), **settings)
    sharded.optimizer = sharded
    return model, sharded


def _stopping(self: Session, number: int) -> LogLine:
    """`Session.step` that goes no further than step 3."""
    if number == 4:
        sys.exit(3)
    return step(self, number)


step = Session.step

if __name__ == "__main__":
    torch.set_num_threads(1)
    if "fsdp" in sys.argv[7:]:
        Accelerator.prepare = _sharded
    if "stop" in sys.argv[7:]:
        Session.step = _stopping
    config, train_config = (json.loads(text) for text in sys.argv[5:7])
    teacher, student, data, out = sys.argv[1:5]
    configs = DistillConfig(**config), TrainConfig(**train_config)
    distill(teacher, student, Path(data), Path(out), *configs)
