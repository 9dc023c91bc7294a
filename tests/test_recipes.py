"""The family: each recipe through its stages, with what it has of its own."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from reference import ENV, KILL_AFTER_SAVE, PROCESS_COUNT_TOLERANCE, ROOT, TINY, call, close_weights, fill, log_lines
from reference import same_weights, succeed

import align
import masking
import recipes
import train
from plumbing.run import Processes, UserError, load_checkpoint

STEPS = "--tokenizer_steps 20 --decoder_steps 12 --sit_steps 12 --log_every 2 --save_every 10 --patch_size 4 --batch_size 4"
FAMILY = {  # recipe: flags, the stage in which it is killed
    "maetok": ("", "decoder"),
    "ldetok": ("--tokens 0 --channels 2 --generator lightningdit", "tokenizer"),
    "aligntok": ("--tokens 0 --teacher dinov2_vits14 --lr 1e-4 --decoder_steps 2 --sit_steps 2", "joint"),
}


SMALL = (48, 2, 3, 14, 37, 0)  # DINOv2's layout, narrow and shallow: a checkpoint is of 12 MB in place of 350
SMALL_DINOV2 = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import align
align.VITS["dinov2_vits14"] = {SMALL}
"""


@pytest.fixture
def small_dinov2(monkeypatch, tmp_path):
    """In this process, as SMALL_DINOV2 in others; a folder with its file."""
    monkeypatch.setitem(align.VITS, "dinov2_vits14", SMALL)
    state = {key: fill(key, value.shape) for key, value in align.ViT("dinov2_vits14").state_dict().items()}
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    return tmp_path


