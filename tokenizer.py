"""The tokenizer of MacTok (arXiv 2603.29634): an image <-> a sequence of L continuous tokens.

    images (B, 3, H, H) in [-1, 1]
      -> Encoder      [N patch tokens; L learnable latent tokens] -> ViT -> the L outputs (B, L, D)
      -> bottleneck   a posterior over latents; z = posterior.sample() has the shape (B, L, C)
      -> Decoder      [N learnable reconstruction tokens; z] -> ViT -> the N outputs -> pixels

This is section 3.1 of the paper. Shapes: B is the batch size, N = (H / patch_size)^2 the number of
image patches, L the number of latent tokens, C the channels of a latent token, D the width.

A mask is a bool tensor (B, N) in which True means that the encoder does not see the patch
(masking.py makes them). A mask that is passed is always applied, in training mode and in eval mode
alike. In comments, "ours" marks a choice that the paper does not state, and "config" one from the
public configurations that it follows (docs/sources.md).

`python tokenizer.py` encodes and decodes two images with an untrained tokenizer.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Width, depth and number of attention heads of the encoder and of the decoder. The paper's table 6b
# counts 45M parameters for S, 176M for B and 391M for BL; these have 43.5M, 172.0M and 389.6M at
# 256 px with 128 tokens (docs/sources.md says where the difference most likely lies).
MODEL_SIZES = {
    "toy": ((128, 3, 4), (128, 3, 4)),
    "S": ((384, 12, 6), (384, 12, 6)),
    "B": ((768, 12, 12), (768, 12, 12)),
    "BL": ((768, 12, 12), (1024, 24, 16)),
}


# --------------------------------------------------------------------------------------------------
# Transformer blocks. The parameter names are those of DINOv2's official files.


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        # False where PyTorch's fused attention is switched off. This project does so on CPUs
        # (utils/distributed.py), where plain products are faster.
        self.is_fused = torch.backends.cuda.flash_sdp_enabled()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        x = self.attend(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, length, width))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v and the result are (B, heads, T, D / heads). sit.py overrides it for RoPE."""
        if self.is_fused:
            return F.scaled_dot_product_attention(q, k, v)
        weights = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, heads, T, T)
        return weights.softmax(dim=-1) @ v


