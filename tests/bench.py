"""Speed of the parts: images/s, FLOP/s and their share of a measured matmul peak, peak memory. A GPU is used when there is one.

    python tests/bench.py                              # the toy preset
    python tests/bench.py --preset b256 --batch 32     # tokenizer B at 256 px, SiT-XL at 128 tokens
    python tests/bench.py --preset b256 --batch 32 --compile
    python tests/bench.py --fid                        # Inception, Frechet distance, precision and recall instead
    python tests/bench.py --damage FOLDER              # Frechet distance of its images to damaged copies

The official networks take part with random weights where their files are not at hand: their values do not change the speed.
A line's FLOPs are counted by PyTorch (matrix products and convolutions, 2 per multiply-add), forward and backward. The
peak is the best of some square and model-shaped matrix products in the precision that training uses, measured in the
same run: on a busy machine compare shares, not times.
"""

import io
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import scipy.linalg
import torch
from PIL import Image, ImageFilter
from torch.utils.flop_counter import FlopCounterMode

from data import OFFICIAL, ImageFolder, Parser, Processes, Shapes, batch_indices, center_crop, command_line, file_hash
from data import image_tensor, loader, official_path, progress, read_image
from fid import InceptionV3, frechet_distance, inception_features, load_inception, precision_recall, statistics
from masking import mask_ratio, random_mask
from sample import build_tokenizer
from sit import SiT, sample, seeded_noise
from losses import DRAWS, Phase
from train import Context, SiTObjective, TokenizerObjective, autocast, compile_blocks, load_teacher, parse_config
from train import peak_memory, pixel_losses, synchronize, update


def seconds_of(step: Callable[[], object], device: torch.device, least: float = 2.0) -> float:
    """Median seconds of step() after two warm-up calls, over at least `least` seconds and 3 calls."""
    times = []
    while len(times) < 5 or sum(times[2:]) < least:
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[len(times[2:]) // 2]


def matmul_peak(device: torch.device) -> float:
    """The best FLOP/s of matrix products, in the precision that training uses."""
    best = 0.0
    for m, k, n in ((2048, 2048, 2048), (4096, 4096, 4096), (8192, 768, 3072), (4608, 128, 512)):
        a, b = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
        if device.type == "cuda":
            a, b = a.bfloat16(), b.bfloat16()
        best = max(best, 2 * m * k * n / seconds_of(lambda a=a, b=b: a @ b, device, 0.3))
    return best


class OneModule(nullcontext):
    """Counts all FLOPs in one place: PyTorch's count per module fails on an autograd.grad within a forward pass."""

    parents = frozenset({"Global"})


def report(name: str, step: Callable[[], object], images: int, device: torch.device, peak: float) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = OneModule()
    with counter:
        step()
    seconds = seconds_of(step, device)
    speed = counter.get_total_flops() / seconds
    share = f"{100 * speed / peak:5.1f} %" if speed else "      -"
    memory = peak_memory(device) / 1e9
    print(
        f"{name:34} {images / seconds:12.1f} {1e3 * seconds:10.1f} {speed / 1e9:10.1f} {share:>8} {memory:8.2f}",
        flush=True,
    )


def training_step(objective: torch.nn.Module, inputs: Callable[[], tuple], device: torch.device) -> Callable:
    """Forward, backward and optimizer step, as train.fit does them."""
    optimizers = {"all": torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-4, fused=True)}
    skipped = torch.zeros(2, device=device)

    def step():
        with autocast(device):
            loss, _ = objective(*inputs())
        loss.backward()
        update(optimizers, 1e-4, skipped)

    return step


