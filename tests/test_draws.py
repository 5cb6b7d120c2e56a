"""Random numbers of lanes: known values, distributions, and that a lane's are its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tables import generator
from torch import Tensor

from l2o import random
from l2o.random import LaneGenerator

N = 200_000


def moments(x: Tensor) -> tuple[float, float, float, float]:
    """Mean, variance, skewness and kurtosis."""
    x = x.double()
    z = (x - x.mean()) / x.std()
    return x.mean().item(), x.var().item(), z.pow(3).mean().item(), z.pow(4).mean().item()


DRAWS: dict[str, Callable[[torch.Generator, int], Tensor]] = {
    "uniform": lambda g, lanes: random.uniform(g, lanes, 3, low=-2.0, high=5.0),
    "log_uniform": lambda g, lanes: random.log_uniform(g, lanes, low=1e-3, high=1e3),
    "normal": lambda g, lanes: random.normal(g, lanes, 2, 4),
    "integers": lambda g, lanes: random.integers(g, 1000, lanes, 5),
    "keys": random.keys,
}
every_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())


def test_splitmix64_is_the_published_one() -> None:
    """The first outputs for seed 1234567, those of the reference implementation (prng.di.unimi.it/splitmix64.c)."""
    want = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    seed = torch.tensor(1234567)
    got = [int(random.stream(seed, call)) % 2**64 for call in range(5)]
    assert got == want
    assert random.hashes(seed, 6)[1:].tolist() == [random.signed(w) for w in want]


def test_shift_is_logical_and_signed_keeps_the_bits() -> None:
    z = torch.tensor([-1, -(2**63), 5])
    for bits in (1, 31, 63):
        assert random.shift(z, bits).tolist() == [(int(v) % 2**64) >> bits for v in z]
    assert [random.signed(v) for v in (0, 2**63 - 1, 2**63, 2**64 - 1, 2**64)] == [0, 2**63 - 1, -(2**63), -1, 0]


def test_uniform_numbers_are_uniform() -> None:
    x = random.uniform(generator(), 1, N)[0]
    assert x.dtype == torch.float32
    assert x.min() >= 0
    assert x.max() < 1
    counts = torch.histc(x, 100, 0.0, 1.0)
    chi = ((counts - N / 100).square() / (N / 100)).sum()
    assert abs(chi - 99) < 4 * math.sqrt(2 * 99)
    pairs = torch.histogramdd(x.view(-1, 2).double(), 10, range=[0.0, 1.0, 0.0, 1.0]).hist  # neighbours are independent
    chi = ((pairs - N / 200).square() / (N / 200)).sum()
    assert abs(chi - 99) < 4 * math.sqrt(2 * 99)


def test_lanes_and_calls_are_independent() -> None:
    g = generator()
    first, second = (random.uniform(g, 400, 500) for _ in range(2))
    numbers = torch.cat([first, second])
    correlation = torch.corrcoef(numbers).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / math.sqrt(500)
    assert abs(correlation.square().mean() * 500 - 1) < 0.05


def test_normal_numbers_are_normal() -> None:
    x = random.normal(generator(), 10, N // 10).flatten()
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    for got, want, deviation in zip(moments(x), (0, 1, 0, 3), (1, 2, 6, 24), strict=True):
        assert abs(got - want) < 4 * math.sqrt(deviation / N)
    share = (x.abs() > 3).double().mean().item()
    assert abs(share - math.erfc(3 / math.sqrt(2))) < 4 * math.sqrt(0.0027 / N)


def test_normal_numbers_hash_from_keys_of_any_shape() -> None:
    key = random.keys(generator(), 6).view(2, 3)
    x = random.hashed_normal(key, 4)
    assert x.shape == (2, 3, 4)
    assert x[1, 2].equal(random.hashed_normal(key[1, 2], 4))
    assert x.view(6, 4).equal(random.normal(generator(), 6, 4))


def test_integers_are_uniform_over_their_range() -> None:
    x = random.integers(generator(), 7, 10, N // 10)
    assert x.dtype == torch.int64
    counts = torch.bincount(x.flatten())
    assert len(counts) == 7
    assert abs(((counts - N / 7).square() / (N / 7)).sum() - 6) < 4 * math.sqrt(12)


@pytest.mark.parametrize("high", [1, 2, 3, 2**31 - 1, 2**31])
def test_integers_stay_in_range(high: int) -> None:
    x = random.integers(generator(), high, 4, 10_000)
    assert x.min() >= 0
    assert x.max() < high
    assert abs(2 * x.double().mean() - (high - 1)) <= 0.03 * (high - 1)
    assert x.unique().numel() > 0.9 * min(high, 40_000)


def test_integers_have_the_range_of_their_lane() -> None:
    high = torch.tensor([1, 5, 100])
    assert random.integers(generator(), high, 3, 5000).amax(1).tolist() == [0, 4, 99]
    assert random.integers(generator(), high, 3).shape == (3,)
    want = [random.integers(generator(), int(h), 3, 2, 4)[lane] for lane, h in enumerate(high)]
    assert random.integers(generator(), high, 3, 2, 4).equal(torch.stack(want))


@pytest.mark.parametrize(("low", "high"), [(1e-3, 1e3), (0.1, 0.3), (1.0, 1e6), (7.0, 7.0), (1e6, 1e6)])
def test_log_uniform_numbers_are_log_uniform(low: float, high: float) -> None:
    x = random.log_uniform(generator(), N, low=low, high=high)
    ends = torch.tensor([low, high])
    assert x.min() >= ends[0]
    assert x.max() <= ends[1]
    share = (x.double().log() - math.log(low)) / (math.log(high / low) or 1.0)
    if low < high:
        assert abs(share.mean() - 0.5) < 4 / math.sqrt(12 * N)
        assert abs(share.var() - 1 / 12) < 0.001


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (1000.0, 1001.0), (-5.12, 5.12), (0.1, 0.3)])
def test_uniform_numbers_stay_in_range(low: float, high: float) -> None:
    x = random.uniform(generator(), N, low=low, high=high)
    ends = torch.tensor([low, high])
    assert x.min() >= ends[0]
    assert x.max() <= ends[1]


@every_draw
def test_a_lane_is_drawn_the_same_beside_any_others(draw: Callable[[torch.Generator, int], Tensor]) -> None:
    whole = draw(generator(4), 8)
    for ids in ([3, 5], [5, 3, 0], [7], [1, 1]):
        few = LaneGenerator("cpu", 4, torch.tensor(ids))
        for _ in range(2):
            few.manual_seed(4)
            assert draw(few, len(ids)).equal(whole[ids])
    far = draw(LaneGenerator("cpu", 4, torch.tensor([2**40, 2**40 + 1])), 2)
    assert not far[0].equal(far[1])


@every_draw
def test_a_draw_takes_as_much_from_the_generator_whatever_is_drawn(
    draw: Callable[[torch.Generator, int], Tensor],
) -> None:
    one, other = generator(), LaneGenerator("cpu", 0, torch.arange(100, 130))
    first, _ = draw(one, 5), draw(other, 30)
    assert one.get_state().equal(other.get_state())
    assert not draw(one, 5).equal(first)


def test_a_lane_generator_is_a_generator() -> None:
    plain, lane = generator(9), LaneGenerator("cpu", 9)
    assert lane.ids is None
    assert torch.rand(3, generator=plain).equal(torch.rand(3, generator=lane))
    assert random.normal(plain, 3).equal(random.normal(lane, 3))


def test_seeds_are_never_negative_and_ids_do_not_matter() -> None:
    seeds = random.draw_seeds(generator(), 10_000)
    assert (seeds >= 0).all()
    assert seeds.unique().numel() == 10_000
    assert seeds.equal(random.draw_seeds(LaneGenerator("cpu", 0, torch.tensor([3])), 10_000))
