"""How good images are: FID, Inception Score, precision and recall, rFID, PSNR, SSIM, linear-probe accuracy.

    python fid.py gfid out/samples.npz reference.npz      # FID, IS, precision, recall; folders, images or statistics
    python fid.py rfid out --data imagenet/val            # reconstructions against the very crops that were encoded
    python fid.py probe out --data imagenet/val           # linear probe on the latents
    python fid.py stats imagenet/train train.npz --image_size 256    # mean and covariance of the crops, for gfid
    python fid.py compare a.gfid.json b.gfid.json ...     # one table; are they comparable, and if not, why
    torchrun --nproc_per_node=8 fid.py gfid ...           # the same figure, for any process count

Images are uint8 and go through the official Inception file of FID, resized as TensorFlow 1 did (what ADM's evaluator sees) or,
with --resize pytorch-fid, as that project does. Results are also cards, in JSON. The metrics are pure functions, in float64.
"""

import json
import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plumbing.data import READERS, ImageSet, open_dataset, split, spread, to_float, to_uint8
from plumbing.inception import InceptionV3, inception_features, load_inception
from plumbing.run import DEVICES, Parser, Processes, UserError, as_user_error, command_line, progress, read_json, replacing
from plumbing.run import warn, within, write_text
from plumbing.weights import LPIPS_FILES, at_hand, find_official, load_lpips
from sample import beside, load_run
from sit import seeded_noise

BATCH = 50  # images per forward pass; a constant, because other inputs of a pass change the last digits of its outputs


def psnr(a: Tensor, b: Tensor, data_range: float = 255.0) -> Tensor:
    """10 log10(data_range^2 / MSE), dB, of a, b (B, C, H, W) in [0, data_range] -> (B,), float64; infinite for equal images."""
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"images must be (B, C, H, W), both of the same shape, not {tuple(a.shape)} and {tuple(b.shape)}")
    return 10 * torch.log10(data_range**2 / (a.double() - b.double()).square().mean(dim=(1, 2, 3)))


