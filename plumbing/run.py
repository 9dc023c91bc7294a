"""Processes, errors, signals, and files that are whole or not there."""

import argparse
import ctypes
import difflib
import hashlib
import json
import math
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DEVICES = ("cpu", "cuda")  # a Mac computes on its CPU: its GPU has no float64, which samplers and metrics take
CHECKPOINT = {"stage": str, "step": int, "of_steps": int, "config": dict, "classes": list, "ema": dict}  # what all of ours hold


class UserError(Exception):
    """Something the user can mend; shown as one sentence, without a traceback, with exit code 2."""


def command_line(main) -> None:
    """Run main(arguments). UserError, what the system refuses, and signals become one line on stderr, with exit code 2 or 130."""
    sys.stdout.reconfigure(errors="backslashreplace")  # paths with letters that its encoding lacks
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwinds as Ctrl-C does, so that temporary files are removed
    try:
        main(sys.argv[1:])
    except (UserError, OSError, KeyboardInterrupt, MemoryError, RuntimeError) as error:
        text = str(error).strip().rpartition("\n")[2]  # a worker's error begins with its traceback
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
            text = "out of memory; a smaller --micro_batch of train.py or --batch_size of sample.py needs less, and changes nothing"
        elif isinstance(error, RuntimeError):
            raise
        # The processes of a machine find the same UserError, and are interrupted together: the first one says it.
        if not isinstance(error, UserError | KeyboardInterrupt) or os.environ.get("LOCAL_RANK", "0") == "0":
            tqdm.write(f"error: {text}" if text else "interrupted", file=sys.stderr)  # below an open progress bar
        sys.exit(2 if text else 130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def as_user_error(subject: str = ""):
    """Turn whatever a component says of the user's values or files into a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(subject + " ".join(str(error).split())[:300]) from error


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors, and name the nearest flag for an unknown one."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> None:
        commands = self._subparsers._group_actions[0].choices.values() if self._subparsers else ()
        flags = [flag for parser in (self, *commands) for flag in parser._option_string_actions]
        unknown = message.partition("unrecognized arguments: ")[2].replace("=", " ").split()
        near = difflib.get_close_matches(unknown[0], flags, 1) if unknown else []
        raise UserError(message + (f"; did you mean {near[0]}?" if near else ""))


def within(kind: type, least: float | None = None, most: float = math.inf):
    """What argparse reads a value with: a type, and bounds if it is a number."""

    def read(text: str):
        value = kind(text)
        if least is not None and not (least <= value <= most and value < math.inf):
            upper = f" and at most {most}" if most < math.inf else ""
            raise argparse.ArgumentTypeError(f"is {text}; it must be at least {least}{upper}")
        return value

    read.__name__ = kind.__name__  # argparse says it: "invalid int value"
    return read


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those of torchrun. One process needs no environment at all."""

    rank: int
    world: int
    device: torch.device
    launch: str = field(default_factory=lambda: os.urandom(4).hex())  # the same in all of them, and in no others

    @staticmethod
    def start(kind: str | None = None) -> "Processes":
        """On a device of DEVICES, in torchrun's process group if there is one: nccl for CUDA tensors, gloo for those on the CPU."""
        cuda, local = (kind == "cuda") if kind else torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            if local >= torch.cuda.device_count():  # perhaps in this process alone
                raise OSError(f"process {local} has no GPU of its own: there are {torch.cuda.device_count()}")
            torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high" if cuda else "medium")  # TF32; on a CPU oneDNN for MKL
        torch.backends.cuda.enable_flash_sdp(cuda)  # it rules CPUs too, where oneDNN is slow at its small products
        if sys.platform == "linux" and not cuda:  # freed memory is kept: to get it from the system again costs more than a product
            for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
                ctypes.CDLL(None).mallopt(option, 2**31 - 1)
        if "RANK" not in os.environ:
            return Processes(0, 1, device)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        launch = [os.urandom(4).hex()]
        dist.broadcast_object_list(launch)
        return Processes(dist.get_rank(), dist.get_world_size(), device, *launch)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence, size: int) -> list[Sequence]:
        """This process's part of the items, in batches whose borders do not depend on the process count."""
        every = [items[start : start + size] for start in range(0, len(items), size)]
        return every[len(every) * self.rank // self.world : len(every) * (self.rank + 1) // self.world]

    def sum(self, values: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, here: bool) -> bool:
        """Whether it is true in any process. The flag travels between CPUs, so no GPU is waited for."""
        return bool(self.sum(torch.tensor(float(here))) > 0)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def gather(self, parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Each process's parts {name: (b, ...)} in the order of the ranks -> {name: (N, ...)} on the first one, {} elsewhere."""
        every = [list(parts)] * self.world
        if self.world > 1:
            dist.gather_object(every[0], every if self.first else None)
        parts = sum(every, []) if self.first else []
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def progress(steps, label: str, processes: Processes, **settings) -> tqdm:
    """A progress bar on rank 0; where stderr is not a terminal it writes a line every half minute."""
    return tqdm(steps, label, disable=not processes.first, mininterval=0.1 if sys.stderr.isatty() else 30, **settings)


def warn(text: str, processes: Processes | None = None) -> None:
    """On stderr, above a progress bar; of several processes the first one says it."""
    if processes is None or processes.first:
        tqdm.write(f"warning: {text}", file=sys.stderr)


@contextmanager
def stop_signals():
    """Gives a list of the SIGINTs and SIGTERMs received meanwhile, so that a step can end and be saved. A second Ctrl-C kills."""
    received, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def handle(number: int, _frame) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = [signal.signal(number, handle) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, previous):
            signal.signal(number, handler)


@contextmanager
def replacing(path: str | Path):
    """Gives a temporary path beside `path`, which is renamed to `path` at the end, or removed if anything goes wrong."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")  # nobody else's
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter is torch's for a failed write, and does not say why
        reason = "the disk is probably full" if isinstance(error, RuntimeError) else error.strerror or error
        kept = "the previous one is kept" if path.exists() else "nothing was written"
        raise UserError(f"cannot write {path} ({reason}); {kept}, make room and run the same command again") from error
    finally:
        temporary.unlink(missing_ok=True)


def claim(path: Path):
    """Open a file and hold it until this process ends, however it does. UserError if another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")  # noqa: SIM115  its end is the process's
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is at work in {path.parent}; wait for its end, or use another --out") from None
    return file


def write_text(text: str, path: str | Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def read_json(path: str | Path) -> dict:
    """A JSON object. UserError names a file that is none."""
    content = Path(path).read_bytes()
    with as_user_error(f"{path} is damaged, it holds no JSON object: "):
        return {**json.loads(content)}


def save_checkpoint(content: dict, path: str | Path) -> None:
    """torch.save, whole or not at all."""
    with replacing(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: str | Path, form: dict[str, type] | None = None) -> dict:
    """A dict of tensors and plain values, on the CPU, with the keys and types of `form` at least. UserError; no code is run."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # released SiT checkpoints hold their arguments
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=form is not None)  # ours; older files cannot be
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:
        reason = "it holds pickled code, which is never run" if "GLOBAL" in str(error) else "it is truncated or not a PyTorch file"
        raise UserError(f"{path} cannot be loaded: {reason}; delete it, or move it away") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(key), kind) for key, kind in (form or {}).items()):
        raise UserError(f"{path} is not {'a checkpoint of train.py' if form else 'a dict of tensors'}, or not whole; move it away")
    return content


def state_hash(state: dict[str, Tensor], text: str = "") -> str:
    """SHA-256 over a text and the names and bytes of a state dict, hexadecimal."""
    digest = hashlib.sha256(text.encode())
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
