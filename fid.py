"""How good images are: FID, Inception Score, precision and recall, rFID, PSNR, SSIM, linear-probe accuracy.

    python fid.py gfid out/samples.npz reference.npz      # FID, IS, precision, recall; folders, images or statistics
    python fid.py rfid out --data imagenet/val            # reconstructions against the very crops that were encoded
    python fid.py probe out --data imagenet/val           # linear probe on the latents
    python fid.py stats imagenet/train train.npz          # mean and covariance, for gfid
    python fid.py compare a.gfid.json b.gfid.json ...     # one table; are they comparable, and if not, why
    torchrun --nproc_per_node=8 fid.py gfid ...           # the same figure, for any process count

Images go in as uint8 of one size, and through the official Inception file of FID, resized as TensorFlow 1 did (what ADM's
evaluator sees) or, with --resize pytorch-fid, as that project does. Every result is also written as a card, in JSON.
The metrics are pure functions in float64.
"""

import argparse
import hashlib
import json
import math
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from data import LPIPS_FILES, OFFICIAL, ImageFolder, Parser, Processes, Shapes, UserError, as_user_error, at_hand
from data import command_line, file_hash, fill, find_official, image_tensor, list_images, official_path, progress
from data import read_image, replacing, split, spread, to_float, to_uint8, write_text


# ---------------------------------------------------------------------------------------------------------------------
# Inception-v3

# A line is a branch: layers in a chain, each "name channels kernel[/stride]" or a pooling; "+" puts two side by side.
# Convolutions of stride 1 are padded to keep the size.
BLOCK_5 = """branch1x1 64 1x1
    branch5x5_1 48 1x1 > branch5x5_2 64 5x5
    branch3x3dbl_1 64 1x1 > branch3x3dbl_2 96 3x3 > branch3x3dbl_3 96 3x3
    average > branch_pool {} 1x1"""
BLOCK_6A = """branch3x3 384 3x3/2
    branch3x3dbl_1 64 1x1 > branch3x3dbl_2 96 3x3 > branch3x3dbl_3 96 3x3/2
    shrink"""
BLOCK_6 = """branch1x1 192 1x1
    branch7x7_1 {0} 1x1 > branch7x7_2 {0} 1x7 > branch7x7_3 192 7x1
    branch7x7dbl_1 {0} 1x1 > branch7x7dbl_2 {0} 7x1 > branch7x7dbl_3 {0} 1x7 > branch7x7dbl_4 {0} 7x1 > branch7x7dbl_5 192 1x7
    average > branch_pool 192 1x1"""
BLOCK_7A = """branch3x3_1 192 1x1 > branch3x3_2 320 3x3/2
    branch7x7x3_1 192 1x1 > branch7x7x3_2 192 1x7 > branch7x7x3_3 192 7x1 > branch7x7x3_4 192 3x3/2
    shrink"""
BLOCK_7 = """branch1x1 320 1x1
    branch3x3_1 384 1x1 > branch3x3_2a 384 1x3 + branch3x3_2b 384 3x1
    branch3x3dbl_1 448 1x1 > branch3x3dbl_2 384 3x3 > branch3x3dbl_3a 384 1x3 + branch3x3dbl_3b 384 3x1
    {} > branch_pool 192 1x1"""
BLOCKS = {
    "Mixed_5b": BLOCK_5.format(32),
    "Mixed_5c": BLOCK_5.format(64),
    "Mixed_5d": BLOCK_5.format(64),
    "Mixed_6a": BLOCK_6A,
    "Mixed_6b": BLOCK_6.format(128),
    "Mixed_6c": BLOCK_6.format(160),
    "Mixed_6d": BLOCK_6.format(160),
    "Mixed_6e": BLOCK_6.format(192),
    "Mixed_7a": BLOCK_7A,
    "Mixed_7b": BLOCK_7.format("average"),
    "Mixed_7c": BLOCK_7.format("largest"),  # the 2015 graph has a max pool here
}


class ConvBN(nn.Module):
    """Convolution, batch normalisation, ReLU; `fuse` folds the normalisation into the convolution."""

    def __init__(self, channels: int, out: int, kernel: tuple[int, int], stride: int = 1, padding: tuple | int = 0):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fuse(self) -> None:
        self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()


