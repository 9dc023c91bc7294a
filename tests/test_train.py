"""train.py, sample.py and recipes.py, mostly through their command lines."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from reference import (
    ENV,
    KILL_AFTER_SAVE,
    PROCESS_COUNT_TOLERANCE,
    ROOT,
    TINY,
    TINY_STEPS,
    call,
    close_weights,
    command,
    filled,
    log_lines,
    make_folder,
    official_folder,
    same_weights,
    shell,
    succeed,
)

import losses
import recipes
import sample
import train
from plumbing import state
from plumbing.data import Latents
from plumbing.run import Processes, UserError, command_line, file_hash, load_checkpoint
from plumbing.weights import OFFICIAL


@pytest.fixture(scope="session")
def whole(images, weights):
    """Arguments of a tiny run with every term of the objective: 20 steps per stage, the discriminator from 10, felt from 12.

    So it joins in the very step at which other tests kill and resume.

    A small learning rate: rounding moves the kinks of VGG's max pools, and larger steps soon make that visible.
    """
    terms = "--perceptual_weight 1 --adversarial_weight 0.2 --discriminator_start 10"
    return f"{TINY} {TINY_STEPS} {terms} --lr 1e-4 --batch_size 4 --weights {weights} --data {images}"


@pytest.fixture(scope="session")
def finished(whole, tmp_path_factory):
    """That run, unbroken."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    succeed("train.py", whole, f"--out {out}")
    return out


def test_a_run_leaves_what_it_promises(finished):
    names = (
        "log.jsonl result.json latents.npy latents.json masks.png reconstructions.png samples.png tokenizer.pt decoder.pt sit.pt"
    )
    assert set(os.listdir(finished)) == set(names.split())
    assert (finished / "tokenizer.pt").stat().st_size < 40e6  # without VGG and DINO
    result = json.loads((finished / "result.json").read_text())
    assert result["decoder"]["psnr"] > 5 and result["decoder"]["held_out_images"] == 8
    assert result["decoder"]["hog_frechet_distance"] > 0 and result["sit"]["hog_frechet_distance"] > 0  # not called FID
    assert result["config"] == load_checkpoint(finished / "sit.pt")["config"]
    line = log_lines(finished, "tokenizer")[-1]
    expected = "loss mse perceptual adversarial kl local global discriminator consistency lecam adaptive_weight"
    expected += " kl_per_token active_units latent_std model_grad_norm discriminator_grad_norm lr images_per_second"
    assert set(expected.split()) <= line.keys() and line["step"] == 20 and line["skipped_steps"] == 0
    assert all(np.isfinite(value) for value in line.values() if not isinstance(value, str))
    assert 0 < line["adaptive_weight"] <= losses.MAX_ADAPTIVE_WEIGHT
    assert "adversarial" in log_lines(finished, "decoder")[0]
    assert "1 perceptual + 0.2 adversarial" in result["objective"] and "off" not in result["objective"]
    assert len(result["weights"]) == 3 and all(len(sha256) == 64 for sha256 in result["weights"].values())
    assert Image.open(finished / "samples.png").size == (8 * 64, 3 * 64)  # 3 classes
    assert log_lines(finished, "tokenizer")[0]["loss"] > line["loss"]


def test_the_decoder_stage_goes_on_with_the_discriminator(finished, whole):
    """Its weights, moving averages and adaptive weight are those of tokenizer.pt."""
    config, _ = recipes.parse_config([*whole.split(), "--out", str(finished)])
    run = state.Run.open(config, Processes(0, 1, torch.device("cpu")))
    adversary, tokenizer = losses.Adversary(384), train.build_tokenizer(dataclasses.asdict(config))
    steps, _ = train.start_from(run, "decoder", tokenizer, adversary)
    saved = load_checkpoint(finished / "tokenizer.pt")
    assert steps == 20 and all(torch.equal(value, saved["adversary"][key]) for key, value in adversary.state_dict().items())
    assert adversary.weight > 0 and torch.equal(tokenizer.encoder.norm.bias, saved["ema"]["encoder.norm.bias"])


