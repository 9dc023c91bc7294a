"""What only a GPU can show: `python -m pytest -m gpu`, which tests/first_gpu.sh runs.

All runs are tiny and have every term of the objective.
"""

from functools import partial

import numpy as np
import pytest
import torch
from reference import (
    ALL_TERMS,
    RECIPES,
    TINY,
    close_weights,
    die_after_save,
    launch,
    log_lines,
    succeed,
)

import train
from utils.checkpoint import read_checkpoint
from utils.metric_log import MetricLog
from utils.muon import Muon
from utils.random import BatchRNG

GPU = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPU == "cuda" and not torch.cuda.is_available(), reason="there is no GPU"),
]
STEPS = "--tokenizer_steps 6 --decoder_steps 4 --generator_steps 6 --log_every 1 --save_every 3"


@pytest.fixture
def words(images, weights):
    return f"{TINY} {STEPS} {ALL_TERMS} --lr 1e-4 --data {images} --weights {weights}"


class CPURandom(BatchRNG):
    """The same numbers on all devices, whose own generators differ."""

    def __init__(self, seed, batch_size, rows, device):
        super().__init__(seed, batch_size, rows, torch.device("cpu"))
        self.target = device

    def rand(self, *shape):
        return super().rand(*shape).to(self.target)

    def randn(self, *shape):
        return super().randn(*shape).to(self.target)


def losses(out, stage: str) -> list[float]:
    return [line["loss"] for line in log_lines(out, stage)]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("precision, tolerance", [("float32", 2e-3), ("bf16", 3e-2)])
def test_losses_are_those_of_a_cpu(recipe, precision, tolerance, words, tmp_path, monkeypatch):
    """float32 has TF32's matrix products on a GPU, which keep three digits."""
    monkeypatch.setattr(train, "BatchRNG", CPURandom)
    words = f"{words} --recipe {recipe}"
    succeed("train.py", words, f"--out {tmp_path}/cpu --device cpu")
    succeed("train.py", words, f"--out {tmp_path}/gpu --device {GPU} --precision {precision}")
    for path in tmp_path.glob("cpu/*.pt"):
        expected = losses(tmp_path / "cpu", path.stem)
        assert losses(tmp_path / "gpu", path.stem) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_losses_are_the_plain_ones(recipe, words, tmp_path):
    words = f"{words} --recipe {recipe} --device {GPU} --precision float32"
    succeed("train.py", words, f"--out {tmp_path}/plain")
    succeed("train.py", words, f"--out {tmp_path}/compiled --compile")
    for path in tmp_path.glob("plain/*.pt"):
        expected = losses(tmp_path / "plain", path.stem)
        assert losses(tmp_path / "compiled", path.stem) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_step_waits_for_the_gpu(recipe, words, tmp_path, monkeypatch):
    """CUDA itself raises at an operation that waits, from a step's seed to its last line."""
    real_seed, real_end = train.step_seed, MetricLog.end_step

    def step_seed(*key):
        torch.cuda.set_sync_debug_mode("error")
        return real_seed(*key)

    def end_step(self):
        torch.cuda.set_sync_debug_mode("default")
        real_end(self)

    monkeypatch.setattr(train, "step_seed", step_seed)
    monkeypatch.setattr(MetricLog, "end_step", end_step)
    succeed("train.py", words, f"--recipe {recipe} --device {GPU} --out {tmp_path}")


def test_an_interrupted_run_goes_on(words, tmp_path):
    words = f"{words} --device {GPU} --stage tokenizer --tokenizer_steps 20 --save_every 10"
    succeed("train.py", words, f"--out {tmp_path}/whole")
    prepare = partial(die_after_save, "tokenizer")
    killed = launch("train.py", words, f"--out {tmp_path}/broken", prepare=prepare)
    assert killed.returncode == -9
    succeed("train.py", words, f"--out {tmp_path}/broken")
    files = [tmp_path / name / "tokenizer.pt" for name in ("broken", "whole")]
    close_weights(*(read_checkpoint(file)["model"] for file in files), tolerance=1e-3)


def test_muon_skips_steps_that_are_not_finite():
    matrix = torch.ones(4, 8, device=GPU)
    muon = Muon([matrix])
    matrix.grad = torch.full_like(matrix, torch.nan)
    muon.found_inf = torch.ones((), device=GPU)
    muon.step()
    assert matrix.eq(1).all() and muon.state[matrix]["momentum"].eq(0).all()
    matrix.grad = torch.randn(matrix.shape, device=GPU)
    muon.found_inf = torch.zeros((), device=GPU)
    muon.step()
    assert matrix.isfinite().all() and not matrix.eq(1).all()


def test_samples_do_not_depend_on_the_batch(words, tmp_path):
    succeed("train.py", words, f"--device {GPU} --out {tmp_path}/run")
    for batch in (2, 5):
        flags = f"--npz 5 --steps 4 --batch_size {batch} --out {tmp_path}/{batch}.npz"
        succeed("sample.py", f"{tmp_path}/run --device {GPU}", flags)
    two, five = (np.load(tmp_path / f"{batch}.npz")["arr_0"].astype(int) for batch in (2, 5))
    assert np.abs(two - five).max() <= 4  # of 255; TF32 rounds to three digits


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_two_gpus_train_as_one_and_end_together(words, tmp_path):
    words = f"{words} --device {GPU} --precision float32"
    succeed("train.py", words, f"--out {tmp_path}/one")
    succeed("train.py", words, f"--out {tmp_path}/two", processes=2)
    for stage in ("tokenizer", "generator"):
        expected = losses(tmp_path / "one", stage)
        assert losses(tmp_path / "two", stage) == pytest.approx(expected, rel=2e-3)
    done = launch("train.py", f"{words} --out {tmp_path}/three", processes=2, prepare=fail_on_one)
    assert done.returncode == 1 and "this is a test" in done.stderr


def fail_on_one() -> None:
    """In another process: an error in the fourth step of the second process."""
    real_seed = train.step_seed

    def step_seed(seed, stage, step):
        if step == 3 and torch.distributed.get_rank() == 1:
            raise ValueError("this is a test")
        return real_seed(seed, stage, step)

    train.step_seed = step_seed
