"""Train MacTok, or a system beside it: images -> tokenizer -> latents -> SiT -> samples. Run the same command again to resume.

    python train.py                                                   # offline default: built-in shapes, minutes on a CPU
    python train.py --data photos/ --preset toy                       # your own images: one sub-folder per class, or flat
    python train.py --recipe ldetok --out out_ldetok                  # another method: maetok, ldetok, aligntok, kl, ae
    python train.py --data imagenet/train --preset b256 --dry_run     # parameters, memory and time before starting
    torchrun --nproc_per_node=8 train.py --data imagenet/train --preset b256 --tokens 128 --out runs/b256

Stages, each with its own checkpoint in --out, done in turn unless --stage picks one:
    tokenizer   encoder, bottleneck and decoder with masks and alignment   -> tokenizer.pt, masks.png, reconstructions.png
    decoder     the decoder alone                                          -> decoder.pt, reconstructions.png
                (aligntok: adapter and joint in place of tokenizer)
    latents     encode the data set once                                   -> latents.npy, latents.json
    sit         the flow-matching transformer on the latents               -> sit.pt, samples.png
All presets but toy train the whole objective, with official weights, fetched before the first step. Every value and its source is
in recipes.py. x (b, 3, S, S) are images, z (b, L, C) latents, b the rows of a micro batch.
"""

import copy
import json
import math
import time
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

import masking
from align import VITS, ViT, build_heads, build_tokenizer
from losses import DRAWS, Adversary, Balance
from plumbing import show
from plumbing.data import Latents, batches, loader, shared_array, to_float
from plumbing.inception import load_inception
from plumbing.run import Processes, UserError, claim, command_line, progress, read_json, state_hash, warn, write_text
from plumbing.state import Run, State, draw, frozen_networks, load_stage, moments, official_files, update_ema
from plumbing.weights import at_hand, find_official, load_official
from recipes import Config, check_config, micro_batches, parse_config
from sit import GENERATORS, drop_labels, flow_matching_loss
from tokenizer import Tokenizer, load_dinov2, to_image