def test_latent_statistics_are_those_of_the_latents(finished):
    """The buffers saved with the tokenizer normalise posterior samples of the training set."""
    saved = load_checkpoint(finished / "sit.pt")["tokenizer"]
    stamp, count = json.loads((finished / "latents.json").read_text())["stamp"], len(np.load(finished / "latents.npy"))
    cache = Latents(finished / "latents.npy", stamp, count, 4, 4, 3)
    mean, std, labels = cache.batch(list(range(len(cache))))
    z = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    normal = (z - saved["latent_mean"]) / saved["latent_std"]
    assert normal.mean((0, 1, 2)).abs().max() < 0.1 and (normal.std((0, 1, 2)) - 1).abs().max() < 0.1
    assert sorted(set(labels.tolist())) == [0, 1, 2]


def test_kill_and_resume_equal_an_unbroken_run_bit_for_bit(finished, whole, tmp_path):
    """kill -9 after step 10 of each stage in turn (in the middle of writing the latents), then the same command again."""
    out = tmp_path / "broken"
    arguments = command("train.py", whole, f"--out {out}")[2:]
    for stage in ("tokenizer", "decoder", "latents", "sit"):
        script = KILL_AFTER_SAVE.format(root=str(ROOT), stage=stage)
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=ENV)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    succeed("train.py", whole, f"--out {out}")
    for name in ("tokenizer.pt", "decoder.pt", "sit.pt"):
        same_weights(out / name, finished / name)
    assert (out / "latents.npy").read_bytes() == (finished / "latents.npy").read_bytes()
    assert (out / "latents.json").read_bytes() == (finished / "latents.json").read_bytes()
    assert (out / "samples.png").read_bytes() == (finished / "samples.png").read_bytes()
    for stage in ("tokenizer", "decoder", "sit"):
        broken, whole = log_lines(out, stage), log_lines(finished, stage)
        assert [line["step"] for line in broken] == [10, 20]
        assert [line["loss"] for line in broken] == [line["loss"] for line in whole]


def test_two_processes_equal_one(finished, whole, tmp_path):
    """Losses, weights, moving averages and latents of 2 gloo processes; the later stages from the same tokenizer.pt."""
    first, rest = tmp_path / "first", copy_run(finished, tmp_path)
    for name in ("decoder.pt", "latents.npy", "latents.json", "sit.pt"):
        (rest / name).unlink()
    succeed("train.py", whole, f"--out {first} --stage tokenizer", processes=2)
    succeed("train.py", whole, f"--out {rest}", processes=2)
    for out, stage in ((first, "tokenizer"), (rest, "decoder"), (rest, "sit")):
        assert len(log_lines(out, stage)) == 2
        for two, one in zip(log_lines(out, stage), log_lines(finished, stage)):
            assert two["loss"] == pytest.approx(one["loss"], rel=PROCESS_COUNT_TOLERANCE)
        ours, theirs = (load_checkpoint(run / f"{stage}.pt") for run in (out, finished))
        for part in ("model", "ema", "heads", "adversary"):
            close_weights(ours.get(part, {}), theirs.get(part, {}))
    ours, theirs = (load_checkpoint(run / "sit.pt")["tokenizer"] for run in (rest, finished))
    torch.testing.assert_close(ours["latent_std"], theirs["latent_std"], atol=1e-4, rtol=0)


def test_resume_on_another_process_count_and_micro_batch(finished, whole, tmp_path):
    out = tmp_path / "mixed"
    stop = KILL_AFTER_SAVE.format(root=str(ROOT), stage="tokenizer")
    arguments = command("train.py", whole, f"--out {out} --stage tokenizer")[2:]
    subprocess.run([sys.executable, "-c", stop, *arguments], capture_output=True, env=ENV)
    assert load_checkpoint(out / "tokenizer.pt")["step"] == 10
    succeed("train.py", whole, f"--out {out} --stage tokenizer --micro_batch 1", processes=2)
    ours, theirs = (load_checkpoint(run / "tokenizer.pt") for run in (out, finished))
    close_weights(ours["model"], theirs["model"])


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_stops(images, tmp_path, processes):
    out = tmp_path / "stopped"
    steps = "--tokenizer_steps 5000 --save_every 5000 --log_every 5 --stage tokenizer --workers 1"
    argv = command("train.py", TINY, steps, f"--data {images} --out {out}", processes=processes)
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=ENV)
    while not ((out / "log.jsonl").exists() and (out / "log.jsonl").read_text()) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and "run the same command again" in message
    assert processes > 1 or "Traceback" not in message  # torchrun adds one of its own
    assert load_checkpoint(out / "tokenizer.pt")["step"] >= 5


