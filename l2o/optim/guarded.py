"""A guard over a run: steps of a tenth, then AdamW from the last good parameters, and the way back.

It acts on a plug-in from outside and is no rule made of rules: those would keep AdamW's moments from the first step on,
choose between two updates of every entry in every step, and have no kernel. What it knows is ``guard`` of the run
(`l2o.optim.slots`), plain numbers but for the losses of the last steps, and ``state[p]["good"]``, copies of parameters
in their dtype, renewed every ten steps while all is well: as much memory as the parameters take. AdamW's moments take
the place of the rule's slots.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from l2o.optim import ladder, watch
from l2o.optim.inputs import is_scalar
from l2o.optim.ladder import Guard
from l2o.optim.members import Member, checked_gradient, infos
from l2o.optim.slots import counts, record, run_of
from l2o.rules import Adam
from l2o.types import Kind, ResumeError, Theta, UpdateRule

GOOD = "good"
"""The name of a parameter's copy, beside its slots."""
_SMALL = 0.1
"""Factor of steps that are backed off."""
_LAST = 0.05
"""Share of the run over which AdamW's rate decays at its end, as the learned rule's steps would have,"""
_FLOOR = 0.05
"""to this share of it."""
_MAKE_UP = 1.25
"""AdamW's rate is larger by what was lost of the run, at most by this factor."""

Facts = Mapping[str, Any]
"""Of a run."""
Names = Mapping[Tensor, Sequence[str]]
"""Of slots, by parameter."""
Kinds = Collection[Kind]
"""Of parameters, that a rule has met in meta-training."""


@cache
def _adamw() -> tuple[UpdateRule, Theta]:
    """Decay is the plug-in's, which is AdamW's."""
    rule = Adam(lr=watch.YARDSTICK)
    return rule, rule.init_theta(torch.Generator())


def acting(run: Facts, rule: UpdateRule, theta: Theta) -> tuple[UpdateRule, Theta]:
    """Say who makes the steps: the rule with its θ, or AdamW."""
    return _adamw() if _stage(run) == "adamw" else (rule, theta)


def check(run: Facts, guard: bool) -> None:
    """Raise `ResumeError` for a saved run in which AdamW acts that an optimizer without a guard is to go on from."""
    if not guard and _stage(run) == "adamw":
        raise ResumeError("state_dict is of a guarded run in which AdamW acts: make the optimizer with guard=True")


def saved(run: Facts) -> str:
    """Return what the guard knows as text: distributed checkpoints take nested structures apart and lose empty ones."""
    guard = run.get("guard")
    return json.dumps({**guard, "losses": [float(x) for x in guard["losses"]]}) if guard else ""


def loaded(run: Facts) -> Facts:
    """Return ``run`` with what was `saved` of the guard."""
    text = run.get("guard")
    rest = {name: fact for name, fact in run.items() if name != "guard"}
    return {**rest, "guard": json.loads(text)} if text else rest


def rate(run: Facts, lr: float, total_steps: int) -> float:
    """Return the factor on updates where a group has ``lr``; AdamW takes no larger steps than its own."""
    match _stage(run):
        case "small":
            return _SMALL * lr
        case "adamw":
            return min(lr, 1.0) * _schedule(run["step"] / total_steps, run["guard"]["since"] / total_steps)
    return lr


def _schedule(done: float, began: float) -> float:
    """The factor on AdamW's rate, of shares of the run."""
    lost = min(began + _LAST / 2, 1.0 - 1.0 / _MAKE_UP)
    return max(min((1.0 - done) / _LAST, 1.0), _FLOOR) / (1.0 - lost)


def limit(run: Facts, members: Sequence[Member]) -> float:
    """Return the norm of all gradients from which on a step is skipped; infinite where others had gradients before."""
    guard = run.get("guard") or ladder.begin()
    known = guard["memory"] and guard.get("entries", [0])[0] == _entries(members)
    return watch.limit(guard["memory"]) if known else math.inf


def report(run: Facts) -> dict[str, Any]:
    """Return ``stage`` and ``events``; the stage is "unguarded" where there is no guard."""
    guard = run.get("guard") or {"stage": "unguarded", "events": []}
    return {"stage": guard["stage"], "events": [dict(event) for event in guard["events"]]}


def begin(optimizer: Optimizer, members: Sequence[Member], known: Kinds | None) -> str | None:
    """Let AdamW act from the start of a run where there are parameters of kinds that the rule does not know.

    members: all.    known: None for every kind.
    Returns what is to be said of it, the first time.
    """
    if known is None or counts(optimizer)[0] or run_of(optimizer).get("guard"):
        return None
    kinds = {info.kind for info in infos(members).values()}
    if kinds <= set(known):
        return None
    record(optimizer, guard=ladder.foreign())
    return (
        f"the rule was meta-trained on parameters of kind {', '.join(sorted(known))} alone, and these are "
        f"{', '.join(sorted(kinds))}: AdamW at 1e-3 acts in its place. guard=False lets the rule act"
    )


