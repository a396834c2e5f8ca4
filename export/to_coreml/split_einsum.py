"""Attention as Apple's neural engine wants it: a head at a time, channels first, as einsums.

"Deploying Transformers on the Apple Neural Engine" (machinelearning.apple.com, 2022), principles 1
to 4: data as (B, C, 1, S), no reshapes or transposes between the two products, small tensors. It is
an attention processor on the diffusers module that is traced, so the U-Net stays the same one.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from laptop.errors import Unsupported

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention


def use_split_einsum_(unet: "UNet2DConditionModel") -> None:
    """Let every attention of `unet` be computed in this form.

    Raises `Unsupported` for attention that has more than projections and a softmax.
    """
    for name, module in unet.named_modules():
        if not hasattr(module, "set_processor"):
            continue
        extras = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross")
        present = [extra for extra in extras if getattr(module, extra, None) is not None]
        if present or module.residual_connection or module.to_k is None:
            raise Unsupported(
                f"{name} has {', '.join(present) or 'a residual connection or no keys'}, which the "
                'split-einsum form does not cover; set export.coreml.attention = "original".'
            )
        module.set_processor(SplitEinsum())


class SplitEinsum:
    """softmax(QKᵀ / √d) V by heads; no state."""

    def __call__(
        self,
        attn: "Attention",
        hidden_states: Tensor,  # (B, S, C)
        encoder_hidden_states: Tensor | None = None,  # (B, T, width)
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            raise Unsupported('split-einsum takes no mask; set export.coreml.attention="original".')
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = _channels_first(attn.to_q(hidden_states))  # (B, C, 1, S)
        key = attn.to_k(context).unsqueeze(2)  # (B, T, 1, C)
        value = _channels_first(attn.to_v(context))  # (B, C, 1, T)
        heads = zip(
            query.chunk(attn.heads, 1),
            key.chunk(attn.heads, 3),
            value.chunk(attn.heads, 1),
            strict=True,
        )
        outputs = [_head(q, k, v, attn.scale) for q, k, v in heads]
        result = torch.cat(outputs, 1).squeeze(2).transpose(1, 2)  # (B, S, C)
        for layer in attn.to_out:
            result = layer(result)
        scaled: Tensor = result / attn.rescale_output_factor
        return scaled


def _channels_first(x: Tensor) -> Tensor:
    """(B, S, C) to (B, C, 1, S)."""
    return x.transpose(1, 2).unsqueeze(2)


def _head(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """One head: (B, c, 1, S), (B, T, 1, c) and (B, c, 1, T) to (B, c, 1, S)."""
    scores = torch.einsum("bchq,bkhc->bkhq", query * scale, key)  # (B, T, 1, S)
    return torch.einsum("bkhq,bchk->bchq", scores.softmax(1), value)