def test_a_longer_decoder_stage_reaches_the_samples(finished, tmp_path):
    """sit.pt holds the tokenizer of its time; sample.py takes the decoder that was trained last."""
    out = copy_run(finished, tmp_path)
    decoder = load_checkpoint(out / "decoder.pt")
    decoder["ema"]["decoder.to_patches.bias"] += 100
    torch.save(decoder, out / "decoder.pt")
    succeed("sample.py", f"{out} --npz 2 --steps 2")
    assert np.load(out / "samples.npz")["arr_0"].min() == 255


@pytest.mark.parametrize("classes", [0, 1])
def test_flat_and_one_class_folders_train_and_sample(tmp_path, classes):
    folder = make_folder(tmp_path / "images", classes, 20)
    out = tmp_path / "out"
    succeed("train.py", TINY, f"--tokenizer_steps 2 --decoder_steps 2 --sit_steps 2 --data {folder} --out {out}")
    succeed("sample.py", f"{out} --npz 5 --steps 3")
    with np.load(out / "samples.npz") as samples:
        assert samples["arr_0"].shape == (5, 16, 16, 3) and samples["arr_1"].tolist() == [0] * 5
    if classes == 0:
        done = call("sample.py", f"{out} --guidance 3")
        assert done.returncode == 2 and "trained without" in done.stderr


