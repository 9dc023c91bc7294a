"""What a run is worth: held-out quality and pictures, rFID, linear probe, comparison of reports.

    python evaluate.py rfid out --data imagenet/val      # reconstructions against cropped images
    python evaluate.py probe out --data imagenet/val     # a linear classifier on the latents
    python evaluate.py stats imagenet/val val.npz --image_size 256    # a reference for fid.py
    python evaluate.py compare a.fid.json b.fid.json     # one table; are they comparable?
    torchrun --nproc_per_node=8 evaluate.py rfid ...     # the same values, faster

train.py calls the functions of the first part. Samples are measured by fid.py. Every command writes
a report in JSON.
"""

import argparse
import copy
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
from utils.shapes import Shapes
from utils.weights import LPIPS_FILES, available, load_pretrained

RIDGE = 0.01  # regularization of the linear probe (ours)

# --------------------------------------------------------------------------------------------------
# During training.


def evaluate_on_val(
    context: TrainContext, make: Callable[[Tensor, range], Tensor], metrics: tuple[Callable, ...]
) -> dict[str, float]:
    """Compare held-out images with make(images, rows), sharing the work among processes.

    Images are uint8 (b, 3, S, S), rows are their places among the held-out ones, and a metric maps
    two such batches to (b,). Returns on rank 0, and {} elsewhere, the means of the metrics and a
    Frechet distance. That is FID, called fid_N for N images, if Inception's official file is
    available. Otherwise it is called hog_frechet_distance, and is the distance between HOG features
    of a 4 x 4 grid, which is good for comparing runs, but is not FID.
    """
    hog = HOG(grid_size=4)
    num_val = len(context.val_indices)

    def features(images: Tensor) -> Tensor:
        if context.inception is not None:
            return inception_features(context.inception, images)
        _, patches = hog(to_float(images))
        return patches.flatten(1).cpu()

    parts = []
    for rows in context.dist.shard(range(num_val), 64):
        # As in training, a few images may be unreadable.
        images, _ = read_batch(context.data, context.val_indices[rows], replace=True)
        images = images.to(context.device)
        fake = make(images, rows)
        part = {metric.__name__: metric(images, fake).cpu() for metric in metrics}
        part |= {"real_features": features(images), "fake_features": features(fake)}
        parts.append(part)
    gathered = context.dist.gather_rows(parts)
    if not gathered:
        return {}
    real_stats = mean_cov(gathered.pop("real_features"))
    fake_stats = mean_cov(gathered.pop("fake_features"))
    numbers = {name: values.mean().item() for name, values in gathered.items()}
    name = f"fid_{num_val}" if context.inception is not None else "hog_frechet_distance"
    numbers[name] = frechet_distance(*fake_stats, *real_stats)
    return {name: round(value, 4) for name, value in numbers.items()}


@torch.no_grad()
def reconstruction_quality(tokenizer: Tokenizer, context: TrainContext) -> dict[str, float]:
    """PSNR in dB, SSIM and distance of held-out reconstructions. Writes reconstructions.png."""
    num_val = len(context.val_indices)
    if context.dist.is_main:
        columns = min(10, num_val // 2)
        images = val_images(context, 2 * columns)
        recons = reconstruct(tokenizer, images).cpu()
        # Two pairs of rows, the originals above.
        pairs = torch.stack([images.unflatten(0, (2, -1)), recons.unflatten(0, (2, -1))], dim=1)
        write_grid(pairs.flatten(0, 1), context.path("reconstructions.png"))
    numbers = evaluate_on_val(
        context, lambda images, rows: reconstruct(tokenizer, images), (psnr, ssim)
    )
    return numbers | {"evaluated_images": num_val, "held_out": has_held_out_images(context)}


@torch.no_grad()
def sample_quality(generator: nn.Module, tokenizer: Tokenizer, context: TrainContext) -> dict:
    """The distance between held-out images and as many samples. Writes samples.png."""
    trained = TrainedRun(context.config, list(context.data.classes), tokenizer, generator)
    settings = trained.sampler_settings()
    seed = context.config.seed
    classes = list(range(max(1, len(trained.classes))))
    if context.dist.is_main:
        path = context.path("samples.png")
        write_sample_grid(trained, classes[:10], 8, path, seed, settings)

    def sample_like(images: Tensor, rows: range) -> Tensor:
        labels = torch.tensor(rows) % len(classes)
        return generate(trained, labels, list(rows), seed, **settings)

    numbers = evaluate_on_val(context, sample_like, ())
    return {
        "sampler": {"seed": seed, **settings},
        **numbers,
        "samples": len(context.val_indices),
        "held_out": has_held_out_images(context),
    }


@torch.no_grad()
def draw_masks(teacher: Callable, context: TrainContext) -> None:
    """Write masks.png: images, then half of their patches hidden at random, and by similarity.

    teacher maps images (B, 3, H, W) to cls, patches.
    """
    images = val_images(context, 8)
    # A copy is not compiled. The teacher itself would be compiled for eight images, and then again
    # for batches of any size, which is slower.
    teacher = copy.deepcopy(teacher)
    scores = masking.cls_similarity(*teacher(to_float(images.to(context.device)))).cpu()
    rows = [images]
    for name in ("random", "semantic"):
        rows.append(hide_half(images, scores, name))
    write_grid(torch.stack(rows), context.path("masks.png"))


def hide_half(images: Tensor, scores: Tensor, name: str) -> Tensor:
    """images uint8 (B, 3, S, S) with half of their patches gray, by a row of masking.MASKS.

    scores (B, N) are the patches' similarities to the class token, eq. 1.
    """
    noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))
    half = torch.full((len(images),), 0.5)
    mask = masking.MASKS[name].function(half, noise=noise, scores=scores, mix=None)
    return images.masked_fill(masking.mask_to_pixels(mask, images.shape[-1]), 128)


