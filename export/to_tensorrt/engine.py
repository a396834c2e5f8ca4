"""TensorRT engines, built where they run: by `trtexec` on this machine or on a board over ssh.

    python -m laptop.export.to_tensorrt.engine ARTIFACTS --device ssh://orin -o DIR

First a probe: which TensorRT, which GPU, how much memory. The graph is sent once (by its sha256),
the engine is built with that version's flags, and kept there under a key of graph, TensorRT, GPU
and flags; an engine whose key differs in anything is not used. A host keeps:

    ~/.cache/laptop/tensorrt/graphs/SHA256/     model.onnx, model.onnx_data
                             engines/KEY.plan   KEY.json: the key in full, sha256 of the engine
                             timing/            timing caches, by TensorRT and GPU

Everything else is in a temporary folder that is removed at the end, whatever happens.
"""

import argparse
import hashlib
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from laptop import files
from laptop.errors import BadInput, LaptopError
from laptop.export.arrays import Array, ArrayFunction
from laptop.export.artifact_list import read_list
from laptop.export.to_onnx import onnx_weights
from laptop.export.to_onnx.onnx_checks import check_file
from laptop.export.to_tensorrt import trtexec
from laptop.export.to_tensorrt.plan import check_graph, read_plan
from laptop.export.to_tensorrt.trtexec import BuildPlan, EngineKey, Gpu, Version
from laptop.files import lines, read_text
from laptop.hosts import commands, ssh
from laptop.hosts.host import Host, Local
from laptop.records import Record

HERE = Local()
CACHE = ".cache/laptop/tensorrt"
BUILD_S = 4 * 3600  # a U-Net of SDXL's size takes an hour on a small board
RUN_S = 600
PARITY = ("--warmUp=0", "--duration=0", "--iterations=1")
# Where JetPack, the SDK's archive and NVIDIA's containers put it, after PATH.
PROBE = """
for t in "$(command -v trtexec)" /usr/src/tensorrt/bin/trtexec /opt/tensorrt/bin/trtexec; do
  [ -x "$t" ] && break
done
echo "home $HOME"
[ -x "$t" ] && echo "trtexec $t"
smi=$(nvidia-smi --query-gpu=name,compute_cap,memory.free --format=csv,noheader,nounits 2>/dev/null)
echo "smi $(echo "$smi" | head -n 1)"
[ -r /proc/device-tree/model ] && echo "board $(tr -d '\\0' </proc/device-tree/model)"
awk '/^MemAvailable/ {print "available " $2}' /proc/meminfo
[ -x "$t" ] && { echo help; "$t" --help 2>&1; }
exit 0
"""


@dataclass(frozen=True)
class Board:
    """TensorRT and the GPU of a host."""

    home: str
    trtexec: str  # its path
    help: str  # what `trtexec --help` prints
    version: Version
    device: Gpu
    free_memory_bytes: int  # of the GPU, or of a board that shares it


@dataclass(frozen=True)
class Engine:
    """An engine in the cache of a host."""

    key: EngineKey
    path: str  # on the host
    is_new: bool  # built by this call
    plan: BuildPlan


@dataclass(frozen=True, kw_only=True)
class BuiltEngine(Record):
    """One engine in the report of the command."""

    component: str
    device: str
    key: EngineKey
    path: str  # on the device
    is_new: bool
    fetched: str | None  # its copy here


def probe(host: Host) -> Board:
    """Ask a host for its TensorRT and GPU; `LaptopError` where it has no trtexec or no GPU."""
    out, _, help_text = commands.checked(host, PROBE).partition("\nhelp\n")
    answers = dict(line.partition(" ")[::2] for line in lines(out))
    if "trtexec" not in answers:
        raise LaptopError(
            f"{host.name} has no trtexec on its PATH, in /usr/src/tensorrt/bin (JetPack) or in "
            "/opt/tensorrt/bin. Install TensorRT there: `sudo apt install tensorrt` on a Jetson."
        )
    device, free = _gpu(answers)
    if device is None:
        raise LaptopError(f"{host.name}: neither nvidia-smi nor the device tree names a GPU.")
    version = trtexec.read_version(help_text)
    trtexec.need_supported(version)
    return Board(answers["home"], answers["trtexec"], help_text, version, device, free)


def _gpu(answers: Mapping[str, str]) -> tuple[Gpu | None, int]:
    """The GPU and its free memory in bytes, from the answers to PROBE.

    On a Jetson nvidia-smi is missing, or prints neither capability nor memory, which is shared.
    """
    name, capability, memory = ([*map(str.strip, answers.get("smi", "").split(",")), "", ""])[:3]
    free = _number(memory) * 2**20 or _number(answers.get("available", "")) * 1024
    if "board" in answers and not capability.replace(".", "").isdigit():
        return Gpu(answers["board"].strip(), ""), free
    # Jetsons add a driver's name, which CUDA, and so trtexec, leaves out
    return (Gpu(name.removesuffix(" (nvgpu)"), capability) if name else None), free


