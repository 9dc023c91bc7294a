"""The lab's teacher and judge: what they learn, their files, and runs that use them; mixtures."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from reference import TINY, make_folder, refuse, succeed

import lab
from classifiers import (
    Judge,
    SmallTeacher,
    augment,
    judge_distance,
    load_judge,
    measure_accuracy,
    train_classifier,
)
from measures import measure_generator
from mixture import gaussian_mixture_nll, standardize
from sample import load_run
from utils.files import hash_file, load_torch, save_torch

SHORT = f"{TINY} --tokenizer_steps 2 --decoder_steps 2 --generator_steps 2"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with teacher.pt and judge.pt of 16-px images, and the two folders of images."""
    root = tmp_path_factory.mktemp("photos")
    make_folder(root / "teacher", 2, 40)
    make_folder(root / "runs", 2, 30)
    words = f"teacher --data {root}/teacher --epochs 1 {TINY} --out {root}"
    (root / "printed.txt").write_text(succeed("lab.py", words).stdout)
    return root


# --------------------------------------------------------------------------------------------------
# The networks.


def colors(count):
    """uint8 images (count, 3, 16, 16), noisy and reddish, greenish or bluish; and their labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 100, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 3
    images[torch.arange(count), labels] += 155
    return images, labels


@pytest.mark.parametrize("make", [lambda: SmallTeacher(4, 3), lambda: Judge(3)])
def test_classifiers_learn_classes_and_a_seed_gives_the_same_weights(make):
    images, labels = colors(90)
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        network = make()
        train_classifier(network, images[:60], labels[:60], epochs=8, seed=1)
        states.append(network.state_dict())
    assert measure_accuracy(network, images[60:], labels[60:]) > 0.9
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_small_teacher_is_called_as_others_are():
    teacher = SmallTeacher(grid_size=8)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    images.requires_grad_()
    cls, patches = teacher(images)
    assert cls.shape == (2, teacher.width) and patches.shape == (2, 64, teacher.width)
    assert patches.detach().var(dim=-1, correction=0).sub(1).abs().max() < 1e-2
    patches.sum().backward()  # AlignTok trains it, by its patches alone
    missing = [name for name, parameter in teacher.named_parameters() if parameter.grad is None]
    assert not missing  # DistributedDataParallel would wait for those
    with torch.no_grad():
        uniform = SmallTeacher(grid_size=8)
        uniform.layers[-1].weight[0] = 0  # then all patches have the same attention
        cls, patches = uniform(images)
        torch.testing.assert_close(cls, patches.mean(dim=1))
    with pytest.raises(RuntimeError, match=r"images must lie in \[-1, 1\]"):
        teacher(images.detach() * 127)


def test_patches_are_centered_on_what_they_stand_for():
    """The gradient of a patch's features is symmetric about the patch's middle on average."""
    torch.manual_seed(0)
    teacher = SmallTeacher(grid_size=8)
    images = torch.zeros(64, 3, 32, 32).uniform_(-1, 1).requires_grad_()
    _, patches = teacher(images)
    (patches[:, 8 * 4 + 4] * torch.randn(128)).sum().backward()
    weight = images.grad.square().sum(dim=(0, 1))
    pixels = torch.arange(32.0) + 0.5
    for axis in (0, 1):
        center = (weight.sum(dim=axis) * pixels).sum() / weight.sum()
        assert center.item() == pytest.approx(18, abs=0.5)


def test_images_are_shifted_and_mirrored_whole():
    ramp = torch.arange(16.0).expand(200, 3, 16, 16)
    rows = augment(ramp, torch.Generator().manual_seed(0))
    assert rows.shape == ramp.shape
    steps = rows[:, 0, 8, 4:12].diff(dim=-1)
    assert (steps == steps[:, :1]).all() and set(steps.unique().tolist()) == {-1.0, 1.0}
    offsets = rows[steps[:, 0] > 0][:, 0, 8, 8] - 8
    assert set(offsets.tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}


def test_the_distance_of_a_set_to_itself_is_0(photos):
    images, _ = colors(200)
    network = load_judge(photos / "judge.pt", 16, ["class0", "class1"])
    assert judge_distance(network, images, images) == pytest.approx(0, abs=1e-6)
    assert judge_distance(network, images, 255 - images) > 1e-5


# --------------------------------------------------------------------------------------------------
# Their files, and runs that use them.


def test_lab_teacher_writes_both_and_a_picture(photos):
    saved = {name: load_torch(photos / f"{name}.pt") for name in ("teacher", "judge")}
    for name, content in saved.items():
        assert content["kind"] == name and content["classes"] == ["class0", "class1"]
        assert content["image_size"] == 16 and 0 <= content["accuracy"] <= 1
    assert saved["teacher"]["grid_size"] == 4
    printed = (photos / "printed.txt").read_text()
    assert printed.count("trained on 36 images in") == 2 and printed.count("of 4 others") == 2
    with Image.open(photos / "teacher_masks.png") as image:
        assert image.size == (8 * 64, 4 * 64)


@pytest.mark.parametrize("recipe", ["mactok", "maetok", "aligntok"])
def test_recipes_train_with_a_teacher_of_a_file(photos, recipe, tmp_path):
    teacher = shutil.copy(photos / "teacher.pt", tmp_path / "mine.pt")
    tokens = "--tokens 0" if recipe == "aligntok" else ""
    flags = f"{SHORT} {tokens} --recipe {recipe} --data {photos}/runs --out {tmp_path}/out"
    done = succeed("train.py", f"{flags} --teacher {teacher}")
    assert "was trained on these images" not in done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["weights"]["teacher file"] == hash_file(teacher)
    if recipe == "aligntok":
        saved = load_torch(tmp_path / "out" / "adapter.pt")["ema"]
        for key, weight in load_torch(teacher)["state"].items():
            if not key.startswith("head."):
                assert torch.equal(saved[f"encoder.teacher.{key}"], weight)
    teacher.unlink()
    assert load_run(tmp_path / "out").generator  # sampling needs no file
    if recipe == "mactok":  # nor does another generator for the same tokenizer
        flags = f"--tokenizer {tmp_path}/out --data {photos}/runs --out {tmp_path}/other"
        succeed("train.py", flags)


def test_a_teacher_may_move_but_not_change(photos, tmp_path):
    teacher = shutil.copy(photos / "teacher.pt", tmp_path / "a.pt")
    flags = f"{SHORT} --data {photos}/runs --out {tmp_path}/out"
    succeed("train.py", f"{flags} --stage tokenizer --teacher {teacher}")
    moved = teacher.rename(tmp_path / "b.pt")
    succeed("train.py", f"{flags} --stage decoder --teacher {moved}")
    changed = load_torch(moved)
    changed["state"]["norm.bias"] += 1
    save_torch(changed, moved)
    error = refuse("train.py", f"{flags} --teacher {moved}")
    assert "tokenizer.pt was made with teacher file of SHA-256 " in error
    assert "use the same, or another --out" in error


def test_a_teacher_of_the_same_images_is_said_once(photos, tmp_path):
    words = f"{SHORT} --data {photos}/teacher --out {tmp_path} --teacher {photos}/teacher.pt"
    done = succeed("train.py", f"{words} --stage tokenizer")
    assert done.stderr.count("teacher.pt was trained on these images, with their labels") == 1


def damage(photos, folder):
    """Files that are no teacher."""
    whole = (photos / "teacher.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    content = load_torch(photos / "teacher.pt")
    del content["state"]["norm.bias"]
    save_torch(content, folder / "short.pt")
    save_torch({"ema": {}}, folder / "other.pt")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--teacher {root}/gone.pt", "gone.pt is neither a file that lab.py teacher wrote nor one"),
        ("--teacher=", "--teacher  is neither a file that lab.py teacher wrote nor one"),
        ("--teacher {tmp}/cut.pt", "it is truncated or not a PyTorch file"),
        ("--teacher {tmp}/short.pt", 'short.pt is damaged: .*Missing key.*"norm.bias"'),
        ("--teacher {tmp}/other.pt", "other.pt is another file, not a teacher; make one with lab"),
        ("--teacher {root}/judge.pt", "judge.pt is a judge, not a teacher; make one with lab.py"),
        (
            "--teacher {root}/teacher.pt --patch_size 2",
            "teacher.pt was trained with grid_size 4, and this run has 8; train another",
        ),
        (
            "--teacher {root}/teacher.pt --image_size 32",
            "teacher.pt was trained with image_size 16, and this run has 32; train another",
        ),
    ],
)
def test_what_is_no_teacher_is_one_sentence(photos, flags, words, tmp_path):
    damage(photos, tmp_path)
    flags = flags.format(root=photos, tmp=tmp_path)
    error = refuse("train.py", f"{SHORT} --data {photos}/runs --out {tmp_path}/out {flags}")
    assert re.search(words, error), error
    assert not list((tmp_path / "out").glob("*.pt"))


@pytest.mark.parametrize(
    "folder, words",
    [
        ("flat", "flat has no class folders, and a teacher learns classes"),
        ("few", "few has 9 images of class0; a teacher and a judge need at least 10 of each class"),
        ("gone", "gone does not exist"),
    ],
)
def test_folders_that_teach_nothing_are_one_sentence(folder, words, tmp_path):
    make_folder(tmp_path / "flat", 0, 20)
    make_folder(tmp_path / "few", 2, 9)
    flags = f"teacher --data {tmp_path}/{folder} --epochs 1 {TINY} --out {tmp_path}/out"
    assert words in refuse("lab.py", flags)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# The lab with a teacher and a judge.


def test_the_lab_measures_with_a_judge(photos, tmp_path, monkeypatch):
    cells = {"mactok": {}}
    small = lab.Experiment(cells, ("mactok",), {}, (None,), ("all",), steps=2, quick_steps=2)
    monkeypatch.setitem(lab.EXPERIMENTS, "recipes", small)
    other = shutil.copy(photos / "judge.pt", tmp_path / "judge.pt")
    flags = f"recipes --quick --data {photos}/runs --teacher {photos}/teacher.pt {TINY}"
    flags += f" --out {tmp_path}/out"
    done = succeed("lab.py", f"{flags} --judge {other}")
    cell = tmp_path / "out" / "recipes" / "mactok-seed0" / "cell.json"
    measures = json.loads(cell.read_text())
    expected = {"flow_loss", "noisy_probe", "hidden_probe", "mixture", "judge_found"}
    assert expected <= measures.keys()
    assert list(measures["mixture"]) == ["1", "2", "4", "8", "16", "32"]  # fitted to 54 images
    assert measures["judge_samples"] > 0 and measures["judge_reconstructions"] > 0
    assert all(lab.MEASURES[name] in done.stdout for name in lab.MEASURES)
    share = measures["judge_found_originals"]
    assert f"The judge finds the class of {share:.1%} of the held-out images" in done.stdout
    assert f"other images is {measures['judge_originals']:.2g}." in done.stdout
    assert "was trained on these images" not in done.stderr
    if "(recipes_generator.png)" in done.stdout:  # matplotlib is there
        assert (tmp_path / "out" / "recipes_generator.png").exists()

    # Without a judge the cell is done; with another judge it is measured again, and not trained.
    assert succeed("lab.py", f"{flags} --plan").stdout.startswith("0 of 1 to do")
    content = load_torch(other)
    content["state"]["head.bias"] += torch.tensor([100.0, 0.0])
    save_torch(content, other)
    assert succeed("lab.py", f"{flags} --plan --judge {other}").stdout.startswith("1 of 1 to do")
    made = (cell.parent / "generator.pt").stat().st_mtime_ns
    succeed("lab.py", f"{flags} --judge {other}")
    assert json.loads(cell.read_text())["judge_found"] == pytest.approx(0.5, abs=0.2)
    assert (cell.parent / "generator.pt").stat().st_mtime_ns == made

    moved = shutil.copy(photos / "teacher.pt", tmp_path / "moved.pt")
    assert succeed("lab.py", f"{flags} --teacher {moved} --plan").stdout.startswith("0 of 1 to do")
    content = load_torch(moved)
    save_torch(content | {"accuracy": 0.0}, moved)
    error = refuse("lab.py", f"{flags} --teacher {moved} --plan")
    assert "was made with teacher " in error and "use another --out" in error

    assert "is a teacher, not a judge" in refuse("lab.py", f"{flags} --judge {photos}/teacher.pt")
    there = f"recipes --quick --plan --data {photos}/teacher {TINY} --out {tmp_path}/there"
    done = succeed("lab.py", f"{there} --judge {other}")
    assert "judge.pt was trained on these images" in done.stderr
    error = refuse("lab.py", f"{flags} --judge {other} --data shapes")
    assert "knows other classes than the images: class0, class1" in error


def test_a_generator_that_stands_still_has_the_flow_loss_of_its_latents(tmp_path, monkeypatch):
    """|noise - x|^2 is 2 on average for normalized latents."""
    monkeypatch.setattr("utils.shapes.Shapes.__len__", lambda self: 60)
    succeed("train.py", f"{SHORT} --recipe ae --out {tmp_path}")
    run = load_run(tmp_path)
    run.generator.forward = lambda x, t, y: torch.zeros_like(x)
    z = run.tokenizer.denormalize(
        torch.randn(200, 4, 4, generator=torch.Generator().manual_seed(0))
    )
    held_out = np.arange(0, 200, 2)
    labels = torch.zeros(200, dtype=torch.int64)
    measures = measure_generator(run, z, labels, held_out + 1, held_out)
    assert measures["flow_loss"] == pytest.approx(2, abs=0.1)


# --------------------------------------------------------------------------------------------------
# Mixtures.


def test_a_known_mixture_needs_its_three_gaussians():
    """Far from each other, so that the entropy is that of the weights plus that of a Gaussian."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.5, 0.3, 0.2]).double()
    means = torch.tensor([[0.0, 0.0], [30.0, 0.0], [0.0, 30.0]]).double()
    stds = torch.tensor([[1.0, 0.5], [2.0, 1.0], [1.0, 1.0]]).double()
    labels = torch.multinomial(weights, 6000, replacement=True, generator=generator)
    noise = torch.randn(6000, 2, generator=generator).double()
    x = means[labels] + stds[labels] * noise
    gaussians = 0.5 * (2 * math.pi * math.e * stds.square()).log().sum(dim=1)
    entropy = (weights * (gaussians - weights.log())).sum().item() / 2
    nll = {k: gaussian_mixture_nll(x[:4000], x[4000:], k) for k in (1, 2, 3, 6)}
    assert nll[1] > nll[2] + 0.3 > nll[3] + 0.6
    assert nll[3] == pytest.approx(entropy, abs=0.03)
    assert nll[6] == pytest.approx(nll[3], abs=0.02)


def test_one_gaussian_needs_the_same_for_all_latents():
    """log(2 pi e) / 2 nats per dimension, whatever the scale and the number of channels."""
    x = torch.randn(4000, 100, generator=torch.Generator().manual_seed(0)) * 5 + 3
    x[:, 8:] *= 1e-6
    known, unknown = standardize(x[:3000], x[3000:])
    assert known.shape == (3000, 8)
    assert gaussian_mixture_nll(known, unknown, 1) == pytest.approx(1.419, abs=0.03)