def bench_tokenizer(context: Context, batch: int, peak: float) -> None:
    """The whole step, and its terms one by one."""
    config, device, size = context.config, context.processes.device, context.config.image_size
    tokenizer, teacher, pixel = build_tokenizer(asdict(config)), load_teacher(context), pixel_losses(context)
    objective = TokenizerObjective(config, tokenizer, teacher.width, pixel).to(device).train().requires_grad_(True)
    if config.compile:
        compile_blocks(objective)
    images = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    generator, u = torch.Generator(device).manual_seed(0), torch.rand(batch, 4, DRAWS, device=device)
    whole = Phase(config.perceptual_weight, config.adversarial_weight > 0, config.adversarial_weight)
    features = teacher(images)

    def inputs(phase: Phase, features: Callable[[], tuple]):
        noise = torch.randn(batch, config.tokens, config.channels, generator=generator, device=device)
        mask = random_mask(mask_ratio(batch, generator=generator), tokenizer.num_patches, generator)
        return images, mask, None, noise, *features(), phase, u

    def term(name: str, loss: Callable[[torch.Tensor], torch.Tensor]):
        """The forward pass of a loss of the pixels and its gradient there."""

        def step():
            pixels = images.roll(1, 0).requires_grad_()
            with autocast(device):
                value = loss(pixels)
            value.backward()

        report(name, step, batch, device, peak)

    step = training_step(objective, lambda: inputs(whole, lambda: teacher(images)), device)
    report(f"tokenizer {config.size} step, batch {batch}", step, batch, device, peak)
    if pixel.frozen[0] is None and pixel.adversary is None:
        return
    report("  teacher", lambda: teacher(images), batch, device, peak)
    if pixel.frozen[0] is not None:
        term("  LPIPS", lambda pixels: pixel.frozen[0](pixels, images).mean())
    if pixel.adversary:
        term("  discriminator's own loss", lambda pixels: pixel.adversary(pixels, images, u, False)[0])
        term("  the same + adversarial", lambda pixels: sum(pixel.adversary(pixels, images, u, True)[:2]))
    objective.pixel.requires_grad_(False)
    step = training_step(objective, lambda: inputs(Phase(0.0, False, 0.0), lambda: features), device)
    report("  the rest: tokenizer and AdamW", step, batch, device, peak)


