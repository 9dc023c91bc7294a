"""fid.py: metrics against closed forms and public implementations, Inception, the command line."""

import io
import json
import re
import subprocess
import sys
import zipfile
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference import ARRAYS, ENV, FID_ARRAYS, ROOT, array, command, low_rank_features, make_folder, official_folder, shell
from torch import nn

import fid
from align import build_tokenizer
import sample
from plumbing.data import ImageFolder, split, to_float
from plumbing.inception import inception_features, inception_input, load_inception
from plumbing.run import UserError, command_line, file_hash, save_checkpoint, state_hash
from plumbing.weights import OFFICIAL, load_lpips
from sit import SiT


def images(name):
    return array(f"psnr_ssim/{name}").permute(0, 3, 1, 2)


def test_psnr_and_ssim_equal_scikit_image():
    torch.testing.assert_close(fid.psnr(images("a"), images("b")), array("psnr_ssim/psnr_u8"), atol=1e-6, rtol=0)
    torch.testing.assert_close(fid.ssim(images("a"), images("b")), array("psnr_ssim/ssim_gauss_u8"), atol=1e-6, rtol=0)


def test_psnr_of_a_known_error_and_of_equal_images():
    a = torch.full((1, 3, 12, 12), 100, dtype=torch.uint8)
    assert fid.psnr(a, a + 10).item() == pytest.approx(10 * np.log10(255**2 / 100))
    assert fid.psnr(a, a).item() == np.inf and fid.ssim(a, a).item() == pytest.approx(1)


@pytest.mark.parametrize("metric", [fid.psnr, fid.ssim, fid.ssim_softvq])
def test_unequal_shapes_are_refused(metric):
    for a, b in (((1, 3, 12, 12), (1, 3, 12, 13)), ((3, 12, 12), (3, 12, 12)), ((1, 3, 12, 12), (2, 3, 12, 12))):
        with pytest.raises(ValueError, match="same shape"):
            metric(torch.zeros(a), torch.zeros(b))


@pytest.mark.parametrize("metric, least", [(fid.ssim, 11), (fid.ssim_softvq, 7)])
def test_ssim_refuses_tiny_images(metric, least):
    assert metric(torch.zeros(1, 3, least, 20), torch.zeros(1, 3, least, 20)).item() == pytest.approx(1)
    with pytest.raises(ValueError, match=f"{least} x {least} px, these are {least - 1} x 20"):
        metric(torch.zeros(1, 3, least - 1, 20), torch.zeros(1, 3, least - 1, 20))


def test_ssim_of_softvq_is_scikit_images_default_for_twice_the_range():
    a, b, window = images("a"), images("b"), torch.ones(7).double()
    index = fid.ssim(a, b, 255.0, window, 49 / 48)
    torch.testing.assert_close(index, array("psnr_ssim/ssim_uniform7_u8"), atol=1e-6, rtol=0)
    assert torch.equal(fid.ssim_softvq(a, b), fid.ssim(a, b, 510.0, window, 49 / 48))
    assert torch.allclose(fid.ssim_softvq(a / 255, b / 255, 1.0), fid.ssim_softvq(a, b))
    smooth = torch.linspace(0, 255, 64).expand(1, 3, 64, 64)
    noisy = smooth + 14 * torch.randn(smooth.shape, generator=torch.Generator().manual_seed(0))  # 25 dB
    assert fid.ssim_softvq(smooth, noisy) > fid.ssim(smooth, noisy) + 0.05


def reference(name):
    return ARRAYS[f"metrics_fid/{name}"]


def test_frechet_distance_equals_pytorch_fid():
    stored = fid.frechet_distance(reference("mu_a"), reference("sigma_a"), reference("mu_b"), reference("sigma_b"))
    assert stored == pytest.approx(float(reference("fid_pytorchfid")), rel=1e-7)
    few = fid.frechet_distance(*fid.statistics(reference("small_a")), *fid.statistics(reference("small_b")))
    assert few == pytest.approx(float(reference("fid_small_float64_eigh")), rel=1e-6)  # 40 and 50 rows of 64: singular
    assert few == pytest.approx(float(reference("fid_small_pytorchfid")), rel=1e-6)


def test_frechet_distance_closed_forms():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((500, 8))
    mean, cov = fid.statistics(features)
    shift = np.arange(8.0)
    assert fid.frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-9)
    assert fid.frechet_distance(mean, cov, *fid.statistics(features + shift)) == pytest.approx((shift**2).sum())
    assert fid.frechet_distance(mean, cov, mean, 4 * cov) == pytest.approx(np.trace(cov))  # (2 - 1)^2 tr S
    assert fid.frechet_distance(mean, np.diag(shift), mean, np.zeros((8, 8))) == pytest.approx(shift.sum())


