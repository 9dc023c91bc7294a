"""Images, folders, splits, batches, shapes, files, signals, random numbers and the log (utils/)."""

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

from utils.checkpoint import REQUIRED_KEYS, read_checkpoint
from utils.console import (
    LocalError,
    UserError,
    as_user_error,
    catch_signals,
    run_main,
    stop_signals,
)
from utils.data import ImageFolder, batch_indices, image_loader, read_batch, train_val_split
from utils.distributed import Distributed
from utils.files import atomic_write, load_torch, read_json, remove_temporary_files, save_torch
from utils.images import center_crop, list_images, read_image, to_float, to_uint8, write_grid
from utils.metric_log import MetricLog
from utils.random import BatchRNG
from utils.shapes import Shapes

CPU = torch.device("cpu")
ONE_PROCESS = Distributed(0, 1, CPU)


def noise_image(width, height, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


# --------------------------------------------------------------------------------------------------
# Images.


def test_crop_is_central_and_square():
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, 28:68] = 255  # halved twice: columns 7 to 17 of 25
    crop = np.asarray(center_crop(Image.fromarray(pixels), 10))
    assert crop.shape == (10, 10, 3)
    assert crop.min() == 255
    assert center_crop(noise_image(17, 90), 64).size == (64, 64)


def test_large_jpegs_are_decoded_small_and_look_the_same(tmp_path):
    """They are from four times the crop on; below that the pixels are those of the whole file."""
    rows, columns = np.mgrid[:800, :1000]
    waves = [np.sin(rows / 90), np.sin(columns / 70), np.sin((rows + columns) / 80)]
    pixels = (127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as image:
        whole = image.convert("RGB")
    for size, is_exact in ((100, False), (250, True)):
        crop = np.asarray(read_image(tmp_path / "x.jpg", size)).astype(int)
        difference = np.abs(crop - np.asarray(center_crop(whole, size)))
        assert (difference.max() == 0) == is_exact
        assert difference.max() <= 3


@pytest.mark.parametrize(
    "mode, suffix",
    [
        ("RGB", "jpg"),
        ("L", "jpg"),
        ("CMYK", "jpg"),
        ("RGBA", "png"),
        ("P", "png"),
        ("1", "png"),
        ("LA", "png"),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, suffix):
    noise_image(30, 20, mode).save(tmp_path / f"x.{suffix}")
    image, label = ImageFolder(tmp_path, 16)[0]
    assert image.dtype == torch.uint8
    assert image.shape == (3, 16, 16)
    assert label == 0


def palette_image():
    """The left half has the first color, which can be made transparent, the right half red."""
    image = Image.new("P", (20, 20), 0)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.paste(1, (10, 0, 20, 20))
    return image


def half_and_half(mode, left, right):
    image = Image.new(mode, (20, 20), left)
    image.paste(right, (10, 0, 20, 20))
    return image


@pytest.mark.parametrize(
    "image, save_options, right",
    [
        (half_and_half("RGBA", (0, 0, 255, 0), (255, 0, 0, 255)), {}, (255, 0, 0)),
        (half_and_half("LA", (0, 0), (60, 255)), {}, (60, 60, 60)),
        (palette_image(), {"transparency": 0}, (255, 0, 0)),
        (palette_image(), {"transparency": b"\x00\xff"}, (255, 0, 0)),
        (half_and_half("L", 7, 60), {"transparency": 7}, (60, 60, 60)),
        (
            half_and_half("RGB", (0, 0, 255), (255, 0, 0)),
            {"transparency": (0, 0, 255)},
            (255, 0, 0),
        ),
    ],
    ids=["RGBA", "LA", "palette index", "palette alphas", "gray value", "color value"],
)
def test_transparent_pixels_become_white(tmp_path, image, save_options, right):
    image.save(tmp_path / "x.png", **save_options)
    pixels = np.asarray(read_image(tmp_path / "x.png"))
    assert (pixels[:, :10] == 255).all()
    assert (pixels[:, 10:] == right).all()


def test_nearly_transparent_red_is_nearly_white(tmp_path):
    """A plain conversion to RGB drops the alpha channel, and would show pure red."""
    Image.new("RGBA", (20, 20), (255, 0, 0, 1)).save(tmp_path / "x.png")
    pixels = np.asarray(read_image(tmp_path / "x.png", 8))
    assert (pixels == (255, 254, 254)).all()


def test_sixteen_bits_keep_their_range(tmp_path):
    pixels = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = ImageFolder(tmp_path, 64)[0][0]
    assert image.min() == 0
    assert image.max() == 255
    assert abs(image.float().mean() - 127.5) < 2


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(tmp_path, mode):
    Image.new(mode, (8, 8), 300).save(tmp_path / "x.tif")
    sentence = f"x.tif is not a readable image: its pixels are of type {mode}; only 8 and 16 bits"
    with pytest.raises(OSError, match=sentence):
        read_image(tmp_path / "x.tif")


def image_with_white_top():
    image = Image.new("RGB", (20, 20), "black")
    image.paste("white", (0, 0, 20, 5))
    return image


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    image_with_white_top().save(tmp_path / "x.jpg", exif=exif, quality=100)
    shown = ImageFolder(tmp_path, 20)[0][0]
    assert shown[:, :4].float().mean() < 20
    assert shown[:, -4:].float().mean() > 235


@pytest.mark.parametrize("exif", [b"Exif\x00\x00neither MM nor II", b"Exif\x00\x00MM\x00*", b"?"])
def test_an_image_with_damaged_exif_data_is_read_as_it_is_stored(tmp_path, exif):
    image = image_with_white_top()
    image.save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "x.png"), image)
    assert torch.equal(ImageFolder(tmp_path, 20).read(0)[0][:, 0], torch.full((3, 20), 255))


