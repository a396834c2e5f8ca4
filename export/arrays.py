"""Artifacts as functions of named arrays, whatever runtime computes them."""

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]
ArrayFunction = Callable[[Mapping[str, Array]], dict[str, Array]]  # inputs to outputs, by name
