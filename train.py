"""Train MacTok or a system beside it: images -> tokenizer -> latents -> generator -> samples.

    python train.py                                           # offline: built-in shapes, on a CPU
    python train.py --data photos/ --preset toy               # your own images
    python train.py --recipe ldetok --out out_ldetok          # maetok, ldetok, aligntok, kl, ae
    python train.py --data imagenet/train --dry_run           # sizes, memory and time of a run
    torchrun --nproc_per_node=8 train.py --data imagenet/train --tokens 128 --out runs/b256

Running the same command again resumes. A run has these stages, each with a checkpoint in --out:

    tokenizer   the whole tokenizer                tokenizer.pt, masks.png, reconstructions.png
    decoder     the decoder alone                  decoder.pt, reconstructions.png
    latents     every image is encoded once        latents.npy, latents.json
    generator   a transformer on the latents       generator.pt, samples.png

AlignTok has the stages adapter and joint in place of tokenizer. recipes.py holds every value with
its source, and docs/method.md walks through the equations. In the comments, x is a batch of images
(B, 3, H, W), z are latents (B, L, C), and B is the number of rows of a micro batch.
"""

import copy
import json
import math
import textwrap
import time
from dataclasses import asdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

import family
import masking
from align import VIT_CONFIGS
from build import (
    TrainContext,
    build_generator,
    build_latent_losses,
    build_tokenizer,
    init_from_pretrained,
    load_frozen_networks,
    required_weights,
)
from dry_run import measure_run
from evaluate import draw_masks, is_held_out, reconstruction_quality, sample_quality
from fid import INCEPTION_FILE, inception_path, load_inception
from losses import NUM_AUG_PARAMS, AdaptiveWeight, GANLoss, pull_back
from options import check_config, parse_config
from recipes import Config
from sample import hash_encoder
from tokenizer import Tokenizer, summarize
from utils.checkpoint import Checkpoint, check_identity, read_checkpoint
from utils.console import UserError, as_user_error, catch_signals, progress, run_main, warn
from utils.data import batch_indices, image_loader, read_ahead
from utils.distributed import Distributed, micro_batch_slices, set_grad_sync
from utils.files import hash_file, lock_file, read_json, remove_temporary_files, write_text
from utils.images import to_float
from utils.latents import (
    LatentDataset,
    latents_exist,
    record_dtype,
    write_latents,
    write_metadata,
)
from utils.metric_log import MetricLog, peak_memory
from utils.provenance import describe_run
from utils.random import BatchRNG, step_seed
from utils.weights import download_weights

MAX_GRAD_NORM = 1.0  # gradients are clipped to this norm (config: SoftVQ-VAE, REPA)
COLLAPSE_THRESHOLD = 0.05  # KL in nats per token below which a warning is given (ours)


class TokenizerWithLosses(nn.Module):
    """The tokenizer and the losses on its latents as one module, for DistributedDataParallel."""

    def __init__(self, tokenizer: Tokenizer, latent_losses: nn.ModuleList, config: Config):
        super().__init__()
        self.tokenizer = tokenizer
        self.latent_losses = latent_losses
        self.config = config

    def forward(self, x: Tensor, patch_mask: "PatchMask", targets: dict, rng: BatchRNG):
        """-> reconstruction (B, 3, H, W), posterior, losses on latents by name.

        targets = {teacher name: its (cls, patches)}.
        """
        config = self.config
        mask, ratio, num_hidden = patch_mask
        if config.drop_masked:  # l-DeTok
            posterior = family.encode_visible(self.tokenizer, x, mask, num_hidden)
        else:
            posterior = self.tokenizer.encode(x, mask)
        num_tokens, latent_dim = posterior.mean.shape[1:]
        z = posterior.sample(rng.randn(num_tokens, latent_dim))  # eq. 8

        # The decoder sees z, except in the paper's failing ablation and in l-DeTok.
        z_dec = z
        if config.latent_mask:
            z_dec = masking.mask_latents(z, masking.random_mask(ratio, rng.rand(num_tokens)))
        if config.latent_noise:
            noise = rng.randn(num_tokens, latent_dim)
            z_dec = family.add_latent_noise(z, rng.rand(), noise, config.latent_noise)
        if config.drop_masked:
            z_dec = masking.mask_latents(z_dec, mask)
        recon = self.tokenizer.decode(z_dec)

        losses = posterior.losses()  # KL, eq. 9
        for latent_loss in self.latent_losses:  # alignment, eq. 3-6
            losses |= latent_loss(z, targets, mask)
        return recon, posterior, losses


