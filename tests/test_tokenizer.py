"""tokenizer.py: shapes, masks, bottlenecks, and the start from DINOv2."""

import pytest
import torch
from reference import array, filled, imagenet_normalized
from torch import nn

from tokenizer import (
    BOTTLENECKS,
    Attention,
    Deterministic,
    DiagonalGaussian,
    Tokenizer,
    load_dinov2,
    resample_patch_embed,
)

POSTERIORS = {"gaussian": DiagonalGaussian, "deterministic": Deterministic}


def toy(**changes) -> Tokenizer:
    """A tokenizer of 4 x 4 patches of 4 pixels, with 4 latent tokens of 3 channels."""
    torch.manual_seed(0)
    settings = {
        "image_size": 16,
        "patch_size": 4,
        "num_latent_tokens": 4,
        "latent_dim": 3,
        "model_size": "toy",
    }
    return Tokenizer(**settings | changes)


def random_images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16) * 2 - 1


@pytest.mark.parametrize("size, millions", [("S", 45), ("B", 176), ("BL", 391)])
def test_sizes_are_the_papers_within_4_percent(size, millions):
    with torch.device("meta"):
        model = Tokenizer(256, 16, 128, 32, size)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.04)


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_shapes_and_gradients_reach_every_parameter(bottleneck):
    """The same with latents on the patch grid is in test_family.py."""
    model = toy(bottleneck=bottleneck).train()
    images = random_images(2)
    mask = torch.eye(16, dtype=torch.bool)[:2]
    reconstruction, posterior, z = model(images, mask)
    assert reconstruction.shape == images.shape
    assert z.shape == posterior.mean.shape == posterior.std.shape == (2, 4, 3)
    assert isinstance(posterior, POSTERIORS.get(bottleneck, tuple))
    assert model.num_latent_tokens == 4
    assert not model.is_2d
    losses = posterior.losses()
    if bottleneck == "gaussian":
        assert posterior.kl().shape == (2, 4)
        assert losses.keys() == {"kl"}
    (reconstruction.square().mean() + sum(losses.values())).backward()
    without_gradient = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert without_gradient == []


def test_the_encoders_outputs_are_those_of_its_latent_tokens():
    """Without blocks, nothing goes from the image to them."""
    encoder = toy().encoder
    encoder.blocks = nn.Identity()
    expected = encoder.norm(encoder.latent_tokens).expand(2, -1, -1)
    torch.testing.assert_close(encoder(random_images(2)), expected)


def test_both_forms_of_attention_have_the_same_outputs_and_gradients():
    torch.manual_seed(0)
    attention = Attention(32, 4).double()
    results = []
    for is_fused in (True, False):
        attention.is_fused = is_fused
        x = torch.linspace(-3, 3, 2 * 5 * 32).double().view(2, 5, 32).requires_grad_()
        y = attention(x.sin())
        y.square().sum().backward()
        results.append((y, x.grad))
    torch.testing.assert_close(*results)


def test_hidden_patches_share_a_token_and_keep_their_positions():
    encoder = toy().encoder
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 3:9] = True
    x = encoder.embed_patches(random_images(1), mask)[0]
    expected = encoder.mask_token + encoder.pos_embed[0]
    torch.testing.assert_close(x[mask[0]], expected[mask[0]])
    assert not torch.isclose(x, expected).all(dim=1)[~mask[0]].any()


def test_training_starts_with_little_noise():
    model = toy()
    posterior = model.bottleneck(torch.zeros(1, 4, model.encoder.width))
    assert posterior.logvar.eq(-4).all() and posterior.mean.eq(0).all()


@pytest.mark.parametrize("training", [True, False])
def test_a_mask_that_is_passed_hides_pixels_in_training_and_eval_alike(training):
    model = toy().train(training)
    images = random_images(1)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True  # row 1, column 1 of the 4 x 4 patches
    no_mask = torch.zeros_like(mask)
    changed = images.clone()
    changed[:, :, 4:8, 4:8] = 0.5

    masked = model.encode(images, mask).mean
    assert torch.equal(masked, model.encode(changed, mask).mean)
    assert not torch.allclose(masked, model.encode(images).mean)
    assert not torch.allclose(model.encode(images).mean, model.encode(changed).mean)
    model.train(not training)
    assert torch.equal(masked, model.encode(images, mask).mean)
    assert torch.equal(model.encode(images, no_mask).mean, model.encode(images).mean)


def test_output_patches_lie_where_input_patches_lie():
    """A change of reconstruction token 5's output changes row 1, column 1 of the 4 x 4 patches."""
    model = toy().eval()
    z = torch.randn(1, 4, 3)
    before = model.decode(z)
    at_token_5 = torch.eye(16)[5][None, :, None]
    model.decoder.last_layer.register_forward_hook(lambda module, inputs, out: out + at_token_5)
    moved = (model.decode(z) - before)[0, 0]
    expected = torch.zeros(16, 16)
    expected[4:8, 4:8] = 1
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)


