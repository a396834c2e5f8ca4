"""The removable layers of a U-Net and their costs (paper, section 3.1).

| granularity | units |
| --- | --- |
| `coarse` | each ResnetBlock2D, each Transformer2DModel as a whole |
| `fine` | each ResnetBlock2D, each BasicTransformerBlock |
| `sublayer` | each ResnetBlock2D, each attention and feed-forward of a BasicTransformerBlock |

A resnet's `conv_shortcut` stays. A transformer all of whose blocks are gone still runs its norm and
projections: at `fine` and `sublayer` this shell is one more unit, removable only together with
everything inside. An unconditional U-Net's Attention is a unit at every granularity. Down- and
upsamplers, the first and last convolution and the embeddings are not removable.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from laptop.errors import BadInput, Unsupported
from laptop.files import shown
from laptop.models import unet_classes
from laptop.models.component_classes import Config
from laptop.models.shapes import input_shapes
from laptop.pruning.scores import Anatomy, Unit
from laptop.pruning.settings import GRANULARITIES

ADDED = ("text_embeds", "time_ids")  # inputs that are passed in `added_cond_kwargs`
SUBLAYERS = unet_classes.shipped_module().SUBLAYERS


def example_inputs(config: Config, tokens: int, batch: int = 1) -> dict[str, Any]:
    """Keyword arguments of a U-Net's forward with the right shapes, zeros, on the meta device."""
    shapes = input_shapes(config, tokens, batch) | {"timestep": (batch,)}
    inputs: dict[str, Any] = {k: torch.zeros(v, device="meta") for k, v in shapes.items()}
    added = {k: inputs.pop(k) for k in ADDED if k in inputs}
    return inputs | ({"added_cond_kwargs": added} if added else {})


def blocks(unet: ModelMixin) -> dict[str, nn.Module]:
    """The down, mid and up blocks by their names; slim U-Nets lack the mid block."""
    down = {f"down_blocks.{i}": block for i, block in enumerate(unet.down_blocks)}
    mid = {} if unet.mid_block is None else {"mid_block": unet.mid_block}
    return down | mid | {f"up_blocks.{i}": block for i, block in enumerate(unet.up_blocks)}


