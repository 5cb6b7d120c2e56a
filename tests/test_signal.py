"""Steps by how much of a gradient repeats: momentum that a gradient contradicts rests, noise makes steps small."""

import pytest
import torch
from tables import generator

from l2o.ops.eigenbasis import Whitening, init_basis, whiten
from l2o.ops.kinds import infos_of
from l2o.ops.moments import Shares
from l2o.ops.scales import tempered
from l2o.rules import Steered
from l2o.types import Run

SHAPE = (12, 9)


KEEP = torch.tensor(0.9)
AS_IT_IS = Whitening(Shares(torch.tensor(1.0), torch.tensor(0.0)), KEEP, due=False)
"""Momentum is what the slots have, and the basis stays."""


def slots_of(shape):
    return {name: t.unsqueeze(0) for name, t in init_basis(torch.zeros(shape), shape).items()}


def held_and_free(momentum, grad, slots):
    """The directions of ``momentum``, in the basis, that rests where ``grad`` contradicts it, and that does not."""
    held, new = whiten(AS_IT_IS._replace(cautious=True), grad, slots | {"turned": momentum})
    free, _ = whiten(AS_IT_IS, grad, slots | {"turned": momentum})
    return held, free, new


def test_in_the_basis_momentum_rests_where_the_gradient_contradicts_it():
    """In a basis that stays at first, which is that of entries."""
    momentum, grad = (torch.randn(1, *SHAPE, generator=generator(i)) for i in range(2))
    held, free, _ = held_and_free(momentum, grad, slots_of(SHAPE))
    against = momentum * grad < 0
    assert 0 < against.sum() < grad.numel()
    torch.testing.assert_close(held, torch.where(against, 0.0, free))


def test_in_a_basis_that_has_turned_it_is_its_axes_that_rest():
    generators = [generator(i) for i in range(8)]
    grads = [torch.randn(1, *SHAPE, generator=g) for g in generators]
    slots = slots_of(SHAPE)
    for g in grads[:6]:
        _, slots = whiten(AS_IT_IS._replace(due=True), g, slots)
    inside = {"momentum": slots["rows"].mT @ grads[6] @ slots["columns"]}
    held, free, new = held_and_free(inside["momentum"], grads[7], slots)
    inside |= {k: new["rows"].mT @ t @ new["columns"] for k, t in (("held", held), ("free", free), ("grad", grads[7]))}
    against = inside["momentum"] * inside["grad"] < 0
    torch.testing.assert_close(inside["held"], torch.where(against, 0.0, inside["free"]), rtol=0.0, atol=1e-5)
    assert (held * grads[7] < 0).any()  # an entry is not an axis


def test_momentum_goes_on_where_there_is_no_gradient():
    momentum, grad = torch.randn(1, *SHAPE, generator=generator()), torch.zeros(1, *SHAPE)
    held, free, _ = held_and_free(momentum, grad, slots_of(SHAPE) | {"v": torch.ones(1, *SHAPE)})
    assert held.all()
    assert torch.equal(held, free)


@pytest.mark.parametrize(("power", "size"), [(0.0, 1.0), (0.5, 2.0), (1.0, 4.0)])
def test_a_size_is_a_power_of_what_it_was(power, size):
    x = torch.randn(2, *SHAPE, generator=generator())
    x = 1.2 * x / x.square().mean((-2, -1), keepdim=True).sqrt()
    sized = tempered(x, power)
    torch.testing.assert_close(sized.square().mean((-2, -1)).sqrt(), torch.full((2,), size))
    torch.testing.assert_close(sized / sized[0, 0, 0], x / x[0, 0, 0])
    assert not tempered(torch.zeros(2, *SHAPE), power).any()


@pytest.mark.parametrize("scale", [1e-6, 1e6, 1e-25])
def test_momentum_rests_or_not_whatever_the_scale(scale):
    """Products of two small numbers would be none."""
    momentum, grad = (scale * torch.randn(1, *SHAPE, generator=generator(i)) for i in range(2))
    held, _, _ = held_and_free(momentum, grad, slots_of(SHAPE))
    assert torch.equal(held != 0, momentum.sign() == grad.sign())


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_gradients_does_not_matter(scale):
    rule = Steered(direction="eigenbasis", early=3, carried=True, cautious=True, by_signal=0.5)
    plain, scaled = (size_of(rule, lambda step, s=s: s * noise(step)) for s in (1.0, scale))
    assert scaled == pytest.approx(plain, rel=1e-3)


def size_of(rule, gradient):
    """Root mean square of the direction after 200 steps of ``gradient(step)``."""
    theta, params = rule.init_theta(generator()), {"w": torch.randn(SHAPE, generator=generator())}
    infos = infos_of(params)
    state = rule.init(theta, params, infos)
    for step in range(200):
        run = Run(torch.tensor(step), torch.tensor(10**6), None)
        _, state = rule.update(theta, {"w": gradient(step)}, state, params, infos, run)
    return float(state.per_param["w"]["d"].square().mean().sqrt())


def noise(step):
    return torch.randn(SHAPE, generator=generator(2 + step))


def test_steps_are_smaller_where_gradients_are_noise():
    """A gradient that repeats is its own momentum, and the root of its second moments."""
    rule = Steered(direction="diagonal", by_signal=0.5, controller="none")
    assert size_of(rule, lambda step: noise(0)) == pytest.approx((1 / 0.3) ** 0.5, rel=1e-3)
    assert 0.8 < size_of(rule, noise) < 1.1


def test_steps_are_smaller_where_few_directions_have_gradients():
    """In its basis a gradient that repeats has as many entries as its rank."""
    rule = Steered(direction="eigenbasis", by_signal=0.5, controller="none")
    for rank in (1, 4):
        left, right = torch.randn(12, rank, generator=generator()), torch.randn(rank, 9, generator=generator(1))
        expected = ((rank / 108) ** 0.5 / 0.3) ** 0.5
        assert size_of(rule, lambda step, g=left @ right: g) == pytest.approx(expected, rel=0.04)