def test_an_image_too_narrow_to_be_cropped_is_unreadable(tmp_path):
    Image.new("L", (1, 65_535)).save(tmp_path / "x.png")
    with pytest.raises(OSError, match=r"x.png is not a readable image: it is too long and narrow"):
        ImageFolder(tmp_path, 256).read(0)
    assert ImageFolder(tmp_path, 4).read(0)[0].shape == (3, 4, 4)


def test_uint8_and_float_are_inverse():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_grid_picture(tmp_path):
    rows = torch.zeros(2, 3, 3, 32, 32, dtype=torch.uint8)
    rows[1, 2, 0] = 255
    write_grid(rows, tmp_path / "new" / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "new" / "x.png"))
    assert pixels.shape == (128, 192, 3)
    assert (pixels[64:, 128:] == [255, 0, 0]).all()
    assert not pixels[:64].any()


# --------------------------------------------------------------------------------------------------
# Folders of images.


def test_classes_are_the_sorted_folders_and_flat_has_none(tmp_path):
    folder = ImageFolder(make_folder(tmp_path / "a", 3, 2), 8)
    assert folder.classes == ["class0", "class1", "class2"]
    assert [folder[i][1] for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert ImageFolder(make_folder(tmp_path / "b", 0, 2), 8).classes == []


@pytest.mark.parametrize("name", ["x.jfif", "x.jpe", "x.avif", "x.jp2", "x.webp", "X.JPG"])
def test_images_of_every_suffix_are_found(tmp_path, name):
    format_name = Image.registered_extensions().get(Path(name).suffix.lower())
    if format_name not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {name}")
    Image.new("RGB", (20, 20), "white").save(tmp_path / name, format=format_name)
    folder = ImageFolder(tmp_path, 8)
    assert folder.paths == [str(tmp_path / name)]
    assert not folder.skipped
    assert folder.read(0)[0].float().mean() > 250


def make_folder_with_text_only(path):
    path.mkdir()
    (path / "notes.txt").write_text("hello")


def make_folder_with_classes_and_loose_images(path):
    make_folder(path, 2, 1)
    make_folder(path, 0, 1)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "no images"),
        (make_folder_with_text_only, "no images"),
        (make_folder_with_classes_and_loose_images, "loose images"),
    ],
)
def test_a_folder_without_use_is_refused(tmp_path, make, sentence):
    make(tmp_path / "images")
    with pytest.raises(UserError, match=sentence):
        ImageFolder(tmp_path / "images", 8)


