"""What a run is worth: held-out quality and pictures, rFID, linear probe, comparison of reports.

    python evaluate.py rfid out --data imagenet/val      # reconstructions against their crops
    python evaluate.py probe out --data imagenet/val     # a linear classifier on the latents
    python evaluate.py stats imagenet/val val.npz --image_size 256    # a reference for fid.py
    python evaluate.py compare a.fid.json b.fid.json     # one table; are they comparable?
    torchrun --nproc_per_node=8 evaluate.py rfid ...     # the same figures, faster

train.py calls the functions of the first part. Samples are measured by fid.py. Every command writes
a report in JSON.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fid
import masking
from align import HOG
from build import TrainContext
from fid import frechet_distance, inception_features, mean_cov, psnr, ssim, ssim_softvq
from losses import LPIPS
from sample import TrainedRun, default_output, generate, load_run, reconstruct, write_sample_grid
from sit import per_sample_noise
from tokenizer import Tokenizer
from utils.console import Parser, UserError, as_user_error, bounded, progress, run_main, warn
from utils.data import ImageFolder, evenly_spaced, open_dataset, read_batch, train_val_split
from utils.distributed import DEVICES, Distributed
from utils.files import read_json
from utils.images import to_float, to_uint8, write_grid
from utils.weights import LPIPS_FILES, available, load_pretrained

# --------------------------------------------------------------------------------------------------
# During training.


def evaluate_on_val(
    run: TrainContext, make: Callable[[Tensor, range], Tensor], metrics: tuple[Callable, ...]
) -> dict[str, float]:
    """Compare held-out images with make(images, rows), by all processes -> numbers on rank 0.

    The numbers are means of the metrics, and a Frechet distance. That is FID, called fid_N for N
    images, if Inception's official file is available. Otherwise it is the distance between HOG
    features of a 4 x 4 grid, which is good for comparing runs, but is not FID.
    """
    hog = HOG(grid_size=4)
    num_val = len(run.val_indices)

    def features(images: Tensor) -> Tensor:
        if run.inception is not None:
            return inception_features(run.inception, images)
        _, patches = hog(to_float(images))
        return patches.flatten(1).cpu()

    parts = []
    for rows in run.dist.shard(range(num_val), 64):
        images, _ = read_batch(run.data, run.val_indices[rows])
        images = images.to(run.device)
        made = make(images, rows)
        part = {metric.__name__: metric(images, made).cpu() for metric in metrics}
        part |= {"real_features": features(images), "made_features": features(made)}
        parts.append(part)
    gathered = run.dist.gather_rows(parts)
    if not gathered:
        return {}
    real = mean_cov(gathered.pop("real_features"))
    made = mean_cov(gathered.pop("made_features"))
    numbers = {name: values.mean().item() for name, values in gathered.items()}
    name = f"fid_{num_val}" if run.inception is not None else "hog_frechet_distance"
    numbers[name] = frechet_distance(*made, *real)
    return {name: round(value, 4) for name, value in numbers.items()}


@torch.no_grad()
def reconstruction_quality(tokenizer: Tokenizer, run: TrainContext) -> dict[str, float]:
    """PSNR in dB, SSIM and distance of reconstructions of held-out images; reconstructions.png."""
    num_val = len(run.val_indices)
    if run.dist.is_main:
        columns = min(10, num_val // 2)
        images = val_images(run, 2 * columns)
        recons = reconstruct(tokenizer, images).cpu()
        # Two pairs of rows, the originals above.
        pairs = torch.stack([images.unflatten(0, (2, -1)), recons.unflatten(0, (2, -1))], dim=1)
        write_grid(pairs.flatten(0, 1), run.path("reconstructions.png"))
    numbers = evaluate_on_val(
        run, lambda images, rows: reconstruct(tokenizer, images), (psnr, ssim)
    )
    return numbers | {"evaluated_images": num_val, "held_out": is_held_out(run)}


@torch.no_grad()
def sample_quality(generator: nn.Module, tokenizer: Tokenizer, run: TrainContext) -> dict:
    """The distance of as many samples as there are held-out images from those; samples.png."""
    trained = TrainedRun(run.config, list(run.data.classes), tokenizer, generator)
    settings = trained.sampler_settings()
    seed = run.config.seed
    classes = list(range(max(1, len(trained.classes))))
    if run.dist.is_main:
        path = run.path("samples.png")
        write_sample_grid(trained, classes[:10], 8, path, seed, settings)

    def sample_like(images: Tensor, rows: range) -> Tensor:
        labels = torch.tensor(rows) % len(classes)
        return generate(trained, labels, list(rows), seed, **settings)

    numbers = evaluate_on_val(run, sample_like, ())
    return {
        "sampler": {"seed": seed, **settings},
        **numbers,
        "samples": len(run.val_indices),
        "held_out": is_held_out(run),
    }


@torch.no_grad()
def draw_masks(teacher: Callable, run: TrainContext) -> None:
    """masks.png: images, then half of their patches hidden at random, then half by similarity."""
    images = val_images(run, 8)
    scores = masking.cls_similarity(*teacher(to_float(images.to(run.device)))).cpu()
    noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))
    half = torch.full((len(images),), 0.5)
    rows = [images]
    for mask in (masking.random_mask(half, noise), masking.semantic_mask(half, scores)):
        hidden = mask.view(-1, 1, run.config.grid_size, run.config.grid_size)
        hidden = hidden.repeat_interleave(run.config.patch_size, dim=2)
        hidden = hidden.repeat_interleave(run.config.patch_size, dim=3)
        rows.append(images.masked_fill(hidden, 128))
    write_grid(torch.stack(rows), run.path("masks.png"))


def val_images(run: TrainContext, count: int) -> Tensor:
    """At most `count` held-out images from all over the data set, uint8 (count, 3, S, S)."""
    picks = evenly_spaced(len(run.val_indices), count)
    images, _ = read_batch(run.data, run.val_indices[picks])
    return images


def is_held_out(run: TrainContext) -> bool:
    """False for data sets that are so small that no image is held out."""
    return not set(run.val_indices) & set(run.train_indices)


# --------------------------------------------------------------------------------------------------
# Commands.


def load_evaluator(args: argparse.Namespace, dist: Distributed) -> tuple[fid.InceptionV3, dict]:
    """Inception, and what a report says of it. One process per machine downloads the file."""
    with as_user_error():
        if os.environ.get("LOCAL_RANK", "0") == "0":
            fid.download_inception(args.weights)
        dist.barrier()
        model = fid.load_inception(args.weights, dist.device)
        return model, fid.describe_protocol(args.resize, args.weights) if dist.is_main else {}


def load_lpips(folder: str, device: torch.device) -> LPIPS | None:
    """LPIPS if its official files are available."""
    if not available(folder, *LPIPS_FILES):
        return None
    lpips = LPIPS()
    for part, name in zip((lpips.vgg, lpips.linear), LPIPS_FILES):
        load_pretrained(part, name, folder)
    return lpips.to(device).eval()


def rfid(args: argparse.Namespace, dist: Distributed) -> None:
    """rFID, PSNR, SSIM and LPIPS of a run's reconstructions of a folder's images"""
    model, protocol = load_evaluator(args, dist)
    run = load_run(args.run, dist.device)
    data = open_dataset(args.data, run.config.image_size)
    lpips = load_lpips(args.weights, dist.device)
    indices = np.arange(len(data))
    if args.held_out:
        _, indices = train_val_split(data.labels, run.config.eval_images)
    parts = []
    for batch in progress(dist.shard(indices, fid.BATCH_SIZE), "reconstructions", dist.is_main):
        images, _ = read_batch(data, batch)
        part = measure_reconstructions(run, model, lpips, images.to(dist.device), batch, args)
        parts.append({name: values.cpu() for name, values in part.items()})
    gathered = dist.gather_rows(parts)
    if not dist.is_main:
        return
    with as_user_error(f"{args.data}: "):
        real = mean_cov(gathered.pop("real_features"))
    values = {}
    for name, rows in gathered.items():
        is_features = rows.ndim == 2
        values[name] = (
            frechet_distance(*mean_cov(rows), *real) if is_features else rows.mean().item()
        )
    report = describe_evaluation("rfid", args, run, data, len(indices))
    report |= {"values": values, "protocol": protocol, "seed": args.seed}
    report["held_out_only"] = args.held_out
    warn_about_rfid(args, run, data, len(indices))
    fid.write_report(report, args.report or default_output(args.run, "rfid.json"))


@torch.no_grad()
def measure_reconstructions(
    run: TrainedRun,
    model: fid.InceptionV3,
    lpips: LPIPS | None,
    images: Tensor,
    indices: np.ndarray,
    args: argparse.Namespace,
) -> dict[str, Tensor]:
    """All metrics of a batch of images uint8 (b, 3, S, S), for the posterior mean and a sample."""
    metrics = {"real_features": inception_features(model, images, args.resize)}
    posterior = run.tokenizer.encode(to_float(images))
    noise = next(per_sample_noise(args.seed, indices, posterior.mean.shape[1:], images.device))
    for name, z in (("mean", posterior.mean), ("sampled", posterior.sample(noise))):
        recons = to_uint8(run.tokenizer.decode(z))
        metrics[f"rfid_{name}"] = inception_features(model, recons, args.resize)
        for metric in (psnr, ssim, ssim_softvq):
            metrics[f"{metric.__name__}_{name}"] = metric(images, recons)
        if lpips is not None:
            distance = lpips(to_float(recons), to_float(images))
            metrics[f"lpips_{name}"] = distance.double()
    return metrics


def warn_about_rfid(args: argparse.Namespace, run: TrainedRun, data, count: int) -> None:
    """Say where a figure cannot be what it is called."""
    if count <= 2048:
        warn(
            f"{args.data}: {count} images are too few for a full-rank covariance of 2048 "
            "dimensions; rFID is usually computed from 50,000"
        )
    trained_on_same = data.fingerprint == run.checkpoint_info.get("images")
    if trained_on_same and not args.held_out:
        warn("the run was trained on these images; --held_out takes only what it held out")


@torch.no_grad()
def probe(args: argparse.Namespace, dist: Distributed) -> None:
    """accuracy of a linear classifier on the posterior means of a folder's images"""
    run = load_run(args.run, dist.device)
    data = open_dataset(args.data, run.config.image_size)
    if len(data.classes) < 2 or len(data) < 20:
        raise UserError(
            f"{args.data} has {len(data)} images in {len(data.classes)} classes; a probe needs at "
            "least 20 in 2"
        )
    parts = []
    batches = dist.shard(range(len(data)), fid.BATCH_SIZE)
    for batch in progress(batches, "latents", dist.is_main):
        images, labels = read_batch(data, batch)
        posterior = run.tokenizer.encode(to_float(images.to(dist.device)))
        parts.append({"latents": posterior.mean.flatten(1).cpu(), "labels": labels})
    gathered = dist.gather_rows(parts)
    if not dist.is_main:
        return
    train, test = train_val_split(data.labels, len(data))
    x, y = gathered["latents"].to(dist.device), gathered["labels"].to(dist.device)
    accuracy = linear_probe(x[train], y[train], x[test], y[test])
    report = describe_evaluation("probe", args, run, data, len(test))
    report["values"] = {"accuracy": accuracy}
    report["protocol"] = {"solver": "ridge", "ridge": 0.01, "train": len(train), "test": len(test)}
    fid.write_report(report, args.report or default_output(args.run, "probe.json"))


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, ridge: float = 0.01
) -> float:
    """The share of test (M, D) whose label a linear classifier finds, in float64.

    The classifier is a ridge regression from standardized train (N, D) to one-hot labels:
    W = (X^T X / N + ridge I)^-1 X^T Y / N.
    """
    train, test = train.double(), test.double()
    mean = train.mean(dim=0)
    std = train.std(dim=0).clamp(min=1e-6)
    train = (train - mean) / std
    test = (test - mean) / std
    targets = F.one_hot(train_labels).double()
    gram = train.T @ train / len(train) + ridge * torch.ones_like(mean).diag()
    weights = torch.linalg.solve(gram, train.T @ targets / len(train))
    predictions = (test @ weights + targets.mean(dim=0)).argmax(dim=1)
    return (predictions == test_labels).double().mean().item()


