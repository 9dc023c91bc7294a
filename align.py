"""Frozen teachers, and heads that compare the latents with what they see (paper section 3.3, eq. 3-6).

    cls, patches = teacher(images)      (B, D), (B, N, D)
    losses = head(z, targets, mask)     {term: loss}: a head is a trained module with this call; targets = {name: what it saw}

Teachers: `DINOv2` (official weights) and `HOG` (no weights: gradients and colours, for offline use). This is the only file
that turns [-1, 1] images into a teacher's input. `DINO` is no teacher, but what the discriminator of losses.py looks through.
Heads: `Alignment` (MacTok), `FeatureDecoder` (MAETok), `Preservation` (AlignTok), whose encoder is a teacher: `TeacherEncoder`.

    python -c "import torch as t, align as a; print([x.shape for x in a.HOG(8)(t.zeros(2, 3, 32, 32))])"
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer import IMAGENET_MEAN, IMAGENET_STD, POSTERIORS, Block, Decoder, Gaussian, Mlp, PatchEmbed, Point, Tokenizer


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
        self.name = name
        self.width, depth, heads, self.patch_size, self.trained_grid, self.registers = VITS[name]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.trained_grid**2, self.width))
        self.register_tokens = nn.Parameter(torch.zeros(1, self.registers, self.width)) if self.registers else None
        is_dinov2 = name.startswith("dinov2")
        self.mask_token = nn.Parameter(torch.zeros(1, self.width), requires_grad=False) if is_dinov2 else None  # of the file alone
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


class CellHOG(nn.Module):
    """Histograms of oriented gradients as MaskFeat and MAETok compute them: 9 orientations per colour and cell of at most 8 px.

    At 256 px with 16-px patches D = 3 x 9 x 2 x 2 = 108 values. A target of `FeatureDecoder`.
    """

    BINS = 9

    def __init__(self, grid: int, patch_size: int):
        super().__init__()
        self.grid, self.cell = grid, math.gcd(8, patch_size)
        self.width = 3 * self.BINS * (patch_size // self.cell) ** 2
        sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("sobel", torch.stack([sobel, sobel.T])[:, None], persistent=False)
        window = torch.exp(-((torch.arange(2 * self.cell) - self.cell + 0.5) / self.cell).square() / 2)
        self.register_buffer("window", window / window.sum(), persistent=False)  # of tiles of 2 x 2 cells, along one side

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, H) in [-1, 1] -> their mean (B, D) and patches (B, grid^2, D), ordered by colour, bin, row, column."""
        check_range(images)
        window = self.window[torch.arange(images.shape[-1], device=images.device) % len(self.window)]
        padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect").flatten(0, 1)[:, None]
        across, down = F.conv2d(padded, self.sobel).unflatten(0, (-1, 3)).unbind(2)  # (B, 3, H, H)
        bins = (torch.atan2(across, down) / math.pi * self.BINS).floor().long() % self.BINS  # orientation modulo pi
        votes = torch.hypot(across, down) * torch.outer(window, window)
        votes = torch.zeros(*bins.shape, self.BINS, device=bins.device).scatter_(-1, bins[..., None], votes[..., None])
        cells = F.avg_pool2d(votes.movedim(-1, 2).flatten(1, 2), self.cell).unflatten(1, (3, self.BINS))
        cells = F.normalize(cells * self.cell**2, dim=2)  # (B, 3, BINS, H / cell, H / cell)
        patches = cells.flatten(1, 2).unflatten(-1, (self.grid, -1)).unflatten(-3, (self.grid, -1))  # (B, 27, grid, r, grid, r)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return patches.mean(dim=1), patches


class TeacherEncoder(nn.Module):
    """AlignTok's encoder: a teacher and an adapter of two layers on its patches (section 3.2, eq. 3); its width is ours."""

    def __init__(self, teacher: nn.Module, channels: int, posterior: str):
        super().__init__()
        self.teacher, self.posterior = teacher, POSTERIORS[posterior]
        self.adapter = nn.Sequential(nn.Linear(teacher.width, 4 * teacher.width), nn.GELU())
        self.to_moments = nn.Linear(4 * teacher.width, channels * len(self.posterior._fields))

    def forward(self, images: Tensor, mask: Tensor | None = None, drop: bool = False) -> Gaussian | Point:
        """images (B, 3, H, W) -> the posterior of (B, N, C). Hidden patches become grey; they cannot be dropped."""
        if drop:
            raise ValueError("a teacher sees whole images: its patches cannot be dropped")
        if mask is not None:
            side = math.isqrt(mask.shape[1])
            images = images * (1 - F.interpolate(mask.view(-1, 1, side, side).to(images.dtype), images.shape[-2:]))
        x = self.adapter(self.teacher(images)[1])
        with torch.autocast(x.device.type, enabled=False):
            return self.posterior.of(self.to_moments(x.float()))


