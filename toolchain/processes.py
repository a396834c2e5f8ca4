"""Several processes at one job: `accelerate launch --num_processes 2 -m laptop score ...`.

(On CPUs `torchrun --nproc-per-node 2 -m laptop score ...`: accelerate's launcher wants MPI there.)
Without a launcher there is one process, which is the main one. Processes share a file system.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def is_main() -> bool:
    """Whether this process writes results and talks to the user."""
    return os.environ.get("RANK", "0") == "0"  # as torchrun and accelerate's launcher set it


def launcher_precision() -> str | None:
    """The mixed precision that accelerate's launcher was configured with, if it started us."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION")


def _state() -> Any:
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def number() -> int:
    """This process's number; 0 is the main one."""
    return int(_state().process_index)


def count() -> int:
    """How many processes there are."""
    return int(_state().num_processes)


def device() -> "torch.device":
    """This process's GPU, else the CPU."""
    found: torch.device = _state().device
    return found


def share(items: Sequence[T]) -> Sequence[T]:
    """Every n-th of `items`, for n processes: those that are this one's to do."""
    return items[number() :: count()]


def local_share(total: int) -> range:
    """This process's neighbouring numbers of 0 to `total` - 1, as many as every process has.

    `total` must be a multiple of the number of processes.
    """
    each, rest = divmod(total, count())
    assert not rest
    return range(number() * each, (number() + 1) * each)


def from_main(value: T) -> T:
    """What the main process passes here; all processes must come here."""
    from accelerate.utils import broadcast_object_list

    _state()
    found: T = broadcast_object_list([value])[0]
    return found


def wait_for_all() -> None:
    """Go on once every process has come here."""
    _state().wait_for_everyone()
