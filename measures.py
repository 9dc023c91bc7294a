"""What the lab measures of a finished run: KL, probes, the generator's loss, a judge's view.

    measures = measure(folder, device, judge_file)     one number by name, for lab.MEASURES

lab.py writes the result into cell.json of the run's folder, beside plots.pt for its pictures.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from classifiers import judge_distance, load_judge, share_found
from evaluate import linear_probe
from family import encode_visible
from masking import mask_latents, random_mask
from mixture import gaussian_mixture_nll, standardize
from recipes import Config
from sample import TrainedRun, generate, load_run, reconstruct
from utils.data import evenly_spaced, open_dataset, read_batch, train_val_split
from utils.files import hash_file, save_torch
from utils.images import to_float
from utils.random import BatchRNG

MAX_IMAGES = 6_000  # that are encoded: as many as there are built-in shapes
NUM_DRAWS = 8  # of time and noise for each held-out image, in the generator's held-out loss
NUM_COMPONENTS = (1, 2, 4, 8, 16, 32, 64)  # of the mixtures of Gaussians
MIXTURE_ROWS = 5_000  # latents that mixtures are fitted to, at most


def read_all_images(config: Config) -> tuple[Tensor, Tensor, np.ndarray]:
    """Images uint8 (n, 3, S, S), labels (n,), and the indices of those that a run held out."""
    data = open_dataset(config.data_dir, config.image_size)
    images, labels = read_batch(data, range(len(data)))
    _, held_out = train_val_split(data.labels, config.eval_images)
    return images, labels, held_out


def take_some(images: Tensor, labels: Tensor, held_out: np.ndarray):
    """The same, of all held-out images and at most about MAX_IMAGES evenly spaced others."""
    keep = np.union1d(held_out, evenly_spaced(len(images), MAX_IMAGES))
    return images[keep], labels[keep], np.searchsorted(keep, held_out)


@torch.no_grad()
def measure(folder: Path, device: torch.device, judge_file: str = "") -> dict:
    """What the averaged weights make of whole images; and plots.pt, what pictures need.

    kl_per_token    nats, of held-out images; not for a deterministic bottleneck
    active_units    the share of latents whose mean varies over held-out images by more than 0.01
    and those of measure_probes, measure_generator and measure_with_judge
    """
    run = load_run(folder, device)
    images, labels, held_out = take_some(*read_all_images(run.config))
    posterior = encode_all(run, images)
    z = posterior.sample(fixed_noise(posterior))
    variance = posterior.mean[held_out].var(dim=0)
    measures = {"active_units": (variance > 0.01).double().mean().item()}
    if hasattr(posterior, "kl"):
        measures["kl_per_token"] = posterior.kl()[held_out].mean().item()
    measures |= measure_probes(run, images, labels, z)
    if run.generator is not None:
        measures |= measure_generator(run, z, labels, held_out)
    if judge_file:
        measures |= measure_with_judge(run, judge_file, images[held_out], labels[held_out])
    save_plot_data(run, images, labels, held_out, posterior.mean.flatten(1), folder)
    return measures


def encode_all(run: TrainedRun, images: Tensor):
    """The posterior (n, L, C) of whole images uint8 (n, 3, S, S), on the CPU."""
    batches = images.to(run.device).split(64)
    posteriors = [run.tokenizer.encode(to_float(batch)) for batch in batches]
    return type(posteriors[0])(*(torch.cat(parts).cpu() for parts in zip(*posteriors)))


def encode_half_hidden(run: TrainedRun, images: Tensor) -> Tensor:
    """Latents (n, L, C) of images uint8 (n, 3, S, S), half of whose patches are hidden at random.

    Where a recipe leaves hidden patches out, their latents are zero, as its decoder sees them.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(len(images), run.tokenizer.num_patches, generator=generator)
    masks = random_mask(torch.full((len(images),), 0.5), noise)
    parts = []
    for batch, mask in zip(images.split(64), masks.split(64)):
        x = to_float(batch.to(run.device))
        mask = mask.to(run.device)
        if run.config.drop_masked:
            posterior = encode_visible(run.tokenizer, x, mask, int(mask[0].sum()))
        else:
            posterior = run.tokenizer.encode(x, mask)
        z = posterior.sample(fixed_noise(posterior))
        parts.append(mask_latents(z, mask) if run.config.drop_masked else z)
    return torch.cat(parts).cpu()


