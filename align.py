"""Frozen teachers, and heads that compare the latents with what they see (paper section 3.3, eq. 3-6).

    targets = teacher(images)           cls (B, D), patches (B, N, D)   no gradient
    losses = head(z, targets, mask)     {term: loss}: a head is a trained module with this call

Two teachers: `DINOv2` (official weights) and `HOG` (no weights: gradients and colours, for offline use). This is the only file
that turns [-1, 1] images into a teacher's input. `DINO` is no teacher, but what the discriminator of losses.py looks through.

    python -c "import torch as t, align as a; print(a.Alignment(16, 64, 11)(t.zeros(2, 4, 16), a.HOG(8)(t.zeros(2, 3, 32, 32))))"
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer import IMAGENET_MEAN, IMAGENET_STD, Block, Mlp, PatchEmbed


def check_range(images: Tensor) -> None:
    """Asserts that images lie in [-1, 1] (without waiting for a GPU): uint8 and [0, 255] floats end here."""
    torch._assert_async((images.detach().abs().amax() <= 1.001), "teacher: images must lie in [-1, 1]")


# name: width, depth, heads, patch size, side of the patch grid it was trained with, registers
VITS = {
    "dinov2_vits14": (384, 12, 6, 14, 37, 0),
    "dinov2_vitb14": (768, 12, 12, 14, 37, 0),
    "dinov2_vitl14": (1024, 24, 16, 14, 37, 0),
    "dinov2_vits14_reg": (384, 12, 6, 14, 37, 4),
    "dinov2_vitb14_reg": (768, 12, 12, 14, 37, 4),
    "dinov2_vitl14_reg": (1024, 24, 16, 14, 37, 4),
    "dino_vits16": (384, 12, 6, 16, 14, 0),
}


class ViT(nn.Module):
    """The backbone of DINOv2 or DINO, with the parameter names and shapes of the official files."""

    def __init__(self, name: str):
        super().__init__()
        self.width, depth, heads, self.patch_size, self.trained_grid, self.registers = VITS[name]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.trained_grid**2, self.width))
        self.register_tokens = nn.Parameter(torch.zeros(1, self.registers, self.width)) if self.registers else None
        is_dinov2 = name.startswith("dinov2")
        self.mask_token = nn.Parameter(torch.zeros(1, self.width)) if is_dinov2 else None  # in the file, not used here
        self.patch_embed = PatchEmbed(self.patch_size, self.width)
        self.blocks = nn.ModuleList(Block(self.width, heads, layer_scale=is_dinov2) for _ in range(depth))
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> zero mean and unit variance per channel over ImageNet."""
        return (images / 2 + 0.5 - self.mean) / self.std

    def positions(self, rows: int, columns: int) -> Tensor:
        """The position embedding for a rows x columns grid, (1, 1 + rows * columns, D), as the official code resamples it."""
        grid = self.trained_grid
        if (rows, columns) == (grid, grid):
            return self.pos_embed
        image = self.pos_embed[:, 1:].view(1, grid, grid, -1).permute(0, 3, 1, 2)
        if self.register_tokens is None:  # the offset of 0.1 is an old guard against rounding, and changes the result
            scale = ((rows + 0.1) / grid, (columns + 0.1) / grid)
            image = F.interpolate(image, scale_factor=scale, mode="bicubic")
        else:
            image = F.interpolate(image, size=(rows, columns), mode="bicubic", antialias=True)
        return torch.cat([self.pos_embed[:, :1], image.flatten(2).transpose(1, 2)], dim=1)

    def embed(self, x: Tensor) -> Tensor:
        """x (B, 3, p h, p w) from `normalise` -> tokens (B, 1 + R + h w, D): cls, R registers, patches."""
        p, height, width = self.patch_size, *x.shape[-2:]
        if height % p or width % p:
            raise ValueError(f"this ViT needs sides that are multiples of {p}, not {height} x {width}")
        cls = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([cls, self.patch_embed(x)], dim=1) + self.positions(height // p, width // p)
        if self.register_tokens is None:
            return x
        return torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)  # without a position

    def levels(self, x: Tensor, blocks: tuple[int, ...]) -> list[Tensor]:
        """x as in `embed` -> the tokens (B, T, D) after each of these blocks, counted from 0, without the final norm."""
        x, found = self.embed(x), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in blocks:
                found.append(x)
        return found

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x as in `embed` -> cls (B, D), registers (B, R, D), patches (B, h w, D), after the final norm."""
        x = self.norm(self.levels(x, (len(self.blocks) - 1,))[0])
        return x[:, 0], x[:, 1 : 1 + self.registers], x[:, 1 + self.registers :]


class DINOv2(nn.Module):
    """DINOv2 as a teacher. `grid` is the side of the patch grid that forward returns, sqrt(N)."""

    def __init__(self, name: str, grid: int):
        super().__init__()
        self.vit, self.grid = ViT(name), grid
        self.width = self.vit.width

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) in [-1, 1] -> cls (B, D), patches (B, grid^2, D).

        The image is resized to 14 * grid px, so that the teacher's patches lie on the tokenizer's (ours, as REPA does).
        """
        check_range(images)
        side = self.vit.patch_size * self.grid
        images = F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)
        cls, _, patches = self.vit(self.vit.normalise(images))
        return cls, patches


