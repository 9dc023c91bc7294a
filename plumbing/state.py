"""What a training loop needs besides its method: run, draws of a step, frozen networks, optimizers, checkpoints, log."""

import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from align import DINO, TEACHERS, CellHOG
from plumbing.data import ImageFolder, Shapes, open_dataset, split
from plumbing.run import CHECKPOINT, Processes, UserError, as_user_error, load_checkpoint, progress, save_checkpoint
from plumbing.run import stop_signals, warn
from plumbing.weights import LPIPS_FILES, OFFICIAL, load_lpips, load_official
from recipes import Config

MAX_GRAD_NORM = 1.0  # (config: SoftVQ-VAE, REPA)
MAX_BAD_STEPS = 10  # non-finite steps in a row that stop the run (ours)
COLLAPSED = 0.05  # nats per token: at or below (ours); a good code may have few active units


@dataclass
class Run:
    """What all stages share."""

    config: Config
    processes: Processes
    data: ImageFolder | Shapes
    train_items: np.ndarray
    eval_items: np.ndarray
    dry: bool = False  # measure only: missing official files leave networks as they are made
    bf16: bool = False  # matrix products in bf16
    compile: bool = False  # the transformer blocks
    inception: nn.Module | None = None  # where its file is at hand

    @staticmethod
    def open(config: Config, processes: Processes, dry: bool = False, precision: str | None = None, compile=False) -> "Run":
        """Find the data and split it. precision: "bf16", "float32", or None for what suits the device."""
        data = open_dataset(config.data, config.image_size)
        if len(data) < 2:
            raise UserError(f"{config.data} has only one image; two are the least")
        native = processes.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = native if precision is None else precision == "bf16"
        return Run(config, processes, data, *split(len(data), config.eval_images), dry, bf16, compile)

    @property
    def device(self) -> torch.device:
        return self.processes.device

    def path(self, name: str) -> Path:
        return Path(self.config.out) / name

    def place(self, network: nn.Module) -> nn.Module:
        """On this process's device, with compiled transformer blocks if asked for."""
        for module in network.modules() if self.compile else ():
            for block in getattr(module, "blocks", ()):
                block.compile()
        return network.to(self.device)

    def autocast(self) -> torch.autocast:
        """Matrix products in bf16 if asked for; weights and losses stay in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, self.bf16)


def draw(run: Run, stage: str, step: int, batch: int, pieces: list[slice], uniform: dict, normal: dict, alike: tuple = ()) -> list:
    """All random numbers of a step, {name: shape per image} -> for each piece of the global batch its tensors by name.

    They are a function of (seed, stage, step), drawn for the whole batch: so a resumed run equals an unbroken one, and the
    process count changes nothing. Of names in `alike` all images have the first one's.
    """
    seed = np.random.SeedSequence([run.config.seed, zlib.crc32(stage.encode()), step]).generate_state(1, np.uint64)[0]
    where = {"generator": torch.Generator(run.device).manual_seed(int(seed)), "device": run.device}
    draws = {name: torch.rand(batch, *shape, **where) for name, shape in uniform.items()}
    draws |= {name: torch.randn(batch, *shape, **where) for name, shape in normal.items()}
    draws |= {name: draws[name][:1].expand_as(draws[name]) for name in alike}
    return [SimpleNamespace(**{name: values[piece] for name, values in draws.items()}) for piece in pieces]


def frozen_networks(run: Run, cfg: Config) -> tuple[dict[str, nn.Module], nn.Module | None, nn.Module | None]:
    """What is only looked through, with official weights: teachers (also HOG of MAETok's kind), the discriminator's DINO, LPIPS."""
    grid, teachers = cfg.image_size // cfg.patch_size, {}
    if cfg.uses_teacher:
        teachers["teacher"] = TEACHERS[cfg.teacher](grid)
    if cfg.hog_weight:
        teachers["hog"] = CellHOG(grid, cfg.patch_size)
    eye = DINO() if cfg.adversarial_weight else None
    lpips = load_lpips(cfg.weights, run.dry) if cfg.perceptual_weight else None
    for network in filter(None, (*teachers.values(), eye, lpips)):
        if hasattr(network, "vit"):
            load_official(network.vit, network.vit.name, cfg.weights, run.dry)
        run.place(network)
    return teachers, eye, lpips


def official_files(cfg: Config, stages: list[str]) -> list[str]:
    """Which official files these stages need."""
    names = []
    for stage in filter(cfg.stages.get, stages):
        at = cfg.at(stage)
        names += [at.encoder_file] if stage == next(iter(cfg.stages)) else []
        names += [at.teacher] if at.uses_teacher else []
        names += [*(LPIPS_FILES if at.perceptual_weight else ()), "dino_vits16" if at.adversarial_weight else ""]
    return [name for name in OFFICIAL if name in names]


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema = d ema + (1 - d) model, where d = min(decay, (1 + step) / (10 + step)) warms up (ours)."""
    warm = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - warm)