def test_bad_features_are_named():
    with pytest.raises(ValueError, match=r"\(3, 2\) with 6 not finite"):
        fid.statistics(np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match=r"at least 2, not \(1, 4\)"):
        fid.statistics(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="4 and of 3"):
        fid.frechet_distance(np.zeros(4), np.eye(4), np.zeros(3), np.eye(3))


# Inception


INCEPTION = "pt_inception-2015-12-05-6726825d"


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A folder with files of the official formats with generated contents."""
    return official_folder(tmp_path_factory.mktemp("weights"), INCEPTION, "vgg16-397923af", "lpips_v0.1_vgg")


@pytest.fixture(scope="session")
def inception(weights):
    return load_inception(str(weights), torch.device("cpu"))


def inception_case(i):
    image = Image.open(io.BytesIO(FID_ARRAYS[f"inception/image_{i}"].tobytes()))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def expected(name):
    return torch.from_numpy(FID_ARRAYS[f"inception/{name}"])[None]


@pytest.mark.parametrize("i", range(3))  # 256 x 256, 299 x 299, 240 x 320 px
def test_inception_equals_torch_fidelity_at_every_level(inception, i, request):
    x = inception_input(inception_case(i))
    pixels = (x * 128 + 128)[:, :, 100:108, 200:208]
    torch.testing.assert_close(pixels, expected(f"torchfidelity_resized_{i}"), atol=1e-3, rtol=0)
    levels = {}
    for name, layer in (("feat64", "Conv2d_3b_1x1"), ("feat192", "Mixed_5b"), ("feat768", "Mixed_7a")):
        hook = inception.get_submodule(layer).register_forward_pre_hook(lambda _, x, n=name: levels.update({n: x[0]}))
        request.addfinalizer(hook.remove)
    with torch.no_grad():
        pool3 = inception(x)
    for name, maps in levels.items():
        torch.testing.assert_close(maps.mean(dim=(2, 3)), expected(f"{name}_{i}"), atol=3e-5, rtol=0)
    assert len(levels) == 3
    torch.testing.assert_close(pool3, expected(f"pool3_{i}"), atol=3e-5, rtol=0)
    torch.testing.assert_close(inception.logits(pool3), expected(f"logits_unbiased_{i}"), atol=3e-5, rtol=0)


@pytest.mark.parametrize("i", range(3))
def test_the_other_convention_equals_pytorch_fid(inception, i):
    x = inception_input(inception_case(i), "pytorch-fid")
    pixels = ((x + 1) / 2)[:, :, 100:108, 200:208]
    torch.testing.assert_close(pixels, expected(f"pytorchfid_resized_{i}"), atol=5e-6, rtol=0)
    features = inception_features(inception, inception_case(i), "pytorch-fid")
    torch.testing.assert_close(features, expected(f"pytorchfid_pool3_{i}"), atol=3e-5, rtol=0)


def test_inception_refuses_floats_and_unknown_conventions():
    with pytest.raises(ValueError, match=r"uint8 images .* not torch.float32"):
        inception_input(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="'clean'; it must be tf1 or pytorch-fid"):
        inception_input(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "clean")


def test_inception_files_are_accepted_without_counters_and_else_strictly(tmp_path, weights, inception):
    state = torch.load(weights / f"{INCEPTION}.pth")
    assert len(state) == 566
    short = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(short) == 472
    path = tmp_path / f"{INCEPTION}.pth"
    torch.save(short, path)
    loaded = load_inception(str(tmp_path), torch.device("cpu")).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in inception.state_dict().items())
    for change, named in (
        ({"fc.bias": torch.zeros(1000)}, r"mismatch for fc.bias: .*\[1000\].*\[1008\]"),
        ({"extra": torch.zeros(1)}, 'Unexpected key.*"extra"'),
        ({"Mixed_5b.branch1x1.bn.weight": None}, 'Missing key.*"Mixed_5b.branch1x1.bn.weight"'),
    ):
        torch.save({key: value for key, value in (short | change).items() if value is not None}, path)
        with pytest.raises(UserError, match=named):
            load_inception(str(tmp_path), torch.device("cpu"))


def test_inception_runs_without_tf32(monkeypatch):
    def network(x):
        seen.append(torch.backends.cudnn.allow_tf32)
        return x.mean(dim=(2, 3))

    network.fc, seen = nn.Linear(1, 1), []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert inception_features(network, torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).shape == (2, 3)
    assert seen == [False] and torch.backends.cudnn.allow_tf32


# Metrics of features


def test_inception_score_equals_torch_fidelity_and_adm():
    def value(name):
        return FID_ARRAYS[f"metrics_is/{name}"]

    logits = torch.from_numpy(value("logits"))
    probabilities, count = logits.double().softmax(dim=1), len(logits)
    shuffled = np.random.RandomState(2020).permutation(count)  # as torch-fidelity
    for order, splits, name in (
        (shuffled, 10, "torchfidelity_splits10_shuffle"),
        (np.arange(count), 10, "torchfidelity_splits10_noshuffle"),
        (shuffled, 1, "torchfidelity_splits1"),
    ):
        assert fid.inception_score(probabilities[order], count // splits) == pytest.approx(tuple(value(name)), rel=1e-9, abs=1e-12)
    rounded = logits.softmax(dim=1).double()  # what ADM gets from its graph is float32
    assert fid.inception_score(rounded)[0] == pytest.approx(float(value("adm_split5000_float64")), rel=1e-9)
    for block in (5000, 1000):
        score, _ = fid.inception_score(probabilities, block)
        assert score == pytest.approx(float(value(f"adm_split{block}")), rel=2e-6)


def test_inception_score_closed_forms():
    one_hot = torch.eye(7, dtype=torch.float64).repeat(10, 1)
    assert fid.inception_score(one_hot) == pytest.approx((7, 0))
    assert fid.inception_score(torch.full((70, 7), 1 / 7)) == pytest.approx((1, 0))
    assert fid.inception_score(one_hot[:10], 7) == pytest.approx((5, 2))  # of 7 classes and of 3: a shorter block counts the same


def test_precision_and_recall_equal_the_public_evaluators():
    real, fake = (low_rank_features(FID_ARRAYS[f"metrics_pr/args_2048_{name}"]) for name in ("ref", "sample"))
    result = fid.precision_recall(real, fake)
    for name, tolerance in (("float64_brute", 0), ("torchfidelity", 1e-6), ("adm_fp32_branch", 1e-9)):
        assert result == pytest.approx(tuple(FID_ARRAYS[f"metrics_pr/{name}_2048"]), abs=tolerance)


def test_precision_and_recall_closed_forms():
    cloud = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    assert fid.precision_recall(cloud, cloud) == (1, 1)
    assert fid.precision_recall(cloud, cloud + 1000) == (0, 0)
    both = torch.cat([cloud, cloud + 1000])
    assert fid.precision_recall(cloud, both) == (0.5, 1) and fid.precision_recall(both, cloud) == (1, 0.5)
    assert fid.precision_recall(cloud, 1.3 * cloud[:30], block=7) == fid.precision_recall(cloud, 1.3 * cloud[:30])
    with pytest.raises(ValueError, match="over 3 points"):
        fid.precision_recall(cloud, cloud[:3])


def test_frechet_distance_of_rotated_and_of_singular_covariances():
    rng = np.random.default_rng(0)
    values, rotation = rng.uniform(0.5, 2, 12), np.linalg.qr(rng.standard_normal((12, 12)))[0]
    scaled, zero = (rotation * (9 * values)) @ rotation.T, np.zeros(12)
    turned = (rotation * values) @ rotation.T
    assert fid.frechet_distance(zero, turned, zero, scaled) == pytest.approx(4 * values.sum())  # (3 - 1)^2 tr S
    few = fid.statistics(rng.standard_normal((20, 300)))
    assert abs(fid.frechet_distance(*few, *few)) < 1e-6
    # one axis each, orthogonal: nothing of the covariances is shared
    a, b = (np.outer(rotation[i], rotation[i]) for i in (0, 1))
    assert fid.frechet_distance(zero, a, zero, b) == pytest.approx(2)
    many = fid.statistics(rng.standard_normal((400, 300)))
    assert fid.frechet_distance(*few, *many) == pytest.approx(fid.frechet_distance(*many, *few), rel=1e-6)


def test_statistics_are_numpys():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    mean, cov = fid.statistics(features)
    np.testing.assert_allclose(mean, features.double().numpy().mean(axis=0), atol=1e-14)
    np.testing.assert_allclose(cov, np.cov(features.double().numpy(), rowvar=False), atol=1e-14)


def test_linear_probe_separates_what_is_linear_and_only_that():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    noise = torch.randn(300, 8, generator=generator)
    x = noise + 8 * torch.eye(8)[labels]
    assert fid.linear_probe(x[:200], labels[:200], x[200:], labels[200:]) == 1
    assert fid.linear_probe(noise[:200], labels[:200], noise[200:], labels[200:]) < 0.6


# Command line


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    """8 PNGs of one size, and an .npz of 9 other images, with the record of sample.py beside it."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    (root / "folder").mkdir()
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(root / "folder" / f"{i}.png")
    np.savez(root / "images.npz", rng.integers(0, 200, (9, 24, 20, 3), dtype=np.uint8), np.arange(9))
    (root / "images.npz.json").write_text('{"guidance": 2.0}')
    return root


