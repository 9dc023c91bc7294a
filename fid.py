"""How good images are: FID, Inception Score, precision and recall, PSNR and SSIM.

    python fid.py samples.npz reference.npz           # FID, Inception Score, precision and recall
    python fid.py folder --save_stats stats.npz       # mean and covariance, to be a reference later

This file works when it is copied alone, which is why it has some small helpers of its own; it needs
torch, numpy, pillow and tqdm. Samples and references are folders of images of one size, .npz files
of images as ADM's evaluator takes them (arr_0, uint8, (N, H, W, 3)), or .npz files of statistics
(mu, sigma). evaluate.py measures runs of train.py.

Images go through the Inception-v3 of the 2015 TensorFlow graph, with the weights of pytorch-fid.
They are resized as TensorFlow 1 did, which is what ADM's evaluator sees, or as pytorch-fid does it.
The metrics are pure functions and compute in float64.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# Images per forward pass. It is a constant because the other images of a pass change the last
# digits.
BATCH_SIZE = 50
# What the report calls the two ways to resize.
RESIZE_MODES = ("tf1", "pytorch-fid")


# --------------------------------------------------------------------------------------------------
# Metrics of image pairs.


def check_same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(
            f"images must be (B, C, H, W), both of the same shape, not {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )


def psnr(a: Tensor, b: Tensor, data_range: float = 255.0) -> Tensor:
    """10 log10(data_range^2 / MSE) in dB -> (B,), float64; infinite for equal images.

    a, b (B, C, H, W) in [0, data_range].
    """
    check_same_shape(a, b)
    mse = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(data_range**2 / mse)


def ssim(
    a: Tensor,
    b: Tensor,
    data_range: float = 255.0,
    window: Tensor | None = None,
    covariance_scale: float = 1.0,
) -> Tensor:
    """Structural similarity (Wang et al. 2004) -> (B,) in [-1, 1], float64.

    a, b               (B, C, H, W) in [0, data_range]
    window             (n,), applied along both sides; by default a Gaussian, 11 px with sigma 1.5
    covariance_scale   factor on variances and covariances

    K1 = 0.01, K2 = 0.03. The mean is over channels and over pixels whose window lies in the image.
    """
    check_same_shape(a, b)
    a, b = a.double(), b.double()
    if window is None:
        window = torch.exp(-torch.arange(-5, 6).double().square() / (2 * 1.5**2))
    if min(a.shape[-2:]) < len(window):
        size = len(window)
        raise ValueError(f"SSIM needs {size} x {size} px, these are {a.shape[-2]} x {a.shape[-1]}")
    window = (window / window.sum()).to(a)

    def blur(x: Tensor) -> Tensor:
        x = x.flatten(0, 1)[:, None]  # (B C, 1, H, W)
        return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mean_a, mean_b = blur(a), blur(b)
    var_a = covariance_scale * (blur(a * a) - mean_a**2)
    var_b = covariance_scale * (blur(b * b) - mean_b**2)
    covariance = covariance_scale * (blur(a * b) - mean_a * mean_b)
    c1 = (0.01 * data_range) ** 2
    c2 = (0.03 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).view(len(a), -1).mean(dim=1)


def ssim_softvq(a: Tensor, b: Tensor, data_range: float = 255.0) -> Tensor:
    """SSIM as SoftVQ-VAE's public script computes it, on whose scale the paper's tables lie.

    It has a uniform window of 7 px and constants for twice the actual range of the images. At 25 dB
    it is about 0.1 above `ssim`.
    """
    sample_covariance = 49 / 48  # N / (N - 1) makes the covariance of 7 x 7 pixels unbiased
    return ssim(a, b, 2 * data_range, torch.ones(7).double(), sample_covariance)


# --------------------------------------------------------------------------------------------------
# Metrics of feature sets.


def mean_cov(features: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """features (N, D) -> mean (D,) and covariance (D, D) with the divisor N - 1, float64.

    Raises ValueError unless N is at least 2 and all values are finite.
    """
    features = torch.as_tensor(features).double()
    num_nonfinite = int((~features.isfinite()).sum())
    if features.ndim != 2 or len(features) < 2 or num_nonfinite:
        raise ValueError(
            f"features must be finite and (N, D) with N of at least 2, not {tuple(features.shape)} "
            f"with {num_nonfinite} not finite"
        )
    return features.mean(dim=0).cpu().numpy(), features.T.cov().cpu().numpy()


class RunningStats:
    """Mean and covariance of features that come in batches, so that no feature has to be kept.

    It holds sums in float64: the number of images, of their features (D,) and of the features'
    outer products (D, D). Those of several processes can be merged.
    """

    def __init__(self):
        self.count = 0
        self.total = torch.zeros(1)
        self.products = torch.zeros(1, 1)

    def add(self, features: Tensor) -> None:
        """features (B, D)."""
        features = features.double()
        self.count += len(features)
        self.total = self.total + features.sum(dim=0)
        self.products = self.products + features.T @ features

    def merge(self, other: "RunningStats") -> None:
        self.count += other.count
        self.total = self.total + other.total
        self.products = self.products + other.products

    def mean_cov(self) -> tuple[np.ndarray, np.ndarray]:
        """As the function `mean_cov` of all features. Raises ValueError as it does."""
        mean = self.total / self.count
        cov = (self.products - self.count * mean[:, None] * mean) / (self.count - 1)
        if not cov.isfinite().all():
            raise ValueError(
                f"features must be finite, of at least 2 images; these are of {self.count}"
            )
        return mean.cpu().numpy(), cov.cpu().numpy()


def frechet_distance(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray
) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), float64 (Heusel et al. 2017).

    Raises ValueError for statistics of different dimensions.
    """
    if mean1.shape != mean2.shape or cov1.shape != cov2.shape:
        raise ValueError(
            f"statistics of {len(mean1)} and {len(mean2)} dimensions are not comparable"
        )
    # With S1 = R R^T, S1 S2 has the same eigenvalues as the symmetric matrix R^T S2 R, so that
    # singular covariances need no regularization. R leaves out the directions in which S1 is zero
    # up to rounding.
    values, vectors = torch.linalg.eigh(torch.from_numpy(cov1))
    keep = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    sqrt_cov1 = vectors[:, keep] * values[keep].sqrt()
    product = sqrt_cov1.T @ torch.from_numpy(cov2) @ sqrt_cov1
    tr_sqrt = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum().item()
    return float(np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * tr_sqrt)


