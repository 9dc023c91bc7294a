"""Train MacTok (arXiv 2603.29634): images -> tokenizer -> latents -> generator -> samples.

    python train.py                                           # offline: built-in shapes, on a CPU
    python train.py --data photos/ --preset toy               # your own images
    python train.py --recipe ldetok --out out_ldetok          # or maetok, aligntok, kl, ae
    python train.py --data imagenet/train --dry_run           # sizes, memory and time of a run
    torchrun --nproc_per_node=8 train.py --data imagenet/train --tokens 128 --out runs/b256

Running the same command again resumes. A run has these stages, each with its files in --out:

    tokenizer   the whole tokenizer                tokenizer.pt, masks.png, reconstructions.png
    decoder     the decoder alone                  decoder.pt, reconstructions.png
    latents     training images are encoded once   latents.npy, latents.json
    generator   a transformer on the latents       generator.pt, samples.png

AlignTok has the stages adapter and joint in place of tokenizer; all recipes have the other stages.
recipes.py holds every value with its source, and docs/method.md walks through the equations. In the
tokenizer's loop x is a micro batch of images (B, 3, H, W), the part of a batch that one process
takes at once, and z are its latents (B, L, C).
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
from torch.optim import AdamW, Optimizer

import family
import masking
from build import (
    TrainContext,
    build_gan,
    build_generator,
    build_latent_losses,
    build_tokenizer,
    describe_parameters,
    init_from_pretrained,
    load_frozen_networks,
    required_weights,
)
from classifiers import read_teacher
from dry_run import Trainers, bytes_to_write, file_sizes, measure_run
from evaluate import draw_masks, has_held_out_images, reconstruction_quality, sample_quality
from fid import INCEPTION_FILE, INCEPTION_URL, inception_path, load_inception
from losses import NUM_AUG_PARAMS, AdaptiveWeight, GANLoss, pull_back
from options import check_config, parse_config
from recipes import Config
from sample import hash_encoder, load_run
from tokenizer import Tokenizer, summarize
from utils.checkpoint import Checkpoint, check_identity, read_checkpoint
from utils.console import UserError, as_user_error, catch_signals, progress, run_main, warn
from utils.data import batch_indices, image_loader, read_ahead
from utils.distributed import Distributed, micro_batch_slices, set_grad_sync
from utils.files import (
    check_room,
    hash_file,
    lock_file,
    read_json,
    remove_temporary_files,
    write_text,
)
from utils.images import to_float
from utils.latents import (
    LatentDataset,
    latents_exist,
    record_dtype,
    write_latents,
    write_metadata,
)
from utils.metric_log import MetricLog, peak_memory
from utils.muon import Muon
from utils.provenance import describe_run
from utils.random import BatchRNG, step_seed
from utils.weights import download_weights

BETAS = (0.9, 0.95)  # of AdamW for tokenizer and discriminator (config: SoftVQ-VAE)
WEIGHT_DECAY = 1e-4  # likewise (config: SoftVQ-VAE)
MAX_GRAD_NORM = 1.0  # gradients are clipped to this norm (config: SoftVQ-VAE, REPA)
LATENTS_BATCH_SIZE = 16  # images that are encoded at once; more do not fit into a CPU's caches
COLLAPSE_THRESHOLD = 0.05  # KL in nats per token, at which or below a warning is given (ours)


# --------------------------------------------------------------------------------------------------
# Masks, and the modules that the loops train.


class PatchMask(NamedTuple):
    """Which patches of a batch are hidden from the encoder."""

    mask: Tensor  # (B, N), True is hidden
    ratio: Tensor  # (B,), m in section 3.2; --latent_mask uses it even with --mask none
    num_hidden: int | None  # with drop_masked: how many in each image


def draw_mask(
    config: Config, features: tuple[Tensor, Tensor] | None, ratio_scale: float, rng: BatchRNG
) -> PatchMask:
    """Draw a mask for each image (section 3.2).

    features = cls, patches of the teacher, if there is one. ratio_scale is a factor on the mask
    ratio, which falls from 1 to 0 in MAETok's decoder stage.
    """
    num_patches = config.grid_size**2
    max_ratio = ratio_scale * config.mask_ratio_max
    min_ratio = ratio_scale * config.mask_ratio_min
    u = rng.rand()
    num_hidden = None
    if config.drop_masked:  # l-DeTok has one ratio per step: it decides the shape of tensors
        shared = torch.tensor([rng.shared_rand()])
        shared_ratio = masking.sample_mask_ratio(shared, max_ratio, min_ratio)
        num_hidden = int((shared_ratio * num_patches).round())
        ratio = torch.full_like(u, num_hidden / num_patches)
    else:
        ratio = masking.sample_mask_ratio(u, max_ratio, min_ratio)
    strategy = masking.MASKS[config.mask]
    scores = masking.cls_similarity(*features) if strategy.needs_scores else None
    mask = strategy.function(ratio, noise=rng.rand(num_patches), scores=scores, mix=rng.rand())
    return PatchMask(mask, ratio, num_hidden)


class TokenizerWithLosses(nn.Module):
    """The tokenizer and the losses on its latents as one module, for DistributedDataParallel."""

    def __init__(self, tokenizer: Tokenizer, loss_modules: nn.ModuleList, config: Config):
        super().__init__()
        self.tokenizer = tokenizer
        self.loss_modules = loss_modules
        self.config = config

    def forward(self, x: Tensor, patch_mask: PatchMask, targets: dict, rng: BatchRNG):
        """Returns reconstruction (B, 3, H, W), posterior, and losses on latents by name.

        targets holds what the frozen networks see, by name: (cls, patches) of a teacher, the
        posterior of AlignTok's reference.
        """
        config = self.config
        mask, ratio, num_hidden = patch_mask
        if config.drop_masked:  # l-DeTok
            posterior = family.encode_visible(self.tokenizer, x, mask, num_hidden)
        else:
            posterior = self.tokenizer.encode(x, mask)
        num_tokens, latent_dim = posterior.mean.shape[1:]
        z = posterior.sample(rng.randn(num_tokens, latent_dim))  # eq. 8

        # The decoder sees z, which is changed in these cases.
        z_dec = z
        if config.latent_mask:  # the ablation that the paper shows to fail (fig. 1)
            z_dec = masking.mask_latents(z_dec, masking.random_mask(ratio, rng.rand(num_tokens)))
        if config.latent_noise:  # l-DeTok
            noise = rng.randn(num_tokens, latent_dim)
            z_dec = family.add_latent_noise(z_dec, rng.rand(), noise, config.latent_noise)
        if config.drop_masked:  # l-DeTok, where each latent belongs to a patch
            z_dec = masking.mask_latents(z_dec, mask)
        recon = self.tokenizer.decode(z_dec)

        losses = posterior.losses()  # KL, eq. 9
        for loss_module in self.loss_modules:  # alignment, eq. 3-6, or another paper's
            losses |= loss_module(z, targets, mask)
        return recon, posterior, losses


class GeneratorLoss(nn.Module):
    """The generator's loss as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, generator: nn.Module):
        super().__init__()
        self.generator = generator

    def forward(self, x: Tensor, y: Tensor, rng: BatchRNG) -> Tensor:
        return self.generator.loss(x, y, rng)


