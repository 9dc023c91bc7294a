"""Which image patches to hide from the encoder (paper section 3.2). Pure functions, copy any of them.

A mask is bool (B, N), True = hidden. Every mask hides exactly round(m * N) patches of each image, with a ratio m per image:

    ratio = mask_ratio(len(images), generator=generator)            # (B,)
    mask = random_mask(ratio, num_patches, generator)               # any patches
    mask = semantic_mask(cls, patches, ratio)                       # those most like the whole image
    mask = mixed_mask(cls, patches, ratio, generator)               # one or the other, per image
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def mask_ratio(batch: int, max_ratio: float = 0.7, *, generator: torch.Generator) -> Tensor:
    """m = max(0, U(-0.1, M)) per image, (B,): about one image in 1 + 10 M is not masked (section 3.2; l-DeTok eq. 5)."""
    uniform = torch.rand(batch, generator=generator, device=generator.device)
    return (uniform * (max_ratio + 0.1) - 0.1).clamp(min=0)


def random_mask(ratio: Tensor, num_patches: int, generator: torch.Generator) -> Tensor:
    """ratio (B,) in [0, 1] -> mask (B, num_patches): round(m N) patches drawn uniformly without replacement."""
    return mask_highest(torch.rand(len(ratio), num_patches, generator=generator, device=generator.device), ratio)


def semantic_mask(cls: Tensor, patches: Tensor, ratio: Tensor) -> Tensor:
    """cls (B, D), patches (B, N, D), ratio (B,) -> mask (B, N): the k = round(m N) patches nearest to cls (eq. 1-2).

    eq. 1: similarity_i = cos(cls, patch_i);  eq. 2: the top-k of them are hidden.
    """
    return mask_highest(F.cosine_similarity(cls[:, None].float(), patches.float(), dim=-1), ratio)


def mixed_mask(
    cls: Tensor, patches: Tensor, ratio: Tensor, generator: torch.Generator, rows: slice = slice(None)
) -> Tensor:
    """Per image a fair coin: random_mask or semantic_mask (section 3.2) -> mask (B, N).

    ratio covers the global batch; cls and patches are its `rows` (by default all). The draws are made for the global
    batch, so that the masks do not depend on how it is cut over processes.
    """
    coin = torch.rand(len(ratio), generator=generator, device=generator.device) < 0.5
    random = random_mask(ratio, patches.shape[1], generator)
    return torch.where(coin[rows, None], random[rows], semantic_mask(cls, patches, ratio[rows]))


def latent_mask(ratio: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """The paper's failing ablation: hide latent tokens from the decoder instead of patches from the encoder, (B, L)."""
    return random_mask(ratio, tokens, generator)


def mask_highest(score: Tensor, ratio: Tensor) -> Tensor:
    """score (B, N), ratio (B,) -> mask (B, N), True at the round(m N) highest scores of each row."""
    rank = score.argsort(dim=1, descending=True).argsort(dim=1)  # 0 = highest
    return rank < (ratio * score.shape[1]).round()[:, None]