class DINO(nn.Module):
    """DINO ViT-S/16 as the discriminator sees through it: patch tokens of four levels, without the final norm."""

    def __init__(self, blocks: tuple[int, ...] = (2, 5, 8, 11)):
        super().__init__()
        self.vit, self.levels = ViT("dino_vits16"), blocks

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) around [-1, 1], sides multiples of 16 -> per level (B, D, H / 16, W / 16)."""
        tokens = self.vit.levels(self.vit.normalise(images), self.levels)
        rows = images.shape[-2] // self.vit.patch_size
        return [level[:, 1:].transpose(1, 2).unflatten(2, (rows, -1)) for level in tokens]


class HOG(nn.Module):
    """A teacher without weights (ours): per patch a histogram of gradient orientations and the mean colour.

    The patch vectors are centred per image; cls is their mean weighted by their length (the saliency), so that
    cos(cls, patch) is high where a patch differs from the average of the image in the way most salient patches do.
    """

    BINS = 8

    def __init__(self, grid: int):
        super().__init__()
        self.grid, self.width = grid, self.BINS + 3

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, H) in [-1, 1] -> cls (B, 11), patches (B, grid^2, 11)."""
        check_range(images)
        images = images.float()
        grey = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        dx = (grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]) / 2  # (B, 1, H, H)
        dy = (grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]) / 2
        position = torch.atan2(dy, dx) / math.pi * self.BINS  # orientation modulo pi, in bins
        bins = torch.arange(self.BINS, device=images.device).view(1, -1, 1, 1)
        distance = (position - bins + self.BINS / 2) % self.BINS - self.BINS / 2
        votes = (1 - distance.abs()).clamp(min=0) * torch.hypot(dx, dy)  # (B, BINS, H, H), linear between two bins
        cells = F.avg_pool2d(torch.cat([votes, images], dim=1), images.shape[-1] // self.grid)
        patches = cells.flatten(2).transpose(1, 2)  # (B, N, BINS + 3)
        patches = patches - patches.mean(dim=1, keepdim=True)
        saliency = patches.norm(dim=-1, keepdim=True)
        cls = (saliency * patches).sum(1) / saliency.sum(1).clamp(min=1e-6)
        return cls, patches


# By name: grid -> teacher.
TEACHERS = {"hog": HOG} | {name: partial(DINOv2, name) for name in VITS if name.startswith("dinov2")}


class Alignment(nn.Module):
    """Local and global alignment of z (B, L, C) with teacher features of width D, 1 - cosine each (eq. 3-6)."""

    def __init__(self, channels: int, hidden: int, teacher_width: int):
        super().__init__()
        self.local_mlp = Mlp(channels, hidden, teacher_width)
        self.global_mlp = Mlp(channels, hidden, teacher_width)

    def forward(self, z: Tensor, targets: tuple[Tensor, Tensor], mask: Tensor | None = None) -> dict[str, Tensor]:
        """-> local (eq. 3, 5, 6) and global (eq. 4, 5, 6), means over the batch in [0, 2]. The mask is of no matter here."""
        cls, patches = targets
        # eq. 3 repeats each latent N/L times before the MLP; the MLP acts per token, so repeating its output is equal.
        repeats = patches.shape[1] // z.shape[1]
        local = self.local_mlp(z).repeat_interleave(repeats, dim=1)  # (B, N, D)
        global_ = self.global_mlp(z.mean(dim=1))  # (B, D): eq. 4
        return {"local": cosine_loss(local, patches), "global": cosine_loss(global_, cls)}


def cosine_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Eq. 6: 1 - mean cosine over all vectors, in float32."""
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()


class Heads(nn.ModuleList):
    """Some heads as one: (z, targets, mask) -> {term: loss} of all of them."""

    def forward(self, z: Tensor, targets: tuple[Tensor, Tensor], mask: Tensor | None = None) -> dict[str, Tensor]:
        return {term: loss for head in self for term, loss in head(z, targets, mask).items()}


def build_heads(weights: dict[str, float], channels: int, hidden: int, teacher: nn.Module | None) -> Heads:
    """The heads of which some term has a weight, for the targets of a teacher."""
    heads = Heads()
    if weights["local"] or weights["global"]:
        heads.append(Alignment(channels, hidden, teacher.width))
    return heads
