"""Random numbers that depend on the seed, the stage, the step and the row of the batch only.

From this follow two promises: a resumed run equals an unbroken one, without any saved state of a
random number generator; and the number of processes or micro batches changes nothing.
"""

import zlib

import numpy as np
import torch
from torch import Tensor


def step_seed(seed: int, stage: str, step: int) -> int:
    """A seed for everything random in one step of one stage."""
    key = [seed, zlib.crc32(stage.encode()), step]
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


class BatchRNG:
    """Draws for the rows of one micro batch.

    Every call draws for the whole global batch and returns the micro batch's rows, so that a row
    gets the same numbers however the batch is divided. Micro batches must make the same calls in
    order.
    """

    def __init__(self, seed: int, batch_size: int, rows: slice, device: torch.device):
        self.batch_size = batch_size
        self.rows = rows
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.shared_generator = np.random.default_rng(seed)

    def rand(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), (rows, *shape)."""
        size = (self.batch_size, *shape)
        return torch.rand(size, generator=self.generator, device=self.device)[self.rows]

    def randn(self, *shape: int) -> Tensor:
        """Normal numbers, (rows, *shape)."""
        size = (self.batch_size, *shape)
        return torch.randn(size, generator=self.generator, device=self.device)[self.rows]

    def shared_rand(self) -> float:
        """One uniform number for the whole batch, which the CPU knows without asking the GPU."""
        return float(self.shared_generator.random())
