"""Frozen teachers, and the alignment of latents with what they see (MacTok section 3.3, eq. 3-6).

    cls, patches = teacher(images)              (B, D) and (B, N, D): per image, and per patch
    losses = AlignmentLoss(...)(z, targets)     {"local": scalar, "global": scalar}

There are two kinds of teachers here. `DINOv2` takes official weights; `HOG` needs no weights, only
gradients and colors, so that everything runs offline. `DINOFeatures` is not a teacher: it is the
frozen network that the discriminator in losses.py looks at images through. Another teacher, trained
on labels, is in classifiers.py.

`python align.py` shows what HOG makes of an image.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer import IMAGENET_MEAN, IMAGENET_STD, Block, Mlp, PatchEmbed

# Width, depth, number of heads, patch size, side of the patch grid in pretraining, register tokens.
VIT_CONFIGS = {
    "dinov2_vits14": (384, 12, 6, 14, 37, 0),
    "dinov2_vitb14": (768, 12, 12, 14, 37, 0),
    "dinov2_vitl14": (1024, 24, 16, 14, 37, 0),
    "dinov2_vits14_reg": (384, 12, 6, 14, 37, 4),
    "dinov2_vitb14_reg": (768, 12, 12, 14, 37, 4),
    "dinov2_vitl14_reg": (1024, 24, 16, 14, 37, 4),
    "dino_vits16": (384, 12, 6, 16, 14, 0),
}


def check_range(images: Tensor) -> None:
    """Raise unless images are in [-1, 1]. The check runs on the device and does not synchronize."""
    largest = images.detach().abs().amax()
    torch._assert_async(largest <= 1.001, "teacher: images must lie in [-1, 1]")


# --------------------------------------------------------------------------------------------------
# The backbone of DINOv2 and DINO, and the two networks built on it.


class ViT(nn.Module):
    """The backbone of DINOv2 or DINO, with the parameter names and shapes of the official files."""

    def __init__(self, name: str):
        super().__init__()
        width, depth, num_heads, patch_size, pretrain_grid, num_registers = VIT_CONFIGS[name]
        is_dinov2 = name.startswith("dinov2")
        self.name = name
        self.width = width
        self.patch_size = patch_size
        self.pretrain_grid = pretrain_grid
        self.num_registers = num_registers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + pretrain_grid**2, width))
        if num_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, width))
        if is_dinov2:  # only the tokenizer's encoder uses it, if it starts from DINOv2
            self.register_buffer("mask_token", torch.zeros(1, width))
        self.patch_embed = PatchEmbed(patch_size, width)
        blocks = (Block(width, num_heads, layer_scale=is_dinov2) for _ in range(depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
        self.register_buffer("imagenet_mean", mean, persistent=False)
        self.register_buffer("imagenet_std", std, persistent=False)

    def imagenet_normalize(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> zero mean and unit variance over ImageNet."""
        return (images / 2 + 0.5 - self.imagenet_mean) / self.imagenet_std

    def interpolate_pos_encoding(self, rows: int, columns: int) -> Tensor:
        """Positions for a grid of rows x columns patches, (1, 1 + rows * columns, D).

        The official code resamples them differently for models with registers.
        """
        size = self.pretrain_grid
        if (rows, columns) == (size, size):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].view(1, size, size, -1).permute(0, 3, 1, 2)
        if self.num_registers:
            grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True)
        else:  # the official code adds 0.1 against rounding errors, which changes the result
            scale = ((rows + 0.1) / size, (columns + 0.1) / size)
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def prepare_tokens(self, x: Tensor) -> Tensor:
        """x (B, 3, p h, p w), normalized -> (B, 1 + R + h w, D): cls, R registers, patches.

        Raises ValueError for sides that are not multiples of the patch size p.
        """
        height, width = x.shape[-2:]
        rows, columns = height // self.patch_size, width // self.patch_size
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image sides must be multiples of {self.patch_size}, not {height} x {width}"
            )
        cls = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([cls, self.patch_embed(x)], dim=1)
        x = x + self.interpolate_pos_encoding(rows, columns)
        if self.num_registers:  # registers have no position
            registers = self.register_tokens.expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        return x

    def get_intermediate_layers(self, x: Tensor, layer_ids: tuple[int, ...]) -> list[Tensor]:
        """Tokens (B, T, D) after each block in layer_ids, counted from 0, without final norm."""
        x = self.prepare_tokens(x)
        feats = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in layer_ids:
                feats.append(x)
        return feats

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, normalized -> cls (B, D), registers (B, R, D), patches (B, h w, D), after the norm."""
        (x,) = self.get_intermediate_layers(x, (len(self.blocks) - 1,))
        x = self.norm(x)
        first_patch = 1 + self.num_registers
        return x[:, 0], x[:, 1:first_patch], x[:, first_patch:]


class DINOv2(nn.Module):
    """DINOv2 as a teacher. `grid_size` is the side of the patch grid that it returns, sqrt(N)."""

    def __init__(self, name: str, grid_size: int):
        super().__init__()
        self.vit = ViT(name)
        self.grid_size = grid_size
        self.width = self.vit.width

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) in [-1, 1] -> cls (B, D), patches (B, grid_size^2, D).

        Images are resized to 14 * grid_size pixels, so that each patch of the teacher covers one
        patch of the tokenizer (ours, as REPA does it).
        """
        check_range(images)
        size = self.vit.patch_size * self.grid_size
        images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
        cls, _, patches = self.vit(self.vit.imagenet_normalize(images))
        return cls, patches


