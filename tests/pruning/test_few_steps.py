"""Models that draw in few steps without classifier-free guidance, from score to generate."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file

from conftest import small_sd15
from laptop.benchmarks import quality
from laptop.benchmarks.latency.image_sampling import ImageSampling, image_sampling
from laptop.benchmarks.settings import EvalConfig
from laptop.distill.settings import DataConfig
from laptop.errors import BadInput
from laptop.export import parity
from laptop.export.artifacts import export_model
from laptop.export.parity_report import ParityReport, check
from laptop.export.settings import ExportConfig, VerifyConfig
from laptop.export.to_coreml import swift_resources
from laptop.files import read_json, write_json
from laptop.generate import generate
from laptop.models import component_classes, loading
from laptop.pruning import calibration, sampling_choice
from laptop.pruning.calibration import Calibration
from laptop.pruning.plan import make_plan
from laptop.pruning.sampling_choice import GUIDANCE, choose_sampling
from laptop.pruning.sampling_config import FILE, SCHEMA, Sampling, SamplingConfig
from laptop.pruning.score import prompts_needed, score
from laptop.pruning.settings import PlanConfig, ScoreConfig
from laptop.pruning.surgery import prune
from laptop.training_data import make

PROMPTS = ["a red circle", "a blue cross"]
TURBO = SamplingConfig(steps=1, guidance=0.0)
SCORE = ScoreConfig(granularity="coarse", batch_size=2)


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As SDXL-Turbo: nothing but trailing timesteps says that it draws in one step."""
    pipe = small_sd15()
    pipe.scheduler = EulerAncestralDiscreteScheduler(timestep_spacing="trailing", steps_offset=1)
    pipe.save_pretrained(folder := tmp_path_factory.mktemp("few") / "small-a")
    return str(folder)


@pytest.fixture(scope="module")
def lcm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As LCM's distilled models: the guidance scale is an input of the U-Net."""
    pipe = small_sd15()
    config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")}
    config["time_cond_proj_dim"] = 8
    pipe.register_modules(unet=UNet2DConditionModel.from_config(config).eval())
    pipe.scheduler = LCMScheduler(original_inference_steps=20, steps_offset=1)
    pipe.save_pretrained(folder := tmp_path_factory.mktemp("few") / "small-b")
    return str(folder)


def stock(folder: str) -> Any:
    """The model as diffusers itself loads it."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def unet_calls(pipe: Any) -> Iterator[list[dict[str, Any]]]:
    """Sample, timestep and embedded guidance of every call of a pipeline's U-Net."""
    calls: list[dict[str, Any]] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        guidance = kwargs.get("timestep_cond")
        calls.append({"sample": args[0], "timestep": float(args[1]), "guidance": guidance})

    hook = pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
    yield calls
    hook.remove()


def drawn(place: str, path: Path, *, steps: int | None, guidance: float | None) -> Any:
    """The pixels that `laptop generate` writes, as integers (H, W, 3)."""
    generate(place, PROMPTS[0], path, steps=steps, guidance=guidance, seed=0)
    return np.asarray(Image.open(path), np.int32)


CASES = [("turbo", TURBO, {"num_inference_steps": 1, "guidance_scale": 0.0}),
         ("lcm", None, {"num_inference_steps": 4})]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "arguments"), CASES)
def test_calibration_sees_what_the_models_own_call_gives_the_unet(
    request, tmp_path, name, config, arguments
) -> None:
    model = request.getfixturevalue(name)
    steps = arguments["num_inference_steps"]
    settings = replace(SCORE, samples=2 * steps)
    folder = score(model, tmp_path / "s", settings, PROMPTS, sampling=config)
    rows = Calibration.read(folder / "calibration.safetensors").rows
    pipe = stock(model)
    with unet_calls(pipe) as calls:
        generator = torch.Generator().manual_seed(settings.seed)
        torch.randperm(2 * steps, generator=generator)  # which rows are kept
        pipe(PROMPTS, generator=generator, **arguments)
    assert len(calls) == steps
    assert all(len(call["sample"]) == 2 for call in calls), "no unconditional row"
    assert rows["timestep"].tolist() == [c["timestep"] for c in calls for _ in PROMPTS]
    assert torch.equal(rows["sample"], torch.cat([c["sample"] for c in calls]))
    if name == "lcm":
        embedded = torch.cat([c["guidance"].expand(2, -1) for c in calls])
        assert torch.equal(rows["timestep_cond"], embedded)


