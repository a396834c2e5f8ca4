"""The distance of two arrays, as a parity report states it for an output."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from laptop.export.arrays import Array

BLANK = 1 / 255  # standard deviation of a picture in [0, 1] that shows nothing


@dataclass(frozen=True)
class Comparison:
    """One output against its reference, or the worst of several."""

    psnr_db: float  # inf where identical, nan where not comparable
    cosine: float  # of the angle between them, 1 where they are parallel; nan likewise
    max_abs_error: float
    nonfinite: int  # NaN and Inf values, in either


def psnr(reference: Array, value: Array) -> float:
    """Peak signal-to-noise ratio in dB, the peak being max|reference|, computed in float64.

    Infinite for equal arrays, -inf where the reference is all zero and the value is not, NaN where
    either holds NaN or Inf. Raises ValueError for arrays of unlike shape.
    """
    if reference.shape != value.shape:
        raise ValueError(f"shapes differ: {reference.shape} and {value.shape}")
    exact, output = reference.astype(np.float64), value.astype(np.float64)
    if not (np.isfinite(exact).all() and np.isfinite(output).all()):
        return math.nan
    error = float(np.mean((exact - output) ** 2))
    peak = float(np.max(np.abs(exact)))
    if error == 0:
        return math.inf
    return 10 * math.log10(peak**2 / error) if peak > 0 else -math.inf


def cosine(reference: Array, value: Array) -> float:
    """Cosine similarity of two arrays as vectors, in float64; 1 for two of zeros, 0 for one."""
    a, b = reference.astype(np.float64).ravel(), value.astype(np.float64).ravel()
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    if lengths == 0:
        return 1.0 if np.array_equal(a, b) else 0.0
    return float(a @ b) / lengths


def compare(reference: Array, value: Array) -> Comparison:
    """Compare one output with its reference; ValueError for unlike shapes."""
    ratio = psnr(reference, value)
    bad = int(np.sum(~np.isfinite(reference)) + np.sum(~np.isfinite(value)))
    if bad:
        return Comparison(math.nan, math.nan, math.nan, bad)
    error = np.abs(reference.astype(np.float64) - value.astype(np.float64))
    return Comparison(ratio, cosine(reference, value), float(error.max()), 0)


def worst(comparisons: Sequence[Comparison]) -> Comparison:
    """The lowest PSNR and cosine, the largest error, all bad values together."""
    bad = sum(c.nonfinite for c in comparisons)
    if bad:
        return Comparison(math.nan, math.nan, math.nan, bad)
    return Comparison(
        min(c.psnr_db for c in comparisons),
        min(c.cosine for c in comparisons),
        max(c.max_abs_error for c in comparisons),
        0,
    )


def is_blank(picture: Array) -> bool:
    """Whether a picture in [0, 1] has one colour, such as the black one that NaN becomes."""
    return bool(np.std(picture.astype(np.float64)) < BLANK)
