"""A stand-in for NVIDIA's package `tensorrt` that computes with ONNX Runtime.

It has what our code may use of TensorRT 10 and 11, by NVIDIA's API reference, and refuses what
they refuse: weakly typed networks, shapes outside of the profile, bindings without an address.
Tensors lie in the memory of the processor.
"""

import ctypes
import json
from enum import Enum, IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from onnx import helper

from laptop.export.to_onnx import onnx_session


def module(version: str) -> ModuleType:
    """A module of this version; `builds` counts what was built."""
    made = ModuleType("tensorrt")
    generation = int(version.split(".")[0])

    class NetworkDefinitionCreationFlag(IntEnum):
        STRONGLY_TYPED = 1

    class Network:
        path = ""

    class OnnxParser:
        num_errors = 0

        def __init__(self, network: Network, logger: Any):
            self.network = network

        def parse_from_file(self, path: str) -> bool:
            onnx.load(path)
            self.network.path = path
            return True

    class TimingCache:
        def __init__(self, content: bytes):
            self.content = content

        def serialize(self) -> bytes:
            return self.content + b"."

    class Config:
        __slots__ = ("builder_optimization_level", "cache", "cleared", "limits", "profiles")

        def __init__(self) -> None:
            self.limits: dict[Any, int] = {}
            self.profiles: list[Profile] = []
            self.cleared: list[Any] = []

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            self.limits[made.MemoryPoolType(pool)] = size

        def clear_flag(self, flag: Any) -> None:
            self.cleared.append(made.BuilderFlag(flag))

        def add_optimization_profile(self, profile: "Profile") -> None:
            self.profiles.append(profile)

        def create_timing_cache(self, content: bytes) -> TimingCache:
            return TimingCache(content)

        def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
            self.cache = cache
            return True

    class Profile(dict):  # type: ignore[type-arg]
        def set_shape(self, name: str, low: Any, usual: Any, high: Any) -> None:
            assert tuple(low) <= tuple(usual) <= tuple(high)
            self[name] = [list(low), list(usual), list(high)]

    class Builder:
        def __init__(self, logger: Any):
            assert isinstance(logger, made.Logger)

        def create_network(self, flags: int = 0) -> Network:
            assert flags == (2 if generation < 11 else 0), "needed is a strongly typed network"
            return Network()

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
            graph = onnx.load(network.path, load_external_data=False).graph
            open_inputs = {
                i.name
                for i in graph.input
                if any(not d.HasField("dim_value") for d in i.type.tensor_type.shape.dim)
            }
            profile = config.profiles[0] if config.profiles else {}
            if open_inputs - set(profile):
                return None
            made.builds.append(config)
            return json.dumps({"path": network.path, "profile": profile}).encode()

    class Context:
        def __init__(self, content: dict[str, Any]):
            self.content, self.shapes, self.addresses = content, {}, {}
            self.run = onnx_session.load(Path(content["path"]))
            graph = onnx.load(content["path"], load_external_data=False).graph
            self.types = {v.name: v.type.tensor_type for v in (*graph.input, *graph.output)}
            self.outputs = [v.name for v in graph.output]

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            low, _, high = self.content["profile"].get(name, [shape] * 3)
            self.shapes[name] = shape
            return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            batch = self.shapes["sample"][0]
            dims = [d.dim_value or 0 for d in self.types[name].shape.dim]
            return tuple(d or batch if i == 0 else d or 8 for i, d in enumerate(dims))

        def set_tensor_address(self, name: str, address: int) -> bool:
            self.addresses[name] = address
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            assert set(self.addresses) == set(self.types)
            got = self.run({name: self._at(name, shape) for name, shape in self.shapes.items()})
            for name in self.outputs:
                self._at(name, got[name].shape)[...] = got[name]
            return True

        def _at(self, name: str, shape: tuple[int, ...]) -> Any:
            dtype = helper.tensor_dtype_to_np_dtype(self.types[name].elem_type)
            size = int(np.prod(shape, dtype=int)) * dtype.itemsize
            memory = (ctypes.c_char * size).from_address(self.addresses[name])
            return np.frombuffer(memory, dtype).reshape(shape)

    class Engine:
        def __init__(self, content: dict[str, Any]):
            self.content = content

        def create_execution_context(self) -> Context:
            return Context(self.content)

        def get_tensor_dtype(self, name: str) -> int:
            return int(Context(self.content).types[name].elem_type)

    class Runtime:
        def __init__(self, logger: Any):
            pass

        def deserialize_cuda_engine(self, content: bytes) -> Engine:
            return Engine(json.loads(content))

    class Logger:
        WARNING = 2

        def __init__(self, level: int):
            self.level = level

    known = (Builder, OnnxParser, Runtime, Logger, NetworkDefinitionCreationFlag)
    vars(made).update({one.__name__: one for one in known})
    vars(made).update(
        __version__=version,
        builds=[],
        MemoryPoolType=Enum("MemoryPoolType", ["WORKSPACE", "DLA_MANAGED_SRAM"]),
        BuilderFlag=Enum("BuilderFlag", ["TF32", "REFIT"]),
        nptype=helper.tensor_dtype_to_np_dtype,
    )
    return made
