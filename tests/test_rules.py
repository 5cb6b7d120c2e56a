"""What every update rule keeps: purity, the two-pass shape, agreement with torch, a small θ."""

import dataclasses
import math

import pytest
import torch
from tables import RULES, SEE_SHAPES, double, every_rule, generator, one_update, random_theta

from l2o import rules
from l2o.ops.kinds import infos_of
from l2o.rules import (
    LSTM,
    MLP,
    RNNMLP,
    SGD,
    STAR,
    AdafacMLP,
    AdaGrad,
    Adam,
    Momentum,
    NNAdam,
    RMSProp,
    RNNprop,
)
from l2o.types import ConfigurationError, OptState

SHAPES = {"scalar": (), "vector": (5,), "matrix": (3, 4), "conv": (2, 3, 2, 2), "empty": (0, 3), "one": (1,)}


NAN = math.nan


def problem(dtype=torch.float64, seed=0):
    g = generator(seed)
    return {k: torch.randn(s, generator=g).to(dtype) for k, s in SHAPES.items()}


def steps(rule, theta, params, grads, total=10):
    """Params after every update by ``grads[t]``, and the last state."""
    state = rule.init(theta, params, infos_of(params))
    trajectory = []
    for t, g in enumerate(grads):
        updates, state = one_update(rule, theta, g, state, params, t, total, torch.tensor(1.0))
        params = {k: p + updates[k] for k, p in params.items()}
        trajectory.append(params)
    return trajectory, state


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updates_have_the_shapes_and_dtype_of_the_parameters(rule, dtype):
    params = problem(dtype)
    theta = {k: t.to(dtype) for k, t in rule.init_theta(generator()).items()}
    trajectory, state = steps(rule, theta, params, [problem(dtype, seed) for seed in (1, 2)])
    for name, p in trajectory[-1].items():
        assert p.shape == params[name].shape
        assert p.dtype == dtype
        assert p.isfinite().all()
        assert not p.numel() or not p.equal(params[name])
        assert all(slot.dtype == dtype for slot in state.per_param[name].values())


@every_rule
def test_update_is_pure(rule):
    theta, params, grads = random_theta(rule), problem(), problem(seed=1)
    state = rule.init(theta, params, infos_of(params))
    _, state = one_update(rule, theta, grads, state, params, loss=torch.tensor(1.0))
    inputs = (theta, grads, state, params)
    before = torch.utils._pytree.tree_map(torch.clone, inputs)
    rng = torch.get_rng_state()
    first = one_update(rule, theta, grads, state, params, 1, loss=torch.tensor(1.0))
    again = one_update(rule, theta, grads, state, params, 1, loss=torch.tensor(1.0))
    leaves = torch.utils._pytree.tree_leaves
    assert all(a.equal(b) for a, b in zip(leaves(inputs), leaves(before), strict=True))
    assert all(a.equal(b) for a, b in zip(leaves(first), leaves(again), strict=True))
    assert rng.equal(torch.get_rng_state())


def update_of_a_view(rule, view):
    theta, flat, grads = random_theta(rule), torch.randn(12).double(), torch.randn(12).double()
    (params,), _ = steps(rule, theta, {"p": view(flat)}, [{"p": view(grads)}])
    return params["p"]


@every_rule
def test_a_tensors_update_does_not_depend_on_its_strides(rule):
    views = [lambda t: t.view(4, 3), lambda t: t.view(4, 3).T.contiguous().T]
    want, got = (torch.manual_seed(1) and update_of_a_view(rule, view) for view in views)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", [name for name in RULES if not name.startswith(SEE_SHAPES)])
def test_a_tensors_update_does_not_depend_on_its_shape(name):
    views = [lambda t: t.view(12), lambda t: t.view(3, 4), lambda t: t.view(1, 12, 1, 1)]
    want, *others = (torch.manual_seed(1) and update_of_a_view(RULES[name], view) for view in views)
    for got in others:
        torch.testing.assert_close(got.flatten(), want)


AT_BOUNDS = ("log_band_down", "log_sure", "log_range")
"""Leaves of Steered that matter where its controller slows down or is at a bound: see test_alignment."""


@every_rule
def test_every_leaf_of_theta_matters(rule):
    theta = {k: t.requires_grad_() for k, t in random_theta(rule).items()}
    grads = [problem(seed=s) for s in (1, 2, 3, 3)]
    trajectory, _ = steps(rule, theta, problem(), grads, total=1000)
    objective = sum(p.square().sum() for p in trajectory[-1].values())
    theta = {name: t for name, t in theta.items() if name not in AT_BOUNDS}
    for name, grad in zip(theta, torch.autograd.grad(objective, list(theta.values())), strict=True):
        assert grad.isfinite().all(), name
        assert grad.abs().max() > 0, name


