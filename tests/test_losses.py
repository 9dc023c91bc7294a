"""losses.py against the LPIPS of PerceptualSimilarity, closed forms and gradients."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from reference import array, contract, fill, filled
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import losses
from align import DINO
from losses import DRAWS, LPIPS, Adversary, Balance, Discriminator, NormedConv, consistency_loss, diff_augment, hinge_loss
from losses import lecam_loss
from train import backward, total


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
    torch.testing.assert_close(lpips(a, b), array("lpips_vgg/layers").sum(1), rtol=1e-4, atol=0)
    for i, expected in enumerate(array("lpips_vgg/layers").T):
        alone = deepcopy(lpips)
        [part.zero_() for name, part in alone.linear.named_parameters() if not name.startswith(f"lin{i}.")]
        torch.testing.assert_close(alone(a, b), expected, rtol=1e-4, atol=0)
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
def eye():
    dino = DINO()
    dino.vit.load_state_dict(filled("dino_deitsmall16_pretrain"))
    return dino.eval().requires_grad_(False)


def test_discriminator_judges_each_patch_and_each_image_for_itself(eye):
    torch.manual_seed(0)
    discriminator = Discriminator(384)
    images = torch.rand(3, 3, 32, 48) * 2 - 1
    features = eye(images)
    logits = discriminator(features)
    assert logits.shape == (3, 4, 6)  # 4 levels, 2 x 3 patches
    for i, (head, level) in enumerate(zip(discriminator.heads, features, strict=True)):
        assert torch.equal(head(level), logits[:, i])
        torch.testing.assert_close(head(3 * level + 1), head(level), atol=1e-5, rtol=0)  # the levels differ in scale
    torch.testing.assert_close(discriminator(eye(images[1:2])), logits[1:2], atol=1e-5, rtol=0)
    shown = (logits[0] - discriminator([torch.where(torch.arange(3) < 1, x.roll(1, 1), x) for x in features])[0]).abs()
    assert (shown.view(4, 2, 3)[:, :, 2] < 1e-5).all() and (shown.view(4, 2, 3)[:, :, :2] > 1e-5).all()  # 3 x 3 places, row-major
    with torch.autocast("cpu", torch.bfloat16):
        assert discriminator(features).dtype == torch.float32 and torch.equal(discriminator(features), logits)
    assert sum(p.numel() for p in discriminator.parameters()) < 1e6  # DINO is not among them


def test_spectral_norms_are_the_common_ones_and_only_refine_moves_them_to_the_largest_singular_value():
    torch.manual_seed(0)
    ours, theirs, x = NormedConv(6, 5, 3), spectral_norm(nn.Conv2d(6, 5, 3, padding=1)).eval(), torch.randn(2, 6, 4, 4)
    with torch.no_grad():
        ours.weight.mul_(3)
        theirs.bias.copy_(ours.bias)
        theirs.parametrizations.weight.original.copy_(ours.weight)
        theirs.parametrizations.weight[0]._u.copy_(ours.u)
        theirs.parametrizations.weight[0]._v.copy_(F.normalize(ours.u @ ours.weight.flatten(1), dim=0))
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.parametrizations.weight.original.grad)

    adversary = Adversary(384).train()
    with torch.no_grad():
        adversary.discriminator.heads[0].reduce.weight.mul_(3)
    before = {key: value.clone() for key, value in adversary.state_dict().items()}
    adversary.discriminator([torch.zeros(1, 384, 1, 1)] * 4)
    assert all(torch.equal(value, before[key]) for key, value in adversary.state_dict().items())
    for _ in range(50):
        adversary.measured["logits"] += torch.zeros(2)
        adversary.end_step(lambda sums: sums)
    for head in adversary.discriminator.heads:
        for layer in (head.reduce, head.mix, head.judge):
            largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
            assert ((layer.u @ layer.weight.flatten(1)).norm() / largest).item() == pytest.approx(1, abs=0.03)


def test_hinge_consistency_and_lecam_by_hand(monkeypatch):
    assert hinge_loss(torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0])).item() == pytest.approx((0.5 + 1.0) / 2)
    weak, strong = torch.tensor([[[1.0, 3.0], [0.0, 0.0]]]), torch.tensor([[[3.0, 1.0], [1.0, 1.0]]])
    assert consistency_loss(weak, strong).item() == 0.5  # level means 2, 2 and 0, 1
    real, fake, adversary = torch.tensor([1.0, -1.0]), torch.tensor([0.5]), Adversary(8)
    assert lecam_loss(real, fake, adversary.averages).item() == 0.5  # averages 0: (1 + 0) / 2 + 0
    assert losses.LECAM_DECAY == 0.999
    monkeypatch.setattr(losses, "LECAM_DECAY", 0.5)
    for means, expected in (((2.0, -1.0), (1.0, -0.5)), ((3.0, 0.5), (2.0, 0.0)), ((2.0, -4.0), (2.0, -2.0))):
        adversary.measured["logits"] += torch.tensor(means)
        adversary.end_step(lambda sums: sums)
        assert adversary.averages.tolist() == list(expected)
    assert lecam_loss(real, fake, adversary.averages).item() == (9 + 1) / 2 + 1.5**2


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
    for others, mine, ratio in ((y.square(), -y / 4, 48), (10 * y.square(), -y / 4, 100), (y.square(), 0 * y, 0)):
        balance = Balance()
        assert balance.weigh(w, (others, None), (mine, None)) == 0
        balance.end_step(lambda sums: sums)
        assert balance.weigh(w, (others, None), (mine, None)).item() == pytest.approx(ratio, rel=1e-5)  # 100 at most


class Painter(nn.Module):
    """A two-layer "decoder" of 16-px images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.code = nn.Parameter(torch.randn(2, 4))
        self.last = nn.Linear(4, 3 * 16 * 16)

    def forward(self):
        return self.last(self.code).unflatten(1, (3, 16, 16))


