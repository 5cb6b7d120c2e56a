"""Augmentations: what the optimizer sees, honest losses and meta-gradients, nesting, sharing, the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from analytic import AUGMENTED
from tables import TOTAL, Recorded, Shapes, double, generator, identical
from test_unroll import assert_equals_finite_differences
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map
from training import command, records

from l2o.estimators import Backprop, Evolution
from l2o.meta import MetaTraining
from l2o.random import LaneGenerator
from l2o.rules import MLP, SGD
from l2o.tasks import (
    Bfloat16Gradients,
    ConvexQuadratic,
    DelayedGradients,
    GradientNoise,
    ImageMLP,
    Quadratic,
    Reparametrized,
    Repeated,
)
from l2o.types import Buffers, ConfigurationError, Grads, InnerState, TaskFamily, UnknownNameError
from l2o.unroll import expand_theta, reset, sample_runs, unroll

LANES = 4
PLAIN = ImageMLP(width=4, batch_size=8)
every_augmentation = pytest.mark.parametrize("family", AUGMENTED.values(), ids=AUGMENTED.keys())


def begin(family: TaskFamily, lanes: int = LANES, horizon: int = 9, seed: int = 3, lr: float = 0.1) -> Any:
    """Rule, θ, state at step 0 and generator."""
    rule, g = SGD(lr=lr), generator(seed)
    theta = expand_theta(rule.init_theta(g), lanes)
    return rule, theta, sample_runs(rule, theta, family, torch.full((lanes,), horizon), g), g


def run(family: TaskFamily, steps: int = 5, **settings: Any) -> tuple[InnerState, Tensor]:
    rule, theta, state, g = begin(family, **settings)
    with torch.no_grad():
        return unroll(rule, theta, family, state, steps, g)


def seen(family: TaskFamily, seed: int = 0, split: str = "train", lanes: int = LANES) -> tuple[Grads, Grads, Any]:
    """True gradients of the first step in float64, those that the optimizer sees, and the data."""
    g = generator(seed)
    data = family.sample(g, lanes)
    params, buffers = family.init(data, g)
    params = {k: t.requires_grad_() for k, t in double(params).items()}
    batch = family.batch(data, split, g)  # type: ignore[arg-type]
    loss, buffers = vmap(family.loss)(params, buffers, data, batch)
    grads = dict(zip(params, torch.autograd.grad(loss.sum(), list(params.values())), strict=True))
    return grads, family.transform_gradients(grads, buffers, data, batch)[0], data


BPTT: dict[str, TaskFamily] = {
    "task": Reparametrized(Shapes(), low=0.1, high=10.0),
    "tensor": Reparametrized(Shapes(), low=0.1, high=10.0, per="tensor"),
    "parameter": Reparametrized(Shapes(), low=0.1, high=10.0, per="parameter"),
    "relative noise": GradientNoise(Shapes()),
    "absolute noise": GradientNoise(Shapes(), low=0.1, high=0.3, relative=False),
    "delayed": DelayedGradients(Shapes()),
    "delayed by two": DelayedGradients(Shapes(), delay=2),
    "outside": DelayedGradients(GradientNoise(Reparametrized(Shapes(), low=0.1, high=10.0, per="parameter"))),
    "inside": Reparametrized(GradientNoise(DelayedGradients(Shapes()), relative=False), low=0.3, high=3.0),
    "twice": Reparametrized(Reparametrized(Shapes(), 0.1, 10.0, "tensor"), low=0.1, high=10.0),
}


@pytest.mark.parametrize("rule", [SGD(lr=0.1), MLP(hidden=())], ids=["SGD", "MLP"])
@pytest.mark.parametrize("family", BPTT.values(), ids=BPTT.keys())
@pytest.mark.parametrize("steps", [2, 4])
def test_backpropagation_equals_finite_differences(family: TaskFamily, rule: Any, steps: int) -> None:
    """Losses, too, are those of the parameters as they are, and their derivatives the true ones."""
    assert_equals_finite_differences(rule, Recorded(family), steps=steps, step=1e-6)


def test_backpropagation_goes_straight_through_the_rounding() -> None:
    """x₁ = x₀ - lr R(A x₀), x₂ = x₁ - lr R(A x₁); with dR taken for the identity the derivative has a closed form."""
    family = Recorded(Bfloat16Gradients(ConvexQuadratic(dims=(4, 4))))
    rule, _, state, g = begin(family, TOTAL)
    state = state._replace(params=double(state.params))
    log_lr = torch.full((TOTAL,), -1.0, dtype=torch.float64, requires_grad=True)
    _, losses = unroll(rule, {"log_lr": log_lr}, family, state, 3, g)
    got = torch.autograd.grad(losses[2].sum(), log_lr)[0]

    data, lr = double(state.data), log_lr.detach().exp().unsqueeze(1)
    data = {name.removeprefix("inner."): t for name, t in data.items()}
    a = torch.einsum("lij,li,lik->ljk", data["rotation"], data["spectrum"], data["rotation"])

    def slope(x: Tensor) -> Tensor:
        return (a @ (x - data["origin"]).unsqueeze(2)).squeeze(2)

    def rounded(x: Tensor) -> Tensor:
        return slope(x).bfloat16().double()

    x0 = state.params["x"]
    x1 = x0 - lr * rounded(x0)
    x2 = x1 - lr * rounded(x1)
    moved = -rounded(x1) + lr * (a @ rounded(x0).unsqueeze(2)).squeeze(2) - rounded(x0)
    torch.testing.assert_close(got, ((slope(x2) * moved).sum(1, keepdim=True) * lr).squeeze(1))


@every_augmentation
def test_vectorised_lanes_equal_lanes_one_by_one(family: TaskFamily) -> None:
    together, losses = run(Recorded(family), lanes=TOTAL)
    for lane in range(TOTAL):
        alone, own = run(Recorded(family, (lane,)), lanes=1)
        torch.testing.assert_close(losses[:, lane], own[:, 0], rtol=1e-4, atol=1e-5)
        for name, p in alone.params.items():
            torch.testing.assert_close(together.params[name][lane], p[0], rtol=1e-4, atol=1e-5)


@every_augmentation
def test_the_lanes_of_a_pair_are_identical(family: TaskFamily) -> None:
    """Task, initialisation, batches, and what the augmentations draw."""
    state, losses = run(Repeated(family, 2), lanes=6)
    lanes_first = (state.data, state.params, state.buffers, losses.T)
    first, second = (tree_map(lambda t, k=k: t[k::2], lanes_first) for k in (0, 1))
    assert identical(first, second)
    assert not losses[:, 0].equal(losses[:, 2])
    assert identical(run(family, lanes=3)[1], losses[:, 0::2])


@every_augmentation
def test_lanes_are_the_same_whichever_others_are_drawn(family: TaskFamily) -> None:
    def draw(ids: Tensor) -> list[dict[str, Tensor]]:
        g = LaneGenerator("cpu", 7, ids)
        data = family.sample(g, len(ids))
        params, buffers = family.init(data, g)
        batch = family.batch(data, "train", g)
        return [{k: t for k, t in each.items() if not k.endswith("lane")} for each in (data, params, buffers, batch)]

    few = torch.tensor([3, 5])
    for some, whole in zip(draw(few), draw(torch.arange(8)), strict=True):
        assert all(some[name].equal(whole[name][few]) for name in whole)


@every_augmentation
def test_losses_are_those_of_the_family(family: TaskFamily) -> None:
    """At the first step; later ones have other parameters."""
    plain = family
    while hasattr(plain, "family"):
        plain = plain.family
    g = generator()
    data = family.sample(g, LANES)
    params, buffers = family.init(data, g)
    batch = family.batch(data, "valid", g)
    scales = {k.removeprefix("scale."): s for k, s in buffers.items() if k.startswith("scale.")}
    undone = {k: p * scales.get(k, 1.0) for k, p in params.items()}
    stripped = [{k.rpartition("inner.")[2]: t for k, t in each.items()} for each in (buffers, data, batch)]
    want = vmap(plain.loss)(undone, *stripped)[0]
    torch.testing.assert_close(vmap(family.loss)(params, buffers, data, batch)[0], want, rtol=1e-4, atol=1e-5)


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


class Closed(Quadratic):
    """With its gradient in closed form."""

    def fused_gradient(self, params: Any, buffers: Any, data: Any, batch: Any) -> tuple[Tensor, Buffers, Grads]:
        residual = torch.einsum("lij,lj->li", data["w"], params["x"]) - data["y"]
        return residual.square().sum(1), buffers, {"x": 2 * torch.einsum("lij,li->lj", data["w"], residual)}


WRAPPED = {
    "repeated": lambda family: Repeated(family, 2),
    "reparametrized": lambda family: Reparametrized(family, per="parameter"),
    "noisy": GradientNoise,
    "rounded": Bfloat16Gradients,
    "delayed": DelayedGradients,
    "all": lambda family: Repeated(Reparametrized(DelayedGradients(GradientNoise(family))), 2),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_closed_form_gradients_are_used_and_equal(wrap: Any) -> None:
    closed, plain = wrap(Closed(dim=3)), wrap(Quadratic(dim=3))
    _, _, state, g = begin(plain)
    batch = plain.batch(state.data, "train", g)
    assert closed.fused_gradient(state.params, state.buffers, state.data, batch) is not None
    assert plain.fused_gradient(state.params, state.buffers, state.data, batch) is None
    (got, got_losses), (want, want_losses) = (run(family, 4, lr=1e-4) for family in (closed, plain))
    torch.testing.assert_close(got.params, want.params, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got_losses, want_losses, rtol=1e-3, atol=1e-4)


@every_augmentation
def test_meta_training_goes_on_from_a_saved_state(family: TaskFamily) -> None:
    """With resets on the way, and pairs."""
    settings = {"lanes": 4, "horizon": 3, "truncation": 2}
    for estimator in (Backprop(SGD(lr=0.01), family, **settings), Evolution(SGD(lr=0.01), family, **settings)):

        def made(estimator: Any = estimator) -> MetaTraining:
            theta = SGD(lr=0.01).init_theta(generator())
            return MetaTraining(estimator, theta, lambda p: torch.optim.Adam(p, lr=1e-2), generator(5))

        whole, resumed = made(), made()
        for _ in range(2):
            assert whole.outer_step()["lanes_broken"] == 0
        resumed.load_state_dict(whole.state_dict())
        for training in (whole, resumed):
            for _ in range(2):
                training.outer_step()
        assert identical(whole.state_dict(), resumed.state_dict())


def test_who_is_keyed_is_the_familys_to_say() -> None:
    class Other(Quadratic):
        keyed = False

    for wrap in WRAPPED.values():
        assert wrap(Quadratic()).keyed
        assert not wrap(Other()).keyed


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
