"""What the lab measures of a finished run: KL, probes, the generator's loss, a judge's view.

    measures = measure(folder, device, judge_file)     values by name (see lab.MEASURES)

lab.py writes the result into cell.json of the run's folder, beside plots.pt for its pictures.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from classifiers import Judge, judge_distance, load_judge, measure_accuracy
from evaluate import hide_half, linear_probe
from mixture import gaussian_mixture_nll, standardize
from recipes import Config
from sample import TrainedRun, generate, load_run, reconstruct
from utils.data import evenly_spaced, open_dataset, read_batch, train_val_split
from utils.files import hash_file, save_torch
from utils.images import to_float
from utils.random import BatchRNG

MAX_IMAGES = 6_000  # About so many images are encoded: there are as many built-in shapes.
NUM_DRAWS = 8  # The held-out loss is a mean over so many times and noises for each image.
NUM_COMPONENTS = (1, 2, 4, 8, 16, 32, 64)  # Mixtures of so many Gaussians are fitted.
MIXTURE_ROWS = 5_000  # They are fitted to at most so many latents.


def read_images(config: Config) -> tuple[Tensor, Tensor, np.ndarray]:
    """Images uint8 (n, 3, S, S), labels (n,), and the indices of those that a run held out.

    Of a large data set these are all held-out images, and about MAX_IMAGES evenly spaced ones.
    """
    data = open_dataset(config.data_dir, config.image_size)
    _, held_out = train_val_split(data.labels, config.eval_images)
    chosen = np.union1d(held_out, evenly_spaced(len(data), MAX_IMAGES))
    images, labels = read_batch(data, chosen, replace=True)
    return images, labels, np.searchsorted(chosen, held_out)


@torch.no_grad()
def measure(folder: Path, device: torch.device, judge_file: str = "") -> dict:
    """Measure a run's averaged weights on whole images, and write plots.pt for its pictures.

    kl_per_token    nats, of held-out images; not for a deterministic bottleneck
    active_units    the share of latents whose mean has a variance above 0.01 over held-out images

    The other values are those of measure_probes, measure_generator and measure_with_judge.
    """
    run = load_run(folder, device)
    images, labels, held_out = read_images(run.config)
    train_rows = np.setdiff1d(np.arange(len(images)), held_out)
    posterior = encode_all(run, images)
    z = posterior.sample(fixed_noise(posterior))
    variance = posterior.mean[held_out].var(dim=0)
    measures = {"active_units": (variance > 0.01).double().mean().item()}
    if hasattr(posterior, "kl"):
        measures["kl_per_token"] = posterior.kl()[held_out].mean().item()
    measures |= measure_probes(run, z, images, labels, train_rows, held_out)
    if run.generator is not None:
        measures |= measure_generator(run, z, labels, train_rows, held_out)
    if judge_file:
        chosen = train_rows[evenly_spaced(len(train_rows), len(held_out))]
        network = load_judge(judge_file, run.config.image_size, run.classes).to(device)
        measures |= measure_with_judge(
            run, network, images[held_out], labels[held_out], images[chosen]
        )
        measures["judge_hash"] = hash_file(judge_file)
    save_plot_data(run, images[held_out], labels[held_out], posterior.mean[held_out], folder)
    return measures


def encode_all(run: TrainedRun, images: Tensor):
    """The posterior (n, L, C) of whole images uint8 (n, 3, S, S), on the CPU."""
    batches = images.to(run.device).split(64)
    posteriors = [run.tokenizer.encode(to_float(batch)) for batch in batches]
    return type(posteriors[0])(*(torch.cat(parts).cpu() for parts in zip(*posteriors)))


def fixed_noise(posterior) -> Tensor:
    """The same normal noise (n, L, C) in each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(posterior.mean.shape, generator=generator)