def train_on_images(run: Run, stage: str) -> dict:
    """A stage on images: eq. 7, of the whole tokenizer or of its decoder alone (section 4.1) -> its part of result.json."""
    cfg, steps, device = run.config.at(stage), run.config.steps(stage), run.device
    tokenizer, weights = run.place(build_tokenizer(asdict(cfg))), cfg.loss_weights()
    teachers, eye, lpips = frozen_networks(run, cfg)
    heads = run.place(build_heads(weights, tokenizer, teachers))
    adversary = Adversary(VITS["dino_vits16"][0]).to(device) if eye else None
    balance = Balance().to(device) if cfg.preservation_weight else None
    age, of = start_from(run, stage, tokenizer, adversary)  # steps of the stages before; what they made
    teachers |= {"before": copy.deepcopy(tokenizer.encoder).requires_grad_(False).eval()} if balance else {}
    if "teacher" in teachers and run.processes.first and not age:
        show.draw_masks(teachers["teacher"], run)
    ema = copy.deepcopy(tokenizer).requires_grad_(False).eval()
    optimizers = {"model": adamw([tokenizer, heads], betas=(0.9, 0.95), weight_decay=1e-4)}
    optimizers |= {"discriminator": adamw([adversary], betas=(0.9, 0.95), weight_decay=1e-4)} if adversary else {}
    networks = dict(model=tokenizer, heads=heads, adversary=adversary, balance=balance, ema=ema)
    state = State(run, stage, networks, optimizers, of)
    encode, decode, compare, judge = map(state.parallel, (tokenizer.encoder, tokenizer.decoder, heads, adversary))
    pieces = micro_batches(cfg.batch_size, cfg.micro_batch, run.processes)  # this process's rows of the global batch
    loaded = iter(loader(run.data, batches(run.train_items, cfg.batch_size, cfg.seed, state.step, pieces), cfg.workers))
    uniform = {"flip": (), "ratio": (), "coin": (), "order": (tokenizer.num_patches,), "augment": (4, DRAWS), "tau": ()}
    normal = dict.fromkeys(("noise", "eps"), (tokenizer.tokens, tokenizer.channels))
    begin = cfg.discriminator_start - age if adversary else math.inf  # the discriminator's first step in this stage
    dropping, numbers = cfg.mask == "dropped", None

    for step in state.steps():
        draws = draw(run, stage, step, cfg.batch_size, pieces, uniform, normal, alike=("ratio",) if dropping else ())
        left = 1 - step / steps if cfg.stages[stage].fades else 1.0  # of the mask ratio
        judging, fooling = step >= begin, step >= begin + cfg.discriminator_start // 4  # it learns; the decoder feels it

        for d in draws:  # gradient accumulation
            state.exchange(d is draws[-1])
            x = to_float(next(loaded)[0].to(device, non_blocking=True))
            x = torch.where(d.flip[:, None, None, None] < 0.5, x.flip(-1), x)  # images (b, 3, S, S) in [-1, 1]
            with run.autocast():
                targets = {name: teacher(x) for name, teacher in teachers.items()}  # "teacher": cls (b, D), patches (b, N, D)
                scores = masking.similarity(*targets["teacher"]) if "teacher" in targets else None  # (b, N)
                m = masking.mask_ratio(d.ratio, left * cfg.mask_ratio, left * cfg.mask_least)  # (b,)
                mask = masking.MASKS[cfg.mask](m, d.order, scores, d.coin)  # (b, N), True = hidden
                posterior = encode(x, mask, dropping)
                z = posterior.sample(d.noise)  # (b, L, C)
                shown = masking.hide_latents(z, m, d.order) if cfg.mask == "latent" else z
                shown = masking.noise_latents(shown, d.tau, d.eps, cfg.latent_noise) if cfg.latent_noise else shown
                reconstruction = to_image(decode(shown, mask if dropping else None), cfg.patch_size)  # (b, 3, S, S)

                on_latents = {"kl": posterior.kl().sum(1).mean()} | compare(z, targets, mask)  # eq. 9, eq. 3-6
                pixels = reconstruction.detach().requires_grad_()  # losses on pixels end here: each network is passed once
                on_pixels = {"mse": F.mse_loss(pixels, x)} | ({"perceptual": lpips(pixels, x).mean()} if lpips else {})
                judgement, fooled, logs = judge(eye, pixels, x, d.augment, fooling) if judging else (None, None, {})
            (slope,) = torch.autograd.grad(total(on_pixels, weights), pixels)
            if fooling:
                (against,) = torch.autograd.grad(fooled, pixels)
                adaptive = adversary.weigh(tokenizer.decoder.to_patches.weight, (reconstruction, slope), (reconstruction, against))
                slope = slope + weights["adversarial"] * adaptive * against
            if balance:
                preservation, layer = (on_latents["preservation"], None), tokenizer.encoder.to_moments.weight
                weights["preservation"] = cfg.preservation_weight * balance.weigh(layer, (reconstruction, slope), preservation)
            backward(reconstruction, slope, [total(on_latents, weights), judgement], 1 / len(pieces))
            terms = {"loss": total(on_pixels | on_latents, weights)} | on_pixels | on_latents | logs
            state.add(terms | moments(posterior.mean, z))

        state.update(warmup_cosine(cfg, step, steps))
        update_ema(ema, tokenizer, cfg.ema_decay, step)
        for measured in filter(None, (adversary, balance)):  # the next adaptive weights, LeCam's averages
            measured.end_step(lambda sums: run.processes.sum(sums) / (len(pieces) * run.processes.world))
        if state.due(cfg.log_every):
            state.write_line(cfg.batch_size)
        if state.due(cfg.save_every):
            state.save()
            numbers = show.reconstruction_quality(ema, run)  # and reconstructions.png
            state.append(numbers)
    return show.reconstruction_quality(ema, run) if numbers is None else numbers


