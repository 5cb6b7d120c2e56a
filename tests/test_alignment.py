"""The controller: the step grows where gradients agree, shrinks where it is sure that they do not, else it rests."""

import math

import pytest
import torch
from plugin import source
from sklearn.datasets import load_digits
from tables import generator
from torch import nn

from l2o.ops.alignment import begin, control, control_each, cosine, init_alignment, init_controller
from l2o.optim import LearnedOptimizer
from l2o.rules import Steered
from l2o.types import Run

T = 1000


def log_steps(cosines, theta=None, total=T):
    """``z`` after each of the ``cosines``, of the gradients at step 0, 1, ..."""
    theta = theta or {k: t.double() for k, t in init_controller(generator()).items()}
    slots, z = init_alignment(next(iter(theta.values()))), []
    for step, c in enumerate(cosines):
        c = torch.as_tensor(c, dtype=torch.float64)
        slots = control(theta, slots, c, Run(torch.tensor(step), torch.tensor(total)))
        z.append(slots["log_step"])
    return torch.stack(z)


def noise(mean, deviation, steps=T):
    return (mean + deviation * torch.randn(steps, generator=generator(), dtype=torch.float64)).tolist()


@pytest.mark.parametrize(
    ("cosines", "low", "high"),
    [
        ([0.9] * T, 2.0, 5.0),  # the step is far too small
        (noise(0.0, 0.03), -0.02, 0.02),  # nothing but noise
        (noise(0.0, 0.3), -0.2, 0.3),
        ([-0.9] * T, -5.0, -2.0),  # it bounces
        (noise(-0.1, 0.5), -0.1, 0.3),  # below zero, but that may be chance
        ([0.9] * 100 + [0.0] * 900, 0.0, 0.3),  # what the first steps made of it leaks away
    ],
    ids=["agree", "noise", "loud", "bounce", "unsure", "leak"],
)
def test_where_the_step_ends(cosines, low, high):
    assert low < log_steps(cosines)[-1] < high


def test_the_first_gradient_has_no_step_before_it():
    assert log_steps([1.0])[0] == 0.0
    assert log_steps([1.0, 1.0])[1] > 0.0


def test_the_first_move_is_the_formula():
    """At step 1 every mean is the cosine itself: 30 / T tanh(6 (c - 0.06)) (1 - 1 / T)."""
    expected = 30 / T * math.tanh(6 * (0.5 - 0.06)) * (1 - 1 / T)
    torch.testing.assert_close(log_steps([0.0, 0.5])[1].item(), expected, rtol=1e-6, atol=0.0)


