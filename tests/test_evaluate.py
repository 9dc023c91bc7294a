"""evaluate.py: rFID, probe, statistics and comparison, on a run with an untrained tokenizer."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference import TINY, launch, make_folder, official_folder

import evaluate
import fid
import sample
from build import build_tokenizer
from options import parse_config
from sit import per_sample_noise
from utils.console import UserError
from utils.data import ImageFolder, train_val_split
from utils.files import hash_file, hash_state_dict, save_torch
from utils.images import to_float, to_uint8

INCEPTION = "pt_inception-2015-12-05-6726825d"
CONFIG, _ = parse_config(f"{TINY} --patch_size 4 --eval_images 4".split())
STATS = {"mu": np.zeros(4), "sigma": np.eye(4)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with files of the official formats with generated contents."""
    folder = tmp_path_factory.mktemp("weights")
    return official_folder(folder, INCEPTION, "vgg16-397923af", "lpips_v0.1_vgg")


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A run with an untrained tokenizer of 16-px images, and a folder of 24 images in 2 classes."""
    root = tmp_path_factory.mktemp("run")
    folder = make_folder(root / "images", 2, 12)
    torch.manual_seed(0)
    checkpoint = {
        "stage": "tokenizer",
        "step": 20,
        "total_steps": 20,
        "config": asdict(CONFIG),
        "classes": ["class0", "class1"],
        "identity": {"data": ImageFolder(folder, 16).fingerprint},
        "ema": build_tokenizer(CONFIG).state_dict(),
    }
    save_torch(checkpoint, root / "tokenizer.pt")
    return root


@pytest.fixture
def three_features(monkeypatch):
    """A pixel's three values in the place of Inception's features, to be quick."""

    def features(model, images, resize):
        return images[:, :, 5, 5].cpu().float()

    monkeypatch.setattr(evaluate, "inception_features", features)
    monkeypatch.setattr(fid, "inception_features", features)
    monkeypatch.setattr(fid.InceptionV3, "logits", lambda model, pool3: pool3)


def run(*words):
    """The command line of evaluate.py."""
    evaluate.main([word for text in words for word in str(text).split()])


def read(path):
    return json.loads(Path(path).read_text())


# --------------------------------------------------------------------------------------------------
# The linear probe.


def test_linear_probe_separates_what_is_linear_and_only_that():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    noise = torch.randn(300, 8, generator=generator)
    x = noise + 8 * torch.eye(8)[labels]
    accuracy = evaluate.linear_probe(x[:200], labels[:200], x[200:], labels[200:])
    assert accuracy == 1
    accuracy = evaluate.linear_probe(noise[:200], labels[:200], noise[200:], labels[200:])
    assert accuracy < 0.6


def test_probe_holds_out_a_tenth_and_needs_classes(tiny_run, tmp_path, capsys):
    run(f"probe {tiny_run} --data {tiny_run}/images --report {tmp_path}/a.json")
    report = read(tmp_path / "a.json")
    assert report["N"] == 2
    assert report["protocol"]["train"] == 22
    assert "unfinished" not in capsys.readouterr().err
    fingerprint = ImageFolder(tiny_run / "images", 16).fingerprint
    assert report["checkpoint"] == {
        "file": "tokenizer.pt",
        "stage": "tokenizer",
        "step": 20,
        "total_steps": 20,
        "data": fingerprint,
        "weights": hash_state_dict(torch.load(tiny_run / "tokenizer.pt")["ema"]),
    }
    assert report["run"] == str(tiny_run)
    assert report["reference"]["hash"] == fingerprint
    with pytest.raises(UserError, match="12 images in 0 classes"):
        run(f"probe {tiny_run} --data {tiny_run}/images/class0")


# --------------------------------------------------------------------------------------------------
# rFID.


def test_rfid_of_held_out_images(tiny_run, weights, tmp_path, three_features, capsys):
    inception_alone = official_folder(tmp_path / "alone", INCEPTION)
    flags = f"--data {tiny_run}/images --report {tmp_path}/x.json"
    run(f"rfid {tiny_run} {flags} --weights {inception_alone}")
    report = read(tmp_path / "x.json")
    assert report["N"] == report["reference"]["N"] == 24
    assert "lpips_mean" not in report["values"]
    run(f"rfid {tiny_run} {flags} --weights {weights} --held_out")
    report = read(tmp_path / "x.json")
    assert report["N"] == report["reference"]["N"] == 2
    assert f"rfid: 2 images, reference {tiny_run}/images (2)" in capsys.readouterr().out

    loaded = sample.load_run(tiny_run, torch.device("cpu"))
    folder = ImageFolder(tiny_run / "images", 16)
    assert report["checkpoint"] == loaded.checkpoint_info
    assert report["reference"]["hash"] == folder.fingerprint
    _, held_out = train_val_split(folder.labels, 4)
    crops = torch.stack([folder[i][0] for i in held_out.tolist()])
    recons = sample.reconstruct(loaded.tokenizer, crops)
    lpips = evaluate.load_lpips(str(weights), torch.device("cpu"))
    expected = {"lpips": lpips(to_float(recons), to_float(crops))}
    for metric in (fid.psnr, fid.ssim, fid.ssim_softvq):
        expected[metric.__name__] = metric(crops, recons)
    for name, found in expected.items():
        assert report["values"][f"{name}_mean"] == pytest.approx(found.mean().item(), rel=1e-5)
    # The noise of sampled latents depends on an image's place in the folder, not in the batch.
    with torch.no_grad():
        posterior = loaded.tokenizer.encode(to_float(crops))
        noise = next(per_sample_noise(0, held_out, (4, 4), torch.device("cpu")))
        sampled = to_uint8(loaded.tokenizer.decode(posterior.sample(noise)))
    psnr = fid.psnr(crops, sampled).mean().item()
    assert report["values"]["psnr_sampled"] == pytest.approx(psnr, rel=1e-5)
    # The reference is the very crops.
    stats = [fid.mean_cov(images[:, :, 5, 5].float()) for images in (recons, crops)]
    distance = fid.frechet_distance(*stats[0], *stats[1])
    assert report["values"]["rfid_mean"] == pytest.approx(distance, rel=1e-6)


def test_rfid_warns_of_images_that_the_run_was_trained_on(
    tiny_run, weights, tmp_path, three_features, capsys
):
    """They are recognized by the files' names and sizes, wherever the folder is."""
    moved = make_folder(tmp_path / "moved", 2, 12)
    other = make_folder(tmp_path / "other", 2, 13)
    flags = f"--weights {weights} --report {tmp_path}/x.json"
    warning = "the run was trained on these images; --held_out takes only what it held out"
    for folder, more, warned in (
        (tiny_run / "images", "", True),
        (moved, "", True),
        (moved, "--held_out", False),
        (other, "", False),
    ):
        run(f"rfid {tiny_run} --data {folder} {flags} {more}")
        assert (warning in capsys.readouterr().err) == warned


