"""How many Gaussians latents need: the mixture analysis of MAETok (arXiv 2502.03444, fig. 2).

    train, test = standardize(train, test)                    leading directions, of variance 1
    nll = gaussian_mixture_nll(train, test, num_components)   nats per dimension

Latents that few Gaussians describe well should be easy for a generator. `python lab.py recipes`
draws this likelihood over the number of Gaussians, for each recipe.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

MIN_VARIANCE = 0.01  # of a component, in units of the data's (ours)


class Mixture(NamedTuple):
    """K Gaussians with diagonal covariances in D dimensions."""

    log_weights: Tensor  # (K,)
    means: Tensor  # (K, D)
    variances: Tensor  # (K, D)


def standardize(train: Tensor, test: Tensor, max_dims: int = 64) -> tuple[Tensor, Tensor]:
    """The leading principal components of train, each of mean 0 and variance 1 (ours).

    train (N, D), test (M, D) -> the same rows with at most max_dims columns, float64. One Gaussian
    then needs the same number of nats for all latents, so that recipes with different numbers of
    channels are comparable.
    """
    train = train.double()
    test = test.double()
    variances, directions = torch.linalg.eigh(train.T.cov())  # ascending
    num_dims = min(max_dims, int((variances > 1e-6 * variances[-1]).sum()))
    directions = directions[:, -num_dims:] / variances[-num_dims:].sqrt()
    mean = train.mean(dim=0)
    return (train - mean) @ directions, (test - mean) @ directions


def log_joint(x: Tensor, mixture: Mixture) -> Tensor:
    """log(weight_k N(x_n; mean_k, variance_k)); x (N, D) -> (N, K)."""
    log_weights, means, variances = mixture
    precisions = 1 / variances
    squares = x.square() @ precisions.T - 2 * x @ (means * precisions).T
    constants = (means.square() * precisions + (2 * math.pi * variances).log()).sum(dim=1)
    return log_weights - 0.5 * (squares + constants)


def em_step(x: Tensor, mixture: Mixture) -> Mixture:
    """One step of expectation maximization; x (N, D)."""
    shares = log_joint(x, mixture).softmax(dim=1)  # of each component in each row, (N, K)
    counts = shares.sum(dim=0).clamp(min=1e-9)[:, None]
    means = shares.T @ x / counts
    variances = shares.T @ x.square() / counts - means.square()
    log_weights = (counts[:, 0] / len(x)).log()
    return Mixture(log_weights, means, variances.clamp(min=MIN_VARIANCE))


def first_mixture(x: Tensor, num_components: int, generator: torch.Generator) -> Mixture:
    """Means at rows of x (N, D) that lie far from each other (k-means++), and equal weights."""
    picks = torch.randint(len(x), (1,), generator=generator)
    means = x[picks]
    for _ in range(num_components - 1):
        nearest = torch.cdist(x, means).amin(dim=1).square()
        pick = torch.multinomial(nearest + 1e-12, 1, generator=generator)
        means = torch.cat([means, x[pick]])
    variances = x.var(dim=0, correction=0).expand_as(means)
    log_weights = torch.full((num_components,), -math.log(num_components), dtype=x.dtype)
    return Mixture(log_weights, means, variances)


def gaussian_mixture_nll(
    train: Tensor, test: Tensor, num_components: int, num_steps: int = 50, seed: int = 0
) -> float:
    """The negative log likelihood of test (M, D), in nats per dimension.

    The mixture is fitted to train (N, D) by num_steps of expectation maximization, in float64.
    """
    train = train.double()
    test = test.double()
    generator = torch.Generator().manual_seed(seed)
    mixture = first_mixture(train, num_components, generator)
    for _ in range(num_steps):
        mixture = em_step(train, mixture)
    log_likelihood = log_joint(test, mixture).logsumexp(dim=1)
    return -log_likelihood.mean().item() / test.shape[1]
