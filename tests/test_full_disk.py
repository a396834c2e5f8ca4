"""A stage whose disk is full: one message, and what was done is kept."""

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from laptop import machine, run
from laptop.errors import NoSpace
from support.stage import Config, Work


def test_a_disk_that_fills_up_is_one_message_and_keeps_what_was_done(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(NoSpace, match="Free some space and run the same command again"):
        run.run_stage("toy", tmp_path / "out", Config(), {}, Work(dies=full))
    again = Work()
    run.run_stage("toy", tmp_path / "out", Config(), {}, again)
    assert again.leftovers == ["half.txt"]


def test_a_disk_that_is_full_for_the_manifest_is_the_same_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", path)

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_json", full)
        with pytest.raises(NoSpace, match="Free some space"):
            run.run_stage("toy", tmp_path / "out", Config(), {}, Work())
    assert run.run_stage("toy", tmp_path / "out", Config(), {}, Work()).is_dir()


def test_weights_that_do_not_fit_on_the_disk_are_the_same_message(tmp_path: Path) -> None:
    """safetensors does not raise OSError when the disk is full."""
    from safetensors import SafetensorError

    full = SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )
    with pytest.raises(NoSpace, match="Free some space"):
        run.run_stage("toy", tmp_path / "out", Config(), {}, Work(dies=full))


def test_other_errors_of_the_system_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError):
        run.run_stage("toy", tmp_path / "out", Config(), {}, Work(dies=PermissionError()))


def test_too_little_space_is_told_with_both_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_500_000_000))
    machine.need_space(tmp_path / "not" / "yet" / "there", 1_400_000_000)
    with pytest.raises(NoSpace, match=r"1\.50 GB free; about 2\.00 GB are needed"):
        machine.need_space(tmp_path / "not" / "yet" / "there", 2_000_000_000)
