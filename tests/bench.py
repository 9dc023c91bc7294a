"""Speed of the parts: images/s, FLOP/s and their share of a measured matmul peak, peak memory. A GPU is used when there is one.

    python tests/bench.py                              # the toy preset
    python tests/bench.py --preset b256 --batch 32     # tokenizer B at 256 px, SiT-XL at 128 tokens
    python tests/bench.py --preset b256 --batch 32 --compile --tokens 64     # any flag of train.py
    python tests/bench.py --grow                       # the toy with more tokens, larger images, other batches
    python tests/bench.py --fid                        # Inception, Frechet distance, precision and recall instead

Training steps are those of train.py's own loops. The official networks take part with random weights where their files are not
at hand: their values do not change the speed. FLOPs are counted by PyTorch (matrix products and convolutions, 2 per
multiply-add). The peak is the best of some matrix products in the precision of the networks, measured in the same run: on a
busy machine compare shares, not times.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import train
from align import build_tokenizer
from fid import BATCH, frechet_distance, precision_recall, statistics
from losses import DRAWS, Adversary
from plumbing.data import ImageFolder, Latents, batches, loader
from plumbing.inception import InceptionV3, inception_features
from plumbing.run import Parser, Processes, command_line, write_text
from plumbing.state import Run, peak_memory
from recipes import PRESETS, parse_config
from sit import GENERATORS, sample, seeded_noise

ROOT = Path(__file__).parents[1]


def seconds_of(step: Callable[[], object], device: torch.device, least: float = 2.0) -> float:
    """Median seconds of step() after two warm-up calls, over at least `least` seconds and 3 calls."""
    times = []
    while len(times) < 5 or sum(times[2:]) < least:
        times.append(once(step, device))
    return float(np.median(times[2:]))


def once(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best FLOP/s of matrix products."""
    best = 0.0
    for m, k, n in ((2048, 2048, 2048), (4096, 4096, 4096), (8192, 768, 3072), (4608, 128, 512)):
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        best = max(best, 2 * m * k * n / seconds_of(lambda a=a, b=b: a @ b, device, 0.3))
    return best


class OneModule(nullcontext):
    """Counts all FLOPs in one place: PyTorch's count per module fails on an autograd.grad within a forward pass."""

    parents = frozenset({"Global"})


def flops_of(step: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = OneModule()
    with counter:
        step()
    return counter.get_total_flops()


def show_line(name: str, images: int, seconds: float, flops: float, device: torch.device, peak: float) -> None:
    share = f"{100 * flops / seconds / peak:5.1f} %" if flops else "      -"
    memory = peak_memory(device) / 1e9
    numbers = f"{images / seconds:12.1f} {1e3 * seconds:10.1f} {flops / seconds / 1e9:10.1f} {share:>8} {memory:8.2f}"
    print(f"{name:40} {numbers}", flush=True)


def report(name: str, step: Callable[[], object], images: int, device: torch.device, peak: float) -> None:
    flops = flops_of(step)
    show_line(name, images, seconds_of(step, device), flops, device, peak)


def bench_loop(name: str, run: Run, stage: str, batch: int, peak: float) -> None:
    """A stage's own loop for some steps: its time per step is the log's; its FLOPs are those of two steps less those of one."""

    def loop(steps: int, every: int = 1) -> list[dict]:
        with tempfile.TemporaryDirectory() as out:
            few = {"tokenizer_steps": steps, "sit_steps": steps, "sample_steps": 1, "guidance": 1.0}
            config = replace(run.config, **few, log_every=every, save_every=0, out=out)
            short = replace(run, config=config, eval_items=run.eval_items[:2])
            if stage == "sit":
                make_latents(short, Path(out))
                train.train_sit(short)
            else:
                train.train_on_images(short, stage)
            return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]

    flops = flops_of(lambda: loop(2)) - flops_of(lambda: loop(1))
    lines = loop(40 if stage == "sit" else 12, 4)
    speed = float(np.median([line["images_per_second"] for line in lines if "loss" in line][1:]))
    show_line(name, batch, batch / speed, flops, run.device, peak)


def make_latents(run: Run, out: Path) -> None:
    """Latents of random numbers, and a tokenizer that they seem to be of, for the stage sit alone."""
    config, count = run.config, len(run.train_items)
    tokenizer = build_tokenizer(vars(config)).eval()
    train.trained_tokenizer = lambda run: (tokenizer.to(run.device), "bench")
    rows = np.lib.format.open_memmap(out / "latents.npy", "w+", Latents.record(tokenizer.tokens, config.channels), (count,))
    rows["mean"], rows["std"], rows["label"] = 0.5, 0.1, np.arange(count) % len(run.data.classes)
    rows.flush()
    zeros, ones = [0.0] * config.channels, [1.0] * config.channels
    write_text(json.dumps({"stamp": "bench", "latent_mean": zeros, "latent_std": ones}), out / "latents.json")


def bench_terms(run: Run, batch: int, peak: float) -> None:
    """What a step of the tokenizer consists of, one by one."""
    config, device, size = run.config, run.device, run.config.image_size
    images = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    tokenizer, (teachers, eye, lpips) = run.place(build_tokenizer(vars(config))), train.frozen_networks(run, config)
    steps = {"encoder and decoder, both ways": lambda: tokenizer(images)[0].square().mean().backward()}
    if teachers:
        steps["teacher"] = lambda: [teacher(images) for teacher in teachers.values()]
    if lpips:
        steps["LPIPS"] = lambda: lpips(images.clone().requires_grad_(), images).mean().backward()
    if eye:
        judge, u = Adversary(384).to(device), torch.rand(batch, 4, DRAWS, device=device)
        steps["discriminator's loss and the decoder's"] = lambda: sum(
            judge(eye, images.clone().requires_grad_(), images, u, True)[:2]
        ).backward()
    for name, step in steps.items():
        report(f"  {name}", run.autocast()(step), batch, device, peak)