@pytest.mark.parametrize("recipe", FAMILY)
def test_a_recipe_trains_resumes_bit_for_bit_and_equals_itself_on_two_processes(recipe, images, small_dinov2, tmp_path):
    """From nothing to samples; kill -9 in the middle of its own stage, and resumed; on two processes, with accumulation."""
    flags, stage = FAMILY[recipe]
    words = f"{TINY} {STEPS} --recipe {recipe} {flags} --weights {small_dinov2} --data {images}"
    whole, broken, two = (tmp_path / name for name in ("whole", "broken", "two"))
    train.main(f"{words} --out {whole}".split())
    stages = list(recipes.STAGES[recipe])
    assert all((whole / f"{name}.pt").exists() for name in (*stages, "sit")) and (whole / "samples.png").exists()
    for name in (*stages, "sit"):
        assert all(np.isfinite(value) for line in log_lines(whole, name) for value in line.values() if not isinstance(value, str))

    script = SMALL_DINOV2 + KILL_AFTER_SAVE.format(root=str(ROOT), stage=stage)
    killed = subprocess.run([sys.executable, "-c", script, *f"{words} --out {broken}".split()], capture_output=True, env=ENV)
    assert killed.returncode == -9 and load_checkpoint(broken / f"{stage}.pt")["step"] == 10
    train.main(f"{words} --out {broken}".split())
    for name in (*stages, "sit"):
        same_weights(broken / f"{name}.pt", whole / f"{name}.pt")
    assert (broken / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()

    script = tmp_path / "small.py"
    script.write_text(SMALL_DINOV2 + "import train\ntrain.command_line(train.main)")
    succeed(script, words, f"--out {two} --micro_batch 1", processes=2)
    for name in stages[:2]:
        for ours, theirs in zip(log_lines(two, name), log_lines(whole, name), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=10 * PROCESS_COUNT_TOLERANCE)
    ours, theirs = (load_checkpoint(out / f"{stages[0]}.pt") for out in (two, whole))
    for part in ("model", "ema", "heads"):
        close_weights(ours[part], theirs[part])
    rows = np.load(whole / "latents.npy")
    assert rows["mean"].shape[1:] == ((2, 4, 4) if recipe == "maetok" else (2, 16, 2 if recipe == "ldetok" else 4))
    assert rows["std"].any() == (recipe == "ldetok")


def spied(monkeypatch, module, name):
    """The arguments of each call of a function, from now on."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments: calls.append(arguments) or function(*arguments))
    return calls


def test_maetoks_ratio_is_a_range_and_falls_to_zero_in_the_decoder_stage(images, tmp_path, monkeypatch):
    ranges = spied(monkeypatch, masking, "mask_ratio")
    steps = "--tokenizer_steps 3 --decoder_steps 4 --sit_steps 1"
    train.main(f"{TINY} --recipe maetok {steps} --data {images} --out {tmp_path}/out".split())
    assert [(most, least) for _, most, least in ranges[:3]] == [(0.6, 0.4)] * 3
    expected = [0.6 * left for left in (1, 0.75, 0.5, 0.25)]
    assert [most for _, most, _ in ranges[3:]] == [least for _, _, least in ranges[3:]] == pytest.approx(expected)


def test_ldetok_drops_as_many_patches_of_each_image_and_noises_in_training_only(images, tmp_path, monkeypatch):
    ratios, noised = spied(monkeypatch, masking, "mask_ratio"), spied(monkeypatch, masking, "noise_latents")
    steps = "--tokenizer_steps 6 --decoder_steps 3 --sit_steps 1"
    train.main(f"{TINY} --tokens 0 --recipe ldetok {steps} --data {images} --out {tmp_path}/out".split())
    assert all((u == u[0]).all() for u, _, _ in ratios[:6]) and len({u[0].item() for u, _, _ in ratios[:6]}) == 6
    assert len(noised) == 6 and all(gamma == 3.0 and len(tau.unique()) == len(tau) for _, tau, _, gamma in noised)


def test_preservation_begins_at_zero_and_is_weighed_by_the_gradients(images, small_dinov2, tmp_path):
    """The joint stage starts from the encoder whose latents it preserves; the first step measures no gradient of the distance."""
    words = f"--recipe aligntok --tokens 0 --teacher dinov2_vits14 --lr 1e-3 --weights {small_dinov2} --patch_size 4 --log_every 1"
    out = tmp_path / "out"
    train.main(f"{TINY} {words} --tokenizer_steps 17 --stage adapter --data {images} --out {out}".split())
    train.main(f"{TINY} {words} --tokenizer_steps 17 --stage joint --data {images} --out {out}".split())
    lines = log_lines(out, "joint")
    assert lines[0]["preservation"] == 0 and all(line["preservation"] > 0 for line in lines[1:])
    assert lines[0]["loss"] == pytest.approx(lines[0]["mse"])
    weights_of = [(line["loss"] - line["mse"]) / line["preservation"] for line in lines[1:]]
    assert weights_of[0] == pytest.approx(0, abs=1e-4) and all(0 < weight <= 100.1 for weight in weights_of[1:])
    assert np.std(weights_of[1:]) > 0
    adapter, joint = (load_checkpoint(out / f"{stage}.pt") for stage in ("adapter", "joint"))
    frozen, moved = "encoder.teacher.vit.blocks.1.attn.qkv.weight", "encoder.adapter.0.weight"
    official = load_checkpoint(small_dinov2 / "dinov2_vits14_pretrain.pth")["blocks.1.attn.qkv.weight"]
    assert torch.equal(adapter["model"][frozen], official) and not torch.equal(joint["model"][frozen], official)
    assert not torch.equal(adapter["model"][moved], joint["model"][moved])


def test_nothing_but_recipes_py_knows_a_recipes_name():
    """A difference between two papers is one between two dicts."""
    names = re.compile("|".join(f"[\"']{name}[\"']" for name in recipes.METHODS if name not in ("kl", "ae")))
    for path in (*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py")):
        assert path.name in ("recipes.py", "lab.py") or not names.search(path.read_text()), path
    text = (ROOT / "recipes.py").read_text()
    assert len(names.findall(text)) >= 4 and "if config.recipe" not in text


@pytest.mark.parametrize("recipe", recipes.METHODS)
@pytest.mark.parametrize("preset", recipes.PRESETS)
@pytest.mark.parametrize("generator", ["", "--generator sit", "--generator lightningdit"])
def test_every_recipe_is_consistent_at_every_scale(recipe, preset, generator):
    config, _ = recipes.parse_config(f"--recipe {recipe} --preset {preset} {generator}".split())
    recipes.check_config(config, Processes(0, 1, torch.device("cpu")))
    assert preset == "toy" or (config.perceptual_weight and config.adversarial_weight)
    if preset not in ("toy", "s128"):
        assert config.decoder_steps >= 50_000
        assert generator != "--generator lightningdit" or (config.sit_batch_size, config.sit_lr) == (1024, 2e-4)


CONTRADICTIONS = [  # the command line, what its sentence must name
    ("--recipe ae --kl_weight 1e-6", "--kl_weight is 1e-06, but a point posterior"),
    ("--mask dropped", "--mask dropped leaves out latents"),
    ("--recipe ldetok --tokens 16", "--mask dropped leaves out latents"),
    ("--recipe ldetok --local_weight 1", "--mask dropped leaves out latents"),
    ("--recipe ldetok --features_weight 1", "--mask dropped leaves out latents"),
    ("--recipe aligntok --mask dropped", "--mask dropped leaves out latents"),
    ("--recipe aligntok --tokens 16", "--tokens is 16, but a teacher"),
    ("--recipe kl --tokens 128 --patch_size 4 --mask latent", "--tokens 128 is more than the 64 patches of --patch_size 4"),
    ("--tokens 24 --patch_size 4", "--tokens 24 does not divide the 64 patches"),
    ("--preservation_weight 1", "--preservation_weight 1.0: stage tokenizer has no stage before"),
    ("--stage joint", "--stage joint: recipe mactok has the stages all, tokenizer, decoder, latents, sit"),
    ("--recipe aligntok --stage joint", "adapter.pt does not exist; run the stage adapter first"),
    ("--recipe vae", "vae"),
    ("--recipe ldetok --latent_noise -1", "--latent_noise: is -1"),
    ("--generator dit", "dit"),
]


@pytest.mark.parametrize("words, named", CONTRADICTIONS)
def test_contradictions_get_one_sentence_before_anything_is_written(words, named, tmp_path):
    with pytest.raises(UserError) as error:
        train.main([*words.split(), "--out", str(tmp_path / "out")])
    assert named in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == ["log.jsonl"]


def test_a_stage_on_one_of_another_recipe_is_refused(images, tmp_path):
    words = f"{TINY} --tokenizer_steps 2 --decoder_steps 2 --data {images} --out {tmp_path}/out"
    train.main(f"{words} --stage tokenizer".split())
    with pytest.raises(UserError, match=r"tokenizer\.pt was made with recipe mactok, this run has maetok"):
        train.main(f"{words} --recipe maetok --stage decoder".split())


def test_a_recipe_that_needs_weights_says_so_before_it_begins(tmp_path):
    done = call("train.py", f"{TINY} --recipe aligntok --tokens 0 --teacher dinov2_vitl14 --out {tmp_path}/out")
    assert done.returncode == 2 and "dinov2_vitl14_pretrain.pth" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
