"""Kernels agree with the formulas they restate, in values and in gradients, and give the same bits on any threads."""

import pytest
import torch
from tables import generator
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from l2o.rules import MLP
from l2o.types import Clock, OptState

SHAPES = {"scalar": (), "vector": (5,), "matrix": (33, 70), "conv": (2, 3, 3, 5), "empty": (0, 3)}  # one of two pieces
RULES = {
    "default": MLP(),
    "steps": MLP(time="steps", step_mult=0.001, exp_mult=0.001),
    "small": MLP(hidden=(8, 8)),
    "one": MLP(hidden=(5,), decays=(0.9,)),
    "deep": MLP(hidden=(7, 33, 3), decays=()),
    "linear": MLP(hidden=()),
}
every_network = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


@pytest.fixture(params=[1, 2], ids="{}-threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def arguments(rule, lanes, dtype=torch.float32, seed=0):
    """What an update takes in the middle of a run: all of it random, tensors of very different scales."""
    g = generator(seed)

    def randn(*shape, scale=1.0):
        return (scale * torch.randn(lanes, *shape, generator=g)).to(dtype)

    # Not a large scalar: the rule does not see its scale, so that its gradient is 0 but for cancellation.
    scales = {"scalar": 3e-3, "vector": 1.0, "matrix": 1e3, "conv": 1e-8, "empty": 1.0}
    theta = {k: (t + 0.05 * randn(*t.shape)).to(dtype) for k, t in rule.init_theta(g).items()}
    params, grads = ({k: randn(*s, scale=scales[k]) for k, s in SHAPES.items()} for _ in range(2))
    slots = {k: {"m": randn(len(rule.decays), *s, scale=scales[k])} for k, s in SHAPES.items()}
    clock = Clock(torch.randint(10, (lanes,), generator=g), torch.randint(10, 90, (lanes,), generator=g))
    return theta, grads, OptState(slots, {}), params, clock


def reference(rule, *args):
    return vmap(rule.update)(*args)


def fused(rule, *args):
    result = rule.fused_update(*args, None)
    assert result is not None
    return result


def as_double(tree):
    return tree_map(lambda t: t.double() if t.is_floating_point() else t, tree)


def assert_close(got, want, rtol):
    """Each tensor in every lane, relative to its largest entry there."""
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        assert a.shape == b.shape
        for lane, expected in enumerate(b):
            if expected.numel():
                torch.testing.assert_close(a[lane].double(), expected, rtol=0, atol=rtol * expected.abs().max().item())


@every_network
@pytest.mark.parametrize("lanes", [1, 3])
def test_the_mlp_kernel_is_the_mlp_rule(rule, lanes, threads):
    args = arguments(rule, lanes)
    with torch.no_grad():
        assert_close(fused(rule, *args), reference(rule, *as_double(args)), rtol=5e-6)


def gradients(update, rule, args):
    """Of a random combination of all outputs, by every input that can have a gradient."""
    args = tree_map(lambda t: t.detach().requires_grad_() if t.is_floating_point() else t, args)
    g, inputs = generator(9), [t for t in tree_leaves(args) if t.requires_grad]
    outputs = tree_leaves(update(rule, *args))
    weights = [
        torch.randn(t.shape, generator=g).to(t.dtype) / t.detach().abs().max() if t.numel() else t for t in outputs
    ]
    objective = sum((t * w).sum() for t, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(objective, inputs, materialize_grads=True)


@every_network
@pytest.mark.parametrize("lanes", [1, 3])
def test_the_mlp_kernel_has_the_derivative_of_the_mlp_rule(rule, lanes, threads):
    args = arguments(rule, lanes)
    assert_close(gradients(fused, rule, args), gradients(reference, rule, as_double(args)), rtol=1e-4)
