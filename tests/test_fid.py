"""fid.py: metrics against closed forms and public implementations, Inception, sets of images, and
the command line.
"""

import hashlib
import io
import json
import re
import runpy
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reference import ARRAYS, FID_ARRAYS, ROOT, array, low_rank_features, official_folder, shell
from torch import nn

import fid
from utils.files import hash_file

INCEPTION = "pt_inception-2015-12-05-6726825d"
CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------------------
# Metrics of image pairs.


def image_batch(name):
    return array(f"psnr_ssim/{name}").permute(0, 3, 1, 2)


def test_psnr_and_ssim_equal_scikit_image():
    a = image_batch("a")
    b = image_batch("b")
    torch.testing.assert_close(fid.psnr(a, b), array("psnr_ssim/psnr_u8"), atol=1e-6, rtol=0)
    torch.testing.assert_close(fid.ssim(a, b), array("psnr_ssim/ssim_gauss_u8"), atol=1e-6, rtol=0)


def test_psnr_of_a_known_error_and_of_equal_images():
    a = torch.full((1, 3, 12, 12), 100, dtype=torch.uint8)
    assert fid.psnr(a, a + 10).item() == pytest.approx(10 * np.log10(255**2 / 100))
    assert fid.psnr(a, a).item() == np.inf
    assert fid.ssim(a, a).item() == pytest.approx(1)


@pytest.mark.parametrize("metric", [fid.psnr, fid.ssim, fid.ssim_softvq])
def test_unequal_shapes_are_refused(metric):
    for a, b in (
        ((1, 3, 12, 12), (1, 3, 12, 13)),
        ((3, 12, 12), (3, 12, 12)),
        ((1, 3, 12, 12), (2, 3, 12, 12)),
    ):
        with pytest.raises(ValueError, match="same shape"):
            metric(torch.zeros(a), torch.zeros(b))


@pytest.mark.parametrize("metric, least", [(fid.ssim, 11), (fid.ssim_softvq, 7)])
def test_ssim_refuses_tiny_images(metric, least):
    image = torch.zeros(1, 3, least, 20)
    assert metric(image, image).item() == pytest.approx(1)
    too_small = torch.zeros(1, 3, least - 1, 20)
    with pytest.raises(ValueError, match=f"{least} x {least} px, these are {least - 1} x 20"):
        metric(too_small, too_small)


def test_ssim_of_softvq_is_scikit_images_default_for_twice_the_range():
    a = image_batch("a")
    b = image_batch("b")
    window = torch.ones(7).double()
    similarity = fid.ssim(a, b, 255.0, window, 49 / 48)
    stored = array("psnr_ssim/ssim_uniform7_u8")
    torch.testing.assert_close(similarity, stored, atol=1e-6, rtol=0)
    softvq = fid.ssim_softvq(a, b)
    assert torch.equal(softvq, fid.ssim(a, b, 510.0, window, 49 / 48))
    assert torch.allclose(fid.ssim_softvq(a / 255, b / 255, 1.0), softvq)
    smooth = torch.linspace(0, 255, 64).expand(1, 3, 64, 64)
    noise = torch.randn(smooth.shape, generator=torch.Generator().manual_seed(0))
    noisy = smooth + 14 * noise  # 25 dB
    assert fid.ssim_softvq(smooth, noisy) > fid.ssim(smooth, noisy) + 0.05


# --------------------------------------------------------------------------------------------------
# Mean, covariance and Frechet distance.


def reference(name):
    return ARRAYS[f"metrics_fid/{name}"]


def test_mean_and_covariance_are_numpys():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    mean, cov = fid.mean_cov(features)
    rows = features.double().numpy()
    np.testing.assert_allclose(mean, rows.mean(axis=0), atol=1e-14)
    np.testing.assert_allclose(cov, np.cov(rows, rowvar=False), atol=1e-14)


