"""Augmentations: what the optimizer sees, honest losses and meta-gradients, nesting, sharing, the command line."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from augmented import LANES, begin, every_augmentation, run
from outer import assert_resumes, training
from tables import TOTAL, Recorded, Shapes, double, generator, identical
from test_unroll import assert_equals_finite_differences
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

import l2o.fused
from l2o.estimators import Backprop, Evolution
from l2o.rules import MLP, SGD
from l2o.tasks import (
    Bfloat16Gradients,
    ConvexQuadratic,
    DelayedGradients,
    GradientNoise,
    Quadratic,
    Reparametrized,
    Repeated,
)
from l2o.types import Buffers, Grads, TaskFamily
from l2o.unroll import unroll

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


class Closed(Quadratic):
    """With its gradient in closed form."""

    def closed(self, params: Any, buffers: Any, data: Any, batch: Any) -> tuple[Tensor, Buffers, Grads]:
        residual = torch.einsum("lij,lj->li", data["w"], params["x"]) - data["y"]
        return residual.square().sum(1), buffers, {"x": 2 * torch.einsum("lij,li->lj", data["w"], residual)}


l2o.fused.GRADIENTS[Closed] = Closed.closed

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
    assert l2o.fused.gradient(closed, state.params, state.buffers, state.data, batch) is not None
    assert l2o.fused.gradient(plain, state.params, state.buffers, state.data, batch) is None
    (got, got_losses), (want, want_losses) = (run(family, 4, lr=1e-4) for family in (closed, plain))
    torch.testing.assert_close(got.params, want.params, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got_losses, want_losses, rtol=1e-3, atol=1e-4)


@every_augmentation
def test_meta_training_goes_on_from_a_saved_state(family: TaskFamily) -> None:
    """With resets on the way, and pairs."""
    for make in (Backprop, Evolution):
        begun = partial(training, SGD(lr=0.01), make=make, family=family, horizon=3, truncation=2)
        assert begun().outer_step()["lanes_broken"] == 0
        assert_resumes(begun, 2, 2)


class Other(Quadratic):
    keyed = False


def test_who_is_keyed_is_the_familys_to_say() -> None:
    for wrap in WRAPPED.values():
        assert wrap(Quadratic()).keyed
        assert not wrap(Other()).keyed
