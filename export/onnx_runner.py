"""Running artifacts on this machine: from named arrays to named arrays."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laptop.errors import BadInput
from laptop.export.to_onnx import onnx_checks
from laptop.files import reason, shown

Array = NDArray[Any]
Runner = Callable[[Mapping[str, Array]], dict[str, Array]]
NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


def check_file(path: Path, target: str) -> None:
    """Raise `BadInput` for a graph that is cut off or asks for more than a graph may."""
    if target in ("onnx", "tensorrt"):
        onnx_checks.read_graph(path)


def onnx_runner(path: Path) -> Runner:
    """An ONNX file on the CPU. Arrays are cast to the types that the graph declares.

    Raises `BadInput` for a file that ONNX Runtime cannot open; the runner does for arrays that do
    not fit the graph.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except errors(RuntimeError) as e:
        raise onnx_checks.broken(path, reason(e)) from None
    types = {i.name: _type(i, path) for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]

    def call(given: Mapping[str, Array]) -> dict[str, Array]:
        if set(given) != set(types):
            raise BadInput(
                f"{path} takes {', '.join(types)}; the model that it is compared with gives "
                f"{', '.join(given)}. Pass the model that it was exported from."
            )
        feed = {name: np.asarray(given[name], dtype) for name, dtype in types.items()}
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


def _type(value: Any, path: Path) -> Any:
    if value.type not in NUMPY_TYPES:
        raise BadInput(f"{path}: its input {shown(value.name)} is a {shown(value.type)}.")
    return NUMPY_TYPES[value.type]
