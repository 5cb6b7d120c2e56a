"""What a rule does, seen from outside: experiments on what it is shown, which need nothing but the contract.

A short run is recorded; then updates of it are repeated with one thing changed, in float64: the gradients of an entry,
the clock, a spike, gradients of zero. What changes in the update is what the rule does with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map, tree_map_only

from l2o.checks import check_int
from l2o.inspection.recording import Recording, StepInputs, dot, double, entries, record, rerun
from l2o.rules import Adam
from l2o.types import OptState, Params, Run, Slots, TaskFamily, Theta, UpdateRule, Updates

MEMORY = 10
"""Updates that a past is made of in the experiments on momentum and decay."""
PASTS = (1.0, 0.0, -1.0)
"""Past gradients of an entry, in units of its present one: equal, zero, opposite."""
FRACTIONS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of the run, which the rule is told to be at."""
REACH = 3.0
"""Gradients are swept to either side by so many root mean squares of their tensor."""
SPIKES = tuple(10.0 ** (i / 2) for i in range(-2, 9))
"""Factors on the whole gradient of one step."""
ADAM_LR = 1e-3
_CHUNK = 32
"""Repetitions that are vectorised at once."""
CHANNELS = 8
"""Channels of a slot that are looked at one by one: momenta of several decays, but not the units of an LSTM."""
EPSILON = 0.01
"""Relative change of an input. No smaller, because some rules see signs of means that are 0 but for rounding, and a
derivative would say nothing of how far such a step goes, or everything."""
_TINY = torch.finfo(torch.float64).tiny


class Response(NamedTuple):
    """The update of one entry of a tensor against its gradient, all else as in the run.

    tensor: its name.     gradients: ``[points]``, in root mean squares of the tensor's.
    by_past: ``[len(PASTS), points]``, after `MEMORY` gradients of that entry equal to the present one, zero, opposite.
    by_age: ``[len(FRACTIONS), points]``, after a past of zeros, the clock set to `FRACTIONS` of the run.
    """

    tensor: str
    gradients: Tensor
    by_past: Tensor
    by_age: Tensor


class Inspection(NamedTuple):
    """All that is measured of a rule; tensors are float64 unless said otherwise.

    run, adam: recordings of the rule, and of Adam at `ADAM_LR`, on the same problems; the inputs of ``run`` lie around
        its ``middle``, a step, and near its ends.
    response: see there.
    schedule: ``[len(FRACTIONS)]``, root mean square of the update at the middle, the clock alone set to `FRACTIONS`.
    clock_change: largest relative distance of these updates from the first of them.
    spikes: ``[len(SPIKES)]``, root mean square of the update for a gradient multiplied by `SPIKES`, over the ordinary.
    rest: ``[2, entries]``: parameters, and the part of their update that changes sign with them, after gradients of 0.
    sensitivity: by input, root mean square of the change of the update relative to the update, per relative change of
        the input (every entry by a random sign); for the clock, per length of the run.
    """

    run: Recording
    adam: Recording
    middle: int
    response: Response
    schedule: Tensor
    clock_change: float
    spikes: Tensor
    rest: Tensor
    sensitivity: dict[str, float]