def train_tokenizer(
    run: TrainContext, stage: str, tokenizer: Tokenizer, gan: GANLoss | None
) -> dict[str, float]:
    """One stage on images: the whole objective (eq. 7), or the decoder alone (section 4.1).

    The tokenizer comes as the stage before left it, and is left with this stage's averaged weights.
    The discriminator goes on from stage to stage, too. Returns the quality of held-out
    reconstructions.
    """
    config = run.config.for_stage(stage)
    about = config.stages[stage]
    dist, device = run.dist, run.device
    total_steps = run.config.total_steps(stage)
    steps_before = count_steps_before(run.config, stage)
    weights = config.loss_weights()  # {"mse": 1.0, "kl": 1e-6, "local": 0.1, ...}
    micro_slices = micro_batch_slices(config.batch_size, config.micro_batch, dist)
    num_micro = len(micro_slices)  # micro batches per step, whose gradients are accumulated

    # ---- Networks ----
    for name, parameter in tokenizer.named_parameters():
        parameter.requires_grad_(name.startswith(about.trainable))
    frozen = load_frozen_networks(run, config)
    latent_losses = run.to_device(build_latent_losses(weights, tokenizer, frozen.teachers))
    model = TokenizerWithLosses(tokenizer, latent_losses, config)
    ema = copy.deepcopy(tokenizer).requires_grad_(False).eval()
    if not config.adversarial_weight:
        gan = None
    reference, preserve_weight = None, None
    if config.preservation_weight:  # AlignTok holds the latents near those it starts with
        reference = copy.deepcopy(ema)
        preserve_weight = AdaptiveWeight().to(device)

    # ---- Optimizers, checkpoint, data, log ----
    optimizers = {"optimizer": build_adamw(model, betas=(0.9, 0.95), weight_decay=1e-4)}
    if gan:
        optimizers["disc_optimizer"] = build_adamw(gan, betas=(0.9, 0.95), weight_decay=1e-4)
    metadata = describe_checkpoint(run, stage, hash_encoder(tokenizer) if steps_before else "")
    objects = {"model": model, "ema": ema, "gan": gan, "preserve_weight": preserve_weight}
    checkpoint = Checkpoint(run.path(f"{stage}.pt"), metadata, objects | optimizers)
    start_step = checkpoint.load()
    ddp_model, ddp_gan = dist.wrap(model), dist.wrap(gan)
    indices = run.train_indices
    batches = batch_indices(indices, config.batch_size, config.seed, start_step, micro_slices)
    loader = iter(image_loader(run.data, batches, config.num_workers))
    log = MetricLog(run.path("log.jsonl"), stage, dist)
    if dist.is_main and "teacher" in frozen.teachers and start_step == steps_before == 0:
        draw_masks(frozen.teachers["teacher"], run)

    # The discriminator begins to train at one step, and its gradient reaches the decoder later.
    disc_start = config.discriminator_start - steps_before
    gan_start = disc_start + config.discriminator_start // 4

    def batch_mean(micro_batch_sum: Tensor) -> Tensor:
        return dist.all_reduce(micro_batch_sum) / (num_micro * dist.world_size)

    metrics = None
    bar = training_bar(stage, start_step, total_steps, dist)
    with catch_signals() as signals:
        for step in bar:
            lr = warmup_cosine(step, total_steps, config)
            train_disc = gan is not None and step >= disc_start
            use_gan = gan is not None and step >= gan_start
            ratio_scale = 1 - step / total_steps if about.anneal_mask_ratio else 1.0
            if preserve_weight:
                weights["preservation"] = config.preservation_weight * preserve_weight.value
            seed = step_seed(config.seed, stage, step)

            for rows in micro_slices:
                set_grad_sync((ddp_model, ddp_gan), sync=rows is micro_slices[-1])
                rng = BatchRNG(seed, config.batch_size, rows, device)
                images, _ = next(loader)
                x = to_float(images.to(device, non_blocking=True))  # (B, 3, H, W) in [-1, 1]
                x = random_flip(x, rng.rand())

                with run.autocast():
                    # 1. What the frozen networks see, and which patches the encoder does not see.
                    targets = {name: teacher(x) for name, teacher in frozen.teachers.items()}
                    if reference:
                        targets["reference"] = reference.encode(x)
                    patch_mask = draw_mask(config, targets.get("teacher"), ratio_scale, rng)

                    # 2. Image -> latents -> image.
                    recon, posterior, latent_terms = ddp_model(x, patch_mask, targets, rng)

                    # 3. Losses on pixels, computed on a detached leaf, so that LPIPS and DINO are
                    # differentiated only once.
                    recon_leaf = recon.detach().requires_grad_()
                    pixel_terms = {"mse": F.mse_loss(recon_leaf, x)}
                    if frozen.lpips:
                        pixel_terms["perceptual"] = frozen.lpips(recon_leaf, x).mean()
                    if train_disc:
                        rand = rng.rand(4, NUM_AUG_PARAMS)
                        d_loss, g_loss, gan_terms = ddp_gan(
                            frozen.disc_backbone, recon_leaf, x, rand, with_g_loss=use_gan
                        )

                # 4. Backward, through the sum of all terms (eq. 7).
                loss = pull_back(recon, recon_leaf, weighted_sum(pixel_terms, weights))
                if use_gan:
                    g_term = pull_back(recon, recon_leaf, g_loss)
                    gan.adaptive_weight.observe(loss, g_term, tokenizer.decoder.last_layer.weight)
                    loss = loss + weights["adversarial"] * gan.adaptive_weight.value * g_term
                if preserve_weight:
                    preservation = latent_terms["preservation"]
                    preserve_weight.observe(loss, preservation, tokenizer.bottleneck.proj.weight)
                loss = loss + weighted_sum(latent_terms, weights)
                (loss / num_micro).backward()
                if train_disc:  # it sees detached images, so its gradient stays in itself
                    (d_loss / num_micro).backward()
                    log.add(gan_terms)

                terms = pixel_terms | latent_terms
                log.add(terms | {"loss": weighted_sum(terms, weights)} | posterior.statistics())

            # 5. Optimizer step, and the averages.
            log.add(clip_and_step(optimizers, lr))
            update_ema(ema, tokenizer, config.ema_decay, step)
            if train_disc:
                gan.update(batch_mean)
            if preserve_weight:
                preserve_weight.update(batch_mean)
            log.end_step()

            # 6. Once in a while.
            done = step + 1
            stop = dist.any_rank(bool(signals)) and done < total_steps
            if is_time(done, config.log_every, total_steps):
                line = write_line(log, done, lr, config.batch_size, run)
                bar.set_postfix_str(f"loss {line['loss']:.4f}")
            if stop or is_time(done, config.save_every, total_steps):
                save(checkpoint, done, dist)
            if stop:
                raise stopped(stage, done)
            if is_time(done, config.save_every, total_steps):
                metrics = reconstruction_quality(ema, run)
                log.write(done, metrics)

    tokenizer.load_state_dict(ema.state_dict())
    return metrics or reconstruction_quality(ema, run)


