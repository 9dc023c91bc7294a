import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference import ROOT, make_folder

from plumbing import data
from plumbing.run import CHECKPOINT, UserError, command_line, load_checkpoint, read_json, replacing, save_checkpoint
from plumbing.run import stop_signals, write_text
from plumbing.shapes import Shapes


def noise_image(width, height, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_crop_is_central_and_square():
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, 28:68] = 255  # halved twice: 7 to 17 of 25 columns
    crop = np.asarray(data.center_crop(Image.fromarray(pixels), 10))
    assert crop.shape == (10, 10, 3) and crop.min() == 255
    assert data.center_crop(noise_image(17, 90), 64).size == (64, 64)


def test_large_jpegs_are_decoded_small_and_look_the_same(tmp_path):
    """From four times the crop on; below that the pixels are those of the whole file."""
    rows, columns = np.mgrid[:800, :1000]
    waves = np.stack([np.sin(rows / 90), np.sin(columns / 70), np.sin((rows + columns) / 80)], axis=-1)
    Image.fromarray((127.5 + 120 * waves).astype(np.uint8)).save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as image:
        whole = image.convert("RGB")
    for size, exact in ((100, False), (250, True)):
        crop = np.asarray(data.read_image(tmp_path / "x.jpg", size)).astype(int)
        apart = np.abs(crop - np.asarray(data.center_crop(whole, size)))
        assert (apart.max() == 0) == exact and apart.max() <= 3


@pytest.mark.parametrize(
    "mode, suffix", [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("LA", "png")]
)
def test_every_mode_becomes_rgb(tmp_path, mode, suffix):
    noise_image(30, 20, mode).save(tmp_path / f"x.{suffix}")
    image, label = data.ImageFolder(tmp_path, 16)[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 16, 16) and label == 0


def test_sixteen_bits_keep_their_range(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)).save(tmp_path / "x.png")
    image = data.ImageFolder(tmp_path, 64)[0][0]
    assert image.min() == 0 and image.max() == 255 and abs(image.float().mean() - 127.5) < 2


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(tmp_path, mode):
    Image.new(mode, (8, 8), 300).save(tmp_path / "x.tif")
    with pytest.raises(OSError, match=f"x.tif is not a readable image: pixels of type {mode}; only 8 and 16 bits"):
        data.read_image(tmp_path / "x.tif")


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (20, 20), "black")
    image.paste("white", (0, 0, 20, 5))  # a white top
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    image.save(tmp_path / "x.jpg", exif=exif, quality=100)
    shown = data.ImageFolder(tmp_path, 20)[0][0]
    assert shown[:, :4].float().mean() < 20 and shown[:, -4:].float().mean() > 235


