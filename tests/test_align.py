import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reference import array, filled, imagenet_normalised
from scipy.stats import rankdata

import align
from align import DINO, HOG, TEACHERS, VITS, Alignment, CellHOG, ViT, build_heads, build_tokenizer
from masking import similarity
from plumbing.data import to_float
from plumbing.shapes import Shapes
from tokenizer import Mlp, Point, Tokenizer


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
        image = shapes[index][0]
        foreground = image.amax(0) > 145  # of 255: half way from the ramp to the shape
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
    targets = {"teacher": (cls, patches)}
    losses = module(z, targets, torch.ones(2, 12, dtype=torch.bool))
    repeated = torch.stack([z[:, n // 4] for n in range(12)], dim=1)  # eq. 3: each latent N / L = 4 times
    cosine = F.cosine_similarity(module.local_mlp(repeated), patches, dim=-1)
    torch.testing.assert_close(losses["local"], 1 - cosine.mean())
    expected = 1 - F.cosine_similarity(module.global_mlp(z.mean(1)), cls, dim=-1).mean()
    torch.testing.assert_close(losses["global"], expected)
    assert losses.keys() == {"local", "global"} and losses == module(z, targets)  # the mask is of no matter
    assert isinstance(module.local_mlp, Mlp) and 0 <= losses["local"] <= 2


def test_alignment_can_be_learned_to_zero():
    torch.manual_seed(0)
    module = Alignment(4, 64, 6)
    z = torch.randn(4, 3, 4, requires_grad=True)
    targets = {"teacher": (torch.randn(4, 6), torch.randn(4, 3, 6))}
    optimizer = torch.optim.Adam([z, *module.parameters()], lr=1e-2)
    for _ in range(300):
        loss = sum(module(z, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


NONE = dict.fromkeys(("local", "global", "features", "hog", "preservation"), 0.0)


def tokenizer(**changes) -> Tokenizer:
    return Tokenizer(**{"image_size": 16, "patch_size": 4, "tokens": 4, "channels": 3, "size": "toy"} | changes)


def test_heads_are_those_with_a_weight_at_the_teachers_width_and_act_as_one():
    made, z, mask = tokenizer(), torch.randn(2, 4, 3), torch.ones(2, 16, dtype=torch.bool)
    teachers, images = {"teacher": HOG(4), "hog": CellHOG(4, 4)}, torch.rand(2, 3, 16, 16) * 2 - 1
    targets = {name: teacher(images) for name, teacher in teachers.items()} | {"before": Point(torch.zeros_like(z))}
    assert build_heads(NONE, made, teachers)(z, targets, mask) == {}
    together = build_heads(dict.fromkeys(NONE, 1.0), made, teachers)(z, targets, mask)
    assert together.keys() == NONE.keys() and all(loss.ndim == 0 and loss > 0 for loss in together.values())
    for term in NONE:
        alone = build_heads(NONE | {term: 1.0}, made, teachers)(z, targets, mask)
        assert alone.keys() == ({"local", "global"} if term in ("local", "global") else {term})
    for name, width in (("dinov2_vits14", 384), ("dinov2_vitl14_reg", 1024)):
        with torch.device("meta"):
            head = build_heads(NONE | {"local": 1.0, "features": 1.0}, made, {"teacher": TEACHERS[name](2)})
        local, decoder = head[0].local_mlp, head[1].decoder
        assert (local.fc1.in_features, local.fc1.out_features, local.fc2.out_features) == (3, 128, width)
        assert (decoder.to_patches.out_features, len(decoder.blocks)) == (width, 3)


def test_a_feature_decoder_has_the_published_width_at_b():
    with torch.device("meta"):
        made = Tokenizer(256, 16, 128, 32, "B")
        decoder = build_heads(NONE | {"hog": 1.0}, made, {"hog": CellHOG(16, 16)})[0].decoder
    assert (decoder.norm.normalized_shape, decoder.blocks[0].attn.heads, decoder.to_patches.out_features) == ((192,), 3, 108)


def test_the_feature_loss_is_of_hidden_patches_only():
    prediction, target = torch.randn(3, 16, 5), torch.randn(3, 16, 5)
    mask = torch.arange(16).expand(3, 16) < torch.tensor([[4], [0], [16]])  # 4, no, all patches hidden
    loss = align.masked_mse(prediction, target, mask)
    error = (prediction - target).square()
    torch.testing.assert_close(loss, (error[0, :4].mean() + error[2].mean()) / 3)
    changed = torch.where(mask[..., None], target, 99.0)
    assert align.masked_mse(prediction, changed, mask) == loss
    assert align.masked_mse(prediction, target, mask & ~mask) == 0


def test_the_feature_loss_has_the_reduction_of_maetoks():
    """The reference keeps every 7th patch, its losses are of all: so they are only close."""
    names = ("hog_pred_every7th", "hog_target_every7th", "mask", "hog_loss", "hog_loss_alltokens")
    prediction, target, mask, hidden, everywhere = (array(f"maetok_masked_small/{name}") for name in names)
    mask = mask[:, ::7].bool()
    assert align.masked_mse(prediction, target, mask).item() == pytest.approx(hidden.item(), rel=0.01)
    assert align.masked_mse(prediction, target, mask | True).item() == pytest.approx(everywhere.item(), rel=0.01)


@pytest.mark.parametrize("size, patch", [(128, 8), (256, 16)])
def test_cell_hog_equals_maetoks(size, patch, monkeypatch):
    monkeypatch.setattr(align, "check_range", lambda images: None)  # the reference's noise leaves it
    pixels, every = array(f"maetok_hog/images_{size}"), 7 if size == 256 else 1
    if size == 256:  # kept as a PNG file
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(pixels.numpy().tobytes()))))[None]
    noise = np.random.default_rng(int(array("maetok_hog/noise_seed")) + size).standard_normal((len(pixels), 3, size, size))
    x = (pixels.double() / 127.5 - 1).permute(0, 3, 1, 2).float() + 0.02 * torch.from_numpy(noise.astype(np.float32))
    teacher = CellHOG(16, patch)
    mean, patches = teacher(x)
    expected = array(f"maetok_hog/hog_{size}_every7th" if size == 256 else f"maetok_hog/hog_{size}")
    assert patches.shape == (len(x), 256, teacher.width) and teacher.width == (108 if size == 256 else 27)
    torch.testing.assert_close(patches[:, ::every], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(mean, patches.mean(1))


CONFIG = {"image_size": 16, "patch_size": 4, "tokens": 0, "channels": 5, "size": "toy", "posterior": "point", "teacher": "hog"}


def test_a_larger_dict_makes_a_tokenizer():
    made = build_tokenizer(CONFIG | {"tokens": 4, "encoder_init": "none", "lr": 1.0, "sit": "XL"})
    assert (made.num_patches, made.tokens, made.channels, made.encoder.posterior) == (16, 4, 5, Point)
    with pytest.raises(KeyError, match="posterior"):
        build_tokenizer({key: value for key, value in CONFIG.items() if key != "posterior"})


@pytest.mark.parametrize("teacher", ["hog", "dinov2_vits14"])
def test_a_teacher_is_the_encoder_with_an_adapter(teacher):
    made, images = build_tokenizer(CONFIG | {"encoder_init": "teacher", "teacher": teacher}), torch.rand(2, 3, 16, 16) * 2 - 1
    encoder = made.encoder
    z = encoder.to_moments(encoder.adapter(encoder.teacher(images)[1]))
    reconstruction, posterior, _ = made(images)
    assert made.has_grid and isinstance(posterior, Point) and reconstruction.shape == images.shape
    torch.testing.assert_close(posterior.mean, z)
    mask = torch.arange(16).expand(2, 16) == 5
    grey = images.clone()
    grey[:, :, 4:8, 4:8] = 0
    torch.testing.assert_close(made.encode(images, mask).mean, made.encode(grey).mean)
    with pytest.raises(ValueError, match="cannot be dropped"):
        encoder(images, mask, drop=True)
    reconstruction.square().mean().backward()
    learned = {name for name, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    frozen = {name for name, p in made.named_parameters() if not p.requires_grad}
    assert frozen == ({"encoder.teacher.vit.mask_token"} if teacher != "hog" else set())
    assert any(name.startswith("encoder.teacher") for name in learned) == (teacher != "hog")


def test_preservation_is_the_squared_distance_from_the_latents_before():
    z, before = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    loss = align.Preservation()(z, {"before": Point(before)})["preservation"]
    torch.testing.assert_close(loss, (z - before).square().mean())
    assert align.Preservation()(z, {"before": Point(z)})["preservation"] == 0
