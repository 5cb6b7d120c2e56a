"""The kernel of a perceptron's second derivatives agrees with autograd's in float64 and with finite differences."""

import pytest
import torch
from tables import first_estimate, generator, identical
from test_kernels import as_double, assert_close, derivatives_twice
from torch.func import vmap
from torch.utils._pytree import tree_leaves

import l2o.fused
from l2o.estimators import Backprop
from l2o.kernels import perceptron
from l2o.rules import MLP, Adam
from l2o.tasks import ImageMLP
from l2o.unroll import expand_theta, inner_step, sample_runs

SIZES = [(32, 1, 128), (7, 3, 5), (1, 0, 1), (50, 2, 9)]
"""Width, depth and batch; most are no multiples of a vector."""
every_size = pytest.mark.parametrize("sizes", SIZES, ids=str)
every_activation = pytest.mark.parametrize("activation", perceptron.ACTIVATIONS)


def problem(activation, sizes, lanes, seed=0):
    """A family, parameters of different scales, a batch, and random cotangents of losses and gradients."""
    width, depth, batch_size = sizes
    family, g = ImageMLP(width=width, depth=depth, activation=activation, batch_size=batch_size), generator(seed)
    data = family.sample(g, lanes)
    params = {k: 3 * p + 0.1 * torch.randn(p.shape, generator=g) for k, p in family.init(data, g)[0].items()}
    batch = family.batch(data, "train", g)
    cotangents = torch.randn(lanes, generator=g), {k: torch.randn(p.shape, generator=g) for k, p in params.items()}
    return family, params, batch, cotangents


def leaves(params):
    return {k: p.detach().clone().requires_grad_() for k, p in params.items()}


def pulled_back(params, losses, grads, cotangents):
    outputs, weights = [losses, *grads.values()], [cotangents[0], *(cotangents[1][k] for k in grads)]
    found = torch.autograd.grad(outputs, list(params.values()), weights, materialize_grads=True)
    return dict(zip(params, found, strict=True))


def by_kernel(family, params, batch, cotangents):
    params = leaves(params)
    losses, _, grads = l2o.fused.gradient(family, params, {}, {}, batch)
    assert losses.grad_fn.name() == "_DerivativeBackward"
    return pulled_back(params, losses, grads, cotangents)


def reference(family, params, batch, cotangents):
    """By differentiating the family's loss twice, in float64."""
    params = leaves(as_double(params))
    losses, _ = vmap(family.loss)(params, {}, {}, batch)
    grads = torch.autograd.grad(losses.sum(), list(params.values()), create_graph=True)
    return pulled_back(params, losses, dict(zip(params, grads, strict=True)), as_double(cotangents))


@every_activation
@every_size
@pytest.mark.parametrize("lanes", [1, 3])
def test_the_derivative_is_that_of_the_loss(activation, sizes, lanes, threads):
    args = problem(activation, sizes, lanes)
    assert_close(by_kernel(*args), reference(*args), rtol=2e-5)