# --------------------------------------------------------------------------------------------------
# The two loops.


def train_tokenizer(
    context: TrainContext, stage: str, tokenizer: Tokenizer, gan: GANLoss | None
) -> dict[str, float]:
    """One stage on images: the whole objective (eq. 7), or the decoder alone (section 4.1).

    The tokenizer starts with the previous stage's weights and ends with this stage's averaged ones.
    The discriminator simply goes on. Returns the quality of held-out reconstructions.
    """
    config = context.config.for_stage(stage)  # with the overrides of this stage
    stage_settings = config.stages[stage]
    dist, device = context.dist, context.device
    total_steps = config.total_steps(stage)
    steps_before = count_steps_before(config, stage)
    loss_weights = config.loss_weights()  # {"mse": 1.0, "kl": 1e-6, "local": 0.1, ...}
    micro_slices = micro_batch_slices(config.batch_size, config.micro_batch, dist)
    num_micro = len(micro_slices)  # micro batches, whose gradients are accumulated

    # ---- Networks ----
    torch.manual_seed(config.seed)  # for the initial weights of the loss modules
    for name, parameter in tokenizer.named_parameters():
        parameter.requires_grad_(name.startswith(stage_settings.trainable))  # such as ("decoder.",)
    frozen = load_frozen_networks(context, config)
    loss_modules = build_latent_losses(loss_weights, tokenizer, frozen.teachers)
    model = TokenizerWithLosses(tokenizer, context.to_device(loss_modules), config)
    ema = copy.deepcopy(tokenizer).requires_grad_(False).eval()
    reference, preserve_weight = None, None
    if config.preservation_weight:  # AlignTok holds the latents near those it starts with
        reference = context.to_device(copy.deepcopy(ema))
        preserve_weight = AdaptiveWeight().to(device)

    # ---- Optimizers, checkpoint, data, log ----
    trained = {"model": model} | ({"disc": gan} if gan else {})
    optimizers = build_optimizers(trained, config.optimizer, BETAS, WEIGHT_DECAY)
    metadata = describe_checkpoint(context, stage, hash_encoder(tokenizer) if steps_before else "")
    objects = {"model": model, "ema": ema, "gan": gan, "preserve_weight": preserve_weight}
    checkpoint = Checkpoint(context.path(f"{stage}.pt"), metadata, objects | optimizers)
    start_step = checkpoint.load(mmap=device.type == "cuda")
    ddp_model, ddp_gan = dist.wrap(model), dist.wrap(gan)
    indices = context.train_indices
    batches = batch_indices(indices, config.batch_size, config.seed, start_step, micro_slices)
    loader = iter(image_loader(context.data, batches, config.num_workers))
    log = MetricLog(context.path("log.jsonl"), stage, dist)
    if dist.is_main and "teacher" in frozen.teachers and start_step == steps_before == 0:
        draw_masks(frozen.teachers["teacher"], context)

    # In steps of this stage, while discriminator_start counts the steps of all stages.
    disc_start = config.discriminator_start - steps_before
    g_loss_start = disc_start + config.discriminator_start // 4

    def batch_mean(micro_batch_sum: Tensor) -> Tensor:
        return dist.all_reduce(micro_batch_sum) / (num_micro * dist.world_size)

    metrics = None
    bar = training_bar(stage, start_step, total_steps, context)
    with catch_signals() as signals:
        for step in bar:
            lr = warmup_cosine(step, total_steps, config)
            train_disc = gan is not None and step >= disc_start
            with_g_loss = gan is not None and step >= g_loss_start
            ratio_scale = 1 - step / total_steps if stage_settings.anneal_mask_ratio else 1.0
            if preserve_weight is not None:
                loss_weights["preservation"] = config.preservation_weight * preserve_weight.value
            seed = step_seed(config.seed, stage, step)

            for rows in micro_slices:
                set_grad_sync((ddp_model, ddp_gan), sync=rows is micro_slices[-1])
                rng = BatchRNG(seed, config.batch_size, rows, device)  # rng.rand(N) is (B, N)
                images, _ = next(loader)
                x = to_float(images.to(device, non_blocking=True))  # (B, 3, H, W) in [-1, 1]
                if config.flip:
                    x = random_flip(x, rng.rand())

                with context.autocast():
                    # 1. What the frozen networks see, and which patches the encoder does not see.
                    targets = {name: teacher(x) for name, teacher in frozen.teachers.items()}
                    if reference is not None:
                        targets["reference"] = reference.encode(x)
                    patch_mask = draw_mask(config, targets.get("teacher"), ratio_scale, rng)

                    # 2. Image -> latents -> image.
                    recon, posterior, latent_losses = ddp_model(x, patch_mask, targets, rng)

                    # 3. Losses on pixels, computed on a detached leaf (see losses.pull_back).
                    recon_leaf = recon.detach().requires_grad_()
                    pixel_losses = {"mse": F.mse_loss(recon_leaf, x)}
                    if frozen.lpips is not None:
                        pixel_losses["perceptual"] = frozen.lpips(recon_leaf, x).mean()
                    if train_disc:
                        rand = rng.rand(4, NUM_AUG_PARAMS)  # for four augmentations
                        outputs = ddp_gan(frozen.disc_backbone, recon_leaf, x, rand, with_g_loss)
                        d_loss, g_loss, gan_metrics = outputs

                # 4. Backward through the sum of all losses (eq. 7). What pull_back returns has the
                # right gradient, but no meaning as a number, so that `loss` is not logged.
                rec_loss = pull_back(recon, recon_leaf, weighted_sum(pixel_losses, loss_weights))
                loss = rec_loss
                if with_g_loss:
                    g_loss = pull_back(recon, recon_leaf, g_loss)
                    last_layer = tokenizer.decoder.last_layer.weight
                    gan.adaptive_weight.observe(rec_loss, g_loss, last_layer)
                    loss = loss + config.adversarial_weight * gan.adaptive_weight.value * g_loss
                if preserve_weight is not None:
                    preservation = latent_losses["preservation"]
                    preserve_weight.observe(loss, preservation, tokenizer.bottleneck.proj.weight)
                loss = loss + weighted_sum(latent_losses, loss_weights)
                (loss / num_micro).backward()
                if train_disc:  # only the discriminator gets this gradient
                    (d_loss / num_micro).backward()
                    log.add(gan_metrics)
                # The logged loss is computed from the values, and leaves out the adversarial one.
                losses = pixel_losses | latent_losses
                log.add(losses | {"loss": weighted_sum(losses, loss_weights)})
                log.add(posterior.statistics())

            # 5. Optimizer step, averaged weights, and the adaptive weights of the next step.
            log.add(clip_and_step(trained, optimizers, lr))
            update_ema(ema, tokenizer, config.ema_decay, step)
            if train_disc:
                gan.update(batch_mean)
            if preserve_weight is not None:
                preserve_weight.update(batch_mean)
            log.end_step()

            # 6. Once in a while: log, save, evaluate.
            done = step + 1
            is_save_step = is_time(done, config.save_every, total_steps)
            stop = dist.any_rank(bool(signals)) and done < total_steps
            if is_time(done, config.log_every, total_steps):
                line = write_line(log, done, lr, config.batch_size, context)
                bar.set_postfix_str(f"loss {line['loss']:.4f}")
            if stop or is_save_step:
                save(checkpoint, done, context)
            if stop:
                raise stopped_error(stage, done)
            if is_save_step:
                metrics = reconstruction_quality(ema, context)
                log.write(done, metrics)

    tokenizer.load_state_dict(ema.state_dict())
    return metrics or reconstruction_quality(ema, context)


