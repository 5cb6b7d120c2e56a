"""Shards equal whole: ranks that hold parts of tensors, or different tensors, take the steps of one that holds all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tables import RULES, generator, random_theta
from torch import Tensor

from l2o.ops.kinds import infos_of
from l2o.rules import STAR, Adam, ByKind, Celo2, Scheduled, Steered
from l2o.types import ParamInfo, Reduce, Run, Slots, Sum

SHAPES = {"scalar": (), "vector": (7,), "matrix": (6, 5), "tall": (9, 2), "conv": (5, 3, 2, 2), "square": (6, 5)}
STEPS = 4

Split = Callable[[str, Tensor], list[Tensor] | None]
"""The shards of a tensor, one a rank, or None where each rank holds all of it."""


class Ranks:
    """Lets ``count`` threads exchange what they have, in the order in which they ask."""

    def __init__(self, count: int) -> None:
        self.count, self._barrier = count, threading.Barrier(count, timeout=60)
        self._given: list[Any] = [None] * count

    def all(self, rank: int, value: Any) -> list[Any]:
        self._given[rank] = value
        self._barrier.wait()
        given = list(self._given)
        self._barrier.wait()
        return given


class Simulated(Reduce):
    """The sums of one of several ``ranks``.

    axis: along which each sharded tensor is cut.    owners: of tensors that one rank has alone.
    """

    def __init__(self, ranks: Ranks, rank: int, axis: Mapping[str, int], owners: Mapping[str, int]) -> None:
        self.ranks, self.rank, self.axis, self.owners = ranks, rank, axis, owners

    def shards(self, sums: Mapping[str, Mapping[str, Sum]]) -> dict[str, Slots]:
        partial = {
            (name, key): each.value
            for name, own in sums.items()
            for key, each in own.items()
            if self.axis.get(name) in each.axes
        }
        total: dict[Any, Tensor] = {}
        for given in self.ranks.all(self.rank, partial):
            for place, value in given.items():
                total[place] = total[place] + value if place in total else value
        return {
            name: {key: total.get((name, key), each.value) for key, each in own.items()} for name, own in sums.items()
        }

    def _everybodys(self, values: Mapping[str, Tensor]) -> Tensor:
        known: dict[str, Tensor] = {}
        for given in self.ranks.all(self.rank, dict(values)):
            known |= given
        return torch.stack([known[name] for name in sorted(known)])

    def tensors(self, values: Mapping[str, Tensor]) -> Tensor:
        return self._everybodys(values).sum(0)

    def largest(self, values: Mapping[str, Tensor]) -> Tensor:
        return self._everybodys(values).amax(0)


def problem(seed: int) -> dict[str, Tensor]:
    g = generator(seed)
    return {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in SHAPES.items()}


Tensors = dict[str, Tensor]


def trained(rule: Any, pick: Callable[[Tensors], Tensors], reduce: Reduce) -> tuple[Tensors, Slots]:
    """What of the parameters ``pick`` leaves a rank, after some steps; and the shared slots."""
    infos: Mapping[str, ParamInfo] = infos_of(problem(0), {"square": "embedding"})
    theta, params = random_theta(rule), pick(problem(0))
    theta = {name: t.double() for name, t in theta.items()}
    with torch.no_grad():
        state = rule.init(theta, params, infos)
        for step in range(STEPS):
            loss = torch.tensor(2.0 - 0.1 * step).double() if rule.needs_loss else None
            run = Run(torch.tensor(step), torch.tensor(10), loss)
            updates, state = rule.update(theta, pick(problem(step + 1)), state, params, infos, run, reduce)
            params = {name: p + updates[name] for name, p in params.items()}
    return params, state.shared


def on_ranks(rule: Any, count: int, axis: Mapping[str, int], sizes: list[int] | None, owners: Mapping[str, int]) -> Any:
    """What each rank has `trained`."""
    ranks = Ranks(count)

    def cut(name: str, t: Tensor) -> tuple[Tensor, ...]:
        length = t.shape[axis[name]]
        return t.split(chunks(length, count, sizes), axis[name])

    def one(rank: int) -> tuple[Tensors, Slots]:
        def pick(tensors: Tensors) -> Tensors:
            mine = {name: t for name, t in tensors.items() if owners.get(name, rank) == rank}
            return {name: cut(name, t)[rank] if name in axis else t for name, t in mine.items()}

        return trained(rule, pick, Simulated(ranks, rank, axis, owners))

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def chunks(length: int, count: int, weights: list[int] | None) -> list[int]:
    """As FSDP2 cuts: equal chunks, the last ones smaller or empty; ``weights`` are the first ranks' lengths instead."""
    if weights is None:
        size = -(-length // count)
        return [max(min(size, length - i * size), 0) for i in range(count)]
    lengths: list[int] = []
    for i in range(count):
        left = length - sum(lengths)
        lengths.append(left if i == count - 1 else min(weights[i], left))
    return lengths


def assert_shared(parts: list[tuple[Tensors, Slots]], want: Slots) -> None:
    """What belongs to no single tensor is the same everywhere."""
    for _, shared in parts:
        torch.testing.assert_close(shared, want, rtol=1e-5, atol=1e-8)


EVERY = {
    **RULES,
    "STAR-means": STAR(weight_decay=0.1, decay_controller=True, mean_magnitude=True, mean_decay=True),
    "Celo2-corrected": Celo2(orthogonalize=False, bias_correction=True),
    "Scheduled": Scheduled(Adam()),
    "ByKind": ByKind({"embedding": Adam()}, Steered(direction="adam")),
}
every = pytest.mark.parametrize("rule", EVERY.values(), ids=EVERY)


@every
@pytest.mark.parametrize(
    ("along", "count", "weights"),
    [("first", 2, None), ("first", 4, None), ("last", 3, None), ("first", 3, [0, 4]), ("second", 2, [1])],
    ids=["rows", "rows, some empty", "last axis", "uneven, one empty", "columns, uneven"],
)
def test_shards_equal_whole(rule: Any, along: str, count: int, weights: list[int] | None) -> None:
    """Tensors that a rule needs as a whole stay so."""
    whole, shared = trained(rule, dict, Reduce())
    infos = infos_of(problem(0), {"square": "embedding"})
    place = {"first": 0, "second": 1, "last": -1}[along]
    axis = {
        name: place % len(shape)
        for name, shape in SHAPES.items()
        if len(shape) > max(place, 0) and not rule.needs_whole(infos[name])
    }
    parts = on_ranks(rule, count, axis, weights, {})
    assert_shared(parts, shared)
    for name, want in whole.items():
        got = torch.cat([part[name] for part, _ in parts], axis[name]) if name in axis else parts[-1][0][name]
        scale = (want - problem(0)[name]).abs().max()
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(scale))


