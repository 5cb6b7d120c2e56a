"""A step under `torch.compile`: one graph of all arithmetic, between what Python does before and after it.

What the host looks up, checks and keeps would break the graph at every look, and its numbers, such as that of the
step, would be constants of the code, which would be compiled anew when they change. So both halves of it are hidden
from the compiler, two breaks in all, and numbers come in as tensors. The graph reads nothing on the host: a step that
is to be skipped is masked, as on a GPU. No kernel of ours takes part; steps of shards are not compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2o.fused import Inputs
from l2o.ops.numeric import finite
from l2o.optim import slots
from l2o.optim.apply import checked
from l2o.optim.guard import beside, masked, plain, rest
from l2o.optim.members import Member
from l2o.types import OptState, Slots, UpdateRule


class Task(NamedTuple):
    """What the graph gets.

    rates: ``lr, keep``, 0-d, and the parameters that have them, by their keys.    limit: 0-d, of the norm of gradients.
    seen: which entries have had a gradient, where the rule has to be told.
    """

    rule: UpdateRule
    inputs: Inputs
    rates: Sequence[tuple[Tensor, Tensor, Sequence[str]]]
    limit: Tensor
    seen: Slots | None


def step(optimizer: Any, closure: Callable[[], Any] | None, loss: Any) -> Any:
    """See `LearnedOptimizer.step`."""
    loss, members, task = _begun(optimizer, closure, loss)
    if task is not None:
        _ended(optimizer, members, task, *_moved(task))
    return loss


@torch.compiler.disable
def _begun(optimizer: Any, closure: Callable[[], Any] | None, loss: Any) -> tuple[Any, Sequence[Member], Task | None]:
    """The loss, the parameters to be moved, and what is left to do: nothing, where there are none, a guard has acted,
    or they are shards."""
    loss, members = optimizer._asked(closure, loss)
    if not members:
        return loss, members, None
    with plain(members[0].param.device):
        ready = optimizer._ready(members, loss)
        if ready is None:
            return loss, members, None
        if optimizer._place.alone:
            return loss, members, _task(members, ready, None if ready.rule.rests else optimizer._seen(members))
        optimizer._step(members, ready)
    return loss, members, None


def _task(members: Sequence[Member], ready: Any, seen: Slots | None) -> Task:
    """See `Task`.  ready: `l2o.optim.apply.Ready`."""
    like = next(iter(ready.inputs.params.values()))
    keys = {group: [m.key for m in members if id(m.group) == group] for group in ready.factors}
    rates = [(*(like.new_full((), x) for x in ready.factors[group]), some) for group, some in keys.items()]
    run = ready.inputs.run._replace(called=None)  # a number of the host would be a constant of the code
    return Task(ready.rule, ready.inputs._replace(run=run), rates, like.new_full((), ready.limit), seen)


def _moved(task: Task) -> tuple[OptState, Tensor]:
    """The new state, apart from all that is written to; bool, 0-d, whether the step counts. Writes to parameters."""
    rule, inputs, rates, limit, seen = task
    old, params, grads = inputs.state, inputs.params, inputs.grads
    with torch.no_grad(), torch.autocast(limit.device.type, enabled=False):
        updates, new = checked(rule, inputs, *rule.update(*inputs))
        if seen is not None:
            updates, now = rest(updates, grads, seen)
            old, new = beside(old, seen), beside(new, now)
        others = [*updates.values(), *([] if inputs.run.loss is None else [inputs.run.loss])]
        ok = finite(list(grads.values()), others, limit)
        updates, new = masked(ok, updates, new, old)
        for lr, keep, keys in rates:
            for key in keys:
                params[key].mul_(torch.where(ok, keep, 1.0)).add_(updates[key] * lr)
    return new, ok


@torch.compiler.disable
def _ended(optimizer: Any, members: Sequence[Member], task: Task, new: OptState, ok: Tensor) -> None:
    with plain(ok.device):
        new = slots.apart(members, task.inputs.params, task.inputs.grads, new)
        optimizer._keep(members, new)
        for m in members:
            if task.inputs.params[m.key].dtype != m.here.dtype:
                m.here.copy_(task.inputs.params[m.key])
        optimizer._count((~ok).long())