class Mixed(nn.Module):
    """Parallel branches, from a table as above: (B, channels, H, W) -> (B, self.out, H', W'), concatenated."""

    def __init__(self, channels: int, table: str):
        super().__init__()
        self.average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        self.largest = nn.MaxPool2d(3, stride=1, padding=1)
        self.shrink = nn.MaxPool2d(3, stride=2)
        self.branches, self.out = [], 0
        for line in table.split("\n"):
            steps = [[layer.split() for layer in step.split("+")] for step in line.split(">")]
            self.branches.append([[layer[0] for layer in step] for step in steps])
            self.out += self.add_branch(channels, steps)

    def add_branch(self, channels: int, steps: list[list[list[str]]]) -> int:
        """Make the convolutions of a branch -> its output channels."""
        for step in steps:
            layers = [layer for layer in step if len(layer) > 1]
            for name, out, shape in layers:
                kernel = tuple(int(side) for side in shape[:3].split("x"))
                stride, padding = (2, 0) if shape.endswith("/2") else (1, (kernel[0] // 2, kernel[1] // 2))
                self.add_module(name, ConvBN(channels, int(out), kernel, stride, padding))
            channels = sum(int(out) for _, out, _ in layers) or channels
        return channels

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([y for branch in self.branches for y in self.follow(branch, x)], dim=1)

    def follow(self, branch: list[list[str]], x: Tensor) -> list[Tensor]:
        """The outputs of a branch's last step; only that one has layers side by side."""
        for (name,) in branch[:-1]:
            x = getattr(self, name)(x)
        return [getattr(self, name)(x) for name in branch[-1]]


class InceptionV3(nn.Module):
    """The Inception-v3 of FID (Heusel et al. 2017, the 2015 TensorFlow graph), with the official file's names."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = ConvBN(32, 64, (3, 3), padding=1)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = ConvBN(80, 192, (3, 3))
        channels = 192
        for name, table in BLOCKS.items():
            block = Mixed(channels, table)
            self.add_module(name, block)
            channels = block.out
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, 299, 299) from `inception_input` -> pool3 (B, 2048), the features of FID."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        for name in BLOCKS:
            x = getattr(self, name)(x)
        return x.mean(dim=(2, 3))

    def logits(self, pool3: Tensor) -> Tensor:
        """pool3 (B, 2048) -> (B, 1008), without the bias, as the Inception Score is computed; in the dtype of pool3."""
        return pool3 @ self.fc.weight.to(pool3).T


def inception_input(images: Tensor, resize: str = "tf1") -> Tensor:
    """images uint8 (B, 3, H, W) -> float32 (B, 3, 299, 299), in about [-1, 1]. Raises ValueError for other types.

    tf1: source index i in / out (no half-pixel shift, no antialiasing), (x - 128) / 128; what ADM and torch-fidelity do.
    pytorch-fid: half-pixel bilinear, 2 x / 255 - 1.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Inception needs uint8 images (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
    if resize == "tf1":
        return (resize_tf1(images.float(), 299) - 128) / 128
    if resize == "pytorch-fid":
        return 2 * F.interpolate(images.float() / 255, (299, 299), mode="bilinear", align_corners=False) - 1
    raise ValueError(f"resize is {resize!r}; it must be tf1 or pytorch-fid")


def resize_tf1(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, C, size, size), along the width first, as TensorFlow's ResizeBilinear rounds it."""
    for dim in (3, 2):
        length = x.shape[dim]
        index = torch.arange(size, device=x.device, dtype=torch.float32) * torch.tensor(length / size)
        low = index.long()
        high, shape = (low + 1).clamp(max=length - 1), [size if d == dim else 1 for d in range(4)]
        left, right = x.index_select(dim, low), x.index_select(dim, high)
        x = left + (right - left) * (index - low).view(shape)
    return x


def load_inception(folder: str, device: torch.device) -> InceptionV3:
    """The official file from `folder` or torch hub's cache (data.fill says what is raised), fused and channels-last."""
    with torch.device("meta"):  # the file fills it
        model = InceptionV3()
    fill(model, "inception", folder)
    for module in list(model.modules()):
        if isinstance(module, ConvBN):
            module.fuse()
    return model.to(device, torch.float32, memory_format=torch.channels_last)


@torch.no_grad()
def inception_features(model: InceptionV3, images: Tensor, resize: str = "tf1") -> Tensor:
    """images uint8 (B, 3, H, W) -> pool3 float32 (B, 2048), on the CPU."""
    x = inception_input(images.to(model.fc.weight.device), resize)
    return model(x.contiguous(memory_format=torch.channels_last)).cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


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
        raise ValueError(f"images must be two batches of the same shape, not {tuple(a.shape)} and {tuple(b.shape)}")


def statistics(features: np.ndarray | Tensor, block: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """features (N, D), N >= 2 -> mean (D,) and covariance (D, D) with n - 1, float64. Raises ValueError on NaN.

    In blocks of rows, so that float32 features are never copied whole.
    """
    features = torch.as_tensor(features)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be (N, D) with N of at least 2, not {tuple(features.shape)}")
    mean = features.mean(dim=0, dtype=torch.float64)
    if not mean.isfinite().all():
        raise ValueError(f"{int((~features.isfinite()).sum())} feature values are not finite")
    cov = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
    for rows in features.split(block):
        centred = rows.double() - mean
        cov += centred.T @ centred
    return mean.cpu().numpy(), (cov / (len(features) - 1)).cpu().numpy()


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), float64 (Dowson and Landau 1982; Heusel et al. 2017).

    With S1 = R R^T from its eigenvalues, S1 S2 has the eigenvalues of the symmetric R^T S2 R: singular covariances need no
    regularisation. Raises ValueError when the dimensions differ.
    """
    if mean1.shape != mean2.shape or cov1.shape != cov2.shape:
        raise ValueError(f"statistics of {len(mean1)} and of {len(mean2)} dimensions cannot be compared")
    root = matrix_root(cov1)
    cross = torch.linalg.eigvalsh(root.T @ torch.from_numpy(cov2) @ root)
    trace = np.trace(cov1) + np.trace(cov2) - 2 * cross.clamp(min=0).sqrt().sum().item()
    return float(np.square(mean1 - mean2).sum() + trace)


def matrix_root(cov: np.ndarray) -> Tensor:
    """cov (D, D), symmetric, no negative eigenvalues -> R (D, rank) with R R^T = cov."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(cov))
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps  # the square root would blow up rounding
    return vectors[:, kept] * values[kept].sqrt()


def frechet_spread(features: Tensor, mean: np.ndarray, cov: np.ndarray, seed: int = 0) -> float | None:
    """By how much the Frechet distance of features (N, D) to mean and cov varies with the N samples drawn, float64.

    The standard deviation over 10 random halves of the rows (delete-half jackknife, Shao and Wu 1989), itself known to a
    quarter; None under 4 rows. Halves are farther away than all rows, so their mean says nothing; and the spread of bootstrap
    resamples is several times too wide where N is not far above D. What `cov` itself owes to chance is not in it.
    """
    if len(features) < 4:
        return None
    rng, distances, root = np.random.default_rng(seed), [], matrix_root(cov).to(features.device)
    for _ in range(10):
        half = features[torch.from_numpy(rng.permutation(len(features))[: len(features) // 2])].double()
        shift = half.mean(dim=0)
        half = (half - shift) / math.sqrt(len(half) - 1)
        few = len(half) < len(mean)  # the smaller Gram matrix has the same eigenvalues, but for zeros
        cross = half @ root @ (half @ root).T if few else root.T @ (half.T @ half) @ root
        trace = half.square().sum().item() - 2 * torch.linalg.eigvalsh(cross.cpu()).clamp(min=0).sqrt().sum().item()
        distances.append(np.square(mean - shift.cpu().numpy()).sum() + trace)  # less the trace of cov, the same for all
    return float(np.std(distances, ddof=1))


def adm_blocks(count: int, block: int = 5000) -> list[np.ndarray]:
    """Consecutive blocks of range(count), the last one shorter: ADM's parts for the Inception Score."""
    return [np.arange(start, min(start + block, count)) for start in range(0, count, block)]


def fidelity_splits(count: int, splits: int = 10, seed: int | None = 2020) -> list[np.ndarray]:
    """Equal parts of range(count), shuffled unless `seed` is None: torch-fidelity's parts for the Inception Score."""
    order = np.arange(count) if seed is None else np.random.RandomState(seed).permutation(count)
    return [order[i * count // splits : (i + 1) * count // splits] for i in range(splits)]


def inception_score(probabilities: np.ndarray | Tensor, parts: list[np.ndarray]) -> tuple[float, float]:
    """exp(E KL(p(y|x) || p(y))) over each part of probabilities (N, K) -> mean and standard deviation over parts, float64.

    Salimans et al. 2016. Each part counts the same, the last of `adm_blocks` too. Raises ValueError for an empty part.
    """
    probabilities, scores = torch.as_tensor(probabilities), []
    for part in parts:
        if not len(part):
            raise ValueError(f"{len(probabilities)} images are too few for {len(parts)} parts")
        p = probabilities[torch.from_numpy(part)].double()
        divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(dim=0))  # 0 log 0 = 0
        scores.append(divergence.sum(dim=1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, block: int = 1000) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features real (N, D), fake (M, D), float64.

    Precision: the share of fake points within the ball of some real point, whose radius is the distance to its k-th nearest
    other real point; recall: the reverse. Distances come in blocks of rows. Raises ValueError for k points or fewer.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need over {k} points, not {len(real)} and {len(fake)}")
    real, fake = torch.as_tensor(real).double(), torch.as_tensor(fake).double()
    precision = inside(fake, real, ball_radii(real, k, block), block)
    recall = inside(real, fake, ball_radii(fake, k, block), block)
    return precision.double().mean().item(), recall.double().mean().item()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N, M)."""
    products = torch.addmm(b.square().sum(dim=1), a, b.T, alpha=-2)
    return products.add_(a.square().sum(dim=1, keepdim=True)).clamp_(min=0)


def ball_radii(points: Tensor, k: int, block: int) -> Tensor:
    """(N, D) -> squared distance of each point to its k-th nearest other point (N,); the nearest is the point itself."""
    parts = [squared_distances(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(block)]
    return torch.cat(parts)


def inside(points: Tensor, centres: Tensor, radii: Tensor, block: int) -> Tensor:
    """Whether each point (N, D) lies within the ball of any centre (M, D), radii squared (M,) -> bool (N,)."""
    return torch.cat([(squared_distances(rows, centres) <= radii).any(dim=1) for rows in points.split(block)])


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int, ridge: float = 0.01
) -> float:
    """Share of test (M, D) whose label a ridge regression from train (N, D) to one-hot labels finds, float64, closed form.

    W = (X^T X / N + ridge I)^-1 X^T (Y - mean Y) / N on features of zero mean and unit variance.
    """
    train, test = train.double(), test.double()
    mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    targets = F.one_hot(train_labels, classes).double()
    share = targets.mean(dim=0)
    gram = train.T @ train / len(train) + ridge * torch.eye(len(mean), dtype=torch.float64, device=train.device)
    weights = torch.linalg.solve(gram, train.T @ (targets - share) / len(train))
    return ((test @ weights + share).argmax(dim=1) == test_labels).double().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Sets of images, and their features from all processes


@dataclass(frozen=True)
class ImageSet:
    """A folder of images or an .npz: `shape` (N, H, W) of its images, or None; mean and covariance where stored.

    `stored` holds them as mu and sigma, with what `stats` recorded beside them: N, hash, resize, weights.
    """

    path: str
    shape: tuple[int, int, int] | None
    files: list[str]
    stored: dict

    def batches(self, rows: list[range]) -> Iterator[Tensor]:
        """The images of consecutive ranges -> uint8 (b, 3, H, W)."""
        if self.files:
            with ThreadPoolExecutor() as pool:
                for part in rows:
                    yield torch.stack(list(pool.map(read_exactly, [self.files[i] for i in part])))
        elif rows:
            try:
                yield from self.archived(rows)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise OSError(f"{self.path} is damaged: {error}") from error

    def archived(self, rows: list[range]) -> Iterator[Tensor]:
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            array_header(file)
            size = 3 * math.prod(self.shape[1:])
            file.seek(rows[0].start * size, 1)
            for part in rows:
                pixels = file.read(len(part) * size)
                if len(pixels) < len(part) * size:
                    raise EOFError("arr_0 is truncated")
                images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
                yield images.view(len(part), *self.shape[1:], 3).permute(0, 3, 1, 2).contiguous()


def read_exactly(path: str) -> Tensor:
    """An image file -> uint8 (3, H, W); OSError names a damaged one."""
    try:
        return image_tensor(read_image(path))
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error}") from error


def array_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of the .npy that begins here; the file stands at its data then."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def open_images(path: str) -> ImageSet:
    """A folder (deep) of images of one size, or an .npz with arr_0 (N, H, W, 3) and / or mu and sigma. Raises UserError."""
    if Path(path).is_dir():
        return open_folder(path)
    if not Path(path).exists():
        raise UserError(f"{path} does not exist; give a folder of images or an .npz")
    try:
        return open_npz(path)
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        pickled = "pickle" in str(error)
        reason = "it holds pickled objects, which are never loaded" if pickled else f"not a sound .npz ({error})"
        raise UserError(f"{path} cannot be read: {reason}") from error


def open_folder(path: str) -> ImageSet:
    files = list_images(Path(path), deep=True)
    if not files:
        raise UserError(f"{path} has no images")
    first = None
    for file in files:
        try:
            with Image.open(file) as image:
                rotated, mode = image.getexif().get(0x0112, 1) >= 5, image.mode
                size = image.size[::-1] if rotated else image.size  # as `read_image` will turn it
        except Exception as error:
            raise UserError(f"{file} cannot be read: {error}") from error
        if mode[0] in "FI":
            raise UserError(f"{file} has pixels of type {mode}; metrics are defined on 8-bit images")
        first = first or size
        if size != first:
            sizes = [f"{width} x {height} px" for width, height in (first, size)]
            raise UserError(f"crop images alike: {files[0]} has {sizes[0]} and {file} {sizes[1]}")
    return ImageSet(path, (len(files), first[1], first[0]), files, {})


STORED = ("mu", "sigma", "N", "hash", "resize", "weights")


def open_npz(path: str) -> ImageSet:
    stored, shape = {}, None
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if "arr_0" in names:
            with archive.open("arr_0.npy") as file:
                found, fortran, dtype = array_header(file)
            if dtype.hasobject:
                raise ValueError("pickled array arr_0")
            if dtype != np.uint8 or len(found) != 4 or found[3] != 3 or fortran or not all(found):
                raise UserError(f"{path}: arr_0 is {dtype} {found}; images must be uint8 (N, H, W, 3), values 0 to 255")
            shape = found[:3]
    if {"mu", "sigma"} <= set(names):
        with np.load(path, allow_pickle=False) as arrays:
            stored = {name: arrays[name] for name in STORED if name in arrays}
        check_statistics(path, **stored)
    if not shape and not stored:
        raise UserError(f"{path} has neither arr_0 nor mu and sigma, but {', '.join(names) or 'nothing'}")
    return ImageSet(path, shape, [], stored)


def check_statistics(path: str, mu: np.ndarray, sigma: np.ndarray, **recorded: np.ndarray) -> None:
    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"{path}: mu is {mu.shape} and sigma {sigma.shape}; they must be (D,) and (D, D)")
    if {mu.dtype.kind, sigma.dtype.kind} != {"f"} or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path}: mu and sigma must be finite floating-point numbers")
    if not np.allclose(sigma, sigma.T) or sigma.diagonal().min() < 0:
        raise UserError(f"{path}: sigma is no covariance: it is not symmetric, or has negative variances")
    if any(value.ndim for value in recorded.values()) or recorded.get("N", np.int64()).dtype.kind not in "iu":
        raise UserError(f"{path}: what stands beside mu and sigma must be single values, and N a whole number")


def batch_rows(count: int, batch: int, processes: Processes) -> list[range]:
    """This process's part of range(count) as batches; their borders do not depend on the process count."""
    return [range(i * batch, min((i + 1) * batch, count)) for i in processes.share(math.ceil(count / batch))]


def gather(parts: Iterator[dict[str, Tensor]], processes: Processes) -> dict[str, Tensor]:
    """Each process's parts {name: (b, ...)} in the order of the ranks -> {name: (N, ...)} on the first one, {} elsewhere."""
    parts = list(parts)
    mine = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
    every = [mine]
    if processes.world > 1:
        every = [{}] * processes.world if processes.first else None
        dist.gather_object(mine, every)
    every = [part for part in every or () if part]
    return {name: torch.cat([part[name] for part in every]) for name in every[0]} if every else {}


def digests(images: Tensor) -> Tensor:
    """uint8 (b, ...) -> SHA-256 of each image's bytes, uint8 (b, 32)."""
    joined = b"".join(hashlib.sha256(image.numpy().tobytes()).digest() for image in images)
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).view(len(images), 32)


def set_hash(digest: Tensor) -> str:
    return hashlib.sha256(digest.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Evaluator:
    """What turns images into features, and how it is told on the result card."""

    model: InceptionV3
    resize: str
    weights: str  # SHA-256 of the file
    processes: Processes

    @staticmethod
    def load(args: argparse.Namespace, processes: Processes) -> "Evaluator":
        find_official(["inception"], args.weights, processes)
        model = load_inception(args.weights, processes.device)
        return Evaluator(model, args.resize, file_hash(official_path("inception", args.weights)), processes)

    @property
    def protocol(self) -> dict:
        return {"resize": self.resize, "weights": self.weights}

    def features(self, images: Tensor) -> Tensor:
        return inception_features(self.model, images, self.resize)

    def all_features(self, images: ImageSet) -> dict[str, Tensor]:
        """{features (N, 2048), digests (N, 32)} on the first process."""
        rows = batch_rows(images.shape[0], BATCH, self.processes)
        steps = progress(images.batches(rows), f"features of {images.path}", self.processes, total=len(rows))
        return gather(({"features": self.features(x), "digests": digests(x)} for x in steps), self.processes)


def warn(text: str, processes: Processes) -> None:
    if processes.first:
        print(f"warning: {text}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

BATCH = 50  # images per forward pass; a constant, because other inputs of a pass change the last digits of its outputs
FLAGS = {
    "weights": {
        "default": "",
        "metavar": "FOLDER",
        "help": f"with {OFFICIAL['inception'].file} (default: torch hub's cache, filled from the internet)",
    },
    "resize": {"default": "tf1", "choices": ["tf1", "pytorch-fid"], "help": "convention (default: tf1, as ADM)"},
    "is_parts": {"default": "adm", "choices": ["adm", "torch-fidelity"], "help": "parts of the Inception Score"},
    "card": {"default": "", "metavar": "FILE", "help": "result to write (default: beside the samples, or in the run)"},
    "data": {"default": "shapes", "help": 'folder of images, all are used (default: "shapes", the built-in ones)'},
    "held_out": {"action": "store_true", "help": "only the images that training on this folder held out"},
    "seed": {"type": int, "default": 0, "help": "of the sampled latents"},
}


def parse(command: str, places: str, flags: str, arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog=f"fid.py {command}", description=__doc__)
    for name in places.split():
        parser.add_argument(name.rstrip("+"), nargs="+" if name.endswith("+") else None)
    for name in flags.split():
        parser.add_argument(f"--{name}", **FLAGS[name])
    args = parser.parse_args(arguments)
    if getattr(args, "seed", 0) < 0:
        raise UserError(f"--seed is {args.seed}; it must be at least 0")
    return args


def start() -> Processes:
    """Join the other processes; without TF32, which would show in the digits that matter."""
    processes = Processes.start()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    return processes


def check_stored(images: ImageSet, protocol: dict) -> None:
    """UserError where statistics were recorded under another convention or with other weights."""
    for name in protocol.keys() & images.stored.keys():
        if str(images.stored[name]) != protocol[name]:
            raise UserError(f"{images.path} was made with {name} {images.stored[name]}, not {protocol[name]}")


def measure(images: ImageSet, evaluator: Evaluator | None, processes: Processes) -> tuple | None:
    """A set's (mean, covariance), features or None, and card entry, on the first process.

    Stored statistics come before those of its images, as in ADM.
    """
    found = evaluator.all_features(images) if images.shape else {}
    if not processes.first:
        return None
    count = int(images.stored["N"]) if "N" in images.stored else images.shape[0] if images.shape else None
    if images.stored:
        pair = images.stored["mu"].astype(np.float64), images.stored["sigma"].astype(np.float64)
        content = hashlib.sha256(pair[0].tobytes() + pair[1].tobytes()).hexdigest()
        sha256 = str(images.stored.get("hash", content))
    else:
        with as_user_error(f"{images.path}: "):
            pair, sha256 = statistics(found["features"]), set_hash(found["digests"])
        warn_of_few(images.path, count, len(pair[0]), processes)
    return pair, found.get("features"), {"path": images.path, "N": count, "hash": sha256}


def warn_of_few(path: str, count: int, dimensions: int, processes: Processes) -> None:
    if count <= dimensions:
        text = f"{count} images are too few for a full-rank covariance of {dimensions} dimensions"
        warn(f"{path}: {text}; the distance is biased, use 50000", processes)


def share(value: float, count: int) -> dict[str, float]:
    """A share of `count` things, with its standard error."""
    return {"value": value, "spread": math.sqrt(value * (1 - value) / count)}


def average(values: Tensor) -> dict[str, float | None]:
    """The mean over images, with its standard error; None where infinite."""
    pair = values.mean().item(), values.std().item() / math.sqrt(len(values))
    return dict(zip(("value", "spread"), (x if math.isfinite(x) else None for x in pair)))


def read_card(path: str) -> dict:
    try:
        card = json.loads(Path(path).read_text())
    except ValueError:
        raise UserError(f"{path} is not JSON") from None
    if not isinstance(card, dict):
        raise UserError(f"{path} is not a result card")
    return card


def shown(number: dict | None) -> str:
    """A value of a card, with its spread."""
    if number is None:
        return "-"
    value, spread = (number.get(key) for key in ("value", "spread"))
    return "infinite" if value is None else f"{value:.4f}" + ("" if spread is None else f" +- {spread:.4f}")


def finish(card: dict, begun: float, path: str | Path) -> None:
    """Print the table and write the card."""
    card["seconds"] = round(time.perf_counter() - begun, 1)
    print(f"{card['command']}: {card['N']} images, reference {card['reference']['path']} ({card['reference']['N']})")
    for name, number in card["values"].items():
        print(f"  {name:24}{shown(number)}")
    write_text(json.dumps(card, indent=1), path)
    print(f"wrote {path}")


def gfid(arguments: list[str]) -> None:
    """FID, Inception Score, precision and recall of samples against a reference."""
    args = parse("gfid", "samples reference", "weights resize is_parts card", arguments)
    begun, processes = time.perf_counter(), start()
    sets = open_images(args.samples), open_images(args.reference)
    evaluator = Evaluator.load(args, processes) if any(images.shape for images in sets) else None
    protocol = evaluator.protocol if evaluator else {}
    for images in sets:
        check_stored(images, protocol or {k: str(v) for k, v in sets[0].stored.items() if k in ("resize", "weights")})
    sides = [measure(images, evaluator, processes) for images in sets]
    if not processes.first:
        return
    (moments, fake, record), (reference, real, reference_record) = sides
    with as_user_error(f"{args.samples} and {args.reference}: "):
        values = {"fid": {"value": frechet_distance(*moments, *reference)}}
        if fake is not None:
            fake = fake.to(processes.device)
            values["fid"]["spread"] = frechet_spread(fake, *reference)
            probabilities = evaluator.model.logits(fake.double()).softmax(dim=1).cpu()
            parts = (adm_blocks if args.is_parts == "adm" else fidelity_splits)(len(probabilities))
            values["inception_score"] = dict(zip(("value", "spread"), inception_score(probabilities, parts)))
            protocol = protocol | {"is_parts": args.is_parts}
        if fake is not None and real is not None:
            real = real[spread(len(real), 10_000)].to(processes.device)  # as many as ADM's reference batches have
            precision, recall = precision_recall(real, fake)
            values |= {"precision": share(precision, len(fake)), "recall": share(recall, len(real))}
            protocol = protocol | {"precision_recall_reference": len(real), "k": 3}
    beside = str(Path(args.samples)).removesuffix(".npz")  # a folder may be called 1.5
    sampler = read_card(f"{beside}.json") if Path(f"{beside}.json").is_file() else None  # as sample.py writes it
    card = {"command": "gfid", "values": values, "N": record["N"], "reference": reference_record}
    card |= {"protocol": protocol, "samples": record, "sampler": sampler}
    finish(card, begun, args.card or f"{beside}.gfid.json")


def stats(arguments: list[str]) -> None:
    """Mean and covariance of a folder or .npz of images, with how they were made."""
    args = parse("stats", "images out", "weights resize", arguments)
    processes, images = start(), open_images(args.images)
    if images.shape is None:
        raise UserError(f"{args.images} holds statistics already")
    evaluator = Evaluator.load(args, processes)
    side = measure(ImageSet(images.path, images.shape, images.files, {}), evaluator, processes)
    if not processes.first:
        return
    (mean, cov), _, record = side
    arrays = {"mu": mean, "sigma": cov, "N": record["N"], "hash": record["hash"]}
    with replacing(args.out) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays, **evaluator.protocol)
    print(f"wrote {args.out}: mu and sigma of {record['N']} images")


def open_run(args: argparse.Namespace, processes: Processes):
    """The run and its data set."""
    from sample import load_run  # only these two commands need the models

    run = load_run(args.run, processes.device)
    size = run.config["image_size"]
    dataset = Shapes(size) if args.data == "shapes" else ImageFolder(args.data, size)
    return run, dataset


def crops(dataset: ImageFolder | Shapes, items: list[int]) -> tuple[Tensor, Tensor]:
    """-> uint8 (b, 3, S, S), labels (b,). OSError names an unreadable file: no other image may stand in for it here."""
    with ThreadPoolExecutor() as pool:
        images, labels, bad = zip(*pool.map(dataset.__getitem__, items))
    unreadable = [index for index in bad if index >= 0]
    if unreadable:
        raise OSError(f"{dataset.name(unreadable[0])} is not a readable image")
    return torch.stack(images), torch.tensor(labels)


@torch.no_grad()
def reconstructions(tokenizer: nn.Module, images: Tensor, items: list[int], seed: int) -> dict[str, Tensor]:
    """images uint8 (b, 3, S, S) -> their reconstructions from posterior mean and from a sample, seeded per item; uint8."""
    posterior = tokenizer.encode(to_float(images.to(tokenizer.latent_mean.device)))
    rows = [np.random.default_rng((seed, i)).standard_normal(posterior.mean.shape[1:], np.float32) for i in items]
    sampled = posterior.sample(torch.from_numpy(np.stack(rows)).to(posterior.mean))
    return {name: to_uint8(tokenizer.decode(z)).cpu() for name, z in (("mean", posterior.mean), ("sampled", sampled))}


def lpips_at_hand(folder: str, device: torch.device) -> nn.Module | None:
    """LPIPS, where both of its official files are there."""
    if not at_hand(folder, *LPIPS_FILES):
        return None
    from losses import load_lpips  # so that this file can be copied without that one

    return load_lpips(folder).to(device)


def rfid(arguments: list[str]) -> None:
    """rFID, PSNR, SSIM and, where its weights are, LPIPS of a run's reconstructions against the very crops that were encoded."""
    args = parse("rfid", "run", "data held_out seed weights resize card", arguments)
    begun, processes = time.perf_counter(), start()
    evaluator, lpips = Evaluator.load(args, processes), lpips_at_hand(args.weights, processes.device)
    run, dataset = open_run(args, processes)
    items = np.arange(len(dataset))
    if args.held_out:
        items = split(len(dataset), run.config["eval_images"])[1]
    elif Path(args.data) == Path(run.config["data"] or "shapes"):
        warn(f"the run was trained on {args.data}; --held_out takes only what that held out", processes)

    def parts() -> Iterator[dict[str, Tensor]]:
        for rows in progress(batch_rows(len(items), BATCH, processes), "reconstructions", processes):
            chosen = [int(items[i]) for i in rows]
            images, _ = crops(dataset, chosen)
            part = {"features": evaluator.features(images), "digests": digests(images)}
            for name, copies in reconstructions(run.tokenizer, images, chosen, args.seed).items():
                part[f"rfid_{name}"] = evaluator.features(copies)
                part |= {f"psnr_{name}": psnr(images, copies), f"ssim_{name}": ssim(images, copies)}
                if lpips:
                    pair = (to_float(x.to(processes.device)) for x in (copies, images))
                    part[f"lpips_{name}"] = lpips(*pair).double().cpu()
            yield part

    with as_user_error(f"{args.run}: "):
        found = gather(parts(), processes)
    if not processes.first:
        return
    with as_user_error(f"{args.data}: "):
        reference, values = statistics(found["features"]), {}
        for name in ("mean", "sampled"):
            features = found[f"rfid_{name}"].to(processes.device)
            distance, noise = frechet_distance(*statistics(features), *reference), frechet_spread(features, *reference)
            values[f"rfid_{name}"] = {"value": distance, "spread": noise}
            measured = [f"{metric}_{name}" for metric in ("psnr", "ssim", "lpips")]
            values |= {key: average(found[key]) for key in measured if key in found}
    warn_of_few(args.data, len(items), len(reference[0]), processes)
    record = {"path": args.data, "N": len(items), "hash": set_hash(found["digests"])}
    card = {"command": "rfid", "values": values, "N": len(items), "reference": record, "protocol": evaluator.protocol}
    if lpips:
        card["lpips_weights"] = {name: file_hash(official_path(name, args.weights)) for name in LPIPS_FILES}
    finish(card | {"run": args.run, "seed": args.seed}, begun, args.card or Path(args.run) / "rfid.json")


def probe(arguments: list[str]) -> None:
    """Accuracy of a linear probe on the posterior means: trained on nine tenths of the data, tested on the rest."""
    args = parse("probe", "run", "data card", arguments)
    begun, processes = time.perf_counter(), start()
    run, dataset = open_run(args, processes)
    if len(dataset.classes) < 2 or len(dataset) < 20:
        found = f"{len(dataset)} images in {len(dataset.classes)} classes"
        raise UserError(f"{args.data} has {found}; 20 in 2 are the least")

    def parts() -> Iterator[dict[str, Tensor]]:
        for rows in progress(batch_rows(len(dataset), BATCH, processes), "latents", processes):
            images, labels = crops(dataset, list(rows))
            with torch.no_grad():
                latents = run.tokenizer.encode(to_float(images.to(processes.device))).mean
            yield {"latents": latents.flatten(1).cpu(), "labels": labels, "digests": digests(images)}

    found = gather(parts(), processes)
    if not processes.first:
        return
    train, test = (torch.from_numpy(items) for items in split(len(dataset), len(dataset)))
    x, y = found["latents"].to(processes.device), found["labels"].to(processes.device)
    accuracy = linear_probe(x[train], y[train], x[test], y[test], len(dataset.classes))
    record = {"path": args.data, "N": len(dataset), "hash": set_hash(found["digests"])}
    values = {"accuracy": share(accuracy, len(test))}
    protocol = {"solver": "ridge", "ridge": 0.01, "train": len(train), "test": len(test)}
    card = {"command": "probe", "values": values, "N": len(test), "reference": record, "protocol": protocol}
    finish(card | {"run": args.run}, begun, args.card or Path(args.run) / "probe.json")


CARD = {"command": str, "N": int | None, "values": dict, "reference": dict, "protocol": dict, "sampler": dict | None}


def read_result(path: str) -> dict:
    card = read_card(path)
    sound = all(isinstance(card.get(name), kind) for name, kind in CARD.items())
    if not sound or not all(isinstance(number, dict) for number in card["values"].values()):
        raise UserError(f"{path} is not a result card of fid.py")
    return card


def differences(a: dict, b: dict) -> list[str]:
    """Why two cards are not comparable; nothing to say when they are."""
    first, second = (
        {"command": card["command"], "N": card["N"], "reference": card["reference"].get("hash"), **card["protocol"]}
        for card in (a, b)
    )
    keys = [key for key in first | second if first.get(key) != second.get(key)]
    return [f"{key} is {str(first.get(key))[:16]} and {str(second.get(key))[:16]}" for key in keys]


def compare(arguments: list[str]) -> None:
    """Any number of result cards in one table, a column each; and which are not comparable with the first, and why."""
    args = parse("compare", "cards+", "", arguments)
    cards, names = [read_result(path) for path in args.cards], [Path(path).stem for path in args.cards]
    samplers, values = [card.get("sampler") or {} for card in cards], [card["values"] for card in cards]
    rows = [["", *names]]
    for key in dict.fromkeys(key for sampler in samplers for key in sampler):
        cells = [str(sampler.get(key, "-")) for sampler in samplers]
        rows += [[key, *cells]] if len(set(cells)) > 1 else []
    for key in dict.fromkeys(key for numbers in values for key in numbers):
        rows.append([key, *(shown(numbers.get(key)) for numbers in values)])
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    for label, *cells in rows:
        print("  ".join([label.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:]))]))
    reasons = {path: differences(cards[0], card) for path, card in zip(args.cards, cards)}
    for path, found in reasons.items():
        if found:
            print(f"{path} is not comparable with {args.cards[0]}: {'; '.join(found)}")
    if not any(reasons.values()):
        print("comparable: same protocol, count and reference")


COMMANDS = {"gfid": gfid, "rfid": rfid, "probe": probe, "stats": stats, "compare": compare}


def main(arguments: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("command", choices=list(COMMANDS), help="fid.py COMMAND --help tells its flags")
    COMMANDS[parser.parse_args(arguments[:1]).command](arguments[1:])


if __name__ == "__main__":
    command_line(main)
