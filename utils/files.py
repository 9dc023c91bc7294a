"""Files that are written whole or not at all, read without running code, locked and hashed."""

import argparse
import errno
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from utils.console import UserError, as_user_error, is_out_of_memory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def atomic_write(path: str | Path):
    """Yield a temporary path, which is renamed to `path` at the end, or removed if anything fails.

    Raises UserError if the file cannot be written; then the previous one is kept.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        kept = "the previous file is kept" if path.exists() else "nothing was written"
        raise UserError(
            f"cannot write {path} ({reason}); {kept}, make room and run the command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary_files(folder: Path) -> None:
    """Remove what `atomic_write` leaves behind in a folder when its process is killed."""
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)


def check_room(path: Path, num_bytes: int, label: str) -> None:
    """Raise UserError if so many bytes do not fit on the disk where `path` is, or is to be."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise UserError(
            f"{path}: the {label} take {num_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
            "make room, or write elsewhere"
        )


def write_text(text: str, path: str | Path) -> None:
    """Write a text file, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def read_json(path: str | Path) -> dict:
    """The JSON object in a file. Raises UserError if the file holds anything else."""
    content = Path(path).read_bytes()
    with as_user_error(f"{path} is damaged, it holds no JSON object: "):
        return {**json.loads(content)}


def lock_file(path: Path):
    """Open a file and lock it until this process ends. Raises UserError if it is locked already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")  # noqa: SIM115  It stays open as long as the process runs.
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another run is at work in {path.parent}; wait for it to end, or use another --out"
        ) from None
    return file


def save_torch(content: dict, path: str | Path) -> None:
    """torch.save, whole or not at all."""
    with atomic_write(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:
            if "inline_container" not in str(error):  # the part of PyTorch that writes the file
                raise
            raise OSError(errno.ENOSPC, "the disk is probably full") from error


def load_torch(path: str | Path, mmap: bool = False) -> dict:
    """A dict of tensors and plain values from a PyTorch file, on the CPU. No code in it is run.

    With `mmap` tensors are read from disk when they are used; such a file must not be replaced
    while they are. Raises UserError for files that are missing, damaged or of another kind.
    """
    try:
        # Released SiT checkpoints hold the arguments of their training script.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = "it is truncated or not a PyTorch file"
        if "GLOBAL" in str(error):
            reason = "it holds pickled code, which is never run"
        advice = "delete it, or move it away"
        raise UserError(f"{path} cannot be loaded: {reason}; {advice}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a dict of tensors; move it away")
    return content


def write_npy_header(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """What stands before the data in a .npy file."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def hash_state_dict(state: dict[str, Tensor]) -> str:
    """SHA-256 over the names and bytes of a state dict, hexadecimal."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        tensor = state[key].detach().cpu().contiguous()
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
