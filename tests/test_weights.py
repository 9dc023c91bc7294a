"""Official weight files: fetched whole or not at all, checked, loaded strictly (plumbing/weights.py)."""

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

from align import VITS, ViT
from losses import LPIPS
from plumbing.run import Processes, UserError, file_hash
from plumbing.weights import LPIPS_FILES, OFFICIAL, Official, at_hand, find_official, load_official, official_path

ALONE = Processes(0, 1, torch.device("cpu"))


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
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/tiny.pth"
        sha256 = hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(OFFICIAL, "tiny", Official("tiny.pth", url, sha256, "MIT"))
        yield running
        running.shutdown()


def cached():
    return sorted(path.name for path in official_path("tiny").parent.glob("*"))


def change_official(monkeypatch, **changes):
    monkeypatch.setitem(OFFICIAL, "tiny", OFFICIAL["tiny"]._replace(**changes))


def test_a_missing_file_is_fetched_once_and_fills_a_network(server, content, monkeypatch):
    assert not at_hand("", "tiny")
    for _ in range(2):
        assert find_official(["tiny"], "", ALONE) == {"tiny.pth": OFFICIAL["tiny"].sha256}
    assert Server.asked == 1 and official_path("tiny").read_bytes() == content and cached() == ["tiny.pth"]
    assert at_hand("", "tiny")
    network = load_official(nn.Linear(2, 1), "tiny")
    assert torch.equal(network.weight, torch.load(official_path("tiny"))["weight"])
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first process of a machine looks
    assert find_official(["tiny"], "", ALONE) == {}


def test_a_download_that_breaks_off_or_is_another_file_leaves_nothing_and_can_be_repeated(server, content):
    fails = r"cannot fetch tiny.pth from http://127.*; try again, .*--weights FOLDER: invalid hash value .*"
    Server.sent = len(content) // 2
    with pytest.raises(UserError, match=fails):
        find_official(["tiny"], "", ALONE)
    assert cached() == []
    Server.content, Server.sent = content[:-1] + b"x", len(content)
    with pytest.raises(UserError, match=fails):
        find_official(["tiny"], "", ALONE)
    assert cached() == []
    Server.content = content
    find_official(["tiny"], "", ALONE)
    assert cached() == ["tiny.pth"] and Server.asked == 3


def test_a_cache_that_cannot_be_written_and_a_server_that_is_not_there_are_named(server, tmp_path, monkeypatch):
    (tmp_path / "hub_home").mkdir()
    (tmp_path / "hub_home" / "hub").write_text("a file where the cache should be")
    with pytest.raises(UserError, match=r"cannot fetch tiny.pth from .*--weights FOLDER: .*hub"):
        find_official(["tiny"], "", ALONE)
    (tmp_path / "hub_home" / "hub").unlink()
    change_official(monkeypatch, url="http://127.0.0.1:9/tiny.pth")
    with pytest.raises(UserError, match=r"cannot fetch tiny.pth from .*--weights FOLDER: .*refused"):
        find_official(["tiny"], "", ALONE)
    assert Server.asked == 0 and cached() == []


