"""Palettes: each weight becomes an index into 16, 64 or 256 values of its layer.

A layer's palette is the one-dimensional k-means of its weights as fp16 has them, by Lloyd's
iterations on the histogram, so its cost does not grow with the layer. PyTorch's weights are
replaced by their palettes' values before tracing; where a saved weight then has at most 256 values,
coremltools stores indices (`OpPalettizerConfig(mode="custom")`), which changes no value any more.

Precision "mixed" chooses the bits of each layer by what they cost in the output: with one layer
alone at 4, 6 or 8 bits the graph runs on real inputs, and mean squared errors are taken to add.
From 4 bits everywhere, the layer whose next step saves most error a stored bit goes up, until the
sum is within the floor; then all layers run together, and a shortfall lowers the allowance.
(Apple's mixed-bit palettization ranks layers by the same PSNR.)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from laptop.errors import Unsupported

BITS = {"palette8": 8, "palette6": 6, "palette4": 4}
STEPS = (4, 6, 8, 16)  # bits a layer may have in "mixed"; 16: fp16, no palette
SMALLEST = 2048  # weights; coremltools leaves smaller tensors alone by default
ITERATIONS = 40  # of Lloyd; converged on all weights of docs/explanation/log.md
ROUNDS = 12  # of choosing again where the joint error is more than the sum

Half: TypeAlias = NDArray[np.float16]
Doubles: TypeAlias = NDArray[np.float64]
Codes: TypeAlias = NDArray[np.uint16]  # fp16 numbers by their bits
Bits = dict[str, int]  # by name of the layer
Forward = Callable[[], list[Tensor]]


def layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weight is worth a palette, by name."""
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    return {
        name: m
        for name, m in module.named_modules()
        if isinstance(m, kinds) and weight_of(m).numel() > SMALLEST
    }


def palettize(weight: Tensor, bits: int) -> Tensor:
    """`weight` with at most 2^bits different values; fp16 values in its own type and shape."""
    half = weight.detach().half()
    codes = half.numpy().reshape(-1).view(np.uint16)
    used, counts = _values(codes)
    if bits == 16 or len(used) <= 2**bits:
        return half.to(weight.dtype)
    values = used.view(np.float16).astype(np.float64)
    table = np.zeros(1 << 16, np.float16)  # from each fp16 number to its replacement
    table[used] = _cluster(values, counts.astype(np.float64), 2**bits)
    return torch.from_numpy(table[codes]).reshape(weight.shape).to(weight.dtype)


def _values(codes: Codes) -> tuple[Codes, NDArray[np.int64]]:
    """The fp16 numbers among `codes` in ascending order, as bits, and how often each occurs.

    By counting, not by sorting: coremltools' own mode "unique" takes minutes a large weight.
    """
    counts = np.bincount(codes, minlength=1 << 16)
    used = np.flatnonzero(counts).astype(np.uint16)
    used = used[np.argsort(used.view(np.float16))]
    return used, counts[used]


def is_palettized(weight: Half) -> bool:
    """Whether an fp16 array has few enough values for a palette."""
    used, _ = _values(weight.reshape(-1).view(np.uint16))
    return len(used) <= 1 << max(BITS.values())


def encode(weight: Half) -> tuple[Half, NDArray[np.uint8]]:
    """The palette of an fp16 array of few values, filled up to 2^bits, and uint8 indices."""
    codes = np.ascontiguousarray(weight).reshape(-1).view(np.uint16)
    used, _ = _values(codes)
    bits = min(b for b in BITS.values() if len(used) <= 2**b)
    palette = np.zeros(2**bits, np.float16)
    palette[: len(used)] = used.view(np.float16)
    index_of = np.zeros(1 << 16, np.uint8)
    index_of[used] = np.arange(len(used))
    return palette, index_of[codes]


