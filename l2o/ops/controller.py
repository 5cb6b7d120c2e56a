"""Decisions about the steps of tensors by a small network, from what needs no loss and has no scale of gradients.

The network is one for all tensors. It adds to what `l2o.ops.alignment` does, and nothing at first: its last layer is
zero until something is learned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from l2o.ops.alignment import begin, control, control_each, cosine
from l2o.ops.groups import Group, tensor_sum
from l2o.ops.networks import init_linear, init_mlp, linear, lstm_cell, mlp
from l2o.ops.numeric import constant, entries_of, of_shapes, over_root, safe_sqrt
from l2o.ops.scales import are_matrices, unheld
from l2o.types import Reduce, Run, Slots, Theta

OF_RUN = ("fast", "slow", "long", "deviation", "log_step", "done", "length", "begun")
OF_LOSS = ("trend", "course")
OF_TENSOR = ("signal", "size", "fan_in", "fan_out", "matrix", "near", "far", "factor")
"""Inputs: what the tensors of a run share, also where the loss is read, and what each has of its own; see `decide`."""
OF_NETWORK = "decide_"
"""What names of its tensors in θ begin with."""
SLOTS = ("near", "far", "factor", "h", "c", "own")
"""Of a tensor, what decisions and `own_factors` are of; those that there are."""
SUMS = ("dots", "grads", "directions", "params", "momenta")
"""Of a tensor: products of gradient and step before, and squares."""
_HIDDEN = 16
_NEAR, _FAR, _LONG = 5.0, 20.0, 100.0
"""Steps that means of cosines go over: of single tensors, and the longest of all together."""
_UNIT = 4.0
"""Of cosines, as inputs: their size is about a quarter."""
_LEAST_SIGNAL = 0.05
_PACE = 0.1
"""Of a tensor's factor towards what the network says: a step is not to follow the noise of its inputs."""
_RANGE = 1.5
"""Of the logarithm of a tensor's factor."""


_LOSS = {"loss_fast": _NEAR, "loss_slow": _FAR, "loss_long": _LONG, "loss_square": _FAR}
"""Means of the loss, and of the square of what it is off its slow one, with the steps that they go over."""


class Seen(NamedTuple):
    """What a step shows of each tensor, ``[tensors]``.

    cosines: of its gradient and its step before.     signal: norm of its momentum over that of its gradient, near one
    where gradients agree, and near ``sqrt((1 - β) / (1 + β))`` where they are noise.     sizes: root mean squares of
    its parameters.
    """

    cosines: Tensor
    signal: Tensor
    sizes: Tensor


def init_decisions(generator: torch.Generator, kind: str, reads_loss: bool = False) -> Theta:
    """Return θ of the network, a perceptron (``mlp``) or ``lstm``: ``decide_w0, decide_b0``, a last layer of zeros."""
    inputs = len(OF_TENSOR) + len(OF_RUN) + (len(OF_LOSS) if reads_loss else 0)
    theta = init_mlp(generator, (inputs, _HIDDEN, 2))
    if kind == "lstm":
        theta["w0"], theta["b0"] = init_linear(generator, inputs + _HIDDEN, 4 * _HIDDEN)
    theta["w1"] = torch.zeros_like(theta["w1"])
    return {f"{OF_NETWORK}{name}": t for name, t in theta.items()}


def init_seen(like: Tensor, kind: str) -> Slots:
    """Return slots of a tensor: running means of its cosine (``near, far``), the logarithm of its ``factor``, 0-d; the
    state ``h, c [hidden]`` of an ``lstm``."""
    slots = {name: like.new_zeros(()) for name in ("near", "far", "factor")}
    return slots | ({name: like.new_zeros(_HIDDEN) for name in ("h", "c")} if kind == "lstm" else {})


def init_shown(like: Tensor, reads_loss: bool = False) -> Slots:
    """Return the shared slots of the network, 0-d zeros: ``long``, and running means of the loss (``loss_*``)."""
    return {name: like.new_zeros(()) for name in ("long", *(_LOSS if reads_loss else ()))}


