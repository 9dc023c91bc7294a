"""What a reconstruction is compared with, besides its pixels (paper eq. 7, section 4.1, B.1): modules and pure functions.

    LPIPS              distance in VGG16 features, official weights
    DinoDiscriminator  light trained heads on a frozen DINO ViT-S/16; hinge_loss, diff_augment, consistency_loss, LeCam
    adaptive_weight    balances the adversarial gradient against the reconstruction's
    PixelLosses        all of them together, in the proportions of a `Phase`

There is no schedule here: train.py decides when a term counts. Images are (B, 3, H, W) in [-1, 1].
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from align import ViT
from data import LPIPS_FILES, fill

CONSISTENCY_WEIGHT = 4.0  # of the discriminator's consistency loss (paper B.1)
LECAM_WEIGHT = 0.001  # (paper B.1)
MAX_ADAPTIVE_WEIGHT = 100.0  # (ours)


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity, VGG16, version 0.1 (Zhang et al. 2018). `load_lpips` gives it its weights.

    forward(images, targets) -> (B,), at least 0; the gradient flows to `images` only.
    """

    CONVS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # a max pool between the groups

    def __init__(self):
        super().__init__()
        layers, channels, self.taps = [], 3, []
        for group in self.CONVS:
            layers += [nn.MaxPool2d(2)] if layers else []
            for width in group:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            self.taps.append(len(layers) - 1)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
        self.vgg = nn.ModuleDict({"features": nn.Sequential(*layers)})  # named as in the official files
        kernels = [nn.Conv2d(group[-1], 1, 1, bias=False) for group in self.CONVS]
        self.linear = nn.ModuleDict(
            {f"lin{i}": nn.ModuleDict({"model": nn.Sequential(nn.Identity(), k)}) for i, k in enumerate(kernels)}
        )
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

    def layers(self, images: Tensor, targets: Tensor) -> Tensor:
        """-> (B, 5): the weighted squared distance per layer, averaged over positions."""
        with torch.no_grad():
            references = self.features(targets)
        terms = []
        for part, a, b in zip(self.linear.values(), self.features(images), references):
            weight = part["model"][1].weight[0].float()  # (C, 1, 1)
            terms.append((weight * (a - b).square()).sum(1).mean((1, 2)))
        return torch.stack(terms, dim=1)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        return self.layers(images, targets).sum(1)


def load_lpips(folder: str = "") -> LPIPS:
    """LPIPS with its two official files (data.fill says where from and what is raised), frozen."""
    lpips = LPIPS()
    for network, name in zip((lpips.vgg, lpips.linear), LPIPS_FILES):
        fill(network, name, folder)
    return lpips.eval()


class Head(nn.Module):
    """DINO's patch tokens of one level (B, N, D) on a rows x columns grid -> a logit per patch (B, N)."""

    def __init__(self, width: int, hidden: int = 128):
        super().__init__()
        self.reduce = spectral_norm(nn.Conv2d(width, hidden, 1))
        self.mix = spectral_norm(nn.Conv2d(hidden, hidden, 3, padding=1))
        self.judge = spectral_norm(nn.Conv2d(hidden, 1, 1))

    def forward(self, tokens: Tensor, rows: int) -> Tensor:
        x = F.layer_norm(tokens.float(), tokens.shape[-1:])  # the levels differ in scale
        x = x.transpose(1, 2).unflatten(2, (rows, -1))
        x = F.leaky_relu(self.reduce(x), 0.2)
        x = (x + F.leaky_relu(self.mix(x), 0.2)) / 2**0.5
        return self.judge(x).flatten(1)


