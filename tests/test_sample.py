"""sample.py on checkpoints of untrained networks: what a run is, guides, solvers, classes."""

import json
from copy import deepcopy
from dataclasses import asdict, replace

import pytest
import torch
from reference import TINY

import fid
import sample
from build import build_generator, build_tokenizer
from options import parse_config
from sit import per_sample_noise
from tokenizer import Tokenizer
from utils.console import UserError
from utils.files import hash_file, save_torch
from utils.images import to_uint8

CPU = torch.device("cpu")
CONFIG, _ = parse_config(f"{TINY} --guidance 2 --patch_size 4".split())


def save_stage(folder, stage, step=20, config=CONFIG, classes=("a", "b", "c"), **networks):
    """A checkpoint as train.py leaves it."""
    states = {name: network.state_dict() for name, network in networks.items()}
    info = {"stage": stage, "step": step, "total_steps": 20, "identity": {}}
    info |= {"config": asdict(config), "classes": list(classes)}
    save_torch(info | states, folder / f"{stage}.pt")


def make_run(folder, tokenizer, classes=("a", "b", "c"), seed=0, **changes):
    """A folder with the generator.pt of a run, whose network does not predict zeros."""
    torch.manual_seed(seed)
    config = replace(CONFIG, **changes)
    generator = build_generator(config, tokenizer, len(classes))
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_stage(folder, "generator", 20, config, classes, ema=generator, tokenizer=tokenizer)
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


# --------------------------------------------------------------------------------------------------
# What a run is.


def test_a_run_is_its_latest_stage_with_a_decoder_of_the_same_encoder(tmp_path, capsys):
    first = build_tokenizer(CONFIG)
    other = build_tokenizer(CONFIG)
    tuned = deepcopy(first)
    tuned.decoder.load_state_dict(other.decoder.state_dict())
    tuned.latent_mean += 1  # the generator knows the latents of its own checkpoint

    def load(decoder=None):
        if decoder:
            save_stage(tmp_path, "decoder", ema=decoder)
        return sample.load_run(tmp_path, "cpu")

    generator = build_generator(CONFIG, first, num_classes=3)
    save_stage(tmp_path, "generator", 7, ema=generator, tokenizer=first)
    before = load().checkpoint_info
    assert before["file"] == "generator.pt"
    assert before["stage"] == "generator"
    assert before["step"] == 7
    assert "generator.pt is unfinished, at step 7 of 20" in capsys.readouterr().err
    found = load(tuned)
    expected = tuned.state_dict() | {"latent_mean": first.latent_mean}
    for key, value in found.tokenizer.state_dict().items():
        assert torch.equal(value, expected[key])
    assert found.checkpoint_info["weights"] != before["weights"]
    assert load(first).checkpoint_info["weights"] == before["weights"]
    message = r"decoder\.pt does not belong to .*generator\.pt: their encoders differ"
    with pytest.raises(UserError, match=message):
        load(other)
    (tmp_path / "generator.pt").unlink()
    capsys.readouterr()
    assert load().checkpoint_info["stage"] == "decoder"
    assert load().generator is None
    assert not capsys.readouterr().err
    torch.save({"ema": {}}, tmp_path / "generator.pt")
    with pytest.raises(UserError, match=r"not a whole checkpoint of train\.py"):
        load()
    with pytest.raises(UserError, match="is not a run"):
        sample.load_run(tmp_path / "none", "cpu")


def test_a_decoder_of_another_bottleneck_is_refused(tmp_path):
    """The bottleneck determines the latents, too."""
    first = build_tokenizer(CONFIG)
    other = deepcopy(first)
    other.bottleneck.proj.bias.data += 1e-3
    generator = build_generator(CONFIG, first, num_classes=3)
    save_stage(tmp_path, "generator", ema=generator, tokenizer=first)
    save_stage(tmp_path, "decoder", ema=other)
    with pytest.raises(UserError, match="their encoders differ"):
        sample.load_run(tmp_path, "cpu")


# --------------------------------------------------------------------------------------------------
# Guides.


