"""What keeps a tokenizer from collapsing, and what masks and alignment do besides: experiments of many short runs, with seeds.

    python lab.py collapse --quick    # minutes on a laptop: fewer settings and steps, one seed, in lab_quick/
    python lab.py collapse            # KL weight x {nothing, masks, alignment}: what survives (paper fig. 5, 7, 9-11)
    python lab.py ratio               # the largest share of hidden patches (paper tab. 4)
    python lab.py modules             # masks and alignment one by one (paper tab. 5)
    python lab.py recipes             # all recipes at equal steps; --plan: what would run, and how long; --draw: draw again

A cell is a row of flags for train.py; with a seed it is an ordinary run in OUT/EXPERIMENT/. The same command passes over finished
ones and resumes an interrupted one. Any other flag is train.py's, and holds for all cells. KL weights b are given as sigma:
mean MSE + b KL over d pixel values in [-1, 1] is a VAE with pixel noise sigma^2 = b d / 2. So they mean the same at every size:
1e-6 at 256 px is sigma = 0.31, which at the toy's 32 px is b = 6.3e-5.
"""

import json
import time
from collections import namedtuple
from contextlib import redirect_stderr, redirect_stdout
from itertools import product
from pathlib import Path

import numpy as np
import torch

import train
from fid import linear_probe
from plumbing.data import open_dataset, split, spread, to_float
from plumbing.run import Parser, Processes, UserError, as_user_error, command_line, load_checkpoint, progress, read_json
from plumbing.run import replacing, save_checkpoint, warn, within, write_text
from plumbing.state import COLLAPSED
from recipes import RECIPES, parse_config
from sample import load_run, reconstruct

# fmt: off
NOTHING, LOCAL, BOTH = (dict(mask="none", local_weight=a, global_weight=b) for a, b in ((0, 0), (0.1, 0), (0.1, 0.1)))
MIXED, PAPER = dict(mask="mixed"), dict(mask_ratio=0.7)  # weights: config; M: paper 4.1
MEASURED = PAPER | dict(sit_batch_size=64)  # what results/ was made with
SETTINGS = {"nothing": NOTHING} | {f"{mask} mask": NOTHING | dict(mask=mask) for mask in ("latent", "random", "semantic", "mixed")}
SETTINGS |= {"local": LOCAL, "local + global": BOTH, "all": BOTH | MIXED}  # against collapse
RATIOS = {"no mask": {}} | {f"M = {most}": dict(mask="random", mask_ratio=most) for most in (0.4, 0.5, 0.6, 0.7, 0.8)}
RATIOS |= {"0.7 semantic": dict(mask="semantic"), "0.7 mixed": MIXED}  # tab. 4, without guidance and fine-tuning
MODULES = {"nothing": NOTHING, "+ random mask": NOTHING | dict(mask="random"), "+ local": LOCAL | dict(mask="random")}
MODULES |= {"+ semantic mask": LOCAL | MIXED, "+ global": BOTH | MIXED}  # tab. 5, from the row above its first
Experiment = namedtuple("Experiment", "cells quick common sigmas stages steps")
EXPERIMENTS = {  # {cell: flags}; cells of --quick; flags of all; sigmas, None: the recipe's; stages of train.py; steps, --quick's
    "collapse": Experiment(SETTINGS, ("nothing", "latent mask", "mixed mask", "local + global", "all"), PAPER,
                           (0.31, 0.8, 1.25, 2.0), ("tokenizer",), (500, 300)),  # --quick: every second sigma, one seed
    "ratio": Experiment(RATIOS, ("no mask", "M = 0.4", "M = 0.7"), BOTH | MEASURED | dict(guidance=1), (0.31,),
                        ("tokenizer", "latents", "sit"), (800, 300)),
    "modules": Experiment(MODULES, ("nothing", "+ random mask", "+ global"), MEASURED, (0.31,), ("all",), (800, 300)),
    "recipes": Experiment({r: dict(recipe=r) for r in RECIPES}, ("mactok", "kl", "ae"), {}, (None,), ("all",), (1000, 300)),
}
LENGTHS = dict(tokenizer_steps=1, sit_steps=1, decoder_steps=10, save_every=5, log_every=20)  # the steps by this, rounded up
LINEAR = "linear optimum"  # needs no training: see water_filling
COLOURS = dict(zip([*SETTINGS, LINEAR], "black tab:brown #6baed6 #2171b5 #08306b #fdae6b #e6550d #2ca02c grey".split()))
MEASURES = {"kl_per_token": "KL per token (nats)", "active_units": "active units (share)", "psnr": "PSNR, held out (dB)",
            "probe": "linear probe (share right)", "distance": "Frechet distance of samples"}
