"""A direction that a matrix has in the eigenbasis of its gradients: Adam's, of gradients rotated there, rotated back.

SOAP (Vyas et al. 2024, arXiv 2409.11321, Algorithm 3), but for what a factor would change: who uses the direction
brings it to size, so that second moments need no bias correction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch

from l2o.ops.moments import Shares, nesterov
from l2o.ops.orthogonal import as_matrix, product, product_dtype
from l2o.types import Run, Slots

Weigh = Callable[[Tensor, Tensor, Tensor], Tensor]
Follow = Callable[["Whitening", Slots, Slots], Slots]

_STAY = 1e-6
"""Beside the largest entry of a product: directions in which no gradient lies yet stay, and do not follow rounding."""
MEANS, BASES = ("left", "right"), ("rows", "columns")
"""By side: the running mean of its products, and its basis."""
_SIDES = tuple(zip(MEANS, BASES, strict=True))
_LEAST, _LEAST_BFLOAT16 = 1e-10, 1e-5
"""Share of the mean second moment under which one is rounding: that of directions in which no gradient lies yet."""


def init_basis(param: Tensor, shape: tuple[int, ...]) -> Slots:
    """Return the slots of a matrix of ``shape [rows, ...]``, of which ``param`` is the whole or a part.

    Momentum and second moments in the basis, ``turned`` and ``v``, are like ``param``. Of the whole matrix are the
    running means of its gradients' products, ``left [rows, rows]`` and ``right [columns, columns]``, and their
    eigenvectors, the columns of ``rows`` and ``columns``; of a row or a column of entries there is one side, for a side
    of one has nothing to turn.
    """
    rows, columns = as_matrix(shape)
    sides = {side: n for side, n in zip(_SIDES, (rows, columns), strict=True) if n > 1}
    products = {mean: param.new_zeros(n, n) for (mean, _), n in sides.items()}
    bases = {basis: torch.eye(n, dtype=param.dtype, device=param.device) for (_, basis), n in sides.items()}
    moments = {name: param.new_zeros(param.shape) for name in ("turned", "v")}
    return moments | products | bases


class Whitening(NamedTuple):
    """How a step whitens, the same for all tensors.

    momentum: shares of Nesterov's momentum, which is kept in the basis and follows it.
    keep: 0-d, of the running means of squares and products.
    due: whether bases follow products: by one step of orthogonal iteration, of which no derivative is taken.
    weigh: makes the direction of momentum and gradient in the basis, over the root of second moments, and these.
    carried: whether second moments follow them, by squares of cosines, as those of entries that do not correlate would;
        in SOAP they stay.
    cautious: whether momentum rests where the gradient has the other sign, in the basis (Liang et al. 2024, Cautious
        Optimizers, arXiv 2411.16085, have it so for entries).
    """

    momentum: Shares
    keep: Tensor
    due: Tensor | bool = True
    weigh: Weigh | None = None
    carried: bool = False
    cautious: bool = False


class Turned(NamedTuple):
    """Matrices in the basis of their gradients, ``[..., rows, columns]``.

    seen: the gradient.     m, v: momentum and second moments before it.     bases: in the dtype of products.
    new: the new products and bases, by their names.
    """

    seen: Tensor
    m: Tensor
    v: Tensor
    bases: Slots
    new: Slots

    @property
    def least(self) -> float:
        """Share of the mean second moment under which one is rounding."""
        narrow = any(basis.dtype == torch.bfloat16 for basis in self.bases.values())
        return _LEAST_BFLOAT16 if narrow else _LEAST


def whiten(how: Whitening, grad: Tensor, slots: Slots) -> tuple[Tensor, Slots]:
    """Return the direction of the momentum, of any size, and the new slots of `init_basis`, ``[..., *]``.

    grad: ``[..., rows, columns]``. Without a basis in ``slots``, moments are of entries, and the first is ``m``.
    """
    turned = turn(how, grad, slots)
    scaled, m, v = weighed(how, turned)
    first = "turned" if turned.bases else "m"
    new = {name: t.view(slots[name].shape) for name, t in ((first, m), ("v", v))}
    return turned_back(scaled, turned.bases), new | turned.new


def turn(how: Whitening, grad: Tensor, slots: Slots, follow: Follow | None = None) -> Turned:
    """Return what a step weighs, in bases that have followed.  grad: ``[..., rows, columns]``.  As in `whiten`.

    follow: `followed`, unless somebody has it faster.
    """
    narrow = product_dtype(grad)
    turns = any(basis in slots for _, basis in _SIDES)
    g = grad.to(narrow if turns and product_dtype(grad.mT) == narrow else grad.dtype)
    new: Slots = {}
    for (mean, basis), x in zip(_SIDES, (g, g.mT), strict=True):
        if basis in slots:
            new[mean] = torch.lerp(product(x, x.mT).to(grad.dtype), slots[mean], how.keep)
    momentum = "turned" if turns else "m"
    moments = {name: slots[name].reshape(grad.shape) for name in (momentum, "v")}
    kept = moments | {basis: slots[basis] for _, basis in _SIDES if basis in slots}
    if turns and how.due is not False:
        kept = (follow or followed)(how, kept, new)
    new |= {basis: kept[basis] for _, basis in _SIDES if basis in kept}
    bases = {basis: new[basis].to(g.dtype) for _, basis in _SIDES if basis in new}
    return Turned(_turned(g, bases).to(grad.dtype), kept[momentum], kept["v"], bases, new)


def followed(how: Whitening, kept: Slots, means: Slots) -> Slots:
    """Return bases that have followed ``means``, and moments in them, where it is due; else as they are.

    kept: bases, ``turned`` and ``v``, ``[..., rows, columns]``.
    """
    bases = {
        basis: _chosen(how.due, kept[basis], partial(_followed, kept[basis], means[mean]))
        for mean, basis in _SIDES
        if basis in kept
    }
    cosines = {basis: product(kept[basis].mT, new) for basis, new in bases.items()}
    m = _chosen(how.due, kept["turned"], partial(_turned, kept["turned"], cosines))
    squares = {basis: t.square() for basis, t in cosines.items()}
    v = _chosen(how.carried and how.due, kept["v"], partial(_turned, kept["v"], squares))
    return {**bases, "turned": m, "v": v}


def weighed(how: Whitening, turned: Turned) -> tuple[Tensor, Tensor, Tensor]:
    """Return the direction in the basis, of any size, and the new momentum and second moments there, all ``[..., rows,
    columns]``."""
    seen, m, v, bases, _ = turned
    m, ahead = nesterov(m, seen, how.momentum)
    ahead = torch.where(ahead * seen.sign() >= 0, ahead, 0.0) if how.cautious else ahead
    # The first of the two says how the result lies in memory: as the slot does, where the gradient does not.
    v = torch.lerp(seen.square(), v, how.keep) if bases else torch.lerp(v, seen.square(), 1.0 - how.keep)
    squares = v + turned.least * v.mean((-2, -1), keepdim=True)
    squares = squares.clamp(min=torch.finfo(v.dtype).tiny)  # before any gradient: 0 times a number
    roots = squares.rsqrt()
    return ahead * roots if how.weigh is None else how.weigh(ahead * roots, seen * roots, squares), m, v


def turned_back(scaled: Tensor, bases: Slots) -> Tensor:
    """Return ``scaled [..., rows, columns]`` out of the bases of its sides."""
    dtype = next(iter(bases.values())).dtype if bases else scaled.dtype
    return _turned(scaled.to(dtype), {basis: t.mT for basis, t in bases.items()}).to(scaled.dtype)


def into_basis(slots: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the slots of a tensor, with its momentum in the basis where an older l2o kept it outside, as ``m``."""
    m, bases = slots.get("m"), {basis: slots[basis] for _, basis in _SIDES if basis in slots}
    if not isinstance(m, Tensor) or not bases:
        return slots
    sides = dict(zip(("rows", "columns"), as_matrix(m.shape), strict=True))
    if any(t.shape != (sides[basis], sides[basis]) for basis, t in bases.items()):
        return slots
    turned = _turned(m.reshape(*sides.values()).to(next(iter(bases.values())).dtype), bases)
    return {name: t for name, t in slots.items() if name != "m"} | {"turned": turned.view(m.shape)}


