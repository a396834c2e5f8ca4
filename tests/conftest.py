"""Small real models that the tests share."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from laptop.distill.encoding import make_cache
from laptop.distill.settings import DataConfig
from laptop.export.inputs import record
from laptop.export.job import IMPORTS, Job, save_examples
from laptop.export.settings import CoremlConfig, ExportConfig
from laptop.models import loading, unet_classes
from laptop.pruning.sampling_config import Sampling
from laptop.tiny import architecture
from laptop.tiny.architecture import MAX_TOKENS, tokenizer
from laptop.training_data import Scenes

# Several workers (pytest -n) share the cores; two threads each on all of them wait for each other.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    THREADS = max(1, (os.cpu_count() or 1) // WORKERS)
    os.environ["OMP_NUM_THREADS"] = str(THREADS)  # of the processes that tests start
    torch.set_num_threads(THREADS)

IMPORTS.append("coremltools")  # 2 s of each process that exports to Core ML
# Files that take longest start first, lest one of them is left for a single worker at the end.
LONGEST = (
    *("test_to_coreml", "test_palettes", "test_onnx_weights", "test_to_onnx", "test_to_executorch"),
    *("test_compress", "test_trainer", "test_session", "test_distributed", "test_magnitudes"),
    *("test_computers", "test_latency", "test_bench", "test_engine", "test_to_tensorrt"),
    *("test_compress_killed", "test_timed_plans"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


TRAINING_SCRIPT = str(Path(__file__).parent / "support" / "training.py")
REMOVED = [
    "down_blocks.0.resnets.1",
    "up_blocks.0.resnets.1",
    "up_blocks.1.attentions.0.transformer_blocks.0",
]


@pytest.fixture(scope="session")
def tiny_pipe() -> StableDiffusionXLPipeline:
    """An untrained `tiny-sdxl`; do not change it."""
    return architecture.pipeline(0)


@pytest.fixture(scope="session")
def tiny_folder(
    tiny_pipe: StableDiffusionXLPipeline, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The untrained `tiny-sdxl` as a diffusers folder; do not change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pruned_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with three layers removed, in the shipped class; do not change it."""
    return without(REMOVED, tiny_folder, tmp_path_factory.mktemp("models") / "pruned")


@pytest.fixture(scope="session")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny-sdxl` with a U-Net of two levels, untrained; do not change it."""
    folder = tmp_path_factory.mktemp("models") / "xl"
    pipe = architecture.pipeline(0)
    changes = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1),
        "attention_head_dim": (2, 2),
    }
    unet = UNet2DConditionModel.from_config({**pipe.unet.config, **changes})
    pipe.register_modules(unet=unet.eval())
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pruned_xl_folder(xl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two layers removed, in the shipped class; do not change it."""
    removed = ["up_blocks.0.attentions.0.transformer_blocks.0", "up_blocks.1.resnets.1"]
    return without(removed, xl_folder, tmp_path_factory.mktemp("models") / "pruned-xl")


@pytest.fixture(scope="session")
def textless_folder(xl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a cross-attention and without one feed-forward network."""
    blocks = {
        name.rpartition(".")[0]
        for name, _ in loading.load_unet(str(xl_folder)).named_modules()
        if name.endswith(".attn2")
    }
    removed = [*(f"{block}.attn2" for block in blocks), f"{min(blocks)}.ff"]
    return without(sorted(removed), xl_folder, tmp_path_factory.mktemp("models") / "textless")


def without(removed: list[str], model: Path, folder: Path) -> Path:
    """A model without some of its layers, in the shipped class."""
    pipe = loading.load_pipeline(str(model))
    unet = unet_classes.shipped_class(pipe.unet).from_config(pipe.unet.config, removed=removed)
    weights = pipe.unet.state_dict()
    unet.load_state_dict({name: weights[name] for name in unet.state_dict()})
    pipe.register_modules(unet=unet)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def recorded_folder(pruned_xl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every component of the pruned model gets while it samples, a file each."""
    folder = tmp_path_factory.mktemp("recorded")
    pipe = loading.load_pipeline(str(pruned_xl_folder))
    for name, rows in record(pipe, ["a large red circle on white"], Sampling(3), seed=0).items():
        save_examples(rows, folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def onnx_job(pruned_xl_folder: Path, recorded_folder: Path, tmp_path: Path) -> Job:
    """The pruned U-Net, of the shipped class, in fp32."""
    path, given = tmp_path / "model.onnx", recorded_folder / "unet.safetensors"
    return Job("onnx", "unet", "fp32", str(pruned_xl_folder), given, path, ExportConfig())


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of a distillation's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _cache(model: str, folder: Path) -> Path:
    return make_cache(model, Scenes(12, seed=0), folder / "cache", DataConfig())


@pytest.fixture(scope="session")
def tiny_cache(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scenes as the untrained `tiny-sdxl` encodes them."""
    return _cache(str(tiny_folder), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def trained_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as the trained one encodes them."""
    return _cache("tiny-sdxl", tmp_path_factory.mktemp("trained"))


def small_sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's wiring, untrained: one text encoder, no added conditions."""
    torch.manual_seed(0)
    tokens = tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokens,
        unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 1.5's wiring, smaller than `tiny-sdxl`."""
    folder = tmp_path_factory.mktemp("models") / "small"
    small_sd15().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pair(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Teacher and student, untrained and small; do not change them."""
    removed = ["down_blocks.1.resnets.0", "up_blocks.1.attentions.1.transformer_blocks.0"]
    student = without(removed, small_folder, tmp_path_factory.mktemp("models") / "student")
    return str(small_folder), str(student)


@pytest.fixture(scope="session")
def pair_cache(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scenes as the teacher of `pair` encodes them."""
    return _cache(str(small_folder), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def job(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """Jobs for the small U-Net on its recorded inputs."""
    folder = tmp_path_factory.mktemp("jobs")
    pipe = loading.load_pipeline(str(small_folder))
    save_examples(
        record(pipe, ["a large red circle on white"], Sampling(2), seed=0)["unet"],
        folder / "unet.safetensors",
    )
    first = Job(
        target="coreml",
        component="unet",
        precision="fp16",
        model=str(small_folder),
        inputs=folder / "unet.safetensors",
        path=folder / "unet.mlpackage",
        config=ExportConfig(targets=("coreml",)),
    )

    def made(name: str, config: CoremlConfig | None = None, **changes: Any) -> Job:
        settings = replace(first.config, coreml=config or CoremlConfig())
        (folder / name).mkdir()
        path = folder / name / "unet.mlpackage"
        return replace(first, path=path, config=settings, **changes)

    return made
