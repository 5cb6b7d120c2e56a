"""`l2o.ops.coordinatewise` for all tensors of a rule, and all lanes, at once: two custom ops with kernels for the CPU.

``l2o::feature_sums`` and ``l2o::coordinatewise`` take lanes as an argument, and have rules for autograd. Float32
tensors of the CPU take the kernels of coordinatewise.cpp; their derivatives, by blocks that are computed again, and all
other tensors take torch's operations.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2o.kernels import coordinatewise_blocks as blocks
from l2o.kernels import coordinatewise_cpu as cpu
from l2o.kernels.arrays import derivative_of
from l2o.kernels.deferred import current, required
from l2o.kernels.lanes import lowered
from l2o.ops.coordinatewise import Recipe
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
        """Keep some of them."""
        return self._replace(grads={name: self.grads[name] for name in names})

    def sources(self, recipe: Recipe) -> list[Tensor]:
        """Return those of one tensor after the other, in the order of gradients; shapes as of the reference's slots."""
        flat: list[Tensor] = []
        for name, grad in self.grads.items():
            own: Any = {"row_mean": self.row_means.get(name), **self.slots[name], "grad": grad}
            own["param"] = self.params[name]
            flat += [own[source] for source in recipe.sources(len(self.infos[name].shape))]
        return flat

    @property
    def axes(self) -> list[int]:
        """Those of `factored_axes`, two for each tensor, -1 for those without."""
        return [axis for name in self.grads for axis in factored_axes(self.infos[name].shape) or (-1, -1)]


def feature_sums(recipe: Recipe, tensors: Tensors) -> dict[str, Sum]:
    """Return sums of squares of each tensor's channels, ``[channels, *recipe.sums_shape(shape)]``, by name."""
    if not tensors.grads:
        return {}
    own_axes, sources = tensors.axes, tensors.sources(recipe)
    if (waiting := current()) is not None:
        found = required(cpu.feature_sums(recipe, 0, own_axes, sources, waiting.joined(recipe)))
    elif cpu.at_hand(sources) and not recipe.raw:
        known = _named(recipe)
        found = lowered(lambda lanes, own: _feature_sums(known, lanes, own_axes, *own), [sources])
    else:
        found = blocks.feature_sums(recipe, 0, own_axes, sources)
    axes = {name: tuple(axis + g.ndim for axis in recipe.scaled_axes(g.ndim)) for name, g in tensors.grads.items()}
    return {name: Sum(sums, axes[name]) for name, sums in zip(tensors.grads, found, strict=True)}


def completed_sums(recipe: Recipe, tensors: Tensors, reduce: Reduce) -> dict[str, Tensor]:
    """Return `feature_sums` over whole tensors, ``[channels, *recipe.sums_shape(shape)]``, by name."""
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
    """Return the update of each tensor, by name, none without a head; and sums over its elements of the outputs.

    weights: ``w0, b0, w1, ...``; each ``[in, out]`` or ``[out]``, or one for every tensor, ``[tensors, ...]``.
    sums: of `feature_sums`, completed over all shards.
    gains: ``[tensors]``, on the updates.     means: ``[tensors, outputs]``, of the outputs, where the head reads them.
    Sums are ``[tensors, outputs]``; both are in the order of the gradients.
    """
    names, layers = list(tensors.grads), layers_of(weights)
    if not names:
        return {}, gains.new_zeros(0, layers[-1].shape[-1])
    counts = [recipe.count(tensors.infos[name].shape) for name in names]
    layers = [t if t.ndim == 3 - i % 2 else t.unsqueeze(0) for i, t in enumerate(layers)]  # with an axis for tensors
    own_gains = [gains] if means is None else [gains, means]
    inputs: list[Any] = [layers, own_gains, [sums[name] for name in names], tensors.sources(recipe)]
    axes = tensors.axes
    if (waiting := current()) is not None:
        own = cpu.Inputs(layers, gains, means, *inputs[2:])
        *updates, totals = required(cpu.coordinatewise(recipe, 0, axes, counts, own, waiting.joined(recipe)))
    elif cpu.at_hand([gains, *layers, *inputs[-1]]) and not recipe.raw:
        known = _named(recipe)
        *updates, totals = lowered(lambda lanes, own: _coordinatewise(known, lanes, axes, counts, *own), inputs)
    else:
        *updates, totals = blocks.Call(recipe, 0, axes, counts).network(*inputs)
    return dict(zip(names, updates, strict=False)), totals


