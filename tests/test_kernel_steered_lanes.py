"""The kernel of Steered updates of lanes, each with its own θ and at its own step, as the rule's update of each."""

import dataclasses

import pytest
import torch
from steered_rules import every_direction
from tables import generator, identical
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map_only

import l2o.fused
from l2o.kernels import steered
from l2o.ops.kinds import infos_of, lane_infos
from l2o.rules import Steered
from l2o.tasks import Quadratic
from l2o.types import InnerState, OptState, Run
from l2o.unroll import expand_theta, inner_step, sample_runs, unroll, updates

SHAPES = {"scalar": (), "vector": (5,), "row": (1, 7), "matrix": (30, 41), "conv": (7, 3, 2, 2), "empty": (0, 3)}
SHAPES |= {"tall": (90, 20), "wide": (6, 150), "zeros": (6, 5)}
KINDS = {"tall": "embedding"}
LANES = 3


def draws(seed, scale=1.0):
    """One matrix begins as zeros."""
    g = generator(seed)
    drawn = {name: scale * torch.randn(LANES, *shape, generator=g) for name, shape in SHAPES.items()}
    return drawn if seed else drawn | {"zeros": torch.zeros_like(drawn["zeros"])}


def gradients(step):
    """Without an entry, once without any, and of one matrix only later."""
    grads = draws(100 + step, scale=0.0 if step == 3 else 1e-3)
    grads["matrix"][:, 2, 3] = 0.0
    grads["zeros"] *= step > 1
    return grads


def started(rule):
    """θ of lanes that differ, parameters, and the state of runs that begin."""
    g, params = generator(), draws(0, scale=0.1)
    theta = expand_theta(rule.init_theta(g), LANES)
    theta = {name: t + 0.05 * torch.randn(t.shape, generator=g) for name, t in theta.items()}
    infos = lane_infos(params, KINDS)
    return theta, params, vmap(lambda th, p: rule.init(th, p, infos))(theta, params)


def reference(rule, theta, grads, state, params, run):
    """Return ``update`` of all lanes by the rule itself."""
    infos = lane_infos(params, KINDS)
    return vmap(lambda *args: rule.update(*args[:4], infos, Run(*args[4:])))(theta, grads, state, params, *run[:3])


def clock(step):
    losses = torch.tensor([3.0, 2.0, 1.0]) / (step + 1)
    return Run(torch.tensor([step, step + 1, step + 4]), torch.tensor([60, 80, 200]), losses)


def settled(rule, steps=60):
    """Lanes whose bases are full: before, rounding has a say in them, which second moments amplify."""
    theta, params, state = started(rule)
    for step in range(steps if rule.direction == "eigenbasis" else 2):
        moves, state = reference(rule, theta, gradients(step), state, params, clock(step))
        params = {name: p + moves[name] for name, p in params.items()}
    return theta, params, state


def kernel(rule, theta, grads, state, params, run):
    return l2o.fused.update(rule, theta, grads, state, params, run, lane_infos(params, KINDS))


@every_direction
@torch.no_grad()
def test_updates_of_lanes_are_those_of_the_rule(rule):
    if rule.direction == "eigenbasis":
        rule = dataclasses.replace(rule, widest=200)
    theta, params, state = settled(rule)
    if any(rule.path(shape) == "orthogonal" for shape in SHAPES.values()):
        assert kernel(rule, theta, gradients(0), state, params, clock(0)) is None
        return
    new, expected = state, state
    for step in range(60, 64):
        before = tree_map_only(torch.Tensor, torch.clone, (new, params))
        args = gradients(step), new, params, clock(step)
        moves, new = kernel(rule, theta, *args)
        assert identical(before, (args[1], params))  # nothing that came is written to
        wanted, expected = reference(rule, theta, gradients(step), expected, params, clock(step))
        torch.testing.assert_close(moves, wanted, rtol=1e-3, atol=2e-5)
        params = {name: p + wanted[name] for name, p in params.items()}
    torch.testing.assert_close(new.shared, expected.shared, rtol=1e-2, atol=1e-5)
    for name, slots in expected.per_param.items():
        for slot, want in slots.items():
            atol = (1e-2 if slot in ("rows", "columns") else 1e-3) * want.abs().max().item() if want.numel() else 0.0
            torch.testing.assert_close(new.per_param[name][slot], want, rtol=1e-3, atol=atol)


