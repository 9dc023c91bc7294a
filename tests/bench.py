"""Speed of the parts: images/s, FLOP/s, their share of a measured matmul peak, and peak memory.

    python tests/bench.py                              # the toy preset
    python tests/bench.py --preset b256 --batch 32     # tokenizer B at 256 px, SiT-XL at 128 tokens
    python tests/bench.py --preset b256 --batch 32 --compile --tokens 64     # any flag of train.py
    python tests/bench.py --grow                       # more tokens, larger images, other batches
    python tests/bench.py --fid                        # Inception and the metrics of features

Training steps are those of train.py's own loops. The official networks take part with random
weights where their files are missing: values do not change the speed. PyTorch counts the FLOPs
(matrix products and convolutions, 2 per multiply-add). The peak is the best of some matrix products
in the precision of the networks, measured in the same run: on a busy machine, compare shares and
not times.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import train
from build import TrainContext, build_gan, build_generator, build_tokenizer, load_frozen_networks
from fid import BATCH_SIZE, InceptionV3, frechet_distance, inception_features, mean_cov
from fid import precision_recall
from losses import NUM_AUG_PARAMS
from options import parse_config
from recipes import PRESETS
from sit import per_sample_noise
from utils.console import Parser, run_main
from utils.data import ImageFolder, batch_indices, image_loader
from utils.distributed import Distributed
from utils.latents import record_dtype, write_latents, write_metadata
from utils.metric_log import peak_memory


@dataclass
class Bench:
    """Where and against what speed is measured."""

    device: torch.device
    peak: float  # FLOP/s

    def time_once(self, step: Callable[[], object]) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def median_time(self, step: Callable[[], object], at_least: float = 2.0) -> float:
        """Median seconds of a call after two warm-up calls, over some seconds and 3 calls."""
        times = []
        while len(times) < 5 or sum(times[2:]) < at_least:
            times.append(self.time_once(step))
        return float(np.median(times[2:]))

    def report(self, name: str, step: Callable[[], object], images: int) -> None:
        flops = count_flops(step)
        self.print_line(name, images, self.median_time(step), flops)

    def print_line(self, name: str, images: int, seconds: float, flops: float) -> None:
        share = f"{100 * flops / seconds / self.peak:5.1f} %" if flops else "      -"
        memory = peak_memory(self.device) / 1e9
        speed = f"{images / seconds:12.1f} {1e3 * seconds:10.1f} {flops / seconds / 1e9:10.1f}"
        print(f"{name:40} {speed} {share:>8} {memory:8.2f}", flush=True)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best FLOP/s of some matrix products."""
    best = 0.0
    bench = Bench(device, 1.0)
    for m, k, n in ((2048, 2048, 2048), (4096, 4096, 4096), (8192, 768, 3072), (4608, 128, 512)):
        a = torch.randn(m, k, device=device, dtype=dtype)
        b = torch.randn(k, n, device=device, dtype=dtype)
        seconds = bench.median_time(lambda a=a, b=b: a @ b, at_least=0.3)
        best = max(best, 2 * m * k * n / seconds)
    return best


class OneModule(nullcontext):
    """Counts all FLOPs in one place.

    PyTorch's count per module fails on an autograd.grad within a forward pass.
    """

    parents = frozenset({"Global"})


def count_flops(step: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = OneModule()
    with counter:
        step()
    return counter.get_total_flops()


def run_tokenizer_loop(context: TrainContext, stage: str) -> None:
    tokenizer = context.to_device(build_tokenizer(context.config))
    gan = build_gan(context.device) if context.config.adversarial_weight else None
    train.train_tokenizer(context, stage, tokenizer, gan)


def run_generator_loop(context: TrainContext, stage: str) -> None:
    """On latents of random numbers."""
    tokenizer = context.to_device(build_tokenizer(context.config)).eval()
    num_tokens, latent_dim = tokenizer.num_latent_tokens, tokenizer.latent_dim
    count = 2 * len(context.train_indices)
    path = context.path("latents.npy")
    with write_latents(path, count, record_dtype(num_tokens, latent_dim), context.dist) as writer:
        for first in range(0, count, 1000):
            rows = min(1000, count - first)
            mean = torch.randn(rows, num_tokens, latent_dim)
            labels = torch.arange(rows) % max(1, len(context.data.classes))
            writer.write(first, mean, torch.full_like(mean, 0.1), labels)
    zeros, ones = torch.zeros(latent_dim), torch.ones(latent_dim)
    write_metadata(path, "bench", context.data.fingerprint, zeros, ones)
    latents = train.cache_latents(context, tokenizer, "bench")
    train.train_generator(context, tokenizer, latents, "bench")


def bench_loop(
    bench: Bench, name: str, context: TrainContext, loop: Callable, stage: str, batch_size: int
) -> None:
    """Some steps of a stage's own loop.

    The time of a step is the log's; its FLOPs are those of two steps less those of one.
    """

    def run_steps(steps: int, log_every: int = 1) -> list[dict]:
        with tempfile.TemporaryDirectory() as out:
            short = {"tokenizer_steps": steps, "generator_steps": steps, "sampling_steps": 1}
            quiet = {"log_every": log_every, "save_every": 10**9, "cfg_scale": 1.0, "out_dir": out}
            config = replace(context.config, **short, **quiet)
            loop(replace(context, config=config, val_indices=context.val_indices[:2]), stage)
            return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]

    flops = count_flops(lambda: run_steps(2)) - count_flops(lambda: run_steps(1))
    lines = run_steps(40 if stage == "generator" else 12, log_every=4)
    speeds = [line["images_per_second"] for line in lines if "loss" in line]
    bench.print_line(name, batch_size, batch_size / float(np.median(speeds[1:])), flops)