def val_images(context: TrainContext, count: int) -> Tensor:
    """At most `count` held-out images from all over the data set, uint8 (count, 3, S, S)."""
    picks = evenly_spaced(len(context.val_indices), count)
    images, _ = read_batch(context.data, context.val_indices[picks], replace=True)
    return images


def has_held_out_images(context: TrainContext) -> bool:
    """False for data sets that are so small that no image is held out."""
    return not set(context.val_indices) & set(context.train_indices)


# --------------------------------------------------------------------------------------------------
# Commands.


def load_evaluator(args: argparse.Namespace, dist: Distributed) -> tuple[fid.InceptionV3, dict]:
    """Inception, and what a report says of it. One process per machine downloads the file."""
    with as_user_error():
        if dist.is_local_main:
            fid.download_inception(args.weights)
        dist.barrier()
        model = fid.load_inception(args.weights, dist.device)
        protocol = {}
        if dist.is_main:
            protocol = fid.describe_protocol(args.resize, args.weights)
        return model, protocol


def load_lpips(folder: str, device: torch.device) -> LPIPS | None:
    """LPIPS if its official files are available."""
    if not available(folder, *LPIPS_FILES):
        return None
    lpips = LPIPS()
    for part, name in zip((lpips.vgg, lpips.linear), LPIPS_FILES):
        load_pretrained(part, name, folder)
    return lpips.to(device).eval()