def measure_probes(
    run: TrainedRun,
    z: Tensor,
    images: Tensor,
    labels: Tensor,
    train_rows: np.ndarray,
    held_out: np.ndarray,
) -> dict[str, float]:
    """The share of held-out images whose class a linear classifier finds in sampled latents.

    The classifier is fitted to the latents of the images that the tokenizer was trained on. z is
    (n, L, C), and train_rows and held_out are the indices of both kinds of images.

    probe           as `evaluate.py probe`, but of sampled latents: in the means a probe also reads
                    what the posterior's noise hides from the decoder and from the generator
    noisy_probe     the same classifier on latents with noise of half their standard deviation
    hidden_probe    the same classifier on latents of images half of whose patches are gray; no
                    recipe is trained on gray patches, so that none has an advantage
    """
    train = z[train_rows].flatten(1)
    test = z[held_out].flatten(1)
    noise = torch.randn(test.shape, generator=torch.Generator().manual_seed(1))
    no_scores = torch.empty(len(held_out), run.tokenizer.num_patches)  # random masks read none
    half_hidden = encode_all(run, hide_half(images[held_out], no_scores, "random"))
    variants = {
        "probe": test,
        "noisy_probe": test + 0.5 * train.std(dim=0) * noise,
        "hidden_probe": half_hidden.sample(fixed_noise(half_hidden)).flatten(1),
    }
    return {
        name: linear_probe(train, labels[train_rows], latents, labels[held_out])
        for name, latents in variants.items()
    }


def measure_generator(
    run: TrainedRun, z: Tensor, labels: Tensor, train_rows: np.ndarray, held_out: np.ndarray
) -> dict[str, float | dict]:
    """How well sampled latents z (n, L, C) of held-out images are modeled.

    flow_loss    the generator's loss (section B.2), a mean over NUM_DRAWS times and noises. Latents
                 with more noise or other channels have another least loss.
    mixture      negative log likelihood under Gaussian mixtures, in nats per dimension, by the
                 number of components (mixture.py)
    """
    x = run.tokenizer.normalize(z.to(run.device))
    y = labels[held_out].to(run.device)
    losses = []
    for seed in range(NUM_DRAWS):
        rng = BatchRNG(seed, len(held_out), slice(None), run.device)
        losses.append(run.generator.loss(x[held_out], y, rng).mean().item())

    chosen = train_rows[evenly_spaced(len(train_rows), MIXTURE_ROWS)]
    rows = x.flatten(1).cpu()
    train, test = standardize(rows[chosen], rows[held_out])
    mixture = {k: gaussian_mixture_nll(train, test, k) for k in NUM_COMPONENTS if k < len(train)}
    return {"flow_loss": float(np.mean(losses)), "mixture": mixture}


def measure_with_judge(
    run: TrainedRun, network: Judge, images: Tensor, labels: Tensor, train_images: Tensor
) -> dict[str, float]:
    """What a judge finds in what is made of held-out images uint8 (n, 3, S, S).

    judge_found              the share of reconstructions whose class it finds
    judge_found_originals    that share of the images themselves
    judge_reconstructions    Frechet distance of reconstructions from the images, in its features
    judge_samples            the same of as many samples, drawn as train.py draws them
    judge_originals          the same of train_images (n, 3, S, S), as many images of the training
                             set: what a perfect generator would have
    """
    recons = torch.cat([reconstruct(run.tokenizer, batch).cpu() for batch in images.split(64)])
    measures = {
        "judge_found": measure_accuracy(network, recons, labels),
        "judge_found_originals": measure_accuracy(network, images, labels),
        "judge_reconstructions": judge_distance(network, recons, images),
        "judge_originals": judge_distance(network, train_images, images),
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
    run: TrainedRun, images: Tensor, labels: Tensor, mean: Tensor, folder: Path
) -> None:
    """Write plots.pt: eight images and reconstructions, two components of the means (n, L, C)."""
    shown = images[evenly_spaced(len(images), 8)]
    mean = mean.flatten(1)
    u, scales, _ = torch.linalg.svd(mean - mean.mean(dim=0), full_matrices=False)
    plot_data = {
        "components": u[:, :2] * scales[:2],  # the first two principal components
        "labels": labels,
        "classes": [name for i, name in enumerate(run.classes) if i in labels],
        "originals": shown,
        "reconstructions": reconstruct(run.tokenizer, shown).cpu(),
    }
    save_torch(plot_data, folder / "plots.pt")