def train_generator(
    run: TrainContext, tokenizer: Tokenizer, latents: LatentDataset, tokenizer_hash: str
) -> dict:
    """Flow matching on normalized latents (section B.2). Returns the quality of samples.

    The latents are drawn from the stored posteriors anew in each step.
    """
    config = run.config
    dist = run.dist
    device = run.device
    total_steps = config.generator_steps
    batch_size = config.generator_batch_size
    micro_slices = micro_batch_slices(batch_size, config.micro_batch, dist)

    # ---- Network, optimizer, checkpoint, data, log ----
    generator = run.to_device(build_generator(config, tokenizer, len(run.data.classes)))
    ema = copy.deepcopy(generator).requires_grad_(False).eval()
    optimizer = build_adamw(generator, betas=generator.betas, weight_decay=0.0)
    metadata = describe_checkpoint(run, "generator", tokenizer_hash)
    objects = {"model": generator, "ema": ema, "optimizer": optimizer, "tokenizer": tokenizer}
    checkpoint = Checkpoint(run.path("generator.pt"), metadata, objects)
    start_step = checkpoint.load()
    ddp_loss = dist.wrap(GeneratorLoss(generator))
    indices = range(len(latents))
    batches = batch_indices(indices, batch_size, config.seed, start_step, micro_slices)
    loader = read_ahead(latents.read, batches)
    log = MetricLog(run.path("log.jsonl"), "generator", dist)

    bar = training_bar("generator", start_step, total_steps, dist)
    with catch_signals() as signals:
        for step in bar:
            seed = step_seed(config.seed, "generator", step)

            for rows in micro_slices:
                set_grad_sync((ddp_loss,), sync=rows is micro_slices[-1])
                rng = BatchRNG(seed, batch_size, rows, device)
                mean, std, y = (part.to(device, non_blocking=True) for part in next(loader))
                z = mean + std * rng.randn(*mean.shape[1:])  # (B, L, C)
                x = tokenizer.normalize(z)
                with run.autocast():
                    loss = ddp_loss(x, y, rng).mean()
                (loss / len(micro_slices)).backward()
                log.add({"loss": loss})

            log.add(clip_and_step({"optimizer": optimizer}, config.generator_lr))
            update_ema(ema, generator, config.ema_decay, step)
            log.end_step()

            # Once in a while.
            done = step + 1
            stop = dist.any_rank(bool(signals)) and done < total_steps
            if is_time(done, config.log_every, total_steps):
                line = write_line(log, done, config.generator_lr, batch_size, run)
                bar.set_postfix_str(f"loss {line['loss']:.4f}")
            if stop or is_time(done, config.save_every, total_steps):
                save(checkpoint, done, dist)
            if stop:
                raise stopped("generator", done)
    return sample_quality(ema, tokenizer, run)


