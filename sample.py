"""Images from a trained run: samples by class, reconstructions, and ADM-format .npz files for evaluators.

    python sample.py out                                    # a grid, 8 per class of the first 10 classes
    python sample.py out --classes 3,7 --guidance 4         # other classes, stronger guidance
    python sample.py out --reconstruct photos/              # originals above their reconstructions
    torchrun --nproc_per_node=8 sample.py out --npz 50000   # exactly 50,000 images, arr_0 uint8 (N, H, W, 3)

The noise of image i depends only on --seed and i: batch size and process count do not change the images.
The settings are written beside the images as JSON.
"""

import json
import shutil
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import ImageFolder, Parser, Processes, Shapes, UserError, as_user_error, command_line, load_checkpoint
from data import progress, replacing, spread, to_float, to_uint8, write_image, write_text
from sit import SiT, check_sampler, sample, seeded_noise
from tokenizer import Tokenizer


@dataclass
class Run:
    """A trained run: the resolved config, class names (empty: unconditional), EMA models; sit is None before its stage."""

    config: dict
    classes: list[str]
    tokenizer: Tokenizer
    sit: SiT | None


@dataclass(frozen=True)
class SamplerSettings:
    """Everything that the samples depend on besides the model; see sit.sample."""

    solver: str = "sde"
    steps: int = 250
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 0.7)
    seed: int = 0


def build_tokenizer(config: dict) -> Tokenizer:
    keys = ("image_size", "patch_size", "tokens", "channels", "size")
    return Tokenizer(**{key: config[key] for key in keys})


def load_run(folder: str | Path, device: torch.device) -> Run:
    """The latest stage in `folder`: sit.pt, else decoder.pt, else tokenizer.pt. Raises UserError."""
    paths = [Path(folder) / name for name in ("sit.pt", "decoder.pt", "tokenizer.pt")]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        names = ", ".join(p.name for p in paths)
        raise UserError(f"{folder} is not a run: it has none of {names}; make one with train.py --out {folder}")
    saved = load_checkpoint(path, mmap=True)
    if not {"config", "classes", "ema"} <= saved.keys():
        raise UserError(f"{path} is not a checkpoint of train.py: it has no config, classes or ema")
    with as_user_error(f"{path}: "):
        tokenizer = build_tokenizer(saved["config"])
        tokenizer.load_state_dict(saved.get("tokenizer", saved["ema"]))
        sit = None
        if path.name == "sit.pt":
            sit = SiT(tokenizer.tokens, tokenizer.channels, len(saved["classes"]), saved["config"]["sit"])
            sit.load_state_dict(saved["ema"])
            sit = sit.to(device).eval()
            if paths[1].exists():  # the stage decoder may have been run again since
                decoder = {
                    k: v for k, v in load_checkpoint(paths[1], mmap=True)["ema"].items() if k.startswith("decoder.")
                }
                tokenizer.load_state_dict(decoder, strict=False)
    return Run(saved["config"], saved["classes"], tokenizer.to(device).eval(), sit)


@torch.no_grad()
def generate(run: Run, sampler: SamplerSettings, labels: Tensor, indices: list[int], device: torch.device) -> Tensor:
    """Samples number `indices` with `labels` (b,) -> uint8 (b, 3, S, S) on the CPU."""
    shape = (run.tokenizer.tokens, run.tokenizer.channels)
    noise = seeded_noise(sampler.seed, indices, shape, device)
    null_label = len(run.classes)
    settings = (sampler.solver, sampler.steps, sampler.guidance, sampler.interval)
    x = sample(run.sit, noise, labels.to(device), null_label, *settings)
    return to_uint8(run.tokenizer.decode(run.tokenizer.denormalize(x.float()))).cpu()


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """images uint8 (b, 3, S, S) -> their reconstructions from the posterior mean, uint8, on the CPU."""
    device = tokenizer.latent_mean.device
    return to_uint8(tokenizer.decode(tokenizer.encode(to_float(images.to(device))).mean)).cpu()


def default_guidance(run: Run) -> float:
    """The config's scale; 1 (none) for a run without classes."""
    return run.config["guidance"] if run.classes else 1.0


def class_grid(run: Run, sampler: SamplerSettings, classes: list[int], columns: int, device: torch.device) -> Tensor:
    """One row of samples per class -> uint8 (rows, columns, 3, S, S)."""
    labels = torch.tensor(classes).repeat_interleave(columns)
    rows = generate(run, sampler, labels, list(range(len(labels))), device)
    return rows.view(len(classes), columns, *rows.shape[1:])


def label_of(index: int, classes: list[int]) -> int:
    """Sample i belongs to class classes[i mod len]: balanced for every count."""
    return classes[index % len(classes)]


def write_npz(
    run: Run, sampler: SamplerSettings, classes: list[int], count: int, batch: int, path: Path, processes: Processes
) -> None:
    """Exactly `count` samples by all processes -> path with arr_0 uint8 (N, S, S, 3) and arr_1 int64 labels (N,)."""
    raw = path.with_name(path.name + ".raw")  # plain bytes that every process writes its rows into
    if processes.first:
        raw.write_bytes(b"")
    processes.barrier()
    try:
        write_rows(run, sampler, classes, count, batch, raw, processes)
        processes.barrier()
        if processes.first:
            labels = np.array([label_of(i, classes) for i in range(count)])
            pack_npz(raw, (count, run.config["image_size"], run.config["image_size"], 3), labels, path)
    finally:
        if processes.first:
            raw.unlink()


