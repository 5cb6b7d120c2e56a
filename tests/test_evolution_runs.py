"""Evolution strategies: pairs share their problem, runs end, explode and are lost, or are whole and of any length."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from outer import assert_resumes
from tables import first_estimate, generator, identical

from l2o.estimators import Evolution
from l2o.meta import MetaTraining
from l2o.random import uniform
from l2o.rules import SGD, Adam
from l2o.tasks import Quadratic


def test_runs_of_a_pair_share_their_problem_and_pairs_differ():
    rule, g = Adam(), generator()
    theta = rule.init_theta(g)
    estimator = Evolution(rule, Quadratic(noise=0.5), lanes=6, horizon=4, truncation=2, sigma=1e-3)
    state = estimator.init(theta, g)
    for _ in range(5):
        _, state, _ = estimator.estimate(theta, state, g)
        first, second = (torch.utils._pytree.tree_map(lambda t, i=i: t[i::2], state.inner) for i in (0, 1))
        assert identical(first.data, second.data)
        assert identical((first.step, first.total_steps), (second.step, second.total_steps))
        assert len({w.sum().item() for w in first.data["w"]}) == 3
        assert identical(first.first_loss, second.first_loss)
    # Noise in the gradients is shared too: without a perturbation the two runs are the same.
    calm = dataclasses.replace(estimator, sigma=1e-30)
    _, state, _ = first_estimate(calm, theta, 7)
    assert state.inner.params["x"][::2].equal(state.inner.params["x"][1::2])


@dataclasses.dataclass(frozen=True)
class Sick(Quadratic):
    """Both runs of the pair ``sick`` have the loss ``value`` from step ``since`` on."""

    sick: int = 0
    value: float = float("nan")
    since: int = 1

    def init(self, data, generator):
        params, _ = super().init(data, generator)
        return params, {"step": torch.zeros(len(data["y"]))}

    def sample(self, generator, lanes):
        data = super().sample(generator, lanes)
        ids = torch.arange(lanes) if generator.ids is None else generator.ids
        return data | {"sick": ids == self.sick}

    def loss(self, params, buffers, data, batch):
        loss, _ = super().loss(params, {}, data, batch)
        sick = data["sick"] & (buffers["step"] >= self.since)
        return torch.where(sick, self.value, loss), {"step": buffers["step"] + 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_losses_of_an_exploded_run_are_cut_off_and_its_pair_is_reset(value):
    rule = SGD(lr=0.001)
    estimator = Evolution(rule, Sick(value=value), lanes=6, horizon=8, truncation=4, stagger=False)
    grads, state, metrics = first_estimate(estimator, rule.init_theta(generator()))
    assert metrics["lanes_masked"] == 2
    assert metrics["lanes_broken"] == 0
    assert state.inner.step.tolist() == [0, 0, 4, 4, 4, 4]
    assert metrics["meta_loss"].isfinite()
    assert grads["log_lr"].isfinite()


def test_a_pair_is_reset_where_one_of_its_runs_explodes():
    """A rate that is far too large in one run of each pair, and far too small in the other."""
    estimator = Evolution(SGD(), Quadratic(), lanes=6, horizon=8, truncation=4, sigma=9.0, stagger=False)
    _, state, metrics = first_estimate(estimator, {"log_lr": torch.tensor(-3.0)})
    assert metrics["lanes_masked"] == 3
    assert state.inner.step.tolist() == [0] * 6
    assert state.inner.data["y"][::2].equal(state.inner.data["y"][1::2])


def test_the_ages_of_pairs_are_spread_and_their_scores_begin_anew_with_each_run():
    theta, g = SGD(lr=1e-3).init_theta(generator()), generator()
    estimator = Evolution(SGD(), Quadratic(), lanes=6, horizon=12, truncation=4, sigma=0.1)
    state = estimator.init(theta, g)
    assert state.inner.total_steps.tolist() == [12, 12, 8, 8, 4, 4]
    before = state.score["log_lr"]
    for ages in ([0, 0, 0], [4, 4, 0], [8, 0, 4], [0, 4, 8]):
        assert state.inner.step[::2].tolist() == ages
        _, state, _ = estimator.estimate(theta, state, g)
        added = state.noise["log_lr"] / 0.1**2
        want = torch.where(torch.tensor(ages) > 0, before + added, added)
        torch.testing.assert_close(state.score["log_lr"], want)
        before = state.score["log_lr"]


def test_a_run_that_is_lost_counts_as_much_as_the_limit():
    """Both runs explode at different speeds: what they count lies between their first loss and five times that."""
    theta = {"log_lr": torch.tensor(3.0)}  # far too much for any quadratic here
    estimator = Evolution(SGD(), Quadratic(), lanes=2, horizon=4, truncation=4, sigma=9.0, explosion=5.0)
    grads, after, metrics = first_estimate(estimator, theta)
    half = (grads["log_lr"] / after.score["log_lr"][0]).abs()
    assert metrics["lanes_masked"] >= 1
    state = estimator.init(theta, generator())
    first = Quadratic().loss(
        *({k: v[0] for k, v in d.items()} for d in (state.inner.params, {}, state.inner.data)), {"noise": 0}
    )[0]
    assert 0 < half <= (5 - 1) / 2 * first


def test_pairs_without_a_finite_first_loss_count_nothing():
    rule = SGD(lr=0.001)
    theta = rule.init_theta(generator())
    results = {}
    for since in (0, 99):
        estimator = Evolution(rule, Sick(since=since), lanes=6, horizon=8, truncation=4, stagger=False)
        results[since] = first_estimate(estimator, theta)
    broken, whole = results[0], results[99]
    assert broken[2]["lanes_broken"] == 2
    assert whole[2]["lanes_broken"] == 0
    assert broken[0]["log_lr"].isfinite()
    assert not broken[0]["log_lr"].isclose(whole[0]["log_lr"])


@pytest.mark.parametrize("fitness", ["standard", "rank"])
def test_pairs_without_a_finite_first_loss_are_no_measure_of_others(fitness, monkeypatch):
    """Of three pairs one is broken: the two others have the fitness that they would have alone."""
    found, make = [], Evolution._fitness
    monkeypatch.setattr(Evolution, "_fitness", lambda self, x: found.append((x, make(self, x))) or found[-1][1])
    estimator = Evolution(SGD(), Sick(since=0), lanes=6, horizon=8, truncation=4, fitness=fitness)
    first_estimate(estimator, SGD(lr=0.001).init_theta(generator()))
    ((objectives, got),) = found
    counted = ~objectives.isnan()
    assert counted.sum() == 4
    torch.testing.assert_close(got[counted[::2]], make(estimator, objectives[counted]))


def test_deviations_by_tensor_and_their_decay():
    rule, g = Adam(), generator()
    theta = rule.init_theta(g)
    estimator = Evolution(
        rule,
        Quadratic(),
        lanes=8000,
        horizon=4,
        truncation=2,
        sigma=0.01,
        sigma_of={"log_eps": 0.5},
        sigma_final=0.001,
        sigma_steps=2,
        stagger=False,
    )
    state = estimator.init(theta, g)
    found = []
    for _ in range(4):
        _, state, _ = estimator.estimate(theta, state, g)
        found.append([state.noise[name].std().item() for name in ("log_lr", "log_eps")])
    want = torch.tensor([[1.0, 50.0], [0.3162, 15.81], [0.1, 5.0], [0.1, 5.0]]) * 0.01
    torch.testing.assert_close(torch.tensor(found), want, rtol=0.05, atol=0.0)


def test_fitness_shapes():
    half = torch.tensor([0.3, -4.0, 0.1, 0.0])
    losses = torch.stack([1.0 + half, 1.0 - half], 1).flatten()
    shape = {
        kind: Evolution(SGD(), Quadratic(), lanes=8, sigma=0.5, fitness=kind)._fitness(losses)
        for kind in ("difference", "sign", "rank")
    }
    torch.testing.assert_close(shape["difference"], half)
    torch.testing.assert_close(shape["sign"], 0.5 * torch.tensor([1.0, -1.0, 1.0, 0.0]))
    torch.testing.assert_close(shape["rank"], 0.5 * torch.tensor([2 / 3, -1.0, 1 / 3, 0.0]))


def whole(**settings):
    settings = {
        "lanes": 8,
        "horizon": (10, 40),
        "truncation": None,
        "meta_loss": "end",
        "fitness": "standard",
    } | settings
    return Evolution(Adam(), Quadratic(dim=3), **settings)


def test_whole_runs_have_one_length_an_estimate_drawn_from_the_range():
    estimator, g, lengths = whole(), generator(), []
    state = estimator.init(Adam().init_theta(g), g)
    for _ in range(30):
        (length,) = set(state.inner.total_steps.tolist())
        before = state.inner.step
        _, state, metrics = estimator.estimate(Adam().init_theta(g), state, g)
        assert not before.any()
        assert metrics["inner_steps"] == 8 * length
        lengths.append(length)
    assert 10 <= min(lengths) < 18 < 26 < max(lengths) <= 40


class Drawn(Quadratic):
    """Draws a number of its own."""

    def sample(self, generator, lanes):
        return {"first": uniform(generator, lanes), **super().sample(generator, lanes)}


def test_the_length_of_whole_runs_says_nothing_of_their_tasks():
    rule = Adam()
    estimator = Evolution(rule, Drawn(dim=2), lanes=4, horizon=(1, 1000), truncation=None)
    theta, runs = rule.init_theta(generator()), []
    for seed in range(40):
        state = estimator.init(theta, generator(seed)).inner
        runs.append([float(state.total_steps[0].log()), float(state.data["first"][0])])
    assert torch.corrcoef(torch.tensor(runs).T)[0, 1].abs() < 0.5


@pytest.mark.parametrize("middle", [None, 0.0, 4.0])
def test_the_end_of_a_run_is_the_mean_of_its_last_twentieth_and_a_share_of_its_middle(middle):
    losses = torch.linspace(3.0, 1.0, 200, dtype=torch.float64).unsqueeze(1)
    first = losses[0]
    state = dataclasses.make_dataclass("State", ["step", "total_steps"])(torch.tensor([0]), torch.tensor([200]))
    weight, settings = (0.25, {}) if middle is None else (middle, {"middle": middle})
    expected = (losses[-10:].mean() + 3e-3).log() + weight * (losses[66:86].mean() + 3e-3).log()
    torch.testing.assert_close(whole(log_floor=1e-3, **settings).objective(losses, state, first)[0], expected)


def test_validation_counts_at_the_end_of_whole_runs_alone(monkeypatch):
    seen, draw = [], Quadratic.batch
    monkeypatch.setattr(Quadratic, "batch", lambda self, *given: seen.append(given[1]) or draw(self, *given))
    first_estimate(whole(lanes=2, horizon=40, valid_weight=0.5), Adam().init_theta(generator()))
    assert seen == ["train"] * 35 + ["train", "valid"] * 5


def test_standard_fitness_has_unit_mean_square_and_no_scale():
    g = torch.tensor([3.0, 1.0, -1.0, 2.0])
    fitness = whole(sigma=0.1)._fitness(g)
    torch.testing.assert_close(fitness, 0.1 * torch.tensor([1.0, -1.5]) / (1.0 + 2.25) ** 0.5 * 2**0.5)
    torch.testing.assert_close(whole(sigma=0.1)._fitness(1e6 * g), fitness)
    assert not whole()._fitness(torch.ones(4)).any()


def test_whole_runs_of_a_range_resume_bit_for_bit():
    def training(seed):
        g = generator(seed)
        return MetaTraining(whole(scaled=True), Adam().init_theta(g), lambda p: torch.optim.SGD(p, lr=1e-2), g)

    assert_resumes(training, 2, 2)
