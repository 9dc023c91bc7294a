"""losses.py against the LPIPS of PerceptualSimilarity, closed forms and gradients."""

import pytest
import torch
from reference import array, contract, fill, filled

from align import ViT
from losses import DRAWS, LPIPS, Adversary, DinoDiscriminator, LeCam, Phase, PixelLosses
from losses import adaptive_weight, consistency_loss, diff_augment, hinge_loss
from train import parse_config, phase_at


@pytest.fixture(scope="module")
def lpips():
    model = LPIPS()
    convolutions = {key: shape for key, shape in contract("vgg16-397923af").items() if key.startswith("features.")}
    model.vgg.load_state_dict({key: fill(key, shape) for key, shape in convolutions.items()})
    model.linear.load_state_dict({key: value.abs() for key, value in filled("lpips_v0.1_vgg").items()})
    return model.requires_grad_(False)


def pair():
    return (array(f"lpips_vgg/{name}").permute(0, 3, 1, 2) / 127.5 - 1 for name in "ab")


def test_lpips_equals_the_official_one_in_float32_and_nearly_in_bf16(lpips):
    a, b = pair()
    torch.testing.assert_close(lpips.layers(a, b), array("lpips_vgg/layers"), rtol=1e-4, atol=0)
    torch.testing.assert_close(lpips(a, b), array("lpips_vgg/layers").sum(1), rtol=1e-4, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        rough = lpips(a, b)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, array("lpips_vgg/layers").sum(1), rtol=0.02, atol=0)


def test_lpips_is_zero_for_equal_images_and_its_gradient_leads_towards_the_target(lpips):
    a, b = (x[:1] for x in pair())
    assert lpips(a, a).item() == 0
    a.requires_grad_()
    before = lpips(a, b)
    (gradient,) = torch.autograd.grad(before.sum(), a)
    assert lpips(a.detach() - 0.1 * gradient / gradient.abs().max(), b) < before


@pytest.fixture(scope="module")
def vit():
    model = ViT("dino_vits16")
    model.load_state_dict(filled("dino_deitsmall16_pretrain"))
    return model.eval().requires_grad_(False)


def test_discriminator_judges_each_patch_and_each_image_for_itself(vit):
    torch.manual_seed(0)
    discriminator = DinoDiscriminator(vit)
    images = torch.rand(3, 3, 32, 48) * 2 - 1
    logits = discriminator(images)
    assert logits.shape == (3, 4, 6)  # 4 levels, 2 x 3 patches
    levels = vit.levels(vit.normalise(images), (2, 5, 8, 11))
    for found, expected in zip(discriminator.features(images), levels, strict=True):
        assert torch.equal(found, expected[:, 1:])  # without the class token
    assert torch.allclose(discriminator.heads[0](3 * found + 1, 2), discriminator.heads[0](found, 2), atol=1e-5)
    torch.testing.assert_close(discriminator(images[1:2]), logits[1:2], atol=1e-5, rtol=0)
    assert sum(p.numel() for p in discriminator.parameters()) < 1e6  # DINO is not among them
    with pytest.raises(ValueError, match="multiples of 16, not 40 x 40"):
        discriminator(torch.zeros(1, 3, 40, 40))


def test_only_refine_norms_moves_the_spectral_norms_and_towards_the_largest_singular_value(vit):
    discriminator = DinoDiscriminator(vit)
    with torch.no_grad():
        discriminator.heads[0].reduce.parametrizations.weight.original.mul_(3)
    before = {key: value.clone() for key, value in discriminator.state_dict().items()}
    discriminator.train()
    discriminator(torch.zeros(1, 3, 16, 16))
    assert all(torch.equal(value, before[key]) for key, value in discriminator.state_dict().items())
    for _ in range(50):
        discriminator.refine_norms()
    for head in discriminator.heads:
        for layer in (head.reduce, head.mix, head.judge):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.03)


