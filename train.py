"""Train MacTok: images -> tokenizer -> latents -> SiT -> samples. Run the same command again to resume.

    python train.py                                                   # offline default: built-in shapes, minutes on a CPU
    python train.py --data photos/ --preset toy                       # your own images: one sub-folder per class, or flat
    python train.py --data imagenet/train --preset b256 --dry_run     # parameters, memory and time before starting
    torchrun --nproc_per_node=8 train.py --data imagenet/train --preset b256 --tokens 128 --out runs/b256

All presets but toy train the whole objective, with official weights of DINOv2, DINO, VGG16 and LPIPS, fetched before the
first step; without any: --teacher hog --encoder_init none --perceptual_weight 0 --adversarial_weight 0.

Stages, each with its own checkpoint in --out, done in turn unless --stage picks one:
    tokenizer   encoder, bottleneck and decoder with masks and alignment   -> tokenizer.pt, masks.png
    decoder     the decoder alone, without masks                           -> decoder.pt, reconstructions.png
    latents     encode the data set once                                   -> latents.bin
    sit         the flow-matching transformer on the latents               -> sit.pt, samples.png
"""

import copy
import gc
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import masking
from align import HOG, VITS, Alignment, DINOv2, ViT
from data import LPIPS_FILES, OFFICIAL, BadFiles, BatchSampler, ImageFolder, LatentCache, Parser, Processes, Shapes
from data import UserError, as_user_error, at_hand, batch_indices, command_line, file_hash, fill, find_official
from data import load_checkpoint, loader, official_path, progress, replacing, save_checkpoint, split, spread
from data import state_hash, to_float, write_image, write_text
from fid import InceptionV3, batch_rows, frechet_distance, gather, inception_features, load_inception
from fid import psnr, ssim, statistics
from losses import DRAWS, LPIPS, Adversary, Phase, PixelLosses, load_lpips
from sample import Run, SamplerSettings, build_tokenizer, class_grid, default_guidance, generate, label_of, reconstruct
from sit import SiT, SiTBlock, drop_labels, flow_matching_loss
from tokenizer import SIZES, Block, Tokenizer, load_dinov2

STAGES = ("tokenizer", "decoder", "latents", "sit")
MASKS = ("mixed", "random", "semantic", "latent", "none")
MAX_GRAD_NORM = 1.0  # (ours)
MAX_BAD_STEPS = 10  # non-finite steps in a row that stop the run (ours)