@pytest.mark.parametrize(
    "names", [("train", "val"), ("Train", "Val"), ("train", "validation"), ("train", "val", "test")]
)
def test_a_folder_of_splits_is_refused_with_the_folder_to_use(tmp_path, names):
    for name in names:
        make_folder(tmp_path / name, 2, 1)
    sentence = (
        rf"holds the splits .*, not classes; use --data {re.escape(str(tmp_path / names[0]))}$"
    )
    with pytest.raises(UserError, match=sentence):
        ImageFolder(tmp_path, 8)
    assert ImageFolder(tmp_path / names[0], 8).classes == ["class0", "class1"]


def test_trains_among_other_things_are_a_class(tmp_path):
    for name in ("boat", "train"):
        make_folder(tmp_path / name, 0, 1)
    assert ImageFolder(tmp_path, 8).classes == ["boat", "train"]


@pytest.mark.parametrize("num_classes", [0, 2])
def test_pictures_of_a_run_are_no_data(tmp_path, num_classes):
    before = ImageFolder(make_folder(tmp_path, num_classes, 3), 8)
    for out in (tmp_path / "out", tmp_path / "runs" / "a"):
        make_folder(out, 0, 1)
        noise_image(30, 20).save(out / "masks.png")
        (out / "log.jsonl").touch()
    after = ImageFolder(tmp_path, 8)
    assert after.paths == before.paths
    assert after.classes == before.classes
    assert after.labels == before.labels
    assert after.fingerprint == before.fingerprint
    assert after.describe() == before.describe()


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "@eaDir"])
def test_folders_that_programs_make_are_passed_over(tmp_path, name):
    """Jupyter and network drives leave copies of images in such folders."""
    before = ImageFolder(make_folder(tmp_path, 2, 3), 8)
    for parent in (tmp_path, tmp_path / "class0", make_folder(tmp_path / "class0" / "deep", 0, 1)):
        make_folder(parent / name / "inside", 0, 2)
        make_folder(parent / name, 0, 2)
    after = ImageFolder(tmp_path, 8)
    assert after.classes == ["class0", "class1"]
    assert after.paths == sorted([*before.paths, str(tmp_path / "class0" / "deep" / "0.png")])
    assert not after.skipped


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in folders are a Unix thing")
def test_pipes_and_links_in_a_circle_are_passed_over(tmp_path):
    root = make_folder(tmp_path / "images", 2, 3)
    a = root / "class0"
    b = root / "class1"
    whole = ImageFolder(root, 8)
    for folder in (a, root):
        os.mkfifo(folder / "pipe.jpg")
        (folder / "self.jpg").symlink_to("self.jpg")
    (a / "up").symlink_to(a)
    assert ImageFolder(root, 8).paths == whole.paths
    (a / "across").symlink_to(b)
    (b / "across").symlink_to(a)
    labels = ImageFolder(root, 8).labels
    # Each class has the images of the other one, too, through a link, and each image once.
    assert [labels.count(label) for label in (0, 1)] == [6, 6]
    (a / "parent").symlink_to(tmp_path)
    paths, _ = list_images(tmp_path, recursive=True)
    assert len(paths) == 6


def test_what_was_found_is_described_with_the_files_that_were_passed_over(tmp_path):
    make_folder(tmp_path / "flat", 0, 3)
    assert ImageFolder(tmp_path / "flat", 8).describe() == "3 images"

    root = make_folder(tmp_path / "classes", 2, 3)
    make_folder(root / "class1" / "deep", 0, 1)
    counts = "7 images in 2 classes, 3 to 4 in each"
    assert ImageFolder(root, 8).describe() == counts
    for name in ("class0/a.heic", "class0/b.HEIC", "class1/deep/c.heic", "notes.txt", "LICENSE"):
        (root / name).touch()
    (root / "class0" / ".DS_Store").touch()
    folder = ImageFolder(root, 8)
    assert folder.skipped == {".heic": 3, ".txt": 1, "LICENSE": 1}
    start, kinds = folder.describe().split("; skipped other files: ")
    assert start == counts
    assert kinds.split(", ")[0] == "3 .heic"
    assert sorted(kinds.split(", ")) == ["1 .txt", "1 LICENSE", "3 .heic"]