def ssim(a: Tensor, b: Tensor, data_range: float = 255.0, window: Tensor | None = None, correction: float = 1.0) -> Tensor:
    """Structural similarity (Wang et al. 2004) of a, b (B, C, H, W) in [0, data_range] -> (B,) in [-1, 1], float64.

    A separable window (n,), by default Gaussian, 11 px with sigma 1.5; `correction` times the population covariance;
    K1 = 0.01, K2 = 0.03; the mean over channels and over the pixels whose window lies inside the image.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"images must be (B, C, H, W), both of the same shape, not {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.double(), b.double()
    window = torch.exp(-torch.arange(-5, 6).double().square() / (2 * 1.5**2)) if window is None else window
    if min(a.shape[-2:]) < len(window):
        raise ValueError(f"SSIM needs at least {len(window)} x {len(window)} px, these are {a.shape[-2]} x {a.shape[-1]}")
    window = (window / window.sum()).to(a)

    def blur(x: Tensor) -> Tensor:  # -> (B C, 1, H - n + 1, W - n + 1)
        return F.conv2d(F.conv2d(x.flatten(0, 1)[:, None], window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = correction * (blur(a * a) - mean_a**2), correction * (blur(b * b) - mean_b**2)
    covariance = correction * (blur(a * b) - mean_a * mean_b)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    index = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return index.view(len(a), -1).mean(dim=1)


def ssim_softvq(a: Tensor, b: Tensor, data_range: float = 255.0) -> Tensor:
    """SSIM as SoftVQ-VAE's public script has it, on whose scale the paper's tables lie: about 0.1 above `ssim` at 25 dB."""
    return ssim(a, b, 2 * data_range, torch.ones(7).double(), 49 / 48)  # uniform, sample covariance; the range is not the images'


def statistics(features: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """features (N, D), N >= 2 -> mean (D,) and covariance (D, D) with N - 1, float64. ValueError for others and NaN."""
    features = torch.as_tensor(features).double()
    bad = int((~features.isfinite()).sum())
    if features.ndim != 2 or len(features) < 2 or bad:
        raise ValueError(f"features must be finite, (N, D) with N of at least 2, not {tuple(features.shape)} with {bad} not finite")
    return features.mean(dim=0).cpu().numpy(), features.T.cov().cpu().numpy()


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), float64 (Dowson and Landau 1982; Heusel et al. 2017). ValueError for unlike D."""
    if mean1.shape != mean2.shape or cov1.shape != cov2.shape:
        raise ValueError(f"statistics of {len(mean1)} and of {len(mean2)} dimensions cannot be compared")
    # With S1 = R R^T, S1 S2 has the eigenvalues of the symmetric R^T S2 R: singular covariances need no regularisation.
    values, vectors = torch.linalg.eigh(torch.from_numpy(cov1))
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps  # the square root would blow up rounding
    root = vectors[:, kept] * values[kept].sqrt()
    cross = torch.linalg.eigvalsh(root.T @ torch.from_numpy(cov2) @ root).clamp(min=0).sqrt().sum().item()
    return float(np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def inception_score(probabilities: Tensor, block: int = 5000) -> tuple[float, float]:
    """exp(E KL(p(y|x) || p(y))), Salimans et al. 2016, of probabilities (N, K) -> its mean and standard deviation, float64."""
    scores = []
    for p in probabilities.double().split(block):  # each block counts the same, a shorter last one too: ADM's way
        divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(dim=0))  # 0 log 0 = 0
        scores.append(divergence.sum(dim=1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, block: int = 1000) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features real (N, D), fake (M, D), N and M > k, float64."""
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need over {k} points, not {len(real)} and {len(fake)}")

    def covered(points: Tensor, centres: Tensor) -> float:
        """The share of points in a ball around some centre, which reaches to its k-th nearest other centre."""
        radii = torch.cat([torch.cdist(rows, centres).kthvalue(k + 1, dim=1).values for rows in centres.split(block)])
        inside = [(torch.cdist(rows, centres) <= radii).any(dim=1) for rows in points.split(block)]
        return torch.cat(inside).double().mean().item()

    real, fake = real.double(), fake.double()
    return covered(fake, real), covered(real, fake)


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, ridge: float = 0.01) -> float:
    """Share of test (M, D) whose label a ridge regression from train (N, D), standardised, to one-hot labels finds, float64."""
    train, test = train.double(), test.double()
    mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    targets = F.one_hot(train_labels).double()
    gram = train.T @ train / len(train) + ridge * torch.eye(len(mean)).to(train)
    weights = torch.linalg.solve(gram, train.T @ targets / len(train))  # W = (X^T X / N + ridge I)^-1 X^T Y / N
    return ((test @ weights + targets.mean(dim=0)).argmax(dim=1) == test_labels).double().mean().item()


def load_evaluator(args: Namespace, processes: Processes) -> tuple[InceptionV3, dict]:
    """Inception, and the protocol that a card names: how it sees images, and the SHA-256 of its file."""
    hashes = find_official(["inception"], args.weights, processes)  # {} but on the first process of a machine
    return load_inception(args.weights, processes.device), {"resize": args.resize, "weights": "".join(hashes.values())}


def image_features(images: ImageSet, model: InceptionV3, args: Namespace, processes: Processes) -> Tensor | None:
    """pool3 (N, 2048) of a set's images, on the first process; None elsewhere."""
    batches = processes.share(range(images.count), BATCH)
    parts = ({"pool3": inception_features(model, images.read(rows), args.resize)} for rows in batches)
    return processes.gather(progress(parts, f"features of {images.path}", processes, total=len(batches))).get("pool3")


def moments(path: str, features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Their statistics, and a warning if they are too few. Raises UserError where there are none."""
    if len(features) <= features.shape[1]:
        warn(f"{path}: {len(features)} images are too few for a full-rank covariance of {features.shape[1]} dimensions; use 50000")
    with as_user_error(f"{path}: "):
        return statistics(features)


def finish(card: dict, path: str | Path) -> None:
    """Write the card, and print its values."""
    values = {name: value if math.isfinite(value) else None for name, value in card["values"].items()}  # JSON has no infinity
    write_text(json.dumps(card | {"values": values}, indent=1), path)
    print(f"{card['command']}: {card['N']} images, reference {card['reference']['path']} ({card['reference']['N']}); wrote {path}")
    for name, value in card["values"].items():
        print(f"  {name:30}{value:.4f}")


def gfid(args: Namespace, processes: Processes) -> None:
    """FID, Inception Score, precision and recall of samples against a reference."""
    sets = [ImageSet(path, args.image_size) for path in (args.samples, args.reference)]
    model, protocol = load_evaluator(args, processes) if sets[0].count or sets[1].count else (None, {})
    fake, real = (image_features(images, model, args, processes) if images.count else None for images in sets)
    if not processes.first:
        return
    for images in sets:
        for name in ("resize", "weights"):
            if (made := images.made.get(name)) and protocol.setdefault(name, made) != made:
                raise UserError(f"{images.path} was made with {name} {made}, not {protocol[name]}")
    pairs = [images.moments or moments(images.path, x) for images, x in zip(sets, (fake, real))]  # stored ones first, as ADM
    with as_user_error(f"{args.samples} and {args.reference}: "):
        values = {"fid": frechet_distance(*pairs[0], *pairs[1])}
        if fake is not None:
            probabilities = model.logits(fake.to(processes.device).double()).softmax(dim=1)
            values["inception_score"], values["inception_score_std"] = inception_score(probabilities)
        if fake is not None and real is not None:
            real = real[spread(len(real), 10_000)]  # as many as ADM's reference batches have
            values["precision"], values["recall"] = precision_recall(real.to(processes.device), fake.to(processes.device))
            protocol |= {"precision_recall_reference": len(real), "k": 3}
    record = Path(f"{Path(args.samples)}.json")  # as sample.py writes it
    if not record.is_file():
        warn(f"no record beside {args.samples}: the card does not say how they were sampled")
    card = {"sampler": read_json(record) if record.is_file() else None, "samples": sets[0].record(), "reference": sets[1].record()}
    card |= {"command": "gfid", "values": values, "N": card["samples"]["N"], "protocol": protocol}
    finish(card, args.card or f"{str(Path(args.samples)).removesuffix('.npz')}.gfid.json")


def stats(args: Namespace, processes: Processes) -> None:
    """Mean and covariance of a folder or .npz of images, with how they were made."""
    images = ImageSet(args.images, args.image_size)
    if not images.count:
        raise UserError(f"{args.images} holds statistics already")
    model, protocol = load_evaluator(args, processes)
    features = image_features(images, model, args, processes)
    if processes.first:
        (mean, cov), record = moments(args.images, features), images.record()
        with replacing(args.out) as temporary, open(temporary, "wb") as file:
            np.savez(file, mu=mean, sigma=cov, N=record["N"], hash=record["hash"], **protocol)
        print(f"wrote {args.out}: mu and sigma of {record['N']} images")


def rfid(args: Namespace, processes: Processes) -> None:
    """rFID, PSNR, SSIM and, where its weights are, LPIPS of a run's reconstructions against the very crops that were encoded."""
    model, protocol = load_evaluator(args, processes)
    run = load_run(args.run, processes.device)
    data = open_dataset(args.data, run.config["image_size"])
    lpips = load_lpips(args.weights).to(processes.device) if at_hand(args.weights, *LPIPS_FILES) else None
    items = split(len(data), run.config["eval_images"])[1] if args.held_out else range(len(data))
    if not args.held_out and Path(args.data) == Path(run.config["data"] or "shapes"):
        warn(f"the run was trained on {args.data}; --held_out takes only what that held out", processes)
    parts = []
    for chosen in progress(processes.share(items, BATCH), "reconstructions", processes):
        images = torch.stack([image for image, _ in READERS.map(data.read, chosen)]).to(processes.device)
        part = {"originals": inception_features(model, images, args.resize)}
        posterior = run.tokenizer.encode(to_float(images))
        noise = next(seeded_noise(args.seed, chosen, posterior.mean.shape[1:], processes.device))
        for name, z in (("mean", posterior.mean), ("sampled", posterior.sample(noise))):
            copies = to_uint8(run.tokenizer.decode(z))
            part[f"rfid_{name}"] = inception_features(model, copies, args.resize)
            part |= {f"{metric.__name__}_{name}": metric(images, copies) for metric in (psnr, ssim, ssim_softvq)}
            if lpips:
                part[f"lpips_{name}"] = lpips(to_float(copies), to_float(images)).double()
        parts.append({name: x.cpu() for name, x in part.items()})
    found = processes.gather(parts)
    if processes.first:
        real = moments(args.data, found.pop("originals"))
        values = {name: x.mean().item() if x.ndim == 1 else frechet_distance(*statistics(x), *real) for name, x in found.items()}
        card = {"command": "rfid", "values": values, "N": len(items), "protocol": protocol, "seed": args.seed}
        about = {"run": args.run, "checkpoint": run.about, "reference": {"path": args.data, "N": len(items), "hash": data.stamp}}
        finish(card | about, args.card or beside(args.run, "rfid.json"))


def probe(args: Namespace, processes: Processes) -> None:
    """Accuracy of a linear probe on the posterior means: trained on nine tenths of the data, tested on the rest."""
    run = load_run(args.run, processes.device)
    data = open_dataset(args.data, run.config["image_size"])
    if len(data.classes) < 2 or len(data) < 20:
        raise UserError(f"{args.data} has {len(data)} images in {len(data.classes)} classes; 20 in 2 are the least")
    parts = []
    for rows in progress(processes.share(range(len(data)), BATCH), "latents", processes):
        images, labels = zip(*READERS.map(data.read, rows))
        posterior = run.tokenizer.encode(to_float(torch.stack(images).to(processes.device)))
        parts.append({"latents": posterior.mean.flatten(1).cpu(), "labels": torch.tensor(labels)})
    found = processes.gather(parts)
    if processes.first:
        train, test = split(len(data), len(data))
        x, y = found["latents"].to(processes.device), found["labels"].to(processes.device)
        values = {"accuracy": linear_probe(x[train], y[train], x[test], y[test])}
        protocol = {"solver": "ridge", "ridge": 0.01, "train": len(train), "test": len(test)}
        card = {"command": "probe", "values": values, "N": len(test), "protocol": protocol}
        about = {"run": args.run, "checkpoint": run.about, "reference": {"path": args.data, "N": len(data), "hash": data.stamp}}
        finish(card | about, args.card or beside(args.run, "probe.json"))


def compare(args: Namespace, processes: Processes) -> None:
    """Any number of result cards in one table; which are not comparable with the first, and why."""
    samplers, columns, protocols = [], [], []
    for path in args.cards:
        card = read_json(path)
        with as_user_error(f"{path} is not a result card of fid.py: "):
            samplers.append({name: str(value) for name, value in (card.get("sampler") or {}).items()})
            values = {name: "infinite" if value is None else f"{value:.4f}" for name, value in card["values"].items()}
            columns.append(samplers[-1] | values)
            about = {"command": card["command"], "N": card["N"], "reference": card["reference"].get("hash")}
            protocols.append(about | card["protocol"])
    print(" " * 30 + "".join(f"{Path(path).stem:>20.19}" for path in args.cards))
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = [column.get(name, "-") for column in columns]
        if name not in samplers[0] or len(set(cells)) > 1:  # settings that all share are left out
            print(f"{name:30}" + "".join(f"{cell:>20.19}" for cell in cells))
    first = protocols[0]
    for path, other in zip(args.cards, protocols):
        unlike = [name for name in first | other if first.get(name) != other.get(name)]
        why = "; ".join(f"{name} is {str(first.get(name))[:16]} and {str(other.get(name))[:16]}" for name in unlike)
        print(f"{path} is not comparable with {args.cards[0]}: {why}" if why else f"{path}: comparable")


@torch.no_grad()
def main(arguments: list[str]) -> None:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    settings = {
        "cards": dict(nargs="+"),
        "--weights": dict(default="", metavar="FOLDER", help="with Inception's file (default: torch hub's cache, filled)"),
        "--resize": dict(default="tf1", choices=("tf1", "pytorch-fid"), help="convention (default: tf1, as ADM)"),
        "--image_size": dict(type=within(int, 0), default=0, metavar="S", help="crop images of folders to S px, as training does"),
        "--card": dict(default="", metavar="FILE", help="result to write (default: beside the samples, or in the run)"),
        "--data": dict(default="shapes", help='folder of images, all are used (default: "shapes", the built-in ones)'),
        "--held_out": dict(action="store_true", help="only the images that training on this folder held out"),
        "--device": dict(choices=DEVICES, help="default: cuda where there is one, else cpu"),
        "--seed": dict(type=within(int, 0), default=0, metavar="SEED", help="of the sampled latents"),
    }
    for command, names in (
        (gfid, "samples reference --weights --resize --image_size --card --device"),
        (rfid, "run --data --held_out --seed --weights --resize --card --device"),
        (probe, "run --data --card --device"),
        (stats, "images out --weights --resize --image_size --device"),
        (compare, "cards"),
    ):
        sub = commands.add_parser(command.__name__, help=command.__doc__)
        sub.set_defaults(run_command=command)
        for name in names.split():
            sub.add_argument(name, **settings.get(name, {}))
    args = parser.parse_args(arguments)
    processes = Processes.start(getattr(args, "device", None))
    torch.set_float32_matmul_precision("highest")  # no TF32
    args.run_command(args, processes)


if __name__ == "__main__":
    command_line(main)