def inspect(
    rule: UpdateRule,
    theta: Theta,
    family: TaskFamily,
    steps: int,
    generator: torch.Generator,
    lanes: int = 4,
    points: int = 21,
) -> Inspection:
    """Record ``steps`` steps of the rule on ``lanes`` tasks of ``family``, and experiment with it.

    theta: ``[...]``, float32, without lanes, on the generator's device.     points: of each curve of the response.
    Raises `ConfigurationError` for fewer than ``2 * MEMORY`` steps, and where a run diverges.
    """
    check_int("steps", steps, 2 * MEMORY)
    middle = steps // 2
    places = [steps // 10, middle, steps * 9 // 10]
    seed = generator.initial_seed()

    def recorded(rule: UpdateRule, theta: Theta, keep: Sequence[int]) -> Recording:
        return record(rule, theta, family, steps, generator.manual_seed(seed), lanes, keep)

    run = recorded(rule, theta, [*places, *range(middle - MEMORY, middle)])
    adam_rule = Adam(lr=ADAM_LR)
    adam = recorded(adam_rule, adam_rule.init_theta(generator), [])
    theta = {name: double(t) for name, t in theta.items()}
    history = [run.inputs[step] for step in range(middle - MEMORY, middle + 1)]
    with torch.no_grad():
        schedule, change = clock_response(rule, theta, history)
        sensitivities = [sensitivity(rule, theta, run.inputs[place], generator) for place in places]
        return Inspection(
            run,
            adam,
            middle,
            response(rule, theta, history, points),
            schedule,
            change,
            spike_response(rule, theta, history[-1]),
            at_rest(rule, theta, history),
            {name: sum(s[name] for s in sensitivities) / len(places) for name in sensitivities[0]},
        )


def response(rule: UpdateRule, theta: Theta, history: Sequence[StepInputs], points: int = 21) -> Response:
    """Sweep the gradient of an ordinary entry of the largest tensor; see `Response`."""
    grads = history[-1].grads
    tensor = max(grads, key=lambda name: grads[name].numel())
    size = _rms({tensor: grads[tensor]}).clamp(min=_TINY)
    entry = (grads[tensor].abs() - size).abs().argmin()  # the one whose gradient is nearest to the root mean square
    chosen = torch.zeros_like(grads[tensor]).flatten().index_fill(0, entry, 1.0).reshape(grads[tensor].shape).bool()
    sweep = torch.linspace(-REACH, REACH, points, dtype=torch.float64, device=size.device)

    def update(past: Tensor, fraction: Tensor, value: Tensor) -> Tensor:
        def change(inputs: StepInputs, back: int) -> StepInputs:
            shown = torch.where(chosen, value * size * (past if back else 1.0), inputs.grads[tensor])
            run = _at(inputs.run, fraction, back)
            return inputs._replace(grads={**inputs.grads, tensor: shown}, run=run)

        return rerun(rule, theta, history, change)[tensor].flatten().index_select(0, entry.unsqueeze(0)).squeeze(0)

    conditions = [*((past, 0.5) for past in PASTS), *((0.0, fraction) for fraction in FRACTIONS)]
    rows = list(dict.fromkeys(conditions))  # one of them is a past and an age
    given = torch.tensor(rows, dtype=torch.float64, device=size.device).repeat_interleave(points, 0)
    curves = vmap(update, chunk_size=_CHUNK)(given[:, 0], given[:, 1], sweep.repeat(len(rows))).reshape(-1, points)
    found = curves[[rows.index(condition) for condition in conditions]]
    return Response(tensor, sweep, found[: len(PASTS)], found[len(PASTS) :])


def _at(run: Run, fraction: Tensor | float, back: int) -> Run:
    """``back`` updates before ``fraction`` of the run."""
    return run._replace(step=((fraction * run.total_steps).long() - back).clamp(min=0))


def clock_response(rule: UpdateRule, theta: Theta, history: Sequence[StepInputs]) -> tuple[Tensor, float]:
    """Return ``schedule``, ``[len(FRACTIONS)]``, and ``clock_change`` of `Inspection`."""

    def update(fraction: Tensor) -> Updates:
        return rerun(rule, theta, history, lambda m, back: m._replace(run=_at(m.run, fraction, back)))

    moves = vmap(update, chunk_size=_CHUNK)(torch.tensor(FRACTIONS, dtype=torch.float64, device=_device(history)))
    moved = {name: u - u[:1] for name, u in moves.items()}
    sizes = _rms(moves, 1)
    return sizes, float((_rms(moved, 1) / sizes[0].clamp(min=_TINY)).max())


def spike_response(rule: UpdateRule, theta: Theta, inputs: StepInputs) -> Tensor:
    """Return ``spikes``, ``[len(SPIKES)]``, of `Inspection`."""

    def update(factor: Tensor) -> Updates:
        def change(m: StepInputs, back: int) -> StepInputs:
            return m._replace(grads={name: g * factor for name, g in m.grads.items()})

        return rerun(rule, theta, [inputs], change)

    factors = torch.tensor([1.0, *SPIKES], dtype=torch.float64, device=_device([inputs]))
    sizes = _rms(vmap(update, chunk_size=_CHUNK)(factors), 1)
    return sizes[1:] / sizes[0].clamp(min=_TINY)


def at_rest(rule: UpdateRule, theta: Theta, history: Sequence[StepInputs]) -> Tensor:
    """Return ``rest``, ``[2, entries]``, of `Inspection`: with no gradient to follow, what is left of the update that
    depends on the parameters.

    A rule that looks at sizes of parameters only, or not at all, has 0 here.
    """

    def update(sign: float) -> Updates:
        def change(m: StepInputs, back: int) -> StepInputs:
            nothing = {name: torch.zeros_like(g) for name, g in m.grads.items()}
            return m._replace(grads=nothing, params={name: sign * p for name, p in m.params.items()})

        return rerun(rule, theta, history, change)

    there, mirrored, params = update(1.0), update(-1.0), history[-1].params
    odd = torch.cat([(there[name] - mirrored[name]).flatten() / 2.0 for name in params])
    return torch.stack([torch.cat([p.flatten() for p in params.values()]), odd])


def sensitivity(rule: UpdateRule, theta: Theta, inputs: StepInputs, generator: torch.Generator) -> dict[str, float]:
    """Measure ``sensitivity`` of `Inspection` at one step: central differences along each of `directions`.

    Inputs are the gradient, the parameter, the loss where the rule needs it, the clock, and the slots of the state
    before the update; of a slot with a few channels, each of them. State of the past is thus apart from the present.
    """
    unit = _rms(rerun(rule, theta, [inputs], _same)).clamp(min=_TINY)
    found = {}
    for name, direction in directions(rule, inputs, generator):
        ends = []
        for side in (1.0, -1.0):
            moved = _shift(inputs, direction, side)
            ends.append((rerun(rule, theta, [moved], _same), moved.run.step))
        (ahead, late), (behind, early) = ends
        distance = (late - early) / inputs.run.total_steps if name == "clock" else 2.0 * EPSILON
        found[name] = float(_rms({k: ahead[k] - behind[k] for k in ahead}) / distance / unit)
    return found


def directions(rule: UpdateRule, inputs: StepInputs, generator: torch.Generator) -> Iterator[tuple[str, StepInputs]]:
    """Return each input by name, and what a relative change of it adds: its entries with random signs, and 0
    elsewhere."""
    none: StepInputs = tree_map_only(Tensor, torch.zeros_like, inputs)
    signed: StepInputs = tree_map_only(Tensor, lambda x: _signed(x, generator), inputs)
    yield "gradient", none._replace(grads=signed.grads)
    yield "parameter", none._replace(params=signed.params)
    if rule.needs_loss:
        yield "loss", none._replace(run=none.run._replace(loss=signed.run.loss))
    yield "clock", none._replace(run=none.run._replace(step=(inputs.run.total_steps // 20).clamp(min=1)))
    blank, noise = none.state, signed.state
    counts = channel_counts(inputs.state, inputs.params)
    parts = {name: _parts(slots, counts) for name, slots in noise.per_param.items()}
    for label in dict.fromkeys(label for found in parts.values() for label in found):
        slots = {k: blank.per_param[k] | dict([own[label]] if label in own else []) for k, own in parts.items()}
        yield label, none._replace(state=blank._replace(per_param=slots))
    for slot, t in noise.shared.items():
        if t.is_floating_point():
            yield f"{slot} (shared)", none._replace(state=blank._replace(shared=blank.shared | {slot: t}))


def channel_counts(state: OptState, params: Params) -> dict[str, int]:
    """Return slots with a few channels along a first axis that parameters lack, and how many: the same in every
    tensor."""
    lengths: dict[str, set[int]] = {}
    lacking = set()
    for name, slots in state.per_param.items():
        for slot, t in slots.items():
            lengths.setdefault(slot, set()).add(len(t) if t.ndim else 0)
            lacking |= {slot} if t.shape != params[name].shape else set()
    return {slot: min(n) for slot, n in lengths.items() if slot in lacking and len(n) == 1 and 1 < min(n) <= CHANNELS}


def _parts(slots: Slots, counts: dict[str, int]) -> dict[str, tuple[str, Tensor]]:
    """Slots in floating point by label, ``m[0], m[1], ...`` for their channels: all else in the slot is 0 then."""
    found: dict[str, tuple[str, Tensor]] = {}
    for slot, t in slots.items():
        if t.is_floating_point() and slot in counts:
            keep = torch.eye(len(t), dtype=t.dtype, device=t.device)
            found |= {f"{slot}[{i}]": (slot, t * keep[i].view(-1, *[1] * (t.ndim - 1))) for i in range(len(t))}
        elif t.is_floating_point():
            found[slot] = (slot, t)
    return found


def _signed(x: Tensor, generator: torch.Generator) -> Tensor:
    """``x`` with random signs; 0 where it counts something."""
    if not x.is_floating_point():
        return torch.zeros_like(x)
    return x * (torch.randint(2, x.shape, generator=generator, device=x.device) * 2.0 - 1.0)


def _shift(inputs: StepInputs, direction: StepInputs, side: float) -> StepInputs:
    """``inputs`` moved along ``direction``; the clock by whole steps, and not to before the start."""

    def shift(x: Any, d: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x + side * EPSILON * d if x.is_floating_point() else (x + int(side) * d).clamp(min=0)

    return cast(StepInputs, tree_map(shift, inputs, direction))


def _same(inputs: StepInputs, back: int) -> StepInputs:
    return inputs


def _rms(tree: dict[str, Tensor], batch_axes: int = 0) -> Tensor:
    """Root mean square over all entries, of each element of the first ``batch_axes`` axes."""
    count = sum(entries(t, batch_axes).shape[-1] for t in tree.values())
    return (dot(tree, tree, batch_axes) / count).sqrt()


def _device(history: Sequence[StepInputs]) -> torch.device:
    return history[0].run.step.device
