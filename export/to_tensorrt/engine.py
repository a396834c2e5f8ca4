"""TensorRT engines, built where they run: by `trtexec` on this machine or on a board over ssh.

    python -m laptop.export.to_tensorrt.engine ARTIFACTS --device ssh://orin -o DIR

First a probe: which TensorRT, which GPU, how much memory. The graph is sent once (by its sha256),
the engine is built with that version's flags, and kept there under a key of graph, TensorRT, GPU
and flags; an engine whose key differs in anything is not used. What a place keeps:

    ~/.cache/laptop/tensorrt/graphs/SHA256/     model.onnx, model.onnx_data
                             engines/KEY.plan   KEY.json: the key in full, sha256 of the engine
                             timing/            timing caches, by TensorRT and GPU

Everything else lies in a temporary folder that is removed at the end, whatever happens.
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
from typing import Any

import numpy as np

from laptop import files
from laptop.errors import BadInput, LaptopError
from laptop.export.arrays import Array, ArrayFunction
from laptop.export.artifact_list import read_list
from laptop.export.to_onnx import onnx_weights
from laptop.export.to_onnx.onnx_checks import check_file
from laptop.export.to_tensorrt import trtexec
from laptop.export.to_tensorrt.plan import check_graph, read_plan
from laptop.export.to_tensorrt.trtexec import BuildPlan, Device, EngineKey, Version
from laptop.files import lines, read_text
from laptop.hosts import commands, ssh
from laptop.hosts.host import Host, Local

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
    """What a probe found."""

    home: str
    trtexec: str  # its path
    help: str  # what `trtexec --help` prints
    version: Version
    device: Device
    free_memory_bytes: int  # of the GPU, or of a board that shares it


@dataclass(frozen=True)
class Engine:
    """An engine and where it lies."""

    key: EngineKey
    path: str  # at its place
    is_new: bool  # built by this call
    plan: BuildPlan


def probe(where: Host) -> Board:
    """What is there; `LaptopError` where no trtexec or no GPU is."""
    out, _, help_text = commands.checked(where, PROBE).partition("\nhelp\n")
    found = dict(line.partition(" ")[::2] for line in lines(out))
    if "trtexec" not in found:
        raise LaptopError(
            f"{where.name} has no trtexec on its PATH, in /usr/src/tensorrt/bin (JetPack) or in "
            "/opt/tensorrt/bin. Install TensorRT there: `sudo apt install tensorrt` on a Jetson."
        )
    device, free = _gpu(found)
    if device is None:
        raise LaptopError(f"{where.name}: neither nvidia-smi nor the device tree names a GPU.")
    version = trtexec.read_version(help_text)
    trtexec.need_supported(version)
    return Board(found["home"], found["trtexec"], help_text, version, device, free)


def _gpu(found: Mapping[str, str]) -> tuple[Device | None, int]:
    """On a Jetson nvidia-smi is missing or tells neither capability nor memory, which is shared."""
    name, capability, memory = ([*map(str.strip, found.get("smi", "").split(",")), "", ""])[:3]
    free = _number(memory) * 2**20 or _number(found.get("available", "")) * 1024
    if "board" in found and not capability.replace(".", "").isdigit():
        return Device(found["board"].strip(), ""), free
    # Jetsons add a driver's name, which CUDA, and so trtexec, leaves out
    return (Device(name.removesuffix(" (nvgpu)"), capability) if name else None), free


def _number(text: str) -> int:
    """A whole number that a board tells; 0 for anything else."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else 0


@cache
def is_here() -> bool:
    """Whether this machine can build and run engines."""
    try:
        probe(HERE)
    except LaptopError:
        return False
    return True


def build(where: Host, artifact: Path, board: Board | None = None) -> Engine:
    """The engine of an exported graph at `where`, built unless it is there already.

    Raises `Unsupported` for operators or flags that its TensorRT does not take, `BadInput` where
    memory is short, each before anything is sent; `LaptopError` for what trtexec reports.
    """
    board = board or probe(where)
    plan = read_plan(artifact).plan
    check_graph(artifact, board.version)
    size, sha256 = graph_digest(artifact)
    flags = trtexec.build_flags(board.version, plan)
    key = EngineKey(sha256, str(board.version), *board.device, tuple(flags))
    engine = f"{board.home}/{CACHE}/engines/{key.digest}.plan"
    if is_there(where, engine, key):
        return Engine(key, engine, False, plan)
    _need_flags(where, board, trtexec.build_arguments(board.version, plan, "", "", ""))
    _need_memory(where, board, size)
    graph = _send(where, board, artifact, sha256)
    _build(where, board, plan, graph, engine, key)
    return Engine(key, engine, True, plan)


