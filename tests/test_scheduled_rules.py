"""VeLO, Celo, Celo-Adam and Celo2, where recorded runs do not look: empty and frozen tensors, kinds, switches."""

import dataclasses

import pytest
import torch
from plugin import TOTAL, make
from tables import RULES, generator, random_theta
from torch import nn

from l2o.ops.kinds import infos_of
from l2o.ops.losses import average_losses, init_loss_averages
from l2o.rules import Celo, Celo2, VeLO
from l2o.types import ConfigurationError, Run

OURS = {name: rule for name, rule in RULES.items() if name.startswith(("VeLO", "Celo"))}
ours = pytest.mark.parametrize("rule", OURS.values(), ids=OURS.keys())


def tensors(seed: int, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    g = generator(seed)
    return {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}


def at(step, total, loss):
    return Run(torch.tensor(step), torch.tensor(total), loss)


def run(rule, params, theta=None, kinds=None, steps=4, total=10):
    """The parameters after ``steps`` updates by random gradients, which depend on a tensor's name and shape alone."""
    theta = theta or random_theta(rule)
    infos = infos_of(params, kinds)
    state = rule.init(theta, params, infos)
    for t in range(steps):
        grads = {name: tensors(100 * t + len(name), **{name: tuple(p.shape)})[name] for name, p in params.items()}
        loss = torch.tensor(3.0 - 0.1 * t + (t == 2), dtype=torch.float64)
        updates, state = rule.update(theta, grads, state, params, infos, at(t, total, loss))
        params = {name: p + updates[name] for name, p in params.items()}
    return params, state


@ours
def test_an_empty_parameter_changes_nothing_for_the_others(rule):
    params = tensors(1, a=(3, 2), bb=(4,))
    want, _ = run(rule, params)
    got, state = run(rule, params | {"empty": torch.zeros(0, 3, dtype=torch.float64)})
    for name, p in want.items():
        torch.testing.assert_close(got[name], p)
    leaves = torch.utils._pytree.tree_leaves(state)
    assert all(t.isfinite().all() for t in leaves)


@ours
def test_only_empty_parameters_are_no_error(rule):
    params, _ = run(rule, {"empty": torch.zeros(0, 3, dtype=torch.float64)})
    assert params["empty"].shape == (0, 3)


@ours
def test_frozen_parameters_stay_and_may_join_later(rule):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).double()
    model[1].weight.requires_grad_(False)
    before = model[1].weight.detach().clone()
    optimizer = make(model.parameters(), rule)
    for step in range(TOTAL // 2):
        if step == 5:
            assert model[1].weight.equal(before)
            model[1].weight.requires_grad_(True)
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3, dtype=torch.float64)).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
    assert not model[1].weight.equal(before)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("total", [10, 300])
def test_the_loss_horizon_stands_in_for_the_length_of_the_run_where_losses_are_averaged(total):
    """Only there: how far the run is goes by ``total_steps`` as before."""
    params = tensors(1, a=(3, 2), bb=(4,))
    plain, fixed = OURS["VeLO"], dataclasses.replace(OURS["VeLO"], loss_horizon=10)
    (want, _), (got, _) = (run(rule, params, total=total) for rule in (plain, fixed))
    assert got["a"].equal(want["a"]) == (total == 10)


def test_without_its_schedule_celo_is_the_network_alone():
    """The rate is a factor, the same for all tensors: with it learned to be 1, nothing changes."""
    rule, params = Celo(lstm_hidden=4, step_mult=0.01), tensors(1, a=(3, 2), bb=(4,))
    theta = random_theta(rule)
    theta["w_lr"], theta["b_lr"] = torch.zeros_like(theta["w_lr"]), torch.full_like(theta["b_lr"], 10.0).log()
    (want, _), (got, _) = (run(r, params, theta) for r in (rule, dataclasses.replace(rule, scheduled=False)))
    torch.testing.assert_close(got, want)


def test_celo2_leaves_to_adam_the_kinds_that_it_is_told():
    """Adam without bias correction, written out; decoupled weight decay in both paths."""
    rule = Celo2(adam=("vector", "embedding"), weight_decay=0.1, adam_mult=20.0, step_mult=1e-3)
    params = tensors(1, a=(3, 2), bb=(4,), ccc=(5, 2))
    kinds = {"a": "matrix", "bb": "vector", "ccc": "embedding"}
    got, state = run(rule, params, kinds=kinds)
    alone, _ = run(dataclasses.replace(rule, adam=()), {"a": params["a"]})
    torch.testing.assert_close(got["a"], alone["a"])
    for name in ("bb", "ccc"):
        assert set(state.per_param[name]) == {"first", "second"}
        p, m, v = params[name], 0.0, 0.0
        for t in range(4):
            g = tensors(100 * t + len(name), **{name: tuple(p.shape)})[name]
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g.square()
            p = p - 0.02 * (m / (v + 1e-8).sqrt() + 0.1 * p)
        torch.testing.assert_close(got[name], p)


def test_a_group_says_that_its_parameters_are_embeddings():
    rule = Celo2(adam=("embedding",))
    embedding, matrix = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    optimizer = make([{"params": [embedding], "kind": "embedding"}, {"params": [matrix]}], rule)
    embedding.grad, matrix.grad = torch.ones(4, 3), torch.ones(4, 3)
    optimizer.step()
    assert set(optimizer.state[embedding]) - {"had_gradient"} == {"first", "second"}
    assert "row" in optimizer.state[matrix]


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_step_of_celo2_has_unit_size(orthogonal):
    rule, params = Celo2(step_mult=1.0, orthogonalize=orthogonal), tensors(1, a=(3, 2), bb=(4,), ccc=(2, 5, 3))
    moved, _ = run(rule, params, steps=1)
    for name, p in params.items():
        axes = (-2, -1) if p.ndim >= 2 else (-1,)
        mean_square = (moved[name] - p).square().mean(axes)
        torch.testing.assert_close(mean_square, torch.ones_like(mean_square), rtol=1e-4, atol=0)


def test_the_derivative_of_loss_averages_survives_float32():
    """While the loss falls, if slowly, every average is its own minimum: what cancels must not be left as noise."""

    def derivative(dtype):
        losses = torch.linspace(2.0, 2.0 - 1e-5, 8, dtype=dtype, requires_grad=True)
        slots = init_loss_averages(losses)
        for t, loss in enumerate(losses):
            slots, features = average_losses(slots, at(t, 0, loss), torch.tensor(50))
        return torch.autograd.grad(features.sum() + slots["loss_means"].sum(), losses)[0].double()

    torch.testing.assert_close(derivative(torch.float32), derivative(torch.float64), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "name", "values"),
    [
        (VeLO, "loss_horizon", [0, 2.5, "10"]),
        (VeLO, "inits", [0, None]),
        (Celo, "hidden", [4, (0,)]),
        (Celo, "decays", [(1.0,), 0.9]),
        (Celo, "adafactor_decays", [(1.0, 0.9, 0.8), 0.9, (0.9,)]),
        (Celo2, "adafactor_decays", [(1.0, 0.9, 0.8), 0.9, (0.9,)]),
        (Celo2, "activation", ["gelu"]),
        (Celo2, "adam", ["vector", ("bias",)]),
        (Celo2, "weight_decay", [-0.1]),
    ],
)
def test_settings_that_make_no_sense_are_refused(rule, name, values):
    for value in values:
        with pytest.raises(ConfigurationError, match=rf"^{name}(\[\d\])?="):
            rule(**{name: value})
