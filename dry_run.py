"""What a run needs before it starts: files, room, parameters, and each stage's memory and time.

Each stage runs for three steps in a temporary folder, with every term of the objective switched on
and at two sizes of the micro batch. A straight line through both says how much memory other sizes
take. On a CPU, the memory of a GPU is estimated: the weights, and what steps in bf16 keep for their
backward passes.
"""

import json
import math
import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from build import (
    TrainContext,
    build_frozen_networks,
    build_gan,
    build_generator,
    build_tokenizer,
    count_parameters,
    describe_parameters,
)
from fid import INCEPTION_FILE, INCEPTION_URL, inception_path
from utils.files import hash_file
from utils.latents import record_dtype
from utils.weights import PRETRAINED, weights_path

GPU_SIZES = (16, 24, 40, 80)  # GB, for which a micro batch is proposed
GPU_OVERHEAD = 0.5  # GB that CUDA takes for itself
MARGIN = 1.1  # on the measured memory, for gaps between its blocks
GRADIENT_SHARE = 0.2  # what gradients of activations add to what is kept, in an estimate


class Trainers(NamedTuple):
    """The two loops of train.py, which are passed on because train.py imports this file."""

    tokenizer: Callable
    generator: Callable


class Cost(NamedTuple):
    """What a step takes."""

    seconds: float  # for the whole batch
    fixed_gb: float  # of memory on a GPU, whatever the micro batch
    gb_per_item: float  # of memory on a GPU for each image or latent of a micro batch

    def memory_gb(self, micro_batch: int) -> float:
        return GPU_OVERHEAD + MARGIN * (self.fixed_gb + micro_batch * self.gb_per_item)

    def largest_micro_batch(self, rows: int, gpu_gb: int) -> int:
        """The largest divisor of a process's rows that fits, or 0."""
        sizes = [size for size in range(1, rows + 1) if rows % size == 0]
        return max((size for size in sizes if self.memory_gb(size) <= gpu_gb), default=0)


def measure_run(
    context: TrainContext, stages: list[str], weight_names: list[str], trainers: Trainers
) -> None:
    """Print what a run of these stages takes.

    weight_names are those of the official files that the run needs; missing ones leave random
    weights.
    """
    config = context.config
    is_main = context.dist.is_main
    if is_main:
        print_files(context, weight_names)
        print_sizes(context, stages)
        print_row("stage", ["batch", "micro batch", "one step", "whole stage", "memory", "fits"])
    for stage in (*config.stages, "generator"):
        is_generator = stage == "generator"
        batch_size = config.generator_batch_size if is_generator else config.batch_size
        micro_batch = config.generator_micro_batch if is_generator else config.micro_batch
        rows = batch_size // context.dist.world_size
        micro_batch = micro_batch or rows
        if context.device.type == "cpu" and weights_gb(context, stage) > 0.75 * physical_gb():
            cells = ["not measured: it takes more memory than this machine has"]
        else:
            cost = measure_stage(context, stage, micro_batch, batch_size, trainers)
            days = cost.seconds * config.total_steps(stage) / 86400
            fits = [str(cost.largest_micro_batch(rows, size)) for size in GPU_SIZES]
            duration = f"{days:.1f} days" if days > 1 else f"{days * 24:.1f} hours"
            memory = f"{cost.memory_gb(micro_batch):.1f} GB"
            cells = [f"{cost.seconds:.2f} s", duration, memory, " ".join(fits)]
        if is_main:
            print_row(stage, [str(batch_size), str(micro_batch), *cells])
    if is_main:
        kind = "of this GPU" if context.device.type == "cuda" else "of a GPU in bf16, estimated"
        sizes = ", ".join(str(size) for size in GPU_SIZES)
        print(f"memory is that {kind}, for each process; fits: the largest micro batch on")
        print(f"GPUs of {sizes} GB, 0 if none; steps were measured on {context.device.type}")


