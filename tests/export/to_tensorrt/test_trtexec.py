"""trtexec's flags and output by version, on the forms that NVIDIA's sources and logs show."""

from dataclasses import replace

import numpy as np
import pytest

from laptop.errors import BadInput, LaptopError, Unsupported
from laptop.export.to_tensorrt import trtexec
from laptop.export.to_tensorrt.trtexec import BuildPlan, EngineKey, Tensor, Version

V8, V10, V11 = Version(8, 6, 2), Version(10, 3, 0), Version(11, 1, 0)
STATIC = BuildPlan(
    "fp16",
    {"sample": Tensor("FLOAT16", (2, 4, 64, 64)), "timestep": Tensor("FLOAT", ())},
    {"out_sample": Tensor("FLOAT16", (2, 4, 64, 64))},
)
DYNAMIC = replace(
    STATIC,
    inputs={**STATIC.inputs, "sample": Tensor("FLOAT16", (-1, 4, 64, 64))},
    profile={"sample": ((2, 4, 64, 64), (2, 4, 64, 64), (8, 4, 64, 64))},
)
KEY = EngineKey("ab12", "10.3.0", "Orin", "8.7", ("--stronglyTyped",))
# NVIDIA/TensorRT issue 4177 (10.x); 8.4 and earlier print one percentile and End-to-End
OUTPUT = """[
  { "name" : "out_sample"
  , "dimensions" : "1x2x2"
  , "values" : [ 0.5, -nan, 1.5e-05, -inf ]
  }
, { "name" : "info"
  , "dimensions" : ""
  , "values" : [ 3 ]
  }
]
"""


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8602] # trtexec --help", (8, 6, 2)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8412] # trtexec --help", (8, 4, 12)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec", (10, 3, 0)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v101501] [b29] # trtexec", (10, 15, 1)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v110000] [b114] # trtexec", (11, 0, 0)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v11.1.0.106] [b48] # trtexec", (11, 1, 0)),
        ("[09/25/2026-10:00:00] [I] TensorRT version: 11.2.1", (11, 2, 1)),
        ("ii  libnvinfer-bin  10.3.0.30-1+cuda12.5  arm64  TensorRT binaries", (10, 3, 0)),
        ("ii  libnvinfer8     8.6.2.3-1+cuda12.2    arm64  TensorRT runtime", (8, 6, 2)),
        ("10.13.3.9", (10, 13, 3)),
    ],
)
def test_a_version_is_read_wherever_it_is_written(text: str, version: tuple[int, ...]) -> None:
    assert trtexec.read_version(text) == version


def test_what_is_no_trtexec_is_an_error_that_quotes_it() -> None:
    with pytest.raises(BadInput, match="no TensorRT version in 'bash: trtexec: command not found'"):
        trtexec.read_version("bash: trtexec: command not found\n")


def test_a_version_without_layer_normalization_is_refused() -> None:
    trtexec.need_supported(V8)
    with pytest.raises(Unsupported, match=r"TensorRT 8\.5\.2 is too old: 8\.6 or later"):
        trtexec.need_supported(Version(8, 5, 2))


@pytest.mark.parametrize(
    ("version", "fp16", "fp32"),
    [
        (V8, ["--fp16"], ["--noTF32"]),
        (Version(9, 2, 0), ["--stronglyTyped"], ["--stronglyTyped", "--noTF32"]),
        (V10, ["--stronglyTyped"], ["--stronglyTyped", "--noTF32"]),
        (V11, [], ["--noTF32"]),
    ],
)
def test_each_version_gets_the_precision_flags_that_it_takes(
    version: Version, fp16: list[str], fp32: list[str]
) -> None:
    assert trtexec.precision_flags(version, "fp16") == fp16
    assert trtexec.precision_flags(version, "fp32") == fp32


@pytest.mark.parametrize("version", [V8, V10, V11])
def test_a_static_graph_gets_no_shapes(version: Version) -> None:
    flags = trtexec.build_arguments(version, STATIC, "m.onnx", "e.plan", "t.cache")
    assert flags[:3] == ["--onnx=m.onnx", "--saveEngine=e.plan", "--timingCacheFile=t.cache"]
    assert flags[-1] == "--skipInference"
    assert not [flag for flag in flags if "hapes" in flag]


