"""Checkpoints that survive: written beside and renamed, the old one removed once the new stands.

torch's distributed checkpoint writes them, each process its own part, so that one made by two
processes (or by FSDP's shards) can be taken up by one, and the other way round.
"""

import contextlib
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from laptop.distill.checkpoint_metadata import Planner, Reader
from laptop.errors import BadInput
from laptop.fields import Range
from laptop.files import open_file, write_json
from laptop.processes import is_main, wait_for_all
from laptop.records import MayBeInfinite, read_record

STATE, SCHEMA = "state.json", "laptop.checkpoint/1"
# What torch raises for files that are missing, cut off or of another content.
DAMAGE = (
    FileNotFoundError, EOFError, pickle.UnpicklingError, KeyError, ValueError, AssertionError,
    RuntimeError, AttributeError, TypeError, IndexError, IsADirectoryError, BadInput,
)  # fmt: skip


class Progress(TypedDict):
    """The fields of `divergence.Watch`."""

    mean: MayBeInfinite
    least: MayBeInfinite  # infinite before there is one
    seen: Annotated[int, Range(0)]


class State(TypedDict):
    """What a checkpoint holds besides tensors."""

    done: Annotated[int, Range(0)]
    watch: Progress
    scaler: NotRequired[Mapping[str, Any] | None]
    seconds: Annotated[float, Range(0)]


def latest(folder: Path) -> Path | None:
    """The last whole checkpoint in `folder`."""
    return max(folder.glob("step-*[0-9]"), default=None)


def step_of(path: Path) -> int:
    """After how many steps a checkpoint was made."""
    return int(path.name.removeprefix("step-"))


def save(folder: Path, step: int, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write `folder`/step-N; all processes must come here. `state` is what JSON can hold."""
    beside, place = folder / "step.tmp", folder / f"step-{step:09}"
    if is_main():
        shutil.rmtree(beside, ignore_errors=True)
    wait_for_all()
    with _as_expected():
        state_dict_saver.save(
            dict(tensors), checkpoint_id=beside, no_dist=not dist.is_initialized()
        )
    if is_main():
        write_json(beside / STATE, {"schema": SCHEMA, **state})
        beside.rename(place)
        for old in set(folder.glob("step-*[0-9]")) - {place}:
            shutil.rmtree(old)
    wait_for_all()


def load(path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """Fill `tensors` in place from a checkpoint, and return its state.

    Raises `BadInput` for one that was damaged.
    """
    for file in path.iterdir():
        open_file(file).close()  # or it is refused, such as a fifo, at which torch would wait
    try:
        reader = Reader(path)
        reader.read_metadata()  # torch would print the traceback of what this raises
        with _as_expected():
            state_dict_loader.load(
                tensors,
                checkpoint_id=path,
                storage_reader=reader,
                planner=Planner(),
                no_dist=not dist.is_initialized(),
            )
        return {**read_record(path / STATE, State, SCHEMA)}
    except torch.OutOfMemoryError:
        raise  # a RuntimeError, but the checkpoint is as it was
    except DAMAGE as e:
        raise BadInput(
            f"the checkpoint {path} is damaged ({type(e).__name__}). Pass --overwrite to train "
            "from the beginning."
        ) from None


@contextlib.contextmanager
def _as_expected() -> Iterator[None]:
    """Quiet about a single process; a full disk as the OSError that it is.

    torch wraps failures in a BaseException.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as e:
        raise next(iter(e.failures.values()))[0] from None
