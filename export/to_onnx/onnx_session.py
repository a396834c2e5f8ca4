"""ONNX files computed by ONNX Runtime on this machine's CPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from laptop.errors import BadInput
from laptop.export.arrays import Array, ArrayFunction
from laptop.export.to_onnx import onnx_checks
from laptop.files import reason, shown

NUMPY_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


def load(path: Path) -> ArrayFunction:
    """An ONNX file as a function; it casts arrays to the types that the graph declares.

    Raises `BadInput` for a file that ONNX Runtime cannot open; the function does for arrays that do
    not fit the graph.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except errors(RuntimeError) as e:
        raise onnx_checks.broken(path, reason(e)) from None
    types = {i.name: _type(i, path) for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]

    def call(inputs: Mapping[str, Array]) -> dict[str, Array]:
        if set(inputs) != set(types):
            raise BadInput(
                f"{path} takes {', '.join(types)}; the model that it is compared with gives "
                f"{', '.join(inputs)}. Pass the model that it was exported from."
            )
        feed = {name: np.asarray(inputs[name], dtype) for name, dtype in types.items()}
        try:
            return dict(zip(names, session.run(names, feed), strict=True))
        except errors() as e:
            raise BadInput(
                f"{path} does not fit the model that it is compared with ({reason(e)}). Pass the "
                "model that it was exported from."
            ) from None

    return call


def errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """The error classes of ONNX Runtime, which have no common one, and `more`."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = vars(state).values()
    own = (k for k in kinds if isinstance(k, type) and issubclass(k, Exception))
    return (*own, *more)


def _type(value: Any, path: Path) -> type[np.generic]:
    if value.type not in NUMPY_TYPES:
        raise BadInput(f"{path}: its input {shown(value.name)} is a {shown(value.type)}.")
    return NUMPY_TYPES[value.type]
