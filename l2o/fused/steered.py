"""`l2o.rules.Steered`: a step in place, by a kernel but for products of large matrices, and updates of lanes."""

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
from torch.utils._pytree import tree_leaves

from l2o.fused.decided import Deciding, remembers
from l2o.fused.inputs import Inputs, copied
from l2o.kernels import steered as kernels
from l2o.kernels.arrays import laid_out_as, plain
from l2o.kernels.steered import fits_lanes, fused_steps, ordered
from l2o.kernels.steered_tables import CONSTANTS, NETWORK, Kind, Layout, is_channels_last
from l2o.kernels.whitened import follow, settle, weigh
from l2o.ops.controller import OF_NETWORK, fan_inputs
from l2o.ops.eigenbasis import BASES, MEANS, Whitening, due_at, turn, turned_back
from l2o.ops.groups import stack, tables_of
from l2o.ops.numeric import entries_of, finite
from l2o.ops.orthogonal import as_matrix, is_matrix, matrices, polar
from l2o.ops.scales import are_rare, fan_in, width_factors
from l2o.rules import Steered
from l2o.types import Grads, Infos, OptState, ParamInfo, Params, Run, Slots, Theta, Updates

_LARGE = 128
"""Rows or columns from which products are torch's; of as many of both, one by one they are as fast as in a batch, which
takes more memory."""
_RENAMED = {"power": ("fall", 1), "beta1": ("fresh1", 3), "beta2": ("fresh2", 3)}
"""Constants that have another name than in θ, and which of its columns they are, see `_Sources`."""
_FORMULAS = ("factors", "scales", "size", "now")
"""Methods of the rule that the kernel does not call: it has their formulas."""


def step(
    rule: Steered, inputs: Inputs, factors: Mapping[str, tuple[float, float]], limit: float = math.inf
) -> OptState | None:
    """See `l2o.fused.step`."""
    theta, grads, state, params, infos, run = inputs
    if not _is_known(rule, inputs) or (run.loss is not None and not finite([run.loss], [])):
        return None
    layout = _layout(
        rule,
        tuple(infos[name] for name in params),
        tuple(None if p.is_contiguous() else p.stride() for p in params.values()),
    )
    if layout is None:
        return None
    own = [laid_out_as(grads[name], p) for name, p in params.items()]
    slots, rates = [state.per_param[name] for name in params], [factors[name] for name in params]
    constants, tensors = _constants(rule, theta, run, limit), ordered(layout, own, list(params.values()), slots)
    steps = fused_steps(layout, tensors, rates, constants, _shared(rule, inputs))
    deciding = Deciding(rule, inputs) if _asks(rule) and steps else None
    if steps is None or not steps.begin(deciding):
        return None  # nothing is written, and `update` shows what is wrong
    if deciding:
        deciding.keep()
    others = _alike(layout, own)
    if others:
        whitening = rule.now(theta, run).whitening
        for (path, _), places in others.items():
            some = [slots[i] for i in places]
            if path == "orthogonal":
                _orthogonalise([each["d"] for each in some], rule.iterations)
            elif whitening is not None:
                _whiten(rule, whitening, [own[i] for i in places], some)
        steps.finish()
    written = [t for each in slots for t in each.values()]
    torch.autograd.graph.increment_version([*params.values(), *written, *state.shared.values()])
    return state


def step_lanes(rule: Steered, inputs: Inputs, ahead: Tensor) -> bool:
    """See `l2o.fused.step_lanes`.  Where nothing is differentiated.  ahead: bool ``[lanes]``."""
    layout, written = _layout_of_lanes(rule, inputs), tree_leaves((dict(inputs.params), inputs.state))
    if layout is None or not all(map(Tensor.is_contiguous, written)):
        return False
    _step_lanes(rule, inputs, layout, ahead.nonzero()[:, 0].numpy())
    torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])
    return True


def update(
    rule: Steered, theta: Theta, grads: Grads, state: OptState, params: Params, run: Run, infos: Infos
) -> tuple[Updates, OptState] | None:
    """See `l2o.fused.update`.  Where nothing is differentiated: a step in place of copies."""
    layout = _layout_of_lanes(rule, Inputs(theta, grads, state, params, infos, run))
    if layout is None:
        return None
    moves, new = copied(dict(params)), copied(state)
    _step_lanes(rule, Inputs(theta, grads, new, moves, infos, run), layout, np.arange(len(run.step)), moves=True)
    return moves, new


