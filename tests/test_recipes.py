"""The recipes of the four papers: each through its stages, with what it has of its own."""

import os
import re
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
from reference import (
    PROCESS_COUNT_TOLERANCE,
    ROOT,
    TINY,
    call,
    close_weights,
    die_after_save,
    fill,
    launch,
    log_lines,
    same_weights,
    succeed,
)

import align
import family
import masking
import options
import recipes
import train
from utils.checkpoint import read_checkpoint
from utils.console import UserError
from utils.distributed import Distributed

ALONE = Distributed(0, 1, torch.device("cpu"))
STEPS = (
    "--tokenizer_steps 17 --decoder_steps 8 --generator_steps 6 --log_every 1 --save_every 5 "
    "--patch_size 4 --batch_size 4"
)
FAMILY = {  # recipe: flags, and the stage in which it is killed
    "maetok": ("", "decoder"),
    "ldetok": ("--tokens 0 --channels 2 --generator lightningdit", "tokenizer"),
    "aligntok": (
        "--tokens 0 --teacher dinov2_vits14 --lr 1e-4 --decoder_steps 2 --generator_steps 2",
        "joint",
    ),
}

# DINOv2's layout, narrow and shallow, so that a checkpoint has 12 MB in place of 350.
SMALL = (48, 2, 3, 14, 37, 0)


def use_small_dinov2(dies_in: str = "") -> None:
    """In another process: make DINOv2 small, and let training die in a stage."""
    align.VIT_CONFIGS["dinov2_vits14"] = SMALL
    die_after_save(dies_in, step_to_die=5)


@pytest.fixture
def small_dinov2(monkeypatch, tmp_path):
    """A folder with a small DINOv2's file."""
    monkeypatch.setitem(align.VIT_CONFIGS, "dinov2_vits14", SMALL)
    state = align.ViT("dinov2_vits14").state_dict()
    state = {key: fill(key, value.shape) for key, value in state.items()}
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    return tmp_path


