"""What the runners for Android print, as documents show it, and how they are called."""

from pathlib import Path

import pytest

from laptop.benchmarks.devices import android_runners
from laptop.errors import BadInput, LaptopError
from support.phone_workloads import SHAPES, graph, of_onnx

# learn.arm.com, performance_onnxruntime_kleidiai_sme2, on a VIVO X300
PERF_TEST = """Setting intra_op_num_threads to 1
Disabling intra-op thread spinning between runs
Session creation time cost: 0.217932 s
First inference time cost: 196 ms
Total inference time cost: 0.49481 s
Total inference requests: 5
Average inference time cost total: 98.961997 ms
Total inference run time: 0.494854 s
Number of inferences per second: 10.104
Avg CPU usage: 11 %
Peak working set size: 271122432 bytes
"""
RESULT = "a,b,0.0958204,271122432,11,0\na,b,0.101519,271122432,11,1\na,b,1e-05,271122432,11,2\n"
# as executor_runner's log stands in public documents: of 2026, of 2025, of 2024
NEW_LOG = """I 00:00:05.833558 executorch:executor_runner.cpp:564] Model loaded in 4463.268273 ms.
I 00:00:06.075611 executorch:executor_runner.cpp:705] Iteration 1 of 2: 241.944288 ms
I 00:00:06.175611 executorch:executor_runner.cpp:705] Iteration 2 of 2: 100.5 ms
I 00:00:06.175701 executorch:executor_runner.cpp:714] Model executed successfully 2 time(s) in 342.444288 ms.
VmHWM:\t   20480 kB
"""  # noqa: E501
SUM_LOG = """I 00:00:00.051509 executorch:executor_runner.cpp:218] Model file model.pte is loaded.
I 00:00:00.091459 executorch:executor_runner.cpp:340] Model executed successfully 4 time(s) in 12.5 ms.
"""  # noqa: E501
OLD_LOG = """I 00:00:00.000526 executorch:executor_runner.cpp:82] Model file add.pte is loaded.
I 00:00:00.000764 executorch:executor_runner.cpp:180] Model executed successfully.
"""


def test_times_of_onnx_runtime_are_raw_and_without_the_first() -> None:
    call = android_runners.read_perf_test(PERF_TEST, RESULT)
    assert call.samples_ms == pytest.approx((95.8204, 101.519, 0.01))
    assert (call.load_s, call.first_ms, call.peak_bytes) == (0.217932, 196, 271122432)


@pytest.mark.parametrize("time", ["nan", "inf", "soon"])
def test_times_that_are_none_are_an_error(time: str) -> None:
    with pytest.raises(LaptopError, match="gave no times"):
        android_runners.read_perf_test("log", f"model,{time},1,1,0\n")


def test_onnx_runtime_without_times_is_an_error_that_quotes_it() -> None:
    with pytest.raises(LaptopError, match="gave no times: Run failed:no such model"):
        android_runners.read_perf_test("using CPU\nRun failed:no such model\nbye\n", "")


def test_times_of_executorch_are_raw_where_it_tells_each() -> None:
    call = android_runners.read_executor_runner(NEW_LOG)
    assert call.samples_ms == (100.5,)
    assert call.is_raw
    assert (call.load_s, call.first_ms) == (4.463268273, 241.944288)
    assert call.peak_bytes == 20480 * 1024


def test_a_sum_of_executorch_is_one_sample_and_no_raw_one() -> None:
    call = android_runners.read_executor_runner(SUM_LOG)
    assert call.samples_ms == (3.125,)
    assert not call.is_raw
    assert call.first_ms is None


@pytest.mark.parametrize("log", [OLD_LOG, "Output 0: tensor(sizes=[1], [2.])\n", ""])
def test_executorch_without_times_is_an_error_that_says_how_to_build_it(log: str) -> None:
    with pytest.raises(LaptopError, match=r"ENABLE_LOGGING=ON and EXECUTORCH_PAL_DEFAULT=posix"):
        android_runners.read_executor_runner(log)


def test_named_dimensions_of_a_graph_are_those_of_the_wanted_shapes(tmp_path: Path) -> None:
    found = android_runners.free_dimensions(graph(tmp_path), SHAPES)
    assert found == {"batch_size": 2, "height": 16, "width": 24, "sequence_length": 7}


@pytest.mark.parametrize(
    ("batch", "shapes"),
    [
        (1, SHAPES),
        (None, SHAPES),  # unnamed: the runner makes it 1
        ("batch_size", SHAPES | {"encoder_hidden_states": (3, 7, 8)}),
        ("batch_size", {"sample": (2, 4, 16)}),
    ],
)
def test_shapes_that_a_graph_does_not_take_are_refused(
    tmp_path: Path, batch: int | str | None, shapes: dict[str, tuple[int, ...]]
) -> None:
    with pytest.raises(BadInput, match="with the shapes that it was exported with"):
        android_runners.free_dimensions(graph(tmp_path, batch=batch), shapes)


@pytest.mark.parametrize("runtime", ["tensorrt", "pytorch", "onnxruntime:cuda"])
def test_a_runtime_that_android_has_not_is_refused(tmp_path: Path, runtime: str) -> None:
    with pytest.raises(BadInput, match=r"known.*: .*(onnxruntime, executorch|cpu, xnnpack)"):
        android_runners.runner_of(of_onnx(tmp_path, runtime=runtime))


def test_a_provider_is_passed_on(tmp_path: Path) -> None:
    workload = of_onnx(graph(tmp_path), runtime="onnxruntime:qnn")
    assert android_runners.runner_of(workload).options(workload)[5:7] == ["-e", "qnn"]


def test_the_page_that_errors_name_is_there() -> None:
    text = (Path(__file__).parents[3] / android_runners.PAGE).read_text()
    assert all(runner.program in text for runner in android_runners.RUNNERS.values())
