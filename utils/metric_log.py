"""log.jsonl: one JSON line per entry, averaged over steps, micro batches and processes."""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.console import warn
from utils.distributed import Distributed


class MetricLog:
    """Collects the metrics of a stage and writes them.

    A resumed run repeats the lines since its checkpoint; the last line of a step counts. To follow
    a run with a tracker such as wandb or TensorBoard, call it in `write`.
    """

    def __init__(self, path: Path, stage: str, dist: Distributed):
        self.path = path
        self.stage = stage
        self.dist = dist
        # When the last line was written, and when each step since has ended.
        self.step_ends = [time.perf_counter()]
        self.sums = {}
        self.counts = {}
        self.warned = set()
        if dist.device.type == "cuda":  # so that `peak_memory` is this stage's
            torch.cuda.reset_peak_memory_stats(dist.device)

    @torch.no_grad()
    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add tensors of a micro batch or a step to the averages, but no non-finite values."""
        for name, value in metrics.items():
            value = value.detach().float()
            is_finite = value.isfinite()
            self.sums[name] = self.sums.get(name, 0) + torch.where(is_finite, value, 0)
            self.counts[name] = self.counts.get(name, 0) + is_finite

    def end_step(self) -> None:
        """Note the time, for `steps_per_second`."""
        self.step_ends.append(time.perf_counter())

    @property
    def num_steps(self) -> int:
        """Steps since the last line."""
        return len(self.step_ends) - 1

    def steps_per_second(self) -> float:
        """By the median time of a step, so that saving and evaluating do not count."""
        return 1 / float(np.median(np.diff(self.step_ends)))

    def flush(self) -> dict[str, Tensor]:
        """The averages since the last call, over all processes, on the CPU.

        All metrics go together, so that a GPU is waited for once.
        """
        pairs = {
            name: torch.stack([total, self.counts[name].float()])
            for name, total in self.sums.items()
        }
        flat = torch.cat([pair.flatten() for pair in pairs.values()])
        parts = self.dist.all_reduce(flat).cpu().split([pair.numel() for pair in pairs.values()])
        averages = {}
        for (name, pair), part in zip(pairs.items(), parts):
            total, count = part.view(pair.shape)
            averages[name] = total / count
        self.sums = {}
        self.counts = {}
        self.step_ends = self.step_ends[-1:]
        return averages

    def warn_once(self, kind: str, text: str) -> None:
        """A warning, of each kind once."""
        if kind not in self.warned:
            self.warned.add(kind)
            warn(text, self.dist.is_main)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line. Values that JSON cannot express, such as infinity, become null."""
        if not self.dist.is_main:
            return
        line = {"stage": self.stage, "step": step, "time": round(time.time(), 1)}
        line |= {name: to_json(value) for name, value in metrics.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def to_json(value):
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on the GPU in this stage, or this process on a CPU.

    0 on Windows, which does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