def once(step: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def bench_fid(device: torch.device, peak: float, samples: int) -> None:
    """The parts of fid.py at the sizes they are used with; random weights and features, whose values do not matter."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(InceptionV3().state_dict(), f"{folder}/{OFFICIAL['inception'].file}")
        model = load_inception(folder, device)
    images = torch.randint(0, 256, (32, 3, 256, 256), dtype=torch.uint8)
    report("Inception features, 256 px, batch 32", lambda: inception_features(model, images), 32, device, peak)
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(count, 2048, generator=generator) for count in (10_000, samples))
    pairs = (*statistics(real), *statistics(fake))
    ours, scipys = once(lambda: frechet_distance(*pairs)), once(lambda: scipy.linalg.sqrtm(pairs[1] @ pairs[3]))
    print(f"Frechet distance, 2048 dimensions: {ours:.1f} s, {scipys / ours:.1f} times as fast as scipy's sqrtm alone")
    seconds = once(lambda: precision_recall(real.to(device), fake.to(device)))
    memory = peak_memory(device) / 1e9
    print(f"precision and recall, {samples:,} against 10,000 x 2048: {seconds:.1f} s, peak memory {memory:.1f} GB")


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def blur(image: Image.Image, radius: int) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def noise(image: Image.Image, sigma: int) -> Image.Image:
    rng = np.random.default_rng(zlib.crc32(image.tobytes()))
    noisy = np.asarray(image) + rng.normal(0, sigma, (*image.size[::-1], 3))
    return Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))


DAMAGES = [(jpeg, 50), (jpeg, 25), (jpeg, 10), (blur, 1), (blur, 2), (blur, 4), (noise, 10), (noise, 25), (noise, 50)]


def bench_damage(folder: str, weights: str, processes: Processes) -> None:
    """Frechet distance of a folder's 256-px crops to damaged copies: it should grow with the damage."""
    with tempfile.TemporaryDirectory() as temporary:
        if not weights:
            torch.manual_seed(0)
            torch.save(InceptionV3().state_dict(), f"{temporary}/{OFFICIAL['inception'].file}")
        model = load_inception(weights or temporary, processes.device)
        sha256 = file_hash(official_path("inception", weights or temporary))
    files, found = ImageFolder(folder, 256).paths, {}
    for start in progress(range(0, len(files), 50), "features", processes):
        crops = [center_crop(read_image(file), 256) for file in files[start : start + 50]]
        for damage, amount in [(None, 0), *DAMAGES]:
            copies = torch.stack([image_tensor(damage(crop, amount) if damage else crop) for crop in crops])
            found.setdefault((damage, amount), []).append(inception_features(model, copies))
    originals = statistics(torch.cat(found[None, 0]))
    official = sha256 == OFFICIAL["inception"].sha256
    kind = "official" if official else "not the official ones" if weights else "random"
    print(f"{len(files)} images; Inception weights: {kind}")
    for (damage, amount), parts in found.items():
        distance = frechet_distance(*statistics(torch.cat(parts)), *originals)
        print(f"{damage.__name__ if damage else 'unchanged':10} {amount:3} {distance:12.4g}", flush=True)


def main(arguments: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--preset", default="toy", help="whose sizes to measure")
    parser.add_argument("--batch", type=int, default=0, help="images per forward (default: the preset's)")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--fid", action="store_true", help="measure fid.py instead of a preset")
    parser.add_argument("--samples", type=int, default=10_000, help="of --fid's precision and recall; published: 50000")
    parser.add_argument("--damage", metavar="FOLDER", help="distance of this folder's images to damaged copies instead")
    parser.add_argument("--weights", default="", help="folder with FID's Inception for --damage (default: random)")
    args = parser.parse_args(arguments)
    if args.damage:
        return bench_damage(args.damage, args.weights, Processes.start())
    config, _, _ = parse_config(["--preset", args.preset])
    processes = Processes.start()
    device = processes.device
    batch, sit_batch = args.batch or config.batch_size, args.batch or config.sit_batch_size
    peak = matmul_peak(device)
    print(
        f"{device.type}, {torch.get_num_threads()} threads, matmul peak {peak / 1e9:.0f} GFLOP/s, preset {args.preset}"
    )
    print(f"{'':34} {'images/s':>12} {'ms':>10} {'GFLOP/s':>10} {'of peak':>8} {'GB':>8}")

    if args.fid:
        return bench_fid(device, peak, args.samples)
    size = config.image_size
    context = Context(replace(config, compile=args.compile), processes, Shapes(size), None, None, None, dry=True)
    bench_tokenizer(context, batch, peak)

    tokenizer = build_tokenizer(asdict(config)).to(device).eval()
    sit = SiT(config.tokens, config.channels, 10, config.sit).to(device).train()
    objective = SiTObjective(sit)
    if args.compile:
        compile_blocks(objective)
    x = torch.randn(sit_batch, config.tokens, config.channels, device=device)
    y, t = torch.arange(sit_batch, device=device) % 10, torch.rand(sit_batch, device=device)
    step = training_step(objective, lambda: (x, y, t, torch.randn_like(x)), device)
    report(f"sit {config.sit} step, batch {sit_batch}", step, sit_batch, device, peak)

    steps, few = 10, min(16, sit_batch)

    def sampling():
        noise = seeded_noise(0, list(range(few)), (config.tokens, config.channels), device)
        z = sample(sit, noise, y[:few], 10, "sde", steps, 2.0, (0.0, 0.7))
        with torch.no_grad():
            tokenizer.decode(z.float())

    report(f"sampling, {steps} SDE steps, batch {few}", sampling, few, device, peak)

    def load(dataset, workers):
        batches = iter(
            loader(dataset, [batch_indices(len(dataset), 32, 0, i, slice(0, 32)) for i in range(10_000)], workers)
        )
        return lambda: next(batches)

    report("loading shapes", load(Shapes(size), 0), 32, device, peak)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(64):
            image = Shapes(32)[i][0].permute(1, 2, 0).numpy()
            Image.fromarray(image).resize((500, 400)).save(f"{folder}/{i}.jpg")
        report(f"loading 500 x 400 JPEG at {size} px", load(ImageFolder(folder, size), 0), 32, device, peak)


if __name__ == "__main__":
    command_line(main)