class Mlp(nn.Module):
    """Linear, GELU, Linear: (..., width) -> (..., out_dim).

    `gelu` is PyTorch's name of a form of GELU: "none" is the exact one (DINOv2), "tanh" its
    approximation (SiT).
    """

    def __init__(self, width: int, hidden_dim: int, out_dim: int, gelu: str = "none"):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_dim)
        self.act = nn.GELU(approximate=gelu)
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned gain per channel, (..., D) -> (..., D). It starts at 1 (ours; DINOv2: 1e-5)."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block, (B, T, D) -> (B, T, D).

    Without layer scale it is a block of the first DINO, which the discriminator uses.
    """

    def __init__(self, width: int, num_heads: int, layer_scale: bool = True):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, width)
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """One linear map per patch: images (B, 3, H, W) -> tokens (B, N, D), row by row."""

    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


def sincos_1d(coords: Tensor, width: int) -> Tensor:
    """Sine-cosine embedding of coordinates: (T,) -> (T, width).

    Channels 2i and 2i + 1 hold sin(x w_i) and cos(x w_i) for the coordinate x, with
    w_i = 10000^(-2i / width).
    """
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = coords.double()[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()


def sincos_2d(grid_size: int, width: int) -> Tensor:
    """Sine-cosine embedding of a square grid, row by row: (grid_size^2, width).

    The first half of the channels encodes the row, the second half the column.
    """
    coords = torch.arange(grid_size)
    rows = coords.repeat_interleave(grid_size)
    columns = coords.repeat(grid_size)
    return torch.cat([sincos_1d(rows, width // 2), sincos_1d(columns, width // 2)], dim=1)


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for linear layers and the patch embedding.

    The tokenizer starts so (ours), and the generators (as DiT does).
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        nn.init.zeros_(module.bias)


# --------------------------------------------------------------------------------------------------
# Encoder.


class Encoder(nn.Module):
    """images (B, 3, H, W), mask (B, N) or None -> outputs at the latent tokens (B, L, D)."""

    def __init__(
        self,
        grid_size: int,
        patch_size: int,
        num_latent_tokens: int,
        width: int,
        depth: int,
        num_heads: int,
    ):
        super().__init__()
        self.width = width
        self.patch_embed = PatchEmbed(patch_size, width)
        self.pos_embed = nn.Parameter(sincos_2d(grid_size, width)[None])  # 2D absolute, trained
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        # Nothing is added for the positions of latent tokens: a learned position beside a learned
        # token would be the same parameter twice. They start as samples of N(0, 1) (ours).
        self.latent_tokens = nn.Parameter(torch.randn(1, num_latent_tokens, width))
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_linear)

    def embed_patches(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """-> (B, N, D) with positions. Hidden patches become a learned token (section 3.2)."""
        x = self.patch_embed(images)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        return x + self.pos_embed

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed_patches(images, mask)
        latent_tokens = self.latent_tokens.expand(len(x), -1, -1).to(x.dtype)
        x = self.blocks(torch.cat([x, latent_tokens], dim=1))  # (B, N + L, D)
        return self.norm(x[:, -latent_tokens.shape[1] :])  # (B, L, D)


# --------------------------------------------------------------------------------------------------
# Bottlenecks. A bottleneck is a module that maps the encoder's outputs h (B, L, D) to a posterior.
# A posterior is a named tuple of tensors (B, L, C) which offers
#
#     mean, std        (B, L, C); they are stored for each image once the tokenizer is trained
#     sample(noise)    z (B, L, C), which is decoded
#     losses()         {name: scalar}
#     statistics()     {name: tensor}, averages over the batch, which `summarize` turns into numbers
#
# A bottleneck lists its losses in `loss_names`; each has its weight in recipes.py, such as
# kl_weight for "kl". Its last linear layer is called `proj`, because AlignTok's adaptive weight
# reads the gradient there. To try another bottleneck, such as a vector quantizer, write a class
# like these, give it a row in BOTTLENECKS, and add its weights to recipes.py. Without noise, std is
# zero, as in `Deterministic`. Generated latents go to the decoder as they are, without passing
# through the bottleneck.


class DiagonalGaussian(NamedTuple):
    """The posterior q(z | image) of section 3.1: independent normal distributions, float32."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """z = mean + std * noise (eq. 8). The noise is drawn from N(0, 1) unless it is given."""
        if noise is None:
            noise = torch.randn_like(self.mean)
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) of each token in nats, (B, L): the sum over channels in eq. 9."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(dim=-1)

    def losses(self) -> dict[str, Tensor]:
        """Eq. 9: the KL divergence, summed over tokens and channels, averaged over the batch."""
        return {"kl": self.kl().sum(dim=1).mean()}

    def statistics(self) -> dict[str, Tensor]:
        return latent_moments(self.mean, self.std)


class GaussianBottleneck(nn.Module):
    """h (B, L, D) -> a `DiagonalGaussian` over (B, L, C)."""

    loss_names = ("kl",)

    def __init__(self, width: int, latent_dim: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * latent_dim)
        init_linear(self.proj)
        nn.init.constant_(self.proj.bias[latent_dim:], -4.0)  # start with little noise (ours)

    def forward(self, h: Tensor) -> DiagonalGaussian:
        with torch.autocast(h.device.type, enabled=False):  # exp and KL need float32
            h = h.to(self.proj.weight.dtype)
            mean, logvar = self.proj(h).chunk(2, dim=-1)
        return DiagonalGaussian(mean, logvar.clamp(-30, 20))  # as latent diffusion models do


class Deterministic(NamedTuple):
    """The posterior of a plain autoencoder: a single point, without noise and without a loss."""

    mean: Tensor

    @property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean)

    def sample(self, noise: Tensor | None = None) -> Tensor:
        return self.mean

    def losses(self) -> dict[str, Tensor]:
        return {}

    def statistics(self) -> dict[str, Tensor]:
        return latent_moments(self.mean, self.std)


class DeterministicBottleneck(nn.Module):
    """h (B, L, D) -> `Deterministic` latents (B, L, C)."""

    loss_names = ()

    def __init__(self, width: int, latent_dim: int):
        super().__init__()
        self.proj = nn.Linear(width, latent_dim)
        init_linear(self.proj)

    def forward(self, h: Tensor) -> Deterministic:
        with torch.autocast(h.device.type, enabled=False):
            return Deterministic(self.proj(h.to(self.proj.weight.dtype)))


BOTTLENECKS = {"gaussian": GaussianBottleneck, "deterministic": DeterministicBottleneck}


# --------------------------------------------------------------------------------------------------
# Decoder, and the whole tokenizer.


class Decoder(nn.Module):
    """z (B, L, C) -> a prediction for each patch (B, N, out_dim): pixels or features."""

    def __init__(
        self,
        grid_size: int,
        num_latent_tokens: int,
        latent_dim: int,
        out_dim: int,
        width: int,
        depth: int,
        num_heads: int,
    ):
        super().__init__()
        self.width = width
        self.num_heads = num_heads
        self.from_latent = nn.Linear(latent_dim, width)
        self.latent_pos = nn.Parameter(sincos_1d(torch.arange(num_latent_tokens), width)[None])
        # One learned token per patch. They start as 2D sine-cosine positions (the paper: 1D), which
        # trains faster, and are learned from there (ours).
        self.reconstruction_tokens = nn.Parameter(sincos_2d(grid_size, width)[None])
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.last_layer = nn.Linear(width, out_dim)
        self.apply(init_linear)

    def make_sequence(self, z: Tensor) -> Tensor:
        """z (B, L, C) -> the transformer's input, whose first N tokens stand for the patches."""
        z = self.from_latent(z)
        z = z + self.latent_pos
        reconstruction_tokens = self.reconstruction_tokens.expand(len(z), -1, -1)
        return torch.cat([reconstruction_tokens.to(z.dtype), z], dim=1)  # (B, N + L, D)

    def forward(self, z: Tensor) -> Tensor:
        x = self.blocks(self.make_sequence(z))
        num_patches = self.reconstruction_tokens.shape[1]
        return self.last_layer(self.norm(x[:, :num_patches])).float()


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Pixels of patches (B, N, 3 p p), row by row -> images (B, 3, H, W)."""
    image_size = math.isqrt(patches.shape[1]) * patch_size
    return F.fold(patches.transpose(1, 2), image_size, patch_size, stride=patch_size)


class Tokenizer(nn.Module):
    """The autoencoder of section 3.1: `encoder`, `bottleneck`, `decoder`, and latent statistics.

    image_size          side of the square images in pixels
    patch_size          side of a patch in pixels; it must divide image_size
    num_latent_tokens   L
    latent_dim          C, the channels of a latent token
    model_size          a key of MODEL_SIZES
    bottleneck          a key of BOTTLENECKS
    encoder, decoder    None, or replacements with the same calls (family.py has some)
    is_2d               True if the latents are a grid, row by row; the generator asks for it

    Raises ValueError for impossible sizes.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        num_latent_tokens: int,
        latent_dim: int,
        model_size: str,
        bottleneck: str = "gaussian",
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        is_2d: bool = False,
    ):
        super().__init__()
        if model_size not in MODEL_SIZES:
            raise ValueError(f"model size {model_size!r} is not one of {', '.join(MODEL_SIZES)}")
        if min(image_size, patch_size, num_latent_tokens, latent_dim) < 1:
            raise ValueError(
                f"image size {image_size}, patch size {patch_size}, {num_latent_tokens} latent "
                f"tokens and {latent_dim} channels must all be at least 1"
            )
        if image_size % patch_size:
            raise ValueError(f"patch size {patch_size} does not divide image size {image_size}")
        grid_size = image_size // patch_size
        encoder_size, decoder_size = MODEL_SIZES[model_size]
        self.patch_size = patch_size
        self.grid_size = grid_size
        self.num_patches = grid_size**2
        self.num_latent_tokens = num_latent_tokens
        self.latent_dim = latent_dim
        self.is_2d = is_2d
        if encoder is None:
            encoder = Encoder(grid_size, patch_size, num_latent_tokens, *encoder_size)
        if decoder is None:
            out_dim = 3 * patch_size**2
            decoder = Decoder(grid_size, num_latent_tokens, latent_dim, out_dim, *decoder_size)
        self.encoder = encoder
        self.decoder = decoder
        self.bottleneck = BOTTLENECKS[bottleneck](self.encoder.width, latent_dim)
        # Mean and standard deviation of z per channel over the training set. They are set after
        # training, by train.cache_latents, and are stored with the weights in generator.pt.
        self.register_buffer("latent_mean", torch.zeros(latent_dim))
        self.register_buffer("latent_std", torch.ones(latent_dim))

    def encode(self, images: Tensor, mask: Tensor | None = None):
        """images (B, 3, H, W) in [-1, 1], mask bool (B, N) or None -> a posterior of (B, L, C)."""
        images = images.to(self.latent_mean.dtype)  # that of the weights
        return self.bottleneck(self.encoder(images, mask))

    def decode(self, z: Tensor) -> Tensor:
        """z (B, L, C) -> images (B, 3, H, W), float32, not clipped to [-1, 1]."""
        z = z.to(self.latent_mean.dtype)
        return unpatchify(self.decoder(z), self.patch_size)

    def forward(self, images: Tensor, mask: Tensor | None = None, noise: Tensor | None = None):
        """Returns reconstruction (B, 3, H, W), posterior, z (B, L, C).

        Training goes through train.TokenizerWithLosses, which adds the losses on latents.
        """
        posterior = self.encode(images, mask)
        z = posterior.sample(noise)
        return self.decode(z), posterior, z

    def normalize(self, z: Tensor) -> Tensor:
        """z (B, L, C) -> zero mean and unit std per channel over the training set."""
        return (z - self.latent_mean) / self.latent_std

    def denormalize(self, x: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return x * self.latent_std + self.latent_mean


# --------------------------------------------------------------------------------------------------
# What the log says of latents.


def latent_moments(mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """First and second moments of the latents over the batch, (L, C) each.

    Unlike a variance, they can be averaged over batches and processes.
    """
    return {
        "posterior_mean": mean.mean(dim=0),
        "posterior_mean_square": mean.square().mean(dim=0),
        "z_square": (mean.square() + std.square()).mean(dim=0),
    }


def summarize(averages: dict[str, Tensor]) -> dict[str, float]:
    """Averaged losses and posterior statistics -> plain numbers for the log.

    kl_per_token is the KL divergence in nats of one latent token; active_units is the share of
    the L x C coordinates whose posterior mean has a variance over images above 0.01 (Burda et al.
    2016); z_std is the standard deviation of z around the mean of its coordinate.
    """
    numbers = {name: value.item() for name, value in averages.items() if value.ndim == 0}
    if "posterior_mean" in averages:
        mean = averages["posterior_mean"]  # (L, C)
        variance = averages["posterior_mean_square"] - mean.square()
        z_variance = averages["z_square"] - mean.square()
        if "kl" in numbers:
            num_tokens = len(mean)
            numbers["kl_per_token"] = numbers["kl"] / num_tokens
        numbers["active_units"] = (variance > 0.01).float().mean().item()
        numbers["z_std"] = z_variance.mean().clamp(min=0).sqrt().item()
    return numbers


# --------------------------------------------------------------------------------------------------
# The encoder starts from DINOv2 (section 4.1).

# Statistics of ImageNet's pixels in [0, 1], with which DINOv2's input is normalized.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def resample_patch_embed(kernel: Tensor, patch_size: int) -> Tensor:
    """(D, 3, p, p) -> (D, 3, patch_size, patch_size), FlexiViT's eq. 4.

    Let R be the matrix of a bicubic, antialiased resize of p x p pixels, flattened, to the new
    size. The new kernel is kernel @ pinv(R): a patch that is resized to a larger size keeps its
    embedding, and one that is resized to a smaller size keeps it as well as possible.
    """
    src_size = kernel.shape[-1]
    basis = torch.ones(src_size**2).diag().view(-1, 1, src_size, src_size)
    resized = F.interpolate(basis, size=(patch_size, patch_size), mode="bicubic", antialias=True)
    resize_matrix = resized.view(src_size**2, -1).T.double()  # R, (patch_size^2, p^2)
    resampled = kernel.flatten(2).double() @ torch.linalg.pinv(resize_matrix)
    return resampled.view(*kernel.shape[:2], patch_size, patch_size).float()


def resample_pos_embed(pos_embed: Tensor, grid_size: int) -> Tensor:
    """(1, n^2, D) -> (1, grid_size^2, D), bicubic and antialiased."""
    src_size = math.isqrt(pos_embed.shape[1])
    grid = pos_embed.view(1, src_size, src_size, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(grid_size, grid_size), mode="bicubic", antialias=True)
    return grid.flatten(2).transpose(1, 2)


def load_dinov2(encoder: Encoder, dinov2: dict[str, Tensor]) -> None:
    """Initialize an encoder from an official DINOv2 state dict of the same width and depth.

    The patch embedding is resampled from 14 px to the encoder's patch size, and takes images in
    [-1, 1] in place of ImageNet-normalized ones; the positions are resampled to the encoder's grid
    (both ours). DINOv2's mask token becomes the encoder's; its class token and registers are not
    used. Raises RuntimeError on a mismatch.
    """
    current = encoder.state_dict()
    patch_size = encoder.patch_embed.proj.kernel_size[0]
    grid_size = math.isqrt(encoder.pos_embed.shape[1])
    state = {key: w for key, w in dinov2.items() if key not in ("cls_token", "register_tokens")}
    if "latent_tokens" in current:  # DINOv2 has none
        state["latent_tokens"] = current["latent_tokens"]

    # DINOv2 sees (x / 2 + 1/2 - mean) / std for x in [-1, 1]; fold that into the first layer.
    kernel = resample_patch_embed(state["patch_embed.proj.weight"], patch_size)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    shift = torch.einsum("dcpq,c->d", kernel, (0.5 - mean) / std)
    state["patch_embed.proj.weight"] = kernel * (0.5 / std).view(1, 3, 1, 1)
    state["patch_embed.proj.bias"] = state["patch_embed.proj.bias"] + shift
    state["pos_embed"] = resample_pos_embed(state["pos_embed"][:, 1:], grid_size)
    encoder.load_state_dict(state)


if __name__ == "__main__":
    tokenizer = Tokenizer(32, 4, num_latent_tokens=16, latent_dim=8, model_size="toy")
    reconstruction, posterior, z = tokenizer(torch.zeros(2, 3, 32, 32))
    print(f"latents {tuple(z.shape)}, reconstruction {tuple(reconstruction.shape)}")
    print(f"KL divergence {posterior.losses()['kl'].item():.1f} nats per image")