def graph_digest(artifact: Path) -> tuple[int, str]:
    """Bytes and sha256 of the graph with its weights, without the plan beside it."""
    paths = [artifact, artifact.with_name(onnx_weights.DATA)]
    found = [path for path in paths if path.exists()]
    digests = [files.sha256(path) for path in found]
    joined = hashlib.sha256(" ".join(digests).encode()).hexdigest()
    return sum(path.stat().st_size for path in found), digests[0] if len(found) == 1 else joined


def has_graph(where: Host, home: str, artifact: Path) -> bool:
    """Whether the graph lies there, whole, from an earlier build."""
    _, digest = graph_digest(artifact)
    return commands.holds(where, _graph_files(artifact), f"{home}/{CACHE}/graphs/{digest}")


def is_there(where: Host, engine: str, key: EngineKey) -> bool:
    """Whether an engine of exactly this key, whole, lies there."""
    beside = shlex.quote(f"{engine.removesuffix('.plan')}.json")
    at = shlex.quote(engine)
    found = where.run(f"cat {beside} && echo && sha256sum {at}", 600)
    if found.code:
        return False
    text, _, line = found.out.strip().rpartition("\n")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return False
    wanted = {"key": key.as_json(), "sha256": line.split()[0]}
    return isinstance(said, dict) and wanted.items() <= said.items()


def _need_flags(where: Host, board: Board, arguments: list[str]) -> None:
    if missing := trtexec.unlisted(arguments, board.help):
        raise trtexec.refused(f"{where.name}: trtexec --help", board.version, missing)


def _need_memory(where: Host, board: Board, graph_bytes: int) -> None:
    """TensorRT holds the weights twice while it builds, and tries kernels besides."""
    needed = 2 * graph_bytes
    if board.free_memory_bytes < needed:
        raise BadInput(
            f"{where.name}: building takes at least {needed / 1e9:.1f} GB of memory, twice the "
            f"graph; {board.free_memory_bytes / 1e9:.1f} GB are free. Close programs there (on a "
            "Jetson the desktop: `sudo systemctl isolate multi-user.target`), or prune more."
        )


def _send(where: Host, board: Board, artifact: Path, sha256: str) -> str:
    """The graph's path there, sent unless it is there already."""
    folder = f"{board.home}/{CACHE}/graphs/{sha256}"
    commands.send(where, _graph_files(artifact), folder)
    return f"{folder}/{artifact.name}"


def _graph_files(artifact: Path) -> dict[Path, str]:
    """A graph and its weights with their sha256."""
    paths = (artifact.with_name(onnx_weights.DATA), artifact)
    return {path: files.sha256(path) for path in paths if path.exists()}


def _build(
    where: Host, board: Board, plan: BuildPlan, graph: str, engine: str, key: EngineKey
) -> None:
    folder = f"{board.home}/{CACHE}"
    timing = f"{folder}/timing/{timing_file(board.device.name, board.version)}"
    commands.checked(where, f"mkdir -p {shlex.quote(folder)}/timing {shlex.quote(folder)}/engines")
    with commands.scratch(where) as scratch:
        made = f"{scratch}/engine.plan"
        arguments = trtexec.build_arguments(board.version, plan, graph, made, timing)
        command = [board.trtexec, *arguments]
        done = commands.run_long(where, f"{scratch}/build", command, BUILD_S)
        what = f"building {Path(graph).name} on {where.name}"
        if done.code:
            raise trtexec.failure(done.out, done.code, what)
        _check_log(done.out, board, what)
        sha256 = commands.checked(where, f"sha256sum {shlex.quote(made)}", 600).split()[0]
        content = json.dumps({"key": key.as_json(), "sha256": sha256})
        beside = f"{engine.removesuffix('.plan')}.json"
        # the JSON goes last; a second call finds the engine moved
        commands.checked(
            where,
            f"[ ! -f {shlex.quote(made)} ] || mv {shlex.quote(made)} {shlex.quote(engine)}\n"
            f"printf %s {shlex.quote(content)} > {shlex.quote(beside)}",
        )