# By name: grid -> teacher.
TEACHERS = {"hog": HOG} | {name: partial(DINOv2, name) for name in VITS if name.startswith("dinov2")}


class Alignment(nn.Module):
    """Local and global alignment of z (B, L, C) with teacher features of width D, 1 - cosine each (eq. 3-6)."""

    def __init__(self, channels: int, hidden: int, teacher_width: int):
        super().__init__()
        self.local_mlp = Mlp(channels, hidden, teacher_width)
        self.global_mlp = Mlp(channels, hidden, teacher_width)

    def forward(self, z: Tensor, targets: dict, mask: Tensor | None = None) -> dict[str, Tensor]:
        """-> local (eq. 3, 5, 6) and global (eq. 4, 5, 6), means over the batch in [0, 2]. The mask is of no matter here."""
        cls, patches = targets["teacher"]
        # eq. 3 repeats each latent N/L times before the MLP; the MLP acts per token, so repeating its output is equal.
        repeats = patches.shape[1] // z.shape[1]
        local = self.local_mlp(z).repeat_interleave(repeats, dim=1)  # (B, N, D)
        global_ = self.global_mlp(z.mean(dim=1))  # (B, D): eq. 4
        return {"local": cosine_loss(local, patches), "global": cosine_loss(global_, cls)}


def cosine_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Eq. 6: 1 - mean cosine over all vectors, in float32."""
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()


class FeatureDecoder(nn.Module):
    """Predicts a teacher's patches from z at the hidden patches, by a decoder of 3 blocks (MAETok section 3.2, eq. 7-8)."""

    def __init__(self, term: str, source: str, decoder: Decoder):
        super().__init__()
        self.term, self.source, self.decoder = term, source, decoder

    def forward(self, z: Tensor, targets: dict, mask: Tensor) -> dict[str, Tensor]:
        return {self.term: masked_mse(self.decoder(z), targets[self.source][1], mask)}


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """(B, N, D) twice, mask (B, N) -> the squared error per value at an image's hidden patches; images without any count as 0."""
    error = (prediction.float() - target.float()).square().mean(dim=-1)
    return ((error * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


class Preservation(nn.Module):
    """AlignTok section 3.2, eq. 4: the mean squared distance of z from the latents of the encoder that the stage began with."""

    def forward(self, z: Tensor, targets: dict, mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"preservation": F.mse_loss(z, targets["before"].mean)}


class Heads(nn.ModuleList):
    """Some heads as one: (z, targets, mask) -> {term: loss} of all of them."""

    def forward(self, z: Tensor, targets: dict, mask: Tensor | None = None) -> dict[str, Tensor]:
        return {term: loss for head in self for term, loss in head(z, targets, mask).items()}


def build_heads(weights: dict[str, float], tokenizer: Tokenizer, teachers: dict[str, nn.Module]) -> Heads:
    """The heads of which some term has a weight, for what these teachers see."""
    heads, channels, width = Heads(), tokenizer.channels, tokenizer.decoder.from_latent.out_features
    grid, tokens = math.isqrt(tokenizer.num_patches), 0 if tokenizer.has_grid else tokenizer.tokens
    if weights["local"] or weights["global"]:
        heads.append(Alignment(channels, width, teachers["teacher"].width))
    for term, source in (("features", "teacher"), ("hog", "hog")):
        if weights[term]:  # a quarter of the decoder's width: 192 and 3 heads for B (config: MAETok's code)
            few = tokenizer.decoder.blocks[0].attn.heads // 4
            decoder = Decoder(grid, tokens, channels, teachers[source].width, width // 4, depth=3, heads=few)
            heads.append(FeatureDecoder(term, source, decoder))
    if weights["preservation"]:
        heads.append(Preservation())
    return heads


def build_tokenizer(config: dict) -> Tokenizer:
    """Made from the entries of a larger dict that it depends on; with encoder_init "teacher" its encoder is the teacher."""
    names = ("image_size", "patch_size", "tokens", "channels", "size", "posterior")
    settings, encoder = {name: config[name] for name in names}, None
    if config["encoder_init"] == "teacher":
        teacher = TEACHERS[config["teacher"]](config["image_size"] // config["patch_size"])
        encoder = TeacherEncoder(teacher, config["channels"], config["posterior"])
    return Tokenizer(**settings, encoder=encoder)