def train_sit(run: Run) -> dict:
    """Flow matching on normalised latents; z is sampled anew from the cached posterior at each step -> its part of result.json."""
    cfg, device, null_label = run.config, run.device, len(run.data.classes)
    tokenizer, latents = cache_latents(run)
    latent = tokenizer.tokens, tokenizer.channels  # L, C
    sit = run.place(GENERATORS[cfg.generator](*latent, null_label, cfg.sit, tokenizer.has_grid))
    ema = copy.deepcopy(sit).requires_grad_(False).eval()
    optimizers = {"model": adamw([sit], betas=sit.betas, weight_decay=0.0)}
    state = State(run, "sit", {"model": sit, "ema": ema}, optimizers, latents.seal["stamp"], {"tokenizer": tokenizer.state_dict()})
    velocity = state.parallel(sit)
    pieces = micro_batches(cfg.sit_batch_size, cfg.micro_batch, run.processes)
    items = batches(range(len(latents)), cfg.sit_batch_size, cfg.seed, state.step, pieces)
    uniform, normal = {"flip": (), "drop": (), "t": ()}, dict.fromkeys(("noise", "end"), latent)

    for step in state.steps():
        draws = draw(run, "sit", step, cfg.sit_batch_size, pieces, uniform, normal)
        for d in draws:
            state.exchange(d is draws[-1])
            mean, std, y = (part.to(device, non_blocking=True) for part in latents.batch(next(items)))
            image, mirror = torch.arange(len(y), device=device), (d.flip < 0.5).long()  # mean, std (b, 2, L, C): mirrored, too
            z = mean[image, mirror] + std[image, mirror] * d.noise  # (b, L, C)
            x = tokenizer.normalize(z)
            y = drop_labels(y, null_label, d.drop)
            with run.autocast():
                loss = flow_matching_loss(velocity, x, y, sit.time(d.t), d.end, sit.cosine_weight).mean()
            (loss / len(pieces)).backward()
            state.add({"loss": loss})
        state.update(cfg.sit_lr)
        update_ema(ema, sit, cfg.ema_decay, step)
        if state.due(cfg.log_every):
            state.write_line(cfg.sit_batch_size)
        if state.due(cfg.save_every):
            state.save()
    return show.sample_quality(ema, tokenizer, run)  # and samples.png