def test_gaussian_samples_with_its_noise_and_has_the_closed_form_kl():
    posterior = DiagonalGaussian(torch.randn(2, 4, 3), torch.randn(2, 4, 3))
    noise = torch.randn(2, 4, 3)
    ours = torch.distributions.Normal(posterior.mean, posterior.std)
    prior = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(ours, prior).sum(-1)
    torch.testing.assert_close(posterior.kl(), expected)
    torch.testing.assert_close(posterior.losses(), {"kl": expected.sum(1).mean()})  # eq. 9
    torch.testing.assert_close(posterior.std.square().log(), posterior.logvar)
    torch.testing.assert_close(posterior.sample(noise), posterior.mean + posterior.std * noise)
    assert not torch.equal(posterior.sample(), posterior.sample())


def test_a_deterministic_posterior_has_no_noise_and_no_kl():
    model = toy(bottleneck="deterministic")
    images = random_images(2)
    noise = torch.randn(2, 4, 3)
    reconstruction, posterior, z = model(images, noise=noise)
    assert torch.equal(z, posterior.mean)
    assert torch.equal(posterior.sample(noise), posterior.sample())
    assert torch.equal(reconstruction, model(images)[0])
    assert not posterior.std.any()
    assert posterior.std.shape == (2, 4, 3)
    assert posterior.losses() == {}
    assert model.bottleneck.proj.out_features == 3
    assert toy().bottleneck.proj.out_features == 6


def test_extreme_logvar_stays_finite():
    model = toy()
    nn.init.constant_(model.bottleneck.proj.bias, 1e4)
    posterior = model.encode(torch.zeros(1, 3, 16, 16))
    assert posterior.logvar.max() == 20
    assert posterior.kl().isfinite().all()


def test_bf16_autocast_keeps_moments_and_pixels_in_float32():
    model = toy()
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction, posterior, _ = model(torch.zeros(1, 3, 16, 16))
    for result in (reconstruction, posterior.mean, posterior.kl()):
        assert result.dtype == torch.float32


def test_normalize_round_trip():
    model = toy()
    model.latent_mean.uniform_(-2, 2)
    model.latent_std.uniform_(0.5, 2)
    z = torch.randn(5, 4, 3)
    torch.testing.assert_close(model.denormalize(model.normalize(z)), z)
    torch.testing.assert_close(model.normalize(z), (z - model.latent_mean) / model.latent_std)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"num_latent_tokens": -5}, "-5"),
        ({"num_latent_tokens": 0}, "0 latent tokens"),
        ({"patch_size": 5}, "5"),
        ({"model_size": "huge"}, "huge"),
        ({"latent_dim": 0}, "0 channels"),
    ],
)
def test_impossible_sizes_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        toy(**changes)


def test_encoder_that_starts_from_dinov2_equals_timm_at_patch_16():
    """Golden: DINOv2 S/14 moved to 16-pixel patches at 256 pixels.

    The encoder's blocks, run as a plain ViT, give the features of that network.
    """
    name = "dinov2_vits14_patch16"
    state = filled("dinov2_vits14_pretrain")
    model = Tokenizer(256, 16, 64, 8, "S")
    encoder = model.encoder
    names = ("encoder.latent_tokens", "bottleneck.proj.weight", "bottleneck.proj.bias")
    own = {key: model.state_dict()[key].clone() for key in names}
    load_dinov2(encoder, state)
    for key, value in own.items():
        assert torch.equal(model.state_dict()[key], value)
    kernel = resample_patch_embed(state["patch_embed.proj.weight"], 16)
    torch.testing.assert_close(kernel[::16], array(f"{name}/kernel"), atol=3e-6, rtol=0)
    positions = array(f"{name}/positions")[1:]
    torch.testing.assert_close(encoder.pos_embed.data[0, :, :8], positions, atol=1e-6, rtol=0)

    images = array(f"{name}/image")[None].float() / 127.5 - 1
    with torch.no_grad():
        cls = state["cls_token"] + state["pos_embed"][:, :1]
        x = torch.cat([cls, encoder.patch_embed(images) + encoder.pos_embed], dim=1)
        for block in encoder.blocks:
            x = block(x)
        x = encoder.norm(x)
    torch.testing.assert_close(x[:, 0], array(f"{name}/cls"), atol=1e-4, rtol=0)
    torch.testing.assert_close(x[:, 1::8], array(f"{name}/patches"), atol=1e-4, rtol=0)
    assert imagenet_normalized(f"{name}/image").shape == images.shape


def test_dinov2_with_registers_can_be_a_start_and_a_wrong_key_is_named():
    encoder = Tokenizer(64, 16, 4, 8, "S").encoder
    load_dinov2(encoder, filled("dinov2_vits14_reg4_pretrain"))
    state = filled("dinov2_vits14_pretrain")
    with pytest.raises(RuntimeError, match=r"384.*768"):
        load_dinov2(Tokenizer(64, 16, 4, 8, "B").encoder, state)
    gamma = state.pop("blocks.3.ls1.gamma")
    with pytest.raises(RuntimeError, match=r"Missing.*blocks\.3\.ls1\.gamma"):
        load_dinov2(encoder, state)
    state |= {"blocks.3.ls1.gamma": gamma, "blocks.99.ls1.gamma": gamma}
    with pytest.raises(RuntimeError, match=r"Unexpected.*blocks\.99\.ls1\.gamma"):
        load_dinov2(encoder, state)