def test_frechet_distance_equals_pytorch_fid():
    stored = fid.frechet_distance(
        reference("mu_a"), reference("sigma_a"), reference("mu_b"), reference("sigma_b")
    )
    assert stored == pytest.approx(float(reference("fid_pytorchfid")), rel=1e-7)
    # 40 and 50 rows of 64 dimensions have singular covariances.
    small_a = fid.mean_cov(reference("small_a"))
    small_b = fid.mean_cov(reference("small_b"))
    few = fid.frechet_distance(*small_a, *small_b)
    assert few == pytest.approx(float(reference("fid_small_float64_eigh")), rel=1e-6)
    assert few == pytest.approx(float(reference("fid_small_pytorchfid")), rel=1e-6)


def test_frechet_distance_closed_forms():
    features = np.random.default_rng(0).standard_normal((500, 8))
    mean, cov = fid.mean_cov(features)
    assert fid.frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-9)
    shift = np.arange(8.0)
    shifted = fid.frechet_distance(mean, cov, *fid.mean_cov(features + shift))
    assert shifted == pytest.approx((shift**2).sum())
    # Twice the standard deviation: (2 - 1)^2 tr S.
    assert fid.frechet_distance(mean, cov, mean, 4 * cov) == pytest.approx(np.trace(cov))
    against_zero = fid.frechet_distance(mean, np.diag(shift), mean, np.zeros((8, 8)))
    assert against_zero == pytest.approx(shift.sum())


def test_frechet_distance_of_rotated_and_of_singular_covariances():
    rng = np.random.default_rng(0)
    values = rng.uniform(0.5, 2, 12)
    rotation, _ = np.linalg.qr(rng.standard_normal((12, 12)))
    zero = np.zeros(12)
    rotated = (rotation * values) @ rotation.T
    scaled = (rotation * (9 * values)) @ rotation.T
    # Three times the standard deviation: (3 - 1)^2 tr S.
    distance = fid.frechet_distance(zero, rotated, zero, scaled)
    assert distance == pytest.approx(4 * values.sum())
    # Each of these two covariances has one axis, and the axes are orthogonal, so that they share
    # nothing.
    a = np.outer(rotation[0], rotation[0])
    b = np.outer(rotation[1], rotation[1])
    assert fid.frechet_distance(zero, a, zero, b) == pytest.approx(2)
    few = fid.mean_cov(rng.standard_normal((20, 300)))
    assert abs(fid.frechet_distance(*few, *few)) < 1e-6
    many = fid.mean_cov(rng.standard_normal((400, 300)))
    forward = fid.frechet_distance(*few, *many)
    assert forward == pytest.approx(fid.frechet_distance(*many, *few), rel=1e-6)


def test_bad_features_are_named():
    with pytest.raises(ValueError, match=r"\(3, 2\) with 6 not finite"):
        fid.mean_cov(np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match=r"at least 2, not \(1, 4\)"):
        fid.mean_cov(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="4 and 3 dimensions are not comparable"):
        fid.frechet_distance(np.zeros(4), np.eye(4), np.zeros(3), np.eye(3))


def test_running_statistics_are_those_of_all_features():
    features = 100 + torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    running, other = fid.RunningStats(), fid.RunningStats()
    for part in features[:30].split(13):
        running.add(part)
    other.add(features[30:])
    running.merge(other)
    running.merge(fid.RunningStats())  # of a process that had no images
    for ours, theirs in zip(running.mean_cov(), fid.mean_cov(features)):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)
    running.add(torch.full((1, 6), torch.inf))
    with pytest.raises(ValueError, match="must be finite, of at least 2 images; these are of 51"):
        running.mean_cov()


# --------------------------------------------------------------------------------------------------
# Inception.


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with Inception's file, of the official format with generated contents."""
    return official_folder(tmp_path_factory.mktemp("weights"), INCEPTION)


@pytest.fixture(scope="module")
def inception(weights):
    return fid.load_inception(str(weights), CPU)


def inception_case(i):
    image = Image.open(io.BytesIO(FID_ARRAYS[f"inception/image_{i}"].tobytes()))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def expected(name):
    return torch.from_numpy(FID_ARRAYS[f"inception/{name}"])[None]