WEIGHTS = {"mse": 1.0, "perceptual": 2.0, "adversarial": 0.2, "rest": 0.5}


def draws(seed=0):
    """Images and what they are augmented with."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, 16, 16, generator=generator) - 0.5, torch.rand(2, 4, DRAWS, generator=generator)


def learn(painter, data, adversary=None, eye=None, lpips=None, fool=False, rows=slice(None), share=1.0):
    """Eq. 7 as `train.train_on_images` differentiates it, on some rows; adds to the gradients -> terms."""
    images, u = (part[rows] for part in data)
    reconstruction = painter()[rows]
    pixels = reconstruction.detach().requires_grad_()
    terms = {"mse": F.mse_loss(pixels, images)} | ({"perceptual": lpips(pixels, images).mean()} if lpips else {})
    (slope,) = torch.autograd.grad(total(terms, WEIGHTS), pixels)
    judgement, logs = None, {}
    if adversary:
        judgement, fooled, logs = adversary(eye, pixels, images, u, fool)
    if fool:
        (against,) = torch.autograd.grad(fooled, pixels)
        weight = adversary.weigh(painter.last.weight, (reconstruction, slope), (reconstruction, against))
        slope = slope + WEIGHTS["adversarial"] * weight * against
    rest = total({"rest": painter.code[rows].square().mean()}, WEIGHTS)
    backward(reconstruction, slope, [rest, judgement], share)
    return terms | logs


def gradients(module):
    found = [p.grad for p in module.parameters()]
    module.zero_grad()
    return found


def plain_loss(painter, data, adversary=None, eye=None, lpips=None):
    """The same sum written out, for the painter."""
    loss = (painter() - data[0]).square().mean() + 0.5 * painter.code.square().mean()
    if lpips:
        loss = loss + 2 * lpips(painter(), data[0]).mean()
    if adversary:
        loss = loss - 0.2 * adversary.weight * adversary.discriminator(eye(diff_augment(painter(), data[1][:, 0], False))).mean()
    return loss


def same(found, expected):
    torch.testing.assert_close(found, list(expected), atol=1e-6, rtol=1e-4)


def test_the_discriminators_gradient_reaches_the_decoder_with_the_weight_it_logs(eye):
    painter, adversary, data = Painter(), Adversary(384), draws()
    without = torch.autograd.grad(plain_loss(painter, data), list(painter.parameters()))
    learn(painter, data)
    same(gradients(painter), without)
    assert gradients(adversary) == [None] * len(list(adversary.parameters()))  # it has not begun
    learn(painter, data, adversary, eye)
    same(gradients(painter), without)  # it trains, and the decoder does not feel it
    for name, p in adversary.named_parameters():
        assert p.grad.abs().sum() > 1e-4 or "judge.bias" in name, name  # there the two sides cancel
    trains = gradients(adversary)
    adversary.weight.fill_(7.0)
    terms = learn(painter, data, adversary, eye, fool=True)
    felt = torch.autograd.grad(plain_loss(painter, data, adversary, eye), list(painter.parameters()))
    assert terms["adaptive_weight"] == 7 and all(not torch.allclose(a, b, rtol=0.01) for a, b in zip(felt, without))
    same(gradients(painter), felt)
    same(gradients(adversary), trains)  # what fools it does not teach it
    assert all(p.grad is None for p in eye.parameters())


def test_all_terms_together_have_the_gradient_of_their_sum_and_pieces_of_a_batch_add_up(eye, lpips):
    painter, adversary, data = Painter(), Adversary(384), draws()
    adversary.weight.fill_(3.0)
    expected = torch.autograd.grad(plain_loss(painter, data, adversary, eye, lpips), list(painter.parameters()))
    terms = learn(painter, data, adversary, eye, lpips, fool=True)
    same(gradients(painter), expected)
    assert terms["perceptual"] > 0 and torch.equal(terms["mse"], F.mse_loss(painter(), data[0]))
    for i in range(2):
        learn(painter, data, adversary, eye, lpips, True, slice(i, i + 1), share=0.5)
    same(gradients(painter), expected)


def test_the_discriminators_loss_and_its_gradient_by_hand(eye):
    torch.manual_seed(0)
    adversary, (images, u) = Adversary(384), draws()
    adversary.averages.copy_(torch.tensor([0.3, -0.2]))
    pixels = (torch.rand(2, 3, 16, 16) - 0.5).requires_grad_()
    loss, fooled, logs = adversary(eye, pixels, images, u, False)
    assert fooled.item() == 0 and not fooled.requires_grad
    *found, at_pixels = torch.autograd.grad(loss, [*adversary.parameters(), pixels], allow_unused=True)
    assert at_pixels is None
    seen = ((pixels, 0, False), (images, 1, False), (pixels, 2, True), (images, 3, True))
    views = (adversary.discriminator(eye(diff_augment(x.detach(), u[:, i], strong))) for x, i, strong in seen)
    fake, real, other_fake, other_real = views
    hinge = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    consistency = sum((a.mean(2) - b.mean(2)).square().mean() for a, b in ((fake, other_fake), (real, other_real)))
    lecam = (real + 0.2).clamp(min=0).square().mean() + (0.3 - fake).clamp(min=0).square().mean()
    expected = hinge + 4 * consistency + 0.001 * lecam
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(found, torch.autograd.grad(expected, list(adversary.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    by_hand = {
        "discriminator": hinge,
        "consistency": consistency,
        "lecam": lecam,
        "logit_real": real.mean(),
        "logit_fake": fake.mean(),
    }
    torch.testing.assert_close({name: logs[name] for name in by_hand}, by_hand)
    torch.testing.assert_close(adversary(eye, pixels, images, u, True)[1], -fake.mean())


def test_the_discriminator_learns_to_tell_two_sets_apart(eye):
    torch.manual_seed(0)
    adversary = Adversary(384)
    pixels, images = torch.zeros(4, 3, 32, 32), torch.rand(4, 3, 32, 32) - 0.5
    optimizer, hinges = torch.optim.Adam(adversary.parameters(), 1e-4), []
    for _ in range(40):
        loss, _, logs = adversary(eye, pixels, images, torch.rand(4, 4, DRAWS), False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hinges.append(logs["discriminator"].item())
    assert hinges[-1] < hinges[0] - 0.1 and logs["logit_real"] > logs["logit_fake"] + 0.2


def test_a_step_sets_the_adaptive_weight_and_the_moving_averages_for_the_next(eye):
    painter, adversary, data = Painter(), Adversary(384), draws()
    vector = adversary.discriminator.heads[0].reduce.u.clone()
    learn(painter, data, adversary, eye)
    adversary.end_step(lambda sums: sums)
    assert adversary.weight == 0 and not adversary.measured  # the decoder does not feel it yet
    assert not torch.equal(adversary.discriminator.heads[0].reduce.u, vector)  # the norms are refined
    adversary.averages.zero_()
    assert learn(painter, data, adversary, eye, fool=True)["adaptive_weight"] == 0
    fake, real = (
        adversary.discriminator(eye(diff_augment(x, data[1][:, i], False))).mean() for i, x in enumerate((painter(), data[0]))
    )
    (first,) = torch.autograd.grad((painter() - data[0]).square().mean(), painter.last.weight)
    (second,) = torch.autograd.grad(-fake, painter.last.weight)
    adversary.end_step(lambda sums: sums)
    weight = (first.norm() / second.norm()).clamp(max=100).item()
    assert adversary.weight.item() == pytest.approx(weight, rel=1e-3)
    assert adversary.averages.tolist() == pytest.approx([0.001 * real.item(), 0.001 * fake.item()], rel=1e-3)
    before = adversary.weight.clone()
    inf, nan = float("inf"), float("nan")
    for first, second in ((nan, 1.0), (inf, 1.0), (1.0, inf), (3e38, 1.0)):  # of steps that were skipped
        adversary.measured["logits"] += torch.full((2,), first)
        adversary.measured["others"] += torch.full((2,), first)
        adversary.measured["mine"] += torch.full((2,), second)
        adversary.end_step(lambda sums: sums)
        assert adversary.weight == before and adversary.averages.isfinite().all()


def test_what_a_step_measures_does_not_depend_on_its_pieces(eye):
    found = []
    for pieces in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        painter, data = Painter(), draws()
        torch.manual_seed(0)
        adversary = Adversary(384)
        for rows in pieces:
            learn(painter, data, adversary, eye, fool=True, rows=rows, share=1 / len(pieces))
        adversary.end_step(lambda sums, pieces=pieces: sums / len(pieces))
        found.append([adversary.weight, adversary.averages])
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=1e-3)
    assert 0 < found[0][0] < losses.MAX_ADAPTIVE_WEIGHT


def test_the_frozen_networks_are_in_no_checkpoint(eye):
    """DINO stays outside state_dict(), the optimizer and DDP, after use too; LPIPS is not handed in at all."""
    painter, adversary = Painter(), Adversary(384)
    learn(painter, draws(), adversary, eye, fool=True)
    keys = adversary.state_dict().keys()
    assert {"averages", "weight"} <= keys and all(key.startswith(("discriminator.heads.", "averages", "weight")) for key in keys)
    assert {module for module in adversary.modules() if isinstance(module, DINO | LPIPS)} == set()
    assert sum(value.numel() for value in adversary.state_dict().values()) < 1e6
