"""The direction in an eigenbasis: what it comes to, what it keeps, and when the basis follows."""

import pytest
import torch
from tables import generator
from torch.autograd import forward_ad
from torch.func import vmap

from l2o.ops.eigenbasis import Whitening, due_at, init_basis, into_basis, is_due, whiten
from l2o.ops.kinds import infos_of
from l2o.ops.moments import Shares
from l2o.optim import LearnedOptimizer
from l2o.rules import Steered
from l2o.types import Run

KEEP = torch.tensor(0.9, dtype=torch.float64)
NO_MOMENTUM = Shares(torch.tensor(0.0), torch.tensor(1.0))
HOW = Whitening(NO_MOMENTUM, KEEP)


def whitened(grads, **how):
    """The last direction, and the slots; gradients ``[rows, columns]`` are their own momentum."""
    slots = {name: t.unsqueeze(0) for name, t in init_basis(grads[0], grads[0].shape).items()}
    for g in grads:
        direction, slots = whiten(HOW._replace(**how), g.unsqueeze(0), slots)
    return direction[0], {name: t[0] for name, t in slots.items()}


@pytest.mark.parametrize("shape", [(5, 5), (4, 7), (7, 4)])
def test_of_one_gradient_again_and_again_it_is_the_polar_factor(shape):
    """The basis becomes that of the singular vectors, in which the gradient is diagonal: all values become one."""
    g = torch.randn(shape, generator=generator(), dtype=torch.float64)
    direction, _ = whitened([g] * 300)
    left, _, right = torch.linalg.svd(g, full_matrices=False)
    torch.testing.assert_close(direction, left @ right, rtol=0.0, atol=2e-3)


def test_bases_stay_orthogonal_and_moments_are_those_in_the_basis():
    grads = [torch.randn(4, 6, generator=generator(i), dtype=torch.float64) for i in range(20)]
    _, slots = whitened(grads)
    for side in ("rows", "columns"):
        torch.testing.assert_close(slots[side].mT @ slots[side], torch.eye(len(slots[side]), dtype=torch.float64))
    mean = sum(0.9 ** (19 - i) * 0.1 * g @ g.mT for i, g in enumerate(grads))
    torch.testing.assert_close(slots["left"], mean)


def test_directions_without_a_gradient_are_not_made_as_long_as_those_with_one():
    """A gradient of rank one, in float32: its rounding is not to be whitened to size one."""
    row, column = (torch.randn(n, generator=generator(n)) for n in (40, 30))
    direction, _ = whitened([torch.outer(row, column)] * 50)
    values = torch.linalg.svdvals(direction)
    assert values[1] < 0.4 * values[0]
    assert values[2:].max() < 0.3 * values[0]


def test_no_gradient_no_direction():
    direction, slots = whitened([torch.zeros(3, 4)])
    assert not direction.any()
    assert all(t.isfinite().all() for t in slots.values())


def test_a_basis_that_is_not_due_stays():
    g = torch.randn(3, 4, generator=generator())
    _, slots = whitened([g] * 3, due=False)
    assert torch.equal(slots["rows"], torch.eye(3))
    _, follows = whitened([g] * 3, due=torch.tensor(True))
    _, always = whitened([g] * 3)
    torch.testing.assert_close(follows, always)


