"""family.py: what MAETok, l-DeTok and AlignTok add, and how build.py puts it together."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reference import array
from torch import Tensor, nn

import family
import tokenizer as tokenizer_module
from align import HOG, TEACHERS
from build import build_latent_losses, build_tokenizer
from family import (
    GridDecoder,
    GridEncoder,
    MaskFeatHOG,
    PreservationLoss,
    PretrainedEncoder,
    add_latent_noise,
    encode_visible,
    masked_mse,
)
from masking import mask_latents, random_mask
from options import find_contradictions
from recipes import Config
from tokenizer import (
    BOTTLENECKS,
    Deterministic,
    DeterministicBottleneck,
    GaussianBottleneck,
    Tokenizer,
    unpatchify,
)
from train import PatchMask, TokenizerWithLosses, draw_mask
from utils.random import BatchRNG

# A tokenizer of 4 x 4 patches of 4 pixels, whose latents lie on the patch grid.
GRID = Config(image_size=16, patch_size=4, num_latent_tokens=0, latent_dim=3, tokenizer_size="toy")


def grid_tokenizer(**changes) -> Tokenizer:
    torch.manual_seed(0)
    return build_tokenizer(replace(GRID, **changes))


def random_images(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 16) * 2 - 1


def random_hidden(num_hidden: int, seed: int) -> Tensor:
    """A mask (2, 16) that hides this many patches of each image."""
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(1) < num_hidden


def test_a_config_makes_a_tokenizer():
    config = replace(
        GRID, latent_dim=5, bottleneck="deterministic", num_latent_tokens=4, encoder_init="none"
    )
    model = build_tokenizer(config)
    assert model.num_patches == 16
    assert model.num_latent_tokens == 4
    assert model.latent_dim == 5
    assert isinstance(model.bottleneck, DeterministicBottleneck)
    assert not model.is_2d


# --------------------------------------------------------------------------------------------------
# MAETok: feature decoders and their targets.

LATENT_LOSSES = ("local", "global", "features", "hog", "preservation")
NO_WEIGHTS = dict.fromkeys(LATENT_LOSSES, 0.0)


def apply_losses(losses: nn.ModuleList, z: Tensor, targets: dict, mask: Tensor) -> dict:
    """All losses on latents by name, as train.TokenizerWithLosses collects them."""
    found = {}
    for latent_loss in losses:
        found |= latent_loss(z, targets, mask)
    return found


def test_losses_on_latents_are_those_with_a_weight_at_the_teachers_width():
    model = Tokenizer(16, 4, 4, 3, "toy")
    z = torch.randn(2, 4, 3)
    mask = torch.ones(2, 16, dtype=torch.bool)
    images = random_images(2)
    teachers = {"teacher": HOG(4), "maskfeat": MaskFeatHOG(4, 4)}
    targets = {name: teacher(images) for name, teacher in teachers.items()}
    targets["reference"] = Deterministic(torch.zeros_like(z))

    def losses_with(**weights) -> dict[str, Tensor]:
        losses = build_latent_losses(NO_WEIGHTS | weights, model, teachers)
        return apply_losses(losses, z, targets, mask)

    assert losses_with() == {}
    together = losses_with(**dict.fromkeys(LATENT_LOSSES, 1.0))
    assert together.keys() == set(LATENT_LOSSES)
    assert all(loss.ndim == 0 and loss > 0 for loss in together.values())
    for name in LATENT_LOSSES:
        expected = {"local", "global"} if name in ("local", "global") else {name}
        assert losses_with(**{name: 1.0}).keys() == expected


@pytest.mark.parametrize("name, width", [("dinov2_vits14", 384), ("dinov2_vitl14_reg", 1024)])
def test_losses_on_latents_have_the_width_of_their_teacher(name, width):
    model = Tokenizer(16, 4, 4, 3, "toy")
    weights = NO_WEIGHTS | {"local": 1.0, "features": 1.0}
    with torch.device("meta"):
        losses = build_latent_losses(weights, model, {"teacher": TEACHERS[name](2)})
    alignment, feature_decoder = losses
    assert alignment.local_mlp.fc1.in_features == 3
    assert alignment.local_mlp.fc1.out_features == 128
    assert alignment.local_mlp.fc2.out_features == width
    assert feature_decoder.decoder.last_layer.out_features == width
    assert len(feature_decoder.decoder.blocks) == 3


def test_a_feature_decoder_has_the_published_width_at_b():
    with torch.device("meta"):
        model = Tokenizer(256, 16, 128, 32, "B")
        teachers = {"maskfeat": MaskFeatHOG(16, 16)}
        (loss,) = build_latent_losses(NO_WEIGHTS | {"hog": 1.0}, model, teachers)
    assert loss.decoder.norm.normalized_shape == (192,)
    assert loss.decoder.blocks[0].attn.num_heads == 3
    assert loss.decoder.last_layer.out_features == 108


def test_a_feature_decoder_of_latents_on_the_grid_is_a_grid_decoder():
    model = grid_tokenizer()
    teachers = {"maskfeat": MaskFeatHOG(4, 4)}
    (loss,) = build_latent_losses(NO_WEIGHTS | {"hog": 1.0}, model, teachers)
    assert isinstance(loss.decoder, GridDecoder)
    assert loss.decoder(torch.randn(2, 16, 3)).shape == (2, 16, teachers["maskfeat"].width)


def test_the_feature_loss_is_of_hidden_patches_only():
    prediction = torch.randn(3, 16, 5)
    target = torch.randn(3, 16, 5)
    num_hidden = torch.tensor([[4], [0], [16]])
    mask = torch.arange(16).expand(3, 16) < num_hidden
    loss = masked_mse(prediction, target, mask)
    error = (prediction - target).square()
    torch.testing.assert_close(loss, (error[0, :4].mean() + error[2].mean()) / 3)
    changed = torch.where(mask[..., None], target, 99.0)
    assert masked_mse(prediction, changed, mask) == loss
    assert masked_mse(prediction, target, torch.zeros_like(mask)) == 0


def test_the_feature_loss_has_the_reduction_of_maetoks():
    """The reference keeps every 7th patch, its losses are of all: so they are only close."""
    names = ("hog_pred_every7th", "hog_target_every7th", "mask", "hog_loss", "hog_loss_alltokens")
    arrays = (array(f"maetok_masked_small/{name}") for name in names)
    prediction, target, mask, hidden_loss, full_loss = arrays
    mask = mask[:, ::7].bool()
    of_hidden = masked_mse(prediction, target, mask)
    of_all = masked_mse(prediction, target, torch.ones_like(mask))
    assert of_hidden.item() == pytest.approx(hidden_loss.item(), rel=0.01)
    assert of_all.item() == pytest.approx(full_loss.item(), rel=0.01)


@pytest.mark.parametrize("size, patch_size, width", [(128, 8, 27), (256, 16, 108)])
def test_maskfeat_hog_equals_maetoks(size, patch_size, width, monkeypatch):
    monkeypatch.setattr(
        family, "check_range", lambda images: None
    )  # the reference's noise leaves it
    pixels = array(f"maetok_hog/images_{size}")
    expected_name = f"maetok_hog/hog_{size}"
    every = 1
    if size == 256:  # the images are kept as a PNG file, and the features of every 7th patch
        png = io.BytesIO(pixels.numpy().tobytes())
        pixels = torch.from_numpy(np.array(Image.open(png)))[None]
        expected_name += "_every7th"
        every = 7
    seed = int(array("maetok_hog/noise_seed")) + size
    noise = np.random.default_rng(seed).standard_normal((len(pixels), 3, size, size))
    noise = torch.from_numpy(noise.astype(np.float32))
    images = (pixels.double() / 127.5 - 1).permute(0, 3, 1, 2).float() + 0.02 * noise

    teacher = MaskFeatHOG(16, patch_size)
    mean, patches = teacher(images)
    assert teacher.width == width
    assert patches.shape == (len(images), 256, width)
    expected = array(expected_name)
    torch.testing.assert_close(patches[:, ::every], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(mean, patches.mean(1))


# --------------------------------------------------------------------------------------------------
# l-DeTok: latents on the grid, dropped patches, noise on latents.


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_shapes_and_gradients_of_latents_on_the_grid_reach_every_parameter(bottleneck):
    model = grid_tokenizer(bottleneck=bottleneck).train()
    images = random_images(2)
    mask = torch.eye(16, dtype=torch.bool)[:2]
    reconstruction, posterior, z = model(images, mask)
    assert reconstruction.shape == images.shape
    assert z.shape == posterior.mean.shape == posterior.std.shape == (2, 16, 3)
    losses = posterior.losses()
    if bottleneck == "gaussian":
        assert posterior.kl().shape == (2, 16)
    assert isinstance(model.encoder, GridEncoder)
    assert isinstance(model.decoder, GridDecoder)
    assert model.num_latent_tokens == 16
    assert model.is_2d
    (reconstruction.square().mean() + sum(losses.values())).backward()
    without_gradient = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert without_gradient == []


def test_latents_of_the_grid_lie_where_their_patches_lie():
    """Without blocks to mix them, patch 5's pixels decide latent 5 and nothing else.

    And latent 5 decides the pixels of patch 5.
    """
    model = grid_tokenizer()
    images = random_images(1)
    model.encoder.blocks = nn.Sequential()
    model.decoder.blocks = nn.Sequential()
    changed = images.clone()
    changed[:, :, 4:8, 4:8] = 0.5
    before = model.encode(images).mean
    after = model.encode(changed).mean
    assert (before != after).any(-1)[0].tolist() == [n == 5 for n in range(16)]
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[4:8, 4:8] = True
    assert torch.equal((model.decode(before) != model.decode(after))[0].any(0), expected)


def test_a_dropped_patch_is_not_seen_and_its_latent_is_the_prior():
    model = grid_tokenizer()
    images = random_images(2)
    mask = random_hidden(6, seed=0)
    hidden_pixels = mask.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    posterior = encode_visible(model, images, mask, 6)
    other = encode_visible(model, images.masked_fill(hidden_pixels, 0.3), mask, 6)
    assert torch.equal(posterior.mean, other.mean)
    assert torch.equal(posterior.logvar, other.logvar)
    assert not posterior.mean[mask].any()
    assert not posterior.logvar[mask].any()
    assert not posterior.kl()[mask].any()
    assert posterior.mean[~mask].all()
    assert posterior.kl()[~mask].all()

    none_dropped = encode_visible(model, images, torch.zeros_like(mask), 0)
    torch.testing.assert_close(none_dropped.mean, model.encode(images).mean)


@pytest.mark.parametrize("grid_size", [4, 9, 16])
def test_masks_for_dropping_hide_the_number_that_goes_with_them(grid_size):
    """encode_visible relies on it: it drops as many patches of each image as it is told."""
    config = replace(GRID, image_size=4 * grid_size, mask="random", drop_masked=True)
    config = replace(config, mask_ratio_max=0.7)
    counts = set()
    for seed in range(50):
        rng = BatchRNG(seed, 4, slice(0, 4), torch.device("cpu"))
        mask, ratio, num_hidden = draw_mask(config, None, 1.0, rng)
        assert mask.shape == (4, grid_size**2)
        assert mask.sum(1).tolist() == [num_hidden] * 4
        torch.testing.assert_close(ratio, mask.float().mean(1))
        counts.add(num_hidden)
    assert 0 in counts
    assert len(counts) > 5


def test_dropping_equals_a_mask_over_attention():
    """The visible patches' latents are those of blocks in which nobody attends to dropped ones."""
    model = grid_tokenizer()
    images = random_images(2)
    mask = random_hidden(7, seed=1)

    def masked_attention(_, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=~mask[:, None, None])

    expected = encode_visible(model, images, mask, 7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module.Attention, "attend", masked_attention)
        masked = model.encode(images)
    torch.testing.assert_close(masked.mean[~mask], expected.mean[~mask])


