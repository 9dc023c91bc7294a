"""lab.py: what is planned, run, resumed, tabulated and drawn, and the optimum in closed form."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from reference import ENV, ROOT, TINY

import lab
import train
from evaluate import linear_probe
from options import check_config, parse_config
from sample import load_run
from utils.console import UserError, run_main
from utils.distributed import Distributed
from utils.files import load_torch, save_torch
from utils.images import to_float
from utils.shapes import Shapes

CPU = torch.device("cpu")
SMALL_EXPERIMENT = lab.Experiment(
    {"nothing": lab.NOTHING, "all": lab.LOCAL_GLOBAL},
    quick_settings=("nothing", "all"),
    common={},
    sigmas=(0.3, 9.0),
    stages=("tokenizer",),
    steps=8,
    quick_steps=8,
)
ARGUMENTS = ["collapse", "--steps", "8", *TINY.split()]


def make_small(patch):
    """Few images, and two settings at two KL weights: four runs of a second."""
    patch.setattr(Shapes, "__len__", lambda self: 60)
    patch.setitem(lab.EXPERIMENTS, "collapse", SMALL_EXPERIMENT)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An experiment of one seed, run to its end."""
    out = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        lab.main([*ARGUMENTS, "--seeds", "1", "--out", str(out)])
    return out


def plan_cells(out, quick=False):
    """The plan of that experiment."""
    return lab.plan("collapse", out, seeds=1, quick=quick, steps=8, extra=TINY.split())


def read_measures(out):
    """What each run measured, but for its time."""
    found = {}
    for path in sorted(out.glob("collapse/*/cell.json")):
        measures = json.loads(path.read_text())
        del measures["seconds"]
        found[path.parent.name] = measures
    return found


# --------------------------------------------------------------------------------------------------
# Running and measuring.


