"""Stand-ins for artifacts that take a known time."""

import time
from collections.abc import Callable

from laptop.benchmarks.devices.computer import Computer
from laptop.benchmarks.devices.device import Workload
from laptop.benchmarks.devices.worker import Loaded
from laptop.benchmarks.settings import BenchConfig
from laptop.hosts.host import Local

QUICK = BenchConfig(rounds=3, iterations=6, seconds=0.3, warmup_s=0.1, cv_bound=10, threads=1)


HERE = Computer(Local())


Order = dict


def load_sleeper(order: Order) -> Loaded:
    """A stand-in that takes as many ms as `source` says."""
    return Loaded(lambda: time.sleep(float(order["source"]) / 1000), 7)


def stand_in(
    label: str, source: object, load: Callable[[Order], Loaded] = load_sleeper
) -> Workload:
    loader = f"{load.__module__}:{load.__name__}"
    return Workload(label, "unet", "stand-in", "x", str(source), {"sample": (2, 4)}, loader=loader)
