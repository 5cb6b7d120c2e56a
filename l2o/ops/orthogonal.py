"""Orthogonalisation of matrices by Newton-Schulz iterations (Muon, Jordan 2024, kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from torch import Tensor

from l2o.ops.numeric import safe_sqrt

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration; tuned for speed, singular values end between about 0.7 and 1.2."""


def orthogonalize(matrices: Tensor, steps: int = 5, eps: float = 1e-8) -> Tensor:
    """``[..., rows, columns]`` with the singular values of each matrix brought near one; a zero matrix stays zero."""
    a, b, c = COEFFICIENTS
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / (safe_sqrt(x.square().sum((-2, -1), keepdim=True)) + eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT
