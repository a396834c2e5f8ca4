"""Only listed classes are components: whatever else an index says is refused, nothing imported."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest

from laptop.errors import BadInput, LaptopError, Unsupported
from laptop.models import loading, locating, unet_classes
from laptop.models.component_classes import (
    CLASSES,
    SHIPPED_LIBRARY,
    TASKS,
    check_agreement,
    check_index,
    needed,
    optional,
)
from laptop.models.model_checks import check_folder

SD: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.39.0",
    "requires_safety_checker": False,
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
TRAP = "a_module_that_an_index_names"
STRANGE: list[object] = [
    *([], ["diffusers"], ["diffusers", "AutoencoderKL", "x"], "diffusers", 3, {}, {"a": 1}, True),
    *([None, "AutoencoderKL"], ["diffusers", None], [["diffusers"], "AutoencoderKL"], [3, 4]),
    *(["", ""], ["diffusers", ""], ["../../x", "AutoencoderKL"], ["os", "system"]),
    *([TRAP, "Code"], ["diffusers.models", "AutoencoderKL"], ["laptop.models", "Known"]),
    *(["diffusers", "AutoencoderKLWan"], ["diffusers", "FluxTransformer2DModel"]),
    *(["transformers", "T5EncoderModel"], ["transformers", "pipeline"], ["x" * 9999, "y" * 9999]),
]


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module in the path of imports that leaves a file when it is run."""
    ran = tmp_path / "ran"
    (tmp_path / f"{TRAP}.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Code: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    return ran


@pytest.mark.parametrize("entry", STRANGE, ids=lambda entry: repr(entry)[:40])
@pytest.mark.parametrize("component", CLASSES)
def test_a_component_of_no_listed_class_is_refused_in_one_short_message(
    component: str, entry: object, trap: Path
) -> None:
    with pytest.raises(LaptopError) as e:
        check_index(SD | {component: entry}, "the model")
    assert str(e.value).startswith("the model")
    assert len(str(e.value)) < 1500
    assert not trap.exists()


@pytest.mark.parametrize("name", ["../../etc", "controlnet", "/tmp/x", "", "text_encoder_2", "a b"])
def test_a_component_that_the_pipeline_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(Unsupported, match="names a component"):
        check_index(SD | {name: ["transformers", "CLIPTextModel"]}, "the model")


@pytest.mark.parametrize("name", [n for n in needed("StableDiffusionPipeline") if n != "unet"])
@pytest.mark.parametrize("entry", [None, [None, None]])
def test_a_component_that_is_needed_and_null_is_named(name: str, entry: object) -> None:
    with pytest.raises(BadInput, match=rf"has no {name}, and a StableDiffusionPipeline needs"):
        check_index(SD | {name: entry}, "the model")


@pytest.mark.parametrize("pipeline", [*TASKS, 3, None, [], {}, "FluxPipeline", "os.system"])
def test_every_pipeline_is_of_a_listed_class_and_calls_its_own_unet(pipeline: object) -> None:
    index = {k: v for k, v in SD.items() if not isinstance(v, list)} | {"_class_name": pipeline}
    if not isinstance(pipeline, str) or pipeline not in TASKS:
        with pytest.raises(Unsupported, match="supported are"):
            check_index(SD | index, "the model")
        return
    unconditional = TASKS[pipeline] == "unconditional"
    for name in needed(pipeline):
        library, classes = next(iter(CLASSES[name].items()))
        index[name] = [library, classes[0]]
    index["unet"] = ["diffusers", "UNet2DModel" if unconditional else "UNet2DConditionModel"]
    check_index(index, "the model")
    index["unet"] = ["diffusers", "UNet2DConditionModel" if unconditional else "UNet2DModel"]
    with pytest.raises(Unsupported, match="calls a UNet2D"):
        check_index(index, "the model")


@pytest.mark.parametrize("pipeline", TASKS)
def test_the_components_are_those_of_the_installed_pipelines(pipeline: str) -> None:
    cls = getattr(diffusers, pipeline)
    needs, options = cls._get_signature_keys(cls)
    ours = {*needed(pipeline), *optional(pipeline)}
    assert set(needs) <= ours, "a component that CLASSES lacks"
    assert {*options} & {*CLASSES} <= ours <= {*needs, *options}


def test_every_listed_class_exists() -> None:
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    libraries["stable_diffusion"] = diffusers.pipelines.stable_diffusion.safety_checker
    libraries[SHIPPED_LIBRARY] = unet_classes.shipped_module()
    for classes in CLASSES.values():
        for library, names in classes.items():
            present = [name for name in names if hasattr(libraries[library], name)]
            assert present, names
            assert {*names} - {*present} <= {"CLIPFeatureExtractor", "CLIPTokenizerFast"}


@pytest.mark.parametrize(
    ("path", "config"),
    [
        ("unet/config.json", {"_class_name": "UNet2DModel"}),
        ("unet/config.json", {"_class_name": 3}),
        ("unet/config.json", {}),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}),
        ("vae/config.json", {}),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
        ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}),
    ],
)
def test_a_component_whose_config_is_of_another_class_is_refused(
    path: str, config: dict[str, Any]
) -> None:
    files = {"unet/config.json": {"_class_name": "UNet2DConditionModel"}}
    check_agreement(SD, files.get, "the model")
    with pytest.raises(LaptopError, match=path):
        check_agreement(SD, (files | {path: config}).get, "the model")


def test_a_folder_whose_index_names_a_module_runs_nothing(
    tiny_folder: Path, tmp_path: Path, trap: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    shutil.copy(tmp_path / f"{TRAP}.py", folder / "vae" / f"{TRAP}.py")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": [TRAP, "Code"]}))
    with pytest.raises(Unsupported, match=f"has .*{TRAP}.* as vae; supported is"):
        check_folder(folder)
    assert not trap.exists()
    assert TRAP not in sys.modules


@pytest.fixture(scope="module")
def tiny_vae_folder(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 1.5's wiring with an AutoencoderTiny."""
    folder = Path(shutil.copytree(small_folder, tmp_path_factory.mktemp("tiny-vae") / "model"))
    shutil.rmtree(folder / "vae")
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(folder / "vae")
    change_index(folder, vae=["diffusers", "AutoencoderTiny"])
    return folder


def change_index(folder: Path, **entries: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | entries))


@pytest.mark.parametrize("stage", ["compress", "cache", "distill", "export", "verify"])
def test_a_vae_without_a_distribution_is_refused_where_one_is_needed(
    tiny_vae_folder: Path, stage: str
) -> None:
    with pytest.raises(Unsupported, match=rf"an AutoencoderTiny.*{stage} takes an AutoencoderKL"):
        locating.need_whole_chain(str(tiny_vae_folder), stage)


def test_a_vae_without_a_distribution_draws(tiny_vae_folder: Path) -> None:
    for stage in ("generate", "eval"):
        locating.need_whole_chain(str(tiny_vae_folder), stage)
    pipe = loading.load_pipeline(str(tiny_vae_folder))
    assert pipe("a red circle", num_inference_steps=1, output_type="np").images.shape[0] == 1
