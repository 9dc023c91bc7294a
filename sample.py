"""Images from a trained run: samples by class, reconstructions, and ADM-format .npz files for evaluators.

    python sample.py out                                    # a grid, 8 per class of the first 10 classes
    python sample.py out --classes 3,7 --guidance 4         # other classes, stronger guidance
    python sample.py out --reconstruct photos/              # originals above their reconstructions
    python sample.py out --export model.pt                  # the averaged models alone, to give away; takes the place of `out`
    torchrun --nproc_per_node=8 sample.py out --npz 50000   # exactly 50,000 images, arr_0 uint8 (N, H, W, 3)

The noise of image i depends only on --seed and i: batch size and process count do not change the images. Beside each file is
FILE.json: the sampler's settings, and stage, step and hash of what made it. From Python:

    run = load_run("out", "cpu")
    images = generate(run, torch.tensor([3, 7]), indices=[0, 1], seed=0)  # uint8 (2, 3, S, S)
    copies = reconstruct(run.tokenizer, images)                            # run.tokenizer.encode(x).mean, run.tokenizer.decode(z)
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from align import build_tokenizer
from plumbing.data import open_dataset, shared_array, spread, to_float, to_uint8, write_image
from plumbing.run import CHECKPOINT, DEVICES, Parser, Processes, UserError, as_user_error, command_line, load_checkpoint
from plumbing.run import progress, read_json, replacing, save_checkpoint, state_hash, warn, within, write_text
from recipes import STAGES
from sit import GENERATORS, SiT, check_sampler, sample, seeded_noise
from tokenizer import Tokenizer


@dataclass
class TrainedRun:
    """A resolved config, class names (none: unconditional), averaged models; sit is None before its stage.

    `about` names the checkpoint for cards: file, stage, step and of how many, hash of the weights.
    """

    config: dict
    classes: list[str]
    tokenizer: Tokenizer
    sit: SiT | None
    about: dict = field(default_factory=dict)
    guide: SiT | None = None  # see `load_guide`

    def sampler(self, solver=None, steps=None, guidance=None, interval=(0.0, 0.7), shift=None) -> dict:
        """Settings of sit.sample; those not given are the run's own. Raises UserError for impossible ones."""
        network = GENERATORS[self.config["generator"]]
        if guidance is not None and guidance > 1 and not (self.classes or self.guide):
            raise UserError(f"--guidance {guidance} needs classes, and this run was trained without; or a --guide")
        guidance = (self.config["guidance"] if self.classes or self.guide else 1.0) if guidance is None else guidance
        solver, steps = solver or network.solver, self.config["sample_steps"] if steps is None else steps
        shift = (1.0 if solver == "sde" else network.shift) if shift is None else shift
        with as_user_error():
            check_sampler(solver, steps, guidance, interval, shift)
        return {"solver": solver, "steps": steps, "guidance": guidance, "interval": tuple(interval), "shift": shift}


def load_run(path: str | Path, device: torch.device | str = "cpu") -> TrainedRun:
    """The latest stage in a folder (sit.pt, else decoder.pt, else what was before), or an exported file. Raises UserError."""
    stages = dict.fromkeys(name for stages in STAGES.values() for name in reversed(stages))  # a folder is of one recipe
    names = [f"{stage}.pt" for stage in ("sit", *stages)]
    paths = [Path(path)] if Path(path).is_file() else [Path(path) / name for name in names if (Path(path) / name).exists()]
    if not paths:
        raise UserError(f"{path} is not a run: it has none of {', '.join(names)}; make one with train.py --out {path}")
    saved, sit = load_checkpoint(paths[0], CHECKPOINT), None
    config, weights = saved["config"], saved.get("tokenizer", saved["ema"])
    if "tokenizer" not in saved and (seal := Path(path) / "latents.json").exists():
        weights |= {name: torch.tensor(read_json(seal)[name]) for name in ("latent_mean", "latent_std")}
    if "tokenizer" in saved and len(paths) > 1:  # the stage decoder may have been run again since
        newer = load_checkpoint(paths[1], CHECKPOINT)["ema"]
        if any(not torch.equal(newer[key], value) for key, value in weights.items() if key.startswith("encoder.")):
            raise UserError(f"{paths[1]} does not belong to {paths[0]}: their encoders differ; move one of them away")
        weights |= {key: value for key, value in newer.items() if key.startswith("decoder.")}
    with as_user_error(f"{paths[0]}: "):
        tokenizer = build_tokenizer(config)
        tokenizer.load_state_dict(weights)
        if "tokenizer" in saved:
            network, grid = GENERATORS[config["generator"]], tokenizer.has_grid
            sit = network(tokenizer.tokens, tokenizer.channels, len(saved["classes"]), config["sit"], grid).to(device).eval()
            sit.load_state_dict(saved["ema"])
            weights |= {f"sit.{key}": value for key, value in saved["ema"].items()}
    if saved["step"] < saved["of_steps"]:
        warn(f"{paths[0]} is unfinished, at step {saved['step']} of {saved['of_steps']}")
    about = {"file": paths[0].name} | {key: saved[key] for key in ("stage", "step", "of_steps")} | {"weights": state_hash(weights)}
    return TrainedRun(config, saved["classes"], tokenizer.to(device).eval(), sit, about)


