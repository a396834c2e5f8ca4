"""Temporary folders of killed processes are removed by the next one, and no others."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from laptop.hosts import scratch


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, for this test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scratch.remove_orphans.cache_clear()
    return tmp_path


def owner(folder: Path, **changes: object) -> None:
    """Change what a folder's mark says."""
    mark = folder / scratch.OWNER
    mark.write_text(json.dumps(json.loads(mark.read_text()) | changes))


KILLED = """
import os, signal, tempfile
from pathlib import Path
from laptop.hosts import scratch
from laptop.export import job

job.IMPORTS[:] = []
scratch.mark(Path(tempfile.mkdtemp(prefix="laptop-")))
job._context()  # the folder of its socket
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_leaves_goes_at_the_next_start(base: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(base)}
    done = subprocess.run([sys.executable, "-c", KILLED], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert sorted(p.name.split("-")[0] for p in base.iterdir()) == ["laptop", "pymp"]
    scratch.remove_orphans()
    assert list(base.iterdir()) == []


def test_folders_of_others_and_of_what_still_runs_stay(base: Path) -> None:
    for name in ("laptop-mine", "laptop-elsewhere", "laptop-broken", "other-dead", "laptop-new"):
        (base / name).mkdir()
        scratch.mark(base / name)
    (base / "pymp-unmarked").mkdir()
    owner(base / "laptop-elsewhere", host="another", pid=2**22 + 1)
    owner(base / "other-dead", pid=2**22 + 1)
    (base / "laptop-broken" / scratch.OWNER).write_text("[]")
    owner(base / "laptop-new", started=1.0)  # the number is another process's by now
    (base / "laptop-link").symlink_to(base / "other-dead")
    before = {p.name for p in base.iterdir()}
    scratch.remove_orphans()
    assert before - {p.name for p in base.iterdir()} == {"laptop-new"}


def test_a_mark_is_written_once(tmp_path: Path) -> None:
    scratch.mark(tmp_path)
    owner(tmp_path, pid=1)
    scratch.mark(tmp_path)
    assert json.loads((tmp_path / scratch.OWNER).read_text())["pid"] == 1
