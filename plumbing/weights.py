"""Weight files of other projects: where they are, what they must be, and a strict load."""

import os
from collections import namedtuple
from pathlib import Path

import torch
from torch import nn

from losses import LPIPS
from plumbing.run import Processes, UserError, as_user_error, file_hash, load_checkpoint, warn


# file: its name, in torch hub's cache and in a folder of one's own; sha256: "" where none was published; unused: keys with these
# parts may be in the file and are passed over.
Official = namedtuple("Official", "file url sha256 licence unused", defaults=[()])


def dinov2(size: str, registers: str, sha256: str) -> Official:
    file = f"dinov2_vit{size}14{registers}_pretrain.pth"
    return Official(file, f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{size}14/{file}", sha256, "Apache-2.0")


# fmt: off
OFFICIAL = {  # DINOv2's authors publish no hashes; these are the ones that finegrain-ai/refiners pins beside the same URLs
    "dinov2_vits14": dinov2("s", "", "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    "dinov2_vitb14": dinov2("b", "", "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
    "dinov2_vitl14": dinov2("l", "", "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
    "dinov2_vits14_reg": dinov2("s", "_reg4", "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb"),
    "dinov2_vitb14_reg": dinov2("b", "_reg4", "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71"),
    "dinov2_vitl14_reg": dinov2("l", "_reg4", "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51"),
    "dino_vits16": Official("dino_deitsmall16_pretrain.pth",  # no published hash was found
        "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", "", "Apache-2.0"),
    "vgg16": Official("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0", "BSD-3-Clause", ("classifier.",)),
    "lpips_vgg": Official("lpips_v0.1_vgg.pth",  # the hash is of the file in that commit
        "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/082bb24f84c091ea94de2867d34c4544f68e0963/lpips/weights/v0.1/vgg.pth",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868", "BSD-2-Clause"),
    "inception": Official("pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", "Apache-2.0", ("num_batches_tracked",)),
}
# fmt: on
LPIPS_FILES = ("vgg16", "lpips_vgg")


def official_path(name: str, folder: str = "") -> Path:
    """Where an official file is: in `folder` if it is there, else in torch hub's cache, whether it is there or not."""
    if folder and not Path(folder).is_dir():
        raise UserError(f"--weights {folder} is not a folder")
    own, cached = (Path(place, OFFICIAL[name].file) for place in (folder, f"{torch.hub.get_dir()}/checkpoints"))
    return own if folder and own.is_file() else cached


def at_hand(folder: str, *names: str) -> bool:
    return all(official_path(name, folder).is_file() for name in names)


def find_official(names: list[str], folder: str, processes: Processes) -> dict[str, str]:
    """The first process of a machine fetches what is missing and checks hashes (one's own: a warning) -> {file: SHA-256} there."""
    hashes = {}
    for name in names if os.environ.get("LOCAL_RANK", "0") == "0" else ():
        official, path = OFFICIAL[name], official_path(name, folder)
        advice = "try again, or get it elsewhere and give its folder, --weights FOLDER"
        with as_user_error(f"cannot fetch {official.file} from {official.url}; {advice}: "):
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(official.url, str(path), hash_prefix=official.sha256 or None)
        hashes[official.file] = sha256 = file_hash(path)
        if official.sha256 not in ("", sha256):
            text = f"{path} is not the official file: its SHA-256 is {sha256}, expected {official.sha256}"
            if path.parent != Path(folder):
                raise UserError(f"{text}; delete it, and it is fetched again")
            warn(text)
    processes.barrier()
    return hashes


def load_official(network: nn.Module, name: str, folder: str = "", random_if_missing: bool = False) -> nn.Module:
    """Give a network the weights of an official file, whose keys and shapes must be its own; returns it frozen. UserError."""
    official, path = OFFICIAL[name], official_path(name, folder)
    if path.is_file() or not random_if_missing:
        state = load_checkpoint(path)
        with as_user_error(f"{path} is not {official.file}: "):
            used = {key: value for key, value in state.items() if not any(part in key for part in official.unused)}
            network.load_state_dict(used, assign=True)
    return network.float().eval().requires_grad_(False)


def load_lpips(folder: str = "", random_if_missing: bool = False) -> nn.Module:
    lpips = LPIPS()
    for network, name in zip((lpips.vgg, lpips.linear), LPIPS_FILES):
        load_official(network, name, folder, random_if_missing)
    return lpips.eval()