def _number(text: str) -> int:
    """A whole number in an answer; 0 for anything else."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else 0


@cache
def is_here() -> bool:
    """Whether this machine can build and run engines."""
    try:
        probe(HERE)
    except LaptopError:
        return False
    return True


def build(host: Host, artifact: Path, board: Board | None = None) -> Engine:
    """The engine of an exported graph on a host, built unless it is in the cache.

    Raises `Unsupported` for operators or flags that its TensorRT does not take, `BadInput` where
    memory is short, each before anything is sent; `LaptopError` for what trtexec reports.
    """
    board = board or probe(host)
    plan = read_plan(artifact).plan
    check_graph(artifact, board.version)
    size, sha256 = graph_digest(artifact)
    flags = trtexec.build_flags(board.version, plan)
    key = EngineKey(sha256, str(board.version), *board.device, tuple(flags))
    engine = f"{board.home}/{CACHE}/engines/{key.digest}.plan"
    if is_there(host, engine, key):
        return Engine(key, engine, False, plan)
    _need_flags(host, board, trtexec.build_arguments(board.version, plan, "", "", ""))
    _need_memory(host, board, size)
    graph = _send(host, board, artifact, sha256)
    _build(host, board, plan, graph, engine, key)
    return Engine(key, engine, True, plan)


def graph_digest(artifact: Path) -> tuple[int, str]:
    """Bytes and sha256 of the graph with its weights, without its plan."""
    paths = [artifact, artifact.with_name(onnx_weights.DATA)]
    paths = [path for path in paths if path.exists()]
    digests = [files.sha256(path) for path in paths]
    joined = hashlib.sha256(" ".join(digests).encode()).hexdigest()
    return sum(path.stat().st_size for path in paths), digests[0] if len(paths) == 1 else joined


def has_graph(host: Host, home: str, artifact: Path) -> bool:
    """Whether a host has the graph, whole, from an earlier build."""
    _, digest = graph_digest(artifact)
    return commands.holds(host, _graph_files(artifact), f"{home}/{CACHE}/graphs/{digest}")


def is_there(host: Host, engine: str, key: EngineKey) -> bool:
    """Whether a host has an engine of exactly this key, whole."""
    key_file = shlex.quote(f"{engine.removesuffix('.plan')}.json")
    at = shlex.quote(engine)
    done = host.run(f"cat {key_file} && echo && sha256sum {at}", 600)
    if done.code:
        return False
    text, _, line = done.out.strip().rpartition("\n")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return False
    wanted = {"key": key.as_json(), "sha256": line.split()[0]}
    return isinstance(said, dict) and wanted.items() <= said.items()


def _need_flags(host: Host, board: Board, arguments: list[str]) -> None:
    if missing := trtexec.unlisted(arguments, board.help):
        raise trtexec.refused(f"{host.name}: trtexec --help", board.version, missing)


def _need_memory(host: Host, board: Board, graph_bytes: int) -> None:
    """Raise `BadInput` unless the GPU has memory for two copies of the weights and some kernels."""
    needed = 2 * graph_bytes
    if board.free_memory_bytes < needed:
        raise BadInput(
            f"{host.name}: building takes at least {needed / 1e9:.1f} GB of memory, twice the "
            f"graph; {board.free_memory_bytes / 1e9:.1f} GB are free. Close programs there (on a "
            "Jetson the desktop: `sudo systemctl isolate multi-user.target`), or prune more."
        )


def _send(host: Host, board: Board, artifact: Path, sha256: str) -> str:
    """The graph's path on the host, sent unless it is there already."""
    folder = f"{board.home}/{CACHE}/graphs/{sha256}"
    commands.send(host, _graph_files(artifact), folder)
    return f"{folder}/{artifact.name}"


def _graph_files(artifact: Path) -> dict[Path, str]:
    """A graph and its weights with their sha256."""
    paths = (artifact.with_name(onnx_weights.DATA), artifact)
    return {path: files.sha256(path) for path in paths if path.exists()}


def _build(
    host: Host, board: Board, plan: BuildPlan, graph: str, engine: str, key: EngineKey
) -> None:
    folder = f"{board.home}/{CACHE}"
    timing = f"{folder}/timing/{timing_file(board.device.name, board.version)}"
    commands.checked(host, f"mkdir -p {shlex.quote(folder)}/timing {shlex.quote(folder)}/engines")
    with commands.scratch(host) as scratch:
        built = f"{scratch}/engine.plan"
        arguments = trtexec.build_arguments(board.version, plan, graph, built, timing)
        command = [board.trtexec, *arguments]
        done = commands.run_long(host, f"{scratch}/build", command, BUILD_S)
        what = f"building {Path(graph).name} on {host.name}"
        if done.code:
            raise trtexec.failure(done.out, done.code, what)
        _check_log(done.out, board, what)
        sha256 = commands.checked(host, f"sha256sum {shlex.quote(built)}", 600).split()[0]
        content = json.dumps({"key": key.as_json(), "sha256": sha256})
        key_file = f"{engine.removesuffix('.plan')}.json"
        # the JSON goes last; a second call finds the engine moved
        commands.checked(
            host,
            f"[ ! -f {shlex.quote(built)} ] || mv {shlex.quote(built)} {shlex.quote(engine)}\n"
            f"printf %s {shlex.quote(content)} > {shlex.quote(key_file)}",
        )