def watch_step(
    optimizer: Optimizer,
    members: Sequence[Member],
    everyone: Sequence[Member],
    names: Callable[[], Names],
    loss: Any,
    total: int,
    stride: float,
) -> ladder.Event | None:
    """See every few steps, before one is taken, how the run goes, and do what has to be done; gives what was done.

    members: those with gradients, whole.     everyone: also those without, which may be trained in turn.
    names: gives those of the acting rule's slots, by parameter.     loss: if known.     total: steps of the run.
    stride: of the rule.
    """
    guard, (step, skipped) = _heard(run_of(optimizer).get("guard") or ladder.begin(), loss), counts(optimizer)
    if step % watch.EVERY:
        record(optimizer, guard=guard)
        return None
    trained = [m for m in everyone if m.param.requires_grad or m.param.grad is not None]
    seen, entries = _seen(optimizer, guard, trained, stride), [_entries(members), _entries(trained)]
    guard = ladder.skips(guard, step, int(skipped))
    if not guard["memory"]:
        new = {**guard, "losses": [], "memory": watch.begun(seen), "entries": entries}
        record(optimizer, guard=_keep_good(optimizer, new, trained))
        return None
    if entries != guard.get("entries"):  # other parameters have gradients now, with norms of their own
        guard = {**guard, "memory": watch.begun(seen, guard["memory"]), "entries": entries}
    signs = watch.alarms(guard["memory"], seen)
    kind = watch.trouble(signs)
    event: ladder.Event | None
    if kind is not None:
        guard, alarm = ladder.alarmed(guard, kind, seen, step, total)
        event = alarm
        if alarm.restored:
            _restore(optimizer, trained, names())
            guard.update(memory=watch.back(guard["memory"], seen), good=step)
    else:
        guard, event = ladder.calm({**guard, "memory": watch.learned(guard["memory"], seen)}, step, total)
        if event and event.done == "handed over":
            _drop(optimizer, names())
        # That small steps do no harm does not make parameters good.
        if watch.good(signs, guard["memory"], seen) and guard["stage"] != "small":
            guard = _keep_good(optimizer, guard, trained)
    record(optimizer, guard={**guard, "losses": []})
    return event


def _heard(guard: Guard, loss: Any) -> Guard:
    """With the loss, if it is one, kept for the next look. Nothing waits for the device."""
    if not is_scalar(loss):
        return guard
    kept = loss.detach().clone() if isinstance(loss, Tensor) else float(loss)
    return {**guard, "losses": [*guard["losses"], kept]}


def _seen(optimizer: Optimizer, guard: Guard, trained: Sequence[Member], stride: float) -> watch.Seen:
    """Reads the device, once for all numbers; raises `GradientError`."""
    params = [m.param.detach() for m in trained]
    good = [optimizer.state.get(m.param, {}).get(GOOD, p) for m, p in zip(trained, params, strict=True)]
    moves = zip(trained, params, good, strict=True)
    known = [(checked_gradient(m), p, old) for m, p, old in moves if m.param.grad is not None]
    grads, here, there = (_together(each) for each in zip(*known, strict=True))
    sizes, bases = _together(params), _together(good)
    slope = _products(grads, here) - _products(grads, there)
    sums = [_norm(grads), _norm(sizes), _norm(bases), _products(sizes, bases), slope]
    losses = [torch.as_tensor(x, dtype=_DTYPE, device=params[0].device).reshape(()) for x in guard["losses"]]
    gradient, size, base, product, slope, *heard = torch.stack([*sums, *losses]).tolist()
    step, skipped = counts(optimizer)
    moved = math.sqrt(max(size * size + base * base - 2.0 * product, 0.0))  # without a difference, which takes memory
    skips, cosine = int(skipped) - guard["skipped"], slope / max(gradient * moved, 1e-30)
    steps, entries = step - guard["good"], _entries(trained)
    return watch.Seen(tuple(heard), gradient, size, moved, base, steps, entries, skips, cosine, stride)


def _entries(members: Sequence[Member]) -> int:
    return sum(m.param.numel() for m in members)


_DTYPE = torch.float32
_FEW = 1 << 16
"""Entries that are sooner copied than asked for one tensor at a time."""


def _together(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same entries in one tensor, ``[entries]``, where to copy them takes less time than an operation for each."""
    few = sum(t.numel() for t in tensors) <= _FEW
    return [torch.cat([t.flatten() for t in tensors])] if few else tensors


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else _DTYPE  # torch narrows none
    return torch.stack(torch._foreach_norm(list(tensors), dtype=dtype)).norm().to(_DTYPE)


def _products(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The sum of products of all entries, of tensors of the same shapes."""
    dtypes = [torch.promote_types(x.dtype, _DTYPE) for x in a]
    dots = [torch.dot(x.flatten().to(dtype), y.flatten().to(dtype)) for x, y, dtype in zip(a, b, dtypes, strict=True)]
    return torch.stack([dot.to(_DTYPE) for dot in dots]).sum()


def keep_good(state: dict[Any, Any], members: Sequence[Member]) -> None:
    """Keep copies of parameters."""
    for m in members:
        state[m.param] = {**state.get(m.param, {}), GOOD: m.param.detach().clone()}


def _keep_good(optimizer: Optimizer, guard: Guard, members: Sequence[Member]) -> Guard:
    keep_good(optimizer.state, members)
    return {**guard, "good": counts(optimizer)[0], "memory": watch.kept(guard["memory"])}


def _restore(optimizer: Optimizer, trained: Sequence[Member], names: Names) -> None:
    """Put back good parameters, of those that are trained and have had a gradient: others are not ours to change."""
    for m in trained:
        kept = optimizer.state.get(m.param, {})
        if GOOD in kept and set(names[m.param]) <= kept.keys():
            m.param.copy_(kept[GOOD])
    _drop(optimizer, names)


def _drop(optimizer: Optimizer, names: Names) -> None:
    """Drop the slots of who acted: who acts next begins with a state of its own."""
    for p, own in names.items():
        if p in optimizer.state:
            optimizer.state[p] = {name: kept for name, kept in optimizer.state[p].items() if name not in own}
    record(optimizer, shared={})


def _stage(run: Facts) -> str | None:
    stage: str | None = (run.get("guard") or {}).get("stage")
    return stage
