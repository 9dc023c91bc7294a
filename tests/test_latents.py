"""Latents on disk: written by several processes, read as needed, and checked (utils/latents.py)."""

import errno
import json
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.console import UserError
from utils.distributed import Distributed
from utils.latents import (
    LatentDataset,
    LatentWriter,
    latents_exist,
    record_dtype,
    write_latents,
    write_metadata,
)

ONE_PROCESS = Distributed(0, 1, torch.device("cpu"))
# What the latents of these tests are expected to be: 6 rows of 4 x 2 numbers.
EXPECTED = {
    "encoder_hash": "abc",
    "data": "images",
    "count": 6,
    "num_tokens": 4,
    "latent_dim": 2,
    "num_classes": 8,
}
METADATA = {"encoder": "abc", "data": "images", "latent_mean": [0, 1], "latent_std": [1, 2]}


def make_latents(path, labels=(5, 5, 6, 6, 7, 7)):
    """Write 6 rows in two parts, as two processes do -> mean, std (6, 4, 2)."""
    mean = torch.randn(6, 4, 2)
    std = torch.rand(6, 4, 2)
    labels = torch.tensor(labels)
    dtype = record_dtype(4, 2)
    with write_latents(path, 6, dtype, ONE_PROCESS) as first:
        second = LatentWriter(Path(first.file.name), dtype)
        with second.file:
            second.write(4, mean[4:], std[4:], labels[4:])
            first.write(0, mean[:2], std[:2], labels[:2])
            first.write(2, mean[2:4], std[2:4], labels[2:4])
    write_metadata(path, "abc", "images", torch.tensor([0, 1]), torch.tensor([1, 2]))
    return mean, std


def open_latents(path, **changes):
    return LatentDataset(path, **EXPECTED | changes)


