"""Make tests/reference.npz and tests/reference_fid.npz from the public-implementation outputs in a
folder of golden files.

    python tests/make_reference.py GOLDEN_FOLDER    # kept outside the repository

The golden files hold outputs of DINO and DINOv2 (facebookresearch), timm, LPIPS, MAETok (its SiT,
HOG, masked training), DeTok, LightningDiT, REPA's samplers, scikit-image, pytorch-fid,
torch-fidelity and ADM's evaluator on deterministic weights (tests/reference.py, `fill`). Only small
parts are kept: one image per case, a stride over patch tokens.
"""

import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def first_image(x: np.ndarray) -> np.ndarray:
    """Normalised (n, 3, H, W) -> the first image as the uint8 (3, H, W) that it was made from."""
    pixels = (x[0].transpose(1, 2, 0) * STD + MEAN) * 255
    assert np.abs(pixels - np.rint(pixels)).max() < 1e-3
    return np.rint(pixels).astype(np.uint8).transpose(2, 0, 1)


def png(pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> the bytes of a PNG file, smaller than the pixels in an .npz."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return np.frombuffer(file.getvalue(), np.uint8)


def fid_arrays(golden: Path) -> dict[str, np.ndarray]:
    """The first image of each Inception case, and what the metrics need."""
    inception, out = np.load(golden / "inception.npz"), {}
    for i in range(3):
        out[f"inception/image_{i}"] = png(inception[f"images_{i}"][0])
        for name in ("feat64", "feat192", "feat768", "pool3", "logits_unbiased"):
            out[f"inception/{name}_{i}"] = inception[f"torchfidelity_{name}_{i}"][0]
        out[f"inception/pytorchfid_pool3_{i}"] = inception[f"pytorchfid_pool3_{i}"][0]
        for name in ("torchfidelity", "pytorchfid"):
            out[f"inception/{name}_resized_{i}"] = inception[f"{name}_resized_slice_{i}"][:, :8, :8]
    score = np.load(golden / "metrics_is.npz")
    out |= {f"metrics_is/{key}": score[key] for key in score if key != "probs"}
    precision_recall = np.load(golden / "metrics_pr.npz")
    out |= {f"metrics_pr/{key}": precision_recall[key] for key in precision_recall if "2048" in key}
    name = "pt_inception-2015-12-05-6726825d"
    out[f"contract/{name}"] = np.array((golden / "contracts" / f"{name}.json").read_text())
    return out


def sibling_arrays(golden: Path) -> dict[str, np.ndarray]:
    """Of MAETok, l-DeTok and LightningDiT; the large image as a PNG file."""
    kept = {
        "lightningdit2d_small": "x t y norm_probe after_block0 out rope_cos rope_sin "
        "pos_embed_init norm_probe_out",
        "lightningdit1d_small": "x t y norm_probe after_block0 out norm_probe_out",
        "lightningdit_loss": "x1 x0 t_normal model_output t x_t v_target mse_loss cos_loss "
        "total_loss",
        "maetok_hog": "images_128 hog_128 noise_seed",
        "maetok_masked_small": "mask hog_pred_every7th hog_target_every7th hog_loss "
        "hog_loss_alltokens",
        "detok_small": "mask_ratio mask_scores posterior_noise tau latent_noise gamma "
        "train_moments train_latents train_kl_per_sample",
    }
    out = {
        f"{name}/{key}": np.load(golden / f"{name}.npz")[key]
        for name, keys in kept.items()
        for key in keys.split()
    }
    sampler = np.load(
        golden / "lightningdit_sampler.npz"
    )  # unguided: hustvl guides three channels only
    out |= {
        f"lightningdit_sampler/{key}": value
        for key, value in sampler.items()
        if "float32" not in key and "cfg4" not in key
    }
    hog = np.load(golden / "maetok_hog.npz")
    out["maetok_hog/images_256"] = png(hog["images_256"][0])
    out["maetok_hog/hog_256_every7th"] = hog["hog_256"][:, ::7]
    return out


def main(golden: Path) -> None:
    out = sibling_arrays(golden)
    for name in (
        "dinov2_vits14",
        "dinov2_vits14_nonsquare",
        "dinov2_vits14_reg4_nonsquare",
        "dinov2_vits14_patch16",
    ):
        arrays = np.load(golden / f"{name}.npz")
        out[f"{name}/image"] = first_image(arrays["x"])
        out[f"{name}/cls"] = arrays["x_norm_clstoken"][:1]
        out[f"{name}/patches"] = arrays["x_norm_patchtokens"][:1, ::8]
        out[f"{name}/positions"] = arrays["pos_embed_interp_ch0to7"].reshape(-1, 8)
        if "x_norm_regtokens" in arrays:
            out[f"{name}/registers"] = arrays["x_norm_regtokens"][:1]
        if "patch_kernel_every16th" in arrays:
            out[f"{name}/kernel"] = arrays["patch_kernel_every16th"]
    for name in ("dino_vits16", "dino_vits16_interp"):
        arrays = np.load(golden / f"{name}.npz")
        out[f"{name}/image"] = first_image(arrays["x"])
        out[f"{name}/cls"] = arrays["clstoken"][:1]
        out[f"{name}/patches"] = arrays["patchtokens"][:1, ::8]
        out[f"{name}/positions"] = arrays["pos_embed_interp_ch0to7"].reshape(-1, 8)
        for block in (2, 5, 8, 11):
            out[f"{name}/block{block}"] = arrays[f"block{block}_tok0to3"][:1]
    lpips = np.load(golden / "lpips_vgg.npz")
    out |= {f"lpips_vgg/{key}": lpips[f"small_{key}"] for key in ("a", "b", "layers")}
    for name in ("sit1d_small", "sit_loss"):
        out |= {f"{name}/{key}": value for key, value in np.load(golden / f"{name}.npz").items()}
    sampler = np.load(golden / "sampler.npz")
    out |= {
        f"sampler/{key}": value for key, value in sampler.items() if not key.endswith("float32")
    }
    out["sampler/cases"] = np.array((golden / "sampler_cases.json").read_text())
    quality = np.load(golden / "psnr_ssim.npz")
    out |= {
        f"psnr_ssim/{key}": quality[key][:2]
        for key in ("a", "b", "psnr_u8", "ssim_gauss_u8", "ssim_uniform7_u8")
    }
    fid = np.load(golden / "metrics_fid.npz")
    keys = ("mu_a", "sigma_a", "mu_b", "sigma_b", "small_a", "small_b")
    keys += ("fid_float64_eigh", "fid_small_float64_eigh", "fid_pytorchfid", "fid_small_pytorchfid")
    out |= {f"metrics_fid/{key}": fid[key] for key in keys}
    contracts = "dinov2_vits14_pretrain dinov2_vits14_reg4_pretrain dino_deitsmall16_pretrain"
    contracts += " vgg16-397923af lpips_v0.1_vgg sit1d_small maetok_sit-xl-1_c32_l128"
    contracts += " lightningdit2d_small lightningdit1d_small lightningdit_xl-1_c32_16x16"
    for name in contracts.split():
        contract = json.loads((golden / "contracts" / f"{name}.json").read_text())
        out[f"contract/{name}"] = np.array(json.dumps(contract))
    np.savez_compressed(Path(__file__).with_name("reference.npz"), **out)
    np.savez_compressed(Path(__file__).with_name("reference_fid.npz"), **fid_arrays(golden))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
