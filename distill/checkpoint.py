"""Checkpoints that survive a kill: renamed when whole, and only then is the old one removed.

torch's distributed checkpoint writes them, each process its own part, so that one process can
continue from a checkpoint of two processes (or of FSDP's shards), and two from that of one.
"""

import contextlib
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from laptop.distill.checkpoint_metadata import Planner, Reader
from laptop.distill.divergence import RunningLoss
from laptop.errors import BadInput
from laptop.fields import Range
from laptop.files import open_file
from laptop.processes import is_main, wait_for_all
from laptop.records import Record

STATE = "state.json"
Tensors = dict[str, Any]  # nested, as torch's distributed checkpoint takes them
# What torch raises for files that are missing, cut off or of another content.
DAMAGE = (
    FileNotFoundError, EOFError, pickle.UnpicklingError, KeyError, ValueError, AssertionError,
    RuntimeError, AttributeError, TypeError, IndexError, IsADirectoryError, BadInput,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainingState(Record):
    """The state.json of a checkpoint: everything besides tensors."""

    SCHEMA = "laptop.checkpoint/1"

    done: Annotated[int, Range(0)]  # steps
    watch: RunningLoss  # to see when training diverges
    scaler: Mapping[str, object] | None = None  # the state of fp16's loss scaling
    seconds: Annotated[float, Range(0)]  # of training


def latest(folder: Path) -> Path | None:
    """The last whole checkpoint in `folder`."""
    return max(folder.glob("step-*[0-9]"), default=None)


def step_of(path: Path) -> int:
    """The number of steps after which a checkpoint was written."""
    return int(path.name.removeprefix("step-"))


def save(folder: Path, tensors: Tensors, state: TrainingState) -> None:
    """Write `folder`/step-N and remove older checkpoints; all processes must call this."""
    temporary, path = folder / "step.tmp", folder / f"step-{state.done:09}"
    if is_main():
        shutil.rmtree(temporary, ignore_errors=True)
    wait_for_all()
    with _clean_errors():
        state_dict_saver.save(tensors, checkpoint_id=temporary, no_dist=not dist.is_initialized())
    if is_main():
        state.write(temporary / STATE)
        temporary.rename(path)
        for old in set(folder.glob("step-*[0-9]")) - {path}:
            shutil.rmtree(old)
    wait_for_all()


def load_(path: Path, tensors: Tensors) -> TrainingState:
    """Fill `tensors` in place from a checkpoint, and return its state.

    Raises `BadInput` for a checkpoint that was damaged.
    """
    for file in path.iterdir():
        open_file(file).close()  # refuses a fifo, for which torch would wait
    try:
        reader = Reader(path)
        reader.read_metadata()  # torch would print the traceback of what this raises
        with _clean_errors():
            state_dict_loader.load(
                tensors,
                checkpoint_id=path,
                storage_reader=reader,
                planner=Planner(),
                no_dist=not dist.is_initialized(),
            )
        return TrainingState.read(path / STATE)
    except torch.OutOfMemoryError:
        raise  # a RuntimeError, but the checkpoint is as it was
    except DAMAGE as e:
        raise BadInput(
            f"the checkpoint {path} is damaged ({type(e).__name__}). Pass --overwrite to train "
            "from the beginning."
        ) from None


@contextlib.contextmanager
def _clean_errors() -> Iterator[None]:
    """Raise torch's failures as what they are, such as OSError of a full disk.

    torch wraps them in a BaseException. Its warning about a single process is silenced.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as e:
        raise next(iter(e.failures.values()))[0] from None
