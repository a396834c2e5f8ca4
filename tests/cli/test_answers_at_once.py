"""What JSON files decide is decided before torch is imported, in a process of its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from laptop.models.locating import EMBEDDED as MODEL
from support.run_folder import write_run

HEAVY = ("torch", "diffusers", "transformers", "sklearn")
CALL = """
import sys
from laptop.cli import main
try:
    main(sys.argv[1:], prog_name="laptop")
except SystemExit as e:
    print([name for name in {heavy} if name in sys.modules], e.code)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is not supported, one that is, and a run."""
    folder = tmp_path_factory.mktemp("answers")
    shutil.copytree(MODEL, folder / "tiny")
    shutil.copytree(MODEL, folder / "flux")
    index = json.loads((MODEL / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    del index["unet"]
    (folder / "flux" / "model_index.json").write_text(json.dumps(index))
    write_run(folder / "run")
    return folder


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("score --model flux -o x", 1),
        ("generate flux red -o x.png", 1),
        ("bench flux -o x.json", 1),
        ("distill --teacher tiny-sdlx --student flux -o x", 1),
        ("compress --model tiny --ratio 2 -o x", 1),
        ("compress --model tiny -o tiny", 1),
        ("export tiny --to onxx -o x", 1),
        ("plan run/score --ratio 0.99 -o x.json", 1),
        ("plan -h", 0),
        ("models", 0),
        ("compare run/bench/local.json run/bench/local.json", 0),
        ("report run", 0),
    ],
)
def test_an_answer_from_json_needs_no_torch(folder: Path, command: str, code: int) -> None:
    call = [sys.executable, "-c", CALL.format(heavy=HEAVY), *command.split()]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"[] {code}", done.stdout + done.stderr
    assert "Traceback" not in done.stderr
