"""Networks that look at every element of a tensor by itself: what they see of it, their layers, and their step.

A tensor is given by its sources, a dict: ``grad`` and ``param [*shape]``, ``m [decays, *shape]``, and what a `Recipe`
needs of ``v [1 or decays, *shape]``, of the slots of `l2o.ops.factored`, and of ``row_mean`` (`row_means` there); and
by its ``axes``, those of rows and columns, which are the whole tensor's where this is a shard of it.

Channels (`l2o.ops.statistics`) are never there all at once: the functions here go over a tensor in blocks of elements,
so that their scratch memory does not grow with it. They are written for one lane and any dtype and device, and are the
reference of `l2o.kernels.coordinatewise`, which is what rules call.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from l2o.ops.factored import diagonal_factor, factors
from l2o.ops.features import EPS, second_moment_scale
from l2o.ops.networks import BLOCK, mlp
from l2o.ops.numeric import safe_rsqrt
from l2o.ops.statistics import Statistics, channels
from l2o.types import Slots, Theta

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh}
Axes = tuple[int, int] | None
"""Of `l2o.ops.factored.factored_axes`."""

_SECONDS = {"v", "m_over_rms", "inv_rms", "grad_over_rms"}
_FACTORED = {"factored_grad", "row", "col", "inv_root_row", "inv_root_col", "factored_m"}

NOMINAL: dict[str, Callable[[Statistics], Tensor]] = {
    "sgd": lambda x: x.grad,
    "sgdm": lambda x: x.m[-1],
    "aggmo": lambda x: x.m.mean(0),
    "adam": lambda x: x.m[-1] * x.inv_rms[-1],
    "adam_aggmo": lambda x: (x.m * x.inv_rms).mean(0),
}
"""Directions without a network: gradient, slowest momentum (the last decay), mean of the momenta; over the root mean
square or not."""


@dataclass(frozen=True)
class Product:
    """``gain * o0 * exp(exp_mult * o1)`` of two or more outputs o."""

    exp_mult: float

    least_outputs: ClassVar[int] = 2
    seconds: ClassVar[bool] = False

    def __call__(self, outputs: Tensor, x: Statistics, gain: Tensor, means: Tensor | None) -> Tensor:
        return outputs[0] * (outputs[1] * self.exp_mult).exp() * gain


@dataclass(frozen=True)
class Nominal:
    """``gain * (learned + nominal) - decay`` of four outputs d, s, n, r (`l2o.rules.STAR`)::

        learned = step_mult * d * exp(exp_mult * s)      times the inverse root mean square where ``normalise``
        nominal = lr * exp(lr_exp_mult * n) * direction, one of `NOMINAL`
        decay   = weight_decay * exp(decay_exp_mult * r) * p

    sets_lr, sets_decay: whether there are n and r; else they are 1 and 0.
    mean_magnitude, mean_lr, mean_decay: take s, n, r from the ``means`` of the outputs, which are then needed.
    """

    direction: Literal["sgd", "sgdm", "aggmo", "adam", "adam_aggmo"]
    step_mult: float
    exp_mult: float
    lr: float
    weight_decay: float
    lr_exp_mult: float
    decay_exp_mult: float
    sets_lr: bool
    sets_decay: bool
    mean_magnitude: bool
    mean_lr: bool
    mean_decay: bool
    normalise: bool

    least_outputs: ClassVar[int] = 4
    seconds: ClassVar[bool] = True

    @property
    def needs_means(self) -> bool:
        """Whether ``means`` are read."""
        return self.mean_magnitude or (self.sets_lr and self.mean_lr) or (self.sets_decay and self.mean_decay)

    def __call__(self, outputs: Tensor, x: Statistics, gain: Tensor, means: Tensor | None) -> Tensor:
        d, s, n, r = (
            means[i] if mean and means is not None else outputs[i]
            for i, mean in enumerate((False, self.mean_magnitude, self.mean_lr, self.mean_decay))
        )
        n = n if self.sets_lr else torch.ones_like(n)
        r = r if self.sets_decay else torch.zeros_like(r)
        learned = d * (s * self.exp_mult).exp() * self.step_mult
        if self.normalise:
            learned = learned * x.inv_rms[0]
        step = learned + (n * self.lr_exp_mult).exp() * self.lr * NOMINAL[self.direction](x)
        return gain * step - (r * self.decay_exp_mult).exp() * self.weight_decay * x.param


@dataclass(frozen=True)
class Recipe:
    """What a network sees of each element, and what is made of its outputs.

    groups: of channels, see `l2o.ops.statistics`.
    head: makes the update from the outputs; None where only their sums are wanted.
    activation: of the hidden layers, a key of `ACTIVATIONS`.
    rms_eps: added to second moments under the root.     diag_eps: the same, for the factor of the momenta of tensors
        without rows and columns; by default ``rms_eps``.     clip: gradients are clipped to ± this.
    scale_eps: of `second_moment_scale`.
    matrices: scale channels over the last two axes of a tensor, not over all of it.
    raw: take the factor of gradients from other slots than that of momenta; see `raw_factors`.
    """

    groups: tuple[str, ...]
    head: Product | Nominal | None = None
    activation: Literal["relu", "tanh"] = "relu"
    rms_eps: float = 1e-6
    diag_eps: float | None = None
    clip: float | None = None
    scale_eps: float = EPS
    matrices: bool = False
    raw: bool = False

    def sources(self, ndim: int) -> tuple[str, ...]:
        """Name what is read of a tensor with ``ndim`` axes, in order."""
        seconds = ("v",) if _SECONDS & {*self.groups} or (self.head and self.head.seconds) else ()
        factored = ("row", "col", "row_mean") if ndim >= 2 else ("diag",)
        needed = factored if _FACTORED & {*self.groups} else ()
        return "grad", "param", "m", *seconds, *needed, *(f"raw_{name}" for name in needed if self.raw)

    def scaled_axes(self, ndim: int) -> tuple[int, ...]:
        """Return the axes, from behind, over which the channels of a tensor with ``ndim`` axes have mean square one."""
        return tuple(range(-min(ndim, 2) if self.matrices else -ndim, 0))

    def sums_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Return ``*shape`` with 1 for the axes summed over."""
        own = set(self.scaled_axes(len(shape)))
        return tuple(1 if axis - len(shape) in own else size for axis, size in enumerate(shape))

    def count(self, shape: Sequence[int]) -> int:
        """Count elements of a whole tensor with the same scales, at least 1, what `second_moment_scale` divides by."""
        return max(math.prod([shape[axis] for axis in self.scaled_axes(len(shape))]), 1)