@pytest.mark.parametrize("i", range(3))  # 256 x 256, 299 x 299, 240 x 320 px
def test_inception_equals_torch_fidelity_at_every_level(inception, i, request):
    x = fid.inception_input(inception_case(i))
    pixels = (x * 128 + 128)[:, :, 100:108, 200:208]
    torch.testing.assert_close(pixels, expected(f"torchfidelity_resized_{i}"), atol=1e-3, rtol=0)
    levels = {}
    for name, layer_name in (
        ("feat64", "Conv2d_3b_1x1"),
        ("feat192", "Mixed_5b"),
        ("feat768", "Mixed_7a"),
    ):
        layer = inception.get_submodule(layer_name)
        hook = layer.register_forward_pre_hook(lambda _, x, n=name: levels.update({n: x[0]}))
        request.addfinalizer(hook.remove)
    with torch.no_grad():
        pool3 = inception(x)
    assert len(levels) == 3
    for name, maps in levels.items():
        means = maps.mean(dim=(2, 3))
        torch.testing.assert_close(means, expected(f"{name}_{i}"), atol=3e-5, rtol=0)
    torch.testing.assert_close(pool3, expected(f"pool3_{i}"), atol=3e-5, rtol=0)
    logits = inception.logits(pool3)
    torch.testing.assert_close(logits, expected(f"logits_unbiased_{i}"), atol=3e-5, rtol=0)


@pytest.mark.parametrize("i", range(3))
def test_the_other_way_to_resize_equals_pytorch_fid(inception, i):
    x = fid.inception_input(inception_case(i), "pytorch-fid")
    pixels = ((x + 1) / 2)[:, :, 100:108, 200:208]
    torch.testing.assert_close(pixels, expected(f"pytorchfid_resized_{i}"), atol=5e-6, rtol=0)
    features = fid.inception_features(inception, inception_case(i), "pytorch-fid")
    torch.testing.assert_close(features, expected(f"pytorchfid_pool3_{i}"), atol=3e-5, rtol=0)


def test_inception_refuses_floats_and_unknown_ways_to_resize():
    with pytest.raises(ValueError, match=r"uint8 images .* not torch.float32"):
        fid.inception_input(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="'clean'; it must be one of tf1, pytorch-fid"):
        fid.inception_input(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "clean")


def test_inception_files_are_accepted_without_counters_and_else_strictly(
    tmp_path, weights, inception
):
    state = torch.load(weights / f"{INCEPTION}.pth")
    assert len(state) == 566
    short = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(short) == 472
    path = tmp_path / f"{INCEPTION}.pth"
    torch.save(short, path)
    loaded = fid.load_inception(str(tmp_path), CPU).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in inception.state_dict().items())
    missing_key = "Mixed_5b.branch1x1.bn.weight"
    for change, named in (
        ({"fc.bias": torch.zeros(1000)}, r"mismatch for fc.bias: .*\[1000\].*\[1008\]"),
        ({"extra": torch.zeros(1)}, r"unexpected keys \['extra'\]"),
        ({missing_key: None}, rf"missing keys \['{missing_key}'\]"),
    ):
        changed = {key: value for key, value in (short | change).items() if value is not None}
        torch.save(changed, path)
        with pytest.raises(ValueError, match=named):
            fid.load_inception(str(tmp_path), CPU)


def test_inception_runs_without_tf32(monkeypatch):
    seen = []

    def network(x):
        seen.append(torch.backends.cudnn.allow_tf32)
        return x.mean(dim=(2, 3))

    network.fc = nn.Linear(1, 1)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert fid.inception_features(network, images).shape == (2, 3)
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32


# --------------------------------------------------------------------------------------------------
# Inception Score, precision and recall.


