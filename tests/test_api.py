"""The functions of `laptop.api`: their examples run, in order, and importing them is cheap."""

import doctest
import inspect
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from laptop import api, recipe
from laptop.errors import UnknownModel

SHORT = {  # what the examples run with here, in place of the defaults
    "prompts": {"calibration": 2},
    "score": {"samples": 4, "steps": 2},
    "data": {"count": 6},
    "distill": {"steps": 1, "batch_size": 2},
    "bench": {"components": ("unet",), "rounds": 2, "iterations": 2, "seconds": 0, "warmup_s": 0},
    "eval": {"prompts": 2, "steps": 2},
}
FUNCTIONS = [
    *("score", "plan", "prune", "cache", "distill", "export", "verify", "bench", "evaluate"),
    *("generate", "compress"),
]


def test_every_example_runs_in_a_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But that of `compress`, which runs in test_compress."""

    def short(model: str, **tables: dict[str, object]) -> recipe.Recipe:
        return recipe.changed(api.recipe(model, **tables), SHORT, "a test")

    monkeypatch.chdir(tmp_path)
    names = vars(api) | {"recipe": short, "bench": partial(api.bench, check=False)}  # too short
    for name in FUNCTIONS[:-1]:
        (example,) = doctest.DocTestFinder().find(getattr(api, name), name, globs=names)
        assert 1 <= len(example.examples) <= 3, name
        assert doctest.DocTestRunner().run(example).failed == 0, capsys.readouterr().out


def test_settings_have_an_example_that_runs() -> None:
    (example,) = doctest.DocTestFinder().find(api.recipe, "recipe", globs=vars(api).copy())
    assert doctest.DocTestRunner().run(example).failed == 0


def test_the_functions_are_those_of_the_stages_and_document_themselves() -> None:
    for name in FUNCTIONS:
        function = getattr(api, name)
        assert ">>>" in (inspect.getdoc(function) or ""), name
        assert "Any" not in str(inspect.signature(function)), name


def test_a_model_that_cannot_be_used_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom laptop import api, errors\nfor call in ('score', 'export', 'evaluate'):\n"
        "    try:\n        getattr(api, call)('tiny-sdlx', 'out')\n"
        "    except errors.UnknownModel as e:\n        print(e)\nassert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.count("Did you mean 'tiny-sdxl'?") == 3


def test_settings_of_another_model_are_used_for_this_one(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="no-such"):
        api.compress("no-such", tmp_path / "run", api.recipe("tiny-sdxl"))
