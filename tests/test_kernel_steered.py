"""The kernel of Steered steps as the rule's update does, in place, the same on any number of threads."""

import ctypes
import math

import pytest
import torch
from plugin import snapshot, source
from tables import generator, identical
from torch import nn

import l2o.fused
from l2o.fused import Inputs
from l2o.kernels import build, steered
from l2o.ops.kinds import infos_of
from l2o.optim import LearnedOptimizer, apply
from l2o.rules import Steered
from l2o.types import Run

SHAPES = {"scalar": (), "vector": (5,), "row": (1, 7), "matrix": (30, 41), "conv": (7, 3, 2, 2), "empty": (0, 3)}
SHAPES |= {"tall": (900, 70), "same": (900, 70)}  # of several blocks
RULES = {
    "orthogonal": Steered(),
    "eigenbasis": Steered(direction="eigenbasis", period=2, widest=64),
    "turned": Steered(direction="eigenbasis", period=2, widest=64, turned=6),
    "tall": Steered(direction="eigenbasis", period=2, widest=16, turned=6, tall=2, free_zeros=True),
    "wide": Steered(direction="eigenbasis", pace=2, widest=64, tall=10, wide=0.5, carried=True),
    "signal": Steered(direction="eigenbasis", period=2, widest=64, turned=6, cautious=True, by_signal=0.5, deep=2),
    "normalized": Steered(direction="normalized", fan_in=0.3),
    "diagonal": Steered(direction="diagonal"),
    "light": Steered(direction="diagonal", cautious=True, by_signal=0.5, tall=2, widest=16, free_zeros=True, deep=2),
    "adam": Steered(direction="adam"),
    "uncontrolled": Steered(controller="none", schedule="constant"),
}
AMPLIFIED = {"eigenbasis": 3e-4, "turned": 3e-4}
"""How far parameters may lie apart: in a basis of few gradients rounding has a say, which second moments amplify."""
every_direction = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


class Reversed(Steered):
    def _sums(self, groups, times, params):
        return {name: -t for name, t in super()._sums(groups, times, params).items()}


class Halved(Steered):
    def size(self, theta, shared, run):
        return 0.5 * super().size(theta, shared, run)


def tensors(seed, scale=1.0):
    g = generator(seed)
    return {name: scale * torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


def gradients(step):
    """Without some entries and rows, and once without any."""
    grads = tensors(100 + step, scale=0.0 if step == 3 else 1e-3)
    grads["matrix"][3], grads["tall"][5, 7], grads["vector"][2] = 0.0, 0.0, 0.0
    return grads


def run(rule, factors, in_place, steps=6):
    theta, params = rule.init_theta(generator()), tensors(0, scale=0.1)
    state = rule.init(theta, params, infos_of(params))
    with torch.no_grad():
        for step in range(steps):
            args = (theta, gradients(step), state, params, infos_of(params), Run(torch.tensor(step), torch.tensor(20)))
            if in_place:
                state = l2o.fused.step(rule, Inputs(*args), dict.fromkeys(params, factors))
                assert state is not None
            else:
                updates, state = rule.update(*args)
                params = {name: factors[1] * p + factors[0] * updates[name] for name, p in params.items()}
    return params, state


def test_a_subclass_has_the_kernel_of_what_it_does_not_change():
    assert not l2o.fused.has(l2o.fused.STEPS, Reversed())
    (params, _), (expected, _) = (run(Halved(), (1.0, 1.0), in_place) for in_place in (True, False))
    torch.testing.assert_close(params, expected, rtol=1e-4, atol=1e-6)


@every_direction
@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.3, 0.98)])
def test_the_kernel_steps_as_update_does(rule, factors):
    (params, state), (expected, slots) = (run(rule, factors, in_place) for in_place in (True, False))
    for name, p in expected.items():
        atol = AMPLIFIED.get(rule.direction, 2e-5)
        torch.testing.assert_close(params[name], p, rtol=1e-4, atol=atol)
        torch.testing.assert_close(state.per_param[name], slots.per_param[name], rtol=1e-3, atol=max(1e-2, 200 * atol))
    torch.testing.assert_close(state.shared, slots.shared, rtol=1e-2, atol=1e-5)


@every_direction
def test_entries_without_gradients_rest_to_the_bit(rule):
    params, _ = run(rule, (1.0, 1.0), in_place=True)
    for name, place in (("matrix", 3), ("tall", (5, 7)), ("vector", 2)):
        assert torch.equal(params[name][place], tensors(0, scale=0.1)[name][place])