def feature_sums(recipe: Recipe, axes: Axes, sources: Slots) -> Tensor:
    """Return sums of squares of the channels, ``[channels, *recipe.sums_shape(shape)]``."""
    whole, shape = broadcast(axes, sources), sources["grad"].shape
    sums = None
    for index in blocks(shape):
        x = block_sums(recipe, cut(whole, index))
        sums = x.new_zeros(len(x), *recipe.sums_shape(shape)) if sums is None else sums
        own = cut({"sums": sums}, index)["sums"]
        own += x
    assert sums is not None  # `blocks` has one for every shape
    return sums


def block_sums(recipe: Recipe, x: Slots) -> Tensor:
    """Return `feature_sums` of one block, ``[channels, ...]``; ``x`` as `broadcast` and `cut` have it."""
    squares = channels(_statistics(recipe, x), recipe.groups).square()
    axes = recipe.scaled_axes(squares.ndim - 1)
    return squares.sum(axes, keepdim=True) if axes else squares


def network(
    recipe: Recipe,
    axes: Axes,
    weights: Theta,
    sources: Slots,
    sums: Tensor,
    count: int,
    gain: Tensor,
    means: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the update ``[*shape]``, and the sums over elements of the network's outputs, ``[outputs]``.

    weights: ``w0, b0, w1, ...``, of a network with the recipe's channels.
    sums: of `feature_sums`, completed over all shards.     count: what they are divided by.
    gain: 0-d.     means: ``[outputs]``, of the outputs, where the head reads them.
    """
    whole, shape = broadcast(axes, sources), sources["grad"].shape
    parts = [
        block(recipe, weights, cut(whole, index), cut({"sums": sums}, index)["sums"], count, gain, means)
        for index in blocks(shape)
    ]
    updates, totals = zip(*parts, strict=True)
    return joined(updates, shape), sum(totals[1:], totals[0])


def block(
    recipe: Recipe, weights: Theta, x: Slots, sums: Tensor, count: int, gain: Tensor, means: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return `network` of one block, updates ``[...]`` and sums ``[outputs]``.

    x, sums: as `broadcast` and `cut` have them.     gain, means: as in `network`.
    """
    seen = _statistics(recipe, x)
    features = channels(seen, recipe.groups) * second_moment_scale(sums, count, recipe.scale_eps)
    shape = features.shape[1:]
    outputs = mlp(weights, features.reshape(len(features), math.prod(shape)), activation=ACTIVATIONS[recipe.activation])
    totals, outputs = outputs.sum(-1), outputs.reshape(len(outputs), *shape)
    return outputs[0] if recipe.head is None else recipe.head(outputs, seen, gain, means), totals


def broadcast(axes: Axes, sources: Slots) -> Slots:
    """Give a row's or a column's sources 1 for the axis that they are without; see `factors`."""
    if axes is None or "row" not in sources:
        return sources
    found = {name: t for name, t in sources.items() if not name.endswith(("row", "col", "row_mean"))}
    found |= factors(sources, sources["row_mean"], axes)
    if "raw_row" in sources:
        raw = factors({"row": sources["raw_row"], "col": sources["raw_col"]}, sources["raw_row_mean"], axes)
        found |= {f"raw_{name}": raw[name] for name in ("row_factor", "col_factor")}
    return found


def raw_factors(slots: Slots, row_mean: Tensor | None) -> Slots:
    """Return the sources that `Recipe.raw` needs besides, of the slots of `l2o.ops.factored` and their `row_means`
    (``row_mean``), in their shapes."""
    every = {**slots, "row_mean": row_mean}
    names = ("diag",) if row_mean is None else ("row", "col", "row_mean")
    return {f"raw_{name}": t for name in names if (t := every[name]) is not None}


def blocks(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Yield slices of a tensor that have at most `BLOCK` elements each, in the order of its elements; one at least."""
    axis = len(shape) if math.prod(shape) > BLOCK else 0
    while axis and math.prod(shape[axis - 1 :]) <= BLOCK:
        axis -= 1
    inner = (slice(None),) * (len(shape) - axis)
    if axis == 0:
        yield inner
        return
    step = max(BLOCK // max(math.prod(shape[axis:]), 1), 1)
    for outer in itertools.product(*map(range, shape[: axis - 1])):
        for start in range(0, shape[axis - 1], step):
            yield (*(slice(i, i + 1) for i in outer), slice(start, start + step), *inner)


def joined(parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Put together what `blocks` took apart, ``[*shape]``."""
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts]).view(*shape)


