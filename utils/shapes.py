"""The built-in images: labeled shapes, drawn on demand, so that the default run needs no data."""

import hashlib
import math
from functools import cached_property

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset


def polygon(
    num_corners: int, radii: tuple[float, ...] = (1.0,), start: float = -math.pi / 2
) -> np.ndarray:
    """Points (num_corners, 2) around the origin. The radii are used in turn."""
    angles = start + 2 * math.pi * np.arange(num_corners) / num_corners
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return points * np.resize(radii, num_corners)[:, None]


def heart() -> np.ndarray:
    """Points (48, 2) of a well-known curve."""
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], axis=1) / 16.5


# fmt: off
DISC = polygon(48)
PLUS = np.array([
    (-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1),
    (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1),
]) / 3
ARROW = np.array([
    (0, -1), (0.9, 0), (0.35, 0), (0.35, 1), (-0.35, 1), (-0.35, 0), (-0.9, 0),
])
HOURGLASS = np.array([(-0.8, -1), (0.8, -1), (-0.8, 1), (0.8, 1)])
# fmt: on

# Each class has an outline and perhaps a hole, in units of the shape's radius; y points down.
SHAPES = {
    "circle": [DISC],
    "square": [1.1 * polygon(4, start=math.pi / 4)],
    "triangle": [1.1 * polygon(3)],
    "star": [polygon(10, (1.15, 0.5))],
    "plus": [PLUS],
    "ring": [DISC, 0.5 * DISC],
    "heart": [heart()],
    "moon": [DISC, 0.8 * DISC + [0.5, 0]],
    "arrow": [ARROW],
    "hourglass": [HOURGLASS],
}


class Shapes(Dataset):
    """A bright shape of random color, size, angle and place on a dark color gradient.

    Items are (uint8 (3, size, size), label in 0..9); image i is a function of i.
    """

    classes = list(SHAPES)
    fingerprint = hashlib.sha256(b"built-in shapes").hexdigest()

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return 6_000

    def describe(self) -> str:
        return f"{len(self)} built-in shapes in {len(self.classes)} classes"

    @cached_property
    def labels(self) -> list[int]:
        """The label of each image, which is the first number that `read` draws."""
        draws = (np.random.default_rng(i).integers(len(SHAPES)) for i in range(len(self)))
        return [int(label) for label in draws]

    def read(self, index: int) -> tuple[Tensor, int]:
        """Draw image number `index`."""
        rng = np.random.default_rng(index)
        label = int(rng.integers(len(SHAPES)))
        radius = rng.uniform(0.3, 0.4)
        angle = rng.uniform(-0.3, 0.3)
        hue = rng.uniform(0, 1)
        center = 0.5 + rng.uniform(-1, 1, 2) * (0.46 - radius)
        shape = SHAPES[self.classes[label]]
        alpha = draw_shape(shape, radius, angle, center, self.size)[..., None]
        phases = 2 * math.pi * (hue + np.array([0, 1 / 3, 2 / 3]))
        color = 0.35 + 0.65 * (0.5 + 0.5 * np.cos(phases))
        background = color_gradient(
            rng.uniform(0, 0.3, (2, 3)), rng.uniform(0, 2 * math.pi), self.size
        )
        pixels = np.rint(255 * (background + alpha * (color - background))).astype(np.uint8)
        return torch.from_numpy(pixels).permute(2, 0, 1), label

    __getitem__ = read


def draw_shape(
    shape: list[np.ndarray], radius: float, angle: float, center: np.ndarray, size: int
) -> np.ndarray:
    """How much of each pixel the shape covers, in [0, 1], (size, size), from 4 x 4 samples."""
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    canvas = Image.new("L", (4 * size, 4 * size))
    for points, fill in zip(shape, (255, 0)):  # the outline, then the hole
        corners = (radius * points @ rotation + center) * 4 * size
        ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in corners], fill=fill)
    return np.asarray(canvas.reduce(4), np.float32) / 255


def color_gradient(colors: np.ndarray, direction: float, size: int) -> np.ndarray:
    """From colors[0] to colors[1] along a direction, (size, size, 3)."""
    coords = (np.arange(size) + 0.5) / size - 0.5
    x, y = coords, coords[:, None]
    position = 0.5 + (math.cos(direction) * x + math.sin(direction) * y) / math.sqrt(2)
    return colors[0] + (colors[1] - colors[0]) * position[..., None]
