"""A network as an ONNX graph without its weights, traced in seconds and next to no memory.

Exporters trace a network by running it, with all of its weights and at the size of its pictures.
Only shapes matter: so each weight is passed as an input of the traced function, a zero that is
repeated by a stride of 0, and pictures are small. SDXL's graph then takes seconds and less than a
gigabyte; `onnx_weights` writes the weights, one at a time.

Of torch 2.13's two exporters this uses the older one (TorchScript): the other takes tens of seconds
for a U-Net of a few million weights, this one two, with the same outputs.
"""

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from laptop.export.components import FP32_INPUTS, Graph, vae_of
from laptop.export.to_onnx import folding
from laptop.models.shapes import latent_pixels

OPSET = 18
# Latents a side of the traced picture: two or more at every level of a U-Net. And odd, because only
# then diffusers traces what sizes need that do not halve evenly; the graph takes even ones, too.
SMALL = 17
BATCH = {0: "batch_size"}


class WithWeights(nn.Module):
    """A network as a function of its inputs and its weights."""

    def __init__(self, graph: Graph):
        super().__init__()
        self.hidden = [graph.module]  # in a list, lest its weights count as this module's
        self.count = len(graph.inputs)
        self.names = list(dict(graph.module.named_parameters()))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        (module,) = self.hidden
        _name_scopes(module)
        for name, weight in zip(self.names, inputs[self.count :], strict=True):
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._parameters[leaf] = weight  # type: ignore[assignment]
        outputs: tuple[Tensor, ...] = module(*inputs[: self.count])
        return outputs


def _name_scopes(module: nn.Module) -> None:
    """Let the tracer name operators by the modules that they come from, which are hidden from it.

    `/unet/mid_block/resnets.0/conv1/Conv`: profiles and converters' messages can then be read.
    """
    scopes = torch.jit._trace._trace_module_map
    called: dict[str, nn.Module] = {}  # a list of modules is not, so it gives no scope of its own
    if scopes is None:
        return
    for path, inner in module.named_modules():
        if path and not isinstance(inner, nn.ModuleList):
            called[path] = inner
            above = (path[:i] for i, c in enumerate(path) if c == "." and path[:i] in called)
            own = path.removeprefix(f"{max(above, default='', key=len)}.")
            kind = torch.typename(type(inner))
            scopes[inner] = torch._C._jit_onnx_create_full_scope_name(kind, own)


def trace(
    graph: Graph, component: str, example: Mapping[str, Tensor], dtype: torch.dtype, opset: int
) -> onnx.ModelProto:
    """The graph in `dtype`, dynamic in batch and picture size; its weights are inputs.

    The weights of `graph.module` are replaced, so they may as well be on the meta device. `example`
    gives the other inputs' shapes and the token ids.
    """
    function = WithWeights(graph)
    weights = dict(graph.module.named_parameters())
    zeros = [torch.zeros((), dtype=dtype).expand(weights[name].shape) for name in function.names]
    inputs = [_small(example[name], name, component, dtype) for name in graph.inputs]
    axes = _dynamic_axes(component, graph)
    # the tracer's warnings are about the values of shapes: the dynamic-shape test is the proof
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "graph.onnx"
        torch.onnx.export(
            function,
            (*inputs, *zeros),
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=[*graph.inputs, *function.names],
            output_names=list(graph.outputs),
            dynamic_axes=axes,
        )
        model = onnx.load(path)
    _declare_unused_(model, dict(zip(graph.inputs, inputs, strict=True)), axes)
    return model


def _declare_unused_(
    model: onnx.ModelProto, inputs: Mapping[str, Tensor], axes: Mapping[str, dict[int, str]]
) -> None:
    """Let every one of `inputs` come first, also those that the tracer dropped as unused.

    Such as the text, where no cross-attention is left: all models of a kind are fed alike.
    """
    traced = {value.name: value for value in model.graph.input}
    weights = [value for name, value in traced.items() if name not in inputs]
    first = [
        traced.get(name)
        or onnx.helper.make_tensor_value_info(
            name,
            onnx.helper.np_dtype_to_tensor_dtype(value.numpy().dtype),
            [axes[name].get(i, size) for i, size in enumerate(value.shape)],
        )
        for name, value in inputs.items()
    ]
    del model.graph.input[:]
    model.graph.input.extend([*first, *weights])


def _small(value: Tensor, name: str, component: str, dtype: torch.dtype) -> Tensor:
    """An example input as it is traced: pictures small, in the graph's precision."""
    if not value.is_floating_point():
        return value
    if value.ndim == 4:
        side = SMALL * (8 if component == "vae_encoder" else 1)
        value = value.new_zeros(*value.shape[:2], side, side)
    return value.to(torch.float32 if name in FP32_INPUTS else dtype)


def _dynamic_axes(component: str, graph: Graph) -> dict[str, dict[int, str]]:
    """Axis names as optimum writes them; it computes output shapes from such as "height * 8"."""
    factor = 1
    if component.startswith("vae_"):
        factor = latent_pixels(vae_of(graph.module).config)

    def picture(name: str, scale: str = "") -> dict[int, str]:
        return BATCH | {2: f"{name}height{scale}", 3: f"{name}width{scale}"}

    special: dict[str, dict[str, dict[int, str]]] = {
        "unet": {
            "sample": picture(""),
            "timestep": {},
            "encoder_hidden_states": BATCH | {1: "sequence_length"},
            "out_sample": picture(""),
        },
        "vae_encoder": {
            "sample": picture("sample_"),
            "latent_parameters": picture("sample_", f" / {factor}"),
        },
        "vae_decoder": {
            "latent_sample": picture("latent_"),
            "sample": picture("latent_", f" * {factor}"),
        },
    }
    own = special.get(component, {})
    return {name: own.get(name, BATCH) for name in (*graph.inputs, *graph.outputs)}


def fix_shapes_(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Fix the shapes of the inputs, and every other shape that follows from them.

    The arithmetic on shapes becomes constants.
    """
    from onnxruntime.tools import onnx_model_utils

    for name, shape in shapes.items():
        if shape:
            onnx_model_utils.make_input_shape_fixed(model.graph, name, list(shape))
    for output in model.graph.output:  # where the names of open axes stand
        output.type.tensor_type.ClearField("shape")
    folding.fold_(model)
    inferred = {o.name: o for o in onnx.shape_inference.infer_shapes(model).graph.output}
    for output in model.graph.output:
        output.CopyFrom(inferred[output.name])
