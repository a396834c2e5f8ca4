"""Running artifacts on this machine: from named arrays to named arrays."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laptop.errors import BadInput
from laptop.files import reason

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
    """Raise `BadInput` for an ONNX file that is cut off: parsing it takes milliseconds."""
    if target != "onnx":
        return
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except DecodeError as e:
        raise _broken(path, str(e)) from None
    if not graph.node:
        raise _broken(path, "it holds no graph")


def onnx_runner(path: Path) -> Runner:
    """An ONNX file on the CPU. Arrays are cast to the types that the graph declares.

    Raises `BadInput` for a file that ONNX Runtime cannot open; the runner does for arrays that do
    not fit the graph.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except (state.InvalidProtobuf, state.InvalidGraph, state.Fail, state.NoSuchFile) as e:
        raise _broken(path, str(e)) from None
    types = {i.name: NUMPY_TYPES[i.type] for i in session.get_inputs()}
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
        except (state.InvalidArgument, state.Fail, state.RuntimeException) as e:
            raise BadInput(
                f"{path} does not fit the model that it is compared with "
                f"({reason(e)}). Pass the model that it was exported from."
            ) from None

    return call


def _broken(path: Path, why: str) -> BadInput:
    return BadInput(
        f"{path} cannot be read as an ONNX model ({why}); it may be cut off. Export it again "
        "with --overwrite."
    )