class DinoDiscriminator(nn.Module):
    """Is it a photograph? Trained heads on features of a frozen DINO ViT-S/16 (section 4.1), as in StyleGAN-T.

    Unlike released discriminators of this kind: DINO's own erf GELU and key bias; four levels, none of the tokens before the
    first block; patch tokens only, the class token is not added to them; images at their own size, for which DINO resamples
    its positions, instead of resized or cropped to 224; small 2D heads that normalise each token instead of the batch, so
    that an image's logits do not depend on its batch.

    Only the heads are in state_dict() and parameters(). They stay in eval mode, in which spectral normalisation uses its
    stored singular vectors; `refine_norms` improves those, once per step however many forwards a step has.
    """

    BLOCKS = (2, 5, 8, 11)  # counted from 0

    def __init__(self, vit: ViT):
        super().__init__()
        self.frozen = [vit]  # in a list: not a submodule
        self.heads = nn.ModuleList(Head(vit.width) for _ in self.BLOCKS).eval()

    def features(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W), sides multiples of 16, values around [-1, 1] -> per level patch tokens (B, N, D)."""
        vit = self.frozen[0]
        return [tokens[:, 1:] for tokens in vit.levels(vit.normalise(images), self.BLOCKS)]

    def judge(self, features: list[Tensor], rows: int) -> Tensor:
        """-> logits (B, levels, N), float32; high means real."""
        with torch.autocast(features[0].device.type, enabled=False):
            return torch.stack([head(level, rows) for head, level in zip(self.heads, features)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.judge(self.features(images), images.shape[-2] // self.frozen[0].patch_size)

    @torch.no_grad()
    def refine_norms(self) -> None:
        """One power iteration per layer."""
        self.heads.train()
        for head in self.heads:
            _ = head.reduce.weight, head.mix.weight, head.judge.weight  # reading them in train mode iterates
        self.heads.eval()

    def train(self, mode: bool = True) -> "DinoDiscriminator":
        """Without effect: see above."""
        return self


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss on logits of any shape: (E max(0, 1 - real) + E max(0, 1 + fake)) / 2."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def consistency_loss(weak: Tensor, strong: Tensor) -> Tensor:
    """Mean squared difference between logits (B, levels, N) of two augmentations of the same images (Zhao et al. 2020, bCR).

    Averaged over N first (ours): translation and cutout move and remove patches, so that these have no counterparts.
    """
    return (weak.mean(2) - strong.mean(2)).square().mean()


class LeCam(nn.Module):
    """LeCam regularisation (Tseng et al. 2021): logits are pulled towards the moving average of the other side's.

    E max(0, real - ema_fake)^2 + E max(0, ema_real - fake)^2
    """

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("ema", torch.zeros(2))  # of the mean logits: real, fake

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        ema_real, ema_fake = self.ema.clone()
        return F.relu(real - ema_fake).square().mean() + F.relu(ema_real - fake).square().mean()

    @torch.no_grad()
    def update(self, means: Tensor) -> None:
        """ema = decay ema + (1 - decay) means, where means (2,) are the step's mean logits: real, fake."""
        self.ema.lerp_(means, 1 - self.decay)


DRAWS = 7  # uniform numbers that an augmentation of one image takes


def diff_augment(images: Tensor, u: Tensor, strong: bool) -> Tensor:
    """Differentiable augmentation (Zhao et al. 2020, DiffAugment), a function of u (B, DRAWS), uniform in [0, 1).

    weak: translation by up to an eighth of the side. strong: also brightness, saturation, contrast, and cutout of a square
    of half the side. What is uncovered or cut out becomes 0, the middle grey.
    """
    if strong:
        images = color(images, *u[:, :3].T.view(3, -1, 1, 1, 1))
    images = translate(images, u[:, 3], u[:, 4])
    return cutout(images, u[:, 5], u[:, 6]) if strong else images


