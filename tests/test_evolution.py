"""Evolution strategies: the truths about bias and variance, pairs, ends of runs, clipping, options."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from outer import assert_resumes, training
from tables import Recorded, Shapes, first_estimate, generator, identical, random_theta

from l2o.estimators import Backprop, Evolution
from l2o.estimators.episodes import reduce_rows
from l2o.meta import MetaTraining
from l2o.rules import MLP, SGD, Adam
from l2o.tasks import Quadratic
from l2o.types import (
    Batch,
    Buffers,
    ConfigurationError,
    OptState,
    Params,
    Split,
    TaskData,
    TaskFamily,
    Theta,
    UpdateRule,
)

SIZE, POSITIVE = 23, 10


@dataclasses.dataclass(frozen=True)
class Chain(TaskFamily):
    """Influence balancing (Tallec and Ollivier 2017, arXiv 1702.05043; Vicol et al. 2021, arXiv 2112.13835).

    The state of `ChainStep` is the parameter ``x``; only its first entry is judged. The loss has a constant, so that
    the first one is not 0.
    """

    keyed = True

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        return {"lane": torch.arange(lanes)}

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        return {"x": torch.ones(len(data["lane"]), SIZE, dtype=torch.float64)}, {}

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        return {}

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[torch.Tensor, Buffers]:
        return 1.0 + 0.5 * (params["x"][0] - 1.0).square(), buffers


@dataclasses.dataclass(frozen=True)
class ChainStep(UpdateRule):
    """``x <- A x + θ (1, ..., 1, -1, ..., -1)``; A has 0.5 on and above its diagonal.

    The nearer entries push the first one up with θ and the farther, more of them, down: what is seen within a few
    steps has the wrong sign.
    """

    def init_theta(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"drive": torch.tensor(0.5)}

    def init(self, theta: Any, params: Params, infos: Any) -> OptState:
        return OptState({"x": {}}, {})

    def update(self, theta, grads, state, params, infos, run, reduce=None):
        x = params["x"]
        sign = torch.where(torch.arange(SIZE) < POSITIVE, 1.0, -1.0).to(x.dtype)
        above = torch.cat([x[1:], x.new_zeros(1)])
        return {"x": 0.5 * x + 0.5 * above + theta["drive"] * sign - x}, state


THETA = {"drive": torch.tensor(0.5, dtype=torch.float64)}
HORIZON = 60


def run_gradient(estimator, theta, horizon=HORIZON):
    """The estimate of the gradient of a whole run's meta-loss; ``estimator`` has no staggering."""
    g = generator()
    state = estimator.init(theta, g)
    grads = []
    for _ in range(-(-horizon // estimator.steps)):
        grad, state, _ = estimator.estimate(theta, state, g)
        grads.append(grad)
    return {name: sum(grad[name] for grad in grads) * estimator.steps / horizon for name in theta}


def pair_estimates(estimator, theta, horizon=HORIZON):
    """The estimate of each pair alone, ``[pairs, ...]``, in each truncation of a run."""
    rows: list[Theta] = []

    def keep(values, mask, sums):
        rows.append({name: v * estimator.steps / horizon for name, v in values.items()})
        return reduce_rows(values, mask, sums)

    with mock.patch("l2o.estimators.evolution.reduce_rows", keep):
        run_gradient(estimator, theta, horizon)
    return rows


def mean_and_error(estimator, horizon=HORIZON):
    each = sum(row["drive"] for row in pair_estimates(estimator, THETA, horizon))
    return each.mean().item(), each.std().item() / len(each) ** 0.5


def backprop(horizon=HORIZON, truncation=None, **settings):
    """The chain has no random numbers: one lane says it all."""
    settings = {"lanes": 1, "clip": 1e9, "explosion": 1e9, "stagger": False} | settings
    estimator = Backprop(ChainStep(), Chain(), horizon=horizon, truncation=truncation, **settings)
    return run_gradient(estimator, THETA, horizon)["drive"].item()


def evolution(**settings):
    settings = {"lanes": 20_000, "horizon": HORIZON, "truncation": 5, "sigma": 0.1, "stagger": False} | settings
    return Evolution(ChainStep(), Chain(), explosion=1e9, **settings)


def test_truncated_backprop_has_the_wrong_sign():
    assert backprop(horizon=200) > 10.0
    assert backprop(horizon=200, truncation=5) < -1.0


def test_truncated_es_has_the_wrong_sign_where_pes_has_the_right_one():
    for accumulate, sign in ((False, -1.0), (True, 1.0)):
        mean, error = mean_and_error(evolution(accumulate=accumulate, lanes=6000, horizon=200), 200)
        assert sign * mean > 4 * error


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"truncation": 7},  # runs end within a truncation
        {"noise_steps": 15},
        {"noise_steps": "episode"},
        {"truncation": None},
        {"sigma_final": 0.05, "sigma_steps": 10},  # perturbations of several sizes within one run
        {"window": "linear"},
    ],
    ids=["PES", "PES-ends-within", "GPES", "NRES", "ES", "PES-decay", "PES-linear"],
)
def test_without_truncation_bias(settings):
    """The meta-loss is quadratic in θ, so that smoothing leaves its gradient as it is."""
    want = backprop(**{key: value for key, value in settings.items() if key == "window"})
    mean, error = mean_and_error(evolution(**settings))
    assert abs(mean - want) < 4 * error
    assert error < 0.1 * abs(want)


