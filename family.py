"""What MAETok, l-DeTok and AlignTok add to MacTok. Skip this file if you only want MacTok.

    MAETok     FeatureDecoder predicts features of hidden patches; MaskFeatHOG is one of its targets
    l-DeTok    GridEncoder and GridDecoder have one latent per patch; encode_visible drops hidden
               patches; add_latent_noise perturbs latents
    AlignTok   PretrainedEncoder is a teacher with an adapter; PreservationLoss holds its latents

Section and equation numbers are those of the three papers. docs/family.md compares the systems.
`python family.py` computes HOG features.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align import check_range
from masking import mask_to_pixels
from tokenizer import Decoder, Encoder, Tokenizer, init_linear

# --------------------------------------------------------------------------------------------------
# MAETok (arXiv 2502.03444): auxiliary decoders.


class FeatureDecoder(nn.Module):
    """Predicts a target's patch features from z at hidden patches (MAETok section 3.2, eq. 7-8).

    loss_name   the loss is returned under this name
    target      its prediction is compared with the patches of targets[target]
    decoder     z (B, L, C) -> (B, N, D)
    """

    def __init__(self, loss_name: str, target: str, decoder: nn.Module):
        super().__init__()
        self.loss_name = loss_name
        self.target = target
        self.decoder = decoder

    def forward(self, z: Tensor, targets: dict, mask: Tensor) -> dict[str, Tensor]:
        """z (B, L, C), targets[self.target] = anything, patches (B, N, D); mask (B, N)."""
        _, patches = targets[self.target]
        return {self.loss_name: masked_mse(self.decoder(z), patches, mask)}


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Squared error per value at an image's hidden patches, averaged over the batch.

    prediction, target (B, N, D), mask (B, N). An image without hidden patches counts as 0.
    """
    error = (prediction.float() - target.float()).square().mean(dim=-1)
    per_image = (error * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return per_image.mean()


class MaskFeatHOG(nn.Module):
    """Histograms of oriented gradients as MaskFeat and MAETok compute them.

    Each color of each cell of at most 8 x 8 pixels has a histogram of 9 orientations. With 16-pixel
    patches a patch has D = 3 x 9 x 2 x 2 = 108 values.
    """

    NUM_BINS = 9

    def __init__(self, grid_size: int, patch_size: int):
        super().__init__()
        self.grid_size = grid_size
        self.cell_size = math.gcd(8, patch_size)
        self.width = 3 * self.NUM_BINS * (patch_size // self.cell_size) ** 2
        sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        kernels = torch.stack([sobel, sobel.T])[:, None]
        self.register_buffer("sobel", kernels, persistent=False)
        # Pixels are weighted by a Gaussian around the middle of tiles of 2 x 2 cells.
        coords = torch.arange(2 * self.cell_size) - self.cell_size + 0.5
        window = torch.exp(-(coords / self.cell_size).square() / 2)
        self.register_buffer("window", window / window.sum(), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, H) in [-1, 1] -> the patches' mean (B, D), and patches (B, N, D).

        The values of a patch are ordered by color, bin, row and column.
        """
        check_range(images)
        with torch.autocast(images.device.type, enabled=False):  # bf16 would change the bins
            padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
            gradients = F.conv2d(padded.flatten(0, 1)[:, None], self.sobel)
        gx, gy = gradients.unflatten(0, (-1, 3)).unbind(dim=2)  # each (B, 3, H, H)

        # Each pixel votes for the bin of its orientation, modulo pi.
        orientation = torch.atan2(gx, gy) / math.pi * self.NUM_BINS  # in MaskFeat's order
        bins = orientation.floor().long() % self.NUM_BINS
        tiles = torch.arange(images.shape[-1], device=images.device) % len(self.window)
        window = self.window[tiles]
        magnitude = torch.hypot(gx, gy) * torch.outer(window, window)
        votes = torch.zeros(*bins.shape, self.NUM_BINS, device=bins.device)
        votes = votes.scatter_(-1, bins[..., None], magnitude[..., None]).movedim(-1, 2)

        # Sum over cells, normalize each cell's histogram, and gather the cells of a patch.
        cells = F.avg_pool2d(votes.flatten(1, 2), self.cell_size) * self.cell_size**2
        cells = F.normalize(cells.unflatten(1, (3, self.NUM_BINS)), dim=2)
        cells = cells.flatten(1, 2)  # (B, 27, H / cell_size, H / cell_size)
        cells = cells.unflatten(-1, (self.grid_size, -1))
        cells = cells.unflatten(-3, (self.grid_size, -1))  # (B, 27, grid, cells, grid, cells)
        patches = cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, D)
        return patches.mean(dim=1), patches


# --------------------------------------------------------------------------------------------------
# l-DeTok (arXiv 2507.15856): latents on the patch grid, dropped patches, noise on latents.


class GridEncoder(Encoder):
    """One latent per patch: images (B, 3, H, W) -> the outputs at the patches (B, N, D)."""

    def __init__(self, grid_size: int, patch_size: int, width: int, depth: int, num_heads: int):
        super().__init__(grid_size, patch_size, 0, width, depth, num_heads)
        del self.latent_tokens

    def forward(
        self, images: Tensor, mask: Tensor | None = None, ids_keep: Tensor | None = None
    ) -> Tensor:
        """If ids_keep (B, V) is given, only these patches enter the blocks, and come out."""
        x = self.embed_patches(images, mask)
        if ids_keep is not None:
            x = x.gather(1, ids_keep[..., None].expand(-1, -1, x.shape[-1]))
        return self.norm(self.blocks(x))


class GridDecoder(Decoder):
    """One latent per patch, which is added to the patch's reconstruction token."""

    def __init__(
        self,
        grid_size: int,
        latent_dim: int,
        out_dim: int,
        width: int,
        depth: int,
        num_heads: int,
    ):
        super().__init__(grid_size, 0, latent_dim, out_dim, width, depth, num_heads)
        del self.latent_pos

    def make_sequence(self, z: Tensor) -> Tensor:
        return self.reconstruction_tokens + self.from_latent(z)  # (B, N, D)


def encode_visible(tokenizer: Tokenizer, images: Tensor, mask: Tensor, num_hidden: int):
    """Encode as a masked autoencoder does: the blocks never see a hidden patch (l-DeTok 3.2).

    mask (B, N) hides num_hidden patches of each image. -> a posterior of (B, N, C). The posterior
    of a hidden patch is the prior: mean and logvar are 0, so that its std is 1 and its KL is 0.
    """
    num_patches = mask.shape[1]
    ids_keep = mask.byte().argsort(dim=1, stable=True)[:, : num_patches - num_hidden]
    # No patch that is kept is hidden, so that the mask changes no value. It gives the mask token a
    # gradient, which is zero: DistributedDataParallel fails at a parameter that has none.
    posterior = tokenizer.bottleneck(tokenizer.encoder(images, mask, ids_keep))
    placed = (place_visible(x, ids_keep, num_patches) for x in posterior)
    return type(posterior)(*placed)


def place_visible(x: Tensor, ids_keep: Tensor, num_patches: int) -> Tensor:
    """x (B, V, C) of the patches ids_keep (B, V) -> (B, num_patches, C), zero elsewhere."""
    index = ids_keep[..., None].expand_as(x)
    return x.new_zeros(len(x), num_patches, x.shape[-1]).scatter(1, index, x)


def add_latent_noise(z: Tensor, tau: Tensor, noise: Tensor, gamma: float = 3.0) -> Tensor:
    """(1 - tau) z + tau gamma noise (l-DeTok section 3.2, eq. 4).

    z (B, L, C); tau (B,) is uniform in [0, 1); noise ~ N(0, 1) has the shape of z.
    """
    tau = tau[:, None, None]
    return (1 - tau) * z + tau * gamma * noise


# --------------------------------------------------------------------------------------------------
# AlignTok (arXiv 2509.25162): a pretrained encoder, whose latents are held where they were.


class PretrainedEncoder(nn.Module):
    """A teacher and an adapter of two layers on its patches (AlignTok section 3.2, eq. 3).

    The adapter's second layer is the bottleneck's `proj`. The width between the two layers, four
    times the teacher's, is ours.
    """

    def __init__(self, teacher: nn.Module):
        super().__init__()
        self.teacher = teacher
        self.width = 4 * teacher.width
        self.adapter = nn.Sequential(nn.Linear(teacher.width, self.width), nn.GELU())
        self.adapter.apply(init_linear)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) -> (B, N, width). Hidden patches become gray before the teacher."""
        if mask is not None:
            images = images.masked_fill(mask_to_pixels(mask, images.shape[-1]), 0)
        _, patches = self.teacher(images)
        return self.adapter(patches)


class PreservationLoss(nn.Module):
    """The squared distance of z from the latents that the stage began with (AlignTok eq. 4)."""

    def forward(self, z: Tensor, targets: dict, mask: Tensor | None = None) -> dict[str, Tensor]:
        """z (B, L, C), targets["reference"] = a posterior of (B, L, C)."""
        return {"preservation": F.mse_loss(z, targets["reference"].mean)}


if __name__ == "__main__":
    _, patches = MaskFeatHOG(grid_size=4, patch_size=8)(torch.rand(2, 3, 32, 32) * 2 - 1)
    print(f"HOG features of 2 images: {tuple(patches.shape)}")
