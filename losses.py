"""The losses on reconstructions other than MSE (MacTok eq. 7, section 4.1, B.1).

    LPIPS            distance between VGG16 features, official weights
    Discriminator    small trained heads on features of a frozen DINO
    GANLoss          the discriminator with its regularizers: DiffAugment, consistency, LeCam
    AdaptiveWeight   VQGAN's ratio of gradient norms
    pull_back        continues the gradient of a loss on a detached reconstruction

Nothing here knows about training steps: train.py decides when a loss counts. Images are (B, 3, H,
W) in [-1, 1]. Frozen networks are passed as arguments: `backbone(images)` returns a list of feature
maps (B, D, h, w). `python losses.py` computes LPIPS with random weights.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONSISTENCY_WEIGHT = 4.0  # of the discriminator's consistency loss (paper B.1)
LECAM_WEIGHT = 0.001  # (paper B.1)
LECAM_DECAY = 0.999  # of its moving averages (config: SoftVQ-VAE)
MAX_ADAPTIVE_WEIGHT = 100.0  # (ours)
NUM_AUG_PARAMS = 7  # how many uniform random numbers one augmentation of one image takes


# --------------------------------------------------------------------------------------------------
# Perceptual loss.


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity, VGG16, version 0.1 (Zhang et al. 2018).

    A new instance has random weights; `vgg` and `linear` have the key names of the official files.
    forward(images, targets) -> distances (B,), at least 0. Only `images` receive a gradient.
    """

    # Output channels of VGG16's convolutions up to relu5_3; 0 stands for a max pool.
    VGG_LAYERS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
    # Index among VGG16's layers -> channels, of relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3.
    LAYER_IDS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}

    def __init__(self):
        super().__init__()
        layers = []
        in_channels = 3
        for channels in self.VGG_LAYERS:
            if channels == 0:
                layers.append(nn.MaxPool2d(2))
            else:
                layers.append(nn.Conv2d(in_channels, channels, 3, padding=1))
                layers.append(nn.ReLU(inplace=True))
                in_channels = channels
        self.vgg = nn.ModuleDict({"features": nn.Sequential(*layers)})
        self.linear = nn.ModuleDict()
        for i, channels in enumerate(self.LAYER_IDS.values()):  # lin0.model.1.weight, ...
            lin = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))
            self.linear[f"lin{i}"] = nn.ModuleDict({"model": lin})
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def features(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) -> five maps (B, C, h, w) of unit vectors, float32."""
        x = (images - self.shift) / self.scale
        feats = []
        for i, layer in enumerate(self.vgg["features"]):
            x = layer(x)
            if i in self.LAYER_IDS:
                feat = x.float()
                feats.append(feat / (feat.norm(dim=1, keepdim=True) + 1e-10))
        return feats

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            target_feats = self.features(targets)
        feats = self.features(images)
        distance = 0
        for lin, a, b in zip(self.linear.values(), feats, target_feats):
            weight = lin["model"][1].weight[0].float()  # (C, 1, 1)
            distance = distance + (weight * (a - b).square()).sum(dim=1).mean(dim=(1, 2))
        return distance


# --------------------------------------------------------------------------------------------------
# Discriminator.


class SpectralNormConv2d(nn.Conv2d):
    """A convolution whose kernel is divided by its largest singular value (Miyato et al. 2018).

    torch's spectral_norm refines its estimate in every forward pass. Here the estimate moves only
    when `power_iteration` is called, so that two forward passes of one step use the same kernel.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.register_buffer("u", torch.randn(out_channels))  # the first left singular vector
        for _ in range(15):
            self.power_iteration()

    @torch.no_grad()
    def power_iteration(self) -> None:
        """Move u towards the first singular vector of the kernel, seen as (out, in * k * k)."""
        matrix = self.weight.flatten(1)
        v = F.normalize(matrix.T @ self.u, dim=0)
        self.u.copy_(F.normalize(matrix @ v, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        sigma = (self.u @ self.weight.flatten(1)).norm()
        return F.conv2d(x, self.weight / sigma, self.bias, padding=self.padding)


class DiscHead(nn.Module):
    """Features of one layer (B, D, h, w) -> one logit per position (B, h w)."""

    def __init__(self, width: int, hidden_dim: int = 128):
        super().__init__()
        self.conv_in = SpectralNormConv2d(width, hidden_dim, 1)
        self.conv_mid = SpectralNormConv2d(hidden_dim, hidden_dim, 3)
        self.conv_out = SpectralNormConv2d(hidden_dim, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        # The layers of DINO differ in scale, so each token is normalized over its channels.
        x = F.layer_norm(x.float().movedim(1, -1), x.shape[1:2]).movedim(-1, 1)
        x = F.leaky_relu(self.conv_in(x), 0.2)
        x = (x + F.leaky_relu(self.conv_mid(x), 0.2)) / 2**0.5
        return self.conv_out(x).flatten(1)


class Discriminator(nn.Module):
    """Tells images from reconstructions by features of a frozen DINO ViT-S/16 (section 4.1).

    It follows StyleGAN-T's projected discriminator. Unlike released discriminators of this kind, it
    keeps DINO's own GELU and key bias, reads patch tokens of four layers only, sees images at their
    own size, for which DINO's positions are resampled, and normalizes tokens, not batches, so that
    the logits of an image do not depend on the other images of its batch.
    """

    def __init__(self, width: int, num_layers: int = 4):
        super().__init__()
        self.heads = nn.ModuleList(DiscHead(width) for _ in range(num_layers))

    def forward(self, feats: list[Tensor]) -> Tensor:
        """Features per layer (B, D, h, w) -> logits (B, num_layers, h w), float32. High is real."""
        with torch.autocast(feats[0].device.type, enabled=False):
            return torch.stack([head(feat) for head, feat in zip(self.heads, feats)], dim=1)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss (config): (E max(0, 1 - real) + E max(0, 1 + fake)) / 2."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def consistency_loss(weak: Tensor, strong: Tensor) -> Tensor:
    """Squared difference between the logits of two augmentations of the same images.

    This is balanced consistency regularization (Zhao et al. 2020). Logits are (B, num_layers, N).
    They are averaged over the N positions first (ours), because translation and cutout move and
    remove patches, which then have no counterpart.
    """
    return (weak.mean(dim=2) - strong.mean(dim=2)).square().mean()


def lecam_loss(real: Tensor, fake: Tensor, ema_logits: Tensor) -> Tensor:
    """LeCam regularization (Tseng et al. 2021).

    It penalizes real logits above the average fake logit, and fake logits below the average real
    one: E max(0, real - ema_fake)^2 + E max(0, ema_real - fake)^2; ema_logits (2,) = ema_real,
    ema_fake.
    """
    ema_real, ema_fake = ema_logits
    return F.relu(real - ema_fake).square().mean() + F.relu(ema_real - fake).square().mean()


# --------------------------------------------------------------------------------------------------
# DiffAugment (Zhao et al. 2020), as a function of its random numbers.


def diff_augment(images: Tensor, rand: Tensor, strong: bool) -> Tensor:
    """Differentiable augmentation by rand (B, NUM_AUG_PARAMS), uniform in [0, 1).

    The weak form translates images by up to an eighth of their side. The strong form also changes
    brightness, saturation and contrast, and cuts out a square of half the side. Pixels that are
    uncovered or cut out become 0, a middle gray.
    """
    if strong:
        images = jitter_color(images, rand[:, 0], rand[:, 1], rand[:, 2])
    images = translate(images, rand[:, 3], rand[:, 4])
    if strong:
        images = cutout(images, rand[:, 5], rand[:, 6])
    return images


def jitter_color(
    images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor
) -> Tensor:
    """Each of the three is (B,), uniform in [0, 1); 0.5 leaves an image as it is.

    Brightness is shifted by up to 0.5, saturation scaled by 0 to 2, and contrast by 0.5 to 1.5.
    """
    brightness, saturation, contrast = (
        x.view(-1, 1, 1, 1) for x in (brightness, saturation, contrast)
    )
    images = images + (brightness - 0.5)
    gray = images.mean(dim=1, keepdim=True)
    images = (images - gray) * (2 * saturation) + gray
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def translate(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Shift images by up to an eighth of their sides; down, right (B,), uniform in [0, 1)."""
    _, _, height, width = images.shape
    max_down, max_right = height // 8, width // 8
    rows = shifted_coords(down, height, max_down)[:, None, :, None]
    columns = shifted_coords(right, width, max_right)[:, None, None, :]
    images = F.pad(images, (max_right, max_right, max_down, max_down))
    images = images.gather(2, rows.expand(-1, 3, -1, images.shape[3]))
    return images.gather(3, columns.expand(-1, 3, height, -1))


def shifted_coords(rand: Tensor, size: int, max_shift: int) -> Tensor:
    """rand (B,) -> (B, size): where the pixels of each shifted side lie in the padded one."""
    start = 2 * max_shift - (rand * (2 * max_shift + 1)).long()
    return start[:, None] + torch.arange(size, device=rand.device)


def cutout(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Set a square of half the side to 0, around a center given by row, column (B,), uniform."""
    height, width = images.shape[2:]
    box = in_box(row, height)[:, None, :, None] & in_box(column, width)[:, None, None, :]
    return images * ~box


def in_box(rand: Tensor, size: int) -> Tensor:
    """rand (B,) -> bool (B, size): which pixels of a side lie in the box that is cut out."""
    coords = torch.arange(size, device=rand.device)
    start = (rand * (size + 1)).long()[:, None] - size // 4
    return (coords >= start) & (coords < start + size // 2)


# --------------------------------------------------------------------------------------------------
# The adversarial loss, and how it is weighed against the others.


class GANLoss(nn.Module):
    """The discriminator with its regularizers and its adaptive weight (section 4.1, B.1)."""

    def __init__(self, width: int):
        super().__init__()
        self.discriminator = Discriminator(width)
        self.adaptive_weight = AdaptiveWeight()
        self.register_buffer("ema_logits", torch.zeros(2))  # LeCam's averages: real, fake
        self.logit_sums = None  # over this process's micro batches of the step

    def forward(
        self, backbone: Callable, fake: Tensor, real: Tensor, rand: Tensor, with_g_loss: bool
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """-> the discriminator's loss, the decoder's loss, and scalars for the log.

        fake, real   reconstructions and images (B, 3, H, W)
        rand         (B, 4, NUM_AUG_PARAMS), uniform
        with_g_loss  if False, the decoder's loss is 0 and costs nothing

        The discriminator's loss updates only the discriminator. The discriminator and
        the decoder see the same reconstructions (ours).
        """
        with torch.set_grad_enabled(with_g_loss):
            fake_feats = backbone(diff_augment(fake, rand[:, 0], strong=False))
        with torch.no_grad():
            real_weak = diff_augment(real, rand[:, 1], strong=False)
            fake_strong = diff_augment(fake, rand[:, 2], strong=True)
            real_strong = diff_augment(real, rand[:, 3], strong=True)
            other_feats = backbone(torch.cat([real_weak, fake_strong, real_strong]))

        # The discriminator's loss.
        fake_logits = self.discriminator([feat.detach() for feat in fake_feats])
        real_logits, fake_strong_logits, real_strong_logits = self.discriminator(other_feats).chunk(
            3
        )
        hinge = hinge_loss(real_logits, fake_logits)
        consistency = consistency_loss(real_logits, real_strong_logits)
        consistency = consistency + consistency_loss(fake_logits, fake_strong_logits)
        lecam = lecam_loss(real_logits, fake_logits, self.ema_logits)
        d_loss = hinge + CONSISTENCY_WEIGHT * consistency + LECAM_WEIGHT * lecam

        # The decoder's loss.
        g_loss = torch.zeros((), device=fake.device)
        if with_g_loss:
            g_loss = -self.discriminator(fake_feats).mean()

        mean_logits = torch.stack([real_logits.mean(), fake_logits.mean()]).detach()
        self.logit_sums = mean_logits if self.logit_sums is None else self.logit_sums + mean_logits
        logs = {"discriminator": hinge, "consistency": consistency, "lecam": lecam}
        logs |= {"logit_real": mean_logits[0], "logit_fake": mean_logits[1]}
        if with_g_loss:
            logs |= {"adversarial": g_loss, "adaptive_weight": self.adaptive_weight.value}
        return d_loss, g_loss, logs

    @torch.no_grad()
    def update(self, batch_mean: Callable[[Tensor], Tensor]) -> None:
        """End a step in which the discriminator was trained.

        This moves LeCam's averages, the spectral norms and the adaptive weight. batch_mean turns a
        sum over this process's micro batches into the mean over the whole batch.
        """
        logits = batch_mean(self.logit_sums)
        self.logit_sums = None
        logits = torch.where(logits.isfinite(), logits, self.ema_logits)
        self.ema_logits.lerp_(logits, 1 - LECAM_DECAY)
        for module in self.discriminator.modules():
            if isinstance(module, SpectralNormConv2d):
                module.power_iteration()
        self.adaptive_weight.update(batch_mean)


class AdaptiveWeight(nn.Module):
    """VQGAN's adaptive weight, |d rec_loss / d layer| / |d other_loss / d layer| (its eq. 7).

    With this weight the other loss has the same gradient norm at `layer` as the reconstruction
    losses. VQGAN takes both gradients from the batch of one GPU. Here they are summed over the
    whole batch, and the ratio takes effect in the next step, so that neither gradient accumulation
    nor the number of GPUs changes it (ours).
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("value", torch.zeros(()))  # so the first step has no such gradient
        self.grad_sums = None  # of the two losses, over this process's micro batches of the step

    def observe(self, rec_loss: Tensor, other_loss: Tensor, layer: Tensor) -> None:
        """Measure both gradients at `layer`, a weight (out, in), on one micro batch."""
        grads = [
            torch.autograd.grad(loss, layer, retain_graph=True)[0]
            for loss in (rec_loss, other_loss)
        ]
        grads = torch.stack(grads)
        self.grad_sums = grads if self.grad_sums is None else self.grad_sums + grads

    @torch.no_grad()
    def update(self, batch_mean: Callable[[Tensor], Tensor]) -> None:
        """End a step: set the weight for the next one.

        It stays as it is if a gradient is not finite, or if that of the other loss is zero.
        """
        if self.grad_sums is None:  # nothing was observed
            return
        rec_grad, other_grad = batch_mean(self.grad_sums)
        self.grad_sums = None
        rec_norm, other_norm = rec_grad.norm(), other_grad.norm()
        ratio = (rec_norm / (other_norm + 1e-6)).clamp(max=MAX_ADAPTIVE_WEIGHT)
        usable = (rec_norm + other_norm).isfinite() & (other_norm > 0)
        self.value.copy_(torch.where(usable, ratio, self.value))


def pull_back(recon: Tensor, recon_leaf: Tensor, loss: Tensor) -> Tensor:
    """Continue the gradient of a loss on a detached copy of the reconstruction.

    recon (B, 3, H, W), recon_leaf its detached copy, loss a scalar function of that. Returns
    sum(recon * g) with the constant g = d loss / d recon_leaf. By the chain rule, its gradient for
    all that produced recon is that of loss; its value has no meaning. So several losses can be
    weighed at the decoder's last layer, while LPIPS, DINO and the discriminator are differentiated
    once.
    """
    (grad,) = torch.autograd.grad(loss, recon_leaf)
    return (recon * grad).sum()


if __name__ == "__main__":
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    noisy = images + 0.1 * torch.randn_like(images)
    print("LPIPS with random weights:", LPIPS()(noisy, images).tolist())
