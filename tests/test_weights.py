"""Official weight files: downloaded whole or not at all, checked, loaded strictly."""

import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from reference import ENV, ROOT
from torch import nn

import fid
from align import VIT_CONFIGS, ViT
from losses import LPIPS
from utils.console import UserError
from utils.distributed import Distributed
from utils.files import hash_file
from utils.weights import (
    LPIPS_FILES,
    PRETRAINED,
    WeightFile,
    available,
    download_weights,
    load_pretrained,
    weights_path,
)

ONE_PROCESS = Distributed(0, 1, torch.device("cpu"))


@pytest.fixture
def content(tmp_path):
    """The bytes of a small weight file, which `Linear(2, 1)` fits."""
    torch.save(nn.Linear(2, 1).state_dict(), tmp_path / "made.pth")
    return (tmp_path / "made.pth").read_bytes()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`, of which it sends `num_sent` bytes."""

    content = b""
    num_sent = 0
    num_requests = 0

    def do_GET(self):
        Server.num_requests += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: self.num_sent])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(content, tmp_path, monkeypatch):
    """A server on this machine with an official file named "tiny"; torch hub's cache is empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub_home"))
    Server.content = content
    Server.num_sent = len(content)
    Server.num_requests = 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/tiny.pth"
        sha256 = hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(PRETRAINED, "tiny", WeightFile("tiny.pth", url, sha256, "MIT"))
        yield running
        running.shutdown()


def list_cache():
    return sorted(path.name for path in weights_path("tiny").parent.glob("*"))


def change_official(monkeypatch, **changes):
    monkeypatch.setitem(PRETRAINED, "tiny", PRETRAINED["tiny"]._replace(**changes))


def test_a_missing_file_is_downloaded_once_and_fills_a_network(server, content, monkeypatch):
    assert not available("", "tiny")
    for _ in range(2):
        hashes = download_weights(["tiny"], "", ONE_PROCESS)
        assert hashes == {"tiny.pth": PRETRAINED["tiny"].sha256}
    assert Server.num_requests == 1
    assert weights_path("tiny").read_bytes() == content
    assert list_cache() == ["tiny.pth"]
    assert available("", "tiny")
    network = load_pretrained(nn.Linear(2, 1), "tiny")
    assert torch.equal(network.weight, torch.load(weights_path("tiny"))["weight"])
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    monkeypatch.setenv("LOCAL_RANK", "1")  # only the first process of a machine looks
    assert download_weights(["tiny"], "", ONE_PROCESS) == {}


def test_a_download_that_breaks_off_or_is_another_file_leaves_nothing_and_can_be_repeated(
    server, content
):
    sentence = (
        r"cannot download tiny.pth from http://127.*; try again, .*--weights FOLDER: "
        r"invalid hash value .*"
    )
    Server.num_sent = len(content) // 2
    with pytest.raises(UserError, match=sentence):
        download_weights(["tiny"], "", ONE_PROCESS)
    assert list_cache() == []
    Server.content = content[:-1] + b"x"
    Server.num_sent = len(content)
    with pytest.raises(UserError, match=sentence):
        download_weights(["tiny"], "", ONE_PROCESS)
    assert list_cache() == []
    Server.content = content
    download_weights(["tiny"], "", ONE_PROCESS)
    assert list_cache() == ["tiny.pth"]
    assert Server.num_requests == 3


def test_a_cache_that_cannot_be_written_and_a_server_that_is_not_there_are_named(
    server, tmp_path, monkeypatch
):
    (tmp_path / "hub_home").mkdir()
    (tmp_path / "hub_home" / "hub").write_text("a file where the cache should be")
    sentence = r"cannot download tiny.pth from .*--weights FOLDER: "
    with pytest.raises(UserError, match=f"{sentence}.*hub"):
        download_weights(["tiny"], "", ONE_PROCESS)
    (tmp_path / "hub_home" / "hub").unlink()
    change_official(monkeypatch, url="http://127.0.0.1:9/tiny.pth")
    with pytest.raises(UserError, match=f"{sentence}.*refused"):
        download_weights(["tiny"], "", ONE_PROCESS)
    assert Server.num_requests == 0
    assert list_cache() == []


def test_a_file_without_a_published_hash_that_arrives_damaged_is_refused_with_a_remedy(
    server, content, monkeypatch
):
    """DINO's is such a file."""
    change_official(monkeypatch, sha256="")
    login_page = b"<html>log in</html>"
    sentence = r"tiny.pth.* not a PyTorch (weight )?file.*(delete it|nothing was kept)"
    for sent, num_sent in ((login_page, len(login_page)), (content, len(content) // 2)):
        Server.content = sent
        Server.num_sent = num_sent
        with pytest.raises(UserError, match=sentence):
            download_weights(["tiny"], "", ONE_PROCESS)
            load_pretrained(nn.Linear(2, 1), "tiny")
        weights_path("tiny").unlink(missing_ok=True)
    Server.num_sent = len(content)
    download_weights(["tiny"], "", ONE_PROCESS)
    load_pretrained(nn.Linear(2, 1), "tiny")


def test_a_wrong_file_in_the_cache_is_refused_with_its_hash(server):
    path = weights_path("tiny")
    path.parent.mkdir(parents=True)
    torch.save(nn.Linear(2, 1).state_dict(), path)  # fits, but is not what its authors released
    for _ in range(2):
        sentence = (
            rf"tiny.pth is not the official file: its SHA-256 is {hash_file(path)}, "
            rf"not {PRETRAINED['tiny'].sha256}; delete it, and it is downloaded again"
        )
        with pytest.raises(UserError, match=sentence):
            download_weights(["tiny"], "", ONE_PROCESS)
        path.write_bytes(path.read_bytes()[:100])  # truncated
    assert Server.num_requests == 0
    path.unlink()
    download_weights(["tiny"], "", ONE_PROCESS)
    assert Server.num_requests == 1


def test_a_file_of_another_network_is_refused_with_what_differs(server, monkeypatch):
    path = weights_path("tiny")
    path.parent.mkdir(parents=True)
    good = nn.Linear(2, 1).state_dict()
    bad = [
        (good | {"weight": torch.zeros(1, 3)}, r"size mismatch for weight.*\[1, 3\].*\[1, 2\]"),
        ({"weight": good["weight"]}, r'Missing key.*"bias"'),
        (good | {"head.extra": torch.zeros(1)}, r'Unexpected key.*"head.extra"'),
    ]
    for state, difference in bad:
        torch.save(state, path)
        with pytest.raises(UserError, match=rf"tiny.pth is not tiny.pth: .*{difference}"):
            load_pretrained(nn.Linear(2, 1), "tiny")
    change_official(monkeypatch, unused=("head.",))
    load_pretrained(nn.Linear(2, 1), "tiny")
    torch.save({key: value.half() for key, value in good.items()}, path)
    assert load_pretrained(nn.Linear(2, 1), "tiny").weight.dtype == torch.float32
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="truncated or not a PyTorch file"):
        load_pretrained(nn.Linear(2, 1), "tiny", random_if_missing=True)
    path.unlink()
    with pytest.raises(UserError, match=r"tiny.pth does not exist"):
        load_pretrained(nn.Linear(2, 1), "tiny")
    network = nn.Linear(2, 1)
    assert load_pretrained(network, "tiny", random_if_missing=True) is network
    assert not network.weight.requires_grad


def test_a_file_of_ones_own_is_used_with_a_warning_and_never_downloaded(server, tmp_path, capsys):
    folder = str(tmp_path)
    own = tmp_path / "tiny.pth"
    torch.save({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, own)
    assert available(folder, "tiny")
    assert not available("", "tiny")
    assert download_weights(["tiny"], folder, ONE_PROCESS) == {"tiny.pth": hash_file(own)}
    assert load_pretrained(nn.Linear(2, 1), "tiny", folder).weight.tolist() == [[1, 1]]
    assert Server.num_requests == 0
    assert "is not the official file" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--weights .*tiny.pth is not a folder"):
        weights_path("tiny", str(own))
    own.unlink()  # what is not in one's own folder comes from the cache
    download_weights(["tiny"], folder, ONE_PROCESS)
    assert Server.num_requests == 1
    assert list_cache() == ["tiny.pth"]
    assert weights_path("tiny", folder) == weights_path("tiny")


def test_only_the_first_process_downloads_and_all_fail_together(server, tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from utils.console import run_main
from utils.distributed import Distributed
from utils.weights import PRETRAINED, WeightFile, download_weights, weights_path
PRETRAINED["tiny"] = WeightFile(*{tuple(PRETRAINED["tiny"])!r})
def main(_):
    dist = Distributed.start()
    hashes = download_weights(["tiny"], "", dist)
    there = weights_path("tiny").is_file()
    # Two processes write at once, so each writes its line in one piece.
    print(f"found {{there}} {{len(hashes)}} {{dist.run_id}}\\n", end="")
run_main(main)
"""
    (tmp_path / "script.py").write_text(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

    def launch():
        return subprocess.run(
            [*launcher, str(tmp_path / "script.py")],
            capture_output=True,
            text=True,
            env=ENV | {"TORCH_HOME": os.environ["TORCH_HOME"]},
        )

    Server.num_sent = 3
    done = launch()
    assert done.returncode != 0
    assert "found" not in done.stdout
    assert Server.num_requests == 1
    assert list_cache() == []
    assert done.stderr.count("error: cannot download tiny.pth") == 1

    Server.num_sent = len(Server.content)
    done = launch()
    assert done.returncode == 0
    lines = sorted(done.stdout.splitlines())
    words, are_there, num_hashes, run_ids = zip(*map(str.split, lines))
    assert words == ("found", "found")
    assert are_there == ("True", "True")
    assert num_hashes == ("0", "1")
    assert Server.num_requests == 2
    assert len(set(run_ids)) == 1
    assert run_ids[0] != ONE_PROCESS.run_id
    assert ONE_PROCESS.run_id != Distributed(0, 1, torch.device("cpu")).run_id


def check_source(name, url, sha256):
    assert url.startswith("https://"), name
    assert len(sha256) in (0, 64), name
    assert re.fullmatch("[0-9a-f]*", sha256), name
    for part in name.removesuffix(".pth").split("-")[1:]:
        if len(part) == 8:  # the name tells how the hash begins
            assert sha256.startswith(part), name


def test_every_official_file_has_a_source_a_license_and_a_hash_or_none():
    for official in PRETRAINED.values():
        check_source(official.name, official.url, official.sha256)
        assert official.license, official.name
    check_source(fid.INCEPTION_FILE, fid.INCEPTION_URL, fid.INCEPTION_SHA256)
    assert {*VIT_CONFIGS, *LPIPS_FILES} <= set(PRETRAINED)


def test_networks_have_the_keys_of_the_released_files():
    """Their numbers of parameters are as published.

    DINOv2 S, B and L have 22M, 87M and 304M, DINO S has 21.7M, and the features of VGG16 14.7M.
    """
    millions = {}
    with torch.device("meta"):
        for name in VIT_CONFIGS:
            millions[name] = sum(p.numel() for p in ViT(name).parameters()) / 1e6
        lpips = LPIPS()
    assert [round(millions[f"dinov2_vit{size}14"], 1) for size in "sbl"] == [22.1, 86.6, 304.4]
    assert round(millions["dino_vits16"], 1) == 21.7
    assert sum(p.numel() for p in lpips.vgg.parameters()) == 14_714_688