def test_a_file_without_a_published_hash_that_arrives_damaged_is_refused_with_a_remedy(server, content, monkeypatch):
    """As DINO's."""
    change_official(monkeypatch, sha256="")
    for Server.content, Server.sent in ((b"<html>log in</html>", 19), (content, len(content) // 2)):
        with pytest.raises(UserError, match=r"tiny.pth.* not a PyTorch (weight )?file.*(delete it|nothing was kept)"):
            find_official(["tiny"], "", ALONE)
            load_official(nn.Linear(2, 1), "tiny")
        official_path("tiny").unlink(missing_ok=True)
    Server.sent = len(content)
    find_official(["tiny"], "", ALONE)
    load_official(nn.Linear(2, 1), "tiny")


def test_a_wrong_file_in_the_cache_is_refused_with_its_hash(server):
    path = official_path("tiny")
    path.parent.mkdir(parents=True)
    torch.save(nn.Linear(2, 1).state_dict(), path)  # fits, but is not what its authors released
    for _ in range(2):
        told = rf"tiny.pth is not the official file: its SHA-256 is {file_hash(path)}, expected {OFFICIAL['tiny'].sha256}"
        with pytest.raises(UserError, match=told + "; delete it, and it is fetched again"):
            find_official(["tiny"], "", ALONE)
        path.write_bytes(path.read_bytes()[:100])  # truncated
    assert Server.asked == 0
    path.unlink()
    find_official(["tiny"], "", ALONE)
    assert Server.asked == 1


def test_a_file_of_another_network_is_refused_with_what_differs(server, monkeypatch):
    path, good = official_path("tiny"), nn.Linear(2, 1).state_dict()
    path.parent.mkdir(parents=True)
    for state, told in (
        (good | {"weight": torch.zeros(1, 3)}, r"size mismatch for weight.*\[1, 3\].*\[1, 2\]"),
        ({"weight": good["weight"]}, r'Missing key.*"bias"'),
        (good | {"head.extra": torch.zeros(1)}, r'Unexpected key.*"head.extra"'),
    ):
        torch.save(state, path)
        with pytest.raises(UserError, match=rf"tiny.pth is not tiny.pth: .*{told}"):
            load_official(nn.Linear(2, 1), "tiny")
    change_official(monkeypatch, unused=("head.",))
    load_official(nn.Linear(2, 1), "tiny")
    torch.save({key: value.half() for key, value in good.items()}, path)
    assert load_official(nn.Linear(2, 1), "tiny").weight.dtype == torch.float32
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="truncated or not a PyTorch file"):
        load_official(nn.Linear(2, 1), "tiny", random_if_missing=True)
    path.unlink()
    with pytest.raises(UserError, match=r"tiny.pth does not exist"):
        load_official(nn.Linear(2, 1), "tiny")
    network = nn.Linear(2, 1)
    assert load_official(network, "tiny", random_if_missing=True) is network and not network.weight.requires_grad


def test_a_file_of_ones_own_is_used_with_a_warning_and_never_fetched(server, tmp_path, capsys):
    own = tmp_path / "tiny.pth"
    torch.save({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, own)
    assert at_hand(str(tmp_path), "tiny") and not at_hand("", "tiny")
    assert find_official(["tiny"], str(tmp_path), ALONE) == {"tiny.pth": file_hash(own)}
    assert load_official(nn.Linear(2, 1), "tiny", str(tmp_path)).weight.tolist() == [[1, 1]]
    assert Server.asked == 0 and "is not the official file" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--weights .*tiny.pth is not a folder"):
        official_path("tiny", str(own))
    own.unlink()  # what is not in one's own folder comes from the cache
    find_official(["tiny"], str(tmp_path), ALONE)
    assert Server.asked == 1 and cached() == ["tiny.pth"] and official_path("tiny", str(tmp_path)) == official_path("tiny")


def test_only_the_first_process_fetches_and_all_fail_together(server, tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from plumbing.run import Processes, command_line
from plumbing.weights import OFFICIAL, Official, find_official, official_path
OFFICIAL["tiny"] = Official(*{tuple(OFFICIAL["tiny"])!r})
def main(_):
    processes = Processes.start()
    found = find_official(["tiny"], "", processes)
    there = official_path("tiny").is_file()
    print(f"found {{there}} {{len(found)}} {{processes.launch}}\\n", end="")  # in one piece: two processes write at once
command_line(main)
"""
    (tmp_path / "script.py").write_text(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    settings = {"capture_output": True, "text": True, "env": ENV | {"TORCH_HOME": os.environ["TORCH_HOME"]}}
    Server.sent = 3
    done = subprocess.run([*launcher, str(tmp_path / "script.py")], **settings)
    assert done.returncode != 0 and "found" not in done.stdout and Server.asked == 1 and cached() == []
    assert done.stderr.count("error: cannot fetch tiny.pth") == 1
    Server.sent = len(Server.content)
    done = subprocess.run([*launcher, str(tmp_path / "script.py")], **settings)
    *lines, launches = zip(*map(str.split, sorted(done.stdout.splitlines())))
    assert done.returncode == 0 and lines == [("found",) * 2, ("True",) * 2, ("0", "1")] and Server.asked == 2
    assert len(set(launches)) == 1 and launches[0] != ALONE.launch != Processes(0, 1, torch.device("cpu")).launch


def test_every_official_file_has_a_source_a_licence_and_a_hash_or_none():
    for name, official in OFFICIAL.items():
        assert official.url.startswith("https://") and official.licence, name
        assert len(official.sha256) in (0, 64) and int(official.sha256 or "0", 16) >= 0
        for part in official.file.removesuffix(".pth").split("-")[1:]:
            assert len(part) != 8 or official.sha256.startswith(part)  # the name tells the start of the hash
    assert {*VITS, *LPIPS_FILES} <= set(OFFICIAL)


def test_networks_have_the_keys_of_the_released_files():
    """Their number and parameters as published: DINOv2 S, B, L 22M, 87M, 304M; DINO S 21.7M; VGG16's features 14.7M."""
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in ViT(name).parameters()) / 1e6 for name in VITS}
        lpips = LPIPS()
    assert [round(counts[f"dinov2_vit{size}14"], 1) for size in "sbl"] == [22.1, 86.6, 304.4]
    assert round(counts["dino_vits16"], 1) == 21.7
    assert sum(p.numel() for p in lpips.vgg.parameters()) == 14_714_688
