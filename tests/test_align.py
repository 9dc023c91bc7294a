"""align.py: teachers against the official implementations, and the alignment loss."""

import pytest
import torch
import torch.nn.functional as F
from reference import array, filled, imagenet_normalized
from scipy.stats import rankdata
from torch import nn

from align import HOG, TEACHERS, VIT_CONFIGS, AlignmentLoss, DINOFeatures, ViT
from masking import cls_similarity
from tokenizer import Mlp
from utils.images import to_float
from utils.shapes import Shapes

DINO_LAYERS = (2, 5, 8, 11)

# Case of the reference: the network's name, and the official file.
CASES = {
    "dinov2_vits14": ("dinov2_vits14", "dinov2_vits14_pretrain"),
    "dinov2_vits14_nonsquare": ("dinov2_vits14", "dinov2_vits14_pretrain"),
    "dinov2_vits14_reg4_nonsquare": ("dinov2_vits14_reg", "dinov2_vits14_reg4_pretrain"),
    "dino_vits16": ("dino_vits16", "dino_deitsmall16_pretrain"),
    "dino_vits16_interp": ("dino_vits16", "dino_deitsmall16_pretrain"),
}


def load(module: nn.Module, vit: ViT, file: str) -> None:
    """Give the ViT of a module the weights that the reference was computed with, and freeze it."""
    vit.load_state_dict(filled(file))
    module.eval().requires_grad_(False)


@pytest.mark.parametrize("case", CASES)
def test_vits_equal_the_official_implementations(case):
    name, file = CASES[case]
    model = ViT(name)
    load(model, model, file)
    x = imagenet_normalized(f"{case}/image")
    cls, registers, patches = model(x)
    torch.testing.assert_close(cls, array(f"{case}/cls"), atol=5e-5, rtol=0)
    torch.testing.assert_close(patches[:, ::8], array(f"{case}/patches"), atol=5e-5, rtol=0)

    rows, columns = (side // model.patch_size for side in x.shape[-2:])
    positions = model.interpolate_pos_encoding(rows, columns)
    torch.testing.assert_close(positions[0, :, :8], array(f"{case}/positions"), atol=1e-6, rtol=0)
    if "reg4" in case:
        torch.testing.assert_close(registers, array(f"{case}/registers"), atol=5e-5, rtol=0)
    if case.startswith("dino_"):
        layers = model.get_intermediate_layers(x, DINO_LAYERS)
        for layer, tokens in zip(DINO_LAYERS, layers, strict=True):
            expected = array(f"{case}/block{layer}")
            torch.testing.assert_close(tokens[:, :4], expected, atol=2e-4, rtol=0)


def test_dino_gives_maps_of_four_layers_without_the_class_token():
    dino = DINOFeatures()
    load(dino, dino.vit, "dino_deitsmall16_pretrain")
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    normalized = (images / 2 + 0.5 - dino.vit.imagenet_mean) / dino.vit.imagenet_std
    layers = dino.vit.get_intermediate_layers(normalized, DINO_LAYERS)
    for feat, tokens in zip(dino(images), layers, strict=True):
        assert feat.shape == (2, 384, 2, 3)  # 2 x 3 patches
        for row in range(2):
            for column in range(3):
                assert torch.equal(feat[:, :, row, column], tokens[:, 1 + 3 * row + column])
    with pytest.raises(ValueError, match="multiples of 16, not 40 x 40"):
        dino(torch.zeros(1, 3, 40, 40))


def test_dinov2_teacher_converts_images_to_its_grid():
    """A teacher resizes images to 14 * grid_size and normalizes them; here the size fits."""
    model = TEACHERS["dinov2_vits14"](16)
    load(model, model.vit, "dinov2_vits14_pretrain")
    images = array("dinov2_vits14/image")[None].float() / 127.5 - 1
    cls, patches = model(images)
    torch.testing.assert_close(cls, array("dinov2_vits14/cls"), atol=1e-4, rtol=0)
    assert patches.shape == (1, 256, 384)
    _, patches_of_small = model(F.interpolate(images, size=64))
    assert patches_of_small.shape == (1, 256, 384)
    with pytest.raises(ValueError, match="multiples of 14, not 224 x 225"):
        model.vit(torch.zeros(1, 3, 224, 225))


def test_teachers_are_made_by_name_and_refuse_other_ranges():
    assert TEACHERS.keys() == {"hog", *VIT_CONFIGS} - {"dino_vits16"}
    with torch.device("meta"):
        teacher = TEACHERS["dinov2_vitb14_reg"](7)
    assert teacher.grid_size == 7
    assert teacher.vit.width == 768
    assert teacher.vit.num_registers == 4
    assert isinstance(TEACHERS["hog"](4), HOG)
    for teacher in (TEACHERS["hog"](4), TEACHERS["dinov2_vits14"](4)):
        with pytest.raises(RuntimeError, match="images must lie in"):
            teacher(torch.full((1, 3, 16, 16), 255.0))


def test_hog_cls_finds_the_object():
    """On the built-in shapes, cos(cls, patch) tells patches on the object from the others.

    It is measured by the area under the ROC curve.
    """
    shapes = Shapes(32)
    teacher = HOG(8)
    areas = []
    for index in range(60):
        image, _ = shapes[index]
        foreground = image.amax(0) > 145  # of 255: half way from the background to the shape
        (scores,) = cls_similarity(*teacher(to_float(image)[None]))
        on_object = F.avg_pool2d(foreground.float()[None], 4).flatten() > 0.5
        ranks = rankdata(scores)[on_object.numpy()]
        count = len(ranks)
        area = (ranks.sum() - count * (count + 1) / 2) / (count * (64 - count))
        areas.append(area)
    assert sum(areas) / len(areas) > 0.95


def test_hog_bins_follow_the_gradient():
    """A horizontal ramp has the angle 0, a vertical one a right angle: bins 0 and NUM_BINS / 2."""
    ramp = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16)
    ramp = ramp * torch.linspace(0.5, 1, 16)[:, None].square()

    def histogram(images: torch.Tensor) -> torch.Tensor:
        _, patches = HOG(4)(images)
        return patches.abs().mean((0, 1))[: HOG.NUM_BINS]

    assert histogram(ramp).argmax() == 0
    assert histogram(ramp.transpose(2, 3)).argmax() == HOG.NUM_BINS // 2