def train_generator(
    context: TrainContext, tokenizer: Tokenizer, latents: LatentDataset, encoder_hash: str
) -> nn.Module:
    """Flow matching on normalized latents (section B.2). Returns the averaged generator.

    The latents are drawn from the stored posteriors anew in each step.
    """
    config = context.config
    dist, device = context.dist, context.device
    total_steps = config.generator_steps
    batch_size = config.generator_batch_size
    micro_slices = micro_batch_slices(batch_size, config.generator_micro_batch, dist)

    # ---- Network, optimizers, checkpoint, data, log ----
    torch.manual_seed(config.seed)  # initial weights do not depend on what ran before
    generator = context.to_device(build_generator(config, tokenizer, len(context.data.classes)))
    ema = copy.deepcopy(generator).requires_grad_(False).eval()
    betas = generator.betas
    optimizers = build_optimizers({"model": generator}, "adamw", betas, weight_decay=0.0)
    metadata = describe_checkpoint(context, "generator", encoder_hash)
    objects = {"model": generator, "ema": ema, "tokenizer": tokenizer}
    checkpoint = Checkpoint(context.path("generator.pt"), metadata, objects | optimizers)
    decoder = copy.deepcopy(tokenizer.decoder.state_dict())
    start_step = checkpoint.load(mmap=device.type == "cuda")
    # The decoder may have been trained on since the checkpoint was written.
    tokenizer.decoder.load_state_dict(decoder)
    ddp_loss = dist.wrap(GeneratorLoss(generator))
    indices = range(len(latents))
    batches = batch_indices(indices, batch_size, config.seed, start_step, micro_slices)
    loader = read_ahead(map(latents.read, batches))
    log = MetricLog(context.path("log.jsonl"), "generator", dist)

    bar = training_bar("generator", start_step, total_steps, context)
    with catch_signals() as signals:
        for step in bar:
            seed = step_seed(config.seed, "generator", step)

            for rows in micro_slices:
                set_grad_sync((ddp_loss,), sync=rows is micro_slices[-1])
                rng = BatchRNG(seed, batch_size, rows, device)
                # Latents of a micro batch, and their class labels y (B,).
                mean, std, y = (part.to(device, non_blocking=True) for part in next(loader))
                z = mean + std * rng.randn(*mean.shape[1:])  # (B, L, C)

                # The loss draws times and noise; see sit.flow_matching_loss.
                with context.autocast():
                    loss = ddp_loss(tokenizer.normalize(z), y, rng).mean()
                (loss / len(micro_slices)).backward()
                log.add({"loss": loss})

            # Optimizer step at a constant learning rate, and averaged weights.
            log.add(clip_and_step({"model": generator}, optimizers, config.generator_lr))
            update_ema(ema, generator, config.ema_decay, step)
            log.end_step()

            # Once in a while.
            done = step + 1
            is_last = done == total_steps
            stop = dist.any_rank(bool(signals)) and not is_last
            # `main` measures the samples at the end.
            is_sample_step = (
                config.sample_every > 0 and done % config.sample_every == 0 and not is_last
            )
            if is_time(done, config.log_every, total_steps):
                line = write_line(log, done, config.generator_lr, batch_size, context)
                bar.set_postfix_str(f"loss {line['loss']:.4f}")
            if stop or is_sample_step or is_time(done, config.save_every, total_steps):
                save(checkpoint, done, context)
            if stop:
                raise stopped_error("generator", done)
            if is_sample_step:
                log.write(done, sample_quality(ema, tokenizer, context))
    return ema


