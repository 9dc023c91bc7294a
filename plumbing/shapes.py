"""The built-in images: labelled shapes, drawn when they are asked for, so that the default run needs no data."""

import hashlib
import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset


def polygon(corners: int, radii: tuple[float, ...] = (1.0,), start: float = -math.pi / 2) -> np.ndarray:
    """(corners, 2) points around the origin, with the radii in turn."""
    angles = start + 2 * math.pi * np.arange(corners) / corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.resize(radii, corners)[:, None]


DISC, T = polygon(48), np.linspace(0, 2 * math.pi, 48, endpoint=False)
HEART = [16 * np.sin(T) ** 3, -(13 * np.cos(T) - 5 * np.cos(2 * T) - 2 * np.cos(3 * T) - np.cos(4 * T))]
PLUS = [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]
SHAPES = {  # name: outline, and the hole if there is one, in units of the radius, y down
    "circle": [DISC],
    "square": [1.1 * polygon(4, start=math.pi / 4)],
    "triangle": [1.1 * polygon(3)],
    "star": [polygon(10, (1.15, 0.5))],
    "plus": [np.array(PLUS) / 3],
    "ring": [DISC, 0.5 * DISC],
    "heart": [np.stack(HEART, axis=1) / 16.5],
    "moon": [DISC, 0.8 * DISC + [0.5, 0]],
    "arrow": [np.array([(0, -1), (0.9, 0), (0.35, 0), (0.35, 1), (-0.35, 1), (-0.35, 0), (-0.9, 0)])],
    "hourglass": [np.array([(-0.8, -1), (0.8, -1), (-0.8, 1), (0.8, 1)])],
}


class Shapes(Dataset):
    """A bright shape of random colour, size, angle and place on a dark ramp. item: uint8 (3, size, size), label in 0..9."""

    classes, stamp = list(SHAPES), hashlib.sha256(b"built-in shapes").hexdigest()

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return 6_000

    def read(self, index: int) -> tuple[Tensor, int]:
        rng = np.random.default_rng(index)
        label = int(rng.integers(len(SHAPES)))
        radius, angle, hue = rng.uniform(0.3, 0.4), rng.uniform(-0.3, 0.3), rng.uniform(0, 1)
        center = 0.5 + rng.uniform(-1, 1, 2) * (0.46 - radius)
        rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        canvas = Image.new("L", (4 * self.size, 4 * self.size))
        for points, ink in zip(SHAPES[self.classes[label]], (255, 0)):
            corners = (radius * points @ rotation + center) * 4 * self.size
            ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in corners], fill=ink)
        cover = np.asarray(canvas.reduce(4), np.float32)[..., None] / 255  # (size, size, 1), antialiased by 4 x 4 samples
        color = 0.35 + 0.65 * (0.5 + 0.5 * np.cos(2 * math.pi * (hue + np.array([0, 1 / 3, 2 / 3]))))
        ends, direction = rng.uniform(0, 0.3, (2, 3)), rng.uniform(0, 2 * math.pi)
        ticks = (np.arange(self.size) + 0.5) / self.size - 0.5
        ramp = 0.5 + (math.cos(direction) * ticks + math.sin(direction) * ticks[:, None]) / math.sqrt(2)
        background = ends[0] + (ends[1] - ends[0]) * ramp[..., None]
        pixels = background + cover * (color - background)
        return torch.from_numpy(np.rint(255 * pixels).astype(np.uint8)).permute(2, 0, 1), label

    __getitem__ = read
