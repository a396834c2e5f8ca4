"""Measuring on an iPhone: coremltools' own benchmark against a stand-in of the app on the phone."""

import json
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import coremltools as ct
import pytest
from coremltools.converters.mil import Builder as mb
from coremltools.models.ml_program.experimental import async_wrapper, perf_utils, remote_device

from laptop.benchmarks.bench_report import BenchReport
from laptop.benchmarks.devices import ios, ios_app
from laptop.benchmarks.devices.addresses import device
from laptop.benchmarks.devices.computer import Computer
from laptop.benchmarks.devices.device import Workload
from laptop.benchmarks.devices.ios import Apple
from laptop.benchmarks.latency.bench import bench
from laptop.benchmarks.report.latency_section import _placements
from laptop.benchmarks.settings import BenchConfig
from laptop.errors import BadInput, LaptopError, Unsupported
from laptop.hosts.host import Local

pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up")  # coremltools' own
UDID = "00008130-000A"
SHAPES = {"sample": (2, 4, 8, 8), "input_ids": (2, 7)}
FEW = BenchConfig(components=("unet",), rounds=2, iterations=6, seconds=0, warmup_s=0)
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
    """`devicectl` and the app: loads take 30 ms, then 20; predictions 5, 6, 7 … ms."""

    def __init__(self) -> None:
        self.requests: dict[str, dict[str, Any]] = {}
        self.sizes: dict[str, int] = {}
        self.loaded: set[str] = set()
        self.most_loaded = 0
        self.units: list[str] = []
        self.predictions = 0
        self.looks = 1  # for an answer
        self.dies_at: int | None = None
        self.is_alive = True
        self.state = "connected"

    def run(self, command: str) -> dict[str, Any]:
        """What devicectl writes for a command."""
        words = shlex.split(command.removeprefix("xcrun "))
        given = dict(pairwise(words))
        match words[1:3]:
            case ["list", "devices"]:
                return listed(self.state)
            case ["device", "info"]:
                self.state = "connected"
            case ["device", "copy"] if words[3] == "to":
                source = Path(given["--source"])
                if source.name == "message.json":
                    message = json.loads(source.read_text())
                    self.requests[message["id"]] = message | {"looks": 0}
            case ["device", "copy"]:
                self.answer(given["--source"], Path(given["--destination"]))
            case _:
                raise AssertionError(command)
        return {"result": {"source": "s", "destination": "d"}}

    def answer(self, source: str, target: Path) -> None:
        request = self.requests[Path(source).parent.name]
        request["looks"] += 1
        if not self.is_alive or request["looks"] < self.looks:
            raise remote_device._DeviceCtlError("no such file", 1)
        if target.name != "message.json":
            target.write_bytes(bytes(4))
            return
        result = self.result(request["method"].partition(".")[2], request["params"])
        if result is None:
            raise remote_device._DeviceCtlError("no such file", 1)
        message = {"jsonrpc": "2.0", "id": request["id"], "result": result}
        if "outputs" in result:
            message["resource"] = "out.bin"
        target.write_text(json.dumps(message))

    def result(self, method: str, params: dict[str, Any]) -> dict[str, Any] | None:
        result = {"modelID": params["modelID"]}
        if method == "Load":
            self.units.append(params["computeUnits"])
            self.loaded.add(params["modelID"])
            self.most_loaded = max(self.most_loaded, len(self.loaded))
            result["duration"] = (40 - 10 * len(self.units)) * 1_000_000
        elif method == "Unload":
            self.loaded.remove(params["modelID"])
        else:
            assert method == "Prediction"
            assert params["modelID"] in self.loaded
            given = {name: (v["shape"], v["dataType"]) for name, v in params["inputs"].items()}
            assert given == {"sample": ([2, 4, 8, 8], "Float32"), "input_ids": ([2, 7], "Int32")}
            if self.predictions == self.dies_at:
                self.is_alive = False
                return None
            result["duration"] = (5 + self.predictions) * 1_000_000
            self.predictions += 1
            storage = {"offset": 0, "size": 4}
            y = {"shape": [1], "strides": [1], "dataType": "Float32", "storage": storage}
            result["outputs"] = {"y": y}
        return result

    # the process of `devicectl device process launch`

    def poll(self) -> int | None:
        return None if self.is_alive else 1

    def terminate(self) -> None:
        self.is_alive = False

    def communicate(self, timeout: float | None = None) -> None:
        assert not self.is_alive


async def plan(loaded: Any) -> Any:
    """The compute plan, which needs macOS to be read."""
    return SimpleNamespace(
        model_structure=loaded.spec_or_path,
        get_compute_device_usage_for_mlprogram_operation=usage,
        get_estimated_cost_for_mlprogram_operation=cost,
    )


def usage(operation: Any) -> Any:
    """Additions run on the neural engine, casts on the processor; constants nowhere."""
    places = {"add": NEURAL_ENGINE, "cast": PROCESSOR}
    where = places.get(operation.type)
    return where and SimpleNamespace(preferred_compute_device=where)