# --------------------------------------------------------------------------------------------------
# What both loops call.


def random_flip(x: Tensor, rand: Tensor) -> Tensor:
    """Mirror each image with probability 1/2 (paper B.1); rand (B,) is uniform in [0, 1)."""
    return torch.where(rand[:, None, None, None] < 0.5, x.flip(-1), x)


def weighted_sum(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The sum of named losses with their weights (eq. 7)."""
    return sum(weights[name] * loss for name, loss in losses.items())


def build_optimizers(
    modules: dict[str, nn.Module], name: str, betas: tuple[float, float], weight_decay: float
) -> dict[str, Optimizer]:
    """AdamW over the trainable parameters, or, with "muon", Muon over the matrices of the blocks.

    Embeddings, norms, biases, first and last layers stay with AdamW. Both get the same learning
    rate, which is set in each step; Muon has neither betas nor weight decay.
    """
    optimizers = {}
    for module_name, module in modules.items():
        matrices, others = [], []
        for key, parameter in module.named_parameters():
            is_block_matrix = "blocks." in key and parameter.ndim == 2
            if parameter.requires_grad:
                (matrices if name == "muon" and is_block_matrix else others).append(parameter)
        if others:
            adamw = AdamW(others, betas=betas, weight_decay=weight_decay, fused=True)
            optimizers[f"{module_name}_adamw"] = adamw
        if matrices:
            optimizers[f"{module_name}_muon"] = Muon(matrices)
    return optimizers


def warmup_cosine(step: int, total_steps: int, config: Config) -> float:
    """The learning rate: a linear warm-up times a cosine from lr to zero (paper B.1)."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def clip_and_step(
    modules: dict[str, nn.Module], optimizers: dict[str, Optimizer], lr: float
) -> dict[str, Tensor]:
    """Clip the gradients of each module, step, and clear them.

    If a gradient is not finite, no optimizer changes anything. All processes then skip the same
    step, because their gradients are equal. The decision is made on the GPU, which is not waited
    for. Returns the gradient norms and, as "skipped_share", 1 for a skipped step and 0 otherwise.
    """
    norms = {}
    for name, module in modules.items():
        parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
        if parameters:
            norms[f"{name}_grad_norm"] = nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    skip = (~torch.stack(list(norms.values())).isfinite().all()).float()
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.found_inf = skip  # the fused AdamW and Muon change nothing if it is 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norms | {"skipped_share": skip}


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema = d ema + (1 - d) model; d = min(decay, (1 + step) / (10 + step)) warms up (ours)."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def training_bar(stage: str, start_step: int, total_steps: int, context: TrainContext):
    """A progress bar over the steps that are left of a stage."""
    steps = range(start_step, total_steps)
    show = context.dist.is_main and not context.is_dry_run
    return progress(steps, stage, show, initial=start_step, total=total_steps)


