"""Images from a trained run: samples by class, reconstructions, and .npz files for evaluators.

    python sample.py out                                 # a grid, 8 of each of the first 10 classes
    python sample.py out --classes 3,7 --guidance 4      # other classes, stronger guidance
    python sample.py out --reconstruct photos/           # originals above their reconstructions
    python sample.py out --export model.pt               # the averaged models alone, to give away
    torchrun --nproc_per_node=8 sample.py out --npz 50000     # exactly 50,000 images, for FID

The noise of image i depends on --seed and i only, so batch size and number of processes do not
change the images. FILE.json beside each file says which checkpoint and which sampler settings made
it. An exported file can take the place of the run's folder. From Python:

    run = load_run("out", "cpu")
    images = generate(run, torch.tensor([3, 7]), indices=[0, 1], seed=0)   # uint8 (2, 3, S, S)
    recons = reconstruct(run.tokenizer, images)
"""

import json
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from build import build_generator, build_tokenizer
from recipes import STAGES, Config
from sit import check_sampler, per_sample_noise
from tokenizer import Tokenizer
from utils.checkpoint import read_checkpoint
from utils.console import Parser, UserError, as_user_error, bounded, progress, run_main, warn
from utils.data import evenly_spaced, open_dataset, read_ahead, read_batch
from utils.distributed import DEVICES, PRECISIONS, Distributed
from utils.files import (
    atomic_write,
    check_room,
    hash_file,
    hash_state_dict,
    read_json,
    save_torch,
    write_npy_header,
    write_text,
)
from utils.images import to_float, to_uint8, write_grid


# The parts of a tokenizer that determine its latents.
ENCODER_PARTS = ("encoder.", "bottleneck.")


@dataclass
class TrainedRun:
    """The averaged models of a run, and what they were made with.

    classes           names; an empty list means that the run is unconditional
    generator         None if it has not been trained
    checkpoint_info   file, stage, step, total steps, hashes of data and weights, for reports
    guide_model       another run's generator, see `load_guide`
    use_bf16          for matrix products of the generator when it samples
    """

    config: Config
    classes: list[str]
    tokenizer: Tokenizer
    generator: nn.Module | None
    checkpoint_info: dict = field(default_factory=dict)
    guide_model: nn.Module | None = None
    use_bf16: bool = False

    @property
    def device(self) -> torch.device:
        return self.tokenizer.latent_mean.device

    def sampler_settings(
        self,
        solver: str | None = None,
        num_steps: int | None = None,
        cfg_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 0.7),
        timestep_shift: float | None = None,
    ) -> dict:
        """Settings of `sit.sample`. Those that are None are the run's own; the interval is REPA's.

        Raises UserError for impossible ones.
        """
        can_guide = bool(self.classes or self.guide_model)
        if cfg_scale is not None and cfg_scale > 1 and not can_guide:
            raise UserError(
                f"--guidance {cfg_scale} needs classes, and this run was trained without; use "
                "--guidance 1, or a --guide"
            )
        if cfg_scale is None:
            cfg_scale = self.config.cfg_scale if can_guide else 1.0
        if solver is None:
            solver = self.generator.default_solver
        if num_steps is None:
            num_steps = self.config.sampling_steps
        if timestep_shift is None:
            timestep_shift = 1.0 if solver == "sde" else self.generator.default_shift
        settings = {
            "solver": solver,
            "num_steps": num_steps,
            "cfg_scale": cfg_scale,
            "guidance_interval": tuple(guidance_interval),
            "timestep_shift": timestep_shift,
        }
        with as_user_error():
            check_sampler(**settings)
        return settings


def find_checkpoints(path: Path) -> list[Path]:
    """An exported file, or the checkpoints in a run's folder, the latest stage first."""
    if path.is_file():
        return [path]
    # The stages of all recipes, each once, the later ones of a recipe first.
    image_stages = dict.fromkeys(name for each in STAGES.values() for name in reversed(each))
    names = [f"{stage}.pt" for stage in ("generator", *image_stages)]
    paths = [path / name for name in names if (path / name).exists()]
    if not paths:
        raise UserError(
            f"{path} is not a run: it has none of {', '.join(names)}; make one with "
            f"train.py --out {path}"
        )
    return paths


