"""When a training run has gone wrong: what is seen of it every few steps, what is kept in mind, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

EVERY = 10
"""Steps between two looks, at which the host waits for the device."""
YARDSTICK = 1e-3
"""The largest root mean square of a step of Adam at its usual rate."""

_LOST = 0.25
"""A loss has risen that has lost so much of what had been gained, more than the noise of batches,"""
_NOISE = 3.0
"""which is so many mean absolute differences of single losses from the median of their look,"""
_SHARE = 0.1
"""and so much of the lowest loss."""
_AT_ONCE = 1.5
"""A loss that is so many times the first one after one look has risen; at first nothing has been gained to lose."""
_LEAP = 0.5
"""A leap moves parameters by this share of their norm in the steps of a look,"""
_LEAP_STEPS = 5.0
"""by so many usual steps of the rule a step at least, so that tensors that start at zero may begin,"""
_DOWN = -0.02
"""and not down the slope, where the gradient at the end opposes it by this cosine: a larger step would help there."""
_FOUND = 0.5
"""A leap to where gradients are smaller counts so much at least: it may have found a better place, or saturation."""
_SPIKE = 100.0
"""A gradient is a spike that is so many times the largest that was seen."""
_SKIPS = 0.5
"""Share of the steps between two looks: where as many were skipped, it is not the data."""
_WARM = 3
"""Looks from which on a gradient can be too large, or smaller than usual: those before show what is usual."""
_UNSURE = 0.5
"""Parameters are good at less than this share of what is an alarm."""
_PROGRESS = 0.05
"""Share of its first value by which a loss has to fall before there are better parameters than those of the start."""

_LOSSES = ("first", "best", "kept", "last")

Memory = dict[str, float]
"""Numbers by name, finite ones, which are all that is kept of earlier looks: ``looks``; ``first``, ``best``, ``noise``
of losses where there are any, ``last``, ``heard`` (looks that had some since the first), and ``kept``, the best when
parameters were last good; norms of gradients: ``level`` of late, ``largest`` at most."""


class Seen(NamedTuple):
    """What a look shows.

    losses: of the steps since the last one, empty where nobody gives them.     gradient, size: norms of all gradients
    and of all parameters.     moved: the norm of what parameters moved by since they were last good.
    base: their norm there.     steps: since then.     entries: of all parameters.     skips: steps that were skipped
    since the last look.     slope: the gradient along that move, as a cosine: below 0, more of it would help.
    stride: of the rule, see `UpdateRule.stride`.
    """

    losses: tuple[float, ...]
    gradient: float
    size: float
    moved: float
    base: float
    steps: int
    entries: int
    skips: int = 0
    slope: float = 0.0
    stride: float = YARDSTICK

    @property
    def loss(self) -> float:
        """The median, which a single batch does not move; infinite where most are not finite."""
        ordered = sorted(x if math.isfinite(x) else math.inf for x in self.losses)
        return ordered[len(ordered) // 2]


def begun(seen: Seen, memory: Mapping[str, float] = MappingProxyType({})) -> Memory:
    """Return what is kept of the first look at parameters; of losses, what ``memory`` of others knows."""
    norms = {"looks": 0.0, "level": seen.gradient if math.isfinite(seen.gradient) else 0.0, "largest": 0.0}
    new = {"heard": 0.0, **memory, **norms}
    return rebased(new, seen.loss) if seen.losses and "first" not in memory else new


def rebased(memory: Mapping[str, float], loss: float) -> Memory:
    """Return ``memory`` of a problem that has become another one, of such a loss; of none, if that is not finite."""
    if not math.isfinite(loss):
        return {name: x for name, x in memory.items() if name not in (*_LOSSES, "noise", "heard")}
    return {"noise": 0.0, "heard": 0.0, **memory, **dict.fromkeys(_LOSSES, loss)}


def kept(memory: Mapping[str, float]) -> Memory:
    """Return ``memory`` where parameters are found good."""
    return {**memory, "kept": memory["best"]} if "best" in memory else dict(memory)


def back(memory: Mapping[str, float], seen: Seen) -> Memory:
    """Return ``memory`` at those parameters again; what gradients came to on the way is no spike any more."""
    largest = max(memory["largest"], seen.gradient) if math.isfinite(seen.gradient) else memory["largest"]
    losses = {"best": memory["kept"], "last": memory["kept"]} if "best" in memory else {}
    return {**memory, **losses, "largest": largest}


def alarms(memory: Mapping[str, float], seen: Seen) -> dict[str, float]:
    """Say by kind how near to an alarm each sign of trouble is: from 1 on it is one."""
    # That parameters grow is no sign: points of a map, word vectors, biases on raw targets have far to go.
    signs = {"leap": _leap(memory, seen), "skips": seen.skips / (_SKIPS * EVERY)}
    if not (seen.losses and "first" in memory):
        return signs
    return {**signs, "rise": _rise(memory, _level(memory, seen))}


def trouble(signs: Mapping[str, float]) -> str | None:
    """Return the kind of the gravest alarm, if there is one."""
    kind, sign = max(signs.items(), key=lambda item: -math.inf if math.isnan(item[1]) else item[1])
    return kind if sign >= 1.0 else None


def good(signs: Mapping[str, float], memory: Mapping[str, float], seen: Seen) -> bool:
    """Say whether parameters are worth going back to: better than those of the start, as far as losses are known, and
    their gradient no spike, which would be skipped there."""
    progress = "first" not in memory or memory["first"] - memory["best"] >= _PROGRESS * abs(memory["first"])
    return progress and seen.gradient <= limit(memory) and all(sign < _UNSURE for sign in signs.values())


def learned(memory: Mapping[str, float], seen: Seen) -> Memory:
    """Return ``memory`` after a look without an alarm."""
    looks = memory["looks"] + 1
    usual = math.isfinite(seen.gradient) and seen.gradient <= limit(memory)
    gradient = seen.gradient if usual else memory["level"]
    norms = {"level": 0.8 * memory["level"] + 0.2 * gradient, "largest": max(memory["largest"], gradient)}
    new = {**memory, **norms, "looks": looks}
    if not seen.losses:
        return new
    if "first" not in memory:
        return rebased(new, seen.loss)
    apart = [abs(x - seen.loss) for x in seen.losses if math.isfinite(x)]
    noise = sum(apart) / max(len(apart), 1)
    new["noise"] = 0.9 * memory["noise"] + 0.1 * noise if memory["heard"] else noise
    new["heard"] = memory["heard"] + 1
    return {**new, "best": min(memory["best"], _level(memory, seen)), "last": seen.loss}


def limit(memory: Mapping[str, float]) -> float:
    """Return the norm from which on a gradient is a spike."""
    known = memory["looks"] >= _WARM and memory["largest"] > 0.0
    return _SPIKE * memory["largest"] if known else math.inf


def _level(memory: Mapping[str, float], seen: Seen) -> float:
    """The loss of this look and the last together: the lowest of many looks is luck where batches are small."""
    return 0.5 * (memory["last"] + seen.loss) if memory["heard"] else seen.loss


def _rise(memory: Mapping[str, float], loss: float) -> float:
    first, best = memory["first"], memory["best"]
    if not memory["heard"]:
        return (loss - first) / ((_AT_ONCE - 1.0) * abs(first)) if first else 0.0
    allowed = max(_LOST * (first - best), _NOISE * memory["noise"], _SHARE * abs(best))
    return (loss - best) / allowed if allowed > 0.0 else 0.0


def _leap(memory: Mapping[str, float], seen: Seen) -> float:
    looks, steps = max(seen.steps / EVERY, 1.0), max(seen.steps, 1)
    least = _LEAP_STEPS * max(seen.stride, YARDSTICK) * steps * math.sqrt(seen.entries)
    if seen.size < 1.1 * seen.base or seen.slope < _DOWN:  # towards the origin, or around it; or still down the slope
        return 0.0
    known = memory["looks"] >= _WARM and math.isfinite(seen.gradient)
    fallen = min(1.0, max(_FOUND, seen.gradient / max(memory["level"], 1e-30))) if known else 1.0
    return fallen * seen.moved / max(_LEAP * looks * seen.base, least, 1e-30)
