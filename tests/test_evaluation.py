"""Runs that are to be compared: they meet the same problems, and a grid is the single runs that it consists of."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import l2o.meta
from l2o.bench.checks import HostReads
from l2o.bench.cost import plug_in, usual
from l2o.evaluation import (
    BASELINES,
    Baseline,
    Setting,
    TorchEntrant,
    baselines,
    run,
    run_baseline,
    run_entrant,
    run_learned,
    step_cost,
)
from l2o.evaluation.baselines import Scheduled, adamw, cosine, half_cosine, half_decades, linear, muon, torch_optimizer
from l2o.evaluation.curves import evaluation_steps
from l2o.evaluation.scores import condense, diverged
from l2o.optim import LearnedOptimizer
from l2o.rules import MLP, SGD, VeLO
from l2o.tasks import GradientNoise, ImageMLP, ModuleTask, Quadratic, Repeated
from l2o.types import ConfigurationError, UnknownNameError

NOISY = Setting("noisy", Quadratic(dim=3, noise=0.1), steps=21, seeds=3, window=1)

GRIDS = {name: entrant for name, entrant in BASELINES.items() if isinstance(entrant, Baseline)}
UNTUNED = sorted(name for name, entrant in BASELINES.items() if entrant.rates == (None,))
OF_TORCH = sorted(BASELINES.keys() - GRIDS.keys())
PACKAGES = {
    **dict.fromkeys(["soap", "soap_fixed"], "pytorch_optimizer"),
    **dict.fromkeys(["schedule_free", "schedule_free_tuned"], "schedulefree"),
    "prodigy": "prodigyopt",
}
"""That a baseline needs beside torch, from the extra ``baselines``."""
TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "heavy_ball": partial(torch.optim.SGD, momentum=0.9),
    "momentum_cosine": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "momentum": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adam_cosine": partial(torch.optim.AdamW, weight_decay=0.0),
}


def theta_of(rule):
    return rule.init_theta(torch.Generator())


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("horizon", "points"), [(100, list(range(5, 101, 5))), (7, list(range(1, 8))), (1, [1]), (30, None)]
)
def test_validation_points_are_spread_over_the_run(horizon, points):
    found = evaluation_steps(horizon, 20)
    assert points is None or found == points
    assert found[-1] == horizon
    assert len(found) == min(20, horizon)
    assert max(np.diff([0, *found])) - min(np.diff([0, *found])) <= 1


def test_validation_does_not_touch_the_training_stream():
    theta = {"log_lr": torch.full((2,), -4.0)}
    runs = [run(SGD(), theta, NOISY.family, 9, torch.Generator().manual_seed(0), n) for n in (1, 9)]
    assert torch.equal(runs[0].train, runs[1].train)


@dataclasses.dataclass(frozen=True)
class Batches(Quadratic):
    """Its loss is the batch alone, noisy also in validation."""

    def batch(self, data, split, generator):
        return super().batch(data, "train", generator)

    def loss(self, params, buffers, data, batch):
        return batch["noise"].sum() + 0.0 * params["x"].sum(), buffers


def test_validation_batches_are_those_of_the_seed_and_of_no_other_stream():
    theta = {"log_lr": torch.full((2,), -4.0)}
    one, same, other = (run(SGD(), theta, Batches(), 5, torch.Generator().manual_seed(s), 5) for s in (1000, 1000, 7))
    assert torch.equal(one.valid, same.valid)
    assert not torch.isin(one.valid, other.valid).any()
    assert not torch.isin(one.valid, one.train).any()


def test_validation_losses_are_those_after_as_many_updates():
    theta = {"log_lr": torch.full((2,), -4.0)}
    curves = run(SGD(), theta, Quadratic(dim=3), 9, torch.Generator().manual_seed(0), 9)
    torch.testing.assert_close(curves.valid[:-1], curves.train[1:])  # training is noiseless here too
    assert curves.valid_steps == list(range(1, 10))
    assert (curves.valid[-1] < curves.valid[-2]).all()


def test_a_run_does_not_wait_for_the_device():
    baseline = GRIDS["adam_cosine"]
    theta = baseline.thetas(torch.Generator())
    with HostReads() as reads:
        family = Repeated(ImageMLP(width=4), len(baseline.rates))
        curves = run(baseline.scheduled_rule(), theta, family, 4, torch.Generator().manual_seed(0), 2)
        assert reads.count == 0
        curves.train[0, 0].item()
    assert reads.count == 1


@pytest.mark.parametrize(
    ("horizon", "evaluations", "names"), [(0, 1, "horizon=0"), (1, 0, "evaluations=0"), (1.5, 1, "horizon=1.5")]
)
def test_a_run_needs_positive_numbers(horizon, evaluations, names):
    with pytest.raises(ConfigurationError, match=names):
        run(SGD(), {"log_lr": torch.zeros(1)}, NOISY.family, horizon, torch.Generator(), evaluations)


# Baselines ------------------------------------------------------------------------------------------------------------


def one_by_one(name: str, rate: float, seed: int) -> list[float]:
    """The losses of torch's optimizer on one problem of ``NOISY``, drawn as the vectorised run draws them."""
    generator = torch.Generator().manual_seed(NOISY.seed)
    data = NOISY.family.sample(generator, NOISY.seeds)
    x = nn.Parameter(NOISY.family.init(data, generator)[0]["x"][seed].clone())
    optimizer = TORCH[name]([x], lr=rate)
    losses = []
    for step in range(NOISY.steps):
        batch = NOISY.family.batch(data, "train", generator)
        loss, _ = NOISY.family.loss({"x": x}, {}, *({k: t[seed] for k, t in d.items()} for d in (data, batch)))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if GRIDS[name].cosine:
            optimizer.param_groups[0]["lr"] = rate * l2o.meta.warmup_cosine(step, NOISY.steps, NOISY.steps // 20)
        optimizer.step()
    return losses


@pytest.mark.parametrize("name", GRIDS)
def test_the_lanes_of_a_grid_are_single_runs_of_torch(name):
    grid = (1e-3, 1e-2)
    trials = run_baseline(dataclasses.replace(GRIDS[name], rates=grid), NOISY)
    singly = [[one_by_one(name, rate, seed) for rate in grid] for seed in range(NOISY.seeds)]
    np.testing.assert_allclose(trials.train, np.array(singly).transpose(2, 0, 1), rtol=2e-5)


@pytest.mark.parametrize(
    "family", [Quadratic(noise=0.1), ImageMLP(width=8, batch_size=16)], ids=["quadratic", "digits"]
)
@pytest.mark.parametrize("name", ["sgd", "adam", "adam_cosine"])
def test_a_learned_rule_meets_the_problems_of_the_baselines(family, name):
    setting = Setting("same", family, steps=12, seeds=3)
    baseline = GRIDS[name]
    grid = run_baseline(baseline, setting)
    rule = dataclasses.replace(baseline.rule, lr=baseline.rates[3])
    once = run_learned(rule, theta_of(rule), setting)
    assert once.train.shape == (12, 3, 1)
    for trial in range(len(baseline.rates)):
        np.testing.assert_array_equal(grid.train[0, :, trial], once.train[0, :, 0])
    if not baseline.cosine:
        np.testing.assert_allclose(grid.train[..., 3], once.train[..., 0], rtol=1e-4)
        np.testing.assert_allclose(grid.valid[..., 3], once.valid[..., 0], rtol=1e-4)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))