def completed_means(totals: Tensor, infos: Infos, names: Iterable[str], reduce: Reduce) -> Tensor:
    """Return means over whole tensors, ``[tensors, outputs]``, of the outputs that `network` summed in ``totals``."""
    sums = {
        name: {"outputs": Sum(own, tuple(range(len(infos[name].shape))))}
        for name, own in zip(names, totals, strict=True)
    }
    return torch.stack([own["outputs"] / size(infos[name]) for name, own in reduce.shards(sums).items()])


def layers_of(weights: Theta) -> list[Tensor]:
    """Return ``w0, b0, w1, ...``, ``[..., in, out]`` and ``[..., out]``, of what may hold more."""
    count = sum(name[0] == "w" and name[1:].isdecimal() for name in weights)
    return [weights[f"{kind}{i}"] for i in range(count) for kind in "wb"]


@torch.library.custom_op("l2o::feature_sums", mutates_args=())
def _feature_sums(recipe: str, lanes: int, axes: Sequence[int], sources: Sequence[Tensor]) -> list[Tensor]:
    """lanes: 0 where tensors have no axis of lanes.     axes, sources: see `Tensors`."""
    made = _RECIPES[recipe]
    found = cpu.feature_sums(made, lanes, axes, sources)
    return blocks.feature_sums(made, lanes, axes, sources) if found is None else found


@torch.library.custom_op("l2o::coordinatewise", mutates_args=())
def _coordinatewise(
    recipe: str,
    lanes: int,
    axes: Sequence[int],
    counts: Sequence[int],
    weights: Sequence[Tensor],
    gains: Sequence[Tensor],
    sums: Sequence[Tensor],
    sources: Sequence[Tensor],
) -> list[Tensor]:
    """Updates, then sums of outputs.  weights: ``[1 or tensors, ...]`` after the lanes.  gains: and means, if any."""
    made = _RECIPES[recipe]
    inputs = cpu.Inputs(weights, gains[0], gains[1] if len(gains) > 1 else None, sums, sources)
    found = cpu.coordinatewise(made, lanes, axes, counts, inputs)
    call = blocks.Call(made, lanes, axes, counts)
    return call.network(weights, gains, sums, sources) if found is None else found


def _keep_sums(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.recipe, ctx.lanes, ctx.axes, sources = inputs
    ctx.save_for_backward(*sources)


def _keep_network(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.recipe, ctx.lanes, ctx.axes, ctx.counts, weights, gains, sums, sources = inputs
    ctx.sizes = len(weights), len(gains), len(sums), len(sources)
    ctx.save_for_backward(*weights, *gains, *sums, *sources)


def _d_sums(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Any, ...]:
    recipe, lanes, axes, sources = _RECIPES[ctx.recipe], ctx.lanes, ctx.axes, ctx.saved_tensors
    if torch.is_grad_enabled():
        found = derivative_of(lambda *own: blocks.feature_sums(recipe, lanes, axes, own), sources, cotangents)
    else:
        found = blocks.d_feature_sums(recipe, lanes, axes, sources, cotangents)
    return None, None, None, found


def _d_network(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Any, ...]:
    call = blocks.Call(_RECIPES[ctx.recipe], ctx.lanes, ctx.axes, ctx.counts)
    if torch.is_grad_enabled():
        found = derivative_of(lambda *own: call.network(*split(own, ctx.sizes)), ctx.saved_tensors, cotangents)
        return None, None, None, None, *split(found, ctx.sizes)
    weights, gains, sums, sources = split(ctx.saved_tensors, ctx.sizes)
    return None, None, None, None, *call.derivative(weights, gains, sums, sources, cotangents)


_feature_sums.register_autograd(_d_sums, setup_context=_keep_sums)
_coordinatewise.register_autograd(_d_network, setup_context=_keep_network)


def split(flat: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """Return lists of these sizes that were put one after the other."""
    rest = iter(flat)
    return [list(itertools.islice(rest, n)) for n in sizes]
