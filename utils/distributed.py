"""The device, and this process's place among those of torchrun."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.console import UserError, end_with_parent

# A Mac computes on its CPU: its GPU has no float64, which samplers and metrics need.
DEVICES = ("cpu", "cuda")
PRECISIONS = ("bf16", "float32")


@dataclass(frozen=True)
class Distributed:
    """This process's rank, the number of processes, and the device.

    run_id is a random text that all processes of a launch share, for the names of temporary files.
    """

    rank: int
    world_size: int
    device: torch.device
    run_id: str = field(default_factory=lambda: os.urandom(4).hex())

    @staticmethod
    def start(device_type: str | None = None) -> "Distributed":
        """Choose the device and join torchrun's process group if there is one.

        GPU tensors are exchanged by nccl, CPU tensors by gloo.
        """
        use_cuda = torch.cuda.is_available() if device_type is None else device_type == "cuda"
        launched = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
        local_rank = int(os.environ.get("LOCAL_RANK", 0)) if launched else 0
        if use_cuda:
            if local_rank >= torch.cuda.device_count():
                count = torch.cuda.device_count()
                raise OSError(f"process {local_rank} has no GPU of its own: there are {count}")
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # TF32
        else:
            device = torch.device("cpu")
            tune_cpu()
        if not launched:
            return Distributed(0, 1, device)
        end_with_parent(signal.SIGTERM)  # if torchrun is killed, training stops and is saved
        if not torch_dist.is_initialized():
            torch_dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo")
        run_id = [os.urandom(4).hex()]
        torch_dist.broadcast_object_list(run_id)
        return Distributed(torch_dist.get_rank(), torch_dist.get_world_size(), device, run_id[0])

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first process of its machine."""
        return os.environ.get("LOCAL_RANK", "0") == "0"

    def shard(self, items: Sequence, batch_size: int) -> list[Sequence]:
        """This process's part of the items, in batches that do not depend on the world size."""
        starts = range(0, len(items), batch_size)
        batches = [items[start : start + batch_size] for start in starts]
        first = len(batches) * self.rank // self.world_size
        last = len(batches) * (self.rank + 1) // self.world_size
        return batches[first:last]

    def all_reduce(self, values: Tensor) -> Tensor:
        """Replace values by their sum over all processes, and return them."""
        if self.world_size > 1:
            torch_dist.all_reduce(values)
        return values

    def any_rank(self, here: bool) -> bool:
        """Whether it is True in any process. CPUs exchange it, so that no GPU is waited for."""
        return bool(self.all_reduce(torch.tensor(float(here))) > 0)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world_size > 1:
            torch_dist.barrier()

    def gather(self, value) -> list | None:
        """The value of each process, in the order of the ranks, on rank 0; None elsewhere."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size if self.is_main else None
        torch_dist.gather_object(value, values)
        return values

    def gather_rows(self, parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Each process's parts {name: (b, ...)} -> {name: (N, ...)} on rank 0, {} elsewhere."""
        shards = self.gather(list(parts))
        if not self.is_main:
            return {}
        parts = [part for shard in shards for part in shard]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def wrap(self, module: nn.Module | None) -> nn.Module | None:
        """DistributedDataParallel, which averages gradients, or with one process the module."""
        if self.world_size == 1 or module is None:
            return module
        # Buffers are the same in all processes by construction.
        return DistributedDataParallel(
            module, gradient_as_bucket_view=True, broadcast_buffers=False
        )


def set_grad_sync(modules: Iterable[nn.Module | None], sync: bool) -> None:
    """Whether the next backward pass averages gradients over processes or only adds them up here.

    It sets what DistributedDataParallel.no_sync() sets.
    """
    for module in modules:
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = sync


def tune_cpu() -> None:
    """Three settings that make training on a CPU about twice as fast (docs/speed.md)."""
    # "medium" makes oneDNN compute matrix products, which on many processors is faster than MKL and
    # equally exact. On processors with AMX it rounds to bfloat16; a product shows whether it does,
    # and then the setting is taken back.
    torch.set_float32_matmul_precision("medium")
    value = torch.full((256, 256), 1 + 2**-12)  # exact in float32, but not in bfloat16
    identity = torch.ones(256).diag()
    if not torch.equal(value @ identity, value):
        torch.set_float32_matmul_precision("highest")
    # PyTorch's fused attention is slower on CPUs than plain products at these lengths.
    torch.backends.cuda.enable_flash_sdp(False)
    # glibc returns freed memory to the system; getting it back costs more than a matrix product.
    if sys.platform == "linux":
        trim_threshold, mmap_threshold = -1, -3
        for parameter in (trim_threshold, mmap_threshold):
            ctypes.CDLL(None).mallopt(parameter, 2**31 - 1)


def tune_compiler() -> None:
    """Three settings of torch.compile that single blocks need."""
    import torch._dynamo  # which takes two seconds
    import torch._functorch.config

    # The adaptive weights differentiate through a block before the backward pass does.
    torch._functorch.config.donated_buffer = False
    # DistributedDataParallel would have blocks cut at the borders of its buckets.
    torch._dynamo.config.optimize_ddp = False
    # Training, evaluation and each kind of block need a graph of their own; beyond the limit blocks
    # would run uncompiled without a word.
    torch._dynamo.config.recompile_limit = 32


def micro_batch_slices(
    batch_size: int, micro_batch: int, dist: Distributed, flag_prefix: str = ""
) -> list[slice]:
    """This process's rows of a global batch, in micro batches whose gradients are added up.

    micro_batch 0 means all rows at once. Raises UserError unless everything divides.
    """
    per_rank, remainder = divmod(batch_size, dist.world_size)
    if remainder:
        raise UserError(
            f"--{flag_prefix}batch_size {batch_size} cannot be divided among {dist.world_size} "
            "processes; use a multiple of their number"
        )
    size = min(micro_batch or per_rank, per_rank)
    if per_rank % size:
        raise UserError(
            f"--{flag_prefix}micro_batch {size} does not divide the {per_rank} rows of "
            f"--{flag_prefix}batch_size {batch_size} that each process has"
        )
    first = per_rank * dist.rank
    return [slice(start, start + size) for start in range(first, first + per_rank, size)]
