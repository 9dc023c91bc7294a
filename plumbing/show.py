"""What a run shows of itself: held-out quality, pictures, and a dry run."""

import json
import platform
import shutil
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import masking
from align import HOG, build_tokenizer
from fid import frechet_distance, psnr, ssim, statistics
from plumbing.data import spread, to_float, write_image
from plumbing.inception import inception_features
from plumbing.run import Processes, file_hash
from plumbing.state import Run
from plumbing.weights import OFFICIAL, official_path
from recipes import Config
from sample import TrainedRun, generate, reconstruct, write_grid
from sit import GENERATORS
from tokenizer import Tokenizer


def held_out(run: Run, count: int) -> Tensor:
    """At most `count` held-out images from all over the data set, uint8 (count, 3, S, S)."""
    return torch.stack([run.data[i][0] for i in run.eval_items[spread(len(run.eval_items), count)]])


def against_held_out(run: Run, make: Callable[[Tensor, range], Tensor], *metrics: Callable) -> dict[str, float]:
    """Held-out images against make(images, their places), by all processes: means of metrics, and a Frechet distance.

    It is called fid_N where the official Inception file is at hand, N the held-out images; else it is one of HOG features of a
    4 x 4 grid, which is no FID. On other processes than the first {}.
    """
    hog, count, parts = HOG(4), len(run.eval_items), []

    def features(images: Tensor) -> Tensor:
        return inception_features(run.inception, images) if run.inception else hog(to_float(images))[1].flatten(1)

    for rows in run.processes.share(range(count), 64):
        images = torch.stack([run.data[i][0] for i in run.eval_items[rows]])
        copies = make(images, rows)
        part = {metric.__name__: metric(images, copies) for metric in metrics}
        parts.append(part | {"originals": features(images), "copies": features(copies)})
    if not (found := run.processes.gather(parts)):
        return {}
    distance = frechet_distance(*statistics(found.pop("copies")), *statistics(found.pop("originals")))
    numbers = {name: values.mean().item() for name, values in found.items()}
    numbers[f"fid_{count}" if run.inception else "hog_frechet_distance"] = distance
    return {name: round(value, 4) for name, value in numbers.items()}


@torch.no_grad()
def reconstruction_quality(tokenizer: Tokenizer, run: Run) -> dict:
    """Held-out images against their reconstructions from the posterior mean: PSNR (dB), SSIM, distance; reconstructions.png."""
    if run.processes.first:
        rows = held_out(run, 20)[: len(run.eval_items) // 2 * 2].unflatten(0, (2, -1))  # two pairs of rows, originals above
        pairs = [row for images in rows for row in (images, reconstruct(tokenizer, images))]
        write_image(torch.stack(pairs), run.path("reconstructions.png"))
    numbers = against_held_out(run, lambda images, rows: reconstruct(tokenizer, images), psnr, ssim)
    return numbers | {"held_out_images": len(run.eval_items)}


@torch.no_grad()
def sample_quality(sit: nn.Module, tokenizer: Tokenizer, run: Run) -> dict:
    """samples.png, 8 of each of the first 10 classes; and as many samples as held-out images against those: their distance."""
    trained = TrainedRun(asdict(run.config), list(run.data.classes), tokenizer, sit)
    settings, classes = {"seed": run.config.seed, **trained.sampler()}, list(range(max(1, len(trained.classes))))
    if run.processes.first:
        write_grid(trained, classes[:10], 8, run.path("samples.png"), **settings)
    numbers = against_held_out(run, lambda _, rows: generate(trained, torch.tensor(rows) % len(classes), list(rows), **settings))
    return {"sampler": settings} | numbers | {"samples": len(run.eval_items)}


@torch.no_grad()
def draw_masks(teacher: Callable, run: Run) -> None:
    """masks.png: images, and the same with half of their patches hidden: at random, and by similarity to the teacher's cls."""
    size, patch, images = run.config.image_size, run.config.patch_size, held_out(run, 8)
    scores = masking.similarity(*teacher(to_float(images.to(run.device)))).cpu()
    half, order = torch.full((len(images),), 0.5), torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))
    rows = [images]
    for mask in (masking.random_mask(half, order), masking.semantic_mask(half, scores)):
        hidden = mask.view(-1, 1, size // patch, size // patch).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
        rows.append(images.masked_fill(hidden, 128))
    write_image(torch.stack(rows), run.path("masks.png"))


def provenance(config: Config, options: Namespace, arguments: list[str], processes: Processes) -> dict:
    """What made a result: the command line, this code, versions, the machine."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    device = torch.cuda.get_device_name() if processes.device.type == "cuda" else platform.machine()
    made_by = {"command": ["train.py", *arguments], "recipe": config.recipe, "preset": options.preset, "commit": commit}
    return made_by | dict(python=platform.python_version(), torch=torch.__version__, device=device, processes=processes.world)


def measure(run: Run, files: list[str], train: Callable[[Run, str], dict]) -> None:
    """A dry run: two steps of the first stage's own loop in a temporary folder, every term on -> files, sizes, memory, time."""
    config, world, first = run.config, run.processes.world, next(iter(run.config.stages))
    share = config.batch_size // world
    width = min(config.micro_batch or share, share)
    few = width if run.device.type == "cuda" else min(2, width)
    with tempfile.TemporaryDirectory() as out:
        short = {"tokenizer_steps": round(2 / config.stages[first].steps[1]), "batch_size": few * world, "micro_batch": 0}
        quiet = {"discriminator_start": 0, "log_every": 1, "save_every": 0, "out": out}
        train(replace(run, config=replace(config, **short, **quiet), eval_items=run.eval_items[:2]), first)
        line = json.loads(Path(out, "log.jsonl").read_text().splitlines()[1]) if run.processes.first else {}
    if not run.processes.first:
        return
    for name in (*files, "inception"):
        file, path = OFFICIAL[name], official_path(name, config.weights)
        absent = "without it there is no FID" if name == "inception" else "measured with random weights"
        size = f"{path.stat().st_size / 1e6:.1f} MB, {file_hash(path)}" if path.is_file() else f"missing, {absent}; from {file.url}"
        print(f"file        {path}: {size}, {file.licence}")
    with torch.device("meta"):
        tokenizer = build_tokenizer(asdict(config))
        sit = GENERATORS[config.generator](tokenizer.tokens, config.channels, len(run.data.classes), config.sit, tokenizer.has_grid)
    sizes = [f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}M parameters" for network in (tokenizer, sit)]
    seconds = share * world / line["images_per_second"]
    days = seconds * config.steps(first) / 86400
    print(f"data        {len(run.train_items)} images to train on, {len(run.eval_items)} held out, {len(run.data.classes)} classes")
    print(f"tokenizer   {config.size}: {sizes[0]}, N = {tokenizer.num_patches}, L = {tokenizer.tokens}, C = {config.channels}")
    print(f"{config.generator:<12}{config.sit}: {sizes[1]}")
    print(f"batch       {config.batch_size} = {world} processes x {share // width} accumulated x {width} images")
    print(f"memory      peak {line['memory_gb']:.2f} GB with {few} images")
    print(f"one step    {seconds:.2f} s for the batch on {run.device.type}, from {few} images; {days:.2f} days for stage {first}")