def bench_terms(bench: Bench, context: TrainContext, batch_size: int) -> None:
    """What a step of the tokenizer consists of, one by one."""
    config = context.config
    size = config.image_size
    images = torch.rand(batch_size, 3, size, size, device=context.device) * 2 - 1
    tokenizer = context.to_device(build_tokenizer(config))
    frozen = load_frozen_networks(context, config)

    def encode_and_decode():
        recon, _, _ = tokenizer(images)
        recon.square().mean().backward()

    def look_through_teachers():
        for teacher in frozen.teachers.values():
            teacher(images)

    def compute_lpips():
        frozen.lpips(images.clone().requires_grad_(), images).mean().backward()

    steps = {"encoder and decoder, forward, backward": encode_and_decode}
    if frozen.teachers:
        steps["teacher"] = look_through_teachers
    if frozen.lpips:
        steps["LPIPS"] = compute_lpips
    if frozen.disc_backbone:
        gan = build_gan(context.device)
        rand = torch.rand(batch_size, 4, NUM_AUG_PARAMS, device=context.device)

        def compute_gan_losses():
            fake = images.clone().requires_grad_()
            d_loss, g_loss, _ = gan(frozen.disc_backbone, fake, images, rand, with_g_loss=True)
            (d_loss + g_loss).backward()

        steps["the discriminator's loss and the decoder's"] = compute_gan_losses
    for name, step in steps.items():
        bench.report(f"  {name}", context.autocast()(step), batch_size)


def bench_sampling(bench: Bench, context: TrainContext, count: int = 16) -> None:
    config = context.config
    tokenizer = build_tokenizer(config).to(context.device).eval()
    generator = build_generator(config, tokenizer, 10).to(context.device)
    shape = (tokenizer.num_latent_tokens, tokenizer.latent_dim)
    labels = torch.arange(count, device=context.device) % 10

    @torch.no_grad()
    def generate():
        noise = per_sample_noise(0, list(range(count)), shape, context.device)
        z = generator.sample(noise, labels, solver="sde", num_steps=10, cfg_scale=2.0)
        tokenizer.decode(z.float())

    bench.report(f"sampling, 10 SDE steps, batch {count}", generate, count)


def bench_loading(bench: Bench, context: TrainContext) -> None:
    def load_from(dataset):
        batches = batch_indices(range(len(dataset)), 32, 0, 0, [slice(0, 32)])
        loader = iter(image_loader(dataset, batches, 0))
        return lambda: next(loader)

    bench.report("loading shapes", load_from(context.data), 32)
    size = context.config.image_size
    with tempfile.TemporaryDirectory() as folder:
        for i in range(64):
            image = Image.fromarray(context.data[i][0].permute(1, 2, 0).contiguous().numpy())
            image.resize((500, 400)).save(f"{folder}/{i}.jpg")
        bench.report(
            f"loading 500 x 400 JPEG at {size} px", load_from(ImageFolder(folder, size)), 32
        )


def bench_inception(bench: Bench) -> None:
    model = InceptionV3().to(bench.device, memory_format=torch.channels_last)
    model = model.eval().requires_grad_(False)
    images = torch.randint(0, 256, (BATCH_SIZE, 3, 256, 256), dtype=torch.uint8)
    name = f"Inception features, 256 px, batch {BATCH_SIZE}"
    bench.report(name, lambda: inception_features(model, images), BATCH_SIZE)


