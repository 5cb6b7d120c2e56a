"""Kernels agree with the formulas they restate, in values and in gradients, and give the same bits on any threads."""

import pytest
import torch
from tables import generator, identical
from torch.autograd import forward_ad
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import l2o.fused
from l2o.estimators import Backprop
from l2o.fused import mlp
from l2o.rules import MLP
from l2o.tasks import ImageMLP
from l2o.types import OptState, Run
from l2o.unroll import expand_theta, sample_runs, unroll

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
    run = Run(torch.randint(10, (lanes,), generator=g), torch.randint(10, 90, (lanes,), generator=g))
    return theta, grads, OptState(slots, {}), params, run


def reference(rule, *args):
    return mlp.reference(rule, *args)


def fused(rule, *args):
    result = l2o.fused.update(rule, *args)
    assert result is not None
    return result


def as_double(tree):
    return tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, tree)


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
    args = tree_map_only(torch.Tensor, lambda t: t.detach().requires_grad_() if t.is_floating_point() else t, args)
    g, inputs = generator(9), [t for t in tree_leaves(args) if getattr(t, "requires_grad", False)]
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


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("sizes", [(32, 1, 128), (7, 3, 5), (1, 0, 1), (50, 2, 9)], ids=str)
@pytest.mark.parametrize("lanes", [1, 3])
def test_the_perceptron_kernel_is_the_gradient_of_the_loss(activation, sizes, lanes, threads):
    width, depth, batch_size = sizes
    family, g = ImageMLP(width=width, depth=depth, activation=activation, batch_size=batch_size), generator()
    data = family.sample(g, lanes)
    params = {k: 3 * p for k, p in family.init(data, g)[0].items()}
    batch = family.batch(data, "train", g)
    losses, buffers, grads = l2o.fused.gradient(family, params, {}, data, batch)
    leaves = {k: p.double().requires_grad_() for k, p in params.items()}
    want, _ = vmap(family.loss)(leaves, {}, data, batch)
    assert buffers == {}
    assert list(grads) == list(params)
    assert_close(losses.unsqueeze(1), want.detach().unsqueeze(1), rtol=2e-6)
    assert_close(
        grads, dict(zip(leaves, torch.autograd.grad(want.sum(), list(leaves.values())), strict=True)), rtol=1e-5
    )


def test_the_same_bits_on_any_number_of_threads():
    rule, family, results = MLP(), ImageMLP(width=9), []
    args, g = arguments(rule, 3), generator()
    data = family.sample(g, 3)
    problem = family.init(data, g)[0], {}, data, family.batch(data, "train", g)
    before = torch.get_num_threads()
    for count in (1, 2, 3, 8, 2):
        torch.set_num_threads(count)
        with torch.no_grad():
            values = fused(rule, *args)
        results.append(
            (*tree_leaves(values), *gradients(fused, rule, args), *tree_leaves(l2o.fused.gradient(family, *problem)))
        )
    torch.set_num_threads(before)
    assert all(identical(results[0], other) for other in results[1:])


def test_strided_tensors_and_a_shared_theta_give_the_same():
    rule = MLP(hidden=(6,))
    args = arguments(rule, 4)
    shared = {k: t[:1].expand(4, *t.shape[1:]) for k, t in args[0].items()}
    strided = tree_map(lambda t: torch.stack([t, t + 1], -1)[..., 0], args[1:4])
    with torch.no_grad():
        want = fused(rule, {k: t.contiguous() for k, t in shared.items()}, *args[1:])
        assert identical(fused(rule, shared, *strided, args[4]), want)


def test_a_diverged_lane_is_nan_alone():
    rule = MLP()
    args = arguments(rule, 3)
    with torch.no_grad():
        want = fused(rule, *args)
        args[1]["matrix"][1, 0, 0] = torch.nan
        updates, _ = fused(rule, *args)
    assert updates["matrix"][1].isnan().all()
    assert all(updates[k][lane].equal(u[lane]) for k, u in want[0].items() for lane in (0, 2))


