"""Several processes at one job: `accelerate launch --num_processes 2 -m laptop score ...`.

(On CPUs `torchrun --nproc-per-node 2 -m laptop score ...`: accelerate's launcher wants MPI there.)
Without a launcher there is one process, which is the main one. Processes share a file system.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

T = TypeVar("T")


def is_main() -> bool:
    """Whether this process writes results and talks to the user."""
    return os.environ.get("RANK", "0") == "0"  # as torchrun and accelerate's launcher set it


def launcher_precision() -> str | None:
    """The mixed precision that accelerate's launcher was configured with, if it started us."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION")


def _state() -> "PartialState":
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def rank() -> int:
    """The number of this process; 0 is the main one."""
    return int(_state().process_index)


def count() -> int:
    """How many processes work together."""
    return int(_state().num_processes)


def device() -> "torch.device":
    """The GPU of this process, else the CPU."""
    own: torch.device = _state().device
    return own


def own_items(items: Sequence[T]) -> Sequence[T]:
    """Every n-th of `items`, for n processes: the items that this process works on."""
    return items[rank() :: count()]


def own_range(total: int) -> range:
    """The part of 0..`total` - 1 that this process works on: neighbours, equally many for each.

    `total` must be a multiple of the number of processes.
    """
    length, rest = divmod(total, count())
    assert not rest
    return range(rank() * length, (rank() + 1) * length)


def broadcast(value: T) -> T:
    """The main process's `value`, in every process; all must call this."""
    from accelerate.utils import broadcast_object_list

    _state()
    received: T = broadcast_object_list([value])[0]
    return received


def wait_for_all() -> None:
    """Return once every process has called this."""
    _state().wait_for_everyone()
