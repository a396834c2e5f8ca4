"""Core ML packages for Apple devices: `<component>.mlpackage`, shapes fixed.

The shapes are those of the sampling (batch 2 with guidance, else 1), because the neural engine
takes fixed ones only. Scalars have rank 1, a rule of Core ML. Converts everywhere. Only macOS can
predict, so elsewhere `load` is our interpreter of the saved program, and `checked` says so.

Palettized weights: `palettes`. A U-Net above 1 GB is also saved as two packages,
`unet_chunk1.mlpackage` and `unet_chunk2.mlpackage`, because iOS kills apps that load more at once.
"""

import json
import logging
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from laptop.console import quiet  # coremltools draws bars and warns of its own functions
from laptop.errors import LaptopError
from laptop.export import components
from laptop.export.arrays import Array, ArrayFunction
from laptop.export.components import FP32_INPUTS, Graph
from laptop.export.job import Job
from laptop.export.magnitudes import is_upcast, keep_scores_wide_
from laptop.export.targets import VERIFIED
from laptop.export.to_coreml import mil_interpreter, palettes, swift_resources
from laptop.export.to_coreml.mil_program import Operation, Stored, read, read_spec
from laptop.export.to_coreml.split_einsum import use_split_einsum_
from laptop.files import read_json, write_text

if TYPE_CHECKING:
    from coremltools import TensorType
    from coremltools.converters.mil.mil import Operation as Op
    from coremltools.models import MLModel

CHUNK_BYTES = 1 << 30  # of weights; above it a U-Net is cut in two
INTERPRETED = "computed by the reference interpreter; not run on Apple hardware"
UNITS = "laptop.compute_units"  # keys of a package's own metadata
PALETTE_BITS = "laptop.palette_bits"
# between the projections of attention and its softmax
SCORE_OPERATORS = ("add", "einsum", "matmul", "mul", "reshape", "split", "squeeze", "transpose")


def export(job: Job) -> None:
    """Write the component of `job` as a package, and in two chunks where the settings say so."""
    config, examples = job.config.coreml, job.examples()
    traced = components.load(job.model, job.component)
    is_wide = job.precision != "fp32" and any(map(is_upcast, traced.module.modules()))
    if job.component == "unet" and config.attention == "split-einsum":
        use_split_einsum_(traced.module.unet)
    if is_wide:
        keep_scores_wide_(traced.module)
    bits = _palettize_(traced, job, examples)
    version = config.minimum_deployment_target
    model = _convert(traced, examples[0], job.precision, version, is_wide=is_wide)
    del traced
    if bits:
        model = _with_palettes(model)
        model.user_defined_metadata[PALETTE_BITS] = json.dumps(bits)
    model.user_defined_metadata[UNITS] = config.compute_units
    model.save(str(job.path))
    if job.component == "unet" and _is_chunked(config.chunk, job.path):
        del model
        chunk(job.path)
        check_chunks(job.path, {k: v.numpy() for k, v in examples[0].items()})
    for package in job.path.parent.glob(f"{job.component}*.mlpackage"):
        name_items_(package)


def name_items_(package: Path) -> None:
    """Name a package's items after their paths, not at random, so that it is the same each time."""
    path = package / "Manifest.json"
    manifest = read_json(path)
    items = manifest["itemInfoEntries"]
    names = {old: str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])) for old, item in items.items()}
    manifest["itemInfoEntries"] = {name: items[old] for old, name in names.items()}
    manifest["rootModelIdentifier"] = names[manifest["rootModelIdentifier"]]
    # as coremltools writes it, which it does again whenever it loads the package
    write_text(path, json.dumps(manifest, indent=4, sort_keys=True) + "\n")


def complete(model: str, folder: Path) -> None:
    """Write the folder `Resources` for Apple's Swift runner."""
    swift_resources.write(model, folder)