@pytest.mark.parametrize(("name", "config", "arguments"), CASES)
def test_training_latents_are_those_of_the_models_own_call(
    request, tmp_path, name, config, arguments
) -> None:
    model = request.getfixturevalue(name)
    data = DataConfig(source=f"prompts:{tmp_path / 'p.txt'}", count=1)
    (tmp_path / "p.txt").write_text("a red circle\n")
    out = make(model, data, tmp_path / "cache", sampling=config)
    cached = load_file(next(out.glob("0*.safetensors")))["latents.8x8"]
    seed = np.random.SeedSequence([data.seed, 0, 0]).generate_state(1, np.uint64).tolist()[0]
    generator = [torch.Generator().manual_seed(seed)]
    own = stock(model)(["a red circle"], generator=generator, output_type="latent", **arguments)
    assert torch.equal(cached, own.images.half())


@pytest.mark.parametrize(("name", "config", "arguments"), CASES)
def test_artifacts_are_of_one_row_and_draw_as_the_model_does(
    request, tmp_path, name, config, arguments
) -> None:
    model = request.getfixturevalue(name)
    settings = ExportConfig(components=("text_encoder", "unet", "vae_decoder"))
    out = export_model(model, tmp_path / "a", settings, PROMPTS, sampling=config)
    listed = read_json(out / "artifacts.json")
    unet = next(row for row in listed["artifacts"] if row["component"] == "unet")
    assert unet["shapes"]["sample"] == [1, 4, 8, 8]
    assert ("timestep_cond" in unet["shapes"]) == (name == "lcm")
    assert listed["sampling"]["steps"] == arguments["num_inference_steps"]
    parity.verify(out, model, tmp_path / "parity", VerifyConfig(), PROMPTS)  # no flags
    report = read_json(tmp_path / "parity" / "report.json")
    check(ParityReport.read(tmp_path / "parity" / "report.json"))
    samples = {row["component"]: row["samples"] for row in report["results"]}
    assert samples["unet"] == len(PROMPTS) * min(3, arguments["num_inference_steps"])
    steps = listed["sampling"]["steps"]
    assert image_sampling({"a": out}, None, None, None) == ImageSampling(steps, False)
    both = image_sampling({"a": [out, model]}, config, None, None)
    assert (both.steps, both.guidance) == (steps, False)
    guidance = choose_sampling(model, config).guidance
    own = drawn(model, tmp_path / "own.png", steps=steps, guidance=guidance)
    assert np.abs(own - drawn(str(out), tmp_path / "a.png", steps=None, guidance=None)).max() <= 2


@pytest.mark.parametrize(("name", "config", "arguments"), CASES)
def test_judged_pictures_are_those_of_the_models_own_call(
    request, tmp_path, name, config, arguments
) -> None:
    model = request.getfixturevalue(name)
    judged = EvalConfig(prompts=1, images_kept=1)
    out = quality.evaluate({"m": model}, tmp_path / "e", judged, PROMPTS, sampling=config)
    report = read_json(out / "eval.json")
    assert report["steps"] == arguments["num_inference_steps"]
    latents = torch.from_numpy(quality.noise(0, 0, (4, 8, 8)))[None]
    torch.manual_seed(0)
    pipe = loading.load_pipeline(model)
    with unet_calls(pipe) as calls:
        quality.draw(pipe, PROMPTS, [0], choose_sampling(model, config), 0)
    with unet_calls(own := stock(model)) as expected:
        own(PROMPTS[:1], latents=latents, **arguments)
    assert [c["timestep"] for c in calls] == [c["timestep"] for c in expected]
    assert [len(c["sample"]) for c in calls] == [1] * arguments["num_inference_steps"]
    assert torch.equal(calls[0]["sample"], expected[0]["sample"])


