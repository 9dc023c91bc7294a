"""Images from folders to batches, pictures back to files, and the latents on disk."""

import hashlib
import io
import itertools
import math
import os
import signal
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from plumbing.run import Processes, UserError, as_user_error, file_hash, read_json, replacing, warn
from plumbing.shapes import Shapes

READERS = ThreadPoolExecutor()
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
OF_A_RUN = {"log.jsonl", "tokenizer.pt"}  # a folder that holds one of them is a run's: its pictures are no data


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float [-1, 1], clipped -> uint8 [0, 255], rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The ADM crop: halve with a box filter while twice too large, resize the short side (bicubic), crop the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    width, height = (round(side * (size / min(image.size))) for side in image.size)
    if width * height > 2 * Image.MAX_IMAGE_PIXELS:  # where Pillow, too, refuses
        raise ValueError(f"too long and narrow: its short side at {size} px, it would have {width} x {height}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path: str | Path, size: int = 0) -> Image.Image:
    """Any file that Pillow reads, as upright 8-bit RGB, cropped to `size` if it is given. OSError names what cannot be read."""
    try:
        with Image.open(path) as image:
            if size:  # a JPEG is decoded up to 8 times smaller, at twice the crop or more
                image.draft("RGB", (2 * size, 2 * size))
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(f"pixels of type {image.mode}; only 8 and 16 bits are understood")
            image = image.convert("RGB")
            return center_crop(image, size) if size else image
    except Exception as error:  # Pillow raises a dozen kinds on damaged files
        raise OSError(f"{path} is not a readable image: {error}") from error


class ImageFolder(Dataset):
    """Images in one sub-folder per class, or flat. item: uint8 (3, size, size), label (flat: 0). UserError if there are none."""

    def __init__(self, root: str | Path, size: int):
        root, self.size, self.unreadable = Path(root), size, set()
        if not root.is_dir():
            raise UserError(f"data folder {root} does not exist or is not a folder")
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        found, loose = {name: list_images(root / name, deep=True) for name in names}, list_images(root, deep=False)
        self.classes = [name for name in names if found[name]]
        if self.classes and loose:
            raise UserError(f"data folder {root} has class folders and loose images such as {loose[0]}; keep one kind")
        if not self.classes and not loose:
            raise UserError(f"data folder {root} has no images (looked for {', '.join(SUFFIXES)})")
        self.paths = [*loose, *(path for name in self.classes for path in found[name])]
        self.labels = [0] * len(loose) + [label for label, name in enumerate(self.classes) for _ in found[name]]
        prefix = os.path.join(root, "")
        lines = [f"{path.removeprefix(prefix)} {os.path.getsize(path)}\n" for path in self.paths]
        self.stamp = hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()  # of names and sizes

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[Tensor, int]:
        """The item, or OSError."""
        pixels = np.array(read_image(self.paths[index], self.size))  # (H, W, 3)
        return torch.from_numpy(pixels).permute(2, 0, 1), self.labels[index]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The item, or the next readable one in its place; OSError when over 1 % of the files turned out unreadable."""
        try:
            return self.read(index)
        except OSError as error:
            if index not in self.unreadable:
                warn(f"{error}; the next one takes its place")
            self.unreadable.add(index)
            if len(self.unreadable) > min(max(1, len(self) // 100), len(self) - 1):
                raise OSError(f"over 1 % of {len(self)} images cannot be read; mend or remove them, such as {error}") from error
            return self[(index + 1) % len(self)]


def list_images(folder: Path, deep: bool) -> list[str]:
    """Paths of image files by suffix, sorted; with `deep` also in folders below, each once even if links go round in a circle."""
    paths, seen = [], set()
    for at, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(at) in seen or OF_A_RUN & set(names):
            folders.clear()
            continue
        seen.add(os.path.realpath(at))
        paths += [os.path.join(at, name) for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        if not deep:
            break
    return sorted(filter(os.path.isfile, paths))  # neither pipes nor links to nowhere


def open_dataset(folder: str, size: int) -> ImageFolder | Shapes:
    """The images of a folder, or the built-in shapes for "" and "shapes"."""
    return Shapes(size) if folder in ("", "shapes") else ImageFolder(folder, size)


def split(count: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Items to train on, and items held out: evenly spaced, at most a tenth; with under 20 images, all serve as both."""
    held = spread(count, min(held_out, count // 10))
    if len(held) < 2:  # one image has no covariance
        return np.arange(count), np.arange(count)
    return np.setdiff1d(np.arange(count), held), held


def spread(count: int, picks: int) -> np.ndarray:
    """At most `picks` of range(count), evenly spaced from the first to the last."""
    return np.linspace(0, count - 1, min(picks, count)).round().astype(int)


def batches(items: np.ndarray | range, batch: int, seed: int, step: int, pieces: list[slice]) -> Iterator[list[int]]:
    """Endless lists of items, the pieces of each global batch from `step` on: a new permutation per epoch, no item is lost."""
    epoch, passed = divmod(step * batch, len(items))
    orders = (np.random.default_rng((seed, each)).permutation(items).tolist() for each in itertools.count(epoch))
    endless = itertools.islice(itertools.chain.from_iterable(orders), passed, None)
    while True:
        whole = list(itertools.islice(endless, batch))
        yield from (whole[piece] for piece in pieces)


def loader(dataset: Dataset, lists: Iterable[list[int]], workers: int) -> DataLoader:
    """A DataLoader over lists of items: uint8 (b, 3, S, S), labels (b,)."""
    pinned = torch.cuda.is_available()
    return DataLoader(dataset, batch_sampler=lists, num_workers=workers, pin_memory=pinned, worker_init_fn=ignore_signals)


def ignore_signals(worker: int) -> None:
    """Ctrl-C and torchrun signal the workers too; the training process still needs their batch to end its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def write_image(rows: Tensor, path: str | Path) -> None:
    """uint8 (rows, columns, 3, S, S) -> a PNG grid; images under 64 px are enlarged by a whole factor."""
    zoom = max(1, round(64 / rows.shape[-1]))
    pixels = rows.cpu().permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (height, width, 3)
    image = ImageOps.scale(Image.fromarray(pixels.numpy()), zoom, Image.Resampling.NEAREST)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


class ImageSet:
    """A folder of images, cropped as in training to `image_size` or else of one size; or an .npz of arr_0 uint8 (N, H, W, 3), of
    mu (D,) and sigma (D, D), or of both, as ADM's references. `count` images or 0, `moments` mu and sigma or None, `made` what
    is stored beside them: N, hash, resize, weights. Raises UserError and OSError, naming the file."""

    def __init__(self, path: str, image_size: int):
        self.path, self.count, self.moments, self.made = path, 0, None, {}
        self.folder = ImageFolder(path, image_size) if Path(path).is_dir() else None
        if self.folder:
            self.count, self.shape = len(self.folder), self.folder.read(0)[0].shape
            return
        with as_user_error(f"{path} cannot be read: "):  # whatever numpy, zipfile and zlib say of a damaged one
            archive = zipfile.ZipFile(path)
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if "arr_0" in names:
                self.pixels = archive.open("arr_0.npy")
                np.lib.format.read_magic(self.pixels)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(self.pixels)
                if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or not all(shape):
                    raise ValueError(f"arr_0 is {dtype} {shape}; images must be uint8 (N, H, W, 3), values 0 to 255")
                self.count, self.shape, self.start = shape[0], shape[1:], self.pixels.tell()
            if "mu" in names and "sigma" in names:
                small = [name for name in ("mu", "sigma", "N", "hash", "resize", "weights") if name in names]
                files = [io.BytesIO(archive.open(f"{name}.npy").read(1 << 28)) for name in small]  # no more of what unpacks to more
                mu, sigma, *made = (np.lib.format.read_array(file, allow_pickle=False) for file in files)
                if mu.ndim != 1 or not mu.size or sigma.shape != 2 * mu.shape or not np.isfinite(mu.sum() + sigma.sum()):
                    raise ValueError(f"mu is {mu.shape} and sigma {sigma.shape}; they must be finite, of shapes (D,) and (D, D)")
                self.moments = mu.astype(float), sigma.astype(float)
                self.made = {name: value.item() for name, value in zip(small[2:], made)}
            if not self.count and not self.moments:
                raise ValueError(f"it has neither arr_0 nor mu and sigma, but {', '.join(names) or 'nothing'}")

    def read(self, rows: range) -> Tensor:
        """-> uint8 (b, 3, H, W). Rows in rising order read an archive once, and it never lies in memory."""
        if self.folder:
            images = [image for image, _ in READERS.map(self.folder.read, rows)]
            if {image.shape for image in images} != {self.shape}:
                raise OSError(f"{self.path} has images of several sizes; --image_size S crops them alike")
            return torch.stack(images)
        try:
            size = math.prod(self.shape)
            self.pixels.seek(self.start + rows.start * size)
            pixels = np.frombuffer(self.pixels.read(len(rows) * size), np.uint8).reshape(len(rows), *self.shape)
        except Exception as error:  # no UserError, which only the first process would say
            raise OSError(f"{self.path} is damaged: {error}") from error
        return torch.tensor(pixels).permute(0, 3, 1, 2)

    def record(self) -> dict:
        """The set on a card; of stored statistics, the images that they were made of."""
        crop = f", cropped to {self.folder.size}" if self.folder and self.folder.size else ""
        digest = self.folder.stamp + crop if self.folder else file_hash(self.path)
        return {"path": self.path, "N": self.count or None, "hash": digest} | self.made


@contextmanager
def shared_array(path: Path, shape: tuple[int, ...], dtype: np.dtype, processes: Processes) -> Iterator[np.memmap]:
    """Gives an array on disk that every process writes its rows into; at the end it is `path`, or gone if anything fails."""
    temporary = path.with_name(f"{path.name}.{processes.launch}.tmp")
    try:
        if processes.first:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(temporary, "w+", dtype, shape)
        processes.barrier()
        rows = np.lib.format.open_memmap(temporary, "r+")
        yield rows
        rows.flush()
        processes.barrier()
        if processes.first:
            temporary.replace(path)
    finally:
        if processes.first:
            temporary.unlink(missing_ok=True)


class Latents:
    """The data set as posterior moments: latents.npy, one record per image, memory-mapped; latents.json, its seal.

    record: mean and std, float16 (2, L, C) for the image and its mirror image, and the label. The seal is written last and
    holds what they are of (`stamp`), and mean and std of z per channel. UserError if they are missing, of others, or damaged.
    """

    def __init__(self, path: Path, stamp: str, count: int, tokens: int, channels: int, classes: int):
        seal, self.labels = path.with_suffix(".json"), range(max(1, classes))
        remedy = f"delete {seal} and run the stage latents"
        if not self.are_whole(path):
            raise UserError(f"{path} does not exist, or not whole; run the stage latents first")
        self.seal = read_json(seal)
        if self.seal.get("stamp") != stamp:
            raise UserError(f"{path} is of another tokenizer or other data; {remedy}")
        with as_user_error(f"{path} is truncated or damaged; {remedy}: "):
            self.rows = np.lib.format.open_memmap(path, mode="r")
            scales = np.shape([self.seal["latent_mean"], self.seal["latent_std"]])
            if (self.rows.dtype, self.rows.shape, scales) != (self.record(tokens, channels), (count,), (2, channels)):
                raise ValueError(f"it must hold {count} records of {tokens} x {channels}")

    @staticmethod
    def are_whole(path: Path) -> bool:
        """Whether they are there, with their seal."""
        return path.exists() and path.with_suffix(".json").exists()

    @staticmethod
    def record(tokens: int, channels: int) -> np.dtype:
        return np.dtype([(name, "<f2", (2, tokens, channels)) for name in ("mean", "std")] + [("label", "<i4")])

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """-> mean, std float32 (b, 2, L, C), labels int64 (b,)."""
        rows = self.rows[indices]
        if not np.isin(rows["label"], self.labels).all():
            raise OSError(f"{self.rows.filename} is damaged: it has labels beyond {self.labels}")  # one process may find it alone
        columns = (rows["mean"].astype(np.float32), rows["std"].astype(np.float32), rows["label"].astype(np.int64))
        return tuple(torch.from_numpy(column) for column in columns)