def cut(sources: Slots, index: tuple[slice, ...]) -> Slots:
    """Return one block of each: ``[*shape]``, or with an axis before those of the tensor; axes of size 1 stay."""

    def one(t: Tensor) -> Tensor:
        for axis, part in enumerate(index, t.ndim - len(index)):
            if part != slice(None) and t.shape[axis] > 1:
                t = t.narrow(axis, part.start, min(part.stop, t.shape[axis]) - part.start)
        return t

    return {name: one(t) for name, t in sources.items()}


def _statistics(recipe: Recipe, x: Slots) -> Statistics:
    """Of a block; what the recipe does not read is an empty tensor."""
    grad, none = x["grad"], x["grad"].new_empty(0)
    if recipe.clip is not None:
        grad = grad.clamp(-recipe.clip, recipe.clip)
    v = x.get("v", none)
    seen = Statistics(grad, x["param"], x["m"], v, torch.rsqrt(v + recipe.rms_eps), none, none, none, none)
    if "diag" in x:
        eps = recipe.rms_eps if recipe.diag_eps is None else recipe.diag_eps
        diag, factor = x["diag"], diagonal_factor(x.get("raw_diag", x["diag"]))
        return seen._replace(row=diag, col=diag, grad_factor=factor, m_factor=safe_rsqrt(diag + eps))
    if "row" in x:
        row, col = (x[name].expand(-1, *grad.shape) for name in ("row", "col"))
        factor = x["row_factor"] * x["col_factor"]
        raw = x["raw_row_factor"] * x["raw_col_factor"] if recipe.raw else factor
        return seen._replace(row=row, col=col, grad_factor=raw, m_factor=factor)
    return seen
