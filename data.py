"""What comes from outside and what goes back: images, latents and weights on disk, processes, errors.

Shapes, ImageFolder   dataset[i] -> (uint8 (3, S, S), label, bad): labelled images; bad is i if its file was unreadable
loader                batches of this process's rows of each global batch, from any step on
LatentCache           the whole data set as posterior moments, in one memory-mapped file
OFFICIAL              weight files of other projects: `find_official` fetches what is missing, `fill` loads one, strictly
load_checkpoint, save_checkpoint, write_image, Processes, command_line
"""

import argparse
import difflib
import errno
import hashlib
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


# ---------------------------------------------------------------------------------------------------------------------
# Errors and processes


class UserError(Exception):
    """Something the user can mend; shown as one sentence, without a traceback, with exit code 2."""


def command_line(main: Callable[[list[str]], None]) -> None:
    """Run main(arguments); UserError and what the system refuses become one line on stderr and exit code 2."""
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        # The processes of a machine find the same UserError, and the first one says it.
        if isinstance(error, OSError) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, and names the nearest flag for an unknown one."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def parse_args(self, arguments: list[str]) -> argparse.Namespace:
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1)
            raise UserError(
                f"unknown argument {flag}" + (f"; did you mean {near[0]}?" if near else "; --help lists them")
            )
        return known

    def error(self, message: str) -> None:
        raise UserError(message)


@contextmanager
def as_user_error(subject: str = ""):
    """Turn what a component says of the user's values or files into a UserError."""
    try:
        yield
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{subject}{str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those of torchrun. One process needs no environment at all."""

    rank: int
    world: int
    device: torch.device

    @staticmethod
    def start() -> "Processes":
        """Join torchrun's process group if there is one: nccl for CUDA tensors, gloo for those on the CPU."""
        cuda = torch.cuda.is_available()
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            if local >= torch.cuda.device_count():
                raise UserError(f"process {local} has no GPU of its own: this machine has {torch.cuda.device_count()}")
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
        if "RANK" not in os.environ:
            return Processes(0, 1, device)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        return Processes(dist.get_rank(), dist.get_world_size(), device)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's part of range(count): contiguous, sizes differing by at most one."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, here: bool) -> bool:
        """Whether it is true in any process. The flag travels between CPUs, so no GPU is waited for."""
        return bool(self.sum(torch.tensor(float(here))) > 0)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def progress(steps, label: str, processes: Processes, **settings) -> tqdm:
    """A progress bar on rank 0; where stderr is not a terminal it writes a line every half minute."""
    seconds = 0.1 if sys.stderr.isatty() else 30
    return tqdm(steps, desc=label, mininterval=seconds, disable=not processes.first, **settings)


# ---------------------------------------------------------------------------------------------------------------------
# Images


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float [-1, 1], clipped -> uint8 [0, 255], rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The ADM crop: halve with a box filter while twice too large, resize the short side (bicubic), crop the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path: str | Path) -> Image.Image:
    """Any file that Pillow reads, as upright 8-bit RGB. Raises OSError when it cannot be read to its end."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # Pillow raises a dozen kinds on damaged files
        raise OSError(str(error)) from error


def image_tensor(image: Image.Image) -> Tensor:
    """RGB image -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class ImageFolder(Dataset):
    """Images of a folder: one sub-folder per class (sorted by name), or flat and without classes.

    item: uint8 (3, size, size), label (0 in a flat folder, which has no classes), and -1, or the item's own index if its
    file could not be read and the next readable one stands in for it. Raises UserError for a folder without images.
    """

    def __init__(self, root: str | Path, size: int):
        self.root, self.size = Path(root), size
        if not self.root.is_dir():
            raise UserError(f"data folder {root} does not exist or is not a folder")
        self.classes = sorted(
            entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")
        )
        found = [(name, path) for name in self.classes for path in list_images(self.root / name, deep=True)]
        loose = list_images(self.root, deep=False)
        if found and loose:
            raise UserError(f"data folder {root} has class folders and loose images such as {loose[0]}; keep one kind")
        if not found and not loose:
            raise UserError(f"data folder {root} has no images (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
        used = {name for name, _ in found}
        self.classes = [name for name in self.classes if name in used]
        number = {name: label for label, name in enumerate(self.classes)}
        self.paths = [path for _, path in found] or loose
        self.labels = [number[name] for name, _ in found] or [0] * len(loose)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        for shift in range(100):
            i = (index + shift) % len(self)
            try:
                image = read_image(self.paths[i])
            except OSError:
                continue
            return image_tensor(center_crop(image, self.size)), self.labels[i], -1 if shift == 0 else index
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8), self.labels[index], index

    def name(self, index: int) -> str:
        return self.paths[index]


