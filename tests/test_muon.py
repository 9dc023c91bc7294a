"""utils/muon.py beside its formulas; that it skips steps is in test_train.py."""

import pytest
import torch

from utils.muon import NEWTON_SCHULZ, Muon, orthogonalize

SHAPES = [(128, 128), (384, 128), (128, 512)]


def random_matrices(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_become_about_one_and_directions_stay(shape):
    matrices = random_matrices(3, *shape)
    u, scales, v = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalize(100 * matrices)  # at any scale
    diagonal = u.mT @ result @ v.mT
    values = diagonal.diagonal(dim1=1, dim2=2)
    is_large = scales > 0.05 * scales[:, :1]
    assert values[is_large].min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(diagonal, torch.diag_embed(values), atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_has_the_size_of_adamws(shape):
    matrix = torch.zeros(shape)
    muon = Muon([matrix], lr=0.01)
    matrix.grad = random_matrices(*shape)
    muon.step()
    assert matrix.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.2)


def test_steps_are_those_of_the_formula_with_nesterov_momentum():
    matrix = random_matrices(6, 4)
    expected = matrix.clone()
    other = torch.ones(6, 4)  # of the same shape, and without a gradient
    muon = Muon([matrix, other], lr=0.1, momentum=0.9)
    momentum = torch.zeros(6, 4)
    for step in range(3):
        gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        matrix.grad = gradient.clone()
        muon.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        ahead = 0.9 * momentum + 0.1 * gradient
        expected = expected - 0.1 * 0.2 * 6**0.5 * orthogonalize(ahead[None])[0]
    torch.testing.assert_close(matrix, expected)
    assert other.eq(1).all()


def test_orthogonalizing_is_the_iteration_on_the_matrix_itself():
    a, b, c = NEWTON_SCHULZ
    matrices = random_matrices(2, 8, 20)
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + b * gram @ x + c * gram @ gram @ x
    torch.testing.assert_close(orthogonalize(matrices), x, atol=1e-4, rtol=0)
    torch.testing.assert_close(orthogonalize(matrices.mT), x.mT, atol=1e-4, rtol=0)