def test_hinge_consistency_and_lecam_by_hand():
    assert hinge_loss(torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0])).item() == pytest.approx((0.5 + 1.0) / 2)
    weak, strong = torch.tensor([[[1.0, 3.0], [0.0, 0.0]]]), torch.tensor([[[3.0, 1.0], [1.0, 1.0]]])
    assert consistency_loss(weak, strong).item() == 0.5  # level means 2, 2 and 0, 1
    lecam = LeCam(decay=0.5)
    real, fake = torch.tensor([1.0, -1.0]), torch.tensor([0.5])
    assert lecam(real, fake).item() == 0.5  # averages 0: (1 + 0) / 2 + 0
    for means, expected in (((2.0, -1.0), (1.0, -0.5)), ((3.0, 0.5), (2.0, 0.0)), ((2.0, -4.0), (2.0, -2.0))):
        lecam.update(torch.tensor(means))
        assert lecam.ema.tolist() == list(expected)
    assert lecam(real, fake).item() == (9 + 1) / 2 + 1.5**2


def test_diff_augment_is_a_differentiable_function_of_its_draws():
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64) - 0.5).requires_grad_()
    u = torch.rand(2, DRAWS, generator=generator)
    for strong in (False, True):
        assert torch.autograd.gradcheck(lambda x, strong=strong: diff_augment(x, u, strong), images)
        assert torch.equal(diff_augment(images, u, strong), diff_augment(images, u, strong))
        torch.testing.assert_close(diff_augment(images[1:], u[1:], strong), diff_augment(images, u, strong)[1:])


def test_augmented_views_differ_between_images_and_do_what_they_say():
    image, u = torch.rand(1, 3, 32, 32) - 0.5, torch.rand(6, DRAWS, generator=torch.Generator().manual_seed(1))
    for strong in (False, True):
        views = diff_augment(image.expand(6, -1, -1, -1), u, strong)
        assert all(not torch.equal(views[i], views[j]) for i in range(6) for j in range(i))
    still = torch.full((1, DRAWS), 0.5)
    torch.testing.assert_close(diff_augment(image, still, False), image)
    moved = diff_augment(image, torch.tensor([[0.5, 0.5, 0.5, 0.999, 0.0, 0.5, 0.5]]), False)  # 4 down, 4 left
    torch.testing.assert_close(moved[:, :, 4:, :-4], image[:, :, :-4, 4:])
    assert (moved[:, :, :4] == 0).all() and (moved[:, :, :, -4:] == 0).all()
    cut = diff_augment(image, still, True)
    assert (cut[:, :, 8:24, 8:24] == 0).all()
    torch.testing.assert_close(cut[:, :, :8], image[:, :, :8])  # the middle of each colour range changes nothing
    bright = diff_augment(image, torch.tensor([[0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]]), True)
    torch.testing.assert_close(bright[:, :, :8], image[:, :, :8] + 0.4)
    grey = image.mean(1, keepdim=True)
    vivid = diff_augment(image, torch.tensor([[0.5, 0.9, 0.5, 0.5, 0.5, 0.5, 0.5]]), True)
    torch.testing.assert_close(vivid[:, :, :8], (grey + 1.8 * (image - grey))[:, :, :8])
    hard = diff_augment(image, torch.tensor([[0.5, 0.5, 0.9, 0.5, 0.5, 0.5, 0.5]]), True)
    torch.testing.assert_close(hard[:, :, :8], (image.mean() + 1.4 * (image - image.mean()))[:, :, :8])


def test_adaptive_weight_on_two_layers_by_hand():
    """h = 2 x, y = w h with x = 3, w = 1; d(y^2)/dw = 2 y h = 72, d(-y/4)/dw = -h/4 = -1.5: the ratio is 48."""
    h, w = 2 * torch.tensor(3.0), torch.tensor(1.0, requires_grad=True)
    y = w * h
    (first,) = torch.autograd.grad(y.square(), w, retain_graph=True)
    (second,) = torch.autograd.grad(-y / 4, w)
    assert adaptive_weight(first, second, 1e4).item() == pytest.approx(48, rel=1e-5)
    assert adaptive_weight(first, second, 10).item() == 10
    assert adaptive_weight(first, torch.zeros(()), 10).item() == 10  # a vanishing gradient, too