def stats(args: argparse.Namespace, dist: Distributed) -> None:
    """mean and covariance of a folder's images, cropped as training crops them"""
    data = ImageFolder(args.images, args.image_size)
    model, protocol = load_evaluator(args, dist)
    parts = []
    batches = dist.shard(range(len(data)), fid.BATCH_SIZE)
    for batch in progress(batches, "features", dist.is_main):
        images, _ = read_batch(data, batch)
        features = inception_features(model, images.to(dist.device), args.resize)
        parts.append({"features": features})
    gathered = dist.gather_rows(parts)
    if not dist.is_main:
        return
    size = (args.image_size, args.image_size)
    about = {"N": len(data), "hash": f"{data.fingerprint} at {args.image_size} px", "size": size}
    with as_user_error(f"{args.images}: "):
        fid.save_stats(args.out, *mean_cov(gathered["features"]), about | protocol)
    print(f"wrote {args.out}: mu and sigma of {len(data)} images")


def describe_evaluation(
    command: str, args: argparse.Namespace, run: TrainedRun, data, count
) -> dict:
    """What a report on a run says of the run and of the images."""
    reference = {"path": args.data, "N": count, "hash": data.fingerprint}
    return {
        "command": command,
        "N": count,
        "run": args.run,
        "checkpoint": run.checkpoint_info,
        "reference": reference,
    }