def _layout_of_lanes(rule: Steered, inputs: Inputs) -> Layout | None:
    """That of a lane's tensors, or None where the kernel is not for them."""
    _, grads, state, params, infos, run = inputs
    if torch.is_grad_enabled() or not _is_known(rule, inputs):
        return None
    layout = _layout(rule, tuple(infos[name] for name in params), (None,) * len(params), large=math.inf)
    assert layout is not None
    slots, own = [state.per_param[name] for name in params], [grads[name] for name in params]
    tensors = ordered(layout, own, list(params.values()), slots)
    return layout if fits_lanes(layout, tensors, _shared(rule, inputs), len(run.step)) else None


def _step_lanes(rule: Steered, inputs: Inputs, layout: Layout, lanes: np.ndarray, moves: bool = False) -> None:
    theta, grads, state, params, _, run = inputs
    slots, own = [state.per_param[name] for name in params], [grads[name].contiguous() for name in params]
    tensors = ordered(layout, own, list(params.values()), slots)
    assert tensors is not None
    deciding = Deciding(rule, inputs, lanes) if _asks(rule) and len(lanes) else None
    kernels.step_lanes(layout, tensors, _constants(rule, theta, run), _shared(rule, inputs), lanes, moves, deciding)
    if deciding:
        deciding.keep()


def _has_perceptron(rule: Steered) -> bool:
    """Whether a network decides that the kernel has."""
    return rule.controller == "mlp" and not rule.reads_loss


def _asks(rule: Steered) -> bool:
    """Whether a network decides that the kernel has to be told of."""
    return rule.decides and not _has_perceptron(rule)


def _shared(rule: Steered, inputs: Inputs) -> Mapping[str, Tensor]:
    """What the kernel's controller keeps, and a perceptron of it."""
    weights = NETWORK.values() if _has_perceptron(rule) else ()
    return {**inputs.state.shared, **{name: inputs.theta[name].contiguous() for name in weights}}


def _is_known(rule: Steered, inputs: Inputs) -> bool:
    """Whether the kernel has the formulas of the rule, and reads its θ, and a network what it remembers."""
    try:
        hash(rule)  # what is made for it is kept
    except TypeError:
        return False
    if rule.network or not _has_formulas(type(rule)) or not plain(inputs.theta.values()):
        return False
    return not rule.decides or remembers(inputs)


@lru_cache(maxsize=64)
def _layout(
    rule: Steered,
    infos: tuple[ParamInfo, ...],
    strides: tuple[tuple[int, ...] | None, ...],
    large: float = _LARGE,
) -> Layout | None:
    """Return that of tensors, or None where one lies in memory in an order that is no matrix'.

    strides: None for contiguous ones.     large: rows or columns from which products are torch's.
    """
    if not all(
        stride is None or is_channels_last(info.shape, stride) for info, stride in zip(infos, strides, strict=True)
    ):
        return None
    shapes, sizes = [info.shape for info in infos], rule.direction != "adam"
    found = tables_of({str(i): info for i, info in enumerate(infos)})
    tables = [str(i) in found for i in range(len(infos))]
    forms = [rule.form(shape) if sizes else shape for shape in shapes]
    rare = are_rare(shapes, forms, tables) if rule.rows and sizes else [0.0] * len(shapes)
    widths = width_factors(shapes, forms, rule.wide if sizes else 0.0)
    kinds = []
    for info, form, table, own, width, stride in zip(infos, forms, tables, rare, widths, strides, strict=True):
        path, shape = rule.path(info.shape), as_matrix(info.shape)
        torchs = path == "eigenbasis" and (max(shape) >= large or stride is not None)
        facts = {
            "is_matrix": is_matrix(info.shape),
            "sized": sizes and is_matrix(form),
            "fan": fan_in(form),
            "entries": entries_of(info.shape),
            "table": rule.tables and table,
            "rare": own,
            "width": width,
            **dict(zip(("columns_in", "rows_in"), fan_inputs(info.shape), strict=True)),
        }
        kept = rule.keeps_free(info), rule.own > 0, _has_perceptron(rule)
        kinds.append(Kind("given" if torchs else path, shape, facts, *kept, stride))
    return Layout(kinds)


@cache
def _has_formulas(rule: type[Steered]) -> bool:
    return all(getattr_static(rule, name) is getattr_static(Steered, name) for name in _FORMULAS)


