"""Directions of tensors ``[k, *shape]`` that have one step: Adam's, whose counts are those of many groups at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from l2o.ops.eigenbasis import Whitening, init_basis
from l2o.ops.groups import Group, matrix_sums
from l2o.ops.moments import Shares, bias_correction, mixed, shares
from l2o.ops.numeric import flat, over_root, square_sums
from l2o.ops.orthogonal import as_matrix, matrices, row_column_scales
from l2o.types import Reduce, Slots, Theta


class Now(NamedTuple):
    """What a step has for all groups.

    theta: meta-parameters.      decays: of running means, by name.
    whitening: None without second moments of matrices.     reduce: completes sums over entries.
    """

    theta: Theta
    decays: Mapping[str, Shares]
    whitening: Whitening | None
    reduce: Reduce


def decays_of(theta: Theta) -> dict[str, Shares]:
    """Return those of the running means that a step may have, 0-d, by name."""
    names = [name for name in ("momentum", "beta1", "beta2", "memory") if f"logit_{name}" in theta]
    found = shares(torch.stack([theta[f"logit_{name}"] for name in names]))
    return {name: Shares(*each) for name, *each in zip(names, *found, strict=True)}


class Age(NamedTuple):
    """How long moments have been running.

    steps: their number, ``[k]``, with this one.     before, after: the step, ``[2, k]``, what first and second moments
    are divided by (`l2o.ops.moments.bias_correction`).
    """

    steps: Tensor
    before: Tensor
    after: Tensor


def ages(groups: Sequence[Group], logits: Sequence[Tensor]) -> list[Age | None]:
    """Return the age of the moments of each group; None where no steps are counted.

    logits: of the decays of first and second moments, 0-d.
    """
    counts = [group.slots["count"] for group in groups if "count" in group.slots]
    if not counts:
        return [None] * len(groups)
    old = torch.cat(counts)
    new = old + 1.0
    times = torch.stack([old.clamp(min=1.0), new])  # no moments are read before there is one
    before, after = bias_correction(torch.stack(list(logits)).view(2, 1, 1), times).unbind(1)
    sizes = [len(count) for count in counts]
    found = map(Age, new.split(sizes), before.split(sizes, 1), after.split(sizes, 1))
    return [next(found) if "count" in group.slots else None for group in groups]


def adam(slots: Slots, correction: Tensor) -> Tensor:
    """Return Adam's direction, ``[k, *shape]``, without eps; 0 before the first gradient.

    slots: ``m, v``.     correction: see `Age`.
    """
    m, v = slots["m"], slots["v"]
    first, second = correction.view(2, -1, *[1] * (m.ndim - 1)).unbind()
    return over_root(m / first, v / second)


def adam_moments(now: Now, group: Group, age: Age) -> Slots:
    """Return the new slots ``m, v, count`` of Adam."""
    m = mixed(group.slots["m"], group.grad, now.decays["beta1"])
    return {"m": m, "v": mixed(group.slots["v"], group.grad.square(), now.decays["beta2"]), "count": age.steps}


def normalized_moments(now: Now, group: Group) -> Slots:
    """Return the new momentum ``m``, and scales ``row, col`` that bring its rows and columns to one size."""
    m = mixed(group.slots["m"], group.grad, now.decays["momentum"])
    row, col = row_column_scales(matrices(m), as_matrix(group.shape), partial(matrix_sums, group, now.reduce))
    return {"m": m, "row": row, "col": col}


def direction_of(slots: Slots, group: Group, correction: Tensor | None) -> Tensor:
    """Return the direction of slots ``[k, *shape]``; 0 before the first gradient.

    correction: of Adam's moments, None for what counts no steps, see `Age`.
    """
    if correction is not None:
        return adam(slots, correction)
    if "row" not in slots:
        return slots["d"]
    scaled = matrices(slots["m"]) * slots["row"].unsqueeze(-1) * slots["col"].unsqueeze(-2)
    return scaled.view_as(group.grad)


def seen_of(groups: Sequence[Group], directions: Iterable[Tensor]) -> Slots:
    """Return sums over tensors, ``[tensors]``: ``dots`` of gradients and directions, and squares of both, ``grads,
    directions``.

    directions: of the steps before, ``[k, *shape]`` of each group; one at a time, where it is no list.
    """
    dots: list[Tensor] = []

    def steps() -> Iterator[Tensor]:
        for group, each in zip(groups, directions, strict=True):
            d = flat(each)
            dots.append((flat(group.grad) * d).sum(1))
            yield d

    squares = square_sums(steps())
    return {"dots": torch.cat(dots), "grads": square_sums(group.grad for group in groups), "directions": squares}


def init_direction(path: str, param: Tensor, shape: tuple[int, ...], squares: bool) -> Slots:
    """Return the slots of a direction of `l2o.rules.Steered`, of a tensor of ``shape`` of which ``param`` is here.

    squares: whether one that is orthogonal has second moments, too.
    """
    m = torch.zeros_like(param)
    match path:
        case "eigenbasis":
            return {"d": m, **init_basis(param, shape)}
        case "diagonal" | "orthogonal":
            own = {"v": torch.zeros_like(m)} if squares or path == "diagonal" else {}
            return {"m": m, "d": torch.zeros_like(m), **own}
        case "normalized":
            rows, columns = as_matrix(param.shape)
            return {"m": m, "row": param.new_zeros(rows), "col": param.new_zeros(columns)}
    return {"m": m, "v": torch.zeros_like(m), "count": param.new_zeros(())}
