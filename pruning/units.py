"""The removable layers of a U-Net, with what each costs.

At `fine` granularity a unit is a ResnetBlock2D (its `conv_shortcut` stays) or a
BasicTransformerBlock. Down- and upsamplers, the first and last convolution and the embeddings are
not removable.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from laptop import models
from laptop.errors import BadInput

KINDS = {ResnetBlock2D: "resnet", BasicTransformerBlock: "transformer_block"}


@dataclass(frozen=True)
class Unit:
    """One removable layer; `params` and `macs` are what removing it saves."""

    name: str  # module path in the U-Net
    kind: str
    params: int
    macs: int  # multiply-accumulates of one forward, batch 1, at the model's native size


@dataclass(frozen=True)
class Anatomy:
    """The removable layers in the order in which they run, and the whole U-Net's cost."""

    units: tuple[Unit, ...]
    params: int
    macs: int

    @property
    def largest_ratio(self) -> float:
        """The pruning ratio at which every removable layer is gone."""
        return sum(u.params for u in self.units) / self.params


def example_inputs(config: Mapping[str, Any], tokens: int, batch: int = 1) -> dict[str, Any]:
    """Keyword arguments of a U-Net's forward with the right shapes, zeros, on the meta device."""
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    with torch.device("meta"):
        inputs: dict[str, Any] = {
            "sample": torch.zeros(batch, config["in_channels"], height, width),
            "timestep": torch.zeros(batch),
            "encoder_hidden_states": torch.zeros(batch, tokens, config["cross_attention_dim"]),
        }
        if config["addition_embed_type"] == "text_time":
            ids = 6
            pooled = config["projection_class_embeddings_input_dim"] - (
                ids * config["addition_time_embed_dim"]
            )
            inputs["added_cond_kwargs"] = {
                "text_embeds": torch.zeros(batch, pooled),
                "time_ids": torch.zeros(batch, ids),
            }
    return inputs


def _removable(unet: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in unet.named_modules() if type(m) in KINDS}


def anatomy(unet: UNet2DConditionModel, tokens: int = 77) -> Anatomy:
    """Units and costs of a U-Net, found by one forward on the meta device; `unet` is not touched.

    `tokens` is the prompt's length, which the cost of cross-attention depends on.
    """
    with torch.device("meta"):
        shadow = type(unet).from_config(unet.config).eval()
    order: list[str] = []
    layers = _removable(shadow)
    for name, module in layers.items():
        module.register_forward_pre_hook(lambda _m, _i, name=name: order.append(name))
    with FlopCounterMode(display=False, depth=1000) as counter, torch.no_grad():
        shadow(**example_inputs(unet.config, tokens))
    macs = {path: sum(ops.values()) // 2 for path, ops in counter.get_flop_counts().items()}
    root = type(shadow).__name__
    units = []
    for name in order:
        layer = layers[name]
        params, cost = _count(layer), macs.get(f"{root}.{name}", 0)
        if getattr(layer, "conv_shortcut", None) is not None:
            params -= _count(layer.conv_shortcut)
            cost -= macs[f"{root}.{name}.conv_shortcut"]
        units.append(Unit(name, KINDS[type(layer)], params, cost))
    return Anatomy(tuple(units), _count(shadow), macs["Global"])


def _count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


@contextmanager
def removed(unet: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Run `unet` as if the named layers were gone; they are back afterwards."""
    stand_in = models.shipped_module().stand_in
    originals = {name: unet.get_submodule(name) for name in names}
    try:
        for name, module in originals.items():
            unet.set_submodule(name, stand_in(module))
        yield
    finally:
        for name, module in originals.items():
            unet.set_submodule(name, module)


def check_names(names: Sequence[str], known: Anatomy, what: str) -> None:
    """Raise `BadInput` unless all `names` are units of the U-Net described by `known`."""
    if len(set(names)) < len(names):
        raise BadInput(f"{what} names a layer twice; it is no whole plan.")
    missing = sorted(set(names) - {u.name for u in known.units})
    if missing:
        raise BadInput(
            f"{what} was made for another model: {len(missing)} of its {len(names)} layers do not "
            f"exist here, such as {missing[0]}. Make the plan from this model's own scores."
        )


def forward_rows(unet: nn.Module, rows: Mapping[str, Tensor], batch_size: int) -> Tensor:
    """The U-Net's output (N, C, H, W) in float32 for calibration rows, in batches."""
    device = next(unet.parameters()).device
    dtype = next(unet.parameters()).dtype
    outputs = []
    for start in range(0, len(rows["sample"]), batch_size):
        part = {k: v[start : start + batch_size].to(device) for k, v in rows.items()}
        added = {k: part[k].to(dtype) for k in ("text_embeds", "time_ids") if k in part}
        with torch.inference_mode():
            out = unet(
                part["sample"].to(dtype),
                part["timestep"],
                part["encoder_hidden_states"].to(dtype),
                added_cond_kwargs=added or None,
            ).sample
        outputs.append(out.float().cpu())
    return torch.cat(outputs)