def test_gains_scale_with_the_length_of_the_run():
    long, short = log_steps([0.5] * T), log_steps([0.5] * (T // 2), total=T // 2)
    torch.testing.assert_close(long[-1], short[-1], rtol=0.02, atol=0.0)


def test_the_step_stays_in_its_range_and_stands_still_after_the_run():
    theta = {k: t.double() for k, t in init_controller(generator()).items()}
    theta["log_gain"] = torch.tensor(9.0, dtype=torch.float64)
    assert log_steps([0.9] * 400, theta, total=1000).max() == pytest.approx(5.0)
    assert log_steps([-0.9] * 400, theta, total=1000).min() == pytest.approx(-5.0)
    still = log_steps([0.9] * 12, theta | {"log_leak": torch.tensor(-50.0, dtype=torch.float64)}, total=10)
    assert still[9] > 0.0
    assert torch.equal(still[10], still[11])


@pytest.mark.parametrize(
    ("name", "cosines"),
    [
        *((name, [0.0, 0.3, 0.1, 0.2]) for name in ("gain", "slope", "band_up", "fast", "slow", "leak")),
        *((name, [0.0, -0.2, -0.05, -0.11]) for name in ("band_down", "sure")),
        ("range", [0.9] * 400),
    ],
)
def test_every_constant_matters_as_finite_differences_say(name, cosines):
    theta = {k: t.double() for k, t in init_controller(generator()).items()}
    if name == "range":
        theta["log_range"] = torch.tensor(-1.0, dtype=torch.float64)

    def end(value):
        return log_steps(cosines, theta | {f"log_{name}": value})[-1]

    value = theta[f"log_{name}"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(end(value), value)
    numeric = (end(theta[f"log_{name}"] + 1e-6) - end(theta[f"log_{name}"] - 1e-6)) / 2e-6
    assert slope != 0.0
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-9)


def deep_slots(cosines, matrices=19, first=0):
    """The slots after each of the ``cosines``, from step ``first`` on, for a rule with ``deep=6``."""
    theta = {k: t.double() for k, t in init_controller(generator()).items()}
    slots, found = init_alignment(next(iter(theta.values())), deep=True), []
    for step, c in enumerate(cosines, first):
        begun = begin(slots, 6, torch.tensor(matrices, dtype=torch.float64))
        slots = control(theta, begun, torch.as_tensor(c, dtype=torch.float64), Run(torch.tensor(step), torch.tensor(T)))
        found.append(slots)
    return found


def missing(cosines, matrices=19):
    return torch.stack([slots["missing"] for slots in deep_slots(cosines, matrices)])


@pytest.mark.parametrize(("matrices", "share"), [(0, 1.0), (6, 1.0), (12, 0.25), (16, 0.140625), (19, 0.1), (600, 0.1)])
def test_a_deep_network_begins_with_a_small_step(matrices, share):
    torch.testing.assert_close(missing([0.0], matrices).exp().item(), share)


def test_who_comes_back_in_a_run_begins_with_a_small_step_too():
    (slots,) = deep_slots([0.0], first=400)
    torch.testing.assert_close(slots["missing"].item(), math.log(0.1) * (1 - 3 / T))
    known = begin(slots, 6, torch.tensor(7.0))  # what it was told then stays
    assert known["missing"] == slots["missing"]


def test_what_is_missing_comes_back_where_gradients_agree_and_else_leaks_away():
    begun = math.log(0.1)
    against, agreed = missing([-0.04] * T), missing([0.04] * T)
    torch.testing.assert_close(against[500].item(), begun * (1 - 3 / T) ** 500)
    assert agreed[100] == 0.0
    assert (agreed <= 0.0).all()
    assert against[100] < missing(noise(0.005, 0.01))[100] < -0.1  # it may be chance


def test_the_step_of_a_deep_network_moves_as_any():
    cosines = [0.0, 0.3, 0.1, -0.4]
    *_, last = deep_slots(cosines)
    assert last["missing"] < -1.0
    assert last["log_step"] == log_steps(cosines)[-1]


def test_the_cosine_weighs_tensors_and_is_0_without_gradients():
    dots, norms = torch.tensor([3.0, -1.0]), torch.tensor([4.0, 4.0])
    assert cosine(dots.sum(), norms.sum()) == 0.25
    assert cosine(torch.zeros(()), torch.zeros(())) == 0.0


def own_steps(cosines, held, steps=300, total=300):
    """``own`` after as many steps, of tensors whose ``cosines`` are the same at each, or drawn at each."""
    theta = {k: t.double() for k, t in init_controller(generator()).items()}
    theta["log_own"], own = torch.tensor(2.0, dtype=torch.float64).log(), torch.zeros(len(held), 4, dtype=torch.float64)
    for step in range(steps):
        own = control_each(theta, own, cosines(), torch.tensor(held), Run(torch.tensor(step), torch.tensor(total)))
    return own


def test_tensors_have_log_steps_of_their_own_by_the_same_formula():
    always = torch.tensor([0.9, 0.9, 0.0, -0.9], dtype=torch.float64)
    own = own_steps(lambda: always, [False, True, False, False], 60)
    assert own[:, 0].tolist() == pytest.approx([2.0, 1.0, 0.0, -2.0], abs=0.2)
    assert (own[0, 0] <= 2.0) & (own[1, 0] <= 1.0) & (own[2, 0] == 0.0)
    assert own[:, 2].tolist() == pytest.approx(always.tolist(), abs=0.1)


def test_a_tensor_that_is_not_sure_hardly_grows():
    g = generator()
    own = own_steps(lambda: 0.15 + 0.6 * torch.randn(2, generator=g, dtype=torch.float64), [False, False])
    assert (own[:, 0].abs() < 0.7).all()


@pytest.mark.parametrize("direction", ["eigenbasis", "diagonal"])
def test_a_bias_far_away_and_weights_nearby_learn_together(direction):
    """A regression on raw targets: without steps of its own the bias has as far to go as weights at the most."""
    g = generator()
    x, ends = torch.randn(64, 3, generator=g), {}
    y = 0.1 * x @ torch.ones(3, 1) + 3.0
    for own in (0.0, 2.0):
        rule = Steered(direction=direction, own=own)
        weight, bias = nn.Parameter(torch.zeros(1, 3)), nn.Parameter(torch.zeros(1))
        optimizer = LearnedOptimizer([weight, bias], source(rule), total_steps=200)
        for _ in range(200):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(x @ weight.T + bias, y)
            loss.backward()
            optimizer.step()
        ends[own] = loss.item()
    assert ends[2.0] < 0.3 * ends[0.0]


def test_default_learns_in_sixteen_layers_with_layer_norm():
    """It stayed at chance, 2.3 nats, when it began with the whole step."""
    images, labels = (torch.as_tensor(t).float() for t in load_digits(return_X_y=True))
    images, width = (images - images.mean()) / images.std(), 48
    torch.manual_seed(0)
    layers = [nn.Linear(64, width)]
    for outputs in [width] * 15 + [10]:
        layers += [nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, outputs)]
    model, losses = nn.Sequential(*layers), []
    optimizer = LearnedOptimizer(model.parameters(), "default", total_steps=300)
    for _ in range(300):
        chosen = torch.randint(len(images), (32,))
        losses.append(nn.functional.cross_entropy(model(images[chosen]), labels[chosen].long()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert torch.stack(losses[-15:]).mean() < 1.0