# fmt: on
Cell = namedtuple("Cell", "name folder words stages")  # folder: of the run, with its seed; words: after train.py


def plan(name: str, out: Path, seeds: int, quick: bool, steps: int | None, extra: list[str]) -> list[Cell]:
    """The runs of an experiment, seed by seed: an interrupted one has whole tables of fewer seeds."""
    about, plans, d = EXPERIMENTS[name], [], 3 * parse_config(extra)[0].image_size ** 2
    steps, cells = steps or about.steps[quick], about.quick if quick else about.cells
    for seed, sigma, cell in product(range(1 if quick else seeds), about.sigmas[:: 1 + quick], cells):
        folder = out / name / f"{cell}-sigma{sigma}-seed{seed}".replace(" ", "").replace("-sigmaNone", "")
        flags = {flag: -(-steps // part) for flag, part in LENGTHS.items()} | about.common | about.cells[cell]
        flags |= {"seed": seed, "out": folder} | ({"kl_weight": f"{2 * sigma**2 / d:.4g}"} if sigma else {})
        words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        plans.append(Cell(cell, folder, [*words, *extra], about.stages))
    return plans


def run_cell(cell: Cell) -> None:
    """Train it, or go on with it, and measure it. cell.json, written last, says that it is finished."""
    start = time.perf_counter()
    cell.folder.mkdir(parents=True, exist_ok=True)
    with open(cell.folder / "console.txt", "a") as console, redirect_stdout(console), redirect_stderr(console):
        for stage in cell.stages:
            train.main([*cell.words, "--stage", stage])
    numbers = measure(cell.folder, Processes.start(parse_config(cell.words)[1].device).device)
    write_text(json.dumps(numbers | {"seconds": round(time.perf_counter() - start, 1)}), cell.folder / "cell.json")


def read_images(config: dict) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """All images of a run, uint8 (n, 3, S, S), their labels (n,), and which of them are held out."""
    data = open_dataset(config["data"], config["image_size"])
    images, labels = zip(*(data[i] for i in range(len(data))))
    return torch.stack(images), torch.tensor(labels), split(len(data), config["eval_images"])[1]


@torch.no_grad()
def measure(folder: Path, device: torch.device) -> dict[str, float]:
    """What the averaged weights make of whole images -> measures; and views.pt, what pictures need.

    Of held-out images: kl_per_token (nats), active_units (share of means with a variance over 0.01). probe: as fid.py probe, but
    of sampled latents, for in means it reads what their noise hides from decoder and SiT; views.pt has the means of its images.
    """
    run = load_run(folder, device)
    tokenizer, (images, labels, held) = run.tokenizer, read_images(run.config)
    parts = [tokenizer.encode(to_float(part.to(device))) for part in images.split(64)]
    posterior = type(parts[0])(*(torch.cat(values).cpu() for values in zip(*parts)))
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    mean, z = posterior.mean.flatten(1), posterior.sample(noise).flatten(1)
    (fitted, tested), shown = split(len(z), len(z)), images[held[spread(len(held), 8)]]
    u, scales = torch.linalg.svd(mean[tested] - mean[tested].mean(0), full_matrices=False)[:2]
    classes = [name for label, name in enumerate(run.classes) if label in labels[tested]]
    views = {"components": u[:, :2] * scales[:2], "labels": labels[tested], "classes": classes}
    save_checkpoint(views | {"originals": shown, "reconstructions": reconstruct(tokenizer, shown)}, folder / "views.pt")
    kl = {"kl_per_token": posterior.kl()[held].mean().item()} if posterior.std.any() else {}  # a point has none
    active = (mean[held].var(0) > 0.01).double().mean().item()
    return kl | {"active_units": active, "probe": linear_probe(z[fitted], labels[fitted], z[tested], labels[tested])}


def read_cell(cell: Cell) -> dict | None:
    """A run: its values and measures, "views", "curve" ({step: line of the log's first stage}); None if it is not finished."""
    folder, log, curve = cell.folder, cell.folder / "log.jsonl", {}
    if not (folder / "cell.json").exists():
        return None
    result, now = read_json(folder / "result.json"), vars(parse_config(cell.words)[0])
    for name, then in result["config"].items():
        if name != "out" and now.get(name) != then:
            raise UserError(f"{folder} was made with {name} {then}, now it is {now.get(name)}; use another --out")
    for number, text in enumerate(log.read_text().splitlines(), 1):
        with as_user_error(f"{log} is damaged at line {number}; move {folder} away and run the same command again: "):
            line = json.loads(text)
            curve.setdefault(line["stage"], {}).setdefault(line["step"], {}).update(line)  # of a step the last line counts
    run = {key: value for part in result.values() if isinstance(part, dict) for key, value in part.items()}  # the last psnr counts
    run |= {"name": cell.name, "curve": next(iter(curve.values())), "views": load_checkpoint(folder / "views.pt")}
    if "sit" in result:
        run["distance"] = next(value for key, value in result["sit"].items() if key.startswith(("fid_", "hog_")))
    return run | read_json(folder / "cell.json") | {"sigma": round((run["kl_weight"] * 1.5) ** 0.5 * run["image_size"], 2)}


def water_filling(eigenvalues: torch.Tensor, kl_weight: float, tokens: int, channels: int) -> dict[str, float]:
    """The optimum of mean MSE + b KL over linear encoders and decoders of Gaussian images in [-1, 1], in closed form.

    eigenvalues (d,) of the images' covariance, descending. sigma^2 = b d / 2 is the water level: of the best L C directions those
    get a latent whose eigenvalue lies above. It costs ln(eigenvalue / sigma^2) / 2 nats; its mean leaves an error of sigma^4 /
    eigenvalue. All others are lost whole. (Cover and Thomas 10.3.3; as a linear VAE: Lucas et al. 2019.) psnr is of that error.
    """
    eigenvalues, d, level = eigenvalues.double(), len(eigenvalues), kl_weight * len(eigenvalues) / 2
    kept = eigenvalues[: min(tokens * channels, int((eigenvalues > level).sum()))]
    mse = ((level**2 / kept).sum() + eigenvalues[len(kept) :].sum()) / d
    kl, psnr = 0.5 * (kept / level).log().sum(), 10 * torch.log10(4 / mse)
    return {"kl_per_token": kl.item() / tokens, "active_units": len(kept) / (tokens * channels), "psnr": psnr.item()}


def linear_optima(runs: list[dict]) -> list[dict]:
    """`water_filling` at each KL weight of the runs, for the images that they trained on and their mirror images."""
    (images, _, held), run = read_images(runs[0]), runs[0]
    x = to_float(torch.from_numpy(np.delete(images.numpy(), held, axis=0)))
    eigenvalues = torch.linalg.eigvalsh(torch.cat([x, x.flip(-1)]).flatten(1).T.cov().double()).flip(0).clamp(min=0)
    optima = {s: water_filling(eigenvalues, b, run["tokens"], run["channels"]) for s, b in groups(runs, "sigma", "kl_weight")}
    return [dict(best, name=LINEAR, seed=0, sigma=s, curve=dict.fromkeys(run["curve"], best)) for s, best in optima.items()]


def groups(runs: list[dict], *names: str) -> dict[tuple, list[dict]]:
    """Runs by what they have under these names, in order."""
    keys = dict.fromkeys(tuple(run[name] for name in names) for run in runs)
    return {key: [run for run in runs if tuple(run[name] for name in names) == key] for key in keys}


def table(runs: list[dict]) -> str:
    """Markdown: mean +- standard deviation (n - 1) over seeds of each measure that any has; how many seeds survive, up to where."""
    keys, cells = [key for key in MEASURES if any(key in run for run in runs)], groups(runs, "name", "sigma")
    alive = {cell: [run.get("kl_per_token", 1) > COLLAPSED for run in same] for cell, same in cells.items()}
    lines = [["", "sigma", *(MEASURES[key] for key in keys), "survive"], ["---"] * (len(keys) + 3)]
    for (name, sigma), same in cells.items():
        values = [[run[key] for run in same if key in run] for key in keys]
        values = [f"{np.mean(x):#.3g}" + (f" ± {np.std(x, ddof=1):#.2g}" if len(x) > 1 else "") if x else "-" for x in values]
        lines.append([name, f"{sigma:g}", *values, f"{sum(alive[name, sigma])} of {len(same)}"])
    most = {name: max((s for cell, s in cells if cell == name and all(alive[name, s])), default="none") for name, _ in cells}
    text = f"\nLargest sigma that all seeds survive: {', '.join(f'{name} {sigma}' for name, sigma in most.items())}.\n"
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + (text if LINEAR in most else "")


def draw(runs: list[dict], sweep: bool):
    """Yields ending of the file's name and figure of each picture. Without matplotlib's pyplot, and so without a display."""
    from matplotlib.figure import Figure

    def canvas(title: str, height: float, down: int = 1, across: int = 1, **shared) -> tuple:
        figure = Figure((9, height), dpi=100, layout="constrained")  # 900 px wide
        figure.suptitle(title)
        return figure, figure.subplots(down, across, squeeze=False, **shared)

    def panels(title: str, rows: list[str], keys: tuple[str, ...], lines: list[tuple], xlabel: str) -> Figure:
        """Titles of the rows, measures of the columns. lines: title of its row, its run, {x: measures}."""
        figure, axes = canvas(title, 2 + 2.2 * len(rows), len(rows), len(keys), sharex=True, sharey="col")
        for (row, run, points), (column, key) in product(lines, enumerate(keys)):
            at, name = [x for x in points if key in points[x]], run["name"]
            style = dict(color=colours[name], linewidth=1, markersize=8, label="" if run["seed"] else name)
            axes[rows.index(row), column].plot(at, [points[x][key] for x in at], "--" if name == LINEAR else ".-", **style)
        for axis, (row, key) in zip(axes.flat, product(rows, keys)):
            axis.set(title=row, xlabel=xlabel, ylabel=MEASURES[key], yscale="log" if key == "kl_per_token" else "linear")
            axis.tick_params(axis="x", rotation=0 if xlabel else 40)
            if key == "kl_per_token":
                axis.axhspan(0, COLLAPSED, color="red", alpha=0.1, label="collapsed")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        return figure

    runs = [run | {"row": f"sigma {run['sigma']:g}" if sweep else ""} for run in runs]
    colours = {name: COLOURS.get(name, f"C{i}") for i, (name,) in enumerate(groups(runs, "name"))}
    rows, keys = [row for (row,) in groups(runs, "row")], ("kl_per_token" if sweep else "distance", "psnr", "probe")
    some, x = rows[:: max(1, (len(rows) - 1) // 2)], "sigma" if sweep else "name"  # first, middle and last
    ends = [("", same[0], {str(run[x]): run for run in same}) for same in groups(runs, "name", "seed").values()]
    yield "", panels("At the end of training", [""], keys, ends, "KL weight (sigma)" if sweep else "")
    steps = [(run["row"], run, run["curve"]) for run in runs if run["row"] in some]
    title, shown = "During training (KL, units: of images as masked)", ("kl_per_token", "active_units", "psnr")
    yield "_steps", panels(title, some, shown, steps, "training step")

    runs, names = [run for run in runs if run["name"] != LINEAR], [name for name in colours if name != LINEAR]
    first = [same[0] for (_, row), same in groups(runs, "name", "row").items() if row in some]
    count = 8 // len(some) + 3
    height = 1.1 + 7.6 / len(some) / count * (1 + len(names))
    figure, axes = canvas("Held-out images and their reconstructions", height, 1, len(some), sharey=True)
    for axis, row in zip(axes[0], some):
        found, originals = {run["name"]: run["views"] for run in first if run["row"] == row}, first[0]["views"]["originals"]
        rest = [found[name]["reconstructions"] if name in found else originals * 0 + 255 for name in names]
        images = torch.stack([originals, *rest])[:, :count]
        axis.imshow(images.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy(), extent=(0, images.shape[1], len(images), 0))
        axis.set(title=row, xticks=[], yticks=np.arange(len(images)) + 0.5, yticklabels=["held out", *names])
    yield "_images", figure

    clouds = [run for run in first if not sweep or run["name"] in ("nothing", "mixed mask", "all")] or first
    title, down = "Images in latent space (means; a sample adds noise of a std up to 1)", -(-len(clouds) // 3)
    figure, axes = canvas(title, 1 + 2.4 * down, down, 3, sharex=True, sharey=True)
    for axis, run in zip(axes.flat, clouds):
        dots = axis.scatter(*run["views"]["components"].numpy().T, c=run["views"]["labels"].numpy(), cmap="tab10", s=5)
        axis.set(title=f"{run['name']} {run['row']}", xlabel="first principal component", ylabel="second")
    for axis in axes.flat[len(clouds) :]:
        axis.set_axis_off()
    figure.legend(dots.legend_elements()[0], run["views"]["classes"], loc="outside right center")
    yield "_latents", figure

    figure, axes = canvas("Each dot is a run", 4.5)
    for (name,), same in groups(runs, "name").items():
        x, y, sizes = zip(*((run[keys[sweep]], run["probe"], 20 + 30 * rows.index(run["row"])) for run in same))
        axes[0, 0].scatter(x, y, sizes, colours[name], label=name, alpha=0.7)
    axes[0, 0].set(xlabel=MEASURES[keys[sweep]], ylabel=MEASURES["probe"])
    figure.legend(loc="outside right center", title="larger: larger sigma" if sweep else "")
    yield "_probe", figure


def main(arguments: list[str]) -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("experiment", choices=EXPERIMENTS)
    add("--seeds", type=within(int, 1), default=3, help="of every cell (default: 3)")
    add("--steps", type=within(int, 1), help="of the tokenizer, and as many of SiT")
    add("--out", help="folder (default: lab, with --quick lab_quick)")
    add("--only", default="", help="cells with this in their names")
    for flag, about in ("quick", "few cells and steps, one seed"), ("plan", "say what would run"), ("draw", "only draw again"):
        add(f"--{flag}", action="store_true", help=about)
    args, extra = parser.parse_known_args(arguments)
    name, out = args.experiment, Path(args.out or ("lab_quick" if args.quick else "lab"))
    cells = [cell for cell in plan(name, out, args.seeds, args.quick, args.steps, extra) if args.only in cell.name]
    runs = [read_cell(cell) for cell in cells]
    todo, took = [cell for cell, run in zip(cells, runs) if not run], [run["seconds"] / 60 for run in runs if run]
    print(f"{len(todo)} of {len(cells)} to do: {len(todo) * np.mean(took or [1]):.0f} minutes, {'as before' if took else '1 each'}")
    if args.plan:
        return print("\n".join(f"{cell.folder}: {'to do' if cell in todo else 'done'}" for cell in cells))
    for cell in (bar := progress([] if args.draw else todo, "runs", Processes.start("cpu"))):
        bar.set_description(cell.folder.name)
        run_cell(cell)
    if not (runs := [run for run in map(read_cell, cells) if run]):
        raise UserError(f"{out / name} has no finished run of these cells; run the same command without --draw")
    runs += linear_optima(runs) if name == "collapse" else []
    count, minutes = sum("views" in run for run in runs), sum(run.get("seconds", 0) for run in runs) / 60
    text = f"# {name}: {count} of {len(cells)} runs, {minutes:.0f} minutes\n\n{table(runs)}"
    try:
        for ending, figure in draw(runs, name == "collapse"):
            with replacing(out / f"{name}{ending}.png") as temporary:
                figure.savefig(temporary, format="png")
            text += f"\n![{name}{ending}]({name}{ending}.png)\n"
    except ImportError:
        warn("there are no pictures without matplotlib; pip install matplotlib, then the same command with --draw")
    write_text(text, out / f"{name}.md")
    print(text)


if __name__ == "__main__":
    command_line(main)
