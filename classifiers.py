"""Two small image classifiers for the lab: one is a teacher with patch features, one is a judge.

    cls, patches = SmallTeacher(grid_size)(images)     as the teachers in align.py
    features = Judge(num_classes)(images)              (B, D), for Frechet distances
    train_classifier(network, images, labels, ...)     minutes on a CPU

Both are ours, and both learn the labels of photographs. `python lab.py teacher` trains them on two
halves of a folder and writes a file of each; `train.py --teacher FILE` takes the teacher's, and
`lab.py --judge FILE` the judge's. The tokenizers that they are used on are then trained on another
folder.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from align import check_range
from fid import frechet_distance, mean_cov
from utils.console import UserError, as_user_error, progress
from utils.files import load_torch, save_torch
from utils.images import to_float

BATCH_SIZE = 64
PEAK_LR = 3e-3  # of the one-cycle schedule
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1


# --------------------------------------------------------------------------------------------------
# The two networks.


def conv_layer(in_width: int, out_width: int, norm: nn.Module, stride: int = 1) -> nn.Module:
    """A convolution, a norm and a ReLU: (B, in, H, W) -> (B, out, H / stride, W / stride).

    With stride 2 its kernel has 4 pixels in place of 3, so that outputs are centered on what they
    stand for. The border's pixels are repeated beyond it: zeros would mark the border, and a
    teacher would then collect what it knows of the object in patches there.
    """
    shape = dict(kernel_size=3 if stride == 1 else 4, padding=1, padding_mode="replicate")
    conv = nn.Conv2d(in_width, out_width, stride=stride, bias=False, **shape)
    return nn.Sequential(conv, norm, nn.ReLU())


class SmallTeacher(nn.Module):
    """A convolutional teacher whose class token is the attention-weighted mean of the patches.

    `grid_size` is the side of the patch grid, sqrt(N). Without classes there is no head: the
    features are all that a tokenizer needs. Its norms are group norms, which do not mix the images
    of a batch.
    """

    kind = "teacher"
    patch_size = 4  # px; images are resized to patch_size * grid_size, as DINOv2's are to 14
    width = 128

    def __init__(self, grid_size: int, num_classes: int = 0):
        super().__init__()
        self.grid_size = grid_size
        self.layers = nn.Sequential(
            conv_layer(3, 32, nn.GroupNorm(8, 32), stride=2),
            conv_layer(32, 64, nn.GroupNorm(8, 64)),
            conv_layer(64, 128, nn.GroupNorm(8, 128), stride=2),
            conv_layer(128, 128, nn.GroupNorm(8, 128)),
            conv_layer(128, 128, nn.GroupNorm(8, 128)),
            nn.Conv2d(128, 1 + self.width, kernel_size=1),  # an attention score, and the features
        )
        self.norm = nn.LayerNorm(self.width)
        self.head = nn.Linear(self.width, num_classes) if num_classes else nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, H) in [-1, 1] -> cls (B, 128), patches (B, grid_size^2, 128)."""
        check_range(images)
        size = self.patch_size * self.grid_size
        if images.shape[-1] != size:
            images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
        x = self.layers(images).flatten(2).transpose(1, 2)  # (B, N, 1 + D)
        attention = x[..., :1].softmax(dim=1)  # (B, N, 1)
        patches = self.norm(x[..., 1:])
        cls = (attention * patches).sum(dim=1)
        return cls, patches

    def logits(self, images: Tensor) -> Tensor:
        """images (B, 3, H, H) in [-1, 1] -> one value per class (B, num_classes)."""
        cls, _ = self(images)
        return self.head(cls)


