"""The Fréchet distance between two sets of pictures (Heusel et al. 2017, arXiv 1706.08500).

The usual feature space is Inception's. Here it is that of the teacher's own VAE, which suits small
synthetic pictures, needs no download, and is the same for every model that is compared.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

POOLED = 8  # latents are averaged to at most this many cells a side
FEATURE_SPACE = (
    "posterior mean latents of the teacher's VAE, "
    f"average-pooled to at most {POOLED}x{POOLED}, flattened"
)
BATCH = 32


def latent_features(vae: Any, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Features (N, D) of images (N, H, W, 3) in the space that `FEATURE_SPACE` describes."""
    import torch
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
    from torch.nn.functional import adaptive_avg_pool2d

    rows = []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            pixels = torch.from_numpy(images[start : start + BATCH]).to(vae.dtype)
            scaled = pixels.permute(0, 3, 1, 2) / 127.5 - 1  # (B, 3, H, W) in -1..1
            encoded = vae.encode(scaled)
            is_tiny = isinstance(encoded, AutoencoderTinyOutput)  # one value, no distribution
            latents = encoded.latents if is_tiny else encoded.latent_dist.mean  # (B, C, h, w)
            size = (min(latents.shape[-2], POOLED), min(latents.shape[-1], POOLED))
            rows.append(adaptive_avg_pool2d(latents, size).flatten(1).double().numpy())
    return np.concatenate(rows)


def frechet_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, D) and (M, D).

    None with fewer than two rows on a side, which have no covariance.
    """
    if min(len(a), len(b)) < 2:
        return None
    (mean_a, cov_a), (mean_b, cov_b) = (gaussian(x) for x in (a, b))
    return gaussian_distance(mean_a, cov_a, mean_b, cov_b)


def gaussian(features: NDArray[np.float64]) -> Sequence[NDArray[np.float64]]:
    """Mean (D,) and covariance (D, D), with n - 1."""
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def gaussian_distance(
    mean_a: NDArray[np.float64],
    cov_a: NDArray[np.float64],
    mean_b: NDArray[np.float64],
    cov_b: NDArray[np.float64],
) -> float:
    """The distance of two Gaussians, in float64.

    tr (C_a C_b)^(1/2) is the sum of the roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which
    is symmetric: unlike a matrix square root of C_a C_b this also holds for singular covariances.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)).sum()
    shift = mean_a - mean_b
    distance = shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(max(distance, 0.0))  # rounding may leave -1e-15
