"""sample.py with another run as the guide, with a shift, and with either generator: on checkpoints of untrained networks."""

import json
from copy import deepcopy
from dataclasses import asdict

import pytest
import torch
from reference import TINY

import fid
import sample
from plumbing.run import UserError, save_checkpoint
from recipes import parse_config
from sit import GENERATORS, seeded_noise
from tokenizer import Tokenizer

CPU = torch.device("cpu")
CONFIG = asdict(parse_config(f"{TINY} --guidance 2 --patch_size 4".split())[0])


def make_run(folder, tokenizer, classes=("a", "b", "c"), seed=0, **config):
    """A folder with the sit.pt of a run, whose network is no zero."""
    torch.manual_seed(seed)
    config = CONFIG | {"generator": "sit"} | config
    network = GENERATORS[config["generator"]](4, tokenizer.channels, len(classes), config["sit"])
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    about = {"stage": "sit", "step": 20, "of_steps": 20, "config": config, "classes": list(classes)}
    states = {"ema": network.state_dict(), "tokenizer": tokenizer.state_dict()}
    save_checkpoint(about | states, folder / "sit.pt")
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return Tokenizer(16, 4, 4, 4, "toy")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer):
    """A run and a weaker one on the same latents."""
    root = tmp_path_factory.mktemp("runs")
    return make_run(root / "run", tokenizer), make_run(root / "weak", tokenizer, seed=1)


def record(path):
    return json.loads((path.parent / f"{path.name}.json").read_text())


def test_a_guide_changes_the_samples_and_stands_in_their_record(runs, tmp_path):
    run, weak = runs
    sample.main(f"{weak} --export {tmp_path}/weak.pt".split())
    pictures = {}
    for name, guide in (("alone", ""), ("weak", weak), ("exported", tmp_path / "weak.pt"), ("itself", run)):
        path = tmp_path / f"{name}.png"
        sample.main(f"{run} --columns 2 --steps 4 --out {path}".split() + (["--guide", str(guide)] if guide else []))
        pictures[name] = path.read_bytes()
        assert record(path)["guide"] == str(guide) and record(path)["run"] == str(run)
    assert pictures["weak"] == pictures["exported"] != pictures["alone"] == pictures["itself"]


def test_the_guide_is_the_unconditional_model_of_every_sample(runs, tokenizer):
    run, calls = sample.load_run(runs[0]), []
    run.sit = lambda x, t, y: y.to(x.dtype)[:, None, None].expand_as(x)
    run.guide = lambda x, t, y: calls.append(y.tolist()) or torch.full_like(x, -1.0)
    images = sample.generate(run, torch.tensor([0, 2]), [3, 4], solver="euler", steps=2, guidance=2.0, interval=(0.0, 1.0))
    x = next(seeded_noise(0, [3, 4], (4, 4), CPU)) - torch.tensor([1.0, 5.0])[:, None, None]  # v = -1 + 2 (y + 1)
    with torch.no_grad():
        expected = sample.to_uint8(tokenizer.decode(tokenizer.denormalize(x)))
    assert calls == [[3, 3], [3, 3]] and (images.int() - expected.int()).abs().max() <= 1


def test_npz_and_its_result_card_say_the_guide(runs, tmp_path):
    run, weak = runs
    path = tmp_path / "samples.npz"
    sample.main(f"{run} --npz 3 --steps 2 --guide {weak} --out {path}".split())
    assert record(path)["guide"] == str(weak) and fid.read_json(f"{path}.json")["guidance"] == 2.0


def test_a_run_without_classes_can_be_guided(tmp_path, tokenizer):
    run, weak = (make_run(tmp_path / name, tokenizer, (), seed) for seed, name in enumerate(("run", "weak")))
    path = tmp_path / "samples.png"
    sample.main(f"{run} --columns 2 --steps 2 --out {path}".split())
    alone = path.read_bytes()
    assert record(path)["guidance"] == 1.0
    sample.main(f"{run} --columns 2 --steps 2 --guide {weak} --out {path}".split())
    assert record(path)["guidance"] == 2.0 and path.read_bytes() != alone
    with pytest.raises(UserError, match=r"--guidance 2.0 needs classes, .* or a --guide"):
        sample.main(f"{run} --guidance 2 --out {path}".split())


