"""`l2o.rules.Steered`: a step in place, all of it by a kernel but for products of large matrices."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from inspect import getattr_static
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from l2o.fused.inputs import Inputs
from l2o.kernels.arrays import laid_out_as
from l2o.kernels.steered import CONSTANTS, SLOTS, Entries, fused_steps
from l2o.kernels.whitened import settle, weigh
from l2o.ops.eigenbasis import Whitening, is_due, turn, turned_back
from l2o.ops.groups import stack, tables_of
from l2o.ops.numeric import entries_of
from l2o.ops.orthogonal import as_matrix, is_matrix, matrices, polar
from l2o.ops.scales import are_rare, fan_in, width_factors
from l2o.rules import Steered
from l2o.types import OptState, ParamInfo, Run, Slots, Theta

_LARGE = 128
"""Rows and columns from which products are torch's, and as fast one by one as in a batch, which takes more memory."""
_FORMULAS = ("factors", "scales", "size", "now")
"""Methods of the rule that the kernel does not call: it has their formulas."""
_COLUMN = {"left": "right", "rows": "columns"}
"""A column of entries is a row to the kernel."""


def step(
    rule: Steered, inputs: Inputs, factors: Mapping[str, tuple[float, float]], limit: float = math.inf
) -> OptState | None:
    """See `l2o.fused.step`."""
    if rule.decides or rule.network or not _has_formulas(type(rule)):
        return None
    theta, grads, state, params, infos, run = inputs
    plan = _plan(rule, tuple(infos[name] for name in params))
    grads = {name: laid_out_as(grads[name], p) for name, p in params.items()}
    tensors = [
        _entries(path, grads[name], p, state.per_param[name], factors[name])
        for path, (name, p) in zip(plan.paths, params.items(), strict=True)
    ]
    constants = _constants(rule, theta, run) | {"limit": limit}
    steps = fused_steps(tensors, plan.facts, constants, state.shared)
    if steps is None or not steps.begin():
        return None  # nothing is written, and `update` shows what is wrong
    others = _alike(params, tensors)
    if others:
        whitening = rule.now(theta, run).whitening
        for (path, _), names in others.items():
            of = [state.per_param[name] for name in names]
            if path == "orthogonal":
                _orthogonalise([own["d"] for own in of], rule.iterations)
            elif whitening is not None:
                _whiten(rule, whitening, [grads[name] for name in names], of)
        steps.finish()
    slots = [t for name in params for t in state.per_param[name].values()]
    torch.autograd.graph.increment_version([*params.values(), *slots, *state.shared.values()])
    return state


class _Plan(NamedTuple):
    """What of some tensors does not change from step to step: their paths, and ``FACTS`` of the kernel."""

    paths: Sequence[str]
    facts: np.ndarray


@lru_cache(maxsize=64)
def _plan(rule: Steered, infos: tuple[ParamInfo, ...]) -> _Plan:
    shapes = [info.shape for info in infos]
    found = tables_of({str(i): info for i, info in enumerate(infos)})
    tables = [str(i) in found for i in range(len(infos))]
    paths = [rule.path(shape) for shape in shapes]
    forms = shapes if rule.direction == "adam" else [rule.form(shape) for shape in shapes]
    sized = [float(rule.direction != "adam" and is_matrix(form)) for form in forms]
    facts = {
        "is_matrix": [float(is_matrix(shape)) for shape in shapes],
        "sized": sized,
        "fan": [float(fan_in(form)) for form in forms],
        "entries": [entries_of(shape) for shape in shapes],
        "table": [float(rule.tables and table) for table in tables],
        "rare": are_rare(shapes, forms, tables) if rule.rows and rule.direction != "adam" else [0.0] * len(shapes),
        "width": width_factors(shapes, forms, rule.wide) if rule.direction != "adam" else [1.0] * len(shapes),
    }
    return _Plan(paths, np.array(list(facts.values())).T)


@cache
def _has_formulas(rule: type[Steered]) -> bool:
    return all(getattr_static(rule, name) is getattr_static(Steered, name) for name in _FORMULAS)


