"""Stand-ins for ONNX Runtime's and ExecuTorch's runners, in the manner of their sources.

    onnxruntime_perf_test   computes with ONNX Runtime; strict about flags; times of real inferences
    executor_runner         sleeps as many ms as the program's first word says; its second word:
                            new (a line for each inference), old (their sum), silent (no log), short
                            of memory (fails)

Which one it is, is told by the name that it is called by. Each call's arguments go to a file
`calls` in TMPDIR.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

PERF_TEST_FLAGS = {"-I": 0, **dict.fromkeys(("-S", "-x", "-e", "-i", "-m", "-r", "-f"), 1)}


def note(**what: Any) -> None:
    with Path(os.environ["TMPDIR"], "calls").open("a") as file:
        file.write(json.dumps({"program": Path(sys.argv[0]).name, **what}) + "\n")


def perf_test(arguments: list[str]) -> int:
    given: dict[str, list[str]] = {}
    while arguments[0].startswith("-"):
        flag = arguments.pop(0)
        if flag not in PERF_TEST_FLAGS:
            print("See 'onnxruntime_perf_test --help'.", file=sys.stderr)
            return 255
        given.setdefault(flag, []).extend(arguments.pop(0) for _ in range(PERF_TEST_FLAGS[flag]))
    model, result = arguments
    if given["-m"] != ["times"] or "-I" not in given or not Path(model).is_file():
        print("Run failed:bad arguments", flush=True)
        return 255
    return _measure(given, model, Path(result))


def _measure(given: dict[str, list[str]], model: str, result: Path) -> int:
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = int(given["-x"][0])
    for name, size in (text.split(":") for text in given.get("-f", [])):
        options.add_free_dimension_override_by_name(name, int(size))
    start = time.perf_counter()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    load_s = time.perf_counter() - start
    shapes = {
        i.name: [d if isinstance(d, int) else 1 for d in i.shape] for i in session.get_inputs()
    }
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    feed = {i.name: np.zeros(shapes[i.name], types[i.type]) for i in session.get_inputs()}
    note(given=given, shapes=shapes, libraries=os.environ.get("LD_LIBRARY_PATH"))
    seconds = []
    for _ in range(1 + int(given["-r"][0])):
        start = time.perf_counter()
        session.run(None, feed)
        seconds.append(time.perf_counter() - start)
    first, *others = seconds
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    name = Path(model).parent.name
    with result.open("a") as file:
        file.writelines(f"{name},{s:.6g},{peak},50,{i}\n" for i, s in enumerate(others))
    print(f"Setting intra_op_num_threads to {given['-x'][0]}")
    print(f"Session creation time cost: {load_s:.6g} s")
    print(f"First inference time cost: {1000 * first:.0f} ms")
    print(f"Total inference time cost: {sum(others):.6g} s")
    print(f"Total inference requests: {len(others)}")
    print(f"Peak working set size: {peak} bytes")
    return 0


def executor_runner(arguments: list[str]) -> int:
    flags = dict(argument.removeprefix("--").split("=") for argument in arguments)
    if unknown := set(flags) - {"model_path", "num_executions", "cpu_threads"}:
        print(f"ERROR: unknown command line flag '{unknown.pop()}'", file=sys.stderr)
        return 1
    ms, kind = Path(flags["model_path"]).read_text().split()
    times = int(flags["num_executions"])
    note(flags=flags)
    if kind == "once":  # of a version that does not know the flag
        times = 1
    if kind == "short":
        log("E", "Memory allocation failed: 4194304B requested (adjusted for alignment)")
        return 134
    log("I", f"Model file {flags['model_path']} is loaded.", kind)
    if kind == "new":
        log("I", "Model loaded in 44.63 ms.")
    for i in range(times):
        time.sleep(float(ms) / 1000)
        if kind == "new":
            log("I", f"Iteration {i + 1} of {times}: {float(ms) + (100 if i == 0 else 0):f} ms")
    total_ms = float(ms) * times + 100
    log("I", f"Model executed successfully {times} time(s) in {total_ms:f} ms.", kind)
    print("OutputX 0: tensor(sizes=[1], [2.])")
    return 0


def log(level: str, text: str, kind: str = "") -> None:
    if kind != "silent":
        print(f"{level} 00:00:00.000526 executorch:executor_runner.cpp:82] {text}", file=sys.stderr)


if __name__ == "__main__":
    run = {"onnxruntime_perf_test": perf_test, "executor_runner": executor_runner}
    sys.exit(run[Path(sys.argv[0]).name](sys.argv[1:]))