def other_encoder(tokenizer):
    tokenizer.encoder.to_moments.bias.data += 1e-3


def other_statistics(tokenizer):
    tokenizer.latent_std *= 1.1


def nearly_the_same_statistics(tokenizer):
    """Latents were encoded on another machine."""
    tokenizer.latent_std *= 1.001


def other_decoder(tokenizer):
    tokenizer.decoder.norm.bias.data += 1


@pytest.mark.parametrize("change", [other_encoder, other_statistics])
def test_a_guide_on_other_latents_is_refused(runs, tmp_path, tokenizer, change):
    other = deepcopy(tokenizer)
    change(other)
    with pytest.raises(UserError, match=rf"--guide {tmp_path} needs a sit.pt for 3 classes on the latents of this run's encoder"):
        sample.main(f"{runs[0]} --guide {make_run(tmp_path, other)}".split())


@pytest.mark.parametrize("change", [nearly_the_same_statistics, other_decoder])
def test_a_guide_on_the_same_latents_is_taken(runs, tmp_path, tokenizer, change):
    other = deepcopy(tokenizer)
    change(other)
    guide = sample.load_guide(make_run(tmp_path, other, sit="S"), sample.load_run(runs[0]))  # of another size
    assert guide.pos_embed.shape[-1] == 384


def test_a_guide_of_other_shapes_or_without_a_sit_is_refused(runs, tmp_path, tokenizer):
    shapes = Tokenizer(16, 4, 4, 2, "toy")
    make_run(tmp_path / "channels", shapes, channels=2)
    make_run(tmp_path / "classes", tokenizer, ("a", "b"))
    about = {"stage": "tokenizer", "step": 20, "of_steps": 20, "config": CONFIG, "classes": ["a", "b", "c"]}
    save_checkpoint(about | {"ema": tokenizer.state_dict()}, tmp_path / "early" / "tokenizer.pt")
    for name in ("channels", "classes", "early"):
        with pytest.raises(UserError, match=f"--guide {tmp_path}/{name} needs a sit.pt for 3 classes"):
            sample.main(f"{runs[0]} --guide {tmp_path}/{name}".split())
    with pytest.raises(UserError, match="none is not a run"):
        sample.main(f"{runs[0]} --guide {tmp_path}/none".split())


def test_solver_and_shift_are_the_generators_own(runs, tmp_path, tokenizer):
    run = make_run(tmp_path / "run", tokenizer, generator="lightningdit")
    for folder, words, solver, shift in (
        (runs[0], "", "sde", 1.0),
        (runs[0], "--solver heun", "heun", 1.0),
        (runs[0], "--solver euler --shift 0.5", "euler", 0.5),
        (run, "", "euler", 0.3),
        (run, "--solver sde", "sde", 1.0),
        (run, "--shift 1", "euler", 1.0),
    ):
        sample.main(f"{folder} --columns 1 --steps 2 --out {tmp_path}/a.png {words}".split())
        assert (record(tmp_path / "a.png")["solver"], record(tmp_path / "a.png")["shift"]) == (solver, shift)
    for words, message in (("--shift 0", "shift is 0.0"), ("--solver sde --shift 0.3", r"shift is 0.3; .* solver sde")):
        with pytest.raises(UserError, match=message):
            sample.main(f"{run} {words}".split())


def test_a_lightningdit_guides_a_sit(runs, tmp_path, tokenizer):
    guide = make_run(tmp_path, tokenizer, generator="lightningdit")
    sample.main(f"{runs[0]} --columns 1 --steps 2 --out {tmp_path}/a.png --guide {guide}".split())
    assert record(tmp_path / "a.png")["solver"] == "sde"