X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
FAMILIES = {
    "quadratic": Quadratic(dim=3, noise=0.1),
    "digits": ImageMLP(width=8, batch_size=16),
    "buffers": ModuleTask(normed, nn.functional.mse_loss, (X, X[:, :1]), (X, X[:, :1]), batch_size=8),
    "changed gradients": GradientNoise(Quadratic(dim=3)),
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("name", GRIDS)
def test_a_rule_and_the_torch_optimizer_of_that_name_get_the_same_curves(name, family):
    setting = Setting("same", family, steps=12, seeds=2)
    grid = (1e-3, 1e-2)
    make = TORCH[name]
    entrant = TorchEntrant(name, lambda p, lr: [make(p, lr=lr)], cosine if GRIDS[name].cosine else None, grid)
    ours, torchs = (run_entrant(e, setting) for e in (dataclasses.replace(GRIDS[name], rates=grid), entrant))
    np.testing.assert_array_equal(ours.train[0], torchs.train[0])
    np.testing.assert_allclose(ours.train, torchs.train, rtol=5e-4)
    np.testing.assert_allclose(ours.valid, torchs.valid, rtol=5e-4)
    assert (torchs.rates, torchs.valid_steps) == (ours.rates, ours.valid_steps)


@pytest.mark.parametrize(("name", "package"), sorted(PACKAGES.items()))
def test_a_baseline_of_a_missing_package_names_its_extra(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnknownNameError, match=rf"{package}.* cannot be imported .*pip install 'l2o\[baselines\]'"):
        run_entrant(BASELINES[name], NOISY)


def test_clipping_shortens_what_is_longer_than_the_limit_and_nothing_else():
    def moved(clip, scale):
        torch_sgd = partial(torch_optimizer, torch.optim.SGD)
        setting = Setting("one step", Quadratic(dim=3, init_scale=scale), steps=2, seeds=1, window=1)
        return run_entrant(TorchEntrant("", torch_sgd, None, (1e-3,), clip), setting).train[1].item()

    assert moved(1e9, 1.0) == moved(None, 1.0)
    assert moved(1e-3, 1.0) > moved(None, 1.0)


@pytest.mark.parametrize("name", OF_TORCH)
def test_baselines_of_libraries_meet_the_problems_of_all(name):
    pytest.importorskip(PACKAGES.get(name, "torch"))
    setting = Setting("same", ImageMLP(width=8), steps=30, seeds=2)
    rates = BASELINES[name].rates if name in UNTUNED else (1e-3, 1e-2)
    trials = run_entrant(dataclasses.replace(BASELINES[name], rates=rates), setting)
    adam = run_entrant(GRIDS["adam"], setting)
    assert (trials.rates, trials.train.shape, trials.valid.shape) == (rates, (30, 2, len(rates)), (20, 2, len(rates)))
    np.testing.assert_array_equal(trials.train[0, :, 0], adam.train[0, :, 0])
    assert (trials.valid[-1] < trials.valid[0]).all()


def test_the_untuned_baselines_are_those_that_their_names_say():
    matrix, vector = nn.Parameter(torch.eye(3, 4)), nn.Parameter(torch.ones(4))
    for rate, lr in ((None, 3e-3), (0.01, 0.01)):
        matrices, rest = muon([matrix, vector], rate)
        assert (type(matrices), type(rest)) == (torch.optim.Muon, torch.optim.Adam)
        assert ([matrices.param_groups[0]["lr"], rest.param_groups[0]["lr"]]) == pytest.approx([3.5 * lr, lr])
    assert [type(o) for o in muon([vector])] == [torch.optim.Adam]
    before = matrix.detach().clone()
    matrix.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    matrices = muon([matrix])[0]
    matrices.step()
    # In the mean: the five steps of Newton and Schulz leave singular values between 0.7 and 1.2.
    size = (matrix.detach() - before).square().mean().sqrt() / (0.7 * 3e-3)
    assert 0.6 * 0.75**0.5 < size < 1.3
    assert [adamw(1e-3)([vector], rate)[0].param_groups[0]["lr"] for rate in (None, 0.1)] == [1e-3, 0.1]
    assert [linear(step, 4) for step in (0, 2, 4)] == [1.0, 0.5, 0.0]
    assert [cosine(step, 40) for step in (0, 1, 2, 21, 40)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])