def test_the_decoder_does_not_see_the_latent_of_a_dropped_patch():
    """It sees zero in its place, in the decoder alone and in a training step."""
    model = grid_tokenizer()
    z = torch.randn(2, 16, 3)
    mask = torch.arange(16).expand(2, 16) % 4 == 0
    prediction = model.decoder(mask_latents(z, mask))
    changed = z.masked_fill(mask[..., None], 9.0)
    assert torch.equal(prediction, model.decoder(mask_latents(changed, mask)))
    assert not torch.allclose(prediction, model.decoder(z))
    zeroed = z.masked_fill(mask[..., None], 0.0)
    assert torch.equal(prediction, model.decoder(zeroed))

    config = replace(GRID, drop_masked=True)
    trained = TokenizerWithLosses(model, nn.ModuleList(), config)
    images = random_images(2)
    patch_mask = PatchMask(mask, mask.float().mean(1), num_hidden=4)
    rng = BatchRNG(0, 2, slice(0, 2), torch.device("cpu"))
    recon, posterior, _ = trained(images, patch_mask, {}, rng)
    noise = BatchRNG(0, 2, slice(0, 2), torch.device("cpu")).randn(16, 3)
    z = posterior.sample(noise)
    assert z[mask].any()  # the prior's noise, which the decoder must not see
    seen = z.masked_fill(mask[..., None], 0.0)
    assert torch.equal(recon, unpatchify(model.decoder(seen), 4))