@pytest.fixture
def three_features(monkeypatch):
    """A pixel's three values in the place of Inception's, to be quick."""
    monkeypatch.setattr(fid, "inception_features", lambda model, images, resize: images[:, :, 5, 5].float())
    monkeypatch.setattr(fid.InceptionV3, "logits", lambda model, pool3: pool3)


MOMENTS = {"mu": np.zeros(4), "sigma": np.eye(4)}


def read(path):
    return json.loads(Path(path).read_text())


def run(*words):
    fid.main([word for text in words for word in str(text).split()])


def test_stats_stand_for_their_images_and_cards_are_compared(samples, weights, tmp_path, capsys):
    flags = f"--weights {weights}"
    run(f"stats {samples}/folder {tmp_path}/stats.npz", flags)
    run(f"gfid {samples}/images.npz {tmp_path}/stats.npz --card {tmp_path}/a.json", flags)
    run(f"gfid {samples}/folder {tmp_path}/stats.npz --card {tmp_path}/b.json", flags)
    np.savez(tmp_path / "four.npz", **MOMENTS)
    run(f"gfid {tmp_path}/four.npz {tmp_path}/four.npz --card {tmp_path}/c.json")  # needs no weights
    a, b, c = (read(tmp_path / f"{name}.json") for name in "abc")
    assert set(a["values"]) == {"fid", "inception_score", "inception_score_std"} and set(c["values"]) == {"fid"}
    assert abs(b["values"]["fid"]) < 1e-6 and abs(c["values"]["fid"]) < 1e-6
    folder = ImageFolder(samples / "folder", 0).stamp
    assert a["reference"]["hash"] == b["reference"]["hash"] == b["samples"]["hash"] == folder
    assert a["samples"]["hash"] == file_hash(samples / "images.npz") and a["reference"]["N"] == 8
    assert c["samples"]["hash"] == file_hash(tmp_path / "four.npz") and c["N"] is None
    assert "9 images are too few for a full-rank covariance of 2048 dimensions" in capsys.readouterr().err
    run(f"compare {tmp_path}/a.json {tmp_path}/a.json")
    assert capsys.readouterr().out.splitlines()[-2:] == [f"{tmp_path}/a.json: comparable"] * 2
    run(f"compare {tmp_path}/a.json {tmp_path}/b.json")
    assert f"{tmp_path}/b.json is not comparable with {tmp_path}/a.json: N is 9 and 8" in capsys.readouterr().out
    with pytest.raises(UserError, match="made with resize tf1, not pytorch-fid"):
        run(f"gfid {samples}/images.npz {tmp_path}/stats.npz --resize pytorch-fid", flags)


