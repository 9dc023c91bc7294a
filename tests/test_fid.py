"""fid.py: metrics against closed forms and public implementations, Inception, the command line."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from reference import ARRAYS, ENV, FID_ARRAYS, ROOT, array, command, low_rank_features, make_folder, official_folder

import data
import fid
import sample
from data import OFFICIAL, ImageFolder, UserError, save_checkpoint, to_float
from losses import load_lpips


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Eigenvalues on several threads take 20 times as long when other programs use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(name):
    return array(f"psnr_ssim/{name}").permute(0, 3, 1, 2)


def test_psnr_and_ssim_equal_scikit_image():
    torch.testing.assert_close(fid.psnr(images("a"), images("b")), array("psnr_ssim/psnr_u8"), atol=1e-6, rtol=0)
    torch.testing.assert_close(fid.ssim(images("a"), images("b")), array("psnr_ssim/ssim_gauss_u8"), atol=1e-6, rtol=0)


def test_psnr_of_a_known_error_and_of_equal_images():
    a = torch.full((1, 3, 12, 12), 100, dtype=torch.uint8)
    assert fid.psnr(a, a + 10).item() == pytest.approx(10 * np.log10(255**2 / 100))
    assert fid.psnr(a, a).item() == np.inf and fid.ssim(a, a).item() == pytest.approx(1)


@pytest.mark.parametrize("a, b", [((1, 3, 12, 12), (1, 3, 12, 13)), ((3, 12, 12), (3, 12, 12))])
def test_unequal_shapes_are_refused(a, b):
    with pytest.raises(ValueError, match="same shape"):
        fid.psnr(torch.zeros(a), torch.zeros(b))


def test_ssim_refuses_tiny_images():
    with pytest.raises(ValueError, match="11 x 11"):
        fid.ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


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


@pytest.mark.parametrize("count", [15, 60])  # halves of fewer and of more rows than dimensions
def test_spread_equals_that_of_halves_measured_one_by_one(count):
    rng = np.random.default_rng(0)
    features, reference = torch.from_numpy(rng.standard_normal((count, 12))).float(), rng.standard_normal((30, 12))
    mean, cov = fid.statistics(0.7 * reference @ rng.standard_normal((12, 12)) + 3)
    draws = np.random.default_rng(5)
    halves = [features[draws.permutation(count)[: count // 2]] for _ in range(10)]
    distances = [fid.frechet_distance(*fid.statistics(half), mean, cov) for half in halves]
    assert fid.frechet_spread(features, mean, cov, seed=5) == pytest.approx(np.std(distances, ddof=1), rel=1e-6)
    assert fid.frechet_spread(features[:3], mean, cov) is None


def test_spread_is_that_of_independent_samples():
    rng = np.random.default_rng(0)
    for count in (500, 20):
        samples = torch.from_numpy(rng.standard_normal((100, count, 16)) * np.linspace(0.2, 2, 16) + 0.5)
        distances = [fid.frechet_distance(*fid.statistics(x), np.zeros(16), np.eye(16)) for x in samples]
        spread = np.mean([fid.frechet_spread(x, np.zeros(16), np.eye(16)) for x in samples[:30]])
        assert spread == pytest.approx(np.std(distances), rel=0.3)


def test_bad_features_are_named():
    with pytest.raises(ValueError, match="not finite"):
        fid.statistics(np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="at least 2"):
        fid.statistics(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="4 and of 3"):
        fid.frechet_distance(np.zeros(4), np.eye(4), np.zeros(3), np.eye(3))


# ---------------------------------------------------------------------------------------------------------------------
# Inception


INCEPTION = "pt_inception-2015-12-05-6726825d"


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A folder with files of the official formats with generated contents."""
    return official_folder(tmp_path_factory.mktemp("weights"), INCEPTION, "vgg16-397923af", "lpips_v0.1_vgg")


@pytest.fixture(scope="session")
def inception(weights):
    return fid.load_inception(str(weights), torch.device("cpu"))


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
    x = fid.inception_input(inception_case(i), "pytorch-fid")
    pixels = ((x + 1) / 2)[:, :, 100:108, 200:208]
    torch.testing.assert_close(pixels, expected(f"pytorchfid_resized_{i}"), atol=5e-6, rtol=0)
    features = fid.inception_features(inception, inception_case(i), "pytorch-fid")
    torch.testing.assert_close(features, expected(f"pytorchfid_pool3_{i}"), atol=3e-5, rtol=0)