def inception_score(probabilities: Tensor, block_size: int = 5000) -> tuple[float, float]:
    """exp(E KL(p(y|x) || p(y))), Salimans et al. 2016 -> mean and standard deviation over blocks.

    probabilities (N, K). A shorter last block counts as much as the others, as in ADM's evaluator.
    """
    scores = []
    for p in probabilities.double().split(block_size):
        divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(dim=0))  # 0 log 0 is 0
        scores.append(divergence.sum(dim=1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
    real: Tensor, fake: Tensor, k: int = 3, block_size: int = 1000
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (N, D) and (M, D).

    Raises ValueError unless N and M are larger than k.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"precision and recall need over {k} images, not {len(real)} and {len(fake)}"
        )

    def fraction_in_manifold(points: Tensor, centers: Tensor) -> float:
        """The share of points within the radius of a center: the distance of its k-th neighbor."""
        radii = []
        for block in centers.split(block_size):
            distances = torch.cdist(block, centers)
            nearest = distances.kthvalue(k + 1, dim=1)  # the very nearest is the center itself
            radii.append(nearest.values)
        radii = torch.cat(radii)
        inside = []
        for block in points.split(block_size):
            inside.append((torch.cdist(block, centers) <= radii).any(dim=1))
        return torch.cat(inside).double().mean().item()

    real, fake = real.double(), fake.double()
    return fraction_in_manifold(fake, real), fraction_in_manifold(real, fake)


# --------------------------------------------------------------------------------------------------
# Inception-v3, with the parameter names of the official file.


def conv_bn(
    in_channels: int, out_channels: int, kernel: int | tuple[int, int], **conv
) -> nn.Sequential:
    """Convolution, batch normalization, ReLU."""
    layers = OrderedDict()
    layers["conv"] = nn.Conv2d(in_channels, out_channels, kernel, bias=False, **conv)
    layers["bn"] = nn.BatchNorm2d(out_channels, eps=1e-3)
    layers["relu"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


def average_pool(x: Tensor) -> Tensor:
    """The average over 3 x 3 pixels, in which padding does not count: FID's own variant."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    def __init__(self, in_channels: int, pool_channels: int):
        super().__init__()
        self.branch1x1 = conv_bn(in_channels, 64, 1)
        self.branch5x5_1 = conv_bn(in_channels, 48, 1)
        self.branch5x5_2 = conv_bn(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = conv_bn(in_channels, 64, 1)
        self.branch3x3dbl_2 = conv_bn(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = conv_bn(96, 96, 3, padding=1)
        self.branch_pool = conv_bn(in_channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3 = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = self.branch_pool(average_pool(x))
        return torch.cat([self.branch1x1(x), branch5x5, branch3x3, branch_pool], dim=1)


class InceptionB(nn.Module):
    """Halves the resolution."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch3x3 = conv_bn(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = conv_bn(in_channels, 64, 1)
        self.branch3x3dbl_2 = conv_bn(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = conv_bn(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), branch3x3dbl, F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionC(nn.Module):
    def __init__(self, in_channels: int, width: int):
        super().__init__()
        row = dict(kernel=(1, 7), padding=(0, 3))
        column = dict(kernel=(7, 1), padding=(3, 0))
        self.branch1x1 = conv_bn(in_channels, 192, 1)
        self.branch7x7_1 = conv_bn(in_channels, width, 1)
        self.branch7x7_2 = conv_bn(width, width, **row)
        self.branch7x7_3 = conv_bn(width, 192, **column)
        self.branch7x7dbl_1 = conv_bn(in_channels, width, 1)
        self.branch7x7dbl_2 = conv_bn(width, width, **column)
        self.branch7x7dbl_3 = conv_bn(width, width, **row)
        self.branch7x7dbl_4 = conv_bn(width, width, **column)
        self.branch7x7dbl_5 = conv_bn(width, 192, **row)
        self.branch_pool = conv_bn(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_1(x)
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(branch7x7dbl))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        branch_pool = self.branch_pool(average_pool(x))
        return torch.cat([self.branch1x1(x), branch7x7, branch7x7dbl, branch_pool], dim=1)


class InceptionD(nn.Module):
    """Halves the resolution."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch3x3_1 = conv_bn(in_channels, 192, 1)
        self.branch3x3_2 = conv_bn(192, 320, 3, stride=2)
        self.branch7x7x3_1 = conv_bn(in_channels, 192, 1)
        self.branch7x7x3_2 = conv_bn(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = conv_bn(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = conv_bn(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7x3 = self.branch7x7x3_2(self.branch7x7x3_1(x))
        branch7x7x3 = self.branch7x7x3_4(self.branch7x7x3_3(branch7x7x3))
        return torch.cat([branch3x3, branch7x7x3, F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionE(nn.Module):
    """The last two blocks. In FID's network, the very last one pools by the maximum."""

    def __init__(self, in_channels: int, max_pool: bool):
        super().__init__()
        row = dict(kernel=(1, 3), padding=(0, 1))
        column = dict(kernel=(3, 1), padding=(1, 0))
        self.max_pool = max_pool
        self.branch1x1 = conv_bn(in_channels, 320, 1)
        self.branch3x3_1 = conv_bn(in_channels, 384, 1)
        self.branch3x3_2a = conv_bn(384, 384, **row)
        self.branch3x3_2b = conv_bn(384, 384, **column)
        self.branch3x3dbl_1 = conv_bn(in_channels, 448, 1)
        self.branch3x3dbl_2 = conv_bn(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = conv_bn(384, 384, **row)
        self.branch3x3dbl_3b = conv_bn(384, 384, **column)
        self.branch_pool = conv_bn(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3_1(x)
        branch3x3 = torch.cat([self.branch3x3_2a(branch3x3), self.branch3x3_2b(branch3x3)], dim=1)
        dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        dbl = torch.cat([self.branch3x3dbl_3a(dbl), self.branch3x3dbl_3b(dbl)], dim=1)
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else average_pool(x)
        return torch.cat([self.branch1x1(x), branch3x3, dbl, self.branch_pool(pooled)], dim=1)


class InceptionV3(nn.Module):
    """The Inception-v3 of FID (Heusel et al. 2017)."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = conv_bn(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = conv_bn(32, 32, 3)
        self.Conv2d_2b_3x3 = conv_bn(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = conv_bn(64, 80, 1)
        self.Conv2d_4a_3x3 = conv_bn(80, 192, 3)
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, max_pool=False)
        self.Mixed_7c = InceptionE(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, 299, 299) from `inception_input` -> pool3 (B, 2048), the features of FID."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6a(x)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7a(x)
        x = self.Mixed_7c(self.Mixed_7b(x))
        return x.mean(dim=(2, 3))

    def logits(self, pool3: Tensor) -> Tensor:
        """pool3 (B, 2048) -> (B, 1008), without the bias, as the Inception Score takes them."""
        return pool3 @ self.fc.weight.to(pool3).T


def inception_input(images: Tensor, resize: str = "tf1") -> Tensor:
    """images uint8 (B, 3, H, W) -> float32 (B, 3, 299, 299) in about [-1, 1].

    tf1          TensorFlow 1's bilinear resize, with the source index i * in / out and without a
                 half-pixel shift; then (x - 128) / 128. ADM's evaluator and torch-fidelity do this
    pytorch-fid  bilinear with a half-pixel shift; then 2 x / 255 - 1

    Raises ValueError for images of another type and for other ways to resize.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        kind = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"Inception needs uint8 images (B, 3, H, W), not {kind}")
    if resize not in RESIZE_MODES:
        raise ValueError(f"resize is {resize!r}; it must be one of {', '.join(RESIZE_MODES)}")
    x = images.float()
    if resize == "pytorch-fid":
        x = F.interpolate(x / 255, size=(299, 299), mode="bilinear", align_corners=False)
        return 2 * x - 1
    x = resize_tf1(x, dim=3)  # the width first, as TensorFlow's ResizeBilinear rounds
    x = resize_tf1(x, dim=2)
    return (x - 128) / 128


def resize_tf1(x: Tensor, dim: int) -> Tensor:
    """Linear interpolation of one dimension to 299, as TensorFlow 1 computes it."""
    size = 299
    length = x.shape[dim]
    ratio = torch.tensor(length / size)  # rounded to float32, as in TensorFlow
    position = torch.arange(size, device=x.device, dtype=torch.float32) * ratio
    low = position.long()
    high = (low + 1).clamp(max=length - 1)
    left, right = x.index_select(dim, low), x.index_select(dim, high)
    shape = [-1] + [1] * (3 - dim)
    return left + (right - left) * (position - low).view(shape)


def inception_path(weights: str = "") -> Path:
    """Where the weights are: in the folder `weights`, or else in torch hub's cache."""
    if weights and not Path(weights).is_dir():
        raise ValueError(f"--weights {weights} is not a folder")
    if weights and Path(weights, INCEPTION_FILE).is_file():
        return Path(weights, INCEPTION_FILE)
    return Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)


def download_inception(weights: str = "") -> Path:
    """Download the weights into torch hub's cache if they are missing -> where they are.

    Raises ValueError if the file cannot be downloaded.
    """
    path = inception_path(weights)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256)
    except Exception as error:
        raise ValueError(
            f"cannot download {INCEPTION_FILE} from {INCEPTION_URL}; try again, or get it "
            f"elsewhere and pass its folder with --weights FOLDER: {error}"
        ) from error
    return path


def load_inception(weights: str = "", device: torch.device | str = "cpu") -> InceptionV3:
    """Inception with its official weights. Raises ValueError if they are missing or do not fit."""
    path = download_inception(weights)
    model = InceptionV3()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing, unexpected = model.load_state_dict(state, strict=False)
        # Some copies of the file have counters of batches, others do not. They are not needed.
        missing = [key for key in missing if not key.endswith("num_batches_tracked")]
        if missing or unexpected:
            raise ValueError(f"missing keys {missing[:3]}, unexpected keys {unexpected[:3]}")
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} is not a whole {INCEPTION_FILE}: {reason}") from error
    model = model.float().eval().requires_grad_(False)
    return model.to(device, memory_format=torch.channels_last)


@torch.no_grad()
def inception_features(model: InceptionV3, images: Tensor, resize: str = "tf1") -> Tensor:
    """images uint8 (B, 3, H, W) -> pool3 float32 (B, 2048), on the CPU.

    TF32 is switched off, because it would show in FID's digits.
    """
    x = inception_input(images.to(model.fc.weight.device), resize)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return model(x.contiguous(memory_format=torch.channels_last)).cpu()


# --------------------------------------------------------------------------------------------------
# Sets of images.


def list_images(folder: str | Path) -> list[Path]:
    """The image files in a folder and in those below it, sorted, without hidden folders."""
    extensions = Image.registered_extensions().items()
    known = {extension for extension, file_format in extensions if file_format in Image.OPEN}
    paths = []
    for path in Path(folder).rglob("*"):
        parts = path.relative_to(folder).parts
        is_hidden = any(part.startswith((".", "@")) for part in parts)
        if path.suffix.lower() in known and not is_hidden:
            paths.append(path)
    return sorted(paths)


def read_image(path: Path) -> Tensor:
    """-> uint8 (3, H, W). Raises ValueError for anything but 8-bit gray and RGB images."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("RGB", "L"):
                raise ValueError(
                    f"its pixels are of type {image.mode}; convert it to 8-bit RGB first"
                )
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:  # Pillow raises a dozen kinds of errors for damaged files
        raise ValueError(f"{path} cannot be used: {error}") from error


class ImageSet:
    """A folder of images of one size, or an .npz of images, of statistics, or of both.

    count       how many images there are, or 0
    size        their height and width
    stats       stored mean and covariance, or None
    metadata    what is stored beside statistics: N, hash, size, resize, weights

    Raises ValueError for anything else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.count = 0
        self.size = None
        self.stats = None
        self.metadata = {}
        self.paths = None
        if self.path.is_dir():
            self.paths = list_images(self.path)
            if not self.paths:
                raise ValueError(f"{path} has no images")
            self.count = len(self.paths)
            self.size = tuple(read_image(self.paths[0]).shape[1:])
            return
        try:
            self.open_npz()
        except Exception as error:  # whatever numpy, zipfile and zlib say of a damaged file
            raise ValueError(f"{path} cannot be read: {error}") from error

    def open_npz(self) -> None:
        self.archive = zipfile.ZipFile(self.path)
        names = [name.removesuffix(".npy") for name in self.archive.namelist()]
        if "arr_0" in names:
            with self.archive.open("arr_0.npy") as file:
                shape, fortran_order, dtype = read_npy_header(file)
            if (
                dtype != np.uint8
                or fortran_order
                or len(shape) != 4
                or shape[3] != 3
                or not all(shape)
            ):
                raise ValueError(f"arr_0 is {dtype} {shape}; images must be uint8 (N, H, W, 3)")
            self.count = shape[0]
            self.size = shape[1:3]
        if "mu" in names and "sigma" in names:
            mu, sigma = self.read_array("mu"), self.read_array("sigma")
            square = mu.ndim == 1 and mu.size > 0 and sigma.shape == (len(mu), len(mu))
            if not square or not np.isfinite(mu.sum() + sigma.sum()):
                raise ValueError(
                    f"mu is {mu.shape} and sigma {sigma.shape}; they must be finite, "
                    "(D,) and (D, D)"
                )
            self.stats = (mu.astype(float), sigma.astype(float))
            self.metadata = self.read_metadata(names)
        if not self.count and not self.stats:
            found = ", ".join(names) or "nothing"
            raise ValueError(f"it has neither arr_0 nor mu and sigma, but {found}")

    def read_metadata(self, names: list[str]) -> dict:
        """What is stored beside statistics."""
        shapes = {"N": (), "hash": (), "size": (2,), "resize": (), "weights": ()}
        metadata = {}
        for name, shape in shapes.items():
            if name in names:
                value = self.read_array(name)
                if value.shape != shape:
                    raise ValueError(f"{name} has the shape {value.shape}, not {shape}")
                metadata[name] = value.tolist()
        return metadata

    def read_array(self, name: str) -> np.ndarray:
        """A small array of the archive."""
        info = self.archive.getinfo(f"{name}.npy")
        if info.file_size > 1 << 28:  # Inception's covariance takes 32 MB
            raise ValueError(f"{name} unpacks to {info.file_size} bytes")
        with self.archive.open(info) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    def batches(self) -> Iterator[Tensor]:
        """The images in batches of BATCH_SIZE, uint8 (b, 3, H, W), in order."""
        return self.folder_batches() if self.paths else self.npz_batches()

    def folder_batches(self) -> Iterator[Tensor]:
        with ThreadPoolExecutor() as pool:
            images = pool.map(read_image, self.paths)
            for start in range(0, self.count, BATCH_SIZE):
                batch = [next(images) for _ in self.paths[start : start + BATCH_SIZE]]
                for path, image in zip(self.paths[start:], batch):
                    if tuple(image.shape[1:]) != self.size:
                        raise ValueError(
                            f"{path} has another size than the first image of {self.path}; crop "
                            "them to one size, or use evaluate.py stats with --image_size"
                        )
                yield torch.stack(batch)

    def npz_batches(self) -> Iterator[Tensor]:
        """They are read one after the other, so that the archive never lies in memory whole."""
        height, width = self.size
        try:
            with self.archive.open("arr_0.npy") as file:
                read_npy_header(file)
                for start in range(0, self.count, BATCH_SIZE):
                    count = min(BATCH_SIZE, self.count - start)
                    pixels = np.frombuffer(file.read(count * height * width * 3), np.uint8)
                    yield torch.tensor(pixels.reshape(count, height, width, 3)).permute(0, 3, 1, 2)
        except Exception as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error

    def describe(self) -> dict:
        """The set in a report; for stored statistics, the images that they were made of.

        The hash is that of the .npz, or of the hashes and names of a folder's images.
        """
        if self.paths:
            names = [path.relative_to(self.path) for path in self.paths]
            lines = [f"{hash_file(path)} {name}\n" for path, name in zip(self.paths, names)]
            text = "".join(lines).encode(errors="surrogateescape")
            sha256 = hashlib.sha256(text).hexdigest()
        else:
            sha256 = hash_file(self.path)
        about = {"path": str(self.path), "N": self.count or None, "size": self.size}
        return about | {"hash": sha256} | self.metadata


def hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_npy_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """-> shape, whether it is in Fortran order, dtype; the file then stands at the data."""
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)


