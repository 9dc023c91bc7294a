"""The Inception-v3 of FID: the network of the 2015 TensorFlow graph, and its input as TensorFlow 1 or pytorch-fid make it."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from plumbing.weights import load_official


def conv_bn(channels: int, out: int, height: int, width: int, stride: int = 1, same: bool = True) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU, with the official file's names. With `same`, stride 1 keeps the size."""
    padding = (height // 2, width // 2) if same and stride == 1 else 0
    conv = nn.Conv2d(channels, out, (height, width), stride, padding, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out, eps=1e-3), relu=nn.ReLU(inplace=True)))


class Mixed(nn.Module):
    """Convolutions {name: (source, channels, height, width[, stride])}, each from an earlier one or "x", and a pooling."""

    def __init__(self, channels: int, layers: dict[str, tuple], pool_out: int, pool: nn.Module | None = None):
        super().__init__()
        self.sources, widths = {name: layer[0] for name, layer in layers.items()}, {"x": channels}
        for name, (source, out, *kernel) in layers.items():
            self.add_module(name, conv_bn(widths[source], out, *kernel))
            widths[name] = out
        self.pool = pool or nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        self.branch_pool = conv_bn(channels, pool_out, 1, 1) if pool_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        done = {"x": x}
        for name, source in self.sources.items():
            done[name] = self.get_submodule(name)(done[source])
        ends = [done[name] for name in self.sources if name not in self.sources.values()]  # those that are no source
        return torch.cat([*ends, self.branch_pool(self.pool(x))], dim=1)


def chain(name: str, *layers: tuple) -> dict[str, tuple]:
    """Layers of `Mixed` one after the other, with the official file's names: name_1, name_2, ..."""
    names = ["x", *(f"{name}_{i}" for i in range(1, len(layers) + 1))]
    return {own: (source, *layer) for own, source, layer in zip(names[1:], names, layers)}


class InceptionV3(nn.Module):
    """The Inception-v3 of FID (Heusel et al. 2017), its layers in order and with the official file's names."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = conv_bn(3, 32, 3, 3, stride=2)
        self.Conv2d_2a_3x3 = conv_bn(32, 32, 3, 3, same=False)
        self.Conv2d_2b_3x3 = conv_bn(32, 64, 3, 3).append(nn.MaxPool2d(3, stride=2))
        self.Conv2d_3b_1x1 = conv_bn(64, 80, 1, 1)
        self.Conv2d_4a_3x3 = conv_bn(80, 192, 3, 3, same=False).append(nn.MaxPool2d(3, stride=2))
        for name, channels, pool_out in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
            layers = {"branch1x1": ("x", 64, 1, 1)} | chain("branch5x5", (48, 1, 1), (64, 5, 5))
            layers |= chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3))
            self.add_module(name, Mixed(channels, layers, pool_out))
        layers = {"branch3x3": ("x", 384, 3, 3, 2)} | chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3, 2))
        self.Mixed_6a = Mixed(288, layers, 0, nn.MaxPool2d(3, stride=2))
        for name, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            layers = {"branch1x1": ("x", 192, 1, 1)} | chain("branch7x7", (c, 1, 1), (c, 1, 7), (192, 7, 1))
            layers |= chain("branch7x7dbl", (c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7))
            self.add_module(name, Mixed(768, layers, 192))
        layers = chain("branch3x3", (192, 1, 1), (320, 3, 3, 2))
        layers |= chain("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2))
        self.Mixed_7a = Mixed(768, layers, 0, nn.MaxPool2d(3, stride=2))
        for name, channels, pool in (("Mixed_7b", 1280, None), ("Mixed_7c", 2048, nn.MaxPool2d(3, stride=1, padding=1))):
            layers = {"branch1x1": ("x", 320, 1, 1)} | chain("branch3x3", (384, 1, 1))
            layers |= {"branch3x3_2a": ("branch3x3_1", 384, 1, 3), "branch3x3_2b": ("branch3x3_1", 384, 3, 1)}
            layers |= chain("branch3x3dbl", (448, 1, 1), (384, 3, 3))
            layers |= {"branch3x3dbl_3a": ("branch3x3dbl_2", 384, 1, 3), "branch3x3dbl_3b": ("branch3x3dbl_2", 384, 3, 1)}
            self.add_module(name, Mixed(channels, layers, 192, pool))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, 299, 299) from `inception_input` -> pool3 (B, 2048), the features of FID."""
        for layer in list(self.children())[:-1]:  # all but fc
            x = layer(x)
        return x.mean(dim=(2, 3))

    def logits(self, pool3: Tensor) -> Tensor:
        """pool3 (B, 2048) -> (B, 1008), without the bias, as the Inception Score is computed; in the dtype of pool3."""
        return pool3 @ self.fc.weight.to(pool3).T


def inception_input(images: Tensor, resize: str = "tf1") -> Tensor:
    """images uint8 (B, 3, H, W) -> float32 (B, 3, 299, 299), in about [-1, 1]. Raises ValueError for other types.

    tf1: source index i in / out (no half-pixel shift, no antialiasing), (x - 128) / 128; what ADM and torch-fidelity do.
    pytorch-fid: half-pixel bilinear, 2 x / 255 - 1.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Inception needs uint8 images (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
    x = images.float()
    if resize == "pytorch-fid":
        return 2 * nn.functional.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) - 1
    if resize != "tf1":
        raise ValueError(f"resize is {resize!r}; it must be tf1 or pytorch-fid")
    for dim in (3, 2):  # the width first, as TensorFlow's ResizeBilinear rounds it
        length = x.shape[dim]
        index = torch.arange(299, device=x.device, dtype=torch.float32) * torch.tensor(length / 299)
        low = index.long()
        left, right = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=length - 1))
        x = left + (right - left) * (index - low).view(-1, *[1] * (3 - dim))
    return (x - 128) / 128


def load_inception(folder: str, device: torch.device) -> InceptionV3:
    """The official file from `folder` or torch hub's cache. Raises UserError."""
    return load_official(InceptionV3(), "inception", folder).to(device, memory_format=torch.channels_last)


@torch.no_grad()
def inception_features(model: InceptionV3, images: Tensor, resize: str = "tf1") -> Tensor:
    """images uint8 (B, 3, H, W) -> pool3 float32 (B, 2048), on the CPU; without TF32, which would show in FID's digits."""
    x = inception_input(images.to(model.fc.weight.device), resize)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return model(x.contiguous(memory_format=torch.channels_last)).cpu()