class Judge(nn.Module):
    """A plain convolutional classifier, which looks at what tokenizer and generator make.

    It has other layers than the teacher and is trained on other images, so that it does not simply
    favor the features that a tokenizer was aligned with. Both know the same classes.
    """

    kind = "judge"

    def __init__(self, num_classes: int):
        super().__init__()
        self.layers = nn.Sequential(
            conv_layer(3, 32, nn.BatchNorm2d(32)),
            conv_layer(32, 64, nn.BatchNorm2d(64), stride=2),
            conv_layer(64, 64, nn.BatchNorm2d(64)),
            conv_layer(64, 128, nn.BatchNorm2d(128), stride=2),
            conv_layer(128, 128, nn.BatchNorm2d(128)),
            conv_layer(128, 128, nn.BatchNorm2d(128)),
        )
        self.head = nn.Linear(128, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> features before the last layer (B, 128)."""
        check_range(images)
        return self.layers(images).mean(dim=(2, 3))

    def logits(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> one value per class (B, num_classes)."""
        return self.head(self(images))


# --------------------------------------------------------------------------------------------------
# Training.


def train_classifier(
    network: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int
) -> None:
    """Train a network that has `logits`, on images uint8 (n, 3, S, S) with labels (n,).

    The learning rate of AdamW rises and falls in one cycle, and its first beta falls and rises. On
    a CPU the same initial weights and the same seed give the same trained weights.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(network.parameters()).device
    batches_per_epoch = -(-len(images) // BATCH_SIZE)
    optimizer = AdamW(network.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    schedule = OneCycleLR(optimizer, PEAK_LR, epochs * batches_per_epoch)
    network.train()
    for _ in progress(range(epochs), network.kind):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):
            x = augment(to_float(images[rows]), generator)
            logits = network.logits(x.to(device))
            targets = labels[rows].to(device)
            loss = F.cross_entropy(logits, targets, label_smoothing=LABEL_SMOOTHING)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    network.eval()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image with probability 1/2, and shift it by up to an eighth of its side.

    images (B, 3, S, S) -> the same shape; pixels that come into view mirror those at the border.
    """
    count = len(images)
    size = images.shape[-1]
    is_flipped = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(is_flipped, images.flip(-1), images)
    margin = size // 8
    padded = F.pad(images, (margin, margin, margin, margin), mode="reflect")
    shifts = torch.randint(2 * margin + 1, (2, count, 1), generator=generator)
    rows, columns = shifts + torch.arange(size)  # each (B, S)
    image = torch.arange(count).view(-1, 1, 1)
    shifted = padded[image, :, rows[:, :, None], columns[:, None, :]]  # (B, S, S, 3)
    return shifted.permute(0, 3, 1, 2)


@torch.no_grad()
def measure_accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images, uint8 (n, 3, S, S), for which a network finds the label (n,)."""
    device = next(network.parameters()).device
    parts = [network.logits(to_float(part.to(device))) for part in images.split(256)]
    found = torch.cat(parts).argmax(dim=1).cpu()
    return (found == labels).double().mean().item()


@torch.no_grad()
def judge_distance(network: Judge, images: Tensor, others: Tensor) -> float:
    """The Frechet distance of two sets of images, uint8 (n, 3, S, S), in the judge's features."""
    device = next(network.parameters()).device
    statistics = []
    for images_of_set in (images, others):
        parts = [network(to_float(part.to(device))) for part in images_of_set.split(256)]
        statistics += mean_cov(torch.cat(parts))
    return frechet_distance(*statistics)


# --------------------------------------------------------------------------------------------------
# Their files.


def save_classifier(network: nn.Module, about: dict, path: str | Path) -> None:
    """Write a network's weights, its kind, and what it was made of and with."""
    save_torch({"kind": network.kind, **about, "state": network.state_dict()}, path)


def read_classifier(path: str | Path, kind: str, expected: dict) -> dict:
    """The content of a file that `save_classifier` wrote.

    kind is "teacher" or "judge", and expected holds what must be as it was in training, such as
    {"image_size": 32}. Raises UserError for a file that is missing, damaged or another one.
    """
    saved = load_torch(path)
    found = saved.get("kind")
    if found != kind:
        described = f"a {found}" if found in ("teacher", "judge") else "another file"
        raise UserError(f"{path} is {described}, not a {kind}; make one with lab.py teacher")
    for name, value in expected.items():
        if saved.get(name) != value:
            raise UserError(
                f"{path} was trained with {name} {saved.get(name)}, and this run has {value}; "
                "train another with lab.py teacher"
            )
    return saved


def read_teacher(path: str | Path, image_size: int, grid_size: int) -> dict:
    """The content of a teacher's file. Raises UserError for another image size or patch grid."""
    return read_classifier(path, "teacher", {"image_size": image_size, "grid_size": grid_size})


def load_teacher(teacher: SmallTeacher, path: str | Path, image_size: int) -> None:
    """Load the weights in a teacher's file, without those of its head."""
    saved = read_teacher(path, image_size, teacher.grid_size)
    with as_user_error(f"{path} is damaged: "):
        state = {key: w for key, w in saved["state"].items() if not key.startswith("head.")}
        teacher.load_state_dict(state)


def load_judge(path: str | Path, image_size: int, classes: list[str]) -> Judge:
    """The judge in a file. Raises UserError for another image size or other classes."""
    saved = read_classifier(path, "judge", {"image_size": image_size})
    if saved["classes"] != classes:
        raise UserError(
            f"{path} knows other classes than the images: {', '.join(saved['classes'][:5])}...; "
            "train a judge on images with the same classes"
        )
    network = Judge(len(classes))
    with as_user_error(f"{path} is damaged: "):
        network.load_state_dict(saved["state"])
    return network.eval().requires_grad_(False)
