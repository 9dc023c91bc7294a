"""What keeps a tokenizer from collapsing, and what masks and alignment do: many short runs.

    python lab.py collapse --quick    # minutes on a laptop: fewer settings and steps, one seed
    python lab.py collapse            # KL weight x {nothing, masks, alignment} (paper fig. 5, 7)
    python lab.py ratio               # the largest share of hidden patches (paper tab. 4)
    python lab.py modules             # masks and alignment one by one (paper tab. 5)
    python lab.py recipes             # all recipes at equal steps
    python lab.py tokens              # 16, 32 and 64 latent tokens
    python lab.py recipes --plan      # what would run, and for how long
    python lab.py recipes --draw      # only the table and the pictures again
    python lab.py teacher --data photos/teacher --out lab_photos    # teacher.pt and judge.pt

A setting is a row of flags for train.py. With a KL weight and a seed it is a cell, an ordinary run
in a folder of its own in OUT/EXPERIMENT/. The same command passes over finished cells and resumes
an interrupted one. Any other flag is train.py's, and holds for all cells.

KL weights b are given as sigma. The loss MSE + b KL, where the MSE is a mean over d pixel values in
[-1, 1], is that of a VAE with pixel noise of variance sigma^2 = b d / 2, so that a sigma means the
same at every image size. The usual b = 1e-6 at 256 px is sigma = 0.31, which at the toy's 32 px is
b = 6.3e-5.
"""

import json
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import train
from align import HOG
from classifiers import (
    Judge,
    SmallTeacher,
    load_judge,
    measure_accuracy,
    save_classifier,
    train_classifier,
)
from evaluate import check_probe_data, hide_half
from masking import cls_similarity
from measures import measure, read_images
from options import check_config, parse_config
from recipes import RECIPES, Config
from utils.console import Parser, UserError, bounded, progress, run_main, warn
from utils.data import evenly_spaced, open_dataset, read_batch, train_val_split
from utils.distributed import Distributed
from utils.files import atomic_write, hash_file, load_torch, read_json, write_text
from utils.images import to_float, write_grid

MIN_PER_CLASS = 10  # images of each class that a teacher and a judge are trained on

# --------------------------------------------------------------------------------------------------
# The experiments.

# Settings. The weights of 0.1 and M = 0.7 are those of the preset b256, not the toy's.
NOTHING = dict(mask="none", local_weight=0, global_weight=0)
LOCAL = dict(mask="none", local_weight=0.1, global_weight=0)
LOCAL_GLOBAL = dict(mask="none", local_weight=0.1, global_weight=0.1)
MIXED = dict(mask="mixed")
PAPER_RATIO = dict(mask_ratio=0.7)
GUIDANCE = dict(guidance=3)  # with which the tables of docs/ were measured

AGAINST_COLLAPSE = {
    "nothing": NOTHING,
    "latent mask": NOTHING | dict(latent_mask=1),
    "random mask": NOTHING | dict(mask="random"),
    "semantic mask": NOTHING | dict(mask="semantic"),
    "mixed mask": NOTHING | MIXED,
    "local": LOCAL,
    "local + global": LOCAL_GLOBAL,
    "all": LOCAL_GLOBAL | MIXED,
}
RATIOS = {"no mask": {}}  # paper tab. 4, without guidance and decoder fine-tuning
RATIOS |= {f"M = {m}": dict(mask="random", mask_ratio=m) for m in (0.4, 0.5, 0.6, 0.7, 0.8)}
RATIOS |= {"0.7 semantic": dict(mask="semantic"), "0.7 mixed": MIXED}
MODULES = {  # paper tab. 5, and before it a row without masks and alignment, which it lacks
    "nothing": NOTHING,
    "+ random mask": NOTHING | dict(mask="random"),
    "+ local": LOCAL | dict(mask="random"),
    "+ semantic mask": LOCAL | MIXED,
    "+ global": LOCAL_GLOBAL | MIXED,
}


class Experiment(NamedTuple):
    """A question: settings to compare, at one or several KL weights."""

    settings: dict[str, dict]  # flags by the setting's name
    quick_settings: tuple[str, ...]  # the settings of --quick
    common: dict  # flags of all settings
    sigmas: tuple[float | None, ...]  # KL weights; None is the recipe's own. --quick: the ends
    stages: tuple[str, ...]  # the stages of train.py
    steps: int
    quick_steps: int