def timing_file(*parts: object) -> str:
    """The name of a timing cache, made of what it depends on: a GPU, a TensorRT."""
    return "-".join("".join(c if c.isalnum() else "-" for c in str(p)) for p in parts) + ".cache"


def _check_log(log: str, board: Board, what: str) -> None:
    """Raise `LaptopError` unless trtexec names what was probed, because the key depends on it."""
    version, device = trtexec.read_version(log), trtexec.read_device(log)
    # a Jetson's device tree has another name for the GPU
    other = board.device.capability and device and device != board.device
    if version != board.version or other:
        raise LaptopError(
            f"{what}: probed were TensorRT {board.version} and {board.device}, but trtexec says "
            f"{version} and {device}. Is there more than one GPU? Set CUDA_VISIBLE_DEVICES."
        )


def fetch(host: Host, engine: Engine, folder: Path) -> Path:
    """Copy an engine and its key here; returns the engine's path."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{engine.key.digest}.plan"
    host.get(engine.path, target)
    files.write_json(target.with_suffix(".json"), {"key": engine.key.as_json()})
    return target


def compute(
    host: Host, board: Board, engine: Engine, inputs: Mapping[str, Array]
) -> dict[str, Array]:
    """The engine's outputs for these inputs, in float64, by --loadInputs and --exportOutput.

    Raises `BadInput` for inputs that do not fit, `LaptopError` for what trtexec reports.
    """
    arrays = raw(engine.plan, board.version, inputs)
    with commands.scratch(host) as scratch, tempfile.TemporaryDirectory() as here:
        names = {name: f"{scratch}/{i}.bin" for i, name in enumerate(arrays)}
        for name, array in arrays.items():
            local = Path(here) / "input.bin"
            local.write_bytes(array.tobytes())
            host.put(local, names[name])
        output = f"{scratch}/output.json"
        shapes = {name: array.shape for name, array in arrays.items()}
        arguments = trtexec.run_arguments(
            engine.plan, engine.path, names, shapes, output=output, extra=PARITY
        )
        _need_flags(host, board, arguments)
        done = commands.run_long(host, f"{scratch}/run", [board.trtexec, *arguments], RUN_S)
        if done.code:
            raise trtexec.failure(done.out, done.code, f"running an engine on {host.name}")
        host.get(output, Path(here) / "output.json")
        return trtexec.read_output(read_text(Path(here) / "output.json"))


def raw(plan: BuildPlan, version: Version, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs in the order and types of the bindings."""
    if set(inputs) != set(plan.inputs):
        raise BadInput(
            f"the engine takes {', '.join(plan.inputs)}; given are {', '.join(inputs)}. Pass the "
            "model that it was exported from."
        )
    arrays = {}
    for name, tensor in plan.inputs.items():
        array = np.ascontiguousarray(inputs[name], trtexec.raw_type(tensor.dtype, version))
        array = array.reshape(np.shape(inputs[name]))
        shape: tuple[int, ...] = array.shape
        fits = len(shape) == len(tensor.shape) and all(
            wanted in (-1, size) for size, wanted in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            raise BadInput(f"{name} has shape {array.shape}; the engine takes {tensor.shape}.")
        arrays[name] = array
    return arrays


def load(host: Host, artifact: Path) -> ArrayFunction:
    """The graph as an engine on a host, built on the way."""
    board = probe(host)
    engine = build(host, artifact, board)
    return lambda inputs: compute(host, board, engine, inputs)


def build_all(folder: Path, host: Host, out: Path | None = None) -> list[BuiltEngine]:
    """Build every TensorRT graph in an artifacts folder; fetch the engines into `out` if given."""
    artifacts = [a for a in read_list(folder).artifacts if a.target == "tensorrt"]
    if not artifacts:
        raise BadInput(f"{folder} has no TensorRT graphs; export with --to tensorrt.")
    board, built = probe(host), []
    for artifact in artifacts:
        check_file(folder / artifact.file)
        engine = build(host, folder / artifact.file, board)
        local = fetch(host, engine, out / artifact.component) if out else None
        built.append(
            BuiltEngine(
                component=artifact.component,
                device=host.name,
                key=engine.key,
                path=engine.path,
                is_new=engine.is_new,
                fetched=str(local) if local else None,
            )
        )
    return built


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build engines of TensorRT graphs; prints JSON.")
    parser.add_argument("folder", type=Path, help="The artifacts' folder.")
    parser.add_argument("--device", default="local", help="local or ssh://[user@]host[:port].")
    parser.add_argument("-o", dest="out", type=Path, help="Fetch the engines into this folder.")
    flags = parser.parse_args()
    try:
        engines = build_all(flags.folder, ssh.host_at(flags.device), flags.out)
    except LaptopError as e:
        sys.exit(f"Error: {e}")
    print(json.dumps([engine.as_json() for engine in engines], indent=2))