def test_noise_on_latents_interpolates_per_image_and_gamma_scales_it():
    z = torch.randn(3, 5, 2)
    noise = torch.randn(3, 5, 2)
    tau = torch.tensor([0.0, 0.25, 1.0])
    noised = add_latent_noise(z, tau, noise, gamma=3.0)
    assert torch.equal(noised[0], z[0])
    torch.testing.assert_close(noised[1], 0.75 * z[1] + 0.75 * noise[1])
    torch.testing.assert_close(noised[2], 3 * noise[2])
    without_noise = add_latent_noise(z, tau, noise, 0.0)
    torch.testing.assert_close(without_noise, (1 - tau)[:, None, None] * z)


def test_noised_latents_equal_detoks():
    """Both noises act: the posterior's and that of tau, one number per image."""
    name = "detok_small"
    moments = array(f"{name}/train_moments")
    latent_dim = moments.shape[-1] // 2
    bottleneck = GaussianBottleneck(2 * latent_dim, latent_dim)
    with torch.no_grad():  # a linear layer that changes nothing
        bottleneck.proj.weight.copy_(torch.ones(2 * latent_dim).diag())
        bottleneck.proj.bias.zero_()
        posterior = bottleneck(moments)
    z = posterior.sample(array(f"{name}/posterior_noise"))
    tau = array(f"{name}/tau").flatten()
    gamma = float(array(f"{name}/gamma"))
    noised = add_latent_noise(z, tau, array(f"{name}/latent_noise"), gamma)
    torch.testing.assert_close(noised, array(f"{name}/train_latents"), atol=5e-5, rtol=0)
    expected_kl = array(f"{name}/train_kl_per_sample")
    torch.testing.assert_close(posterior.kl().sum(1), expected_kl, atol=0, rtol=1e-5)

    # Of 64 patches 29 are kept at this ratio: DeTok rounds the kept up, we round the hidden.
    ratio = array(f"{name}/mask_ratio").float().expand(2)
    scores = array(f"{name}/mask_scores")
    kept = ~random_mask(ratio, scores)
    num_kept = int(kept[0].sum())
    assert abs(num_kept - z.shape[1]) <= 1
    smallest = scores.argsort(1)[:, :num_kept]
    assert kept.gather(1, smallest).all()  # those of the smallest scores, in both


