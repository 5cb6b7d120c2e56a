"""`l2o.ops.coordinatewise` for several tensors and lanes, and its derivative, in torch's operations by blocks.

The first derivative computes a block again and has no graph of more than that; where it is to be differentiated itself,
autograd goes through `feature_sums` and `Call.network` as a whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from l2o.ops import coordinatewise as reference
from l2o.ops.coordinatewise import Axes, Recipe
from l2o.types import Slots

_GAINS = "gain", "means"
Block = Callable[[Slots, Any, dict[str, Tensor]], tuple[Tensor, ...]]
"""Of sources and sums of a block, and tensors that all blocks share, all lanes at once: outputs."""


def by_tensor(recipe: Recipe, lanes: int, axes: Sequence[int], sources: Sequence[Tensor]) -> list[tuple[Axes, Slots]]:
    """Return axes and sources of each tensor, which `Tensors` put one after the other: ``[lanes, ...]`` with lanes."""
    found: list[tuple[Axes, Slots]] = []
    at = 0
    for second, largest in zip(axes[::2], axes[1::2], strict=True):
        names = recipe.sources(sources[at].ndim - bool(lanes))
        own = dict(zip(names, sources[at : at + len(names)], strict=True))
        found.append((None if second < 0 else (second, largest), own))
        at += len(names)
    return found


def feature_sums(recipe: Recipe, lanes: int, axes: Sequence[int], sources: Sequence[Tensor]) -> list[Tensor]:
    """Return the sums of each tensor, ``[lanes, channels, *recipe.sums_shape(shape)]``.

    lanes: 0 where tensors have no axis of lanes.     axes, sources: see `by_tensor`.
    """
    return [
        _over_lanes(functools.partial(reference.feature_sums, recipe, own_axes), lanes)(own)
        for own_axes, own in by_tensor(recipe, lanes, axes, sources)
    ]


def d_feature_sums(
    recipe: Recipe, lanes: int, axes: Sequence[int], sources: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradients of ``sources``, like these.  cotangents: of what `feature_sums` returns."""
    one = _over_lanes(functools.partial(reference.block_sums, recipe), lanes)
    found: list[Tensor | None] = []
    for (own_axes, own), d in zip(by_tensor(recipe, lanes, axes, sources), cotangents, strict=True):
        grads = _pulled_back(lambda x, s, t: (one(x),), _Whole.of(lanes, own_axes, own, None, {}), (d,), (True,))
        found += [grads[name] for name in own]
    return found