def steer(
    theta: Theta,
    shared: Slots,
    groups: Sequence[Group],
    sums: Slots,
    factors: Tensor,
    run: Run,
    reduce: Reduce,
    deep: int = 0,
) -> tuple[Slots, Slots]:
    """Return what is shared after a step, and new slots of each tensor: what the network decided, and ``own`` of
    `l2o.ops.alignment.control_each`, of those that there are.

    shared: of `l2o.ops.alignment`, or nothing, and for the network ``long``.    deep: see `l2o.ops.alignment.begin`.
    sums: ``SUMS`` of whole tensors, ``[tensors]``, in the order of the groups; ``momenta`` for the network alone.
    factors: of their steps, ``[tensors]``.
    """
    if not shared:
        return shared, {}
    # The network sees all tensors at once.
    memory = {name: torch.cat([group.slots[name] for group in groups]) for name in SLOTS if name in groups[0].slots}
    shapes = [group.shape for group in groups for _ in group.names]
    products = _products(memory, sums, factors)
    counted = torch.cat([products, are_matrices(shapes, products).unsqueeze(1)], 1) if deep else products
    dot, norm, *count = tensor_sum(groups, counted, reduce)
    aligned, shared = cosine(dot, norm), begin(shared, deep, *count) if deep else shared
    own: Slots = {}
    if "own" in memory:
        free = unheld(torch.zeros_like(factors), [(group.slots, len(group.names)) for group in groups]) > 0
        held = (are_matrices(shapes, products) > 0) & ~free
        own["own"] = control_each(theta, memory["own"], cosine(*products.unbind(1)), held, run)
    if "long" not in shared:
        return control(theta, shared, aligned, run), own
    growth, decided = decide(theta, shared, _seen(shapes, sums, products), memory, shapes, run)
    push = _push(tensor_sum(groups, _weighed(growth, products), reduce))
    return control(theta, shared, aligned, run, push) | _shown(shared, aligned, run), decided | own


def decide_alone(
    theta: Theta,
    shared: Slots,
    sums: Slots,
    memory: Slots,
    factors: Tensor,
    shapes: Sequence[tuple[int, ...]],
    run: Run,
) -> tuple[Tensor, Slots, Slots]:
    """Return what the network of a run whose tensors are all here adds to the push of `control`, 0-d, what is shared of
    it after the step, and new slots of tensors.

    sums: ``SUMS [tensors]``.    memory: ``SLOTS [tensors, ...]``.    factors: as of `steer`.
    """
    products = _products(memory, sums, factors)
    growth, decided = decide(theta, shared, _seen(shapes, sums, products), memory, shapes, run)
    shown = _shown(shared, cosine(*products.sum(0)), run)
    return _push(_weighed(growth, products).sum(0)), shown, decided


def _weighed(growth: Tensor, products: Tensor) -> Tensor:
    """``[tensors, 2]``, to be summed: of what tensors say, by the size of their steps."""
    weights = products[:, 1]
    return torch.stack([growth * weights, weights], 1)


def _push(sums: Tensor) -> Tensor:
    return torch.tanh(cosine(*sums))


def _shown(shared: Slots, aligned: Tensor, run: Run) -> Slots:
    return {"long": _follow(shared["long"], aligned, _LONG, run.step), **_loss_means(shared, run)}


def _products(memory: Slots, sums: Slots, factors: Tensor) -> Tensor:
    """``[tensors, 2]``: of gradients and the step before, and of their norms, but for a factor of all."""
    norms = safe_sqrt(sums["grads"]) * safe_sqrt(sums["directions"])
    return (factors * own_factors(memory)).unsqueeze(1) * torch.stack([sums["dots"], norms], 1)


def own_factors(slots: Slots) -> Tensor | float:
    """Return those of the steps of single tensors, ``[tensors]``, by slots: the network's, and their own, if any."""
    logarithms = [slots["factor"]] if "factor" in slots else []
    logarithms += [slots["own"][:, 0]] if "own" in slots else []
    return torch.stack(logarithms).sum(0).exp() if logarithms else 1.0


def _seen(shapes: Sequence[tuple[int, ...]], sums: Slots, products: Tensor) -> Seen:
    entries = of_shapes(entries_of, shapes, sums["params"])
    return Seen(
        cosine(*products.unbind(1)),
        over_root(safe_sqrt(sums["momenta"]), sums["grads"]),
        safe_sqrt(sums["params"] / entries),
    )


