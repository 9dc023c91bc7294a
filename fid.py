"""How good images are, as pure functions in float64: PSNR, SSIM, and the Frechet distance between feature sets.

psnr(a, b), ssim(a, b)                        reconstruction against original, per image
frechet_distance(*statistics(f), *statistics(g))    two sets of features; it is FID only for Inception features
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(a: Tensor, b: Tensor, data_range: float = 255.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of a, b (B, C, H, W) with values in [0, data_range] -> (B,), float64.

    10 log10(data_range^2 / MSE); infinite for equal images.
    """
    check_pair(a, b)
    mse = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(data_range**2 / mse)


def ssim(a: Tensor, b: Tensor, data_range: float = 255.0) -> Tensor:
    """Structural similarity of a, b (B, C, H, W) with values in [0, data_range] -> (B,) in [-1, 1], float64.

    Wang et al. 2004: Gaussian window 11 x 11 with sigma 1.5, population covariance, K1 = 0.01, K2 = 0.03; the mean over the
    pixels whose window lies inside the image, and over channels. Raises ValueError for images under 11 px.
    """
    check_pair(a, b)
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11 x 11 px, these are {a.shape[-2]} x {a.shape[-1]}")
    offsets = torch.arange(-5, 6, dtype=torch.float64, device=a.device)
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(x: Tensor) -> Tensor:
        x = x.flatten(0, 1)[:, None]  # (B C, 1, H, W): the window is separable
        return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    a_, b_ = a.double(), b.double()
    mean_a, mean_b = blur(a_), blur(b_)
    var_a, var_b = blur(a_ * a_) - mean_a**2, blur(b_ * b_) - mean_b**2
    covariance = blur(a_ * b_) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    index = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    index = index / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return index.view(len(a), -1).mean(dim=1)


def check_pair(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(
            f"two batches (B, C, H, W) of the same shape are needed, not {tuple(a.shape)} and {tuple(b.shape)}"
        )


def statistics(features: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """features (N, D), N >= 2 -> mean (D,) and covariance (D, D) with n - 1, float64. Raises ValueError on NaN."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be (N, D) with N of at least 2, not {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError(f"{int((~np.isfinite(features)).sum())} feature values are not finite")
    return features.mean(axis=0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), float64 (Dowson and Landau 1982; Heusel et al. 2017).

    By symmetric eigenvalues, so that singular covariances need no regularisation.
    """
    if mean1.shape != mean2.shape or cov1.shape != cov2.shape:
        raise ValueError(f"statistics of {len(mean1)} and of {len(mean2)} dimensions cannot be compared")
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov2 @ root)
    trace = np.trace(cov1) + np.trace(cov2) - 2 * np.sqrt(cross.clip(min=0)).sum()
    return float(np.square(mean1 - mean2).sum() + trace)
