"""Muon, an optimizer for matrices (Jordan et al. 2024), as train.py needs it.

torch.optim.Muon exists from PyTorch 2.9 on; this one runs on older versions, too. Like the fused
AdamW, it skips steps whose gradients are not finite without waiting for the GPU. It orthogonalizes
all matrices of one shape in one product.
"""

import torch
from torch import Tensor
from torch.optim import Optimizer

# Coefficients of the Newton-Schulz iteration x -> a x + b x^3 + c x^5 on singular values in [0, 1],
# chosen by Jordan for a steep start. Five iterations bring all but tiny ones to 0.7 ... 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, num_iterations: int = 5) -> Tensor:
    """Replace the singular values of matrices (n, rows, columns) by about 1.

    An iteration multiplies x from the left by the factor a + b x x^T + c (x x^T)^2. All factors are
    polynomials in the first x x^T, so they commute. Their product is computed first and meets x
    once: products of (rows, rows) cost less than products with x, whose longer side is last. The
    squares have to be exact: their errors grow from one iteration to the next.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    if x.device.type == "cuda":
        x = x.double()  # train.py allows TF32, whose rounding is too coarse for this
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    gram = x @ x.mT
    identity = torch.ones_like(x[0, :, 0]).diag()
    product = identity
    for _ in range(num_iterations):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor  # x x^T after this iteration
    x = product @ x
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(Optimizer):
    """Moves matrices by their orthogonalized momentum.

    An update has the same root mean square as a typical one of AdamW, 0.2 lr (Liu et al. 2025), so
    that both optimizers share a learning rate. If the attribute `found_inf`, a tensor, is 1, a step
    changes nothing.
    """

    def __init__(self, matrices: list[Tensor], lr: float = 1e-3, momentum: float = 0.95):
        groups = {}
        for matrix in matrices:
            groups.setdefault(matrix.shape, []).append(matrix)
        param_groups = [{"params": group} for group in groups.values()]
        super().__init__(param_groups, {"lr": lr, "momentum": momentum})
        self.found_inf = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            if matrices:
                self.step_group(matrices, group["lr"], group["momentum"])

    def step_group(self, matrices: list[Tensor], lr: float, momentum: float) -> None:
        """Step all matrices of one shape."""
        for matrix in matrices:
            if "momentum" not in self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        buffers = [self.state[matrix]["momentum"] for matrix in matrices]
        grads = torch.stack([matrix.grad for matrix in matrices])
        averages = torch.stack(buffers).lerp(grads, 1 - momentum)
        updates = orthogonalize(grads.lerp(averages, momentum))  # Nesterov's form
        # An orthogonal matrix has the root mean square 1 / sqrt(longer side).
        scale = 0.2 * max(matrices[0].shape) ** 0.5
        for matrix, buffer, average, update in zip(matrices, buffers, averages, updates):
            new = matrix - lr * scale * update
            if self.found_inf is not None:
                skip = self.found_inf.bool()
                average = torch.where(skip, buffer, average)
                new = torch.where(skip, matrix, new)
            buffer.copy_(average)
            matrix.copy_(new)