def test_a_network_that_reads_the_loss_of_lanes_does():
    test_updates_of_lanes_are_those_of_the_rule(Steered(direction="diagonal", controller="mlp", reads_loss=True))


@every_direction
@torch.no_grad()
def test_a_parameter_that_is_not_finite_has_a_finite_update(rule):
    """As the rule's own: it counts as one of no size."""
    if rule.direction == "eigenbasis":
        rule = dataclasses.replace(rule, widest=200)
    theta, params, state = settled(rule)
    params["matrix"][1, 0, 0] = float("nan")
    found = kernel(rule, theta, gradients(60), state, params, clock(60))
    assert (found is None) == (rule.direction == "orthogonal")
    if found is not None:
        wanted, _ = reference(rule, theta, gradients(60), state, params, clock(60))
        assert all(t.isfinite().all() for t in wanted.values())
        torch.testing.assert_close(found[0], wanted, rtol=1e-3, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("wrong", [{"log_step": torch.zeros(1)}, {}, None])
def test_what_the_controller_keeps_is_measured(wrong):
    rule = Steered(direction="diagonal")
    theta, params, state = started(rule)
    shared = {**state.shared, **wrong} if wrong else {"log_step": torch.zeros(LANES)} if wrong is None else {}
    found = kernel(rule, theta, gradients(0), OptState(state.per_param, shared), params, clock(0))
    assert (found is None) == (wrong != {})


@torch.no_grad()
def test_a_lane_that_is_not_finite_spoils_no_other():
    rule = Steered(direction="eigenbasis", widest=200, carried=True)
    theta, params, state = settled(rule, 3)
    grads = gradients(3)
    clean, _ = kernel(rule, theta, grads, state, params, clock(3))
    grads["matrix"][1, 0, 0] = float("nan")
    moves, new = kernel(rule, theta, grads, state, params, clock(3))
    for name in SHAPES:
        assert moves[name][1].isnan().all()
        assert all(torch.equal(moves[name][lane], clean[name][lane]) for lane in (0, 2))
    assert new.shared["log_step"][1].isnan()


@torch.no_grad()
def test_the_number_of_threads_changes_no_bit(monkeypatch):
    monkeypatch.setattr(steered, "_WORTH_THREADS", 0)
    rule, before, found = Steered(direction="eigenbasis", widest=200, carried=True), torch.get_num_threads(), []
    theta, params, state = settled(rule, 3)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(kernel(rule, theta, gradients(9), state, params, clock(3)))
    finally:
        torch.set_num_threads(before)
    assert identical(*found)


@pytest.mark.parametrize("what", ["derivatives", "float64", "network", "shape"])
def test_what_the_kernel_cannot_take_is_left_to_torch(what):
    rule = Steered(direction="diagonal", network=what == "network")
    theta, params, state = started(rule)
    grads = gradients(0)
    if what == "shape":
        grads["matrix"] = grads["matrix"][:, :-1]
    if what == "float64":
        theta, params, state, grads = tree_map_only(torch.Tensor, torch.Tensor.double, (theta, params, state, grads))
    with torch.set_grad_enabled(what == "derivatives"):
        assert kernel(rule, theta, grads, state, params, clock(0)) is None


@torch.no_grad()
@pytest.mark.parametrize(("columns", "taken"), [(1024, True), (1025, False)])
def test_matrices_too_wide_for_a_basis_are_left_to_torch(columns, taken):
    rule, params = Steered(direction="eigenbasis"), {"x": torch.randn(2, 2, columns, generator=generator())}
    theta = expand_theta(rule.init_theta(generator()), 2)
    state = vmap(lambda th, p: rule.init(th, p, lane_infos(params)))(theta, params)
    run = Run(torch.ones(2, dtype=torch.long), torch.full((2,), 9))
    assert (l2o.fused.update(rule, theta, params, state, params, run) is not None) == taken


@every_direction
@torch.no_grad()
def test_steps_in_place_are_updates_and_leave_other_lanes_alone(rule):
    if rule.direction == "eigenbasis":
        rule = dataclasses.replace(rule, widest=200)
    theta, *found = settled(rule)
    params, state = l2o.fused.copied(found)
    before = l2o.fused.copied((params, state))
    found = kernel(rule, theta, gradients(60), state, params, clock(60))
    ahead = torch.tensor([True, False, True])
    inputs = l2o.fused.Inputs(theta, gradients(60), state, params, lane_infos(params, KINDS), clock(60))
    assert l2o.fused.step_lanes(rule, inputs, ahead) == (found is not None)
    if found is None:
        assert identical((params, state), before)
        return
    moves, new = found
    after = {name: before[0][name] + moves[name] for name in params}, new
    for now, moved, old in zip(*map(tree_leaves, ((params, state), after, before)), strict=True):
        torch.testing.assert_close(now[[0, 2]], moved[[0, 2]], rtol=1e-6, atol=1e-7)
        assert torch.equal(now[1], old[1])


@pytest.fixture
def in_place(monkeypatch):
    """Whether each step of an unroll was taken in place, in their order."""
    taken, kernels = [], dict(l2o.fused.LANE_STEPS)
    monkeypatch.setitem(l2o.fused.LANE_STEPS, Steered, lambda *args: taken.append(kernels[Steered](*args)) or taken[-1])
    return taken


@torch.no_grad()
def test_an_unroll_in_place_keeps_what_it_was_given_and_is_its_steps(in_place):
    rule, family, g = Steered(direction="eigenbasis", period=3, carried=True), Quadratic(), generator()
    theta = expand_theta(rule.init_theta(g), LANES)
    state = sample_runs(rule, theta, family, torch.tensor([2, 5, 9]), g)
    state, _ = unroll(rule, theta, family, state, 1, generator(1))
    before = tree_map_only(torch.Tensor, torch.clone, state)
    after, losses = unroll(rule, theta, family, state, 6, generator(2))
    assert identical(state, before)
    assert in_place == [True] * 7
    g = generator(2)
    for loss in losses:
        state, own = inner_step(rule, theta, family, state, family.batch(state.data, "train", g))
        torch.testing.assert_close(loss, own)
    torch.testing.assert_close(after.params, state.params)
    assert torch.equal(after.step, state.step)
    assert len(in_place) == 7


class Remembering(Quadratic):
    """Keeps the last iterate in its buffers, in the memory of the parameters, and stays near it."""

    def init(self, data, generator):
        params, _ = super().init(data, generator)
        return params, {"last": params["x"].clone()}

    def loss(self, params, buffers, data, batch):
        near = (params["x"] - buffers["last"]).square().sum()
        return super().loss(params, {}, data, batch)[0] + 0.1 * near, {"last": params["x"]}


@torch.no_grad()
def test_a_step_in_place_leaves_buffers_as_they_were(in_place):
    rule, family, g = Steered(direction="diagonal"), Remembering(), generator()
    theta = expand_theta(rule.init_theta(g), LANES)
    state = sample_runs(rule, theta, family, torch.full((LANES,), 9), g)
    after, _ = unroll(rule, theta, family, state, 5, generator(2))
    before, _ = unroll(rule, theta, family, state, 4, generator(2))
    assert in_place == [True] * 9
    torch.testing.assert_close(after.buffers["last"], before.params["x"])
    assert not torch.equal(after.buffers["last"], after.params["x"])


@torch.no_grad()
def test_the_engine_takes_the_kernel_and_knows_kinds(monkeypatch):
    rule, taken, kernels = Steered(direction="diagonal", tables=True, rows=2.0), [], dict(l2o.fused.UPDATES)
    monkeypatch.setitem(l2o.fused.UPDATES, Steered, lambda *args: taken.append(args[-1]) or kernels[Steered](*args))
    theta, params, state = started(rule)
    inner = InnerState({}, params, {}, state, *clock(0)[:2], torch.zeros(LANES))
    moves, new = updates(rule, theta, gradients(0), inner, torch.zeros(LANES), KINDS)
    wanted, _ = reference(rule, theta, gradients(0), state, params, clock(0))
    torch.testing.assert_close(moves, wanted, rtol=1e-4, atol=1e-6)
    assert isinstance(new, OptState)
    assert taken == [infos_of({name: p[0] for name, p in params.items()}, KINDS)]
