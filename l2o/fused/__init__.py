"""Kernels for whole updates, steps in place, gradients and unrolls, by the classes of rules and families they are of.

They stand above rules and tasks, which know nothing of them. Whoever has a kernel for a class of their own enters it::

    l2o.fused.UPDATES[MyRule] = my_update

A kernel gives None, with nothing drawn or written, where it does not fit or cannot be had; the engine and the plug-in
then go by the contract. A subclass has the kernels of its class unless it overrides what they are a kernel of, or a
helper of the class (``_name``); what else they depend on they call, or give None where it is overridden. Results differ
from the contract's by rounding alone. Each is differentiable where grad mode is on, or gives None there, but for steps
in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from inspect import getattr_static
from typing import Any

import torch
from torch import Tensor

from l2o.fused import adam, coordinatewise, mlp, perceptrons, steered
from l2o.fused.inputs import Inputs as Inputs
from l2o.fused.inputs import copied as copied
from l2o.kernels.moments import HAD_GRADIENT as HAD_GRADIENT
from l2o.kernels.unroll import Batches as Batches
from l2o.ops.kinds import lane_infos
from l2o.rules import MLP, STAR, AdafacMLP, Adam, Celo, Celo2, Steered, VeLO
from l2o.tasks.augment import Augmented, Reparametrized
from l2o.tasks.image import ImageMLP
from l2o.tasks.repeated import Repeated
from l2o.types import (
    Batch,
    Buffers,
    Grads,
    Infos,
    InnerState,
    OptState,
    Params,
    Run,
    TaskData,
    TaskFamily,
    Theta,
    UpdateRule,
    Updates,
)

Table = dict[type, Callable[..., Any]]

UPDATES: Table = {MLP: mlp.update, Steered: steered.update}
LANE_STEPS: Table = {Steered: steered.step_lanes}
STEPS: Table = {Adam: adam.step, Steered: steered.step}
STEPS |= dict.fromkeys((AdafacMLP, STAR, Celo, Celo2, VeLO), coordinatewise.step)
GRADIENTS: Table = {ImageMLP: perceptrons.gradient}
BATCHES: Table = {ImageMLP: perceptrons.batches}
"""What a family's training batches are to unrolls that know their kind."""
UNROLLS: dict[tuple[type, type], Callable[..., Any]] = {(MLP, Batches): mlp.unroll}
UNROLLS |= dict.fromkeys([(AdafacMLP, Batches), (STAR, Batches)], coordinatewise.unroll)
"""By rule and kind of batches."""


def update(
    rule: UpdateRule,
    theta: Theta,
    grads: Grads,
    state: OptState,
    params: Params,
    run: Run,
    infos: Infos | None = None,
) -> tuple[Updates, OptState] | None:
    """Return `UpdateRule.update` of all lanes at once, every tensor ``[lanes, ...]``.

    infos: of a lane's tensors, which kernels are handed last; by default what their shapes say.
    """
    kernel = _entry(UPDATES, rule, "update")
    if kernel is None:
        return None
    infos = lane_infos(params) if infos is None else infos
    found: tuple[Updates, OptState] | None = kernel(rule, theta, grads, state, params, run, infos)
    return found


def step_lanes(rule: UpdateRule, inputs: Inputs, ahead: Tensor) -> bool:
    """Do ``p <- p + update`` in place, also of the state, in the lanes that are ``ahead``, bool ``[lanes]``.

    inputs: of all lanes, every tensor ``[lanes, ...]``.     Says whether a kernel did it; else nothing is written.
    """
    kernel = _entry(LANE_STEPS, rule, "update")
    return kernel is not None and bool(kernel(rule, inputs, ahead))