# --------------------------------------------------------------------------------------------------
# AlignTok: a pretrained encoder, and preservation.


@pytest.mark.parametrize("teacher", ["hog", "dinov2_vits14"])
def test_a_teacher_is_the_encoder_with_an_adapter(teacher):
    changes = {"encoder_init": "teacher", "teacher": teacher, "bottleneck": "deterministic"}
    model = grid_tokenizer(latent_dim=5, **changes)
    encoder = model.encoder
    images = random_images(2)
    assert isinstance(encoder, PretrainedEncoder)
    assert isinstance(model.decoder, GridDecoder)
    assert model.is_2d
    assert model.num_latent_tokens == 16
    _, patches = encoder.teacher(images)
    z = model.bottleneck.proj(encoder.adapter(patches))
    reconstruction, posterior, _ = model(images)
    assert isinstance(posterior, Deterministic)
    assert reconstruction.shape == images.shape
    torch.testing.assert_close(posterior.mean, z)

    # A hidden patch is gray to the teacher.
    mask = torch.arange(16).expand(2, 16) == 5
    gray = images.clone()
    gray[:, :, 4:8, 4:8] = 0
    torch.testing.assert_close(model.encode(images, mask).mean, model.encode(gray).mean)

    # Every parameter of a network that learns is trained; HOG has none, and the mask token of
    # DINOv2's files is a buffer.
    reconstruction.square().mean().backward()
    parameters = dict(model.named_parameters())
    learned = {name for name, p in parameters.items() if p.grad is not None and p.grad.any()}
    frozen = {name for name, p in parameters.items() if not p.requires_grad}
    assert frozen == set()
    has_weights = teacher != "hog"
    assert any(name.startswith("encoder.teacher") for name in learned) == has_weights
    mask_token = "encoder.teacher.vit.mask_token"
    assert mask_token not in parameters
    assert (mask_token in dict(model.named_buffers())) == has_weights


def test_patches_of_a_teacher_cannot_be_dropped():
    config = replace(GRID, encoder_init="teacher", mask="random", drop_masked=True)
    config = replace(config, local_weight=0.0, global_weight=0.0)
    (problem,) = find_contradictions(config)
    assert "an encoder that is not a teacher" in problem
    model = build_tokenizer(config)
    with pytest.raises(TypeError):
        encode_visible(model, random_images(2), random_hidden(6, seed=0), 6)


def test_preservation_is_the_squared_distance_from_the_latents_before():
    z = torch.randn(2, 4, 3)
    before = torch.randn(2, 4, 3)
    loss = PreservationLoss()(z, {"reference": Deterministic(before)})
    torch.testing.assert_close(loss, {"preservation": (z - before).square().mean()})
    unmoved = PreservationLoss()(z, {"reference": Deterministic(z)})
    assert unmoved["preservation"] == 0
