"""Which patches MacTok hides from the encoder (arXiv 2603.29634, section 3.2).

A mask is a bool tensor (B, N) in which True means hidden. Every image has its own ratio m, and
exactly round(m N) of its patches are hidden:

    ratio = sample_mask_ratio(u)                             u (B,), uniform in [0, 1)
    mask = random_mask(ratio, noise)                         any patches; noise (B, N), uniform
    mask = semantic_mask(ratio, scores)                      those most like the whole image
    mask = mixed_mask(ratio, noise, scores, mix)             one or the other; mix (B,), uniform
    scores = cls_similarity(cls, patches)                    from a teacher's features (align.py)

All functions are pure: the random numbers are arguments. In comments, "ours" marks a choice that
the paper does not state, and "config" one from the public configurations that it follows
(docs/sources.md). `python masking.py` draws some masks.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_mask_ratio(u: Tensor, max_ratio: float = 0.7, min_ratio: float = -0.1) -> Tensor:
    """u (B,), uniform in [0, 1) -> the ratio m = max(0, U(min_ratio, max_ratio)) of each image.

    A negative lower end leaves some images whole: from -0.1 to 0.7, one image in eight (section
    3.2; l-DeTok eq. 5).
    """
    return (u * (max_ratio - min_ratio) + min_ratio).clamp(min=0)


def topk_mask(ratio: Tensor, scores: Tensor) -> Tensor:
    """ratio (B,), scores (B, N) -> mask (B, N), True at the round(m N) highest scores of a row."""
    rank = scores.argsort(dim=1, descending=True).argsort(dim=1)  # 0 is the highest score
    num_hidden = (ratio * scores.shape[1]).round()
    return rank < num_hidden[:, None]


def no_mask(ratio: Tensor, noise: Tensor, scores: Tensor | None, mix: Tensor) -> Tensor:
    """A mask (B, N) that hides nothing."""
    return torch.zeros_like(noise, dtype=torch.bool)


def random_mask(ratio: Tensor, noise: Tensor) -> Tensor:
    """ratio (B,), noise (B, N) uniform -> mask (B, N): round(m N) patches without replacement."""
    return topk_mask(ratio, noise)


def cls_similarity(cls: Tensor, patches: Tensor) -> Tensor:
    """Eq. 1: cls (B, D), patches (B, N, D) of a teacher -> cos(cls, patch_i), (B, N)."""
    return F.cosine_similarity(cls[:, None].float(), patches.float(), dim=-1)


def semantic_mask(ratio: Tensor, scores: Tensor) -> Tensor:
    """Eq. 2: hide the k = round(m N) patches most like the whole image; scores (B, N) of eq. 1."""
    return topk_mask(ratio, scores)


def mixed_mask(ratio: Tensor, noise: Tensor, scores: Tensor, mix: Tensor) -> Tensor:
    """Random or semantic masks with probability 1/2 each, per image (section 3.2).

    ratio (B,), noise (B, N) uniform, scores (B, N) of eq. 1, mix (B,) uniform -> mask (B, N).
    """
    use_random = mix[:, None] < 0.5
    return torch.where(use_random, random_mask(ratio, noise), semantic_mask(ratio, scores))


class MaskStrategy(NamedTuple):
    """A way to choose hidden patches: a row of MASKS."""

    function: Callable[..., Tensor]  # (ratio, noise, scores, mix) -> mask (B, N)
    needs_scores: bool  # whether a teacher has to look at the images; if False, scores is None


# To try another mask, write a function and give it a row here. It becomes a value of --mask.
MASKS = {
    "none": MaskStrategy(no_mask, False),
    "random": MaskStrategy(lambda ratio, noise, scores, mix: random_mask(ratio, noise), False),
    "semantic": MaskStrategy(lambda ratio, noise, scores, mix: semantic_mask(ratio, scores), True),
    "mixed": MaskStrategy(mixed_mask, True),
}


def mask_latents(z: Tensor, mask: Tensor) -> Tensor:
    """z (B, L, C), mask (B, L) -> z with zeros, the mean of the prior, where the mask is True.

    Hiding random latents from the decoder is the ablation that the paper shows to fail (fig. 1);
    that they become zero is ours. l-DeTok hides the latents of patches that its encoder left out.
    """
    return z.masked_fill(mask[..., None], 0)


def mask_to_pixels(mask: Tensor, image_size: int) -> Tensor:
    """mask (B, N) of a square grid of patches -> bool (B, 1, image_size, image_size)."""
    grid_size = math.isqrt(mask.shape[1])
    patch_size = image_size // grid_size
    mask = mask.view(-1, 1, grid_size, grid_size)
    return mask.repeat_interleave(patch_size, dim=2).repeat_interleave(patch_size, dim=3)


if __name__ == "__main__":
    ratio = sample_mask_ratio(torch.rand(3))
    for m, mask in zip(ratio, random_mask(ratio, torch.rand(3, 64))):
        print(f"ratio {m:.2f}: {mask.sum()} of 64 patches are hidden")
        print(
            "\n".join("".join("#" if hidden else "." for hidden in row) for row in mask.view(8, 8))
        )