def due_at(step: Any, period: int, early: int = 0, pace: int = 0) -> Any:
    """Say whether a step, an int or 0-d, is one of every ``period``, or of the first ``early``.

    pace: unless it is 0, steps in which the period grows by one, from 1 to ``period``: bases change most at first.
    """
    so_far: Any = step // pace if pace else period
    now = so_far.clamp(1, period) if isinstance(so_far, Tensor) else min(max(so_far, 1), period)
    return (step % now == 0) | (step < early)


def is_due(run: Run, period: int, early: int = 0, pace: int = 0) -> Tensor | bool:
    """Say whether a step is due, see `due_at`: 0-d, or a bool where it is so for all lanes and nothing is compiled.

    Waits for the device in unrolls, but not in the plug-in, which says what the host knows.
    """
    if run.called is not None:
        return bool(due_at(run.called, period, early, pace))
    known = due = due_at(run.step, period, early, pace)
    if torch.compiler.is_compiling():
        return due
    while _functorch.is_functorch_wrapped_tensor(known):
        known = _functorch.get_unwrapped(known)
    lanes = int(known.sum())
    return due if 0 < lanes < known.numel() else lanes > 0


def _turned(x: Tensor, bases: Slots) -> Tensor:
    """``[k, rows, columns]`` in the bases of its sides, of those that have one."""
    x = product(bases["rows"].mT, x) if "rows" in bases else x
    return product(x, bases["columns"]) if "columns" in bases else x


def _chosen(due: Tensor | bool, old: Tensor, new: Callable[[], Tensor]) -> Tensor:
    """Return ``new()`` where it is ``due``, else ``old``."""
    if isinstance(due, bool):
        return new() if due else old
    return torch.where(due, new(), old)


def _followed(basis: Tensor, mean: Tensor) -> Tensor:
    """``basis`` once it has been multiplied by ``mean``, a product whose scale does not matter, and made orthogonal."""
    with torch.no_grad():
        largest = mean.abs().amax((-2, -1), keepdim=True)
        scaled = mean / torch.where(largest > 0, largest, 1.0)
        new = product(scaled, basis) + _STAY * basis
        return torch.linalg.householder_product(*torch.geqrf(new.detach())).contiguous()  # `qr`, its first factor alone
