"""What made a result: command line, code, versions, machine."""

import platform
import shutil
import subprocess
from pathlib import Path

import torch

from utils.distributed import Distributed

ROOT = Path(__file__).parents[1]


def describe_run(script: str, arguments: list[str], dist: Distributed) -> dict:
    """What a report says about how it was made."""
    is_cuda = dist.device.type == "cuda"
    return {
        "command": [script, *arguments],
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if is_cuda else platform.machine(),
        "processes": dist.world_size,
    }


def git_commit() -> str:
    """The commit of this project, or "" if it does not lie in a git repository of its own."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
