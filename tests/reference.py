"""What the tests share.

Reference arrays of public implementations, deterministic weights, tiny data, the command lines.
"""

import importlib
import io
import json
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
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
    """The weights that the reference outputs were computed with.

    They are normal numbers, seeded by the CRC-32 of the key and scaled by kind.
    """
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
    """A folder of files of the official formats and names, with deterministic contents."""
    root.mkdir(exist_ok=True)
    for file in files:
        shapes = contract(file)
        state = {key: fill(key, shape) for key, shape in shapes.items() if "classifier" not in key}
        if file.startswith("lpips"):
            state = {key: value.abs() for key, value in state.items()}
        state |= {
            key: torch.zeros(1).expand(shape)
            for key, shape in shapes.items()
            if "classifier" in key
        }  # small on disk
        torch.save(state, root / f"{file}.pth")
    return root


def low_rank_features(arguments: np.ndarray) -> torch.Tensor:
    """The (n, d) features that a reference value was computed from.

    0.4 + 0.2 (scale Z W / sqrt(rank) + 0.5 E) + shift M, with Z, W, E and M normal.
    """
    seed_basis, seed_rows, n, d, rank = (int(x) for x in arguments[:5])
    scale, shift = arguments[5:]
    basis, rows = np.random.default_rng(seed_basis), np.random.default_rng(seed_rows)
    w, m = basis.standard_normal((rank, d)), basis.standard_normal(d)
    z, e = rows.standard_normal((n, rank)), rows.standard_normal((n, d))
    features = 0.4 + 0.2 * (scale * (z @ w) / np.sqrt(rank) + 0.5 * e) + shift * m
    return torch.from_numpy(features.astype(np.float32))


def imagenet_normalized(name: str) -> torch.Tensor:
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
            Image.fromarray(pixels).resize((size, size + 2), Image.Resampling.BICUBIC).save(
                folder / f"{i}.png"
            )
    return root


# A run that takes seconds: 16-px images, N = 16, L = 4.
TINY = (
    "--preset toy --image_size 16 --patch_size 4 --tokens 4 --channels 4 --batch_size 8 "
    "--generator_batch_size 8 --eval_images 8 --sampling_steps 4"
)
TINY_STEPS = (
    "--tokenizer_steps 20 --decoder_steps 20 --generator_steps 20 --log_every 10 --save_every 10"
)
# Every term of the objective, and every recipe with what it needs at that size.
ALL_TERMS = "--perceptual_weight 1 --adversarial_weight 0.2 --discriminator_start 1"
RECIPES = ["mactok", "maetok", "ldetok --tokens 0", "aligntok --tokens 0"]

ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SERVER_ENV = ENV | {"PYTHONPATH": str(ROOT)}


def command(script: str, *words: str, processes: int = 1) -> list[str]:
    """argv of a script of the project, under torchrun when processes > 1."""
    argv = [sys.executable]
    if processes > 1:
        argv += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*argv, str(ROOT / script), *(word for text in words for word in str(text).split())]


def shell(script: str, *words: str) -> subprocess.CompletedProcess:
    """Run a script of the project to its end as a user would, on one thread."""
    argv = command(script, *words)
    return subprocess.run(argv, capture_output=True, text=True, env=ENV)


# Processes that start with the project's modules imported: the server imports them once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train", "sample", "evaluate"])