def load_run(path: str | Path, device: torch.device | str = "cpu") -> TrainedRun:
    """The latest stage in a run's folder, or an exported file. Raises UserError if there is none.

    generator.pt contains the tokenizer whose latents the generator knows. The decoder of the last
    image checkpoint, which may have been trained on since, replaces the one in it.
    """
    first, *others = find_checkpoints(Path(path))
    # Only weights that are used are read from disk, not the optimizer's state.
    saved = read_checkpoint(first, mmap=True)
    has_generator = "tokenizer" in saved
    state = saved["tokenizer"] if has_generator else saved["ema"]
    latents_file = Path(path) / "latents.json"
    if not has_generator and latents_file.exists():
        metadata = read_json(latents_file)
        for name in ("latent_mean", "latent_std"):
            state[name] = torch.tensor(metadata[name])
    if has_generator and others:
        last_image_state = read_checkpoint(others[0], mmap=True)["ema"]
        for key, value in last_image_state.items():
            if key.startswith(ENCODER_PARTS) and not torch.equal(value, state[key]):
                raise UserError(
                    f"{others[0]} does not belong to {first}: their encoders differ; move one of "
                    "them away"
                )
            if key.startswith("decoder."):
                state[key] = value

    with as_user_error(f"{first}: "):
        config = Config(**saved["config"])
        tokenizer = build_tokenizer(config)
        tokenizer.load_state_dict(state)
        generator = None
        if has_generator:
            generator = build_generator(config, tokenizer, len(saved["classes"]))
            generator.load_state_dict(saved["ema"])
            generator = generator.to(device).eval()
            state = state | {f"generator.{key}": w for key, w in saved["ema"].items()}
    if saved["step"] < saved["total_steps"]:
        warn(f"{first} is unfinished, at step {saved['step']} of {saved['total_steps']}")
    info = {"file": first.name} | {key: saved[key] for key in ("stage", "step", "total_steps")}
    info |= {"data": saved["identity"].get("data"), "weights": hash_state_dict(state)}
    tokenizer = tokenizer.to(device).eval()
    return TrainedRun(config, saved["classes"], tokenizer, generator, info)


def load_guide(path: str, run: TrainedRun) -> nn.Module:
    """The generator of another run, for autoguidance (MAETok 4.5).

    Raises UserError unless it was trained on the same latents and classes.
    """
    other = load_run(path, run.device)
    ours, theirs = run.tokenizer, other.tokenizer
    fits = (
        other.generator is not None
        and len(other.classes) == len(run.classes)
        and hash_encoder(theirs) == hash_encoder(ours)
        # Processes and devices may round the statistics of the same latents differently.
        and ours.normalize(theirs.latent_mean).abs().max() <= 0.01
        and (theirs.latent_std / ours.latent_std - 1).abs().max() <= 0.01
    )
    if not fits:
        raise UserError(
            f"--guide {path} needs a generator.pt for {len(run.classes)} classes, trained on the "
            "latents of this run's encoder"
        )
    return other.generator


def hash_encoder(tokenizer: Tokenizer) -> str:
    """SHA-256 of the weights that determine the latents."""
    state = tokenizer.state_dict()
    return hash_state_dict({key: w for key, w in state.items() if key.startswith(ENCODER_PARTS)})


# --------------------------------------------------------------------------------------------------
# Samples and reconstructions.


