"""`l2o.ops.coordinatewise` for all tensors of a rule, and all lanes, at once: two custom ops with kernels for the CPU.

``l2o::feature_sums`` and ``l2o::coordinatewise`` have rules for `torch.func.vmap` and for autograd. Float32 tensors of
the CPU take the kernels of coordinatewise.cpp; all others, and derivatives, take torch's operations in blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import vmap

from l2o.kernels import coordinatewise_cpu as cpu
from l2o.kernels.arrays import derivative_of
from l2o.kernels.lanes import lowered, vmap_rule
from l2o.ops import coordinatewise as reference
from l2o.ops.coordinatewise import Axes, Recipe
from l2o.ops.factored import factored_axes
from l2o.ops.kinds import size
from l2o.types import Grads, Infos, Params, Reduce, Slots, Sum, Theta, Updates

_RECIPES: dict[str, Recipe] = {}
"""By the name that the ops have for them: their arguments are tensors, numbers and strings."""


@functools.lru_cache(maxsize=256)
def _named(recipe: Recipe) -> str:
    _RECIPES[repr(recipe)] = recipe
    return repr(recipe)


class Tensors(NamedTuple):
    """What the ops read of tensors, by name.

    slots: of each; see `Recipe.sources`.     row_means: see `l2o.ops.factored.row_means`.
    """

    grads: Grads
    params: Params
    slots: Mapping[str, Slots]
    infos: Infos
    row_means: Mapping[str, Tensor | None] = {}

    def only(self, names: Iterable[str]) -> Tensors:
        """Some of them."""
        return self._replace(grads={name: self.grads[name] for name in names})

    def sources(self, recipe: Recipe) -> list[Tensor]:
        """Of one tensor after the other, in the order of gradients."""
        flat: list[Tensor] = []
        for name, grad in self.grads.items():
            own: Any = {"row_mean": self.row_means.get(name), **self.slots[name], "grad": grad}
            own["param"] = self.params[name]
            flat += [own[source] for source in recipe.sources(grad.ndim)]
        return flat

    @property
    def axes(self) -> list[int]:
        """Those of `factored_axes`, two for each tensor, -1 for those without."""
        return [axis for name in self.grads for axis in factored_axes(self.infos[name].shape) or (-1, -1)]


def feature_sums(recipe: Recipe, tensors: Tensors) -> dict[str, Sum]:
    """Sums of squares of each tensor's channels, ``[channels, *recipe.sums_shape(shape)]``, by name."""
    if not tensors.grads:
        return {}
    own_axes, sources, known = tensors.axes, tensors.sources(recipe), _named(recipe)
    if forward_ad._current_level >= 0:  # which custom ops have no rule for
        found = sums_in_blocks(recipe, 0, own_axes, sources)
    else:
        found = lowered(lambda lanes, own: _feature_sums(known, lanes, own_axes, *own), [sources])
    axes = {name: tuple(axis + g.ndim for axis in recipe.scaled_axes(g.ndim)) for name, g in tensors.grads.items()}
    return {name: Sum(sums, axes[name]) for name, sums in zip(tensors.grads, found, strict=True)}


def completed_sums(recipe: Recipe, tensors: Tensors, reduce: Reduce) -> dict[str, Tensor]:
    """`feature_sums` over whole tensors."""
    sums = reduce.shards({name: {"squares": own} for name, own in feature_sums(recipe, tensors).items()})
    return {name: own["squares"] for name, own in sums.items()}


def network(
    recipe: Recipe,
    weights: Theta,
    tensors: Tensors,
    sums: Mapping[str, Tensor],
    gains: Tensor,
    means: Tensor | None = None,
) -> tuple[Updates, Tensor]:
    """The update of each tensor, by name, none without a head; and the sums over its elements of the network's outputs.

    weights: ``w0, b0, w1, ...``; each ``[in, out]`` or ``[out]``, or one for every tensor, ``[tensors, ...]``.
    sums: of `feature_sums`, completed over all shards.
    gains: ``[tensors]``, on the updates.     means: ``[tensors, outputs]``, of the outputs, where the head reads them.
    Returns updates, and sums ``[tensors, outputs]``; both in the order of the gradients.
    """
    names, layers = list(tensors.grads), _layers(weights)
    if not names:
        return {}, gains.new_zeros(0, layers[-1].shape[-1])
    counts = [recipe.count(tensors.infos[name].shape) for name in names]
    inputs = [layers, gains, means, [sums[name] for name in names], tensors.sources(recipe)]
    axes = tensors.axes
    if forward_ad._current_level >= 0:
        *updates, totals = network_in_blocks(recipe, 0, axes, counts, *inputs)
    else:
        known = _named(recipe)
        *updates, totals = lowered(lambda lanes, own: _coordinatewise(known, lanes, axes, counts, *own), inputs)
    return dict(zip(names, updates, strict=False)), totals


