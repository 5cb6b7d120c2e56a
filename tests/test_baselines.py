"""Baselines: what they are, what they meet, and how optimizers of users may behave that are run beside them."""

import dataclasses
import sys
from functools import partial

import numpy as np
import pytest
import torch
from suites import GRIDS, NOISY
from torch import nn

from l2o.evaluation import (
    BASELINES,
    Setting,
    TorchEntrant,
    baselines,
    run_entrant,
)
from l2o.evaluation.baselines import adamw, cosine, half_cosine, half_decades, linear, muon, torch_optimizer
from l2o.evaluation.scores import condense, diverged
from l2o.tasks import ImageMLP, Quadratic
from l2o.types import ConfigurationError, UnknownNameError

UNTUNED = sorted(name for name, entrant in BASELINES.items() if entrant.rates == (None,))
OF_TORCH = sorted(BASELINES.keys() - GRIDS.keys())
PACKAGES = {
    **dict.fromkeys(["soap", "soap_fixed"], "pytorch_optimizer"),
    **dict.fromkeys(["schedule_free", "schedule_free_tuned"], "schedulefree"),
    "prodigy": "prodigyopt",
}
"""That a baseline needs beside torch, from the extra ``baselines``."""


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


def test_grids_have_at_least_eight_rates_half_a_decade_apart():
    for baseline in (entrant for name, entrant in BASELINES.items() if name not in UNTUNED):
        assert len(baseline.rates) >= 8
        assert None not in baseline.rates
        np.testing.assert_allclose(np.diff(np.log10(baseline.rates)), 0.5)


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