TOKENS = {f"{count} tokens": dict(tokens=count) for count in (16, 32, 64)}

EXPERIMENTS = {
    "collapse": Experiment(
        AGAINST_COLLAPSE,
        quick_settings=("nothing", "latent mask", "mixed mask", "local + global", "all"),
        common=PAPER_RATIO,
        sigmas=(0.31, 0.8, 1.25, 2.0),
        stages=("tokenizer",),
        steps=500,
        quick_steps=300,
    ),
    "ratio": Experiment(
        RATIOS,
        quick_settings=("no mask", "M = 0.4", "M = 0.7"),
        common=LOCAL_GLOBAL | PAPER_RATIO | dict(guidance=1),
        sigmas=(0.31,),
        stages=("tokenizer", "latents", "generator"),
        steps=800,
        quick_steps=300,
    ),
    "modules": Experiment(
        MODULES,
        quick_settings=("nothing", "+ random mask", "+ global"),
        common=PAPER_RATIO | GUIDANCE,
        sigmas=(0.31,),
        stages=("all",),
        steps=800,
        quick_steps=300,
    ),
    "recipes": Experiment(
        {name: dict(recipe=name) for name in RECIPES},
        quick_settings=("mactok", "kl", "ae"),
        common=GUIDANCE | dict(generator_batch_size=16, generator_lr=2e-3),
        sigmas=(None,),
        stages=("all",),
        steps=1000,
        quick_steps=300,
    ),
    "tokens": Experiment(
        TOKENS,
        quick_settings=("16 tokens", "64 tokens"),
        common=GUIDANCE | dict(channels=8, generator_batch_size=16, generator_lr=2e-3),
        sigmas=(None,),
        stages=("all",),
        steps=1000,
        quick_steps=300,
    ),
}
# Each flag is the number of steps divided by its divisor, rounded up.
STEP_DIVISORS = {
    "tokenizer_steps": 1,
    "generator_steps": 1,
    "decoder_steps": 10,
    "save_every": 5,
    "sample_every": 3,
    "log_every": 20,
}


DEFAULT_FLAGS = ("--preset", "toy")  # With --data, train.py would choose b256.


class Cell(NamedTuple):
    """One run: a setting with a KL weight and a seed."""

    name: str  # the name of the setting
    folder: Path
    argv: list[str]  # for train.py
    stages: tuple[str, ...]
    judge_file: str = ""  # the judge that measures it, if there is one