def test_a_guide_changes_the_samples_and_stands_in_their_record(runs, tmp_path):
    run, weak = runs
    sample.main(f"{weak} --export {tmp_path}/weak.pt".split())
    pictures = {}
    for name, guide in (
        ("alone", ""),
        ("weak", weak),
        ("exported", tmp_path / "weak.pt"),
        ("itself", run),
    ):
        path = tmp_path / f"{name}.png"
        words = f"{run} --columns 2 --steps 4 --out {path}".split()
        if guide:
            words += ["--guide", str(guide)]
        sample.main(words)
        pictures[name] = path.read_bytes()
        assert record(path)["guide"] == str(guide)
        assert record(path)["run"] == str(run)
    assert pictures["weak"] == pictures["exported"]
    assert pictures["alone"] == pictures["itself"]
    assert pictures["weak"] != pictures["alone"]


def test_the_guide_is_the_unconditional_model_of_every_sample(runs, tokenizer):
    """The model predicts the label y, the guide -1: with guidance 2 that is v = -1 + 2 (y + 1)."""
    run = sample.load_run(runs[0])
    calls = []

    def guide_model(x, t, y):
        calls.append(y.tolist())
        return torch.full_like(x, -1.0)

    run.generator.forward = lambda x, t, y: y.to(x.dtype)[:, None, None].expand_as(x)
    run.guide_model = guide_model
    images = sample.generate(
        run,
        torch.tensor([0, 2]),
        [3, 4],
        solver="euler",
        num_steps=2,
        cfg_scale=2.0,
        guidance_interval=(0.0, 1.0),
    )
    noise = next(per_sample_noise(0, [3, 4], (4, 4), CPU))
    x = noise - torch.tensor([1.0, 5.0])[:, None, None]
    with torch.no_grad():
        expected = to_uint8(tokenizer.decode(tokenizer.denormalize(x)))
    assert calls == [[3, 3], [3, 3]]
    assert (images.int() - expected.int()).abs().max() <= 1


def test_npz_and_the_report_on_it_say_the_guide(runs, tmp_path):
    run, weak = runs
    path = tmp_path / "samples.npz"
    sample.main(f"{run} --npz 3 --steps 2 --guide {weak} --out {path}".split())
    assert record(path)["guide"] == str(weak)
    sampler = fid.read_sampler(fid.ImageSet(path), hash_file(path))
    assert sampler == record(path)
    assert sampler["cfg_scale"] == 2.0
    assert sampler["hash"] == hash_file(path)


def test_a_run_without_classes_can_be_guided(tmp_path, tokenizer):
    run = make_run(tmp_path / "run", tokenizer, classes=())
    weak = make_run(tmp_path / "weak", tokenizer, classes=(), seed=1)
    path = tmp_path / "samples.png"
    sample.main(f"{run} --columns 2 --steps 2 --out {path}".split())
    alone = path.read_bytes()
    assert record(path)["cfg_scale"] == 1.0
    sample.main(f"{run} --columns 2 --steps 2 --guide {weak} --out {path}".split())
    assert record(path)["cfg_scale"] == 2.0
    assert path.read_bytes() != alone
    with pytest.raises(UserError, match=r"--guidance 2.0 needs classes, .* or a --guide"):
        sample.main(f"{run} --guidance 2 --out {path}".split())


def other_encoder(tokenizer):
    tokenizer.bottleneck.proj.bias.data += 1e-3


def other_encoder_blocks(tokenizer):
    tokenizer.encoder.norm.bias.data += 1e-3


def other_statistics(tokenizer):
    tokenizer.latent_std *= 1.1


def nearly_the_same_statistics(tokenizer):
    """Latents were encoded on another machine."""
    tokenizer.latent_std *= 1.001


def other_decoder(tokenizer):
    tokenizer.decoder.norm.bias.data += 1


@pytest.mark.parametrize("change", [other_encoder, other_encoder_blocks, other_statistics])
def test_a_guide_on_other_latents_is_refused(runs, tmp_path, tokenizer, change):
    other = deepcopy(tokenizer)
    change(other)
    message = (
        f"--guide {tmp_path} needs a generator.pt for 3 classes, trained on the latents of this "
        "run's encoder"
    )
    with pytest.raises(UserError, match=message):
        sample.main(f"{runs[0]} --guide {make_run(tmp_path, other)}".split())