@every_activation
def test_the_derivative_of_the_losses_is_the_gradient(activation):
    family, params, batch, _ = problem(activation, (7, 2, 9), 3)
    params = leaves(params)
    losses, _, grads = l2o.fused.gradient(family, params, {}, {}, batch)
    assert_close(torch.autograd.grad(losses.sum(), list(params.values())), tree_leaves(as_double(grads)), rtol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_where_there_is_no_kernel_torch_has_the_same_derivative(activation, monkeypatch):
    args = problem(activation, (9, 2, 6), 2)
    want = by_kernel(*args)
    monkeypatch.setenv("L2O_KERNELS", "0")
    family, params, batch, cotangents = args
    params = leaves(params)
    losses, _, grads = l2o.fused.gradient(family, params, {}, {}, batch)
    assert_close(pulled_back(params, losses, grads, cotangents), as_double(want), rtol=2e-5)


def test_what_the_kernel_does_not_fit_is_left_to_torch():
    family, params, batch, _ = problem("relu", (4, 1, 3), 2)
    params, x = leaves(params), batch["x"].requires_grad_()
    losses, _, _ = l2o.fused.gradient(family, params, {}, {}, batch)
    assert torch.autograd.grad(losses.sum(), x)[0].abs().max() > 0
    assert l2o.fused.gradient(family, as_double(params), {}, {}, batch) is None
    with pytest.raises(RuntimeError, match="out of bounds"):
        l2o.fused.gradient(family, params, {}, {}, {**batch, "y": batch["y"] + 10})


def test_constants_have_no_derivative():
    family, params, batch, _ = problem("relu", (4, 1, 3), 2)
    with torch.no_grad():
        constant = l2o.fused.gradient(family, leaves(params), {}, {}, batch)
    result = l2o.fused.gradient(family, params, {}, {}, batch)
    assert identical(constant, result)
    assert not any(t.requires_grad for t in tree_leaves((constant, result)))


def test_strided_tensors_give_the_same():
    family, params, batch, (u, v) = problem("tanh", (5, 1, 6), 2)
    strided = {k: torch.stack([t, t + 1], -1)[..., 0] for k, t in v.items()}
    want = by_kernel(family, params, batch, (u, v))
    assert identical(by_kernel(family, params, batch, (u[:1].expand(2), strided))["0.bias"][0], want["0.bias"][0])
    turned = leaves({k: p.mT.contiguous() if p.ndim == 3 else p for k, p in params.items()})
    losses, _, grads = l2o.fused.gradient(
        family, {k: p.mT if p.ndim == 3 else p for k, p in turned.items()}, {}, {}, batch
    )
    found = pulled_back(turned, losses, grads, (u, v))
    assert identical({k: d.mT if d.ndim == 3 else d for k, d in found.items()}, want)


@every_activation
def test_the_same_bits_on_any_number_of_threads(activation):
    args, results = problem(activation, (9, 2, 17), 5), []
    before = torch.get_num_threads()
    for count in (1, 2, 3, 8, 2):
        torch.set_num_threads(count)
        results.append(by_kernel(*args))
    torch.set_num_threads(before)
    assert all(identical(results[0], other) for other in results[1:])


@every_activation
def test_a_diverged_lane_is_nan_alone(activation):
    family, params, batch, (u, v) = problem(activation, (6, 2, 5), 3)
    want = by_kernel(family, params, batch, (u, v))
    v["0.weight"][0] = torch.inf
    got = by_kernel(family, params, batch, (u, v))
    assert not any(t[0].isfinite().all() for t in got.values())
    assert all(t[1:].equal(want[k][1:]) for k, t in got.items())


@every_activation
def test_a_derivative_can_be_differentiated_again(activation):
    family, params, batch, _ = problem(activation, (4, 2, 3), 2)
    found = []
    for kernel, tree in ((True, params), (False, as_double(params))):
        tree = leaves(tree)
        if kernel:
            losses, _, grads = l2o.fused.gradient(family, tree, {}, {}, batch)
            assert losses.grad_fn.name() == "_DerivativeBackward"
        else:
            losses, _ = vmap(family.loss)(tree, {}, {}, batch)
            grads = dict(
                zip(tree, torch.autograd.grad(losses.sum(), list(tree.values()), create_graph=True), strict=True)
            )
        found.append(derivatives_twice([losses, *(grads[name] for name in tree)], list(tree.values())))
    assert_close(*found, rtol=1e-4)


def loss_after_two_steps(rule, family, theta, state, batches):
    for batch in batches:
        state, loss = inner_step(rule, theta, family, state, batch)
    return loss


@every_activation
def test_finite_differences_through_two_steps(activation):
    rule, family = MLP(hidden=(8,), step_mult=0.1), ImageMLP(width=6, activation=activation, batch_size=16)
    g, lanes = generator(3), 3
    theta = expand_theta(rule.init_theta(g), lanes)
    state = sample_runs(rule, theta, family, torch.full((lanes,), 9), g)
    batches = [family.batch(state.data, "train", g) for _ in range(3)]
    theta, direction = leaves(theta), {k: torch.randn(t.shape, generator=g).double() for k, t in theta.items()}
    loss = loss_after_two_steps(rule, family, theta, state, batches)
    grads = torch.autograd.grad(loss.sum(), list(theta.values()))
    got = sum((d * direction[k]).flatten(1).sum(1) for k, d in zip(theta, grads, strict=True))

    def shifted(step):
        moved = {k: t.detach().double() + step * direction[k] for k, t in theta.items()}
        with torch.no_grad():
            return loss_after_two_steps(rule, family, moved, as_double(state), batches)

    step = 1e-6
    torch.testing.assert_close(got, (shifted(step) - shifted(-step)) / (2 * step), rtol=1e-3, atol=1e-6)


def test_first_order_takes_gradients_in_closed_form_as_constants_too(monkeypatch):
    """Of a rule without a kernel for whole unrolls, whose family has one for its gradients."""
    rule, found = Adam(lr=0.1), {}
    theta, family = rule.init_theta(generator()), ImageMLP(width=4, batch_size=8)
    for closed in (True, False):
        for second_order in (True, False):
            estimator = Backprop(rule, family, lanes=2, horizon=6, truncation=6, second_order=second_order, clip=1e9)
            found[closed, second_order] = first_estimate(estimator, theta, 1)[0]
        monkeypatch.delitem(l2o.fused.GRADIENTS, ImageMLP, raising=False)
    for second_order in (True, False):
        torch.testing.assert_close(found[True, second_order], found[False, second_order], rtol=1e-3, atol=1e-6)
    assert not found[True, True]["log_lr"].isclose(found[True, False]["log_lr"], rtol=0.01)
