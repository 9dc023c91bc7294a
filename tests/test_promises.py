"""What could be lost without an error: each test here turns red when one line that keeps the quality is taken out."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from reference import TINY, TINY_STEPS, make_folder

import align
import fid
import masking
import sample
import train
from plumbing.data import Latents, to_float, to_uint8
from plumbing.state import describe, moments

COLOURS = [(230, 30, 30), (30, 200, 40), (40, 60, 230)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three classes, each of one plain colour with some noise: long enough that samples have their class's colour."""
    root = tmp_path_factory.mktemp("colours")
    for label, colour in enumerate(COLOURS):
        (root / "images" / f"class{label}").mkdir(parents=True)
        for i in range(16):
            noise = np.random.default_rng((label, i)).integers(-25, 26, (16, 16, 3))
            Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8)).save(root / "images" / f"class{label}" / f"{i}.png")
    seen, loss = [], train.flow_matching_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "flow_matching_loss", lambda model, x, *rest: (seen.append(x), loss(model, x, *rest))[1])
        steps = "--tokenizer_steps 120 --decoder_steps 2 --sit_steps 250 --sit_batch_size 32 --recipe kl --sample_steps 10"
        train.main(f"{TINY} {steps} --data {root}/images --out {root}/out".split())
    return root, torch.cat(seen)


def test_a_class_goes_from_its_folder_to_its_samples(run):
    """By a grid's rows, and by the labels of an .npz."""
    root, _ = run
    sample.main(f"{root}/out --npz 12 --steps 10 --guidance 1.5".split())
    with np.load(root / "out" / "samples.npz") as samples:
        colours, labels = samples["arr_0"].mean((1, 2)), samples["arr_1"]
    assert labels.tolist() == [0, 1, 2] * 4
    nearest = np.linalg.norm(colours[:, None] - np.array(COLOURS), axis=-1).argmin(1)
    assert (nearest == labels).all()


def test_latents_reach_sit_with_mean_0_and_std_1(run):
    root, x = run
    assert x.mean((0, 1)).abs().max() < 0.15 and (x.std((0, 1)) - 1).abs().max() < 0.15
    seal = json.loads((root / "out" / "latents.json").read_text())
    assert np.abs(seal["latent_mean"]).max() > 0.3 or np.abs(np.array(seal["latent_std"]) - 1).max() > 0.3  # not so by themselves


def test_samples_leave_sit_with_the_latents_own_mean_and_std(run):
    """A network that stands still leaves the noise where it is."""
    root, _ = run
    loaded = sample.load_run(root / "out")
    loaded.sit = lambda x, t, y: torch.zeros_like(x)
    images = sample.generate(loaded, torch.tensor([0, 2]), [5, 6], seed=3, solver="euler", steps=2)
    noise = next(sample.seeded_noise(3, [5, 6], (4, 4), torch.device("cpu")))
    with torch.no_grad():
        z = noise * loaded.tokenizer.latent_std + loaded.tokenizer.latent_mean
        assert torch.equal(images, to_uint8(loaded.tokenizer.decode(z)))


def test_latents_are_of_the_image_and_of_its_mirror_image_with_its_label(run):
    root, _ = run
    loaded, config = sample.load_run(root / "out"), train.parse_config(f"{TINY} --data {root}/images".split())[0]
    state = train.Run.open(config, train.Processes.start("cpu"))
    rows = np.load(root / "out" / "latents.npy")
    images, labels = zip(*(state.data[int(i)] for i in state.train_items))
    assert rows["label"].tolist() == list(labels)
    images = to_float(torch.stack(images))
    with torch.no_grad():
        for place, x in enumerate((images, images.flip(-1))):
            found = torch.from_numpy(rows["mean"][:, place].astype(np.float32))
            torch.testing.assert_close(found, loaded.tokenizer.encode(x).mean, atol=5e-3, rtol=5e-3)


def test_latents_stay_on_disk(run):
    root, _ = run
    seal, count = json.loads((root / "out" / "latents.json").read_text()), len(np.load(root / "out" / "latents.npy"))
    assert isinstance(Latents(root / "out" / "latents.npy", seal["stamp"], count, 4, 4, 3).rows, np.memmap)


def test_lost_latents_are_made_again_and_not_called_done(run, tmp_path, capsys):
    root, _ = run
    shutil.copytree(root / "out", tmp_path / "out")
    (tmp_path / "out" / "latents.npy").unlink()
    command = json.loads((root / "out" / "result.json").read_text())["sit"]["made_by"]["command"]
    train.main([word.replace(f"{root}/out", f"{tmp_path}/out") for word in command[1:]])
    printed = capsys.readouterr().out
    assert "decoder: done before" in printed and "latents: done before" not in printed
    assert (tmp_path / "out" / "latents.npy").read_bytes() == (root / "out" / "latents.npy").read_bytes()


def test_result_json_says_how_it_came_about(run):
    root, _ = run
    result = json.loads((root / "out" / "result.json").read_text())
    expected = {"seed": 0, "solver": "sde", "steps": 10, "guidance": 3.0, "interval": [0.0, 0.7], "shift": 1.0}
    assert result["sit"]["sampler"] == expected
    made_by = result["tokenizer"]["made_by"]
    assert made_by["command"][0] == "train.py" and made_by["recipe"] == "kl" and made_by["preset"] == "toy"
    assert made_by["torch"] == torch.__version__ and made_by["processes"] == 1 and {"commit", "device", "python"} <= made_by.keys()
    times = [json.loads(line)["time"] for line in (root / "out" / "log.jsonl").read_text().splitlines()]
    assert times == sorted(times) and times[0] > 1.7e9


