"""What a reconstruction is compared with, besides its pixels (paper eq. 7, section 4.1, B.1): modules and pure functions.

    LPIPS            distance in VGG16 features, official weights
    Discriminator    light trained heads on a frozen network's features; hinge_loss, diff_augment, consistency_loss, LeCam
    Balance          the adaptive weight of a loss
    Adversary        the discriminator with its regularisers and its adaptive weight

There is no schedule here: train.py decides when a term counts. Images are (B, 3, H, W) in [-1, 1]. Frozen networks are handed
in as arguments: `eye(images)` gives a list of feature maps (B, D, h, w).

    python -c "import torch, losses; x = torch.zeros(2, 3, 64, 64); print(losses.LPIPS()(x, x))"
"""

from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONSISTENCY_WEIGHT = 4.0  # of the discriminator's consistency loss (paper B.1)
LECAM_WEIGHT = 0.001  # (paper B.1)
LECAM_DECAY = 0.999  # of its moving averages (config: SoftVQ-VAE)
MAX_ADAPTIVE_WEIGHT = 100.0  # (ours)
DRAWS = 7  # uniform numbers that an augmentation of one image takes


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity, VGG16, version 0.1 (Zhang et al. 2018), without weights as it is made.

    `vgg` and `linear` have the names of the official files. forward(images, targets) -> (B,), at least 0; the gradient flows
    to `images` only.
    """

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):  # 0: a max pool
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)] if width else [nn.MaxPool2d(2)]
            channels = width or channels
        self.vgg = nn.ModuleDict({"features": nn.Sequential(*layers)})
        self.taps = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3: their widths
        parts = [nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False)) for width in self.taps.values()]
        self.linear = nn.ModuleDict({f"lin{i}": nn.ModuleDict({"model": part}) for i, part in enumerate(parts)})
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)

    def features(self, images: Tensor) -> list[Tensor]:
        """-> five maps (B, C, h, w) of unit vectors, float32."""
        x, found = (images - self.shift) / self.scale, []
        for i, layer in enumerate(self.vgg["features"]):
            x = layer(x)
            if i in self.taps:
                found.append(x.float() / (x.float().norm(dim=1, keepdim=True) + 1e-10))
        return found

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            references = self.features(targets)
        distance = 0  # weighted and squared, summed over the layers, averaged over positions
        for part, a, b in zip(self.linear.values(), self.features(images), references):
            weight = part["model"][1].weight[0].float()  # (C, 1, 1)
            distance = distance + (weight * (a - b).square()).sum(1).mean((1, 2))
        return distance


class NormedConv(nn.Conv2d):
    """A convolution of the same size whose kernel W is divided by its largest singular value |W^T u| (Miyato et al. 2018)."""

    def __init__(self, channels: int, out: int, kernel: int):
        super().__init__(channels, out, kernel, padding=kernel // 2)
        self.register_buffer("u", torch.randn(out))
        for _ in range(15):
            self.refine()

    @torch.no_grad()
    def refine(self) -> None:
        """One power iteration: u moves towards the first singular vector of the kernel."""
        matrix = self.weight.flatten(1)
        self.u.copy_(F.normalize(matrix @ F.normalize(matrix.T @ self.u, dim=0), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        largest = (self.u @ self.weight.flatten(1)).norm()
        return F.conv2d(x, self.weight / largest, self.bias, padding=self.padding)


class Head(nn.Module):
    """Features of one level (B, D, h, w) -> a logit per place (B, h w)."""

    def __init__(self, width: int, hidden: int = 128):
        super().__init__()
        self.reduce = NormedConv(width, hidden, 1)
        self.mix = NormedConv(hidden, hidden, 3)
        self.judge = NormedConv(hidden, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.float().movedim(1, -1), x.shape[1:2]).movedim(-1, 1)  # the levels differ in scale
        x = F.leaky_relu(self.reduce(x), 0.2)
        x = (x + F.leaky_relu(self.mix(x), 0.2)) / 2**0.5
        return self.judge(x).flatten(1)


class Discriminator(nn.Module):
    """Is it a photograph? Trained heads on features of a frozen DINO ViT-S/16 (section 4.1), as in StyleGAN-T.

    Unlike released discriminators of this kind: DINO's own erf GELU and key bias; four levels, none of the tokens before the
    first block; patch tokens only, the class token is not added to them; images at their own size, for which DINO resamples
    its positions, instead of resized or cropped to 224; small 2D heads that normalise each token instead of the batch, so
    that an image's logits do not depend on its batch.
    """

    def __init__(self, width: int, levels: int = 4):
        super().__init__()
        self.heads = nn.ModuleList(Head(width) for _ in range(levels))

    def forward(self, features: list[Tensor]) -> Tensor:
        """features per level (B, D, h, w) -> logits (B, levels, h w), float32; high means real."""
        with torch.autocast(features[0].device.type, enabled=False):
            return torch.stack([head(level) for head, level in zip(self.heads, features)], dim=1)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss on logits of any shape: (E max(0, 1 - real) + E max(0, 1 + fake)) / 2 (config)."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def consistency_loss(weak: Tensor, strong: Tensor) -> Tensor:
    """Mean squared difference between logits (B, levels, N) of two augmentations of the same images (Zhao et al. 2020, bCR).

    Averaged over N first (ours): translation and cutout move and remove patches, so that these have no counterparts.
    """
    return (weak.mean(2) - strong.mean(2)).square().mean()


def lecam_loss(real: Tensor, fake: Tensor, averages: Tensor) -> Tensor:
    """LeCam regularisation (Tseng et al. 2021): logits are pulled towards the moving average of the other side's.

    E max(0, real - ema_fake)^2 + E max(0, ema_real - fake)^2, with averages (2,) = ema_real, ema_fake of the mean logits.
    """
    return F.relu(real - averages[1]).square().mean() + F.relu(averages[0] - fake).square().mean()


def diff_augment(images: Tensor, u: Tensor, strong: bool) -> Tensor:
    """Differentiable augmentation (Zhao et al. 2020, DiffAugment), a function of u (B, DRAWS), uniform in [0, 1).

    weak: translation by up to an eighth of the side. strong: also brightness, saturation, contrast, and cutout of a square
    of half the side. What is uncovered or cut out becomes 0, the middle grey.
    """
    if strong:
        brightness, saturation, contrast = u[:, :3].T.view(3, -1, 1, 1, 1)
        images = images + (brightness - 0.5)
        grey = images.mean(1, keepdim=True)
        images = (images - grey) * (2 * saturation) + grey
        level = images.mean((1, 2, 3), keepdim=True)
        images = (images - level) * (contrast + 0.5) + level
    images = translate(images, u[:, 3], u[:, 4])
    return cutout(images, u[:, 5], u[:, 6]) if strong else images


def translate(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Draws (B,) in [0, 1) -> each image moved by whole pixels, up to an eighth of its sides."""
    for dim, draw in ((2, down), (3, right)):
        side = images.shape[dim]
        most = side // 8
        first = 2 * most - (draw * (2 * most + 1)).long()[:, None]  # (B, 1), of the padded rows or columns
        index = (first + torch.arange(side, device=images.device)).view((-1, 1, side, 1) if dim == 2 else (-1, 1, 1, side))
        padded = F.pad(images, (0, 0, most, most) if dim == 2 else (most, most))
        images = padded.gather(dim, index.expand_as(images))
    return images


