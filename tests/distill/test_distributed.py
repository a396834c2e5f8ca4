"""Several processes distill as one does, with whole students (DDP) or sharded ones (FSDP 2)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import TRAINING_SCRIPT, logged
from laptop.distill.settings import DistillConfig, TrainConfig
from laptop.distill.trainer import distill

CONFIG = {"steps": 6, "batch_size": 8, "warmup_steps": 2, "learning_rate": 1e-4}


def launch(pair, cache: Path, out: Path, processes: int, *more: str) -> int:
    """Train eight samples a step by `processes` of torchrun; its exit code."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += [TRAINING_SCRIPT, *pair, str(cache), str(out), json.dumps(CONFIG)]
    every = 0 if "fsdp" in more else 200  # accelerate would say that it shards
    settings = json.dumps({"checkpoint_every": 2, "log_every": 1, "shares_every": every})
    done = subprocess.run([*command, settings, *more], capture_output=True, text=True, check=False)
    assert "stop" in more or done.returncode == 0, done.stderr
    return done.returncode


@pytest.fixture(scope="module")
def alone(pair, pair_cache, tmp_path_factory) -> Path:
    """The training of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    train_config = TrainConfig(checkpoint_every=2, log_every=1)
    return distill(*pair, pair_cache, out, DistillConfig(**CONFIG), train_config)


def assert_same_training(a: Path, b: Path) -> None:
    """The first loss to 1e-6, later ones to 1e-3: Adam magnifies another order of summation."""
    one, two = logged(a), logged(b)
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(6))
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    for x, y in zip(one, two, strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-3), x["step"]


@pytest.mark.parametrize(
    "sharding",
    [pytest.param((), id="ddp"), pytest.param(("fsdp",), id="fsdp", marks=pytest.mark.long)],
)
def test_two_processes_train_as_one_with_the_whole_batch(
    pair, pair_cache, tmp_path, alone, sharding
) -> None:
    launch(pair, pair_cache, tmp_path / "two", 2, *sharding)
    assert_same_training(alone, tmp_path / "two")


@pytest.mark.long
@pytest.mark.parametrize(("first", "then", "sharding"), [(2, 1, ("fsdp",)), (1, 2, ())])
def test_what_some_processes_began_others_finish(
    pair, pair_cache, tmp_path, alone, first, then, sharding
) -> None:
    """From two that share the student's weights out to one, and from one to two."""
    out = tmp_path / "out"
    assert launch(pair, pair_cache, out, first, "stop", *(sharding if first == 2 else ())) != 0
    assert not out.exists()
    launch(pair, pair_cache, out, then, *(sharding if then == 2 else ()))
    assert_same_training(alone, out)