class DINOFeatures(nn.Module):
    """The discriminator's frozen feature extractor: patches of four layers of DINO ViT-S/16."""

    def __init__(self, layer_ids: tuple[int, ...] = (2, 5, 8, 11)):
        super().__init__()
        self.vit = ViT("dino_vits16")
        self.layer_ids = layer_ids

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W), sides multiples of 16 -> a map (B, D, H/16, W/16) per layer.

        Augmented images may leave [-1, 1] a little, so their range is not checked.
        """
        x = self.vit.imagenet_normalize(images)
        rows = images.shape[-2] // self.vit.patch_size
        feats = self.vit.get_intermediate_layers(x, self.layer_ids)
        return [tokens[:, 1:].transpose(1, 2).unflatten(2, (rows, -1)) for tokens in feats]


# --------------------------------------------------------------------------------------------------
# A teacher without weights.


class HOG(nn.Module):
    """A teacher without weights (ours): per patch, a histogram of gradient orientations and a
    color.

    The histogram has NUM_BINS orientations modulo pi, weighted by the gradient's length; the color
    is the patch's mean. Both are centered per image. cls stands in for a class token: it is the
    mean of the patch vectors, weighted by their norms, so that cos(cls, patch) is high for the
    patches that stand out from the image.
    """

    NUM_BINS = 8

    def __init__(self, grid_size: int):
        super().__init__()
        self.grid_size = grid_size
        self.width = self.NUM_BINS + 3

    @torch.no_grad()  # There is nothing to train. DINOv2 has gradients, because AlignTok trains it.
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, H) in [-1, 1] -> cls (B, 11), patches (B, grid_size^2, 11)."""
        check_range(images)
        images = images.float()
        gray = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        gx = (gray[..., 1:-1, 2:] - gray[..., 1:-1, :-2]) / 2  # (B, 1, H, H)
        gy = (gray[..., 2:, 1:-1] - gray[..., :-2, 1:-1]) / 2

        # Each pixel votes for the two bins next to its orientation.
        orientation = torch.atan2(gy, gx) / math.pi * self.NUM_BINS  # in bins, modulo NUM_BINS
        bins = torch.arange(self.NUM_BINS, device=images.device).view(1, -1, 1, 1)
        half = self.NUM_BINS / 2
        distance = (orientation - bins + half) % self.NUM_BINS - half
        votes = (1 - distance.abs()).clamp(min=0) * torch.hypot(gx, gy)  # (B, NUM_BINS, H, H)

        patch_size = images.shape[-1] // self.grid_size
        patches = F.avg_pool2d(torch.cat([votes, images], dim=1), patch_size)
        patches = patches.flatten(2).transpose(1, 2)  # (B, N, NUM_BINS + 3)
        patches = patches - patches.mean(dim=1, keepdim=True)
        saliency = patches.norm(dim=-1, keepdim=True)
        cls = (saliency * patches).sum(dim=1) / saliency.sum(dim=1).clamp(min=1e-6)
        return cls, patches


# Teachers by name. Each entry takes the side of the patch grid, and makes a module with a `width`
# that maps images to cls and patches.
TEACHERS = {"hog": HOG}
TEACHERS |= {name: partial(DINOv2, name) for name in VIT_CONFIGS if name.startswith("dinov2")}


# --------------------------------------------------------------------------------------------------
# Alignment.


class AlignmentLoss(nn.Module):
    """Local and global alignment of latents z (B, L, C) with a teacher of width D (eq. 3-6).

    Two small MLPs map latents to the teacher's space (eq. 5); the loss is 1 - cosine (eq. 6). The
    MLPs have two layers, and `hidden_dim` is the decoder's width (ours).
    """

    def __init__(self, latent_dim: int, hidden_dim: int, teacher_width: int):
        super().__init__()
        self.local_mlp = Mlp(latent_dim, hidden_dim, teacher_width)
        self.global_mlp = Mlp(latent_dim, hidden_dim, teacher_width)

    def forward(self, z: Tensor, targets: dict, mask: Tensor | None = None) -> dict[str, Tensor]:
        """z (B, L, C), where L divides N -> two losses in [0, 2].

        targets["teacher"] = cls (B, D), patches (B, N, D). Losses on latents share this signature;
        this one covers all patches and ignores the mask.
        """
        cls, patches = targets["teacher"]
        # Eq. 3 repeats each latent N / L times and then applies the MLP to each copy. The MLP acts
        # on tokens one by one, so repeating its output is the same and cheaper.
        patches_per_token = patches.shape[1] // z.shape[1]
        local_pred = self.local_mlp(z).repeat_interleave(patches_per_token, dim=1)  # (B, N, D)
        global_pred = self.global_mlp(z.mean(dim=1))  # eq. 4: (B, D)
        return {"local": cosine_loss(local_pred, patches), "global": cosine_loss(global_pred, cls)}


def cosine_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Eq. 6: 1 - the mean cosine similarity over all vectors, in float32."""
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()


if __name__ == "__main__":
    images = torch.zeros(1, 3, 32, 32)
    images[:, :2, 8:20, 12:24] = 1  # a yellow square on gray
    cls, patches = HOG(grid_size=8)(images)
    print(f"cls {tuple(cls.shape)}, patches {tuple(patches.shape)}; cos(cls, patch):")
    for row in F.cosine_similarity(cls[:, None], patches, dim=-1).view(8, 8).tolist():
        print(" ".join(f"{value:5.2f}" for value in row))