def test_npz_is_exact_and_does_not_depend_on_batch_size_or_processes(finished, tmp_path):
    paths = [tmp_path / f"{i}.npz" for i in range(3)]
    for path, batch, processes in zip(paths, (7, 3, 2), (1, 1, 2)):
        words = f"{finished} --npz 7 --batch_size {batch} --steps 5 --guidance 2 --out {path}"
        succeed("sample.py", words, processes=processes)
    loaded = [np.load(path) for path in paths]
    for other in loaded:
        assert other["arr_0"].shape == (7, 16, 16, 3) and other["arr_0"].dtype == np.uint8
        assert other["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert np.abs(other["arr_0"].astype(int) - loaded[0]["arr_0"]).max() <= 1  # rounding of one part in 255
    record = json.loads((tmp_path / "0.npz.json").read_text())
    assert [record[key] for key in ("solver", "steps", "guidance", "interval", "seed")] == ["sde", 5, 2.0, [0.0, 0.7], 0]
    made_by = record["checkpoint"]
    assert (made_by["file"], made_by["stage"], made_by["step"], made_by["of_steps"]) == ("sit.pt", "sit", 20, 20)
    assert made_by["weights"] == sample.load_run(finished, "cpu").about["weights"] and len(made_by["weights"]) == 64
    assert sorted(os.listdir(tmp_path)) == sorted(f"{i}.{end}" for i in range(3) for end in ("npz", "npz.json"))


def test_sample_pictures(finished, images, tmp_path):
    succeed("sample.py", f"{finished} --classes class2,0 --columns 3 --steps 2 --solver heun --out {tmp_path}/s.png")
    assert Image.open(tmp_path / "s.png").size == (3 * 64, 2 * 64)
    succeed("sample.py", f"{finished} --reconstruct {images} --columns 4 --out {tmp_path}/r.png")
    assert Image.open(tmp_path / "r.png").size == (4 * 64, 2 * 64)


def test_dinov2_teacher_and_encoder_train(images, weights, tmp_path):
    words = f"--size S --teacher dinov2_vits14_reg --encoder_init dinov2_vits14 --weights {weights} --lr 0"
    steps = "--batch_size 2 --tokenizer_steps 1 --stage tokenizer"
    done = succeed("train.py", TINY, words, steps, f"--data {images} --out {tmp_path}/out")
    assert "teacher dinov2_vits14_reg; off: perceptual, adversarial" in done.stdout
    assert done.stderr.count("is not the official file") == 2  # the contents are generated
    model = load_checkpoint(tmp_path / "out" / "tokenizer.pt")["ema"]
    torch.testing.assert_close(
        model["encoder.blocks.3.attn.qkv.weight"], filled("dinov2_vits14_pretrain")["blocks.3.attn.qkv.weight"]
    )


def test_fid_is_reported_under_that_name_where_its_weights_are_at_hand(images, tmp_path):
    file = OFFICIAL["inception"].file
    folder, steps = official_folder(tmp_path / "weights", file.removesuffix(".pth")), "--tokenizer_steps 2"
    words = f"{TINY} {steps} --stage tokenizer --data {images} --weights {folder} --out {tmp_path}/out"
    succeed("train.py", words)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["tokenizer"]["fid_8"] > 0 and "hog_frechet_distance" not in result["tokenizer"]  # called by its count
    assert result["weights"] == {file: file_hash(folder / file)}
    os.truncate(folder / file, 1000)
    with pytest.raises(UserError, match="truncated"):
        train.main(words.replace("/out", "/other").split())
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("tokens", [64, 128])
def test_built_in_shapes_take_the_papers_token_counts(tokens):
    config, _ = recipes.parse_config(["--tokens", str(tokens)])
    assert (config.image_size // config.patch_size) ** 2 % tokens == 0
    recipes.check_config(config, Processes(0, 2, torch.device("cpu")))


def test_dry_run_prints_and_writes_nothing(images, tmp_path):
    done = succeed("train.py", TINY, f"--dry_run --data {images} --out {tmp_path}/out --batch_size 8 --micro_batch 2")
    assert "M parameters" in done.stdout and "1 processes x 4 accumulated x 2 images" in done.stdout
    assert re.search(r"one step +\d+\.\d+ s", done.stdout) and "GB" in done.stdout
    assert not (tmp_path / "out").exists()


def test_dry_run_lists_the_files_that_a_run_needs(images, weights, tmp_path):
    (tmp_path / "vgg16-397923af.pth").symlink_to(weights / "vgg16-397923af.pth")
    words = f"--perceptual_weight 1 --adversarial_weight 1 --weights {tmp_path} --data {images} --dry_run"
    lines = succeed("train.py", TINY, words).stdout.splitlines()
    files = {name: next(line for line in lines if OFFICIAL[name].file in line) for name in OBJECTIVE_FILES}
    assert file_hash(weights / "vgg16-397923af.pth") in files["vgg16"]
    assert "58.9 MB" in files["vgg16"] and "BSD-3-Clause" in files["vgg16"]
    assert "missing, measured with random weights" in files["dino_vits16"] and "https://" in files["dino_vits16"]
    assert "without it there is no FID" in files["inception"] and not any("dinov2" in line for line in lines)


OBJECTIVE_FILES = ("vgg16", "lpips_vgg", "dino_vits16", "inception")


def test_every_config_field_is_read_by_a_run(images, tmp_path, monkeypatch):
    """By the stages themselves: what is copied into checkpoints, compared or checked is no use of a value."""
    asked, fields = set(), {field.name for field in dataclasses.fields(recipes.Config)}

    def read(config, name):
        asked.add(name)
        return object.__getattribute__(config, name)

    def copied(config, **changes):
        values = {name: object.__getattribute__(config, name) for name in fields}
        return recipes.Config(**values | changes)

    def plain(thing):
        return (
            {name: object.__getattribute__(thing, name) for name in fields} if isinstance(thing, recipes.Config) else asdict(thing)
        )

    asdict = dataclasses.asdict
    for module in (train, state, train.show):
        monkeypatch.setattr(module, "asdict", plain)
    monkeypatch.setattr(recipes, "replace", copied)
    monkeypatch.setattr(train, "check_config", lambda *_: None)
    monkeypatch.setattr(state, "load_stage", lambda *_, **__: None)
    config, options = recipes.parse_config([*TINY.split(), "--data", str(images), "--out", str(tmp_path)])
    small = dataclasses.replace(config, tokenizer_steps=2, decoder_steps=2, sit_steps=2)
    monkeypatch.setattr(train, "parse_config", lambda _: (small, options))
    built_from = {
        "image_size",
        "patch_size",
        "tokens",
        "channels",
        "size",
        "posterior",
        "guidance",
        "sample_steps",
    }  # read from dicts, as of checkpoints
    monkeypatch.setattr(recipes.Config, "__getattribute__", read)
    train.main([])
    assert fields - asked - built_from == set()


def test_every_field_tells_its_source_and_its_bounds():
    for field in dataclasses.fields(recipes.Config):
        about = field.metadata
        assert about["help"] and about["source"].split()[0].rstrip(":;") in ("paper", "config", "ours"), field.name
        assert about["fixes"] in ("all", "decoder", "sit", "")
        if field.type in (int, float):
            assert about["least"] is not None and about["least"] <= field.default <= about["most"], field.name
    assert len(dataclasses.fields(recipes.Config)) <= 44


def test_stages_and_recipes_are_dicts_of_fields():
    names = {field.name for field in dataclasses.fields(recipes.Config)}
    dicts = (recipes.PRESETS, recipes.RECIPES, recipes.FULL_RECIPES, recipes.FULL_GENERATORS, recipes.TOY_TOKENS)
    stages = [stage for each in recipes.STAGES.values() for stage in each.values()]
    for values in (*chain(*(each.values() for each in dicts)), *(stage.changes for stage in stages)):
        assert values.keys() <= names
    assert recipes.RECIPES.keys() == recipes.FULL_RECIPES.keys() == recipes.STAGES.keys() == set(recipes.METHODS)
    config, _ = recipes.parse_config("--lr 0.5 --mask random".split())
    decoder = config.at("decoder")
    assert (decoder.lr, decoder.mask, decoder.kl_weight, decoder.uses_teacher) == (0.05, "none", 0, False)
    assert config.at("tokenizer") == config and config.stages["decoder"].learns == ("decoder.",)
    more, _ = recipes.parse_config("--tokens 128 --sit_steps 5 --sample_steps 9".split())
    assert (more.patch_size, more.channels, more.tokenizer_steps, more.sit_steps, more.sample_steps) == (2, 4, 6000, 5, 9)
    baseline, _ = recipes.parse_config("--recipe kl --local_weight 0.3".split())  # flags win
    assert (baseline.mask, baseline.local_weight, baseline.global_weight, baseline.kl_weight) == ("none", 0.3, 0.0, 1e-6)


@pytest.mark.parametrize("recipe", ["kl", "ae"])
def test_baselines_train_resume_and_sample(images, tmp_path, recipe):
    """Without masks, alignment and (ae) noise; no teacher is asked."""
    steps = "--tokenizer_steps 4 --decoder_steps 2 --sit_steps 2 --log_every 2"
    words = f"{TINY} --recipe {recipe} {steps} --data {images} --out {tmp_path}/out"
    succeed("train.py", words)
    line = log_lines(tmp_path / "out", "tokenizer")[-1]
    assert "local" not in line and not (tmp_path / "out" / "masks.png").exists()
    assert (line["kl"] == 0) == (recipe == "ae")
    rows = np.load(tmp_path / "out" / "latents.npy")
    assert rows["std"].any() == (recipe == "kl")
    assert "done before" in succeed("train.py", words).stdout
    succeed("sample.py", f"{tmp_path}/out --npz 2 --steps 2")


def test_local_and_global_alignment_have_weights_of_their_own(images, tmp_path):
    """Table 5 adds them one by one: with weight 0 a term is measured, and its MLP stays where it was."""
    words = f"{TINY} --global_weight 0 --tokenizer_steps 2 --stage tokenizer --data {images} --out {tmp_path}/out"
    succeed("train.py", words)
    saved, line = load_checkpoint(tmp_path / "out" / "tokenizer.pt"), log_lines(tmp_path / "out", "tokenizer")[-1]
    assert line["loss"] == pytest.approx(line["mse"] + 1e-6 * line["kl"] + 0.02 * line["local"], rel=1e-4) and line["global"] > 0
    moments = saved["optimizers"]["model"]["state"]
    assert any(not entry["exp_avg"].any() for entry in moments.values()) and any(
        entry["exp_avg"].any() for entry in moments.values()
    )


def test_presets_are_complete_and_consistent():
    for name in recipes.PRESETS:
        config, _ = recipes.parse_config(["--preset", name, "--data", "x"])
        recipes.check_config(config, Processes(0, 8, torch.device("cpu")))
        if name != "toy":  # the whole objective
            teacher = "dinov2_vits14" if name == "s128" else "dinov2_vitb14"
            assert (config.perceptual_weight, config.adversarial_weight, config.teacher) == (1.0, 0.2, teacher)
            assert config.encoder_init == ("dinov2_vits14" if config.size == "S" else "dinov2_vitb14")
    paper, _ = recipes.parse_config(["--data", "x"])
    assert paper.size == "B" and paper.image_size == 256 and paper.tokens == 128  # the default with data is b256
    assert (paper.sit_steps, paper.sit) == (4_000_000, "XL")


def test_collapse_is_named(finished, images, tmp_path):
    words = f"--kl_weight 1 --lr 1e-2 --tokenizer_steps 60 --log_every 20 --stage tokenizer --data {images} --out {tmp_path}/out"
    done = succeed("train.py", TINY, words)
    assert "posterior has collapsed" in done.stderr and "--kl_weight" in done.stderr
    assert not state.has_collapsed(log_lines(finished, "tokenizer")[-1])
    for kl, units, collapsed in ((1.3, 0.05, False), (0.05, 1.0, True), (float("nan"), 0.0, False)):  # a code of few units is good
        assert state.has_collapsed({"kl_per_token": kl, "active_units": units}) == collapsed


def test_non_finite_steps_are_skipped_and_leave_no_trace(tmp_path):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(3))
    other = torch.nn.Parameter(torch.ones(3))  # of a discriminator that has no gradients yet
    optimizer, idle = (torch.optim.AdamW([x], fused=True) for x in (weight, other))
    config, _ = recipes.parse_config(["--out", str(tmp_path)])
    run = state.Run.open(config, Processes(0, 1, torch.device("cpu")))
    keeper = state.State(run, "tokenizer", {}, {"model": optimizer, "discriminator": idle})
    weight.grad = torch.ones(3)
    keeper.update(0.1)
    before, kept = weight.detach().clone(), {key: value.clone() for key, value in optimizer.state[weight].items()}
    for bad in (float("nan"), float("inf")):
        weight.grad = torch.tensor([1.0, bad, 1.0])
        keeper.update(0.1)
        assert torch.equal(weight, before)
        assert all(torch.equal(value, kept[key]) for key, value in optimizer.state[weight].items())
    assert keeper.skipped.tolist() == [2, 2, 2] and not idle.state
    weight.grad, keeper.sums = torch.ones(3), {}
    keeper.update(0.1)
    assert keeper.sums.keys() == {"model_grad_norm"}
    assert not torch.equal(weight, before) and keeper.skipped.tolist() == [2, 0, 2]  # no step of a window is missed
    after = weight.detach().clone()
    weight.grad, other.grad = torch.ones(3), torch.full((3,), float("nan"))
    keeper.update(0.1)  # one that is not finite stops both
    assert torch.equal(weight, after) and torch.equal(other, torch.ones(3)) and keeper.skipped.tolist() == [3, 1, 2]
    assert keeper.step == 5


def test_gradients_are_clipped_to_norm_1(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(2))
    config, _ = recipes.parse_config(["--out", str(tmp_path)])
    run = state.Run.open(config, Processes(0, 1, torch.device("cpu")))
    keeper = state.State(run, "tokenizer", {}, {"model": torch.optim.SGD([weight], lr=1.0, fused=True)})
    weight.grad = torch.tensor([30.0, 40.0])
    keeper.update(1.0)
    assert keeper.sums["model_grad_norm"] == 50 and torch.allclose(weight, torch.tensor([-0.6, -0.8]), atol=1e-5)


def test_many_non_finite_steps_stop_the_run(images, tmp_path):
    words = f"--kl_weight 1e38 --tokenizer_steps 40 --log_every 10 --stage tokenizer --data {images} --out {tmp_path}/out"
    done = call("train.py", TINY, words)
    assert done.returncode == 2 and "10 steps in a row" in done.stderr and "Traceback" not in done.stderr


def test_ema_follows_the_formula_and_warms_up(finished):
    model, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 5.0)
    torch.nn.init.constant_(average.weight, 1.0)
    state.update_ema(average, model, 0.75, 10**6)
    assert average.weight.item() == 2.0
    state.update_ema(average, model, 0.75, 0)  # (1 + 0) / (10 + 0)
    assert average.weight.item() == pytest.approx(0.1 * 2 + 0.9 * 5)
    saved = load_checkpoint(finished / "tokenizer.pt")
    key = "encoder.latent_tokens"  # after 20 steps an average with decay 0.999 would still sit at its start
    drift = (saved["ema"][key] - saved["model"][key]).abs().mean()
    assert 0 < drift < 0.05