def listed(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of all members of the module's lists, such as the layers of a block."""
    for child, members in module.named_children():
        if isinstance(members, nn.ModuleList):
            for i, member in enumerate(members):
                if member is not None:  # a mid block without attention
                    yield f"{name}.{child}.{i}", member


def layers(unet: ModelMixin, granularity: str) -> dict[str, str]:
    """Kind of each removable layer, by name."""
    kinds: dict[str, str] = {}
    for block_name, block in blocks(unet).items():
        for name, layer in listed(block_name, block):
            if isinstance(layer, Transformer2DModel):
                kinds |= _transformer_layers(name, layer, granularity)
            elif isinstance(layer, ResnetBlock2D):
                if not (layer.up or layer.down):
                    kinds[name] = "resnet"
            elif isinstance(layer, Attention) and layer.residual_connection:
                kinds[name] = "attention"
            elif name.split(".")[-2] in ("resnets", "attentions") and not _is_removed(layer):
                raise Unsupported(
                    f"{type(unet).__name__}: {name} is a {type(layer).__name__}; layers "
                    "that can be removed are ResnetBlock2D, Transformer2DModel and residual "
                    "Attention. Choose a U-Net of Stable Diffusion's kind."
                )
    return kinds


def _transformer_layers(name: str, layer: Transformer2DModel, granularity: str) -> dict[str, str]:
    if granularity == "coarse":
        return {name: "transformer"}
    kinds = {name: "transformer_shell"}
    for block_name, block in listed(name, layer):
        if granularity == "fine" and isinstance(block, BasicTransformerBlock):
            kinds[block_name] = "transformer_block"
        elif granularity == "sublayer":
            kinds |= {
                f"{block_name}.{part}": part
                for part in SUBLAYERS
                if isinstance(getattr(block, part, None), nn.Module)
                and not _is_removed(getattr(block, part))
            }
    return kinds


def _is_removed(layer: nn.Module) -> bool:
    return bool(type(layer).__module__ == unet_classes.shipped_module().NAME)


def anatomy_of(unet: ModelMixin, tokens: int = 77, granularity: str = "fine") -> Anatomy:
    """Units and costs of a U-Net, counted by one forward on the meta device; `unet` is not changed.

    `tokens` is the prompt's length, on which the cost of cross-attention depends.
    """
    if granularity not in GRANULARITIES:
        raise BadInput(
            f"granularity {granularity!r} is unknown; known are {', '.join(GRANULARITIES)}."
        )
    with torch.device("meta"):
        shadow = type(unet).from_config(unet.config).eval()
    kinds = layers(shadow, granularity)
    before: dict[str, int] = {}
    with FlopCounterMode(display=False, depth=1000) as counter, torch.no_grad():
        for name in kinds:
            shadow.get_submodule(name).register_forward_pre_hook(
                lambda _m, _i, name=name: before.update({name: counter.get_total_flops() // 2})
            )
        shadow(**example_inputs(unet.config, tokens))
    root = type(shadow).__name__
    macs = {
        path.removeprefix(f"{root}."): sum(ops.values()) // 2
        for path, ops in counter.get_flop_counts().items()
    }
    costs = {name: _cost(shadow, name, macs) for name in before}
    units = []
    for name in before:
        params, cost = costs[name]
        needs: tuple[str, ...] = ()
        if kinds[name] == "transformer_shell":
            needs = tuple(n for n in before if n.startswith(f"{name}."))
            params -= sum(costs[n][0] for n in needs)
            cost -= sum(costs[n][1] for n in needs)
        units.append(Unit(name, kinds[name], params, cost, needs))
    return Anatomy(tuple(units), _count(shadow), macs["Global"], before)


def _cost(unet: nn.Module, name: str, macs: Mapping[str, int]) -> tuple[int, int]:
    """Parameters and multiply-accumulates that go with a layer, everything inside included."""
    layer = unet.get_submodule(name)
    params, cost = _count(layer), macs.get(name, 0)
    if getattr(layer, "conv_shortcut", None) is not None:
        params -= _count(unet.get_submodule(f"{name}.conv_shortcut"))
        cost -= macs[f"{name}.conv_shortcut"]
    parent, _, part = name.rpartition(".")
    if part in SUBLAYERS:
        params += _count(unet.get_submodule(f"{parent}.{SUBLAYERS[part]}"))
    return params, cost


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@contextmanager
def removed(unet: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Run `unet` as if the named layers were gone; they are back afterwards."""
    remove_, undo = unet_classes.shipped_module().remove_, []
    try:
        for name in sorted(names, key=len, reverse=True):  # what is inside first
            undo += remove_(unet, name)
        yield
    finally:
        for name, module in reversed(undo):
            unet.set_submodule(name, module)


def check_names(unet: ModelMixin, names: Sequence[str], where: str) -> None:
    """Raise `BadInput` unless all `names` are removable layers of `unet`."""
    if len(set(names)) < len(names):
        raise BadInput(f"{where} names a layer twice; it is no whole plan.")
    removable: set[str] = set().union(*(layers(unet, g) for g in GRANULARITIES))
    if missing := sorted(set(names) - removable):
        raise BadInput(
            f"{where} was made for another model: {len(missing)} of its {len(names)} layers do not "
            f"exist here, such as {shown(missing[0])}. Make the plan from this model's own scores."
        )


def check_size(unet: ModelMixin, params: int, where: str) -> None:
    """Raise `BadInput` unless `unet` has the number of parameters that a file states."""
    if params != unet.num_parameters():
        raise BadInput(
            f"{where} was made for another model: a U-Net of {params:,} parameters; this one has "
            f"{unet.num_parameters():,}. Make the plan from this model's own scores."
        )


def call(unet: nn.Module, rows: Mapping[str, Tensor]) -> Tensor:
    """The U-Net's output (B, C, H, W) in float32 for calibration rows, all in one batch."""
    first = next(unet.parameters())
    part = {
        k: v.to(first.device, None if k == "timestep" else first.dtype) for k, v in rows.items()
    }
    added = {k: part.pop(k) for k in ADDED if k in part}
    if added:
        part["added_cond_kwargs"] = added  # type: ignore[assignment]
    output: Tensor = unet(**part).sample
    return output.float()


@torch.inference_mode()
def forward_rows(unet: nn.Module, rows: Mapping[str, Tensor], batch_size: int) -> Tensor:
    """The U-Net's output (N, C, H, W) in float32 on the CPU for calibration rows, in batches."""
    starts = range(0, len(rows["sample"]), batch_size)
    outputs = [call(unet, {k: v[s : s + batch_size] for k, v in rows.items()}) for s in starts]
    return torch.cat([output.cpu() for output in outputs])
