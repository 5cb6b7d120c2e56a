"""What each augmentation does: factors, noise, rounding and delays, and how they are set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from augmented import LANES, PLAIN, begin, run, seen
from tables import Shapes, double, generator, identical
from training import command, records

from l2o.rules import SGD
from l2o.tasks import (
    Bfloat16Gradients,
    DelayedGradients,
    GradientNoise,
    ImageMLP,
    Quadratic,
    Reparametrized,
)
from l2o.types import ConfigurationError, UnknownNameError
from l2o.unroll import reset, unroll


@pytest.mark.parametrize(("per", "distinct"), [("task", 1), ("tensor", 4), ("parameter", None)])
def test_reparametrized_parameters_are_divided_by_factors_of_their_range(per: Any, distinct: int | None) -> None:
    family = Reparametrized(PLAIN, low=1e-2, high=10.0, per=per)
    g = generator()
    data = family.sample(g, 300)
    params, buffers = family.init(data, g)
    scales = {name: buffers[f"scale.{name}"] for name in params}
    factors = torch.cat([s.flatten(1) for s in scales.values()], 1)
    total = sum(p[0].numel() for p in params.values())
    assert factors[0].unique().numel() >= 0.9 * total if distinct is None else factors[0].unique().numel() == distinct
    assert factors.min() >= 1e-2
    assert factors.max() <= 10
    assert abs(factors.log10().mean() + 0.5) < 0.1
    assert abs(factors.log10().std() - 3 / 12**0.5) < 0.1
    for name, p in params.items():  # as uniform as they were before
        bound = 64**-0.5 if name.startswith("0") else 4**-0.5
        assert abs((p * scales[name]).abs().max() / bound - 1) < 0.01


def test_a_reparametrized_gradient_is_the_factor_times_the_true_one() -> None:
    family = Reparametrized(Quadratic(dim=3), per="parameter")
    grads, after, _ = seen(family)
    torch.testing.assert_close(grads, after)  # nothing inside changes them
    g = generator()
    data = family.sample(g, LANES)
    params, buffers = family.init(data, g)
    scale = buffers["scale.x"].double()
    inner = {k.removeprefix("inner."): t for k, t in data.items()}
    w, y = inner["w"].double(), inner["y"].double()
    x = scale * double(params)["x"]
    want = scale * 2 * torch.einsum("lij,li->lj", w, torch.einsum("lij,lj->li", w, x) - y)
    torch.testing.assert_close(grads["x"], want)


@pytest.mark.parametrize("relative", [True, False])
def test_gradient_noise_is_normal_and_as_large_as_sampled(relative: bool) -> None:
    family = GradientNoise(Quadratic(dim=300), low=0.1, high=1.0, relative=relative)
    grads, noisy, data = seen(family, lanes=40)
    unit = grads["x"].square().mean(1).sqrt() if relative else torch.ones(40)
    sigma = data["sigma"]
    assert 0.1 <= sigma.min() < 0.2
    assert 0.7 < sigma.max() <= 1.0
    xi = (noisy["x"] - grads["x"]) / (sigma * unit).unsqueeze(1)
    assert abs(xi.mean()) < 0.05
    assert abs(xi.std() - 1) < 0.05
    assert abs(xi.pow(4).mean() - 3) < 0.3
    assert abs(torch.corrcoef(torch.stack([xi.flatten(), grads["x"].flatten()]))[0, 1]) < 0.05


def test_gradient_noise_is_fresh_in_every_batch_and_tensor_and_absent_in_validation() -> None:
    family = GradientNoise(Shapes(dead=False), relative=False)
    grads, noisy, _ = seen(family, split="valid")
    assert identical(grads, noisy)
    g = generator()
    data = family.sample(g, LANES)
    zeros = {name: torch.zeros(LANES, 5, dtype=torch.float64) for name in ("one", "two")}
    first, second = (family.transform_gradients(zeros, {}, data, family.batch(data, "train", g))[0] for _ in range(2))
    drawn = torch.cat([*first.values(), *second.values()])
    assert drawn.unique().numel() == drawn.numel()
    silent = GradientNoise(Shapes()).transform_gradients(zeros, {}, data, family.batch(data, "train", g))[0]
    assert identical(silent, zeros)  # relative to nothing


def test_rounded_gradients_are_those_of_bfloat16() -> None:
    grads, rounded, _ = seen(Bfloat16Gradients(ImageMLP(width=4, batch_size=8)))
    for name, g in grads.items():
        assert rounded[name].dtype == torch.float64
        assert rounded[name].equal(g.bfloat16().double())
        assert not rounded[name].equal(g)
    odd = torch.tensor([[0.0, -0.0, 1.0, 3e38, 1e-40, 1.00390625, torch.inf, torch.nan]])
    after = Bfloat16Gradients(Quadratic()).transform_gradients({"x": odd}, {}, {}, {})[0]["x"]
    assert after[0, :6].equal(odd[0, :6].bfloat16().float())
    assert not after[0, 6:].isfinite().any()


@pytest.mark.parametrize("delay", [1, 3])
def test_delayed_gradients_are_those_of_earlier_steps(delay: int) -> None:
    family = DelayedGradients(Quadratic(dim=3, noise=0.3), delay=delay)
    *_, state, g = begin(family, lr=0.02)
    x, batches = [state.params["x"]], []
    inner = {k.removeprefix("inner."): t for k, t in state.data.items()}
    for t in range(7):
        batches.append(family.batch(state.data, "train", g)["inner.noise"])
        old = max(t - delay, 0)
        residual = torch.einsum("lij,lj->li", inner["w"], x[old]) - inner["y"] - 0.3 * batches[old]
        x.append(x[t] - 0.02 * 2 * torch.einsum("lij,li->lj", inner["w"], residual))
    after, losses = run(family, 7, lr=0.02)
    torch.testing.assert_close(after.params["x"], x[7])
    residual = torch.einsum("lij,lj->li", inner["w"], x[6]) - inner["y"] - 0.3 * batches[6]
    torch.testing.assert_close(losses[6], residual.square().sum(1))  # of the parameters as they are


def test_a_lane_that_is_reset_forgets_its_delayed_gradients() -> None:
    family = DelayedGradients(Quadratic(dim=3), delay=2)
    rule, theta, state, g = begin(family)
    fresh = begin(family, 1, seed=9)[2]
    with torch.no_grad():
        state, _ = unroll(rule, theta, family, state, 3, g)
        state = reset(state, torch.tensor([False, True, False, False]), lambda _: fresh)
        state, _ = unroll(rule, theta, family, state, 4, g)
        alone, _ = unroll(rule, {k: t[:1] for k, t in theta.items()}, family, fresh, 4, g)
    torch.testing.assert_close(state.params["x"][1], alone.params["x"][0])


@pytest.mark.parametrize(
    ("error", "text", "make"),
    [
        (ConfigurationError, "family=SGD.*expected a TaskFamily", lambda: Bfloat16Gradients(SGD())),
        (ConfigurationError, r"\[low, high\]=\[2, 1\]", lambda: Reparametrized(PLAIN, 2, 1)),
        (ConfigurationError, r"\[low, high\]\[0\]=0", lambda: GradientNoise(PLAIN, 0, 1)),
        (UnknownNameError, "per 'tensors', did you mean 'tensor'", lambda: Reparametrized(PLAIN, per="tensors")),
        (ConfigurationError, "delay=0", lambda: DelayedGradients(PLAIN, delay=0)),
        (ConfigurationError, "delay=1.5 .*whole number", lambda: DelayedGradients(PLAIN, delay=1.5)),
    ],
)
def test_bad_settings_are_named(error: type[Exception], text: str, make: Any) -> None:
    with pytest.raises(error, match=text):
        make()


BASE = ["rule=sgd", "estimator.lanes=3", "estimator.horizon=4", "estimator.truncation=2", "logger=none", "run=run"]
NESTED = [
    "task._target_=l2o.tasks.Reparametrized",
    "task.per=tensor",
    "task.family._target_=l2o.tasks.DelayedGradients",
    "task.family.family._target_=l2o.tasks.ConvexQuadratic",
    "task.family.family.dims=[2,3]",
    "evaluation.seeds=2",
]


def test_augmentations_nest_on_the_command_line_and_in_what_is_continued(here: Path) -> None:
    assert command(*NESTED, "steps=2", base=BASE) == 0
    assert command("run=run", "steps=3", base=[]) == 0  # on the authority of the saved configuration
    assert len([r for r in records() if "meta_loss" in r]) == 3
    assert command(*NESTED, "steps=3", "run=other", base=BASE) == 0
    assert (here / "run/metrics.jsonl").read_bytes() == (here / "other/metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("task.family.family.dims=[3,2]", "task.family.family: ConvexQuadratic: dims=[3, 2]"),
        ("task.family.family._target_=l2o.tasks.Quadratik", "task.family.family._target_: unknown name in l2o.tasks"),
        ("task.family.dellay=3", "task.family: DelayedGradients got an unexpected keyword argument 'dellay'"),
        ("task.family._target_=l2o.rules.SGD", "task.family: SGD got an unexpected keyword argument 'family'"),
    ],
)
def test_what_is_wrong_inside_is_said_with_its_place(here: Path, capsys: Any, argument: str, says: str) -> None:
    assert command(*NESTED, argument, base=BASE) == 2
    assert says in capsys.readouterr().err