def list_images(folder: Path, deep: bool) -> list[str]:
    """Paths of image files by suffix, sorted; with `deep` also in folders below."""
    walk = os.walk(folder, followlinks=True) if deep else [next(os.walk(folder))]
    return sorted(os.path.join(at, name) for at, _, names in walk for name in names if is_image_name(name))


def is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def polygon(corners: int, radii: tuple[float, ...] = (1.0,), start: float = -math.pi / 2) -> np.ndarray:
    """(corners, 2) points around the origin, with the radii in turn."""
    angles = start + 2 * math.pi * np.arange(corners) / corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.resize(radii, corners)[:, None]


def heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], axis=1) / 16.5


DISC, NO_HOLE = polygon(48), np.zeros((0, 2))
PLUS = [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]
ARROW = [(0, -1), (0.9, 0), (0.35, 0), (0.35, 1), (-0.35, 1), (-0.35, 0), (-0.9, 0)]
SHAPES = {  # name: outline and hole, in units of the radius, y down
    "circle": (DISC, NO_HOLE),
    "square": (1.1 * polygon(4, start=math.pi / 4), NO_HOLE),
    "triangle": (1.1 * polygon(3), NO_HOLE),
    "star": (polygon(10, (1.15, 0.5)), NO_HOLE),
    "plus": (np.array(PLUS) / 3, NO_HOLE),
    "ring": (DISC, 0.5 * DISC),
    "heart": (heart(), NO_HOLE),
    "moon": (DISC, 0.8 * DISC + [0.5, 0]),
    "arrow": (np.array(ARROW), NO_HOLE),
    "hourglass": (np.array([(-0.8, -1), (0.8, -1), (-0.8, 1), (0.8, 1)]), NO_HOLE),
}


class Shapes(Dataset):
    """Procedural labelled images: one bright shape of random colour, size, angle and place on a dark smooth background.

    item: uint8 (3, size, size), label in 0..9, -1. Item i is the same on every machine; `draw` also gives its mask.
    """

    classes = list(SHAPES)

    def __init__(self, size: int, length: int = 6_000):
        self.size, self.length = size, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image, label, _ = self.draw(index)
        return image, label, -1

    def name(self, index: int) -> str:
        return f"shape {index}"

    def draw(self, index: int) -> tuple[Tensor, int, Tensor]:
        """-> image uint8 (3, size, size), label, foreground bool (size, size)."""
        rng = np.random.default_rng(index)
        label = int(rng.integers(len(SHAPES)))
        radius, angle, hue = rng.uniform(0.3, 0.4), rng.uniform(-0.3, 0.3), rng.uniform(0, 1)
        center = 0.5 + rng.uniform(-1, 1, 2) * (0.46 - radius)
        cover = draw_shape(SHAPES[self.classes[label]], radius, angle, center, self.size)[..., None]
        color = 0.35 + 0.65 * (0.5 + 0.5 * np.cos(2 * math.pi * (hue + np.array([0, 1 / 3, 2 / 3]))))
        ends, direction = rng.uniform(0, 0.3, (2, 3)), rng.uniform(0, 2 * math.pi)
        ticks = (np.arange(self.size) + 0.5) / self.size - 0.5
        ramp = 0.5 + (math.cos(direction) * ticks + math.sin(direction) * ticks[:, None]) / math.sqrt(2)
        background = ends[0] + (ends[1] - ends[0]) * ramp[..., None]
        pixels = background + cover * (color - background)
        image = torch.from_numpy(np.rint(255 * pixels).astype(np.uint8)).permute(2, 0, 1)
        return image, label, torch.from_numpy(cover[..., 0] > 0.5)