def test_schedule_warms_up_and_ends_at_zero():
    config, _ = recipes.parse_config("--lr 1e-3 --warmup_steps 10 --tokenizer_steps 100".split())
    lr = [train.warmup_cosine(config, step, 100) for step in range(100)]
    assert lr[0] == pytest.approx(1e-4) and lr[50] == pytest.approx(5e-4) and 0 < lr[99] < 1e-6


BAD = [  # what is said on the command line, what the sentence must name
    ("--data {tmp}/nowhere", "nowhere"),
    ("--data {tmp}", "no images"),
    ("--learning_rat 3", "unrecognized arguments: --learning_rat 3"),
    ("--token 3", "did you mean --tokens"),
    ("--tokens 7", "7"),
    ("--tokens -1", "--tokens: is -1"),
    ("--image_size 30 --patch_size 4", "30"),
    ("--tokenizer_steps 0", "--tokenizer_steps: is 0; it must be at least 1"),
    ("--sit_steps -1", "--sit_steps: is -1"),
    ("--lr nan", "--lr: is nan"),
    ("--guidance 0.5", "--guidance: is 0.5; it must be at least 1"),
    ("--posterior point", "--kl_weight is 1e-06, but a point posterior has no KL"),
    ("--mask sideways", "sideways"),
    ("--mask_ratio 1.5", "1.5"),
    ("--size XXL", "XXL"),
    ("--sit XXL", "XXL"),
    ("--batch_size 9 --micro_batch 2", "--micro_batch 2"),
    ("--tokens many", "many"),
    ("--preset b257", "b257"),
    ("--stage sit", "tokenizer.pt does not exist"),
    ("--teacher dinov3", "dinov3"),
    ("--encoder_init dinov2_vitb14", "--encoder_init dinov2_vitb14"),
    ("--adversarial_weight 1 --image_size 24", "multiple of 16"),
    ("--weights {tmp}/nowhere", "--weights {tmp}/nowhere is not a folder"),
    ("--perceptual_weight 1", "cannot fetch vgg16-397923af.pth from https://download.pytorch.org/"),
    ("--teacher dinov2_vitb14", "--weights FOLDER"),
    ("--teacher dinov2_vits14 --weights {tmp}/evil", "pickled code"),
    ("--teacher dinov2_vits14 --weights {tmp}/short", 'Missing key(s) in state_dict: "norm.bias"'),
    ("--teacher dinov2_vits14 --weights {tmp}/cut", "truncated"),
]


