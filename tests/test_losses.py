"""losses.py against the LPIPS of PerceptualSimilarity, closed forms and gradients."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from reference import array, contract, fill, filled
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import losses
from align import DINOFeatures
from losses import (
    LPIPS,
    NUM_AUG_PARAMS,
    AdaptiveWeight,
    Discriminator,
    GANLoss,
    SpectralNormConv2d,
    consistency_loss,
    diff_augment,
    hinge_loss,
    lecam_loss,
    pull_back,
)
from train import weighted_sum

# --------------------------------------------------------------------------------------------------
# LPIPS.


@pytest.fixture(scope="module")
def lpips():
    model = LPIPS()
    vgg_shapes = contract("vgg16-397923af")
    vgg = {
        key: fill(key, shape) for key, shape in vgg_shapes.items() if key.startswith("features.")
    }
    linear = {key: value.abs() for key, value in filled("lpips_v0.1_vgg").items()}
    model.vgg.load_state_dict(vgg)
    model.linear.load_state_dict(linear)
    return model.requires_grad_(False)


def image_pair() -> list[Tensor]:
    return [array(f"lpips_vgg/{name}").permute(0, 3, 1, 2) / 127.5 - 1 for name in "ab"]


def test_lpips_equals_the_official_one_in_float32_and_nearly_in_bf16(lpips):
    a, b = image_pair()
    layers = array("lpips_vgg/layers")
    torch.testing.assert_close(lpips(a, b), layers.sum(1), rtol=1e-4, atol=0)
    for i, expected in enumerate(layers.T):
        one_layer = deepcopy(lpips)
        for name, parameter in one_layer.linear.named_parameters():
            if not name.startswith(f"lin{i}."):
                parameter.zero_()
        torch.testing.assert_close(one_layer(a, b), expected, rtol=1e-4, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        rough = lpips(a, b)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, layers.sum(1), rtol=0.02, atol=0)


def test_lpips_is_zero_for_equal_images_and_its_gradient_leads_towards_the_target(lpips):
    a, b = (images[:1] for images in image_pair())
    assert lpips(a, a).item() == 0
    a.requires_grad_()
    before = lpips(a, b)
    (gradient,) = torch.autograd.grad(before.sum(), a)
    moved = a.detach() - 0.1 * gradient / gradient.abs().max()
    assert lpips(moved, b) < before


# --------------------------------------------------------------------------------------------------
# Discriminator.


@pytest.fixture(scope="module")
def backbone():
    dino = DINOFeatures()
    dino.vit.load_state_dict(filled("dino_deitsmall16_pretrain"))
    return dino.eval().requires_grad_(False)


def test_discriminator_judges_each_patch_and_each_image_for_itself(backbone):
    torch.manual_seed(0)
    discriminator = Discriminator(384)
    images = torch.rand(3, 3, 32, 48) * 2 - 1
    feats = backbone(images)
    logits = discriminator(feats)
    assert logits.shape == (3, 4, 6)  # 4 layers, 2 x 3 patches
    for i, (head, feat) in enumerate(zip(discriminator.heads, feats, strict=True)):
        assert torch.equal(head(feat), logits[:, i])
        # The layers differ in scale, which must not matter.
        torch.testing.assert_close(head(3 * feat + 1), head(feat), atol=1e-5, rtol=0)
    of_one_image = discriminator(backbone(images[1:2]))
    torch.testing.assert_close(of_one_image, logits[1:2], atol=1e-5, rtol=0)

    # A change in the first column reaches its neighbors (3 x 3 places, row by row), no further.
    in_first_column = torch.arange(3) < 1
    changed = [torch.where(in_first_column, feat.roll(1, 1), feat) for feat in feats]
    difference = (logits[0] - discriminator(changed)[0]).abs().view(4, 2, 3)
    assert (difference[:, :, 2] < 1e-5).all()
    assert (difference[:, :, :2] > 1e-5).all()

    with torch.autocast("cpu", torch.bfloat16):
        in_autocast = discriminator(feats)
    assert in_autocast.dtype == torch.float32
    assert torch.equal(in_autocast, logits)
    # DINO is not among its parameters.
    assert sum(parameter.numel() for parameter in discriminator.parameters()) < 1e6


def test_spectral_norm_equals_torchs():
    torch.manual_seed(0)
    ours = SpectralNormConv2d(6, 5, 3)
    theirs = spectral_norm(nn.Conv2d(6, 5, 3, padding=1)).eval()
    x = torch.randn(2, 6, 4, 4)
    with torch.no_grad():
        ours.weight.mul_(3)
        theirs.bias.copy_(ours.bias)
        weight = theirs.parametrizations.weight
        weight.original.copy_(ours.weight)
        weight[0]._u.copy_(ours.u)
        weight[0]._v.copy_(F.normalize(ours.u @ ours.weight.flatten(1), dim=0))
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, weight.original.grad)


def test_only_updates_move_spectral_norms_and_to_the_largest_singular_value():
    torch.manual_seed(0)
    gan = GANLoss(384).train()
    with torch.no_grad():
        gan.discriminator.heads[0].conv_in.weight.mul_(3)
    before = {key: value.clone() for key, value in gan.state_dict().items()}
    gan.discriminator([torch.zeros(1, 384, 1, 1)] * 4)
    for key, value in gan.state_dict().items():
        assert torch.equal(value, before[key])
    for _ in range(50):
        gan.logit_sums = torch.zeros(2)
        gan.update(lambda sums: sums)
    for head in gan.discriminator.heads:
        for conv in (head.conv_in, head.conv_mid, head.conv_out):
            matrix = conv.weight.flatten(1)
            largest = torch.linalg.matrix_norm(matrix, 2)
            assert ((conv.u @ matrix).norm() / largest).item() == pytest.approx(1, abs=0.03)


def test_hinge_consistency_and_lecam_by_hand(monkeypatch):
    hinge = hinge_loss(torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0]))
    assert hinge.item() == pytest.approx((0.5 + 1.0) / 2)
    weak = torch.tensor([[[1.0, 3.0], [0.0, 0.0]]])
    strong = torch.tensor([[[3.0, 1.0], [1.0, 1.0]]])
    assert consistency_loss(weak, strong).item() == 0.5  # means over places: 2, 2 and 0, 1

    real = torch.tensor([1.0, -1.0])
    fake = torch.tensor([0.5])
    gan = GANLoss(8)
    assert lecam_loss(real, fake, gan.ema_logits).item() == 0.5  # averages 0: (1 + 0) / 2 + 0
    assert losses.LECAM_DECAY == 0.999
    monkeypatch.setattr(losses, "LECAM_DECAY", 0.5)
    steps = [
        ((2.0, -1.0), [1.0, -0.5]),
        ((3.0, 0.5), [2.0, 0.0]),
        ((2.0, -4.0), [2.0, -2.0]),
    ]
    for mean_logits, expected in steps:
        gan.logit_sums = torch.tensor(mean_logits)
        gan.update(lambda sums: sums)
        assert gan.ema_logits.tolist() == expected
    assert lecam_loss(real, fake, gan.ema_logits).item() == (9 + 1) / 2 + 1.5**2


# --------------------------------------------------------------------------------------------------
# DiffAugment.


def test_diff_augment_is_a_differentiable_function_of_its_random_numbers():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64) - 0.5
    images.requires_grad_()
    rand = torch.rand(2, NUM_AUG_PARAMS, generator=generator)
    for strong in (False, True):
        assert torch.autograd.gradcheck(lambda x, s=strong: diff_augment(x, rand, s), images)
        views = diff_augment(images, rand, strong)
        assert torch.equal(views, diff_augment(images, rand, strong))
        second = diff_augment(images[1:], rand[1:], strong)
        torch.testing.assert_close(second, views[1:])


def test_augmented_views_differ_between_images():
    image = torch.rand(1, 3, 32, 32) - 0.5
    rand = torch.rand(6, NUM_AUG_PARAMS, generator=torch.Generator().manual_seed(1))
    for strong in (False, True):
        views = diff_augment(image.expand(6, -1, -1, -1), rand, strong)
        for i in range(6):
            for j in range(i):
                assert not torch.equal(views[i], views[j])


def test_augmentations_do_what_they_say():
    image = torch.rand(1, 3, 32, 32) - 0.5

    def augment(strong: bool, **changes: float) -> Tensor:
        """With 0.5 as the random numbers that are not given."""
        names = ("brightness", "saturation", "contrast", "down", "right", "row", "column")
        values = dict.fromkeys(names, 0.5) | changes
        assert len(values) == NUM_AUG_PARAMS
        return diff_augment(image, torch.tensor([list(values.values())]), strong)

    torch.testing.assert_close(augment(strong=False), image)
    moved = augment(strong=False, down=0.999, right=0.0)  # 4 down, 4 left
    torch.testing.assert_close(moved[:, :, 4:, :-4], image[:, :, :-4, 4:])
    assert (moved[:, :, :4] == 0).all()
    assert (moved[:, :, :, -4:] == 0).all()
    cut = augment(strong=True)
    assert (cut[:, :, 8:24, 8:24] == 0).all()

    # The first 8 rows are not cut out. The middle of each color range changes nothing there.
    torch.testing.assert_close(cut[:, :, :8], image[:, :, :8])
    bright = augment(strong=True, brightness=0.9)
    torch.testing.assert_close(bright[:, :, :8], image[:, :, :8] + 0.4)
    gray = image.mean(1, keepdim=True)
    vivid = augment(strong=True, saturation=0.9)
    torch.testing.assert_close(vivid[:, :, :8], (gray + 1.8 * (image - gray))[:, :, :8])
    hard = augment(strong=True, contrast=0.9)
    expected = image.mean() + 1.4 * (image - image.mean())
    torch.testing.assert_close(hard[:, :, :8], expected[:, :, :8])


# --------------------------------------------------------------------------------------------------
# The adaptive weight, and all losses of a training step together.


def test_adaptive_weight_on_two_layers_by_hand():
    """h = 2 x and y = w h, with x = 3 and w = 1.

    d(y^2)/dw = 2 y h = 72 and d(-y/4)/dw = -h/4 = -1.5, so the ratio is 48.
    """
    h = 2 * torch.tensor(3.0)
    w = torch.tensor(1.0, requires_grad=True)
    y = w * h
    cases = (
        (y.square(), -y / 4, 48),
        (10 * y.square(), -y / 4, 100),  # the ratio is 480, and 100 the largest weight
        (y.square(), 0 * y, 0),  # no gradient, so that the weight stays as it is
    )
    for rec_loss, other_loss, ratio in cases:
        adaptive_weight = AdaptiveWeight()
        adaptive_weight.observe(rec_loss, other_loss, w)
        assert adaptive_weight.value == 0  # it takes effect in the next step
        adaptive_weight.update(lambda sums: sums)
        assert adaptive_weight.value.item() == pytest.approx(ratio, rel=1e-5)


class Painter(nn.Module):
    """A "decoder" of two layers, which paints two images of 16 x 16 pixels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.code = nn.Parameter(torch.randn(2, 4))
        self.last_layer = nn.Linear(4, 3 * 16 * 16)

    def forward(self) -> Tensor:
        return self.last_layer(self.code).unflatten(1, (3, 16, 16))


