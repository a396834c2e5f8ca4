"""Healing: exact where a layer maps its channels, never worse, and at home in every model."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from laptop.cli import main
from laptop.errors import BadInput
from laptop.models import loading
from laptop.pruning.calibration import Calibration
from laptop.pruning.expressible import without
from laptop.pruning.heal import Correction, corrected_layers, fit, fold, with_corrections
from laptop.pruning.settings import GRANULARITIES, PruneConfig
from laptop.pruning.surgery import prune, prune_unet
from laptop.pruning.units import anatomy_of, layers
from support.elsewhere import check_elsewhere
from support.unets import LAST_BLOCKS, model, rows_for

BLOCK = "up_blocks.1.attentions.0.transformer_blocks"
IN_PLACE = ["down_blocks.0.resnets.0", f"{BLOCK}.0"]  # nothing beside them to be folded into
FOLDED = ["up_blocks.0.resnets.1", f"{BLOCK}.1"]  # into a conv_shortcut, into a proj_out


def recorded(unet: nn.Module, count: int = 8) -> Calibration:
    """Random rows, with timesteps, and what the U-Net makes of them."""
    torch.manual_seed(1)
    inputs = rows_for(unet, count)
    empty = Calibration(inputs, inputs["sample"], 4)
    return Calibration(inputs, empty.forward(unet), 4)


def some(unet: nn.Module, names: list[str]) -> dict[str, Correction]:
    """Random corrections for the layers `names`."""
    generator = torch.Generator().manual_seed(0)
    empty = without(unet, names, names)
    widths = {name: len(empty.get_submodule(name).scale) for name in names}
    return {
        name: Correction(*(0.3 * torch.randn(2, width, generator=generator, dtype=torch.float64)))
        for name, width in widths.items()
    }


class ChannelMap(nn.Module):
    """In place of a layer: y = a x + b by channel."""

    def __init__(self, a: Tensor, b: Tensor):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        shape = (-1, 1, 1) if x.ndim == 4 else (-1,)
        return x * self.a.view(shape) + self.b.view(shape)


@pytest.mark.parametrize("name", ["up_blocks.0.attentions.1", f"{BLOCK}.0", "mid_block.resnets.1"])
def test_a_layer_that_maps_its_channels_is_healed_exactly(name: str) -> None:
    unet = model("tiny-sdxl")
    width = len(without(unet, [name], [name]).get_submodule(name).scale)
    a, b = 1 + 0.5 * torch.randn(width), torch.randn(width)
    layer = unet.get_submodule(name)
    mapped = ChannelMap(a, b)
    layer.forward = lambda x, *_, **kwargs: (
        (mapped(x),) if kwargs.get("return_dict") is False else mapped(x)
    )
    rows = recorded(unet)
    found, facts = fit(unet, [name], rows)
    torch.testing.assert_close(found[name].scale.float(), a - 1, rtol=1e-3, atol=1e-3)
    assert facts["healed_loss"] < 1e-8 * facts["unhealed_loss"]
    assert rows.loss(prune_unet(unet, [name], found)) < 1e-10


def test_where_nothing_is_lost_nothing_is_corrected() -> None:
    unet, name = model("tiny-sdxl"), "mid_block.resnets.0"
    for part in unet.get_submodule(name).conv2.parameters():
        part.data.zero_()
    rows = recorded(unet)
    found, facts = fit(unet, [name], rows)
    assert facts["unhealed_loss"] == pytest.approx(0, abs=1e-10)  # rounding: smaller batches
    assert facts["healed_loss"] <= facts["unhealed_loss"]
    assert all(c.scale.abs().max() < 1e-4 and c.shift.abs().max() < 1e-4 for c in found.values())


@pytest.mark.parametrize("names", [IN_PLACE, FOLDED, IN_PLACE + FOLDED])
def test_folded_corrections_compute_what_the_stand_ins_do(names: list[str]) -> None:
    unet = model("tiny-sdxl")
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    rows, corrections = recorded(unet), some(unet, names)
    student = prune_unet(unet, names, corrections)
    assert set(student.config.healed) == set(names) & set(IN_PLACE)
    wanted = rows.forward(with_corrections(unet, names, corrections))
    assert not torch.allclose(wanted, rows.forward(prune_unet(unet, names)), atol=1e-3)
    torch.testing.assert_close(rows.forward(student), wanted, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items()), "the teacher"


def test_a_plan_that_a_stock_config_can_express_stays_stock(tiny_pipe) -> None:
    unet, corrections = tiny_pipe.unet.eval(), some(tiny_pipe.unet, LAST_BLOCKS)
    student, rows = prune_unet(unet, LAST_BLOCKS, corrections), recorded(unet)
    assert type(student) is UNet2DConditionModel
    wanted = rows.forward(with_corrections(unet, LAST_BLOCKS, corrections))
    torch.testing.assert_close(rows.forward(student), wanted, rtol=1e-4, atol=1e-4)


def test_neighbours_in_a_transformer_are_corrected_once(tiny_pipe) -> None:
    unet, other = tiny_pipe.unet, "down_blocks.0.resnets.0"
    assert corrected_layers(unet, [other, f"{BLOCK}.0", f"{BLOCK}.1"]) == [other, f"{BLOCK}.1"]
    assert corrected_layers(unet, [f"{BLOCK}.0.attn2", f"{BLOCK}.0.ff"]) == [f"{BLOCK}.0.ff"]
    apart = [f"{BLOCK}.0.attn1", f"{BLOCK}.0.ff", f"{BLOCK}.1.attn2"]
    assert corrected_layers(unet, apart) == apart
    assert corrected_layers(unet, [f"{BLOCK}.0.ff", f"{BLOCK}.1.attn1"]) == [f"{BLOCK}.1.attn1"]
    transformer = BLOCK.rpartition(".")[0]
    assert corrected_layers(unet, [transformer, f"{BLOCK}.0", f"{BLOCK}.1"]) == [transformer]


@pytest.mark.parametrize(
    ("family", "granularity"),
    [("sd1", "sublayer"), ("unconditional", "coarse")],
)
def test_the_joint_loss_falls_on_rows_that_nothing_was_fitted_to(family, granularity) -> None:
    unet = model(family)
    names = [u.name for u in anatomy_of(unet, 5, granularity).units if not u.needs][2::10]
    rows = recorded(unet, 16)
    found, facts = fit(unet, names, rows)
    assert found
    assert facts["healed_loss"] < facts["unhealed_loss"]
    assert facts["folded"] == len(found) - len(fold(unet, names, found)[1])
    student = prune_unet(unet, names, found)
    assert rows.loss(student) < rows.loss(prune_unet(unet, names))


@pytest.mark.parametrize("family", ["tiny-sdxl", "unconditional"])
def test_what_is_healed_survives_another_pruning(family: str) -> None:
    unet, first = model(family), ["down_blocks.1.resnets.1", "down_blocks.1.attentions.0"]
    others = ["mid_block.resnets.1", "down_blocks.0.resnets.1"]
    corrections = some(unet, first)
    rows = recorded(unet)
    once = prune_unet(unet, first, corrections)
    assert set(first).isdisjoint(set().union(*(layers(once, g) for g in GRANULARITIES)))
    twice = prune_unet(once, others, later := some(once, others))
    at_once = with_corrections(unet, first + others, corrections | later)
    assert torch.equal(rows.forward(twice), rows.forward(at_once))


def test_with_a_shell_goes_what_is_healed_inside(tiny_pipe) -> None:
    unet, shell = tiny_pipe.unet, BLOCK.rpartition(".")[0]
    once = prune_unet(unet, [f"{BLOCK}.0"], some(unet, [f"{BLOCK}.0"]))
    twice = prune_unet(once, [shell, f"{BLOCK}.1"])
    assert twice.config.healed == []
    assert not [key for key in twice.state_dict() if key.startswith(shell)]


@pytest.fixture(scope="module")
def healed_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` without two layers, with random corrections left in their place; do not change it."""
    pipe = loading.load_pipeline(str(tiny_folder))
    pipe.register_modules(unet=prune_unet(pipe.unet, IN_PLACE, some(pipe.unet, IN_PLACE)))
    folder = tmp_path_factory.mktemp("models") / "healed"
    pipe.save_pretrained(folder)
    return folder