@pytest.mark.parametrize("name", ["collapse", "ratio", "modules", "recipes", "tokens"])
def test_every_cell_of_every_experiment_is_a_valid_command_of_its_own(name, tmp_path, monkeypatch):
    monkeypatch.undo()
    about = lab.EXPERIMENTS[name]
    cells = lab.plan(name, tmp_path, 3, False, None, [])
    assert len(cells) == 3 * len(about.settings) * len(about.sigmas)
    assert len({cell.folder for cell in cells}) == len(cells)
    of_one_seed = cells[: len(cells) // 3]
    configs = [parse_config(cell.argv)[0] for cell in of_one_seed]
    assert len(set(configs)) == len(configs)
    assert {config.tokenizer_steps for config in configs} == {about.steps}
    for config, cell in zip(configs, of_one_seed):
        check_config(config, Distributed(0, 1, CPU))
        if about.sigmas != (None,):  # sigma^2 = b d / 2
            sigma = (config.kl_weight * 3 * 32**2 / 2) ** 0.5
            assert f"sigma{sigma:.3g}" in cell.folder.name
        for stage in cell.stages:
            parse_config([*cell.argv, "--stage", stage])
    quick = lab.plan(name, tmp_path, 1, True, None, [])
    assert {cell.folder.name for cell in quick} < {cell.folder.name for cell in of_one_seed}
    assert {parse_config(cell.argv)[0].tokenizer_steps for cell in quick} == {about.quick_steps}


def test_a_run_ends_in_a_table_and_is_not_run_again(finished, monkeypatch, capsys):
    measures = read_measures(finished)
    assert len(measures) == 4
    names = {"kl_per_token", "active_units", "probe", "noisy_probe", "hidden_probe"}
    assert all(values.keys() == names for values in measures.values())
    text = (finished / "collapse.md").read_text()
    rows = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ")][2:]
    trained = [[f"| {name}", sigma] for sigma in ("0.3", "9") for name in ("nothing", "all")]
    assert rows == trained + [[f"| {lab.LINEAR}", sigma] for sigma in ("0.3", "9")]
    monkeypatch.setattr(train, "main", None)
    lab.main([*ARGUMENTS, "--seeds", "1", "--out", str(finished)])
    assert (finished / "collapse.md").read_text() == text
    capsys.readouterr()
    lab.main([*ARGUMENTS, "--seeds", "2", "--out", str(finished), "--plan"])
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("4 of 8 to do: ")
    assert [line.rpartition(": ")[2] for line in others] == ["done"] * 4 + ["to do"] * 4
    lab.main([*ARGUMENTS, "--only", "all", "--out", str(finished), "--plan"])
    assert capsys.readouterr().out.startswith("4 of 6 to do: ")


def test_a_killed_lab_goes_on_and_finds_the_same(finished, tmp_path):
    arguments = [*ARGUMENTS, "--quick", "--only", "nothing", "--out", str(tmp_path)]
    cells = plan_cells(tmp_path, quick=True)
    first, second = [cell for cell in cells if cell.name == "nothing"]
    script = f"""
import lab, utils.shapes
utils.shapes.Shapes.__len__ = lambda self: 60
lab.EXPERIMENTS["collapse"] = lab.Experiment(*{tuple(SMALL_EXPERIMENT)!r})
lab.main({arguments!r})
"""
    argv = [sys.executable, "-c", script]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(argv, cwd=ROOT, env=ENV, **silent)
    deadline = time.time() + 60
    while not (second.folder / "tokenizer.pt").exists():
        if process.poll() is not None or time.time() > deadline:
            break
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert list(read_measures(tmp_path)) == [first.folder.name]
    made = os.stat(first.folder / "tokenizer.pt").st_mtime_ns
    lab.main(arguments)
    assert os.stat(first.folder / "tokenizer.pt").st_mtime_ns == made
    measures = read_measures(tmp_path)
    assert len(measures) == 2
    assert measures.items() <= read_measures(finished).items()


@pytest.mark.parametrize("recipe", ["kl", "ae"])
def test_measures_are_of_whole_held_out_images(recipe, tmp_path):
    flags = f"--recipe {recipe} --stage tokenizer --tokenizer_steps 2 --out {tmp_path}"
    train.main([*TINY.split(), *flags.split()])
    measures = lab.measure(tmp_path, CPU)
    run = load_run(tmp_path)
    images, labels, held_out = lab.read_images(run.config)
    with torch.no_grad():
        posterior = run.tokenizer.encode(to_float(images))
    mean = posterior.mean.flatten(1)
    others = np.delete(np.arange(len(images)), held_out)
    active_units = (mean[held_out].var(0) > 0.01).double().mean().item()
    assert measures["active_units"] == pytest.approx(active_units)
    if recipe == "ae":
        # A deterministic bottleneck has no KL, and a sample is the mean, so that the probe is what
        # `evaluate.py probe` finds.
        assert "kl_per_token" not in measures
        train_set = mean[others], labels[others]
        assert measures["probe"] == linear_probe(*train_set, mean[held_out], labels[held_out])
    else:
        kl = posterior.kl()[held_out].mean().item()
        assert measures["kl_per_token"] == pytest.approx(kl, rel=1e-5)
    plot_data = load_torch(tmp_path / "plots.pt")
    covariance = mean[held_out].T.cov(correction=0)
    largest_two = torch.linalg.eigvalsh(covariance)[-2:].sum().item()
    scatter = plot_data["components"].square().mean(0).sum()
    assert scatter == pytest.approx(largest_two, rel=1e-4)


# --------------------------------------------------------------------------------------------------
# The table.


def record_cell(folder, seed, psnr, kl):
    """A run's folder with what a finished cell leaves, of known numbers."""
    folder.mkdir(parents=True)
    argv = [*TINY.split(), "--seed", str(seed), "--kl_weight", "0.1"]
    config, _ = parse_config(argv)
    result = {
        "objective": "mse",
        "config": asdict(config),
        "weights": {},
        "tokenizer": {"psnr": 1.0, "evaluated_images": 6},
        "decoder": {"psnr": psnr, "evaluated_images": 6},
        "generator": {"sampler": {}, "hog_frechet_distance": 3.0},
    }
    (folder / "result.json").write_text(json.dumps(result))
    measures = {"kl_per_token": kl, "active_units": 0.5, "probe": 0.25, "seconds": 60}
    (folder / "cell.json").write_text(json.dumps(measures))
    lines = [
        {"stage": "tokenizer", "step": 1, "kl_per_token": 9},
        {"stage": "tokenizer", "step": 2, "kl_per_token": 8},
        {"stage": "tokenizer", "step": 1, "kl_per_token": 7},
        {"stage": "tokenizer", "step": 2, "psnr": 12.5},
        {"stage": "generator", "step": 1, "loss": 1},
    ]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    save_torch({}, folder / "plots.pt")
    return lab.Cell("nothing", folder, argv, ())


def test_a_table_of_a_recorded_log_has_means_and_spreads(tmp_path):
    runs = [
        lab.read_cell(record_cell(tmp_path / "0", seed=0, psnr=10.0, kl=0.04)),
        lab.read_cell(record_cell(tmp_path / "1", seed=1, psnr=12.0, kl=0.06)),
    ]
    assert runs[0]["curve"] == {
        1: {"stage": "tokenizer", "step": 1, "kl_per_token": 7},
        2: {"stage": "tokenizer", "step": 2, "kl_per_token": 8, "psnr": 12.5},
    }
    sigma = round((0.1 * 3 * 16**2 / 2) ** 0.5, 2)
    row = lab.table(runs).splitlines()[-1]
    assert row.strip("| ").split(" | ") == [
        "nothing",
        f"{sigma:g}",
        "0.0500 ± 0.014",
        "0.500 ± 0.0",
        f"11.0 ± {np.sqrt(2):.2g}",  # of 10 and 12, with the divisor n - 1
        "0.250 ± 0.0",
        "3.00 ± 0.0",
        "1 of 2",
    ]
    runs += [runs[1] | {"sigma": 99.0}, runs[0] | {"name": lab.LINEAR}]
    last_line = lab.table(runs).splitlines()[-1]
    assert last_line.endswith(f": nothing 99.0, {lab.LINEAR} none.")


def test_measures_of_a_judge_and_of_a_generator_are_columns_of_their_own(tmp_path):
    cells = [record_cell(tmp_path / str(seed), seed, psnr=10.0, kl=1.0) for seed in (0, 1)]
    more = {"flow_loss": 1.25, "noisy_probe": 0.5, "hidden_probe": 0.25, "judge_samples": 8.0}
    more |= {"judge_reconstructions": 4.0, "judge_found": 0.75}
    path = cells[1].folder / "cell.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    header, _, row = lab.table([lab.read_cell(cell) for cell in cells]).splitlines()
    columns = dict(zip(header.split(" | "), row.split(" | ")))
    assert {name: columns[lab.MEASURES[name]] for name in more} == {
        "flow_loss": "1.25",
        "noisy_probe": "0.500",
        "hidden_probe": "0.250",
        "judge_samples": "8.00",
        "judge_reconstructions": "4.00",
        "judge_found": "0.750",
    }
    assert columns[lab.MEASURES["psnr"]] == "10.0 ± 0.0"
    assert lab.read_cell(cells[0])["generator_curve"] == {
        1: {"stage": "generator", "step": 1, "loss": 1}
    }


# --------------------------------------------------------------------------------------------------
# The optimum of a linear code.


@pytest.mark.parametrize("kl_weight, active_units", [(0.02, 1), (0.2, 1), (0.6, 2 / 3), (5.0, 0)])
def test_water_filling_is_the_optimum_of_a_linear_vae(kl_weight, active_units):
    """Against LBFGS on its expected loss, written with covariances.

    The encoder is (k, d), the variances are (k,), and the decoder is (d, k).
    """
    d, k = 6, 3
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator).double())[0]
    eigenvalues = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.2, 0.1]).double()
    covariance = basis @ torch.diag(eigenvalues) @ basis.T
    encoder = 0.3 * torch.randn(k, d, generator=generator).double()
    decoder = 0.3 * torch.randn(d, k, generator=generator).double()
    logvar = torch.zeros(k).double()
    parameters = [encoder, decoder, logvar]
    for parameter in parameters:
        parameter.requires_grad_()

    def terms():
        error = torch.eye(d) - decoder @ encoder
        mse = (error @ covariance @ error.T).trace() / d
        noise = (decoder.square().sum(0) * logvar.exp()).sum() / d
        means = (encoder @ covariance @ encoder.T).diagonal()
        kl = 0.5 * (means + logvar.exp() - 1 - logvar).sum()
        return mse, noise, kl, means

    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=3000,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def loss():
        optimizer.zero_grad()
        mse, noise, kl, _ = terms()
        value = mse + noise + kl_weight * kl
        value.backward()
        return value

    optimizer.step(loss)
    mse, _, kl, means = (term.detach() for term in terms())
    best = lab.water_filling(eigenvalues, kl_weight, 1, k)
    assert best["kl_per_token"] == pytest.approx(kl.item(), abs=1e-3)
    assert best["active_units"] == (means > 0.01).double().mean().item() == active_units
    assert best["psnr"] == pytest.approx(10 * np.log10(4 / mse.item()), abs=1e-3)


