"""A stand-in for trtexec: strict about flags as each version is, computing with ONNX Runtime.

    standin_trtexec.py --standin=10.3.0,Orin,8.7[,SECONDS] ARGUMENTS OF TRTEXEC

It parses as NVIDIA's samples/common/sampleOptions.cpp does: each known flag is taken out, what is
left is an unknown option, the help goes to standard output, the exit code is 1. Its "engine" is the
graph with the GPU and version that it was built for, and is refused by any other.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

# Flags with their value's placeholder; "" where they take none. From `trtexec --help` of 8.4 and
# 10.6 and the sources of 8.6 and 10.x.
ALWAYS = {
    **dict.fromkeys(("--onnx", "--saveEngine", "--loadEngine", "--timingCacheFile"), "<file>"),
    **dict.fromkeys(("--minShapes", "--optShapes", "--maxShapes", "--shapes"), "spec"),
    **dict.fromkeys(("--inputIOFormats", "--outputIOFormats", "--memPoolSize"), "spec"),
    **dict.fromkeys(("--loadInputs", "--percentile", "--profilingVerbosity"), "spec"),
    **dict.fromkeys(("--iterations", "--warmUp", "--duration", "--avgRuns", "--device"), "N"),
    **dict.fromkeys(("--sleepTime", "--idleTime", "--avgTiming"), "N"),
    **dict.fromkeys(("--exportTimes", "--exportOutput", "--exportProfile"), "<file>"),
    **dict.fromkeys(("--noTF32", "--refit", "--verbose", "--dumpOutput", "--dumpProfile"), ""),
    **dict.fromkeys(("--useSpinWait", "--useCudaGraph", "--noDataTransfers", "--threads"), ""),
    **dict.fromkeys(("--skipInference", "--buildOnly", "--help", "--separateProfileRun"), ""),
    "--builderOptimizationLevel": "N",
}
PRECISION = dict.fromkeys(("--fp16", "--int8", "--fp8", "--best"), "")
VERSIONS = {
    8: {**ALWAYS, **PRECISION, "--workspace": "N", "--maxBatch": "N", "--minTiming": "N"},
    10: {**ALWAYS, **PRECISION, "--bf16": "", "--int4": "", "--stronglyTyped": ""},
    # --stronglyTyped is accepted and does nothing
    11: {**ALWAYS, "--stronglyTyped": ""},
}
MAGIC = b"stand-in engine\n"
INTEGERS_8 = {"tensor(int64)": np.int32}
TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


class Refused(Exception):
    """The real one prints this as an error and fails."""


def say(kind: str, text: str) -> None:
    """A line of the log; errors go to standard error."""
    stamp = time.strftime("%m/%d/%Y-%H:%M:%S")
    print(f"[{stamp}] [{kind}] {text}", file=sys.stderr if kind == "E" else sys.stdout, flush=True)


class Trtexec:
    def __init__(self, standin: str, arguments: list[str]):
        version, self.gpu, self.capability, *pause = standin.split(",")
        self.version = tuple(map(int, version.split(".")))
        self.pause = float(pause[0]) if pause else 0.0
        self.arguments = arguments
        major, minor, patch = self.version
        number = major * 1000 + minor * 100 + patch
        if major >= 10:
            number = major * 10000 + minor * 100 + patch
        self.banner = f"TensorRT.trtexec [TensorRT v{number}] # trtexec {' '.join(arguments)}"
        self.known = VERSIONS[major]

    def main(self) -> int:
        print(f"&&&& RUNNING {self.banner}", flush=True)
        if "--help" in self.arguments:
            self.help()
            return 0
        try:
            self.work(self.parse())
        except Refused as e:
            for line in str(e).splitlines():
                say("E", line)
            print(f"&&&& FAILED {self.banner}", flush=True)
            return 1
        print(f"&&&& PASSED {self.banner}", flush=True)
        return 0

    def help(self) -> None:
        for flag, value in self.known.items():
            print(f"  {flag + ('=' + value if value else ''):<34} ...")

    def parse(self) -> dict[str, str]:
        found, unknown = {}, []
        for argument in self.arguments:
            flag, _, value = argument.partition("=")
            if flag not in self.known or bool(value) != bool(self.known[flag]):
                unknown.append(f"Unknown option: {flag} {value}")
            found[flag] = value
        if unknown:
            self.help()
            raise Refused("\n".join(unknown))
        if "--loadEngine" in found and "--saveEngine" in found:
            raise Refused("Incompatible load and save engine options selected")
        if "--loadEngine" not in found and "--onnx" not in found:
            raise Refused("Model missing or format not recognized")
        return found

    def work(self, given: dict[str, str]) -> None:
        say("I", "=== Device Information ===")
        say("I", f"Selected Device: {self.gpu}")
        say("I", f"Compute Capability: {self.capability}")
        say("I", f"TensorRT version: {'.'.join(map(str, self.version))}")
        graph = self.load(given) if "--loadEngine" in given else self.build(given)
        if "--skipInference" in given or "--buildOnly" in given:
            say("I", "Skipped inference phase since --skipInference is added.")
            return
        self.infer(graph, given)

    def build(self, given: dict[str, str]) -> bytes:
        model = onnx.load(given["--onnx"])
        dynamic = [
            i.name
            for i in model.graph.input
            if not all(d.HasField("dim_value") for d in i.type.tensor_type.shape.dim)
        ]
        shapes = [f for f in ("--minShapes", "--optShapes", "--maxShapes") if f in given]
        if shapes and not dynamic:
            raise Refused(
                "Static model does not take explicit shapes since the shape of inference tensors "
                "will be determined by the model itself\nNetwork And Config setup failed"
            )
        for flag in shapes:
            if missing := set(dynamic) - set(read_spec(given[flag])):
                raise Refused(f"Missing dynamic dimensions of {', '.join(sorted(missing))}")
        has_half = any(i.data_type == onnx.TensorProto.FLOAT16 for i in model.graph.initializer)
        typed = self.version[0] >= 11 or "--stronglyTyped" in given
        if has_half and not typed and not {"--fp16", "--best"} & set(given):
            raise Refused(
                "[TRT] Error Code 4: Internal Error (fp16 precision has been set for a layer or "
                "layer output, but fp16 is not configured in the builder)\nEngine set up failed"
            )
        time.sleep(self.pause)
        if cache := given.get("--timingCacheFile"):
            say(
                "I",
                f"{'Loaded' if Path(cache).exists() else 'Could not read'} timing cache {cache}",
            )
            with Path(cache).open("a") as file:
                file.write(f"{self.gpu} {given['--onnx']}\n")
        head = {"gpu": self.gpu, "capability": self.capability, "version": self.version}
        engine = MAGIC + json.dumps(head).encode() + b"\n" + model.SerializeToString()
        if path := given.get("--saveEngine"):
            Path(path).write_bytes(engine)
        return model.SerializeToString()

    def load(self, given: dict[str, str]) -> bytes:
        try:
            content = Path(given["--loadEngine"]).read_bytes()
        except OSError:
            raise Refused(f"Error opening engine file: {given['--loadEngine']}") from None
        head, _, graph = content.removeprefix(MAGIC).partition(b"\n")
        said = json.loads(head)
        if tuple(said["version"]) != self.version:
            raise Refused(
                "[TRT] Error Code 1: Serialization (Version tag does not match. Note: Current "
                f"Version: {self.version}, Serialized Engine Version: {said['version']})\n"
                "Engine deserialization failed"
            )
        if said["gpu"] != self.gpu:
            raise Refused(
                "[TRT] Error Code 6: The engine plan file is generated on an incompatible device, "
                f"expecting compute {self.capability} got compute {said['capability']}, please "
                "rebuild.\nEngine deserialization failed"
            )
        return graph

    def infer(self, graph: bytes, given: dict[str, str]) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(graph, options, providers=providers)
        feed = self.feed(session, given)
        names = [o.name for o in session.get_outputs()]
        times = []
        for _ in range(int(given.get("--iterations", 10))):
            start = time.perf_counter()
            values = session.run(names, feed)
            times.append((start * 1e3, time.perf_counter() * 1e3))
        if path := given.get("--exportOutput"):
            Path(path).write_text(write_output(dict(zip(names, values, strict=True))))
        if path := given.get("--exportTimes"):
            Path(path).write_text(write_times(times))
        self.summary([end - start for start, end in times])

    def feed(self, session: onnxruntime.InferenceSession, given: dict[str, str]) -> dict:
        files = dict(pair.split(":") for pair in given.get("--loadInputs", "").split(",") if pair)
        shapes = read_spec(given.get("--shapes", ""))
        feed = {}
        for entry in session.get_inputs():
            shape = shapes.get(entry.name, entry.shape)
            shape = [1 if isinstance(d, str) else d for d in shape]
            dtype = np.dtype(TYPES[entry.type])
            if entry.name not in files:
                feed[entry.name] = np.zeros(shape, dtype)
                continue
            stored = np.dtype(INTEGERS_8.get(entry.type, dtype) if self.version[0] == 8 else dtype)
            content = Path(files.pop(entry.name)).read_bytes()
            if len(content) != stored.itemsize * int(np.prod(shape)):
                raise Refused(f"{entry.name}: {len(content)} bytes do not fill {shape} of {stored}")
            feed[entry.name] = np.frombuffer(content, stored).reshape(shape).astype(dtype)
        if files:
            raise Refused(f"Cannot find input tensor with name {', '.join(files)}")
        return feed

    def summary(self, ms: list[float]) -> None:
        say("I", "=== Performance summary ===")
        say("I", f"Throughput: {1000 * len(ms) / sum(ms):.6g} qps")
        for name in ("Latency", "GPU Compute Time"):
            low, high, mean, median = min(ms), max(ms), np.mean(ms), np.median(ms)
            tail = ", ".join(f"percentile({p}%) = {np.percentile(ms, p):.6g} ms" for p in (90, 99))
            bounds = f"min = {low:.6g} ms, max = {high:.6g} ms, mean = {mean:.6g} ms"
            say("I", f"{name}: {bounds}, median = {median:.6g} ms, {tail}")


def read_spec(text: str) -> dict[str, tuple[int, ...]]:
    pairs = [item.split(":") for item in text.split(",") if item]
    return {k: tuple(int(d) for d in v.split("x") if d.isdigit()) for k, v in pairs}


def write_output(values: dict) -> str:
    """As sampleReporting.cpp's exportJSONOutput, six digits and C++'s nan."""
    rows = []
    for name, value in values.items():
        numbers = " , ".join(f"{v:.6g}" for v in value.ravel().tolist())
        rows.append(
            f'{{ "name" : "{name}"\n  , "dimensions" : "{"x".join(map(str, value.shape))}"\n'
            f'  , "values" : [ {numbers} ]\n  }}'
        )
    return "[\n  " + "\n, ".join(rows) + "\n]\n"


def write_times(times: list[tuple[float, float]]) -> str:
    """As exportJSONTrace from 8.5 on."""
    rows = []
    for start, end in times:
        keys = {
            **{"startEnqMs": start, "endEnqMs": start, "startH2dMs": start, "endH2dMs": start},
            **{"startComputeMs": start, "endComputeMs": end, "startD2hMs": end, "endD2hMs": end},
            **{"h2dMs": 0, "computeMs": end - start, "d2hMs": 0, "latencyMs": end - start},
        }
        rows.append("{ " + ", ".join(f'"{k}" : {v:.6g}' for k, v in keys.items()) + " }")
    return "[\n  " + "\n, ".join(rows) + "\n]\n"


if __name__ == "__main__":
    standin = sys.argv[1].removeprefix("--standin=")
    sys.exit(Trtexec(standin, sys.argv[2:]).main())