def test_inception_refuses_floats_and_unknown_conventions():
    with pytest.raises(ValueError, match=r"uint8 images .* not torch.float32"):
        fid.inception_input(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="'clean'; it must be tf1 or pytorch-fid"):
        fid.inception_input(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "clean")


def test_inception_files_are_accepted_without_counters_and_else_strictly(tmp_path, weights, inception):
    state = torch.load(weights / f"{INCEPTION}.pth")
    assert len(state) == 566
    short = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(short) == 472
    path = tmp_path / f"{INCEPTION}.pth"
    torch.save(short, path)
    loaded = fid.load_inception(str(tmp_path), torch.device("cpu")).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in inception.state_dict().items())
    for change, named in (
        ({"fc.bias": torch.zeros(1000)}, r"fc.bias is \(1000,\), expected \(1008,\)"),
        ({"extra": torch.zeros(1)}, r"extra is \(1,\), expected absent"),
        ({"Mixed_5b.branch1x1.bn.weight": None}, r"Mixed_5b.branch1x1.bn.weight is absent, expected \(64,\)"),
    ):
        torch.save({key: value for key, value in (short | change).items() if value is not None}, path)
        with pytest.raises(UserError, match=named):
            fid.load_inception(str(tmp_path), torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# Metrics of features


def test_inception_score_equals_torch_fidelity_and_adm():
    def value(name):
        return FID_ARRAYS[f"metrics_is/{name}"]

    logits = torch.from_numpy(value("logits"))
    probabilities, count = logits.double().softmax(dim=1), len(logits)
    for parts, name in (
        (fid.fidelity_splits(count), "torchfidelity_splits10_shuffle"),
        (fid.fidelity_splits(count, seed=None), "torchfidelity_splits10_noshuffle"),
        (fid.fidelity_splits(count, 1), "torchfidelity_splits1"),
    ):
        assert fid.inception_score(probabilities, parts) == pytest.approx(tuple(value(name)), rel=1e-9, abs=1e-12)
    rounded = logits.softmax(dim=1).double()  # what ADM gets from its graph is float32
    assert fid.inception_score(rounded, fid.adm_blocks(count))[0] == pytest.approx(
        float(value("adm_split5000_float64")), rel=1e-9
    )
    for block in (5000, 1000):
        score, _ = fid.inception_score(probabilities, fid.adm_blocks(count, block))
        assert score == pytest.approx(float(value(f"adm_split{block}")), rel=2e-6)


def test_inception_score_closed_forms():
    one_hot = torch.eye(7, dtype=torch.float64).repeat(10, 1)
    assert fid.inception_score(one_hot, fid.adm_blocks(70)) == pytest.approx((7, 0))
    assert fid.inception_score(torch.full((70, 7), 1 / 7), fid.adm_blocks(70)) == pytest.approx((1, 0))
    assert [len(part) for part in fid.adm_blocks(12)] == [12] and [len(p) for p in fid.adm_blocks(12, 5)] == [5, 5, 2]
    with pytest.raises(ValueError, match="70 images are too few"):
        fid.inception_score(one_hot, fid.fidelity_splits(70, 100))


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


def test_statistics_do_not_depend_on_the_block():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    mean, cov = fid.statistics(features, block=7)
    np.testing.assert_allclose(mean, features.double().numpy().mean(axis=0), atol=1e-14)
    np.testing.assert_allclose(cov, np.cov(features.double().numpy(), rowvar=False), atol=1e-14)


def test_linear_probe_separates_what_is_linear_and_only_that():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    noise = torch.randn(300, 8, generator=generator)
    x = noise + 8 * torch.eye(8)[labels]
    assert fid.linear_probe(x[:200], labels[:200], x[200:], labels[200:], 3) == 1
    assert fid.linear_probe(noise[:200], labels[:200], noise[200:], labels[200:], 3) < 0.6


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    """8 PNGs of one size, and an .npz of 9 other images; sampler settings beside it."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    (root / "folder").mkdir()
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(root / "folder" / f"{i}.png")
    np.savez(root / "images.npz", rng.integers(0, 200, (9, 24, 20, 3), dtype=np.uint8), np.arange(9))
    (root / "images.json").write_text('{"guidance": 2.0}')
    return root


def read(path):
    return json.loads(path.read_text())


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
    assert set(a["values"]) == {"fid", "inception_score"} and set(c["values"]) == {"fid"}
    assert abs(b["values"]["fid"]["value"]) < 1e-6 and abs(c["values"]["fid"]["value"]) < 1e-6
    assert a["reference"]["hash"] == b["reference"]["hash"] == b["samples"]["hash"]
    assert "9 images are too few for a full-rank covariance of 2048 dimensions" in capsys.readouterr().err
    run(f"compare {tmp_path}/a.json {tmp_path}/a.json")
    assert "comparable: same protocol" in capsys.readouterr().out
    run(f"compare {tmp_path}/a.json {tmp_path}/b.json")
    assert f"{tmp_path}/b.json is not comparable with {tmp_path}/a.json: N is 9 and 8" in capsys.readouterr().out
    with pytest.raises(UserError, match="made with resize tf1, not pytorch-fid"):
        run(f"gfid {samples}/images.npz {tmp_path}/stats.npz --resize pytorch-fid", flags)


def test_any_number_of_cards_makes_one_table(tmp_path, capsys):
    for guidance in (1, 1.5, 2):
        card = {"command": "gfid", "N": 5, "reference": {"hash": "x"}, "protocol": {"k": 3}}
        card["values"] = {"fid": {"value": 10 * guidance, "spread": 0.25}, "psnr": {"value": None, "spread": None}}
        card["sampler"] = {"guidance": guidance, "steps": 250}
        if guidance == 2:
            card |= {"N": 6, "values": {}}
        (tmp_path / f"{guidance}.gfid.json").write_text(json.dumps(card))
    cards = [f"{tmp_path}/{guidance}.gfid.json" for guidance in (1, 1.5, 2)]
    run("compare", *cards[:2])
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [[cell.strip() for cell in line if cell.strip()] for line in lines] == [
        ["1.gfid", "1.5.gfid"],
        ["guidance", "1", "1.5"],
        ["fid", "10.0000 +- 0.2500", "15.0000 +- 0.2500"],
        ["psnr", "infinite", "infinite"],
        ["comparable: same protocol, count and reference"],
    ]
    run("compare", *cards)
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["guidance", "1", "1.5", "2"] and said[2].split()[-1] == "-"
    assert said[-1] == f"{cards[2]} is not comparable with {cards[0]}: N is 5 and 6"


def test_cards_lie_beside_what_they_are_of(tmp_path):
    for name in ("1", "1.5", "2.npz"):
        with open(tmp_path / name, "wb") as file:
            np.savez(file, **MOMENTS)
        run(f"gfid {tmp_path}/{name} {tmp_path}/1")
    assert {path.name for path in tmp_path.glob("*.json")} == {"1.gfid.json", "1.5.gfid.json", "2.gfid.json"}


def test_reference_batches_with_spatial_statistics_are_read(samples, weights, tmp_path):
    """As ADM's: images, mu, sigma, and mu_s, sigma_s, which FID has no use for."""
    moments = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(9), "sigma_s": np.eye(9)}
    np.savez(tmp_path / "adm.npz", np.load(samples / "images.npz")["arr_0"], **moments)
    images = fid.open_images(str(tmp_path / "adm.npz"))
    assert images.shape == (9, 24, 20) and set(images.stored) == {"mu", "sigma"}


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Gives a function: words of a command that must fail as the shell shows it -> what it wrote on stderr."""

    def call(words):
        monkeypatch.setattr(sys, "argv", ["fid.py", *words.split()])
        with pytest.raises(SystemExit) as stop:
            data.command_line(fid.main)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.splitlines()[-1].startswith("error: ")
        return said

    return call


def bad_npz(**arrays):
    return lambda path: np.savez(path, **arrays)


def mixed_folder(path):
    path.mkdir()
    for side in (20, 21):
        Image.new("RGB", (side, side)).save(path / f"{side}.png")


def float_folder(path):
    path.mkdir()
    Image.fromarray(np.zeros((20, 20), np.float32)).save(path / "x.tif")


MOMENTS = {"mu": np.zeros(4), "sigma": np.eye(4)}


@pytest.mark.parametrize("make, named", [
    (bad_npz(arr_0=np.zeros((9, 8, 8, 3), np.float32)), "arr_0 is float32 .* must be uint8"),
    (bad_npz(arr_0=np.zeros((9, 8, 8), np.uint8)), r"must be uint8 \(N, H, W, 3\)"),
    (bad_npz(arr_0=np.zeros((0, 8, 8, 3), np.uint8)), "must be uint8"),
    (bad_npz(arr_0=np.array([{}])), "pickled objects, which are never loaded"),
    (bad_npz(mu=np.array([{}]), sigma=np.eye(4)), "pickled objects, which are never loaded"),
    (bad_npz(mu=np.zeros(4), sigma=np.eye(5)), r"mu is \(4,\) and sigma \(5, 5\)"),
    (bad_npz(mu=np.full(4, np.nan), sigma=np.eye(4)), "finite"),
    (bad_npz(mu=np.zeros(4), sigma=np.full((4, 4), np.nan)), "finite"),
    (bad_npz(mu=np.zeros(0), sigma=np.zeros((0, 0))), r"mu is \(0,\)"),
    (bad_npz(mu=np.zeros(4), sigma=np.triu(np.ones((4, 4)))), "not symmetric"),
    (bad_npz(mu=np.zeros(4), sigma=np.eye(4), N=np.arange(2)), "N a whole number"),
    (bad_npz(mu=np.zeros(3), sigma=np.eye(3)), "3 and of 4 dimensions cannot be compared"),
    (bad_npz(other=np.zeros(3)), "neither arr_0 nor mu and sigma, but other"),
    (lambda path: path.write_text("hello"), "not a sound .npz"),
    (lambda path: path.mkdir(), "no images"),
    (lambda path: None, "does not exist"),
    (mixed_folder, "20.png has 20 x 20 px and .*21 x 21 px"),
    (float_folder, "type F; metrics are defined on 8-bit"),
])  # fmt: skip
def test_what_cannot_be_measured_is_said_in_a_sentence(tmp_path, refusal, make, named):
    path = tmp_path / "bad.npz"
    make(path)
    np.savez(tmp_path / "good.npz", **MOMENTS)
    said = refusal(f"gfid {path} {tmp_path}/good.npz")
    assert said.count("\n") == 1 and re.search(named, said)


def test_features_that_are_not_finite_and_unequal_dimensions_are_refused(samples, weights, tmp_path, refusal):
    state = torch.load(weights / f"{INCEPTION}.pth")
    state["Mixed_7c.branch1x1.bn.bias"] = torch.full((320,), torch.nan)
    torch.save(state, tmp_path / f"{INCEPTION}.pth")
    np.savez(tmp_path / "four.npz", **MOMENTS)
    said = refusal(f"gfid {samples}/folder {tmp_path}/four.npz --weights {tmp_path}")
    assert "feature values are not finite" in said
    said = refusal(f"gfid {samples}/folder {tmp_path}/four.npz --weights {weights}")
    assert "2048 and of 4 dimensions" in said


def test_errors_leave_with_code_2_and_without_a_traceback(samples, tmp_path):
    argv = command("fid.py", f"gfid {samples}/folder {samples}/folder")
    done = subprocess.run(argv, capture_output=True, text=True, env=ENV)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert OFFICIAL["inception"].url in done.stderr and "--weights" in done.stderr
    for words, named in (("gfod a b", "invalid choice"), ("gfid a b --weight x", "did you mean --weights")):
        with pytest.raises(UserError, match=named):
            run(words)
    with pytest.raises(UserError, match="--seed is -1"):
        run("rfid a --seed -1")
    for text in ("[]", '{"command": "gfid", "N": 3, "values": {"fid": 3}, "reference": {}, "protocol": {}}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError, match="not a result card"):
            run(f"compare {tmp_path}/x.json {tmp_path}/x.json")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run with an untrained tokenizer of 16-px images, and a folder of 24 images in 2 classes."""
    root = tmp_path_factory.mktemp("run")
    config = {
        "image_size": 16,
        "patch_size": 4,
        "tokens": 4,
        "channels": 4,
        "size": "toy",
        "data": "",
        "eval_images": 4,
    }
    torch.manual_seed(0)
    state = sample.build_tokenizer(config).state_dict()
    save_checkpoint({"config": config, "classes": ["class0", "class1"], "ema": state}, root / "tokenizer.pt")
    make_folder(root / "images", 2, 12)
    return root


