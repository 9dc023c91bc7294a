"""The training set as latents on disk: what the generator is trained on."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.console import LocalError, UserError, as_user_error
from utils.distributed import Distributed
from utils.files import read_json, write_npy_header, write_text

MAX_FLOAT16 = 65504


def record_dtype(num_tokens: int, latent_dim: int) -> np.dtype:
    """The dtype of a row of latents.npy: mean and std (L, C) of a posterior, and a label."""
    moments = [(name, "<f2", (num_tokens, latent_dim)) for name in ("mean", "std")]
    return np.dtype([*moments, ("label", "<i4")])


def metadata_path(path: Path) -> Path:
    return path.with_suffix(".json")


def latents_exist(path: Path) -> bool:
    """Whether the stage that makes them came to its end: the metadata is written last."""
    return path.exists() and metadata_path(path).exists()


class LatentWriter:
    """Writes records into latents.npy; every process its own rows, by ordinary writes.

    Memory maps are not used for writing: on a full disk they end in a bus error, not an exception.
    """

    def __init__(self, path: Path, dtype: np.dtype):
        self.dtype = dtype
        self.file = open(path, "r+b")  # noqa: SIM115  closed by write_latents
        np.lib.format.read_magic(self.file)
        np.lib.format.read_array_header_1_0(self.file)
        self.data_start = self.file.tell()

    def write(self, first_row: int, mean: Tensor, std: Tensor, labels: Tensor) -> None:
        """mean, std (b, L, C), labels (b,) -> rows first_row, first_row + 1, ...

        Raises LocalError for values that float16 cannot hold.
        """
        largest = torch.stack([mean.abs().max(), std.max()]).max().item()  # NaN if there is one
        if not largest <= MAX_FLOAT16:
            raise LocalError(
                f"latents reach {largest:.3g}, and cannot be stored beyond {MAX_FLOAT16}: the "
                "tokenizer has diverged; train it again with a lower --lr or a larger --kl_weight"
            )
        records = np.empty(len(labels), self.dtype)
        records["mean"] = mean.cpu().numpy()
        records["std"] = std.cpu().numpy()
        records["label"] = labels.cpu().numpy()
        self.file.seek(self.data_start + first_row * self.dtype.itemsize)
        self.file.write(records.tobytes())


@contextmanager
def write_latents(path: Path, count: int, dtype: np.dtype, dist: Distributed):
    """Yield a LatentWriter. At the end the file becomes `path`; if anything fails it is removed."""
    temporary = path.with_name(f"{path.name}.{dist.run_id}.tmp")
    try:
        if dist.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            reserve_array(temporary, count, dtype)
        dist.barrier()
        writer = LatentWriter(temporary, dtype)
        with writer.file:
            yield writer
            writer.file.flush()
            os.fsync(writer.file.fileno())
        dist.barrier()
        if dist.is_main:
            temporary.replace(path)
    except OSError as error:
        raise LocalError(f"cannot write {path}: {error.strerror or error}; make room") from error
    finally:
        if dist.is_main:
            temporary.unlink(missing_ok=True)


def reserve_array(path: Path, count: int, dtype: np.dtype) -> None:
    """Make a .npy file of `count` records, whose room on the disk is reserved where possible."""
    with open(path, "wb") as file:
        write_npy_header(file, dtype, (count,))
        size = file.tell() + count * dtype.itemsize
        file.truncate(size)
        file.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)


def write_metadata(path: Path, encoder_hash: str, data: str, mean: Tensor, std: Tensor) -> None:
    """What the latents were made from, and their statistics per channel. Written last.

    data is the fingerprint of the data set.
    """
    content = {
        "encoder": encoder_hash,
        "data": data,
        "latent_mean": mean.tolist(),
        "latent_std": std.tolist(),
    }
    write_text(json.dumps(content), metadata_path(path))


class LatentDataset:
    """latents.npy, read from disk as it is needed, and latents.json.

    encoder_hash    of the tokenizer that made them (sample.hash_encoder)
    data            the fingerprint of the data set
    count           rows: one per training image, and one per mirror image
    mean, std       attributes (C,), statistics of the latents z over all rows

    Raises UserError if they are missing, damaged, or of another tokenizer or other images.
    """

    def __init__(
        self,
        path: Path,
        encoder_hash: str,
        data: str,
        count: int,
        num_tokens: int,
        latent_dim: int,
        num_classes: int,
    ):
        remedy = f"delete {metadata_path(path)} and run the latents stage again"
        if not latents_exist(path):
            raise UserError(f"{path} does not exist, or is not whole; run the latents stage first")
        metadata = read_json(metadata_path(path))
        if (metadata.get("encoder"), metadata.get("data")) != (encoder_hash, data):
            raise UserError(f"{path} is of another tokenizer or of other images; {remedy}")
        with as_user_error(f"{path} is truncated or damaged; {remedy}: "):
            self.rows = np.load(path, mmap_mode="r", allow_pickle=False)
            self.mean = torch.tensor(metadata["latent_mean"])
            self.std = torch.tensor(metadata["latent_std"])
            if self.rows.dtype != record_dtype(num_tokens, latent_dim) or len(self.rows) != count:
                raise ValueError(f"it must hold {count} records of {num_tokens} x {latent_dim}")
            statistics = torch.stack([self.mean, self.std])
            if statistics.shape != (2, latent_dim) or not statistics.isfinite().all():
                raise ValueError(f"its statistics must be finite, of {latent_dim} channels")
        self.path = path
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """-> mean, std float32 (b, L, C), labels int64 (b,)."""
        rows = self.rows[indices]
        labels = torch.from_numpy(rows["label"].astype(np.int64))
        if labels.min() < 0 or labels.max() > max(0, self.num_classes - 1):
            raise OSError(
                f"{self.path} is damaged: it has labels beyond {self.num_classes} classes"
            )
        mean = torch.from_numpy(rows["mean"].astype(np.float32))
        std = torch.from_numpy(rows["std"].astype(np.float32))
        return mean, std, labels