def test_held_noise_varies_less_than_fresh_noise():
    """Li et al. 2023, section 4: the variance of one truncation's estimate, in the mean over a run's truncations."""
    variance = {}
    for noise_steps in ("truncation", 20, "episode"):
        estimates = pair_estimates(evolution(noise_steps=noise_steps, lanes=4000, sigma=0.01), THETA)
        variance[noise_steps] = torch.stack([row["drive"].var() for row in estimates]).mean()
    assert variance["episode"] < 0.8 * variance[20]
    assert variance[20] < 0.9 * variance["truncation"]


def test_pes_of_one_truncation_is_es():
    rule, family = MLP(hidden=(4,)), Recorded(Shapes(), lanes=(0, 1))
    theta, make = random_theta(rule), partial(Evolution, rule, family, lanes=4, horizon=6, stagger=False)
    settings = ({"accumulate": False}, {"noise_steps": "episode"}, {"truncation": None})
    one, *others = (first_estimate(make(**{"truncation": 6, **each}), theta, 1)[0] for each in ({}, *settings))
    assert all(identical(one, other) for other in others)
    assert all(grad.abs().max() > 0 for grad in one.values())


def test_the_difference_of_a_pair_is_the_directional_derivative():
    """Half the difference of a pair's losses is ``gradient · noise``, and the estimate that times the score."""
    rule, family = Adam(lr=0.05), Recorded(Shapes(), lanes=(0,))
    theta = random_theta(rule, noise=0.0)
    settings = {"horizon": 5, "truncation": 5, "stagger": False}
    es = Evolution(rule, family, lanes=2, sigma=1e-6, **settings)
    grads, state, _ = first_estimate(es, theta, 2)
    bptt = Backprop(rule, family, lanes=1, clip=1e9, **settings)
    exact = first_estimate(bptt, theta, 2)[0]
    along = sum((exact[k] * state.noise[k][0]).sum() for k in theta)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, along * state.score[name][0], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(state.score[name] * 1e-12, state.noise[name])


@pytest.mark.parametrize("fitness", ["difference", "rank", "sign"])
def test_meta_training_by_pes_learns_a_learning_rate(fitness):
    rule, g = SGD(lr=1e-3), generator()
    estimator = Evolution(
        rule, Quadratic(dim=5), lanes=32, horizon=20, truncation=5, meta_loss="log", sigma=0.1, fitness=fitness
    )
    run = MetaTraining(estimator, rule.init_theta(g), lambda p: torch.optim.Adam(p, lr=0.1), g)
    losses = [run.outer_step()["meta_loss"].item() for _ in range(80)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize("settings", [{}, {"noise_steps": "episode", "fitness": "rank", "horizon": (3, 9)}])
def test_resuming_equals_never_having_stopped(settings):
    settings = {"horizon": 9, "truncation": 3, "curriculum": 4} | settings
    assert_resumes(partial(training, make=Evolution, family=Quadratic(noise=0.1), **settings), 3, 4)


@pytest.mark.parametrize(
    "settings",
    [
        {"lanes": 3},
        {"sigma": 0.0},
        {"sigma_of": {"w": -1.0}},
        {"sigma_final": 0.0},
        {"sigma_final": 0.1},  # no sigma_steps
        {"fitness": "ranks"},
        {"noise_steps": 30},
        {"noise_steps": "run"},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(
        ConfigurationError, match="sigma_steps" if settings == {"sigma_final": 0.1} else next(iter(settings))
    ):
        Evolution(SGD(), Quadratic(), **settings)


def test_a_deviation_of_a_tensor_that_does_not_exist_is_refused():
    rule = SGD()
    with pytest.raises(ConfigurationError, match=r"log_rate.*did you mean 'log_lr'"):
        Evolution(rule, Quadratic(), sigma_of={"log_rate": 0.1}).init(rule.init_theta(generator()), generator())


def test_scaled_gradients_move_theta_as_if_in_units_of_its_deviations():
    def gradient(scaled):
        settings = {"sigma": 0.1, "sigma_of": {"log_lr": 0.02}, "scaled": scaled}
        estimator = Evolution(SGD(), Quadratic(dim=2), lanes=4, horizon=5, truncation=None, **settings)
        return first_estimate(estimator, SGD().init_theta(generator()))[0]["log_lr"]

    torch.testing.assert_close(gradient(True), gradient(False) * 0.04)


def test_compiled_estimates_are_those_of_the_engine():
    rule = Adam()
    results = []
    for compiled in (False, True):
        estimator = Evolution(rule, Shapes(), lanes=4, horizon=4, truncation=None, compile=compiled)
        g = generator()
        theta = rule.init_theta(g)
        state = estimator.init(theta, g)
        grads, state, _ = estimator.estimate(theta, state, g)
        results.append((grads, estimator.estimate(theta, state, g)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