def test_alignment_equals_the_equations_written_out():
    torch.manual_seed(0)
    module = AlignmentLoss(4, 16, 6)
    z = torch.randn(2, 3, 4)
    cls = torch.randn(2, 6)
    patches = torch.randn(2, 12, 6)
    targets = {"teacher": (cls, patches)}
    losses = module(z, targets, torch.ones(2, 12, dtype=torch.bool))
    # Eq. 3: each latent is repeated N / L = 4 times.
    repeated = torch.stack([z[:, n // 4] for n in range(12)], dim=1)
    cosine = F.cosine_similarity(module.local_mlp(repeated), patches, dim=-1)
    torch.testing.assert_close(losses["local"], 1 - cosine.mean())
    expected = 1 - F.cosine_similarity(module.global_mlp(z.mean(1)), cls, dim=-1).mean()
    torch.testing.assert_close(losses["global"], expected)
    assert losses.keys() == {"local", "global"}
    assert losses == module(z, targets)  # the mask does not matter
    assert isinstance(module.local_mlp, Mlp)
    assert 0 <= losses["local"] <= 2


def test_alignment_can_be_learned_to_zero():
    torch.manual_seed(0)
    module = AlignmentLoss(4, 64, 6)
    z = torch.randn(4, 3, 4, requires_grad=True)
    targets = {"teacher": (torch.randn(4, 6), torch.randn(4, 3, 6))}
    optimizer = torch.optim.Adam([z, *module.parameters()], lr=1e-2)
    for _ in range(300):
        loss = sum(module(z, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
