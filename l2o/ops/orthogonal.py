"""Directions that a matrix gives whatever its scale: orthogonalised, or with rows and columns of unit size."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from l2o.ops.numeric import over_root, safe_sqrt, unit

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration (Muon, Jordan 2024, kellerjordan.github.io/posts/muon); tuned for speed, singular values end
between about 0.7 and 1.2."""

_LONG, _LONG_BFLOAT16 = 2.5, 16.0
"""Columns over rows from which the iteration is cheaper on the Gram matrix: two products with all columns instead of
two a step, but four small ones a step, which are float32 also where the others are bfloat16."""
_GRAM_STEPS = 3
_SMALL = 0.01
"""Squared norm of a row or column, relative to the mean, at which its factor is 0.7 of what makes it one."""
_LARGE = 128
"""Rows from which products take longer than to begin them."""


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of a tensor of this shape: its first axis, and all others."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Say whether `as_matrix` gives more than a row, a column or nothing at all."""
    return min(as_matrix(shape)) > 1


def matrices(tensors: Tensor) -> Tensor:
    """Reshape ``tensors [k, *shape] -> [k, rows, columns]``."""
    return tensors.reshape(len(tensors), *as_matrix(tensors.shape[1:]))


def orthogonalize(matrices: Tensor, steps: int = 5, eps: float = 1e-8) -> Tensor:
    """Return ``matrices [..., rows, columns]`` with their singular values brought near one; a zero matrix stays
    zero."""
    x = _wide(matrices)
    x = newton_schulz(x / (safe_sqrt(x.square().sum((-2, -1), keepdim=True)) + eps), steps)
    return x if _is_wide(matrices) else x.mT


def polar(matrices: Tensor, steps: int) -> Tensor:
    """Do what `orthogonalize` does in the cheapest form, and without an epsilon, so that no scale is too small.

    matrices: ``[..., rows, columns]``. In float32, those of 128 rows and columns and more are multiplied as bfloat16
    where the device has units for it and nothing is differentiated, with an error of some 1%; Muon does so everywhere.
    """
    if len(matrices) == 1 and matrices.ndim == 3:  # a product of two matrices is faster than a batch of one
        return polar(matrices.squeeze(0), steps).unsqueeze(0)
    x = unit(_wide(matrices), (-2, -1))
    x = x.to(product_dtype(x)).contiguous()
    rows, columns = x.shape[-2:]
    long = _LONG_BFLOAT16 if x.dtype == torch.bfloat16 else _LONG
    x = newton_schulz_gram(x, steps) if columns > long * rows else newton_schulz(x, steps)
    return (x if _is_wide(matrices) else x.mT).to(matrices.dtype)


def newton_schulz(x: Tensor, steps: int) -> Tensor:
    """Iterate ``x <- a x + (b x xᵀ + c (x xᵀ)²) x``.  x: ``[..., rows, columns]``, rows <= columns, of norm at most
    one."""
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = _add_product(a, x, 1.0, _add_product(b, gram, c, gram, gram), x)
    return x


def newton_schulz_gram(x: Tensor, steps: int) -> Tensor:
    """Return `newton_schulz` of ``[..., rows, columns]`` with two products of all columns every three steps.

    x: as there. Each step multiplies from the left by a polynomial ``q`` of ``g = x xᵀ``; all of these commute, so that
    ``x <- q x`` is ``g <- q q g``. But for a fresh ``g``, what rounding put below 0 would grow by ``a²`` a step.
    """
    if steps > _GRAM_STEPS:
        return newton_schulz_gram(newton_schulz_gram(x, _GRAM_STEPS), steps - _GRAM_STEPS)
    a, b, c = COEFFICIENTS
    gram = x @ x.mT
    gram = gram.float() if x.dtype == torch.bfloat16 else gram
    product = identity = torch.eye(x.shape[-2], dtype=gram.dtype, device=x.device)
    for _ in range(steps):
        q = a * identity + _add_product(b, gram, c, gram, gram)
        product, gram = q @ product, q @ q @ gram
    return product.to(x.dtype) @ x


def row_column_scales(
    matrices: Tensor,
    lengths: tuple[int, int] | None = None,
    reduce: Callable[[dict[str, Tensor]], Sequence[Tensor]] = lambda sums: list(sums.values()),
) -> tuple[Tensor, Tensor]:
    """Return ``[..., rows]`` and ``[..., columns]``: factors that make the rows of a matrix, then its columns of one
    norm.

    Its mean square is then one. One round of the iteration of Scetbon et al. 2025 (arXiv 2502.06742), but for rows and
    columns far smaller than the others, which stay small: a row whose gradients have ended is to stop, not to go on at
    full size for as long as its momentum can be told from 0.

    lengths: rows and columns of the whole matrix, where ``matrices`` is a part.
    reduce: completes sums over ``rows``, ``columns`` or ``all``.
    """
    one, (rows, columns) = matrices.new_ones(()), lengths or matrices.shape[-2:]
    squares = matrices.square().sum(-1)
    squares, total = reduce({"columns": squares, "all": squares.sum(-1, keepdim=True)})
    row = over_root(one, squares + _SMALL * total / rows)
    squares = (matrices * row.unsqueeze(-1)).square().sum(-2)
    squares, total = reduce({"rows": squares, "all": squares.sum(-1, keepdim=True)})
    col = over_root(one, squares + _SMALL * total / columns)
    (total,) = reduce({"columns": (squares * col.square()).sum(-1, keepdim=True)})
    return row, col * over_root(one * (rows * columns) ** 0.5, total)


def _add_product(scale: float, x: Tensor, factor: float, left: Tensor, right: Tensor) -> Tensor:
    """``scale * x + factor * left @ right``, ``[..., rows, columns]``, where torch can in one pass over the result."""
    if x.ndim > 3:
        return scale * x + factor * left @ right
    product = torch.addmm if x.ndim == 2 else torch.baddbmm
    return product(x, left, right, beta=scale, alpha=factor)


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x @ y``, ``[..., rows, columns]``; a product of two matrices is faster than a batch of one."""
    alone = x.ndim == y.ndim == 3 and len(x) == len(y) == 1
    return (x.squeeze(0) @ y.squeeze(0)).unsqueeze(0) if alone else x @ y


def _is_wide(matrices: Tensor) -> bool:
    return matrices.shape[-2] <= matrices.shape[-1]


def _wide(matrices: Tensor) -> Tensor:
    return matrices if _is_wide(matrices) else matrices.mT


def product_dtype(x: Tensor) -> torch.dtype:
    """Return what ``x [..., rows, columns]`` is multiplied as: bfloat16 where it is large, the device has units for it,
    and nothing is differentiated."""
    large = x.dtype == torch.float32 and x.shape[-2] >= _LARGE
    return torch.bfloat16 if large and not torch.is_grad_enabled() and _has_bfloat16_units(x.device.type) else x.dtype


@functools.cache
def _has_bfloat16_units(device: str) -> bool:
    if device == "cpu":  # AMX, ten times as fast as float32, or AVX-512's, four times, both by way of oneDNN
        units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return units and torch.backends.mkldnn.is_available()
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
