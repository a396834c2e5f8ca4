"""Measuring on an iPhone: coremltools' own benchmark against a stand-in of the app on the phone."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb
from coremltools.models.ml_program.experimental import perf_utils, remote_device

from laptop.benchmarks import ios
from laptop.benchmarks.computers import Computer
from laptop.benchmarks.devices import apples, device
from laptop.benchmarks.ios import Apple
from laptop.benchmarks.latency import BenchConfig, bench
from laptop.benchmarks.latency_section import _placements
from laptop.benchmarks.metering import Workload
from laptop.errors import BadInput, LaptopError, Unsupported
from laptop.export.places import Local

pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up")  # coremltools' own
UDID = "00008130-000A"
SHAPES = {"sample": (2, 4, 8, 8), "input_ids": (2, 7)}
FEW = BenchConfig(components=("unet",), rounds=2, iterations=6, seconds=0, warmup_s=0, team="A1B2")
NEURAL_ENGINE = type("MLNeuralEngineComputeDevice", (), {})()
PROCESSOR = type("MLCPUComputeDevice", (), {})()


def listed(state: str = "connected") -> dict[str, Any]:
    """What `devicectl list devices -j FILE` writes, of an iPhone and a watch."""
    phone = {
        "identifier": "1-2-3",
        "hardwareProperties": {"deviceType": "iPhone", "udid": UDID},
        "deviceProperties": {
            "name": "a phone",
            "osVersionNumber": "18.2",
            "osBuildUpdate": "22C152",
            "developerModeStatus": "enabled",
        },
        "connectionProperties": {"tunnelState": state},
    }
    watch = phone | {"hardwareProperties": {"deviceType": "appleWatch", "udid": "w"}}
    return {"result": {"devices": [phone, watch]}}


class Phone:
    """What coremltools asks of the app: loads in 30 ms, then 20; predictions take 5, 6, 7 … ms."""

    def __init__(self) -> None:
        self.loaded: list[Any] = []
        self.units: list[str] = []
        self.predictions = 0
        self.fails_at: int | None = None
        self.stopped = 0

    async def load(self, model: Any, device: Any) -> "Loaded":
        assert device.session is self.session
        self.units.append(model.compute_unit.name)
        loaded = Loaded(self, model.get_spec())
        self.loaded.append(loaded)
        return loaded

    @property
    def session(self) -> Any:
        return self

    def stop(self) -> None:
        self.stopped += 1


class Loaded:
    def __init__(self, phone: Phone, spec: Any):
        self.phone, self.spec = phone, spec
        self.load_duration_in_nano_seconds = (30 - 10 * len(phone.loaded)) * 1_000_000
        self.last_predict_duration_in_nano_seconds = 0

    def make_state_if_needed(self) -> None:
        return None

    async def predict(self, inputs: dict[str, Any], state: object) -> None:
        for wanted in self.spec.description.input:
            value = inputs[wanted.name]
            assert value.shape == tuple(wanted.type.multiArrayType.shape)
            assert value.dtype == (np.int32 if wanted.name == "input_ids" else np.float32)
        if self.phone.predictions == self.phone.fails_at:
            raise ConnectionError("the app is gone")
        self.last_predict_duration_in_nano_seconds = (5 + self.phone.predictions) * 1_000_000
        self.phone.predictions += 1

    async def retrieve_compute_plan(self) -> Any:
        return SimpleNamespace(
            model_structure=self.spec,
            get_compute_device_usage_for_mlprogram_operation=usage,
            get_estimated_cost_for_mlprogram_operation=cost,
        )

    async def unload(self) -> None:
        self.phone.loaded.remove(self)


def usage(operation: Any) -> Any:
    """Additions run on the neural engine, casts on the processor; constants nowhere."""
    places = {"add": NEURAL_ENGINE, "cast": PROCESSOR}
    where = places.get(operation.type)
    return where and SimpleNamespace(preferred_compute_device=where)


def cost(operation: Any) -> Any:
    return SimpleNamespace(weight=0.3 if operation.type == "add" else 0.1)


@pytest.fixture
def phone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Phone]:
    phone = Phone()
    monkeypatch.setattr(ios, "missing_programs", list)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    run = staticmethod(lambda command: listed())
    monkeypatch.setattr(remote_device._DeviceCtl, "_run_command", run)
    launch = lambda *_: phone.session  # noqa: E731
    monkeypatch.setattr(remote_device.Device, "_build_and_launch_model_runner_app", launch)
    benchmarker = perf_utils.MLModelBenchmarker
    monkeypatch.setattr(benchmarker, "_create_loaded_model", staticmethod(phone.load))
    structure = lambda model_structure: perf_utils.map_model_spec_to_path(model_structure)  # noqa: E731
    monkeypatch.setattr(perf_utils, "map_model_structure_to_path", structure)
    yield phone
    ios.prepared.cache_clear()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifacts folder with a U-Net that only adds."""
    specs = [
        mb.TensorSpec(SHAPES["sample"]),
        mb.TensorSpec(SHAPES["input_ids"], dtype=ct.converters.mil.mil.types.int32),
    ]

    @mb.program(input_specs=specs, opset_version=ct.target.iOS16)
    def program(sample, input_ids):
        text = mb.reduce_sum(x=mb.cast(x=input_ids, dtype="fp32"))
        return mb.add(x=mb.add(x=sample, y=sample), y=text)

    folder = tmp_path_factory.mktemp("artifacts")
    model = ct.convert(
        program,
        convert_to="mlprogram",
        compute_precision=ct.precision.FLOAT32,
        minimum_deployment_target=ct.target.iOS16,
        skip_model_load=True,
    )
    model.save(folder / "coreml" / "unet.mlpackage")
    row = {
        "target": "coreml",
        "component": "unet",
        "file": "coreml/unet.mlpackage",
        "precision": "fp16",
        "shapes": {name: list(shape) for name, shape in SHAPES.items()},
    }
    (folder / "artifacts.json").write_text(
        json.dumps({"schema": "laptop.artifacts/1", "artifacts": [row]})
    )
    return folder