@torch.no_grad()
def generate(
    run: TrainedRun, labels: Tensor, indices: list[int], seed: int = 0, **settings
) -> Tensor:
    """Generate a sample for each of the labels (b,).

    A sample's index and the seed choose its noise. Returns uint8 (b, 3, S, S), where S is the image
    size. The settings are those of TrainedRun.sampler_settings.
    """
    settings = run.sampler_settings(**settings)
    shape = (run.tokenizer.num_latent_tokens, run.tokenizer.latent_dim)
    noise = read_ahead(per_sample_noise(seed, indices, shape, run.device))
    if run.guide_model is not None:
        settings = settings | {"guide_model": run.guide_model}
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.use_bf16):
        x = run.generator.sample(noise, labels.to(run.device), **settings)
    z = run.tokenizer.denormalize(x.float())
    return to_uint8(run.tokenizer.decode(z))


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """images uint8 (b, 3, S, S) -> reconstructions from the posterior mean, uint8."""
    x = to_float(images.to(tokenizer.latent_mean.device))
    return to_uint8(tokenizer.decode(tokenizer.encode(x).mean))


def write_sample_grid(
    run: TrainedRun, classes: list[int], columns: int, path: Path, seed: int, settings: dict
) -> None:
    """One row of samples per class."""
    labels = torch.tensor(classes).repeat_interleave(columns)
    images = generate(run, labels, list(range(len(labels))), seed, **settings)
    write_grid(images.unflatten(0, (-1, columns)), path)


def write_npz(
    run: TrainedRun,
    classes: list[int],
    count: int,
    batch_size: int,
    path: Path,
    dist: Distributed,
    seed: int,
    settings: dict,
) -> None:
    """Exactly `count` samples, classes in turn -> arr_0 uint8 (N, S, S, 3), arr_1 int64 (N,).

    Processes take turns with batches, and rank 0 writes them into the archive as they come.
    """
    labels = np.resize(classes, count)
    image_size = run.config.image_size
    starts = range(0, count, batch_size)
    rounds = range(0, len(starts), dist.world_size)

    def make_batch(number: int) -> np.ndarray | None:
        if number >= len(starts):
            return None
        rows = range(starts[number], min(starts[number] + batch_size, count))
        images = generate(run, torch.from_numpy(labels[rows]), list(rows), seed, **settings)
        return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    if not dist.is_main:
        for first in rounds:
            dist.gather(make_batch(first + dist.rank))
        return
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            write_npy_header(file, np.dtype(np.uint8), (count, image_size, image_size, 3))
            for first in progress(rounds, "samples"):
                for batch in dist.gather(make_batch(first + dist.rank)):
                    if batch is not None:
                        file.write(batch.tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels)


# --------------------------------------------------------------------------------------------------
# Command line.


def parse_classes(text: str, names: list[str]) -> list[int]:
    """Labels of classes, given by names with commas, or by labels if no name is a number.

    So a number never means two classes. An empty text means all classes; for a run without classes
    that is label 0, the null label. Raises UserError for unknown classes.
    """
    if not names:
        if text:
            raise UserError(f"--classes {text}: this run was trained without classes")
        return [0]
    labels = {name: label for label, name in enumerate(names)}
    problem = "is not a class name; labels are not taken, because some names are numbers"
    if not any(name.isdigit() for name in names):
        labels |= {str(label): label for label in range(len(names))}
        problem = f"is neither a class name nor a label in 0..{len(names) - 1}"
    words = [word for word in text.split(",") if word]
    for word in words:
        if word not in labels:
            raise UserError(f"--classes: {word} {problem}")
    return [labels[word] for word in words] or list(range(len(names)))


def default_output(run: str, name: str) -> Path:
    """Where a result goes by default: into the run's folder, or beside an exported file."""
    return Path(run) / name if Path(run).is_dir() else Path(f"{run}.{name}")