def test_a_student_carries_how_it_draws_from_the_scores_on(turbo, tmp_path) -> None:
    config = replace(TURBO, scheduler="LCMScheduler", scheduler_options={"clip_sample": False})
    needed = prompts_needed(turbo, replace(SCORE, samples=5), config)
    assert needed == 5, "one row of each prompt"
    scores = score(turbo, tmp_path / "s", replace(SCORE, samples=2), PROMPTS, sampling=config)
    plan = make_plan(scores, tmp_path / "plan.json", PlanConfig(ratio=0.2))
    student = prune(turbo, plan, tmp_path / "student")
    assert read_json(student / FILE) == {"schema": SCHEMA, **config.stated}
    chosen = choose_sampling(str(student))
    assert (chosen.steps, chosen.guidance, chosen.rows) == (1, 0.0, 1)
    assert chosen.scheduler == "LCMScheduler"
    stated = choose_sampling(str(student), SamplingConfig(guidance=3.0))
    assert (stated.steps, stated.guidance, stated.rows) == (1, 3.0, 2), "flags go first"
    again = prune(str(student), make_plan(
        score(str(student), tmp_path / "s2", replace(SCORE, samples=2), PROMPTS),
        tmp_path / "plan2.json", PlanConfig(ratio=0.2),
    ), tmp_path / "again")  # fmt: skip
    assert read_json(again / FILE) == read_json(student / FILE)


def test_a_scheduler_is_replaced_on_the_models_noise_schedule(turbo) -> None:
    config = SamplingConfig(
        scheduler="LCMScheduler", scheduler_options={"original_inference_steps": 4}
    )
    chosen = choose_sampling(turbo, config)
    assert (chosen.steps, chosen.guidance, chosen.rows) == (4, 1.0, 1), "as an LCM draws"
    pipe = loading.load_pipeline(turbo)
    betas = pipe.scheduler.betas
    sampling_choice.set_scheduler_(pipe, chosen)
    assert type(pipe.scheduler) is LCMScheduler
    assert torch.equal(pipe.scheduler.betas, betas)
    with unet_calls(pipe) as calls:
        pipe(PROMPTS[:1], **chosen.arguments, output_type="latent")
    assert [c["timestep"] for c in calls] == [999, 749, 499, 249], "as DMD2 was trained"


@pytest.mark.parametrize("other", ["LCMScheduler", "TCDScheduler", "HeunDiscreteScheduler"])
def test_a_scheduler_in_place_keeps_betas_that_the_models_file_leaves_out(other, tmp_path) -> None:
    """Old files leave out what was the default of the scheduler that they name."""
    write_json(tmp_path / "scheduler_config.json", {"_class_name": "DDIMScheduler"})
    own = DDIMScheduler.from_pretrained(tmp_path)
    config = {"_class_name": "DDIMScheduler", **own.config}
    made = sampling_choice.make_scheduler(config, Sampling(4, scheduler=other))
    assert torch.allclose(made.alphas_cumprod, own.alphas_cumprod)
    spacing = type(made)().config.timestep_spacing
    assert made.config.timestep_spacing == spacing, "as diffusers' from_config, for the rest"


