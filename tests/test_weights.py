"""Official weight files: fetched whole or not at all, checked, loaded strictly (data.py)."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading

import pytest
import torch
from reference import ENV, ROOT
from torch import nn

import data
from align import VITS, ViT
from losses import LPIPS

ALONE = data.Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def content(tmp_path):
    """The bytes of a small weight file, which `Linear(2, 1)` fits."""
    torch.save(nn.Linear(2, 1).state_dict(), tmp_path / "made.pth")
    return (tmp_path / "made.pth").read_bytes()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`, of which it sends `sent` bytes."""

    content, sent, asked = b"", 0, 0

    def do_GET(self):
        Server.asked += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: self.sent])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(content, tmp_path, monkeypatch):
    """An official file named "tiny", to be had from a server on this machine; torch hub's cache is empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub_home"))
    Server.content, Server.sent, Server.asked = content, len(content), 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/tiny.pth"
        sha256 = hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(data.OFFICIAL, "tiny", data.Official("tiny.pth", url, sha256, "MIT"))
        yield running
        running.shutdown()


def cached():
    return sorted(path.name for path in data.official_path("tiny").parent.glob("*"))


def test_a_missing_file_is_fetched_once_and_fills_a_network(server, content):
    for _ in range(2):
        data.find_official(["tiny"], "", ALONE)
    assert Server.asked == 1 and data.official_path("tiny").read_bytes() == content and cached() == ["tiny.pth"]
    network = data.fill(nn.Linear(2, 1), "tiny")
    assert torch.equal(network.weight, torch.load(data.official_path("tiny"))["weight"])
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_a_download_that_breaks_off_or_is_another_file_leaves_nothing_and_can_be_repeated(server, content, monkeypatch):
    Server.sent = len(content) // 2
    with pytest.raises(data.UserError, match=f"broke after {Server.sent} of {len(content)} bytes.*--weights FOLDER"):
        data.find_official(["tiny"], "", ALONE)
    assert cached() == []
    Server.content, Server.sent = content[:-1] + b"x", len(content)
    with pytest.raises(data.UserError, match=r"gave a file with SHA-256 .* expected .*; nothing was kept"):
        data.find_official(["tiny"], "", ALONE)
    assert cached() == []
    monkeypatch.setitem(data.OFFICIAL, "tiny", data.OFFICIAL["tiny"]._replace(sha256=""))  # as of DINO: none published
    Server.content, Server.sent = b"<html>log in</html>", 19
    with pytest.raises(data.UserError, match=r"tiny.pth gave what is not a PyTorch weight file; nothing was kept"):
        data.find_official(["tiny"], "", ALONE)
    assert cached() == []
    Server.content, Server.sent = content, len(content)
    data.find_official(["tiny"], "", ALONE)
    assert cached() == ["tiny.pth"]


def test_a_wrong_file_in_the_cache_is_refused_with_its_hash_and_the_first_differing_key(server, tmp_path):
    path = data.official_path("tiny")
    path.parent.mkdir(parents=True)
    torch.save({"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}, path)
    wrong = data.file_hash(path)
    with pytest.raises(data.UserError, match=rf"weight is \(1, 3\), expected \(1, 2\); its SHA-256 is {wrong}"):
        data.fill(nn.Linear(2, 1), "tiny")
    torch.save(nn.Linear(2, 1).half().state_dict(), path)
    with pytest.raises(data.UserError, match=r"weight is \(1, 2\) torch.float16, expected \(1, 2\);"):
        data.fill(nn.Linear(2, 1), "tiny")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(data.UserError, match=r"truncated or not a PyTorch file; its SHA-256 is .*; delete it"):
        data.fill(nn.Linear(2, 1), "tiny")
    torch.save(nn.Linear(2, 1).state_dict(), path)  # fits, but is not what its authors released
    with pytest.raises(data.UserError, match=r"is damaged: its SHA-256 is .*; delete it"):
        data.fill(nn.Linear(2, 1), "tiny")


def test_a_file_of_ones_own_is_used_with_a_warning_and_never_fetched(server, tmp_path, capsys):
    torch.save({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, tmp_path / "tiny.pth")
    data.find_official(["tiny"], str(tmp_path), ALONE)
    assert data.fill(nn.Linear(2, 1), "tiny", str(tmp_path)).weight.tolist() == [[1, 1]]
    assert Server.asked == 0 and "is not the official file" in capsys.readouterr().err


def test_only_the_first_process_fetches_and_all_fail_together(server, tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import data
data.OFFICIAL["tiny"] = data.Official(*{tuple(data.OFFICIAL["tiny"])!r})
processes = data.Processes.start()
try:
    data.find_official(["tiny"], "", processes)
    print("found " + str(data.official_path("tiny").is_file()))  # in one piece: two processes write at once
except data.UserError as error:
    print("failed")
"""
    (tmp_path / "script.py").write_text(script)
    argv = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(tmp_path / "script.py"),
    ]
    environment = ENV | {"TORCH_HOME": os.environ["TORCH_HOME"]}
    Server.sent = 3
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert done.stdout.count("failed") == 2 and Server.asked == 1 and cached() == []
    (tmp_path / "hub_home" / "hub").rename(tmp_path / "hub_home" / "away")
    (tmp_path / "hub_home" / "hub").write_text("a file where the cache should be")
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert done.stdout.count("failed") == 2
    (tmp_path / "hub_home" / "hub").unlink()
    Server.sent = len(Server.content)
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert done.stdout.count("found True") == 2 and Server.asked == 2


def test_every_official_file_has_a_source_a_licence_and_a_hash_or_none():
    for name, official in data.OFFICIAL.items():
        assert official.url.startswith("https://") and official.licence, name
        assert len(official.sha256) in (0, 64) and int(official.sha256 or "0", 16) >= 0
        for part in official.file.removesuffix(".pth").split("-")[1:]:
            assert len(part) != 8 or official.sha256.startswith(part)  # the name tells the start of the hash
    assert set(VITS) <= set(data.OFFICIAL)


def test_networks_have_the_keys_of_the_released_files():
    """Their number and parameters as published: DINOv2 S, B, L 22M, 87M, 304M; DINO S 21.7M; VGG16's features 14.7M."""
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in ViT(name).parameters()) / 1e6 for name in VITS}
        lpips = LPIPS()
    assert [round(counts[f"dinov2_vit{size}14"], 1) for size in "sbl"] == [22.1, 86.6, 304.4]
    assert round(counts["dino_vits16"], 1) == 21.7
    assert sum(p.numel() for p in lpips.vgg.parameters()) == 14_714_688
