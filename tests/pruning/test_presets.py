"""Presets: published sizes, weights where their authors put them, students that load anywhere."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel

from laptop.benchmarks.report.report import write_report
from laptop.cli import main
from laptop.cli.prune import PRESETS as OFFERED
from laptop.distill.features import Features, module_pairs
from laptop.errors import BadInput
from laptop.models import loading, unet_classes
from laptop.models.architectures import UNETS
from laptop.pruning.plan_file import CostChange, Plan
from laptop.pruning.presets import (
    PRESETS,
    changes,
    check_layout,
    make_preset_plan,
    preset_plan,
    transplant,
)
from laptop.pruning.settings import PruneConfig
from laptop.pruning.surgery import apply_plan, check_plan, prune
from laptop.pruning.units import forward_rows
from laptop.publish import model_card
from laptop.tiny import architecture
from support.unets import SD15, SDXL, on_meta

PUBLISHED = {
    "bk-base": 579_384_964,
    "bk-small": 482_346_884,
    "bk-tiny": 323_384_964,
    "ssd-1b": 1_331_334_404,
    "segmind-vega": 745_225_604,
    "koala-1b": 1_161_184_324,  # 1,161 M and 782 M in the KOALA paper
    "koala-700m": 782_822_724,
}
SMALL_SD = {
    "sample_size": 8,
    "cross_attention_dim": architecture.TEXT_WIDTH,
    "block_out_channels": (8, 16, 24, 24),
    "norm_num_groups": 8,
    "attention_head_dim": (1, 2, 3, 3),
}
SMALL_XL = SDXL | {
    "sample_size": 8,
    "block_out_channels": (8, 16, 24),
    "norm_num_groups": 8,
    "attention_head_dim": (1, 2, 3),
    "cross_attention_dim": 2 * architecture.TEXT_WIDTH,
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 6 * 16 + architecture.TEXT_WIDTH,
}
MIDDLE_OF_THREE = (r"(up_blocks\.\d\.(?:resnets|attentions))\.1\.", r"\1.2.")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def teacher_tensor(preset: str, name: str) -> str:
    """Where a student's tensor comes from, said in another way than `presets` does."""
    if preset == "ssd-1b":
        tens = r"((?:down_blocks\.2|up_blocks\.0)\.attentions\.[01]\.transformer_blocks)\.3\."
        return re.sub(tens, r"\1.6.", name)
    if preset == "bk-tiny":
        name = re.sub(r"up_blocks\.(\d)", lambda m: f"up_blocks.{int(m[1]) + 1}", name)
    return name if preset == "segmind-vega" else re.sub(*MIDDLE_OF_THREE, name)


@pytest.fixture(scope="module")
def small() -> dict[str, UNet2DConditionModel]:
    """Random U-Nets with the layouts of SD 1.5 and SDXL; do not change them."""
    torch.manual_seed(0)
    made = {"sd15": UNet2DConditionModel(**SMALL_SD), "sdxl": UNet2DConditionModel(**SMALL_XL)}
    for unet in made.values():
        for parameter in unet.parameters():  # norms too, so that no two layers are alike
            torch.nn.init.normal_(parameter, std=0.1)
    return {name: unet.eval() for name, unet in made.items()}


@pytest.fixture(scope="module")
def folders(small, tmp_path_factory) -> dict[str, Path]:
    """The same in whole pipelines; do not change them."""
    tokens = architecture.tokenizer()
    pipes = {
        "sd15": StableDiffusionPipeline(
            vae=architecture.vae(),
            text_encoder=CLIPTextModel(architecture._text_config(tokens)),
            tokenizer=tokens,
            unet=small["sd15"],
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ),
        "sdxl": architecture.pipeline(0),
    }
    pipes["sdxl"].register_modules(unet=small["sdxl"])
    root = tmp_path_factory.mktemp("teachers")
    for name, pipe in pipes.items():
        pipe.save_pretrained(root / name)
    return {name: root / name for name in pipes}


@pytest.fixture(scope="module")
def plans(small) -> dict[str, Plan]:
    """Every preset's plan, for prompts of 5 tokens."""
    return {n: preset_plan(small[p.teacher], n, tokens=5) for n, p in PRESETS.items()}