@every_direction
def test_the_number_of_threads_changes_no_bit(rule):
    """But for products of matrices, which are torch's; in bases of few gradients their rounding is most of a step."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(rule, (1.0, 1.0), in_place=True, steps=2))
    finally:
        torch.set_num_threads(before)
    if rule.direction in ("eigenbasis", "orthogonal"):
        (params, state), (others, other) = results
        for name, shape in SHAPES.items():
            if rule.path(shape) != "eigenbasis":
                assert torch.equal(state.per_param[name]["m"], other.per_param[name]["m"])
                torch.testing.assert_close(params[name], others[name], rtol=1e-4, atol=2e-5)
    else:
        assert identical(*results)


@every_direction
def test_weights_whose_channels_are_last_and_expanded_gradients_take_the_kernel(rule):
    """A matrix whose columns lie in another order in memory is the same to every formula."""
    theta = rule.init_theta(generator())
    ends = []
    for memory in (torch.contiguous_format, torch.channels_last):
        g = generator()
        params = {"conv": torch.randn(8, 6, 3, 3, generator=g), "bias": torch.randn(5, generator=g)}
        params["conv"] = params["conv"].to(memory_format=memory)
        infos, factors = infos_of(params), dict.fromkeys(params, (1.0, 1.0))
        state = rule.init(theta, params, infos)
        for step in range(4):
            grads = {"conv": torch.randn(8, 6, 3, 3, generator=g), "bias": torch.tensor(0.3).expand(5)}
            run = Run(torch.tensor(step), torch.tensor(20))
            with torch.no_grad():
                state = l2o.fused.step(rule, Inputs(theta, grads, state, params, infos, run), factors)
            assert state is not None
        ends.append({name: p.contiguous() for name, p in params.items()})
    torch.testing.assert_close(*ends, rtol=1e-4, atol=AMPLIFIED.get(rule.direction, 1e-6))


def test_a_step_in_place_shows_in_the_version_of_tensors():
    """So that a backward pass through what was changed raises, as after any optimizer of torch."""
    weight = torch.randn(4, 4, generator=generator(), requires_grad=True)
    loss = (weight * weight).sum()
    rule = Steered()
    with torch.no_grad():
        params = {"weight": weight.detach()}
        theta = rule.init_theta(generator())
        state = rule.init(theta, params, infos_of(params))
        run = Run(torch.tensor(0), torch.tensor(20))
        inputs = Inputs(theta, {"weight": torch.ones(4, 4)}, state, params, infos_of(params), run)
        assert l2o.fused.step(rule, inputs, {"weight": (1.0, 1.0)})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("change", ["dtype", "strides", "shape"])
def test_what_the_kernel_cannot_take_is_left_to_torch_with_nothing_written(change):
    rule, params = Steered(), tensors(0)
    theta, grads = rule.init_theta(generator()), gradients(0)
    if change == "dtype":
        params["matrix"], grads["matrix"] = params["matrix"].double(), grads["matrix"].double()
    if change == "strides":
        params["matrix"] = params["matrix"].T.contiguous().T
    if change == "shape":
        grads["matrix"] = grads["matrix"][:-1]
    infos, factors = infos_of(params), dict.fromkeys(params, (1.0, 1.0))
    state, before = rule.init(theta, params, infos), {k: p.clone() for k, p in params.items()}
    run = Run(torch.tensor(0), torch.tensor(20))
    assert l2o.fused.step(rule, Inputs(theta, grads, state, params, infos, run), factors) is None
    assert identical(params, before)


def test_structures_are_laid_out_as_the_compiler_does(tmp_path):
    """Drift would be memory corruption."""
    (tmp_path / "sizes.cpp").write_text(
        f'#include "{build.SOURCES / "steered.cpp"}"\n#include <cstddef>\n'
        'extern "C" int64_t sizes(int64_t* out) {'
        " out[0] = sizeof(Tensor); out[1] = offsetof(Tensor, sums);"
        " out[2] = sizeof(Step); out[3] = offsetof(Step, tensor); return SUMS; }"
    )
    library = tmp_path / "sizes.so"
    build._run([*build._compiler(), *build.FLAGS, *build.LINK, str(tmp_path / "sizes.cpp"), "-o", str(library)])
    out = (ctypes.c_int64 * 4)()
    assert ctypes.CDLL(str(library)).sizes(out) == len(steered._Tensor().sums)
    tensor, step = steered._Tensor, steered._Step
    assert list(out) == [ctypes.sizeof(tensor), tensor.sums.offset, ctypes.sizeof(step), step.tensor.offset]


def trained(steps, rule, **settings):
    """The optimizer of a small model, after some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 2))
    optimizer = LearnedOptimizer(model.parameters(), source(rule), total_steps=20, **settings)
    for step in range(steps):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=generator(10 * step + i))
        optimizer.step()
    return optimizer