def test_unreadable_files_are_named_once_and_replaced_until_they_are_over_one_percent(
    tmp_path, capsys
):
    make_folder(tmp_path, 0, 300, size=8)
    folder = ImageFolder(tmp_path, 8)
    bad = [298, 299, 7]  # after the last comes the first

    def damage(index):
        path = Path(folder.paths[index])
        path.write_bytes(path.read_bytes()[:99] if index % 2 else b"not an image")

    for index in bad:
        damage(index)
        sentence = re.escape(f"{folder.paths[index]} is not a readable image")
        with pytest.raises(OSError, match=sentence):
            folder.read(index)
    # `read` only raises the error.
    assert not folder.unreadable
    assert not capsys.readouterr().err
    assert torch.equal(folder[298][0], folder.read(0)[0])
    assert torch.equal(folder[7][0], folder.read(8)[0])
    batches = [list(range(i, i + 50)) for i in range(0, 300, 50)]
    assert sum(len(images) for images, _ in image_loader(folder, batches * 2, 0)) == 600
    assert folder.unreadable == set(bad)  # 3 of 300 are not more than 1 %
    warned = capsys.readouterr().err
    for index in bad:
        assert warned.count(f"warning: {folder.paths[index]}") == 1
    assert warned.count("takes its place") == 3
    damage(100)
    sentence = rf"more than 1 % of the 300 images cannot be read.*{re.escape(folder.paths[100])}"
    with pytest.raises(OSError, match=sentence):
        list(image_loader(folder, batches, 0))


def test_a_thousand_unreadable_files_in_a_row_are_replaced(tmp_path, capsys):
    make_folder(tmp_path, 0, 2, size=8)
    (tmp_path / "0.png").write_text("not an image")
    folder = ImageFolder(tmp_path, 8)
    bad, good = folder.paths
    folder.paths = [bad] * 1_500 + [good] * 150_000
    folder.labels = range(len(folder.paths))
    assert folder[0][1] == 1_500
    assert capsys.readouterr().err.count("takes its place") == 1_500


@pytest.mark.parametrize("count, bad", [(50, 1), (2, 1), (1, 0)])
def test_a_small_folder_bears_one_unreadable_image_if_there_is_another(tmp_path, count, bad):
    make_folder(tmp_path, 0, count, size=8)
    folder = ImageFolder(tmp_path, 8)
    for index in range(bad + 1):
        (tmp_path / f"{index}.png").write_text("not an image")
        if index < bad:
            assert all(len(folder[i]) == 2 for i in range(count))
    with pytest.raises(OSError, match="not a readable image"):
        [folder[i] for i in range(count)]


def test_a_batch_is_read_in_order_and_an_unreadable_file_is_an_error(tmp_path):
    folder = ImageFolder(make_folder(tmp_path, 3, 2), 8)
    images, labels = read_batch(folder, np.array([5, 0, 2]))
    assert images.dtype == torch.uint8
    assert labels.tolist() == [2, 0, 1]
    for image, index in zip(images, (5, 0, 2)):
        assert torch.equal(image, folder.read(index)[0])
    Path(folder.paths[0]).write_text("not an image")
    with pytest.raises(OSError, match="not a readable image"):
        read_batch(folder, [5, 0])
    images, labels = read_batch(folder, [5, 0], replace=True)
    assert torch.equal(images[1], folder.read(1)[0])
    assert labels.tolist() == [2, 0]


def test_the_fingerprint_of_a_folder_depends_on_its_names_and_sizes_and_not_on_its_place(tmp_path):
    root = make_folder(tmp_path / "a", 2, 3)
    fingerprint = ImageFolder(root, 8).fingerprint
    assert fingerprint == ImageFolder(root, 16).fingerprint
    assert len(fingerprint) == 64
    root = root.rename(tmp_path / "elsewhere")
    assert ImageFolder(root, 8).fingerprint == fingerprint
    file = root / "class0" / "1.png"
    content = file.read_bytes()
    noise_image(30, 20).save(file)  # other content, another size
    assert ImageFolder(root, 8).fingerprint != fingerprint
    file.write_bytes(content)
    assert ImageFolder(root, 8).fingerprint == fingerprint
    for other in (file.with_name("9.png"), root / "class1" / "9.png"):
        file.rename(other)
        assert ImageFolder(root, 8).fingerprint != fingerprint
        other.rename(file)
    file.unlink()
    assert ImageFolder(root, 8).fingerprint != fingerprint
    assert fingerprint != Shapes(8).fingerprint


