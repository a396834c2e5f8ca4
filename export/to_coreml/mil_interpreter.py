"""Computes a saved Core ML program on PyTorch, operator by operator: the check where no Mac is.

Values are kept in the types that the program declares. Inside one operator floats are computed in
float32 and the result is rounded once to the declared type, which is what hardware with wide
accumulators does; so the error of fp16 storage and of palettes is in the result, and that of one
particular device's arithmetic is not.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from laptop.errors import BadInput, Unsupported
from laptop.export.arrays import Array, ArrayFunction
from laptop.export.to_coreml.mil_operators import OPERATORS
from laptop.export.to_coreml.mil_program import (
    Argument,
    Name,
    Operation,
    Program,
    Stored,
    Type,
    read,
)

Values = dict[str, object]  # computed so far, by name
TORCH_TYPES = {
    "bool": torch.bool,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "uint16": torch.int32,
    "uint32": torch.int64,
}


def load(package: Path) -> ArrayFunction:
    """The package as a function on arrays, outputs in the types that the program declares.

    Raises `Unsupported` for an unknown operator, before anything is computed; the function
    raises `BadInput` for arrays that are not those of the program.
    """
    program = read(package)
    check_operators(program)
    return lambda inputs: compute(program, inputs)


def check_operators(program: Program) -> None:
    """Raise `Unsupported` that names what `OPERATORS` lacks."""
    unknown = sorted({op.kind for op in program.operations} - set(OPERATORS))
    if unknown:
        raise Unsupported(
            f"{program.path} uses {', '.join(unknown)}, which the reference interpreter does not "
            f"know (it knows {len(OPERATORS)} operators); verify on macOS, or add it to OPERATORS."
        )


@torch.no_grad()
def compute(program: Program, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run a program; returns its outputs by name."""
    if set(inputs) != set(program.inputs):
        raise BadInput(
            f"{program.path} takes {', '.join(program.inputs)}; given were {', '.join(inputs)}. "
            "Pass the model that it was exported from."
        )
    values: Values = {
        name: _input(program, name, inputs[name], kind) for name, kind in program.inputs.items()
    }
    last = _last_uses(program)
    for number, op in enumerate(program.operations):
        compute_(op, values)
        for name in last.get(number, ()):
            del values[name]
    return {name: _array(values[name]) for name in program.outputs}


def _array(value: object) -> Array:
    assert isinstance(value, Tensor)  # outputs of programs are
    return value.numpy()


def _input(program: Program, name: str, array: Array, kind: Type) -> Tensor:
    if tuple(array.shape) != kind.shape:
        raise BadInput(
            f"{program.path} takes {name} of shape {kind.shape}, given was {array.shape}. Pass the "
            "model that it was exported from, and its resolution."
        )
    return torch.from_numpy(np.array(array)).to(TORCH_TYPES[kind.dtype])


def compute_(op: Operation, values: Values) -> None:
    """Run one operation on `values` and add its outputs to them."""
    inputs = {name: _bound(value, values) for name, value in op.inputs.items()}
    try:
        result = OPERATORS[op.kind](**inputs)
    except (RuntimeError, TypeError, IndexError) as e:
        shapes = {k: tuple(v.shape) for k, v in inputs.items() if isinstance(v, Tensor)}
        raise BadInput(f"operation {op.name} ({op.kind}) of {shapes} cannot be run: {e}") from e
    results = result if isinstance(result, tuple) else (result,)
    for (name, kind), value in zip(op.outputs, results, strict=True):
        values[name] = _declared(op, value, kind) if isinstance(value, Tensor) else value


def _bound(value: Argument, values: Values) -> object:
    if isinstance(value, list):
        return [_bound(v, values) for v in value]
    bound = values[value.text] if isinstance(value, Name) else value
    bound = bound.read() if isinstance(bound, Stored) else bound
    if isinstance(bound, Tensor) and bound.dtype == torch.float16:
        return bound.float()
    return bound


def _declared(op: Operation, value: Tensor, kind: Type) -> Tensor:
    """`value` in its declared type; raises `BadInput` where the shape is not the declared one."""
    if kind.dtype in TORCH_TYPES:
        value = value.to(TORCH_TYPES[kind.dtype])
    if tuple(value.shape) != kind.shape:
        raise BadInput(
            f"operation {op.name} ({op.kind}) gives {tuple(value.shape)}, but the program "
            f"declares {kind.shape}. The package is damaged; export it again."
        )
    return value


def _last_uses(program: Program) -> dict[int, list[str]]:
    """The values that nothing needs after an operation, by its number."""
    last: dict[str, int] = {}
    for number, op in enumerate(program.operations):
        for name, _ in op.outputs:
            last[name] = number
        for value in op.inputs.values():
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, Name):
                    last[part.text] = number
    ends: dict[int, list[str]] = {}
    for name, number in last.items():
        if name not in program.outputs:
            ends.setdefault(number, []).append(name)
    return ends