WEIGHTS = {"mse": 1.0, "perceptual": 2.0, "adversarial": 0.2, "code": 0.5}


def draw_data(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two images, and the random numbers that they are augmented with."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 3, 16, 16, generator=generator) - 0.5
    return images, torch.rand(2, 4, NUM_AUG_PARAMS, generator=generator)


def learn(
    painter: Painter,
    data: tuple[Tensor, Tensor],
    gan: GANLoss | None = None,
    backbone: nn.Module | None = None,
    lpips: nn.Module | None = None,
    use_gan: bool = False,
    rows: slice = slice(None),
    num_micro: int = 1,
) -> dict[str, Tensor]:
    """Add to the gradients those of eq. 7 on some rows -> the terms of eq. 7 and of the log.

    It differentiates line by line as `train.train_tokenizer` does. The mean square of the code
    stands for the losses on latents.
    """
    x, rand = (part[rows] for part in data)
    recon = painter()[rows]
    latent_terms = {"code": painter.code[rows].square().mean()}

    recon_leaf = recon.detach().requires_grad_()
    pixel_terms = {"mse": F.mse_loss(recon_leaf, x)}
    if lpips:
        pixel_terms["perceptual"] = lpips(recon_leaf, x).mean()
    gan_terms = {}
    if gan:
        d_loss, g_loss, gan_terms = gan(backbone, recon_leaf, x, rand, with_g_loss=use_gan)

    loss = pull_back(recon, recon_leaf, weighted_sum(pixel_terms, WEIGHTS))
    if use_gan:
        g_term = pull_back(recon, recon_leaf, g_loss)
        gan.adaptive_weight.observe(loss, g_term, painter.last_layer.weight)
        loss = loss + WEIGHTS["adversarial"] * gan.adaptive_weight.value * g_term
    loss = loss + weighted_sum(latent_terms, WEIGHTS)
    (loss / num_micro).backward()
    if gan:
        (d_loss / num_micro).backward()
    return pixel_terms | gan_terms


def take_gradients(module: nn.Module) -> list[Tensor | None]:
    """The gradients of all parameters, which are then cleared."""
    gradients = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    return gradients


def expected_gradients(
    painter: Painter,
    data: tuple[Tensor, Tensor],
    gan: GANLoss | None = None,
    backbone: nn.Module | None = None,
    lpips: nn.Module | None = None,
) -> list[Tensor]:
    """The painter's gradients of the same sum written out."""
    images, rand = data
    loss = (painter() - images).square().mean() + 0.5 * painter.code.square().mean()
    if lpips:
        loss = loss + 2 * lpips(painter(), images).mean()
    if gan:
        feats = backbone(diff_augment(painter(), rand[:, 0], False))
        loss = loss - 0.2 * gan.adaptive_weight.value * gan.discriminator(feats).mean()
    return list(torch.autograd.grad(loss, list(painter.parameters())))


def assert_same_gradients(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_the_discriminators_gradient_reaches_the_decoder_with_the_weight_it_logs(backbone):
    painter = Painter()
    gan = GANLoss(384)
    data = draw_data()
    without_gan = expected_gradients(painter, data)

    # The discriminator has not begun to train.
    learn(painter, data)
    assert_same_gradients(take_gradients(painter), without_gan)
    assert take_gradients(gan) == [None] * len(list(gan.parameters()))

    # It trains, and the decoder does not feel it.
    learn(painter, data, gan, backbone)
    assert_same_gradients(take_gradients(painter), without_gan)
    for name, parameter in gan.named_parameters():
        if "conv_out.bias" not in name:  # there the two sides cancel
            assert parameter.grad.abs().sum() > 1e-4, name
    gradients_of_gan = take_gradients(gan)

    # The decoder feels it, and what fools the discriminator does not teach it.
    gan.adaptive_weight.value.fill_(7.0)
    terms = learn(painter, data, gan, backbone, use_gan=True)
    with_gan = expected_gradients(painter, data, gan, backbone)
    assert terms["adaptive_weight"] == 7
    for a, b in zip(with_gan, without_gan, strict=True):
        assert not torch.allclose(a, b, rtol=0.01)
    assert_same_gradients(take_gradients(painter), with_gan)
    assert_same_gradients(take_gradients(gan), gradients_of_gan)
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_all_terms_have_the_gradient_of_their_sum_and_micro_batches_add_up(backbone, lpips):
    painter = Painter()
    gan = GANLoss(384)
    data = draw_data()
    gan.adaptive_weight.value.fill_(3.0)
    expected = expected_gradients(painter, data, gan, backbone, lpips)
    terms = learn(painter, data, gan, backbone, lpips, use_gan=True)
    assert_same_gradients(take_gradients(painter), expected)
    assert terms["perceptual"] > 0
    assert torch.equal(terms["mse"], F.mse_loss(painter(), data[0]))
    for i in range(2):
        rows = slice(i, i + 1)
        learn(painter, data, gan, backbone, lpips, use_gan=True, rows=rows, num_micro=2)
    assert_same_gradients(take_gradients(painter), expected)


def test_the_discriminators_loss_and_its_gradient_by_hand(backbone):
    torch.manual_seed(0)
    gan = GANLoss(384)
    images, rand = draw_data()
    gan.ema_logits.copy_(torch.tensor([0.3, -0.2]))
    recon = (torch.rand(2, 3, 16, 16) - 0.5).requires_grad_()
    parameters = list(gan.parameters())
    d_loss, g_loss, logs = gan(backbone, recon, images, rand, with_g_loss=False)
    assert g_loss.item() == 0
    assert not g_loss.requires_grad
    found = torch.autograd.grad(d_loss, [*parameters, recon], allow_unused=True)
    *gradients, gradient_of_recon = found
    assert gradient_of_recon is None

    def judge(x: Tensor, i: int, strong: bool) -> Tensor:
        return gan.discriminator(backbone(diff_augment(x.detach(), rand[:, i], strong)))

    fake = judge(recon, 0, strong=False)
    real = judge(images, 1, strong=False)
    fake_strong = judge(recon, 2, strong=True)
    real_strong = judge(images, 3, strong=True)
    hinge = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    consistency = (fake.mean(2) - fake_strong.mean(2)).square().mean()
    consistency = consistency + (real.mean(2) - real_strong.mean(2)).square().mean()
    lecam = (real + 0.2).clamp(min=0).square().mean() + (0.3 - fake).clamp(min=0).square().mean()
    expected = hinge + 4 * consistency + 0.001 * lecam
    torch.testing.assert_close(d_loss, expected)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    by_hand = {
        "discriminator": hinge,
        "consistency": consistency,
        "lecam": lecam,
        "logit_real": real.mean(),
        "logit_fake": fake.mean(),
    }
    torch.testing.assert_close({name: logs[name] for name in by_hand}, by_hand)
    _, g_loss, _ = gan(backbone, recon, images, rand, with_g_loss=True)
    torch.testing.assert_close(g_loss, -fake.mean())


def test_the_discriminator_learns_to_tell_two_sets_apart(backbone):
    torch.manual_seed(0)
    gan = GANLoss(384)
    fake = torch.zeros(4, 3, 32, 32)
    real = torch.rand(4, 3, 32, 32) - 0.5
    optimizer = torch.optim.Adam(gan.parameters(), 1e-4)
    hinges = []
    for _ in range(40):
        rand = torch.rand(4, 4, NUM_AUG_PARAMS)
        d_loss, _, logs = gan(backbone, fake, real, rand, with_g_loss=False)
        optimizer.zero_grad()
        d_loss.backward()
        optimizer.step()
        hinges.append(logs["discriminator"].item())
    assert hinges[-1] < hinges[0] - 0.1
    assert logs["logit_real"] > logs["logit_fake"] + 0.2


def test_a_step_sets_the_adaptive_weight_and_the_moving_averages_for_the_next(backbone):
    painter = Painter()
    gan = GANLoss(384)
    images, rand = data = draw_data()
    conv = gan.discriminator.heads[0].conv_in
    u_before = conv.u.clone()
    learn(painter, data, gan, backbone)
    gan.update(lambda sums: sums)
    assert gan.adaptive_weight.value == 0  # the decoder does not feel the discriminator yet
    assert gan.logit_sums is None
    assert gan.adaptive_weight.grad_sums is None
    assert not torch.equal(conv.u, u_before)  # the spectral norms are refined

    gan.ema_logits.zero_()
    terms = learn(painter, data, gan, backbone, use_gan=True)
    assert terms["adaptive_weight"] == 0
    fake = gan.discriminator(backbone(diff_augment(painter(), rand[:, 0], False))).mean()
    real = gan.discriminator(backbone(diff_augment(images, rand[:, 1], False))).mean()
    rec_loss = (painter() - images).square().mean()
    (rec_grad,) = torch.autograd.grad(rec_loss, painter.last_layer.weight)
    (gan_grad,) = torch.autograd.grad(-fake, painter.last_layer.weight)
    gan.update(lambda sums: sums)
    assert gan.logit_sums is None
    assert gan.adaptive_weight.grad_sums is None  # the next step begins anew
    ratio = (rec_grad.norm() / gan_grad.norm()).clamp(max=100).item()
    assert gan.adaptive_weight.value.item() == pytest.approx(ratio, rel=1e-3)
    expected = [0.001 * real.item(), 0.001 * fake.item()]
    assert gan.ema_logits.tolist() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "rec_grad, other_grad",
    [
        (float("nan"), 1.0),
        (float("inf"), 1.0),
        (1.0, float("inf")),
        (3e38, 1.0),  # its norm is infinite
    ],
)
def test_a_step_that_was_skipped_leaves_the_adaptive_weight(rec_grad, other_grad):
    gan = GANLoss(384)
    gan.adaptive_weight.value.fill_(2.5)
    gan.logit_sums = torch.full((2,), rec_grad)
    gan.adaptive_weight.grad_sums = torch.tensor([[rec_grad] * 2, [other_grad] * 2])
    gan.update(lambda sums: sums)
    assert gan.adaptive_weight.value == 2.5
    assert gan.ema_logits.isfinite().all()


def test_what_a_step_measures_does_not_depend_on_its_micro_batches(backbone):
    measured = []
    for pieces in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        painter = Painter()
        data = draw_data()
        torch.manual_seed(0)
        gan = GANLoss(384)
        num_micro = len(pieces)
        for rows in pieces:
            learn(painter, data, gan, backbone, use_gan=True, rows=rows, num_micro=num_micro)
        gan.update(lambda sums, num_micro=num_micro: sums / num_micro)
        measured.append([gan.adaptive_weight.value, gan.ema_logits])
    torch.testing.assert_close(measured[0], measured[1], atol=0, rtol=1e-3)
    assert 0 < measured[0][0] < losses.MAX_ADAPTIVE_WEIGHT


def test_the_frozen_networks_are_in_no_checkpoint(backbone):
    """DINO stays outside state_dict(), the optimizer and DDP, after use too.

    LPIPS is not even passed to the discriminator.
    """
    gan = GANLoss(384)
    learn(Painter(), draw_data(), gan, backbone, use_gan=True)
    state = gan.state_dict()
    others = {key for key in state if not key.startswith("discriminator.heads.")}
    assert others == {"ema_logits", "adaptive_weight.value"}
    assert not any(isinstance(module, DINOFeatures | LPIPS) for module in gan.modules())
    assert sum(value.numel() for value in state.values()) < 1e6
