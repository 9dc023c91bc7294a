"""Weight files of other projects: where they are, what they must be, and a strict load."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from utils.console import UserError, as_user_error, warn
from utils.distributed import Distributed
from utils.files import hash_file, load_torch


class WeightFile(NamedTuple):
    """An official file."""

    name: str  # in torch hub's cache, and in a folder of the user's own
    url: str
    sha256: str  # empty where none was published
    license: str
    unused: tuple[str, ...] = ()  # keys that contain one of these are skipped


def dinov2_file(size: str, suffix: str, sha256: str) -> WeightFile:
    name = f"dinov2_vit{size}14{suffix}_pretrain.pth"
    url = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{size}14/{name}"
    return WeightFile(name, url, sha256, "Apache-2.0")


DINO_URL = "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain"
LPIPS_URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity"
LPIPS_COMMIT = "082bb24f84c091ea94de2867d34c4544f68e0963"

# DINOv2's authors publish no hashes; these are the ones that finegrain-ai/refiners pins beside the
# same URLs. No published hash of DINO's file was found. LPIPS's hash is of the file in that commit.
# fmt: off
PRETRAINED = {
    "dinov2_vits14": dinov2_file("s", "",
        "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    "dinov2_vitb14": dinov2_file("b", "",
        "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
    "dinov2_vitl14": dinov2_file("l", "",
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
    "dinov2_vits14_reg": dinov2_file("s", "_reg4",
        "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb"),
    "dinov2_vitb14_reg": dinov2_file("b", "_reg4",
        "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71"),
    "dinov2_vitl14_reg": dinov2_file("l", "_reg4",
        "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51"),
    "dino_vits16": WeightFile("dino_deitsmall16_pretrain.pth",
        f"{DINO_URL}/dino_deitsmall16_pretrain.pth", "", "Apache-2.0"),
    "vgg16": WeightFile("vgg16-397923af.pth",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0", "BSD-3-Clause",
        unused=("classifier.",)),
    "lpips_vgg": WeightFile("lpips_v0.1_vgg.pth",
        f"{LPIPS_URL}/{LPIPS_COMMIT}/lpips/weights/v0.1/vgg.pth",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868", "BSD-2-Clause"),
}
# fmt: on
LPIPS_FILES = ("vgg16", "lpips_vgg")


def weights_path(name: str, folder: str = "") -> Path:
    """Where a file is: in `folder`, or else in torch hub's cache, whether it exists or not."""
    if folder and not Path(folder).is_dir():
        raise UserError(f"--weights {folder} is not a folder")
    file_name = PRETRAINED[name].name
    if folder and Path(folder, file_name).is_file():
        return Path(folder, file_name)
    return Path(torch.hub.get_dir(), "checkpoints", file_name)


def available(folder: str, *names: str) -> bool:
    """Whether all these files exist."""
    return all(weights_path(name, folder).is_file() for name in names)


def download_weights(names: list[str], folder: str, dist: Distributed) -> dict[str, str]:
    """Get missing files into torch hub's cache and verify all. Returns {file name: SHA-256}.

    Local rank 0 downloads and verifies while the others wait; on those the result is empty. A
    user's own file with another hash gives only a warning.
    """
    hashes = {}
    if dist.is_local_main:
        for name in names:
            hashes[PRETRAINED[name].name] = download_and_verify(name, folder)
    dist.barrier()
    return hashes


def download_and_verify(name: str, folder: str) -> str:
    """Get a file if it is missing, and check its hash. Returns its SHA-256."""
    official = PRETRAINED[name]
    path = weights_path(name, folder)
    advice = "try again, or get it elsewhere and pass its folder with --weights FOLDER"
    with as_user_error(f"cannot download {official.name} from {official.url}; {advice}: "):
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            expected = official.sha256 or None
            torch.hub.download_url_to_file(official.url, str(path), hash_prefix=expected)
    sha256 = hash_file(path)
    if official.sha256 not in ("", sha256):
        text = f"{path} is not the official file: its SHA-256 is {sha256}, not {official.sha256}"
        if path.parent != Path(folder):
            raise UserError(f"{text}; delete it, and it is downloaded again")
        warn(text)
    return sha256


def load_pretrained(
    network: nn.Module, name: str, folder: str = "", random_if_missing: bool = False
) -> nn.Module:
    """Load an official file, whose keys and shapes must be the network's own, and freeze the
    network.

    Raises UserError for a file that is missing or does not fit.
    """
    official = PRETRAINED[name]
    path = weights_path(name, folder)
    if path.is_file() or not random_if_missing:
        state = load_torch(path)
        with as_user_error(f"{path} is not {official.name}: "):
            used = {
                key: weight
                for key, weight in state.items()
                if not any(part in key for part in official.unused)
            }
            network.load_state_dict(used, assign=True)
    return network.float().eval().requires_grad_(False)