def plan(
    experiment: str,
    out: Path,
    seeds: int,
    quick: bool,
    steps: int | None,
    extra: list[str],
    judge_file: str = "",
) -> list[Cell]:
    """The runs of an experiment, ordered by seed: whole tables come first, and then more seeds.

    Raises UserError if `extra` has a flag in which the cells differ.
    """
    about = EXPERIMENTS[experiment]
    own_flags = {"seed", *(flag for setting in about.settings.values() for flag in setting)}
    if about.sigmas != (None,):
        own_flags.add("kl_weight")
    given = {word.removeprefix("--").partition("=")[0] for word in extra if word.startswith("--")}
    if given & own_flags:
        flag = min(given & own_flags)
        raise UserError(f"--{flag} differs between the runs of {experiment}; leave it out")
    config, _ = parse_config(extra)
    num_values = 3 * config.image_size**2
    if steps is None:
        steps = about.quick_steps if quick else about.steps
    names = about.quick_settings if quick else about.settings
    sigmas = about.sigmas
    if quick and len(sigmas) > 1:
        sigmas = (sigmas[0], sigmas[-1])
    cells = []
    for seed, sigma, name in product(range(seeds), sigmas, names):
        folder = f"{name}-seed{seed}" if sigma is None else f"{name}-sigma{sigma}-seed{seed}"
        folder = out / experiment / folder.replace(" ", "")
        flags = {flag: -(-steps // divisor) for flag, divisor in STEP_DIVISORS.items()}
        flags |= about.common | about.settings[name] | {"seed": seed, "out": folder}
        if sigma is not None:
            flags["kl_weight"] = f"{2 * sigma**2 / num_values:.4g}"
        argv = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        cells.append(Cell(name, folder, [*argv, *extra], about.stages, judge_file))
    return cells


# --------------------------------------------------------------------------------------------------
# Running and measuring.


def run_cell(cell: Cell) -> None:
    """Train a run, or go on with it, and measure it. cell.json is written last."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    console = open(cell.folder / "console.txt", "a")  # noqa: SIM115  closed by the next line
    with console, redirect_stdout(console), redirect_stderr(console):
        for stage in cell.stages:
            train.main([*cell.argv, "--stage", stage])
    start = time.perf_counter()
    _, options = parse_config(cell.argv)
    device = Distributed.start(options.device).device
    measures = measure(cell.folder, device, cell.judge_file)
    seconds = time.perf_counter() - start
    for record in read_json(cell.folder / "result.json").values():
        if isinstance(record, dict):
            seconds += record.get("seconds", 0)  # of a stage
    measures["seconds"] = round(seconds, 1)
    write_text(json.dumps(measures), cell.folder / "cell.json")


def read_cell(cell: Cell) -> dict | None:
    """A finished run, as `read_run` has it; None if it is unfinished, damaged, or of another judge.

    Damaged records are set aside. Raises UserError for a run of other values.
    """
    folder = cell.folder
    if not (folder / "cell.json").exists():
        return None
    try:
        config_before, run = read_run(folder)
    except Exception as error:  # whatever a damaged file makes the reader raise
        warn(f"the records in {folder} are damaged ({error}); the run is measured again")
        for name in ("cell.json", "result.json"):
            if (folder / name).exists():
                (folder / name).replace(folder / f"{name}.damaged")
        return None
    config, _ = parse_config(cell.argv)
    if config.teacher_file:  # a file may move, but not change
        config_before["teacher"] = run.get("teacher file", config_before["teacher"])
        config = replace(config, teacher=hash_file(config.teacher_file))
    for name, before in config_before.items():
        now = getattr(config, name, before)
        if name != "out_dir" and now != before:
            raise UserError(
                f"{folder} was made with {name} {before}, now it is {now}; use another --out"
            )
    if cell.judge_file and run.get("judge_hash") != hash_file(cell.judge_file):
        return None
    return run | {"name": cell.name}


def read_run(folder: Path) -> tuple[dict, dict]:
    """The config of a finished run, and what tables and pictures need.

    That is the config's values, the measures, the last PSNR, "plots" (see `measure`), and {step:
    line of the log} of the first stage, "curve", and of the generator, "generator_curve".
    """
    result = read_json(folder / "result.json")
    run = {}
    for value in result.values():
        if isinstance(value, dict):  # the config, and each stage in order
            run |= value
    run |= {"curve": read_curve(folder / "log.jsonl")}
    run |= {"generator_curve": read_curve(folder / "log.jsonl", "generator")}
    run |= read_json(folder / "cell.json") | {"plots": load_torch(folder / "plots.pt")}
    if "generator" in result:
        run["distance"] = find_distance(result["generator"])
    sigma = (run["kl_weight"] * 3 * run["image_size"] ** 2 / 2) ** 0.5
    run["sigma"] = round(sigma, 2)
    return {**result["config"]}, run


def find_distance(record: dict) -> float | None:
    """The distance of samples in an evaluation of the generator: FID, or else HOG's."""
    values = [value for key, value in record.items() if key.startswith(("fid_", "hog_"))]
    return values[0] if values else None


def read_curve(path: Path, stage: str = "") -> dict[int, dict]:
    """The log of a stage, or else of the first one, by step.

    Of several lines on a step the last one counts. A line that is not whole, as a killed run may
    leave it, is passed over.
    """
    curves = {}
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
            steps = curves.setdefault(line["stage"], {})
            steps.setdefault(line["step"], {}).update(line)
        except (ValueError, KeyError, TypeError):
            continue
    return curves.get(stage or next(iter(curves), ""), {})


# --------------------------------------------------------------------------------------------------
# The optimum of a linear code, in closed form.

LINEAR = "linear optimum"


def water_filling(
    eigenvalues: Tensor, kl_weight: float, num_tokens: int, latent_dim: int
) -> dict[str, float]:
    """The optimum of mean MSE + b KL over linear encoders and decoders of Gaussian images.

    eigenvalues (d,) of the covariance of images in [-1, 1], descending. sigma^2 = b d / 2 is the
    water level: of the best L C directions, those whose eigenvalue lies above it get a latent. Such
    a latent costs ln(eigenvalue / sigma^2) / 2 nats, and its mean leaves an error of sigma^4 /
    eigenvalue. All other directions are lost. (Cover and Thomas 10.3.3; as a linear VAE: Lucas et
    al. 2019.) The PSNR is that of the means.
    """
    eigenvalues = eigenvalues.double()
    d = len(eigenvalues)
    water_level = kl_weight * d / 2
    num_kept = min(num_tokens * latent_dim, int((eigenvalues > water_level).sum()))
    kept, lost = eigenvalues[:num_kept], eigenvalues[num_kept:]
    mse = ((water_level**2 / kept).sum() + lost.sum()) / d
    kl = 0.5 * (kept / water_level).log().sum()
    return {
        "kl_per_token": kl.item() / num_tokens,
        "active_units": num_kept / (num_tokens * latent_dim),
        "psnr": (10 * torch.log10(4 / mse)).item(),
    }


def linear_optima(runs: list[dict]) -> list[dict]:
    """`water_filling` at each KL weight of the runs, for their training images, also mirrored."""
    run = runs[0]
    # A run that was made before an option existed lacks it.
    config = Config(**{name: run[name] for name in Config.__dataclass_fields__ if name in run})
    images, _, held_out = read_images(config)
    x = to_float(torch.from_numpy(np.delete(images.numpy(), held_out, axis=0)))
    x = torch.cat([x, x.flip(-1)]).flatten(1)
    eigenvalues = torch.linalg.eigvalsh(x.T.cov().double()).flip(0).clamp(min=0)
    optima = []
    for sigma, kl_weight in group_by(runs, "sigma", "kl_weight"):
        tokens = config.num_latent_tokens or config.grid_size**2
        best = water_filling(eigenvalues, kl_weight, tokens, config.latent_dim)
        curve = dict.fromkeys(run["curve"], best)
        optima.append(best | {"name": LINEAR, "seed": 0, "sigma": sigma, "curve": curve})
    return optima


# --------------------------------------------------------------------------------------------------
# Teacher and judge.


def make_classifiers(config: Config, epochs: int, out: Path, device: torch.device) -> None:
    """Train a teacher and a judge on two halves of a folder, and write teacher_masks.png."""
    data = open_dataset(config.data_dir, config.image_size)
    check_classes(config.data_dir, data.classes, data.labels)
    images, labels = read_batch(data, range(len(data)))
    about = {"image_size": config.image_size, "classes": list(data.classes)}
    about |= {"data": data.fingerprint, "grid_size": config.grid_size, "epochs": epochs}
    torch.manual_seed(config.seed)
    teacher = SmallTeacher(config.grid_size, len(data.classes))
    networks = (teacher, Judge(len(data.classes)))
    for half, network in enumerate(networks):
        start = time.perf_counter()
        x = images[half::2]
        y = labels[half::2]
        fit, test = train_val_split(y.tolist(), len(y))  # It holds out a tenth at most.
        train_classifier(network.to(device), x[fit], y[fit], epochs, config.seed + half)
        accuracy = measure_accuracy(network, x[test], y[test])
        path = out / f"{network.kind}.pt"
        save_classifier(network, about | {"accuracy": accuracy}, path)
        print(
            f"{path}: trained on {len(fit)} images in {time.perf_counter() - start:.0f} s, right "
            f"for {accuracy:.1%} of {len(test)} others"
        )
    unseen = images[1::2]  # by the teacher
    shown = unseen[evenly_spaced(len(unseen), 8)]
    draw_teacher_masks(teacher, shown, out / "teacher_masks.png")


def check_classes(folder: str, classes: list[str], labels: list[int]) -> None:
    """Raise UserError unless there are two classes, and MIN_PER_CLASS images of each."""
    if len(classes) < 2:
        raise UserError(f"{folder} has no class folders, and a teacher learns classes; use others")
    counts = np.bincount(labels, minlength=len(classes))
    if counts.min() < MIN_PER_CLASS:
        raise UserError(
            f"{folder or 'shapes'} has {counts.min()} images of {classes[counts.argmin()]}; a "
            f"teacher and a judge need at least {MIN_PER_CLASS} of each class"
        )


@torch.no_grad()
def draw_teacher_masks(teacher: SmallTeacher, images: Tensor, path: Path) -> None:
    """Write a picture of images uint8 (n, 3, S, S), whole and with half of their patches hidden.

    The patches of the second row are random, those of the third row are HOG's choice, and those of
    the fourth row the teacher's.
    """
    x = to_float(images.to(next(teacher.parameters()).device))
    hog_scores = cls_similarity(*HOG(teacher.grid_size)(x)).cpu()
    scores = cls_similarity(*teacher(x)).cpu()
    rows = [images, hide_half(images, scores, "random")]
    rows += [hide_half(images, hog_scores, "semantic"), hide_half(images, scores, "semantic")]
    write_grid(torch.stack(rows), path)
    print(f"wrote {path}: images; half hidden at random, by HOG, and by the teacher")


# --------------------------------------------------------------------------------------------------
# Table and pictures.

MEASURES = {
    "kl_per_token": "KL per token (nats)",
    "active_units": "active units (share)",
    "psnr": "PSNR, held out (dB)",
    "probe": "linear probe (share right)",
    "distance": "Frechet distance of samples",
    "flow_loss": "flow-matching loss, held out",
    "noisy_probe": "probe, noise on latents (share right)",
    "hidden_probe": "probe, half of the patches gray (share right)",
    "judge_samples": "judge's distance of samples",
    "judge_reconstructions": "judge's distance of reconstructions",
    "judge_found": "class found in reconstructions (share)",
}
COLORS = dict(
    zip(
        [*AGAINST_COLLAPSE, LINEAR],
        "black tab:brown #6baed6 #2171b5 #08306b #fdae6b #e6550d #2ca02c gray".split(),
    )
)


def group_by(runs: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Runs by their values of these keys, in order."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in keys), []).append(run)
    return groups


def has_survived(run: dict) -> bool:
    return not train.has_collapsed(run)


def table(runs: list[dict]) -> str:
    """Markdown: mean +- standard deviation over seeds of each measure; how many seeds survive."""
    keys = [key for key in MEASURES if any(key in run for run in runs)]
    groups = group_by(runs, "name", "sigma")
    lines = [["", "sigma", *(MEASURES[key] for key in keys), "survive"]]
    lines.append(["---"] * len(lines[0]))
    for (name, sigma), group in groups.items():
        values = [format_spread([run[key] for run in group if key in run]) for key in keys]
        survived = f"{sum(map(has_survived, group))} of {len(group)}"
        lines.append([name, f"{sigma:g}", *values, survived])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    if LINEAR not in (name for name, _ in groups):
        return text
    largest = {}
    for (name, sigma), group in groups.items():
        largest.setdefault(name, "none")
        if all(map(has_survived, group)):
            largest[name] = sigma if largest[name] == "none" else max(sigma, largest[name])
    ends = ", ".join(f"{name} {sigma}" for name, sigma in largest.items())
    return f"{text}\nLargest sigma that all seeds survive: {ends}.\n"


def format_spread(values: list[float]) -> str:
    """Mean +- standard deviation with the divisor n - 1."""
    if not values:
        return "-"
    spread = f" ± {np.std(values, ddof=1):#.2g}" if len(values) > 1 else ""
    return f"{np.mean(values):#.3g}{spread}"


class Pictures:
    """Draws the pictures of an experiment with matplotlib, without its pyplot and without a
    display.

    runs        finished runs, with the linear optima if there are any
    is_sweep    whether the runs differ in sigma; then pictures have a row or column for some sigmas
    """

    def __init__(self, runs: list[dict], is_sweep: bool):
        self.is_sweep = is_sweep
        self.runs = [run | {"row": f"sigma {run['sigma']:g}" if is_sweep else ""} for run in runs]
        self.rows = [row for (row,) in group_by(self.runs, "row")]
        last = len(self.rows) - 1
        self.some_rows = [self.rows[i] for i in sorted({0, last // 2, last})]
        names = [name for (name,) in group_by(self.runs, "name")]
        self.colors = {name: COLORS.get(name, f"C{i}") for i, name in enumerate(names)}
        self.main_measure = "kl_per_token" if is_sweep else "distance"
        trained = [run for run in self.runs if run["name"] != LINEAR]
        groups = group_by(trained, "name", "row")
        self.trained = trained
        self.examples = [group[0] for (_, row), group in groups.items() if row in self.some_rows]

    def draw_all(self) -> Iterator[tuple[str, object]]:
        """Yield the end of each picture's file name, and its figure."""
        yield "", self.draw_ends()
        yield "_steps", self.draw_steps()
        yield "_images", self.draw_images()
        yield "_latents", self.draw_latents()
        yield "_probe", self.draw_probe()
        if any("mixture" in run for run in self.trained):  # there are generators
            yield "_generator", self.draw_generator()

    def make_figure(self, title: str, height: float, rows: int = 1, columns: int = 1, **kwargs):
        from matplotlib.figure import Figure

        figure = Figure((9, height), dpi=100, layout="constrained")  # 900 px wide
        figure.suptitle(title)
        return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)

    def draw_panels(self, title: str, rows: list[str], keys: tuple[str, ...], lines, xlabel: str):
        """A panel per row and measure. lines: (row, run, {x: measures}) for each line."""
        height = 2 + 2.2 * len(rows)
        shared = dict(sharex=True, sharey="col")
        figure, axes = self.make_figure(title, height, len(rows), len(keys), **shared)
        for row, run, points in lines:
            name = run["name"]
            style = dict(color=self.colors[name], linewidth=1, markersize=8)
            style["label"] = "" if run["seed"] else name
            for column, key in enumerate(keys):
                x = [at for at in points if key in points[at]]
                y = [points[at][key] for at in x]
                axis = axes[rows.index(row), column]
                axis.plot(x, y, "--" if name == LINEAR else ".-", **style)
        for axis, (row, key) in zip(axes.flat, product(rows, keys)):
            scale = "log" if key == "kl_per_token" else "linear"
            axis.set(title=row, xlabel=xlabel, ylabel=MEASURES[key], yscale=scale)
            axis.tick_params(axis="x", rotation=0 if xlabel else 40)
            if key == "kl_per_token":
                axis.axhspan(0, train.COLLAPSE_THRESHOLD, color="red", alpha=0.1, label="collapsed")
        handles = axes[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=5)
        return figure

    def draw_ends(self):
        """Measures at the end of training, over sigma or over settings."""
        x = "sigma" if self.is_sweep else "name"
        lines = []
        for group in group_by(self.runs, "name", "seed").values():
            lines.append(("", group[0], {str(run[x]): run for run in group}))
        xlabel = "KL weight (sigma)" if self.is_sweep else ""
        keys = (self.main_measure, "psnr", "probe")
        return self.draw_panels("At the end of training", [""], keys, lines, xlabel)

    def draw_steps(self):
        """KL, active units and PSNR during training."""
        lines = [
            (run["row"], run, run["curve"]) for run in self.runs if run["row"] in self.some_rows
        ]
        title = "During training (KL, units: of images as masked)"
        keys = ("kl_per_token", "active_units", "psnr")
        return self.draw_panels(title, self.some_rows, keys, lines, "training step")

    def draw_images(self):
        """Held-out images above their reconstructions by each setting."""
        names = [name for name in self.colors if name != LINEAR]
        num_columns = 8 // len(self.some_rows) + 3
        height = 1.1 + 7.6 / len(self.some_rows) / num_columns * (1 + len(names))
        title = "Held-out images and their reconstructions"
        figure, axes = self.make_figure(title, height, 1, len(self.some_rows), sharey=True)
        for axis, row in zip(axes[0], self.some_rows):
            plots = {run["name"]: run["plots"] for run in self.examples if run["row"] == row}
            originals = self.examples[0]["plots"]["originals"]
            white = torch.full_like(originals, 255)
            recons = [plots[name]["reconstructions"] if name in plots else white for name in names]
            images = torch.stack([originals, *recons])[:, :num_columns]
            pixels = images.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy()
            axis.imshow(pixels, extent=(0, images.shape[1], len(images), 0))
            ticks = np.arange(len(images)) + 0.5
            axis.set(title=row, xticks=[], yticks=ticks, yticklabels=["held out", *names])
        return figure

    def draw_latents(self):
        """The first two principal components of latents, colored by class."""
        runs = self.examples
        if self.is_sweep:
            typical = ("nothing", "mixed mask", "all")
            runs = [run for run in runs if run["name"] in typical] or runs
        num_rows = -(-len(runs) // 3)
        title = "Images in latent space (means; a sample adds noise of a std up to 1)"
        shared = dict(sharex=self.is_sweep, sharey=self.is_sweep)
        figure, axes = self.make_figure(title, 1 + 2.4 * num_rows, num_rows, 3, **shared)
        for axis, run in zip(axes.flat, runs):
            x, y = run["plots"]["components"].numpy().T
            dots = axis.scatter(x, y, c=run["plots"]["labels"].numpy(), cmap="tab10", s=5)
            title = f"{run['name']} {run['row']}"
            axis.set(title=title, xlabel="first principal component", ylabel="second")
        for axis in axes.flat[len(runs) :]:
            axis.set_axis_off()
        handles, _ = dots.legend_elements(num=None)  # one of each class
        figure.legend(handles, run["plots"]["classes"], loc="outside right center")
        return figure

    def draw_probe(self):
        """Probe accuracy against KL or against the distance of samples."""
        key = self.main_measure
        figure, axes = self.make_figure("Each dot is a run", 4.5)
        for (name,), group in group_by(self.trained, "name").items():
            x = [run[key] for run in group]
            y = [run["probe"] for run in group]
            sizes = [20 + 30 * self.rows.index(run["row"]) for run in group]
            axes[0, 0].scatter(x, y, sizes, self.colors[name], label=name, alpha=0.7)
        axes[0, 0].set(xlabel=MEASURES[key], ylabel=MEASURES["probe"])
        figure.legend(
            loc="outside right center", title="larger: larger sigma" if self.is_sweep else ""
        )
        return figure

    def draw_generator(self):
        """The generator's loss and samples in training, and how Gaussian mixtures fit latents."""
        figure, axes = self.make_figure("Are the latents easy to generate?", 4.8, 1, 3)
        training, samples, mixtures = axes[0]
        for (name,), group in group_by(self.trained, "name").items():
            flow_loss = format_spread([run["flow_loss"] for run in group if "flow_loss" in run])
            for run in group:
                style = dict(color=self.colors[name], linewidth=1)
                style["label"] = "" if run["seed"] else f"{name}: held-out loss {flow_loss}"
                curve = run["generator_curve"]
                losses = {step: line["loss"] for step, line in curve.items() if "loss" in line}
                training.plot(list(losses), list(losses.values()), **style)
                distances = {step: find_distance(line) for step, line in curve.items()}
                steps = [step for step, distance in distances.items() if distance is not None]
                samples.plot(steps, [distances[step] for step in steps], ".-", **style)
                mixture = run.get("mixture", {})
                mixtures.plot([int(k) for k in mixture], list(mixture.values()), ".-", **style)
        training.set(xlabel="training step", ylabel="flow-matching loss, training")
        samples.set(xlabel="training step", ylabel=MEASURES["distance"])
        samples.set_ylim(bottom=0)
        mixtures.set_xscale("log", base=2)
        mixtures.set(xlabel="Gaussians in the mixture")  # MAETok fig. 2
        mixtures.set(ylabel="negative log likelihood, held out (nats)")
        figure.legend(*training.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return figure


# --------------------------------------------------------------------------------------------------
# Command line.


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("experiment", choices=[*EXPERIMENTS, "teacher"])
    add("--epochs", type=bounded(int, 1, 10**6), default=13, help="of teacher and judge")
    add("--judge", dest="judge_file", default="", metavar="FILE", help="measure with this judge")
    add("--seeds", type=bounded(int, 1), help="of every cell (default: 3, with --quick 1)")
    add("--steps", type=bounded(int, 1, 10**9), help="of the tokenizer, and of the generator")
    add("--out", help="folder (default: lab, with --quick lab_quick)")
    add("--only", default="", help="only cells with this in their names")
    add("--quick", action="store_true", help="few cells and steps, and one seed")
    add("--plan", action="store_true", help="only say what would run")
    add("--draw", action="store_true", help="only draw table and pictures again")
    return parser


def check_data(judge_file: str, extra: list[str]) -> None:
    """Raise UserError, before any run, unless the images and the judge can be used.

    A probe needs classes, and a judge has to know them. It also warns if teacher or judge were
    trained on these images.
    """
    config, _ = parse_config(extra)
    data = open_dataset(config.data_dir, config.image_size)
    check_probe_data(config.data_dir, data)
    if judge_file:
        load_judge(judge_file, config.image_size, list(data.classes))
    for path in (config.teacher_file, judge_file):
        if path and load_torch(path).get("data") == data.fingerprint:
            warn(f"{path} was trained on these images, so that it knows too much of them")


def write_results(experiment: str, out: Path, runs: list[dict], num_cells: int) -> None:
    """Write EXPERIMENT.md, and its pictures if matplotlib is there."""
    if experiment == "collapse":
        runs = runs + linear_optima(runs)
    minutes = sum(run.get("seconds", 0) for run in runs) / 60
    num_runs = sum("plots" in run for run in runs)
    text = f"# {experiment}: {num_runs} of {num_cells} runs, {minutes:.0f} minutes\n\n{table(runs)}"
    judged = [run for run in runs if "judge_found_originals" in run]
    if judged:
        text += (
            f"\nThe judge finds the class of {judged[0]['judge_found_originals']:.1%} of the "
            "held-out images themselves. Their distance from as many other images is "
            f"{judged[0]['judge_originals']:.2g}.\n"
        )
    try:
        for ending, figure in Pictures(runs, is_sweep=experiment == "collapse").draw_all():
            name = f"{experiment}{ending}"
            with atomic_write(out / f"{name}.png") as temporary:
                figure.savefig(temporary, format="png")
            text += f"\n![{name}]({name}.png)\n"
    except ImportError:
        warn("there are no pictures without matplotlib; pip install it, then use --draw")
    write_text(text, out / f"{experiment}.md")
    print(text)


def main(arguments: list[str]) -> None:
    args, extra = build_parser().parse_known_args(arguments)
    out = Path(args.out or ("lab_quick" if args.quick else "lab"))
    extra = [*DEFAULT_FLAGS, *extra]
    if args.experiment == "teacher":
        if args.plan or args.draw:
            raise UserError("lab.py teacher always trains; leave out --plan and --draw")
        config, options = parse_config(extra)
        dist = Distributed.start(options.device)
        check_config(config, dist)
        make_classifiers(config, args.epochs, out, dist.device)
        return
    check_data(args.judge_file, extra)
    seeds = args.seeds or (1 if args.quick else 3)
    cells = plan(args.experiment, out, seeds, args.quick, args.steps, extra, args.judge_file)
    cells = [cell for cell in cells if args.only in cell.name]
    runs = [read_cell(cell) for cell in cells]
    todo = [cell for cell, run in zip(cells, runs) if run is None]
    minutes = [run["seconds"] / 60 for run in runs if run]
    estimate = len(todo) * np.mean(minutes or [1])
    basis = "as before" if minutes else "1 each"
    print(f"{len(todo)} of {len(cells)} to do: {estimate:.0f} minutes, {basis}")
    if args.plan:
        for cell in cells:
            print(f"{cell.folder}: {'to do' if cell in todo else 'done'}")
        return

    bar = progress([] if args.draw else todo, "runs")
    for cell in bar:
        bar.set_description(cell.folder.name)
        run_cell(cell)
    runs = [run for run in map(read_cell, cells) if run]
    if not runs:
        raise UserError(
            f"{out / args.experiment} has no finished run of these cells; leave out --draw, or "
            f"--only {args.only}"
        )
    write_results(args.experiment, out, runs, len(cells))


if __name__ == "__main__":
    run_main(main)