def fixed_noise(posterior) -> Tensor:
    """The same normal noise (n, L, C) in each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean.device)


def measure_probes(run: TrainedRun, images: Tensor, labels: Tensor, z: Tensor) -> dict[str, float]:
    """The share of images whose class a linear classifier finds in sampled latents z (n, L, C).

    probe           as `evaluate.py probe`, but of sampled latents: in the means a probe also reads
                    what the posterior's noise hides from the decoder and from the generator
    noisy_probe     the same classifier on latents with noise of half their standard deviation
    hidden_probe    the same classifier on latents of images with half of their patches hidden
    """
    fit, test = train_val_split(labels.tolist(), len(labels))
    known = z[fit].flatten(1)
    unknown = z[test].flatten(1)
    noise = torch.randn(unknown.shape, generator=torch.Generator().manual_seed(1))
    variants = {
        "probe": unknown,
        "noisy_probe": unknown + 0.5 * known.std(dim=0) * noise,
        "hidden_probe": encode_half_hidden(run, images[test]).flatten(1),
    }
    return {
        name: linear_probe(known, labels[fit], latents, labels[test])
        for name, latents in variants.items()
    }


def measure_generator(
    run: TrainedRun, z: Tensor, labels: Tensor, held_out: np.ndarray
) -> dict[str, float | dict]:
    """How well sampled latents z (n, L, C) of held-out images are modeled.

    flow_loss    the generator's loss (section B.2), a mean over NUM_DRAWS times and noises
    mixture      negative log likelihood under Gaussian mixtures, in nats per dimension, by the
                 number of components (mixture.py)
    """
    x = run.tokenizer.normalize(z.to(run.device))
    y = labels[held_out].to(run.device)
    losses = []
    for seed in range(NUM_DRAWS):
        rng = BatchRNG(seed, len(held_out), slice(None), run.device)
        losses.append(run.generator.loss(x[held_out], y, rng).mean().item())

    others = np.setdiff1d(np.arange(len(x)), held_out)
    others = others[evenly_spaced(len(others), MIXTURE_ROWS)]
    rows = x.flatten(1).cpu()
    known, unknown = standardize(rows[others], rows[held_out])
    mixture = {k: gaussian_mixture_nll(known, unknown, k) for k in NUM_COMPONENTS if k < len(known)}
    return {"flow_loss": float(np.mean(losses)), "mixture": mixture}


def measure_with_judge(
    run: TrainedRun, judge_file: str, images: Tensor, labels: Tensor
) -> dict[str, float | str]:
    """What a judge finds in what is made of held-out images uint8 (n, 3, S, S).

    judge_found              the share of reconstructions whose class it finds
    judge_found_originals    that share of the images themselves
    judge_reconstructions    Frechet distance of reconstructions from the images, in its features
    judge_samples            the same of as many samples, drawn as train.py draws them
    judge_hash               the file's SHA-256
    """
    network = load_judge(judge_file, run.config.image_size, run.classes).to(run.device)
    recons = torch.cat([reconstruct(run.tokenizer, batch).cpu() for batch in images.split(64)])
    measures = {
        "judge_found": share_found(network, recons, labels),
        "judge_found_originals": share_found(network, images, labels),
        "judge_reconstructions": judge_distance(network, recons, images),
        "judge_hash": hash_file(judge_file),
    }
    if run.generator is not None:
        classes = torch.arange(len(images)) % len(run.classes)
        samples = [
            generate(run, classes[rows], rows.tolist(), run.config.seed).cpu()
            for rows in torch.arange(len(images)).split(64)
        ]
        measures["judge_samples"] = judge_distance(network, torch.cat(samples), images)
    return measures


def save_plot_data(
    run: TrainedRun,
    images: Tensor,
    labels: Tensor,
    held_out: np.ndarray,
    mean: Tensor,
    folder: Path,
) -> None:
    """Write plots.pt: held-out images and reconstructions; two components of mean (n, L C)."""
    _, test = train_val_split(labels.tolist(), len(labels))
    shown = images[held_out[evenly_spaced(len(held_out), 8)]]
    centered = mean[test] - mean[test].mean(dim=0)
    u, scales, _ = torch.linalg.svd(centered, full_matrices=False)
    test_labels = labels[test]
    plot_data = {
        "components": u[:, :2] * scales[:2],  # the first two principal components
        "labels": test_labels,
        "classes": [name for i, name in enumerate(run.classes) if i in test_labels],
        "originals": shown,
        "reconstructions": reconstruct(run.tokenizer, shown).cpu(),
    }
    save_torch(plot_data, folder / "plots.pt")