def step(
    rule: UpdateRule, inputs: Inputs, factors: Mapping[str, tuple[float, float]], limit: float = math.inf
) -> OptState | None:
    """Do ``p <- keep p + lr update`` in place, also of the slots, without lanes; return the new state.

    inputs: with `HAD_GRADIENT` among the slots where the rule does not rest.     factors: ``lr, keep`` by parameter.
    None also where the kernel finds numbers that are not finite, or a norm of all gradients above ``limit``.
    """
    kernel = _entry(STEPS, rule, "update")
    found: OptState | None = kernel and kernel(rule, inputs, factors, limit)
    return found


def gradient(
    family: TaskFamily, params: Params, buffers: Buffers, data: TaskData, batch: Batch
) -> tuple[Tensor, Buffers, Grads] | None:
    """Return losses ``[lanes]``, new buffers and gradients of all lanes at once, by a kernel or in closed form."""
    kernel = _entry(GRADIENTS, family, "loss")
    found: tuple[Tensor, Buffers, Grads] | None = kernel and kernel(family, params, buffers, data, batch)
    return found


def batches(family: TaskFamily, data: TaskData, like: torch.Generator) -> Any:
    """Say what kind of batches ``family`` would draw for training where ``like`` is, or None."""
    kind = _entry(BATCHES, family, "batch", "loss", "transform_gradients")
    return kind and kind(family, data, like)


def unroll(
    rule: UpdateRule, theta: Theta, family: TaskFamily, state: InnerState, steps: int, generator: torch.Generator
) -> tuple[InnerState, Tensor] | None:
    """Take ``steps`` inner steps of all lanes on fresh training batches: new state and losses ``[steps, lanes]``."""
    if not any(isinstance(rule, cls) for cls, _ in UNROLLS):
        return None
    found = batches(family, state.data, generator)
    return None if found is None else unroll_on(found, rule, theta, state, steps, generator)


def unroll_on(
    found: Any, rule: UpdateRule, theta: Theta, state: InnerState, steps: int, generator: torch.Generator
) -> tuple[InnerState, Tensor] | None:
    """Do what `unroll` does on the batches that `batches` has ``found``: losses ``[steps, lanes]``."""
    of_kind = {cls: kernel for (cls, kind), kernel in UNROLLS.items() if kind is type(found)}
    kernel = _entry(of_kind, rule, "update")
    result: tuple[InnerState, Tensor] | None = kernel and kernel(rule, theta, state, found, steps, generator)
    return result


def has(table: Table, thing: UpdateRule | TaskFamily) -> bool:
    """Say whether there may be a kernel for ``thing`` in one of the tables of rules, or of families."""
    return _entry(table, thing, "update" if isinstance(thing, UpdateRule) else "loss") is not None


def _entry(table: Table, thing: Any, *methods: str) -> Callable[..., Any] | None:
    """The kernel of the nearest class that ``thing`` has these methods of, and all helpers (``_name``)."""
    kind: Any = type(thing)
    cls: Any = next((cls for cls in kind.__mro__ if cls in table), None)
    return table[cls] if cls is not None and _is_alike(kind, cls, methods) else None


@cache
def _is_alike(kind: type, cls: type, methods: tuple[str, ...]) -> bool:
    helpers = [n for n, x in vars(cls).items() if n[0] == "_" and n[-2:] != "__" and hasattr(x, "__get__")]
    same = (getattr_static(kind, n) is getattr_static(cls, n) for n in (*methods, *helpers))
    return kind is cls or all(same)


def _augmented(family: Augmented, *arguments: Any) -> tuple[Tensor, Buffers, Grads] | None:
    return family.gradient_through(partial(gradient, family.family), *arguments)


def _repeated(family: Repeated, *arguments: Any) -> tuple[Tensor, Buffers, Grads] | None:
    return gradient(family.family, *arguments)


def _repeated_batches(family: Repeated, data: TaskData, like: torch.Generator) -> Any:
    found = batches(family.family, family.once(data), like)
    return found and found.repeated(family.copies)


GRADIENTS[Augmented] = GRADIENTS[Reparametrized] = _augmented
GRADIENTS[Repeated] = _repeated
BATCHES[Repeated] = _repeated_batches