QUICK = """
import fid
features = fid.inception_features
fid.BATCH, fid.inception_features = 4, lambda *inputs: features(*inputs)[:, :64]
fid.InceptionV3.logits = lambda model, pool3: pool3
fid.command_line(lambda commands: [fid.main(words.split()) for words in commands])
"""


def measure_everything(samples, run_folder, weights, out):
    """The words of each command that has a figure, and its card or statistics in `out`."""
    flags = f"--weights {weights} --card {out}"
    return (
        f"gfid {samples}/images.npz {samples}/folder {flags}/gfid.json",
        f"rfid {run_folder} --data {run_folder}/images {flags}/rfid.json",
        f"probe {run_folder} --data {run_folder}/images --card {out}/probe.json",
        f"stats {samples}/images.npz {out}/stats.npz --weights {weights}",
    )


def test_no_figure_depends_on_the_process_count(samples, tiny_run, weights, tmp_path):
    """Batches of 4, so that both processes have several, and the last one is not full; 64 features, to be quick."""
    script = tmp_path / "quick.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + QUICK)
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        words = measure_everything(samples, tiny_run, weights, out)
        done = subprocess.run([*command(script, processes=processes), *words], capture_output=True, text=True, env=ENV)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "warning" in done.stderr and "too few for a full-rank covariance" in done.stderr
    for name in ("gfid", "rfid", "probe"):
        a, b = (read(tmp_path / processes / f"{name}.json") for processes in "12")
        assert a.pop("seconds") >= 0 and b.pop("seconds") >= 0
        for key, number in a.pop("values").items():
            assert b["values"][key] == pytest.approx(number, rel=1e-9), (name, key)
        del b["values"]
        assert a == b
    a, b = (np.load(tmp_path / processes / "stats.npz") for processes in "12")
    np.testing.assert_allclose(a["mu"], b["mu"], rtol=1e-9)
    np.testing.assert_allclose(a["sigma"], b["sigma"], rtol=1e-9, atol=1e-9 * a["sigma"].max())
    assert a["hash"] == b["hash"]
    card = read(tmp_path / "1" / "gfid.json")
    assert card["values"]["fid"]["spread"] > 0
    assert set(card["values"]) == {"fid", "inception_score", "precision", "recall"} and card["N"] == 9
    assert card["reference"]["N"] == 8 and card["sampler"] == {"guidance": 2.0} and card["protocol"]["resize"] == "tf1"
    values = read(tmp_path / "1" / "rfid.json")["values"]
    assert set(values) == {f"{x}_{y}" for x in ("rfid", "psnr", "ssim", "lpips") for y in ("mean", "sampled")}
    assert values["rfid_mean"] != values["rfid_sampled"]