def launch(
    script: str, *words: str, processes: int = 1, prepare: Callable | None = None
) -> subprocess.CompletedProcess:
    """Run a script in new processes, which find the variables that torchrun would set.

    prepare is called first in each of them. As under torchrun, all end when one fails. The result
    has the first failure's exit code, or 0.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes}
    argv = command(script, *words)[1:]
    with tempfile.TemporaryDirectory() as folder:
        children = []
        # Without this, each process would import pytest as the program that started it.
        no_program = {"__main__": ModuleType("__main__")}
        with mock.patch.dict(sys.modules, no_program), mock.patch.dict(os.environ, SERVER_ENV):
            for rank in range(processes):
                env = variables | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
                arguments = (argv, env, f"{folder}/{rank}", prepare)
                children.append(PROCESSES.Process(target=run_here, args=arguments))
                children[-1].start()
        ended = multiprocessing.connection.wait
        failed = None
        waiting = {child.sentinel: child for child in children}
        while waiting:
            for sentinel in ended(list(waiting)):
                child = waiting.pop(sentinel)
                child.join()
                if child.exitcode and failed is None:
                    failed = child.exitcode
                    for other in waiting.values():
                        other.terminate()
        texts = [
            "".join(Path(folder, f"{rank}.{name}").read_text() for rank in range(processes))
            for name in ("out", "err")
        ]
    return subprocess.CompletedProcess(argv, failed or 0, *texts)


def run_here(argv: list[str], env: dict, output: str, prepare: Callable | None) -> None:
    """What a process of `launch` does."""
    from utils.console import run_main

    # Loading workers start as in any program, not from the server.
    multiprocessing.set_start_method(None, force=True)
    os.environ |= {name: str(value) for name, value in env.items()}
    for descriptor, name in ((1, "out"), (2, "err")):
        with open(f"{output}.{name}", "w") as file:
            os.dup2(file.fileno(), descriptor)
    torch.set_num_threads(1)
    sys.argv = argv
    if prepare is not None:
        prepare()
    run_main(importlib.import_module(Path(argv[0]).stem).main)


def call(script: str, *words: str) -> subprocess.CompletedProcess:
    """The same in this process, which saves the start of another."""
    from utils.console import run_main

    argv = command(script, *words)[1:]
    main = importlib.import_module(Path(script).stem).main
    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    code = 0
    with redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "argv", argv):
        try:
            run_main(main)
        except SystemExit as stop:
            code = stop.code
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return subprocess.CompletedProcess(argv, code, *texts)


def succeed(
    script: str, *words: str, processes: int = 1, prepare: Callable | None = None
) -> subprocess.CompletedProcess:
    """Run a script that must not fail, in this process if one is enough."""
    if processes == 1:
        done = call(script, *words)
    else:
        done = launch(script, *words, processes=processes, prepare=prepare)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def refuse(script: str, *words: str) -> str:
    """Run a script that must end with exit code 2 and one sentence -> that sentence."""
    done = call(script, *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    *warnings, error = done.stderr.splitlines()
    assert error.startswith("error: ") and all(line.startswith("warning: ") for line in warnings)
    return error


# Losses of different process counts agree up to this.
PROCESS_COUNT_TOLERANCE = 1e-5


def log_lines(out: Path, stage: str) -> list[dict]:
    """The lines of a stage by step; of a resumed run the last one of a step counts."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["stage"] == stage and "loss" in line]
    return list({line["step"]: line for line in lines}.values())


def same_weights(a: Path, b: Path, tolerance: float = 0.0) -> None:
    """Compare the tensors of two checkpoints, optimizer and averages included."""

    def compare(x, y):
        assert type(x) is type(y)
        if isinstance(x, dict):
            assert x.keys() == y.keys()
            [compare(x[key], y[key]) for key in x if key not in ("config", "identity")]
        elif isinstance(x, list | tuple):
            assert len(x) == len(y)
            [compare(a, b) for a, b in zip(x, y)]
        elif isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)
        else:
            assert x == y

    compare(torch.load(a, weights_only=True), torch.load(b, weights_only=True))


def close_weights(ours: dict, theirs: dict, tolerance: float = PROCESS_COUNT_TOLERANCE) -> None:
    """Compare two state dicts up to a tolerance.

    Attention is blind to its key bias, whose gradient is rounding noise that Adam blows up.
    """
    for key, value in theirs.items():
        if key.endswith("adaptive_weight.value"):  # a ratio of gradients through VGG's max pools
            torch.testing.assert_close(ours[key], value, atol=0, rtol=1e-2)
            continue
        acting = torch.ones(len(value), dtype=torch.bool) if value.ndim else ...
        if key.endswith("attn.qkv.bias"):
            acting.view(3, -1)[1] = False
        expected = value[acting]
        torch.testing.assert_close(ours[key][acting], expected, atol=tolerance, rtol=0)


def die_after_save(stage: str, step_to_die: int = 10) -> None:
    """From now on, train.py is killed after it has saved this step of a stage.

    In the stage latents it is killed at the second batch.
    """
    import train

    save, cache_latents, to_float = train.save, train.cache_latents, train.to_float
    batches = []

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def save_then_die(checkpoint, step, context):
        save(checkpoint, step, context)
        if checkpoint.metadata["stage"] == stage and step == step_to_die:
            die()

    def die_in_the_second_batch(images):
        batches.append(images)
        if len(batches) == 2:
            die()
        return to_float(images)

    def cache_latents_and_die(*arguments):
        train.to_float = die_in_the_second_batch
        return cache_latents(*arguments)

    train.save = save_then_die
    if stage == "latents":
        train.cache_latents = cache_latents_and_die