def test_classes_are_the_sorted_folders_and_flat_has_none(tmp_path):
    folder = data.ImageFolder(make_folder(tmp_path / "a", 3, 2), 8)
    assert folder.classes == ["class0", "class1", "class2"]
    assert [folder[i][1] for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert data.ImageFolder(make_folder(tmp_path / "b", 0, 2), 8).classes == []


@pytest.mark.parametrize("make, named", [
    (lambda p: None, "does not exist"),
    (lambda p: p.mkdir(), "no images"),
    (lambda p: (p.mkdir(), (p / "notes.txt").write_text("hello")), "no images"),
    (lambda p: (make_folder(p, 2, 1), make_folder(p, 0, 1)), "loose images"),
])  # fmt: skip
def test_a_folder_without_use_is_refused(tmp_path, make, named):
    make(tmp_path / "images")
    with pytest.raises(UserError, match=named):
        data.ImageFolder(tmp_path / "images", 8)


@pytest.mark.parametrize("classes", [0, 2])
def test_pictures_of_a_run_are_no_data(tmp_path, classes):
    before = data.ImageFolder(make_folder(tmp_path, classes, 3), 8)
    for out in (tmp_path / "out", tmp_path / "runs" / "a"):
        noise_image(30, 20).save(make_folder(out, 0, 1) / "masks.png")
        (out / "log.jsonl").touch()
    after = data.ImageFolder(tmp_path, 8)
    assert (after.paths, after.classes, after.labels, after.stamp) == (before.paths, before.classes, before.labels, before.stamp)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in folders are a Unix thing")
def test_pipes_and_links_in_a_circle_are_passed_over(tmp_path):
    a, b = (make_folder(tmp_path / "images", 2, 3) / name for name in ("class0", "class1"))
    whole = data.ImageFolder(a.parent, 8)
    for folder in (a, a.parent):
        os.mkfifo(folder / "pipe.jpg")
        (folder / "self.jpg").symlink_to("self.jpg")
    (a / "up").symlink_to(a)
    assert data.ImageFolder(a.parent, 8).paths == whole.paths
    (a / "across").symlink_to(tmp_path / "images" / "class1")
    (b / "across").symlink_to(tmp_path / "images" / "class0")
    assert [data.ImageFolder(a.parent, 8).labels.count(label) for label in (0, 1)] == [6, 6]  # each through a link, too, once
    (tmp_path / "images" / "class0" / "parent").symlink_to(tmp_path)
    assert len(data.list_images(tmp_path, deep=True)) == 6


def test_an_image_too_narrow_to_be_cropped_is_unreadable(tmp_path):
    Image.new("L", (1, 65_535)).save(tmp_path / "x.png")
    with pytest.raises(OSError, match=r"x.png is not a readable image: too long and narrow"):
        data.ImageFolder(tmp_path, 256).read(0)
    assert data.ImageFolder(tmp_path, 4).read(0)[0].shape == (3, 4, 4)


def test_unreadable_files_are_named_once_and_replaced_until_they_are_over_one_percent(tmp_path, capsys):
    make_folder(tmp_path, 0, 300, size=8)
    folder = data.ImageFolder(tmp_path, 8)
    bad = [298, 299, 7]  # after the last comes the first

    def damage(index):
        path = Path(folder.paths[index])
        path.write_bytes(path.read_bytes()[:99] if index % 2 else b"not an image")

    for index in bad:
        damage(index)
        with pytest.raises(OSError, match=re.escape(f"{folder.paths[index]} is not a readable image")):
            folder.read(index)
    assert not folder.unreadable and not capsys.readouterr().err  # `read` only says it
    assert torch.equal(folder[298][0], folder.read(0)[0]) and torch.equal(folder[7][0], folder.read(8)[0])
    batches = [list(range(i, i + 50)) for i in range(0, 300, 50)]
    assert sum(len(images) for images, _ in data.loader(folder, batches * 2, 0)) == 600
    assert folder.unreadable == set(bad)  # 3 of 300: not over 1 %
    warned = capsys.readouterr().err
    assert all(warned.count(f"warning: {folder.paths[index]}") == 1 for index in bad) and warned.count("takes its place") == 3
    damage(100)
    with pytest.raises(OSError, match=rf"over 1 % of 300 images cannot be read.*{re.escape(folder.paths[100])}"):
        list(data.loader(folder, batches, 0))


@pytest.mark.parametrize("count, bad", [(50, 1), (2, 1), (1, 0)])
def test_a_small_folder_bears_one_unreadable_image_if_there_is_another(tmp_path, count, bad):
    make_folder(tmp_path, 0, count, size=8)
    folder = data.ImageFolder(tmp_path, 8)
    for index in range(bad + 1):
        (tmp_path / f"{index}.png").write_text("not an image")
        if index < bad:
            assert all(len(folder[i]) == 2 for i in range(count))
    with pytest.raises(OSError, match="not a readable image"):
        [folder[i] for i in range(count)]


def test_the_stamp_of_a_folder_changes_with_its_names_and_sizes_and_not_with_its_place(tmp_path):
    root = make_folder(tmp_path / "a", 2, 3)
    stamp = data.ImageFolder(root, 8).stamp
    assert stamp == data.ImageFolder(root, 16).stamp and len(stamp) == 64
    root = root.rename(tmp_path / "elsewhere")
    assert data.ImageFolder(root, 8).stamp == stamp
    file, kept = root / "class0" / "1.png", (root / "class0" / "1.png").read_bytes()
    noise_image(30, 20).save(file)  # other content, another size
    assert data.ImageFolder(root, 8).stamp != stamp
    file.write_bytes(kept)
    assert data.ImageFolder(root, 8).stamp == stamp
    for other in (file.with_name("9.png"), root / "class1" / "9.png"):
        file.rename(other)
        assert data.ImageFolder(root, 8).stamp != stamp
        other.rename(file)
    file.unlink()
    assert data.ImageFolder(root, 8).stamp != stamp != Shapes(8).stamp


def test_shapes_are_deterministic_labelled_and_balanced():
    shapes = Shapes(32)
    image, label = shapes[7]
    for found in (Shapes(32)[7], shapes.read(7)):
        assert torch.equal(image, found[0]) and found[1] == label
    shape, ramp = image.amin(0) >= 89, image.amax(0) <= 77  # of 255: a shape's colours begin at 0.35, a ramp ends at 0.3
    assert image[:, shape].float().mean() > 1.5 * image[:, ~shape].float().mean() and 0.03 < shape.float().mean() < 0.5
    assert (shape | ramp).float().mean() > 0.8  # the rest is the antialiased edge
    counts = np.bincount([shapes[i][1] for i in range(1000)], minlength=10)
    assert len(counts) == 10 and counts.min() > 60


def test_split_is_disjoint_and_covers_everything():
    train, held = data.split(100, 256)
    assert len(held) == 10 and sorted([*train, *held]) == list(range(100))
    train, held = data.split(20, 256)
    assert len(held) == 2 and sorted([*train, *held]) == list(range(20))
    for count, held_out in ((7, 4), (19, 256), (100, 1)):  # at most one could be held out: all serve as both
        assert [list(part) for part in data.split(count, held_out)] == [list(range(count))] * 2


def test_batches_cover_each_epoch_once_and_do_not_depend_on_the_process_count():
    def lists(count, step, *pieces, items=range(10)):
        return list(islice(data.batches(items, 4, 0, step, list(pieces)), count))

    whole = lists(5, 0, slice(0, 4))
    assert sorted(sum(whole, [])[:10]) == sorted(sum(whole, [])[10:]) == list(range(10)) != sum(whole, [])[:10]
    assert sum(lists(10, 0, slice(0, 2), slice(2, 4)), []) == sum(whole, [])  # accumulated
    assert lists(2, 3, slice(0, 4), items=np.arange(100, 110)) == [[100 + i for i in part] for part in whole[3:]]  # resumed
    shares = [lists(5, 0, rows) for rows in (slice(0, 2), slice(2, 4))]  # of two processes
    assert [first + second for first, second in zip(*shares)] == whole


def test_uint8_and_float_are_inverse():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_uint8(data.to_float(values)), values)
    assert data.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


