"""The export stage and its ONNX files, run by ONNX Runtime and by the real optimum."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import DiffusionPipeline

from conftest import small_sd15
from laptop.errors import BadInput, MissingExtra, NoSpace
from laptop.export import components
from laptop.export.artifact_list import read_list
from laptop.export.artifacts import ExportConfig, export_model
from laptop.export.closeness import psnr
from laptop.export.settings import OnnxConfig
from laptop.export.to_onnx import onnx_session
from laptop.export.to_onnx import target as to_onnx
from laptop.generate import generate
from laptop.models import loading, locating
from laptop.pruning.sampling_config import SamplingConfig

PROMPTS = ["a large red circle above a small green cross on black"]


@pytest.fixture(scope="module")
def pruned(pruned_xl_folder: Path) -> DiffusionPipeline:
    return loading.load_pipeline(str(pruned_xl_folder))


@pytest.fixture(scope="module")
def exported(pruned_xl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All components of a pruned model of the shipped class."""
    out = tmp_path_factory.mktemp("export") / "artifacts"
    targets = ExportConfig(targets=("onnx", "onnx:fp16"))
    return export_model(str(pruned_xl_folder), out, targets, PROMPTS)


def picture(pipe: Any, count: int = 1, **kwargs: Any) -> np.ndarray:
    generator = [torch.Generator().manual_seed(i) for i in range(count)]
    return pipe(
        PROMPTS * count, num_inference_steps=3, generator=generator, output_type="np", **kwargs
    ).images


def test_the_folder_is_laid_out_as_optimum_does(exported: Path) -> None:
    folder = exported / "onnx"
    for component in components.ALL:
        assert {p.name for p in (folder / component).iterdir()} == {"model.onnx", "config.json"}
    for name in ("tokenizer", "tokenizer_2", "scheduler", "model_index.json"):
        assert (folder / name).exists()


def test_operators_have_the_names_of_their_modules(exported: Path) -> None:
    graph = onnx.load(exported / "onnx" / "unet" / "model.onnx", load_external_data=False).graph
    assert all(node.name for node in graph.node)
    assert len({node.name for node in graph.node}) == len(graph.node)
    for node in graph.node:
        if node.op_type == "Conv":
            weight = node.input[1]
            module = node.name.removesuffix("/Conv").removeprefix("/").replace("/", ".")
            assert weight == f"{module}.weight"


def test_names_of_inputs_and_outputs_are_optimums(exported: Path) -> None:
    def names(component: str) -> tuple[list[str], list[str]]:
        graph = onnx.load(exported / "onnx" / component / "model.onnx").graph
        return [i.name for i in graph.input], [o.name for o in graph.output]

    states = [f"hidden_states.{i}" for i in range(4)]
    ids = ["input_ids"]
    assert names("text_encoder") == (ids, ["last_hidden_state", "pooler_output", *states])
    assert names("text_encoder_2") == (ids, ["text_embeds", "last_hidden_state", *states])
    assert names("vae_encoder") == (["sample"], ["latent_parameters"])
    assert names("vae_decoder") == (["latent_sample"], ["sample"])
    assert names("unet") == (
        ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"],
        ["out_sample"],
    )


@pytest.mark.parametrize("folder", ["onnx", "onnx-fp16"])
def test_optimum_draws_pytorchs_picture_from_the_same_noise(
    folder: str, exported: Path, pruned: DiffusionPipeline
) -> None:
    reference = picture(pruned, 2)
    drawn = picture(to_onnx.load_pipeline(exported / folder), 2)
    assert reference.std() > 0.01, "an empty picture would prove nothing"
    assert psnr(reference, drawn) >= 40


def test_batch_picture_size_and_tokens_are_dynamic(
    exported: Path, pruned: DiffusionPipeline
) -> None:
    torch.manual_seed(0)
    given = {
        "sample": torch.randn(3, 4, 16, 12),
        "timestep": torch.tensor(500.5),
        "encoder_hidden_states": torch.randn(3, 20, 128),
        "text_embeds": torch.randn(3, 64),
        "time_ids": torch.full((3, 6), 64.0),
    }
    cases = {
        "unet": given,
        "text_encoder": {"input_ids": torch.randint(0, 90, (3, 16))},
        "vae_decoder": {"latent_sample": torch.randn(3, 4, 16, 12)},
        "vae_encoder": {"sample": torch.randn(2, 3, 128, 96)},
    }
    for component, case in cases.items():
        run = onnx_session.load(exported / "onnx" / component / "model.onnx")
        got = run({name: value.numpy() for name, value in case.items()})
        for name, value in components.run(components.graph(pruned, component), case).items():
            assert psnr(value.numpy(), got[name]) >= 60, (component, name)