@every_rule
def test_derivatives_are_finite_in_float32_where_gradients_and_parameters_are_zero(rule):
    theta = {k: t.float().requires_grad_() for k, t in random_theta(rule).items()}
    zeros = {k: torch.zeros(s, requires_grad=True) for k, s in SHAPES.items()}
    trajectory, _ = steps(rule, theta, zeros, [zeros, zeros, problem(torch.float32), zeros])
    objective = sum((p - 1.0).square().sum() for p in trajectory[-1].values())
    inputs = [*theta.values(), *zeros.values()]
    assert all(g.isfinite().all() for g in torch.autograd.grad(objective, inputs, materialize_grads=True))


TORCH = {
    "SGD": (SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "Momentum": (Momentum(lr=0.1, momentum=0.8), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8)),
    "Nesterov": (
        Momentum(lr=0.1, momentum=0.8, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True),
    ),
    "RMSProp": (RMSProp(lr=0.02, alpha=0.95), lambda p: torch.optim.RMSprop(p, lr=0.02, alpha=0.95)),
    "AdaGrad": (AdaGrad(lr=0.3), lambda p: torch.optim.Adagrad(p, lr=0.3)),
    "Adam": (Adam(lr=0.02, beta2=0.99), lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.9, 0.99))),
}


@pytest.mark.parametrize(("rule", "optimizer"), TORCH.values(), ids=TORCH.keys())
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-12, 0.0, 1e6])
def test_hand_designed_rules_agree_with_torch(rule, optimizer, scale):
    params = problem()
    grads = [{k: scale * g for k, g in problem(seed=s).items()} for s in range(1, 6)]
    theta = double(rule.init_theta(generator()))
    trajectory, _ = steps(rule, theta, params, grads)
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    reference = optimizer(list(leaves.values()))
    for t, g in enumerate(grads):
        for name, p in leaves.items():
            p.grad = g[name].clone()
        reference.step()
        for name, p in leaves.items():
            step, want = trajectory[t][name] - params[name], p.detach() - params[name]
            if want.numel():  # of the steps taken, not of the parameters, which would hide small ones
                torch.testing.assert_close(step, want, rtol=0, atol=1e-6 * want.abs().max().item() + 1e-15)


@pytest.mark.parametrize(("name", "limit"), [("MLP", 2_000), ("LSTM", 6_000)])
def test_theta_is_small(name, limit):
    assert sum(t.numel() for t in RULES[name].init_theta(generator()).values()) < limit


def test_lstm_is_two_lstm_layers_and_a_linear_readout():
    """One step from zero state, written out with torch's LSTM as the reference."""
    rule = LSTM(hidden=(3, 2), scale=0.1)
    theta, grads = random_theta(rule), {"p": torch.tensor([0.3, -0.002]).double()}
    state = rule.init(theta, grads, infos_of(grads))
    updates, new = one_update(rule, theta, grads, state, grads)
    assert isinstance(new, OptState)
    for j, g in enumerate(grads["p"].tolist()):
        eps = torch.finfo(torch.float32).eps
        x = torch.tensor(
            [max(torch.log(torch.tensor(abs(g) + eps).double()).item() / 5, -1), max(-1, min(1, g * 148.4131591))]
        )
        x = x.double()
        for i, units in enumerate(rule.hidden):
            z = torch.cat([x, torch.zeros(units).double()]) @ theta[f"w{i}"] + theta[f"b{i}"]
            gate_i, gate_g, _, gate_o = z.chunk(4)
            x = torch.sigmoid(gate_o) * torch.tanh(torch.sigmoid(gate_i) * torch.tanh(gate_g))
            torch.testing.assert_close(new.per_param["p"][f"h{i}"][:, j], x)
        torch.testing.assert_close(updates["p"][j], 0.1 * (x @ theta["w_out"] + theta["b_out"])[0])


def test_nn_adam_starts_at_its_settings():
    """θ holds them as raw numbers; the first update is that of Adam with them, without bias correction."""
    rule = NNAdam(lr=0.02, beta1=0.7, beta2=0.95, eps=0.01)
    params, grads = {"p": torch.zeros(5)}, {"p": torch.randn(5, generator=generator())}
    theta = rule.init_theta(generator())
    state = rule.init(theta, params, infos_of(params))
    updates, state = one_update(rule, theta, grads, state, params)
    m, v = 0.3 * grads["p"], 0.05 * grads["p"] ** 2
    torch.testing.assert_close(state.per_param["p"]["m"], m)
    torch.testing.assert_close(state.per_param["p"]["v"], v)
    torch.testing.assert_close(updates["p"], -0.02 * 1.01 * m / (0.01 + (v + 1e-10).sqrt()))