FORM = {"count": 3, "tokens": 4, "channels": 2, "classes": 8}
SEAL = {"stamp": "abc", "latent_mean": [0, 1], "latent_std": [1, 2]}


def make_latents(path, labels=(5, 6, 7), **seal):
    mean, std = torch.randn(3, 2, 4, 2), torch.rand(3, 2, 4, 2)
    np.lib.format.open_memmap(path, "w+", data.Latents.record(4, 2), (3,))
    for part in (slice(1, 3), slice(0, 1)):  # as two processes do
        rows = np.lib.format.open_memmap(path, mode="r+")[part]
        rows["mean"], rows["std"], rows["label"] = mean[part].numpy(), std[part].numpy(), labels[part]
    write_text(json.dumps(SEAL | seal), path.with_suffix(".json"))
    return mean, std


def test_latents_round_trip(tmp_path):
    mean, std = make_latents(tmp_path / "latents.npy")
    latents = data.Latents(tmp_path / "latents.npy", "abc", **FORM)
    got = latents.batch([2, 0])
    torch.testing.assert_close(got[0], mean[[2, 0]], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(got[1], std[[2, 0]], atol=2e-3, rtol=1e-3)
    assert len(latents) == 3 and got[2].tolist() == [7, 5] and got[2].dtype == torch.int64
    assert latents.seal["latent_mean"] == [0, 1] and latents.seal["latent_std"] == [1, 2]


@pytest.mark.parametrize("damage", [
    lambda whole: whole[:-10], lambda whole: whole[:100], lambda whole: whole[:4], lambda whole: b"",
    lambda whole: b"hello", lambda whole: bytes(len(whole)), lambda whole: whole[:20] + bytes(50) + whole[70:],
    lambda whole: whole.replace(b"<f2", b"<i2"), lambda whole: whole.replace(b"'std'", b"'sdt'"),
    lambda whole: whole.replace(b"(2, 4, 2)", b"(4, 2, 2)"), lambda whole: whole.replace(b"(3,)", b"(2,)"),
], ids="data header magic empty text zeros hole type key form count".split())  # fmt: skip
def test_truncated_and_damaged_latents_are_refused(tmp_path, damage):
    make_latents(tmp_path / "latents.npy")
    whole = (tmp_path / "latents.npy").read_bytes()
    assert damage(whole) != whole
    (tmp_path / "latents.npy").write_bytes(damage(whole))
    with pytest.raises(UserError, match=r"latents.npy is truncated or damaged; delete .*latents.json and run"):
        data.Latents(tmp_path / "latents.npy", "abc", **FORM)


@pytest.mark.parametrize("labels, classes, good", [((0, 1, 8), 8, False), ((0, -1, 0), 8, False), ((0, 0, 0), 0, True)])
def test_labels_out_of_range_are_refused(tmp_path, labels, classes, good):
    make_latents(tmp_path / "latents.npy", labels)
    latents = data.Latents(tmp_path / "latents.npy", "abc", **FORM | {"classes": classes})
    with nullcontext() if good else pytest.raises(OSError, match=r"latents.npy is damaged: it has labels beyond range\(0, 8\)"):
        latents.batch([0, 1, 2])


def test_stale_and_missing_latents_and_a_damaged_seal_are_refused(tmp_path):
    path, seal = tmp_path / "latents.npy", tmp_path / "latents.json"
    with pytest.raises(UserError, match="does not exist"):
        data.Latents(path, "abc", **FORM)
    make_latents(path)
    with pytest.raises(UserError, match=r"another tokenizer or other data; delete .*latents.json and run"):
        data.Latents(path, "other", **FORM)
    for change in ({"latent_mean": [0]}, {"latent_std": "abc"}, {"latent_mean": None}):
        seal.write_text(json.dumps(SEAL | change))
        with pytest.raises(UserError, match=r"latents.npy is truncated or damaged; delete .*latents.json and run"):
            data.Latents(path, "abc", **FORM)
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(UserError, match="not whole"):
        data.Latents(path, "abc", **FORM)
    path.write_bytes(whole)
    for text in (seal.read_text()[:-5], "[]", ""):
        seal.write_text(text)
        with pytest.raises(UserError, match=r"latents.json is damaged"):
            data.Latents(path, "abc", **FORM)
    seal.unlink()  # it is written last
    with pytest.raises(UserError, match="not whole"):
        data.Latents(path, "abc", **FORM)


@pytest.mark.parametrize("text", [b"", b'{"a": 1', b"[]", b'{"a": "\xfc"}', b'{"a":' * 100_000], ids=range(5))
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "result.json").write_bytes(text)
    with pytest.raises(UserError, match=r"result.json is damaged, it holds no JSON object"):
        read_json(tmp_path / "result.json")


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_checkpoints_refuse_pickled_code_truncation_and_absence(tmp_path):
    path = tmp_path / "x.pt"
    save_checkpoint({"a": torch.arange(3)}, path)
    assert load_checkpoint(path)["a"].tolist() == [0, 1, 2]
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="truncated"):
        load_checkpoint(path)
    for text in ("", "hello", "<!DOCTYPE html><html>"):
        path.write_text(text)
        with pytest.raises(UserError, match="not a PyTorch file"):
            load_checkpoint(path)
    torch.save({"a": Evil()}, path)
    with pytest.raises(UserError, match="pickled code"):
        load_checkpoint(path)
    assert not os.path.exists("pwned")
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(tmp_path / "no.pt")


