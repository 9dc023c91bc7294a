"""train.py from end to end, mostly through its command line: files, resuming, processes, errors."""

import copy
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference import (
    ENV,
    PROCESS_COUNT_TOLERANCE,
    TINY,
    TINY_STEPS,
    call,
    close_weights,
    command,
    die_after_save,
    filled,
    launch,
    log_lines,
    make_folder,
    official_folder,
    refuse,
    same_weights,
    shell,
    succeed,
)

import build
import dry_run
import evaluate
import fid
import losses
import options
import recipes
import sample
import train
from tokenizer import Tokenizer
from utils import checkpoint
from utils.checkpoint import read_checkpoint
from utils.console import UserError, stop_signals
from utils.distributed import Distributed
from utils.files import hash_file
from utils.latents import LatentDataset
from utils.weights import PRETRAINED

ALONE = Distributed(0, 1, torch.device("cpu"))
OBJECTIVE_FILES = ("vgg16", "lpips_vgg", "dino_vits16")


@pytest.fixture(scope="session")
def whole(images, weights):
    """Arguments of a tiny run with every term of the objective: 20 steps per stage.

    The discriminator trains from step 10 on, and its gradient reaches the decoder from step 12 on,
    in the very steps at which other tests kill and resume. The learning rate is small, because
    rounding moves the kinks of VGG's max pools, which larger steps soon make visible.
    """
    terms = "--perceptual_weight 1 --adversarial_weight 0.2 --discriminator_start 10"
    sizes = f"--lr 1e-4 --batch_size 4 --weights {weights} --data {images}"
    return f"{TINY} {TINY_STEPS} {terms} {sizes}"