def test_the_linear_optimum_of_no_noise_is_pca(finished):
    cell = plan_cells(finished)[0]
    runs = [lab.read_cell(cell) | {"kl_weight": 1e-9}]
    images, _, held_out = lab.read_images(parse_config(cell.argv)[0])
    x = np.delete(images.numpy(), held_out, axis=0) / 127.5 - 1
    x = np.concatenate([x, x[..., ::-1]]).reshape(2 * len(x), -1)
    singular_values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    lost = np.square(singular_values[16:]).sum() / (len(x) - 1) / x.shape[1]
    del runs[0]["sample_every"]  # as in a run that was made before this option existed
    (optimum,) = lab.linear_optima(runs)
    assert optimum["psnr"] == pytest.approx(10 * np.log10(4 / lost), abs=1e-3)
    assert optimum["active_units"] == 1


# --------------------------------------------------------------------------------------------------
# Pictures.


def test_drawing_needs_no_display(finished, monkeypatch):
    pytest.importorskip("matplotlib")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    lab.main([*ARGUMENTS, "--seeds", "1", "--out", str(finished), "--draw"])
    text = (finished / "collapse.md").read_text()
    for ending in ("", "_steps", "_images", "_latents", "_probe"):
        with Image.open(finished / f"collapse{ending}.png") as image:
            assert image.width == 900
            assert len(image.convert("RGB").getcolors(10**6)) > 10
        assert f"(collapse{ending}.png)" in text
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_there_is_the_table_and_a_sentence(finished, monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    lab.main([*ARGUMENTS, "--seeds", "1", "--out", str(finished), "--draw"])
    warned = capsys.readouterr().err
    assert warned.count("no pictures without matplotlib; pip install it") == 1
    text = (finished / "collapse.md").read_text()
    assert "| nothing | 0.3 |" in text
    assert ".png" not in text


def test_there_is_nothing_to_draw_before_a_run(tmp_path):
    with pytest.raises(UserError, match="has no finished run"):
        lab.main([*ARGUMENTS, "--out", str(tmp_path), "--draw"])


# --------------------------------------------------------------------------------------------------
# Errors.


def run_badly(arguments, monkeypatch, capsys):
    """The one line on stderr, which is all that there is, beside exit code 2."""
    monkeypatch.setattr(sys, "argv", ["lab.py", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(lab.main)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("colapse", "invalid choice: 'colapse'"),
        ("collapse --seeds 0", "--seeds: is 0; it must be at least 1"),
        ("collapse --steps 0", "--steps: is 0; it must be at least 1"),
        ("collapse --sedes 2", "unrecognized arguments: --sedes 2 (--help lists all flags)"),
        ("collapse --channels 0", "must be at least 1"),
        ("collapse --seed 1", "--seed differs between the runs of collapse; leave it out"),
        ("collapse --kl_weight=0", "--kl_weight differs between the runs of collapse"),
        ("ratio --mask_ratio 0.5", "--mask_ratio differs between the runs of ratio"),
        ("teacher --plan", "lab.py teacher always trains; leave out --plan"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    error = run_badly([*arguments.split(), "--out", tmp_path], monkeypatch, capsys)
    assert words in error
    assert not list(tmp_path.iterdir())


def test_a_folder_of_other_settings_is_left_as_it_is(finished, monkeypatch, capsys):
    arguments = [*ARGUMENTS, "--seeds", 1, "--out", finished]
    error = run_badly([*arguments, "--lr", "0.5"], monkeypatch, capsys)
    folder = plan_cells(finished)[0].folder
    assert f"{folder} was made with lr 0.004, now it is 0.5; use another --out" in error
    assert lab.read_cell(plan_cells(finished)[0])


@pytest.mark.parametrize(
    "name, text",
    [
        ("cell.json", "{"),
        ("result.json", "[]"),
        ("result.json", '{"config": 3, "tokenizer": "x"}'),
        ("plots.pt", ""),
    ],
)
def test_damaged_records_are_set_aside_and_measured_again(finished, tmp_path, capsys, name, text):
    cell = plan_cells(tmp_path)[2]
    shutil.copytree(plan_cells(finished)[2].folder, cell.folder)
    expected = lab.read_cell(cell)
    (cell.folder / name).write_text(text)
    assert lab.read_cell(cell) is None
    assert "the run is measured again" in capsys.readouterr().err
    assert list(cell.folder.glob("*.damaged"))
    lab.run_cell(cell)
    found = lab.read_cell(cell)
    for key in ("psnr", "kl_per_token", "probe"):
        assert found[key] == expected[key]


def test_a_line_that_is_not_whole_is_passed_over(finished, tmp_path):
    log = (plan_cells(finished)[2].folder / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(log + '{"stage": "tokenizer", "st')
    (tmp_path / "whole.jsonl").write_text(log)
    assert lab.read_curve(tmp_path / "log.jsonl") == lab.read_curve(tmp_path / "whole.jsonl")
    (tmp_path / "log.jsonl").write_text("")
    assert lab.read_curve(tmp_path / "log.jsonl") == {}


def test_an_unfinished_run_of_other_settings_is_named(finished, tmp_path):
    cell = plan_cells(tmp_path)[0]
    cell.folder.mkdir(parents=True)
    other = plan_cells(finished)[1].folder / "tokenizer.pt"
    (cell.folder / "tokenizer.pt").write_bytes(other.read_bytes())
    sentence = r"tokenizer.pt was made with local_weight 0.1, this run has 0.0; use"
    with pytest.raises(UserError, match=sentence):
        lab.main([*ARGUMENTS, "--seeds", "1", "--out", str(tmp_path)])
