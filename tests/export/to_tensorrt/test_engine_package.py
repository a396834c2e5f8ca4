"""Engines built by a stand-in for the package `tensorrt`; no real TensorRT runs here."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from laptop.errors import BadInput, LaptopError, Unsupported
from laptop.export import components
from laptop.export.closeness import psnr
from laptop.export.job import Job
from laptop.export.settings import ExportConfig, TensorrtConfig
from laptop.export.targets import VERIFIED
from laptop.export.to_tensorrt import engine, engine_package
from laptop.export.to_tensorrt import target as to_tensorrt
from laptop.export.to_tensorrt.plan import read_plan
from laptop.export.to_tensorrt.trtexec import Gpu
from support import standin_tensorrt

Install = Callable[[str], ModuleType]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """This machine as if it had a GPU and this version of the package."""

    def installed(version: str, gpu: str = "NVIDIA L4") -> ModuleType:
        made = standin_tensorrt.module(version)
        monkeypatch.setitem(sys.modules, "tensorrt", made)
        monkeypatch.setattr(engine_package, "device", lambda: Gpu(gpu, "8.9"))
        engine_package._logger.cache_clear()
        return made

    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(engine_package, "DEVICE", "cpu")
    monkeypatch.setattr(engine_package, "is_here", lambda: True)
    monkeypatch.setattr(engine_package, "_stream", lambda: 0)
    monkeypatch.setattr(engine_package, "_wait", lambda: None)
    monkeypatch.setattr(engine, "is_here", lambda: False)
    return installed


@pytest.fixture(scope="module")
def graph(
    pruned_xl_folder: Path, recorded_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The U-Net in fp16, for one or two pictures."""
    profile = TensorrtConfig(batch=(1, 1, 2), optimization_level=2, workspace_mib=64)
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    given, config = recorded_folder / "unet.safetensors", ExportConfig(tensorrt=profile)
    to_tensorrt.export(Job("tensorrt", "unet", "fp16", str(pruned_xl_folder), given, path, config))
    return path


@pytest.mark.parametrize("version", ["10.3.0", "11.1.0"])
def test_an_engine_computes_what_pytorch_computes(
    version: str, install: Install, onnx_job: Job, graph: Path
) -> None:
    package = install(version)
    unet, given = components.load(onnx_job.model, "unet"), onnx_job.examples()[0]
    (got,) = to_tensorrt.load(graph)({k: v.numpy() for k, v in given.items()}).values()
    assert psnr(components.run(unet, given)["out_sample"].numpy(), got) >= 40
    assert to_tensorrt.checked("fp16") == VERIFIED
    (config,) = package.builds
    assert config.builder_optimization_level == 2
    assert config.limits == {package.MemoryPoolType.WORKSPACE: 64 << 20}


def test_an_engine_is_built_once_for_each_version_and_gpu(install: Install, graph: Path) -> None:
    plan = read_plan(graph).plan
    first = install("10.3.0")
    made = engine_package.build(graph, plan)
    assert engine_package.build(graph, plan) == made
    assert len(first.builds) == 1
    assert engine_package.build(graph, replace(plan, optimization_level=5)) != made
    for version, gpu in (("10.4.0", "NVIDIA L4"), ("10.3.0", "NVIDIA A10")):
        other = install(version, gpu)
        assert engine_package.build(graph, plan) != made
        assert len(other.builds) == 1
    made.write_bytes(b"damaged")
    again = install("10.3.0")
    engine_package.build(graph, plan)
    assert len(again.builds) == 1


def test_what_timing_measured_is_kept(install: Install, graph: Path, tmp_path: Path) -> None:
    plan = read_plan(graph).plan
    package = install("10.3.0")
    engine_package.build(graph, plan)
    engine_package.build(graph, replace(plan, optimization_level=5))
    assert [config.cache.content for config in package.builds] == [b"", b"."]
    (kept,) = (tmp_path / "home" / engine.CACHE / "timing").iterdir()
    assert kept.read_bytes() == b".."


def test_what_cannot_be_built_or_fed_is_an_error(
    install: Install, onnx_job: Job, graph: Path
) -> None:
    plan = read_plan(graph).plan
    install("8.6.1")
    with pytest.raises(Unsupported, match=r"TensorRT 8\.6\.1 by its Python package is too old"):
        engine_package.build(graph, plan)
    install("10.3.0")
    with pytest.raises(LaptopError, match="could not build"):
        engine_package.build(graph, replace(plan, profile={}))
    given = {k: v.numpy() for k, v in onnx_job.examples()[0].items()}
    five = {k: np.repeat(v[:1], 5, 0) if v.ndim else v for k, v in given.items()}
    with pytest.raises(BadInput, match="outside of the engine's profile"):
        engine_package.load(graph)(five)
    with pytest.raises(BadInput, match="the engine takes"):
        engine_package.load(graph)(given | {"other": np.zeros(1)})


def test_without_a_gpu_there_is_no_engine() -> None:
    if not torch.cuda.is_available():
        assert not engine_package.is_here()