def write_rows(
    run: Run, sampler: SamplerSettings, classes: list[int], count: int, batch: int, raw: Path, processes: Processes
) -> None:
    """This process's share of the samples, in the order of their indices, at their place in the file `raw`."""
    side, mine = run.config["image_size"], processes.share(count)
    with open(raw, "r+b") as file:
        file.seek(mine.start * side * side * 3)
        for start in progress(range(mine.start, mine.stop, batch), "samples", processes):
            indices = list(range(start, min(start + batch, mine.stop)))
            labels = torch.tensor([label_of(i, classes) for i in indices])
            images = generate(run, sampler, labels, indices, processes.device)
            file.write(images.permute(0, 2, 3, 1).numpy().tobytes())


def pack_npz(raw: Path, shape: tuple[int, ...], labels: np.ndarray, path: Path) -> None:
    """numpy.savez of raw uint8 bytes and labels, without holding the images in memory."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry, open(raw, "rb") as file:
            np.lib.format.write_array_header_1_0(entry, header)
            shutil.copyfileobj(file, entry)
        with archive.open("arr_1.npy", "w") as entry:
            np.lib.format.write_array(entry, labels)


def parse_classes(text: str, names: list[str]) -> list[int]:
    """Labels of "3,7" or of class names; of "" all (label 0, the null label, for a run without classes)."""
    if not names and text:
        raise UserError(f"--classes {text}: this run was trained without classes")
    labels = []
    for word in filter(None, text.split(",")):
        label = names.index(word) if word in names else int(word) if word.isdigit() else -1
        if not 0 <= label < len(names):
            raise UserError(f"--classes: {word!r} is neither a class name nor a label in 0..{len(names) - 1}")
        labels.append(label)
    return labels or list(range(max(1, len(names))))


def reconstruction_grid(run: Run, folder: str, columns: int) -> Tensor:
    """Two rows: images of `folder` (or "shapes", the built-in ones), evenly spaced, above their reconstructions."""
    size = run.config["image_size"]
    dataset = Shapes(size) if folder == "shapes" else ImageFolder(folder, size)
    images = torch.stack([dataset[int(i)][0] for i in spread(len(dataset), columns)])
    return torch.stack([images, reconstruct(run.tokenizer, images)])


def main(arguments: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("run", help="the folder that train.py --out made")
    parser.add_argument(
        "--out", default="", help="file to write (default: samples.png, samples.npz or reconstructions.png in the run)"
    )
    parser.add_argument(
        "--classes", default="", help="labels or names, separated by commas (default: all; the first 10 in a grid)"
    )
    parser.add_argument("--columns", type=int, default=8, help="images per row of a grid")
    parser.add_argument(
        "--npz", type=int, default=0, metavar="N", help="write N samples, classes in turn, instead of a grid"
    )
    parser.add_argument(
        "--reconstruct", default="", metavar="FOLDER", help='show reconstructions of its images, or of "shapes"'
    )
    parser.add_argument("--batch_size", type=int, default=64, help="samples per forward with --npz")
    parser.add_argument("--solver", default="sde", help="sde (paper), heun or euler")
    parser.add_argument("--steps", type=int, help="solver steps (default: the run's; paper: 250)")
    parser.add_argument(
        "--guidance", type=float, help="scale (default: the run's; paper: 2.3 / 2.4 for 128 / 64 tokens)"
    )
    parser.add_argument(
        "--interval",
        type=float,
        nargs=2,
        default=(0.0, 0.7),
        metavar=("LOW", "HIGH"),
        help="guide only for t in it, t = 1 is noise",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    args = parser.parse_args(arguments)
    for name, least in (("columns", 1), ("batch_size", 1), ("npz", 0), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least {least}")
    if args.npz and args.reconstruct:
        raise UserError("--npz and --reconstruct exclude each other; --npz writes samples")
    processes = Processes.start()
    run = load_run(args.run, processes.device)
    if args.reconstruct:
        grid = reconstruction_grid(run, args.reconstruct, args.columns)
        if processes.first:
            write_image(grid, args.out or Path(args.run) / "reconstructions.png")
        return
    if run.sit is None:
        raise UserError(f"{args.run} has no sit.pt yet, so it can only --reconstruct; train its sit stage to sample")
    classes = parse_classes(args.classes, run.classes)
    if not args.npz and not args.classes:
        classes = classes[:10]
    if args.guidance is not None and args.guidance > 1 and not run.classes:
        raise UserError(f"--guidance {args.guidance} needs classes, and this run was trained without")
    guidance = default_guidance(run) if args.guidance is None else args.guidance
    steps = run.config["sample_steps"] if args.steps is None else args.steps
    sampler = SamplerSettings(args.solver, steps, guidance, tuple(args.interval), args.seed)
    with as_user_error():
        check_sampler(sampler.solver, sampler.steps, sampler.guidance, sampler.interval)
    path = Path(args.out or Path(args.run) / ("samples.npz" if args.npz else "samples.png"))
    if args.npz:
        write_npz(run, sampler, classes, args.npz, args.batch_size, path, processes)
    elif processes.first:
        write_image(class_grid(run, sampler, classes, args.columns, processes.device), path)
    if processes.first:
        settings = {
            "run": str(args.run),
            "count": args.npz or len(classes) * args.columns,
            "classes": classes,
            **asdict(sampler),
        }
        write_text(json.dumps(settings, indent=1), path.with_suffix(".json"))
        print(f"wrote {path}")


if __name__ == "__main__":
    command_line(main)