def bench_inception(device: torch.device, peak: float) -> None:
    model = InceptionV3().to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    images = torch.randint(0, 256, (BATCH, 3, 256, 256), dtype=torch.uint8)
    report(f"Inception features, 256 px, batch {BATCH}", lambda: inception_features(model, images), BATCH, device, peak)


def bench_fid(device: torch.device, samples: int) -> None:
    """What fid.py does with features; random ones, whose values do not matter."""
    generator = torch.Generator().manual_seed(0)
    real, few, fake = (torch.randn(count, 2048, generator=generator) for count in (10_000, 1_000, samples))
    found = statistics(real)
    seconds = once(lambda: frechet_distance(*statistics(few), *found), device)
    print(f"statistics of 1,000 images and Frechet distance, 2048 dimensions: {seconds:.1f} s")
    pairs = (*statistics(fake), *found)
    ours = once(lambda: frechet_distance(*pairs), device)
    scipys = once(lambda: scipy.linalg.sqrtm(pairs[1] @ pairs[3]), device)
    print(f"Frechet distance, full rank: {ours:.1f} s, {scipys / ours:.1f} times as fast as scipy's sqrtm alone")
    seconds = once(lambda: precision_recall(real.to(device), fake.to(device)), device)
    memory = peak_memory(device) / 1e9
    print(f"precision and recall, {samples:,} against 10,000 x 2048: {seconds:.1f} s, peak memory {memory:.1f} GB")


def bench_growth(words: list[str]) -> None:
    """The table, with these words, in a process of its own (its memory, too) for each of some values of three flags."""
    for flag, values in (("tokens", (16, 64, 128)), ("image_size", (64, 128)), ("batch", (4, 64))):
        for value in values:
            print(f"\n--{flag} {value}", flush=True)
            flags = {"patch_size": 0 if flag == "tokens" else 4, "channels": 4, "batch": 16} | {flag: value}
            varied = [word for name, number in flags.items() for word in (f"--{name}", str(number))]
            subprocess.run([sys.executable, __file__, *varied, *words], check=True)


def main(arguments: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--preset", default="toy", choices=PRESETS, help="whose sizes to measure")
    parser.add_argument("--batch", type=int, default=0, help="images per forward (default: the preset's)")
    parser.add_argument("--precision", choices=("bf16", "float32"), help="as train.py's")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--grow", action="store_true", help="several tables")
    parser.add_argument("--fid", action="store_true", help="measure fid.py instead of a preset")
    parser.add_argument("--samples", type=int, default=10_000, help="of --fid's precision and recall; published: 50000")
    args, flags = parser.parse_known_args(arguments)
    if args.grow:
        return bench_growth([word for word in arguments if word != "--grow"])
    config, _ = parse_config(["--preset", args.preset, *flags])
    processes = Processes.start()
    device, few = processes.device, 16
    if args.fid:
        return bench_fid(device, args.samples)
    batch, sit_batch = args.batch or config.batch_size, args.batch or config.sit_batch_size
    changes = {"batch_size": batch, "sit_batch_size": sit_batch, "micro_batch": 0, "discriminator_start": 0, "workers": 0}
    run = Run.open(replace(config, **changes), processes, dry=True, precision=args.precision, compile=args.compile)
    peaks = [matmul_peak(device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    config, peak, (float32, bf16) = run.config, peaks[run.bf16], (f"{value / 1e9:.0f}" for value in peaks)
    print(f"{device.type}, {torch.get_num_threads()} threads, matmul peak {float32} GFLOP/s in float32, {bf16} in bf16")
    print(f"{args.preset} {' '.join(flags):35} {'images/s':>12} {'ms':>10} {'GFLOP/s':>10} {'of peak':>8} {'GB':>8}")

    bench_loop(f"tokenizer {config.size} step, batch {batch}", run, "tokenizer", batch, peak)
    bench_terms(run, batch, peak)
    bench_loop(f"{config.generator} {config.sit} step, batch {sit_batch}", run, "sit", sit_batch, peak)
    tokenizer = build_tokenizer(vars(config)).to(device).eval()
    sit = GENERATORS[config.generator](tokenizer.tokens, config.channels, 10, config.sit, tokenizer.has_grid).to(device)

    @torch.no_grad()
    def sampling():
        noise = seeded_noise(0, list(range(few)), (tokenizer.tokens, config.channels), device)
        tokenizer.decode(sample(sit, noise, torch.arange(few, device=device) % 10, 10, "sde", 10, 2.0).float())

    report(f"sampling, 10 SDE steps, batch {few}", sampling, few, device, peak)

    def load(dataset):
        loaded = iter(loader(dataset, batches(range(len(dataset)), 32, 0, 0, [slice(0, 32)]), 0))
        return lambda: next(loaded)

    report("loading shapes", load(run.data), 32, device, peak)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(64):
            Image.fromarray(run.data[i][0].permute(1, 2, 0).numpy()).resize((500, 400)).save(f"{folder}/{i}.jpg")
        report(f"loading 500 x 400 JPEG at {config.image_size} px", load(ImageFolder(folder, config.image_size)), 32, device, peak)
    if not flags:
        bench_inception(device, peak)


if __name__ == "__main__":
    command_line(main)