def test_an_exported_file_takes_the_place_of_its_run(run, tmp_path):
    root, _ = run
    sample.main(f"{root}/out --export {tmp_path}/model.pt".split())
    for words in (f"{root}/out", f"{tmp_path}/model.pt"):
        sample.main(f"{words} --classes 1 --columns 2 --steps 3 --out {tmp_path}/{len(words)}.png".split())
    pictures = [path.read_bytes() for path in tmp_path.glob("*.png")]
    assert len(pictures) == 2 and pictures[0] == pictures[1]
    fid.main(f"probe {tmp_path}/model.pt --data {root}/images".split())
    assert json.loads((tmp_path / "model.pt.probe.json").read_text())["values"]["accuracy"] == 1  # plain colours
    assert (tmp_path / "model.pt").stat().st_size < (root / "out" / "sit.pt").stat().st_size / 2
    assert sample.load_run(tmp_path / "model.pt").about["weights"] == sample.load_run(root / "out").about["weights"]


def test_a_tokenizer_carries_the_statistics_of_its_latents(run, tmp_path):
    """Also before there is a SiT, and when it is given away."""
    root, _ = run
    for name in ("decoder.pt", "latents.json"):
        (tmp_path / name).write_bytes((root / "out" / name).read_bytes())
    sample.main(f"{tmp_path} --export {tmp_path}/alone/model.pt".split())
    (tmp_path / "alone" / "latents.json").write_text('{"latent_mean": [9, 9, 9, 9], "latent_std": [9, 9, 9, 9]}')  # of another run
    for path in (tmp_path, tmp_path / "alone" / "model.pt"):
        assert torch.equal(sample.load_run(path).tokenizer.latent_std, sample.load_run(root / "out").tokenizer.latent_std)


def test_active_units_are_counted():
    mean = torch.randn(1000, 2, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.5, 0.01, 0.0])
    numbers = describe(moments(mean, mean) | {"kl": torch.tensor(6.0)})
    assert numbers["active_units"] == 0.5 and numbers["kl_per_token"] == 3


def test_cosines_are_taken_in_float32():
    a, b = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for low, high in (
        (align.cosine_loss(a, b), align.cosine_loss(a.float(), b.float())),
        (masking.similarity(a, b[:, None]), masking.similarity(a.float(), b[:, None].float())),
    ):
        assert low.dtype == torch.float32 and torch.equal(low, high)


def test_a_second_run_in_the_same_folder_is_told_so(tmp_path):
    folder, held = make_folder(tmp_path / "images", 0, 20), train.claim(tmp_path / "out" / "log.jsonl")
    words = f"{TINY} {TINY_STEPS} --stage tokenizer --data {folder} --out {tmp_path}/out".split()
    with pytest.raises(train.UserError, match="another run is at work"):
        train.main(words)
    held.close()
    train.main([*words, "--tokenizer_steps", "1"])


@pytest.mark.parametrize("text", [b"", b'{"tokenizer": {', b"[1, 2]", b"\xff\xfe"])
def test_a_damaged_record_does_not_stop_a_run(tmp_path, text, capsys):
    folder, out = make_folder(tmp_path / "images", 0, 20), tmp_path / "out"
    out.mkdir()
    (out / "result.json").write_bytes(text)
    train.main(f"{TINY} --tokenizer_steps 1 --stage tokenizer --data {folder} --out {out}".split())
    assert "only a record" in capsys.readouterr().err and (out / "result.json.damaged").read_bytes() == text
    assert "psnr" in json.loads((out / "result.json").read_text())["tokenizer"]


def test_the_runs_own_folder_may_lie_in_the_data(tmp_path):
    folder = make_folder(tmp_path / "images", 0, 20)
    words = f"{TINY} --tokenizer_steps 1 --decoder_steps 1 --data {folder} --out {folder}/out".split()
    train.main([*words, "--stage", "tokenizer"])
    train.main([*words, "--stage", "decoder"])


@pytest.mark.parametrize("text, named", [
    ("--seed 18446744073709551616", "--seed"), (f"--seed {'9' * 300}", "--seed"), ("--batch_size 1000000000000", "--batch_size"),
    ("--channels 1000000000", "--channels"), ("--image_size 100000", "--image_size"), ("--device abacus", "--device"),
])  # fmt: skip
def test_numbers_without_measure_are_refused(text, named):
    with pytest.raises(train.UserError, match=named):
        train.parse_config(text.split())


def test_out_of_memory_is_one_sentence(capsys, monkeypatch):
    from plumbing.run import command_line

    def main(arguments):
        torch.empty(2**55)

    with pytest.raises(SystemExit) as stop:
        command_line(main)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("error: out of memory") and message.count("\n") == 1


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_precision_is_that_of_matrix_products(tmp_path, precision):
    folder = make_folder(tmp_path / "images", 0, 20)
    words = f"{TINY} --tokenizer_steps 2 --log_every 1 --stage tokenizer --data {folder} --out {tmp_path}/out"
    train.main([*words.split(), "--precision", precision, "--device", "cpu"])
    config, options = train.parse_config([*words.split(), "--precision", precision])
    with train.Run.open(config, train.Processes.start("cpu"), precision=options.precision).autocast():
        product = torch.nn.Linear(2, 2)(torch.zeros(1, 2))
    assert product.dtype == {"bf16": torch.bfloat16, "float32": torch.float32}[precision]