def cost(operation: Any) -> Any:
    return SimpleNamespace(weight=0.3 if operation.type == "add" else 0.1)


@pytest.fixture
def phone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Phone:
    phone = Phone()

    def launch(device: Any, build: Path, working: Path, *_: Any) -> Any:
        phone.is_alive = True
        info = remote_device._AppInstallationInfo("com.a1b2.laptop.modelrunner", "uuid")
        working.mkdir(exist_ok=True)
        return remote_device._AppSession(device, phone, info, working)

    def prepared(device: Any, folder: Path, working: Path, *more: Any) -> Any:
        session = launch(device, folder, working, *more)
        session.device = replace(device, session=session)
        return session

    monkeypatch.setattr(ios, "missing_programs", list)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(remote_device._DeviceCtl, "_run_command", staticmethod(phone.run))
    monkeypatch.setattr(remote_device.Device, "_build_and_launch_model_runner_app", prepared)
    compiled = lambda model, destination_path: Path(destination_path).mkdir()  # noqa: E731
    monkeypatch.setattr(async_wrapper, "compile_model", compiled)
    monkeypatch.setattr(async_wrapper.RemoteMLModelAsyncWrapper, "retrieve_compute_plan", plan)
    monkeypatch.setattr(
        perf_utils,
        "map_model_structure_to_path",
        lambda model_structure: perf_utils.map_model_spec_to_path(model_structure),
    )
    return phone


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
    assert ios.addresses() == [f"ios://{UDID}"], "a watch is none"


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
    assert (
        "neural engine 66.7 % of the operations, 85.7 % of their"
        in _placements(BenchReport.read(out).results)[0]
    )
    assert phone.units == ["ALL", "ALL"]
    assert phone.most_loaded == 1, "iOS ends apps that take much memory"
    assert not phone.loaded
    assert not phone.is_alive, "the app is ended"
    assert not list((tmp_path / ".cache/laptop/ios").rglob("*.json")), "what went to and fro"


def test_a_runtime_names_the_compute_units(phone: Phone, package: Path, tmp_path: Path) -> None:
    config = replace(FEW, runtimes=("coreml:ane",))
    bench({"model": package}, tmp_path / "x.json", config, Apple(UDID, "A1B2"))
    assert set(phone.units) == {"CPU_AND_NE"}


def test_two_models_share_the_app(phone: Phone, package: Path, tmp_path: Path) -> None:
    subjects = {"base": package, "new": package}
    bench(subjects, tmp_path / "x.json", FEW, Apple(UDID, "A1B2"))
    assert phone.most_loaded == 2
    assert not phone.loaded


def test_an_app_that_dies_is_an_error_that_says_when(phone: Phone, package: Path) -> None:
    with Apple(UDID, "A1B2").meter(workload(package), 1, 0) as meter:
        phone.dies_at = phone.predictions + 1
        with pytest.raises(LaptopError, match=r"running 'a' .*: the app there has ended"):
            meter.run_round(5, 0)
    phone.dies_at = None
    with Apple(UDID, "A1B2").meter(workload(package), 0, 0) as meter:
        assert len(meter.run_round(2, 0).samples_ms) == 2, "a new app"


def test_an_answer_may_take_long(
    phone: Phone, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phone.looks = 25  # coremltools gives up after 20
    monkeypatch.setattr(ios_app, "POLL_S", 0.01)
    with Apple(UDID, "A1B2").meter(workload(package), 0, 0) as meter:
        assert meter.ready.cold_s == 0.03
        phone.looks = 1


def test_without_a_compute_plan_the_times_stay(
    phone: Phone, package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def refused(loaded: Any) -> None:
        raise ValueError("needs iOS 17.4")

    wrapper = async_wrapper.RemoteMLModelAsyncWrapper
    monkeypatch.setattr(wrapper, "retrieve_compute_plan", refused)
    with Apple(UDID, "A1B2").meter(workload(package), 0, 0) as meter:
        assert meter.ready.placement is None
        assert meter.ready.first_ms == 5
    assert "needs iOS 17.4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "team", "said"),
    [
        ({}, "", r"must be signed. Set \[devices\] team"),
        ({"shapes": {"sample": (2, 8, 4, 8)}}, "A1B2", r"takes sample of \[2, 4, 8, 8\]"),
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
    phone: Phone,
) -> None:
    with pytest.raises(LaptopError, match=rf"there is ios://{UDID} \(a phone, connected\)"):
        Apple("another").probe()


def test_devicectl_is_asked_to_connect(phone: Phone) -> None:
    phone.state = "disconnected"
    assert Apple(UDID).probe().name == "a phone"


def test_elsewhere_it_is_refused_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ios.sys, "platform", "linux")
    monkeypatch.setattr(ios.shutil, "which", lambda program: None)
    with pytest.raises(Unsupported, match=r"a Mac \(this is not one\), Xcode, devicectl"):
        Apple(UDID).probe()
    assert ios.addresses() == []


def test_a_computer_times_no_packages(package: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds nothing that can be timed"):
        bench({"model": package}, tmp_path / "x.json", FEW, Computer(Local()))