class State:
    """Optimizers, checkpoint and log of a stage. A loop calls it, it never calls the loop.

    Made, it goes on from the stage's checkpoint if there is one. `of` says what the stage was built on: a checkpoint of the
    same stage on something else is refused. Everything random is a function of the step, so no state of it is kept.
    """

    def __init__(self, run: Run, stage: str, networks: dict, optimizers: dict, of: str = "", extra: dict | None = None):
        self.run, self.stage, self.optimizers, self.total = run, stage, optimizers, run.config.steps(stage)
        self.networks = {name: network for name, network in networks.items() if network is not None}
        self.about = {"stage": stage, "of": of, "of_steps": self.total, "classes": list(run.data.classes), "data": run.data.stamp}
        self.about |= extra or {}
        self.step, self.parallels, self.collapsed = 0, [], False
        self.skipped = torch.zeros(3, device=run.device)  # non-finite steps: in all, in a row, most in a row since a line
        self.sums, self.counts, self.ends = {}, {}, []  # of the line to be logged; when each of its steps ended
        if saved := load_stage(run, stage, of):
            with as_user_error(f"{run.path(stage)}.pt is damaged: "):
                for name, network in self.networks.items():
                    network.load_state_dict(saved[name])
                for name, optimizer in self.optimizers.items():
                    optimizer.load_state_dict(saved["optimizers"][name])
                self.step, self.skipped = saved["step"], saved["skipped"].to(run.device)

    def save(self) -> None:
        """Rank 0 writes the stage's checkpoint."""
        if self.run.processes.first:
            about = self.about | {"step": self.step, "config": asdict(self.run.config), "skipped": self.skipped}
            optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
            networks = {name: network.state_dict() for name, network in self.networks.items()}
            save_checkpoint(about | {"optimizers": optimizers} | networks, self.run.path(f"{self.stage}.pt"))

    def parallel(self, network: nn.Module | None) -> Callable | None:
        """What to call for a trained network: with several processes DistributedDataParallel, which averages gradients."""
        if network is None:
            return None
        if self.run.processes.world > 1 and any(p.requires_grad for p in network.parameters()):
            network = DistributedDataParallel(network, gradient_as_bucket_view=True)
            self.parallels.append(network)
        return network

    def exchange(self, now: bool) -> None:
        """Whether the coming backward pass averages gradients over processes, or only adds them up here."""
        for network in self.parallels:
            network.require_backward_grad_sync = now  # what DDP's no_sync() sets

    def steps(self) -> Iterator[int]:
        """The steps still to do. Ctrl-C or SIGTERM in any process end it after the step in progress, saved."""
        processes = self.run.processes
        self.ends = [time.perf_counter()]
        with stop_signals() as received, progress(None, self.stage, processes, initial=self.step, total=self.total) as self.bar:
            while self.step < self.total:
                yield self.step
                self.bar.update()
                if processes.any(bool(received)):
                    self.save()
                    processes.barrier()  # rank 0 has saved
                    message = f"stopped at step {self.step} of stage {self.stage} and saved; run the same command again to go on"
                    sys.exit(message if processes.first else 1)

    def due(self, every: int) -> bool:
        """Whether this many steps are done again, or all; 0 = never."""
        return every > 0 and (self.step == self.total or self.step % every == 0)

    def update(self, lr: float) -> None:
        """One step of each optimizer on clipped gradients, or none if any is not finite. Never waits for the GPU.

        The gradients are equal on all processes, so that all skip the same steps.
        """
        groups = {name: optimizer.param_groups[0] for name, optimizer in self.optimizers.items()}
        active = [name for name, group in groups.items() if any(p.grad is not None for p in group["params"])]
        norms = {name: nn.utils.clip_grad_norm_(groups[name]["params"], MAX_GRAD_NORM) for name in active}
        bad = (~torch.stack(list(norms.values())).isfinite().all()).float()
        for name in active:
            groups[name]["lr"] = lr
            self.optimizers[name].found_inf = bad  # read by the fused kernel, which leaves everything as it was when this is 1
            self.optimizers[name].step()
            self.optimizers[name].zero_grad(set_to_none=True)
        in_a_row = (self.skipped[1] + 1) * bad
        self.skipped = torch.stack([self.skipped[0] + bad, in_a_row, torch.maximum(self.skipped[2], in_a_row)])
        self.add({f"{name}_grad_norm": norm for name, norm in norms.items()})
        self.step += 1
        self.ends.append(time.perf_counter())

    @torch.no_grad()
    def add(self, terms: dict[str, Tensor]) -> None:
        """Take in values, of a step or of a piece, for the next line of the log."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value.float()
            self.counts[name] = self.counts.get(name, 0) + 1

    def write_line(self, batch_size: int) -> None:
        """Average over steps and processes since the line before, and log it; UserError if the run cannot go on.

        images/s are by the median time from the end of a step to the next: saving and evaluating do not count.
        """
        processes = self.run.processes
        averages = {name: processes.sum(value / self.counts[name] / processes.world) for name, value in self.sums.items()}
        line = describe(averages) | {"lr": self.optimizers["model"].param_groups[0]["lr"]}
        line |= {"images_per_second": batch_size / float(np.median(np.diff(self.ends)))}
        line |= {"memory_gb": peak_memory(self.run.device) / 1e9, "skipped_steps": int(self.skipped[0])}
        self.append(line)
        self.bar.set_postfix_str(f"loss {line['loss']:.4f}")
        before, self.collapsed = self.collapsed, self.run.config.kl_weight > 0 and has_collapsed(line)
        if self.collapsed and not before:
            left = f"{100 * line['active_units']:.0f} % active units, {line['kl_per_token']:.3f} nats per token"
            advice = "the latents carry no image; if it lasts, lower --kl_weight"
            warn(f"the posterior has collapsed to its prior ({left}): {advice}", processes)
        if self.skipped[2] >= MAX_BAD_STEPS:
            skipped = f"{int(self.skipped[2])} steps in a row of stage {self.stage} had non-finite gradients and were skipped"
            raise UserError(f"{skipped}; the last checkpoint is kept; start again in another --out with a lower learning rate")
        self.skipped[2] = self.skipped[1]
        self.sums, self.counts, self.ends = {}, {}, self.ends[-1:]

    def append(self, line: dict) -> None:
        """A line of log.jsonl, null for what JSON cannot say. A resumed run repeats those since its checkpoint: the last counts."""
        if self.run.processes.first:
            line = {k: (float(f"{v:.6g}") if math.isfinite(v) else None) if isinstance(v, float) else v for k, v in line.items()}
            with open(self.run.path("log.jsonl"), "a") as file:
                file.write(json.dumps({"stage": self.stage, "step": self.step, "time": round(time.time(), 1)} | line) + "\n")


def load_stage(run: Run, stage: str, of: str | None = None, finished: bool = False) -> dict | None:
    """The checkpoint of a stage, or None where there is none. UserError if damaged, of other values or data, or unfinished."""
    path, config, another = run.path(f"{stage}.pt"), run.config, "or use another --out"
    if not path.exists():
        if finished:
            raise UserError(f"{path} does not exist; run the stage {stage} first")
        return None
    saved = load_checkpoint(path, CHECKPOINT | {"data": str, "of": str})
    now = {f.name: getattr(config, f.name) for f in fields(Config) if f.metadata["fixes"] in ("all", stage)}
    now |= {"classes": list(run.data.classes), "stage": stage}
    for name, value in now.items():
        then = (saved["config"] | {"classes": saved["classes"], "stage": saved["stage"]}).get(name)
        if then != value:
            raise UserError(f"{path} was made with {name} {then}, this run has {value}; use the same value, {another}")
    if saved["data"] != run.data.stamp:
        raise UserError(f"{path} was made with other images than {config.data} now has; use those, {another}")
    if of not in (None, saved["of"]):
        raise UserError(f"{path} was trained on what another tokenizer made; move it away, {another}")
    if finished and saved["step"] < config.steps(stage):
        raise UserError(f"{path} is at step {saved['step']} of {config.steps(stage)}; finish the stage {stage} first")
    return saved


def moments(mean: Tensor, z: Tensor) -> dict[str, Tensor]:
    """First and second moments over the batch, (L, C) each: what `describe` needs, and can be averaged over batches."""
    return {"mean": mean.mean(0), "mean_square": mean.square().mean(0), "z_square": z.square().mean(0)}


def describe(averages: dict[str, Tensor]) -> dict[str, float]:
    """Averaged terms -> numbers; of the moments: KL per token (nats), active units (variance of the mean > 0.01), std."""
    numbers = {name: value.item() for name, value in averages.items() if value.ndim == 0}
    if "mean" in averages:
        variance = averages["mean_square"] - averages["mean"].square()
        numbers["kl_per_token"] = numbers["kl"] / len(variance)
        numbers["active_units"] = (variance > 0.01).float().mean().item()
        numbers["latent_std"] = (averages["z_square"] - averages["mean"].square()).mean().clamp(min=0).sqrt().item()
    return numbers


def has_collapsed(numbers: dict[str, float]) -> bool:
    """Whether the posterior has collapsed to its prior; a line without KL has not."""
    return numbers.get("kl_per_token", math.inf) <= COLLAPSED


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on the GPU, or that the process took on a CPU; 0 on Windows, which does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