def test_the_untuned_baselines_of_libraries_are_those_that_their_names_say():
    for package in PACKAGES.values():
        pytest.importorskip(package)
    p = nn.Parameter(torch.ones(2, 2))
    (soap,), (free,), (prodigy,) = (BASELINES[n].make([p], None) for n in ("soap_fixed", "schedule_free", "prodigy"))
    made = [(type(o).__name__, o.param_groups[0]["lr"]) for o in (soap, free, prodigy)]
    assert made == [("SOAP", 3e-3), ("AdamWScheduleFree", 2.5e-3), ("Prodigy", 1.0)]
    schedules = [BASELINES[n].schedule for n in ("soap_fixed", "schedule_free", "prodigy")]
    assert schedules == [cosine, None, half_cosine]
    assert [half_cosine(step, 40) for step in (0, 20, 40)] == pytest.approx([1.0, 0.5, 0.0])


class Averaging(torch.optim.SGD):
    """Judged elsewhere than trained: at the parameters less ``shift``."""

    def __init__(self, params, lr, shift):
        super().__init__(params, lr=lr)
        self.shift, self.at = shift, 0.0

    def train(self):
        self._move(0.0)

    def eval(self):
        self._move(-self.shift)

    def _move(self, to):
        for p in self.param_groups[0]["params"]:
            p.data += to - self.at
        self.at = to

    def step(self):
        assert self.at == 0.0
        super().step()