def test_what_a_kernel_does_not_fit_is_left_to_torch():
    rule, family = MLP(), ImageMLP(width=4, batch_size=2)
    args, data = arguments(rule, 2), family.sample(generator(), 2)
    params, batch = family.init(data, generator())[0], family.batch(data, "train", generator())
    theta = {**args[0], "w0": args[0]["w0"][:, 1:]}
    assert l2o.fused.update(rule, *as_double(args)) is None
    assert l2o.fused.update(rule, theta, *args[1:]) is None
    assert vmap(lambda t: l2o.fused.update(rule, *args) is None and t)(torch.ones(2)).all()
    assert l2o.fused.gradient(family, as_double(params), {}, data, batch) is None
    with torch.no_grad(), pytest.raises(RuntimeError, match="out of bounds"):
        l2o.fused.gradient(family, params, {}, data, {**batch, "y": batch["y"] + 10})


def derivatives_twice(outputs, inputs):
    """By ``inputs``: of a random combination of ``outputs``, and of one of the results."""
    g, found = generator(3), []
    for create_graph in (True, False):
        outputs = [t for t in outputs if t.requires_grad]
        weights = [torch.randn(t.shape, generator=g).to(t.dtype) for t in outputs]
        settings = {"create_graph": create_graph, "materialize_grads": True}
        outputs = torch.autograd.grad(outputs, inputs, weights, **settings)
        found += outputs
    return found


@every_network
def test_a_derivative_can_be_differentiated_again(rule):
    """Also where gradients are computed from parameters, and these from θ."""
    found = []
    for update, tree in ((fused, lambda t: t), (reference, as_double)):
        theta, grads, state, params, clock = tree(arguments(rule, 2))
        leaves = [t.requires_grad_() for t in (*theta.values(), *params.values())]
        moved = {k: p * theta["b0"].mean() for k, p in params.items()}
        updates, after = update(rule, theta, {k: g * moved[k] for k, g in grads.items()}, state, moved, clock)
        found.append(derivatives_twice([*updates.values(), *tree_leaves(after)], leaves))
    assert_close(*found, 1e-3)


def test_meta_gradients_do_not_depend_on_the_kernels(monkeypatch):
    family, rule, results = ImageMLP(width=8, batch_size=16), MLP(hidden=(8,), step_mult=0.1), []
    theta = rule.init_theta(generator())
    for setting in ("1", "0"):
        monkeypatch.setenv("L2O_KERNELS", setting)
        estimator, g = Backprop(rule, family, lanes=3, horizon=4, truncation=None, clip=1e9), generator(1)
        with torch.no_grad():
            lanes = expand_theta(theta, 3)
            state = sample_runs(rule, lanes, family, torch.full((3,), 4), generator(2))
            state, losses = unroll(rule, lanes, family, state, 4, generator(3))
        grads, _, metrics = estimator.estimate(theta, estimator.init(theta, g), g)
        results.append((state.params, losses, grads, metrics))
    for got, want in zip(*map(tree_leaves, results), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, of its forward mode
@pytest.mark.parametrize("setting", ["1", "0"])
def test_forward_mode_is_backward_mode_whatever_the_kernels(monkeypatch, setting):
    monkeypatch.setenv("L2O_KERNELS", setting)
    rule, family, g = MLP(hidden=(8,)), ImageMLP(width=8, batch_size=16), generator(1)
    theta = expand_theta(rule.init_theta(g), 3)
    direction = {name: torch.randn(t.shape, generator=g) for name, t in theta.items()}
    state = sample_runs(rule, theta, family, torch.full((3,), 4), g)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(t, direction[name]) for name, t in theta.items()}
        slope = forward_ad.unpack_dual(unroll(rule, dual, family, state, 4, generator(3))[1]).tangent
    leaves = [t.requires_grad_() for t in theta.values()]
    grads = torch.autograd.grad(unroll(rule, theta, family, state, 4, generator(3))[1].sum(), leaves)
    along = sum((g * d).sum() for g, d in zip(grads, direction.values(), strict=True))
    torch.testing.assert_close(slope.sum(), along, rtol=1e-4, atol=1e-6)
