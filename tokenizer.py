"""The MacTok tokenizer: image -> L continuous 1D tokens -> image (paper section 3.1).

    images (B, 3, H, W) in [-1, 1]
      -> Encoder   [N image tokens; L learnable latent tokens] -> ViT -> the L outputs -> a posterior of (B, L, C)
      -> Gaussian  (or Point)  z = posterior.sample()  (B, L, C)
      -> Decoder   [N learnable reconstruction tokens; z] -> ViT -> the N outputs -> pixels (B, 3, H, W)

Shapes: B batch, N = (H / patch_size)^2 image patches, L latent tokens, C channels per token, D width. With tokens = 0 there are
no latent tokens, the latents are the outputs at the patches and L = N (l-DeTok, AlignTok).
The mask is an argument (see masking.py): bool (B, N), True = hidden from the encoder. One that is passed is applied.

    python -c "import torch, tokenizer as t; m = t.Tokenizer(32, 4, 16, 16, 'toy'); print(m(torch.zeros(2, 3, 32, 32))[0].shape)"
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (width, depth, heads) of the encoder and of the decoder. Paper tab. 6b: S 45M, B 176M, BL 391M; here 43.5M, 172.0M, 389.6M at
# 256 px with 128 tokens (the README says where the rest is).
SIZES = {
    "toy": ((128, 3, 4), (128, 3, 4)),
    "S": ((384, 12, 6), (384, 12, 6)),
    "B": ((768, 12, 12), (768, 12, 12)),
    "BL": ((768, 12, 12), (1024, 24, 16)),
}

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # DINOv2's input, images in [0, 1]


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        x = self.attend(*qkv.permute(2, 0, 3, 1, 4))
        return self.proj(x.transpose(1, 2).reshape(batch, length, width))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each (B, heads, T, D / heads)."""
        return F.scaled_dot_product_attention(q, k, v)


class Mlp(nn.Module):
    """Linear, GELU, Linear: (..., width) -> (..., out). `gelu` is 'none' (exact, DINOv2) or 'tanh' (SiT)."""

    def __init__(self, width: int, hidden: int, out: int, gelu: str = "none"):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate=gelu)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned gain per channel, (..., D) -> (..., D)."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block with DINOv2's parameter names, (B, T, D) -> (B, T, D); DINO has no layer scale."""

    def __init__(self, width: int, heads: int, layer_scale: bool = True):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, width)
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


