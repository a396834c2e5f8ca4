"""The MIL operators as functions of tensors, by coremltools' documentation of the operators.

Functions take the operator's inputs by their MIL names as tensors (floats in float32, whatever they
are stored as), texts, or lists; the interpreter rounds what they return to the saved type. An
operator that is not in `OPERATORS` is an error, never a guess.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from laptop.errors import Unsupported
from laptop.export.to_coreml.mil_constants import (
    affine_dequantize,
    blockwise_shift_scale,
    lut_to_dense,
)

Operator = Callable[..., object]
Scalar = Tensor | float  # a number or a truth value, saved as a tensor of rank 0
Vector = Tensor | Sequence[int] | int


def ints(value: Vector) -> list[int]:
    """A vector, or a scalar, as Python integers."""
    return [int(v) for v in torch.as_tensor(value).reshape(-1).tolist()]


def conv(
    x: Tensor,  # (B, C, *S)
    weight: Tensor,  # (C out, C / groups, *K)
    bias: Tensor | None = None,
    strides: Vector = 1,
    pad_type: str = "valid",
    pad: Vector = (),
    dilations: Vector = 1,
    groups: Scalar = 1,
) -> Tensor:
    spatial = weight.ndim - 2
    if pad_type == "custom":
        before_after = ints(pad)
        pairs = [before_after[2 * i : 2 * i + 2] for i in range(spatial)]
        x = F.pad(x, [p for pair in reversed(pairs) for p in pair])
    elif pad_type != "valid":
        raise Unsupported(f"conv with pad_type {pad_type!r}; known: 'valid', 'custom'.")
    stride, dilation = _each(strides, spatial), _each(dilations, spatial)
    convolve = {1: F.conv1d, 2: F.conv2d}[spatial]
    return convolve(x, weight, bias, stride, 0, dilation, int(groups))


def _each(value: Vector, count: int) -> list[int]:
    sizes = ints(value)
    return sizes if len(sizes) == count else sizes * count


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def matmul(
    x: Tensor, y: Tensor, transpose_x: Scalar = False, transpose_y: Scalar = False
) -> Tensor:
    x = x.transpose(-1, -2) if bool(transpose_x) else x
    y = y.transpose(-1, -2) if bool(transpose_y) else y
    return x @ y


def einsum(values: list[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation, *values)


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        hidden = torch.zeros_like(scores).masked_fill(~attn_mask, -math.inf)
        scores = scores + (hidden if attn_mask.dtype == torch.bool else attn_mask)
    return scores.softmax(-1) @ value


def layer_norm(
    x: Tensor,
    axes: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Scalar = 1e-5,
) -> Tensor:
    over = [a % x.ndim for a in ints(axes)]
    centred = x - x.mean(over, keepdim=True)
    result = centred / (centred.square().mean(over, keepdim=True) + float(epsilon)).sqrt()
    shape = [size if i in over else 1 for i, size in enumerate(x.shape)]
    result = result if gamma is None else result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


def batch_norm(
    x: Tensor,  # (B, C, *S)
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Scalar = 1e-5,
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, False, 0.0, float(epsilon))


def instance_norm(
    x: Tensor,  # (B, C, *S)
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Scalar = 1e-5,
) -> Tensor:
    return F.instance_norm(x, None, None, gamma, beta, True, 0.0, float(epsilon))


def reduce(over: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def call(x: Tensor, axes: Tensor | None = None, keep_dims: Scalar = False) -> Tensor:
        return over(x, list(range(x.ndim)) if axes is None else ints(axes), bool(keep_dims))

    return call


def reduce_argmax(
    x: Tensor, axis: Scalar = -1, keep_dims: Scalar = False, output_dtype: str = "int32"
) -> Tensor:
    return x.argmax(int(axis), bool(keep_dims))


def softmax(x: Tensor, axis: Scalar = -1) -> Tensor:
    return x.softmax(int(axis))


def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    match mode:
        case "EXACT":
            return F.gelu(x)
        case "TANH_APPROXIMATION":
            return F.gelu(x, approximate="tanh")
        case "SIGMOID_APPROXIMATION":
            return x * torch.sigmoid(1.702 * x)
    raise Unsupported(f"gelu with mode {mode!r}.")


def reshape(x: Tensor, shape: Tensor) -> Tensor:
    wanted = ints(shape)
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(wanted)])


def transpose(x: Tensor, perm: Tensor) -> Tensor:
    return x.permute(ints(perm))


def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    rank = x.ndim + len(ints(axes))
    for axis in sorted(a % rank for a in ints(axes)):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    over = [i for i, size in enumerate(x.shape) if size == 1] if axes is None else ints(axes)
    return x.squeeze(tuple(over))


def concat(values: list[Tensor], axis: Scalar, interleave: Scalar = False) -> Tensor:
    if bool(interleave):
        raise Unsupported("concat with interleave.")
    return torch.cat(values, int(axis))


def stack(values: list[Tensor], axis: Scalar) -> Tensor:
    return torch.stack(values, int(axis))


def split(
    x: Tensor, axis: Scalar, num_splits: Scalar = 1, split_sizes: Tensor | None = None
) -> tuple[Tensor, ...]:
    along = int(axis)
    sizes = x.shape[along] // int(num_splits) if split_sizes is None else ints(split_sizes)
    return torch.split(x, sizes, along)


def slice_by_index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    rank = x.ndim
    no = [False] * rank
    steps = [1] * rank if stride is None else ints(stride)
    from_start = no if begin_mask is None else begin_mask.tolist()
    to_end = no if end_mask is None else end_mask.tolist()
    single = no if squeeze_mask is None else squeeze_mask.tolist()
    starts, ends = ints(begin), ints(end)
    for axis in range(rank):
        if single[axis]:
            rows = range(x.shape[axis])[starts[axis] : None][:1]
        else:
            start = None if from_start[axis] else starts[axis]
            stop = None if to_end[axis] else ends[axis]
            rows = range(x.shape[axis])[start : stop : steps[axis]]
        x = x.index_select(axis, torch.tensor(list(rows), dtype=torch.int64))
    return x.squeeze(tuple(i for i in range(rank) if single[i]))


def slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    for axis, (start, count) in enumerate(zip(ints(begin), ints(size), strict=True)):
        start = start % x.shape[axis] if start < 0 else start
        x = x.narrow(axis, start, x.shape[axis] - start if count == -1 else count)
    return x


def tile(x: Tensor, reps: Tensor) -> Tensor:
    return x.repeat(ints(reps))


def pad(x: Tensor, pad: Tensor, mode: str = "constant", constant_val: Scalar = 0.0) -> Tensor:
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "replicate"}
    if mode not in modes:
        raise Unsupported(f"pad with mode {mode!r}; known: {', '.join(modes)}.")
    sizes = ints(pad)
    pairs = [sizes[i : i + 2] for i in range(0, len(sizes), 2)]
    if mode != "constant":  # torch pads the last axes only
        while pairs and pairs[0] == [0, 0]:
            pairs = pairs[1:]
    flat = [p for pair in reversed(pairs) for p in pair]
    return F.pad(x, flat, modes[mode], float(constant_val) if mode == "constant" else None)


def upsample_nearest_neighbor(
    x: Tensor,  # (B, C, H, W)
    scale_factor_height: Scalar = 1,
    scale_factor_width: Scalar = 1,
) -> Tensor:
    high, wide = float(scale_factor_height), float(scale_factor_width)
    if high % 1 or wide % 1:
        raise Unsupported(f"upsample_nearest_neighbor by {high} and {wide}: whole numbers only.")
    return x.repeat_interleave(int(high), -2).repeat_interleave(int(wide), -1)


def gather(
    x: Tensor,
    indices: Tensor,
    axis: Scalar = 0,
    batch_dims: Scalar = 0,
    validate_indices: Scalar = False,
) -> Tensor:
    if int(batch_dims):
        raise Unsupported(f"gather with batch_dims {int(batch_dims)}; 0 only.")
    along = int(axis) % x.ndim
    rows = indices.reshape(-1).long()
    picked = x.index_select(along, torch.where(rows < 0, rows + x.shape[along], rows))
    return picked.reshape(*x.shape[:along], *indices.shape, *x.shape[along + 1 :])


def gather_nd(
    x: Tensor, indices: Tensor, batch_dims: Scalar = 0, validate_indices: Scalar = False
) -> Tensor:
    if int(batch_dims):
        raise Unsupported(f"gather_nd with batch_dims {int(batch_dims)}; 0 only.")
    return x[tuple(indices.long().unbind(-1))]


def gather_along_axis(
    x: Tensor, indices: Tensor, axis: Scalar = 0, validate_indices: Scalar = False
) -> Tensor:
    return x.take_along_dim(indices.long(), int(axis))


def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item())


def fill(shape: Tensor, value: Scalar = 0.0) -> Tensor:
    return torch.as_tensor(value).reshape(()).expand(ints(shape))


def cumsum(
    x: Tensor, axis: Scalar = 0, exclusive: Scalar = False, reverse: Scalar = False
) -> Tensor:
    if bool(exclusive) or bool(reverse):
        raise Unsupported("cumsum with exclusive or reverse.")
    return x.cumsum(int(axis))


def cast(x: Tensor, dtype: str) -> Tensor:
    """Convert to `dtype`, which is the declared type of the output; integers drop the fraction."""
    return x.trunc() if "int" in dtype and x.is_floating_point() else x


def rsqrt(x: Tensor, epsilon: Scalar = 1e-12) -> Tensor:
    return (x + float(epsilon)).rsqrt()


def clip(x: Tensor, alpha: Scalar, beta: Scalar) -> Tensor:
    return x.clamp(float(alpha), float(beta))


def floor_div(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode="floor")


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond.bool(), a, b)


OPERATORS: dict[str, Operator] = {
    "add": lambda x, y: x + y,
    "batch_norm": batch_norm,
    "cast": cast,
    "clip": clip,
    "concat": concat,
    "const": lambda val: val,
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_cast": lambda source_val, output_dtype: source_val,
    "constexpr_lut_to_dense": lut_to_dense,
    "conv": conv,
    "cos": lambda x: x.cos(),
    "cumsum": cumsum,
    "einsum": einsum,
    "equal": lambda x, y: x == y,
    "erf": lambda x: x.erf(),
    "exp": lambda x: x.exp(),
    "expand_dims": expand_dims,
    "fill": fill,
    "floor_div": floor_div,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "gelu": gelu,
    "greater": lambda x, y: x > y,
    "greater_equal": lambda x, y: x >= y,
    "identity": lambda x: x,
    "instance_norm": instance_norm,
    "layer_norm": layer_norm,
    "less": lambda x, y: x < y,
    "less_equal": lambda x, y: x <= y,
    "linear": linear,
    "logical_and": lambda x, y: x & y,
    "logical_not": lambda x: ~x,
    "logical_or": lambda x, y: x | y,
    "matmul": matmul,
    "maximum": lambda x, y: torch.maximum(x, y),
    "minimum": lambda x, y: torch.minimum(x, y),
    "mul": lambda x, y: x * y,
    "not_equal": lambda x, y: x != y,
    "pad": pad,
    "pow": lambda x, y: x**y,
    "range_1d": range_1d,
    "real_div": lambda x, y: x / y,
    "reduce_argmax": reduce_argmax,
    "reduce_max": reduce(lambda x, axes, keep: x.amax(axes, keep)),
    "reduce_mean": reduce(lambda x, axes, keep: x.mean(axes, keep)),
    "reduce_sum": reduce(lambda x, axes, keep: x.sum(axes, keep)),
    "relu": lambda x: x.relu(),
    "reshape": reshape,
    "rsqrt": rsqrt,
    "scaled_dot_product_attention": attention,
    "select": select,
    "shape": lambda x: torch.tensor(x.shape),
    "sigmoid": lambda x: x.sigmoid(),
    "silu": lambda x: x * x.sigmoid(),
    "sin": lambda x: x.sin(),
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "softmax": softmax,
    "split": split,
    "sqrt": lambda x: x.sqrt(),
    "square": lambda x: x.square(),
    "squeeze": squeeze,
    "stack": stack,
    "sub": lambda x, y: x - y,
    "tanh": lambda x: x.tanh(),
    "tile": tile,
    "transpose": transpose,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