def measure_stage(
    context: TrainContext, stage: str, micro_batch: int, batch_size: int, trainers: Trainers
) -> Cost:
    """Run a stage at two micro batches: the one that is set and its half, or 2 and 1 on a CPU."""
    if context.device.type == "cuda":
        large = max(2, micro_batch)
        small = large // 2
        line = run_steps(context, stage, large, trainers)
        memory = line["memory_gb"]
        memory_small = run_steps(context, stage, small, trainers)["memory_gb"]
        gb_per_item = (memory - memory_small) / (large - small)
        fixed_gb = memory - large * gb_per_item
    else:
        peaks = []
        for size in (1, 2):
            meter = ActivationMeter()
            # Networks that are built here have fused attention, as on a GPU.
            with meter, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                run_steps(replace(context, use_bf16=True), stage, size, trainers)
            peaks.append(meter.peak / 1e9)
        gb_per_item = (1 + GRADIENT_SHARE) * (peaks[1] - peaks[0])
        fixed_gb = weights_gb(context, stage)
        is_toy = fixed_gb < 0.2  # then a CPU is fast enough for the whole micro batch
        line = run_steps(context, stage, micro_batch if is_toy else 2, trainers)
    return Cost(batch_size / line["images_per_second"], fixed_gb, gb_per_item)


def run_steps(context: TrainContext, stage: str, size: int, trainers: Trainers) -> dict:
    """The log's line on the third of three steps with `size` images or latents per process."""
    config = context.config
    batch_size = size * context.dist.world_size
    changes = dict(
        batch_size=batch_size,
        micro_batch=0,
        generator_batch_size=batch_size,
        generator_micro_batch=0,
        discriminator_start=0,
        generator_steps=3,
        log_every=1,
        save_every=10**9,
        sample_every=0,
    )
    if stage in config.stages:
        settings = config.stages[stage]
        changes[settings.steps_field] = round(3 / settings.steps_share)
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, **changes, out_dir=folder)
        context = replace(context, config=config, val_indices=context.val_indices[:2])
        tokenizer = context.to_device(build_tokenizer(config))
        if stage == "generator":
            latents = RandomLatents(tokenizer.num_latent_tokens, tokenizer.latent_dim)
            trainers.generator(context, tokenizer, latents, encoder_hash="")
        else:
            gan = build_gan(context.device) if config.adversarial_weight else None
            trainers.tokenizer(context, stage, tokenizer, gan)
        if not context.dist.is_main:  # which writes no log
            return {"images_per_second": math.inf, "memory_gb": 0.0}
        lines = Path(folder, "log.jsonl").read_text().splitlines()
    return json.loads(lines[2])