def test_latents_that_two_processes_write_are_read_again(tmp_path):
    path = tmp_path / "new" / "latents.npy"
    mean, std = make_latents(path)
    assert sorted(os.listdir(path.parent)) == ["latents.json", "latents.npy"]
    assert json.loads(path.with_suffix(".json").read_text()) == METADATA
    latents = open_latents(path)
    assert len(latents) == 6
    read_mean, read_std, labels = latents.read([4, 0, 3])
    assert read_mean.dtype == read_std.dtype == torch.float32
    torch.testing.assert_close(read_mean, mean[[4, 0, 3]], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(read_std, std[[4, 0, 3]], atol=2e-3, rtol=1e-3)
    assert labels.tolist() == [7, 5, 6]
    assert labels.dtype == torch.int64
    assert latents.mean.tolist() == [0, 1]
    assert latents.std.tolist() == [1, 2]


def test_the_file_is_a_plain_numpy_array(tmp_path):
    mean, _ = make_latents(tmp_path / "latents.npy")
    rows = np.load(tmp_path / "latents.npy", allow_pickle=False)
    assert rows.dtype == record_dtype(4, 2)
    assert np.array_equal(rows["mean"], mean.numpy().astype(np.float16))


DAMAGES = {
    "data": lambda content: content[:-10],
    "header": lambda content: content[:100],
    "magic": lambda content: content[:4],
    "empty": lambda content: b"",
    "text": lambda content: b"hello",
    "zeros": lambda content: bytes(len(content)),
    "hole": lambda content: content[:20] + bytes(50) + content[70:],
    "type": lambda content: content.replace(b"<f2", b"<i2"),
    "key": lambda content: content.replace(b"'std'", b"'sdt'"),
    "shape": lambda content: content.replace(b"(4, 2)", b"(2, 4)"),
    "count": lambda content: content.replace(b"(6,)", b"(5,)"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_truncated_and_damaged_latents_are_refused(tmp_path, damage):
    path = tmp_path / "latents.npy"
    make_latents(path)
    content = path.read_bytes()
    assert damage(content) != content
    path.write_bytes(damage(content))
    sentence = r"latents.npy is truncated or damaged; delete .*latents.json and run"
    with pytest.raises(UserError, match=sentence):
        open_latents(path)


@pytest.mark.parametrize(
    "labels, num_classes, is_good",
    [
        ((0, 0, 1, 1, 8, 8), 8, False),
        ((0, 0, -1, -1, 0, 0), 8, False),
        ((0, 0, 0, 0, 1, 1), 0, False),
        ((0, 0, 0, 0, 0, 0), 0, True),
        ((0, 0, 7, 7, 1, 1), 8, True),
    ],
)
def test_labels_out_of_range_are_refused(tmp_path, labels, num_classes, is_good):
    make_latents(tmp_path / "latents.npy", labels)
    latents = open_latents(tmp_path / "latents.npy", num_classes=num_classes)
    sentence = rf"latents.npy is damaged: it has labels beyond {num_classes} classes"
    refused = pytest.raises(OSError, match=sentence)
    with nullcontext() if is_good else refused:
        assert tuple(latents.read(list(range(6)))[2].tolist()) == labels


def test_stale_and_missing_latents_and_damaged_metadata_are_refused(tmp_path):
    path = tmp_path / "latents.npy"
    metadata = tmp_path / "latents.json"
    assert not latents_exist(path)
    with pytest.raises(UserError, match="does not exist"):
        open_latents(path)
    make_latents(path)
    assert latents_exist(path)
    sentence = r"another tokenizer or of other images; delete .*latents.json and run"
    for change in ({"encoder_hash": "other"}, {"data": "other"}):
        with pytest.raises(UserError, match=sentence):
            open_latents(path, **change)
    sentence = r"latents.npy is truncated or damaged; delete .*latents.json and run"
    changes = [
        {"latent_mean": [0]},
        {"latent_std": [1]},
        {"latent_std": "abc"},
        {"latent_mean": None},
    ]
    for change in changes:
        metadata.write_text(json.dumps(METADATA | change))
        with pytest.raises(UserError, match=sentence):
            open_latents(path)
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(UserError, match="not whole"):
        open_latents(path)
    path.write_bytes(content)
    for text in (metadata.read_text()[:-5], "[]", ""):
        metadata.write_text(text)
        with pytest.raises(UserError, match=r"latents.json is damaged"):
            open_latents(path)
    metadata.unlink()  # it is written last
    assert not latents_exist(path)
    with pytest.raises(UserError, match="not whole"):
        open_latents(path)


@pytest.mark.parametrize(
    "moment, value, shown",
    [
        ("mean", 7e4, "7e\\+04"),
        ("mean", -7e4, "7e\\+04"),
        ("mean", float("inf"), "inf"),
        ("mean", float("nan"), "nan"),
        ("std", 7e4, "7e\\+04"),
        ("std", float("inf"), "inf"),
        ("std", float("nan"), "nan"),
    ],
)
def test_values_beyond_float16_are_refused_and_nothing_is_left(tmp_path, moment, value, shown):
    moments = {"mean": torch.rand(2, 4, 2), "std": torch.rand(2, 4, 2)}
    moments[moment][1, 2, 0] = value
    writing = write_latents(tmp_path / "latents.npy", 2, record_dtype(4, 2), ONE_PROCESS)
    sentence = rf"latents reach {shown}, and cannot be stored beyond 65504: .* has diverged"
    with pytest.raises(UserError, match=sentence), writing as writer:
        writer.write(0, moments["mean"], moments["std"], torch.zeros(2))
    assert not os.listdir(tmp_path)


def test_the_largest_values_of_float16_are_kept(tmp_path):
    path = tmp_path / "latents.npy"
    mean = torch.full((1, 4, 2), -65504.0)
    with write_latents(path, 1, record_dtype(4, 2), ONE_PROCESS) as writer:
        writer.write(0, mean, -mean, torch.zeros(1))
    write_metadata(path, "abc", "images", torch.zeros(2), torch.ones(2))
    read_mean, read_std, _ = open_latents(path, count=1).read([0])
    assert torch.equal(read_mean, mean)
    assert torch.equal(read_std, -mean)


def test_an_interrupted_stage_leaves_the_previous_latents(tmp_path):
    path = tmp_path / "latents.npy"
    mean, std = make_latents(path)
    content = path.read_bytes()
    writing = write_latents(path, 6, record_dtype(4, 2), ONE_PROCESS)
    with pytest.raises(KeyboardInterrupt), writing as writer:
        writer.write(0, std[:2], mean[:2].abs(), torch.zeros(2))
        raise KeyboardInterrupt
    assert path.read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["latents.json", "latents.npy"]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="only Unix reserves room on a disk")
def test_a_full_disk_is_found_before_anything_is_encoded(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    sentence = r"cannot write .*latents.npy: No space left on device; make room"
    writing = write_latents(tmp_path / "latents.npy", 6, record_dtype(4, 2), ONE_PROCESS)
    with pytest.raises(UserError, match=sentence), writing:
        pytest.fail("the disk is full")
    assert not os.listdir(tmp_path)
