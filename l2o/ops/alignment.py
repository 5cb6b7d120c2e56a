"""A controller of the step that needs no loss: does the fresh gradient agree with the step just taken?

The derivative of the loss along the last step, as a cosine over all tensors: positive where the step could have been
longer, negative where it was too long (hypergradient descent; Almeida et al. 1998, Baydin et al. 2018, arXiv
1703.04782).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from l2o.ops.numeric import constant, log_of, over_root, scalar_like
from l2o.types import Run, Slots, Theta

_START = {
    "gain": 30.0,  # of the log step, a run; at most _FASTEST a step
    "slope": 6.0,  # of tanh
    "band_up": 0.06,  # a cosine under this is noise: the step does not grow
    "band_down": 0.05,  # one over minus this is too: it does not shrink
    "fast": 5.0,  # steps that the means go over
    "slow": 20.0,
    "sure": 1.0,  # standard deviations that the slow mean has to be under 0 before the step shrinks
    "range": 5.0,  # of the log step
    "leak": 3.0,  # of the log step, a run: what it loses where nothing pushes
}
"""Hand-set; all positive, θ has their logarithms."""
_FASTEST = 0.1
_LEAST_START = 0.1**0.5
_VARIANCE = 1e-8
OF_HELD = 0.5
"""Of the range of a tensor's own log step: a matrix that has a size to begin with has less to find out."""
_OWN = ("log_step", "fast", "slow", "square")


def init_controller(generator: torch.Generator) -> Theta:
    """Return θ of the controller, ``log_*``, 0-d."""
    return {f"log_{name}": scalar_like(log_of(name, value), generator) for name, value in _START.items()}


def init_alignment(like: Tensor, deep: bool = False) -> Slots:
    """Return shared slots, 0-d: zeros for ``log_step``, running means of the cosine (``fast, slow``) and its square; 1
    for what is ``missing`` of the step of a ``deep`` network, until `begin` knows it."""
    zeros = {name: like.new_zeros(()) for name in ("log_step", "fast", "slow", "square")}
    return zeros | ({"missing": like.new_ones(())} if deep else {})


def begin(shared: Slots, deep: int, matrices: Tensor) -> Slots:
    """Return the shared slots, and what is ``missing`` of the logarithm of the step of a network with many matrices.

    A run, and who comes back in one, begins with ``(deep / matrices) ** 2`` of the step, at least a tenth, where there
    are more than ``deep``: changes of layers multiply, and where that is too much at first, gradients of a deep network
    without residual connections have nothing to do with the step before, and the cosine says no more than under noise.
    Where they do have, as in transformers, the cosine says so in the first steps, and `control` gives back what is
    missing.

    matrices: 0-d, of all processes; those that have a gradient now, of a deep network or of many parallel parts.
    """
    missing = 2.0 * (deep / matrices).clamp(_LEAST_START, 1.0).log()  # also without a matrix
    return {**shared, "missing": torch.where(shared["missing"] > 0, missing, shared["missing"])}


def control_each(theta: Theta, own: Tensor, cosines: Tensor, held: Tensor, run: Run) -> Tensor:
    """Return ``own [tensors, 4]`` once the ``cosines [tensors]`` are known: of each tensor its own log step, beside
    that of all, and means, by the same formula.

    held: bool ``[tensors]``, matrices that did not begin as zeros, which have half the range, ``log_own`` of θ.

    What is an input's weight, a bias, a temperature or a place on a map may have a hundred times as far to go as the
    rest, and is lost in the sum over all tensors.
    """
    most = torch.where(held, OF_HELD, constant(1.0, cosines)) * theta["log_own"].exp()
    slots = dict(zip(_OWN, own.unbind(-1), strict=True))
    new = control(theta, slots, cosines, run, most=most)
    return torch.stack([new[name] for name in _OWN], -1)


def cosine(dot: Tensor, norm: Tensor) -> Tensor:
    """Return ``dot / norm``, 0 without norm: products of gradient and step, and of norms.  Both 0-d, of all tensors, or
    ``[tensors]``."""
    return dot / torch.where(norm > 0, norm, constant(1.0, norm))


def control(
    theta: Theta,
    slots: Mapping[str, Tensor],
    cosine: Tensor,
    run: Run,
    more: Tensor | float = 0.0,
    most: Tensor | None = None,
) -> Slots:
    """Return the slots once the ``cosine`` of the gradient at ``run.step`` and the step before is known; 0-d, or all of
    one shape.

    more: push from elsewhere, from -1 to 1 as the signal's own.
    most: ranges of single tensors, instead of θ's for all. Their cosines are noisier: they grow by as much as the sign
        is sure, up to one standard deviation.

    The target is neutral and the step shrinks only where the sign is sure: with a positive target noise drives it to
    its lower bound, and without the gate runs that are almost exact stop too early. What it grew by in the first steps,
    which noise does not show to be too much, leaks away. So does what is ``missing``, and sooner where the sign is sure
    to be positive, by the same measure.
    """
    values = torch.stack([theta[f"log_{name}"] for name in _START]).exp()
    value = dict(zip(_START, values.unbind(), strict=True))
    step, total = (t.to(cosine.dtype) for t in run[:2])
    begun, steps = step > 0, step.clamp(min=1.0)
    keep = {name: torch.exp(-1.0 / value[name]) for name in ("fast", "slow")}
    ages = {name: 1.0 - kept**steps for name, kept in keep.items()}
    seen = {"fast": ("fast", cosine), "slow": ("slow", cosine), "square": ("slow", cosine.square())}
    new = {name: torch.lerp(x, slots[name], keep[pace]) for name, (pace, x) in seen.items()}
    mean = {name: new[name] / ages[pace] for name, (pace, _) in seen.items()}
    deviation = (mean["square"] - mean["slow"].square()).clamp(min=0.0) + _VARIANCE
    error = 0.5 * (mean["fast"] + mean["slow"])
    error = torch.relu(error - value["band_up"]) - torch.relu(-error - value["band_down"])
    below = over_root(-mean["slow"], deviation)
    against = (below - value["sure"]).clamp(0.0, 1.0)
    along = constant(1.0, against) if most is None else (-below).clamp(0.0, 1.0)
    push = torch.tanh(value["slope"] * error) * torch.where(error < 0, against, along)
    gain = (value["gain"] / total).clamp(max=_FASTEST) * (1.0 - step / total).clamp(min=0.0)
    leak = (value["leak"] / total).clamp(max=_FASTEST)
    most = value["range"] if most is None else most
    log_step = torch.clamp((1.0 - leak) * slots["log_step"] + gain * (push + more), -most, most)
    moved = {"log_step": log_step, **new}
    if "missing" in slots:
        agree = (-below - value["sure"]).clamp(0.0, 1.0)
        moved["missing"] = ((1.0 - leak) * slots["missing"] + gain * agree).clamp(max=0.0)
    return {name: torch.where(begun, x, slots[name]) for name, x in moved.items()}