@pytest.mark.parametrize(
    ("raw", "lr", "eps", "left", "next_raw"),
    [(9.0, 1e3, 1e4, 1.0, 0.0), (-9.0, 1e-8, 1e-11, math.exp(-10.0), -1.0)],
)
def test_hyperparameters_of_nn_adam_stay_within_their_ranges(raw, lr, eps, left, next_raw):
    """Beyond them the raw numbers are those of the bounds from then on; no recorded run gets there."""
    rule = NNAdam()
    theta = {k: torch.full_like(t, raw) if k.startswith("raw") else t for k, t in rule.init_theta(generator()).items()}
    theta, params = double(theta), {"p": torch.zeros(5).double()}
    grads = {"p": torch.randn(5, generator=generator()).double()}
    state = rule.init(theta, params, infos_of(params))
    updates, state = one_update(rule, theta, grads, state, params)
    m, v, slots = left * grads["p"], left * grads["p"] ** 2, state.per_param["p"]
    torch.testing.assert_close(updates["p"], -lr * (1.0 + eps) / (eps + (v + 1e-10).sqrt()) * m)
    expected = {"m": m, "v": v}
    expected |= {"raw_beta1": next_raw, "raw_lr": 0.1 * math.log(lr), "raw_eps": 0.1 * math.log(eps)}
    for name, value in expected.items():
        torch.testing.assert_close(slots[name], torch.as_tensor(value, dtype=torch.float64))


@pytest.mark.parametrize(
    ("rule", "name", "values"),
    [
        (MLP, "time", ["epochs"]),
        (MLP, "hidden", [32, "32", (0,), (4, 1.5), (True,)]),
        (MLP, "decays", [0.9, (1.0,), (-0.1,), (NAN,), ("0.9",)]),
        (MLP, "step_mult", [NAN, 0.0, "x"]),
        (MLP, "exp_mult", [NAN, -1.0, None]),
        (LSTM, "hidden", [20, (), [0], (20, "20")]),
        (LSTM, "scale", [NAN, math.inf, 0.0]),
        (LSTM, "k", [0, -5.0, "5"]),
        *((rule, "lr", [0.0, -1.0, NAN, "abc", True]) for rule in (SGD, Momentum, RMSProp, AdaGrad, Adam)),
        *((rule, "eps", [0.0, NAN, "abc"]) for rule in (RMSProp, AdaGrad, Adam)),
        (Momentum, "momentum", [1.0, 0.0, "0.9"]),
        (RMSProp, "alpha", [1.0, -0.1]),
        (Adam, "beta1", [1.0, None]),
        (Adam, "beta2", [NAN, 2]),
        (Adam, "eps_root", [-1, NAN, "0"]),
        (AdafacMLP, "hidden", [4, (0,)]),
        (AdafacMLP, "momentum_decays", [0.9, (1.0,)]),
        (AdafacMLP, "adafactor_decays", [(0.9, -0.1, 0.5), (0.9,)]),
        (AdafacMLP, "rms_decay", [(0.9,), 1.0]),
        (STAR, "nominal", ["adamw", None]),
        (STAR, "weight_decay", [-1e-9, NAN]),
        (STAR, "step_mult", [0.0]),
        (NNAdam, "beta1", [1.0, -0.1]),
        (NNAdam, "decay_strength", [1.0, -1]),
        (NNAdam, "eps", [0.0]),
        (RNNprop, "hidden", [(), 20]),
        (RNNprop, "projected", [0]),
        (RNNprop, "beta2", [1.0]),
        (RNNMLP, "from_mlp", [0, 1.5]),
        (RNNMLP, "decays", [(1.0,)]),
    ],
)
def test_settings_that_make_no_sense_are_refused(rule, name, values):
    for value in values:
        with pytest.raises(ConfigurationError, match=rf"^{name}(\[\d\])?=.*expected"):
            rule(**{name: value})


def test_every_field_that_is_a_number_refuses_a_word():
    for name in rules.__all__:
        rule = getattr(rules, name)
        numbers = [f.name for f in dataclasses.fields(rule) if type(f.default) in (int, float, tuple)]
        assert numbers
        for field in numbers:
            with pytest.raises(ConfigurationError, match=f"^{field}='word' "):
                rule(**{field: "word"})


@every_rule
def test_whether_initial_states_are_learned_is_said_truly(rule):
    """A state that is made of NaN where θ is: that of a rule which reads it."""
    theta = {name: torch.full_like(t, torch.nan) for name, t in rule.init_theta(generator()).items()}
    params = {"matrix": torch.ones(3, 4), "vector": torch.ones(3)}
    state = rule.init(theta, params, infos_of(params))
    reads = any(leaf.isnan().any() for leaf in torch.utils._pytree.tree_leaves(state))
    assert rule.learned_init or not reads
