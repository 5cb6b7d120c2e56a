"""A direction that a matrix has in the eigenbasis of its gradients: Adam's without momentum, rotated there and back.

SOAP (Vyas et al. 2024, arXiv 2409.11321, Algorithm 3), but for what a factor would change: who uses the direction
brings it to size, so that second moments need no bias correction.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _functorch

from l2o.ops.orthogonal import as_matrix, product_dtype
from l2o.types import Run, Slots

Weigh = Callable[[Tensor, Tensor, Tensor], Tensor]

_STAY = 1e-6
"""Beside the largest entry of a product: directions in which no gradient lies yet stay, and do not follow rounding."""
_SIDES = (("left", "rows"), ("right", "columns"))
"""The products of a side, and its basis."""
_LEAST, _LEAST_BFLOAT16 = 1e-10, 1e-5
"""Share of the mean second moment under which one is rounding: that of directions in which no gradient lies yet."""


def init_basis(param: Tensor, shape: tuple[int, ...]) -> Slots:
    """Return the slots of a matrix of ``shape [rows, ...]``, of which ``param`` is the whole or a part.

    Second moments in the basis, ``v``, are like ``param``. Of the whole matrix are the running means of its gradients'
    products, ``left [rows, rows]`` and ``right [columns, columns]``, and their eigenvectors, the columns of ``rows``
    and ``columns``; of a row or a column of entries there is one side, for a side of one has nothing to turn.
    """
    rows, columns = as_matrix(shape)
    sides = {side: n for side, n in zip(_SIDES, (rows, columns), strict=True) if n > 1}
    products = {product: param.new_zeros(n, n) for (product, _), n in sides.items()}
    bases = {basis: torch.eye(n, dtype=param.dtype, device=param.device) for (_, basis), n in sides.items()}
    return {"v": param.new_zeros(param.shape), **products, **bases}


def whiten(
    momentum: Tensor,
    grad: Tensor,
    slots: Slots,
    keep: Tensor,
    due: Tensor | bool,
    weigh: Weigh | None = None,
    carried: bool = False,
    cautious: bool = False,
) -> tuple[Tensor, Slots]:
    """Return the direction of ``momentum``, of any size, and the new slots of `init_basis`, ``[k, ...]``.

    momentum, grad: ``[k, rows, columns]``.     keep: 0-d, of the running means.
    due: whether the basis follows: by one step of orthogonal iteration for each side, of which no derivative is taken.
    carried: whether second moments follow it, as those of entries that do not correlate would; in SOAP they stay.
    cautious: whether momentum rests where the gradient has another sign, in the basis (Liang et al. 2024, Cautious
        Optimizers, arXiv 2411.16085, have it so for entries).
    weigh: makes the direction of momentum and gradient in the basis, over the root of second moments, and these.
    Without a basis in ``slots``, entries are what second moments are of.
    """
    narrow = product_dtype(grad)
    turns = any(basis in slots for _, basis in _SIDES)
    dtype = narrow if turns and product_dtype(grad.mT) == narrow else grad.dtype
    g, m = grad.to(dtype), momentum.to(dtype)
    new: Slots = {}
    for (product, basis), x in zip(_SIDES, (g, g.mT), strict=True):
        if basis in slots:
            new[product] = torch.lerp((x @ x.mT).to(grad.dtype), slots[product], keep)
            new[basis] = _followed(slots[basis], new[product], due)
    bases = {basis: new[basis].to(dtype) for _, basis in _SIDES if basis in new}
    turned, seen = (_turned(x, bases).to(grad.dtype) for x in (m, g))
    turned = torch.where(turned * seen.sign() > 0, turned, 0.0) if cautious else turned
    before = slots["v"].reshape(grad.shape)
    v = torch.lerp(seen.square(), _carried(before, slots, new, due) if carried else before, keep)
    share = _LEAST_BFLOAT16 if dtype == torch.bfloat16 else _LEAST
    squares = v + share * v.mean((-2, -1), keepdim=True)
    squares = squares.clamp(min=torch.finfo(v.dtype).tiny)  # before any gradient: 0 times a number
    roots = squares.rsqrt()
    scaled = turned * roots if weigh is None else weigh(turned * roots, seen * roots, squares)
    direction = _turned(scaled.to(dtype), {basis: t.mT for basis, t in bases.items()}).to(grad.dtype)
    return direction, {"v": v.view(slots["v"].shape), **new}


def is_due(run: Run, period: int, early: int = 0) -> Tensor | bool:
    """Say whether a step is one of every ``period``, or of the first ``early``: 0-d, or a bool where it is so for all
    lanes and nothing is compiled.

    Waits for the device in unrolls, but not in the plug-in, which says what the host knows.
    """
    if run.called is not None:
        return run.called % period == 0 or run.called < early
    known = due = (torch.remainder(run.step, period) == 0) | (run.step < early)
    if torch.compiler.is_compiling():
        return due
    while _functorch.is_functorch_wrapped_tensor(known):
        known = _functorch.get_unwrapped(known)
    lanes = int(known.sum())
    return due if 0 < lanes < known.numel() else lanes > 0


def _turned(x: Tensor, bases: Slots) -> Tensor:
    """``[k, rows, columns]`` in the bases of its sides, of those that have one."""
    x = bases["rows"].mT @ x if "rows" in bases else x
    return x @ bases["columns"] if "columns" in bases else x


def _followed(basis: Tensor, product: Tensor, due: Tensor | bool) -> Tensor:
    """``basis`` once it has been multiplied by ``product``, whose scale does not matter, and made orthogonal."""
    if due is False:
        return basis
    with torch.no_grad():
        largest = product.abs().amax((-2, -1), keepdim=True)
        scaled = product / torch.where(largest > 0, largest, 1.0)
        new, _ = torch.linalg.qr(scaled @ basis + _STAY * basis)
        return new.contiguous() if due is True else torch.where(due, new, basis).contiguous()


def _carried(v: Tensor, slots: Slots, new: Slots, due: Tensor | bool) -> Tensor:
    """Second moments ``[k, rows, columns]`` in the bases of ``new``: shares of those before, by squares of cosines."""
    if due is False:
        return v
    turns = {basis: (slots[basis].mT @ new[basis]).square() for _, basis in _SIDES if basis in new}
    carried = _turned(v, turns)
    return carried if due is True else torch.where(due, carried, v)