def draw_shape(
    shape: tuple[np.ndarray, np.ndarray], radius: float, angle: float, center: np.ndarray, size: int
) -> np.ndarray:
    """Coverage of each pixel by the shape in [0, 1], float32 (size, size), antialiased by 4 x 4 samples."""
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    canvas = Image.new("L", (4 * size, 4 * size))
    pen = ImageDraw.Draw(canvas)
    for points, ink in zip(shape, (255, 0)):
        if len(points):
            pen.polygon([tuple(p) for p in (radius * points @ rotation + center) * 4 * size], fill=ink)
    return np.asarray(canvas.reduce(4), np.float32) / 255


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def split(count: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Items to train on, and items held out: evenly spaced, at most a tenth; with under 10 images, all serve as both."""
    held_out = min(held_out, count // 10)
    if held_out == 0:
        return np.arange(count), np.arange(count)
    held = spread(count, held_out)
    return np.setdiff1d(np.arange(count), held), held


def spread(count: int, picks: int) -> np.ndarray:
    """At most `picks` of range(count), evenly spaced from the first to the last."""
    return np.linspace(0, count - 1, min(picks, count)).round().astype(int)


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def batch_indices(count: int, batch: int, seed: int, step: int, rows: slice) -> list[int]:
    """The items that `rows` of global batch `step` hold: a new permutation per epoch, no item lost between epochs."""
    positions = np.arange(step * batch, (step + 1) * batch)[rows]
    return [int(epoch_order(count, seed, int(p // count))[p % count]) for p in positions]


class BatchSampler(Sampler):
    """Endless lists of items for this process, from `step` on."""

    def __init__(self, items: np.ndarray, batch: int, seed: int, step: int, rows: slice):
        self.items, self.batch, self.seed, self.step, self.rows = items, batch, seed, step, rows

    def __iter__(self) -> Iterator[list[int]]:
        step = self.step
        while True:
            yield [int(self.items[i]) for i in batch_indices(len(self.items), self.batch, self.seed, step, self.rows)]
            step += 1


def loader(dataset: Dataset, sampler: Sampler | list[list[int]], workers: int) -> DataLoader:
    """A DataLoader over lists of items: (uint8 (b, 3, S, S), labels (b,), bad (b,))."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=ignore_signals,
    )


def ignore_signals(worker: int) -> None:
    """Ctrl-C and torchrun signal the workers too; the training process still needs their batch to end its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class BadFiles:
    """The unreadable files of a data set: each is named once, and too many stop the run."""

    def __init__(self, dataset: Dataset):
        self.dataset, self.seen = dataset, set()

    def note(self, bad: Tensor) -> None:
        """Name the new ones of a batch's `bad` column."""
        for index in set(bad.tolist()) - {-1} - self.seen:
            self.seen.add(index)
            tqdm.write(f"warning: skipped {self.dataset.name(index)}: not a readable image", file=sys.stderr)

    def check(self, processes: Processes) -> int:
        """How many files all processes have found so far; UserError above 1 %. All processes must ask together."""
        found = [self.seen] * processes.world
        if processes.world > 1:
            dist.all_gather_object(found, self.seen)
        every = sorted(set().union(*found))
        if len(every) > 0.01 * len(self.dataset):
            raise UserError(
                f"{len(every)} of {len(self.dataset)} images cannot be read, more than 1 %; mend or remove them, "
                f"such as {self.dataset.name(every[0])}"
            )
        return len(every)


# ---------------------------------------------------------------------------------------------------------------------
# Files


@contextmanager
def replacing(path: str | Path):
    """Gives a temporary path beside `path`, which is renamed to `path` at the end, or removed if anything goes wrong."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        kept = "the previous one is kept" if path.exists() else "nothing was written"
        raise UserError(f"cannot write {path} ({reason}); {kept}, make room and run the same command again") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(content: dict, path: str | Path) -> None:
    """torch.save, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # how torch reports a failed write, without its cause
            raise OSError(errno.ENOSPC, "the disk is probably full") from error
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path: str | Path, mmap: bool = False) -> dict:
    """A dict of tensors and plain values, on the CPU. Pickled code is refused; every failure is a UserError.

    mmap reads only the parts that are used; files of other projects may be too old for it.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # released SiT checkpoints hold their arguments
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:
        pickled = "GLOBAL" in str(error)
        reason = "it holds pickled code, which is never run" if pickled else "it is truncated or not a PyTorch file"
        raise UserError(f"{path} cannot be loaded: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    return content


def write_text(text: str, path: str | Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_image(rows: Tensor, path: str | Path, min_side: int = 64) -> None:
    """uint8 (rows, columns, 3, S, S) -> a PNG grid; images under min_side px are enlarged by a whole factor."""
    height, width, _, side, _ = rows.shape
    zoom = max(1, round(min_side / side))
    pixels = rows.permute(0, 3, 1, 4, 2).reshape(height * side, width * side, 3)
    image = Image.fromarray(pixels.cpu().numpy())
    with replacing(path) as temporary:
        image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(temporary, format="PNG")


def state_hash(state: dict[str, Tensor]) -> str:
    """SHA-256 over names and bytes of a state dict, hexadecimal."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Official weight files


class Official(NamedTuple):
    """A weight file of another project."""

    file: str  # its name, in torch hub's cache and in a folder of one's own
    url: str
    sha256: str  # "" where none was published
    licence: str
    unused: tuple[str, ...] = ()  # keys with these parts may be in the file and are passed over