class GeneratorLoss(nn.Module):
    """The generator's loss as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, generator: nn.Module):
        super().__init__()
        self.generator = generator

    def forward(self, x: Tensor, y: Tensor, rng: BatchRNG) -> Tensor:
        return self.generator.loss(x, y, rng)


# --------------------------------------------------------------------------------------------------
# Steps of the loops.


def random_flip(x: Tensor, rand: Tensor) -> Tensor:
    """Mirror each image with probability 1/2 (paper B.1); rand (B,) is uniform in [0, 1)."""
    return torch.where(rand[:, None, None, None] < 0.5, x.flip(-1), x)


class PatchMask(NamedTuple):
    """Which patches of a batch are hidden from the encoder."""

    mask: Tensor  # (B, N), True is hidden
    ratio: Tensor  # (B,), the share of hidden patches
    num_hidden: int | None  # with drop_masked: how many in each image


def draw_mask(
    config: Config, target: tuple[Tensor, Tensor] | None, ratio_scale: float, rng: BatchRNG
) -> PatchMask:
    """Draw a mask for each image (section 3.2).

    target = cls, patches of the teacher; ratio_scale is a factor on the mask ratio, which falls
    from 1 to 0 in MAETok's decoder stage.
    """
    num_patches = config.grid_size**2
    max_ratio = ratio_scale * config.mask_ratio_max
    min_ratio = ratio_scale * config.mask_ratio_min
    u = rng.rand()
    num_hidden = None
    if config.drop_masked:  # l-DeTok has one ratio per step, which the CPU has to know
        shared = torch.tensor([rng.shared_rand()])
        shared_ratio = masking.sample_mask_ratio(shared, max_ratio, min_ratio)
        num_hidden = int((shared_ratio * num_patches).round())
        ratio = torch.full_like(u, num_hidden / num_patches)
    else:
        ratio = masking.sample_mask_ratio(u, max_ratio, min_ratio)
    mask = masking.MASKS[config.mask]
    scores = masking.cls_similarity(*target) if mask.needs_scores else None
    noise = rng.rand(num_patches)
    return PatchMask(mask.function(ratio, noise, scores, mix=rng.rand()), ratio, num_hidden)


def weighted_sum(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The sum of named losses with their weights (eq. 7)."""
    return sum(weights[name] * loss for name, loss in losses.items())