@pytest.fixture(scope="session")
def finished(whole, tmp_path_factory):
    """That run, unbroken."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    succeed("train.py", whole, f"--out {out}")
    return out


def copy_run(finished, tmp_path):
    out = tmp_path / "copy"
    out.mkdir()
    for name in os.listdir(finished):
        (out / name).write_bytes((finished / name).read_bytes())
    return out


def open_run(words, out):
    """The context of a run with these arguments."""
    config, opts = options.parse_config([*words.split(), "--out", str(out)])
    return train.TrainContext.open(config, ALONE, opts)


# --------------------------------------------------------------------------------------------------
# What a run leaves.


def test_a_run_leaves_what_it_promises(finished):
    names = "log.jsonl result.json latents.npy latents.json masks.png reconstructions.png"
    names += " samples.png tokenizer.pt decoder.pt generator.pt"
    assert set(os.listdir(finished)) == set(names.split())
    assert (finished / "tokenizer.pt").stat().st_size < 40e6  # without VGG and DINO
    result = json.loads((finished / "result.json").read_text())
    assert result["decoder"]["psnr"] > 5
    assert result["decoder"]["evaluated_images"] == 8 and result["decoder"]["held_out"] is True
    for stage in ("decoder", "generator"):  # the distance is not called FID
        assert result[stage]["hog_frechet_distance"] > 0
    assert result["config"] == read_checkpoint(finished / "generator.pt")["config"]
    assert "1 perceptual + 0.2 adversarial" in result["objective"]
    assert "off" not in result["objective"]
    assert len(result["weights"]) == 3
    assert all(len(sha256) == 64 for sha256 in result["weights"].values())
    assert Image.open(finished / "samples.png").size == (8 * 64, 3 * 64)  # 3 classes


def test_a_log_line_has_all_terms(finished):
    first, line = log_lines(finished, "tokenizer")
    names = "loss mse perceptual adversarial kl local global discriminator consistency lecam"
    names += " adaptive_weight kl_per_token active_units z_std model_grad_norm disc_grad_norm"
    names += " lr images_per_second memory_gb"
    assert set(names.split()) <= line.keys()
    assert line["step"] == 20 and line["skipped_share"] == 0
    assert all(np.isfinite(value) for value in line.values() if not isinstance(value, str))
    assert 0 < line["adaptive_weight"] <= losses.MAX_ADAPTIVE_WEIGHT
    assert "adversarial" in log_lines(finished, "decoder")[0]
    assert first["loss"] > line["loss"]


def test_the_decoder_stage_goes_on_with_the_discriminator(finished, whole):
    """Its weights, moving averages and adaptive weight are those of tokenizer.pt."""
    run = open_run(whole, finished)
    gan = losses.GANLoss(384)
    tokenizer = build.build_tokenizer(run.config)
    train.load_previous_stage(run, "decoder", tokenizer, gan)
    saved = read_checkpoint(finished / "tokenizer.pt")
    assert train.count_steps_before(run.config, "decoder") == 20
    assert all(torch.equal(value, saved["gan"][key]) for key, value in gan.state_dict().items())
    assert gan.adaptive_weight.value > 0
    assert torch.equal(tokenizer.encoder.norm.bias, saved["ema"]["encoder.norm.bias"])


def test_a_stage_leaves_its_averages_in_the_tokenizer(finished):
    """The decoder's stage starts from the averages of the tokenizer's stage, not from its model."""
    first = read_checkpoint(finished / "tokenizer.pt")
    second = read_checkpoint(finished / "decoder.pt")
    for key, value in second["ema"].items():
        if key.startswith(("encoder.", "bottleneck.")):
            assert torch.equal(value, first["ema"][key])
    key = "encoder.latent_tokens"
    assert not torch.equal(first["ema"][key], first["model"][f"tokenizer.{key}"])


def test_latent_statistics_are_those_of_the_latents(finished):
    """The buffers saved with the tokenizer normalize posterior samples of the training set."""
    saved = read_checkpoint(finished / "generator.pt")["tokenizer"]
    metadata = json.loads((finished / "latents.json").read_text())
    count = len(np.load(finished / "latents.npy"))
    hashes = metadata["encoder"], metadata["data"]
    latents = LatentDataset(finished / "latents.npy", *hashes, count, 4, 4, 3)
    mean, std, labels = latents.read(list(range(len(latents))))
    z = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    normal = (z - saved["latent_mean"]) / saved["latent_std"]
    assert normal.mean(dim=(0, 1)).abs().max() < 0.1
    assert (normal.std(dim=(0, 1)) - 1).abs().max() < 0.1
    assert sorted(set(labels.tolist())) == [0, 1, 2]


# --------------------------------------------------------------------------------------------------
# Resuming, processes and signals.


def test_kill_and_resume_equal_an_unbroken_run_bit_for_bit(finished, whole, tmp_path):
    """kill -9 after step 10 of each stage in turn, and while the latents are written."""
    out = tmp_path / "broken"
    for stage in ("tokenizer", "decoder", "latents", "generator"):
        prepare = partial(die_after_save, stage)
        done = launch("train.py", whole, f"--out {out}", prepare=prepare)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    succeed("train.py", whole, f"--out {out}")
    assert not list(out.glob("*.tmp"))  # what the killed runs left behind is removed
    for name in ("tokenizer.pt", "decoder.pt", "generator.pt"):
        same_weights(out / name, finished / name)
    for name in ("latents.npy", "latents.json", "samples.png"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    for stage in ("tokenizer", "decoder", "generator"):
        broken, whole = log_lines(out, stage), log_lines(finished, stage)
        assert [line["step"] for line in broken] == [10, 20]
        assert [line["loss"] for line in broken] == [line["loss"] for line in whole]


def test_two_processes_equal_one(finished, whole, tmp_path):
    """Losses, weights, averages and latents of 2 gloo processes.

    The later stages start from the same tokenizer.pt.
    """
    first, rest = tmp_path / "first", copy_run(finished, tmp_path)
    for name in ("decoder.pt", "latents.npy", "latents.json", "generator.pt"):
        (rest / name).unlink()
    succeed("train.py", whole, f"--out {first} --stage tokenizer", processes=2)
    succeed("train.py", whole, f"--out {rest}", processes=2)
    for out, stage in ((first, "tokenizer"), (rest, "decoder"), (rest, "generator")):
        assert len(log_lines(out, stage)) == 2
        for two, one in zip(log_lines(out, stage), log_lines(finished, stage)):
            assert two["loss"] == pytest.approx(one["loss"], rel=PROCESS_COUNT_TOLERANCE)
        ours, theirs = (read_checkpoint(run / f"{stage}.pt") for run in (out, finished))
        for part in ("model", "ema", "gan"):
            close_weights(ours.get(part, {}), theirs.get(part, {}))
    ours, theirs = (read_checkpoint(run / "generator.pt") for run in (rest, finished))
    expected = theirs["tokenizer"]["latent_std"]
    torch.testing.assert_close(ours["tokenizer"]["latent_std"], expected, atol=1e-4, rtol=0)


def test_resume_on_another_process_count_and_micro_batch(finished, whole, tmp_path):
    out = tmp_path / "mixed"
    words = f"{whole} --out {out} --stage tokenizer"
    launch("train.py", words, prepare=partial(die_after_save, "tokenizer"))
    assert read_checkpoint(out / "tokenizer.pt")["step"] == 10
    succeed("train.py", words, "--micro_batch 1", processes=2)
    ours, theirs = (read_checkpoint(run / "tokenizer.pt") for run in (out, finished))
    close_weights(ours["model"], theirs["model"])
    # AdamW and Muon hardly notice a gradient of another scale.
    ours, theirs = (log_lines(run, "tokenizer")[-1]["model_grad_norm"] for run in (out, finished))
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize(
    "processes, number",
    [(1, signal.SIGTERM), (1, stop_signals()[-1]), (2, signal.SIGTERM), (2, signal.SIGKILL)],
)
def test_a_signal_saves_and_stops(images, tmp_path, processes, number):
    """With two processes torchrun gets it; if it is killed, they notice."""
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux tells processes that their parent has ended")
    out = tmp_path / "stopped"
    steps = "--tokenizer_steps 5000 --save_every 5000 --log_every 5 --stage tokenizer --workers 1"
    words = f"{steps} --data {images} --out {out}"
    argv = command("train.py", TINY, words, processes=processes)
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=ENV)
    log = out / "log.jsonl"
    while not (log.exists() and log.read_text()) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(number)
    message = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and "run the same command again" in message
    assert processes > 1 or "Traceback" not in message  # torchrun adds one of its own
    assert read_checkpoint(out / "tokenizer.pt")["step"] >= 5


def test_a_finished_run_is_not_run_again(finished, whole, tmp_path, monkeypatch):
    out = copy_run(finished, tmp_path)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(train, "build_tokenizer", None)  # nothing is built
    done = succeed("train.py", whole, f"--out {out}")
    assert done.stdout.count("finished before") == 4
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_finished_stage_whose_record_is_lost_is_evaluated_again(finished, whole, tmp_path):
    out = copy_run(finished, tmp_path)
    (out / "result.json").unlink()
    succeed("train.py", whole, f"--out {out} --stage tokenizer")
    ours = json.loads((out / "result.json").read_text())["tokenizer"]
    theirs = json.loads((finished / "result.json").read_text())["tokenizer"]
    assert ours["psnr"] == theirs["psnr"]


# --------------------------------------------------------------------------------------------------
# Samples.


def test_a_longer_decoder_stage_reaches_the_samples(finished, tmp_path):
    """generator.pt holds the tokenizer of its time; sample.py takes the decoder trained last."""
    out = copy_run(finished, tmp_path)
    decoder = read_checkpoint(out / "decoder.pt")
    decoder["ema"]["decoder.last_layer.bias"] += 100
    torch.save(decoder, out / "decoder.pt")
    succeed("sample.py", f"{out} --npz 2 --steps 2")
    assert np.load(out / "samples.npz")["arr_0"].min() == 255


def test_a_longer_decoder_stage_reaches_the_samples_of_training(finished, whole, tmp_path):
    """The generator is finished; its samples are drawn and measured again."""
    out = copy_run(finished, tmp_path)
    decoder = read_checkpoint(out / "decoder.pt")
    decoder["ema"]["decoder.last_layer.bias"] += 100
    torch.save(decoder, out / "decoder.pt")
    result = json.loads((out / "result.json").read_text())
    before = result.pop("generator")
    (out / "result.json").write_text(json.dumps(result))
    succeed("train.py", f"{whole} --out {out} --stage generator")
    with Image.open(out / "samples.png") as picture:
        assert np.asarray(picture).min() == 255
    after = json.loads((out / "result.json").read_text())["generator"]
    assert after["hog_frechet_distance"] != before["hog_frechet_distance"]
    same_weights(out / "generator.pt", finished / "generator.pt")


@pytest.mark.parametrize("classes", [0, 1])
def test_flat_and_one_class_folders_train_and_sample(tmp_path, classes):
    folder = make_folder(tmp_path / "images", classes, 20)
    out = tmp_path / "out"
    steps = "--tokenizer_steps 2 --decoder_steps 2 --generator_steps 2"
    succeed("train.py", TINY, f"{steps} --data {folder} --out {out}")
    succeed("sample.py", f"{out} --npz 5 --steps 3")
    with np.load(out / "samples.npz") as samples:
        assert samples["arr_0"].shape == (5, 16, 16, 3)
        assert samples["arr_1"].tolist() == [0] * 5
    if classes == 0:
        assert "trained without" in refuse("sample.py", f"{out} --guidance 3")


def test_npz_is_exact_and_does_not_depend_on_batch_size_or_processes(finished, tmp_path):
    paths = [tmp_path / f"{i}.npz" for i in range(3)]
    for path, batch, processes in zip(paths, (7, 3, 2), (1, 1, 2)):
        words = f"{finished} --npz 7 --batch_size {batch} --steps 5 --guidance 2 --out {path}"
        succeed("sample.py", words, processes=processes)
    loaded = [np.load(path) for path in paths]
    for other in loaded:
        assert other["arr_0"].shape == (7, 16, 16, 3) and other["arr_0"].dtype == np.uint8
        assert other["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
        difference = np.abs(other["arr_0"].astype(int) - loaded[0]["arr_0"])
        assert difference.max() <= 1  # rounding of one part in 255
    record = json.loads((tmp_path / "0.npz.json").read_text())
    settings = ("solver", "num_steps", "cfg_scale", "guidance_interval", "seed")
    assert [record[key] for key in settings] == ["sde", 5, 2.0, [0.0, 0.7], 0]
    assert record["hash"] == hash_file(paths[0])
    made_by = record["checkpoint"]
    expected = {"file": "generator.pt", "stage": "generator", "step": 20, "total_steps": 20}
    assert expected.items() <= made_by.items()
    assert made_by["weights"] == sample.load_run(finished).checkpoint_info["weights"]
    assert len(made_by["weights"]) == 64
    names = [f"{i}.{ending}" for i in range(3) for ending in ("npz", "npz.json")]
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_sample_pictures(finished, images, tmp_path):
    words = f"--classes class2,0 --columns 3 --steps 2 --solver heun --out {tmp_path}/s.png"
    succeed("sample.py", f"{finished} {words}")
    assert Image.open(tmp_path / "s.png").size == (3 * 64, 2 * 64)
    words = f"--reconstruct {images} --columns 4 --out {tmp_path}/r.png"
    succeed("sample.py", f"{finished} {words}")
    assert Image.open(tmp_path / "r.png").size == (4 * 64, 2 * 64)


# --------------------------------------------------------------------------------------------------
# Official weights and the dry run.


def test_dinov2_teacher_and_encoder_train(images, weights, tmp_path):
    words = "--size S --teacher dinov2_vits14_reg --encoder_init dinov2_vits14 --lr 0"
    steps = f"--batch_size 2 --tokenizer_steps 1 --stage tokenizer --weights {weights}"
    done = succeed("train.py", TINY, words, steps, f"--data {images} --out {tmp_path}/out")
    assert "teacher dinov2_vits14_reg; off: perceptual, adversarial" in done.stdout
    assert done.stderr.count("is not the official file") == 2  # the contents are generated
    model = read_checkpoint(tmp_path / "out" / "tokenizer.pt")["ema"]
    expected = filled("dinov2_vits14_pretrain")["blocks.3.attn.qkv.weight"]
    torch.testing.assert_close(model["encoder.blocks.3.attn.qkv.weight"], expected)


def test_fid_is_reported_under_that_name_where_its_weights_are_available(images, tmp_path):
    name = fid.INCEPTION_FILE
    folder = official_folder(tmp_path / "weights", name.removesuffix(".pth"))
    words = f"{TINY} --tokenizer_steps 2 --stage tokenizer --data {images} --weights {folder}"
    succeed("train.py", f"{words} --out {tmp_path}/out")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["tokenizer"]["fid_8"] > 0  # called by the number of images
    assert "hog_frechet_distance" not in result["tokenizer"]
    assert result["weights"] == {name: hash_file(folder / name)}
    os.truncate(folder / name, 1000)
    assert "is not a whole" in refuse("train.py", f"{words} --out {tmp_path}/other")
    assert not (tmp_path / "other").exists()


def test_dry_run_prints_and_writes_nothing(images, tmp_path):
    words = f"--dry_run --data {images} --out {tmp_path}/out --batch_size 8 --micro_batch 2"
    done = succeed("train.py", TINY, words)
    assert "M parameters" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    costs = {row[0]: row[1:] for row in rows if row[0] in ("tokenizer", "decoder", "generator")}
    assert [costs[stage][:2] for stage in costs] == [["8", "2"], ["8", "2"], ["8", "8"]]
    for stage in costs:
        seconds, hours, memory, *fits = costs[stage][2::2][:3] + costs[stage][8:]
        assert float(seconds) > 0 and float(hours) >= 0 and 0.5 <= float(memory) < 2
        assert fits == ["8"] * 4  # the largest micro batch on four kinds of GPU
    assert not (tmp_path / "out").exists()


def test_a_run_knows_about_how_much_room_its_files_take(finished, whole, tmp_path):
    context = open_run(whole, finished)
    stages = ["tokenizer", "decoder", "latents", "generator"]
    tokenizer = build.build_tokenizer(context.config)
    generator = build.build_generator(context.config, tokenizer, len(context.data.classes))
    sizes = dry_run.file_sizes(context, stages, tokenizer, generator)
    written = {name: (finished / name).stat().st_size for name in sizes}
    for name, size in sizes.items():
        assert 0.5 * size < written[name] < 1.5 * size
    largest = max(sizes[name] for name in sizes if name != "latents.npy")
    assert dry_run.bytes_to_write(context, sizes) == sum(sizes.values()) + largest - sum(
        written.values()
    )
    elsewhere = open_run(whole, tmp_path)
    assert dry_run.bytes_to_write(elsewhere, sizes) == sum(sizes.values()) + largest


def test_dry_run_lists_the_files_that_a_run_needs(images, weights, tmp_path):
    (tmp_path / "vgg16-397923af.pth").symlink_to(weights / "vgg16-397923af.pth")
    words = f"--perceptual_weight 1 --adversarial_weight 1 --weights {tmp_path}"
    text = succeed("train.py", TINY, words, f"--data {images} --dry_run").stdout
    lines = text.splitlines()

    def line_of(file):
        return next(line for line in lines if file in line)

    files = {name: line_of(PRETRAINED[name].name) for name in OBJECTIVE_FILES}
    assert hash_file(weights / "vgg16-397923af.pth") in files["vgg16"]
    assert "58.9 MB" in files["vgg16"] and "BSD-3-Clause" in files["vgg16"]
    assert "missing, measured with random weights" in files["dino_vits16"]
    assert "https://" in files["dino_vits16"]
    assert "without it there is no FID" in line_of(fid.INCEPTION_FILE)
    assert "dinov2" not in text.split("config")[0]


def test_the_memory_of_a_step_is_what_autograd_keeps():
    x = torch.randn(100, 250, requires_grad=True)
    meter = dry_run.ActivationMeter()
    with meter:
        y = (x.exp() + x.exp()).sin().sum()  # both exp and the input of sin are kept
    assert meter.bytes == meter.peak == 3 * 100 * 250 * 4
    y.backward()
    assert meter.bytes == 0 and meter.peak == 3 * 100 * 250 * 4


def test_the_proposed_micro_batch_fits_and_divides():
    cost = dry_run.Cost(seconds=1.0, fixed_gb=4.0, gb_per_item=0.5)
    assert cost.memory_gb(2) == pytest.approx(0.5 + 1.1 * 5)
    assert [cost.largest_micro_batch(32, size) for size in (4, 16, 24, 80)] == [0, 16, 32, 32]
    assert cost.largest_micro_batch(30, 16) == 15


# --------------------------------------------------------------------------------------------------
# A tokenizer that is trained already, and images that must not be mirrored.


def test_a_generator_is_trained_on_another_runs_tokenizer(finished, tmp_path):
    """On other images, with other classes; the values are those of the tokenizer's run."""
    folder = make_folder(tmp_path / "images", 2, 12)
    out = tmp_path / "out"
    words = f"--tokenizer {finished} --data {folder} --out {out} --generator_steps 3"
    done = succeed("train.py", words)
    assert sorted(path.name for path in out.glob("*.pt")) == ["generator.pt"]
    ours, theirs = read_checkpoint(out / "generator.pt"), read_checkpoint(finished / "decoder.pt")
    for key, weight in theirs["ema"].items():
        if not key.startswith("latent_"):
            assert torch.equal(ours["tokenizer"][key], weight)
    assert ours["classes"] == ["class0", "class1"] and ours["config"]["latent_dim"] == 4
    result = json.loads((out / "result.json").read_text())
    expected = sample.hash_encoder(sample.load_run(finished).tokenizer)
    assert result["tokenizer_run"]["encoder"] == expected
    assert "24 images in 2 classes" in done.stdout
    assert succeed("train.py", words).stdout.count("finished before") == 2
    succeed("sample.py", f"{out} --npz 2 --steps 2")