def _constants(rule: Steered, theta: Theta, run: Run, limit: float = math.inf) -> np.ndarray:
    """``CONSTANTS`` of the kernel, ``[lanes, constants]``, of θ without lanes or ``[lanes]``."""
    own = {name: t for name, t in theta.items() if not name.startswith(OF_NETWORK)}
    values = torch.stack(list(own.values()), -1).double().view(-1, len(own)).numpy()
    with np.errstate(over="ignore"):
        powers, shares, fresh = np.exp(values), 1.0 / (1.0 + np.exp(-values)), 1.0 / (1.0 + np.exp(values))
    found, sources, fixed = np.empty((len(values), len(CONSTANTS))), _sources(tuple(own)), _fixed(rule)
    found[:] = fixed
    found[:, sources.places] = np.concatenate([values, powers, shares, fresh], 1)[:, sources.columns]
    step, total = (t.numpy() for t in run[:2])
    now = run.step if run.called is None else run.called
    due = rule.direction == "eigenbasis" and np.asarray(due_at(now, rule.period, rule.early, rule.pace))
    for name, value in {"step": step, "total": total, "due": due, "limit": limit}.items():
        found[:, CONSTANTS.index(name)] = value
    return found


class _Sources(NamedTuple):
    """Which constants are of θ, and in which column of its values, their powers of e, shares, and what these leave."""

    places: Sequence[int]
    columns: Sequence[int]


@cache
def _sources(names: tuple[str, ...]) -> _Sources:
    """``names``: of θ."""
    columns = {}
    for i, name in enumerate(names):
        kind, _, rest = name.partition("_")
        constant, block = _RENAMED.get(rest, (rest, 1 if kind == "log" else 2))
        if name in ("log_lr", "fan_in"):
            constant, block = name, 0
        columns[CONSTANTS.index(constant)] = block * len(names) + i
    return _Sources(list(columns), list(columns.values()))


@lru_cache(maxsize=64)
def _fixed(rule: Steered) -> np.ndarray:
    """``CONSTANTS`` that are the rule's; 0 for all others."""
    known = {name: getattr(rule, name) for name in ("cautious", "by_signal", "carried", "haste", "by_gain", "deep")}
    known |= {"longer": rule.rows, "decays": rule.schedule == "decay"}
    return np.array([float(known.get(name, 0.0)) for name in CONSTANTS])


def _whiten(rule: Steered, how: Whitening, grads: Sequence[Tensor], slots: Sequence[Mapping[str, Tensor]]) -> None:
    """In place, the slots of tensors of one shape with bases."""
    power = rule.by_signal if is_matrix(grads[0].shape) else None  # vectors keep their size
    for part in _parts(grads):
        some = slots[part]
        own = {name: stack([each[name] for each in some]) for name in some[0]}
        grad, d = (matrices(t).contiguous() for t in (stack(grads[part]), own["d"]))
        turned = turn(how, grad, own, _follow)
        seen, m, v = (t.contiguous() for t in turned[:3])
        scaled = weigh(seen, m, v, float(how.momentum.keep), float(how.keep), how.cautious, turned.least)
        settle(turned_back(scaled, turned.bases).contiguous(), grad, d, power)
        for name, t in {"turned": m, "v": v, "d": d, **turned.new}.items():
            if t is not own[name] and t.data_ptr() != some[0][name].data_ptr():  # else it is in its place
                _copy(t, [each[name] for each in some])


def _follow(how: Whitening, kept: Slots, means: Slots) -> Slots:
    """`l2o.ops.eigenbasis.followed`, in the place of what was: other tensors, so that one sees they are new."""
    to = {name: t.contiguous().detach() for name, t in kept.items()}
    products, bases = ([of.get(side) for side in sides] for of, sides in ((means, MEANS), (to, BASES)))
    follow(products, bases, to["turned"], to["v"], how.carried)
    return to


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


def _alike(layout: Layout, grads: Sequence[Tensor]) -> dict[tuple[str, torch.Size], list[int]]:
    """Return the places of the tensors whose directions are torch's, by path and shape."""
    places: dict[tuple[str, torch.Size], list[int]] = defaultdict(list)
    for i, (kind, grad) in enumerate(zip(layout.kinds, grads, strict=True)):
        if kind.path in ("orthogonal", "given"):
            places[kind.path, grad.shape].append(i)
    return places