def build_adamw(module: nn.Module, betas: tuple[float, float], weight_decay: float) -> AdamW:
    """AdamW over the trainable parameters. The learning rate is set in each step."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return AdamW(trainable, betas=betas, weight_decay=weight_decay, fused=True)


def warmup_cosine(step: int, total_steps: int, config: Config) -> float:
    """The learning rate: linear warm-up to lr, then along a cosine to zero (paper B.1)."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def clip_and_step(optimizers: dict[str, AdamW], lr: float) -> dict[str, Tensor]:
    """Clip gradients, make a step with each optimizer that has some, clear them -> gradient norms.

    If a gradient is not finite, no optimizer makes a step. Gradients are the same in all processes,
    so that all skip the same steps, and the CPU does not wait for the GPU to find out.
    """
    norms = {}
    for name, optimizer in optimizers.items():
        parameters = optimizer.param_groups[0]["params"]
        if any(parameter.grad is not None for parameter in parameters):
            norms[name] = nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    skipped = (~torch.stack(list(norms.values())).isfinite().all()).float()
    for name in norms:
        optimizer = optimizers[name]
        optimizer.param_groups[0]["lr"] = lr
        optimizer.found_inf = skipped  # if it is 1, the fused kernel changes nothing
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    grad_norms = {name.replace("optimizer", "grad_norm"): norm for name, norm in norms.items()}
    return grad_norms | {"skipped_steps": skipped}


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema = d ema + (1 - d) model; d = min(decay, (1 + step) / (10 + step)) warms up (ours)."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def training_bar(stage: str, start_step: int, total_steps: int, dist: Distributed):
    """A progress bar over the steps that are left of a stage."""
    steps = range(start_step, total_steps)
    return progress(steps, stage, dist.is_main, initial=start_step, total=total_steps)


def is_time(done: int, every: int, total_steps: int) -> bool:
    """True after every `every` steps, and after the last one."""
    return done == total_steps or done % every == 0


def write_line(
    log: MetricLog, step: int, lr: float, batch_size: int, run: TrainContext
) -> dict[str, float]:
    """Average the metrics since the last line, write them, and warn of what is wrong."""
    images_per_second = batch_size * log.steps_per_second()
    line = summarize(log.flush())
    line |= {"lr": lr, "images_per_second": images_per_second}
    line |= {"memory_gb": peak_memory(run.device) / 1e9}
    log.write(step, line)
    skipped = line["skipped_steps"]  # the share of steps
    if skipped == 1:
        raise UserError(
            f"the gradients of all steps before step {step} of stage {log.stage} were not finite, "
            "so that nothing is learned; start again in another --out with a lower learning rate"
        )
    if skipped > 0:
        log.warn_once(
            "skipped",
            f"{100 * skipped:.0f} % of the steps before step {step} had gradients that were not "
            "finite, and were skipped",
        )
    if has_collapsed(line):
        log.warn_once(
            "collapse",
            f"the posterior has collapsed to its prior (KL {line['kl_per_token']:.3f} nats per "
            f"token, {100 * line['active_units']:.0f} % active units): the latents carry no image; "
            "if it lasts, lower --kl_weight",
        )
    return line


def has_collapsed(line: dict[str, float]) -> bool:
    """Whether the posterior is as good as the prior. A good code may have few active units."""
    return line.get("kl_per_token", math.inf) <= COLLAPSE_THRESHOLD


def save(checkpoint: Checkpoint, step: int, dist: Distributed) -> None:
    """Rank 0 writes the checkpoint, and the others wait."""
    if dist.is_main:
        checkpoint.save(step)
    dist.barrier()


def stopped(stage: str, step: int) -> KeyboardInterrupt:
    return KeyboardInterrupt(
        f"stopped at step {step} of stage {stage}, and saved; run the same command again to go on"
    )


# --------------------------------------------------------------------------------------------------
# Between the stages.


def count_steps_before(config: Config, stage: str) -> int:
    """The steps of the stages before this one."""
    names = list(config.stages)
    return sum(config.total_steps(name) for name in names[: names.index(stage)])


def describe_checkpoint(run: TrainContext, stage: str, tokenizer_hash: str) -> dict:
    """What a checkpoint holds besides states."""
    return {
        "stage": stage,
        "total_steps": run.config.total_steps(stage),
        "config": asdict(run.config),
        "classes": list(run.data.classes),
        "identity": run.identity(stage, tokenizer_hash),
    }