class RandomLatents:
    """Stands in for utils.latents.LatentDataset."""

    def __init__(self, num_tokens: int, latent_dim: int):
        self.shape = (num_tokens, latent_dim)

    def __len__(self) -> int:
        return 1000

    def read(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        shape = (len(indices), *self.shape)
        return torch.randn(shape), torch.ones(shape), torch.zeros(len(indices), dtype=torch.long)


class ActivationMeter(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps for backward passes, and their peak."""

    def __init__(self):
        super().__init__(self.pack, lambda saved: saved.tensor)
        self.holders = Counter()  # how many saved tensors share a storage
        self.bytes = 0
        self.peak = 0

    def pack(self, tensor: Tensor) -> "SavedTensor":
        saved = SavedTensor(tensor)
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if self.holders[pointer] == 0:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        self.holders[pointer] += 1
        weakref.finalize(saved, self.release, pointer, size)
        return saved

    def release(self, pointer: int, size: int) -> None:
        self.holders[pointer] -= 1
        if self.holders[pointer] == 0:
            self.bytes -= size


class SavedTensor:
    """A tensor that autograd keeps, as an object whose end can be noticed."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def weights_gb(context: TrainContext, stage: str) -> float:
    """GB of what does not grow with the batch: weights, optimizer, averages, frozen networks.

    A float32 number takes 4 bytes, and its copy in bf16 takes 2. A trained weight is itself, two
    averages of AdamW, its moving average and the copy: 18 bytes. A fixed part of the tokenizer is
    itself, its moving average and the copy: 10. The discriminator has no moving average: 14. Frozen
    networks and AlignTok's reference are themselves and the copy: 6. The memory is fullest when the
    gradients of weights do not exist yet.
    """
    config = context.config
    with torch.device("meta"):
        tokenizer = build_tokenizer(config)
        if stage == "generator":
            generator = build_generator(config, tokenizer, len(context.data.classes))
            return 18 * count_parameters(generator) / 1e9
        stage_config = config.for_stage(stage)
        prefixes = config.stages[stage].trainable
        trained = sum(
            p.numel() for name, p in tokenizer.named_parameters() if name.startswith(prefixes)
        )
        fixed = count_parameters(tokenizer) - trained
        num_bytes = 18 * trained + 10 * fixed
        for network in build_frozen_networks(stage_config).pretrained_parts().values():
            num_bytes += 6 * count_parameters(network)
        if config.adversarial_weight:
            num_bytes += 14 * count_parameters(build_gan("meta"))
        if stage_config.preservation_weight:
            num_bytes += 6 * count_parameters(tokenizer)
    return num_bytes / 1e9


def physical_gb() -> float:
    """The memory of this machine; infinite where Python does not tell."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


# --------------------------------------------------------------------------------------------------
# Room on the disk.


def file_sizes(
    context: TrainContext, stages: list[str], tokenizer: nn.Module, generator: nn.Module
) -> dict[str, int]:
    """About how many bytes the files of these stages take, by name.

    A checkpoint holds four float32 numbers for each weight of its network: itself, its moving
    average, and the two averages of AdamW. That of the generator holds the tokenizer, too.
    """
    sizes = {}
    for stage in stages:
        if stage == "latents":
            record = record_dtype(tokenizer.num_latent_tokens, tokenizer.latent_dim)
            sizes["latents.npy"] = context.num_latents * record.itemsize
            continue
        num_floats = 4 * count_parameters(tokenizer)
        if stage == "generator":
            num_floats = 4 * count_parameters(generator) + count_parameters(tokenizer)
        sizes[f"{stage}.pt"] = 4 * num_floats  # bytes
    return sizes


def bytes_to_write(context: TrainContext, sizes: dict[str, int]) -> int:
    """How many bytes must be free for files of these sizes, by name, some of which may exist.

    A file is written beside the one that it replaces, so that the largest checkpoint is there
    twice for a while.
    """
    paths = [context.path(name) for name in sizes]
    existing = sum(path.stat().st_size for path in paths if path.exists())
    checkpoints = [size for name, size in sizes.items() if name != "latents.npy"]
    largest = max(checkpoints, default=0)
    return sum(sizes.values()) + largest - existing


# --------------------------------------------------------------------------------------------------
# What is printed.


def print_row(stage: str, cells: list[str]) -> None:
    print(f"{stage:12}" + "".join(f" {cell:>13}" for cell in cells))


def print_files(context: TrainContext, weight_names: list[str]) -> None:
    """Which official files there are, and where the missing ones come from."""
    for name in weight_names:
        path = weights_path(name, context.config.weights_dir)
        official = PRETRAINED[name]
        state = f"missing, measured with random weights; from {official.url}"
        if path.is_file():
            state = f"{path.stat().st_size / 1e6:.1f} MB, SHA-256 {hash_file(path)}"
        print(f"file        {path}: {state}, {official.license}")
    if not inception_path(context.config.weights_dir).is_file():
        print(f"file        {INCEPTION_FILE}: missing, without it there is no FID; {INCEPTION_URL}")


def print_sizes(context: TrainContext, stages: list[str]) -> None:
    """How large the data, the networks and the files of these stages are."""
    config = context.config
    with torch.device("meta"):
        tokenizer = build_tokenizer(config)
        generator = build_generator(config, tokenizer, len(context.data.classes))
    print(
        f"data        {context.data.describe()}; {len(context.train_indices)} to train on, "
        f"{len(context.val_indices)} for evaluation"
    )
    print(
        f"tokenizer   {config.tokenizer_size}: {describe_parameters(tokenizer)}, "
        f"N = {tokenizer.num_patches}, L = {tokenizer.num_latent_tokens}, C = {config.latent_dim}"
    )
    print(f"{config.generator:<12}{config.generator_size}: {describe_parameters(generator)}")
    sizes = file_sizes(context, stages, tokenizer, generator)
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items())
    print(f"disk        {bytes_to_write(context, sizes) / 1e9:.2f} GB must be free: {parts}")
