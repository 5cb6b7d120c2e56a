"""Steps as one CUDA graph: captured once, then replayed, so that a step costs the host one launch and not hundreds.

Whatever a graph reads and writes has to stay where it is: gradients and numbers are copied to places of their own
before a replay, state and parameters are written in place. Steps that do more than usual ones (bases follow in them)
do the same without a graph. Where anything else changes, the step is captured anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from l2o.ops.groups import is_same
from l2o.ops.numeric import finite
from l2o.optim.apply import Ready, updated
from l2o.optim.guard import HAD_GRADIENT, beside, masked, rest
from l2o.optim.members import Member
from l2o.types import ConfigurationError, OptState, Run, Slots, Updates

_EAGER = 3
"""Steps before the first capture: what is copied to the device or compiled once must not be part of a graph."""

Replay = Callable[[], Any]


def capture(function: Replay) -> Replay:
    """Return what does again on the device what ``function`` does there."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may load data meanwhile
        function()
    return graph.replay


def check(members: Sequence[Member], alone: bool, state_dtype: torch.dtype | None) -> None:
    """Raise `ConfigurationError` where there can be no graph."""
    device = members[0].param.device.type
    if device != "cuda" or not alone or state_dtype is not None:
        came = (
            f"parameters on {device}" if device != "cuda" else "shards" if not alone else f"state_dtype={state_dtype}"
        )
        raise ConfigurationError(
            f"cuda_graph=True: expected parameters on cuda, whole in one process, and no state_dtype; got {came}; set "
            "cuda_graph=False"
        )


class Graphs:
    """The graph of an optimizer's steps, once they have been alike for a while."""

    def __init__(self) -> None:
        self._graph: Graph | None = None
        self._key: Any = None
        self._alike = 0

    def step(self, optimizer: Any, members: Sequence[Member], ready: Ready) -> bool:
        """Take a step by a graph, and say so: not before there have been some that it would have been one of."""
        check(members, optimizer._place.alone, optimizer.state_dtype)
        key = _key(members, ready)
        self._alike, self._key = (self._alike + 1 if key == self._key else 0), key
        if self._alike < _EAGER:
            self._graph = None
            return False
        if self._graph is None or optimizer._lent or not self._graph.has(ready.inputs.state):
            seen = None if ready.rule.rests else optimizer._seen(members)
            self._graph = Graph(members, ready, seen, optimizer.total_steps)
            optimizer._keep(members, self._graph.state)
            optimizer._lent = False
        optimizer._count((~self._graph.step(ready)).long())
        return True


def _key(members: Sequence[Member], ready: Ready) -> Any:
    """What a graph has been captured for."""
    inputs = ready.inputs
    places = tuple((m.key, id(m.group), m.here.data_ptr(), m.here.dtype, m.here.stride()) for m in members)
    plain = tuple((group, lr == 1.0, keep == 1.0) for group, (lr, keep) in ready.factors.items())
    infos = tuple((info.shape, info.kind) for info in inputs.infos.values())
    return places, plain, infos, id(ready.rule), id(inputs.theta), inputs.run.loss is None


class Graph:
    """Steps of some parameters at fixed addresses.

    state: at them, a copy of what it was made with, in which stacked tensors stay so.
    """

    def __init__(self, members: Sequence[Member], ready: Ready, seen: Slots | None, total_steps: int) -> None:
        inputs, run = ready.inputs, ready.inputs.run
        like = next(iter(inputs.params.values()))
        self._members, self._rule, self._rests, self._total_steps = members, ready.rule, seen is None, total_steps
        self.state = copy.deepcopy(inputs.state if seen is None else beside(inputs.state, seen))
        grads = {key: torch.empty_like(g) for key, g in inputs.grads.items()}
        fixed = Run(run.step.clone(), run.total_steps.clone(), None if run.loss is None else run.loss.clone())
        self._inputs = inputs._replace(grads=grads, state=self.state, run=fixed)
        self._rates = {group: [like.new_full((), x) for x in each] for group, each in ready.factors.items()}
        self._plain = {group: (lr == 1.0, keep == 1.0) for group, (lr, keep) in ready.factors.items()}
        self._limit, self._ok = like.new_full((), ready.limit), torch.ones((), dtype=torch.bool, device=like.device)
        self._replay: Replay | None = None

    def has(self, state: OptState) -> bool:
        """Say whether ``state``, without masks, is that of the graph."""
        own = self.state
        slots = all(own.per_param[key][name] is t for key, s in state.per_param.items() for name, t in s.items())
        return slots and all(own.shared[name] is t for name, t in state.shared.items())

    def step(self, ready: Ready) -> Tensor:
        """Take a step, and return whether it counts, bool, 0-d. The host does not wait."""
        self._fill(ready)
        called = ready.inputs.run.called
        if called is None or not self._rule.is_usual(called):
            self._advance(called)
        else:
            self._replay = self._replay or capture(lambda: self._advance(called))
            self._replay()
        return self._ok

    def _fill(self, ready: Ready) -> None:
        own, given = self._inputs, ready.inputs
        torch._foreach_copy_(list(own.grads.values()), [given.grads[key] for key in own.grads])
        for to, number in zip(own.run[:3], given.run[:3], strict=True):
            if isinstance(to, Tensor) and isinstance(number, Tensor):
                to.copy_(number)
        for group, rates in self._rates.items():
            for rate, value in zip(rates, ready.factors[group], strict=True):
                rate.fill_(value)
        self._limit.fill_(ready.limit)

    def _advance(self, called: int | None) -> None:
        """Take the step itself, from fixed addresses to fixed addresses."""
        params, grads, old = self._inputs.params, self._inputs.grads, self.state
        copied = [m for m in self._members if params[m.key].dtype != m.here.dtype]
        for m in copied:
            params[m.key].copy_(m.here)
        inputs = self._inputs._replace(run=self._inputs.run._replace(called=called))
        updates, new = updated(self._rule, inputs, self._total_steps)
        if not self._rests:
            updates, now = rest(updates, grads, {key: slots[HAD_GRADIENT] for key, slots in old.per_param.items()})
            new = beside(new, now)
        others = [*updates.values(), *([] if inputs.run.loss is None else [inputs.run.loss])]
        self._ok.copy_(finite(list(grads.values()), others, self._limit))
        updates, new = masked(self._ok, updates, new, old)
        moved = [(to, new.per_param[key][name]) for key, slots in old.per_param.items() for name, to in slots.items()]
        moved += [(to, new.shared[name]) for name, to in old.shared.items()]
        moved = [(to, t) for to, t in moved if not is_same(to, t)]
        torch._foreach_copy_([to for to, _ in moved], [t for _, t in moved])
        self._write(updates)
        for m in copied:
            m.here.copy_(params[m.key])

    def _write(self, updates: Updates) -> None:
        """See `l2o.optim.apply.write`; with numbers of the device, which a graph reads anew at each step."""
        for group, (lr, keep) in self._rates.items():
            keys = [m.key for m in self._members if id(m.group) == group]
            values, moves = [self._inputs.params[key] for key in keys], [updates[key] for key in keys]
            (whole, stays) = self._plain[group]
            if not stays:
                torch._foreach_mul_(values, torch.where(self._ok, keep, 1.0))
            torch._foreach_add_(values, moves if whole else torch._foreach_mul(moves, lr))
