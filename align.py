"""Aligning the latents with a frozen teacher's features (paper section 3.3, eq. 3-6).

    cls, patches = teacher(images)              (B, D), (B, N, D)   no gradient
    local, global_ = Alignment(C, D)(z, cls, patches)

Two teachers share that call: `DINOv2` (official weights) and `HOG` (no weights: gradients and colours, for offline use).
This is the only file that turns [-1, 1] images into a teacher's input.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer import IMAGENET_MEAN, IMAGENET_STD, Block, Mlp, PatchEmbed


def check_range(images: Tensor) -> None:
    """Asserts that images lie in [-1, 1] (without waiting for a GPU): uint8 and [0, 255] floats end here."""
    torch._assert_async((images.detach().abs().amax() <= 1.001), "teacher: images must lie in [-1, 1]")


class DINOv2(nn.Module):
    """DINOv2 S/B/L, with or without registers; parameter names and shapes of the official files.

    Build it with `DINOv2.from_state`. `grid` is the side of the patch grid that forward returns, sqrt(N).
    """

    def __init__(self, width: int, depth: int, heads: int, registers: int, grid: int):
        super().__init__()
        self.width, self.grid = width, grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 37 * 37, width))  # trained at 518 px: 37 x 37 patches
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # in the file, not used by a teacher
        self.patch_embed = PatchEmbed(14, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    @classmethod
    def from_state(cls, state: dict[str, Tensor], grid: int) -> "DINOv2":
        """A frozen teacher from an official state dict; raises ValueError naming the first key that does not fit."""
        width = state["cls_token"].shape[-1] if "cls_token" in state else 0
        sizes = {384: (12, 6), 768: (12, 12), 1024: (24, 16)}
        if width not in sizes:
            raise ValueError(f"not a DINOv2 S, B or L file: cls_token has width {width}")
        registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
        teacher = cls(width, *sizes[width], registers, grid)
        expected = {key: value.shape for key, value in teacher.state_dict().items()}
        for key in sorted(expected.keys() | state.keys()):
            found = state[key].shape if key in state else None
            if found != expected.get(key):
                raise ValueError(f"DINOv2 file: key {key!r} has shape {found}, expected {expected.get(key)}")
        teacher.load_state_dict(state)
        return teacher.eval().requires_grad_(False)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The position embedding for a rows x columns grid, (1, 1 + rows * columns, D), as the official code resamples it."""
        if (rows, columns) == (37, 37):
            return self.pos_embed
        image = self.pos_embed[:, 1:].view(1, 37, 37, -1).permute(0, 3, 1, 2)
        if self.register_tokens is None:  # the offset of 0.1 is an old guard against rounding, and changes the result
            scale = ((rows + 0.1) / 37, (columns + 0.1) / 37)
            image = F.interpolate(image, scale_factor=scale, mode="bicubic")
        else:
            image = F.interpolate(image, size=(rows, columns), mode="bicubic", antialias=True)
        return torch.cat([self.pos_embed[:, :1], image.flatten(2).transpose(1, 2)], dim=1)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ImageNet-normalised x (B, 3, 14 h, 14 w) -> cls (B, D), registers (B, R, D), patches (B, h w, D), after the norm."""
        if x.shape[-2] % 14 or x.shape[-1] % 14:
            raise ValueError(f"DINOv2 needs sides that are multiples of 14, not {x.shape[-2]} x {x.shape[-1]}")
        rows, columns = x.shape[-2] // 14, x.shape[-1] // 14
        cls = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([cls, self.patch_embed(x)], dim=1) + self.positions(rows, columns)
        registers = 0
        if self.register_tokens is not None:  # between cls and patches, without a position
            registers = self.register_tokens.shape[1]
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1 : 1 + registers], x[:, 1 + registers :]

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) in [-1, 1] -> cls (B, D), patches (B, grid^2, D).

        The image is resized to 14 * grid px, so that the teacher's patches lie on the tokenizer's (ours, as REPA does).
        """
        check_range(images)
        side = 14 * self.grid
        images = F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)
        cls, _, patches = self.features((images / 2 + 0.5 - self.mean) / self.std)
        return cls, patches


class HOG(nn.Module):
    """A teacher without weights (ours): per patch a histogram of gradient orientations and the mean colour.

    The patch vectors are centred per image; cls is their mean weighted by their length (the saliency), so that
    cos(cls, patch) is high where a patch differs from the average of the image in the way most salient patches do.
    """

    BINS = 8

    def __init__(self, grid: int):
        super().__init__()
        self.width, self.grid = self.BINS + 3, grid

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


class Alignment(nn.Module):
    """Local and global alignment of z (B, L, C) with teacher features of width D (eq. 3-6), 1 - cosine each."""

    def __init__(self, channels: int, hidden: int, teacher_width: int):
        super().__init__()
        self.local_mlp = Mlp(channels, hidden, teacher_width)
        self.global_mlp = Mlp(channels, hidden, teacher_width)

    def forward(self, z: Tensor, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """-> two losses in [0, 2], means over the batch: local (eq. 3-4), global (eq. 5-6)."""
        # eq. 3 repeats each latent N/L times before the MLP; the MLP acts per token, so repeating its output is equal.
        repeats = patches.shape[1] // z.shape[1]
        local = self.local_mlp(z).repeat_interleave(repeats, dim=1)  # (B, N, D)
        global_ = self.global_mlp(z.mean(dim=1))  # (B, D)
        return cosine_loss(local, patches), cosine_loss(global_, cls)


def cosine_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - mean cosine over all vectors, in float32."""
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()