def test_rfid_of_held_out_images(tiny_run, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "inception_features", lambda model, images, resize: images[:, :, 5, 5].float())
    for flags, count in (("", 24), ("--held_out", 2)):
        run(f"rfid {tiny_run} --data {tiny_run}/images --weights {weights} --card {tmp_path}/x.json {flags}")
        card = read(tmp_path / "x.json")
        assert card["N"] == card["reference"]["N"] == count
        assert (card["values"]["rfid_mean"]["spread"] is None) == (count == 2)
    loaded = sample.load_run(tiny_run, torch.device("cpu"))
    items = fid.split(24, 4)[1].tolist()
    crops = torch.stack([ImageFolder(tiny_run / "images", 16)[i][0] for i in items])
    copies = sample.reconstruct(loaded.tokenizer, crops)
    distances = load_lpips(str(weights))(to_float(copies), to_float(crops))
    assert card["values"]["lpips_mean"]["value"] == pytest.approx(distances.mean().item(), rel=1e-5)
    alone = official_folder(tmp_path / "alone", INCEPTION)
    run(f"rfid {tiny_run} --data {tiny_run}/images --weights {alone} --card {tmp_path}/x.json --held_out")
    assert "lpips_mean" not in read(tmp_path / "x.json")["values"]


def test_probe_holds_out_a_tenth_and_needs_classes(tiny_run, tmp_path):
    run(f"probe {tiny_run} --data {tiny_run}/images --card {tmp_path}/a.json")
    card = read(tmp_path / "a.json")
    assert card["N"] == 2 and card["protocol"]["train"] == 22
    with pytest.raises(UserError, match="12 images in 0 classes"):
        run(f"probe {tiny_run} --data {tiny_run}/images/class0")


def test_a_damaged_archive_is_named(samples, weights, tmp_path, refusal):
    content = bytearray((samples / "images.npz").read_bytes())
    content[3000] ^= 255
    (tmp_path / "bad.npz").write_bytes(content)
    said = refusal(f"gfid {tmp_path}/bad.npz {samples}/folder --weights {weights}")
    assert "bad.npz is damaged: Bad CRC-32" in said


def test_a_damaged_image_stops_the_count(tiny_run, weights, tmp_path):
    folder = make_folder(tmp_path / "images", 2, 12)
    (folder / "class0" / "3.png").write_bytes((folder / "class0" / "3.png").read_bytes()[:200])
    with pytest.raises(OSError, match=r"3.png"):
        run(f"probe {tiny_run} --data {folder}")
    with pytest.raises(UserError, match=r"3.png"):
        run(f"gfid {folder} {folder} --weights {weights}")