def compare(args: argparse.Namespace, dist: Distributed) -> None:
    """any number of reports in one table, and which are not comparable with the first"""
    settings = []  # of the sampler, one dict per report
    values = []
    protocols = []
    for path in args.reports:
        report = read_json(path)
        with as_user_error(f"{path} is not a report of fid.py or evaluate.py: "):
            sampler = report.get("sampler") or {}
            settings.append({name: str(value) for name, value in sampler.items()})
            values.append({name: format_value(value) for name, value in report["values"].items()})
            protocols.append(comparable_part(report))

    print(format_row("", [Path(path).stem for path in args.reports]))
    for name in dict.fromkeys(name for column in settings for name in column):
        cells = [column.get(name, "-") for column in settings]
        if len(set(cells)) > 1:  # settings that all reports share are left out
            print(format_row(name, cells))
    for name in dict.fromkeys(name for column in values for name in column):
        print(format_row(name, [column.get(name, "-") for column in values]))

    first = protocols[0]
    for path, other in zip(args.reports, protocols):
        differing = [name for name in first | other if first.get(name) != other.get(name)]
        reasons = [
            f"{name} is {first.get(name)!s:.16} and {other.get(name)!s:.16}" for name in differing
        ]
        if reasons:
            print(f"{path} is not comparable with {args.reports[0]}: {'; '.join(reasons)}")
        else:
            print(f"{path}: comparable")