def _cluster(values: Doubles, counts: Doubles, size: int) -> Doubles:
    """The centre of the cluster of each of the sorted `values`, with `size` clusters."""
    # the quantiles of density^(1/3) are where an optimal quantizer's centres are (Panter and Dite)
    bins, edges = np.histogram(values, 4 * size, weights=counts)
    mass = np.concatenate([[0.0], np.cumsum(np.cbrt(bins))])
    centres = np.interp((np.arange(size) + 0.5) / size * mass[-1], mass, edges)
    for _ in range(ITERATIONS):
        nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, values)
        weight = np.bincount(nearest, counts, size)
        total = np.bincount(nearest, counts * values, size)
        moved = np.where(weight > 0, total / np.maximum(weight, 1e-300), centres)
        if np.array_equal(moved, centres):
            break
        centres = np.sort(moved)
    nearest_centres: Doubles = centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, values)]
    return nearest_centres


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer; mypy knows no attributes of modules."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight


def palettize_(module: nn.Module, bits: Mapping[str, int]) -> None:
    """Replace the weights of the layers in `bits` by their palettes' values."""
    by_name = layers(module)
    for name, number in bits.items():
        weight = weight_of(by_name[name])
        weight.data = palettize(weight, number)


def uniform(module: nn.Module, bits: int) -> Bits:
    """Bits that are equal for every layer."""
    return dict.fromkeys(layers(module), bits)


@torch.no_grad()
def choose(module: nn.Module, forward: Forward, floor_db: float) -> Bits:
    """Bits of each layer so that the outputs of `forward` keep `floor_db` at the fewest bits.

    `forward` runs `module` on real inputs; of its outputs the worst PSNR counts. `module` is left
    as it was. Raises `Unsupported` where not even fp16 weights keep the floor.
    """
    exact = forward()
    sizes = {name: weight_of(layer).numel() for name, layer in layers(module).items()}
    errors = _errors_alone(module, forward, exact)
    allowance = 1.0
    for _ in range(ROUNDS):
        bits = _fewest(errors, sizes, allowance, floor_db)
        joint = _error_of(module, bits, forward, exact)
        if joint <= _allowed(floor_db):
            return bits
        allowance *= min(0.9, _allowed(floor_db) / joint)
    raise Unsupported(
        f"precision mixed: {-10 * math.log10(joint):.1f} dB after {ROUNDS} choices, "
        f"{floor_db:g} dB wanted. Lower export.coreml.mixed_floor_db, or use fp16."
    )


def _allowed(floor_db: float) -> float:
    """Squared error relative to the squared peak that a PSNR allows."""
    return 10 ** (-floor_db / 10)


def _errors_alone(
    module: nn.Module, forward: Forward, exact: Sequence[Tensor]
) -> dict[str, dict[int, float]]:
    """The error of the output with one layer alone in a palette, by layer and bits."""
    return {
        name: {bits: _error_of(module, {name: bits}, forward, exact) for bits in STEPS[:-1]}
        | {STEPS[-1]: 0.0}
        for name in layers(module)
    }


def _error_of(
    module: nn.Module, bits: Mapping[str, int], forward: Forward, exact: Sequence[Tensor]
) -> float:
    """Squared error over squared peak, of the worst output; the weights are put back."""
    by_name = layers(module)
    before = {name: weight_of(by_name[name]).data for name in bits}
    palettize_(module, bits)
    try:
        return max(
            float((a - b).double().square().mean() / b.double().abs().max() ** 2)
            for a, b in zip(forward(), exact, strict=True)
        )
    finally:
        for name, weight in before.items():
            weight_of(by_name[name]).data = weight


def _fewest(
    errors: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, int],
    allowance: float,
    floor_db: float,
) -> Bits:
    """Greedy: the step that saves most error a stored bit, until the sum is allowed."""
    chosen = dict.fromkeys(errors, STEPS[0])
    total = sum(errors[name][STEPS[0]] for name in errors)
    while total > allowance * _allowed(floor_db):
        gains = {
            (name, to): (errors[name][now] - errors[name][to]) / (sizes[name] * (to - now))
            for name, now in chosen.items()
            for to in STEPS
            if to > now
        }
        if not gains:
            break
        name, to = max(gains, key=lambda step: gains[step])
        total -= errors[name][chosen[name]] - errors[name][to]
        chosen[name] = to
    return chosen