def total(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The weighted sum of named losses (eq. 7)."""
    return sum(weights[name] * loss for name, loss in terms.items())


def backward(reconstruction: Tensor, slope: Tensor, losses: list[Tensor | None], share: float) -> None:
    """One backward pass of `share` times: what has the gradient `slope` at the pixels, and the other losses."""
    roots = [(reconstruction, share * slope), *((share * loss, None) for loss in losses if loss is not None and loss.requires_grad)]
    torch.autograd.backward(*zip(*roots))


def adamw(networks: list[nn.Module], betas: tuple[float, float], weight_decay: float) -> AdamW:
    """Of what is trained in these networks; the loop sets the learning rate at each step."""
    trained = [p for network in networks for p in network.parameters() if p.requires_grad]
    return AdamW(trained, betas=betas, weight_decay=weight_decay, fused=True)


def warmup_cosine(cfg: Config, step: int, steps: int) -> float:
    """The learning rate: linear over warmup_steps to lr, then cosine to zero at the last step (paper B.1)."""
    ramp = min(1.0, (step + 1) / max(1, cfg.warmup_steps))
    return cfg.lr * ramp * 0.5 * (1 + math.cos(math.pi * step / steps))


def start_from(run: Run, stage: str, tokenizer: Tokenizer, adversary: Adversary | None) -> tuple[int, str]:
    """What the tokenizer learns in a stage, and from where: DINOv2's weights, or those of the stage before.

    -> the steps of the stages before, and a hash of their encoder.
    """
    for name, parameter in tokenizer.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name.startswith(run.config.stages[stage].learns))
    stages = list(run.config.stages)
    before = stages[: stages.index(stage)]
    if before:
        saved = load_stage(run, before[-1], finished=True)
        tokenizer.load_state_dict(saved["ema"])
        if adversary:
            adversary.load_state_dict(saved["adversary"])
        return sum(run.config.steps(name) for name in before), state_hash(tokenizer.encoder.state_dict())
    if (name := run.config.encoder_file) in VITS:
        official = load_official(ViT(name), name, run.config.weights, run.dry).state_dict()
        if run.config.encoder_init == "teacher":
            tokenizer.encoder.teacher.vit.load_state_dict(official)
        else:
            load_dinov2(tokenizer.encoder, official)
    return 0, ""


def trained_tokenizer(run: Run) -> tuple[Tokenizer, str]:
    """The averaged tokenizer of the last stage on images that has a checkpoint, and a hash of its encoder and the data."""
    stages = list(run.config.stages)
    stage = next((name for name in reversed(stages) if run.path(f"{name}.pt").exists()), stages[0])
    tokenizer = build_tokenizer(asdict(run.config))
    tokenizer.load_state_dict(load_stage(run, stage, finished=True)["ema"])
    return run.place(tokenizer).eval(), state_hash(tokenizer.encoder.state_dict(), run.data.stamp)


@torch.no_grad()
def cache_latents(run: Run) -> tuple[Tokenizer, Latents]:
    """Posterior moments of each training image and its mirror image -> latents.npy, once; the tokenizer with their statistics."""
    processes, path, items, (tokenizer, of) = run.processes, run.path("latents.npy"), run.train_items, trained_tokenizer(run)
    latent = tokenizer.tokens, tokenizer.channels  # L, C
    if not Latents.are_whole(path):
        parts = processes.share(range(len(items)), 16)
        lists = [items[part].tolist() for part in parts]
        sums = torch.zeros(3, tokenizer.channels, dtype=torch.float64)
        with shared_array(path, (len(items),), Latents.record(*latent), processes) as rows, run.autocast():
            for (images, labels), part in zip(progress(loader(run.data, lists, run.config.workers), "latents", processes), parts):
                images = to_float(images.to(run.device))
                posterior = tokenizer.encode(torch.stack([images, images.flip(-1)], dim=1).flatten(0, 1))
                mean, std = (moment.unflatten(0, (-1, 2)).cpu() for moment in (posterior.mean, posterior.std))  # (b, 2, L, C)
                batch = rows[part.start : part.stop]
                batch["mean"], batch["std"], batch["label"] = mean.numpy(), std.numpy(), labels.numpy()
                sums += torch.stack([moment.double().sum((0, 1, 2)) for moment in (mean, mean.square(), std.square())])
        center, mean_square, variance = processes.sum(sums) / (2 * len(items) * tokenizer.tokens)
        spread = (mean_square - center.square() + variance).sqrt()  # law of total variance
        if processes.first:  # written last
            seal = {"stamp": of, "latent_mean": center.tolist(), "latent_std": spread.tolist()}
            write_text(json.dumps(seal), path.with_suffix(".json"))
        processes.barrier()
    latents = Latents(path, of, len(items), *latent, len(run.data.classes))
    tokenizer.latent_mean.copy_(torch.tensor(latents.seal["latent_mean"]))
    tokenizer.latent_std.copy_(torch.tensor(latents.seal["latent_std"]))
    return tokenizer, latents


def is_done(run: Run, stage: str) -> bool:
    """Whether a stage has nothing left to do. UserError if its checkpoint is of another run."""
    if stage == "latents":
        return Latents.are_whole(run.path("latents.npy")) and bool(cache_latents(run))
    saved = load_stage(run, stage, of=trained_tokenizer(run)[1] if stage == "sit" else None)
    return saved is not None and saved["step"] >= run.config.steps(stage)


def main(arguments: list[str]) -> None:
    config, options = parse_config(arguments)
    processes = Processes.start(options.device)
    check_config(config, processes)
    run = Run.open(config, processes, options.dry_run, options.precision, options.compile)
    stages = [*config.stages, "latents", "sit"] if options.stage == "all" else [options.stage]
    if processes.first:
        print(f"objective: {config.objective}")
    if options.dry_run:
        return show.measure(run, official_files(config, stages), train_on_images)
    path = run.path("result.json")
    try:
        result = read_json(path) if path.exists() else {}
    except UserError as error:
        processes.barrier()
        if processes.first:
            path.replace(f"{path}.damaged")
        warn(f"{error}; it is only a record, kept as {path.name}.damaged", processes)
        result = {}
    while stages and stages[0] in result and is_done(run, stages[0]):
        if processes.first:
            print(f"{stages[0]}: done before")
        stages.pop(0)
    files = official_files(config, stages)
    if stages and not processes.any(not at_hand(config.weights, "inception")):
        files.append("inception")  # FID is reported if its weights are at hand, which is no reason to fetch them
    hashes = find_official(files, config.weights, processes)
    if "inception" in files:
        run.inception = load_inception(config.weights, run.device)
    _held = claim(run.path("log.jsonl")) if processes.first else None  # one run at a time in a folder
    result |= {"objective": config.objective, "weights": result.get("weights", {}) | hashes}
    for stage in stages:
        start = time.perf_counter()
        torch.manual_seed(config.seed)  # initial weights: equal on all processes, whichever stages ran before
        if stage == "latents":
            numbers = {"images": len(cache_latents(run)[1])}
        else:
            numbers = train_sit(run) if stage == "sit" else train_on_images(run, stage)
        result[stage] = numbers | {"seconds": round(time.perf_counter() - start, 1)}
        processes.barrier()
        if processes.first:
            print(f"{stage}: {json.dumps(result[stage])}")
            result[stage] |= {"made_by": show.provenance(config, options, arguments, processes)}
            write_text(json.dumps(result | {"config": asdict(config)}, indent=1), path)


if __name__ == "__main__":
    command_line(main)