def load_guide(path: str, run: TrainedRun) -> SiT:
    """The SiT of another run, for autoguidance (MAETok 4.5). Raises UserError unless it knows the same latents and classes."""
    other = load_run(path, run.tokenizer.latent_mean.device)
    hashes = {state_hash(each.tokenizer.encoder.state_dict(), str(len(each.classes))) for each in (run, other)}
    if other.sit is None or len(hashes) > 1 or (run.tokenizer.normalize(other.tokenizer.denormalize(1.0)) - 1).abs().max() > 0.01:
        raise UserError(f"--guide {path} needs a sit.pt for {len(run.classes)} classes on the latents of this run's encoder")
    return other.sit


def beside(run: str, name: str) -> Path:
    """Where a result is written if nothing else is said: in the run's folder, or beside an exported file."""
    return Path(run) / name if Path(run).is_dir() else Path(f"{run}.{name}")


@torch.no_grad()
def generate(run: TrainedRun, labels: Tensor, indices: list[int], seed: int = 0, **sampler) -> Tensor:
    """Samples number `indices` of a seed with `labels` (b,) -> uint8 (b, 3, S, S) on the CPU. `sampler`: see TrainedRun.sampler."""
    device = run.tokenizer.latent_mean.device
    noise = seeded_noise(seed, indices, (run.tokenizer.tokens, run.tokenizer.channels), device)
    x = sample(run.sit, noise, labels.to(device), len(run.classes), guide=run.guide, **run.sampler(**sampler))
    return to_uint8(run.tokenizer.decode(run.tokenizer.denormalize(x.float()))).cpu()


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """images uint8 (b, 3, S, S) -> their reconstructions from the posterior mean, uint8, on the CPU."""
    device = tokenizer.latent_mean.device
    return to_uint8(tokenizer.decode(tokenizer.encode(to_float(images.to(device))).mean)).cpu()


def write_grid(run: TrainedRun, classes: list[int], columns: int, path: Path, seed: int = 0, **sampler) -> None:
    """One row of samples per class."""
    labels = torch.tensor(classes).repeat_interleave(columns)
    write_image(generate(run, labels, list(range(len(labels))), seed, **sampler).unflatten(0, (-1, columns)), path)


def write_npz(run: TrainedRun, classes: list[int], count: int, batch: int, path: Path, processes: Processes, **settings) -> None:
    """Exactly `count` samples by all processes, classes in turn -> path with arr_0 uint8 (N, S, S, 3), arr_1 int64 labels (N,)."""
    side, images = run.config["image_size"], path.with_name(f"{path.name}.{processes.launch}.npy")
    labels = np.resize(classes, count)
    with shared_array(images, (count, side, side, 3), np.uint8, processes) as rows:
        for part in progress(processes.share(range(count), batch), "samples", processes):
            rows[part] = generate(run, torch.from_numpy(labels[part]), list(part), **settings).permute(0, 2, 3, 1).numpy()
    if processes.first:
        try:
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, np.load(images, mmap_mode="r"), labels)
        finally:
            images.unlink()