@pytest.mark.parametrize("words, named", BAD, ids=lambda value: value)
def test_bad_arguments_get_one_sentence(words, named, tmp_path, capsys, monkeypatch):
    """In this process, to be quick; `command_line` is what the script runs."""
    monkeypatch.setattr(
        sys, "argv", ["train.py", *TINY.split(), "--out", str(tmp_path / "out"), *words.format(tmp=tmp_path).split()]
    )
    state = filled("dinov2_vits14_pretrain") if "short" in words else {"x": torch.zeros(9)}
    state.pop("norm.bias", None)
    for name, content in (("evil", {"x": range(3)}), ("short", state), ("cut", state)):
        (tmp_path / name).mkdir()
        torch.save(content, tmp_path / name / OFFICIAL["dinov2_vits14"].file)
    os.truncate(tmp_path / "cut" / OFFICIAL["dinov2_vits14"].file, 300)
    with pytest.raises(SystemExit) as stop:
        command_line(train.main)
    *warnings, message = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and named.format(tmp=tmp_path) in message and message.startswith("error: ")
    assert all("is not the official file" in line for line in warnings)
    assert not list(tmp_path.glob("out/*.pt"))


def test_bad_arguments_through_the_shell(tmp_path):
    for script, words, named in (("train.py", "--tokens 7 --image_size 16", "7"), ("sample.py", f"{tmp_path}", "not a run")):
        done = shell(script, words)
        assert done.returncode == 2 and named in done.stderr and "Traceback" not in done.stderr, (words, done.stderr)
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("words, named", [
    ("--classes 3", "0..2"),
    ("--interval 0.7 0.1", "0.7"),
    ("--steps 0", "0 sampling steps"),
    ("--gidance 2", "--guidance"),
    ("--npz 4 --reconstruct {images}", "not allowed with argument --npz"),
    ("--reconstruct {tmp}", "no images"),
])  # fmt: skip
def test_bad_arguments_of_sample(finished, images, tmp_path, words, named, monkeypatch, capsys):
    words = words.format(images=images, tmp=tmp_path)
    monkeypatch.setattr(sys, "argv", ["sample.py", str(finished), *words.split()])
    with pytest.raises(SystemExit) as stop:
        command_line(sample.main)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and named in message and message.startswith("error: ") and message.count("\n") == 1