class Painter(torch.nn.Module):
    """A two-layer "decoder" of one 16-px image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.code = torch.nn.Parameter(torch.randn(1, 4))
        self.last = torch.nn.Linear(4, 3 * 16 * 16)

    def forward(self):
        return self.last(self.code).view(1, 3, 16, 16)


def weighed(painter, pixel, phase, images, u):
    """-> loss, logs, and the gradient of the last layer."""
    painter.zero_grad()
    pixel.zero_grad()
    loss, logs = pixel(painter(), images, painter.last.weight, phase, u)
    loss.backward()
    return loss, logs, painter.last.weight.grad.clone()


def test_the_discriminators_gradient_reaches_the_decoder_with_the_weight_it_logs(vit):
    config, _, _ = parse_config(
        "--adversarial_weight 0.2 --discriminator_start 3 --discriminator_delay 2 --perceptual_weight 0".split()
    )
    painter, pixel = Painter(), PixelLosses(vit=vit)
    calls = []
    pixel.adversary.discriminator.register_forward_pre_hook(lambda *_: calls.append(1))
    judge = pixel.adversary.discriminator.judge
    pixel.adversary.discriminator.judge = lambda *inputs: calls.append(1) or judge(*inputs)
    images, u = torch.rand(1, 3, 16, 16) - 0.5, torch.rand(1, 4, DRAWS)
    plain = (painter() - images).square().mean()
    (expected,) = torch.autograd.grad(plain, painter.last.weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit, "levels", None)  # before its start nothing of it may be touched
        loss, logs, gradient = weighed(painter, pixel, phase_at(config, 2), images, None)
    assert not calls and loss == plain and "discriminator" not in logs
    torch.testing.assert_close(gradient, expected)
    pixel.adversary.requires_grad_(True)
    loss, logs, gradient = weighed(painter, pixel, phase_at(config, 4), images, u)
    assert calls and "adversarial" not in logs
    torch.testing.assert_close(gradient, expected)  # it trains, and the decoder does not feel it
    felt = {name: p.grad.abs().sum() for name, p in pixel.adversary.named_parameters()}
    assert all(value > 1e-4 for name, value in felt.items() if "judge.bias" not in name)  # there the two sides cancel
    assert loss.item() == pytest.approx(plain.item())
    pixel.adversary.weight.fill_(7.0)
    loss, logs, gradient = weighed(painter, pixel, phase_at(config, 5), images, u)
    fake = pixel.adversary.discriminator(diff_augment(painter(), u[:, 0], strong=False))
    (against,) = torch.autograd.grad(-fake.mean(), painter.last.weight)
    torch.testing.assert_close(gradient, expected + 0.2 * 7 * against)
    assert loss.item() == pytest.approx(plain.item() - 0.2 * 7 * fake.mean().item(), abs=1e-5)
    assert logs["adaptive_weight"] == 7


def test_the_discriminators_loss_and_its_gradient_by_hand(vit):
    torch.manual_seed(0)
    adversary = Adversary(vit).requires_grad_(True)
    adversary.lecam.ema.copy_(torch.tensor([0.3, -0.2]))
    pixels, images, u = torch.rand(2, 3, 16, 16) - 0.5, torch.rand(2, 3, 16, 16) - 0.5, torch.rand(2, 4, DRAWS)
    loss, _, logs = adversary(pixels, images, u, False)
    gradients = torch.autograd.grad(loss, list(adversary.parameters()))
    fake, real = (adversary.discriminator(diff_augment(x, u[:, i], False)) for x, i in ((pixels, 0), (images, 1)))
    other_fake, other_real = (
        adversary.discriminator(diff_augment(x, u[:, i], True)) for x, i in ((pixels, 2), (images, 3))
    )
    hinge = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    consistency = sum((a.mean(2) - b.mean(2)).square().mean() for a, b in ((fake, other_fake), (real, other_real)))
    lecam = (real + 0.2).clamp(min=0).square().mean() + (0.3 - fake).clamp(min=0).square().mean()
    expected = hinge + 4 * consistency + 0.001 * lecam
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, list(adversary.parameters()))):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(logs["discriminator"], hinge)


def test_the_discriminator_learns_to_tell_two_sets_apart(vit):
    torch.manual_seed(0)
    adversary = Adversary(vit).requires_grad_(True)
    pixels, images = torch.zeros(4, 3, 32, 32), torch.rand(4, 3, 32, 32) - 0.5
    optimizer, hinges = torch.optim.Adam(adversary.parameters(), 1e-4), []
    for _ in range(40):
        loss, _, logs = adversary(pixels, images, torch.rand(4, 4, DRAWS), False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hinges.append(logs["discriminator"].item())
    assert hinges[-1] < hinges[0] - 0.1 and logs["logit_real"] > logs["logit_fake"] + 0.2


VECTOR = "heads.0.reduce.parametrizations.weight.0._u"


def test_a_step_sets_the_adaptive_weight_and_the_moving_averages_for_the_next(vit):
    config, _, _ = parse_config("--adversarial_weight 0.2 --discriminator_start 0 --discriminator_delay 0".split())
    painter, pixel = Painter(), PixelLosses(vit=vit)
    images, u = torch.rand(1, 3, 16, 16) - 0.5, torch.rand(1, 4, DRAWS)
    vector = pixel.adversary.discriminator.state_dict()[VECTOR].clone()
    _, logs, _ = weighed(painter, pixel, phase_at(config, 0), images, u)
    assert logs["adaptive_weight"] == 0
    (first,) = torch.autograd.grad((painter() - images).square().mean(), painter.last.weight)
    fake = pixel.adversary.discriminator(diff_augment(painter(), u[:, 0], strong=False)).mean()
    (second,) = torch.autograd.grad(-fake, painter.last.weight)
    pixel.adversary.finish_step(lambda total: total)
    assert pixel.adversary.weight.item() == pytest.approx(
        (first.norm() / second.norm()).clamp(max=100).item(), rel=1e-3
    )
    assert pixel.adversary.lecam.ema[1].item() == pytest.approx(0.001 * fake.item(), rel=1e-3)
    assert not torch.equal(pixel.adversary.discriminator.state_dict()[VECTOR], vector)  # the norms are refined
    before = pixel.adversary.weight.clone()
    inf, nan = float("inf"), float("nan")
    for first, second in ((nan, 1.0), (inf, 1.0), (1.0, inf), (3e38, 1.0)):  # of steps that were skipped
        pixel.adversary.measure("logits", torch.full((2,), first))
        pixel.adversary.measure("reconstruction", torch.full((2,), first))
        pixel.adversary.measure("adversarial", torch.full((2,), second))
        pixel.adversary.finish_step(lambda total: total)
        assert pixel.adversary.weight == before and pixel.adversary.lecam.ema.isfinite().all()


def test_lpips_reaches_the_decoder_with_its_weight(lpips):
    painter, images = Painter(), torch.rand(1, 3, 16, 16) - 0.5
    loss, logs, gradient = weighed(painter, PixelLosses(lpips), Phase(2.0, False, 0.0), images, None)
    expected = (painter() - images).square().mean() + 2 * lpips(painter(), images).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, painter.last.weight)[0])
    assert logs["lpips"] > 0


def test_perceptual_weight_ramps_and_the_adversary_joins_in_two_steps():
    words = "--perceptual_weight 2 --perceptual_warmup 4 --adversarial_weight 0.2 --discriminator_start 3 --discriminator_delay 2"
    config, _, _ = parse_config(words.split())
    phases = [phase_at(config, step) for step in range(7)]
    assert [phase.perceptual for phase in phases] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    assert [phase.discriminate for phase in phases] == [False] * 3 + [True] * 4
    assert [phase.adversarial for phase in phases] == [0] * 5 + [0.2] * 2
    offline, _, _ = parse_config([])
    assert phase_at(offline, 10**9) == (0.0, False, 0.0)


def test_the_frozen_networks_are_in_no_checkpoint(vit, lpips):
    """DINO and VGG stay outside state_dict(), the optimizer and DDP."""
    keys = PixelLosses(lpips, vit).state_dict().keys()
    assert keys and all(
        key.startswith(("adversary.discriminator.heads.", "adversary.lecam", "adversary.weight")) for key in keys
    )
    assert not PixelLosses(lpips).state_dict() and isinstance(PixelLosses(lpips, vit).adversary, Adversary)
