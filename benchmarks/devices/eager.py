"""PyTorch as a runtime: components of a diffusers model."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from laptop.benchmarks.devices.worker import Loaded, Order, value
from laptop.export import components
from laptop.models import loading

INTEGERS = ("input_ids",)
Run = Callable[[], object]  # one inference


def load(order: Order) -> Loaded:
    """Load a component: in float32 on the processor, else in float16; sets torch's threads."""
    torch.set_num_threads(order["threads"])
    device = order["runtime"].partition(":")[2] or "cpu"
    dtype = torch.float32 if device == "cpu" else torch.float16
    if order["component"] == "unet":
        net, run = unet(order["source"], order["shapes"], order["seed"], device, dtype)
    else:
        net, run = _graph(order, device, dtype)
    params = sum(p.numel() for p in net.parameters())
    return Loaded(run, params, "fp32" if device == "cpu" else "fp16")


def unet(
    source: str,
    shapes: Mapping[str, Sequence[int]],
    seed: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, Run]:
    """A U-Net of any kind that can be pruned, and one inference of it."""
    net = loading.load_unet(source, dtype).to(device)
    tensors = _tensors(shapes, seed, device, dtype)
    timestep = tensors.pop("timestep")
    added = {k: tensors.pop(k) for k in ("text_embeds", "time_ids") if k in tensors}
    inputs = {**tensors, **({"added_cond_kwargs": added} if added else {})}

    @torch.inference_mode()
    def run() -> object:
        out = net(**inputs, timestep=timestep, return_dict=False)
        _wait(device)
        return out

    return net, run


def _graph(order: Order, device: str, dtype: torch.dtype) -> tuple[nn.Module, Run]:
    """Any other component, as it is exported, and one inference of it."""
    graph = components.load(order["source"], order["component"], dtype)
    module = graph.module.to(device)
    tensors = _tensors(order["shapes"], order["seed"], device, dtype)

    @torch.inference_mode()
    def run() -> object:
        out = module(*(tensors[name] for name in graph.inputs))
        _wait(device)
        return out

    return module, run


def _tensors(
    shapes: Mapping[str, Sequence[int]], seed: int, device: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Inputs of these shapes: integers, the timestep in float32, other floats in `dtype`."""
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.from_numpy(
            value(name, list(shape), "int64" if name in INTEGERS else "float32", seed)
        )
        keeps = name in (*INTEGERS, *components.FP32_INPUTS)
        tensors[name] = tensor.to(device) if keeps else tensor.to(device, dtype)
    return tensors


def _wait(device: str) -> None:
    """Wait until a GPU has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()
