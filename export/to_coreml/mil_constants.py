"""MIL's compressed constants as tensors: palettes, and integers with scale and offset.

The functions take an operator's inputs by their MIL names, as those of `mil_operators` do.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from laptop.errors import Unsupported
from laptop.export.to_coreml.mil_program import unpack


def lut_to_dense(
    indices: Tensor,
    lut: Tensor,
    shape: Tensor | None = None,
    vector_axis: Tensor | None = None,
) -> Tensor:
    """A palette's entries at their places (iOS 16: packed indices; iOS 18: palettes by group)."""
    if shape is not None:
        size = [int(v) for v in shape.tolist()]
        bits = int(math.log2(len(lut)))
        places = unpack(indices.numpy().tobytes(), bits, math.prod(size))
        return lut[torch.from_numpy(places).long()].reshape(size)
    if lut.shape[-1] != 1:
        raise Unsupported(f"constexpr_lut_to_dense with vectors of {lut.shape[-1]} elements.")
    groups = lut.shape[:-2]
    number = torch.arange(math.prod(groups)).reshape(groups)
    number = _spread(number, indices.shape)
    return lut.reshape(-1, lut.shape[-2])[number, indices.long()]


def _spread(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """One value a block, repeated over the elements of the block."""
    for axis, size in enumerate(shape):
        blocks = blocks.repeat_interleave(size // blocks.shape[axis], axis)
    return blocks


def blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """(data - offset) * scale, with one scale a block."""
    shift = 0.0 if offset is None else _spread(offset.float(), data.shape)
    return (data.float() - shift) * _spread(scale, data.shape)


def affine_dequantize(
    quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: Tensor
) -> Tensor:
    """(data - zero point) * scale, with one scale along `axis`."""
    shape = [1] * quantized_data.ndim
    shape[int(axis)] = -1
    zero, step = (v.float().reshape(shape if v.ndim else ()) for v in (zero_point, scale))
    return (quantized_data.float() - zero) * step