def cutout(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Draws (B,) in [0, 1) for the centre -> a square of half the side becomes 0."""

    def near(draw: Tensor, side: int) -> Tensor:
        position = torch.arange(side, device=images.device)
        first = (draw * (side + 1)).long()[:, None] - side // 4
        return (position >= first) & (position < first + side // 2)  # (B, side)

    hidden = near(row, images.shape[2])[:, :, None] & near(column, images.shape[3])[:, None, :]
    return images * ~hidden[:, None]


class Balance(nn.Module):
    """The adaptive weight of a loss: with it, its gradient has the norm of the other losses' at a layer (Esser et al. 2021, eq. 7).

    The layer is the decoder's last one, for AlignTok's preservation the encoder's (its section A). What a step measures over its
    whole global batch takes effect in the next one (ours): so neither accumulation nor the process count changes anything.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.zeros(()))
        self.measured = defaultdict(int)  # sums over this process's pieces of a batch

    def weigh(self, layer: Tensor, others: tuple, mine: tuple) -> Tensor:
        """The weight of this step. Of (what is differentiated, its gradient), both gradients at the layer are measured."""
        for name, (output, gradient) in (("others", others), ("mine", mine)):
            self.measured[name] += torch.autograd.grad(output, layer, gradient, retain_graph=True)[0]
        return self.weight

    @torch.no_grad()
    def end_step(self, average: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Take in what was measured, if it is finite and not 0; `average` turns this process's sums into means over the batch."""
        mean = {name: average(value) for name, value in self.measured.items()}
        self.measured.clear()
        if "mine" in mean:
            others, mine = mean["others"].norm(), mean["mine"].norm()
            weight = (others / (mine + 1e-6)).clamp(max=MAX_ADAPTIVE_WEIGHT)
            self.weight.copy_(torch.where((others + mine).isfinite() & (mine > 0), weight, self.weight))
        return mean


class Adversary(Balance):
    """The discriminator with its regularisers, and the adaptive weight of its gradient (section 4.1, B.1)."""

    def __init__(self, width: int):
        super().__init__()
        self.discriminator = Discriminator(width)
        self.register_buffer("averages", torch.zeros(2))  # LeCam's, of the mean logits: real, fake

    def forward(self, eye: Callable, fakes: Tensor, images: Tensor, u: Tensor, fool: bool) -> tuple[Tensor, Tensor, dict]:
        """fakes, images (b, 3, S, S), u (b, 4, DRAWS) -> the discriminator's loss, the decoder's (0 without `fool`), logs.

        The gradient of the decoder's loss is for `fakes` only; discriminator and decoder learn from the same fakes (ours).
        """
        with torch.set_grad_enabled(fool):
            seen = eye(diff_augment(fakes, u[:, 0], strong=False))
        with torch.no_grad():
            views = [diff_augment(images, u[:, 1], strong=False)]
            views += [diff_augment(x, u[:, i], strong=True) for i, x in ((2, fakes), (3, images))]
            others = eye(torch.cat(views))
        fake = self.discriminator([level.detach() for level in seen])
        real, fake_strong, real_strong = self.discriminator(others).chunk(3)
        hinge = hinge_loss(real, fake)
        consistency = consistency_loss(real, real_strong) + consistency_loss(fake, fake_strong)
        lecam = lecam_loss(real, fake, self.averages)
        logs = {"discriminator": hinge, "consistency": consistency, "lecam": lecam, "adaptive_weight": self.weight}
        logs |= {"logit_real": real.mean(), "logit_fake": fake.mean()}
        self.measured["logits"] += torch.stack([real.mean(), fake.mean()]).detach()
        loss = hinge + CONSISTENCY_WEIGHT * consistency + LECAM_WEIGHT * lecam
        fooled = -self.discriminator(seen).mean() if fool else torch.zeros(())
        return loss, fooled, logs | ({"adversarial": fooled} if fool else {})

    @torch.no_grad()
    def end_step(self, average: Callable[[Tensor], Tensor]) -> None:
        """As a `Balance`, and LeCam's averages with it; nothing if the discriminator was not asked."""
        logits = super().end_step(average).get("logits")
        if logits is None:
            return
        self.averages.lerp_(torch.where(logits.isfinite(), logits, self.averages), 1 - LECAM_DECAY)
        for head in self.discriminator.heads:
            for layer in head.children():
                layer.refine()