def test_a_profile_has_three_bounds_and_a_run_says_its_shape() -> None:
    plan = replace(DYNAMIC, optimization_level=4, workspace_mib=2048)
    assert trtexec.build_flags(V10, plan) == [
        "--stronglyTyped",
        "--minShapes=sample:2x4x64x64",
        "--optShapes=sample:2x4x64x64",
        "--maxShapes=sample:8x4x64x64",
        "--builderOptimizationLevel=4",
        "--memPoolSize=workspace:2048",
    ]
    shapes = {"sample": (4, 4, 64, 64), "timestep": ()}
    files = {"sample": "s.bin", "timestep": "t.bin"}
    assert trtexec.run_arguments(
        plan, "e.plan", files, shapes, output="o.json", times="t.json"
    ) == [
        "--loadEngine=e.plan",
        "--shapes=sample:4x4x64x64",
        "--loadInputs=sample:s.bin,timestep:t.bin",
        "--exportOutput=o.json",
        "--exportTimes=t.json",
    ]
    assert "--shapes" not in " ".join(trtexec.run_arguments(STATIC, "e.plan", files, shapes))


def test_a_dynamic_scalar_is_written_as_the_help_says() -> None:
    profile = {"timestep": ((), (), ())}
    flags = trtexec.build_flags(V10, replace(STATIC, profile=profile))
    assert "--optShapes=timestep:scalar" in flags


def test_flags_that_the_help_of_this_trtexec_does_not_list_are_found() -> None:
    listed = "  --onnx=<file>   ONNX model\n  --fp16   Enable fp16 precision\n"
    arguments = ["--onnx=a.onnx", "--fp16", "--fp1", "--stronglyTyped"]
    assert trtexec.unlisted(arguments, listed) == ["--fp1", "--stronglyTyped"]


def test_int64_inputs_are_int32_bindings_before_9() -> None:
    assert trtexec.raw_type("INT64", V8) == np.int32
    assert trtexec.raw_type("INT64", V10) == np.int64
    assert trtexec.raw_type("FLOAT16", V8) == np.float16


def test_outputs_are_read_with_what_json_has_not() -> None:
    found = trtexec.read_output(OUTPUT)
    expected = [[[0.5, np.nan], [1.5e-5, -np.inf]]]
    np.testing.assert_array_equal(found["out_sample"], expected)
    assert found["info"].shape == ()
    assert found["info"] == 3
    with pytest.raises(BadInput, match="--exportOutput wrote something else"):
        trtexec.read_output(OUTPUT.replace("1x2x2", "1x2x3"))


def test_the_gpu_is_read_from_a_log() -> None:
    log = "[I] Selected Device: Orin\n[I] Compute Capability: 8.7\n[I] SMs: 16\n"
    assert trtexec.read_device(log) == ("Orin", "8.7")
    assert trtexec.read_device("[E] Unknown option: --fp16") is None


def test_a_refused_flag_and_other_failures_say_what_trtexec_said() -> None:
    banner = "&&&& RUNNING TensorRT.trtexec [TensorRT v110201] [b3] # trtexec --fp16\n"
    error = trtexec.failure(
        f"{banner}[09/25/2026] [E] Unknown option: --fp16 \n", 1, "unet on orin"
    )
    assert isinstance(error, Unsupported)
    assert "unet on orin: this trtexec (TensorRT 11.2.1) does not know --fp16" in str(error)
    log = (
        "[E] [TRT] ITensor::getDimensions: Error Code 4: API Usage Error (/Sub: "
        "ElementWiseOperation SUB must have same input types.)\n[E] Engine set up failed\n"
    )
    error = trtexec.failure(banner + log, 1, "unet")
    assert "must have same input types" in str(error)
    assert "exit code 1" in str(error)
    assert type(error) is LaptopError


@pytest.mark.parametrize(
    "other",
    [
        {"onnx_sha256": "ab13"},
        {"tensorrt": "10.3.1"},
        {"gpu": "Orin Nano"},
        {"capability": "8.9"},
        {"flags": ("--stronglyTyped", "--builderOptimizationLevel=5")},
    ],
)
def test_an_engine_of_anything_else_has_another_key(other: dict[str, object]) -> None:
    assert replace(KEY, **other).digest != KEY.digest  # type: ignore[arg-type]
    assert replace(KEY).digest == KEY.digest