def timing_file(*parts: object) -> str:
    """The name of a timing cache, of what it depends on: a GPU, a TensorRT."""
    return "-".join("".join(c if c.isalnum() else "-" for c in str(p)) for p in parts) + ".cache"


def _check_log(log: str, board: Board, what: str) -> None:
    """What trtexec says of itself must be what was probed: the key stands on it."""
    version, device = trtexec.read_version(log), trtexec.read_device(log)
    # a Jetson's device tree has another name for the GPU
    other = board.device.capability and device and device != board.device
    if version != board.version or other:
        raise LaptopError(
            f"{what}: probed were TensorRT {board.version} and {board.device}, but trtexec says "
            f"{version} and {device}. Is there more than one GPU? Set CUDA_VISIBLE_DEVICES."
        )


def fetch(where: Host, engine: Engine, folder: Path) -> Path:
    """Copy an engine and its key here; returns the engine's path."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{engine.key.digest}.plan"
    where.get(engine.path, target)
    files.write_json(target.with_suffix(".json"), {"key": engine.key.as_json()})
    return target


def compute(
    where: Host, board: Board, engine: Engine, given: Mapping[str, Array]
) -> dict[str, Array]:
    """The engine's outputs for these inputs, in float64, by --loadInputs and --exportOutput.

    Raises `BadInput` for inputs that do not fit, `LaptopError` for what trtexec reports.
    """
    arrays = raw(engine.plan, board.version, given)
    with commands.scratch(where) as scratch, tempfile.TemporaryDirectory() as here:
        names = {name: f"{scratch}/{i}.bin" for i, name in enumerate(arrays)}
        for name, array in arrays.items():
            local = Path(here) / "input.bin"
            local.write_bytes(array.tobytes())
            where.put(local, names[name])
        output = f"{scratch}/output.json"
        shapes = {name: array.shape for name, array in arrays.items()}
        arguments = trtexec.run_arguments(
            engine.plan, engine.path, names, shapes, output=output, extra=PARITY
        )
        _need_flags(where, board, arguments)
        done = commands.run_long(where, f"{scratch}/run", [board.trtexec, *arguments], RUN_S)
        if done.code:
            raise trtexec.failure(done.out, done.code, f"running an engine on {where.name}")
        where.get(output, Path(here) / "output.json")
        return trtexec.read_output(read_text(Path(here) / "output.json"))


def raw(plan: BuildPlan, version: Version, given: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs in the order and types of the bindings."""
    if set(given) != set(plan.inputs):
        raise BadInput(
            f"the engine takes {', '.join(plan.inputs)}; given are {', '.join(given)}. Pass the "
            "model that it was exported from."
        )
    arrays = {}
    for name, tensor in plan.inputs.items():
        array = np.ascontiguousarray(given[name], trtexec.raw_type(tensor.dtype, version))
        array = array.reshape(np.shape(given[name]))
        shape: tuple[int, ...] = array.shape
        fits = len(shape) == len(tensor.shape) and all(
            wanted in (-1, found) for found, wanted in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            raise BadInput(f"{name} has shape {array.shape}; the engine takes {tensor.shape}.")
        arrays[name] = array
    return arrays


def load(where: Host, artifact: Path) -> ArrayFunction:
    """The graph as an engine at `where`, built on the way: named arrays to named arrays."""
    board = probe(where)
    engine = build(where, artifact, board)
    return lambda given: compute(where, board, engine, given)


def build_all(folder: Path, where: Host, out: Path | None = None) -> list[dict[str, Any]]:
    """Engines of every TensorRT graph in an artifacts folder; fetched into `out` if given."""
    artifacts = [a for a in read_list(folder).artifacts if a.target == "tensorrt"]
    if not artifacts:
        raise BadInput(f"{folder} has no TensorRT graphs; export with --to tensorrt.")
    board, made = probe(where), []
    for artifact in artifacts:
        check_file(folder / artifact.file)
        engine = build(where, folder / artifact.file, board)
        local = fetch(where, engine, out / artifact.component) if out else None
        made.append(
            {
                "component": artifact.component,
                "device": where.name,
                "key": engine.key.as_json(),
                "path": engine.path,
                "is_new": engine.is_new,
                "fetched": str(local) if local else None,
            }
        )
    return made


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
    print(json.dumps(engines, indent=2))