def rows(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """One row that the U-Net takes."""
    shapes = {"sample": (4, 8, 8), "encoder_hidden_states": (5, unet.config.cross_attention_dim)}
    if unet.config.addition_embed_type:
        shapes |= {"text_embeds": (architecture.TEXT_WIDTH,), "time_ids": (6,)}
    return {k: torch.ones(1, *v) for k, v in shapes.items()} | {"timestep": torch.tensor([500.0])}


def test_the_command_knows_every_preset() -> None:
    assert OFFERED == tuple(PRESETS) == tuple(PUBLISHED)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_its_published_size(name: str) -> None:
    teacher = on_meta(UNETS[PRESETS[name].teacher])
    student = transplant(teacher, changes(teacher.config, name), PRESETS[name].rename)
    assert type(student) is UNet2DConditionModel
    assert student.num_parameters() == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_weights_come_from_where_the_authors_took_them(small, plans, name: str) -> None:
    teacher = small[PRESETS[name].teacher]
    student, weights = apply_plan(teacher, plans[name]), teacher.state_dict()
    taken = {n: teacher_tensor(name, n) for n in student.state_dict()}
    assert all(torch.equal(t, weights[taken[n]]) for n, t in student.state_dict().items())
    assert len(set(taken.values())) == len(taken), "no weight is used twice"
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        assert forward_rows(student, rows(student), 1).isfinite().all()
    assert counter.get_total_flops() // 2 == plans[name].macs.after


@pytest.mark.parametrize("name", PRESETS)
def test_a_plan_tells_exactly_what_is_gone(small, plans, name: str, tmp_path) -> None:
    teacher, plan = small[PRESETS[name].teacher], plans[name]
    student = apply_plan(teacher, plan)
    assert plan.params == CostChange(
        before=teacher.num_parameters(), after=student.num_parameters()
    )
    gone = [teacher.get_submodule(n) for n in plan.remove]
    less = sum(p.numel() for module in gone for p in module.parameters())
    assert less == plan.params.before - plan.params.after
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan


def test_only_the_plan_of_a_preset_changes_the_config(small, plans) -> None:
    plan = replace(plans["bk-base"], preset=None, remove=())
    assert apply_plan(small["sd15"], plan) is small["sd15"]


def test_what_is_gone_is_named_as_a_whole(plans) -> None:
    assert list(plans["bk-tiny"].remove) == [
        *("down_blocks.0.attentions.1", "down_blocks.0.resnets.1"),
        *("down_blocks.1.attentions.1", "down_blocks.1.resnets.1"),
        *("down_blocks.2.attentions.1", "down_blocks.2.resnets.1"),
        *("down_blocks.2.downsamplers.0", "down_blocks.3", "mid_block", "up_blocks.0"),
        *("up_blocks.1.attentions.1", "up_blocks.1.resnets.1"),
        *("up_blocks.2.attentions.1", "up_blocks.2.resnets.1"),
        *("up_blocks.3.attentions.1", "up_blocks.3.resnets.1"),
    ]
    ssd = plans["ssd-1b"].remove
    assert {"mid_block.attentions.0", "mid_block.resnets.1"} < set(ssd)
    tens = [n for n in ssd if n.startswith("up_blocks.0.attentions.1.")]
    assert [n.rpartition(".")[2] for n in tens] == ["3", "4", "5", "7", "8", "9"]


@pytest.mark.parametrize(
    ("config", "preset", "words"),
    [
        (SDXL, "bk-base", "needs the blocks of sd15.*For this model: ssd-1b"),
        (SD15, "koala-1b", "needs the blocks of sdxl.*For this model: bk-base"),
        (
            SDXL | {"transformer_layers_per_block": (1, 2, 1)},
            "ssd-1b",
            r"transformer_layers_per_block is \[1, 2, 1\]; needed is \[1, 2, 10\].*No preset",
        ),
        (UNETS["sdxl-refiner"], "ssd-1b", "No preset"),
    ],
)
def test_a_teacher_of_another_layout_is_refused(config, preset, words) -> None:
    with pytest.raises(BadInput, match=words):
        preset_plan(on_meta(config), preset)


@pytest.mark.parametrize("teacher", ["sd15-inpainting", "lcm-sd15", "sd21"])
def test_a_teacher_of_the_same_layout_fits(teacher: str) -> None:
    unet = on_meta(UNETS[teacher])
    check_layout(unet, "bk-tiny")
    student = transplant(unet, changes(unet.config, "bk-tiny"), PRESETS["bk-tiny"].rename)
    assert student.config.in_channels == unet.config.in_channels
    assert len(student.up_blocks) == 3


def test_a_pruned_teacher_is_refused() -> None:
    with torch.device("meta"):
        pruned = unet_classes.shipped_module().LaptopUNet2DConditionModel(
            **SMALL_SD, removed=["down_blocks.0.resnets.1"]
        )
    with pytest.raises(BadInput, match="1 layers of this one are removed already"):
        preset_plan(pruned, "bk-base")


@pytest.mark.parametrize(("family", "name"), [("sd15", "bk-tiny"), ("sdxl", "ssd-1b")])
def test_the_written_student_is_stock_and_draws(folders, tmp_path, family, name) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "student"
    made = run("plan", "--model", folders[family], "--preset", name, "-o", plan)
    assert made.exit_code == 0, made.output
    assert run("prune", "--model", folders[family], "--plan", plan, "-o", out).exit_code == 0
    document = Plan.read(plan)
    unet = UNet2DConditionModel.from_pretrained(out, subfolder="unet")
    assert unet.num_parameters() == document.params.after
    assert not list((out / "unet").glob("*.py"))
    taken = apply_plan(loading.load_unet(str(folders[family])), document).state_dict()
    assert all(torch.equal(tensor, taken[n]) for n, tensor in unet.state_dict().items())
    pipe = DiffusionPipeline.from_pretrained(out)
    assert type(pipe.unet) is UNet2DConditionModel
    drawn = run("generate", out, "a large red circle", "--steps", 1, "-o", tmp_path / "x.png")
    assert drawn.exit_code == 0, drawn.output
    again = run("plan", "--model", folders[family], "--preset", name, "-o", plan)
    assert "up to date" in again.stderr


def test_a_report_and_a_model_card_need_no_losses(folders, tmp_path) -> None:
    plan = make_preset_plan(str(folders["sd15"]), "bk-tiny", tmp_path / "plan.json")
    document = Plan.read(plan)
    assert document.predicted_loss is document.measured_loss is None
    assert "- `mid_block`" in model_card(document)
    write_report(tmp_path)
    assert "`down_blocks.3`" in (tmp_path / "report.md").read_text()
    compared = run("compare", plan, plan, "--fail-on", "params>+0%")
    assert compared.exit_code == 0, compared.output


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_written(folders, tmp_path) -> None:
    plan = make_preset_plan(str(folders["sd15"]), "bk-base", tmp_path / "plan.json")
    whole = json.loads(plan.read_text())
    wrong = {"up_blocks.3.resnets.1": "up_blocks.0.resnets.1"}
    for edited, words in [
        (whole | {"rename": whole["rename"] | wrong}, "rename is not what the preset bk-base"),
        (whole | {"config": whole["config"] | {"norm_eps": 0.9}}, "config is not what the preset"),
        (whole | {"preset": "bk-huge"}, "preset 'bk-huge' is unknown"),
        (whole | {"config": None}, "lacks the preset's 'config' or 'rename'"),
        (whole | {"params": {"before": 5, "after": 5}}, "made for another model"),
    ]:
        plan.write_text(json.dumps(edited))
        with pytest.raises(BadInput, match=words):
            prune(str(folders["sd15"]), plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    plan.write_text(json.dumps(whole))
    with pytest.raises(BadInput, match="made for another model"):
        check_plan(Plan.read(plan), on_meta(SMALL_XL), str(plan))
    with pytest.raises(BadInput, match="is not possible for the plan of the preset 'bk-base'"):
        prune(str(folders["sd15"]), plan, tmp_path / "out", PruneConfig(heal="affine"), tmp_path)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "sd15", "--preset", "bk-huge"], "bk-huge"),
        (["--model", "sd15"], "--preset"),
        (["--preset", "bk-base"], "--model"),
        (["scores", "--model", "sd15", "--preset", "bk-base"], "Leave one of them out"),
        (["--model", "sd15", "--preset", "bk-base", "--ratio", "0.5"], "--ratio"),
        (["--model", "sd15", "--preset", "bk-base", "--max-macs", "5"], "--max-macs"),
        (["--model", "sd15", "--preset", "bk-base", "--menu"], "--menu"),
        ([], "SCORES is missing"),
    ],
)
def test_a_wrong_combination_is_a_usage_error(tmp_path, args, words) -> None:
    result = run("plan", *args, "-o", tmp_path / "plan.json")
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PRESETS)
def test_a_student_has_a_feature_map_like_its_teachers_in_every_block(small, plans, name) -> None:
    teacher = small[PRESETS[name].teacher]
    student = apply_plan(teacher, plans[name]).eval()
    paired = module_pairs(teacher, student)
    theirs = Features(teacher, {block: block for block in paired})
    own = Features(student, paired)
    shapes = []
    for unet, features in ((teacher, theirs), (student, own)):
        features.collect()
        forward_rows(unet, rows(unet), 1)
        shapes.append({k: v.shape for k, v in features.take().items()})
    assert shapes[0] == shapes[1]
    blocks = 2 * len(student.down_blocks) + (student.mid_block is not None)
    assert len(paired) == blocks - (name == "bk-tiny")  # whose innermost down block ends there