def is_finished(run: TrainContext, stage: str) -> bool:
    """Whether a stage has nothing left to do. UserError if its checkpoint is of another run."""
    if stage == "latents":
        return latents_exist(run.path("latents.npy"))
    path = run.path(f"{stage}.pt")
    if not path.exists():
        return False
    saved = read_checkpoint(path, mmap=True)  # reads the metadata, not the weights
    check_identity(path, saved, run.identity(stage, saved["identity"].get("tokenizer")))
    return saved["step"] >= run.config.total_steps(stage)


def load_previous_stage(
    run: TrainContext, stage: str, tokenizer: Tokenizer, gan: GANLoss | None
) -> None:
    """Load the weights that a stage starts from: those of the stage before, or DINOv2's.

    The stages latents and generator start from the last stage on images that has a checkpoint.
    """
    names = list(run.config.stages)
    if stage in names:
        earlier = names[: names.index(stage)]
    else:
        earlier = [name for name in names if run.path(f"{name}.pt").exists()] or names[:1]
    if not earlier:
        init_from_pretrained(run, tokenizer)
        return
    previous = earlier[-1]
    path = run.path(f"{previous}.pt")
    if not path.exists():
        raise UserError(f"{path} does not exist; run the stage {previous} first")
    saved = read_checkpoint(path)
    check_identity(path, saved, run.identity(previous, saved["identity"].get("tokenizer")))
    total_steps = run.config.total_steps(previous)
    if saved["step"] < total_steps:
        raise UserError(
            f"{path} is at step {saved['step']} of {total_steps}; finish the stage {previous} first"
        )
    tokenizer.load_state_dict(saved["ema"])
    if gan:
        gan.load_state_dict(saved["gan"])


@torch.no_grad()
def cache_latents(run: TrainContext, tokenizer: Tokenizer, tokenizer_hash: str) -> LatentDataset:
    """Encode each training image and its mirror image once, and give the tokenizer their
    statistics.

    Rows 2 i and 2 i + 1 of latents.npy are image i and its mirror image.
    """
    path = run.path("latents.npy")
    num_tokens, latent_dim = tokenizer.num_latent_tokens, tokenizer.latent_dim
    count = 2 * len(run.train_indices)
    if not latents_exist(path):
        tokenizer.eval()
        sums = torch.zeros(3, latent_dim, dtype=torch.float64)
        shards = run.dist.shard(range(len(run.train_indices)), 16)
        batches = [run.train_indices[rows].tolist() for rows in shards]
        loader = image_loader(run.data, batches, run.config.num_workers)
        dtype = record_dtype(num_tokens, latent_dim)
        with write_latents(path, count, dtype, run.dist) as writer, run.autocast():
            bar = progress(loader, "latents", run.dist.is_main)
            for (images, labels), rows in zip(bar, shards):
                x = to_float(images.to(run.device))
                x = torch.stack([x, x.flip(-1)], dim=1).flatten(
                    0, 1
                )  # each beside its mirror image
                posterior = tokenizer.encode(x)
                mean, std = posterior.mean.cpu(), posterior.std.cpu()
                writer.write(2 * rows.start, mean, std, labels.repeat_interleave(2))
                for total, moment in zip(sums, (mean, mean.square(), std.square())):
                    total += moment.double().sum(dim=(0, 1))
        latent_mean, mean_square, variance = run.dist.all_reduce(sums) / (count * num_tokens)
        # The law of total variance: that of the means, and the mean of the variances.
        latent_std = (mean_square - latent_mean.square() + variance).sqrt()
        if not latent_std.min() > 0:
            raise UserError(
                f"latent channel {int(latent_std.argmin())} is the same for all images, so that it "
                "cannot be normalized: the tokenizer has collapsed; train it again, with a lower "
                "--lr"
            )
        if run.dist.is_main:
            write_metadata(path, tokenizer_hash, run.data.fingerprint, latent_mean, latent_std)
        run.dist.barrier()
    latents = LatentDataset(
        path,
        tokenizer_hash,
        run.data.fingerprint,
        count,
        num_tokens,
        latent_dim,
        len(run.data.classes),
    )
    tokenizer.latent_mean.copy_(latents.mean)
    tokenizer.latent_std.copy_(latents.std)
    return latents


# --------------------------------------------------------------------------------------------------
# Command line.