def test_stored_statistics_must_be_made_alike_where_both_say_how(tmp_path):
    made = {"N": 5, "hash": "h", "weights": "w"}
    for name, more in (("tf1", made | {"resize": "tf1"}), ("other", made | {"resize": "pytorch-fid"}), ("plain", {})):
        np.savez(tmp_path / f"{name}.npz", **MOMENTS, **more)
    for a, b in (("tf1", "tf1"), ("tf1", "plain"), ("plain", "tf1")):
        run(f"gfid {tmp_path}/{a}.npz {tmp_path}/{b}.npz")
    assert read(tmp_path / "tf1.gfid.json")["samples"] == {"path": f"{tmp_path}/tf1.npz", "resize": "tf1"} | made
    with pytest.raises(UserError, match=r"other.npz was made with resize pytorch-fid, not tf1"):
        run(f"gfid {tmp_path}/tf1.npz {tmp_path}/other.npz")


def test_any_number_of_cards_makes_one_table(tmp_path, capsys):
    for guidance in (1, 1.5, 2):
        card = {"command": "gfid", "N": 5, "reference": {"hash": "x"}, "protocol": {"k": 3}}
        card |= {"values": {"fid": 10 * guidance, "psnr": None}, "sampler": {"guidance": guidance, "steps": 250}}
        if guidance == 2:
            card |= {"N": 6, "values": {}}
        (tmp_path / f"{guidance}.gfid.json").write_text(json.dumps(card))
    cards = [f"{tmp_path}/{guidance}.gfid.json" for guidance in (1, 1.5, 2)]
    run("compare", *cards[:2])
    said = capsys.readouterr().out.splitlines()
    assert [line.split() for line in said[:-2]] == [
        ["1.gfid", "1.5.gfid"],
        ["guidance", "1", "1.5"],
        ["fid", "10.0000", "15.0000"],
        ["psnr", "infinite", "infinite"],
    ]
    assert {len(line) for line in said[:-2]} == {70} and said[-2:] == [f"{card}: comparable" for card in cards[:2]]
    run("compare", *cards)
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["guidance", "1", "1.5", "2"] and said[2].split()[-1] == "-"
    assert said[-2:] == [f"{cards[1]}: comparable", f"{cards[2]} is not comparable with {cards[0]}: N is 5 and 6"]