def load(path: Path) -> ArrayFunction:
    """A package as a function: predicted by Core ML on macOS, by the interpreter elsewhere."""
    run = _predictor(path) if sys.platform == "darwin" else mil_interpreter.load(path)

    def call(inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = run({name: np.atleast_1d(value) for name, value in inputs.items()})
        return {graph_name(name): value for name, value in outputs.items()}

    return call


def wide_scores(path: Path) -> Callable[[str], bool]:
    """All modules, where every softmax of the program is in float32; else none."""
    outputs = [out for op in read(path).operations if op.kind == "softmax" for out in op.outputs]
    is_wide = bool(outputs) and all(kind.dtype == "fp32" for _, kind in outputs)
    return lambda _module: is_wide


def checked(_precision: str) -> str:
    """The state of a package that reaches its floor: who computed it."""
    return VERIFIED if sys.platform == "darwin" else INTERPRETED


def graph_name(name: str) -> str:
    """An output's name in `components.Graph`: Core ML's names have no dots."""
    return name.replace("hidden_states_", "hidden_states.")


def library() -> ModuleType:
    """coremltools, imported without its notes on versions and on parts that macOS alone has."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    import coremltools

    return cast(ModuleType, coremltools)


def _predictor(path: Path) -> ArrayFunction:
    ct = library()
    words = read_spec(path).description.metadata.userDefined
    units = ct.ComputeUnit[words.get(UNITS, "all").upper()]
    model = ct.models.MLModel(str(path), compute_units=units)
    return lambda inputs: dict(model.predict(dict(inputs)))


def _palettize_(traced: Graph, job: Job, examples: list[dict[str, torch.Tensor]]) -> palettes.Bits:
    """Give the weights the palettes of the job's precision; returns the bits of each layer."""
    if job.precision == "mixed":
        ends = [examples[0], examples[-1]][: len(examples)]

        def forward() -> list[torch.Tensor]:
            return [value for row in ends for value in components.run(traced, row).values()]

        bits = palettes.choose(traced.module, forward, job.config.coreml.mixed_floor_db)
    elif job.precision in palettes.BITS:
        bits = palettes.uniform(traced.module, palettes.BITS[job.precision])
    else:
        return {}
    palettes.palettize_(traced.module, bits)
    return bits


def _convert(
    traced: Graph,
    example: dict[str, torch.Tensor],
    precision: str,
    target: str,
    *,
    is_wide: bool = False,
) -> "MLModel":
    """The model in a precision; with `is_wide`, attention scores stay in fp32 in any."""
    example = at_least_rank_1({name: example[name] for name in traced.inputs})
    with torch.no_grad(), quiet():
        ct = library()
        program = torch.export.export(traced.module, tuple(example.values()))
        program = program.run_decompositions({})
        _remove_aliases_(program.graph)
        return ct.convert(
            program,
            convert_to="mlprogram",
            inputs=[_tensor_type(name, value, precision) for name, value in example.items()],
            outputs=[ct.TensorType(name) for name in traced.outputs],
            compute_precision=ct.precision.FLOAT32
            if precision == "fp32"
            else ct.transform.FP16ComputePrecision(
                lambda op: not (feeds_angles(op) or (is_wide and feeds_scores(op)))
            ),
            minimum_deployment_target=ct.target[target],
            skip_model_load=True,
        )


def _remove_aliases_(graph: torch.fx.Graph) -> None:
    """Views of a whole tensor, which coremltools does not know, become the tensor."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target == torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _with_palettes(model: "MLModel") -> "MLModel":
    """The model with indices and palettes where a weight has few values."""
    few = [
        op.name
        for op in read(Path(model.package_path)).operations
        if op.kind == "const" and _is_palettized(op)
    ]
    with quiet():
        coreml = library().optimize.coreml
        rule = coreml.OpPalettizerConfig(
            mode="custom", lut_function=palettes.encode, weight_threshold=palettes.SMALLEST
        )
        config = coreml.OptimizationConfig(op_name_configs=dict.fromkeys(few, rule))
        return coreml.palettize_weights(model, config)


def _is_palettized(op: Operation) -> bool:
    value = op.inputs["val"]
    if not isinstance(value, Stored) or value.type.dtype != "fp16":
        return False
    array = value.read().numpy()
    return array.size > palettes.SMALLEST and palettes.is_palettized(array)


def at_least_rank_1(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Recorded inputs with scalars of rank 1, as packages take them."""
    return {k: v.reshape(1) if v.ndim == 0 else v for k, v in inputs.items()}


def _tensor_type(name: str, value: torch.Tensor, precision: str) -> "TensorType":
    is_wide = name in FP32_INPUTS or precision == "fp32"
    dtype: type[np.generic] = np.float32 if is_wide else np.float16
    if not value.is_floating_point():
        dtype = np.int32
    return library().TensorType(name, shape=tuple(value.shape), dtype=dtype)


def feeds_angles(op: "Op", depth: int = 6) -> bool:
    """Whether `op` is the sine or cosine of a time embedding, or only such are made of it.

    They stay fp32: at timestep 999 the angle's fp16 neighbours are half a radian apart.
    """
    if op.op_type in ("sin", "cos"):
        return True
    users = [user for output in op.outputs for user in output.child_ops]
    return depth > 0 and bool(users) and all(feeds_angles(user, depth - 1) for user in users)


def feeds_scores(op: "Op", depth: int = 6) -> bool:
    """Whether `op` is a softmax, or only attention scores are made of it."""
    if op.op_type == "softmax":
        return True
    users = [user for output in op.outputs for user in output.child_ops]
    is_near = depth > 0 and op.op_type in SCORE_OPERATORS and bool(users)
    return is_near and all(feeds_scores(user, depth - 1) for user in users)


def _is_chunked(chunk: str, path: Path) -> bool:
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return chunk == "always" or (chunk == "auto" and size > CHUNK_BYTES)


def chunks_of(path: Path) -> tuple[Path, Path]:
    """The paths of a package's chunks, whether they exist or not."""
    return path.with_stem(f"{path.stem}_chunk1"), path.with_stem(f"{path.stem}_chunk2")


def chunk(path: Path) -> None:
    """Write the package at `path` as two of about the same size into its folder."""
    with quiet():
        library().models.utils.bisect_model(
            str(path), str(path.parent), check_output_correctness=False
        )


def check_chunks(path: Path, example: dict[str, Array]) -> None:
    """Raise `LaptopError` unless the chunks in sequence compute what the whole package does."""
    values = {name: np.atleast_1d(value) for name, value in example.items()}
    whole = mil_interpreter.load(path)(values)
    for part in chunks_of(path):
        taken = {name: values[name] for name in read(part).inputs}
        values = {**values, **mil_interpreter.load(part)(taken)}
    for name, value in whole.items():
        if not np.array_equal(values[name], value):
            raise LaptopError(
                f"the two chunks of {path} give another {name} than the whole: at most "
                f"{np.abs(values[name].astype(np.float64) - value).max():.3g} apart. Set "
                'export.coreml.chunk = "never" and report it.'
            )