def dinov2(size: str, registers: str, sha256: str) -> Official:
    file = f"dinov2_vit{size}14{registers}_pretrain.pth"
    return Official(file, f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{size}14/{file}", sha256, "Apache-2.0")


# DINOv2's authors publish no hashes; these are the ones that finegrain-ai/refiners pins beside the same URLs.
OFFICIAL = {
    "dinov2_vits14": dinov2("s", "", "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    "dinov2_vitb14": dinov2("b", "", "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
    "dinov2_vitl14": dinov2("l", "", "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
    "dinov2_vits14_reg": dinov2("s", "_reg4", "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb"),
    "dinov2_vitb14_reg": dinov2("b", "_reg4", "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71"),
    "dinov2_vitl14_reg": dinov2("l", "_reg4", "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51"),
    "dino_vits16": Official(
        "dino_deitsmall16_pretrain.pth",
        "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
        "",  # no published hash was found
        "Apache-2.0",
    ),
    "vgg16": Official(
        "vgg16-397923af.pth",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        "BSD-3-Clause",
        ("classifier.",),
    ),
    "lpips_vgg": Official(
        "lpips_v0.1_vgg.pth",
        "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/082bb24f84c091ea94de2867d34c4544f68e0963/lpips/weights/v0.1/vgg.pth",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",  # of the file in that commit
        "BSD-2-Clause",
    ),
    "inception": Official(
        "pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        "Apache-2.0",
        ("num_batches_tracked",),
    ),
}


LPIPS_FILES = ("vgg16", "lpips_vgg")


def official_path(name: str, folder: str = "") -> Path:
    """Where an official file is: in `folder` if it is there, else in torch hub's cache, whether it is there or not."""
    if folder and not Path(folder).is_dir():
        raise UserError(f"--weights {folder} is not a folder")
    own, cache = Path(folder), Path(torch.hub.get_dir()) / "checkpoints"
    return (own if folder and (own / OFFICIAL[name].file).is_file() else cache) / OFFICIAL[name].file


def at_hand(folder: str, *names: str) -> bool:
    """Whether these official files are all there."""
    return all(official_path(name, folder).is_file() for name in names)


def find_official(names: list[str], folder: str, processes: Processes) -> None:
    """See that the files are there: rank 0 fetches what is missing into torch hub's cache. Raises UserError on all ranks."""
    failed = [""]
    if processes.first:
        try:
            for name in names:
                if not at_hand(folder, name):
                    download(OFFICIAL[name], official_path(name, folder))
        except UserError as error:
            failed = [str(error)]
        except OSError as error:
            failed = [
                f"cannot write into torch hub's cache ({error}); mend that, or give a folder of files: --weights FOLDER"
            ]
    if processes.world > 1:
        dist.broadcast_object_list(failed)
    if failed[0]:
        raise UserError(failed[0])
    missing = [OFFICIAL[name].file for name in names if not at_hand(folder, name)]
    if processes.any(bool(missing)):
        raise UserError(
            f"not all machines have {', '.join(missing) or 'the weight files'}: put them on a disk that all of them share "
            f"and give --weights FOLDER"
        )


def download(official: Official, path: Path) -> None:
    """Fetch a file, whole, with the right hash and readable, or not at all; a later call starts anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")  # another run may be fetching the same file
    try:
        with open(partial, "wb") as file:
            for chunk in chunks(official):
                file.write(chunk)
        sha256 = file_hash(partial)
        if official.sha256 not in ("", sha256):
            raise UserError(
                f"{official.url} gave a file with SHA-256 {sha256}, expected {official.sha256}; nothing was kept"
            )
        try:
            load_checkpoint(partial)
        except UserError:
            raise UserError(f"{official.url} gave what is not a PyTorch weight file; nothing was kept") from None
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def chunks(official: Official) -> Iterator[bytes]:
    """The bytes of official.url, with a progress bar. UserError when they cannot be had, all of them."""
    request = Request(official.url, headers={"User-Agent": "mactok"})  # some servers refuse Python's own name
    try:
        with urlopen(request, timeout=60) as source:
            total = int(source.headers.get("Content-Length") or 0)
            with tqdm(desc=official.file, total=total or None, unit="B", unit_scale=True) as bar:
                while chunk := source.read(1 << 20):
                    bar.update(len(chunk))
                    yield chunk
                if bar.n < total:
                    raise OSError(f"the connection broke after {bar.n} of {total} bytes")
    except (OSError, HTTPException) as error:
        raise UserError(
            f"cannot fetch {official.file} from {official.url} ({error}); "
            f"try again, or get it elsewhere and give its folder: --weights FOLDER"
        ) from error


def fill(network: nn.Module, name: str, folder: str = "") -> nn.Module:
    """Give a network the weights of an official file, whose keys, shapes and types must be its own; returns it frozen.

    In torch hub's cache it must also have the official hash; of one in `folder` it is only said that it has another.
    Raises UserError, with the hash and the first differing key.
    """
    official, path = OFFICIAL[name], official_path(name, folder)
    own = bool(folder) and path.parent == Path(folder)
    sha256 = file_hash(path)
    hashes = f"its SHA-256 is {sha256}, the official one's {official.sha256 or 'is not published'}"
    remedy = "" if own else "; delete it, and it is fetched again"
    try:
        state = load_checkpoint(path)
    except UserError as error:
        raise UserError(f"{error}; {hashes}{remedy}") from error
    wanted, found = kinds(network.state_dict(), official), kinds(state, official)
    for key in [*wanted, *found]:
        if wanted.get(key) != found.get(key):
            text = f"{key} is {found.get(key, 'absent')}, expected {wanted.get(key, 'absent')}"
            raise UserError(f"{path} is not {official.file}: {text}; {hashes}{remedy}")
    if official.sha256 not in ("", sha256):
        if not own:
            raise UserError(f"{path} is damaged: {hashes}{remedy}")
        warn_once(f"{path} is not the official file: {hashes}")
    network.load_state_dict({key: state[key] for key in found}, strict=False, assign=True)  # compared above
    return network.eval().requires_grad_(False)


def kinds(state: dict, official: Official) -> dict[str, str]:
    """{key: shape, and type if it is not float32} of what is used of a state dict."""
    used = {key: value for key, value in state.items() if not any(part in key for part in official.unused)}
    return {key: kind(value) for key, value in used.items()}


def kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)}" + ("" if value.dtype == torch.float32 else f" {value.dtype}")


@lru_cache
def warn_once(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Latents


class LatentCache(Dataset):
    """The data set as posterior moments: one file, a JSON header of HEADER bytes, then one record per image.

    record: mean and std, float16 (2, L, C) for the image and its mirror image, and the label. Opened memory-mapped, so the
    file may be larger than memory. The header holds the tokenizer's hash (`stamp`), latent_mean and latent_std (C,).
    """

    HEADER = 1 << 16

    def __init__(self, path: str | Path, stamp: str):
        try:
            with open(path, "rb") as file:
                self.header = json.loads(file.read(self.HEADER))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; run the stage latents first") from None
        except ValueError:
            raise UserError(f"{path} is not a latent cache; delete it and run the stage latents") from None
        if self.header["stamp"] != stamp:
            raise UserError(
                f"latent cache {path} is of another tokenizer or other data; delete it and run the stage latents"
            )
        record = self.record(*self.header["shape"])
        if os.path.getsize(path) != self.HEADER + self.header["count"] * record.itemsize:
            raise UserError(f"latent cache {path} is truncated; delete it and run the stage latents")
        self.rows = np.memmap(path, record, mode="r", offset=self.HEADER, shape=(self.header["count"],))

    @staticmethod
    def record(tokens: int, channels: int) -> np.dtype:
        moments = (2, tokens, channels)
        return np.dtype([("mean", "<f2", moments), ("std", "<f2", moments), ("label", "<i4")])

    @classmethod
    def write(cls, path: str | Path, first: int, mean: Tensor, std: Tensor, labels: Tensor) -> None:
        """Put records of moments (b, 2, L, C) and labels (b,) at row `first` of a file made by `seal`."""
        rows = np.empty(len(labels), cls.record(*mean.shape[2:]))
        rows["mean"], rows["std"], rows["label"] = mean.cpu().numpy(), std.cpu().numpy(), labels.numpy()
        with open(path, "r+b") as file:
            file.seek(cls.HEADER + first * rows.itemsize)
            file.write(rows.tobytes())

    @classmethod
    def seal(cls, path: str | Path, header: dict) -> None:
        """Write the header: {stamp, count, shape, latent_mean, latent_std}; makes the file where there is none."""
        with open(path, "r+b" if os.path.exists(path) else "wb") as file:
            file.write(json.dumps(header).encode().ljust(cls.HEADER))

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """-> mean, std float32 (b, 2, L, C), labels int64 (b,)."""
        rows = self.rows[indices]
        columns = (rows["mean"].astype(np.float32), rows["std"].astype(np.float32), rows["label"].astype(np.int64))
        return tuple(torch.from_numpy(column) for column in columns)