def color(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Draws (B, 1, 1, 1) in [0, 1) -> shift by [-0.5, 0.5), saturation times [0, 2), contrast times [0.5, 1.5)."""
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    level = images.mean((1, 2, 3), keepdim=True)
    return (images - level) * (contrast + 0.5) + level


def translate(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Draws (B,) in [0, 1) -> each image moved by whole pixels, up to an eighth of its sides."""
    for dim, draw in ((2, down), (3, right)):
        side = images.shape[dim]
        most = side // 8
        shift = (draw * (2 * most + 1)).long() - most  # (B,)
        source = torch.arange(side, device=images.device) - shift[:, None]  # (B, side)
        inside = (source >= 0) & (source < side)
        shape = (-1, 1, side, 1) if dim == 2 else (-1, 1, 1, side)
        index = source.clamp(0, side - 1).view(shape).expand_as(images)
        images = images.gather(dim, index) * inside.view(shape)
    return images


def cutout(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Draws (B,) in [0, 1) for the centre -> a square of half the side becomes 0."""

    def near(draw: Tensor, side: int) -> Tensor:
        position = torch.arange(side, device=images.device)
        first = (draw * (side + 1)).long()[:, None] - side // 4
        return (position >= first) & (position < first + side // 2)  # (B, side)

    hidden = near(row, images.shape[2])[:, :, None] & near(column, images.shape[3])[:, None, :]
    return images * ~hidden[:, None]


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, most: float) -> Tensor:
    """|gradient of the reconstruction loss| / |gradient of the adversarial loss|, at most `most` (Esser et al. 2021, eq. 7).

    Both are gradients of the decoder's last layer, of the same shape.
    """
    return (reconstruction.norm() / (adversarial.norm() + 1e-6)).clamp(max=most)


class Phase(NamedTuple):
    """Which terms count at a step."""

    perceptual: float  # weight of LPIPS
    discriminate: bool  # whether the discriminator trains
    adversarial: float  # weight of its gradient, before the adaptive one


class Adversary(nn.Module):
    """The discriminator with its regularisers, and the adaptive weight of its gradient (section 4.1, B.1).

    What a step measures over its whole global batch (mean logits, gradients of the decoder's last layer) takes effect in the
    next one (ours): so neither accumulation nor the process count changes anything.
    """

    def __init__(self, vit: ViT):
        super().__init__()
        self.discriminator = DinoDiscriminator(vit)
        self.lecam = LeCam()
        self.register_buffer("weight", torch.zeros(()))
        self.measured: dict[str, Tensor] = {}
        self.requires_grad_(False)  # until it joins

    def forward(self, pixels: Tensor, images: Tensor, u: Tensor, generate: bool) -> tuple[Tensor, Tensor | None, dict]:
        """pixels, images (b, 3, S, S), u (b, 4, DRAWS) -> the discriminator's loss, the decoder's (if `generate`), logs."""
        rows = images.shape[-2] // self.discriminator.frozen[0].patch_size
        with torch.set_grad_enabled(generate):
            features = self.discriminator.features(diff_augment(pixels, u[:, 0], strong=False))
        with torch.no_grad():
            views = [diff_augment(images, u[:, 1], strong=False)]
            views += [diff_augment(x, u[:, i], strong=True) for i, x in ((2, pixels), (3, images))]
            others = self.discriminator.features(torch.cat(views))
        fake = self.discriminator.judge([level.detach() for level in features], rows)
        real, fake_strong, real_strong = self.discriminator.judge(others, rows).chunk(3)
        hinge = hinge_loss(real, fake)
        consistency = consistency_loss(real, real_strong) + consistency_loss(fake, fake_strong)
        lecam = self.lecam(real, fake)
        logs = {"discriminator": hinge, "consistency": consistency, "lecam": lecam, "adaptive_weight": self.weight}
        logs |= {"logit_real": real.mean(), "logit_fake": fake.mean()}
        self.measure("logits", torch.stack([real.detach().mean(), fake.detach().mean()]))
        loss = hinge + CONSISTENCY_WEIGHT * consistency + LECAM_WEIGHT * lecam
        return loss, -self.discriminator.judge(features, rows).mean() if generate else None, logs

    def measure(self, name: str, value: Tensor) -> None:
        self.measured[name] = self.measured.get(name, 0) + value

    @torch.no_grad()
    def finish_step(self, average: Callable[[Tensor], Tensor]) -> None:
        """Take in what was measured, unless it is not finite; `average` turns this process's sums into means over the batch."""
        mean = {name: average(value) for name, value in self.measured.items()}
        self.measured = {}
        self.lecam.update(torch.where(mean["logits"].isfinite(), mean["logits"], self.lecam.ema))
        if "adversarial" in mean:
            pair = mean["reconstruction"], mean["adversarial"]
            finite = pair[0].norm().isfinite() & pair[1].norm().isfinite()
            self.weight.copy_(torch.where(finite, adaptive_weight(*pair, MAX_ADAPTIVE_WEIGHT), self.weight))
        self.discriminator.refine_norms()


class PixelLosses(nn.Module):
    """The terms of eq. 7 that compare pixels: MSE, LPIPS and the adversarial one; and the discriminator's own loss."""

    def __init__(self, lpips: LPIPS | None = None, vit: ViT | None = None):
        super().__init__()
        self.frozen = [lpips]  # in a list: not a submodule, so in no checkpoint
        self.adversary = None if vit is None else Adversary(vit)

    def forward(self, reconstruction: Tensor, images: Tensor, last_layer: nn.Parameter, phase: Phase, u: Tensor | None):
        """reconstruction, images (b, 3, S, S), u (b, 4, DRAWS) -> loss, logs.

        The gradient of each loss is taken at the pixels, so that every network is passed once; from there on the two are
        added. The returned loss has the value of the decoder's terms, and also the gradient of the discriminator's loss.
        """
        pixels = reconstruction.detach().requires_grad_()
        mse = F.mse_loss(pixels, images)
        logs, value = {"mse": mse}, mse
        if phase.perceptual:
            logs["lpips"] = self.frozen[0](pixels, images).mean()
            value = value + phase.perceptual * logs["lpips"]
        (gradient,) = torch.autograd.grad(value, pixels)
        if not phase.discriminate:
            return with_gradient(value, (reconstruction * gradient).sum()), logs
        judgement, adversarial, more = self.adversary(pixels, images, u, phase.adversarial > 0)
        logs |= more
        if adversarial is not None:
            (against,) = torch.autograd.grad(adversarial, pixels)
            for name, at_pixels in (("reconstruction", gradient), ("adversarial", against)):
                (at_layer,) = torch.autograd.grad(reconstruction, last_layer, at_pixels, retain_graph=True)
                self.adversary.measure(name, at_layer)
            weight = phase.adversarial * self.adversary.weight
            logs["adversarial"] = adversarial
            value, gradient = value + weight * adversarial, gradient + weight * against
        return with_gradient(value, (reconstruction * gradient).sum() + judgement), logs


def with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """The value of one scalar with the gradient of another."""
    return surrogate + (value - surrogate).detach()