def is_time(done: int, every: int, total_steps: int) -> bool:
    """True after every `every` steps, and after the last one."""
    return done == total_steps or done % every == 0


def write_line(
    log: MetricLog, step: int, lr: float, batch_size: int, context: TrainContext
) -> dict[str, float]:
    """Average the metrics since the last line, write them, and warn of what is wrong.

    Raises UserError if all steps since then, and at least ten, were skipped.
    """
    images_per_second = batch_size * log.steps_per_second()
    num_steps = log.num_steps
    line = summarize(log.flush())
    line |= {"lr": lr, "images_per_second": images_per_second}
    line |= {"memory_gb": peak_memory(context.device) / 1e9}
    log.write(step, line)
    skipped = line["skipped_share"]
    if skipped == 1 and num_steps >= 10:
        raise UserError(
            f"the gradients of the last {num_steps} steps of the {log.stage} stage were not "
            "finite; start again in another --out, with a lower learning rate"
        )
    if skipped > 0:
        log.warn_once(
            "skipped",
            f"{skipped * num_steps:.0f} of the last {num_steps} steps were skipped, because their "
            "gradients were not finite",
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
    """Whether the posterior almost equals the prior; few active units alone are no collapse."""
    return line.get("kl_per_token", math.inf) <= COLLAPSE_THRESHOLD


def save(checkpoint: Checkpoint, step: int, context: TrainContext) -> None:
    """Rank 0 writes the checkpoint, and the others wait."""
    if context.dist.is_main and not context.is_dry_run:
        checkpoint.save(step)
    context.dist.barrier()


def stopped_error(stage: str, step: int) -> KeyboardInterrupt:
    """What ends the program after a signal."""
    return KeyboardInterrupt(
        f"stopped at step {step} of the {stage} stage, and saved; run the same command again to "
        "go on"
    )


# --------------------------------------------------------------------------------------------------
# Between the stages.


def count_steps_before(config: Config, stage: str) -> int:
    """The steps of the stages before this one."""
    names = list(config.stages)
    return sum(config.total_steps(name) for name in names[: names.index(stage)])


def describe_checkpoint(context: TrainContext, stage: str, encoder_hash: str) -> dict:
    """What a checkpoint holds besides states."""
    return {
        "stage": stage,
        "total_steps": context.config.total_steps(stage),
        "config": asdict(context.config),
        "classes": list(context.data.classes),
        "identity": context.identity(stage, encoder_hash),
    }


def is_finished(context: TrainContext, stage: str) -> bool:
    """Whether a stage has nothing left to do. UserError if its checkpoint is of another run."""
    if stage == "latents":
        return latents_exist(context.path("latents.npy"))
    if not context.path(f"{stage}.pt").exists():
        return False
    saved = read_stage(context, stage)
    return saved["step"] >= context.config.total_steps(stage)


def read_stage(context: TrainContext, stage: str) -> dict:
    """The checkpoint of a stage, whose tensors are read from disk when they are used.

    Raises UserError if it is of another run.
    """
    path = context.path(f"{stage}.pt")
    saved = read_checkpoint(path, mmap=True)
    encoder_hash = saved["identity"].get("encoder")  # the file's own, because ours is not known
    check_identity(path, saved, context.identity(stage, encoder_hash))
    return saved


def load_previous_stage(
    context: TrainContext, stage: str, tokenizer: Tokenizer, gan: GANLoss | None
) -> None:
    """Load the weights that a stage starts from: those of the stage before, or DINOv2's.

    The latents and generator stages start from the last image stage that has a checkpoint, or from
    the tokenizer of another run.
    """
    if context.config.tokenizer_run:
        other = load_run(context.config.tokenizer_run)
        tokenizer.load_state_dict(other.tokenizer.state_dict())
        return
    names = list(context.config.stages)
    if stage in names:
        earlier = names[: names.index(stage)]
    else:
        earlier = [name for name in names if context.path(f"{name}.pt").exists()]
        earlier = earlier or names[:1]  # the error below names it
    if not earlier:
        init_from_pretrained(context, tokenizer)
        return
    previous = earlier[-1]
    path = context.path(f"{previous}.pt")
    if not path.exists():
        raise UserError(f"{path} does not exist; run the {previous} stage first")
    saved = read_stage(context, previous)
    total_steps = context.config.total_steps(previous)
    if saved["step"] < total_steps:
        raise UserError(
            f"{path} is at step {saved['step']} of {total_steps}; finish the {previous} stage first"
        )
    tokenizer.load_state_dict(saved["ema"])
    if gan:
        gan.load_state_dict(saved["gan"])


@torch.no_grad()
def cache_latents(context: TrainContext, tokenizer: Tokenizer, encoder_hash: str) -> LatentDataset:
    """Encode all training images, and give the tokenizer the latents' statistics.

    Unless --flip is 0, rows 2 i and 2 i + 1 of latents.npy are image i and its mirror image. If the
    file is there already, and is of this encoder and these images, it is only opened.
    """
    path = context.path("latents.npy")
    num_tokens, latent_dim = tokenizer.num_latent_tokens, tokenizer.latent_dim
    count = context.num_latents
    rows_per_image = count // len(context.train_indices)
    if not latents_exist(path):
        tokenizer.eval()
        sums = torch.zeros(3, latent_dim, dtype=torch.float64)
        shards = context.dist.shard(range(len(context.train_indices)), LATENTS_BATCH_SIZE)
        batches = [context.train_indices[rows].tolist() for rows in shards]
        loader = image_loader(context.data, batches, context.config.num_workers)
        dtype = record_dtype(num_tokens, latent_dim)
        with write_latents(path, count, dtype, context.dist) as writer, context.autocast():
            bar = progress(loader, "latents", context.dist.is_main)
            for (images, labels), rows in zip(bar, shards):
                x = to_float(images.to(context.device))
                if context.config.flip:  # each image beside its mirror image
                    x = torch.stack([x, x.flip(-1)], dim=1).flatten(0, 1)
                posterior = tokenizer.encode(x)
                mean, std = posterior.mean.cpu(), posterior.std.cpu()
                labels = labels.repeat_interleave(rows_per_image)
                writer.write(rows_per_image * rows.start, mean, std, labels)
                moments = torch.stack([mean, mean.square(), std.square()]).double()
                sums += moments.sum(dim=(1, 2))
        means = context.dist.all_reduce(sums) / (count * num_tokens)
        latent_mean, mean_square, average_variance = means
        # Var(z) = Var(mean) + E(std^2), the law of total variance.
        latent_std = (mean_square - latent_mean.square() + average_variance).sqrt()
        if not latent_std.min() > 0:
            raise UserError(
                f"latent channel {int(latent_std.argmin())} is the same for all images, so that it "
                "cannot be normalized; train the tokenizer again, with a lower --lr"
            )
        if context.dist.is_main:
            write_metadata(path, encoder_hash, context.data.fingerprint, latent_mean, latent_std)
        context.dist.barrier()
    latents = LatentDataset(
        path,
        encoder_hash,
        context.data.fingerprint,
        count,
        num_tokens,
        latent_dim,
        len(context.data.classes),
    )
    tokenizer.latent_mean.copy_(latents.mean)
    tokenizer.latent_std.copy_(latents.std)
    return latents


# --------------------------------------------------------------------------------------------------
# Command line.


def print_run(context: TrainContext, tokenizer: Tokenizer, generator: nn.Module) -> None:
    """Say what is going to be trained, on what, and with which values."""
    config = context.config
    settings = ", ".join(f"{name} {value}" for name, value in asdict(config).items() if value != "")
    print(f"data: {context.data.describe()}; {len(context.train_indices)} to train on")
    print(f"objective: {config.describe_objective()}")
    print(
        f"tokenizer: {describe_parameters(tokenizer)}, N = {tokenizer.num_patches} patches, "
        f"L = {tokenizer.num_latent_tokens} tokens of C = {tokenizer.latent_dim} channels"
    )
    print(f"generator: {config.generator}, {describe_parameters(generator)}")
    if context.inception is None:
        print(
            f"distances: of HOG features; for FID, put {INCEPTION_FILE} beside the other weights "
            f"({INCEPTION_URL})"
        )
    print("\n".join(textwrap.wrap(f"config: {settings}", width=100, subsequent_indent="  ")))
    if not has_held_out_images(context):
        warn(f"only {len(context.data)} images: they are trained on and evaluated on alike")
    if config.needs_teacher_file:
        teacher = read_teacher(config.teacher_file, config.image_size, config.grid_size)
        if teacher["data"] == context.data.fingerprint:
            warn(f"{config.teacher_file} was trained on these images, with their labels")


def read_result(context: TrainContext) -> dict:
    """result.json of the stages so far. It is only a record, so a damaged one is set aside."""
    path = context.path("result.json")
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except UserError as error:
        context.dist.barrier()  # all processes have read the file before it is moved
        if context.dist.is_main:
            path.replace(f"{path}.damaged")
        warn(
            f"{error}; it is only a record, and is kept as {path.name}.damaged",
            context.dist.is_main,
        )
        return {}


def main(arguments: list[str]) -> None:
    config, options = parse_config(arguments, description=__doc__)
    dist = Distributed.start(options.device)
    check_config(config, dist)
    context = TrainContext.open(config, dist, options)
    stages = [options.stage]
    if options.stage == "all":
        stages = [*config.stages, "latents", "generator"]
    if options.dry_run:
        trainers = Trainers(train_tokenizer, train_generator)
        measure_run(context, stages, required_weights(config, stages), trainers)
        return

    # ---- What is left to do ----
    result = read_result(context)
    while stages and stages[0] in result and is_finished(context, stages[0]):
        if dist.is_main:
            print(f"{stages[0]}: finished before")
        stages.pop(0)
    if not stages:
        return

    # ---- Official weights, and a lock, so that one run at a time is at work in a folder ----
    hashes = download_weights(required_weights(config, stages), config.weights_dir, dist)
    with as_user_error():
        # FID is reported where Inception's weights are available on all machines.
        path = inception_path(config.weights_dir)
        is_missing_somewhere = dist.any_rank(not path.is_file())
        if not is_missing_somewhere:
            context.inception = load_inception(config.weights_dir, context.device)
            hashes[INCEPTION_FILE] = hash_file(path)
    if dist.is_main:
        lock = lock_file(context.path("log.jsonl"))  # noqa: F841  held until the process ends
        remove_temporary_files(context.path(""))
    dist.barrier()

    # ---- What goes from stage to stage ----
    torch.manual_seed(config.seed)
    tokenizer = context.to_device(build_tokenizer(config))
    gan = None
    if config.adversarial_weight and stages[0] in config.stages:
        gan = build_gan(context.device)
    load_previous_stage(context, stages[0], tokenizer, gan)
    if context.teacher_hash:
        hashes["teacher file"] = context.teacher_hash
    if dist.is_main:
        with torch.device("meta"):
            generator = build_generator(config, tokenizer, len(context.data.classes))
        print_run(context, tokenizer, generator)
        sizes = file_sizes(context, stages, tokenizer, generator)
        check_room(context.path(""), bytes_to_write(context, sizes), "files of this run")

    # ---- The stages ----
    if config.tokenizer_run:
        result["tokenizer_run"] = {"encoder": hash_encoder(tokenizer)}
    result |= {"objective": config.describe_objective(), "config": asdict(config)}
    result["weights"] = result.get("weights", {}) | hashes
    for stage in stages:
        start = time.perf_counter()
        if stage in config.stages:
            metrics = train_tokenizer(context, stage, tokenizer, gan)
        else:
            encoder_hash = hash_encoder(tokenizer)
            latents = cache_latents(context, tokenizer, encoder_hash)
            metrics = {"latents": len(latents)}
            if stage == "generator":
                generator = train_generator(context, tokenizer, latents, encoder_hash)
                metrics = sample_quality(generator, tokenizer, context)
                log = MetricLog(context.path("log.jsonl"), stage, dist)
                log.write(config.generator_steps, metrics)
        metrics["seconds"] = round(time.perf_counter() - start, 1)
        if dist.is_main:
            print(f"{stage}: {json.dumps(metrics)}")
            made_by = describe_run("train.py", arguments, dist)
            result[stage] = metrics | {"made_by": made_by | {"preset": options.preset}}
            write_text(json.dumps(result, indent=1), context.path("result.json"))
        dist.barrier()


if __name__ == "__main__":
    run_main(main)