def print_run(run: TrainContext, tokenizer: Tokenizer) -> None:
    """Say what is going to be trained, on what, and with which values."""
    config = run.config
    with torch.device("meta"):
        generator = build_generator(config, tokenizer, len(run.data.classes))
    settings = ", ".join(f"{name} {value}" for name, value in asdict(config).items() if value != "")
    print(f"data: {run.data.describe()}; {len(run.train_indices)} to train on")
    print(f"objective: {config.describe_objective()}")
    print(
        f"tokenizer: {count_parameters(tokenizer)}, N = {tokenizer.num_patches} patches, "
        f"L = {tokenizer.num_latent_tokens} tokens of C = {tokenizer.latent_dim} channels"
    )
    print(f"generator: {config.generator}, {count_parameters(generator)}")
    print("\n".join(textwrap.wrap(f"config: {settings}", width=100, subsequent_indent="  ")))
    if not is_held_out(run):
        warn(f"only {len(run.data)} images: they are trained on and evaluated on alike")


def count_parameters(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f}M parameters"


def read_result(run: TrainContext) -> dict:
    """result.json of the stages so far. It is only a record, so a damaged one is set aside."""
    path = run.path("result.json")
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except UserError as error:
        run.dist.barrier()
        if run.dist.is_main:
            path.replace(f"{path}.damaged")
        warn(f"{error}; it is only a record, and is kept as {path.name}.damaged", run.dist.is_main)
        return {}


def main(arguments: list[str]) -> None:
    config, options = parse_config(arguments, description=__doc__)
    dist = Distributed.start(options.device)
    check_config(config, dist)
    run = TrainContext.open(config, dist, options)
    stages = [options.stage]
    if options.stage == "all":
        stages = [*config.stages, "latents", "generator"]
    if options.dry_run:
        measure_run(run, required_weights(config, stages), train_tokenizer)
        return

    # ---- What is left to do ----
    result = read_result(run)
    while stages and stages[0] in result and is_finished(run, stages[0]):
        if dist.is_main:
            print(f"{stages[0]}: finished before")
        stages.pop(0)
    if not stages:
        return

    # ---- Official weights, and a lock, so that one run at a time is at work in a folder ----
    hashes = download_weights(required_weights(config, stages), config.weights_dir, dist)
    with as_user_error():
        path = inception_path(config.weights_dir)
        if not dist.any_rank(not path.is_file()):  # FID is reported where its weights are available
            run.inception = load_inception(config.weights_dir, run.device)
            hashes[INCEPTION_FILE] = hash_file(path)
    if dist.is_main:
        lock = lock_file(run.path("log.jsonl"))  # noqa: F841  held until the process ends
        remove_temporary_files(run.path(""))
    dist.barrier()

    # ---- What goes from stage to stage ----
    torch.manual_seed(config.seed)
    tokenizer = run.to_device(build_tokenizer(config))
    gan = None
    if config.adversarial_weight:
        gan = GANLoss(VIT_CONFIGS["dino_vits16"][0]).to(run.device)
    load_previous_stage(run, stages[0], tokenizer, gan)
    if dist.is_main:
        print_run(run, tokenizer)

    # ---- The stages ----
    result |= {"objective": config.describe_objective(), "config": asdict(config)}
    result["weights"] = result.get("weights", {}) | hashes
    for stage in stages:
        start = time.perf_counter()
        torch.manual_seed(config.seed)  # initial weights do not depend on which stages ran before
        if stage in config.stages:
            metrics = train_tokenizer(run, stage, tokenizer, gan)
        else:
            tokenizer_hash = hash_encoder(tokenizer)
            latents = cache_latents(run, tokenizer, tokenizer_hash)
            metrics = {"images": len(latents) // 2}
            if stage == "generator":
                metrics = train_generator(run, tokenizer, latents, tokenizer_hash)
        metrics["seconds"] = round(time.perf_counter() - start, 1)
        if dist.is_main:
            print(f"{stage}: {json.dumps(metrics)}")
            made_by = describe_run("train.py", arguments, dist)
            result[stage] = metrics | {"made_by": made_by | {"preset": options.preset}}
            write_text(json.dumps(result, indent=1), run.path("result.json"))
        dist.barrier()


if __name__ == "__main__":
    run_main(main)
