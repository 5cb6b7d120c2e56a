"""The learned controller: at first it is the hand-made one, and whatever it learns, no scale of gradients matters."""

import math

import pytest
import torch
from tables import Shapes, generator, random_theta
from test_steered import tensors, trajectory
from torch import nn

from l2o.ops.controller import OF_RUN, OF_TENSOR, Seen, decide, init_decisions, init_seen
from l2o.optim import LearnedOptimizer
from l2o.rules import Steered
from l2o.tasks import ImageConv, Reparametrized, WordMLP
from l2o.types import Run
from l2o.unroll import expand_theta, sample_runs, unroll

LEARNED = Steered(controller="mlp")
every_network = pytest.mark.parametrize("rule", [LEARNED, Steered(controller="lstm")], ids=["mlp", "lstm"])


def learned(seed=3, size=1.0, rule=LEARNED):
    """θ with decisions, float32."""
    g = generator(seed)
    theta = rule.init_theta(g)
    return theta | {"decide_w1": size * torch.randn(theta["decide_w1"].shape, generator=g)}


def curves(family, rule, theta, lanes=2, steps=30):
    g = generator()
    with torch.no_grad():
        state = sample_runs(rule, expand_theta(theta, lanes), family, torch.full((lanes,), steps), g)
        state, losses = unroll(rule, expand_theta(theta, lanes), family, state, steps, g)
    return losses, state


@every_network
@pytest.mark.parametrize("family", [ImageConv(batch_size=8), WordMLP(batch_size=4, tied=False)], ids=["conv", "words"])
def test_at_first_it_is_the_hand_made_controller(family, rule):
    hand, start = (curves(family, each, each.init_theta(generator())) for each in (Steered(), rule))
    assert torch.equal(hand[0], start[0])
    assert all(torch.equal(t, start[1].opt.shared[name]) for name, t in hand[1].opt.shared.items())
    assert not torch.equal(hand[0], curves(family, rule, learned(rule=rule))[0])


@every_network
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_loss_does_not_matter(scale, rule):
    grads = [tensors(seed, torch.float32) for seed in range(1, 9)]
    scaled = [{k: scale * g for k, g in each.items()} for each in grads]
    start, theta = tensors(0, torch.float32), learned(rule=rule)
    plain, other = (trajectory(rule, each, params=start, theta=theta)[0] for each in (grads, scaled))
    for a, b in zip(plain, other, strict=True):
        for name, u in a.items():
            torch.testing.assert_close(u, b[name], rtol=1e-3, atol=1e-7)


@every_network
def test_other_units_of_parameters_are_no_end_of_a_run(rule):
    family = Reparametrized(ImageConv(batch_size=16), per="tensor")
    for seed in range(3):
        losses, _ = curves(family, rule, learned(seed, rule=rule), lanes=6, steps=60)
        assert losses.isfinite().all()
        assert (losses[-10:].mean(0) < 1.5 * losses[0]).all()


def test_decisions_are_bounded_whatever_is_seen():
    theta = learned(size=100.0)
    big = torch.tensor([1e30, -1e30, 0.0, 1.0])
    seen, slots = Seen(big.clamp(-1, 1), big.abs(), big.abs()), dict.fromkeys(("near", "far", "factor"), torch.zeros(4))
    shared = {name: torch.ones(()) for name in ("fast", "slow", "square", "long", "log_step")}
    for step in (0, 10, 10_000):
        growth, new = decide(theta, shared, seen, slots, [(3, 5)] * 4, Run(torch.tensor(step), torch.tensor(100)))
        assert growth.isfinite().all()
        assert (new["factor"].abs() <= 1.5).all()


def test_the_network_has_as_many_inputs_as_are_named_and_one_slot_each_for_its_memory():
    theta = init_decisions(generator(), "mlp")
    assert theta["decide_w0"].shape == (len(OF_TENSOR) + len(OF_RUN), 16)
    assert not theta["decide_w1"].any()
    assert init_seen(torch.ones(2, 3), "mlp").keys() == {"near", "far", "factor"}
    assert init_seen(torch.ones(2, 3), "lstm").keys() == {"near", "far", "factor", "h", "c"}


def test_a_tensors_factor_is_that_of_its_step():
    grads = [tensors(1)] * 40
    theta = LEARNED.init_theta(generator())
    theta["decide_b1"] = torch.tensor([0.0, 0.5])
    plain, (_, state) = trajectory(LEARNED, grads, total=1000)[0], trajectory(LEARNED, grads, theta=theta, total=1000)
    steps = trajectory(LEARNED, grads, theta=theta, total=1000)[0]
    bound = 1.5 * math.tanh(0.5 / 1.5)
    factor = state.per_param["vector"]["factor"].item()
    assert factor == pytest.approx(bound * (1 - 0.9**40), rel=1e-4)
    ratio = steps[-1]["vector"] / plain[-1]["vector"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.exp(factor)), rtol=1e-3, atol=0.0)


def test_all_tensors_say_how_the_step_grows():
    theta = LEARNED.init_theta(generator())
    theta["decide_b1"] = torch.tensor([10.0, 0.0])
    noise = [tensors(seed) for seed in range(1, 51)]
    assert trajectory(LEARNED, noise, theta=theta, total=1000)[1].shared["log_step"] > 49 * 0.03 * 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_go_on_past_their_end_with_late_frozen_and_scalar_parameters(dtype):
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((3, 4), (), (5,), (4, 3), (2, 2))]
    params[4].requires_grad_(False)
    optimizer = LearnedOptimizer([p for p in params if p.requires_grad], (LEARNED, learned()), total_steps=4)

    def steps(first, last):
        for step in range(first, last):
            for p in params[: 2 + step // 3]:
                p.grad = torch.randn(p.shape, generator=generator(step)).to(dtype)
            optimizer.step()

    steps(0, 4)
    with pytest.warns(UserWarning, match="step 5 of a run of total_steps=4"):
        steps(4, 9)
    assert all(p.isfinite().all() for p in params)


def test_the_whole_update_can_be_differentiated():
    """In the network's last layer, against finite differences; float64."""
    family, theta = Shapes(), random_theta(LEARNED)
    name = "decide_w1"

    def total(w):
        lanes = expand_theta(theta, 2) | {name: w.expand(2, *w.shape)}
        state = sample_runs(LEARNED, lanes, family, torch.tensor([9, 9]), generator())
        return unroll(LEARNED, lanes, family, state, 5, generator())[1].sum()

    w = theta[name].clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(total(w), w)
    way = torch.randn(w.shape, generator=generator(1), dtype=w.dtype)
    with torch.no_grad():
        difference = (total(w + 1e-5 * way) - total(w - 1e-5 * way)) / 2e-5
    torch.testing.assert_close((by_autograd * way).sum(), difference, rtol=1e-4, atol=1e-8)