def test_a_scheduler_without_continuous_times_cannot_replace_one_with_them() -> None:
    own = EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
    config = {"_class_name": "EulerDiscreteScheduler", **own.config}
    with pytest.raises(BadInput, match="cannot have the model's timestep_type"):
        sampling_choice.make_scheduler(config, Sampling(4, scheduler="DDIMScheduler"))
    with pytest.raises(BadInput, match="timestep_type, which says what the model was trained"):
        SamplingConfig(scheduler_options={"timestep_type": "discrete"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scheduler_options": {"speed": 3}}, "has 'speed', which Euler.* lacks; known are time"),
        ({"scheduler_options": {"timestep_spacing": "random"}}, "known are leading, trailing"),
        ({"scheduler_options": {"steps_offset": -900}}, "steps_offset is -900; it must be"),
        ({"scheduler": "DPMSolverMultistepScheduler", "scheduler_options": {"variance_type":
         "learned"}}, "variance_type is for a U-Net that learned"),
        ({"scheduler_options": {"timestep_spacing": 3}}, "timestep_spacing is 3; needed is a str"),
        ({"scheduler": "EDMEulerScheduler"}, "cannot have the model's beta_end"),
        ({"scheduler": "LCMScheduler", "steps": 60}, "does not draw in 60 steps"),
        ({"height": 38}, "resolution 38 x 16 does not fit this model: it must be a multiple of 4"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_draw_with_is_refused_from_its_configs(
    turbo, config, message
) -> None:
    with pytest.raises(BadInput, match=message):
        choose_sampling(turbo, SamplingConfig(**config))


def test_signs_of_few_steps_are_said_once_and_decide_nothing(
    turbo, lcm, small_folder, capsys
) -> None:
    sampling_choice._say_once.cache_clear()
    for _ in range(2):
        chosen = choose_sampling(turbo)
    assert (chosen.steps, chosen.guidance, chosen.rows) == (25, 7.5, 2)
    said = capsys.readouterr().err
    assert said.count("looks like a few-step model (its timesteps are trailing)") == 1
    assert "[sampling] steps and guidance" in said
    assert "--sampling-steps and --guidance" in said
    choose_sampling(turbo, TURBO)
    choose_sampling(str(small_folder))
    assert not capsys.readouterr().err
    assert choose_sampling(lcm).steps == 4
    assert "its scheduler is LCMScheduler" in capsys.readouterr().err
    choose_sampling("tiny-sdxl")
    assert not capsys.readouterr().err, "its schedule ends in pure noise, so it trails"


@pytest.mark.parametrize(
    ("name", "is_few"),
    [("sdxl-turbo", True), ("SDXL-Lightning-4step", True), ("Hyper-SD", True), ("dmd2", True),
     ("my_lcm", True), ("hyperion", False), ("tiny-sdxl", False), ("turbocharged", False)],
)  # fmt: skip
def test_names_that_are_signs(name, is_few) -> None:
    assert bool(sampling_choice.NAMES.search(name.lower())) == is_few


def test_a_stages_own_steps_go_first_and_bounds_hold(turbo, lcm) -> None:
    assert choose_sampling(turbo, TURBO, steps=3).steps == 3
    assert choose_sampling(turbo, TURBO, most=8).steps == 1
    assert choose_sampling(turbo, most=8).steps == 8
    assert choose_sampling(lcm, most=2).steps == 2
    assert choose_sampling(turbo, default=20).steps == 20


def test_folders_that_disagree_are_refused_and_flags_decide(turbo, tmp_path) -> None:
    pipe = loading.load_pipeline(turbo)
    for name, steps in (("one", 1), ("two", 2)):
        pipe.save_pretrained(tmp_path / name)
        write_json(tmp_path / name / FILE, {"schema": SCHEMA, "steps": steps})
    names = [str(tmp_path / name) for name in ("one", "two")]
    with pytest.raises(BadInput, match=r"different .sampling. steps: 1 and 2"):
        choose_sampling(names[0], None, names[1])
    assert choose_sampling(names[0], SamplingConfig(steps=3), names[1]).steps == 3
    with pytest.raises(BadInput, match="draw with different steps"):
        image_sampling({"a": names[0], "b": names[1]}, None, None, None)
    (tmp_path / "one" / FILE).write_text(json.dumps({"schema": SCHEMA, "steps": "x" * 999}))
    with pytest.raises(
        BadInput, match=r"laptop_sampling.json: .sampling. steps is 'x{200}…'; it must"
    ):
        choose_sampling(names[0])


def test_pictures_are_drawn_in_the_size_of_the_table(turbo, tmp_path) -> None:
    config = replace(TURBO, height=24, width=16)
    chosen = choose_sampling(turbo, config)
    assert (chosen.height, chosen.width) == (24, 16)
    pipe = loading.load_pipeline(turbo)
    rows = calibration.record(pipe, PROMPTS, chosen, samples=2, seed=0, batch_size=2)
    assert rows["sample"].shape == (2, 4, 12, 8)
    assert quality.draw(pipe, PROMPTS, [0], chosen, 0)[0].shape == (1, 24, 16, 3)
    assert image_sampling({"m": turbo}, config, None, None).size == (24, 16)


def test_default_guidance_is_that_of_diffusers_pipelines() -> None:
    import inspect

    import diffusers

    for name in component_classes.TASKS:
        parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
        guidance = parameters.get("guidance_scale")
        assert GUIDANCE.get(name) == (guidance and guidance.default), name


def test_a_sampling_without_settings_is_the_pipelines_own() -> None:
    assert Sampling(3).arguments == {"num_inference_steps": 3}


def test_apples_runner_is_not_given_a_unet_that_takes_the_guidance_scale(
    lcm, tmp_path, capsys
) -> None:
    swift_resources.write(lcm, tmp_path)
    assert not (tmp_path / "Resources").exists()
    assert "Swift runner does not pass the U-Net its guidance" in capsys.readouterr().err


def test_apples_runner_is_not_given_a_unet_of_one_row(turbo, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(swift_resources, "_rows", lambda _folder: 1)
    swift_resources.write(turbo, tmp_path)
    assert not (tmp_path / "Resources").exists()
    assert "always guides, with two rows" in capsys.readouterr().err
