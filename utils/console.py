"""What the command-line programs share: flags, error messages, warnings, progress bars, signals."""

import argparse
import ctypes
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress

import torch
import torch.distributed as torch_dist
from tqdm import tqdm

OUT_OF_MEMORY = (
    "out of memory; a smaller --micro_batch of train.py or --batch_size of sample.py needs less "
    "memory and changes nothing else"
)


class UserError(Exception):
    """Something that the user can fix: one sentence that says what is wrong and what to do."""


class LocalError(UserError):
    """A UserError of this process alone: the other processes of a run do not find it."""


@contextmanager
def as_user_error(subject: str = ""):
    """Turn any error that a component raises about the user's values or files into a UserError."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(subject + reason) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of this machine or of its GPU is full."""
    is_memory_error = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_memory_error or "can't allocate memory" in str(error)


def run_main(main: Callable[[list[str]], None]) -> None:
    """Run main(arguments) as a program. Whatever goes wrong becomes one line on stderr.

    Exit codes: 2 for what the user can fix, 1 for unexpected errors, 130 after Ctrl-C or SIGTERM.
    """
    for name in ("stdout", "stderr"):  # either may be closed
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  stays open
    # Paths may have letters that the terminal's encoding lacks.
    sys.stdout.reconfigure(errors="backslashreplace")
    # Each of these signals then unwinds the program as Ctrl-C does: temporary files are removed.
    for number in stop_signals():
        signal.signal(number, signal.default_int_handler)
    try:
        main(sys.argv[1:])
        if torch_dist.is_initialized():
            torch_dist.destroy_process_group()
    except SystemExit as stop:
        leave(stop.code)
    except BaseException as error:
        message, code = describe_error(error)
        # All processes of a machine find the same UserError, so that the first one speaks for them.
        speaks_for_all = isinstance(error, UserError | KeyboardInterrupt)
        speaks_for_all = speaks_for_all and not isinstance(error, LocalError)
        with suppress(OSError):  # whoever read stderr may have gone
            if not speaks_for_all or os.environ.get("LOCAL_RANK", "0") == "0":
                tqdm.write(message, file=sys.stderr)  # below an open progress bar
        leave(code)


def describe_error(error: BaseException) -> tuple[str, int]:
    """What to say of an error, and the program's exit code."""
    text = str(error).strip().rpartition("\n")[2]  # a data-loading worker's traceback comes first
    if isinstance(error, KeyboardInterrupt):
        return text or "interrupted", 130
    if is_out_of_memory(error):
        return f"error: {OUT_OF_MEMORY}", 2
    if isinstance(error, BrokenPipeError):
        # Python would complain once more at exit, when it writes what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "error: standard output was closed by the program that read it", 2
    if isinstance(error, UserError | OSError):
        return f"error: {text}", 2
    if "DataLoader worker" in text:
        return f"error: {text[:200]}; perhaps memory is short, so try fewer --workers", 2
    if torch_dist.is_initialized() and isinstance(error, RuntimeError) and "by peer" in text:
        return "error: another process of this run has ended", 2
    with tempfile.NamedTemporaryFile("w", prefix="mactok-", suffix=".txt", delete=False) as file:
        file.write(f"{' '.join(sys.argv)}\n\n")
        traceback.print_exception(error, file=file)
    kind = type(error).__name__
    return f"error: unexpected {kind}: {text[:300]}; please report it with {file.name}", 1


def leave(code: int | str | None) -> None:
    """End this process with an exit code, even if other processes are stuck.

    Data-loading workers are killed, because Python would wait for them. With several training
    processes the others may wait in a collective operation for ever: this process does not take
    part in closing the process group, which is such an operation, and torchrun then ends the
    others.
    """
    workers = multiprocessing.active_children()
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader would complain of their end
    for worker in workers:
        worker.kill()
    if torch_dist.is_initialized() and code:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def end_with_parent(number: int) -> None:
    """Ask the system to send this process a signal when its parent ends, which Linux does."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # prctl's PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, number)


# --------------------------------------------------------------------------------------------------
# Flags.


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors, and whose flags cannot be abbreviated."""

    def __init__(self, **kwargs):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, **kwargs)

    def error(self, message: str) -> None:
        raise UserError(f"{message} (--help lists all flags)")


def bounded(type_fn: type, min: float | None = None, max: float = math.inf) -> Callable:
    """A `type` for argparse: numbers within bounds, or 0 and 1 for bool."""

    def convert(text: str):
        if type_fn is bool:
            if text not in ("0", "1"):
                raise argparse.ArgumentTypeError(f"is {text}; it must be 0 or 1")
            return text == "1"
        value = type_fn(text)
        if min is not None and not (min <= value <= max and value < math.inf):
            upper = f" and at most {max}" if max < math.inf else ""
            raise argparse.ArgumentTypeError(f"is {text}; it must be at least {min}{upper}")
        return value

    convert.__name__ = type_fn.__name__  # argparse prints it: "invalid int value"
    return convert


# --------------------------------------------------------------------------------------------------
# Progress, warnings and signals.


def progress(steps: Iterable, label: str, show: bool = True, **kwargs) -> tqdm:
    """A progress bar. Where stderr is not a terminal, it writes a line every half minute."""
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(steps, label, disable=not show, mininterval=interval, **kwargs)


def warn(text: str, show: bool = True) -> None:
    """Print a warning on stderr, above an open progress bar."""
    if show:
        tqdm.write(f"warning: {text}", file=sys.stderr)


def stop_signals() -> list[int]:
    """The signals that stop a program: Ctrl-C, a request to end, and the end of its terminal.

    The last one is left out where it is ignored, which is what nohup does.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


@contextmanager
def catch_signals():
    """Yield a list that collects `stop_signals`, so that a training step can end and be saved.

    A second Ctrl-C interrupts at once. Raises KeyboardInterrupt at the end if a signal came too
    late for a step.
    """
    received = []

    def handle(number: int, frame) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = stop_signals()
    previous = [signal.signal(number, handle) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, previous):
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt(
            "stopped at the end of a stage; run the same command again to go on"
        )