def compute_features(images: ImageSet, model: InceptionV3, resize: str) -> Iterator[Tensor]:
    """pool3 (b, 2048) of each batch of a set."""
    bar = tqdm(images.batches(), f"features of {images.path}", total=-(-images.count // BATCH_SIZE))
    for batch in bar:
        yield inception_features(model, batch, resize)


# --------------------------------------------------------------------------------------------------
# Command line.


def evaluate_samples(
    samples: ImageSet, reference: ImageSet, model: InceptionV3 | None, resize: str = "tf1"
) -> dict[str, float]:
    """FID, Inception Score, precision and recall, as far as the two sets allow.

    Statistics that are stored in an .npz are used in place of those of its images, as in ADM's
    evaluator. The Inception Score is of blocks of 5,000 images, shuffled with a fixed seed, because
    images that are sorted by class would have a much lower score. `model` may be None if both sets
    are statistics.
    """
    fake, real = None, None
    if samples.count:
        fake = torch.cat(list(compute_features(samples, model, resize)))
    if reference.count:
        real = torch.cat(list(compute_features(reference, model, resize)))
    fake_stats = samples.stats or mean_cov(fake)
    real_stats = reference.stats or mean_cov(real)
    values = {"fid": frechet_distance(*fake_stats, *real_stats)}
    if fake is not None:
        fake = fake.to(model.fc.weight.device)
        order = torch.randperm(len(fake), generator=torch.Generator().manual_seed(0))
        probabilities = model.logits(fake[order].double()).softmax(dim=1)
        mean, std = inception_score(probabilities)
        values |= {"inception_score": mean, "inception_score_std": std}
    if fake is not None and real is not None:
        # ADM's reference batches have 10,000 images for precision and recall.
        picks = np.linspace(0, len(real) - 1, min(10_000, len(real))).round().astype(int)
        precision, recall = precision_recall(real[picks].to(fake.device), fake)
        values |= {"precision": precision, "recall": recall}
    return values


def find_too_few_images(path: str | Path, count: int) -> list[str]:
    """A list with one sentence if these are too few images for FID, and else an empty one."""
    if count > 2048:
        return []
    return [
        f"{path}: {count} images are too few for a full-rank covariance of 2048 dimensions; FID is "
        "usually computed from 50,000"
    ]


def find_problems(samples: ImageSet, reference: ImageSet) -> list[str]:
    """Why a value may not be what it is called, in sentences."""
    problems = []
    for images in (samples, reference):
        if images.count and not images.stats:
            problems += find_too_few_images(images.path, images.count)
    sizes = [images.size or images.metadata.get("size") for images in (samples, reference)]
    if None not in sizes and tuple(sizes[0]) != tuple(sizes[1]):
        (height, width), (ref_height, ref_width) = sizes
        problems.append(
            f"the samples have {height} x {width} px, the reference {ref_height} x {ref_width} px; "
            "FID depends on the resolution, and is comparable only between equal ones"
        )
    return problems


def main(arguments: list[str]) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("samples", help="folder or .npz of samples")
    add("reference", nargs="?", help="folder or .npz of the reference")
    add("--save_stats", default="", metavar="FILE", help="write mean and covariance of the samples")
    add("--resize", default="tf1", choices=RESIZE_MODES, help="how images are resized to 299 px")
    add("--weights", default="", metavar="FOLDER", help="folder with Inception's weights")
    add("--report", default="", metavar="FILE", help="file to write (default: SAMPLES.fid.json)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(arguments)
    if not (args.reference or args.save_stats):
        parser.error("a reference is required, or --save_stats FILE")
    samples = ImageSet(args.samples)
    if args.save_stats:
        make_stats(samples, args)
    else:
        make_report(samples, ImageSet(args.reference), args)


def make_stats(samples: ImageSet, args: argparse.Namespace) -> None:
    """Write statistics of the samples, to be a reference later."""
    if not samples.count:
        raise ValueError(f"{args.samples} holds statistics already")
    model = load_inception(args.weights, args.device)
    running = RunningStats()
    for features in compute_features(samples, model, args.resize):
        running.add(features)
    about = samples.describe() | describe_protocol(args.resize, args.weights)
    save_stats(args.save_stats, *running.mean_cov(), about)
    print(f"wrote {args.save_stats}: mu and sigma of {samples.count} images")


def make_report(samples: ImageSet, reference: ImageSet, args: argparse.Namespace) -> None:
    """Measure samples against a reference, and write what was measured and how."""
    protocol = {}
    model = None
    if samples.count or reference.count:
        model = load_inception(args.weights, args.device)
        protocol = describe_protocol(args.resize, args.weights)
    for images in (samples, reference):  # statistics say how they were made
        for name in ("resize", "weights"):
            made_with = images.metadata.get(name)
            if made_with is None:
                continue
            expected = protocol.setdefault(name, made_with)
            if made_with != expected:
                raise ValueError(f"{images.path} was made with {name} {made_with}, not {expected}")
    for problem in find_problems(samples, reference):
        warn(problem)
    values = evaluate_samples(samples, reference, model, args.resize)
    about_samples = samples.describe()
    if "inception_score" in values:
        protocol["inception_score"] = "shuffled, blocks of 5000"
    if "precision" in values:
        protocol["precision_recall"] = "k = 3, at most 10000 of the reference"
    report = {
        "command": "fid",
        "values": values,
        "N": about_samples["N"],
        "protocol": protocol,
        "samples": about_samples,
        "reference": reference.describe(),
        "sampler": read_sampler(samples, about_samples["hash"]),
    }
    write_report(report, args.report or f"{str(samples.path).removesuffix('.npz')}.fid.json")


def describe_protocol(resize: str, weights: str) -> dict:
    """What a value depends on besides the images. A file of other weights gives a warning."""
    sha256 = hash_file(inception_path(weights))
    if sha256 != INCEPTION_SHA256:
        warn(f"{inception_path(weights)} is not the official file: its SHA-256 is {sha256}")
    return {"resize": resize, "weights": sha256}


def read_sampler(samples: ImageSet, sha256: str) -> dict | None:
    """What sample.py wrote beside its samples, if it is about these very images."""
    path = Path(f"{samples.path}.json")
    if not path.is_file():
        warn(f"there is no {path.name}, which would say how the samples were made")
        return None
    try:
        record = {**json.loads(path.read_text())}
    except (ValueError, TypeError):
        warn(f"{path.name} is damaged, and is left out of the report")
        return None
    if record.get("hash", sha256) != sha256:
        warn(f"{path.name} is about other samples, and is left out of the report")
        return None
    return record


@contextmanager
def write_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `path` unless something fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_stats(path: str | Path, mean: np.ndarray, cov: np.ndarray, about: dict) -> None:
    """Write an .npz of statistics, with what they are of and how they were made."""
    kept = {name: about[name] for name in ("N", "hash", "size", "resize", "weights")}
    with write_whole(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, mu=mean, sigma=cov, **kept)


def write_report(report: dict, path: str | Path) -> None:
    """Write a report, and print its values."""
    values = report["values"]
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    text = json.dumps(report | {"values": finite}, indent=1)  # JSON has no infinity
    with write_whole(path) as temporary:
        temporary.write_text(text)
    about = report["reference"]
    print(f"{report['command']}: {report['N']} images, reference {about['path']} ({about['N']})")
    for name, value in values.items():
        print(f"  {name:30}{value:.4f}")
    print(f"wrote {path}")


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