# --------------------------------------------------------------------------------------------------
# Statistics.


def test_photographs_of_many_sizes_are_cropped_as_in_training(weights, tmp_path, three_features):
    raw = tmp_path / "raw"
    raw.mkdir()
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(40, 30), (25, 60), (33, 33), (90, 70), (16, 17)]):
        pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(raw / f"{i}.png")
    flags = f"--weights {weights}"
    with pytest.raises(UserError, match="arguments are required: --image_size"):
        run(f"stats {raw} {tmp_path}/out.npz", flags)
    for size in (-5, 0):
        with pytest.raises(UserError, match=f"--image_size: is {size}; it must be at least 1"):
            run(f"stats {raw} {tmp_path}/out.npz --image_size {size}", flags)
    with pytest.raises(ValueError, match=r"has another size .* use evaluate.py stats with --image"):
        fid.main([str(raw), str(raw), *flags.split()])
    assert not (tmp_path / "out.npz").exists()

    run(f"stats {raw} {tmp_path}/out.npz --image_size 16", flags)
    folder = ImageFolder(raw, 16)
    found = np.load(tmp_path / "out.npz")
    crops = torch.stack([folder.read(i)[0] for i in range(5)])
    np.testing.assert_allclose(found["mu"], crops[:, :, 5, 5].double().mean(dim=0))
    assert str(found["hash"]) == f"{folder.fingerprint} at 16 px"
    assert found["size"].tolist() == [16, 16]
    assert found["resize"] == "tf1"
    assert found["weights"] == hash_file(weights / f"{INCEPTION}.pth")

    # fid.py takes the statistics in the place of the crops.
    (tmp_path / "crops").mkdir()
    for i, crop in enumerate(crops):
        Image.fromarray(crop.permute(1, 2, 0).numpy()).save(tmp_path / "crops" / f"{i}.png")
    fid.main([f"{tmp_path}/crops", f"{tmp_path}/out.npz", *flags.split()])
    report = read(tmp_path / "crops.fid.json")
    assert report["values"]["fid"] == pytest.approx(0, abs=1e-6)
    assert report["N"] == report["reference"]["N"] == 5
    assert report["reference"]["hash"] == f"{folder.fingerprint} at 16 px"


