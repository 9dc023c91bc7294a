import os
import tempfile

import pytest
import torch
from reference import make_folder, official_folder

# No test reaches the network, or finds weights that happen to be on the machine.
os.environ |= {
    "TORCH_HOME": tempfile.mkdtemp(),
    "https_proxy": "http://127.0.0.1:9",
    "no_proxy": "127.0.0.1",
}
# One thread, as in the processes that tests start: then equal bits can be asked for. And several
# threads wait long for each other when other programs use the cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def full_precision():
    """Programs that ran in this process may have left it lower."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "images", 3, 30)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Files of the official formats with generated contents."""
    files = ("dinov2_vits14_pretrain", "dinov2_vits14_reg4_pretrain", "dino_deitsmall16_pretrain")
    return official_folder(
        tmp_path_factory.mktemp("weights"), *files, "vgg16-397923af", "lpips_v0.1_vgg"
    )
