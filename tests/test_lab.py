"""lab.py: what is planned, run, resumed, tabulated and drawn; the closed-form optimum against a numeric one."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from reference import ENV, ROOT, TINY

import lab
import train
from fid import linear_probe
from plumbing.data import split, to_float
from plumbing.run import Processes, UserError, command_line, load_checkpoint, save_checkpoint
from plumbing.shapes import Shapes
from recipes import check_config, parse_config
from sample import load_run

CELLS = lab.Experiment({"nothing": lab.NOTHING, "all": lab.BOTH}, ("nothing", "all"), {}, (0.3, 9.0), ("tokenizer",), (8, 8))
ARGUMENTS = ["collapse", "--steps", "8", *TINY.split()]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few images, and two settings at two KL weights: four runs of a second."""
    monkeypatch.setattr(Shapes, "__len__", lambda self: 60)
    monkeypatch.setitem(lab.EXPERIMENTS, "collapse", CELLS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An experiment of one seed, run to its end."""
    out = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shapes, "__len__", lambda self: 60)
        patch.setitem(lab.EXPERIMENTS, "collapse", CELLS)
        lab.main([*ARGUMENTS, "--seeds", "1", "--out", str(out)])
    return out


def cells(out, **changes):
    """The plan of that experiment."""
    settings = dict(seeds=1, quick=False, steps=8, extra=TINY.split()) | changes
    return lab.plan("collapse", out, **settings)


def numbers(out):
    """What each run measured, but for its time."""
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("collapse/*/cell.json"))}
    return {name: {key: value for key, value in measures.items() if key != "seconds"} for name, measures in found.items()}


@pytest.mark.parametrize("name", ["collapse", "ratio", "modules", "recipes"])
def test_every_cell_of_every_experiment_is_a_valid_command_of_its_own(name, tmp_path, monkeypatch):
    monkeypatch.undo()
    about = lab.EXPERIMENTS[name]
    planned = lab.plan(name, tmp_path, 3, False, None, [])
    assert len(planned) == 3 * len(about.cells) * len(about.sigmas) == len({cell.folder for cell in planned})
    one = planned[: len(planned) // 3]
    configs = [parse_config(cell.words)[0] for cell in one]
    assert len(set(configs)) == len(configs) and {config.tokenizer_steps for config in configs} == {about.steps[0]}
    for config, cell in zip(configs, one):
        check_config(config, Processes(0, 1, torch.device("cpu")))
        if about.sigmas != (None,):  # sigma^2 = b d / 2
            assert f"sigma{(config.kl_weight * 3 * 32**2 / 2) ** 0.5:.3g}" in cell.folder.name
        for stage in cell.stages:
            parse_config([*cell.words, "--stage", stage])
    assert {cell.folder.name for cell in lab.plan(name, tmp_path, 3, True, None, [])} < {cell.folder.name for cell in one}


def test_a_run_ends_in_a_table_and_is_not_run_again(finished, monkeypatch, capsys):
    assert len(numbers(finished)) == 4 and all(len(measures) == 3 for measures in numbers(finished).values())
    text = (finished / "collapse.md").read_text()
    rows = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ")][2:]
    assert rows == [[f"| {name}", sigma] for sigma in ("0.3", "9") for name in ("nothing", "all")] + [
        [f"| {lab.LINEAR}", sigma] for sigma in ("0.3", "9")
    ]
    monkeypatch.setattr(train, "main", None)
    lab.main([*ARGUMENTS, "--seeds", "1", "--out", str(finished)])
    assert (finished / "collapse.md").read_text() == text
    capsys.readouterr()
    lab.main([*ARGUMENTS, "--seeds", "2", "--out", str(finished), "--plan"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4 of 8 to do: ")
    assert [line.rpartition(": ")[2] for line in lines[1:]] == ["done"] * 4 + ["to do"] * 4
    lab.main([*ARGUMENTS, "--only", "all", "--out", str(finished), "--plan"])
    assert capsys.readouterr().out.startswith("4 of 6 to do: ")


def test_a_killed_lab_goes_on_and_finds_the_same(finished, tmp_path):
    arguments, (first, second) = [*ARGUMENTS, "--quick", "--out", str(tmp_path)], cells(tmp_path, quick=True)
    lines = ["import lab, plumbing.shapes", "plumbing.shapes.Shapes.__len__ = lambda self: 60"]
    lines += [f"lab.EXPERIMENTS['collapse'] = lab.Experiment(*{tuple(CELLS)!r})", f"lab.main({arguments!r})"]
    argv, silent = [sys.executable, "-c", "\n".join(lines)], {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process, end = subprocess.Popen(argv, cwd=ROOT, env=ENV, **silent), time.time() + 60
    while not (second.folder / "tokenizer.pt").exists() and process.poll() is None and time.time() < end:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL and [*numbers(tmp_path)] == [first.folder.name]
    made = os.stat(first.folder / "tokenizer.pt").st_mtime_ns
    lab.main(arguments)
    assert os.stat(first.folder / "tokenizer.pt").st_mtime_ns == made and len(numbers(tmp_path)) == 2
    assert numbers(tmp_path).items() <= numbers(finished).items()


@pytest.mark.parametrize("recipe", ["kl", "ae"])
def test_measures_are_of_whole_held_out_images(recipe, tmp_path):
    train.main([*TINY.split(), *f"--recipe {recipe} --stage tokenizer --tokenizer_steps 2 --out {tmp_path}".split()])
    found, run = lab.measure(tmp_path, "cpu"), load_run(tmp_path)
    images, labels, held = lab.read_images(run.config)
    with torch.no_grad():
        posterior = run.tokenizer.encode(to_float(images))
    z, (fitted, tested) = posterior.mean.flatten(1), split(len(images), len(images))
    assert found["active_units"] == pytest.approx((z[held].var(0) > 0.01).double().mean().item())
    if recipe == "ae":  # a point: no KL, and a sample is the mean, so this is what fid.py probe finds
        assert "kl_per_token" not in found
        assert found["probe"] == linear_probe(z[fitted], labels[fitted], z[tested], labels[tested])
    else:
        assert found["kl_per_token"] == pytest.approx(posterior.kl()[held].mean().item(), rel=1e-5)
    views = load_checkpoint(tmp_path / "views.pt")
    scatter = (z[tested] - z[tested].mean(0)).T.cov(correction=0)
    assert views["components"].square().mean(0).sum() == pytest.approx(torch.linalg.eigvalsh(scatter)[-2:].sum().item(), rel=1e-4)


def recorded(folder, seed, psnr, kl):
    """A run folder with what a finished cell leaves, of known numbers."""
    folder.mkdir(parents=True)
    config = vars(parse_config([*TINY.split(), "--seed", str(seed), "--kl_weight", "0.1"])[0])
    stages = {"tokenizer": {"psnr": 1.0, "held_out_images": 6}, "decoder": {"psnr": psnr, "held_out_images": 6}}
    stages |= {"sit": {"sampler": {}, "hog_frechet_distance": 3.0}}
    (folder / "result.json").write_text(json.dumps({"objective": "mse", **stages, "config": config}))
    (folder / "cell.json").write_text(json.dumps({"kl_per_token": kl, "active_units": 0.5, "probe": 0.25, "seconds": 60}))
    lines = [{"stage": "tokenizer", "step": step, "kl_per_token": value} for step, value in ((1, 9), (2, 8), (1, 7))]
    lines += [{"stage": "tokenizer", "step": 2, "psnr": 12.5}, {"stage": "sit", "step": 1, "loss": 1}]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    save_checkpoint({}, folder / "views.pt")
    return lab.Cell("nothing", folder, [*TINY.split(), "--seed", str(seed), "--kl_weight", "0.1"], ())


def test_a_table_of_a_recorded_log_has_means_and_spreads(tmp_path):
    runs = [lab.read_cell(recorded(tmp_path / str(seed), seed, 10.0 + 2 * seed, (0.04, 0.06)[seed])) for seed in (0, 1)]
    assert runs[0]["curve"] == {
        1: {"stage": "tokenizer", "step": 1, "kl_per_token": 7},
        2: {"stage": "tokenizer", "step": 2, "kl_per_token": 8, "psnr": 12.5},
    }
    sigma = f"{round((0.1 * 3 * 16**2 / 2) ** 0.5, 2):g}"
    row = lab.table(runs).splitlines()[-1]
    spread = f"{np.sqrt(2):.2g}"  # of 10 and 12: with n - 1
    cells = ["nothing", sigma, "0.0500 ± 0.014", "0.500 ± 0.0", f"11.0 ± {spread}", "0.250 ± 0.0", "3.00 ± 0.0", "1 of 2"]
    assert row.strip("| ").split(" | ") == cells
    runs += [runs[1] | {"sigma": 99.0}, runs[0] | {"name": lab.LINEAR}]
    assert lab.table(runs).splitlines()[-1].endswith(f": nothing 99.0, {lab.LINEAR} none.")


@pytest.mark.parametrize("kl_weight", [0.02, 0.2, 0.6, 5.0])
def test_water_filling_is_the_optimum_of_a_linear_vae(kl_weight):
    """Against LBFGS on its expected loss, written with covariances: encoder (k, d), variances (k,), decoder (d, k)."""
    d, k = 6, 3
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator).double())[0]
    eigenvalues = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.2, 0.1]).double()
    covariance = basis @ torch.diag(eigenvalues) @ basis.T
    encoder, decoder = (0.3 * torch.randn(*shape, generator=generator).double() for shape in ((k, d), (d, k)))
    logvar = torch.zeros(k).double()
    for parameter in (parameters := [encoder, decoder, logvar]):
        parameter.requires_grad_()

    def terms():
        error = torch.eye(d) - decoder @ encoder
        mse, noise = (error @ covariance @ error.T).trace() / d, (decoder.square().sum(0) * logvar.exp()).sum() / d
        means = (encoder @ covariance @ encoder.T).diagonal()
        return mse, noise, 0.5 * (means + logvar.exp() - 1 - logvar).sum(), means

    optimizer = torch.optim.LBFGS(
        parameters, max_iter=3000, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        mse, noise, kl, _ = terms()
        (value := mse + noise + kl_weight * kl).backward()
        return value

    optimizer.step(loss)
    mse, _, kl, means = (x.detach() for x in terms())
    found = lab.water_filling(eigenvalues, kl_weight, 1, k)
    assert found["kl_per_token"] == pytest.approx(kl.item(), abs=1e-3)
    assert found["active_units"] == (means > 0.01).double().mean().item() == {0.02: 1, 0.2: 1, 0.6: 2 / 3, 5.0: 0}[kl_weight]
    assert found["psnr"] == pytest.approx(10 * np.log10(4 / mse.item()), abs=1e-3)


def test_the_linear_optimum_of_no_noise_is_pca(finished):
    runs = [lab.read_cell(cells(finished)[0]) | {"kl_weight": 1e-9}]
    images, _, held = lab.read_images(runs[0])
    x = np.delete(images.numpy(), held, axis=0) / 127.5 - 1
    x = np.concatenate([x, x[..., ::-1]]).reshape(2 * len(x), -1)
    lost = np.square(np.linalg.svd(x - x.mean(0), compute_uv=False)[16:]).sum() / (len(x) - 1) / x.shape[1]
    (optimum,) = lab.linear_optima(runs)
    assert optimum["psnr"] == pytest.approx(10 * np.log10(4 / lost), abs=1e-3) and optimum["active_units"] == 1


def test_drawing_needs_no_display(finished, monkeypatch):
    pytest.importorskip("matplotlib")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    lab.main([*ARGUMENTS, "--seeds", "1", "--out", str(finished), "--draw"])
    endings, text = ("", "_steps", "_images", "_latents", "_probe"), (finished / "collapse.md").read_text()
    for ending in endings:
        with Image.open(finished / f"collapse{ending}.png") as image:
            assert image.width == 900 and len(image.convert("RGB").getcolors(10**6)) > 10
        assert f"(collapse{ending}.png)" in text
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_there_is_the_table_and_a_sentence(finished, monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    lab.main([*ARGUMENTS, "--seeds", "1", "--out", str(finished), "--draw"])
    assert capsys.readouterr().err.count("pip install matplotlib") == 1
    text = (finished / "collapse.md").read_text()
    assert "| nothing | 0.3 |" in text and ".png" not in text


def run_badly(arguments, monkeypatch, capsys):
    """The one line on stderr, which is all that there is, and exit code 2."""
    monkeypatch.setattr(sys, "argv", ["lab.py", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command_line(lab.main)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("colapse", "invalid choice: 'colapse'"),
        ("collapse --seeds 0", "--seeds: is 0; it must be at least 1"),
        ("collapse --steps 0", "--steps: is 0; it must be at least 1"),
        ("collapse --sedes 2", "did you mean --seed?"),
        ("collapse --channels 0", "must be at least 1"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    assert words in run_badly([*arguments.split(), "--out", tmp_path], monkeypatch, capsys)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_other_settings_or_damaged_files_is_left_as_it_is(finished, monkeypatch, capsys):
    folder, arguments = cells(finished)[2].folder, [*ARGUMENTS, "--seeds", 1, "--out", finished]
    says = run_badly([*arguments, "--lr", "0.5"], monkeypatch, capsys)
    assert f"{cells(finished)[0].folder} was made with lr 0.002, now it is 0.5; use another --out" in says
    for name, text in (("log.jsonl", '{"stage": "tokenizer", "st\n'), ("cell.json", "{"), ("result.json", "[]"), ("views.pt", "")):
        whole = (folder / name).read_bytes()
        (folder / name).write_text(text)
        says = run_badly(arguments, monkeypatch, capsys)
        assert str(folder / name) in says and (name != "log.jsonl" or "is damaged at line 1; move" in says)
        assert (folder / name).read_text() == text
        (folder / name).write_bytes(whole)
    assert lab.read_cell(cells(finished)[2])


def test_an_unfinished_run_of_other_settings_is_named(finished, tmp_path, monkeypatch, capsys):
    cell = cells(tmp_path, steps=8)[0]
    cell.folder.mkdir(parents=True)
    (cell.folder / "tokenizer.pt").write_bytes((cells(finished)[1].folder / "tokenizer.pt").read_bytes())
    monkeypatch.setattr(sys, "argv", ["lab.py", *ARGUMENTS, "--seeds", "1", "--out", str(tmp_path)])
    with pytest.raises(UserError, match=r"tokenizer.pt was made with local_weight 0.1, this run has 0.0; use"):
        lab.main(sys.argv[1:])


def test_there_is_nothing_to_draw_before_a_run(tmp_path):
    with pytest.raises(UserError, match="has no finished run"):
        lab.main([*ARGUMENTS, "--out", str(tmp_path), "--draw"])