def completed_means(totals: Tensor, infos: Infos, names: Iterable[str], reduce: Reduce) -> Tensor:
    """Means over whole tensors of the network's outputs, ``[tensors, outputs]``, of their sums in `network`."""
    sums = {
        name: {"outputs": Sum(own, tuple(range(len(infos[name].shape))))}
        for name, own in zip(names, totals, strict=True)
    }
    return torch.stack([own["outputs"] / size(infos[name]) for name, own in reduce.shards(sums).items()])


def with_shared(weights: Theta, own: int, shared: Tensor) -> Theta:
    """``weights`` for the first ``own`` inputs; the others, the same for all elements, become a part of the bias.

    shared: ``[k]``, or ``[tensors, k]`` where they differ from tensor to tensor.
    """
    first, common = weights["w0"].split([own, shared.shape[-1]], -2)
    return weights | {"w0": first, "b0": weights["b0"] + shared @ common}


def _layers(weights: Theta) -> list[Tensor]:
    """``w0, b0, w1, ...`` of what may hold more, each with an axis for tensors."""
    count = sum(name[0] == "w" and name[1:].isdecimal() for name in weights)
    found = [(weights[f"{kind}{i}"], axes) for i in range(count) for kind, axes in (("w", 3), ("b", 2))]
    return [t if t.ndim == axes else t.unsqueeze(0) for t, axes in found]


def by_tensor(recipe: Recipe, lanes: int, axes: Sequence[int], sources: Sequence[Tensor]) -> list[tuple[Axes, Slots]]:
    """Axes and sources of each tensor, which `Tensors` put one after the other."""
    found: list[tuple[Axes, Slots]] = []
    at = 0
    for second, largest in zip(axes[::2], axes[1::2], strict=True):
        names = recipe.sources(sources[at].ndim - bool(lanes))
        own = dict(zip(names, sources[at : at + len(names)], strict=True))
        found.append((None if second < 0 else (second, largest), own))
        at += len(names)
    return found


@torch.library.custom_op("l2o::feature_sums", mutates_args=())
def _feature_sums(recipe: str, lanes: int, axes: Sequence[int], sources: Sequence[Tensor]) -> list[Tensor]:
    """lanes: 0 where tensors have no axis of lanes.     axes, sources: see `Tensors`."""
    made = _RECIPES[recipe]
    found = cpu.feature_sums(made, lanes, axes, sources)
    return found if found is not None else sums_in_blocks(made, lanes, axes, sources)


@torch.library.custom_op("l2o::coordinatewise", mutates_args=())
def _coordinatewise(
    recipe: str,
    lanes: int,
    axes: Sequence[int],
    counts: Sequence[int],
    weights: Sequence[Tensor],
    gains: Tensor,
    means: Tensor | None,
    sums: Sequence[Tensor],
    sources: Sequence[Tensor],
) -> list[Tensor]:
    """Updates, then sums of outputs.  weights: ``[1 or tensors, ...]`` after the lanes."""
    made = _RECIPES[recipe]
    inputs = cpu.Inputs(weights, gains, means, sums, sources)
    found = cpu.coordinatewise(made, lanes, axes, counts, inputs)
    return found if found is not None else network_in_blocks(made, lanes, axes, counts, *inputs)


def sums_in_blocks(recipe: Recipe, lanes: int, axes: Sequence[int], sources: Sequence[Tensor]) -> list[Tensor]:
    """``_feature_sums`` in torch's operations."""
    return [
        _over_lanes(functools.partial(reference.feature_sums, recipe, own_axes), lanes)(own)
        for own_axes, own in by_tensor(recipe, lanes, axes, sources)
    ]