# --------------------------------------------------------------------------------------------------
# What all commands have in common.


def take_pixels_as_features() -> None:
    """In another process: batches of 5, and no Inception."""

    def features(model, images, resize):
        pixels = images[:, :, ::3, ::3].flatten(1).cpu().float()
        return pixels + pixels.mean(0)

    fid.BATCH_SIZE = 5
    evaluate.inception_features = features


def test_no_figure_depends_on_the_process_count(tiny_run, weights, tmp_path):
    """Batches of 5, so that both processes have several, and the last one is not full.

    Pixels take the place of Inception's features, to be quick; as those, they depend on what else
    is in the batch.
    """
    images = tiny_run / "images"
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        commands = (
            f"rfid {tiny_run} --data {images} --weights {weights} --report {out}/rfid.json",
            f"probe {tiny_run} --data {images} --report {out}/probe.json",
            f"stats {images} {out}/stats.npz --weights {weights} --image_size 16",
        )
        messages = ""
        for words in commands:
            flags = dict(processes=processes, prepare=take_pixels_as_features)
            done = launch("evaluate.py", words, **flags)
            assert done.returncode == 0, done.stderr[-3000:]
            messages += done.stderr
        assert "warning" in messages
        assert "too few for a full-rank covariance" in messages
    for name in ("rfid", "probe"):
        alone = read(tmp_path / "1" / f"{name}.json")
        shared = read(tmp_path / "2" / f"{name}.json")
        shared_values = shared.pop("values")
        for key, number in alone.pop("values").items():
            assert shared_values.pop(key) == pytest.approx(number, rel=1e-9), (name, key)
        assert not shared_values
        assert alone == shared
    alone, shared = (np.load(tmp_path / processes / "stats.npz") for processes in "12")
    np.testing.assert_allclose(alone["mu"], shared["mu"], rtol=1e-9)
    tolerance = 1e-9 * alone["sigma"].max()
    np.testing.assert_allclose(alone["sigma"], shared["sigma"], rtol=1e-9, atol=tolerance)
    fingerprint = ImageFolder(images, 16).fingerprint
    assert alone["hash"] == shared["hash"] == f"{fingerprint} at 16 px"
    assert alone["N"] == shared["N"] == 24
    report = read(tmp_path / "1" / "rfid.json")
    assert report["protocol"]["resize"] == "tf1"
    assert report["protocol"]["weights"] == hash_file(weights / f"{INCEPTION}.pth")
    metrics = ("rfid", "psnr", "ssim", "ssim_softvq", "lpips")
    names = {f"{metric}_{kind}" for metric in metrics for kind in ("mean", "sampled")}
    assert set(report["values"]) == names
    assert report["values"]["rfid_mean"] != report["values"]["rfid_sampled"]


def test_a_damaged_image_stops_the_count(tiny_run, weights, tmp_path, three_features):
    folder = make_folder(tmp_path / "images", 2, 12)
    damaged = folder / "class0" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    for words in (
        f"probe {tiny_run} --data {folder} --report {tmp_path}/out",
        f"rfid {tiny_run} --data {folder} --weights {weights} --report {tmp_path}/out",
        f"stats {folder} {tmp_path}/out --image_size 16 --weights {weights}",
    ):
        with pytest.raises(OSError, match=r"3\.png is not a readable image"):
            run(words)
    assert not (tmp_path / "out").exists()


def test_wrong_words_are_named():
    for words, named in (
        ("", "required: COMMAND"),
        ("gfod a b", "invalid choice"),
        ("rfid", "required: run"),
        ("stats a --image_size 16", "required: out"),
        ("rfid a --weight x", "unrecognized arguments: --weight x"),
        ("probe a --seed 1", "unrecognized arguments: --seed"),
        ("rfid a --seed -1", r"--seed\b.*-1"),
    ):
        with pytest.raises(UserError, match=named):
            run(words)