def comparable_part(report: dict) -> dict:
    """What must be the same in two reports for their values to be comparable."""
    reference = report["reference"]
    part = {"command": report["command"], "N": report["N"], "reference": reference.get("hash")}
    part["size of samples"] = report.get("samples", {}).get("size")
    part["size of reference"] = reference.get("size")
    return part | report["protocol"]


def format_value(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.4f}"


def format_row(name: str, cells: list[str]) -> str:
    return f"{name:30}" + "".join(f"{cell:>20.19}" for cell in cells)


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function: Callable) -> Parser:
        sub = commands.add_parser(function.__name__, help=function.__doc__)
        sub.set_defaults(function=function)
        return sub

    def add_device(sub: Parser) -> None:
        sub.add_argument("--device", choices=DEVICES, help="default: cuda if there is a GPU")

    def add_inception(sub: Parser) -> None:
        add = sub.add_argument
        add("--weights", default="", metavar="FOLDER", help="folder with official weight files")
        add("--resize", default="tf1", choices=fid.RESIZE_MODES, help="how images become 299 px")

    def add_run(sub: Parser, name: str) -> None:
        add = sub.add_argument
        add("run", help="the folder that train.py --out made, or an exported file")
        add("--data", default="shapes", help="folder of images (default: the built-in shapes)")
        add("--report", default="", metavar="FILE", help=f"file to write (default: {name})")

    sub = command(rfid)
    add_run(sub, "rfid.json in the run")
    add_inception(sub)
    add_device(sub)
    sub.add_argument("--held_out", action="store_true", help="only what training held out")
    sub.add_argument("--seed", type=bounded(int, 0), default=0, help="of the sampled latents")

    sub = command(probe)
    add_run(sub, "probe.json in the run")
    add_device(sub)

    sub = command(stats)
    sub.add_argument("images", help="folder of images")
    sub.add_argument("out", help=".npz file to write")
    sub.add_argument("--image_size", type=bounded(int, 1), required=True, help="size of the crops")
    add_inception(sub)
    add_device(sub)

    sub = command(compare)
    sub.add_argument("reports", nargs="+", help="files that fid.py and evaluate.py wrote")
    return parser


def main(arguments: list[str]) -> None:
    args = build_parser().parse_args(arguments)
    dist = Distributed.start(getattr(args, "device", None))
    torch.set_float32_matmul_precision("highest")  # TF32 would show in the figures
    args.function(args, dist)


if __name__ == "__main__":
    run_main(main)