@pytest.mark.parametrize("change, named", [
    ([], "no JSON object"),
    ({"values": 3}, "not a result card"),
    ({"values": {"fid": {"value": 3, "spread": 1}}}, "not a result card"),  # as they once were
    ({"values": {"fid": "3"}}, "not a result card"),
    ({"sampler": [3]}, "not a result card"),
])  # fmt: skip
def test_what_is_no_card_is_refused(tmp_path, change, named):
    card = {"command": "gfid", "N": 3, "values": {"fid": 3}, "reference": {}, "protocol": {}}
    (tmp_path / "x.json").write_text(json.dumps(card | change if change else change))
    with pytest.raises(UserError, match=named):
        run(f"compare {tmp_path}/x.json {tmp_path}/x.json")


def test_photographs_of_many_sizes_are_cropped_as_in_training(weights, tmp_path, three_features):
    raw, rng = tmp_path / "raw", np.random.default_rng(0)
    raw.mkdir()
    for i, shape in enumerate([(40, 30), (25, 60), (33, 33), (90, 70), (16, 17)]):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(raw / f"{i}.png")
    with pytest.raises(OSError, match="raw has images of several sizes; --image_size S crops them"):
        run(f"stats {raw} {tmp_path}/out.npz --weights {weights}")
    with pytest.raises(UserError, match="--image_size: is -5; it must be at least 0"):
        run(f"stats {raw} {tmp_path}/out.npz --weights {weights} --image_size -5")
    run(f"stats {raw} {tmp_path}/out.npz --weights {weights} --image_size 16")
    folder, found = ImageFolder(raw, 16), np.load(tmp_path / "out.npz")
    crops = torch.stack([folder.read(i)[0] for i in range(5)])
    np.testing.assert_allclose(found["mu"], crops[:, :, 5, 5].double().mean(dim=0))
    run(f"gfid {raw} {tmp_path}/out.npz --weights {weights} --image_size 16")
    card = read(tmp_path / "raw.gfid.json")
    assert card["values"]["fid"] == pytest.approx(0, abs=1e-6) and card["N"] == card["reference"]["N"] == 5
    assert card["samples"]["hash"] == card["reference"]["hash"] == f"{folder.stamp}, cropped to 16"


def test_the_record_of_the_samples_is_on_the_card_or_missed(tmp_path, capsys):
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", **MOMENTS)
    (tmp_path / "a.npz.json").write_text('{"guidance": 2.0}')
    for samples, reference, sampler in (("a", "b", {"guidance": 2.0}), ("b", "a", None)):
        run(f"gfid {tmp_path}/{samples}.npz {tmp_path}/{reference}.npz")
        assert read(tmp_path / f"{samples}.gfid.json")["sampler"] == sampler
        missed = f"no record beside {tmp_path}/{samples}.npz: the card does not say how they were sampled"
        assert (missed in capsys.readouterr().err) == (sampler is None)


def test_cards_lie_beside_what_they_are_of(tmp_path):
    for name in ("1", "1.5", "2.npz"):
        with open(tmp_path / name, "wb") as file:
            np.savez(file, **MOMENTS)
        run(f"gfid {tmp_path}/{name} {tmp_path}/1")
    assert {path.name for path in tmp_path.glob("*.json")} == {"1.gfid.json", "1.5.gfid.json", "2.gfid.json"}


