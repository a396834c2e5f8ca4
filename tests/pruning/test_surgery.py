"""Removing layers for real: same output as in memory, stock config where that can say it."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from laptop.models import loading, locating
from laptop.models.precision import stored_dtype
from laptop.pruning import surgery
from laptop.pruning.settings import GRANULARITIES
from laptop.pruning.surgery import prune, prune_unet, write_model
from laptop.pruning.units import anatomy_of, forward_rows, removed
from laptop.tiny import architecture
from support.unets import LAST_BLOCKS

RESNETS = ["down_blocks.0.resnets.0", "up_blocks.1.resnets.2", "mid_block.resnets.1"]
INNER_BLOCK = ["up_blocks.1.attentions.1.transformer_blocks.0"]
WHOLE_TRANSFORMER = ["up_blocks.1.attentions.0", "mid_block.attentions.0.transformer_blocks.0"]
SUBLAYERS = [
    "up_blocks.1.attentions.1.transformer_blocks.0.attn1",
    "up_blocks.1.attentions.1.transformer_blocks.1.attn2",
    "down_blocks.1.attentions.0.transformer_blocks.0.ff",
]
SHELL = [
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.0.transformer_blocks.0.attn1",
    "up_blocks.0.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.0.attentions.0.transformer_blocks.0.ff",
]


@pytest.fixture(scope="module")
def rows() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "sample": (3, 4, 8, 8),
        "encoder_hidden_states": (3, 16, 128),
        "text_embeds": (3, 64),
        "time_ids": (3, 6),
    }
    made = {k: torch.randn(s, generator=generator) for k, s in shapes.items()}
    return made | {"timestep": torch.tensor([1.0, 500.0, 999.0])}


@pytest.mark.parametrize(
    ("names", "stock"),
    [
        (RESNETS, False),
        (INNER_BLOCK, False),
        (WHOLE_TRANSFORMER, False),
        (SUBLAYERS, False),
        (SHELL, False),
        (LAST_BLOCKS, True),
        (RESNETS + LAST_BLOCKS, False),
    ],
)
def test_the_pruned_model_computes_what_skipping_the_layers_does(
    tiny_pipe, rows, names, stock
) -> None:
    unet = tiny_pipe.unet.eval()
    with removed(unet, names):
        wanted = forward_rows(unet, rows, 2)
    student = prune_unet(unet, names)
    assert torch.equal(forward_rows(student, rows, 2), wanted)
    assert (type(student) is UNet2DConditionModel) == stock
    by_kind = {kind: anatomy_of(unet, 16, kind).units for kind in reversed(GRANULARITIES)}
    params = {u.name: u.params for units in by_kind.values() for u in units}
    for shell in set(SHELL) & set(names):  # its own are those that the content does not hold
        params |= {u.name: u.params for u in by_kind["sublayer"] if u.name == shell}
    less = sum(params[n] for n in names)
    assert student.num_parameters() == unet.num_parameters() - less
    assert set(student.state_dict()) < set(unet.state_dict()), "names of survivors must not change"


def test_pruning_twice_is_pruning_once(tiny_pipe, rows) -> None:
    unet = tiny_pipe.unet.eval()
    twice = prune_unet(prune_unet(unet, RESNETS), INNER_BLOCK)
    once = prune_unet(unet, RESNETS + INNER_BLOCK)
    assert torch.equal(forward_rows(twice, rows, 3), forward_rows(once, rows, 3))


def _write_plan(path, unet, names) -> None:
    plan = {
        "schema": "laptop.plan/1",
        "remove": names,
        "params": {"before": unet.num_parameters(), "after": 1},
    }
    path.write_text(json.dumps(plan))


@pytest.mark.parametrize("names", [[], LAST_BLOCKS, RESNETS])
def test_the_written_folder_gives_the_same_output(tiny_folder, rows, tmp_path, names) -> None:
    unet = loading.load_unet(str(tiny_folder))
    _write_plan(tmp_path / "plan.json", unet, names)
    out = prune(str(tiny_folder), tmp_path / "plan.json", tmp_path / "pruned")
    with removed(unet, names):
        wanted = forward_rows(unet, rows, 3)
    assert torch.equal(forward_rows(loading.load_unet(str(out)), rows, 3), wanted)
    assert loading.load_pipeline(str(out)).unet.num_parameters() <= unet.num_parameters()
    index = json.loads((out / "model_index.json").read_text())
    shipped = (out / "unet" / "laptop_unet_v1.py").exists()
    assert shipped == (names == RESNETS) == (index["unet"][0] == "laptop_unet_v1")


def test_the_stored_precision_is_kept(tmp_path) -> None:
    half = architecture.pipeline(0).to(torch.float16)
    half.save_pretrained(tmp_path / "half")
    unet = loading.load_unet(str(tmp_path / "half"))
    assert unet.dtype == torch.float32
    _write_plan(tmp_path / "plan.json", unet, RESNETS)
    out = prune(str(tmp_path / "half"), tmp_path / "plan.json", tmp_path / "pruned")
    assert stored_dtype(str(out)) == torch.float16


@pytest.mark.parametrize("wide", ["norm", "conv_in"])
def test_each_tensor_keeps_the_precision_that_it_is_stored_in(tmp_path, wide) -> None:
    """Also where the first tensor of the file has another one than most."""
    pipe = architecture.pipeline(0)
    for name, tensor in pipe.unet.named_parameters():
        tensor.data += 0.1 * torch.randn(tensor.shape)
        tensor.data = tensor.data.to(torch.float32 if wide in name else torch.bfloat16)
    pipe.save_pretrained(tmp_path / "mixed")
    plan = tmp_path / "plan.json"
    _write_plan(plan, pipe.unet, RESNETS)
    out = prune(str(tmp_path / "mixed"), plan, tmp_path / "out")
    before, after = stored_weights(tmp_path / "mixed"), stored_weights(out)
    assert after.keys() < before.keys()
    assert all(value.dtype == before[name].dtype for name, value in after.items())
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def stored_weights(folder: Path) -> dict[str, torch.Tensor]:
    files = (folder / "unet").glob("*.safetensors")
    return {name: value for file in files for name, value in load_file(file).items()}


def test_a_large_model_is_read_and_written_in_shards(tmp_path, tiny_pipe, monkeypatch) -> None:
    tiny_pipe.save_pretrained(tmp_path / "whole", max_shard_size="1MB")
    assert len(list((tmp_path / "whole" / "unet").glob("*-of-*.safetensors"))) > 2
    assert stored_dtype(str(tmp_path / "whole")) == torch.float32
    _write_plan(tmp_path / "plan.json", tiny_pipe.unet, RESNETS)
    monkeypatch.setattr(surgery, "SHARD", "1MB")
    out = prune(str(tmp_path / "whole"), tmp_path / "plan.json", tmp_path / "pruned")
    assert len(list((out / "unet").glob("*-of-*.safetensors"))) > 2
    wanted = prune_unet(tiny_pipe.unet, RESNETS).state_dict()
    for name, value in loading.load_pipeline(str(out)).unet.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_a_folder_of_the_fp16_variant_stays_one(tmp_path) -> None:
    half = architecture.pipeline(0).to(torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    assert locating.variant(str(tmp_path / "half")) == "fp16"
    unet = loading.load_unet(str(tmp_path / "half"))
    _write_plan(tmp_path / "plan.json", unet, RESNETS)
    out = prune(str(tmp_path / "half"), tmp_path / "plan.json", tmp_path / "pruned")
    pipe = DiffusionPipeline.from_pretrained(out, variant="fp16", trust_remote_code=True)
    assert stored_dtype(str(out)) == torch.float16
    assert pipe.unet.num_parameters() < unet.num_parameters()
    wanted = prune_unet(unet, RESNETS).state_dict()
    for name, value in loading.load_unet(str(out)).state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_both_precisions_in_one_folder_are_no_variant(tmp_path) -> None:
    architecture.pipeline(0).to(torch.float16).save_pretrained(tmp_path / "m", variant="fp16")
    architecture.pipeline(0).save_pretrained(tmp_path / "m")
    assert locating.variant(str(tmp_path / "m")) is None
    assert stored_dtype(str(tmp_path / "m")) == torch.float32


def test_pruning_holds_no_second_copy_of_the_weights(tiny_folder) -> None:
    unet = loading.load_unet(str(tiny_folder))
    places = {p.data_ptr() for p in unet.parameters()}
    for names in (RESNETS, LAST_BLOCKS):
        assert {p.data_ptr() for p in prune_unet(unet, names).parameters()} < places


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["mid_block.attentions.0", "mid_block.resnets.1"], "UNetMidBlock2D"),
        (["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"], None),
    ],
)
def test_a_stock_unet_does_without_its_mid_block(tiny_pipe, rows, names, kind) -> None:
    unet = tiny_pipe.unet
    inner = [u.name for u in anatomy_of(unet).units if u.name.startswith(f"{names[-2]}.trans")]
    gone = [*names, *inner]
    student = prune_unet(unet, gone)
    assert type(student) is UNet2DConditionModel
    assert student.config.mid_block_type == kind
    with removed(unet, gone):
        wanted = forward_rows(unet, rows, 3)
    assert torch.equal(forward_rows(student, rows, 3), wanted)
    half = prune_unet(unet, ["mid_block.resnets.0", *inner])
    assert type(half) is not UNet2DConditionModel, "a mid block without its first resnet only"


def test_a_written_model_does_not_say_where_it_was_loaded_from(tiny_folder, tmp_path) -> None:
    unet = prune_unet(loading.load_unet(str(tiny_folder)), ["down_blocks.0.resnets.1"])
    write_model(tmp_path / "pruned", unet, str(tiny_folder))
    assert str(tiny_folder) not in (tmp_path / "pruned" / "unet" / "config.json").read_text()