def arg(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. Defaults are the toy preset's; "paper" and "ours" say where a full-size value comes from."""

    data: str = arg("", "folder of images, one sub-folder per class or flat (empty: the built-in shapes)")
    out: str = arg("out", "folder for checkpoints, log.jsonl, result.json and pictures")
    seed: int = arg(0, "of everything random")
    # the tokenizer
    image_size: int = arg(32, "pixels; images are centre-cropped (paper: 256, 512)")
    patch_size: int = arg(0, "pixels; 0 = the largest power of two for which L divides N (ours: 16)")
    tokens: int = arg(16, "L, latent tokens per image (paper: 128, 64)")
    channels: int = arg(16, "C, channels per token (paper: 32)")
    size: str = arg("toy", "tokenizer size: toy, S, B, BL (paper: B)")
    teacher: str = arg("hog", "what z is aligned with: hog, dinov2_vitb14 (paper), or another official DINOv2")
    encoder_init: str = arg(
        "none", "DINOv2 of the encoder's width that it starts from (paper), such as dinov2_vitb14, or none"
    )
    weights: str = arg("", "folder with official weight files (empty: torch hub's cache, filled from the internet)")
    mask: str = arg("mixed", "mixed (paper), random, semantic, none, or latent (the paper's failing ablation)")
    mask_ratio: float = arg(0.4, "M in m = max(0, U(-0.1, M)) (paper: 0.7)")
    kl_weight: float = arg(1e-6, "of KL, summed over L and C (ours: 1e-6)")
    align_weight: float = arg(0.02, "of local + global alignment (ours: 0.1)")
    perceptual_weight: float = arg(0.0, "of LPIPS (ours: 1.0)")
    perceptual_warmup: int = arg(200, "steps over which that weight grows to its value (ours: 10000)")
    adversarial_weight: float = arg(0.0, "of the adversarial loss, times the adaptive weight (ours: 0.2)")
    discriminator_start: int = arg(400, "step at which the discriminator begins to train (ours: 20000)")
    discriminator_delay: int = arg(100, "steps that it trains before its gradient reaches the decoder (ours: 5000)")
    # its training
    batch_size: int = arg(16, "images per step over all processes (paper: 256; 128 at 512 px)")
    micro_batch: int = arg(0, "images per forward and process, the rest is accumulated; 0 = all of the process's share")
    lr: float = arg(2e-3, "peak, AdamW, cosine to zero (paper: 1e-4)")
    warmup_steps: int = arg(50, "linear warm-up of lr (paper: 5000; 10000 at 512 px)")
    tokenizer_steps: int = arg(2400, "steps of stage tokenizer (paper: 250000; 500000 at 512 px)")
    decoder_steps: int = arg(150, "steps of stage decoder (paper: 10 epochs)")
    # SiT and its training
    sit: str = arg("toy", "SiT size: toy, S, B, L, XL (paper: XL)")
    sit_batch_size: int = arg(64, "latents per step over all processes (paper: 256)")
    sit_micro_batch: int = arg(0, "latents per forward and process, as micro_batch")
    sit_lr: float = arg(1e-3, "constant (paper: 1e-4)")
    sit_steps: int = arg(2000, "steps of stage sit (ours: 400000)")
    sample_steps: int = arg(50, "solver steps of the samples at the end (paper: 250)")
    guidance: float = arg(3.0, "scale of the samples at the end (paper: 2.3 for 128 tokens, 2.4 for 64)")
    # the run
    ema_decay: float = arg(0.999, "of the weights that are evaluated, after a warm-up (paper: 0.9999)")
    eval_every: int = arg(800, "steps between evaluations of held-out images, which are also evaluated at the end")
    eval_images: int = arg(256, "images held out for PSNR and SSIM, at most a tenth of the data (ours)")
    log_every: int = arg(50, "steps between lines of log.jsonl")
    save_every: int = arg(500, "steps between checkpoints")
    workers: int = arg(0, "data-loading processes per training process")
    compile: bool = arg(False, "torch.compile the networks")


FULL = {
    "image_size": 256, "patch_size": 16, "tokens": 128, "channels": 32, "size": "B",
    "mask_ratio": 0.7, "align_weight": 0.1, "teacher": "dinov2_vitb14", "encoder_init": "dinov2_vitb14",
    "perceptual_weight": 1.0, "perceptual_warmup": 10_000,
    "adversarial_weight": 0.2, "discriminator_start": 20_000, "discriminator_delay": 5_000,
    "batch_size": 256, "micro_batch": 32, "lr": 1e-4, "warmup_steps": 5_000, "tokenizer_steps": 250_000, "decoder_steps": 50_000,
    "sit": "XL", "sit_batch_size": 256, "sit_lr": 1e-4, "sit_steps": 400_000, "sample_steps": 250, "guidance": 2.3,
    "ema_decay": 0.9999, "eval_every": 10_000, "eval_images": 5_000, "log_every": 100, "save_every": 5_000, "workers": 8,
}  # fmt: skip
AT_512 = {
    "image_size": 512, "batch_size": 128, "micro_batch": 8, "warmup_steps": 10_000, "tokenizer_steps": 500_000,
    "decoder_steps": 100_000,
}  # fmt: skip
PRESETS = {
    "toy": {},
    "s256": FULL | {"size": "S", "encoder_init": "dinov2_vits14"},
    "b256": FULL,
    "b512": FULL | AT_512,
    "bl512": FULL | AT_512 | {"size": "BL", "tokens": 64, "guidance": 2.4},
}

POSITIVE = "tokenizer_steps decoder_steps sit_steps batch_size sit_batch_size sample_steps".split()
POSITIVE += "eval_every eval_images log_every save_every".split()
NOT_NEGATIVE = "micro_batch sit_micro_batch warmup_steps workers seed kl_weight align_weight lr sit_lr guidance".split()
NOT_NEGATIVE += "perceptual_weight perceptual_warmup adversarial_weight discriminator_start discriminator_delay".split()
# Fields that may differ between a checkpoint and its resumption: for every stage, and those that a stage does not read.
FREE = set(
    "data out weights micro_batch sit_micro_batch eval_every log_every save_every workers compile guidance sample_steps".split()
)
SIT_FIELDS = set("sit sit_batch_size sit_lr sit_steps".split())
UNREAD = {"tokenizer": SIT_FIELDS | {"decoder_steps"}, "decoder": SIT_FIELDS}
UNREAD["sit"] = {"sit_steps", "decoder_steps"}  # its learning rate is constant: it may be trained for longer


def parse_config(arguments: list[str]) -> tuple[Config, str, bool]:
    """Command line -> resolved config, stage ("all" or one of STAGES), dry_run. Raises UserError."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--preset", choices=PRESETS, help="toy (default without --data), b256 (default with --data), s256, b512, bl512"
    )
    parser.add_argument("--stage", default="all", choices=("all", *STAGES))
    parser.add_argument(
        "--dry_run", action="store_true", help="print parameters, batch split, memory and one measured step, then stop"
    )
    for f in fields(Config):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        parser.add_argument(f"--{f.name}", default=None, help=f"{f.metadata['help']} [{f.default}]", **kind)
    given = vars(parser.parse_args(arguments))
    preset, stage, dry_run = (given.pop(key) for key in ("preset", "stage", "dry_run"))
    preset = preset or ("b256" if given["data"] else "toy")
    values = PRESETS[preset] | {key: value for key, value in given.items() if value is not None}
    config = Config(**values)
    if config.patch_size == 0:
        config = Config(**asdict(config) | {"patch_size": largest_patch(config.image_size, config.tokens)})
    return config, stage, dry_run


def largest_patch(image_size: int, tokens: int) -> int:
    """The largest power of two p, up to an eighth of the image, for which L divides N = (image_size / p)^2; 1 if there is none."""
    candidates = [1 << k for k in range(10) if image_size % (1 << k) == 0 and 8 << k <= image_size]
    fitting = [p for p in candidates if tokens > 0 and (image_size // p) ** 2 % tokens == 0]
    return max(fitting, default=1)


def check_config(config: Config, processes: Processes) -> None:
    """Raises UserError for values that cannot be trained with, before anything is read or written."""
    for name in POSITIVE + NOT_NEGATIVE:
        value, least = getattr(config, name), int(name in POSITIVE)
        if not (math.isfinite(value) and value >= least):
            raise UserError(f"--{name} is {value}; it must be at least {least}")
    for name in ("mask_ratio", "ema_decay"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"--{name} is {getattr(config, name)}; it must lie in [0, 1]")
    if config.image_size < 11:
        raise UserError(f"--image_size is {config.image_size}; SSIM needs at least 11")
    if config.mask not in MASKS:
        raise UserError(f"--mask is {config.mask!r}; it must be one of {', '.join(MASKS)}")
    teachers = [name for name in VITS if name.startswith("dinov2")]
    for name, other in (("teacher", "hog"), ("encoder_init", "none")):
        if getattr(config, name) not in (other, *teachers):
            raise UserError(
                f"--{name} is {getattr(config, name)!r}; it must be {other}, or one of {', '.join(teachers)}"
            )
    if config.adversarial_weight and config.image_size % 16:
        raise UserError(f"--image_size is {config.image_size}; the discriminator's DINO needs a multiple of 16")
    if config.perceptual_weight and config.image_size < 16:
        raise UserError(f"--image_size is {config.image_size}; LPIPS needs at least 16")
    for prefix in ("", "sit_"):
        micro_rows(getattr(config, f"{prefix}batch_size"), getattr(config, f"{prefix}micro_batch"), processes, prefix)
    with as_user_error(), torch.device("meta"):
        build_tokenizer(asdict(config))
        SiT(config.tokens, config.channels, 0, config.sit)
    encoder = SIZES[config.size][0]
    if config.encoder_init != "none" and VITS[config.encoder_init][:3] != encoder:
        raise UserError(
            f"--encoder_init {config.encoder_init} has another width or depth than the encoder of {config.size}"
        )


def micro_rows(batch: int, micro_batch: int, processes: Processes, prefix: str = "") -> list[slice]:
    """The rows of the global batch that this process computes, in pieces of micro_batch: gradients are summed over them."""
    if batch % processes.world:
        raise UserError(
            f"--{prefix}batch_size {batch} cannot be divided among {processes.world} processes; "
            f"use a multiple of {processes.world}"
        )
    share = processes.share(batch)
    micro = min(micro_batch or len(share), len(share))
    if len(share) % micro:
        raise UserError(
            f"--{prefix}micro_batch {micro} does not divide the {len(share)} rows that each process takes of "
            f"--{prefix}batch_size {batch}"
        )
    return [slice(start, start + micro) for start in range(share.start, share.stop, micro)]


def official_files(config: Config, stages: list[str]) -> list[str]:
    """Which official files (data.OFFICIAL) these stages need."""
    names = [config.teacher, config.encoder_init] if "tokenizer" in stages else []
    if "tokenizer" in stages or "decoder" in stages:
        names += LPIPS_FILES if config.perceptual_weight else ()
        names += ["dino_vits16"] if config.adversarial_weight else []
    return [name for name in OFFICIAL if name in names]


def objective_text(config: Config) -> str:
    """The objective in one line, with what is missing in it."""
    terms = ["MSE", f"{config.kl_weight:g} KL", f"{config.align_weight:g} alignment with {config.teacher}"]
    if config.perceptual_weight:
        terms.append(f"{config.perceptual_weight:g} LPIPS (grows over {config.perceptual_warmup} steps)")
    if config.adversarial_weight:
        joins = config.discriminator_start + config.discriminator_delay
        terms.append(f"{config.adversarial_weight:g} adversarial (from step {joins})")
    off = [] if config.perceptual_weight else ["LPIPS (--perceptual_weight)"]
    off += [] if config.adversarial_weight else ["discriminator (--adversarial_weight)"]
    return " + ".join(terms) + (f"; off: {', '.join(off)}, which need official weights" if off else "")


def load_vit(name: str, context: "Context") -> ViT:
    """The official ViT of that name; in a dry run with random weights where its file is missing."""
    return ViT(name) if absent(context, name) else fill(ViT(name), name, context.config.weights)


def absent(context: "Context", *names: str) -> bool:
    """Whether this is a dry run that has to do without these official files."""
    return context.dry and not at_hand(context.config.weights, *names)


def frozen(network: nn.Module, context: "Context") -> nn.Module:
    """In inference form: no gradients, no dropout, on the device, compiled with the rest."""
    if context.config.compile:
        compile_blocks(network)
    return network.to(context.processes.device).eval().requires_grad_(False)


def load_teacher(context: "Context") -> nn.Module:
    """The frozen teacher, with patches on the tokenizer's grid."""
    config = context.config
    grid = config.image_size // config.patch_size
    if config.teacher == "hog":
        return HOG(grid)
    return frozen(DINOv2(load_vit(config.teacher, context), grid), context)


def pixel_losses(context: "Context") -> PixelLosses:
    """With the networks that the configuration asks for."""
    config, lpips, vit = context.config, None, None
    if config.perceptual_weight:
        lpips = LPIPS() if absent(context, *LPIPS_FILES) else load_lpips(config.weights)
        frozen(lpips, context)
    if config.adversarial_weight:
        vit = frozen(load_vit("dino_vits16", context), context)
    return PixelLosses(lpips, vit)


# ---------------------------------------------------------------------------------------------------------------------
# What is trained: modules whose forward gives a loss and named values to log


def phase_at(config: Config, step: int) -> Phase:
    """`step` counts on through stages tokenizer and decoder."""
    ramp = min(1.0, (step + 1) / max(1, config.perceptual_warmup))
    started = config.adversarial_weight > 0 and step >= config.discriminator_start
    joined = step >= config.discriminator_start + config.discriminator_delay
    return Phase(config.perceptual_weight * ramp, started, config.adversarial_weight * (started and joined))


class TokenizerObjective(nn.Module):
    """Paper eq. 7: reconstruction, perceptual and adversarial terms, KL, alignment."""

    def __init__(self, config: Config, tokenizer: Tokenizer, teacher_width: int, pixel: PixelLosses):
        super().__init__()
        self.tokenizer, self.pixel = tokenizer, pixel
        self.alignment = Alignment(config.channels, tokenizer.decoder.from_latent.out_features, teacher_width)
        self.kl_weight, self.align_weight = config.kl_weight, config.align_weight

    def forward(
        self,
        images: Tensor,
        mask: Tensor,
        latent_mask: Tensor | None,
        noise: Tensor,
        cls: Tensor,
        patches: Tensor,
        phase: Phase,
        u: Tensor | None,
    ):
        posterior = self.tokenizer.encode(images, mask)
        z = posterior.sample(noise)
        shown = z if latent_mask is None else z.masked_fill(latent_mask[..., None], 0)  # 0 is the prior's mean (ours)
        last_layer = self.tokenizer.decoder.to_pixels.weight
        loss, logs = self.pixel(self.tokenizer.decode(shown), images, last_layer, phase, u)
        kl = posterior.kl().sum(1).mean()
        local, global_ = self.alignment(z, cls, patches)
        loss = loss + self.kl_weight * kl + self.align_weight * (local + global_)
        logs = {"loss": loss, **logs, "kl": kl, "align_local": local, "align_global": global_}
        return loss, {key: value.detach() for key, value in (logs | moments(posterior.mean, z)).items()}


def moments(mean: Tensor, z: Tensor) -> dict[str, Tensor]:
    """First and second moments over the batch, (L, C) each: what `describe` needs, and can be averaged over batches."""
    return {"mean": mean.mean(0), "mean_square": mean.square().mean(0), "z_square": z.square().mean(0)}


def describe(logs: dict[str, Tensor]) -> dict[str, float]:
    """Averaged logs -> numbers; the moments become KL per token (nats), active units (variance of the mean > 0.01) and std of z."""
    numbers = {key: value.item() for key, value in logs.items() if value.ndim == 0}
    if "mean" in logs:
        variance = logs["mean_square"] - logs["mean"].square()
        numbers["kl_per_token"] = numbers["kl"] / len(variance)
        numbers["active_units"] = (variance > 0.01).float().mean().item()
        numbers["latent_std"] = (logs["z_square"] - logs["mean"].square()).mean().clamp(min=0).sqrt().item()
    return numbers


def collapse_warning(numbers: dict[str, float]) -> str:
    """A sentence when the posterior has collapsed to its prior, else ""."""
    kl = numbers.get("kl_per_token", math.inf)
    if not math.isfinite(kl) or (kl > 0.05 and numbers["active_units"] > 0.05):
        return ""
    return (
        f"warning: the posterior has collapsed to its prior ({100 * numbers['active_units']:.0f} % active units, "
        f"{kl:.3f} nats per token): the latents carry no image; lower --kl_weight or use --mask mixed"
    )


class DecoderObjective(nn.Module):
    """Section 4.1: the encoder is frozen and unmasked, the decoder learns to reconstruct from its samples."""

    def __init__(self, tokenizer: Tokenizer, pixel: PixelLosses):
        super().__init__()
        self.tokenizer, self.pixel = tokenizer.requires_grad_(False), pixel
        self.tokenizer.decoder.requires_grad_(True)

    def forward(self, images: Tensor, noise: Tensor, phase: Phase, u: Tensor | None):
        with torch.no_grad():
            z = self.tokenizer.encode(images).sample(noise)
        last_layer = self.tokenizer.decoder.to_pixels.weight
        loss, logs = self.pixel(self.tokenizer.decode(z), images, last_layer, phase, u)
        return loss, {key: value.detach() for key, value in ({"loss": loss} | logs).items()}


class SiTObjective(nn.Module):
    """Flow matching on normalised latents, with label dropout."""

    def __init__(self, sit: SiT):
        super().__init__()
        self.sit = sit

    def forward(self, x: Tensor, y: Tensor, t: Tensor, noise: Tensor):
        loss = flow_matching_loss(self.sit, x, y, t, noise).mean()
        return loss, {"loss": loss.detach()}


# ---------------------------------------------------------------------------------------------------------------------
# The training loop


# (local batch, its rows, which rows of the global batch those are, step, generator) -> arguments of the objective's forward
Inputs = Callable[[tuple, slice, slice, int, torch.Generator], tuple]


@dataclass
class Job:
    """One stage as data, for `fit`."""

    stage: str
    objective: nn.Module  # forward(*inputs) -> loss, logs; holds every trained parameter
    model: nn.Module  # the part of it whose moving average is kept and evaluated
    inputs: Inputs
    batches: Callable[[int], Iterator]  # first step -> this process's batches from there on
    batch_size: int
    micro_batch: int
    steps: int
    lr: Callable[[int], float]  # step -> learning rate
    evaluate: Callable[[nn.Module], dict] = lambda average: {}  # the moving average -> numbers for log.jsonl
    extra: dict = field(default_factory=dict)  # goes into the checkpoint
    adversary: Adversary | None = None  # a part of the objective with its own optimizer
    joins: int = -1  # the step at which it begins to train


@dataclass
class Context:
    """What all stages share."""

    config: Config
    processes: Processes
    dataset: ImageFolder | Shapes
    train_items: np.ndarray
    eval_items: np.ndarray
    bad: BadFiles
    dry: bool = False  # only a dry run
    inception: InceptionV3 | None = None  # where its file is at hand

    def path(self, name: str) -> Path:
        return Path(self.config.out) / name


def fit(job: Job, context: Context) -> nn.Module:
    """Train job.objective from its checkpoint, if there is one, to job.steps; returns the moving average of job.model."""
    config, processes = context.config, context.processes
    job.objective.to(processes.device).train()
    ema = copy.deepcopy(job.model).requires_grad_(False).eval()
    optimizers = make_optimizers(job)
    first = resume(job, context, ema, optimizers)
    if processes.first:  # not before: a refused command must not rewrite what the run was made with
        write_text(json.dumps(asdict(config), indent=1), context.path("config.json"))
    if first >= job.steps:
        return ema
    if config.compile:
        compile_blocks(job.objective)
    pieces = micro_rows(job.batch_size, job.micro_batch, processes)
    skipped = torch.zeros(2, device=processes.device)  # non-finite steps: in all, and in a row
    meter = Meter(job, context, first)
    batches = job.batches(first)
    with StopSignals() as stop:
        bar = progress(range(first, job.steps), job.stage, processes, initial=first, total=job.steps)
        for step in bar:
            if step == first or (job.adversary and step == job.joins):
                forward = None
                gc.collect()  # an earlier DDP is part of a cycle, and would keep its buckets
                forward = parallel(job, step, processes)
            accumulate(forward, job, context, next(batches), pieces, step, meter)
            norms = update(optimizers, job.lr(step), skipped)
            update_ema(ema, job.model, min(config.ema_decay, (1 + step) / (10 + step)))
            if job.adversary and step >= job.joins:
                job.adversary.finish_step(lambda total: processes.sum(total) / (len(pieces) * processes.world))
            meter.add(norms, 1)
            done = step + 1
            if done % config.log_every == 0 or done == job.steps:
                line = meter.write(done, job.lr(step), skipped)
                bar.set_postfix_str(f"loss {line['loss']:.4f}")
            stopping = processes.any(stop.received)
            if stopping or done % config.save_every == 0 or done == job.steps:
                save(job, context, ema, optimizers, done)
            if done % config.eval_every == 0 and done < job.steps and not stopping:
                meter.append({"stage": job.stage, "step": done, **job.evaluate(ema)})
            if stopping:
                processes.barrier()  # rank 0 has saved
                message = f"stopped at step {done} of stage {job.stage} and saved; run the same command again to go on"
                sys.exit(message if processes.first else 1)
    return ema


def make_optimizers(job: Job) -> dict[str, torch.optim.Optimizer]:
    """AdamW (paper B.1) for the model, and one for the discriminator, which takes no memory before it has gradients."""
    groups = {"model": [p for p in job.objective.parameters() if p.requires_grad]}
    if job.adversary:
        groups["discriminator"] = list(job.adversary.parameters())
    settings = {"lr": job.lr(0), "betas": (0.9, 0.95), "weight_decay": 1e-4, "fused": True}
    return {name: torch.optim.AdamW(group, **settings) for name, group in groups.items()}


def compile_blocks(network: nn.Module) -> None:
    """torch.compile each transformer block in place: one compilation serves all of a kind, and the rest stays plain."""
    for module in network.modules():
        if isinstance(module, Block | SiTBlock | LPIPS):
            module.compile()


def parallel(job: Job, step: int, processes: Processes) -> nn.Module:
    """What to call for the loss. DDP must know what is trained, so it is made again when the discriminator joins."""
    if job.adversary:
        job.adversary.requires_grad_(step >= job.joins)
    if processes.world == 1:
        return job.objective
    return DistributedDataParallel(job.objective, forward_sync_buffers=False, gradient_as_bucket_view=True)


def accumulate(
    forward: nn.Module, job: Job, context: Context, batch: tuple, pieces: list[slice], step: int, meter: "Meter"
) -> None:
    """Gradients of the mean loss over the global batch, in pieces; they are exchanged once, with the last piece."""
    device = context.processes.device
    for rows in pieces:
        local = slice(rows.start - pieces[0].start, rows.stop - pieces[0].start)
        generator = step_generator(context.config.seed, job.stage, step, device)
        waiting = rows is not pieces[-1] and context.processes.world > 1
        with forward.no_sync() if waiting else nullcontext():
            with autocast(device):
                loss, logs = forward(*job.inputs(batch, local, rows, step, generator))
            (loss / len(pieces)).backward()
        meter.add(logs, 1 / len(pieces))


def update(optimizers: dict[str, torch.optim.Optimizer], lr: float, skipped: Tensor) -> dict[str, Tensor]:
    """One AdamW step on clipped gradients, or none if any is not finite -> gradient norms. Never waits for the GPU.

    The gradients are equal on all processes, so that all skip the same steps. skipped = (in all, in a row) is updated.
    """
    groups = {name: optimizer.param_groups[0] for name, optimizer in optimizers.items()}
    active = [name for name, group in groups.items() if any(p.grad is not None for p in group["params"])]
    norms = {name: nn.utils.clip_grad_norm_(groups[name]["params"], MAX_GRAD_NORM) for name in active}
    bad = (~torch.stack(list(norms.values())).isfinite().all()).float()
    for name in active:
        groups[name]["lr"] = lr
        optimizers[name].found_inf = bad  # the fused kernel leaves everything as it was when this is 1
        optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)
    skipped[0] += bad
    skipped[1] = (skipped[1] + 1) * bad
    return {f"{name}_grad_norm": norm for name, norm in norms.items()}


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * model."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def autocast(device: torch.device):
    """bf16 on CUDA; master weights, norms, losses and the CPU stay in float32."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def step_generator(seed: int, stage: str, step: int, device: torch.device) -> torch.Generator:
    """The random numbers of one step. They are drawn for the whole global batch, of which each process keeps its rows:

    a resumed run equals an unbroken one, and the process count changes nothing.
    """
    number = np.random.SeedSequence([seed, STAGES.index(stage), step]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(number))


def warmup_cosine(config: Config) -> Callable[[int], float]:
    """Linear over warmup_steps to lr, then cosine to zero at tokenizer_steps."""

    def lr(step: int) -> float:
        ramp = min(1.0, (step + 1) / max(1, config.warmup_steps))
        return config.lr * ramp * 0.5 * (1 + math.cos(math.pi * step / config.tokenizer_steps))

    return lr


class StopSignals:
    """Remembers SIGINT or SIGTERM while training, so that the step in progress ends and is saved. A second Ctrl-C kills."""

    def __enter__(self) -> "StopSignals":
        self.received = False
        self.previous = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, _frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True


class Meter:
    """Averages what is logged on the device, and writes a line of log.jsonl every log_every steps."""

    def __init__(self, job: Job, context: Context, first: int):
        self.job, self.context = job, context
        self.path = context.path("log.jsonl")
        self.warned = False
        if context.processes.first:
            drop_lines_after(self.path, job.stage, first)
        if context.processes.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.reset(first)

    def reset(self, step: int) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}
        self.start, self.time = step, time.perf_counter()

    @torch.no_grad()
    def add(self, logs: dict[str, Tensor], weight: float) -> None:
        for key, value in logs.items():
            self.sums[key] = self.sums.get(key, 0) + weight * value.float()
            self.weights[key] = self.weights.get(key, 0) + weight

    def write(self, step: int, lr: float, skipped: Tensor) -> dict:
        """Average over steps and processes, print warnings, append the line, return it; UserError if the run cannot go on."""
        processes, steps = self.context.processes, step - self.start
        averages = {key: processes.sum(value / self.weights[key] / processes.world) for key, value in self.sums.items()}
        seconds = time.perf_counter() - self.time
        line = {"stage": self.job.stage, "step": step, **describe(averages), "lr": lr}
        line["images_per_second"] = self.job.batch_size * steps / seconds
        line["memory_gb"] = peak_memory(processes.device) / 1e9
        line["skipped_steps"] = int(skipped[0])
        line["bad_images"] = self.context.bad.check(processes)
        self.reset(step)
        self.append(line)
        if processes.first:
            warning = collapse_warning(line)
            if warning and not self.warned:
                tqdm.write(warning, file=sys.stderr)
            self.warned = bool(warning)
        if skipped[1] >= MAX_BAD_STEPS:
            raise UserError(
                f"the last {int(skipped[1])} steps of stage {self.job.stage} had non-finite gradients and were skipped; "
                f"the last checkpoint is kept; start again in another --out with a lower learning rate"
            )
        return line

    def append(self, line: dict) -> None:
        if self.context.processes.first:
            with open(self.path, "a") as file:
                file.write(json.dumps({key: tidy(value) for key, value in line.items()}) + "\n")


def tidy(value: float | int | str) -> float | int | str | None:
    """Six significant digits; null for what JSON cannot say."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def drop_lines_after(path: Path, stage: str, step: int) -> None:
    """Remove the lines that a killed run logged after its last checkpoint."""
    if not path.exists():
        return
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    kept = [line for line in lines if line["stage"] != stage or line["step"] <= step]
    if len(kept) < len(lines):
        write_text("".join(json.dumps(line) + "\n" for line in kept), path)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on the GPU, or that the process took on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # Windows has no such counter in the standard library
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def save(job: Job, context: Context, ema: nn.Module, optimizers: dict[str, torch.optim.Optimizer], step: int) -> None:
    """Rank 0 writes the stage's checkpoint; everything random is a function of the step, so no state of it is kept."""
    if context.processes.first:
        content = {
            "stage": job.stage, "step": step, "config": asdict(context.config), "classes": list(context.dataset.classes),
            "images": len(context.dataset), "model": job.objective.state_dict(), "ema": ema.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()}, **job.extra,
        }  # fmt: skip
        save_checkpoint(content, context.path(f"{job.stage}.pt"))


