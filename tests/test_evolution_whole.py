"""Evolution strategies over whole runs, whose length is drawn anew for each estimate."""

from __future__ import annotations

import dataclasses

import torch
from outer import assert_resumes
from tables import first_estimate, generator

from l2o.estimators import Evolution
from l2o.meta import MetaTraining
from l2o.random import uniform
from l2o.rules import Adam
from l2o.tasks import Quadratic


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


def test_the_end_of_a_run_is_the_mean_of_its_last_twentieth_and_a_quarter_of_its_middle():
    losses = torch.linspace(3.0, 1.0, 200, dtype=torch.float64).unsqueeze(1)
    first = losses[0]
    state = dataclasses.make_dataclass("State", ["step", "total_steps"])(torch.tensor([0]), torch.tensor([200]))
    expected = (losses[-10:].mean() + 3e-3).log() + 0.25 * (losses[66:86].mean() + 3e-3).log()
    torch.testing.assert_close(whole(log_floor=1e-3).objective(losses, state, first)[0], expected)


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