def workload(package: Path, **changed: Any) -> Workload:
    source = str(package / "coreml/unet.mlpackage")
    return replace(Workload("a", "unet", "coreml", "coreml", source, SHAPES), **changed)


def test_a_probe_tells_phone_system_and_state(phone: Phone) -> None:
    facts = device(f"ios://{UDID}").probe()
    assert (facts.name, facts.os) == ("a phone", "iOS 18.2 (22C152)")
    assert facts.runtimes["coreml:ane"] == "Core ML of iOS 18.2"
    assert facts.state == "connected; developer mode enabled"
    assert apples() == [f"ios://{UDID}"], "a watch is none"


def test_bench_takes_the_times_that_the_phone_tells(
    phone: Phone, package: Path, tmp_path: Path
) -> None:
    out = tmp_path / "phone.json"
    bench({"model": package}, out, FEW, Apple(UDID, "A1B2"))
    (row,) = json.loads(out.read_text())["results"]
    # the first, one for the plan and three to warm up come before
    assert row["samples_ms"] == [10, 11, 12, 13, 14, 15]
    assert row["latency_ms"]["first"] == 5
    assert row["load_s"] == {"cold": 0.03, "warm": 0.02}
    assert row["conditions"]["runtime_version"] == "Core ML of iOS 18.2"
    assert row["placement"]["neural_engine"]["operations"] == pytest.approx(2 / 3)
    assert row["placement"]["neural_engine"]["cost"] == pytest.approx(6 / 7)
    assert row["placement"]["cpu"]["cost"] == pytest.approx(1 / 7)
    assert "neural engine 66.7 % of the operations, 85.7 % of their" in _placements([row])[0]
    assert phone.units == ["ALL", "ALL"]
    assert not phone.loaded, "nothing stays on the phone"


def test_a_runtime_names_the_compute_units(phone: Phone, package: Path, tmp_path: Path) -> None:
    config = replace(FEW, runtimes=("coreml:ane",))
    bench({"model": package}, tmp_path / "x.json", config, Apple(UDID, "A1B2"))
    assert set(phone.units) == {"CPU_AND_NE"}


def test_an_app_that_dies_is_an_error_that_says_when(phone: Phone, package: Path) -> None:
    with Apple(UDID, "A1B2").meter(workload(package), 1, 0) as meter:
        phone.fails_at = phone.predictions + 1
        with pytest.raises(LaptopError, match=r"predicting failed: ConnectionError: the app is"):
            meter.run_round(5, 0)
    assert not phone.loaded


@pytest.mark.parametrize(
    ("asked", "team", "said"),
    [
        ({}, "", r"must be signed. Set \[bench\] team"),
        ({"shapes": {"sample": (2, 4, 16, 16)}}, "A1B2", r"shape \(2, 4, 8, 8\); asked for is"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_app_is_built(
    phone: Phone, package: Path, asked: dict[str, Any], team: str, said: str
) -> None:
    with (
        pytest.raises(BadInput, match=said),
        Apple(UDID, team).meter(workload(package, **asked), 1, 0),
    ):
        pass
    assert not phone.units


def test_a_phone_that_is_not_connected_is_an_error_that_lists_those_that_are(
    phone: Phone, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LaptopError, match=rf"there is ios://{UDID} \(a phone\)"):
        Apple("another").probe()
    run = staticmethod(lambda command: listed("disconnected"))
    monkeypatch.setattr(remote_device._DeviceCtl, "_run_command", run)
    with pytest.raises(LaptopError, match="there is no device"):
        Apple(UDID).probe()


def test_elsewhere_it_is_refused_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ios.sys, "platform", "linux")
    monkeypatch.setattr(ios.shutil, "which", lambda program: None)
    with pytest.raises(Unsupported, match=r"a Mac \(this is not one\), Xcode, devicectl"):
        Apple(UDID).probe()
    assert apples() == []


def test_a_computer_times_no_packages(package: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds nothing that can be timed"):
        bench({"model": package}, tmp_path / "x.json", FEW, Computer(Local()))