def test_shapes_are_deterministic_labeled_and_balanced():
    shapes = Shapes(32)
    image, label = shapes[7]
    for other_image, other_label in (Shapes(32)[7], shapes.read(7)):
        assert torch.equal(image, other_image)
        assert label == other_label
    # Of 255: the colors of a shape begin at 0.35, those of the background end at 0.3.
    shape = image.amin(0) >= 89
    background = image.amax(0) <= 77
    assert image[:, shape].float().mean() > 1.5 * image[:, ~shape].float().mean()
    assert 0.03 < shape.float().mean() < 0.5
    assert (shape | background).float().mean() > 0.8  # the rest is the antialiased edge
    labels = [shapes[i][1] for i in range(1000)]
    counts = np.bincount(labels, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 60
    assert shapes.labels[:1000] == labels
    assert len(shapes.labels) == len(shapes)


# --------------------------------------------------------------------------------------------------
# Splits and order.


def test_split_is_disjoint_and_covers_everything():
    for count, num_val in ((100, 10), (20, 2)):
        train, val = train_val_split([0] * count, 256)
        assert len(val) == num_val
        assert sorted([*train, *val]) == list(range(count))
    # They come from all over the data set: of 4 classes as many each, the last image among them.
    labels = np.repeat(range(4), 25)
    _, val = train_val_split(labels.tolist(), 8)
    assert np.bincount(labels[val]).tolist() == [2] * 4 and val[-1] == 99
    # Where at most one image could be held out, all serve as both.
    for count, num_val in ((7, 4), (19, 256), (100, 1)):
        train, val = train_val_split([0] * count, num_val)
        assert list(train) == list(val) == list(range(count))


@pytest.mark.parametrize(
    "sizes",
    [
        [1, 98, 1],  # a class of one image is the first by name, and another one the last
        [1, 1, 40, 1, 1],
        [50, 50],
        [2] * 30,
        [1] * 30 + [10],
    ],
)
def test_split_never_holds_out_all_images_of_a_class(sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes).tolist()
    train, val = train_val_split(labels, 256)
    assert set(np.take(labels, train)) == set(labels)
    assert not set(train) & set(val)
    assert sorted([*train, *val]) == list(range(len(labels)))
    assert len(val) == len(labels) // 10


def test_split_of_classes_of_one_image_each_holds_out_none():
    train, val = train_val_split(list(range(100)), 256)
    assert list(train) == list(val) == list(range(100))


def test_batches_cover_each_epoch_once_and_do_not_depend_on_the_process_count():
    def batches(count, first_step, *slices, indices=range(10)):
        return list(islice(batch_indices(indices, 4, 0, first_step, list(slices)), count))

    whole = batches(5, 0, slice(0, 4))
    first_epoch = sum(whole, [])[:10]
    second_epoch = sum(whole, [])[10:]
    assert sorted(first_epoch) == sorted(second_epoch) == list(range(10))
    assert first_epoch != list(range(10))
    assert first_epoch != second_epoch
    assert next(batch_indices(range(10), 4, 1, 0, [slice(0, 4)])) != whole[0]  # another seed
    micro_batches = batches(10, 0, slice(0, 2), slice(2, 4))
    assert sum(micro_batches, []) == sum(whole, [])
    resumed = batches(2, 3, slice(0, 4), indices=np.arange(100, 110))
    assert resumed == [[100 + i for i in batch] for batch in whole[3:]]
    of_two_processes = [batches(5, 0, rows) for rows in (slice(0, 2), slice(2, 4))]
    assert [first + second for first, second in zip(*of_two_processes)] == whole


# --------------------------------------------------------------------------------------------------
# Random numbers of a step, and the log.


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_row_gets_the_same_random_numbers_however_the_batch_is_divided(size):
    def draw(rows, seed=3):
        rng = BatchRNG(seed, 8, rows, CPU)
        drawn = [rng.rand(), rng.randn(2, 3), rng.rand(5)]
        return drawn, [rng.shared_rand(), rng.shared_rand()]

    whole, shared = draw(slice(0, 8))
    assert [tuple(part.shape) for part in whole] == [(8,), (8, 2, 3), (8, 5)]
    divided = [draw(slice(start, start + size)) for start in range(0, 8, size)]
    for i, expected in enumerate(whole):
        assert torch.equal(torch.cat([drawn[i] for drawn, _ in divided]), expected)
        assert len(expected.flatten(1 - expected.ndim).unique(dim=0)) == 8  # rows differ
    for _, shared_by_part in divided:
        assert shared_by_part == shared
    assert all(type(value) is float and 0 <= value < 1 for value in shared)
    assert shared[0] != shared[1]
    other, other_shared = draw(slice(0, 8), seed=4)
    assert not torch.equal(other[0], whole[0])
    assert other_shared != shared


def test_shared_random_numbers_do_not_change_those_of_the_rows():
    plain = BatchRNG(0, 4, slice(0, 4), CPU)
    with_shared = BatchRNG(0, 4, slice(0, 4), CPU)
    with_shared.shared_rand()
    assert torch.equal(plain.rand(), with_shared.rand())


def test_the_log_leaves_values_that_are_not_finite_out_of_its_averages(tmp_path):
    log = MetricLog(tmp_path / "log.jsonl", "tokenizer", ONE_PROCESS)
    log.add({"loss": torch.tensor(1.0), "grad_norm": torch.tensor(float("inf"))})
    log.add({"loss": torch.tensor(float("nan")), "grad_norm": torch.tensor(float("nan"))})
    log.add({"loss": torch.tensor(4.0), "mean": torch.tensor([1.0, float("-inf")])})
    log.add({"mean": torch.tensor([3.0, 7.0])})
    averages = log.flush()
    assert averages["loss"] == 2.5
    assert averages["mean"].tolist() == [2, 7]
    assert averages["grad_norm"].isnan()

    # A value that was never finite becomes null, and the others of the line stay.
    log.write(3, {name: averages[name].item() for name in ("loss", "grad_norm")})
    log.add({"loss": torch.tensor(9.0)})
    log.write(4, {"loss": log.flush()["loss"].item(), "lr": float("inf"), "held_out": True})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for line in lines:
        assert isinstance(line.pop("time"), float)
    first, second = lines
    assert first == {"stage": "tokenizer", "step": 3, "loss": 2.5, "grad_norm": None}
    assert second == {"stage": "tokenizer", "step": 4, "loss": 9, "lr": None, "held_out": True}


# --------------------------------------------------------------------------------------------------
# Files.


@pytest.mark.parametrize(
    "content", [b"", b'{"a": 1', b"[]", b'{"a": "\xfc"}', b'{"a":' * 100_000], ids=range(5)
)
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(UserError, match=r"result.json is damaged, it holds no JSON object"):
        read_json(tmp_path / "result.json")


class Evil:
    """Unpickling it runs a command."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_pytorch_files_with_pickled_code_truncated_and_missing_ones_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    save_torch({"a": torch.arange(3)}, path)
    assert load_torch(path)["a"].tolist() == [0, 1, 2]
    assert load_torch(path, mmap=True)["a"].tolist() == [0, 1, 2]
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="truncated"):
        load_torch(path)
    for text in ("", "hello", "<!DOCTYPE html><html>"):
        path.write_text(text)
        with pytest.raises(UserError, match="not a PyTorch file"):
            load_torch(path)
    torch.save({"a": Evil()}, path)
    with pytest.raises(UserError, match="pickled code"):
        load_torch(path)
    assert not os.path.exists("pwned")
    with pytest.raises(UserError, match="does not exist"):
        load_torch(tmp_path / "no.pt")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_torch(tmp_path)


def test_a_full_memory_is_not_called_a_damaged_file(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(RuntimeError, match="allocate"):
        load_torch(tmp_path / "x.pt")
    with pytest.raises(RuntimeError, match="allocate"), as_user_error("x.pt is damaged: "):
        fail()


def test_an_error_of_torch_save_that_is_not_of_writing_is_passed_on(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError(text)

    monkeypatch.setattr(torch, "save", fail)
    text = "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"
    with pytest.raises(UserError, match="the disk is probably full"):
        save_torch({}, tmp_path / "x.pt")
    text = "CUDA error: uncorrectable ECC error encountered"
    with pytest.raises(RuntimeError, match="ECC"):
        save_torch({}, tmp_path / "x.pt")
    assert not os.listdir(tmp_path)


def test_a_checkpoint_must_have_its_keys_with_their_types(tmp_path):
    path = tmp_path / "x.pt"
    whole = {
        "stage": "generator",
        "step": 3,
        "total_steps": 4,
        "config": {},
        "classes": [],
        "identity": {},
        "ema": {},
    }
    assert whole.keys() == REQUIRED_KEYS.keys()
    save_torch(whole, path)
    assert read_checkpoint(path) == whole
    lacking = [{name: value for name, value in whole.items() if name != key} for key in whole]
    for content in (*lacking, whole | {"step": "3"}, whole | {"config": []}):
        save_torch(content, path)
        with pytest.raises(UserError, match=r"x.pt is not a whole checkpoint of train.py"):
            read_checkpoint(path)
    torch.save([1], path)
    with pytest.raises(UserError, match=r"x.pt does not hold a dict of tensors"):
        read_checkpoint(path)


def test_temporary_files_have_names_of_their_own_in_folders_made_for_them(tmp_path):
    path = tmp_path / "new" / "folder" / "x.txt"
    with atomic_write(path) as first, atomic_write(path) as second:
        assert first != second
        assert first.suffix == second.suffix == ".tmp"
        assert first.parent == second.parent == path.parent
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert os.listdir(path.parent) == ["x.txt"]


def test_what_a_killed_process_left_behind_can_be_removed(tmp_path):
    (tmp_path / "x.pt").write_text("whole")
    with atomic_write(tmp_path / "x.pt") as temporary:
        temporary.write_text("half")
        left_behind = temporary.with_name(temporary.name.replace("x.pt", "y.pt"))
        left_behind.write_text("half")
    remove_temporary_files(tmp_path)
    assert os.listdir(tmp_path) == ["x.pt"]


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "out").write_text("a file")
    sentence = rf"cannot write {re.escape(str(tmp_path / 'out' / 'x.txt'))}"
    with pytest.raises(UserError, match=sentence), atomic_write(tmp_path / "out" / "x.txt"):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="file size limits are a Unix thing")
def test_a_full_disk_keeps_the_previous_file(tmp_path):
    """A limit on the size of files fails the write in the middle, as a full disk does."""
    path = tmp_path / "x.pt"
    save_torch({"step": 1}, path)
    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from utils.console import run_main
from utils.files import save_torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
sys.argv = ["x"]
run_main(lambda _: save_torch({{"big": torch.zeros(1 << 20)}}, {str(path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot write" in done.stderr
    assert "the previous file is kept" in done.stderr
    assert "Traceback" not in done.stderr
    assert load_torch(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["x.pt"]


# --------------------------------------------------------------------------------------------------
# Signals and the terminal.


@pytest.mark.parametrize("number", stop_signals())
@pytest.mark.parametrize("is_training", [False, True])
def test_signals_end_a_command_in_one_line_and_leave_no_temporary_file(
    tmp_path, capsys, number, is_training
):
    """In training the first one only asks it to stop; a second Ctrl-C ends it."""

    def main(_):
        with (
            atomic_write(tmp_path / "x") as temporary,
            catch_signals() if is_training else nullcontext() as received,
        ):
            temporary.write_text("half")
            signal.raise_signal(number)
            assert is_training
            assert received == [number]
            signal.raise_signal(signal.SIGINT)

    previous = {each: signal.getsignal(each) for each in stop_signals()}
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    for each, handler in previous.items():
        signal.signal(each, handler)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_run_under_nohup_outlives_its_terminal():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with catch_signals() as received:
        signal.raise_signal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, previous)
    assert not received


@pytest.mark.parametrize("error, lines", [(UserError("no"), 0), (LocalError("no"), 1)])
def test_a_later_process_tells_only_what_the_first_one_does_not_know(
    error, lines, monkeypatch, capsys
):
    def main(_):
        raise error

    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: no\n" * lines


def test_a_signal_that_comes_too_late_for_a_step_ends_the_command_after_the_stage():
    sentence = "at the end of a stage; run the same command"
    with pytest.raises(KeyboardInterrupt, match=sentence), catch_signals() as received:
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]


def test_only_a_failed_write_is_called_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"), atomic_write(tmp_path / "x"):
        raise RuntimeError("out of memory")
    assert not os.listdir(tmp_path)


def test_paths_that_the_terminal_cannot_show_are_shown_somehow(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    run_main(lambda _: print("wrote M\xfcnchen.png", flush=True))
    assert sys.stdout.buffer.getvalue().strip() == b"wrote M\\xfcnchen.png"