def test_inception_score_equals_torch_fidelity_and_adm():
    def value(name):
        return FID_ARRAYS[f"metrics_is/{name}"]

    logits = torch.from_numpy(value("logits"))
    count = len(logits)
    probabilities = logits.double().softmax(dim=1)
    in_order = np.arange(count)
    shuffled = np.random.RandomState(2020).permutation(count)  # as torch-fidelity
    for order, splits, name in (
        (shuffled, 10, "torchfidelity_splits10_shuffle"),
        (in_order, 10, "torchfidelity_splits10_noshuffle"),
        (shuffled, 1, "torchfidelity_splits1"),
    ):
        score = fid.inception_score(probabilities[order], count // splits)
        assert score == pytest.approx(tuple(value(name)), rel=1e-9, abs=1e-12)
    rounded = logits.softmax(dim=1).double()  # what ADM gets from its graph is float32
    score, _ = fid.inception_score(rounded)
    assert score == pytest.approx(float(value("adm_split5000_float64")), rel=1e-9)
    for block_size in (5000, 1000):
        score, _ = fid.inception_score(probabilities, block_size)
        assert score == pytest.approx(float(value(f"adm_split{block_size}")), rel=2e-6)


def test_inception_score_closed_forms():
    one_hot = torch.eye(7, dtype=torch.float64).repeat(10, 1)
    assert fid.inception_score(one_hot) == pytest.approx((7, 0))
    assert fid.inception_score(torch.full((70, 7), 1 / 7)) == pytest.approx((1, 0))
    # A block of 7 classes and a shorter one of 3 count the same.
    assert fid.inception_score(one_hot[:10], 7) == pytest.approx((5, 2))


def test_inception_score_does_not_depend_on_the_order_of_the_classes(tmp_path, monkeypatch):
    """10,000 images of 10 classes make two blocks. Each pixel is a class, and Inception knows it.

    Sorted by class, a block of 5,000 images in order would have 5 of the classes.
    """

    def features(model, images, resize):
        return 50 * F.one_hot(images[:, 0, 0, 0].long(), 10).float()

    monkeypatch.setattr(fid, "inception_features", features)
    model = SimpleNamespace(fc=nn.Linear(1, 1), logits=lambda pool3: pool3)
    np.savez(tmp_path / "reference.npz", mu=np.zeros(10), sigma=np.eye(10))
    classes = np.arange(10, dtype=np.uint8)
    scores = {}
    for name, labels in (("sorted", classes.repeat(1000)), ("in turn", np.tile(classes, 1000))):
        pixels = np.broadcast_to(labels[:, None, None, None], (10_000, 1, 1, 3))
        np.savez(tmp_path / "samples.npz", pixels)
        samples = fid.ImageSet(tmp_path / "samples.npz")
        values = fid.evaluate_samples(samples, fid.ImageSet(tmp_path / "reference.npz"), model)
        scores[name] = values["inception_score"]
        assert values["inception_score_std"] < 0.01
    assert scores["sorted"] == pytest.approx(scores["in turn"], rel=1e-3)
    assert scores["sorted"] == pytest.approx(10, rel=1e-2)
    unshuffled = torch.eye(10, dtype=torch.float64).repeat_interleave(1000, dim=0)
    assert fid.inception_score(unshuffled) == pytest.approx((5, 0))


def test_precision_and_recall_equal_the_public_evaluators():
    real = low_rank_features(FID_ARRAYS["metrics_pr/args_2048_ref"])
    fake = low_rank_features(FID_ARRAYS["metrics_pr/args_2048_sample"])
    result = fid.precision_recall(real, fake)
    for name, tolerance in (
        ("float64_brute", 0),
        ("torchfidelity", 1e-6),
        ("adm_fp32_branch", 1e-9),
    ):
        theirs = tuple(FID_ARRAYS[f"metrics_pr/{name}_2048"])
        assert result == pytest.approx(theirs, abs=tolerance)


def test_precision_and_recall_closed_forms():
    cloud = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    assert fid.precision_recall(cloud, cloud) == (1, 1)
    assert fid.precision_recall(cloud, cloud + 1000) == (0, 0)
    both = torch.cat([cloud, cloud + 1000])
    assert fid.precision_recall(cloud, both) == (0.5, 1)
    assert fid.precision_recall(both, cloud) == (1, 0.5)
    wider = 1.3 * cloud[:30]
    in_blocks = fid.precision_recall(cloud, wider, block_size=7)
    assert in_blocks == fid.precision_recall(cloud, wider)
    with pytest.raises(ValueError, match="over 3 images"):
        fid.precision_recall(cloud, cloud[:3])


# --------------------------------------------------------------------------------------------------
# Command line.

STATS = {"mu": np.zeros(4), "sigma": np.eye(4)}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """8 PNGs of one size, and an .npz of 9 other images, with the record of sample.py beside it."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    (root / "folder").mkdir()
    for i in range(8):
        pixels = rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "folder" / f"{i}.png")
    pixels = rng.integers(0, 200, (9, 24, 20, 3), dtype=np.uint8)
    np.savez(root / "images.npz", pixels, np.arange(9))
    (root / "images.npz.json").write_text('{"cfg_scale": 2.0}')
    return root


@pytest.fixture
def three_features(monkeypatch):
    """A pixel's three values in the place of Inception's features, to be quick."""

    def features(model, images, resize):
        return images[:, :, 5, 5].float()

    monkeypatch.setattr(fid, "inception_features", features)
    monkeypatch.setattr(fid.InceptionV3, "logits", lambda model, pool3: pool3)


def run(*words):
    """The command line of fid.py."""
    fid.main([word for text in words for word in str(text).split()])


@pytest.fixture
def refusal(monkeypatch, capsys):
    """A function: words of a command that must fail as in a shell -> what it wrote on stderr."""

    def refuse(*words):
        argv = ["fid.py", *(word for text in words for word in str(text).split())]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "fid.py"), run_name="__main__")
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert said.splitlines()[-1].startswith("error: ")
        return said

    return refuse


def read(path):
    return json.loads(Path(path).read_text())


def hash_folder(folder):
    """The hash of a folder's images in a report, computed anew."""
    lines = [f"{hash_file(path)} {path.name}\n" for path in sorted(folder.iterdir())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_stored_statistics_stand_for_their_images(samples, weights, tmp_path, capsys):
    flags = f"--weights {weights}"
    run(f"{samples}/folder --save_stats {tmp_path}/stats.npz", flags)
    run(f"{samples}/images.npz {tmp_path}/stats.npz --report {tmp_path}/a.json", flags)
    run(f"{samples}/folder {tmp_path}/stats.npz --report {tmp_path}/b.json", flags)
    warnings = capsys.readouterr().err
    assert "9 images are too few for a full-rank covariance of 2048 dimensions" in warnings
    np.savez(tmp_path / "four.npz", **STATS)
    run(f"{tmp_path}/four.npz {tmp_path}/four.npz --report {tmp_path}/c.json")  # needs no weights
    a, b, c = (read(tmp_path / f"{name}.json") for name in "abc")
    assert set(a["values"]) == {"fid", "inception_score", "inception_score_std"}
    assert set(c["values"]) == {"fid"}
    assert abs(b["values"]["fid"]) < 1e-6
    assert abs(c["values"]["fid"]) < 1e-6
    folder_hash = hash_folder(samples / "folder")
    assert a["reference"]["hash"] == b["reference"]["hash"] == b["samples"]["hash"] == folder_hash
    assert a["samples"]["hash"] == hash_file(samples / "images.npz")
    assert a["reference"]["N"] == 8
    assert c["samples"]["hash"] == hash_file(tmp_path / "four.npz")
    assert c["N"] is None
    with pytest.raises(ValueError, match="made with resize tf1, not pytorch-fid"):
        run(f"{samples}/images.npz {tmp_path}/stats.npz --resize pytorch-fid", flags)


def test_a_report_says_what_was_measured_and_how(samples, weights, tmp_path, three_features):
    """The images are read in batches of 50, and in batches of 4 the same values come out."""
    flags = f"--weights {weights} --report {tmp_path}/report.json"
    run(f"{samples}/images.npz {samples}/folder", flags)
    report = read(tmp_path / "report.json")
    names = {"fid", "inception_score", "inception_score_std", "precision", "recall"}
    assert set(report["values"]) == names
    assert report["N"] == 9
    assert report["reference"]["N"] == 8
    assert report["samples"]["size"] == report["reference"]["size"] == [24, 20]
    assert report["sampler"] == {"cfg_scale": 2.0}
    assert report["protocol"]["resize"] == "tf1"
    assert report["protocol"]["weights"] == hash_file(weights / f"{INCEPTION}.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "BATCH_SIZE", 4)
        run(f"{samples}/images.npz {samples}/folder", flags)
    assert read(tmp_path / "report.json") == report


def test_stored_statistics_must_be_made_alike_where_both_say_how(tmp_path):
    made = {"N": 5, "hash": "h", "weights": "w"}
    for name, more in (
        ("tf1", made | {"resize": "tf1"}),
        ("other", made | {"resize": "pytorch-fid"}),
        ("plain", {}),
    ):
        np.savez(tmp_path / f"{name}.npz", **STATS, **more)
    for a, b in (("tf1", "tf1"), ("tf1", "plain"), ("plain", "tf1")):
        run(f"{tmp_path}/{a}.npz {tmp_path}/{b}.npz")
    described = read(tmp_path / "tf1.fid.json")["samples"]
    assert described == {"path": f"{tmp_path}/tf1.npz", "size": None, "resize": "tf1"} | made
    with pytest.raises(ValueError, match=r"other.npz was made with resize pytorch-fid, not tf1"):
        run(f"{tmp_path}/tf1.npz {tmp_path}/other.npz")


def test_samples_and_references_of_different_sizes_give_a_warning(samples, tmp_path, capsys):
    np.savez(tmp_path / "small.npz", np.zeros((9, 12, 10, 3), np.uint8))
    np.savez(tmp_path / "sized.npz", **STATS, size=(12, 10))
    np.savez(tmp_path / "unsized.npz", **STATS)
    images = fid.ImageSet(samples / "images.npz")
    folder = fid.ImageSet(samples / "folder")
    small = fid.ImageSet(tmp_path / "small.npz")
    sized = fid.ImageSet(tmp_path / "sized.npz")
    unsized = fid.ImageSet(tmp_path / "unsized.npz")
    for measured, other in ((small, folder), (small, images), (sized, folder), (sized, images)):
        *_, problem = fid.find_problems(measured, other)
        assert problem.startswith("the samples have 12 x 10 px, the reference 24 x 20 px;")
    for measured, other in ((images, folder), (small, sized), (images, unsized), (unsized, small)):
        problems = fid.find_problems(measured, other)
        assert not any("the samples have" in problem for problem in problems)
    np.savez(tmp_path / "larger.npz", **STATS, size=(24, 20))
    run(f"{tmp_path}/sized.npz {tmp_path}/larger.npz")
    warning = "warning: the samples have 12 x 10 px, the reference 24 x 20 px; FID depends on the"
    assert warning in capsys.readouterr().err


def test_the_size_of_images_is_stored_with_their_statistics(
    samples, weights, tmp_path, three_features
):
    run(f"{samples}/folder --save_stats {tmp_path}/stats.npz --weights {weights}")
    assert fid.ImageSet(tmp_path / "stats.npz").metadata["size"] == [24, 20]
    np.savez(tmp_path / "small.npz", np.zeros((9, 12, 10, 3), np.uint8))
    small = fid.ImageSet(tmp_path / "small.npz")
    *_, problem = fid.find_problems(small, fid.ImageSet(tmp_path / "stats.npz"))
    assert "the samples have 12 x 10 px, the reference 24 x 20 px" in problem


def test_the_record_of_the_samples_is_in_the_report_or_missed(tmp_path, capsys):
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", **STATS)
    (tmp_path / "a.npz.json").write_text('{"cfg_scale": 2.0}')
    for measured, other, sampler in (("a", "b", {"cfg_scale": 2.0}), ("b", "a", None)):
        run(f"{tmp_path}/{measured}.npz {tmp_path}/{other}.npz")
        assert read(tmp_path / f"{measured}.fid.json")["sampler"] == sampler
        missed = f"there is no {measured}.npz.json, which would say how the samples were made"
        assert (missed in capsys.readouterr().err) == (sampler is None)


def test_the_record_of_other_samples_is_left_out_of_the_report(tmp_path, capsys):
    np.savez(tmp_path / "samples.npz", **STATS)
    record_path = tmp_path / "samples.npz.json"
    left_out = "samples.npz.json is about other samples, and is left out of the report"
    for sha256, kept in ((hash_file(tmp_path / "samples.npz"), True), ("0" * 64, False)):
        record = {"cfg_scale": 2.0, "hash": sha256}
        record_path.write_text(json.dumps(record))
        run(f"{tmp_path}/samples.npz {tmp_path}/samples.npz")
        assert read(tmp_path / "samples.fid.json")["sampler"] == (record if kept else None)
        assert (left_out in capsys.readouterr().err) == (not kept)


def test_reports_lie_beside_what_they_are_of(tmp_path):
    for name in ("1", "1.5", "2.npz"):
        with open(tmp_path / name, "wb") as file:
            np.savez(file, **STATS)
        run(f"{tmp_path}/{name} {tmp_path}/1")
    names = {path.name for path in tmp_path.glob("*.json")}
    assert names == {"1.fid.json", "1.5.fid.json", "2.fid.json"}


def test_reference_batches_with_spatial_statistics_are_read(
    samples, weights, tmp_path, three_features, monkeypatch
):
    """As ADM's: images, mu and sigma, which come before those of the images, and mu_s and sigma_s.

    FID has no use for the latter two.
    """
    stats = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(9), "sigma_s": np.eye(9)}
    pixels = np.load(samples / "images.npz")["arr_0"]
    np.savez(tmp_path / "adm.npz", pixels, **stats)
    images = fid.ImageSet(str(tmp_path / "adm.npz"))
    assert images.count == 9
    assert images.size == (24, 20)
    assert not images.metadata
    monkeypatch.setattr(fid, "BATCH_SIZE", 4)
    batches = list(images.batches())
    assert [len(batch) for batch in batches] == [4, 4, 1]
    assert torch.equal(torch.cat(batches), torch.from_numpy(pixels).permute(0, 3, 1, 2))
    run(f"{tmp_path}/adm.npz {tmp_path}/adm.npz --weights {weights} --report {tmp_path}/x.json")
    report = read(tmp_path / "x.json")
    assert report["values"]["fid"] == pytest.approx(0)
    assert report["values"]["precision"] == 1
    assert report["reference"]["N"] == 9
    run(f"{tmp_path}/adm.npz --save_stats {tmp_path}/out.npz --weights {weights}")
    found = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(found["mu"], pixels[:, 5, 5].mean(axis=0))
    assert str(found["hash"]) == hash_file(tmp_path / "adm.npz")
    assert found["N"] == 9


def test_the_images_of_a_folder_come_in_the_order_of_their_names(samples, monkeypatch):
    folder = samples / "folder"
    images = fid.ImageSet(folder)
    assert images.count == 8
    assert images.size == (24, 20)
    monkeypatch.setattr(fid, "BATCH_SIZE", 3)
    batches = list(images.batches())
    assert [len(batch) for batch in batches] == [3, 3, 2]
    pixels = np.stack([np.array(Image.open(path)) for path in sorted(folder.iterdir())])
    assert torch.equal(torch.cat(batches), torch.from_numpy(pixels).permute(0, 3, 1, 2))


# --------------------------------------------------------------------------------------------------
# What is refused.


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
    header = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
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
    (bad_npz(mu=np.zeros(4), sigma=np.eye(4), N=np.arange(2)), "bad.npz cannot be read: "),
    (bad_npz(mu=np.zeros(4), sigma=np.array("a")), "cannot be read"),
    (bad_sigma(b"no array"), "cannot be read: the magic string is not correct"),
    (bad_sigma(b"\x93NUMPY\x01\x00\x05\x00none\n"), "cannot be read: malformed"),
    (bad_sigma(float_header((40_000, 40_000))), "cannot be read"),
    (bad_sigma(b"", method=97), "cannot be read: That compression method is not supported"),
    (bad_npz(mu=np.zeros(3), sigma=np.eye(3)), "3 and 4 dimensions are not comparable"),
    (bad_npz(other=np.zeros(3)), "neither arr_0 nor mu and sigma, but other"),
    (lambda path: path.write_text("hello"), "bad.npz cannot be read: File is not a zip file"),
    (lambda path: path.mkdir(), "no images"),
    (lambda path: None, "No such file or directory: '.*bad.npz'"),
    (float_folder, "x.tif cannot be used: its pixels are of type F"),
])  # fmt: skip
def test_what_cannot_be_measured_is_said_in_a_sentence(tmp_path, refusal, make, named):
    path = tmp_path / "bad.npz"
    make(path)
    np.savez(tmp_path / "good.npz", **STATS)
    said = refusal(f"{path} {tmp_path}/good.npz")
    assert said.count("\n") == 1
    assert re.search(named, said)