@pytest.mark.parametrize(
    "words, named",
    [
        ("--tokens 8", "--tokens is 8, but the tokenizer of {run} was made with 4"),
        ("--recipe ldetok", "--recipe is ldetok"),
        ("--preset b256", "--preset is not possible with --tokenizer"),
        ("--stage decoder", "has the stages all, latents, generator"),
    ],
)
def test_flags_that_contradict_another_runs_tokenizer_are_refused(finished, tmp_path, words, named):
    error = refuse("train.py", f"--tokenizer {finished} --out {tmp_path}/out {words}")
    assert named.format(run=finished) in error
    assert "is not a run" in refuse("train.py", f"--tokenizer {tmp_path} --out {tmp_path}/out")


def test_without_flip_no_image_is_ever_mirrored(tmp_path, monkeypatch):
    """All images are brighter on the left, and so is all that the tokenizer sees."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8] = 200
    (tmp_path / "images").mkdir()
    for i in range(24):
        Image.fromarray(pixels + i).save(tmp_path / "images" / f"{i}.png")
    seen = []
    encode = Tokenizer.encode

    def spy(self, images, mask=None):
        seen.append(images[..., :8].mean((1, 2, 3)) > images[..., 8:].mean((1, 2, 3)))
        return encode(self, images, mask)

    monkeypatch.setattr(Tokenizer, "encode", spy)
    steps = "--tokenizer_steps 3 --decoder_steps 1 --generator_steps 1 --eval_images 2"
    for flip in (0, 1):
        seen.clear()
        out = tmp_path / f"flip{flip}"
        words = f"{steps} --flip {flip} --data {tmp_path}/images --out {out}"
        succeed("train.py", TINY, words)
        assert torch.cat(seen).all() == (flip == 0)
        assert len(np.load(out / "latents.npy")) == 22 * (1 + flip)


# --------------------------------------------------------------------------------------------------
# The config.


def test_every_config_field_is_read_by_a_run(images, tmp_path, monkeypatch):
    """By the stages themselves: copying, printing or checking a value is no use of it."""
    fields = {field.name for field in dataclasses.fields(recipes.Config)}
    asked = set()

    def read(config, name):
        asked.add(name)
        return object.__getattribute__(config, name)

    def quietly(function):
        """The same function, whose reading of fields does not count."""

        def call_quietly(*arguments, **kwargs):
            before = set(asked)
            result = function(*arguments, **kwargs)
            asked.intersection_update(before)
            return result

        return call_quietly

    words = "--tokenizer_steps 2 --decoder_steps 2 --generator_steps 2"
    arguments = f"{TINY} {words} --data {images} --out {tmp_path}".split()
    monkeypatch.setattr(train, "asdict", quietly(dataclasses.asdict))
    monkeypatch.setattr(recipes, "replace", quietly(dataclasses.replace))
    monkeypatch.setattr(train, "parse_config", quietly(options.parse_config))
    monkeypatch.setattr(train, "check_config", quietly(options.check_config))
    monkeypatch.setattr(train, "print_run", quietly(train.print_run))
    monkeypatch.setattr(build.TrainContext, "identity", quietly(build.TrainContext.identity))
    describe = quietly(recipes.Config.describe_objective)
    monkeypatch.setattr(recipes.Config, "describe_objective", describe)
    monkeypatch.setattr(recipes.Config, "__getattribute__", read)
    train.main(arguments)
    assert fields - asked == set()


def test_every_field_tells_its_source_and_its_bounds():
    for field in dataclasses.fields(recipes.Config):
        about = field.metadata
        source = about["source"].split()[0].rstrip(":;")
        assert about["help"] and source in ("paper", "config", "ours"), field.name
        assert about["resume_scope"] in ("all", "decoder", "generator", "none")
        if field.type in (int, float):
            assert about["min"] is not None, field.name
            assert about["min"] <= field.default <= about["max"], field.name


def test_flags_win_over_recipes_and_those_over_presets():
    config, _ = options.parse_config("--lr 0.5 --mask random".split())
    decoder = config.for_stage("decoder")
    assert (decoder.lr, decoder.mask, decoder.kl_weight) == (0.05, "none", 0)
    assert not decoder.needs_teacher
    assert config.for_stage("tokenizer") == config
    assert config.stages["decoder"].trainable == ("decoder.",)
    more, _ = options.parse_config("--tokens 128 --generator_steps 5 --sampling_steps 9".split())
    assert (more.patch_size, more.latent_dim, more.batch_size) == (2, 4, 4)
    assert (more.generator_steps, more.sampling_steps) == (5, 9)
    baseline, _ = options.parse_config("--recipe kl --local_weight 0.3".split())
    assert (baseline.mask, baseline.local_weight, baseline.global_weight) == ("none", 0.3, 0.0)
    assert baseline.kl_weight == 1e-6


@pytest.mark.parametrize("tokens", [64, 128])
def test_built_in_shapes_take_the_papers_token_counts(tokens):
    config, _ = options.parse_config(["--tokens", str(tokens)])
    assert config.grid_size**2 % tokens == 0
    options.check_config(config, Distributed(0, 2, torch.device("cpu")))


@pytest.mark.parametrize(
    "size, tokens, patch_size",
    [(32, 16, 4), (32, 64, 4), (32, 128, 2), (16, 4, 2), (36, 16, 3), (60, 16, 5), (84, 16, 7)],
)
def test_the_patch_size_keeps_the_grid_near_8_patches_per_side(size, tokens, patch_size):
    config, _ = options.parse_config(f"--image_size {size} --tokens {tokens}".split())
    assert config.patch_size == patch_size and 8 <= config.grid_size <= 16
    assert config.grid_size**2 % tokens == 0


@pytest.mark.parametrize("size", [28, 100, 31])
def test_sizes_without_a_fitting_grid_are_refused_with_the_nearest_one(size):
    with pytest.raises(
        UserError, match=f"--image_size {size}: .* use --image_size (\\d+)"
    ) as error:
        options.parse_config(f"--image_size {size} --tokens 16".split())
    found = int(re.search(r"use --image_size (\d+)", str(error.value)).group(1))
    assert abs(found - size) <= 4
    config, _ = options.parse_config(f"--image_size {found} --tokens 16".split())
    assert 8 <= config.grid_size <= 16


def test_presets_are_complete_and_consistent():
    for name in recipes.PRESETS:
        config, _ = options.parse_config(["--preset", name, "--data", "x"])
        options.check_config(config, Distributed(0, 8, torch.device("cpu")))
        if name == "toy":
            continue
        teacher = "dinov2_vits14" if name == "s128" else "dinov2_vitb14"
        assert (config.perceptual_weight, config.adversarial_weight) == (1.0, 0.2)
        assert config.teacher == teacher
        is_small = config.tokenizer_size == "S"
        assert config.encoder_init == ("dinov2_vits14" if is_small else "dinov2_vitb14")
    paper, _ = options.parse_config(["--data", "x"])  # the default with data is b256
    assert (paper.tokenizer_size, paper.image_size, paper.num_latent_tokens) == ("B", 256, 128)
    assert (paper.generator_steps, paper.generator_size) == (4_000_000, "XL")


# --------------------------------------------------------------------------------------------------
# Baselines and single terms.


@pytest.mark.parametrize("recipe", ["kl", "ae"])
def test_baselines_train_resume_and_sample(images, tmp_path, recipe):
    """Without masks, alignment and (ae) noise; no teacher looks at the images."""
    steps = "--tokenizer_steps 4 --decoder_steps 2 --generator_steps 2 --log_every 2"
    words = f"{TINY} --recipe {recipe} {steps} --data {images} --out {tmp_path}/out"
    succeed("train.py", words)
    line = log_lines(tmp_path / "out", "tokenizer")[-1]
    assert "local" not in line and not (tmp_path / "out" / "masks.png").exists()
    assert ("kl" in line) == (recipe == "kl")
    rows = np.load(tmp_path / "out" / "latents.npy")
    assert rows["std"].any() == (recipe == "kl")
    assert "finished before" in succeed("train.py", words).stdout
    succeed("sample.py", f"{tmp_path}/out --npz 2 --steps 2")


def test_local_and_global_alignment_have_weights_of_their_own(images, tmp_path):
    """Table 5 adds them one by one: with weight 0 a term is measured, and its MLP does not move."""
    words = f"--global_weight 0 --tokenizer_steps 2 --stage tokenizer --data {images}"
    succeed("train.py", TINY, words, f"--out {tmp_path}/out")
    saved = read_checkpoint(tmp_path / "out" / "tokenizer.pt")
    line = log_lines(tmp_path / "out", "tokenizer")[-1]
    expected = line["mse"] + 1e-6 * line["kl"] + 0.02 * line["local"]
    assert line["loss"] == pytest.approx(expected, rel=1e-4) and line["global"] > 0
    moments = [entry["exp_avg"].any() for entry in saved["model_adamw"]["state"].values()]
    assert any(moments) and not all(moments)


# --------------------------------------------------------------------------------------------------
# What goes wrong in training.


def test_collapse_is_named(finished, images, tmp_path):
    words = "--kl_weight 1 --lr 1e-2 --tokenizer_steps 60 --log_every 20 --stage tokenizer"
    done = succeed("train.py", TINY, words, f"--data {images} --out {tmp_path}/out")
    assert "posterior has collapsed" in done.stderr and "--kl_weight" in done.stderr
    assert done.stderr.count("posterior has collapsed") == 1
    assert not train.has_collapsed(log_lines(finished, "tokenizer")[-1])
    for kl, units, collapsed in ((1.3, 0.05, False), (0.05, 1.0, True), (np.nan, 0.0, False)):
        # A code of few active units is a good one if it has enough nats.
        line = {"kl_per_token": kl, "active_units": units}
        assert train.has_collapsed(line) == collapsed


@pytest.mark.parametrize("optimizer", recipes.OPTIMIZERS)
def test_non_finite_steps_are_skipped_and_leave_no_trace(optimizer):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"blocks": torch.nn.Linear(3, 2)})
    disc = torch.nn.Linear(3, 1)  # it has no gradients yet
    modules = {"model": model, "disc": disc}
    optimizers = train.build_optimizers(modules, optimizer, (0.9, 0.95), weight_decay=0.1)
    assert ("model_muon" in optimizers) == (optimizer == "muon")

    def set_gradients(module, value):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, value)

    def copy_all():
        states = [each.state_dict() for each in (*modules.values(), *optimizers.values())]
        return copy.deepcopy(states)

    def are_equal(before, after):
        if isinstance(before, torch.Tensor):
            return torch.equal(before, after)
        if isinstance(before, dict):
            return all(are_equal(before[key], after[key]) for key in before)
        if isinstance(before, list):
            return all(map(are_equal, before, after))
        return before == after

    set_gradients(model, 1.0)
    assert train.clip_and_step(modules, optimizers, 0.1)["skipped_share"] == 0
    before = copy_all()
    for bad in (float("nan"), float("inf")):
        set_gradients(model, 1.0)
        model["blocks"].weight.grad[0, 1] = bad
        assert train.clip_and_step(modules, optimizers, 0.1)["skipped_share"] == 1
        assert are_equal(before, copy_all())
        assert model["blocks"].weight.grad is None
    set_gradients(model, 1.0)
    norms = train.clip_and_step(modules, optimizers, 0.1)
    assert norms.keys() == {"model_grad_norm", "skipped_share"}
    after = copy_all()
    assert not are_equal(before, after)
    set_gradients(model, 1.0)
    set_gradients(disc, float("nan"))
    norms = train.clip_and_step(modules, optimizers, 0.1)  # one that is not finite stops both
    assert norms["skipped_share"] == 1 and norms.keys() >= {"model_grad_norm", "disc_grad_norm"}
    assert are_equal(after[0], model.state_dict()) and are_equal(after[1], disc.state_dict())


def test_gradients_are_clipped_to_norm_1():
    module = torch.nn.Linear(1, 2, bias=False)
    torch.nn.init.zeros_(module.weight)
    module.weight.grad = torch.tensor([[30.0], [40.0]])
    sgd = torch.optim.SGD(module.parameters(), lr=1.0, fused=True)
    norms = train.clip_and_step({"model": module}, {"model_sgd": sgd}, 1.0)
    assert norms["model_grad_norm"] == 50
    assert torch.allclose(module.weight, torch.tensor([[-0.6], [-0.8]]), atol=1e-5)
    assert module.weight.grad is None


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    config, _ = options.parse_config([])
    tokenizer = build.build_tokenizer(config)
    optimizers = train.build_optimizers({"model": tokenizer}, "muon", (0.9, 0.95), 1e-4)
    names = {parameter: name for name, parameter in tokenizer.named_parameters()}

    def names_of(optimizer):
        return {names[p] for group in optimizer.param_groups for p in group["params"]}

    muon, adamw = names_of(optimizers["model_muon"]), names_of(optimizers["model_adamw"])
    kinds = {name.partition(".blocks.")[2].split(".", 1)[1] for name in muon}
    assert kinds == {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
    assert muon | adamw == set(names.values()) and not muon & adamw
    frozen = tokenizer.decoder.requires_grad_(False)
    optimizers = train.build_optimizers({"model": frozen}, "muon", (0.9, 0.95), 1e-4)
    assert optimizers == {}


def test_full_size_presets_train_with_adamw_as_the_paper():
    for preset in recipes.PRESETS:
        for recipe in recipes.METHODS:
            words = f"--preset {preset} --recipe {recipe} --data x"
            config, _ = options.parse_config(words.split())
            expected = "muon" if preset == "toy" else "adamw"
            assert config.optimizer == expected


def test_a_run_in_which_every_step_is_skipped_stops(images, tmp_path):
    words = "--kl_weight 1e38 --tokenizer_steps 40 --log_every 10 --stage tokenizer"
    done = call("train.py", TINY, words, f"--data {images} --out {tmp_path}/out")
    assert done.returncode == 2
    assert "gradients of the last 10 steps of the tokenizer stage were not finite" in done.stderr


def test_the_discriminator_trains_a_while_before_its_gradient_counts(
    images, weights, tmp_path, monkeypatch
):
    """It starts at step 4, and the decoder gets its gradient from step 1.25 * 4 on."""
    seen = []
    forward = losses.GANLoss.forward

    def spy(self, *arguments):
        *_, with_g_loss = arguments
        seen.append(with_g_loss)
        return forward(self, *arguments)

    monkeypatch.setattr(losses.GANLoss, "forward", spy)
    words = "--adversarial_weight 0.2 --discriminator_start 4 --tokenizer_steps 7 --stage tokenizer"
    succeed("train.py", TINY, words, f"--data {images} --weights {weights} --out {tmp_path}")
    assert seen == [False, True, True]


def test_ema_follows_the_formula_and_warms_up(finished):
    model = torch.nn.Linear(1, 1, bias=False)
    average = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 5.0)
    torch.nn.init.constant_(average.weight, 1.0)
    train.update_ema(average, model, 0.75, 10**6)
    assert average.weight.item() == 2.0
    train.update_ema(average, model, 0.75, 0)  # the decay is (1 + 0) / (10 + 0)
    assert average.weight.item() == pytest.approx(0.1 * 2 + 0.9 * 5)
    saved = read_checkpoint(finished / "tokenizer.pt")
    key = "encoder.latent_tokens"
    drift = (saved["ema"][key] - saved["model"][f"tokenizer.{key}"]).abs().mean()
    assert 0 < drift < 0.05  # after 20 steps, a decay of 0.999 would still sit at its start


def test_schedule_warms_up_and_ends_at_zero():
    config, _ = options.parse_config("--lr 1e-3 --warmup_steps 10".split())
    lr = [train.warmup_cosine(step, 100, config) for step in range(100)]
    assert lr[0] == pytest.approx(1e-4) and lr[50] == pytest.approx(5e-4) and 0 < lr[99] < 1e-6


# --------------------------------------------------------------------------------------------------
# Bad input.

BAD = [  # what is said on the command line, and what the sentence must name
    ("--data {tmp}/nowhere", "nowhere"),
    ("--data {tmp}", "no images"),
    ("--learning_rat 3", "unrecognized arguments: --learning_rat 3"),
    ("--token 3", "unrecognized arguments: --token 3"),
    ("--tokens 7 --patch_size 2", "7"),
    ("--tokens -1", "--tokens: is -1"),
    ("--image_size 30 --patch_size 4", "30"),
    ("--tokenizer_steps 0", "--tokenizer_steps: is 0; it must be at least 1"),
    ("--generator_steps -1", "--generator_steps: is -1"),
    ("--lr nan", "--lr: is nan"),
    ("--guidance 0.5", "--guidance: is 0.5; it must be at least 1"),
    ("--drop_masked yes", "--drop_masked: is yes; it must be 0 or 1"),
    ("--bottleneck deterministic", "--kl_weight is 1e-06, but a deterministic bottleneck"),
    ("--mask sideways", "sideways"),
    ("--mask_ratio 1.5", "1.5"),
    ("--size XXL", "XXL"),
    ("--generator_size XXL", "XXL"),
    ("--batch_size 9 --micro_batch 2", "--micro_batch 2"),
    ("--tokens many", "many"),
    ("--preset b257", "b257"),
    ("--stage generator", "tokenizer.pt does not exist"),
    ("--teacher dinov3", "dinov3"),
    ("--encoder_init dinov2_vitb14", "--encoder_init dinov2_vitb14"),
    ("--adversarial_weight 1 --image_size 24", "multiple of 16"),
    ("--weights {tmp}/nowhere", "--weights {tmp}/nowhere is not a folder"),
    ("--perceptual_weight 1", "cannot download vgg16-397923af.pth from https://download.pytorch."),
    ("--teacher dinov2_vitb14", "--weights FOLDER"),
    ("--teacher dinov2_vits14 --weights {tmp}/evil", "pickled code"),
    ("--teacher dinov2_vits14 --weights {tmp}/short", 'Missing key(s) in state_dict: "norm.bias"'),
    ("--teacher dinov2_vits14 --weights {tmp}/cut", "truncated"),
]


@pytest.mark.parametrize("words, named", BAD, ids=lambda value: value)
def test_bad_arguments_get_one_sentence(words, named, tmp_path):
    state = filled("dinov2_vits14_pretrain") if "short" in words else {"x": torch.zeros(9)}
    state.pop("norm.bias", None)
    for name, content in (("evil", {"x": range(3)}), ("short", state), ("cut", state)):
        (tmp_path / name).mkdir()
        torch.save(content, tmp_path / name / PRETRAINED["dinov2_vits14"].name)
    os.truncate(tmp_path / "cut" / PRETRAINED["dinov2_vits14"].name, 300)
    error = refuse("train.py", f"{TINY} --out {tmp_path}/out", words.format(tmp=tmp_path))
    assert named.format(tmp=tmp_path) in error
    assert not list(tmp_path.glob("out/*.pt"))


def test_bad_arguments_through_the_shell(tmp_path):
    for script, words, named in (
        ("train.py", "--tokens 7 --image_size 16", "7"),
        ("sample.py", f"{tmp_path}", "not a run"),
    ):
        done = shell(script, words)
        assert done.returncode == 2 and named in done.stderr, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words, named",
    [
        ("--classes 3", "0..2"),
        ("--interval 0.7 0.1", "0.7"),
        ("--steps 0", "--steps: is 0; it must be at least 1"),
        (f"--steps 1{30 * '0'}", "at most 1000000"),
        ("--gidance 2", "unrecognized arguments: --gidance 2"),
        ("--npz 4 --reconstruct {images}", "not allowed with argument --npz"),
        ("--reconstruct {tmp}", "no images"),
        ("--columns 1000000", "--columns: is 1000000"),
    ],
)
def test_bad_arguments_of_sample(finished, images, tmp_path, words, named):
    error = refuse("sample.py", str(finished), words.format(images=images, tmp=tmp_path))
    assert named in error


def test_a_batch_that_the_processes_do_not_divide():
    config, _ = options.parse_config(["--batch_size", "9"])
    with pytest.raises(UserError, match="cannot be divided among 2"):
        options.check_config(config, Distributed(0, 2, torch.device("cpu")))


@pytest.mark.parametrize(
    "damage, words, named",
    [
        ("", "--lr 0.5", "lr 0.0001, this run has 0.5"),
        ("", "--tokens 8", "tokens 4, this run has 8"),
        ("tokenizer.pt", "", "truncated"),
        ("latents.npy", "--stage generator", "truncated"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(
    finished, whole, tmp_path, damage, words, named
):
    out = copy_run(finished, tmp_path)
    if damage:
        os.truncate(out / damage, os.path.getsize(out / damage) // 2)
        (out / "result.json").unlink()  # so that the stage is not passed over
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    assert named in refuse("train.py", whole, f"--out {out} {words}")
    assert before == {name: (out / name).read_bytes() for name in os.listdir(out)}


@pytest.mark.parametrize(
    "key, value", [("step", "7"), ("step", -1), ("ema", None), ("config", []), ("stage", 3)]
)
def test_a_checkpoint_with_a_missing_or_wrong_entry_is_refused(
    finished, whole, tmp_path, key, value
):
    out = copy_run(finished, tmp_path)
    saved = read_checkpoint(out / "tokenizer.pt")
    saved[key] = value
    torch.save(saved, out / "tokenizer.pt")
    (out / "decoder.pt").unlink()
    error = refuse("train.py", whole, f"--out {out}")
    assert "tokenizer.pt" in error and ("not a whole checkpoint" in error or "damaged" in error)


def test_a_stale_latent_cache_is_refused(finished, whole, tmp_path):
    out = copy_run(finished, tmp_path)
    saved = torch.load(out / "decoder.pt", weights_only=True)
    saved["ema"]["bottleneck.proj.bias"] += 1
    torch.save(saved, out / "decoder.pt")
    (out / "generator.pt").unlink()
    assert "another tokenizer" in refuse("train.py", whole, f"--out {out} --stage generator")


def test_a_generator_on_another_tokenizer_is_refused(finished, whole, tmp_path):
    """generator.pt is of other latents than the present tokenizer makes, and unfinished."""
    out = copy_run(finished, tmp_path)
    for name in ("decoder.pt", "generator.pt"):
        saved = torch.load(out / name, weights_only=True)
        saved["ema"].get("bottleneck.proj.bias", torch.zeros(1)).add_(1)
        torch.save(saved | {"step": saved["step"] - (name == "generator.pt")}, out / name)
    for name in ("latents.npy", "latents.json"):
        (out / name).unlink()
    done = call("train.py", whole, f"--out {out}")
    assert done.returncode == 2 and "generator.pt was made with encoder" in done.stderr


def test_replaced_images_are_noticed(tmp_path):
    """Other images of the same number and names between two calls of train.py."""
    folder = make_folder(tmp_path / "images", 3, 10)
    words = f"{TINY} --tokenizer_steps 1 --decoder_steps 1 --generator_steps 1"
    words += f" --data {folder} --out {tmp_path}/out"
    succeed("train.py", words, "--stage tokenizer")
    Image.new("RGB", (90, 90)).save(folder / "class1" / "4.png")
    assert "tokenizer.pt was made with data" in refuse("train.py", words)


# --------------------------------------------------------------------------------------------------
# Once in a while.


def test_an_unreadable_held_out_image_does_not_end_a_run(tmp_path):
    folder = make_folder(tmp_path / "images", 2, 20)
    words = f"{TINY} --tokenizer_steps 2 --stage tokenizer --data {folder} --out {tmp_path}/out"
    run = open_run(words, tmp_path / "out")
    path = Path(run.data.paths[run.val_indices[0]])
    path.write_bytes(path.read_bytes()[:99])
    done = succeed("train.py", words)
    assert f"warning: {path} is not a readable image" in done.stderr
    assert log_lines(tmp_path / "out", "tokenizer")


def test_speed_leaves_out_saving_and_evaluation(images, tmp_path, monkeypatch):
    """A save that takes a second at every sixth step does not show in images/s."""
    save = checkpoint.Checkpoint.save
    slow = lambda self, step: (time.sleep(1), save(self, step))  # noqa: E731
    monkeypatch.setattr(checkpoint.Checkpoint, "save", slow)
    steps = "--tokenizer_steps 12 --save_every 6 --log_every 6 --stage tokenizer"
    succeed("train.py", TINY, steps, f"--data {images} --out {tmp_path}/out")
    line = log_lines(tmp_path / "out", "tokenizer")[-1]
    assert line["images_per_second"] > 2 * 8 * 6 / 7  # with it, at most 6 steps a second


def test_pictures_come_with_the_first_evaluation(images, tmp_path, monkeypatch):
    seen = []
    write_grid = evaluate.write_grid

    def spy(rows, path):
        seen.append(path.name)
        write_grid(rows, path)

    monkeypatch.setattr(evaluate, "write_grid", spy)
    steps = "--tokenizer_steps 6 --save_every 2 --stage tokenizer"
    succeed("train.py", TINY, steps, f"--data {images} --out {tmp_path}/out")
    assert seen == ["masks.png", *["reconstructions.png"] * 3]
    lines = [json.loads(text) for text in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "psnr" in line] == [2, 4, 6]


def test_samples_on_the_way_are_measured_and_change_nothing(finished, whole, tmp_path, monkeypatch):
    out = copy_run(finished, tmp_path)
    (out / "generator.pt").unlink()
    (out / "log.jsonl").unlink()
    saved_steps = []
    sample_quality = train.sample_quality

    def spy(*args):
        saved_steps.append(read_checkpoint(out / "generator.pt")["step"])
        return sample_quality(*args)

    monkeypatch.setattr(train, "sample_quality", spy)
    succeed("train.py", f"{whole} --sample_every 8 --out {out}")
    assert saved_steps == [8, 16, 20]  # first the checkpoint, then the samples
    lines = [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]
    distances = {
        line["step"]: line["hog_frechet_distance"]
        for line in lines
        if "hog_frechet_distance" in line
    }
    assert list(distances) == [8, 16, 20]
    assert len(set(distances.values())) == 3
    same_weights(out / "generator.pt", finished / "generator.pt")
    assert (out / "samples.png").read_bytes() == (finished / "samples.png").read_bytes()


def test_the_resolved_config_is_printed(images, tmp_path):
    words = f"--tokenizer_steps 1 --stage tokenizer --data {images} --out {tmp_path}/out --lr 0.003"
    printed = succeed("train.py", TINY, words).stdout
    config = " ".join(printed.partition("config: ")[2].split("\ntokenizer:")[0].split())
    for field in dataclasses.fields(recipes.Config):
        assert f"{field.name} " in config or field.default == "", field.name
    assert "lr 0.003," in config and "90 images in 3 classes, 30 to 30 in each" in printed
    assert call("train.py", "--help").returncode in (0, None)
