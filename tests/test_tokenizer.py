import pytest
import torch
import torch.nn.functional as F
from reference import array, filled, imagenet_normalised

import tokenizer as tk


def toy(**changes) -> tk.Tokenizer:
    torch.manual_seed(0)
    return tk.Tokenizer(**{"image_size": 16, "patch_size": 4, "tokens": 4, "channels": 3, "size": "toy"} | changes)


@pytest.mark.parametrize("size, millions", [("S", 45), ("B", 176), ("BL", 391)])
def test_sizes_are_the_papers_within_4_percent(size, millions):
    with torch.device("meta"):
        model = tk.Tokenizer(256, 16, 128, 32, size)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.04)


@pytest.mark.parametrize("tokens", [4, 0])
@pytest.mark.parametrize("posterior", tk.POSTERIORS)
def test_shapes_and_gradients_reach_every_parameter(posterior, tokens):
    """With tokens = 0 the latents lie on the grid of the 16 patches."""
    model, count = toy(posterior=posterior, tokens=tokens).train(), tokens or 16
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    reconstruction, q, z = model(images, torch.eye(16, dtype=torch.bool)[:2])
    assert reconstruction.shape == images.shape and z.shape == q.mean.shape == q.std.shape == (2, count, 3)
    assert isinstance(q, tk.POSTERIORS[posterior]) and q.kl().shape == (2, count)
    assert model.tokens == count and model.has_grid == (tokens == 0)
    (reconstruction.square().mean() + q.kl().mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("training", [True, False])
def test_a_mask_that_is_passed_hides_pixels_in_training_and_eval_alike(training):
    model, images = toy().train(training), torch.rand(1, 3, 16, 16) * 2 - 1
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True  # row 1, column 1 of the 4 x 4 patches
    changed = images.clone()
    changed[:, :, 4:8, 4:8] = 0.5
    assert torch.equal(model.encode(images, mask).mean, model.encode(changed, mask).mean)
    assert not torch.allclose(model.encode(images, mask).mean, model.encode(images).mean)
    assert not torch.allclose(model.encode(images).mean, model.encode(changed).mean)
    assert torch.equal(model.encode(images, mask).mean, model.train(not training).encode(images, mask).mean)
    assert torch.equal(model.encode(images, ~mask & mask).mean, model.encode(images).mean)


def test_output_patches_lie_where_input_patches_lie():
    """Shifting only the last layer's output of reconstruction token 5 changes row 1, column 1 of the 4 x 4 patches."""
    model = toy().eval()
    z = torch.randn(1, 4, 3)
    before = model.decode(z)
    model.decoder.to_patches.register_forward_hook(lambda module, inputs, out: out + torch.eye(16)[5][None, :, None])
    moved = (model.decode(z) - before)[0, 0]
    expected = torch.zeros(16, 16)
    expected[4:8, 4:8] = 1
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)


def test_gaussian_samples_with_its_noise_and_has_the_closed_form_kl():
    posterior, noise = tk.Gaussian(torch.randn(2, 4, 3), torch.randn(2, 4, 3)), torch.randn(2, 4, 3)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(posterior.kl(), expected)
    torch.testing.assert_close(posterior.std.square().log(), posterior.logvar)
    torch.testing.assert_close(posterior.sample(noise), posterior.mean + posterior.std * noise)
    assert not torch.equal(posterior.sample(), posterior.sample())


def test_a_point_has_no_noise_and_no_kl():
    model, images, noise = toy(posterior="point"), torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 3)
    reconstruction, posterior, z = model(images, noise=noise)
    assert torch.equal(z, posterior.mean) and torch.equal(posterior.sample(noise), posterior.sample())
    assert torch.equal(reconstruction, model(images)[0])
    assert not posterior.std.any() and not posterior.kl().any() and posterior.kl().shape == (2, 4)
    assert model.encoder.to_moments.out_features == 3 and toy().encoder.to_moments.out_features == 6


def test_extreme_logvar_stays_finite():
    model = toy()
    torch.nn.init.constant_(model.encoder.to_moments.bias, 1e4)
    posterior = model.encode(torch.zeros(1, 3, 16, 16))
    assert posterior.logvar.max() == 20 and posterior.kl().isfinite().all()


def test_bf16_autocast_keeps_moments_and_pixels_in_float32():
    model = toy()
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction, posterior, _ = model(torch.zeros(1, 3, 16, 16))
    assert reconstruction.dtype == posterior.mean.dtype == posterior.kl().dtype == torch.float32


def test_normalize_round_trip():
    model = toy()
    model.latent_mean.uniform_(-2, 2)
    model.latent_std.uniform_(0.5, 2)
    z = torch.randn(5, 4, 3)
    torch.testing.assert_close(model.denormalize(model.normalize(z)), z)
    torch.testing.assert_close(model.normalize(z), (z - model.latent_mean) / model.latent_std)


@pytest.mark.parametrize(
    "changes, named", [({"tokens": -5}, "-5"), ({"patch_size": 5}, "5"), ({"size": "huge"}, "huge"), ({"channels": 0}, "0")]
)
def test_impossible_geometry_is_named(changes, named):
    with pytest.raises(ValueError, match=named):
        toy(**changes)


