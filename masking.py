"""What to hide from the encoder or the decoder (paper section 3.2). Pure functions of scores and draws, copy any of them.

A mask is bool (B, N), True = hidden. Each image has its own ratio m, of which exactly round(m N) patches are hidden:

    m = mask_ratio(u)                                    u (B,) uniform in [0, 1)
    mask = random_mask(m, order)                         order (B, N) uniform: any patches
    mask = semantic_mask(m, similarity(cls, patches))    the patches most like the whole image
    mask = mixed_mask(m, order, scores, coin)            one or the other, per image; coin (B,) uniform

What the decoder gets instead of z: `hide_latents` (a failing ablation), `noise_latents` (l-DeTok).

    python -c "import torch, masking as k; print(k.random_mask(k.mask_ratio(torch.rand(4)), torch.rand(4, 64)).sum(1))"
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def mask_ratio(u: Tensor, most: float = 0.7, least: float = -0.1) -> Tensor:
    """u (B,) -> m = max(0, U(least, M)): at -0.1 one image in 1 + 10 M is not masked (section 3.2; l-DeTok eq. 5)."""
    return (u * (most - least) + least).clamp(min=0)


def mask_highest(m: Tensor, scores: Tensor) -> Tensor:
    """m (B,), scores (B, N) -> mask (B, N), True at the round(m N) highest scores of each row."""
    rank = scores.argsort(dim=1, descending=True).argsort(dim=1)  # 0 = highest
    return rank < (m * scores.shape[1]).round()[:, None]


def random_mask(m: Tensor, order: Tensor) -> Tensor:
    """m (B,), order (B, N) uniform -> mask (B, N): round(m N) patches drawn without replacement."""
    return mask_highest(m, order)


def similarity(cls: Tensor, patches: Tensor) -> Tensor:
    """Eq. 1: cls (B, D), patches (B, N, D) of the teacher -> cos(cls, patch_i), (B, N)."""
    return F.cosine_similarity(cls[:, None].float(), patches.float(), dim=-1)


def semantic_mask(m: Tensor, scores: Tensor) -> Tensor:
    """Eq. 2: m (B,), scores (B, N) of eq. 1 -> mask (B, N): the top k = round(m N) are hidden."""
    return mask_highest(m, scores)


def mixed_mask(m: Tensor, order: Tensor, scores: Tensor, coin: Tensor) -> Tensor:
    """Random or semantic with probability 1/2 each, per image (section 3.2) -> mask (B, N)."""
    return torch.where(coin[:, None] < 0.5, random_mask(m, order), semantic_mask(m, scores))


def hide_latents(z: Tensor, m: Tensor, order: Tensor) -> Tensor:
    """The paper's failing ablation (fig. 1): round(m L) latents of z (B, L, C) are hidden from the decoder.

    They become 0, the mean of the prior (ours).
    """
    return z.masked_fill(random_mask(m, order[:, : z.shape[1]])[..., None], 0)


def noise_latents(z: Tensor, tau: Tensor, noise: Tensor, gamma: float = 3.0) -> Tensor:
    """z (B, L, C), tau (B,) uniform, noise ~ N(0, 1) -> (1 - tau) z + tau gamma noise (l-DeTok section 3.2, eq. 4)."""
    tau = tau[:, None, None]
    return (1 - tau) * z + tau * gamma * noise


# By name, with one call: m (B,), order (B, N), scores (B, N) or None where there is no teacher, coin (B,) -> mask (B, N).
MASKS = {
    "mixed": mixed_mask,
    "random": lambda m, order, scores, coin: random_mask(m, order),
    "semantic": lambda m, order, scores, coin: semantic_mask(m, scores),
    "latent": lambda m, order, scores, coin: torch.zeros_like(order, dtype=torch.bool),  # `hide_latents` acts instead
    "dropped": lambda m, order, scores, coin: random_mask(m, order),  # m of one value: the encoder leaves out the hidden patches
    "none": lambda m, order, scores, coin: torch.zeros_like(order, dtype=torch.bool),
}
