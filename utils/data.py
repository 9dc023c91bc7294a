"""Data sets of images, how they are split, and the order in which batches come."""

import hashlib
import itertools
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.console import UserError, end_with_parent, stop_signals, warn
from utils.images import HIDDEN_PREFIXES, SUFFIXES, list_images, read_image, to_tensor
from utils.shapes import Shapes

IO_POOL = ThreadPoolExecutor()
# Folders with these names are not classes.
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}


class ImageFolder(Dataset):
    """Images in one sub-folder per class, or flat.

    Items are (uint8 (3, size, size), label); in a flat folder all labels are 0. `classes` are the
    names of the sub-folders, `fingerprint` is a hash of all names and file sizes. Raises UserError
    if the folder cannot be used.
    """

    def __init__(self, root: str | Path, size: int):
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"data folder {root} does not exist or is not a folder")
        self.size = size
        self.unreadable = set()  # indices that a warning was given for
        loose, self.skipped = list_images(root, recursive=False)
        self.classes = []
        self.paths = list(loose)
        self.labels = [0] * len(loose)
        for entry in sorted(root.iterdir()):
            if not entry.is_dir() or entry.name.startswith(HIDDEN_PREFIXES):
                continue
            paths, skipped = list_images(entry, recursive=True)
            self.skipped += skipped
            if paths:
                self.paths += paths
                self.labels += [len(self.classes)] * len(paths)
                self.classes.append(entry.name)
        self.check(root, loose)
        self.fingerprint = fingerprint(self.paths, root)

    def check(self, root: Path, loose: list[str]) -> None:
        if not self.paths:
            raise UserError(f"data folder {root} has no images (looked for {' '.join(SUFFIXES)})")
        if self.classes and loose:
            raise UserError(
                f"data folder {root} has class folders and loose images such as {loose[0]}; "
                "keep one kind"
            )
        if self.classes and set(map(str.lower, self.classes)) <= SPLIT_NAMES:
            train = next((name for name in self.classes if name.lower().startswith("train")), "")
            raise UserError(
                f"data folder {root} holds the splits {', '.join(self.classes)}, not classes; "
                f"use --data {root / (train or self.classes[0])}"
            )

    def describe(self) -> str:
        """What was found, in one line."""
        line = f"{len(self)} images"
        if self.classes:
            counts = np.bincount(self.labels)
            line += f" in {len(self.classes)} classes, {counts.min()} to {counts.max()} in each"
        if self.skipped:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in self.skipped.most_common(5))
            line += f"; skipped other files: {kinds}"
        return line

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[Tensor, int]:
        """The item. Raises OSError if the file is not readable."""
        return to_tensor(read_image(self.paths[index], self.size)), self.labels[index]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The item, or the next readable one in its place.

        Raises OSError when more than 1 % of the files, and more than one, have turned out
        unreadable.
        """
        while True:
            try:
                return self.read(index)
            except OSError as error:
                self.note_unreadable(index, error)
            index = (index + 1) % len(self)

    def note_unreadable(self, index: int, error: OSError) -> None:
        """Warn of an unreadable file once, and raise OSError if there are too many."""
        if index not in self.unreadable:
            warn(f"{error}; the next image takes its place")
        self.unreadable.add(index)
        allowed = min(max(1, len(self) // 100), len(self) - 1)
        if len(self.unreadable) > allowed:
            raise OSError(
                f"more than 1 % of the {len(self)} images cannot be read; repair or remove them: "
                f"{error}"
            ) from error


def fingerprint(paths: list[str], root: Path) -> str:
    """SHA-256 over the files' names, as seen from `root`, and sizes."""
    prefix = os.path.join(root, "")
    digest = hashlib.sha256()
    for path in paths:
        line = f"{path.removeprefix(prefix)} {os.path.getsize(path)}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def open_dataset(folder: str, size: int) -> ImageFolder | Shapes:
    """The images of a folder, or the built-in shapes for "" and "shapes"."""
    return Shapes(size) if folder in ("", "shapes") else ImageFolder(folder, size)


def read_batch(
    dataset: ImageFolder | Shapes, indices: Iterable[int], replace: bool = False
) -> tuple[Tensor, Tensor]:
    """Items read in parallel -> uint8 (b, 3, S, S), labels (b,).

    An unreadable file raises OSError or, if `replace` is true, the next image takes its place.
    """
    read = dataset.__getitem__ if replace else dataset.read
    images, labels = zip(*IO_POOL.map(read, map(int, indices)))
    return torch.stack(images), torch.tensor(labels)


# --------------------------------------------------------------------------------------------------
# Splits and order.


def evenly_spaced(count: int, picks: int) -> np.ndarray:
    """At most `picks` of range(count), evenly spaced from the first to the last."""
    return np.linspace(0, count - 1, min(picks, count)).round().astype(int)


def train_val_split(labels: list[int], num_val: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on, and indices to evaluate on, evenly spaced over the data set.

    At most a tenth of the images is held out, and never all images of a class. Where that leaves
    fewer than two, as with under 20 images, none is held out: all images serve both purposes.
    """
    indices = np.arange(len(labels))
    _, first_of_class = np.unique(labels, return_index=True)
    may_be_held_out = np.delete(indices, first_of_class)
    num_val = min(num_val, len(indices) // 10)
    val = may_be_held_out[evenly_spaced(len(may_be_held_out), num_val)]
    if len(val) < 2:
        return indices, indices
    return np.setdiff1d(indices, val), val


def batch_indices(
    indices: np.ndarray | range, batch_size: int, seed: int, first_step: int, slices: list[slice]
) -> Iterator[list[int]]:
    """Endless micro batches of indices, from the global batch number `first_step` on.

    Every epoch is a new permutation that depends on the seed and the epoch only, and batches run on
    from one epoch into the next, so that no image is left out. `slices` are this process's rows.
    """
    first_epoch, start = divmod(first_step * batch_size, len(indices))

    def from_epoch_on() -> Iterator[int]:
        for epoch in itertools.count(first_epoch):
            yield from np.random.default_rng((seed, epoch)).permutation(indices).tolist()

    stream = itertools.islice(from_epoch_on(), start, None)
    while True:
        batch = list(itertools.islice(stream, batch_size))
        for rows in slices:
            yield batch[rows]


def read_ahead(items: Iterator) -> Iterator:
    """The items of an endless iterator, which another thread makes, one item ahead."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items)
        while True:
            item = future.result()
            future = pool.submit(next, items)
            yield item


def image_loader(dataset: Dataset, batches: Iterable[list[int]], num_workers: int) -> DataLoader:
    """Reads batches of indices: uint8 (b, 3, S, S), labels (b,)."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=prepare_worker,
    )


def prepare_worker(worker_id: int) -> None:
    """A worker ignores requests to stop, and ends when the training process ends.

    Ctrl-C and torchrun signal workers, too, but the training process needs their batch for its
    step.
    """
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