def bench_fid(bench: Bench, num_samples: int) -> None:
    """What fid.py does with features; random ones, whose values do not matter."""
    generator = torch.Generator().manual_seed(0)
    counts = (10_000, 1_000, num_samples)
    real, few, fake = (torch.randn(count, 2048, generator=generator) for count in counts)
    real_stats = mean_cov(real)
    seconds = bench.time_once(lambda: frechet_distance(*mean_cov(few), *real_stats))
    print(f"statistics of 1,000 images and Frechet distance, 2048 dimensions: {seconds:.1f} s")
    fake_stats = mean_cov(fake)
    ours = bench.time_once(lambda: frechet_distance(*fake_stats, *real_stats))
    product = fake_stats[1] @ real_stats[1]
    scipys = bench.time_once(lambda: scipy.linalg.sqrtm(product))
    faster = scipys / ours
    print(f"Frechet distance, full rank: {ours:.1f} s, {faster:.1f} times as fast as scipy's sqrtm")
    real, fake = real.to(bench.device), fake.to(bench.device)
    seconds = bench.time_once(lambda: precision_recall(real, fake))
    memory = peak_memory(bench.device) / 1e9
    sizes = f"{num_samples:,} against 10,000 x 2048"
    print(f"precision and recall, {sizes}: {seconds:.1f} s, peak memory {memory:.1f} GB")


def bench_growth(arguments: list[str]) -> None:
    """The table for some values of three flags, in a process of its own each, for its memory."""
    for flag, values in (("tokens", (16, 64, 128)), ("image_size", (64, 128)), ("batch", (4, 64))):
        for value in values:
            print(f"\n--{flag} {value}", flush=True)
            flags = {"patch_size": 0 if flag == "tokens" else 4, "channels": 4, "batch": 16}
            flags[flag] = value
            words = [word for name, number in flags.items() for word in (f"--{name}", str(number))]
            subprocess.run([sys.executable, __file__, *words, *arguments], check=True)


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--preset", default="toy", choices=PRESETS, help="whose sizes to measure")
    add("--batch", type=int, default=0, help="images per forward pass (default: the preset's)")
    add("--grow", action="store_true", help="several tables")
    add("--fid", action="store_true", help="measure fid.py instead of a preset")
    add("--samples", type=int, default=10_000, help="for --fid; published figures have 50000")
    return parser


def bench_preset(args: argparse.Namespace, flags: list[str]) -> None:
    config, options = parse_config(["--preset", args.preset, *flags])
    dist = Distributed.start(options.device)
    batch_size = args.batch or config.micro_batch or config.batch_size
    generator_batch_size = args.batch or config.generator_micro_batch or config.generator_batch_size
    sizes = {"batch_size": batch_size, "generator_batch_size": generator_batch_size}
    together = {"micro_batch": 0, "generator_micro_batch": 0}
    config = replace(config, **sizes, **together, discriminator_start=0, num_workers=0)
    options.dry_run = True
    context = TrainContext.open(config, dist, options)
    peaks = [matmul_peak(dist.device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    bench = Bench(dist.device, peaks[context.use_bf16])
    threads = torch.get_num_threads()
    float32, bf16 = (f"{peak / 1e9:.0f} GFLOP/s" for peak in peaks)
    print(
        f"{dist.device.type}, {threads} threads, matmul peak {float32} in float32, {bf16} in bf16"
    )
    titles = f"{'images/s':>12} {'ms':>10} {'GFLOP/s':>10} {'of peak':>8} {'GB':>8}"
    print(f"{args.preset} {' '.join(flags):35} {titles}")

    name = f"tokenizer {config.tokenizer_size} step, batch {batch_size}"
    stage = config.first_stage
    bench_loop(bench, name, context, run_tokenizer_loop, stage, batch_size)
    bench_terms(bench, context, batch_size)
    name = f"{config.generator} {config.generator_size} step, batch {generator_batch_size}"
    bench_loop(bench, name, context, run_generator_loop, "generator", generator_batch_size)
    bench_sampling(bench, context)
    bench_loading(bench, context)
    if not flags:
        bench_inception(bench)


def main(arguments: list[str]) -> None:
    args, flags = build_parser().parse_known_args(arguments)
    if args.grow:
        bench_growth([word for word in arguments if word != "--grow"])
    elif args.fid:
        device = Distributed.start().device
        bench_fid(Bench(device, 1.0), args.samples)
    else:
        bench_preset(args, flags)


if __name__ == "__main__":
    run_main(main)