def test_a_healed_folder_loads_here_and_in_stock_diffusers(healed_folder, tmp_path) -> None:
    unet = loading.load_unet(str(healed_folder))
    assert unet.config.healed == IN_PLACE
    assert all(unet.get_submodule(n).scale.requires_grad for n in IN_PLACE), "distillation trains"
    assert all(unet.get_submodule(n).scale.abs().sum() > 0 for n in IN_PLACE)
    check_elsewhere(healed_folder, tmp_path)


def write_scores(folder: Path, unet: nn.Module, rows: Calibration) -> Path:
    """What `laptop score` leaves, as far as healing reads it."""
    folder.mkdir()
    known = anatomy_of(unet, 16)
    scores = {
        "schema": "laptop.scores/1",
        "model": "tiny",
        "batch_size": 4,
        "units": [asdict(unit) | {"score": 1.0} for unit in known.units],
        "base": {"params": known.params, "macs": known.macs},
    }
    (folder / "scores.json").write_text(json.dumps(scores))
    inputs = {name: value.float() for name, value in rows.rows.items()}
    Calibration(inputs, rows.output).write(folder / "calibration.safetensors")
    return folder


def write_plan(path: Path, unet: nn.Module, names: list[str], **more: object) -> Path:
    params = {"before": unet.num_parameters(), "after": 1}
    path.write_text(
        json.dumps({"schema": "laptop.plan/1", "remove": names, "params": params, **more})
    )
    return path


