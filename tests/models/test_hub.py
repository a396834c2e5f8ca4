"""A model by its Hub id: taken from the Hub's local cache, whole job, without network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from laptop.models import loading, locating
from laptop.tiny import architecture

HUB_ID = "some-owner/some-model"
IN_TURN = """
import json, sys
from laptop.cli import main
for args in json.loads(sys.argv[1]):
    main(args, standalone_mode=False)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A Hub cache, as its client keeps it, with one model of the fp16 variant in shards."""
    home = tmp_path_factory.mktemp("hf")
    model = home / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    snapshot = model / "snapshots" / ("a" * 40)
    pipe = architecture.pipeline(0).to(torch.float16)
    pipe.save_pretrained(snapshot, variant="fp16", max_shard_size="1MB")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("a" * 40)
    return home


def test_a_hub_id_is_scored_planned_and_pruned_from_the_cache(hub, tmp_path) -> None:
    assert len(list(hub.rglob("unet/*fp16*-of-*"))) + len(list(hub.rglob("unet/*-of-*fp16*"))) > 1
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        "[score]\nsamples = 2\nsteps = 2\ngranularity = 'coarse'\n[prompts]\ncalibration = 1\n"
    )
    commands = [
        ["score", "--model", HUB_ID, "-c", recipe, "-o", tmp_path / "scores"],
        ["plan", tmp_path / "scores", "--ratio", "0.4", "-o", tmp_path / "plan.json"],
        ["prune", "--model", HUB_ID, "--plan", tmp_path / "plan.json", "-o", tmp_path / "pruned"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, json.dumps(commands, default=str)],
        env={**os.environ, "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["model"] == HUB_ID
    pruned = str(tmp_path / "pruned")
    assert locating.variant(pruned) == "fp16"
    assert loading.load_unet(pruned).num_parameters() == plan["params"]["after"]
    manifest = json.loads((tmp_path / "scores" / "manifest.json").read_text())
    assert f"{HUB_ID}@{'a' * 40}" in json.dumps(manifest["config"]), "the commit is recorded"