def _constants(rule: Steered, theta: Theta, run: Run) -> dict[str, float]:
    """``CONSTANTS`` of the kernel but for the limit, by name."""
    values = dict(zip(theta, torch.stack(list(theta.values())).tolist(), strict=True))
    found = {name: _decoded(name, x) for name, x in values.items()}
    by_name = {name.removeprefix("log_").removeprefix("logit_"): x for name, x in found.items()}
    due = rule.direction == "eigenbasis" and bool(is_due(run, rule.period, rule.early, rule.pace))
    step, total = map(int, run[:2])
    by_name |= {"log_lr": values["log_lr"], "fall": by_name.get("power", 0.0), "longer": rule.rows, "step": step}
    by_name |= {"total": total, "due": due, "decays": rule.schedule == "decay"}
    by_name |= {name: getattr(rule, name) for name in ("cautious", "by_signal", "carried", "haste", "by_gain", "deep")}
    return {name: float(by_name.get(name, 0.0)) for name in CONSTANTS}


def _decoded(name: str, value: float) -> float:
    """Of an entry of θ, what it is the logarithm or the logit of."""
    if name.startswith("logit_"):
        return 1.0 / (1.0 + math.exp(-value))
    return math.exp(value) if name.startswith("log_") else value


def _entries(path: str, grad: Tensor, param: Tensor, slots: Slots, factors: tuple[float, float]) -> Entries:
    """What the kernel has to do with: of a tensor with a large basis, its direction alone."""
    shape = as_matrix(param.shape)
    if path == "eigenbasis" and not (max(shape) < _LARGE and param.is_contiguous()):
        path = "given"
    own = {slot: t for slot, t in slots.items() if slot in SLOTS[path] or slot == "free"}
    if path == "eigenbasis" and shape[1] == 1:
        return Entries(path, (1, shape[0]), grad, param, {_COLUMN.get(k, k): t for k, t in own.items()}, factors)
    return Entries(path, shape, grad, param, own, factors)


def _whiten(rule: Steered, how: Whitening, grads: Sequence[Tensor], slots: Sequence[Mapping[str, Tensor]]) -> None:
    """In place, the slots of tensors of one shape with bases."""
    power = rule.by_signal if is_matrix(grads[0].shape) else None  # vectors keep their size
    for part in _parts(grads):
        some = slots[part]
        own = {name: stack([each[name] for each in some]) for name in some[0]}
        grad, d = (matrices(t).contiguous() for t in (stack(grads[part]), own["d"]))
        turned = turn(how, grad, own)
        seen, m, v = (t.contiguous() for t in turned[:3])
        scaled = weigh(seen, m, v, float(how.momentum.keep), float(how.keep), how.cautious, turned.least)
        settle(turned_back(scaled, turned.bases).contiguous(), grad, d, power)
        for name, t in {"turned": m, "v": v, "d": d, **turned.new}.items():
            if t is not own[name] and t.data_ptr() != some[0][name].data_ptr():  # else it is in its place
                _copy(t, [each[name] for each in some])


def _orthogonalise(tensors: Sequence[Tensor], iterations: int) -> None:
    """In place, tensors of one shape."""
    for part in _parts(tensors):
        _copy(polar(matrices(stack(tensors[part])), iterations), tensors[part])


def _parts(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Which of the tensors, of one shape, to multiply together: small ones in one batched product, large ones apart."""
    together = 1 if min(as_matrix(tensors[0].shape)) >= _LARGE else len(tensors)
    return (slice(first, first + together) for first in range(0, len(tensors), together))


def _copy(stacked: Tensor, to: Sequence[Tensor]) -> None:
    torch._foreach_copy_(list(to), list(stacked.reshape(-1, *to[0].shape).unbind()))


def _alike(params: Mapping[str, Tensor], tensors: Sequence[Entries]) -> dict[tuple[str, torch.Size], list[str]]:
    """Return the names of the tensors whose directions are torch's, of each path and shape."""
    names: dict[tuple[str, torch.Size], list[str]] = defaultdict(list)
    for (name, p), entries in zip(params.items(), tensors, strict=True):
        if entries.path in ("orthogonal", "given"):
            names[entries.path, p.shape].append(name)
    return names