class Call(NamedTuple):
    """A network over tensors but for these.  axes, counts: two and one of each tensor."""

    recipe: Recipe
    lanes: int
    axes: Sequence[int]
    counts: Sequence[int]

    def network(
        self, weights: Sequence[Tensor], gains: Sequence[Tensor], sums: Sequence[Tensor], sources: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return updates like each tensor, then sums of outputs, ``[lanes, tensors, outputs]``.

        weights: ``[lanes, 1 or tensors, ...]``.     gains: ``[lanes, tensors]``, and means, if there are any.
        """
        results = []
        for i, (axes, own) in enumerate(by_tensor(self.recipe, self.lanes, self.axes, sources)):

            def one(x: Slots, s: Tensor, t: dict[str, Tensor], axes: Axes = axes, n: int = self.counts[i]) -> Any:
                return reference.network(self.recipe, axes, t, x, s, n, t["gain"], t.get("means"))

            results.append(_over_lanes(one, self.lanes)(own, sums[i], self._shared(weights, gains, i)))
        updates, totals = zip(*results, strict=True)
        return [*(updates if self.recipe.head else ()), torch.stack(totals, 1 if self.lanes else 0)]

    def _shared(self, weights: Sequence[Tensor], gains: Sequence[Tensor], i: int) -> dict[str, Tensor]:
        """What all elements of tensor ``i`` share, by name; views."""
        axis = 1 if self.lanes else 0
        own = {name: t.select(axis, i if t.shape[axis] > 1 else 0) for name, t in _named(weights).items()}
        return own | {name: t.select(axis, i) for name, t in zip(_GAINS, gains, strict=False)}

    def derivative(
        self,
        weights: Sequence[Tensor],
        gains: Sequence[Tensor],
        sums: Sequence[Tensor],
        sources: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
    ) -> tuple[list[Tensor | None], ...]:
        """Return the gradients of what `network` takes, like these.  cotangents: of what it returns."""
        axis = 1 if self.lanes else 0
        *d_updates, d_totals = cotangents
        shared = _named(weights) | dict(zip(_GAINS, gains, strict=False))
        d_shared = {name: torch.zeros_like(t) for name, t in shared.items() if t.requires_grad}
        d_sums: list[Tensor | None] = []
        d_sources: list[Tensor | None] = []
        for i, (axes, own) in enumerate(by_tensor(self.recipe, self.lanes, self.axes, sources)):

            def one(x: Slots, s: Tensor, t: dict[str, Tensor], n: int = self.counts[i]) -> Any:
                return reference.block(self.recipe, t, x, s, n, t["gain"], t.get("means"))

            d = d_updates[i] if d_updates else None, None if d_totals is None else d_totals.select(axis, i)
            whole = _Whole.of(self.lanes, axes, own, sums[i], self._shared(weights, gains, i))
            grads = _pulled_back(_over_lanes(one, self.lanes), whole, d, (True, False))
            d_sums.append(grads["sums"])
            d_sources += [grads[name] for name in own]
            for name, total in d_shared.items():
                grad, at = grads[name], i if name in _GAINS or total.shape[axis] > 1 else 0
                assert grad is not None  # a part of ``total`` needs one where that does
                total.select(axis, at).add_(grad)
        return (
            [d_shared.get(name) for name in _named(weights)],
            [d_shared.get(name) for name in _GAINS[: len(gains)]],
            d_sums,
            d_sources,
        )


def _named(weights: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{'wb'[k % 2]}{k // 2}": t for k, t in enumerate(weights)}


def _over_lanes(f: Callable[..., Any], lanes: int) -> Callable[..., Any]:
    return vmap(f) if lanes else f


class _Whole(NamedTuple):
    """What blocks are cut from.

    leaves: sources, with no graph.     broadcast: `l2o.ops.coordinatewise.broadcast` of them, with a graph, and
    ``sums``.     shared: what blocks share.     shape: of the tensor.
    """

    leaves: Slots
    broadcast: Slots
    shared: dict[str, Tensor]
    shape: torch.Size

    @classmethod
    def of(cls, lanes: int, axes: Axes, sources: Slots, sums: Tensor | None, shared: dict[str, Tensor]) -> _Whole:
        leaves = _leaves(sources)
        with torch.enable_grad():
            broadcast = _over_lanes(functools.partial(reference.broadcast, axes), lanes)(leaves)
        broadcast |= {} if sums is None else {"sums": sums}
        return cls(leaves, broadcast, shared, sources["grad"].shape[bool(lanes) :])

    def through_broadcast(self, totals: Slots) -> dict[str, Tensor | None]:
        """Return the gradients of ``leaves`` and the rest, of those of what is broadcast and the rest."""
        made = [name for name in totals if name in self.broadcast and self.broadcast[name].grad_fn is not None]
        moving = [n for n, leaf in self.leaves.items() if leaf.requires_grad and self.broadcast.get(n) is not leaf]
        grads: dict[str, Tensor | None] = {**dict.fromkeys([*self.leaves, "sums"]), **totals}
        if not moving:
            return grads
        found = torch.autograd.grad(
            [self.broadcast[name] for name in made],
            [self.leaves[name] for name in moving],
            [totals[name] for name in made],
            materialize_grads=True,
        )
        return grads | dict(zip(moving, found, strict=True))


def _leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().requires_grad_(t.requires_grad) for name, t in tensors.items()}


def _pulled_back(
    f: Block, whole: _Whole, cotangents: Sequence[Tensor | None], cuts: Sequence[bool]
) -> dict[str, Tensor | None]:
    """The gradients of sources, ``sums`` and shared tensors that need any, by name.  cuts: which outputs are blocks."""
    every = {**whole.broadcast, **whole.shared}
    totals = {name: torch.zeros_like(t) for name, t in every.items() if t.requires_grad}
    for index in reference.blocks(whole.shape):
        own = _leaves({**reference.cut(whole.broadcast, index), **whole.shared})
        with torch.enable_grad():
            x = {name: own[name] for name in whole.broadcast if name != "sums"}
            outputs = f(x, own.get("sums"), {name: own[name] for name in whole.shared})
        pairs = [
            (out, reference.cut({"d": d}, index)["d"] if is_block else d)
            for out, d, is_block in zip(outputs, cotangents, cuts, strict=True)
            if d is not None and out.requires_grad
        ]
        if not pairs:
            continue
        grads = torch.autograd.grad(
            [out for out, _ in pairs], [own[name] for name in totals], [d for _, d in pairs], materialize_grads=True
        )
        for (name, total), grad in zip(totals.items(), grads, strict=True):
            part = total if name in whole.shared else reference.cut({name: total}, index)[name]
            part += grad
    return whole.through_broadcast(totals)
