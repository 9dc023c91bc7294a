import pytest
import torch
import torch.nn.functional as F
from reference import array, filled, imagenet_normalised
from scipy.stats import rankdata

from align import DINO, HOG, TEACHERS, VITS, Alignment, ViT, build_heads
from masking import similarity
from plumbing.data import to_float
from plumbing.shapes import Shapes
from tokenizer import Mlp


def load(module, vit, weights):
    vit.load_state_dict(filled(weights))
    return module.eval().requires_grad_(False)


CASES = {  # case: name, file
    "dinov2_vits14": ("dinov2_vits14", "dinov2_vits14_pretrain"),
    "dinov2_vits14_nonsquare": ("dinov2_vits14", "dinov2_vits14_pretrain"),
    "dinov2_vits14_reg4_nonsquare": ("dinov2_vits14_reg", "dinov2_vits14_reg4_pretrain"),
    "dino_vits16": ("dino_vits16", "dino_deitsmall16_pretrain"),
    "dino_vits16_interp": ("dino_vits16", "dino_deitsmall16_pretrain"),
}


@pytest.mark.parametrize("case", CASES)
def test_vits_equal_the_official_implementations(case):
    name, weights = CASES[case]
    model = ViT(name)
    load(model, model, weights)
    x = imagenet_normalised(f"{case}/image")
    cls, registers, patches = model(x)
    torch.testing.assert_close(cls, array(f"{case}/cls"), atol=5e-5, rtol=0)
    torch.testing.assert_close(patches[:, ::8], array(f"{case}/patches"), atol=5e-5, rtol=0)
    positions = model.positions(*(side // model.patch_size for side in x.shape[-2:]))
    torch.testing.assert_close(positions[0, :, :8], array(f"{case}/positions"), atol=1e-6, rtol=0)
    if "reg4" in case:
        torch.testing.assert_close(registers, array(f"{case}/registers"), atol=5e-5, rtol=0)
    if case.startswith("dino_"):
        for block, tokens in zip((2, 5, 8, 11), model.levels(x, (2, 5, 8, 11)), strict=True):
            torch.testing.assert_close(tokens[:, :4], array(f"{case}/block{block}"), atol=2e-4, rtol=0)


def test_dino_gives_maps_of_four_levels_without_the_class_token():
    dino = DINO()
    load(dino, dino.vit, "dino_deitsmall16_pretrain")
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    levels = dino.vit.levels((images / 2 + 0.5 - dino.vit.mean) / dino.vit.std, (2, 5, 8, 11))
    for found, tokens in zip(dino(images), levels, strict=True):
        assert found.shape == (2, 384, 2, 3)  # 2 x 3 patches
        assert all(torch.equal(found[:, :, r, c], tokens[:, 1 + 3 * r + c]) for r in range(2) for c in range(3))
    with pytest.raises(ValueError, match="multiples of 16, not 40 x 40"):
        dino(torch.zeros(1, 3, 40, 40))


def test_dinov2_teacher_converts_images_to_its_grid():
    """forward = features of the image resized to 14 * grid and normalised; here the size already fits."""
    model = TEACHERS["dinov2_vits14"](16)
    load(model, model.vit, "dinov2_vits14_pretrain")
    images = array("dinov2_vits14/image")[None].float() / 127.5 - 1
    cls, patches = model(images)
    torch.testing.assert_close(cls, array("dinov2_vits14/cls"), atol=1e-4, rtol=0)
    assert patches.shape == (1, 256, 384)
    assert model(F.interpolate(images, size=64))[1].shape == (1, 256, 384)
    with pytest.raises(ValueError, match="multiples of 14, not 224 x 225"):
        model.vit(torch.zeros(1, 3, 224, 225))


def test_teachers_are_made_by_name_and_refuse_other_ranges():
    assert TEACHERS.keys() == {"hog", *VITS} - {"dino_vits16"}
    with torch.device("meta"):
        teacher = TEACHERS["dinov2_vitb14_reg"](7)
    assert (teacher.grid, teacher.vit.width, teacher.vit.registers) == (7, 768, 4) and isinstance(TEACHERS["hog"](4), HOG)
    for teacher in (TEACHERS["hog"](4), TEACHERS["dinov2_vits14"](4)):
        with pytest.raises(RuntimeError, match="images must lie in"):
            teacher(torch.full((1, 3, 16, 16), 255.0))


def test_hog_cls_finds_the_object():
    """Area under the ROC curve of cos(cls, patch) for "the patch is on the object", on the built-in shapes."""
    shapes, areas = Shapes(32), []
    for index in range(60):
        image, _, foreground = shapes.draw(index)
        scores = similarity(*HOG(8)(to_float(image)[None]))
        on = F.avg_pool2d(foreground.float()[None], 4).flatten() > 0.5
        rank = rankdata(scores[0])[on.numpy()]
        areas.append((rank.sum() - len(rank) * (len(rank) + 1) / 2) / (len(rank) * (64 - len(rank))))
    assert sum(areas) / len(areas) > 0.95


def test_hog_bins_follow_the_gradient():
    """A horizontal ramp has gradient angle 0, a vertical one a right angle: bins 0 and BINS / 2."""
    ramp = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16) * torch.linspace(0.5, 1, 16)[:, None].square()
    across, down = (HOG(4)(x)[1].abs().mean((0, 1))[: HOG.BINS] for x in (ramp, ramp.transpose(2, 3)))
    assert across.argmax() == 0 and down.argmax() == HOG.BINS // 2


def test_alignment_equals_the_equations_written_out():
    torch.manual_seed(0)
    module, z = Alignment(4, 16, 6), torch.randn(2, 3, 4)
    cls, patches = torch.randn(2, 6), torch.randn(2, 12, 6)
    losses = module(z, (cls, patches), torch.ones(2, 12, dtype=torch.bool))
    repeated = torch.stack([z[:, n // 4] for n in range(12)], dim=1)  # eq. 3: each latent N / L = 4 times
    cosine = F.cosine_similarity(module.local_mlp(repeated), patches, dim=-1)
    torch.testing.assert_close(losses["local"], 1 - cosine.mean())
    expected = 1 - F.cosine_similarity(module.global_mlp(z.mean(1)), cls, dim=-1).mean()
    torch.testing.assert_close(losses["global"], expected)
    assert losses.keys() == {"local", "global"} and losses == module(z, (cls, patches))  # the mask is of no matter
    assert isinstance(module.local_mlp, Mlp) and 0 <= losses["local"] <= 2


def test_alignment_can_be_learned_to_zero():
    torch.manual_seed(0)
    module = Alignment(4, 64, 6)
    z = torch.randn(4, 3, 4, requires_grad=True)
    targets = torch.randn(4, 6), torch.randn(4, 3, 6)
    optimizer = torch.optim.Adam([z, *module.parameters()], lr=1e-2)
    for _ in range(300):
        loss = sum(module(z, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_heads_are_those_with_a_weight_at_the_teachers_width_and_act_as_one():
    z, targets = torch.randn(2, 3, 4), (torch.randn(2, 11), torch.randn(2, 12, 11))
    assert build_heads({"local": 0.0, "global": 0.0}, 4, 16, HOG(2))(z, targets) == {}
    for weights in ({"local": 1.0, "global": 0.0}, {"local": 0.0, "global": 1.0}):
        heads = build_heads(weights, 4, 16, HOG(2))
        assert heads(z, targets) == heads[0](z, targets) and list(heads.parameters())
    heads.append(other := torch.nn.Module())
    other.forward = lambda z, targets, mask: {"hidden": mask.float().mean()}
    merged = heads(z, targets, torch.ones(2, 12, dtype=torch.bool))
    assert merged == heads[0](z, targets) | {"hidden": 1}
    for name, width in (("dinov2_vits14", 384), ("dinov2_vitl14_reg", 1024)):
        with torch.device("meta"):
            local = build_heads({"local": 1.0, "global": 1.0}, 4, 16, TEACHERS[name](2))[0].local_mlp
        assert (local.fc1.in_features, local.fc1.out_features, local.fc2.out_features) == (4, 16, width)