def test_every_command_has_help(capsys):
    for words, named in (
        ("", "compare"),
        ("rfid", "--held_out"),
        ("probe", "--data"),
        ("stats", "out"),
        ("compare", "reports"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(words, "--help")
        assert not stop.value.code
        assert named in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Comparison of reports.


def test_any_number_of_reports_makes_one_table(tmp_path, capsys):
    for scale in (1, 1.5, 2):
        report = {
            "command": "fid",
            "N": 5,
            "reference": {"hash": "x"},
            "protocol": {"k": 3},
            "values": {"fid": 10 * scale, "psnr": None},
            "sampler": {"cfg_scale": scale, "num_steps": 250},
        }
        if scale == 2:
            report |= {"N": 6, "values": {}}
        (tmp_path / f"{scale}.fid.json").write_text(json.dumps(report))
    paths = [f"{tmp_path}/{scale}.fid.json" for scale in (1, 1.5, 2)]
    run("compare", *paths[:2])
    said = capsys.readouterr().out.splitlines()
    assert [line.split() for line in said[:-2]] == [
        ["1.fid", "1.5.fid"],
        ["cfg_scale", "1", "1.5"],
        ["fid", "10.0000", "15.0000"],
        ["psnr", "infinite", "infinite"],
    ]
    assert {len(line) for line in said[:-2]} == {70}
    assert said[-2:] == [f"{path}: comparable" for path in paths[:2]]
    run("compare", *paths)
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["cfg_scale", "1", "1.5", "2"]
    assert said[2].split()[-1] == "-"
    assert said[-2:] == [
        f"{paths[1]}: comparable",
        f"{paths[2]} is not comparable with {paths[0]}: N is 5 and 6",
    ]


def test_reports_of_fid_are_compared(tmp_path, capsys):
    """The same report twice, and one with another number of samples."""
    np.savez(tmp_path / "reference.npz", **STATS)
    for name, count in (("a", 9), ("b", 8)):
        np.savez(tmp_path / f"{name}.npz", **STATS, N=count)
        fid.main([f"{tmp_path}/{name}.npz", f"{tmp_path}/reference.npz"])
    a = f"{tmp_path}/a.fid.json"
    b = f"{tmp_path}/b.fid.json"
    capsys.readouterr()
    run(f"compare {a} {a}")
    assert capsys.readouterr().out.splitlines()[-2:] == [f"{a}: comparable"] * 2
    run(f"compare {a} {b}")
    assert f"{b} is not comparable with {a}: N is 9 and 8" in capsys.readouterr().out


def test_reports_of_samples_of_another_size_are_not_comparable(tmp_path, capsys):
    """Two sets of samples against one reference; the second one also gave a warning of fid.py."""
    np.savez(tmp_path / "reference.npz", **STATS, size=(24, 20))
    for name, size in (("a", (24, 20)), ("b", (12, 10))):
        np.savez(tmp_path / f"{name}.npz", **STATS, size=size)
        fid.main([f"{tmp_path}/{name}.npz", f"{tmp_path}/reference.npz"])
        warned = "the samples have 12 x 10 px, the reference 24 x 20 px" in capsys.readouterr().err
        assert warned == (name == "b")
    a = f"{tmp_path}/a.fid.json"
    b = f"{tmp_path}/b.fid.json"
    run(f"compare {a} {b}")
    last = capsys.readouterr().out.splitlines()[-1]
    reason = "size of samples is [24, 20] and [12, 10]"
    assert last == f"{b} is not comparable with {a}: {reason}"
    run(f"compare {b} {a}")
    assert "is not comparable" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("change, named", [
    ([], "no JSON object"),
    ({"values": 3}, "not a report of fid.py or evaluate.py"),
    ({"values": {"fid": {"value": 3, "spread": 1}}}, "not a report"),  # as they once were
    ({"values": {"fid": "3"}}, "not a report"),
    ({"sampler": [3]}, "not a report"),
])  # fmt: skip
def test_what_is_no_report_is_refused(tmp_path, change, named):
    report = {"command": "fid", "N": 3, "values": {"fid": 3}, "reference": {}, "protocol": {}}
    content = report | change if change else change
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=named):
        run(f"compare {tmp_path}/x.json {tmp_path}/x.json")