def values(optimizer):
    return [p.detach().clone() for p in optimizer.param_groups[0]["params"]]


@pytest.fixture
def worth(monkeypatch):
    """Kernels in runs of any length; the steps that took one."""
    taken, step = [], l2o.fused.step
    monkeypatch.setattr(apply, "WORTH_A_KERNEL", 0)
    monkeypatch.setattr(l2o.fused, "step", lambda *args: taken.append(1) or step(*args))
    return taken


@every_direction
def test_the_plug_in_takes_the_kernel_where_a_run_is_worth_it(rule, request):
    plain = trained(5, rule, lr=0.5, weight_decay=0.2)
    taken = request.getfixturevalue("worth")
    fused = trained(5, rule, lr=0.5, weight_decay=0.2)
    assert len(taken) == 5
    torch.testing.assert_close(values(fused), values(plain), rtol=1e-4, atol=AMPLIFIED.get(rule.direction, 1e-5))


def test_a_state_dict_stays_what_it_was_and_resumes(worth):
    optimizer = trained(3, Steered())
    saved, kept, start = optimizer.state_dict(), snapshot(optimizer), values(optimizer)
    ends = []
    for _ in range(2):
        with torch.no_grad():
            torch._foreach_copy_(optimizer.param_groups[0]["params"], start)
        optimizer.load_state_dict(saved)
        optimizer.step()
        optimizer.step()
        assert identical(saved, kept)
        ends.append(values(optimizer))
    assert identical(*ends)
    assert len(worth) == 7


def test_the_default_device_does_not_matter(worth):
    optimizer = trained(2, Steered())
    torch.set_default_device("meta")
    try:
        optimizer.step()
    finally:
        torch.set_default_device(None)
    assert len(worth) == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e20])
def test_a_gradient_that_is_not_finite_is_skipped_in_place_too(bad, worth):
    optimizer = trained(3, Steered())
    state, start = snapshot(optimizer)["state"], values(optimizer)
    optimizer.param_groups[0]["params"][1].grad[0] = bad
    with pytest.warns(UserWarning, match="step 4 was skipped: the gradient of parameter 1 is not finite") as said:
        optimizer.step()
    assert said[0].filename == __file__
    assert optimizer.skipped_steps == 1
    assert identical(values(optimizer), start)
    now = snapshot(optimizer)["state"]
    assert identical(now, state)


def test_a_parameter_that_is_not_finite_spoils_no_other(worth):
    optimizer = trained(3, Steered())
    broken, *others = optimizer.param_groups[0]["params"]
    broken.data[0, 0] = float("nan")
    optimizer.step()
    assert all(p.isfinite().all() for p in others)
    assert optimizer.param_groups[0]["run"]["shared"]["log_step"].isfinite()


@pytest.mark.filterwarnings("ignore:step 4 was skipped")
def test_a_state_that_is_not_finite_skips_the_step_with_nothing_written(worth):
    """It would reach all tensors through the controller."""
    optimizer = trained(3, Steered())
    optimizer.state[optimizer.param_groups[0]["params"][0]]["d"].data[0, 0] = float("nan")
    start = values(optimizer)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert identical(values(optimizer), start)


@pytest.mark.parametrize(("size", "limit", "taken"), [(1.0, 5.0, True), (1.0, 3.0, False), (1e30, math.inf, False)])
def test_gradients_above_the_limit_are_left_to_torch_with_nothing_written(size, limit, taken):
    """Of 16 entries, whose norm is 4 times their size; the square of 1e30 is no float32."""
    rule, params = Steered(), {"weight": torch.ones(4, 4)}
    theta = rule.init_theta(generator())
    state, grads = rule.init(theta, params, infos_of(params)), {"weight": torch.full((4, 4), size)}
    run = Run(torch.tensor(0), torch.tensor(20))
    with torch.no_grad():
        inputs = Inputs(theta, grads, state, params, infos_of(params), run)
        found = l2o.fused.step(rule, inputs, {"weight": (1.0, 1.0)}, limit)
    assert (found is not None) == taken
    assert params["weight"].eq(1.0).all().item() != taken