def test_reference_batches_with_spatial_statistics_are_read(samples, weights, tmp_path, three_features):
    """As ADM's: images, mu, sigma, which come before those of the images, and mu_s, sigma_s, which FID has no use for."""
    moments = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(9), "sigma_s": np.eye(9)}
    pixels = np.load(samples / "images.npz")["arr_0"]
    np.savez(tmp_path / "adm.npz", pixels, **moments)
    images = fid.ImageSet(str(tmp_path / "adm.npz"), 0)
    assert images.count == 9 and images.shape == (24, 20, 3) and not images.made
    assert torch.equal(images.read(range(2, 5)), torch.from_numpy(pixels[2:5]).permute(0, 3, 1, 2))
    run(f"gfid {tmp_path}/adm.npz {tmp_path}/adm.npz --weights {weights} --card {tmp_path}/x.json")
    card = read(tmp_path / "x.json")
    assert card["values"]["fid"] == pytest.approx(0) and card["values"]["precision"] == 1 and card["reference"]["N"] == 9
    run(f"stats {tmp_path}/adm.npz {tmp_path}/out.npz --weights {weights}")
    found = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(found["mu"], pixels[:, 5, 5].mean(axis=0))
    assert str(found["hash"]) == file_hash(tmp_path / "adm.npz") and found["N"] == 9


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Gives a function: words of a command that must fail as the shell shows it -> what it wrote on stderr."""

    def refuse(words):
        monkeypatch.setattr(sys, "argv", ["fid.py", *words.split()])
        with pytest.raises(SystemExit) as stop:
            command_line(fid.main)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.splitlines()[-1].startswith("error: ")
        return said

    return refuse


def bad_npz(**arrays):
    return lambda path: np.savez(path, **arrays)


def bad_sigma(content, method=0):
    """An .npz whose sigma.npy is these bytes, said to be compressed by this method."""

    def make(path):
        np.savez(path, mu=np.zeros(4))
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("sigma.npy", content)
        raw = bytearray(path.read_bytes())
        raw[raw.rindex(b"PK\1\2") + 10] = method
        path.write_bytes(raw)

    return make


def float_header(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue()


def float_folder(path):
    path.mkdir()
    Image.fromarray(np.zeros((20, 20), np.float32)).save(path / "x.tif")


@pytest.mark.parametrize("make, named", [
    (bad_npz(arr_0=np.zeros((9, 8, 8, 3), np.float32)), "arr_0 is float32 .* must be uint8"),
    (bad_npz(arr_0=np.zeros((9, 8, 8), np.uint8)), r"must be uint8 \(N, H, W, 3\)"),
    (bad_npz(arr_0=np.zeros((0, 8, 8, 3), np.uint8)), "must be uint8"),
    (bad_npz(arr_0=np.array([{}])), "arr_0 is object .* must be uint8"),
    (bad_npz(mu=np.array([{}]), sigma=np.eye(4)), "Object arrays cannot be loaded"),
    (bad_npz(mu=np.zeros(4), sigma=np.eye(5)), r"mu is \(4,\) and sigma \(5, 5\)"),
    (bad_npz(mu=np.full(4, np.nan), sigma=np.eye(4)), "finite"),
    (bad_npz(mu=np.zeros(4), sigma=np.full((4, 4), np.nan)), "finite"),
    (bad_npz(mu=np.zeros(0), sigma=np.zeros((0, 0))), r"mu is \(0,\)"),
    (bad_npz(mu=np.zeros(4), sigma=np.eye(4), N=np.arange(2)), "cannot be read: can only convert an array of size 1"),
    (bad_npz(mu=np.zeros(4), sigma=np.array("a")), "cannot be read"),
    (bad_sigma(b"no array"), "cannot be read: the magic string is not correct"),
    (bad_sigma(b"\x93NUMPY\x01\x00\x05\x00none\n"), "cannot be read: malformed"),
    (bad_sigma(float_header((40_000, 40_000))), "cannot be read"),
    (bad_sigma(b"", method=97), "cannot be read: That compression method is not supported"),
    (bad_npz(mu=np.zeros(3), sigma=np.eye(3)), "3 and of 4 dimensions cannot be compared"),
    (bad_npz(other=np.zeros(3)), "neither arr_0 nor mu and sigma, but other"),
    (lambda path: path.write_text("hello"), "bad.npz cannot be read: File is not a zip file"),
    (lambda path: path.mkdir(), "no images"),
    (lambda path: None, "No such file or directory: '.*bad.npz'"),
    (float_folder, "x.tif is not a readable image: pixels of type F"),
])  # fmt: skip
def test_what_cannot_be_measured_is_said_in_a_sentence(tmp_path, refusal, make, named):
    path = tmp_path / "bad.npz"
    make(path)
    np.savez(tmp_path / "good.npz", **MOMENTS)
    said = refusal(f"gfid {path} {tmp_path}/good.npz")
    assert said.count("\n") == 1 and re.search(named, said)


def test_images_of_several_sizes_and_damaged_archives_are_named(samples, weights, tmp_path, refusal):
    (tmp_path / "mixed").mkdir()
    for side in (20, 21):
        Image.new("RGB", (side, side)).save(tmp_path / "mixed" / f"{side}.png")
    content = bytearray((samples / "images.npz").read_bytes())
    content[3000] ^= 255
    (tmp_path / "bad.npz").write_bytes(content)
    with zipfile.ZipFile(samples / "images.npz") as whole, zipfile.ZipFile(tmp_path / "short.npz", "w") as short:
        short.writestr("arr_0.npy", whole.read("arr_0.npy")[:-100])
    for name, named in (
        ("mixed", "mixed has images of several sizes; --image_size S crops"),
        ("bad.npz", "bad.npz is damaged: Bad CRC-32"),
        ("short.npz", "short.npz is damaged"),
    ):
        assert re.search(named, refusal(f"gfid {tmp_path}/{name} {samples}/folder --weights {weights}").splitlines()[-1])


def test_features_that_are_not_finite_and_unequal_dimensions_are_refused(samples, weights, tmp_path, refusal):
    state = torch.load(weights / f"{INCEPTION}.pth")
    state["Mixed_7c.branch1x1.bn.bias"] = torch.full((320,), torch.nan)
    torch.save(state, tmp_path / f"{INCEPTION}.pth")
    np.savez(tmp_path / "four.npz", **MOMENTS)
    for folder, named in ((tmp_path, "2048) with 2560 not finite"), (weights, "2048 and of 4 dimensions")):
        assert named in refusal(f"gfid {samples}/folder {tmp_path}/four.npz --weights {folder}")


def test_errors_leave_with_code_2_and_without_a_traceback(samples):
    done = shell("fid.py", f"gfid {samples}/folder {samples}/folder")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert OFFICIAL["inception"].url in done.stderr and "--weights" in done.stderr
    for words, named in (
        ("", "required: COMMAND"),
        ("gfod a b", "invalid choice"),
        ("gfid a", "required: reference"),
        ("gfid a b --weight x", "did you mean --weights"),
        ("probe a --seed 1", "unrecognized arguments: --seed"),
    ):
        with pytest.raises(UserError, match=named):
            run(words)


def test_every_command_has_help_and_seeds_have_bounds(capsys):
    with pytest.raises(UserError, match=r"--seed\b.*-1"):
        run("rfid a --seed -1")
    for words, named in (("", "compare"), ("gfid", "--resize"), ("rfid", "--held_out"), ("probe", "--data"), ("stats", "out")):
        with pytest.raises(SystemExit) as stop:
            run(words, "--help")
        assert not stop.value.code and named in capsys.readouterr().out


CONFIG = {"image_size": 16, "patch_size": 4, "tokens": 4, "channels": 4, "size": "toy", "posterior": "gaussian", "sit": "toy"}
CONFIG |= {"data": "", "eval_images": 4, "encoder_init": "none", "generator": "sit"}


def save_stage(root, stage, step, **networks):
    """A checkpoint as train.py leaves it, of untrained networks."""
    states = {name: network.state_dict() for name, network in networks.items()}
    about = {"config": CONFIG, "classes": ["class0", "class1"], "stage": stage, "step": step, "of_steps": 20}
    save_checkpoint(about | states, root / f"{stage}.pt")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run with an untrained tokenizer of 16-px images, and a folder of 24 images in 2 classes."""
    root = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    save_stage(root, "tokenizer", 20, ema=build_tokenizer(CONFIG))
    make_folder(root / "images", 2, 12)
    return root