@every
def test_ranks_with_different_tensors_equal_one_with_all(rule: Any) -> None:
    owners = {name: i % 2 for i, name in enumerate(SHAPES)}
    (whole, shared), parts = trained(rule, dict, Reduce()), on_ranks(rule, 2, {}, None, owners)
    assert_shared(parts, shared)
    for name, want in whole.items():
        scale = (want - problem(0)[name]).abs().max()
        torch.testing.assert_close(parts[owners[name]][0][name], want, rtol=0, atol=1e-5 * float(scale))


def test_what_needs_whole_tensors_says_so() -> None:
    infos = infos_of(problem(0))
    needs = {name for name, rule in EVERY.items() if any(rule.needs_whole(info) for info in infos.values())}
    assert needs == {
        "Steered",
        "Steered-eigenbasis",
        "Steered-turned",
        "Steered-mlp",
        "Steered-lstm",
        "Steered-uncontrolled",
        "Steered-diagonal",
        "Steered-network",
        "Steered-loss",
        "Celo2",
        "Celo2-options",
    }
    assert not Steered().needs_whole(infos["vector"])


UNREAD = {
    "Steered-uncontrolled": {"dots", "grads", "directions", "momenta"},
    "Steered": {"momenta"},
    "Steered-adam": {"params", "momenta"},
    "Celo2": {"param"},
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_nobody_reads_is_not_summed(name: str) -> None:
    asked: set[str] = set()

    class Watching(Reduce):
        def shards(self, sums: Mapping[str, Mapping[str, Sum]]) -> dict[str, Slots]:
            asked.update(*sums.values())
            return super().shards(sums)

    trained(EVERY[name], dict, Watching())
    assert asked
    assert not asked & UNREAD[name]