def parse_classes(text: str, names: list[str]) -> list[int]:
    """Labels of "3,7" or of class names; of "" all (label 0, the null label, for a run without classes)."""
    if not names and text:
        raise UserError(f"--classes {text}: this run was trained without classes")
    labels = {str(label): label for label in range(len(names))} | {name: label for label, name in enumerate(names)}
    try:
        return [labels[word] for word in text.split(",") if word] or list(range(max(1, len(names))))
    except KeyError as word:
        raise UserError(f"--classes: {word} is neither a class name nor a label in 0..{len(names) - 1}") from None


def main(arguments: list[str]) -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("run", help="the folder that train.py --out made, or an exported file")
    add("--out", default="", help="file to write (default: samples.png, samples.npz or reconstructions.png beside the run)")
    add("--classes", default="", help="labels or names, separated by commas (default: all; the first 10 in a grid)")
    add("--columns", type=within(int, 1), default=8, help="images per row of a grid")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--npz", type=within(int, 0), default=0, metavar="N", help="write N samples, classes in turn; no grid")
    what.add_argument("--reconstruct", default="", metavar="FOLDER", help='show reconstructions of its images, or of "shapes"')
    what.add_argument("--export", default="", metavar="FILE", help="write the averaged models alone")
    add("--batch_size", type=within(int, 1), default=64, help="samples per forward with --npz")
    add("--solver", help="sde, heun or euler (default: the generator's; config: SiT sde, LightningDiT euler)")
    add("--steps", type=int, help="solver steps (default: the run's; config: 250)")
    add("--guidance", type=float, help="scale (default: the run's; 1 = none; paper: 2.3 / 2.4 for 128 / 64 tokens)")
    add("--interval", type=float, nargs=2, default=(0.0, 0.7), metavar="T", help="guide only for t in it (config: REPA's 0 0.7)")
    add("--shift", type=float, help="of the time steps of heun and euler (default: the generator's own)")
    add("--guide", default="", metavar="RUN", help="a weaker run on the same latents, for autoguidance (MAETok 4.5)")
    add("--seed", type=within(int, 0), default=0, help="of the noise")
    add("--device", choices=DEVICES, help="default: cuda where there is one, else cpu")
    args = parser.parse_args(arguments)
    processes = Processes.start(args.device)
    run = load_run(args.run, processes.device)
    name = "reconstructions.png" if args.reconstruct else "samples.npz" if args.npz else "samples.png"
    path = Path(args.out or beside(args.run, name))
    if args.export:
        networks = {"ema": run.sit, "tokenizer": run.tokenizer} if run.sit else {"ema": run.tokenizer}
        about = {name: run.about[name] for name in ("stage", "step", "of_steps")} | {"config": run.config, "classes": run.classes}
        return save_checkpoint(about | {key: network.state_dict() for key, network in networks.items()}, args.export)
    if args.reconstruct:
        data = open_dataset(args.reconstruct, run.config["image_size"])
        images = torch.stack([data.read(int(i))[0] for i in spread(len(data), args.columns)])
        return write_image(torch.stack([images, reconstruct(run.tokenizer, images)]), path)
    if run.sit is None:
        raise UserError(f"{args.run} has no sit.pt yet, so it can only --reconstruct; train its sit stage to sample")
    classes = parse_classes(args.classes, run.classes)
    classes = classes if args.npz or args.classes else classes[:10]
    run.guide = load_guide(args.guide, run) if args.guide else None
    settings = {"seed": args.seed, **run.sampler(args.solver, args.steps, args.guidance, args.interval, args.shift)}
    if args.npz:
        write_npz(run, classes, args.npz, args.batch_size, path, processes, **settings)
    elif processes.first:
        write_grid(run, classes, args.columns, path, **settings)
    if processes.first:
        count = args.npz or len(classes) * args.columns
        record = {"run": args.run, "guide": args.guide, "checkpoint": run.about, "count": count, "classes": classes, **settings}
        write_text(json.dumps(record, indent=1), f"{path}.json")
        print(f"wrote {path}")


if __name__ == "__main__":
    command_line(main)
