import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from reference import ROOT, make_folder

import data

CPU = data.Processes(0, 1, torch.device("cpu"))


def noise_image(width, height, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_crop_is_central_and_square():
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, 28:68] = 255  # halved twice: 7 to 17 of 25 columns
    crop = np.asarray(data.center_crop(Image.fromarray(pixels), 10))
    assert crop.shape == (10, 10, 3) and crop.min() == 255
    assert data.center_crop(noise_image(17, 90), 64).size == (64, 64)


@pytest.mark.parametrize(
    "mode, suffix",
    [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("LA", "png")],
)
def test_every_mode_becomes_rgb(tmp_path, mode, suffix):
    noise_image(30, 20, mode).save(tmp_path / f"x.{suffix}")
    image, label, bad = data.ImageFolder(tmp_path, 16)[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 16, 16) and (label, bad) == (0, -1)


def test_sixteen_bits_keep_their_range(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)).save(tmp_path / "x.png")
    image = data.ImageFolder(tmp_path, 64)[0][0]
    assert image.min() == 0 and image.max() == 255 and abs(image.float().mean() - 127.5) < 2


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
    with pytest.raises(data.UserError, match=named):
        data.ImageFolder(tmp_path / "images", 8)


def test_bad_files_are_named_replaced_and_counted(tmp_path, capsys):
    make_folder(tmp_path, 0, 300, size=8)
    (tmp_path / "1.png").write_text("not an image")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    folder = data.ImageFolder(tmp_path, 8)
    index = folder.paths.index(str(tmp_path / "1.png"))
    image, _, bad = folder[index]
    assert bad == index and torch.equal(image, folder[index + 1][0])
    counter = data.BadFiles(folder)
    for batch in data.loader(folder, [list(range(i, i + 50)) for i in range(0, 300, 50)] * 2, 0):
        counter.note(batch[2])
    assert counter.check(CPU) == 2  # of 300: under 1 %
    warned = capsys.readouterr().err
    assert warned.count("1.png") == 1 and warned.count("2.png") == 1
    counter.seen |= {5, 6}
    with pytest.raises(data.UserError, match="more than 1 %"):
        counter.check(CPU)


def test_shapes_are_deterministic_labelled_and_balanced():
    shapes = data.Shapes(32)
    image, label, foreground = shapes.draw(7)
    assert torch.equal(image, data.Shapes(32)[7][0]) and label == shapes[7][1]
    inside, outside = image[:, foreground].float().mean(), image[:, ~foreground].float().mean()
    assert inside > 1.5 * outside and 0.03 < foreground.float().mean() < 0.5
    counts = np.bincount([shapes.draw(i)[1] for i in range(1000)], minlength=10)
    assert len(counts) == 10 and counts.min() > 60


def test_split_is_disjoint_and_covers_everything():
    train, held = data.split(100, 256)
    assert len(held) == 10 and sorted([*train, *held]) == list(range(100))
    assert all(len(part) == 7 for part in data.split(7, 4))  # too few to hold any out


def test_batches_cover_each_epoch_once_and_do_not_depend_on_the_process_count():
    whole = [data.batch_indices(10, 4, 0, step, slice(0, 4)) for step in range(5)]
    assert sorted(sum(whole, [])[:10]) == sorted(sum(whole, [])[10:]) == list(range(10))
    halves = [data.batch_indices(10, 4, 0, step, rows) for step in range(5) for rows in (slice(0, 2), slice(2, 4))]
    assert sum(halves, []) == sum(whole, [])
    sampler = iter(data.BatchSampler(np.arange(100, 110), 4, 0, 3, slice(0, 4)))
    assert next(sampler) == [100 + i for i in whole[3]]


def test_uint8_and_float_are_inverse():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_uint8(data.to_float(values)), values)
    assert data.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def make_cache(path, stamp="abc"):
    header = {"stamp": stamp, "count": 3, "shape": [4, 2], "latent_mean": [0, 0], "latent_std": [1, 1]}
    data.LatentCache.seal(path, header)
    mean, std, labels = torch.randn(3, 2, 4, 2), torch.rand(3, 2, 4, 2), torch.tensor([5, 6, 7])
    data.LatentCache.write(path, 1, mean[1:], std[1:], labels[1:])
    data.LatentCache.write(path, 0, mean[:1], std[:1], labels[:1])
    return mean, std, labels


def test_latent_cache_round_trip(tmp_path):
    mean, std, _ = make_cache(tmp_path / "c")
    cache = data.LatentCache(tmp_path / "c", "abc")
    got = cache.batch([2, 0])
    torch.testing.assert_close(got[0], mean[[2, 0]], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(got[1], std[[2, 0]], atol=2e-3, rtol=1e-3)
    assert len(cache) == 3 and got[2].tolist() == [7, 5]


def test_latent_cache_refuses_stale_truncated_missing_and_foreign_files(tmp_path):
    make_cache(tmp_path / "c")
    with pytest.raises(data.UserError, match="another tokenizer"):
        data.LatentCache(tmp_path / "c", "other")
    os.truncate(tmp_path / "c", data.LatentCache.HEADER + 10)
    with pytest.raises(data.UserError, match="truncated"):
        data.LatentCache(tmp_path / "c", "abc")
    with pytest.raises(data.UserError, match="does not exist"):
        data.LatentCache(tmp_path / "nothing", "abc")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(data.UserError, match="not a latent cache"):
        data.LatentCache(tmp_path / "text", "abc")


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_checkpoints_refuse_pickled_code_truncation_and_absence(tmp_path):
    path = tmp_path / "x.pt"
    data.save_checkpoint({"a": torch.arange(3)}, path)
    assert data.load_checkpoint(path)["a"].tolist() == [0, 1, 2]
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(data.UserError, match="truncated"):
        data.load_checkpoint(path)
    for text in ("", "hello", "<!DOCTYPE html><html>"):
        path.write_text(text)
        with pytest.raises(data.UserError, match="not a PyTorch file"):
            data.load_checkpoint(path)
    torch.save({"a": Evil()}, path)
    with pytest.raises(data.UserError, match="pickled code"):
        data.load_checkpoint(path)
    assert not os.path.exists("pwned")
    with pytest.raises(data.UserError, match="does not exist"):
        data.load_checkpoint(tmp_path / "no.pt")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="file size limits are a Unix thing")
def test_a_full_disk_keeps_the_previous_file(tmp_path):
    """A limit on the size of files fails the write in the middle, as a full disk does."""
    path = tmp_path / "x.pt"
    data.save_checkpoint({"step": 1}, path)
    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import data, torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
sys.argv = ["x"]
data.command_line(lambda _: data.save_checkpoint({{"big": torch.zeros(1 << 20)}}, {str(path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and "cannot write" in done.stderr and "the previous one is kept" in done.stderr
    assert "Traceback" not in done.stderr
    assert data.load_checkpoint(path) == {"step": 1} and os.listdir(tmp_path) == ["x.pt"]


def test_grid_picture(tmp_path):
    rows = torch.zeros(2, 3, 3, 32, 32, dtype=torch.uint8)
    rows[1, 2, 0] = 255
    data.write_image(rows, tmp_path / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "x.png"))
    assert pixels.shape == (128, 192, 3) and (pixels[64:, 128:] == [255, 0, 0]).all() and not pixels[:64].any()
