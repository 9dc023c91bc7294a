"""What a run needs before it starts: files, parameters, memory, and the time of one step."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from build import TrainContext, build_generator, build_tokenizer
from fid import INCEPTION_FILE, INCEPTION_URL, inception_path
from losses import GANLoss
from utils.distributed import micro_batch_slices
from utils.files import hash_file
from utils.weights import PRETRAINED, weights_path


def measure_run(run: TrainContext, weights: list[str], train_tokenizer: Callable) -> None:
    """Make two steps of the first stage with every term switched on, and print what they take.

    weights are the names of the official files that the run needs; missing ones leave random
    weights. Nothing is written but in a temporary folder.
    """
    config = run.config
    stage = next(iter(config.stages))
    per_process = config.batch_size // run.dist.world_size
    micro_batch = min(config.micro_batch or per_process, per_process)
    # A CPU would take minutes for a micro batch of the full-size presets; two images tell enough.
    measured = micro_batch if run.device.type == "cuda" else min(2, micro_batch)
    line = measure_step(run, stage, measured, train_tokenizer)
    if not run.dist.is_main:
        return
    print_files(run, weights)
    print_sizes(run)
    num_micro = len(micro_batch_slices(config.batch_size, config.micro_batch, run.dist))
    seconds = per_process * run.dist.world_size / line["images_per_second"]
    days = seconds * config.total_steps(stage) / 86400
    print(
        f"batch       {config.batch_size} = {run.dist.world_size} processes x {num_micro} "
        f"accumulated x {micro_batch} images"
    )
    print(f"memory      peak {line['memory_gb']:.2f} GB with {measured} images")
    print(
        f"one step    {seconds:.2f} s for the batch on {run.device.type}, measured with {measured} "
        f"images; {days:.2f} days for the stage {stage}"
    )


def measure_step(run: TrainContext, stage: str, images: int, train_tokenizer: Callable) -> dict:
    """The log's line on the second of two steps with this many images per process."""
    config = run.config
    steps = {"tokenizer_steps": round(2 / config.stages[stage].steps_share)}
    sizes = {"batch_size": images * run.dist.world_size, "micro_batch": 0}
    quiet = {"discriminator_start": 0, "log_every": 1, "save_every": 10**9}
    with tempfile.TemporaryDirectory() as folder:
        short = replace(config, **steps, **sizes, **quiet, out_dir=folder)
        short_run = replace(run, config=short, val_indices=run.val_indices[:2])
        tokenizer = short_run.to_device(build_tokenizer(short))
        gan = GANLoss(384).to(run.device) if config.adversarial_weight else None
        train_tokenizer(short_run, stage, tokenizer, gan)
        if not run.dist.is_main:
            return {}
        lines = Path(folder, "log.jsonl").read_text().splitlines()
    return json.loads(lines[1])


def print_files(run: TrainContext, weights: list[str]) -> None:
    for name in weights:
        path = weights_path(name, run.config.weights_dir)
        official = PRETRAINED[name]
        state = f"missing, measured with random weights; from {official.url}"
        if path.is_file():
            state = f"{path.stat().st_size / 1e6:.1f} MB, {hash_file(path)}"
        print(f"file        {path}: {state}, {official.license}")
    if not inception_path(run.config.weights_dir).is_file():
        print(f"file        {INCEPTION_FILE}: missing, without it there is no FID; {INCEPTION_URL}")


def print_sizes(run: TrainContext) -> None:
    config = run.config
    with torch.device("meta"):
        tokenizer = build_tokenizer(config)
        generator = build_generator(config, tokenizer, len(run.data.classes))
    counts = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (tokenizer, generator)]
    print(
        f"data        {run.data.describe()}; {len(run.train_indices)} to train on, "
        f"{len(run.val_indices)} for evaluation"
    )
    print(
        f"tokenizer   {config.tokenizer_size}: {counts[0]:.1f}M parameters, "
        f"N = {tokenizer.num_patches}, L = {tokenizer.num_latent_tokens}, C = {config.latent_dim}"
    )
    print(f"{config.generator:<12}{config.generator_size}: {counts[1]:.1f}M parameters")
