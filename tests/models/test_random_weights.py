"""Random weights: made once, by a name, and good for every stage that a real model is good for."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from laptop.cli import main
from laptop.errors import UnknownModel
from laptop.models import architectures, component_classes, loading, locating, random_weights
from laptop.models.precision import stored_dtype

SMALL = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 24, 24),
    "norm_num_groups": 8,
    "attention_head_dim": (1, 2, 3, 3),
    "cross_attention_dim": 32,
}
TEXT = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


@pytest.fixture
def small(monkeypatch, tmp_path) -> Path:
    """SD 1.5 in small, and a cache of its own."""
    monkeypatch.setitem(architectures.UNETS, "sd15", SMALL)
    monkeypatch.setitem(random_weights.TEXT, "sd15", [TEXT])
    monkeypatch.setattr(random_weights, "VAE_CHANNELS", (32,) * 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_there_are_random_weights_for_every_known_architecture() -> None:
    assert set(architectures.PIPELINES) == set(architectures.UNETS) > set(random_weights.TEXT)
    assert set(architectures.PIPELINES.values()) <= set(component_classes.TASKS)
    with pytest.raises(UnknownModel, match=r"'flux'.*sd15"):
        locating.locate("random:flux")


def test_the_folder_is_made_once_and_the_same_each_time(small, monkeypatch, tmp_path) -> None:
    first = loading.load_unet("random:sd15").state_dict()
    assert stored_dtype("random:sd15") == torch.float16
    monkeypatch.setattr(random_weights, "_pipeline", None)  # cannot be made again
    assert locating.locate("random:sd15").startswith(str(tmp_path))
    monkeypatch.undo()
    monkeypatch.setitem(architectures.UNETS, "sd15", SMALL)
    monkeypatch.setitem(random_weights.TEXT, "sd15", [TEXT])
    monkeypatch.setattr(random_weights, "VAE_CHANNELS", (32,) * 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    for name, value in loading.load_unet("random:sd15").state_dict().items():
        assert torch.equal(value, first[name]), name
    assert torch.get_default_dtype() == torch.float32


def test_a_random_model_is_scored_planned_and_pruned_like_any_other(small) -> None:
    recipe = small / "r.toml"
    recipe.write_text(
        "[score]\nsamples = 2\nsteps = 2\ndtype = 'bfloat16'\n[prompts]\ncalibration = 1\n"
    )
    scores, plan, pruned = small / "scores", small / "plan.json", small / "pruned"
    model = ["--model", "sd15", "--random-weights"]
    for args in (
        ["score", *model, "-c", recipe, "-o", scores],
        ["plan", scores, "--ratio", 0.4, "-o", plan],
        ["prune", *model, "--plan", plan, "-o", pruned],
    ):
        result = CliRunner().invoke(main, [str(a) for a in args])
        assert result.exit_code == 0, result.output
    document = json.loads((scores / "scores.json").read_text())
    assert document["model"] == "random:sd15"
    assert document["dtype"] == "bfloat16"
    student = loading.load_unet(str(pruned))
    assert student.num_parameters() == json.loads(plan.read_text())["params"]["after"]
