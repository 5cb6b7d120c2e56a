"""The derivative of whole unrolls by one kernel agrees with the engine's, in float64 and step by step."""

import pytest
import torch
from tables import generator, identical
from test_kernel_unroll import CASES, FAMILY, LANES, RULE, STEPS, batches, problem
from test_kernels import as_double, assert_close, derivatives_twice
from torch.utils._pytree import tree_leaves, tree_map

import l2o.fused
from l2o.unroll import unroll


def moving(state):
    return [*state.params.values(), *tree_leaves(state.opt)]


def derivatives(rule, family, theta, state, weighed=slice(None)):
    """By θ, parameters and momenta of each lane, of random combinations of all losses and of the end."""
    theta, state = tree_map(lambda t: t.detach().requires_grad_() if t.is_floating_point() else t, (theta, state))
    end, losses = unroll(rule, theta, family, state, STEPS, batches())
    g, outputs = generator(9), [losses, *moving(end)][weighed]
    weights = [torch.randn(t.shape, generator=g).to(t.dtype) for t in outputs]
    return torch.autograd.grad(outputs, [*theta.values(), *moving(state)], weights, materialize_grads=True)


def midway(rule, family):
    """Different θ in every lane and no momentum zero; two lanes end within the unroll."""
    theta, problems, state = problem(rule, family)
    g = generator(4)
    opt = tree_map(lambda m: 0.1 * torch.randn(m.shape, generator=g), state.opt)
    return theta, problems, state._replace(opt=opt)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("rule", "family"), CASES.values(), ids=CASES.keys())
def test_the_derivative_is_the_engines_in_float64(monkeypatch, rule, family):
    theta, problems, state = midway(rule, family)
    got = derivatives(rule, problems, theta, state)
    monkeypatch.setattr(l2o.fused, "unroll", lambda *_: None)
    assert_close(got, derivatives(rule, problems, as_double(theta), as_double(state)), rtol=1e-3)


@pytest.mark.parametrize("outputs", [slice(1), slice(1, None)], ids=["losses", "end"])
def test_outputs_may_be_left_unused(monkeypatch, outputs):
    theta, problems, state = midway(RULE, FAMILY)
    got = derivatives(RULE, problems, theta, state, outputs)
    monkeypatch.setattr(l2o.fused, "unroll", lambda *_: None)
    assert_close(got, as_double(derivatives(RULE, problems, theta, state, outputs)), rtol=1e-3)


def test_the_unroll_is_the_same_with_a_derivative_as_without():
    theta, problems, state = midway(RULE, FAMILY)
    with torch.no_grad():
        want = unroll(RULE, theta, problems, state, STEPS, batches())
    leaves = {name: t.clone().requires_grad_() for name, t in theta.items()}
    got = unroll(RULE, leaves, problems, state, STEPS, batches())
    assert got[1].grad_fn.name() == "_DerivativeBackward"
    assert identical(tree_map(torch.Tensor.detach, got), want)
    assert not got[0].first_loss.requires_grad


def test_the_same_bits_on_any_number_of_threads():
    theta, problems, state = midway(RULE, FAMILY)
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 3, LANES, 2):
        torch.set_num_threads(count)
        results.append(derivatives(RULE, problems, theta, state))
    torch.set_num_threads(before)
    assert all(identical(results[0], other) for other in results[1:])


def test_a_shared_theta_has_a_gradient_in_each_lane():
    theta, problems, state = midway(RULE, FAMILY)
    shared = {name: t[:1].expand(LANES, *t.shape[1:]) for name, t in theta.items()}
    dense = {name: t.contiguous() for name, t in shared.items()}
    assert identical(derivatives(RULE, problems, shared, state), derivatives(RULE, problems, dense, state))


def test_a_diverged_lane_harms_no_other():
    theta, problems, state = midway(RULE, FAMILY)
    want = derivatives(RULE, problems, theta, state)
    theta["b2"][0] = torch.nan
    got = derivatives(RULE, problems, theta, state)
    assert not all(t[0].isfinite().all() for t in got)
    assert all(a[1:].equal(b[1:]) for a, b in zip(got, want, strict=True))


def test_the_end_does_not_keep_the_steps():
    theta, problems, state = midway(RULE, FAMILY)
    leaves = {name: t.requires_grad_() for name, t in theta.items()}
    end, _ = unroll(RULE, leaves, problems, state, STEPS, batches())
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in moving(end))


@pytest.mark.parametrize(("rule", "family"), CASES.values(), ids=CASES.keys())
def test_a_derivative_can_be_differentiated_again(monkeypatch, rule, family):
    theta, problems, state = midway(rule, family)
    found = []
    for of in (lambda t: t, as_double):
        own, start = tree_map(lambda t: t.detach().requires_grad_() if t.is_floating_point() else t, of((theta, state)))
        end, losses = unroll(rule, own, problems, start, STEPS, batches())
        assert (losses.grad_fn.name() == "_DerivativeBackward") == (losses.dtype == torch.float32)
        found.append(derivatives_twice([losses, *moving(end)], [*own.values(), *moving(start)]))
        monkeypatch.setattr(l2o.fused, "unroll", lambda *_: None)
    assert_close(*found, rtol=1e-2)