def test_images_of_several_sizes_and_damaged_archives_are_named(
    samples, weights, tmp_path, refusal
):
    (tmp_path / "mixed").mkdir()
    for side in (20, 21):
        Image.new("RGB", (side, side)).save(tmp_path / "mixed" / f"{side}.png")
    content = bytearray((samples / "images.npz").read_bytes())
    content[3000] ^= 255
    (tmp_path / "bad.npz").write_bytes(content)
    with zipfile.ZipFile(samples / "images.npz") as archive:
        whole = archive.read("arr_0.npy")
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        archive.writestr("arr_0.npy", whole[:-100])
    (tmp_path / "cut").mkdir()
    png = (samples / "folder" / "3.png").read_bytes()
    (tmp_path / "cut" / "3.png").write_bytes(png[:200])
    for name, named in (
        ("mixed", "21.png has another size than the first image of .*mixed; .* --image_size"),
        ("bad.npz", "bad.npz is damaged: Bad CRC-32"),
        ("short.npz", "short.npz is damaged"),
        ("cut", "3.png cannot be used: "),
    ):
        said = refusal(f"{tmp_path}/{name} {samples}/folder --weights {weights}")
        assert re.search(named, said.splitlines()[-1])


def test_a_damaged_image_among_others_stops_the_count(samples, weights, tmp_path, three_features):
    for i in range(8):
        content = (samples / "folder" / f"{i}.png").read_bytes()
        (tmp_path / f"{i}.png").write_bytes(content[:200] if i == 3 else content)
    for words in (f"{tmp_path} {tmp_path}", f"{tmp_path} --save_stats {tmp_path}/out.npz"):
        with pytest.raises(ValueError, match=r"3\.png cannot be used: "):
            run(words, f"--weights {weights}")
    assert not (tmp_path / "out.npz").exists()