def network_in_blocks(
    recipe: Recipe,
    lanes: int,
    axes: Sequence[int],
    counts: Sequence[int],
    weights: Sequence[Tensor],
    gains: Tensor,
    means: Tensor | None,
    sums: Sequence[Tensor],
    sources: Sequence[Tensor],
) -> list[Tensor]:
    """``_coordinatewise`` in torch's operations."""
    results = []
    for i, (own_axes, own) in enumerate(by_tensor(recipe, lanes, axes, sources)):
        call = _Call.of(recipe, lanes, i, counts[i], weights, gains, means, own_axes)
        results.append(_over_lanes(lambda x, s, t, call=call: call.network(x, s, t), lanes)(own, sums[i], call.tensors))
    updates, totals = zip(*results, strict=True)
    return [*(updates if recipe.head else ()), torch.stack(totals, 1 if lanes else 0)]


class _Call(NamedTuple):
    """What the network has of one tensor besides sources and sums.  tensors: weights, ``gain`` and ``means``."""

    recipe: Recipe
    axes: Axes
    count: int
    tensors: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        lanes: int,
        i: int,
        count: int,
        weights: Sequence[Tensor],
        gains: Tensor,
        means: Tensor | None,
        axes: Axes,
    ) -> _Call:
        """Of tensor ``i``; views."""
        axis = 1 if lanes else 0
        own = {f"{'wb'[k % 2]}{k // 2}": t.select(axis, i if t.shape[axis] > 1 else 0) for k, t in enumerate(weights)}
        own["gain"] = gains.select(axis, i)
        return cls(recipe, axes, count, own if means is None else own | {"means": means.select(axis, i)})

    def network(self, sources: Slots, sums: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """`l2o.ops.coordinatewise.network`, of one lane."""
        return reference.network(
            self.recipe, self.axes, tensors, sources, sums, self.count, tensors["gain"], tensors.get("means")
        )

    def block(self, x: Slots, sums: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """`l2o.ops.coordinatewise.block`, of one lane."""
        return reference.block(self.recipe, tensors, x, sums, self.count, tensors["gain"], tensors.get("means"))


def _over_lanes(f: Callable[..., Any], lanes: int) -> Callable[..., Any]:
    return vmap(f) if lanes else f


_feature_sums.register_vmap(vmap_rule(_feature_sums, 1))
_coordinatewise.register_vmap(vmap_rule(_coordinatewise, 2))


def _keep_sums(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.recipe, ctx.lanes, ctx.axes, sources = inputs
    ctx.save_for_backward(*sources)


def _keep_network(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.recipe, ctx.lanes, ctx.axes, ctx.counts, weights, gains, means, sums, sources = inputs
    ctx.sizes = len(weights), means is not None, len(sums)
    ctx.save_for_backward(*weights, gains, *(() if means is None else (means,)), *sums, *sources)


def _d_sums(ctx: Any, d_sums: Sequence[Tensor | None]) -> tuple[Any, ...]:
    recipe, sources = _RECIPES[ctx.recipe], ctx.saved_tensors
    if torch.is_grad_enabled():
        again = functools.partial(sums_in_blocks, recipe, ctx.lanes, ctx.axes)
        return None, None, None, derivative_of(lambda *tensors: again(tensors), sources, d_sums)
    found: list[Tensor | None] = []
    one = _over_lanes(functools.partial(reference.block_sums, recipe), ctx.lanes)
    for (axes, own), d in zip(by_tensor(recipe, ctx.lanes, ctx.axes, sources), d_sums, strict=True):
        grads = _pulled_back(ctx.lanes, axes, lambda x, s, t: (one(x),), own, None, {}, (d,), (True,))
        found += [grads[name] for name in own]
    return None, None, None, found


def _d_network(ctx: Any, d_outputs: Sequence[Tensor | None]) -> tuple[Any, ...]:
    recipe, lanes = _RECIPES[ctx.recipe], ctx.lanes
    weights, gains, means, sums, sources = _split(ctx.saved_tensors, *ctx.sizes)
    if torch.is_grad_enabled():

        def again(*tensors: Tensor) -> list[Tensor]:
            return network_in_blocks(recipe, lanes, ctx.axes, ctx.counts, *_split(tensors, *ctx.sizes))

        grads = derivative_of(again, ctx.saved_tensors, d_outputs)
        return None, None, None, None, *_split(grads, *ctx.sizes)
    axis = 1 if lanes else 0
    *d_updates, d_totals = d_outputs
    d_shared = {name: torch.zeros_like(t) for name, t in _shared(weights, gains, means).items() if t.requires_grad}
    d_sums: list[Tensor | None] = []
    d_sources: list[Tensor | None] = []
    for i, (axes, own) in enumerate(by_tensor(recipe, lanes, ctx.axes, sources)):
        call = _Call.of(recipe, lanes, i, ctx.counts[i], weights, gains, means, axes)
        cotangents = (d_updates[i] if d_updates else None, None if d_totals is None else d_totals.select(axis, i))
        one = _over_lanes(call.block, lanes)
        grads = _pulled_back(lanes, axes, one, own, sums[i], call.tensors, cotangents, (True, False))
        d_sums.append(grads["sums"])
        d_sources += [grads[name] for name in own]
        for name, total in d_shared.items():
            total.select(axis, i if total.shape[axis] > 1 else 0).add_(grads[name])
    return (
        None,
        None,
        None,
        None,
        [d_shared.get(f"{'wb'[k % 2]}{k // 2}") for k in range(len(weights))],
        d_shared.get("gain"),
        d_shared.get("means"),
        d_sums,
        d_sources,
    )


_feature_sums.register_autograd(_d_sums, setup_context=_keep_sums)
_coordinatewise.register_autograd(_d_network, setup_context=_keep_network)


def _split(flat: Sequence[Any], weights: int, has_means: bool, sums: int) -> tuple[Any, ...]:
    """Weights, gains, means, sums, sources: what `_keep_network` put one after the other."""
    rest = list(flat)
    first, rest = rest[:weights], rest[weights:]
    gains = rest.pop(0)
    means = rest.pop(0) if has_means else None
    return first, gains, means, rest[:sums], rest[sums:]


def _shared(weights: Sequence[Tensor], gains: Tensor, means: Tensor | None) -> dict[str, Tensor]:
    named = {f"{'wb'[k % 2]}{k // 2}": t for k, t in enumerate(weights)} | {"gain": gains}
    return named if means is None else named | {"means": means}


def _pulled_back(
    lanes: int,
    axes: Axes,
    f: Callable[..., tuple[Tensor, ...]],
    sources: Slots,
    sums: Tensor | None,
    tensors: dict[str, Tensor],
    cotangents: Sequence[Tensor | None],
    cuts: Sequence[bool],
) -> dict[str, Tensor | None]:
    """The gradients of ``sources``, ``sums`` and ``tensors`` that need any, by name; by blocks, without a graph.

    f: of sources and sums of a block, and ``tensors``, all lanes at once. Of its outputs those of ``cuts`` are blocks.
    """
    leaves = {name: t.detach().requires_grad_(t.requires_grad) for name, t in sources.items()}
    with torch.enable_grad():
        whole = _over_lanes(functools.partial(reference.broadcast, axes), lanes)(leaves)
    if sums is not None:
        whole = whole | {"sums": sums}
    totals = {name: torch.zeros_like(t) for name, t in {**whole, **tensors}.items() if t.requires_grad}
    for index in reference.blocks(sources["grad"].shape[bool(lanes) :]):
        own = {
            name: t.detach().requires_grad_(t.requires_grad)
            for name, t in {**reference.cut(whole, index), **tensors}.items()
        }
        with torch.enable_grad():
            x = {name: own[name] for name in whole if name != "sums"}
            outputs = f(x, own.get("sums"), {name: own[name] for name in tensors})
        pairs = [
            (out, reference.cut({"d": d}, index)["d"] if blockwise else d)
            for out, d, blockwise in zip(outputs, cotangents, cuts, strict=True)
            if d is not None and out.requires_grad
        ]
        if not pairs:
            continue
        grads = torch.autograd.grad(
            [out for out, _ in pairs], [own[name] for name in totals], [d for _, d in pairs], materialize_grads=True
        )
        for (name, total), grad in zip(totals.items(), grads, strict=True):
            part = total if name in tensors else reference.cut({name: total}, index)[name]
            part += grad
    return _through_broadcast(leaves, whole, totals)


def _through_broadcast(leaves: Slots, whole: Slots, totals: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """From the gradients of what `broadcast` made to those of ``leaves``."""
    grads: dict[str, Tensor | None] = {**dict.fromkeys([*leaves, "sums"]), **totals}
    made = [name for name in totals if name in whole and whole[name].grad_fn is not None]
    moving = [name for name, leaf in leaves.items() if leaf.requires_grad and whole.get(name) is not leaf]
    if moving:
        found = torch.autograd.grad(
            [whole[name] for name in made],
            [leaves[name] for name in moving],
            [totals[name] for name in made],
            materialize_grads=True,
        )
        grads |= dict(zip(moving, found, strict=True))
    return grads