def test_second_moments_follow_the_basis():
    """They are the variances that entries of these second moments, which do not correlate, have in the new basis."""
    grads = [torch.randn(3, 4, generator=generator(i), dtype=torch.float64) for i in range(6)]
    _, old = whitened(grads[:3])
    slots = {name: t.unsqueeze(0) for name, t in old.items()}
    slots |= {"left": (grads[4] @ grads[4].mT).unsqueeze(0), "right": (grads[5].mT @ grads[5]).unsqueeze(0)}
    nothing, keep = torch.zeros(1, 3, 4, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    how = Whitening(NO_MOMENTUM, keep, carried=True)
    _, stays = whiten(how._replace(due=torch.tensor(False)), nothing, slots)
    assert torch.equal(stays["v"], slots["v"])
    _, new = whiten(how, nothing, slots)
    rows, columns = (old[side].mT @ new[side][0] for side in ("rows", "columns"))
    expected = torch.einsum("ia,jb,ij->ab", rows**2, columns**2, old["v"])
    torch.testing.assert_close(new["v"][0], expected)
    assert (new["v"][0] - old["v"]).abs().max() > 0.1 * old["v"].max()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own, of forward mode
def test_forward_mode_takes_bases_as_they_are():
    rule = Steered(direction="eigenbasis", period=1)
    theta, params = rule.init_theta(generator()), {"w": torch.randn(4, 5, generator=generator())}
    state = rule.init(theta, params, infos_of(params))

    def update(g):
        run = Run(torch.tensor(0), torch.tensor(9), called=0)
        return rule.update(theta, {"w": g}, state, params, infos_of(params), run)[0]["w"]

    g, tangent = (torch.randn(4, 5, generator=generator(seed)) for seed in (1, 2))
    with forward_ad.dual_level():
        forward = forward_ad.unpack_dual(update(forward_ad.make_dual(g, tangent))).tangent
    _, pull = torch.func.vjp(update, g)
    weights = torch.randn(4, 5, generator=generator(3))
    torch.testing.assert_close((weights * forward).sum(), (pull(weights)[0] * tangent).sum())


def test_looks_become_rarer_to_the_period():
    found = [step for step in range(24) if due_at(step, 4, pace=5)]
    assert found == [*range(10), 10, 12, 14, 15, 18, 20]
    assert [step for step in range(24) if due_at(torch.tensor(step), 4, pace=5)] == found


def test_the_rule_looks_when_it_says_that_a_step_is_unusual():
    rule = Steered(direction="eigenbasis", period=4, pace=5)
    theta, params = rule.init_theta(generator()), {"w": torch.randn(4, 5, generator=generator())}
    state, looked = rule.init(theta, params, infos_of(params)), []
    for step in range(24):
        grads, before = {"w": torch.randn(4, 5, generator=generator(step))}, state.per_param["w"]["rows"]
        run = Run(torch.tensor(step), torch.tensor(99), called=step)
        _, state = rule.update(theta, grads, state, params, infos_of(params), run)
        looked.append(not torch.equal(state.per_param["w"]["rows"], before))
    assert looked == [not rule.is_usual(step) for step in range(24)]
    assert not all(looked[10:])


def test_due_is_what_the_host_knows_or_what_all_lanes_say():
    total = torch.tensor(50)
    assert [is_due(Run(torch.tensor(i), total), 5) for i in (0, 4, 10)] == [True, False, True]
    assert is_due(Run(torch.tensor(3), total, called=5), 5) is True
    assert is_due(Run(torch.tensor(5), total, called=6), 5) is False
    said = []

    def lane(step):
        said.append(is_due(Run(step, total), 5))
        return step + torch.as_tensor(said[-1]).long()

    vmap(lane)(torch.tensor([5, 10]))
    vmap(lane)(torch.tensor([1, 2]))
    assert vmap(lane)(torch.tensor([5, 6])).tolist() == [6, 6]
    assert said[0] is True
    assert said[1] is False
    assert isinstance(said[2], torch.Tensor)


def test_lanes_at_different_steps_follow_each_at_its_own():
    rule = Steered(direction="eigenbasis", period=3)
    theta = rule.init_theta(generator())
    params = {"w": torch.randn(4, 5, generator=generator())}
    infos, state = infos_of(params), rule.init(theta, params, infos_of(params))
    grads = {"w": torch.randn(4, 5, generator=generator(1))}

    def rows(step):
        return rule.update(theta, grads, state, params, infos, Run(step, torch.tensor(9)))[1].per_param["w"]["rows"]

    steps = torch.tensor([3, 4])
    torch.testing.assert_close(vmap(rows)(steps), torch.stack([rows(step) for step in steps]))


def test_wide_matrices_are_orthogonalised():
    rule = Steered(direction="eigenbasis", widest=8)
    assert [rule.path(shape) for shape in ((8, 8), (8, 9), (9, 2), (1, 8), (8,))] == [
        "eigenbasis",
        "orthogonal",
        "orthogonal",
        "adam",
        "adam",
    ]


@pytest.mark.parametrize("shape", [(6,), (1, 6), (6, 1)])
def test_a_turned_vector_keeps_the_size_that_second_moments_leave(shape):
    """Of one gradient again and again it has a length of one, where a root mean square of one would be 6 ** 0.5."""
    rule = Steered(direction="eigenbasis", turned=6, controller="none", schedule="constant", warmup=1e-6)
    params = {"x": torch.zeros(shape, dtype=torch.float64)}
    theta = {name: t.double() for name, t in rule.init_theta(generator()).items()}
    infos, state = infos_of(params), rule.init(theta, params, infos_of(params))
    g = {"x": torch.randn(shape, generator=generator(), dtype=torch.float64)}
    for step in range(200):
        update, state = rule.update(theta, g, state, params, infos, Run(torch.tensor(step), torch.tensor(500)))
    torch.testing.assert_close(update["x"], -rule.lr * g["x"] / g["x"].norm(), rtol=1e-3, atol=1e-6)
    assert len(state.per_param["x"]) == 5  # m, d, v, and of the one side that there is, product and basis


def test_short_vectors_are_turned():
    rule = Steered(direction="eigenbasis", turned=6)
    shapes = ((6,), (1, 6), (6, 1), (7,), (1,), ())
    assert [rule.path(shape) for shape in shapes] == [*["eigenbasis"] * 3, *["adam"] * 3]
    assert Steered(turned=6).path((6,)) == "adam"


@pytest.mark.parametrize("turned", [0, 8])
def test_a_turned_vector_gets_down_a_bowl_that_lies_askew(turned):
    """Of condition 1e4. Adam's steps go along axes, of which none is the bowl's."""
    basis, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator(), dtype=torch.float64))
    bowl = basis @ torch.diag(torch.logspace(-4, 0, 8, dtype=torch.float64)) @ basis.mT
    x = {"x": torch.ones(8, dtype=torch.float64)}
    optimizer = LearnedOptimizer([x["x"].requires_grad_()], turned_rule(turned), total_steps=400)
    first = 0.5 * x["x"] @ bowl @ x["x"]
    for _ in range(400):
        optimizer.zero_grad()
        loss = 0.5 * x["x"] @ bowl @ x["x"]
        loss.backward()
        optimizer.step()
    assert (loss / first < 1e-7) == (turned > 0)