@pytest.mark.parametrize("recipe", FAMILY)
def test_a_recipe_trains_resumes_bit_for_bit_and_equals_itself_on_two_processes(
    recipe, images, small_dinov2, tmp_path
):
    """From nothing to samples; killed in its own stage and resumed; on two processes."""
    flags, stage = FAMILY[recipe]
    words = f"{TINY} {STEPS} --recipe {recipe} {flags} --weights {small_dinov2} --data {images}"
    whole, broken, two = (tmp_path / name for name in ("whole", "broken", "two"))
    stages = list(recipes.STAGES[recipe])

    # An unbroken run.
    train.main(f"{words} --out {whole}".split())
    assert all((whole / f"{name}.pt").exists() for name in (*stages, "generator"))
    assert (whole / "samples.png").exists()
    for name in (*stages, "generator"):
        for line in log_lines(whole, name):
            assert all(np.isfinite(v) for v in line.values() if not isinstance(v, str))

    # One that is killed, and goes on.
    prepare = partial(use_small_dinov2, dies_in=stage)
    killed = launch("train.py", words, f"--out {broken}", prepare=prepare)
    assert killed.returncode == -9 and read_checkpoint(broken / f"{stage}.pt")["step"] == 5
    train.main(f"{words} --out {broken}".split())
    for name in (*stages, "generator"):
        same_weights(broken / f"{name}.pt", whole / f"{name}.pt")
    assert (broken / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()

    # Two processes, with accumulation.
    flags = f"--out {two} --micro_batch 1"
    succeed("train.py", words, flags, processes=2, prepare=use_small_dinov2)
    for name in stages[:2]:
        for ours, theirs in zip(log_lines(two, name), log_lines(whole, name), strict=True):
            tolerance = 10 * PROCESS_COUNT_TOLERANCE
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
    ours, theirs = (read_checkpoint(out / f"{stages[0]}.pt") for out in (two, whole))
    for part in ("model", "ema"):
        close_weights(ours[part], theirs[part])

    # Its latents.
    rows = np.load(whole / "latents.npy")
    shape = {"maetok": (4, 4), "ldetok": (16, 2), "aligntok": (16, 4)}[recipe]
    assert rows["mean"].shape[1:] == shape
    assert rows["std"].any() == (recipe == "ldetok")


def spy_on(monkeypatch, module, name):
    """The arguments of each call of a function, from now on."""
    calls = []
    function = getattr(module, name)

    def spy(*arguments):
        calls.append(arguments)
        return function(*arguments)

    monkeypatch.setattr(module, name, spy)
    return calls


def test_maetoks_ratio_is_a_range_and_falls_to_zero_in_the_decoder_stage(
    images, tmp_path, monkeypatch
):
    ranges = spy_on(monkeypatch, masking, "sample_mask_ratio")
    steps = "--tokenizer_steps 3 --decoder_steps 4 --generator_steps 1"
    train.main(f"{TINY} --recipe maetok {steps} --data {images} --out {tmp_path}/out".split())
    assert [bounds for _, *bounds in ranges[:3]] == [[0.6, 0.4]] * 3
    expected = [0.6 * scale for scale in (1, 0.75, 0.5, 0.25)]
    assert [high for _, high, _ in ranges[3:]] == pytest.approx(expected)
    assert [low for _, _, low in ranges[3:]] == pytest.approx(expected)


def test_ldetok_drops_as_many_patches_of_each_image_and_adds_noise_in_training_only(
    images, tmp_path, monkeypatch
):
    encoded = spy_on(monkeypatch, family, "encode_visible")
    noised = spy_on(monkeypatch, family, "add_latent_noise")
    steps = "--tokenizer_steps 6 --decoder_steps 3 --generator_steps 1"
    words = f"{TINY} --tokens 0 --recipe ldetok {steps} --data {images} --out {tmp_path}/out"
    train.main(words.split())
    assert len(encoded) == 6
    for _, _, mask, num_hidden in encoded:
        assert (mask.sum(dim=1) == num_hidden).all()
    assert len({num_hidden for *_, num_hidden in encoded}) > 3  # another ratio in each step
    assert len(noised) == 6
    for _, tau, _, gamma in noised:
        assert gamma == 3.0 and len(tau.unique()) == len(tau)


def test_what_ldetok_drops_never_reaches_the_decoder(monkeypatch):
    """The noised latent of a hidden patch is replaced by zero."""
    words = "--recipe ldetok --image_size 16 --patch_size 4"
    config, _ = options.parse_config(words.split())
    tokenizer = train.build_tokenizer(config)
    model = train.TokenizerWithLosses(tokenizer, torch.nn.ModuleList(), config)
    decoded = []
    monkeypatch.setattr(tokenizer, "decode", lambda z: decoded.append(z) or z)
    rng = train.BatchRNG(0, 3, slice(0, 3), torch.device("cpu"))
    patch_mask = train.draw_mask(config, None, 1.0, rng)
    assert 0 < patch_mask.num_hidden < 16
    model(torch.rand(3, 3, 16, 16) * 2 - 1, patch_mask, {}, rng)
    (z,) = decoded
    assert torch.equal((z == 0).all(dim=-1), patch_mask.mask)


def test_preservation_begins_at_zero_and_is_weighed_by_the_gradients(
    images, small_dinov2, tmp_path
):
    """The joint stage starts from the encoder whose latents it preserves.

    So the first step measures no gradient of the distance, and nothing is weighed by it.
    """
    words = f"{TINY} --recipe aligntok --tokens 0 --teacher dinov2_vits14 --lr 1e-3 --patch_size 4"
    words += f" --weights {small_dinov2} --log_every 1 --tokenizer_steps 17 --data {images}"
    out = tmp_path / "out"
    train.main(f"{words} --stage adapter --out {out}".split())
    train.main(f"{words} --stage joint --out {out}".split())
    first, *lines = log_lines(out, "joint")
    assert first["preservation"] == 0 and first["loss"] == pytest.approx(first["mse"])
    assert all(line["preservation"] > 0 for line in lines)
    weights = [(line["loss"] - line["mse"]) / line["preservation"] for line in lines]
    assert weights[0] == pytest.approx(0, abs=1e-4)
    assert all(0 < weight <= 100.1 for weight in weights[1:]) and np.std(weights[1:]) > 0

    adapter, joint = (read_checkpoint(out / f"{stage}.pt") for stage in ("adapter", "joint"))
    official = torch.load(small_dinov2 / "dinov2_vits14_pretrain.pth", weights_only=True)
    key = "blocks.1.attn.qkv.weight"
    pretrained = f"tokenizer.encoder.teacher.vit.{key}"
    assert torch.equal(adapter["model"][pretrained], official[key])
    assert not torch.equal(joint["model"][pretrained], official[key])
    trained = "tokenizer.encoder.adapter.0.weight"
    assert not torch.equal(adapter["model"][trained], joint["model"][trained])


def test_nothing_but_recipes_py_knows_a_recipes_name():
    """A difference between two papers is a difference between two dicts."""
    methods = [name for name in recipes.METHODS if name not in ("kl", "ae")]
    names = re.compile("|".join(f"[\"']{name}[\"']" for name in methods))
    for path in (*ROOT.glob("*.py"), *ROOT.glob("utils/*.py")):
        allowed = {"recipes.py": 100, "lab.py": 100, "options.py": 1}.get(path.name, 0)
        assert len(names.findall(path.read_text())) <= allowed, path  # options.py: the default
    text = (ROOT / "recipes.py").read_text()
    assert len(names.findall(text)) >= 4 and "if config.recipe" not in text


def test_stages_and_recipes_are_dicts_of_fields():
    names = set(recipes.Config.__dataclass_fields__)
    tables = (recipes.PRESETS, recipes.RECIPES, recipes.FULL_RECIPES)
    tables += (recipes.FULL_GENERATORS, recipes.TOY_TOKENS)
    stages = [stage for each in recipes.STAGES.values() for stage in each.values()]
    rows = chain(*(table.values() for table in tables), (stage.overrides for stage in stages))
    assert all(values.keys() <= names for values in rows)
    methods = set(recipes.METHODS)
    assert recipes.RECIPES.keys() == recipes.FULL_RECIPES.keys() == recipes.STAGES.keys() == methods


@pytest.mark.parametrize("recipe", recipes.METHODS)
@pytest.mark.parametrize("preset", recipes.PRESETS)
@pytest.mark.parametrize("generator", ["", "--generator sit", "--generator lightningdit"])
def test_every_recipe_is_consistent_at_every_scale(recipe, preset, generator):
    words = f"--recipe {recipe} --preset {preset} {generator}"
    config, _ = options.parse_config(words.split())
    options.check_config(config, ALONE)
    assert preset == "toy" or (config.perceptual_weight and config.adversarial_weight)
    if preset not in ("toy", "s128"):
        assert config.decoder_steps >= 50_000
        if generator == "--generator lightningdit":
            assert (config.generator_batch_size, config.generator_lr) == (1024, 2e-4)


CONTRADICTIONS = [  # the command line, and what its sentence must name
    ("--recipe ae --kl_weight 1e-6", "--kl_weight is 1e-06, but a deterministic bottleneck"),
    ("--drop_masked 1", "--drop_masked 1 leaves out latents"),
    ("--recipe ldetok --tokens 16", "--drop_masked 1 leaves out latents"),
    ("--recipe ldetok --local_weight 1", "--drop_masked 1 leaves out latents"),
    ("--recipe ldetok --features_weight 1", "--drop_masked 1 leaves out latents"),
    ("--recipe aligntok --drop_masked 1", "--drop_masked 1 leaves out latents"),
    ("--recipe aligntok --tokens 16", "--tokens is 16, but a teacher"),
    (
        "--recipe kl --tokens 128 --patch_size 4 --latent_mask 1",
        "--tokens 128 is more than the 64 patches of --patch_size 4",
    ),
    ("--tokens 24 --patch_size 4", "--tokens 24 does not divide the 64 patches"),
    (
        "--preservation_weight 1",
        "--preservation_weight 1.0: the tokenizer stage has no stage before",
    ),
    ("--stage joint", "--stage joint: recipe mactok has the stages all, tokenizer, decoder, "),
    ("--recipe aligntok --stage joint", "adapter.pt does not exist; run the adapter stage first"),
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
    message = r"tokenizer\.pt was made with recipe mactok, this run has maetok"
    with pytest.raises(UserError, match=message):
        train.main(f"{words} --recipe maetok --stage decoder".split())


def test_a_recipe_that_needs_weights_says_so_before_it_begins(tmp_path):
    words = f"--recipe aligntok --tokens 0 --teacher dinov2_vitl14 --out {tmp_path}/out"
    done = call("train.py", f"{TINY} {words}")
    assert done.returncode == 2 and "dinov2_vitl14_pretrain.pth" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