def test_latents_of_the_grid_lie_where_their_patches_lie():
    """Without blocks to mix them, patch 5's pixels decide latent 5 and nothing else, and that the pixels of patch 5."""
    model, images = toy(tokens=0), torch.rand(1, 3, 16, 16) * 2 - 1
    model.encoder.blocks = model.decoder.blocks = torch.nn.Sequential()
    changed = images.clone()
    changed[:, :, 4:8, 4:8] = 0.5
    before, after = (model.encode(x).mean for x in (images, changed))
    assert (before != after).any(-1)[0].tolist() == [n == 5 for n in range(16)]
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[4:8, 4:8] = True
    assert torch.equal((model.decode(before) != model.decode(after))[0].any(0), expected)


def drop(model: tk.Tokenizer, images: torch.Tensor, mask: torch.Tensor):
    return model.encoder(images, mask, drop=True)


def test_a_dropped_patch_is_not_seen_and_its_latent_is_the_prior():
    model, images = toy(tokens=0), torch.rand(2, 3, 16, 16) * 2 - 1
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)).argsort(1) < 6  # six patches of each image
    hidden = mask.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    posterior, other = drop(model, images, mask), drop(model, images.masked_fill(hidden, 0.3), mask)
    assert torch.equal(posterior.mean, other.mean) and torch.equal(posterior.logvar, other.logvar)
    assert not posterior.mean[mask].any() and not posterior.logvar[mask].any() and not posterior.kl()[mask].any()
    assert posterior.mean[~mask].all() and posterior.kl()[~mask].all()
    torch.testing.assert_close(drop(model, images, mask & ~mask).mean, model.encode(images).mean)  # none dropped
    with pytest.raises(RuntimeError):
        drop(model, images, torch.tensor([[True] * 3 + [False] * 13, [True] * 2 + [False] * 14]))  # uneven counts


def test_dropping_equals_a_mask_over_attention():
    """The visible patches' latents are those of blocks in which nobody attends to the dropped ones."""
    model, images = toy(tokens=0), torch.rand(2, 3, 16, 16) * 2 - 1
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(1)).argsort(1) < 7

    def attend(q, k, v, plain=F.scaled_dot_product_attention):
        return plain(q, k, v, attn_mask=~mask[:, None, None])

    expected = drop(model, images, mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tk.F, "scaled_dot_product_attention", attend)
        masked = model.encode(images)
    torch.testing.assert_close(masked.mean[~mask], expected.mean[~mask])


def test_the_decoder_does_not_see_the_latent_of_a_dropped_patch():
    model, z = toy(tokens=0), torch.randn(2, 16, 3)
    mask = torch.arange(16).expand(2, 16) % 4 == 0
    copies = model.decoder(z, mask)
    assert torch.equal(copies, model.decoder(z.masked_fill(mask[..., None], 9.0), mask))
    assert not torch.allclose(copies, model.decoder(z))


def test_dinov2_initialised_encoder_equals_timm_at_patch_16():
    """Golden: DINOv2 S/14 moved to 16-px patches at 256 px. The encoder's blocks, run as a plain ViT, give its features."""
    name, state = "dinov2_vits14_patch16", filled("dinov2_vits14_pretrain")
    encoder = tk.Tokenizer(256, 16, 64, 8, "S").encoder
    own = {key: value.clone() for key, value in encoder.state_dict().items()}
    tk.load_dinov2(encoder, state)
    assert all(
        torch.equal(encoder.state_dict()[key], own[key]) for key in ("latent_tokens", "to_moments.weight", "to_moments.bias")
    )
    kernel = tk.resample_patch_kernel(state["patch_embed.proj.weight"], 16)
    torch.testing.assert_close(kernel[::16], array(f"{name}/kernel"), atol=3e-6, rtol=0)
    torch.testing.assert_close(encoder.pos_embed.data[0, :, :8], array(f"{name}/positions")[1:], atol=1e-6, rtol=0)

    images = torch.from_numpy(array(f"{name}/image").numpy())[None].float() / 127.5 - 1
    with torch.no_grad():
        cls = state["cls_token"] + state["pos_embed"][:, :1]
        x = torch.cat([cls, encoder.patch_embed(images) + encoder.pos_embed], dim=1)
        for block in encoder.blocks:
            x = block(x)
        x = encoder.norm(x)
    torch.testing.assert_close(x[:, 0], array(f"{name}/cls"), atol=1e-4, rtol=0)
    torch.testing.assert_close(x[:, 1::8], array(f"{name}/patches"), atol=1e-4, rtol=0)
    assert imagenet_normalised(f"{name}/image").shape == images.shape


def test_dinov2_with_registers_initialises_too_and_a_missing_key_is_named():
    encoder = tk.Tokenizer(64, 16, 4, 8, "S").encoder
    tk.load_dinov2(encoder, filled("dinov2_vits14_reg4_pretrain"))
    state = filled("dinov2_vits14_pretrain")
    with pytest.raises(RuntimeError, match=r"384.*768"):
        tk.load_dinov2(tk.Tokenizer(64, 16, 4, 8, "B").encoder, state)
    gamma = state.pop("blocks.3.ls1.gamma")
    with pytest.raises(RuntimeError, match=r"Missing.*blocks\.3\.ls1\.gamma"):
        tk.load_dinov2(encoder, state)
    with pytest.raises(RuntimeError, match=r"Unexpected.*blocks\.99\.ls1\.gamma"):
        tk.load_dinov2(encoder, state | {"blocks.3.ls1.gamma": gamma, "blocks.99.ls1.gamma": gamma})
