"""What the tests share: reference arrays of public implementations, deterministic weights, tiny data, the command lines."""

import importlib
import io
import json
import os
import subprocess
import sys
import zlib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

ARRAYS = np.load(Path(__file__).with_name("reference.npz"))  # see make_reference.py
FID_ARRAYS = np.load(Path(__file__).with_name("reference_fid.npz"))
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def array(name: str) -> torch.Tensor:
    return torch.from_numpy(ARRAYS[name])


def contract(name: str) -> dict[str, list[int]]:
    """Key -> shape of an official weight file."""
    arrays = ARRAYS if f"contract/{name}" in ARRAYS else FID_ARRAYS
    return json.loads(str(arrays[f"contract/{name}"]))


def fill(key: str, shape: list[int]) -> torch.Tensor:
    """The weights that the reference outputs were computed with: normal numbers seeded by the key's CRC-32, scaled by kind."""
    normal = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    last = key.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if last == "running_var":
        values = 1 + 0.1 * np.abs(normal)
    elif last in ("pos_embed", "cls_token", "mask_token", "register_tokens"):
        values = 0.02 * normal
    elif normal.ndim >= 2:
        values = normal * np.sqrt((2 if normal.ndim == 4 else 1) / np.prod(shape[1:]))
    else:
        values = 0.1 * normal + (1 if last in ("weight", "gamma") else 0)
    return torch.from_numpy(values.astype(np.float32))


def filled(name: str) -> dict[str, torch.Tensor]:
    """A state dict of the official format with deterministic contents."""
    return {key: fill(key, shape) for key, shape in contract(name).items()}


def official_folder(root: Path, *files: str) -> Path:
    """A folder of files of the official formats and names, with deterministic contents: those of their contracts."""
    root.mkdir(exist_ok=True)
    for file in files:
        shapes = contract(file)
        state = {key: fill(key, shape) for key, shape in shapes.items() if "classifier" not in key}
        if file.startswith("lpips"):
            state = {key: value.abs() for key, value in state.items()}
        state |= {key: torch.zeros(1).expand(shape) for key, shape in shapes.items() if "classifier" in key}  # small on disk
        torch.save(state, root / f"{file}.pth")
    return root


def low_rank_features(arguments: np.ndarray) -> torch.Tensor:
    """The (n, d) features that a reference value was computed from: 0.4 + 0.2 (scale Z W / sqrt(rank) + 0.5 E) + shift M."""
    seed_basis, seed_rows, n, d, rank = (int(x) for x in arguments[:5])
    scale, shift = arguments[5:]
    basis, rows = np.random.default_rng(seed_basis), np.random.default_rng(seed_rows)
    w, m = basis.standard_normal((rank, d)), basis.standard_normal(d)
    z, e = rows.standard_normal((n, rank)), rows.standard_normal((n, d))
    features = 0.4 + 0.2 * (scale * (z @ w) / np.sqrt(rank) + 0.5 * e) + shift * m
    return torch.from_numpy(features.astype(np.float32))


def imagenet_normalised(name: str) -> torch.Tensor:
    """The stored image of a DINOv2 case as the network's input (1, 3, H, W)."""
    pixels = ARRAYS[name].astype(np.float64) / 255
    return torch.from_numpy((pixels - MEAN[:, None, None]) / STD[:, None, None]).float()[None]


def make_folder(root: Path, classes: int, per_class: int, size: int = 20) -> Path:
    """Small PNGs of smooth random colours; classes = 0 makes a flat folder."""
    for label in range(max(1, classes)):
        folder = root / f"class{label}" if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            rng = np.random.default_rng((label, i))
            pixels = rng.integers(0, 256, (3, 3, 3)).astype(np.uint8)
            Image.fromarray(pixels).resize((size, size + 2), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return root


# A run that takes seconds: 16-px images, N = 64, L = 4.
TINY = "--preset toy --image_size 16 --tokens 4 --channels 4 --batch_size 8 --sit_batch_size 8 --eval_images 8 --sample_steps 4"
TINY_STEPS = "--tokenizer_steps 20 --decoder_steps 20 --sit_steps 20 --log_every 10 --save_every 10"


ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(script: str, *words: str, processes: int = 1) -> list[str]:
    """argv of a script of the project, under torchrun when processes > 1."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, str(ROOT / script), *(word for text in words for word in str(text).split())]


def shell(script: str, *words: str, processes: int = 1) -> subprocess.CompletedProcess:
    """Run a script of the project to its end, on one thread per process."""
    return subprocess.run(command(script, *words, processes=processes), capture_output=True, text=True, env=ENV)


def call(script: str, *words: str) -> subprocess.CompletedProcess:
    """The same in this process, which saves the start of another."""
    from plumbing.run import command_line

    argv, main = command(script, *words)[1:], importlib.import_module(Path(script).stem).main
    texts = [io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in "oe"]
    with redirect_stdout(texts[0]), redirect_stderr(texts[1]), mock.patch.object(sys, "argv", argv):
        try:
            command_line(main)
            code = 0
        except SystemExit as stop:
            code = stop.code
    return subprocess.CompletedProcess(argv, code, *(text.buffer.getvalue().decode() for text in texts))


def succeed(script: str, *words: str, processes: int = 1) -> subprocess.CompletedProcess:
    done = shell(script, *words, processes=processes) if processes > 1 else call(script, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


PROCESS_COUNT_TOLERANCE = 1e-5


def log_lines(out, stage):
    """The lines of a stage by step; of a resumed run the last one of a step counts."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return list({line["step"]: line for line in lines if line["stage"] == stage and "loss" in line}.values())


def same_weights(a, b, tolerance=0.0):
    """Compare the tensors of two checkpoints, optimizer and moving average included."""

    def compare(x, y):
        assert type(x) is type(y)
        if isinstance(x, dict):
            assert x.keys() == y.keys()
            [compare(x[key], y[key]) for key in x if key != "config"]
        elif isinstance(x, list | tuple):
            assert len(x) == len(y)
            [compare(a, b) for a, b in zip(x, y)]
        elif isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)
        else:
            assert x == y

    from plumbing.run import load_checkpoint

    compare(load_checkpoint(a), load_checkpoint(b))


def close_weights(ours, theirs):
    """Equal to PROCESS_COUNT_TOLERANCE. Attention is blind to its key bias, whose gradient is rounding noise that Adam blows up."""
    for key, value in theirs.items():
        if key == "weight" and value.ndim == 0:  # of the adversary: a ratio of gradients through VGG's max pools
            torch.testing.assert_close(ours[key], value, atol=0, rtol=1e-2)
            continue
        acting = torch.ones(len(value), dtype=torch.bool) if value.ndim else ...
        if key.endswith("attn.qkv.bias"):
            acting.view(3, -1)[1] = False
        torch.testing.assert_close(ours[key][acting], value[acting], atol=PROCESS_COUNT_TOLERANCE, rtol=0)


KILL_AFTER_SAVE = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
stage, save, batch = {stage!r}, train.State.save, train.to_float
def save_then_die(self):
    save(self)
    if self.stage == stage and self.step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
def die_in_latents(run):
    train.to_float = lambda images: os.kill(os.getpid(), signal.SIGKILL) if seen else seen.append(1) or batch(images)
    return cache_latents(run)
seen, cache_latents, train.State.save = [], train.cache_latents, save_then_die
if stage == "latents":
    train.cache_latents = die_in_latents
train.main(sys.argv[1:])
"""