def resume(job: Job, context: Context, ema: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> int:
    """Load the stage's checkpoint if there is one -> the first step still to do. UserError if it is of another run."""
    saved = load_stage(context, job.stage)
    if saved is None:
        return 0
    job.objective.load_state_dict(saved["model"])
    ema.load_state_dict(saved["ema"])
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(saved["optimizers"][name])
    return saved["step"]


def load_stage(context: Context, stage: str) -> dict | None:
    """The checkpoint of a stage, or None where there is none. UserError if it is damaged or of another run."""
    path = context.path(f"{stage}.pt")
    if not path.exists():
        return None
    saved = load_checkpoint(path, mmap=True)
    check_same_run(path, saved, context, stage)
    if stage == "sit" and saved["stamp"] != encoder_stamp(context, load_trained_tokenizer(context)):
        raise UserError(f"{path} was trained on latents of another tokenizer; move it away, or use another --out")
    return saved


def is_done(context: Context, stage: str) -> bool:
    """Whether a stage has nothing left to do."""
    if stage == "latents":
        return context.path("latents.bin").exists() and bool(open_latents(context, load_trained_tokenizer(context)))
    saved = load_stage(context, stage)
    return saved is not None and saved["step"] >= getattr(context.config, f"{stage}_steps")


def check_same_run(path: Path, saved: dict, context: Context, stage: str) -> None:
    """Raises UserError, naming the first difference, when a checkpoint is not of this configuration and data."""
    if saved.get("stage") != stage or not isinstance(saved.get("config"), dict):
        raise UserError(f"{path} is not a checkpoint of stage {stage}; move it away or use another --out")
    now = {k: v for k, v in asdict(context.config).items() if k not in FREE | UNREAD[stage]}
    now |= {"classes": list(context.dataset.classes), "images": len(context.dataset)}
    then = saved["config"] | {"classes": saved["classes"], "images": saved["images"]}
    for key, value in now.items():
        if then.get(key) != value:
            raise UserError(
                f"{path} was made with {key} {then.get(key)}, this run has {value}; use the same value or another --out"
            )


# ---------------------------------------------------------------------------------------------------------------------
# The stages


def load_finished(context: Context, stage: str) -> dict:
    """The checkpoint of an earlier stage. UserError if it is missing, unfinished or of another run."""
    saved, steps = load_stage(context, stage), getattr(context.config, f"{stage}_steps")
    if saved is None:
        raise UserError(f"{context.path(stage)}.pt does not exist; run the stage {stage} first")
    if saved["step"] < steps:
        raise UserError(
            f"{context.path(stage)}.pt is at step {saved['step']} of {steps}; finish the stage {stage} first"
        )
    return saved


def image_batches(context: Context) -> Callable[[int], Iterator]:
    """first step -> endless (uint8 images, labels, bad) of this process's rows."""
    config = context.config
    share = context.processes.share(config.batch_size)

    def batches(first: int) -> Iterator:
        sampler = BatchSampler(
            context.train_items, config.batch_size, config.seed, first, slice(share.start, share.stop)
        )
        return iter(loader(context.dataset, sampler, config.workers))

    return batches


def images_and_noise(
    context: Context, batch: tuple, local: slice, rows: slice, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Images (b, 3, S, S) in [-1, 1], half of them mirrored (paper B.1), and noise (b, L, C) for their posteriors."""
    config, device = context.config, context.processes.device
    context.bad.note(batch[2][local])
    images = to_float(batch[0][local].to(device, non_blocking=True))
    mirror = torch.rand(config.batch_size, generator=generator, device=device)[rows] < 0.5
    noise = torch.randn(config.batch_size, config.tokens, config.channels, generator=generator, device=device)[rows]
    return torch.where(mirror[:, None, None, None], images.flip(-1), images), noise


def augmentation(config: Config, phase: Phase, rows: slice, generator: torch.Generator) -> Tensor | None:
    """The draws (b, 4, DRAWS) of diff_augment for four views, or None while there is no discriminator."""
    if not phase.discriminate:
        return None
    return torch.rand(config.batch_size, 4, DRAWS, generator=generator, device=generator.device)[rows]


def tokenizer_job(context: Context) -> Job:
    """Stage tokenizer: the whole objective, with masks."""
    config = context.config
    tokenizer, teacher, pixel = build_tokenizer(asdict(config)), load_teacher(context), pixel_losses(context)
    if config.encoder_init != "none" and not context.path("tokenizer.pt").exists():
        load_dinov2(tokenizer.encoder, load_vit(config.encoder_init, context).state_dict())

    def inputs(batch: tuple, local: slice, rows: slice, step: int, generator: torch.Generator) -> tuple:
        images, noise = images_and_noise(context, batch, local, rows, generator)
        cls, patches = teacher(images)
        ratio = masking.mask_ratio(config.batch_size, config.mask_ratio, generator=generator)
        mask, latent_mask = make_masks(config, ratio, rows, cls, patches, generator)
        phase = phase_at(config, step)
        return images, mask, latent_mask, noise, cls, patches, phase, augmentation(config, phase, rows, generator)

    objective = TokenizerObjective(config, tokenizer, teacher.width, pixel)
    return image_job(context, "tokenizer", objective, inputs, warmup_cosine(config), before=0)


def image_job(
    context: Context,
    stage: str,
    objective: TokenizerObjective | DecoderObjective,
    inputs: Inputs,
    lr: Callable[[int], float],
    before: int,
) -> Job:
    """A stage on images, after `before` steps of the stages that share its discriminator."""
    config = context.config
    return Job(
        stage=stage,
        objective=objective,
        model=objective.tokenizer,
        inputs=inputs,
        batches=image_batches(context),
        batch_size=config.batch_size,
        micro_batch=config.micro_batch,
        steps=getattr(config, f"{stage}_steps"),
        lr=lr,
        evaluate=lambda average: reconstruction_quality(average, context),
        adversary=objective.pixel.adversary,
        joins=config.discriminator_start - before,
    )


def make_masks(
    config: Config, ratio: Tensor, rows: slice, cls: Tensor, patches: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """config.mask, for `rows` of the global batch -> patch mask (b, N) and, for "latent" only, latent mask (b, L)."""
    nothing = torch.zeros(patches.shape[:2], dtype=torch.bool, device=patches.device)
    if config.mask == "mixed":
        return masking.mixed_mask(cls, patches, ratio, generator, rows), None
    if config.mask == "random":
        return masking.random_mask(ratio, patches.shape[1], generator)[rows], None
    if config.mask == "semantic":
        return masking.semantic_mask(cls, patches, ratio[rows]), None
    if config.mask == "latent":
        return nothing, masking.latent_mask(ratio, config.tokens, generator)[rows]
    return nothing, None


def decoder_job(context: Context) -> Job:
    """Stage decoder: from the averaged weights of stage tokenizer and its discriminator, at its peak lr / 10 (ours)."""
    config = context.config
    tokenizer, pixel = build_tokenizer(asdict(config)), pixel_losses(context)
    before = load_finished(context, "tokenizer")
    tokenizer.load_state_dict(before["ema"])
    if pixel.adversary:
        prefix = "pixel.adversary."
        state = {key.removeprefix(prefix): value for key, value in before["model"].items() if key.startswith(prefix)}
        pixel.adversary.load_state_dict(state)

    def inputs(batch: tuple, local: slice, rows: slice, step: int, generator: torch.Generator) -> tuple:
        images, noise = images_and_noise(context, batch, local, rows, generator)
        phase = phase_at(config, config.tokenizer_steps + step)
        return images, noise, phase, augmentation(config, phase, rows, generator)

    def lr(step: int) -> float:
        return config.lr / 10 * (1 - step / config.decoder_steps)

    return image_job(context, "decoder", DecoderObjective(tokenizer, pixel), inputs, lr, before=config.tokenizer_steps)


def encoder_stamp(context: Context, tokenizer: Tokenizer) -> str:
    """Hash of what the latents depend on: encoder weights and data set."""
    state = {key: value for key, value in tokenizer.state_dict().items() if key.startswith(("encoder.", "to_moments."))}
    data = {"classes": list(context.dataset.classes), "images": len(context.dataset), "train": len(context.train_items)}
    return state_hash(state | {json.dumps(data): torch.zeros(0)})


def load_trained_tokenizer(context: Context) -> Tokenizer:
    """The averaged tokenizer of stage decoder, or of stage tokenizer where there is no decoder.pt."""
    stage = "decoder" if context.path("decoder.pt").exists() else "tokenizer"
    tokenizer = build_tokenizer(asdict(context.config))
    tokenizer.load_state_dict(load_finished(context, stage)["ema"])
    return tokenizer.to(context.processes.device).eval()


def open_latents(context: Context, tokenizer: Tokenizer) -> LatentCache:
    """latents.bin. UserError if it is missing, damaged or stale."""
    return LatentCache(context.path("latents.bin"), encoder_stamp(context, tokenizer))


@torch.no_grad()
def cache_latents(context: Context) -> None:
    """Stage latents: posterior moments of each training image and its mirror image -> latents.bin."""
    config, processes, path = context.config, context.processes, context.path("latents.bin")
    tokenizer = load_trained_tokenizer(context)
    if path.exists():
        open_latents(context, tokenizer)
        return
    stamp = encoder_stamp(context, tokenizer)
    mine, count = processes.share(len(context.train_items)), len(context.train_items)
    lists = [
        [int(context.train_items[i]) for i in range(s, min(s + 64, mine.stop))]
        for s in range(mine.start, mine.stop, 64)
    ]
    sums = torch.zeros(3, config.channels, dtype=torch.float64, device=processes.device)
    header = {"stamp": stamp, "count": count, "shape": [config.tokens, config.channels]}
    with replacing(path) if processes.first else nullcontext(path.with_name(path.name + ".tmp")) as temporary:
        if processes.first:
            LatentCache.seal(temporary, header)
        processes.barrier()
        row = mine.start
        for images, labels, bad in progress(loader(context.dataset, lists, config.workers), "latents", processes):
            context.bad.note(bad)
            images = to_float(images.to(processes.device))
            with autocast(processes.device):
                posterior = tokenizer.encode(torch.stack([images, images.flip(-1)], dim=1).flatten(0, 1))
            mean, std = (m.unflatten(0, (-1, 2)) for m in (posterior.mean, posterior.std))  # (b, 2, L, C)
            LatentCache.write(temporary, row, mean, std, labels)
            row += len(labels)
            sums += torch.stack([m.double().sum((0, 1, 2)) for m in (mean, mean.square(), std.square())])
        context.bad.check(processes)
        first, mean_square, variance = processes.sum(sums) / (2 * count * config.tokens)
        std = (mean_square - first.square() + variance).sqrt()  # law of total variance
        if processes.first:
            LatentCache.seal(temporary, header | {"latent_mean": first.tolist(), "latent_std": std.tolist()})


def sit_job(context: Context) -> Job:
    """Stage sit: z is sampled anew from the cached posterior at each step."""
    config, device = context.config, context.processes.device
    tokenizer = load_trained_tokenizer(context)
    cache = open_latents(context, tokenizer)
    tokenizer.latent_mean.copy_(torch.tensor(cache.header["latent_mean"]))
    tokenizer.latent_std.copy_(torch.tensor(cache.header["latent_std"]))
    num_classes = len(context.dataset.classes)
    share = context.processes.share(config.sit_batch_size)

    def batches(first: int) -> Iterator:
        for step in count(first):
            yield cache.batch(
                batch_indices(len(cache), config.sit_batch_size, config.seed, step, slice(share.start, share.stop))
            )

    def inputs(batch: tuple, local: slice, rows: slice, step: int, generator: torch.Generator) -> tuple:
        mean, std, y = (part[local].to(device, non_blocking=True) for part in batch)
        size, shape = config.sit_batch_size, mean.shape[2:]
        flip, drop, t = torch.rand(3, size, generator=generator, device=device)[:, rows]
        noises = torch.randn(2, size, *shape, generator=generator, device=device)[:, rows]
        mirror, image = (flip < 0.5).long(), torch.arange(len(flip), device=device)
        z = mean[image, mirror] + std[image, mirror] * noises[0]
        return tokenizer.normalize(z), drop_labels(y, num_classes, drop), t, noises[1]

    sit = SiT(config.tokens, config.channels, num_classes, config.sit)
    return Job(
        stage="sit",
        objective=SiTObjective(sit),
        model=sit,
        inputs=inputs,
        batches=batches,
        batch_size=config.sit_batch_size,
        micro_batch=config.sit_micro_batch,
        steps=config.sit_steps,
        lr=lambda step: config.sit_lr,
        extra={"tokenizer": tokenizer.state_dict(), "stamp": cache.header["stamp"]},
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a run shows


def distance_features(context: Context) -> tuple[str, Callable[[Tensor], Tensor]]:
    """What a Frechet distance is called, and its features of uint8 images (b, 3, S, S) -> (b, D).

    FID where the official Inception file is at hand; else HOG features of a 4 x 4 grid, which are no FID.
    """
    if context.inception is not None:
        return "fid", lambda images: inception_features(context.inception, images)
    hog = HOG(4)
    return "hog_frechet_distance", lambda images: hog(to_float(images))[1].flatten(1)


@torch.no_grad()
def reconstruction_quality(tokenizer: Tokenizer, context: Context) -> dict[str, float]:
    """Held-out images against their reconstructions from the posterior mean: PSNR (dB), SSIM, distance; {} but on rank 0."""
    name, features = distance_features(context)

    def parts() -> Iterator[dict[str, Tensor]]:
        for images in held_out_batches(context):
            copies = reconstruct(tokenizer, images)
            yield {
                "psnr": psnr(images, copies),
                "ssim": ssim(images, copies),
                "originals": features(images),
                "copies": features(copies),
            }

    found = gather(parts(), context.processes)
    if not found:
        return {}
    distance = frechet_distance(*statistics(found["copies"]), *statistics(found["originals"]))
    numbers = {"psnr": found["psnr"].mean().item(), "ssim": found["ssim"].mean().item(), name: distance}
    return {key: round(value, 4) for key, value in numbers.items()} | {"held_out_images": len(found["psnr"])}


@torch.no_grad()
def sample_quality(run: Run, sampler: SamplerSettings, context: Context) -> dict[str, float]:
    """As many samples as there are held-out images, against those: their distance; {} but on rank 0."""
    name, features = distance_features(context)
    processes, count = context.processes, len(context.eval_items)
    classes = list(range(max(1, len(run.classes))))

    def parts() -> Iterator[dict[str, Tensor]]:
        for rows in batch_rows(count, 64, processes):
            labels = torch.tensor([label_of(i, classes) for i in rows])
            yield {"samples": features(generate(run, sampler, labels, list(rows), processes.device))}

    samples = gather(parts(), processes)
    originals = gather(({"originals": features(images)} for images in held_out_batches(context)), processes)
    if not samples:
        return {}
    distance = frechet_distance(*statistics(samples["samples"]), *statistics(originals["originals"]))
    return {name: round(distance, 4), "samples": count, "held_out_images": len(originals["originals"])}


def held_out_batches(context: Context) -> Iterator[Tensor]:
    """This process's readable held-out images, uint8 (b, 3, S, S)."""
    lists = [
        context.eval_items[list(rows)].tolist() for rows in batch_rows(len(context.eval_items), 64, context.processes)
    ]
    for images, _, bad in loader(context.dataset, lists, 0):
        context.bad.note(bad)
        yield images[bad < 0]  # what stands in for an unreadable file may be a training image


def draw_reconstructions(tokenizer: Tokenizer, context: Context) -> None:
    """reconstructions.png: two pairs of rows, held-out originals above their reconstructions."""
    images = held_out(context, 20)
    images = images[: len(images) // 2 * 2 or 1]
    pairs = torch.stack([images, reconstruct(tokenizer, images)])  # (2, count, 3, S, S)
    blocks = pairs.unflatten(1, (2 if len(images) > 1 else 1, -1)).transpose(0, 1).flatten(0, 1)
    write_image(blocks, context.path("reconstructions.png"))


def held_out(context: Context, count: int) -> Tensor:
    """At most `count` held-out images from all over the data set, uint8 (count, 3, S, S)."""
    items = context.eval_items[spread(len(context.eval_items), count)]
    return torch.stack([context.dataset[int(i)][0] for i in items])


@torch.no_grad()
def draw_masks(context: Context) -> None:
    """masks.png: images, and the same with half of their patches hidden: at random, and by similarity to the teacher's cls."""
    config, device = context.config, context.processes.device
    grid = config.image_size // config.patch_size
    images = held_out(context, 8)
    cls, patches = load_teacher(context)(to_float(images.to(device)))
    ratio = torch.full((len(images),), 0.5, device=device)
    generator = torch.Generator(device).manual_seed(config.seed)
    rows = [images]
    for mask in (masking.random_mask(ratio, grid**2, generator), masking.semantic_mask(cls, patches, ratio)):
        hidden = (
            mask.view(-1, 1, grid, grid).repeat_interleave(config.patch_size, 2).repeat_interleave(config.patch_size, 3)
        )
        rows.append(images.masked_fill(hidden.cpu(), 128))
    write_image(torch.stack(rows), context.path("masks.png"))


def show_samples(sit: nn.Module, tokenizer: Tokenizer, context: Context) -> dict:
    """samples.png: 8 samples of each of the first 10 classes -> the sampler's settings and the quality of more samples."""
    config, processes = context.config, context.processes
    run = Run(asdict(config), list(context.dataset.classes), tokenizer, sit)
    sampler = SamplerSettings(steps=config.sample_steps, guidance=default_guidance(run), seed=config.seed)
    if processes.first:
        classes = list(range(max(1, min(10, len(run.classes)))))
        write_image(class_grid(run, sampler, classes, 8, processes.device), context.path("samples.png"))
    return {"sampler": asdict(sampler), **sample_quality(run, sampler, context)}


def run_stage(stage: str, context: Context) -> dict:
    """Do a stage -> its part of result.json."""
    torch.manual_seed(context.config.seed)  # initial weights: equal on all processes, whichever stages ran before
    if stage == "latents":
        cache_latents(context)
        return {"images": len(context.train_items), "moments_per_image": 2}
    job = {"tokenizer": tokenizer_job, "decoder": decoder_job, "sit": sit_job}[stage](context)
    model = fit(job, context)
    if stage == "sit":
        tokenizer = load_trained_tokenizer(context)
        tokenizer.load_state_dict(job.extra["tokenizer"])
        return show_samples(model, tokenizer, context)
    numbers = job.evaluate(model)
    if context.processes.first:
        draw_reconstructions(model, context)
        if stage == "tokenizer":
            draw_masks(context)
        print(
            f"{stage}: held-out PSNR {numbers['psnr']:.2f} dB, SSIM {numbers['ssim']:.3f} ({numbers['held_out_images']} images)"
        )
    return numbers


def dry_run(context: Context) -> None:
    """Print the files, parameters, batch split, memory and one measured step of the tokenizer; nothing is written."""
    config, processes, device = context.config, context.processes, context.processes.device
    job = tokenizer_job(context)
    with torch.device("meta"):
        sit = SiT(config.tokens, config.channels, len(context.dataset.classes), config.sit)
    job.objective.to(device).train()
    optimizers = make_optimizers(job)
    parallel(job, job.joins, Processes(0, 1, device))
    if config.compile:
        compile_blocks(job.objective)
    trained = sum(p.numel() for p in job.objective.parameters())
    pieces = micro_rows(config.batch_size, config.micro_batch, processes)
    width = pieces[0].stop - pieces[0].start
    measured = width if device.type == "cuda" else min(2, width)
    rows = slice(pieces[0].start, pieces[0].start + measured)
    items = [int(context.train_items[i]) for i in batch_indices(len(context.train_items), measured, 0, 0, slice(None))]
    batch = next(iter(loader(context.dataset, [items], 0)))
    late = config.discriminator_start + config.discriminator_delay  # every term counts
    for _ in range(2):  # the first one warms up
        synchronize(device)
        start = time.perf_counter()
        with autocast(device):
            generator = step_generator(0, "tokenizer", 0, device)
            loss, _ = job.objective(*job.inputs(batch, slice(0, len(items)), rows, late, generator))
        loss.backward()
        update(optimizers, 0.0, torch.zeros(2, device=device))
        synchronize(device)
        seconds = time.perf_counter() - start
    if not processes.first:
        return
    list_files(context)
    model, share = job.model, config.batch_size / processes.world
    batch_seconds = seconds / measured * share
    print(
        f"data        {len(context.train_items)} images to train on, {len(context.eval_items)} held out, "
        f"{len(context.dataset.classes)} classes"
    )
    print(
        f"tokenizer   {config.size}: {millions(model)}, N = {model.num_patches}, L = {config.tokens}, C = {config.channels}"
    )
    print(f"alignment   {millions(job.objective.alignment)}, teacher {config.teacher}")
    if job.adversary:
        print(f"adversary   {millions(job.adversary)} in the heads")
    print(f"sit         {config.sit}: {millions(sit)}")
    print(f"batch       {config.batch_size} = {processes.world} processes x {len(pieces)} accumulated x {width} images")
    print(
        f"memory      {20 * trained / 1e9:.2f} GB for weights, gradients, Adam and EMA; "
        f"peak with {measured} images {peak_memory(device) / 1e9:.2f} GB"
    )
    print(
        f"one step    {seconds:.2f} s for {measured} images on {device.type}: {batch_seconds:.1f} s for the batch, "
        f"{batch_seconds * config.tokenizer_steps / 3600:.1f} h for {config.tokenizer_steps} steps"
    )


def list_files(context: Context) -> None:
    """Print each official file that the run needs: path, size, SHA-256, licence; or where a missing one will come from."""
    needed = official_files(context.config, list(STAGES))
    for name in [*needed, "inception"]:
        file, path = OFFICIAL[name], official_path(name, context.config.weights)
        if path.is_file():
            print(f"file        {path}: {path.stat().st_size / 1e6:.1f} MB, SHA-256 {file_hash(path)}, {file.licence}")
        elif name in needed:
            print(f"file        {path}: missing, measured with random weights; from {file.url}, {file.licence}")
        else:
            print(f"file        {path}: missing, so there will be no FID; from {file.url}, {file.licence}")


def millions(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def open_context(config: Config, processes: Processes, dry: bool = False) -> Context:
    """Find the data and split it."""
    dataset = ImageFolder(config.data, config.image_size) if config.data else Shapes(config.image_size)
    if len(dataset) < 2:
        raise UserError(f"{config.data} has only one image; two are the least")
    train_items, eval_items = split(len(dataset), config.eval_images)
    return Context(config, processes, dataset, train_items, eval_items, BadFiles(dataset), dry)


def main(arguments: list[str]) -> None:
    config, stage, dry = parse_config(arguments)
    processes = Processes.start()
    check_config(config, processes)
    context = open_context(config, processes, dry)
    if processes.first:
        print(f"objective: {objective_text(config)}")
    if dry:
        return dry_run(context)
    path, stages = context.path("result.json"), list(STAGES) if stage == "all" else [stage]
    result = json.loads(path.read_text()) if path.exists() else {}
    while stages and stages[0] in result and is_done(context, stages[0]):
        if processes.first:
            print(f"{stages[0]}: done before")
        stages.pop(0)
    files = official_files(config, stages)
    if stages and not processes.any(not at_hand(config.weights, "inception")):
        files.append("inception")  # FID is reported if its weights are at hand, which is no reason to fetch them
    find_official(files, config.weights, processes)
    if "inception" in files:
        context.inception = load_inception(config.weights, processes.device)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    result["objective"] = objective_text(config)
    hashes = {OFFICIAL[name].file: file_hash(official_path(name, config.weights)) for name in files if processes.first}
    result["weights"] = result.get("weights", {}) | hashes
    for name in stages:
        start = time.perf_counter()
        result[name] = run_stage(name, context)
        result[name]["seconds"] = round(time.perf_counter() - start, 1)
        processes.barrier()
        if processes.first:
            write_text(json.dumps(result | {"config": asdict(config)}, indent=1), path)


if __name__ == "__main__":
    command_line(main)
