"""masking.py: mask ratios, and which patches or latents are hidden."""

import pytest
import torch

from masking import (
    MASKS,
    cls_similarity,
    mask_latents,
    mixed_mask,
    random_mask,
    sample_mask_ratio,
    semantic_mask,
)


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_mask_ratio_is_a_clipped_uniform():
    ratio = sample_mask_ratio(uniform(100_000), 0.7)
    assert ratio.min() == 0
    assert 0.69 < ratio.max() < 0.7
    # U(-0.1, 0.7) is negative in one case of eight.
    assert abs((ratio == 0).float().mean() - 0.1 / 0.8) < 0.005
    assert abs(ratio[ratio > 0].mean() - 0.35) < 0.005

    between = sample_mask_ratio(uniform(100_000), 0.6, 0.4)  # MAETok's range
    assert 0.4 <= between.min() < 0.401
    assert 0.599 < between.max() <= 0.6
    assert abs(between.mean() - 0.5) < 0.001


def test_random_mask_hides_exactly_round_mn_patches_evenly():
    ratio = torch.tensor([0.0, 0.1, 0.5, 0.7, 1.0]).repeat(2000)
    mask = random_mask(ratio, uniform(10_000, 16))
    assert mask.dtype == torch.bool
    assert torch.equal(mask.sum(1), torch.round(ratio * 16).long())
    share = mask[2::5].float().mean(0)  # ratio 0.5
    assert (share - 0.5).abs().max() < 0.05


def test_semantic_mask_hides_the_patches_most_like_cls():
    cls = torch.tensor([[1.0, 0.0]])
    angles = torch.tensor([0.3, 1.5, 0.1, 3.0, 0.2])
    directions = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    patches = 7 * directions  # their length must not matter
    scores = cls_similarity(cls, patches)
    torch.testing.assert_close(scores, angles.cos()[None])
    mask = semantic_mask(torch.tensor([0.4]), scores)
    assert mask.tolist() == [[False, False, True, False, True]]


def test_mixed_mask_is_random_or_semantic_per_image():
    ratio = torch.full((2000,), 0.5)
    noise = uniform(2000, 16)
    scores = uniform(2000, 16, seed=2)
    mix = uniform(2000, seed=1)
    mixed = mixed_mask(ratio, noise, scores, mix)
    is_semantic = (mixed == semantic_mask(ratio, scores)).all(1)
    assert torch.equal(is_semantic, mix >= 0.5)
    assert abs(is_semantic.float().mean() - 0.5) < 0.04
    assert torch.equal(mixed[~is_semantic], random_mask(ratio, noise)[~is_semantic])
    assert torch.equal(mixed.sum(1), torch.full((2000,), 8))


@pytest.mark.parametrize("name", MASKS)
def test_masks_have_one_call_and_act_on_each_image_for_itself(name):
    """So rows of the draws give rows of the mask. Masks without a teacher take None as scores."""
    ratio = uniform(8)
    noise = uniform(8, 16)
    mix = uniform(8)
    function, needs_scores = MASKS[name]
    scores = torch.randn(8, 16) if needs_scores else None
    mask = function(ratio, noise, scores, mix)
    num_hidden = torch.zeros(8) if name == "none" else (16 * ratio).round()
    assert mask.dtype == torch.bool
    assert mask.shape == noise.shape
    assert torch.equal(mask.sum(1), num_hidden.long())

    rows = slice(4, 8)
    row_scores = None if scores is None else scores[rows]
    assert torch.equal(function(ratio[rows], noise[rows], row_scores, mix[rows]), mask[rows])


def test_the_draws_decide():
    ratio = torch.full((4,), 0.5)
    mask = random_mask(ratio, uniform(4, 64))
    assert torch.equal(mask, random_mask(ratio, uniform(4, 64)))
    assert not torch.equal(mask, random_mask(ratio, uniform(4, 64, seed=1)))


def test_hidden_latents_are_zero_as_whole_tokens_and_the_others_stay():
    z = torch.randn(4, 8, 3)
    ratio = torch.tensor([0.0, 0.25, 0.5, 1.0])
    mask = random_mask(ratio, uniform(4, 8))
    hidden = mask_latents(z, mask)
    is_zero = (hidden == 0).all(-1)
    assert torch.equal(is_zero, mask)
    assert is_zero.sum(1).tolist() == [0, 2, 4, 8]
    assert torch.equal(hidden[~is_zero], z[~is_zero])