def test_a_checkpoint_must_have_its_keys_with_their_types(tmp_path):
    path, whole = tmp_path / "x.pt", {"stage": "sit", "step": 3, "of_steps": 4, "config": {}, "classes": [], "ema": {}}
    save_checkpoint(whole, path)
    assert load_checkpoint(path, CHECKPOINT) == whole
    lacking = [{name: value for name, value in whole.items() if name != key} for key in whole]
    for content in (*lacking, whole | {"step": "3"}, whole | {"config": []}):
        save_checkpoint(content, path)
        with pytest.raises(UserError, match=r"x.pt is not a checkpoint of train.py, or not whole"):
            load_checkpoint(path, CHECKPOINT)
    torch.save([1], path)
    with pytest.raises(UserError, match=r"x.pt is not a dict of tensors"):
        load_checkpoint(path)


def test_temporary_files_have_names_of_their_own_in_folders_made_for_them(tmp_path):
    path = tmp_path / "new" / "folder" / "x.txt"
    with replacing(path) as first, replacing(path) as second:
        assert first != second and first.suffix == second.suffix == ".tmp" and first.parent == second.parent == path.parent
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and os.listdir(path.parent) == ["x.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("training", [False, True])
def test_signals_end_a_command_in_one_line_and_leave_no_temporary_file(tmp_path, capsys, number, training):
    """In training the first one only asks it to stop; a second Ctrl-C ends it."""

    def main(_):
        with replacing(tmp_path / "x") as temporary, stop_signals() if training else nullcontext() as received:
            temporary.write_text("half")
            signal.raise_signal(number)
            assert training and received == [number]
            signal.raise_signal(signal.SIGINT)

    previous = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with pytest.raises(SystemExit) as stop:
        command_line(main)
    signal.signal(signal.SIGTERM, previous)
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n" and not os.listdir(tmp_path)


def test_paths_that_the_terminal_cannot_show_are_shown_somehow(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    command_line(lambda _: print("wrote M\xfcnchen.png", flush=True))
    assert sys.stdout.buffer.getvalue().strip() == b"wrote M\\xfcnchen.png"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="file size limits are a Unix thing")
def test_a_full_disk_keeps_the_previous_file(tmp_path):
    """A limit on the size of files fails the write in the middle, as a full disk does."""
    path = tmp_path / "x.pt"
    save_checkpoint({"step": 1}, path)
    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from plumbing.run import command_line, save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
sys.argv = ["x"]
command_line(lambda _: save_checkpoint({{"big": torch.zeros(1 << 20)}}, {str(path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and "cannot write" in done.stderr and "the previous one is kept" in done.stderr
    assert "Traceback" not in done.stderr
    assert load_checkpoint(path) == {"step": 1} and os.listdir(tmp_path) == ["x.pt"]


def test_grid_picture(tmp_path):
    rows = torch.zeros(2, 3, 3, 32, 32, dtype=torch.uint8)
    rows[1, 2, 0] = 255
    data.write_image(rows, tmp_path / "new" / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "new" / "x.png"))
    assert pixels.shape == (128, 192, 3) and (pixels[64:, 128:] == [255, 0, 0]).all() and not pixels[:64].any()
