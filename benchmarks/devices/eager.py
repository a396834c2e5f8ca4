"""PyTorch as a runtime: a component of a diffusers model, one call after the other."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from laptop.benchmarks.devices.device import Shapes
from laptop.benchmarks.devices.worker import Loaded, value
from laptop.export import components
from laptop.models import loading

INTEGERS = ("input_ids",)


def load(order: Mapping[str, Any]) -> Loaded:
    """On the processor in float32, else in float16; sets the number of torch's threads."""
    torch.set_num_threads(order["threads"])
    place = order["runtime"].partition(":")[2] or "cpu"
    dtype = torch.float32 if place == "cpu" else torch.float16
    if order["component"] == "unet":
        net, run = unet(order["source"], order["shapes"], order["seed"], place, dtype)
    else:
        net, run = _graph(order, place, dtype)
    params = sum(p.numel() for p in net.parameters())
    return Loaded(run, params, "fp32" if place == "cpu" else "fp16")


def unet(
    source: str,
    shapes: Shapes,
    seed: int,
    place: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Callable[[], object]]:
    """A U-Net of any kind that can be pruned, and one inference of it."""
    net = loading.load_unet(source, dtype).to(place)
    tensors = _tensors(shapes, seed, place, dtype)
    timestep = tensors.pop("timestep")
    added = {k: tensors.pop(k) for k in ("text_embeds", "time_ids") if k in tensors}
    given = {**tensors, **({"added_cond_kwargs": added} if added else {})}

    @torch.inference_mode()
    def run() -> object:
        out = net(**given, timestep=timestep, return_dict=False)
        _wait(place)
        return out

    return net, run


def _graph(order: Mapping[str, Any], place: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Any other component, as it is exported."""
    graph = components.load(order["source"], order["component"], dtype)
    module = graph.module.to(place)
    tensors = _tensors(order["shapes"], order["seed"], place, dtype)

    @torch.inference_mode()
    def run() -> object:
        out = module(*(tensors[name] for name in graph.inputs))
        _wait(place)
        return out

    return module, run


def _tensors(shapes: Shapes, seed: int, place: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Inputs of these shapes; floats in `dtype` but the timestep, integers as they are."""
    found = {}
    for name, shape in shapes.items():
        tensor = torch.from_numpy(
            value(name, list(shape), "int64" if name in INTEGERS else "float32", seed)
        )
        keeps = name in (*INTEGERS, *components.FP32_INPUTS)
        found[name] = tensor.to(place) if keeps else tensor.to(place, dtype)
    return found


def _wait(place: str) -> None:
    """Until a GPU has finished."""
    if place == "cuda":
        torch.cuda.synchronize()
    elif place == "mps":
        torch.mps.synchronize()