def export(run: TrainedRun, path: str) -> None:
    """Write the averaged models alone, as a checkpoint that `load_run` reads."""
    info = {key: run.checkpoint_info[key] for key in ("stage", "step", "total_steps")}
    identity = {"data": run.checkpoint_info["data"]}
    content = info | {"config": asdict(run.config), "classes": run.classes, "identity": identity}
    if run.generator is None:
        content |= {"ema": run.tokenizer.state_dict()}
    else:
        content |= {"ema": run.generator.state_dict(), "tokenizer": run.tokenizer.state_dict()}
    save_torch(content, path)


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("run", help="the folder that train.py --out made, or an exported file")
    add(
        "--out",
        default="",
        help="file to write (default: samples.png, samples.npz, ... in the run)",
    )
    add("--classes", default="", help="names or labels, with commas (default: all, 10 in a grid)")
    add("--columns", type=bounded(int, 1, 1000), default=8, help="images per row of a grid")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--npz", type=bounded(int, 1), metavar="N", help="write N samples to an .npz")
    mode.add_argument("--reconstruct", metavar="FOLDER", help='images of a folder, or of "shapes"')
    mode.add_argument("--export", metavar="FILE", help="write the averaged models alone")
    add("--batch_size", type=bounded(int, 1), default=64, help="samples per forward with --npz")
    add("--solver", help="sde, heun or euler (default: the generator's own)")
    add(
        "--steps",
        type=bounded(int, 1, 10**6),
        help="solver steps (default: the run's; config: 250)",
    )
    add("--guidance", type=float, help="scale, 1 is none (default: the run's; paper: 2.3)")
    add(
        "--interval",
        type=float,
        nargs=2,
        default=(0.0, 0.7),
        metavar="T",
        help="guidance is on for t in it",
    )
    add("--shift", type=float, help="shift of an ODE solver's steps (default: the generator's)")
    add("--guide", default="", metavar="RUN", help="a weaker run, for autoguidance (MAETok 4.5)")
    add("--seed", type=bounded(int, 0), default=0, help="seed of the noise")
    add("--precision", choices=PRECISIONS, default="float32", help="of the generator's products")
    add("--device", choices=DEVICES, help="default: cuda if there is a GPU, else cpu")
    return parser


def main(arguments: list[str]) -> None:
    args = build_parser().parse_args(arguments)
    dist = Distributed.start(args.device)
    run = load_run(args.run, dist.device)

    if args.export:
        export(run, args.export)
        return

    if args.reconstruct:
        path = Path(args.out or default_output(args.run, "reconstructions.png"))
        data = open_dataset(args.reconstruct, run.config.image_size)
        images, _ = read_batch(data, evenly_spaced(len(data), args.columns))
        write_grid(torch.stack([images, reconstruct(run.tokenizer, images).cpu()]), path)
        print(f"wrote {path}")
        return

    if run.generator is None:
        raise UserError(
            f"{args.run} has no generator.pt yet, so it can only --reconstruct; train its "
            "generator stage to sample"
        )
    run.use_bf16 = args.precision == "bf16"
    classes = parse_classes(args.classes, run.classes)
    if args.guide:
        run.guide_model = load_guide(args.guide, run)
    settings = run.sampler_settings(
        args.solver, args.steps, args.guidance, args.interval, args.shift
    )
    path = Path(args.out or default_output(args.run, "samples.npz" if args.npz else "samples.png"))
    if args.npz:
        count = args.npz
        check_room(path, count * 3 * run.config.image_size**2, "samples")
        write_npz(run, classes, count, args.batch_size, path, dist, args.seed, settings)
    else:
        classes = classes if args.classes else classes[:10]
        count = len(classes) * args.columns
        if dist.is_main:
            write_sample_grid(run, classes, args.columns, path, args.seed, settings)
    if dist.is_main:
        record = {
            "run": args.run,
            "guide": args.guide,
            "checkpoint": run.checkpoint_info,
            "count": count,
            "classes": classes,
            "seed": args.seed,
            "precision": args.precision,
            "hash": hash_file(path),
        }
        write_text(json.dumps(record | settings, indent=1), f"{path}.json")
        names = [run.classes[label] for label in classes] if run.classes else ["none"]
        print(f"wrote {path}: {count} samples of the classes {', '.join(names[:20])}")


if __name__ == "__main__":
    run_main(main)