def test_the_command_heals_and_says_what_it_did(tiny_folder: Path, tmp_path: Path) -> None:
    unet = loading.load_unet(str(tiny_folder))
    rows, names = recorded(unet, 16), IN_PLACE + FOLDED
    scores = write_scores(tmp_path / "scores", unet, rows)
    plan = write_plan(tmp_path / "plan.json", unet, names)
    out = tmp_path / "out"
    base = ["prune", "--model", str(tiny_folder), "--plan", str(plan), "-o", str(out), "--json"]
    done = CliRunner().invoke(main, [*base, "--heal", "affine", "--calibration", str(scores)])
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    manifest = json.loads((out / "manifest.json").read_text())
    assert {k: manifest[k] for k in said if k != "model"} == {
        k: v for k, v in said.items() if k != "model"
    }
    assert said["healed_loss"] < said["unhealed_loss"]
    assert said["corrections"] > 0
    assert {"scores", "calibration"} <= set(manifest["inputs"])
    found, _ = fit(unet, names, rows)
    torch.testing.assert_close(
        rows.forward(loading.load_unet(str(out))),
        rows.forward(prune_unet(unet, names, found)),
    )
    for more, message in [
        (["--heal", "affine"], "needs --calibration SCORES"),
        (["--calibration", str(scores)], "pass --heal affine too"),
    ]:
        refused = CliRunner().invoke(main, [*base, *more])
        assert refused.exit_code != 0
        assert message in refused.stderr


def test_what_does_not_belong_together_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    unet = loading.load_unet(str(tiny_folder))
    rows = recorded(unet)
    plan = write_plan(tmp_path / "plan.json", unet, IN_PLACE)
    affine = PruneConfig(heal="affine")
    for number, (path, changed, message) in enumerate(
        [
            (plan, Calibration(rows.rows, rows.output + 1, 4), "another model: the output"),
            (plan, Calibration({**rows.rows, "sample": torch.zeros(8, 9, 8, 8)}, rows.output, 4),
             "another model: channels"),
            (plan, rows.part(slice(0, 3)), "has 3 rows; healing needs 4"),
        ]
    ):  # fmt: skip
        scores = write_scores(tmp_path / f"scores{number}", unet, changed)
        with pytest.raises(BadInput, match=message):
            prune(str(tiny_folder), path, tmp_path / "out", affine, scores)
    with pytest.raises(BadInput, match=r"heal is 'glue'; known are none, affine"):
        prune(str(tiny_folder), plan, tmp_path / "out", PruneConfig(heal="glue"))


def test_an_unconditional_model_keeps_its_corrections_on_disk(tmp_path: Path) -> None:
    unet = model("unconditional")
    names = ["down_blocks.1.attentions.0", "mid_block.attentions.0", "down_blocks.0.resnets.0"]
    student = prune_unet(unet, names, some(unet, names))
    DDPMPipeline(student, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    again = loading.load_unet(str(tmp_path / "ddpm"))
    rows = recorded(unet)
    assert torch.equal(rows.forward(again), rows.forward(student))