def measure_all(
    dist: Distributed,
    data: ImageFolder | Shapes,
    indices: np.ndarray,
    label: str,
    measure: Callable[[Tensor, Tensor, np.ndarray], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """measure(images, labels, indices) of all these images, in batches, shared among processes.

    images uint8 (b, 3, S, S) are on the device. Returns the rows of all batches by name on rank 0,
    and {} elsewhere.
    """
    parts = []
    for batch in progress(dist.shard(indices, fid.BATCH_SIZE), label, dist.is_main):
        images, labels = read_batch(data, batch)
        part = measure(images.to(dist.device), labels, batch)
        parts.append({name: values.cpu() for name, values in part.items()})
    return dist.gather_rows(parts)


def rfid(args: argparse.Namespace, dist: Distributed) -> None:
    """Measure reconstructions of a folder's images: rFID, PSNR, SSIM, and LPIPS if available."""
    model, protocol = load_evaluator(args, dist)
    run = load_run(args.run, dist.device)
    data = open_dataset(args.data, run.config.image_size)
    lpips = load_lpips(args.weights, dist.device)
    indices = np.arange(len(data))
    was_trained_on = data.fingerprint == run.checkpoint_info["data"]
    if args.held_out and not was_trained_on:
        raise UserError(
            f"--held_out takes the images that training held out, but {args.data} is not what the "
            "run was trained on"
        )
    if args.held_out:
        _, indices = train_val_split(data.labels, run.config.eval_images)

    @torch.no_grad()
    def measure(images: Tensor, labels: Tensor, batch: np.ndarray) -> dict[str, Tensor]:
        """All metrics, for the posterior mean and for a sample."""
        metrics = {"real_features": inception_features(model, images, args.resize)}
        posterior = run.tokenizer.encode(to_float(images))
        noise = next(per_sample_noise(args.seed, batch, posterior.mean.shape[1:], dist.device))
        for name, z in (("mean", posterior.mean), ("sampled", posterior.sample(noise))):
            recons = to_uint8(run.tokenizer.decode(z))
            metrics[f"features_{name}"] = inception_features(model, recons, args.resize)
            for metric in (psnr, ssim, ssim_softvq):
                metrics[f"{metric.__name__}_{name}"] = metric(images, recons)
            if lpips is not None:
                distance = lpips(to_float(recons), to_float(images))
                metrics[f"lpips_{name}"] = distance.double()
        return metrics

    gathered = measure_all(dist, data, indices, "reconstructions", measure)
    if not dist.is_main:
        return
    values = {}
    with as_user_error(f"{args.data}: "):
        real_stats = mean_cov(gathered.pop("real_features"))
        for name in ("mean", "sampled"):
            fake_stats = mean_cov(gathered.pop(f"features_{name}"))
            values[f"rfid_{name}"] = frechet_distance(*fake_stats, *real_stats)
    values |= {name: rows.mean().item() for name, rows in gathered.items()}
    for problem in fid.find_too_few_images(args.data, len(indices)):
        warn(problem)
    if was_trained_on and not args.held_out:
        warn("the run was trained on these images; --held_out takes only what it held out")
    report = describe_evaluation("rfid", args, run, data, len(indices))
    report |= {"values": values, "protocol": protocol, "seed": args.seed}
    report["held_out_only"] = args.held_out
    fid.write_report(report, args.report or default_output(args.run, "rfid.json"))


def probe(args: argparse.Namespace, dist: Distributed) -> None:
    """Train a linear classifier on the latents of a folder's images.

    It is fitted to the posterior means of nine tenths of the images, and tested on the others.
    """
    run = load_run(args.run, dist.device)
    data = open_dataset(args.data, run.config.image_size)
    check_probe_data(args.data, data)

    @torch.no_grad()
    def measure(images: Tensor, labels: Tensor, batch: np.ndarray) -> dict[str, Tensor]:
        mean = run.tokenizer.encode(to_float(images)).mean
        return {"latents": mean.flatten(1), "labels": labels}

    gathered = measure_all(dist, data, np.arange(len(data)), "latents", measure)
    if not dist.is_main:
        return
    train, test = train_val_split(data.labels, len(data))  # It holds out a tenth at most.
    x, y = gathered["latents"].to(dist.device), gathered["labels"].to(dist.device)
    accuracy = linear_probe(x[train], y[train], x[test], y[test])
    report = describe_evaluation("probe", args, run, data, len(test))
    report["values"] = {"accuracy": accuracy}
    report["protocol"] = {"solver": "ridge", "ridge": RIDGE, "train": len(train), "test": len(test)}
    fid.write_report(report, args.report or default_output(args.run, "probe.json"))


def check_probe_data(folder: str, data: ImageFolder | Shapes) -> None:
    """Raise UserError unless there are enough images and classes for a probe."""
    if len(data.classes) < 2 or len(data) < 20:
        raise UserError(
            f"{folder} has {len(data)} images in {len(data.classes)} classes; a probe needs at "
            "least 20 in 2"
        )


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, ridge: float = RIDGE
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
    """Write mean and covariance of a folder's images, cropped as training crops them."""
    data = ImageFolder(args.images, args.image_size)
    model, protocol = load_evaluator(args, dist)
    running = fid.RunningStats()
    for batch in progress(
        dist.shard(np.arange(len(data)), fid.BATCH_SIZE), "features", dist.is_main
    ):
        images, _ = read_batch(data, batch)
        running.add(inception_features(model, images.to(dist.device), args.resize))
    shards = dist.gather(running)
    if not dist.is_main:
        return
    for other in shards[1:]:
        running.merge(other)
    size = (args.image_size, args.image_size)
    about = {"N": len(data), "hash": f"{data.fingerprint} at {args.image_size} px", "size": size}
    with as_user_error(f"{args.images}: "):
        fid.save_stats(args.out, *running.mean_cov(), about | protocol)
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
    """Print reports in one table, and say which are not comparable with the first."""
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
        summary = function.__doc__.splitlines()[0]
        sub = commands.add_parser(function.__name__, help=summary)
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
    # TF32, a GPU's coarser rounding in products and convolutions, would show in the values.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    args.function(args, dist)


if __name__ == "__main__":
    run_main(main)
