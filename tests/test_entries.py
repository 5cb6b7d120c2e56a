"""The network over entries: at first it changes nothing, and whatever it learns keeps what a direction owes."""

import pytest
import torch
from tables import generator
from test_steered import tensors, trajectory

from l2o.ops.entries import init_entries, weigh
from l2o.rules import Steered

RULES = {
    "in the eigenbasis": Steered(direction="eigenbasis", network=True, turned=16, period=2),
    "alone": Steered(direction="diagonal", network=True),
    "before it is orthogonalised": Steered(direction="orthogonal", network=True),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def learned(theta, seed=3):
    """θ whose network has something to say."""
    g = generator(seed)
    return theta | {"entry_w1": 0.3 * torch.randn(theta["entry_w1"].shape, generator=g)}


def random_matrices(seed, *shape):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def test_a_network_that_has_learned_nothing_gives_the_momentum():
    theta = {name: t.double() for name, t in init_entries(generator()).items()}
    m, g, v = (random_matrices(seed, 2, 5, 3) for seed in range(3))
    torch.testing.assert_close(weigh(theta, m, g, v.square()), m)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_a_direction_turns_its_sign_with_its_entry_and_has_the_size_of_the_momentum(scale):
    theta = learned({name: t.double() for name, t in init_entries(generator()).items()})
    theta = {name: t.double() for name, t in theta.items()}
    m, g, v = (random_matrices(seed, 2, 5, 3) for seed in range(3))
    signs = random_matrices(4, 2, 5, 3).sign()
    want = weigh(theta, m, g, v.square())
    torch.testing.assert_close(weigh(theta, signs * m, signs * g, v.square()), signs * want)
    torch.testing.assert_close(weigh(theta, scale * m, g / scale, scale * v.square()), scale * want)
    assert not torch.allclose(want, m)


def test_an_entry_without_momentum_and_gradient_rests():
    theta = learned(init_entries(generator()))
    m, g = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    m[0, 0, 0] = 1.0
    moved = weigh(theta, m, g, torch.full((1, 2, 2), 1e-30))
    assert moved[0, 0, 0] != 0.0
    assert moved.flatten()[1:].eq(0.0).all()


@every_rule
def test_at_first_the_rule_is_the_one_without(rule):
    grads, start = [tensors(seed, torch.float32) for seed in range(1, 9)], tensors(0, torch.float32)
    theta = rule.init_theta(generator())
    got, _ = trajectory(rule, grads, params=start, theta=theta)
    moved, _ = trajectory(rule, grads, params=start, theta=learned(theta))
    plain = Steered(direction=rule.direction, turned=rule.turned, period=rule.period)
    want, _ = trajectory(plain, grads, params=start, theta=plain.init_theta(generator()))
    for a, b, other in zip(got, want, moved, strict=True):
        if rule.direction != "orthogonal":  # which has no second moments without a network
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
        assert any(not torch.allclose(u, other[name]) for name, u in a.items())


@every_rule
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_loss_does_not_matter(rule, scale):
    grads, start = [tensors(seed) for seed in range(1, 9)], tensors(0)
    theta = learned(rule.init_theta(generator()))
    scaled = [{k: scale * g for k, g in each.items()} for each in grads]
    plain, other = (trajectory(rule, each, params=start, theta=theta)[0] for each in (grads, scaled))
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-6)