def sincos_1d(positions: Tensor, width: int) -> Tensor:
    """Positions (T,) -> (T, width): sin(p w_i), cos(p w_i) interleaved, w_i = 10000^(-2i / width)."""
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = positions.double()[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()


def sincos_2d(grid: int, width: int) -> Tensor:
    """(grid^2, width), row-major: the first half of the channels says the row, the second half the column."""
    ticks = torch.arange(grid)
    rows, columns = ticks.repeat_interleave(grid), ticks.repeat(grid)
    return torch.cat([sincos_1d(rows, width // 2), sincos_1d(columns, width // 2)], dim=1)


class Gaussian(NamedTuple):
    """A diagonal Gaussian posterior q(z | image); mean and logvar are (B, L, C), float32 (section 3.1)."""

    mean: Tensor
    logvar: Tensor

    @staticmethod
    def of(outputs: Tensor) -> "Gaussian":
        """The encoder's outputs (B, L, 2 C) -> mean and logvar."""
        mean, logvar = outputs.chunk(2, dim=-1)
        return Gaussian(mean, logvar.clamp(-30, 20))

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """z = mean + std * noise (eq. 8); noise ~ N(0, 1) of the same shape, drawn here when not given."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats, (B, L): summed over channels. Eq. 9 is `kl().sum(1).mean()`."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(-1)


class Point(NamedTuple):
    """The posterior of a plain autoencoder: one point, without noise and without KL; mean is (B, L, C), float32."""

    mean: Tensor

    @staticmethod
    def of(outputs: Tensor) -> "Point":
        return Point(outputs)

    @property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean)

    def sample(self, noise: Tensor | None = None) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        return torch.zeros_like(self.mean[..., 0])


POSTERIORS = {"gaussian": Gaussian, "point": Point}


class PatchEmbed(nn.Module):
    """(B, 3, H, W) -> (B, N, D), row-major."""

    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """images (B, 3, H, W), mask (B, N) or None -> the posterior of (B, L, C)."""

    def __init__(self, grid: int, patch_size: int, tokens: int, channels: int, posterior: str, width: int, depth: int, heads: int):
        super().__init__()
        self.posterior = POSTERIORS[posterior]
        self.patch_embed = PatchEmbed(patch_size, width)
        self.pos_embed = nn.Parameter(sincos_2d(grid, width)[None])  # 2D absolute, trained
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        # Distinct learned tokens are their own 1D positions: a position table would be the same parameter twice.
        self.latent_tokens = nn.Parameter(torch.randn(1, tokens, width)) if tokens else None
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.to_moments = nn.Linear(width, channels * len(self.posterior._fields))  # mean and logvar, or the point

    def forward(self, images: Tensor, mask: Tensor | None = None, drop: bool = False) -> Gaussian | Point:
        """Hidden patches become a learned token. With `drop`, as many in each image, the blocks never see them (l-DeTok 3.2).

        A dropped patch has no latent: the prior, mean 0 and logvar 0, stands in its place.
        """
        x = self.patch_embed(images)  # (B, N, D)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = x + self.pos_embed
        if drop:
            x = x[~mask].view(len(x), -1, x.shape[-1])  # (B, visible, D)
        if self.latent_tokens is not None:
            x = torch.cat([x, self.latent_tokens.expand(len(x), -1, -1).to(x.dtype)], dim=1)  # (B, N + L, D)
        x = self.blocks(x)
        x = self.norm(x if self.latent_tokens is None else x[:, -self.latent_tokens.shape[1] :])  # (B, L, D)
        with torch.autocast(x.device.type, enabled=False):
            outputs = self.to_moments(x.float())
        if drop:
            outputs = outputs.new_zeros(*mask.shape, outputs.shape[-1]).masked_scatter(~mask[..., None], outputs)
        return self.posterior.of(outputs)


class Decoder(nn.Module):
    """z (B, L, C) -> (B, N, out), what it predicts of each patch: its pixels, or features (align.py)."""

    def __init__(self, grid: int, tokens: int, channels: int, out: int, width: int, depth: int, heads: int):
        super().__init__()
        self.from_latent = nn.Linear(channels, width)
        self.latent_pos = nn.Parameter(sincos_1d(torch.arange(tokens), width)[None]) if tokens else None
        # One learned token per patch; starting as 2D positions costs nothing and learns faster than 1D ones (ours).
        self.reconstruction_tokens = nn.Parameter(sincos_2d(grid, width)[None])
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.to_patches = nn.Linear(width, out)

    def forward(self, z: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Latents of patches are added to the tokens of theirs; a dropped one's (B, N) stands alone, as its mask token."""
        x, z = self.reconstruction_tokens.expand(len(z), -1, -1), self.from_latent(z)
        if self.latent_pos is not None:
            x = torch.cat([x.to(z.dtype), z + self.latent_pos], dim=1)  # (B, N + L, D)
        else:
            x = x + (z if dropped is None else z.masked_fill(dropped[..., None], 0))  # (B, N, D)
        x = self.blocks(x)
        return self.to_patches(self.norm(x[:, : self.reconstruction_tokens.shape[1]])).float()


def to_image(patches: Tensor, patch_size: int) -> Tensor:
    """(B, N, 3 p p), row-major -> (B, 3, H, W)."""
    side = math.isqrt(patches.shape[1]) * patch_size
    return F.fold(patches.transpose(1, 2), side, patch_size, stride=patch_size)


class Tokenizer(nn.Module):
    """The autoencoder of paper section 3.1: `encoder`, `decoder` and the statistics of its latents.

    image_size and patch_size in pixels (256 and 16 give N = 256), tokens = L (0: one latent per patch), channels = C, size of
    SIZES, posterior of POSTERIORS, encoder: another one with the call of `Encoder` and a last layer `to_moments`. Raises
    ValueError when patch_size does not divide image_size.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        tokens: int,
        channels: int,
        size: str,
        posterior: str = "gaussian",
        encoder: nn.Module | None = None,
    ):
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size is {size!r}; it must be one of {', '.join(SIZES)}")
        if min(image_size, patch_size, channels) < 1 or tokens < 0 or image_size % patch_size:
            sizes = f"image_size {image_size}, patch_size {patch_size}, tokens {tokens}, channels {channels}"
            raise ValueError(f"{sizes}: patch_size must divide image_size, and all but tokens be at least 1")
        grid = image_size // patch_size
        self.patch_size, self.num_patches, self.tokens, self.channels = patch_size, grid**2, tokens or grid**2, channels
        self.has_grid = tokens == 0  # the latents lie on the grid of the patches
        self.encoder = encoder or Encoder(grid, patch_size, tokens, channels, posterior, *SIZES[size][0])
        self.decoder = Decoder(grid, tokens, channels, 3 * patch_size**2, *SIZES[size][1])
        # Statistics of z over the training set, per channel; set once after training (train.py, stage "latents").
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))
        self.apply(init_linear)
        nn.init.constant_(self.encoder.to_moments.bias[channels:], -4.0)  # logvar: start nearly noise-free (ours)

    def encode(self, images: Tensor, mask: Tensor | None = None) -> Gaussian | Point:
        """images (B, 3, H, W) in [-1, 1], mask bool (B, N), True = hidden -> the posterior of (B, L, C)."""
        return self.encoder(images, mask)

    def decode(self, z: Tensor) -> Tensor:
        """z (B, L, C) -> images (B, 3, H, W), float32, not clipped to [-1, 1]."""
        return to_image(self.decoder(z), self.patch_size)

    def forward(self, images: Tensor, mask: Tensor | None = None, noise: Tensor | None = None):
        """-> reconstruction (B, 3, H, W), posterior, z (B, L, C)."""
        posterior = self.encode(images, mask)
        z = posterior.sample(noise)
        return self.decode(z), posterior, z

    def normalize(self, z: Tensor) -> Tensor:
        """z (B, L, C) -> zero mean and unit std per channel over the training set: what SiT sees."""
        return (z - self.latent_mean) / self.latent_std

    def denormalize(self, x: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return x * self.latent_std + self.latent_mean


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for linear layers and the patch embedding (as a linear layer)."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        nn.init.zeros_(module.bias)


def resample_patch_kernel(kernel: Tensor, patch_size: int) -> Tensor:
    """(D, 3, p, p) -> (D, 3, patch_size, patch_size), so that a resized patch keeps its embedding (FlexiViT eq. 4).

    With R the matrix of a bicubic antialiased resize from p x p to the new size, the new kernel is kernel @ pinv(R).
    """
    old = kernel.shape[-1]
    unit = torch.eye(old**2).view(old**2, 1, old, old)
    resize = F.interpolate(unit, size=(patch_size, patch_size), mode="bicubic", antialias=True)
    inverse = torch.linalg.pinv(resize.view(old**2, -1).double())  # (new^2, old^2)
    resampled = kernel.flatten(2).double() @ inverse.T
    return resampled.view(*kernel.shape[:2], patch_size, patch_size).float()


def resample_positions(positions: Tensor, grid: int) -> Tensor:
    """(1, n^2, D) -> (1, grid^2, D), bicubic and antialiased."""
    old = math.isqrt(positions.shape[1])
    image = positions.view(1, old, old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", antialias=True)
    return image.flatten(2).transpose(1, 2)


def load_dinov2(encoder: Encoder, state: dict[str, Tensor]) -> None:
    """Initialise an encoder from the state dict of an official DINOv2 file of the same width and depth (section 4.1).

    The patch kernel is resampled 14 -> patch_size and takes [-1, 1] images instead of ImageNet-normalised ones; the positions
    are resampled to the grid (both ours). The class token and registers are not used. Raises RuntimeError on a mismatch.
    """
    own = encoder.state_dict()
    new = {key: value for key, value in state.items() if key not in ("cls_token", "register_tokens")}
    new |= {key: value for key, value in own.items() if key == "latent_tokens" or key.startswith("to_moments")}
    kernel = resample_patch_kernel(new["patch_embed.proj.weight"], encoder.patch_embed.proj.kernel_size[0])
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    # (x / 2 + 1 / 2 - mean) / std, folded into the first layer.
    new["patch_embed.proj.bias"] = new["patch_embed.proj.bias"] + torch.einsum("dcpq,c->d", kernel, (0.5 - mean) / std)
    new["patch_embed.proj.weight"] = kernel * (0.5 / std).view(1, 3, 1, 1)
    new["pos_embed"] = resample_positions(new["pos_embed"][:, 1:], math.isqrt(own["pos_embed"].shape[1]))
    encoder.load_state_dict(new)
