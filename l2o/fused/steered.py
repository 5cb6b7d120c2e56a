"""`l2o.rules.Steered`: a step in place, its passes over entries by a kernel."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from l2o.fused.inputs import Inputs
from l2o.kernels.arrays import laid_out_as
from l2o.kernels.steered import SLOTS, Entries, fused_steps
from l2o.kernels.whitened import settle, weigh
from l2o.ops.alignment import begin, control, cosine
from l2o.ops.directions import decays_of
from l2o.ops.eigenbasis import Whitening, turn, turned_back
from l2o.ops.groups import stack, tables_of
from l2o.ops.numeric import safe_sqrt
from l2o.ops.orthogonal import as_matrix, is_matrix, matrices, polar
from l2o.ops.scales import are_matrices, unheld
from l2o.rules import Steered
from l2o.rules.steered import Direction
from l2o.types import OptState, Slots

_LARGE = 128
"""Rows and columns from which products are as fast one by one as in a batch, which takes more memory."""


def step(
    rule: Steered, inputs: Inputs, factors: Mapping[str, tuple[float, float]], limit: float = math.inf
) -> OptState | None:
    """See `l2o.fused.step`."""
    theta, grads, state, params, infos, run = inputs
    if rule.decides or rule.network:
        return None
    decays = decays_of(theta)
    known = [name if name in decays else "beta1" for name in ("momentum", "beta1", "beta2", "memory")]
    numbers: list[Tensor | float] = [decays[name].keep for name in known]
    numbers += [rule.cautious, rule.by_signal]
    paths = {n: rule.path(p.shape) for n, p in params.items()}
    grads = {n: laid_out_as(grads[n], p) for n, p in params.items()}
    tensors = [_entries(rule, paths[n], grads[n], p, state.per_param[n], factors[n]) for n, p in params.items()]
    steps = fused_steps(tensors, numbers)
    if steps is None:
        return None
    seen = steps.look()
    dots, gradients, directions, squares = sums = seen.to(theta["log_lr"].dtype)
    shapes = [tuple(p.shape) for p in params.values()]
    weights = rule.factors(theta, shapes)
    shared = begin(state.shared, rule.deep, are_matrices(shapes, weights).sum()) if rule.deep else state.shared
    if rule.controller == "alignment":
        norms = weights * safe_sqrt(gradients) * safe_sqrt(directions)
        shared = control(theta, shared, cosine((weights * dots).sum(), norms.sum()), run)
    held = unheld(squares, [(own, 1) for own in map(state.per_param.__getitem__, params)])
    tables = tables_of(infos)
    sizes = rule.size(theta, shared, run) * weights
    scales = rule.scales(theta, sizes, held, shapes, [name in tables for name in params])
    usual = sums.isfinite().all() and gradients.sum().isfinite() and gradients.sum().sqrt() <= limit
    if not (usual and scales.isfinite().all()):
        return None  # nothing is written yet, and `update` shows what is wrong
    steps.advance(-scales)
    whitening = rule.now(theta, run).whitening
    for (path, _), names in _alike(params, paths).items():
        of = [state.per_param[name] for name in names]
        if path == "orthogonal":
            _orthogonalise([own["d"] for own in of], rule.iterations)
        elif path == "eigenbasis" and whitening is not None:
            _whiten(rule, whitening, [grads[name] for name in names], of)
    steps.finish()
    slots = [t for name in params for t in state.per_param[name].values()]
    torch.autograd.graph.increment_version([*params.values(), *slots])
    return OptState(state.per_param, shared)


def _entries(
    rule: Steered, path: Direction, grad: Tensor, param: Tensor, slots: Slots, factors: tuple[float, float]
) -> Entries:
    """What the kernel has to do with: of a tensor with a basis, its direction alone."""
    name = "given" if path == "eigenbasis" else path
    own = {slot: t for slot, t in slots.items() if slot in SLOTS[name]}
    return Entries(name, as_matrix(param.shape), grad, param, own, factors)


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


def _alike(params: Mapping[str, Tensor], paths: Mapping[str, str]) -> dict[tuple[str, torch.Size], list[str]]:
    """Return the names of the tensors of each path and shape."""
    names: dict[tuple[str, torch.Size], list[str]] = defaultdict(list)
    for name, p in params.items():
        names[paths[name], p.shape].append(name)
    return names
