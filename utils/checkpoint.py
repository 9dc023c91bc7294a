"""Checkpoints: one file with the state of several objects, from which training resumes exactly."""

from pathlib import Path

from utils.console import UserError, as_user_error
from utils.files import load_torch, save_torch

# Entries that every checkpoint has besides the states of its objects.
REQUIRED_KEYS = {
    "stage": str,
    "step": int,
    "total_steps": int,
    "config": dict,
    "classes": list,
    "identity": dict,
    "ema": dict,
}


def read_checkpoint(path: Path, mmap: bool = False) -> dict:
    """The content of a checkpoint. Raises UserError if the file is not one, or not whole."""
    saved = load_torch(path, mmap)
    for key, kind in REQUIRED_KEYS.items():
        if not isinstance(saved.get(key), kind):
            raise UserError(f"{path} is not a whole checkpoint of train.py; move it away")
    if saved["step"] < 0:
        raise UserError(f"{path} is damaged: its step is {saved['step']}; move it away")
    return saved


def check_identity(path: Path, saved: dict, identity: dict) -> None:
    """Raise UserError unless a checkpoint was made with the same values, images and tokenizer.

    Options that are newer than the checkpoint are not compared.
    """
    for name, value in identity.items():
        before = saved["identity"].get(name, value)
        if before != value:
            raise UserError(
                f"{path} was made with {name} {shorten(before)}, this run has {shorten(value)}; "
                f"use the same, or another --out"
            )


def shorten(value) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:12]}..."


class Checkpoint:
    """The file of a training stage.

    path       where it is
    metadata   what is stored besides the states and the step; see REQUIRED_KEYS. A resumed run must
               have the same metadata["identity"]
    objects    by name, what has state_dict and load_state_dict; None is left out
    """

    def __init__(self, path: Path, metadata: dict, objects: dict):
        self.path = path
        self.metadata = metadata
        self.objects = {name: obj for name, obj in objects.items() if obj is not None}

    def load(self, mmap: bool = False) -> int:
        """Restore all objects and return the step to go on from; without a file that is 0.

        With `mmap` the file is not read into memory first, which is for objects on a GPU. On a CPU
        optimizers would keep tensors of the file itself.
        """
        if not self.path.exists():
            return 0
        saved = read_checkpoint(self.path, mmap)
        check_identity(self.path, saved, self.metadata["identity"])
        with as_user_error(f"{self.path} is damaged: "):
            for name, obj in self.objects.items():
                obj.load_state_dict(saved[name])
        return saved["step"]

    def save(self, step: int) -> None:
        """Write the file; a run that is killed meanwhile leaves the previous one."""
        states = {name: obj.state_dict() for name, obj in self.objects.items()}
        save_torch(self.metadata | {"step": step} | states, self.path)
