import torch

import masking


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_ratio_is_a_clipped_uniform():
    ratio = masking.mask_ratio(100_000, 0.7, generator=generator())
    assert ratio.min() == 0 and 0.69 < ratio.max() < 0.7
    assert abs((ratio == 0).float().mean() - 0.1 / 0.8) < 0.005  # U(-0.1, 0.7) is negative in one case of eight
    assert abs(ratio[ratio > 0].mean() - 0.35) < 0.005


def test_random_mask_hides_exactly_round_mn_patches_evenly():
    ratio = torch.tensor([0.0, 0.1, 0.5, 0.7, 1.0]).repeat(2000)
    mask = masking.random_mask(ratio, 16, generator())
    assert mask.dtype == torch.bool and torch.equal(mask.sum(1), torch.round(ratio * 16).long())
    share = mask[2::5].float().mean(0)  # ratio 0.5
    assert (share - 0.5).abs().max() < 0.05


def test_semantic_mask_hides_the_patches_most_like_cls():
    cls = torch.tensor([[1.0, 0.0]])
    angles = torch.tensor([0.3, 1.5, 0.1, 3.0, 0.2])
    patches = 7 * torch.stack([angles.cos(), angles.sin()], dim=1)[None]  # length must not matter
    mask = masking.semantic_mask(cls, patches, torch.tensor([0.4]))
    assert mask.tolist() == [[False, False, True, False, True]]


def test_mixed_mask_is_random_or_semantic_per_image():
    batch, patches = 2000, torch.randn(2000, 16, 4)
    cls, ratio = torch.randn(batch, 4), torch.full((batch,), 0.5)
    mixed = masking.mixed_mask(cls, patches, ratio, generator())
    semantic = (mixed == masking.semantic_mask(cls, patches, ratio)).all(1)
    assert abs(semantic.float().mean() - 0.5) < 0.04
    assert torch.equal(mixed.sum(1), torch.full((batch,), 8))


def test_mixed_mask_of_rows_equals_rows_of_the_whole():
    patches, cls, ratio = torch.randn(8, 16, 4), torch.randn(8, 4), torch.rand(8)
    whole = masking.mixed_mask(cls, patches, ratio, generator(3))
    rows = slice(4, 8)
    assert torch.equal(masking.mixed_mask(cls[rows], patches[rows], ratio, generator(3), rows), whole[rows])


def test_the_generator_decides():
    ratio = torch.full((4,), 0.5)
    assert torch.equal(masking.random_mask(ratio, 64, generator(1)), masking.random_mask(ratio, 64, generator(1)))
    assert not torch.equal(masking.random_mask(ratio, 64, generator(1)), masking.random_mask(ratio, 64, generator(2)))
    assert masking.latent_mask(ratio, 8, generator()).sum(1).tolist() == [4] * 4
