"""Sets of images for fid.py: folders and .npz archives; results of all processes; cards."""

import io
import json
import math
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from plumbing.data import ImageFolder
from plumbing.run import Processes, as_user_error, file_hash, read_json, write_text

BATCH = 50  # images per forward pass; a constant, because other inputs of a pass change the last digits of its outputs
READERS = ThreadPoolExecutor()


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


def batch_rows(count: int, batch: int, processes: Processes) -> list[range]:
    """This process's part of range(count) as batches; their borders do not depend on the process count."""
    return [range(i * batch, min((i + 1) * batch, count)) for i in processes.share(math.ceil(count / batch))]


def gather(parts: Iterator[dict[str, Tensor]], processes: Processes) -> dict[str, Tensor]:
    """Each process's parts {name: (b, ...)} in the order of the ranks -> {name: (N, ...)} on the first one, {} elsewhere."""
    every = [list(parts)] * processes.world
    if processes.world > 1:
        dist.gather_object(every[0], every if processes.first else None)
    parts = sum(every, []) if processes.first else []
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def finish(card: dict, path: str | Path) -> None:
    """Write the card, and print its values."""
    values = {name: value if math.isfinite(value) else None for name, value in card["values"].items()}  # JSON has no infinity
    write_text(json.dumps(card | {"values": values}, indent=1), path)
    print(f"{card['command']}: {card['N']} images, reference {card['reference']['path']} ({card['reference']['N']}); wrote {path}")
    for name, value in card["values"].items():
        print(f"  {name:30}{value:.4f}")


def compare(args: Namespace, processes: Processes) -> None:
    """Any number of result cards in one table; which are not comparable with the first, and why."""
    samplers, columns, protocols = [], [], []
    for path in args.cards:
        card = read_json(path)
        with as_user_error(f"{path} is not a result card of fid.py: "):
            samplers.append({name: str(value) for name, value in (card.get("sampler") or {}).items()})
            values = {name: "infinite" if value is None else f"{value:.4f}" for name, value in card["values"].items()}
            columns.append(samplers[-1] | values)
            about = {"command": card["command"], "N": card["N"], "reference": card["reference"].get("hash")}
            protocols.append(about | card["protocol"])
    print(" " * 30 + "".join(f"{Path(path).stem:>20.19}" for path in args.cards))
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = [column.get(name, "-") for column in columns]
        if name not in samplers[0] or len(set(cells)) > 1:  # settings that all share are left out
            print(f"{name:30}" + "".join(f"{cell:>20.19}" for cell in cells))
    first = protocols[0]
    for path, other in zip(args.cards, protocols):
        unlike = [name for name in first | other if first.get(name) != other.get(name)]
        why = "; ".join(f"{name} is {str(first.get(name))[:16]} and {str(other.get(name))[:16]}" for name in unlike)
        print(f"{path} is not comparable with {args.cards[0]}: {why}" if why else f"{path}: comparable")