def test_an_sd15_pipeline_exports_and_optimum_draws_its_picture(tmp_path: Path) -> None:
    """Its configs are as old diffusers wrote them, without the keys that came later."""
    pipe = small_sd15()
    pipe.save_pretrained(tmp_path / "model")
    for part in ("unet", "vae"):
        path = tmp_path / "model" / part / "config.json"
        config = json.loads(path.read_text())
        defaults = locating.with_defaults({"_class_name": config["_class_name"]})
        kept = {k: v for k, v in config.items() if k.startswith("_") or defaults.get(k) != v}
        assert not {"time_cond_proj_dim", "scaling_factor"} & kept.keys()
        path.write_text(json.dumps(kept))
    out = export_model(str(tmp_path / "model"), tmp_path / "artifacts", ExportConfig(), PROMPTS)
    assert not (out / "onnx" / "text_encoder_2").exists()
    loaded = to_onnx.load_pipeline(out)
    assert type(loaded).__name__ == "ORTStableDiffusionPipeline"
    assert psnr(picture(pipe), picture(loaded)) >= 40


def test_the_list_holds_bytes_and_hash_of_every_file(exported: Path) -> None:
    rows = read_list(exported).artifacts
    assert [row.component for row in rows] == list(components.ALL) * 2
    half = [row.component for row in rows if row.precision == "fp16"]
    assert half == ["text_encoder", "text_encoder_2", "unet"], "the VAE stays in fp32"
    for row in rows:
        assert row.target == "onnx"
        assert row.bytes == (exported / row.file).stat().st_size
        assert len(row.sha256) == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"targets": ("onxn",)},
            "unknown target 'onxn'; known: onnx, ort, coreml, tensorrt, executorch. Did you",
        ),
        ({"targets": ()}, "at least one target"),
        ({"resolution": 100}, "resolution is 100 pixels; needed is a multiple of 8"),
        ({"vae_precision": "bf16"}, "vae_precision 'bf16' is none of onnx's"),
        ({"components": ("vae",)}, "components is 'vae'; known are"),
        ({"targets": ("onnx:int3",)}, "onnx:int3: onnx has no 'int3'; choose fp32, fp16"),
        ({"targets": ("onnx", "onnx:fp32")}, "a target is named twice"),
    ],
)
def test_a_wrong_request_is_refused_before_the_model_is_looked_at(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        export_model("no/such-model", tmp_path / "a", ExportConfig(**changes), PROMPTS)
    assert not list(tmp_path.iterdir())


def test_shapes_of_another_name_are_refused() -> None:
    with pytest.raises(BadInput, match="shapes is 'fixed'; known are dynamic, static"):
        OnnxConfig(shapes="fixed")


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"coremltools: pip install 'laptop-diff\[coreml\]'"):
        export_model("no/such", tmp_path / "a", ExportConfig(targets=("coreml",)), PROMPTS)


def test_a_full_disk_is_found_before_weights_are_read(
    xl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    monkeypatch.setattr(loading, "load_pipeline", None)
    with pytest.raises(NoSpace, match="GB are needed"):
        export_model(str(xl_folder), tmp_path / "a", ExportConfig(), PROMPTS)


def test_loading_a_folder_without_onnx_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="laptop export MODEL --to onnx"):
        to_onnx.load_pipeline(tmp_path)


@pytest.mark.parametrize(
    "file",
    [
        "unet/config.json",
        "vae_decoder/config.json",
        "text_encoder/config.json",
        "text_encoder_2/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
    ],
)
def test_a_damaged_folder_is_refused_before_it_is_loaded(
    exported: Path, tmp_path: Path, file: str
) -> None:
    damaged = Path(shutil.copytree(exported / "onnx", tmp_path / "onnx"))
    (damaged / file).write_text("{}")
    with pytest.raises(BadInput, match=str(damaged)):
        to_onnx.load_pipeline(damaged)


def test_a_picture_is_of_the_size_that_was_exported(pruned_xl_folder: Path, tmp_path: Path) -> None:
    components = ("text_encoder", "text_encoder_2", "unet", "vae_decoder")
    config = ExportConfig(components=components, resolution=96, onnx=OnnxConfig(shapes="static"))
    sampling = SamplingConfig(steps=1)
    export_model(str(pruned_xl_folder), tmp_path / "a", config, ["red"], sampling=sampling)
    size = generate(str(tmp_path / "a"), "red", tmp_path / "o.png", steps=1, guidance=None, seed=0)
    assert size == (96, 96)


@pytest.mark.parametrize(
    "change", [{"tokenizer_2": None}, {"vae": [None]}, {"unet": 3}, {"_class_name": "FluxPipeline"}]
)
def test_an_index_that_names_something_else_is_refused(
    exported: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    damaged = Path(shutil.copytree(exported / "onnx", tmp_path / "onnx"))
    path = damaged / "model_index.json"
    index = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in index.items() if v is not None}))
    with pytest.raises(BadInput):
        to_onnx.load_pipeline(damaged)
