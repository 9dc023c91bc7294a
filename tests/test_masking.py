import pytest
import torch
from reference import array

import masking
from tokenizer import Gaussian


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_ratio_is_a_clipped_uniform():
    ratio = masking.mask_ratio(uniform(100_000), 0.7)
    assert ratio.min() == 0 and 0.69 < ratio.max() < 0.7
    assert abs((ratio == 0).float().mean() - 0.1 / 0.8) < 0.005  # U(-0.1, 0.7) is negative in one case of eight
    assert abs(ratio[ratio > 0].mean() - 0.35) < 0.005
    between = masking.mask_ratio(uniform(100_000), 0.6, 0.4)  # MAETok's range
    assert 0.4 <= between.min() < 0.401 and 0.599 < between.max() <= 0.6 and abs(between.mean() - 0.5) < 0.001


def test_random_mask_hides_exactly_round_mn_patches_evenly():
    ratio = torch.tensor([0.0, 0.1, 0.5, 0.7, 1.0]).repeat(2000)
    mask = masking.random_mask(ratio, uniform(10_000, 16))
    assert mask.dtype == torch.bool and torch.equal(mask.sum(1), torch.round(ratio * 16).long())
    share = mask[2::5].float().mean(0)  # ratio 0.5
    assert (share - 0.5).abs().max() < 0.05


def test_semantic_mask_hides_the_patches_most_like_cls():
    cls = torch.tensor([[1.0, 0.0]])
    angles = torch.tensor([0.3, 1.5, 0.1, 3.0, 0.2])
    patches = 7 * torch.stack([angles.cos(), angles.sin()], dim=1)[None]  # length must not matter
    scores = masking.similarity(cls, patches)
    torch.testing.assert_close(scores, angles.cos()[None])
    assert masking.semantic_mask(torch.tensor([0.4]), scores).tolist() == [[False, False, True, False, True]]


def test_mixed_mask_is_random_or_semantic_per_image():
    m, order, scores, coin = torch.full((2000,), 0.5), uniform(2000, 16), torch.randn(2000, 16), uniform(2000, seed=1)
    mixed = masking.mixed_mask(m, order, scores, coin)
    semantic = (mixed == masking.semantic_mask(m, scores)).all(1)
    assert torch.equal(semantic, coin >= 0.5) and abs(semantic.float().mean() - 0.5) < 0.04
    assert torch.equal(mixed[~semantic], masking.random_mask(m, order)[~semantic])
    assert torch.equal(mixed.sum(1), torch.full((2000,), 8))


@pytest.mark.parametrize("name", masking.MASKS)
def test_masks_have_one_call_and_act_on_each_image_for_itself(name):
    """So rows of the draws give rows of the mask. Those that need no teacher take None for its scores."""
    m, order, coin = uniform(8), uniform(8, 16), uniform(8)
    scores = torch.randn(8, 16) if name in ("mixed", "semantic") else None
    mask = masking.MASKS[name](m, order, scores, coin)
    hidden = torch.zeros(8) if name in ("latent", "none") else (16 * m).round()
    assert mask.dtype == torch.bool and mask.shape == order.shape and torch.equal(mask.sum(1), hidden.long())
    rows = slice(4, 8)
    part = masking.MASKS[name](m[rows], order[rows], None if scores is None else scores[rows], coin[rows])
    assert torch.equal(part, mask[rows])


def test_the_draws_decide():
    m = torch.full((4,), 0.5)
    assert torch.equal(masking.random_mask(m, uniform(4, 64)), masking.random_mask(m, uniform(4, 64)))
    assert not torch.equal(masking.random_mask(m, uniform(4, 64)), masking.random_mask(m, uniform(4, 64, seed=1)))


def test_hidden_latents_are_zero_whole_tokens_and_the_others_stay():
    z = torch.randn(4, 8, 3)
    hidden = masking.hide_latents(z, torch.tensor([0.0, 0.25, 0.5, 1.0]), uniform(4, 64))
    zero = (hidden == 0).all(-1)
    assert zero.sum(1).tolist() == [0, 2, 4, 8] and torch.equal(hidden[~zero], z[~zero])


def test_noise_on_latents_interpolates_per_image_and_gamma_scales_it():
    z, noise, tau = torch.randn(3, 5, 2), torch.randn(3, 5, 2), torch.tensor([0.0, 0.25, 1.0])
    noised = masking.noise_latents(z, tau, noise, gamma=3.0)
    assert torch.equal(noised[0], z[0])
    torch.testing.assert_close(noised[1], 0.75 * z[1] + 0.75 * noise[1])
    torch.testing.assert_close(noised[2], 3 * noise[2])
    torch.testing.assert_close(masking.noise_latents(z, tau, noise, 0.0), (1 - tau)[:, None, None] * z)


def test_noised_latents_equal_detoks():
    """Both noises act: the posterior's and that of tau, one number per image."""
    name = "detok_small"
    posterior = Gaussian.of(array(f"{name}/train_moments"))
    z = posterior.sample(array(f"{name}/posterior_noise"))
    tau, noise = array(f"{name}/tau").flatten(), array(f"{name}/latent_noise")
    noised = masking.noise_latents(z, tau, noise, float(array(f"{name}/gamma")))
    torch.testing.assert_close(noised, array(f"{name}/train_latents"), atol=5e-5, rtol=0)
    torch.testing.assert_close(posterior.kl().sum(1), array(f"{name}/train_kl_per_sample"), atol=0, rtol=1e-5)
    # Of 64 patches 29 are kept at this ratio: DeTok rounds the kept up, we round the hidden.
    m, scores = array(f"{name}/mask_ratio").float().expand(2), array(f"{name}/mask_scores")
    kept = ~masking.random_mask(m, scores)
    assert abs(int(kept[0].sum()) - z.shape[1]) <= 1
    order = scores.argsort(1)[:, : int(kept[0].sum())]
    assert kept.gather(1, order).all()  # those of the smallest scores, in both