QUICK = """
import fid
def features(model, images, resize):
    pixels = images[:, :, ::3, ::3].flatten(1).cpu().float()
    return pixels + pixels.mean(0)
fid.BATCH, fid.inception_features = 4, features
fid.InceptionV3.logits = lambda model, pool3: pool3
fid.command_line(lambda commands: [fid.main(words.split()) for words in commands])
"""


def test_no_figure_depends_on_the_process_count(samples, tiny_run, weights, tmp_path):
    """Batches of 4, so that both processes have several, and the last one is not full.

    Pixels in the place of Inception's features, to be quick; as those, they depend on what else is in the batch.
    """
    script = tmp_path / "quick.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + QUICK)
    for processes in (1, 2):
        out, flags = tmp_path / str(processes), f"--weights {weights} --card {tmp_path}/{processes}"
        out.mkdir()
        words = (
            f"gfid {samples}/images.npz {samples}/folder {flags}/gfid.json",
            f"rfid {tiny_run} --data {tiny_run}/images {flags}/rfid.json",
            f"probe {tiny_run} --data {tiny_run}/images --card {out}/probe.json",
            f"stats {samples}/images.npz {out}/stats.npz --weights {weights}",
        )
        done = subprocess.run([*command(script, processes=processes), *words], capture_output=True, text=True, env=ENV)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "warning" in done.stderr and "too few for a full-rank covariance" in done.stderr
    for name in ("gfid", "rfid", "probe"):
        a, b = (read(tmp_path / processes / f"{name}.json") for processes in "12")
        for key, number in a.pop("values").items():
            assert b["values"][key] == pytest.approx(number, rel=1e-9), (name, key)
        del b["values"]
        assert a == b
    a, b = (np.load(tmp_path / processes / "stats.npz") for processes in "12")
    np.testing.assert_allclose(a["mu"], b["mu"], rtol=1e-9)
    np.testing.assert_allclose(a["sigma"], b["sigma"], rtol=1e-9, atol=1e-9 * a["sigma"].max())
    assert a["hash"] == b["hash"] == file_hash(samples / "images.npz")
    card = read(tmp_path / "1" / "gfid.json")
    assert set(card["values"]) == {"fid", "inception_score", "inception_score_std", "precision", "recall"} and card["N"] == 9
    assert card["reference"]["N"] == 8 and card["sampler"] == {"guidance": 2.0} and card["protocol"]["resize"] == "tf1"
    assert card["protocol"]["weights"] == file_hash(weights / f"{INCEPTION}.pth")
    values = read(tmp_path / "1" / "rfid.json")["values"]
    assert set(values) == {f"{x}_{y}" for x in ("rfid", "psnr", "ssim", "ssim_softvq", "lpips") for y in ("mean", "sampled")}
    assert values["rfid_mean"] != values["rfid_sampled"]