def test_a_batch_that_the_processes_do_not_divide():
    config, _ = recipes.parse_config(["--batch_size", "9"])
    with pytest.raises(UserError, match="cannot be divided among 2"):
        recipes.check_config(config, Processes(0, 2, torch.device("cpu")))


def copy_run(finished, tmp_path):
    out = tmp_path / "copy"
    out.mkdir()
    for name in os.listdir(finished):
        (out / name).write_bytes((finished / name).read_bytes())
    return out


@pytest.mark.parametrize("damage, words, named", [
    ("", "--lr 0.5", "lr 0.0001"),
    ("", "--tokens 8", "tokens 4"),
    ("tokenizer.pt", "", "truncated"),
    ("latents.npy", "", "truncated"),
])  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(finished, whole, tmp_path, damage, words, named, monkeypatch, capsys):
    out = copy_run(finished, tmp_path)
    if damage:
        os.truncate(out / damage, os.path.getsize(out / damage) // 2)
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    arguments = f"{whole} --out {out} {words}".split()
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        command_line(train.main)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and named in message
    assert before == {name: (out / name).read_bytes() for name in os.listdir(out)}


def test_a_stale_latent_cache_is_refused(finished, whole, tmp_path, monkeypatch, capsys):
    out = copy_run(finished, tmp_path)
    saved = torch.load(out / "decoder.pt", weights_only=True)
    saved["ema"]["encoder.to_moments.bias"] += 1
    torch.save(saved, out / "decoder.pt")
    monkeypatch.setattr(sys, "argv", ["train.py", *f"{whole} --out {out} --stage sit".split()])
    with pytest.raises(SystemExit) as stop:
        command_line(train.main)
    assert stop.value.code == 2 and "another tokenizer" in capsys.readouterr().err


def test_replaced_images_are_noticed(images, tmp_path, monkeypatch, capsys):
    """Other images of the same number and names between two calls: nothing goes on from what the old ones made."""
    folder, words = tmp_path / "images", f"{TINY} --tokenizer_steps 1 --decoder_steps 1 --sit_steps 1"
    make_folder(folder, 3, 10)
    arguments = f"{words} --data {folder} --out {tmp_path}/out".split()
    train.main([*arguments, "--stage", "tokenizer"])
    Image.new("RGB", (90, 90)).save(folder / "class1" / "4.png")
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        command_line(train.main)
    assert stop.value.code == 2 and "made with other images" in capsys.readouterr().err


def test_speed_leaves_out_saving_and_evaluation(images, tmp_path, monkeypatch):
    """A save that takes a second at every other step does not show in images/s."""
    save = state.State.save
    monkeypatch.setattr(state.State, "save", lambda self: (time.sleep(1), save(self)))
    steps = "--tokenizer_steps 12 --save_every 6 --log_every 6 --stage tokenizer"
    train.main([*f"{TINY} {steps} --data {images} --out {tmp_path}/out".split()])
    assert log_lines(tmp_path / "out", "tokenizer")[-1]["images_per_second"] > 2 * 8 * 6 / 7  # with it at most 6 steps a second


def test_pictures_come_with_the_first_evaluation(images, tmp_path):
    steps = "--tokenizer_steps 6 --save_every 2 --stage tokenizer"
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        write = train.show.write_image
        patch.setattr(train.show, "write_image", lambda rows, path: (seen.append(path.name), write(rows, path)))
        train.main([*f"{TINY} {steps} --data {images} --out {tmp_path}/out".split()])
    assert seen == ["masks.png", *["reconstructions.png"] * 3]
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "psnr" in line] == [2, 4, 6]