@pytest.mark.parametrize("change", [nearly_the_same_statistics, other_decoder])
def test_a_guide_on_the_same_latents_is_taken(runs, tmp_path, tokenizer, change):
    """It may be of another size."""
    other = deepcopy(tokenizer)
    change(other)
    folder = make_run(tmp_path, other, generator_size="S")
    guide = sample.load_guide(folder, sample.load_run(runs[0]))
    assert guide.pos_embed.shape[-1] == 384


def test_a_guide_of_other_shapes_or_without_a_generator_is_refused(runs, tmp_path, tokenizer):
    make_run(tmp_path / "channels", Tokenizer(16, 4, 4, 2, "toy"), latent_dim=2)
    make_run(tmp_path / "classes", tokenizer, classes=("a", "b"))
    save_stage(tmp_path / "early", "tokenizer", ema=tokenizer)
    for name in ("channels", "classes", "early"):
        message = f"--guide {tmp_path}/{name} needs a generator.pt for 3 classes"
        with pytest.raises(UserError, match=message):
            sample.main(f"{runs[0]} --guide {tmp_path}/{name}".split())
    with pytest.raises(UserError, match="none is not a run"):
        sample.main(f"{runs[0]} --guide {tmp_path}/none".split())


# --------------------------------------------------------------------------------------------------
# Solvers and generators.


def test_solver_and_shift_are_the_generators_own(runs, tmp_path, tokenizer):
    lightningdit = make_run(tmp_path / "run", tokenizer, generator="lightningdit")
    path = tmp_path / "a.png"
    for folder, words, solver, shift in (
        (runs[0], "", "sde", 1.0),
        (runs[0], "--solver heun", "heun", 1.0),
        (runs[0], "--solver euler --shift 0.5", "euler", 0.5),
        (lightningdit, "", "euler", 0.3),
        (lightningdit, "--solver sde", "sde", 1.0),
        (lightningdit, "--shift 1", "euler", 1.0),
    ):
        sample.main(f"{folder} --columns 1 --steps 2 --out {path} {words}".split())
        assert record(path)["solver"] == solver
        assert record(path)["timestep_shift"] == shift
    for words, message in (
        ("--shift 0", r"shift 0\.0 must be a finite number above 0"),
        ("--solver sde --shift 0.3", r"shift 0\.3 is not possible with the solver sde"),
    ):
        with pytest.raises(UserError, match=message):
            sample.main(f"{lightningdit} {words}".split())


def test_a_lightningdit_guides_a_sit(runs, tmp_path, tokenizer):
    guide = make_run(tmp_path, tokenizer, generator="lightningdit")
    path = tmp_path / "a.png"
    sample.main(f"{runs[0]} --columns 1 --steps 2 --out {path} --guide {guide}".split())
    assert record(path)["solver"] == "sde"


# --------------------------------------------------------------------------------------------------
# Classes.


def test_a_number_never_means_two_classes():
    """Folders named 1, 10 and 2, in the order in which they are sorted, have the labels 0 to 2.

    Where a name is a number, words are names only.
    """
    names = ["1", "10", "2"]
    assert sample.parse_classes("2,10,1", names) == [2, 1, 0]
    assert sample.parse_classes("", names) == [0, 1, 2]
    assert sample.parse_classes("0,1,2", ["0", "1", "2"]) == [0, 1, 2]
    assert sample.parse_classes("002", ["001", "002", "cat"]) == [1]
    for word, given in (("0", names), ("1,0", names), ("2", ["001", "002", "cat"])):
        with pytest.raises(UserError, match="is not a class name; labels are not taken"):
            sample.parse_classes(word, given)


def test_classes_are_names_or_labels(runs, tmp_path):
    names = ["cat", "dog", "owl"]
    assert sample.parse_classes("owl,0,dog", names) == [2, 0, 1]
    assert sample.parse_classes("1,1,", names) == [1, 1]
    assert sample.parse_classes("", []) == [0]
    for word in ("bat", "3", "-1", "²"):
        with pytest.raises(UserError, match=f"{word} is neither a class name nor a label in 0..2"):
            sample.parse_classes(word, names)
    with pytest.raises(UserError, match="--classes 0: this run was trained without classes"):
        sample.parse_classes("0", [])
    path = tmp_path / "a.png"
    sample.main(f"{runs[0]} --classes c,0 --columns 1 --steps 2 --out {path}".split())
    assert record(path)["classes"] == [2, 0]
    assert record(path)["hash"] == hash_file(path)