def turned_rule(turned):
    rule = Steered(direction="eigenbasis", turned=turned, lr=0.01, power=2.0)
    return rule, rule.init_theta(generator())


@pytest.mark.parametrize(("power", "factor"), [(0.0, 1.0), (1.0, 0.1), (2.0, 0.01)])
def test_the_limit_of_a_step_falls_with_the_gain_of_its_matrix(power, factor):
    """A matrix of root mean square 0.05 and four inputs has a gain of 0.1; large ones have no more than one."""
    rule = Steered(by_gain=power, relative=1e-3)
    theta = rule.init_theta(generator())
    small, large = (
        rule.scales(theta, torch.tensor(1e9), torch.tensor([40 * x**2]), [(10, 4)], [False]) for x in (0.05, 5.0)
    )
    least = 3e-4 * (4.0 if power else 1.0)  # four inputs, not 64
    torch.testing.assert_close(small.item(), 1e-3 * 0.05 * factor + least, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(large.item(), 1e-3 * 5.0 + least, rtol=1e-4, atol=0.0)


def test_steps_fall_with_the_root_of_many_inputs():
    """Of matrices with their fan-in, of tables that move as vectors with a row's length."""
    few, many = (Steered(direction="eigenbasis", fan_in=0.0, tall=8, wide=wide) for wide in (0.0, 0.5))
    shapes = [(10, 64), (10, 256), (8, 16, 4, 4), (1100, 256), (5000, 256), (300,), ()]
    ratios = many.factors(many.init_theta(generator()), shapes) / few.factors(few.init_theta(generator()), shapes)
    torch.testing.assert_close(ratios, torch.tensor([1.0, 0.5, 0.5, 0.5, 0.5, 1.0, 1.0]))


@pytest.mark.parametrize("shape", [(5, 4), (3, 2, 2), (6,)])
def test_momentum_is_that_of_gradients_outside_the_basis(shape):
    """However often the basis has turned: it is kept inside, and follows."""
    rule = Steered(direction="eigenbasis", period=2, early=3, turned=8)
    params = {"w": 0.1 * torch.randn(shape, generator=generator(), dtype=torch.float64)}
    theta = {name: t.double() for name, t in rule.init_theta(generator()).items()}
    state, m = rule.init(theta, params, infos_of(params)), torch.zeros(shape, dtype=torch.float64)
    for step in range(9):
        grads = {"w": torch.randn(shape, generator=generator(step), dtype=torch.float64)}
        _, state = rule.update(theta, grads, state, params, infos_of(params), Run(torch.tensor(step), torch.tensor(20)))
        m = 0.9 * m + 0.1 * grads["w"]
    slots = state.per_param["w"]
    assert not torch.equal(slots["rows"], torch.eye(shape[0], dtype=torch.float64))
    older = {name: t for name, t in slots.items() if name != "turned"} | {"m": m}
    torch.testing.assert_close(into_basis(older)["turned"], slots["turned"], rtol=1e-5, atol=1e-7)


def test_a_part_of_an_older_momentum_stays_outside_the_basis():
    """A shard has the bases of the whole matrix, in which rows alone cannot be turned: loading says so."""
    shard = init_basis(torch.zeros(5, 4), (5, 4)) | {"m": torch.ones(3, 4)}
    assert into_basis(shard) is shard


def test_a_run_that_an_older_l2o_saved_goes_on():
    """It kept momentum outside the basis, as ``m``."""
    runs = []
    for old in (False, True):
        p = torch.nn.Parameter(torch.randn(6, 4, generator=generator()))
        optimizer = LearnedOptimizer([p], "default", total_steps=40)
        for step in range(30):
            if old and step == 25:
                saved = optimizer.state_dict()
                slots = saved["state"][0]
                slots["m"] = slots["rows"] @ slots.pop("turned") @ slots["columns"].mT
                optimizer = LearnedOptimizer([p], "default", total_steps=40)
                optimizer.load_state_dict(saved)
            p.grad = torch.randn(6, 4, generator=generator(step))
            optimizer.step()
        runs.append(p.detach())
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)