def test_rfid_of_held_out_images(tiny_run, weights, tmp_path, three_features, capsys):
    alone, flags = official_folder(tmp_path / "alone", INCEPTION), f"--data {tiny_run}/images --card {tmp_path}/x.json"
    run(f"rfid {tiny_run} {flags} --weights {alone}")
    card = read(tmp_path / "x.json")
    assert card["N"] == card["reference"]["N"] == 24 and "lpips_mean" not in card["values"]
    run(f"rfid {tiny_run} {flags} --weights {weights} --held_out")
    card, loaded = read(tmp_path / "x.json"), sample.load_run(tiny_run, torch.device("cpu"))
    folder = ImageFolder(tiny_run / "images", 16)
    crops = torch.stack([folder[i][0] for i in split(24, 4)[1].tolist()])
    copies = sample.reconstruct(loaded.tokenizer, crops)
    lpips = load_lpips(str(weights))(to_float(copies), to_float(crops))
    metrics = {"lpips": lpips} | {metric.__name__: metric(crops, copies) for metric in (fid.psnr, fid.ssim, fid.ssim_softvq)}
    for name, found in metrics.items():
        assert card["values"][f"{name}_mean"] == pytest.approx(found.mean().item(), rel=1e-5)
    assert card["checkpoint"] == loaded.about and card["reference"]["hash"] == folder.stamp
    assert card["N"] == card["reference"]["N"] == 2
    pairs = [fid.statistics(images[:, :, 5, 5].float()) for images in (copies, crops)]  # against the very crops
    assert card["values"]["rfid_mean"] == pytest.approx(fid.frechet_distance(*pairs[0], *pairs[1]), rel=1e-6)
    assert f"rfid: 2 images, reference {tiny_run}/images (2)" in capsys.readouterr().out


def test_probe_holds_out_a_tenth_and_needs_classes(tiny_run, tmp_path, capsys):
    run(f"probe {tiny_run} --data {tiny_run}/images --card {tmp_path}/a.json")
    card = read(tmp_path / "a.json")
    assert card["N"] == 2 and card["protocol"]["train"] == 22 and "unfinished" not in capsys.readouterr().err
    about = {"file": "tokenizer.pt", "stage": "tokenizer", "step": 20, "of_steps": 20}
    saved = torch.load(tiny_run / "tokenizer.pt")["ema"]
    assert card["checkpoint"] == about | {"weights": state_hash(saved)} and card["run"] == str(tiny_run)
    assert card["reference"]["hash"] == ImageFolder(tiny_run / "images", 16).stamp
    with pytest.raises(UserError, match="12 images in 0 classes"):
        run(f"probe {tiny_run} --data {tiny_run}/images/class0")


def test_a_run_is_its_latest_stage_with_a_decoder_of_the_same_encoder(tmp_path, capsys):
    first, other = build_tokenizer(CONFIG), build_tokenizer(CONFIG)
    tuned = deepcopy(first)
    tuned.decoder.load_state_dict(other.decoder.state_dict())
    tuned.latent_mean += 1  # SiT knows the latents of its own checkpoint

    def load(decoder=None):
        if decoder:
            save_stage(tmp_path, "decoder", 20, ema=decoder)
        return sample.load_run(tmp_path, "cpu")

    save_stage(tmp_path, "sit", 7, ema=SiT(4, 4, 2, "toy"), tokenizer=first)
    before = load().about
    assert {key: before[key] for key in ("file", "stage", "step")} == {"file": "sit.pt", "stage": "sit", "step": 7}
    assert "sit.pt is unfinished, at step 7 of 20" in capsys.readouterr().err
    found = load(tuned)
    expected = tuned.state_dict() | {"latent_mean": first.latent_mean}
    assert all(torch.equal(value, expected[key]) for key, value in found.tokenizer.state_dict().items())
    assert found.about["weights"] != before["weights"] == load(first).about["weights"]
    with pytest.raises(UserError, match=r"decoder.pt does not belong to .*sit.pt: their encoders differ"):
        load(other)
    (tmp_path / "sit.pt").unlink()
    capsys.readouterr()
    assert load().about["stage"] == "decoder" and load().sit is None and not capsys.readouterr().err
    torch.save({"ema": {}}, tmp_path / "sit.pt")
    with pytest.raises(UserError, match=r"not a checkpoint of train.py"):
        load()
    with pytest.raises(UserError, match="is not a run"):
        sample.load_run(tmp_path / "none", "cpu")


def test_a_damaged_image_stops_the_count(tiny_run, weights, tmp_path):
    folder = make_folder(tmp_path / "images", 2, 12)
    (folder / "class0" / "3.png").write_bytes((folder / "class0" / "3.png").read_bytes()[:200])
    for words in (f"probe {tiny_run} --data {folder}", f"gfid {folder} {folder} --weights {weights}"):
        with pytest.raises(OSError, match=r"3.png is not a readable image"):
            run(words)