def test_features_that_are_not_finite_and_unequal_dimensions_are_refused(
    samples, weights, tmp_path, refusal
):
    state = torch.load(weights / f"{INCEPTION}.pth")
    state["Mixed_7c.branch1x1.bn.bias"] = torch.full((320,), torch.nan)
    torch.save(state, tmp_path / f"{INCEPTION}.pth")
    np.savez(tmp_path / "four.npz", **STATS)
    for folder, named in (
        (tmp_path, "2048) with 2560 not finite"),
        (weights, "2048 and 4 dimensions"),
    ):
        assert named in refusal(f"{samples}/folder {tmp_path}/four.npz --weights {folder}")


def test_statistics_of_statistics_are_refused(tmp_path):
    np.savez(tmp_path / "four.npz", **STATS)
    with pytest.raises(ValueError, match=r"four\.npz holds statistics already"):
        run(f"{tmp_path}/four.npz --save_stats {tmp_path}/out.npz")


def test_errors_leave_with_code_2_and_without_a_traceback(samples, capsys):
    done = shell("fid.py", f"{samples}/folder {samples}/folder")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert fid.INCEPTION_URL in done.stderr
    assert "--weights" in done.stderr
    for words, named in (
        ("", "required: samples"),
        ("a", "a reference is required, or --save_stats FILE"),
        ("a b --seed 1", "unrecognized arguments: --seed"),
        ("a b --resize clean", "invalid choice: 'clean'"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(words)
        assert stop.value.code == 2
        assert named in capsys.readouterr().err


def test_the_command_has_help(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert not stop.value.code
    assert "--resize" in capsys.readouterr().out