def decide(
    theta: Theta, shared: Slots, seen: Seen, slots: Slots, shapes: Sequence[tuple[int, ...]], run: Run
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what each tensor says of the growth of the step of all, and its new slots, all ``[tensors]``.

    shared: of `l2o.ops.alignment`, and ``long``, before this step.     slots: see `init_seen`, ``[tensors, ...]``.
    shapes: of the tensors.
    """
    step, total = (t.to(seen.cosines.dtype) for t in run[:2])
    paces = {"near": _NEAR, "far": _FAR}
    new = {name: _follow(slots[name], seen.cosines, pace, step) for name, pace in paces.items()}
    inputs = torch.stack([*_of_tensors(seen, shapes), _UNIT * new["near"], _UNIT * new["far"], slots["factor"]])
    of_run = torch.cat([_of_run(shared, step, total), *_of_loss(shared)])
    (growth, factor), state = _network(theta, inputs, of_run, slots)
    bounded = _RANGE * torch.tanh(factor / _RANGE)
    return growth, {**new, "factor": torch.lerp(slots["factor"], bounded, _PACE), **state}


def _network(theta: Theta, inputs: Tensor, of_run: Tensor, slots: Slots) -> tuple[Tensor, Slots]:
    """``[2, tensors]`` of ``inputs [k, tensors]`` and those that all share, and the new state of an LSTM."""
    own = {name.removeprefix(OF_NETWORK): t for name, t in theta.items() if name.startswith(OF_NETWORK)}
    if "h" not in slots:
        return mlp(own, inputs, of_run, torch.tanh), {}
    x = torch.cat([inputs, of_run.unsqueeze(1).expand(-1, inputs.shape[1])])
    h, c = lstm_cell(x, slots["h"].T, slots["c"].T, own["w0"], own["b0"])
    return linear(h, own["w1"], own["b1"]), {"h": h.T, "c": c.T}


def _follow(mean: Tensor, cosine: Tensor, steps: float, step: Tensor) -> Tensor:
    """The running mean over ``steps``; the first gradient has no step before it."""
    return torch.where(step > 0, torch.lerp(cosine, mean, math.exp(-1.0 / steps)), mean)


def _of_run(shared: Slots, step: Tensor, total: Tensor) -> Tensor:
    """Inputs that all tensors share, ``[k]``; lengths of runs by their logarithm, 0 at 300 steps."""
    variance = (shared["square"] - shared["slow"].square()).clamp(min=0.0)
    return torch.stack(
        [
            *(_UNIT * shared[name] for name in ("fast", "slow", "long")),
            _UNIT * over_root(variance, variance),
            0.5 * shared["log_step"],
            (step / total).clamp(max=1.0),
            0.5 * torch.log(total / 300.0),
            torch.exp(-step / 20.0),
        ]
    )


def _loss_means(shared: Slots, run: Run) -> Slots:
    """Return the new means of the loss; nothing where it is not read.  The first loss is where they begin."""
    if "loss_slow" not in shared or run.loss is None:
        return {}
    loss, first = run.loss.to(shared["loss_slow"].dtype), run.step == 0
    seen = dict.fromkeys(_LOSS, loss) | {"loss_square": (loss - shared["loss_slow"]).square()}
    means = {name: torch.lerp(seen[name], shared[name], math.exp(-1.0 / pace)) for name, pace in _LOSS.items()}
    start = dict.fromkeys(_LOSS, loss) | {"loss_square": torch.zeros_like(loss)}
    return {name: torch.where(first, start[name], mean) for name, mean in means.items()}


def _of_loss(shared: Slots) -> list[Tensor]:
    """Inputs of the loss, ``[2]``: how far its means of fewer steps lie from those of more, whatever its scale."""
    if "loss_slow" not in shared:
        return []
    differences = [shared["loss_fast"] - shared["loss_slow"], shared["loss_slow"] - shared["loss_long"]]
    return [torch.stack([over_root(x, x.square() + shared["loss_square"]) for x in differences])]


def fan_inputs(shape: tuple[int, ...]) -> tuple[float, float]:
    """Return the inputs ``fan_in`` and ``fan_out``, of columns and rows; 0 for 64."""
    columns, rows = (0.5 * math.log(max(math.prod(part), 1) / 64.0) for part in (shape[1:], shape[:1]))
    return columns, rows


def _of_tensors(seen: Seen, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Inputs of each tensor, ``[tensors]`` each; 0 for a matrix of 64 inputs and outputs with entries of 1/8."""
    fans = [constant(own, seen.sizes) for own in zip(*map(fan_inputs, shapes), strict=True)]
    kinds = are_matrices(shapes, seen.sizes)
    sizes = 0.25 * torch.log(seen.sizes + 1e-5) + 0.25 * math.log(8.0)
    return [1.0 + torch.log(seen.signal.clamp(min=_LEAST_SIGNAL)), sizes, *fans, kinds]
