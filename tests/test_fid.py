import numpy as np
import pytest
import torch
from reference import ARRAYS, array

import fid


def images(name):
    return array(f"psnr_ssim/{name}").permute(0, 3, 1, 2)


def test_psnr_and_ssim_equal_scikit_image():
    torch.testing.assert_close(fid.psnr(images("a"), images("b")), array("psnr_ssim/psnr_u8"), atol=1e-6, rtol=0)
    torch.testing.assert_close(fid.ssim(images("a"), images("b")), array("psnr_ssim/ssim_gauss_u8"), atol=1e-6, rtol=0)


def test_psnr_of_a_known_error_and_of_equal_images():
    a = torch.full((1, 3, 12, 12), 100, dtype=torch.uint8)
    assert fid.psnr(a, a + 10).item() == pytest.approx(10 * np.log10(255**2 / 100))
    assert fid.psnr(a, a).item() == np.inf and fid.ssim(a, a).item() == pytest.approx(1)


@pytest.mark.parametrize("a, b", [((1, 3, 12, 12), (1, 3, 12, 13)), ((3, 12, 12), (3, 12, 12))])
def test_unequal_shapes_are_refused(a, b):
    with pytest.raises(ValueError, match="same shape"):
        fid.psnr(torch.zeros(a), torch.zeros(b))


def test_ssim_refuses_tiny_images():
    with pytest.raises(ValueError, match="11 x 11"):
        fid.ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def reference(name):
    return ARRAYS[f"metrics_fid/{name}"]


def test_frechet_distance_equals_pytorch_fid():
    stored = fid.frechet_distance(reference("mu_a"), reference("sigma_a"), reference("mu_b"), reference("sigma_b"))
    assert stored == pytest.approx(float(reference("fid_pytorchfid")), rel=1e-7)
    few = fid.frechet_distance(*fid.statistics(reference("small_a")), *fid.statistics(reference("small_b")))
    assert few == pytest.approx(float(reference("fid_small_float64_eigh")), rel=1e-6)  # 40 and 50 rows of 64: singular
    assert few == pytest.approx(float(reference("fid_small_pytorchfid")), rel=1e-6)


def test_frechet_distance_closed_forms():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((500, 8))
    mean, cov = fid.statistics(features)
    shift = np.arange(8.0)
    assert fid.frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-9)
    assert fid.frechet_distance(mean, cov, *fid.statistics(features + shift)) == pytest.approx((shift**2).sum())
    assert fid.frechet_distance(mean, cov, mean, 4 * cov) == pytest.approx(np.trace(cov))  # (2 - 1)^2 tr S
    assert fid.frechet_distance(mean, np.diag(shift), mean, np.zeros((8, 8))) == pytest.approx(shift.sum())


def test_bad_features_are_named():
    with pytest.raises(ValueError, match="not finite"):
        fid.statistics(np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="at least 2"):
        fid.statistics(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="4 and of 3"):
        fid.frechet_distance(np.zeros(4), np.eye(4), np.zeros(3), np.eye(3))
