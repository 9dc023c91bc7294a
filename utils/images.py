"""Image files: which ones a folder has, how they are read and cropped; grids of pictures."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from utils.files import atomic_write

# Of formats that Pillow reads.
SUFFIXES = ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .jp2 .avif".split()
# A folder that holds one of these belongs to a run, and its pictures are not data.
RUN_MARKERS = {"log.jsonl", "tokenizer.pt"}
# Folders whose names begin like this are made by programs, such as .ipynb_checkpoints and @eaDir.
HIDDEN_PREFIXES = (".", "@")


def to_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float in [-1, 1], clipped -> uint8 in [0, 255], rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


def list_images(folder: Path, recursive: bool) -> tuple[list[str], Counter]:
    """Returns sorted paths of the image files in a folder, and counts of other files by suffix.

    With `recursive` folders below count, too, each once even if links between them form a circle.
    Hidden files and folders, folders of runs, pipes and broken links are skipped.
    """
    paths = []
    skipped = Counter()
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen or RUN_MARKERS & set(names):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(HIDDEN_PREFIXES)]
        for name in names:
            path = os.path.join(root, name)
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith(".") or not os.path.isfile(path):
                continue
            if suffix in SUFFIXES:
                paths.append(path)
            else:
                skipped[suffix or name] += 1
        if not recursive:
            break
    return sorted(paths), skipped


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop: halve while twice too large, resize the short side to `size`, crop the center.

    (read_image decodes large JPEGs smaller before that, which ADM does not do.)
    """
    while min(image.size) >= 2 * size:
        halved = (image.width // 2, image.height // 2)
        image = image.resize(halved, Image.Resampling.BOX)
    scale = size / min(image.size)
    width = round(image.width * scale)
    height = round(image.height * scale)
    if width * height > 2 * Image.MAX_IMAGE_PIXELS:  # where Pillow also refuses to go on
        raise ValueError(
            f"it is too long and narrow: with a short side of {size} px it would have "
            f"{width} x {height} px"
        )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left = (width - size) // 2
    top = (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path: str | Path, size: int = 0) -> Image.Image:
    """Any file that Pillow reads as upright 8-bit RGB, cropped to `size` px if it is given.

    What is transparent becomes white, as in a browser. Raises OSError if the file is not readable.
    """
    try:
        with Image.open(path) as image:
            if size:  # JPEGs are decoded up to 8 times smaller, but at least at twice the size
                image.draft("RGB", (2 * size, 2 * size))
            image.load()
            image = convert_to_rgb(turn_upright(image))
        return center_crop(image, size) if size else image
    except Exception as error:  # Pillow raises a dozen kinds of errors for damaged files
        raise OSError(f"{path} is not a readable image: {error}") from error


def turn_upright(image: Image.Image) -> Image.Image:
    """Apply the camera's orientation; an image whose EXIF data is damaged stays as it is."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of type {image.mode}; only 8 and 16 bits are understood")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """Returns uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def write_grid(rows: Tensor, path: str | Path) -> None:
    """Images uint8 (rows, columns, 3, S, S) -> a PNG. Images under 64 px are enlarged."""
    zoom = max(1, round(64 / rows.shape[-1]))
    pixels = rows.cpu().permute(0, 3, 1, 4, 2)  # rows, S, columns, S, 3
    pixels = pixels.flatten(2, 3).flatten(0, 1).contiguous()
    image = Image.fromarray(pixels.numpy())
    image = ImageOps.scale(image, zoom, Image.Resampling.NEAREST)
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")