def test_optimizers_may_be_judged_elsewhere_than_they_are_trained():
    setting = dataclasses.replace(NOISY, family=Quadratic(dim=3))
    still, shifted = (
        run_entrant(TorchEntrant("", partial(torch_optimizer, Averaging, lr=1e-3, shift=shift)), setting)
        for shift in (0.0, 1.0)
    )
    np.testing.assert_allclose(shifted.train, still.train, rtol=1e-5)
    assert (np.abs(shifted.valid - still.valid) > 1e-2).all()
    away = TorchEntrant("", partial(torch_optimizer, Averaging, lr=0.0, shift=0.5))
    start = dataclasses.replace(setting, family=Quadratic(dim=3, init_scale=0.0), steps=1)
    generator = torch.Generator().manual_seed(start.seed)
    data = start.family.sample(generator, start.seeds)
    want = (data["w"].sum(2) * -0.5 - data["y"]).square().sum(1)
    np.testing.assert_allclose(run_entrant(away, start).valid[0, :, 0], want.numpy(), rtol=1e-5)


class Replacing(torch.optim.Optimizer):
    """SGD that puts new tensors into its parameters."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.data = p.data - self.param_groups[0]["lr"] * p.grad


def test_optimizers_may_replace_what_a_parameter_holds():
    ours, plain = (
        TorchEntrant("", lambda p, lr, make=make: [make(p, lr=lr)], None, (0.01,))
        for make in (Replacing, torch.optim.SGD)
    )
    np.testing.assert_allclose(run_entrant(ours, NOISY).valid, run_entrant(plain, NOISY).valid, rtol=1e-5)


class Factorising(torch.optim.SGD):
    """SGD that factorises its gradients, as Shampoo and SOAP do, and is wrong about others."""

    def step(self):
        for p in self.param_groups[0]["params"]:
            if p.grad.abs().max() > 1e3:
                torch.linalg.cholesky(-torch.eye(2))
            if self.param_groups[0]["lr"] == 7.0:
                raise RuntimeError("a bug")
        super().step()


def test_a_run_in_which_an_optimizer_fails_is_lost_and_the_others_are_not():
    make = partial(torch_optimizer, Factorising)
    trials = run_entrant(TorchEntrant("", make, None, (0.01, 10.0)), NOISY)
    assert np.isfinite(trials.train[..., 0]).all()
    assert np.isnan(trials.train[-1, :, 1]).all()
    assert diverged(condense(trials, 1)).tolist() == [[False, True]] * NOISY.seeds
    with pytest.raises(RuntimeError, match="a bug"):
        run_entrant(TorchEntrant("", make, None, (7.0,)), NOISY)


def test_what_is_done_of_all_runs_is_told():
    for entrant in (
        dataclasses.replace(GRIDS["adam"], rates=(0.1, 1.0)),
        TorchEntrant("both", adamw(0.1), None, (0.1, 1.0)),
    ):
        told: list[int] = []
        run_entrant(entrant, NOISY, advance=told.append)
        assert (len(told), sum(told)) == (20, 21 * 3 * 2)


def test_grids_have_at_least_eight_rates_half_a_decade_apart():
    for baseline in (entrant for name, entrant in BASELINES.items() if name not in UNTUNED):
        assert len(baseline.rates) >= 8
        assert None not in baseline.rates
        np.testing.assert_allclose(np.diff(np.log10(baseline.rates)), 0.5)


@pytest.mark.parametrize("rule", [SGD(), MLP(), VeLO()], ids=lambda rule: type(rule).__name__)
def test_a_scheduled_rule_gets_what_its_rule_needs(rule):
    scheduled = Scheduled(rule)
    assert (scheduled.needs_loss, scheduled.learned_init) == (rule.needs_loss, rule.learned_init)
    setting = Setting("same", Quadratic(dim=3), steps=3, seeds=2)
    found = run_learned(scheduled, theta_of(scheduled), setting).train
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0], run_learned(rule, theta_of(rule), setting).train[0])


def test_grids_can_go_further_up():
    (adam, adamw_cosine, adamw) = baselines(["adam", "adamw_cosine", "adamw"], wider=2).values()
    assert adam.rates == half_decades(-4.0, 1.5)
    assert adamw_cosine.rates == half_decades(-4.0, 1.0)
    assert adamw is BASELINES["adamw"]
    with pytest.raises(ConfigurationError, match="wider=-1"):
        baselines(["adam"], wider=-1)


def test_baselines_go_by_name():
    assert list(baselines(["adam", "sgd"])) == ["adam", "sgd"]
    with pytest.raises(UnknownNameError, match=r"'adma', did you mean 'adam'.*rmsprop, .*sgd"):
        baselines(["adma"])
    with pytest.raises(ConfigurationError, match=r"expected a list, such as \[adam\]"):
        baselines("adam")


@pytest.mark.parametrize(
    ("bad", "names"),
    [
        ({"steps": 0}, "steps=0"),
        ({"seeds": 1.5}, "seeds=1.5"),
        ({"steps": "9"}, "steps='9'"),
        ({"window": 0.5}, "window=0.5"),
        ({"seed": -1}, "seed=-1"),
        ({"window": 22}, "window=22"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(bad, names):
    with pytest.raises(ConfigurationError, match=names):
        dataclasses.replace(NOISY, **bad)


@pytest.mark.parametrize(
    ("seconds", "expected"), [([2.0] * 10 + [12.0] + [2.0] * 9 + [12.0], 3.0), ([1.0, 2.0, 9.0], 4.0)]
)
def test_what_every_tenth_step_takes_has_its_share_in_the_usual_time(seconds, expected):
    assert usual(seconds) == pytest.approx(expected)


def test_the_cost_of_a_step():
    makers = {
        "plug-in": lambda params: LearnedOptimizer(params, (SGD(), theta_of(SGD())), total_steps=10),
        "Adam": torch.optim.Adam,
        "two": lambda params: [torch.optim.Adam(params[:1]), torch.optim.SGD(params[1:])],
        "reads the loss": lambda params: plug_in(VeLO(), theta_of(VeLO()), params),
    }
    module = nn.Linear(30, 30)
    before = module.weight.detach().clone()
    costs = step_cost(makers, module, rounds=3)
    assert (costs["plug-in"].state_bytes, costs["Adam"].state_bytes) == (0.0, pytest.approx(8.0, abs=0.1))
    assert costs["two"].state_bytes == pytest.approx(8.0 * 900 / 930, abs=0.1)
    assert all(cost.seconds > 0 for cost in costs.values())
    assert torch.equal(module.weight, before)
