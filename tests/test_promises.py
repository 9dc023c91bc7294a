"""What could be lost without an error.

Each test here turns red when one line that keeps the quality, or a promise to the user, is taken
out.
"""

import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference import (
    ENV,
    ROOT,
    TINY,
    TINY_STEPS,
    command,
    launch,
    make_folder,
    refuse,
    succeed,
)

import align
import masking
import options
import sample
import train
from sit import SiT, per_sample_noise
from tokenizer import DiagonalGaussian, summarize
from utils.console import UserError, run_main
from utils.distributed import Distributed
from utils.files import lock_file
from utils.images import to_float, to_uint8
from utils.latents import LatentDataset

COLORS = [(230, 30, 30), (30, 200, 40), (40, 60, 230)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three classes, each of one plain color with some noise.

    It is long enough that samples have their class's color. -> its folder, and the normalized
    latents that the generator saw.
    """
    root = tmp_path_factory.mktemp("colors")
    for label, color in enumerate(COLORS):
        folder = root / "images" / f"class{label}"
        folder.mkdir(parents=True)
        for i in range(16):
            noise = np.random.default_rng((label, i)).integers(-25, 26, (16, 16, 3))
            pixels = np.clip(noise + color, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    seen = []
    loss = SiT.loss

    def spy(self, x, y, rng):
        seen.append(x)
        return loss(self, x, y, rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiT, "loss", spy)
        steps = "--tokenizer_steps 60 --decoder_steps 2 --generator_steps 120 --generator_lr 3e-3"
        steps += " --generator_batch_size 32 --recipe kl --sampling_steps 10"
        train.main(f"{TINY} {steps} --data {root}/images --out {root}/out".split())
    return root, torch.cat(seen)


def test_a_class_goes_from_its_folder_to_its_samples(run):
    """By the labels of an .npz."""
    root, _ = run
    sample.main(f"{root}/out --npz 12 --steps 10 --guidance 1.5".split())
    with np.load(root / "out" / "samples.npz") as samples:
        colors = samples["arr_0"].mean(axis=(1, 2))
        labels = samples["arr_1"]
    assert labels.tolist() == [0, 1, 2] * 4
    distances = np.linalg.norm(colors[:, None] - np.array(COLORS), axis=-1)
    assert (distances.argmin(axis=1) == labels).all()


def test_latents_reach_the_generator_with_mean_0_and_std_1(run):
    root, x = run
    assert x.mean(dim=(0, 1)).abs().max() < 0.15
    assert (x.std(dim=(0, 1)) - 1).abs().max() < 0.15
    metadata = json.loads((root / "out" / "latents.json").read_text())
    mean, std = np.array(metadata["latent_mean"]), np.array(metadata["latent_std"])
    assert np.abs(mean).max() > 0.3 or np.abs(std - 1).max() > 0.3  # not so by themselves


def test_samples_leave_the_generator_with_the_latents_own_mean_and_std(run):
    """A network that stands still leaves the noise where it is."""
    root, _ = run
    loaded = sample.load_run(root / "out")
    loaded.generator.forward = lambda x, t, y: torch.zeros_like(x)
    labels = torch.tensor([0, 2])
    images = sample.generate(loaded, labels, [5, 6], seed=3, solver="euler", num_steps=2)
    noise = next(per_sample_noise(3, [5, 6], (4, 4), CPU))
    with torch.no_grad():
        z = noise * loaded.tokenizer.latent_std + loaded.tokenizer.latent_mean
        assert torch.equal(images, to_uint8(loaded.tokenizer.decode(z)))


def test_latents_are_of_the_image_and_of_its_mirror_image_with_its_label(run):
    root, _ = run
    loaded = sample.load_run(root / "out")
    config, opts = options.parse_config(f"{TINY} --data {root}/images".split())
    context = train.TrainContext.open(config, Distributed.start("cpu"), opts)
    rows = np.load(root / "out" / "latents.npy")
    images, labels = zip(*(context.data[int(i)] for i in context.train_indices))
    images = to_float(torch.stack(images))
    for first, x in enumerate((images, images.flip(-1))):
        own = rows[first::2]
        assert own["label"].tolist() == list(labels)
        found = torch.from_numpy(own["mean"].astype(np.float32))
        with torch.no_grad():
            expected = loaded.tokenizer.encode(x).mean
        torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-3)


def test_latents_stay_on_disk(run):
    root, _ = run
    path = root / "out" / "latents.npy"
    metadata = json.loads(path.with_suffix(".json").read_text())
    hashes = metadata["encoder"], metadata["data"]
    latents = LatentDataset(path, *hashes, len(np.load(path)), 4, 4, 3)
    assert isinstance(latents.rows, np.memmap)


def test_lost_latents_are_made_again_and_not_called_finished(run, tmp_path, capsys):
    root, _ = run
    out = tmp_path / "out"
    shutil.copytree(root / "out", out)
    (out / "latents.npy").unlink()
    result = json.loads((root / "out" / "result.json").read_text())
    command = result["generator"]["made_by"]["command"]
    train.main([word.replace(f"{root}/out", str(out)) for word in command[1:]])
    printed = capsys.readouterr().out
    assert "decoder: finished before" in printed and "latents: finished before" not in printed
    assert (out / "latents.npy").read_bytes() == (root / "out" / "latents.npy").read_bytes()


def test_result_json_says_how_it_came_about(run):
    root, _ = run
    result = json.loads((root / "out" / "result.json").read_text())
    expected = {"seed": 0, "solver": "sde", "num_steps": 10, "cfg_scale": 2.3}
    expected |= {"guidance_interval": [0.0, 0.7], "timestep_shift": 1.0}
    assert result["generator"]["sampler"] == expected
    made_by = result["tokenizer"]["made_by"]
    assert made_by["command"][0] == "train.py" and made_by["preset"] == "toy"
    assert result["config"]["recipe"] == "kl"
    assert made_by["torch"] == torch.__version__ and made_by["processes"] == 1
    assert {"commit", "device", "python"} <= made_by.keys()
    lines = (root / "out" / "log.jsonl").read_text().splitlines()
    times = [json.loads(line)["time"] for line in lines]
    assert times == sorted(times) and times[0] > 1.7e9


def test_an_exported_file_takes_the_place_of_its_run(run, tmp_path):
    root, _ = run
    model = tmp_path / "model.pt"
    sample.main(f"{root}/out --export {model}".split())
    for i, path in enumerate((root / "out", model)):
        words = f"--classes 1 --columns 2 --steps 3 --out {tmp_path}/{i}.png"
        sample.main([str(path), *words.split()])
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    succeed("evaluate.py", f"probe {model} --data {root}/images")
    report = json.loads((tmp_path / "model.pt.probe.json").read_text())
    assert report["values"]["accuracy"] == 1  # plain colors
    assert model.stat().st_size < (root / "out" / "generator.pt").stat().st_size / 2
    exported, original = (sample.load_run(path) for path in (model, root / "out"))
    assert exported.checkpoint_info["weights"] == original.checkpoint_info["weights"]
    assert exported.checkpoint_info["data"] == original.checkpoint_info["data"]


def test_a_tokenizer_carries_the_statistics_of_its_latents(run, tmp_path):
    """Also before there is a generator, and when it is given away."""
    root, _ = run
    for name in ("decoder.pt", "latents.json"):
        (tmp_path / name).write_bytes((root / "out" / name).read_bytes())
    alone = tmp_path / "alone"
    sample.main(f"{tmp_path} --export {alone}/model.pt".split())
    other_run = {"latent_mean": [9, 9, 9, 9], "latent_std": [9, 9, 9, 9]}
    (alone / "latents.json").write_text(json.dumps(other_run))
    expected = sample.load_run(root / "out").tokenizer.latent_std
    for path in (tmp_path, alone / "model.pt"):
        assert torch.equal(sample.load_run(path).tokenizer.latent_std, expected)


def test_active_units_are_counted():
    scales = torch.tensor([1.0, 0.5, 0.01, 0.0])
    mean = torch.randn(1000, 2, 4, generator=torch.Generator().manual_seed(0)) * scales
    posterior = DiagonalGaussian(mean, torch.zeros_like(mean))
    numbers = summarize(posterior.statistics() | {"kl": torch.tensor(6.0)})
    assert numbers["active_units"] == 0.5 and numbers["kl_per_token"] == 3
    variance = (mean.var(dim=0, correction=0) + 1).mean().item()
    assert numbers["z_std"] == pytest.approx(variance**0.5, rel=1e-5)


def test_cosines_are_taken_in_float32():
    a, b = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    patches = b[:, None]
    for low, high in (
        (align.cosine_loss(a, b), align.cosine_loss(a.float(), b.float())),
        (masking.cls_similarity(a, patches), masking.cls_similarity(a.float(), patches.float())),
    ):
        assert low.dtype == torch.float32 and torch.equal(low, high)


def test_a_second_run_in_the_same_folder_is_told_so(tmp_path):
    folder = make_folder(tmp_path / "images", 0, 20)
    held = lock_file(tmp_path / "out" / "log.jsonl")
    words = f"{TINY} {TINY_STEPS} --stage tokenizer --data {folder} --out {tmp_path}/out".split()
    with pytest.raises(UserError, match="another run is at work"):
        train.main(words)
    held.close()
    train.main([*words, "--tokenizer_steps", "1"])


@pytest.mark.parametrize("text", [b"", b'{"tokenizer": {', b"[1, 2]", b"\xff\xfe"])
def test_a_damaged_record_does_not_stop_a_run(tmp_path, text, capsys):
    folder = make_folder(tmp_path / "images", 0, 20)
    out = tmp_path / "out"
    out.mkdir()
    (out / "result.json").write_bytes(text)
    words = f"{TINY} --tokenizer_steps 1 --stage tokenizer --data {folder} --out {out}"
    train.main(words.split())
    assert "only a record" in capsys.readouterr().err
    assert (out / "result.json.damaged").read_bytes() == text
    assert "psnr" in json.loads((out / "result.json").read_text())["tokenizer"]


def test_the_runs_own_folder_may_lie_in_the_data(tmp_path):
    folder = make_folder(tmp_path / "images", 0, 20)
    words = f"{TINY} --tokenizer_steps 1 --decoder_steps 1 --data {folder} --out {folder}/out"
    train.main([*words.split(), "--stage", "tokenizer"])
    train.main([*words.split(), "--stage", "decoder"])


@pytest.mark.parametrize(
    "text, named",
    [
        ("--seed 18446744073709551616", "--seed"),
        (f"--seed {'9' * 300}", "--seed"),
        ("--batch_size 1000000000000", "--batch_size"),
        ("--channels 1000000000", "--channels"),
        ("--image_size 100000", "--image_size"),
        ("--device abacus", "--device"),
    ],
)
def test_numbers_without_measure_are_refused(text, named):
    with pytest.raises(UserError, match=named):
        options.parse_config(text.split())


def test_a_tokenizer_works_in_other_precisions(run):
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    expected = sample.reconstruct(sample.load_run(run[0] / "out").tokenizer, images).double()
    for dtype, tolerance in ((torch.float64, 1), (torch.bfloat16, 8)):
        tokenizer = sample.load_run(run[0] / "out").tokenizer.to(dtype)
        difference = sample.reconstruct(tokenizer, images).double() - expected
        assert difference.abs().max() <= tolerance  # of 255


def test_samples_in_bf16_are_nearly_those_in_float32(run, tmp_path):
    out = run[0] / "out"
    for precision in ("float32", "bf16"):
        words = f"{out} --npz 6 --steps 4 --solver euler --precision {precision}"
        succeed("sample.py", words, f"--out {tmp_path}/{precision}.npz")
    a, b = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("float32", "bf16"))
    difference = np.abs(a.astype(int) - b)
    assert difference.max() > 0 and difference.mean() < 2
    assert json.loads((tmp_path / "bf16.npz.json").read_text())["precision"] == "bf16"


def test_a_file_that_does_not_fit_is_refused_before_anything_is_computed(run, monkeypatch):
    out = run[0] / "out"
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    error = refuse("sample.py", f"{out} --npz 100000")
    assert "samples.npz: the samples take 0.1 GB, and 0.0 GB are free; make room" in error
    error = refuse("train.py", TINY, f"--out {out}/new --tokenizer_steps 1")
    assert "new: the files of this run take 0.1 GB" in error


def in_the_third_step(action) -> None:
    """From now on, train.py calls action(process ids of its loading workers) in its third step."""
    real_seed = train.step_seed

    def step_seed(seed, stage, step):
        if step == 2:
            action([worker.pid for worker in multiprocessing.active_children()])
        return real_seed(seed, stage, step)

    train.step_seed = step_seed


def kill_a_worker() -> None:
    in_the_third_step(lambda workers: os.kill(workers[0], signal.SIGKILL))


def raise_an_error() -> None:
    def action(workers):
        raise ValueError("nobody foresaw this")

    in_the_third_step(action)


def print_workers_and_die() -> None:
    def action(workers):
        print(*workers, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    in_the_third_step(action)


WITH_WORKERS = f"{TINY} --stage tokenizer --workers 2 --tokenizer_steps 500"


@pytest.mark.parametrize(
    "prepare, code, sentence",
    [
        (kill_a_worker, 2, "perhaps memory is short, so try fewer --workers"),
        (raise_an_error, 1, "error: unexpected ValueError: nobody foresaw this; please report it"),
    ],
)
def test_an_error_ends_a_run_that_has_workers(prepare, code, sentence, images, tmp_path):
    """Python would wait for them for ever."""
    start = time.monotonic()
    done = launch("train.py", WITH_WORKERS, f"--data {images} --out {tmp_path}", prepare=prepare)
    assert (done.returncode, sentence in done.stderr) == (code, True), done.stderr[-2000:]
    assert time.monotonic() - start < 60


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells workers of this")
def test_workers_end_with_the_process_that_they_load_for(images, tmp_path):
    words = f"--data {images} --out {tmp_path}"
    done = launch("train.py", WITH_WORKERS, words, prepare=print_workers_and_die)
    assert done.returncode == -signal.SIGKILL
    workers = done.stdout.splitlines()[-1].split()
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: str) -> bool:
    """Whether a process is there, and not only its entry in the table of processes."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_what_another_launcher_left_in_the_environment_is_ignored(name, monkeypatch):
    monkeypatch.setenv(name, "3")
    dist = Distributed.start("cpu")
    assert (dist.rank, dist.world_size, dist.is_main) == (0, 1, True)


@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
def test_programs_run_with_closed_output(run, tmp_path, closed):
    out = run[0] / "out"
    redirect = {"stdout": ">&-", "stderr": "2>&-", "both": ">&- 2>&-"}[closed]
    words = command("sample.py", f"{out} --columns 1 --steps 1 --out {tmp_path}/s.png")
    done = subprocess.run(f"{shlex.join(words)} {redirect}", shell=True, env=ENV)
    assert done.returncode == 0 and (tmp_path / "s.png").exists()


def test_out_of_memory_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(lambda arguments: torch.empty(2**55))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("error: out of memory")
    assert message.count("\n") == 1


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_precision_is_that_of_matrix_products(tmp_path, precision):
    folder = make_folder(tmp_path / "images", 0, 20)
    words = f"{TINY} --tokenizer_steps 2 --log_every 1 --stage tokenizer --data {folder}"
    words += f" --out {tmp_path}/out --precision {precision} --device cpu"
    train.main(words.split())
    config, opts = options.parse_config(words.split())
    context = train.TrainContext.open(config, Distributed.start("cpu"), opts)
    with context.autocast():
        product = torch.nn.Linear(2, 2)(torch.zeros(1, 2))
    assert product.dtype == {"bf16": torch.bfloat16, "float32": torch.float32}[precision]


def test_float32_means_float32_on_every_processor():
    """Processors with AMX would round products to bfloat16 under torch's "medium" precision."""
    Distributed.start("cpu")
    a = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    error = (a @ a - (a.double() @ a.double()).float()).abs().max()
    assert error < 1e-3


def test_utils_import_nothing_from_above():
    """A student never has to read the rooms below to understand the method, nor the other way."""
    above = {path.stem for path in ROOT.glob("*.py")}
    for path in ROOT.glob("utils/*.py"):
        for line in path.read_text().splitlines():
            if line.startswith(("import ", "from ")):
                module = line.split()[1].split(".")[0]
                assert module not in above, f"{path.name}: {line}"
