"""The kernel of Steered steps as the rule's update does, in place, the same on any number of threads."""

import copy
import ctypes
import math

import pytest
import torch
from steered_rules import every_direction
from tables import generator, identical

import l2o.fused
from l2o.fused import Inputs
from l2o.kernels import build, steered_tables
from l2o.ops.kinds import infos_of
from l2o.rules import Steered
from l2o.types import Run

SHAPES = {"scalar": (), "vector": (5,), "row": (1, 7), "matrix": (30, 41), "conv": (7, 3, 2, 2), "empty": (0, 3)}
SHAPES |= {"tall": (900, 70), "same": (900, 70), "zeros": (6, 5)}  # the first two of several blocks


class Reversed(Steered):
    def _sums(self, groups, times, params):
        return {name: -t for name, t in super()._sums(groups, times, params).items()}


class Halved(Steered):
    def size(self, theta, shared, run):
        return 0.5 * super().size(theta, shared, run)


class Named(Steered):
    def path(self, shape):
        return "adam" if shape == SHAPES["conv"] else super().path(shape)


def settled(rule, factors=(1.0, 1.0)):
    """Where all that has a basis has had more gradients than axes: before, rounding has a say in it, which second
    moments amplify."""
    return 30, *run(rule, factors, in_place=False, steps=30)


def tensors(seed, scale=1.0):
    """One matrix begins as zeros."""
    g = generator(seed)
    drawn = {name: scale * torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    return drawn if seed else drawn | {"zeros": torch.zeros_like(drawn["zeros"])}


def gradients(step):
    """Without some entries and rows, once without any, and of one matrix only later."""
    grads = tensors(100 + step, scale=0.0 if step == 3 else 1e-3)
    grads["zeros"] *= step > 1
    grads["matrix"][3], grads["tall"][5, 7], grads["vector"][2] = 0.0, 0.0, 0.0
    return grads


def decided(theta):
    """With a network, if there is one, that has something to say."""
    g = generator(5)
    said = {name: 0.4 * torch.randn(t.shape, generator=g) for name, t in theta.items() if name.startswith("decide_")}
    return theta | {name: theta[name] + more for name, more in said.items()}


def run(rule, factors, in_place, steps=6, start=None):
    """Steps from the start, or from ``step, params, state``, which stay as they are."""
    theta, first, params, state = decided(rule.init_theta(generator())), 0, tensors(0, scale=0.1), None
    infos = infos_of(params, {"same": "embedding"})
    if start is not None:
        first, params, state = copy.deepcopy(start)
    state = state or rule.init(theta, params, infos)
    with torch.no_grad():
        for step in range(first, first + steps):
            now = Run(torch.tensor(step), torch.tensor(60), torch.tensor(1.0 / (step + 1)))
            args = (theta, gradients(step), state, params, infos, now)
            if in_place:
                state = l2o.fused.step(rule, Inputs(*args), dict.fromkeys(params, factors))
                assert state is not None
            else:
                updates, state = rule.update(*args)
                params = {name: factors[1] * p + factors[0] * updates[name] for name, p in params.items()}
    return params, state


def test_a_subclass_has_the_kernel_of_what_it_does_not_change():
    assert not l2o.fused.has(l2o.fused.STEPS, Reversed())
    assert l2o.fused.has(l2o.fused.STEPS, Named())
    run(Named(), (1.0, 1.0), in_place=True)
    with pytest.raises(AssertionError):  # its formula is another one than the kernel's
        run(Halved(), (1.0, 1.0), in_place=True)


@every_direction
@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.3, 0.98)])
def test_the_kernel_steps_as_update_does(rule, factors):
    start = settled(rule, factors) if rule.direction == "eigenbasis" else None
    (params, state), (expected, slots) = (run(rule, factors, in_place, start=start) for in_place in (True, False))
    for name, p in expected.items():
        torch.testing.assert_close(params[name], p, rtol=1e-4, atol=2e-5)
        for slot, want in slots.per_param[name].items():
            atol = (1e-2 if slot in ("rows", "columns") else 1e-3) * want.abs().max().item() if want.numel() else 0.0
            torch.testing.assert_close(state.per_param[name][slot], want, rtol=1e-3, atol=atol)
    torch.testing.assert_close(state.shared, slots.shared, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("direction", ["eigenbasis", "orthogonal"])
def test_a_perceptron_sees_momentum_where_directions_are_torchs(direction):
    rule = Steered(direction=direction, controller="mlp", period=2, turned=6)
    test_the_kernel_steps_as_update_does(rule, (1.0, 1.0))


def test_weights_that_lie_in_memory_in_another_order_are_the_same():
    """Their copies live until the kernel has read them."""
    rule, params = Steered(direction="diagonal", controller="mlp"), tensors(0, scale=0.1)
    theta, infos = decided(rule.init_theta(generator())), infos_of(params)
    found = []
    for weights in (theta, {name: t.mT.contiguous().mT if t.ndim == 2 else t for name, t in theta.items()}):
        own, state = copy.deepcopy(params), rule.init(theta, params, infos)
        with torch.no_grad():
            for step in range(4):
                inputs = Inputs(weights, gradients(step), state, own, infos, Run(torch.tensor(step), torch.tensor(60)))
                state = l2o.fused.step(rule, inputs, dict.fromkeys(own, (1.0, 1.0)))
        found.append((own, state))
    assert identical(*found)


def test_a_network_that_reads_the_loss_does():
    test_the_kernel_steps_as_update_does(Steered(direction="adam", controller="lstm", reads_loss=True), (1.0, 1.0))


@pytest.mark.parametrize("lost", ["near", "long"])
def test_a_network_without_its_memory_is_left_to_torch(lost):
    rule, params = Steered(controller="mlp"), {"weight": torch.ones(4, 4)}
    theta, infos = rule.init_theta(generator()), infos_of(params)
    state = rule.init(theta, params, infos)
    for slots in (state.shared, *state.per_param.values()):
        slots.pop(lost, None)
    inputs = Inputs(theta, params, state, params, infos, Run(torch.tensor(0), torch.tensor(9)))
    assert l2o.fused.step(rule, inputs, {"weight": (1.0, 1.0)}) is None


@pytest.mark.parametrize("logit", [-40.0, 40.0])
def test_shares_that_round_to_one_and_the_range_of_the_controller_are_those_of_update(logit):
    rule, params = Steered(direction="adam"), {"x": torch.ones(3), "y": torch.ones(2, 2)}
    infos, grads = infos_of(params), {"x": torch.ones(3), "y": torch.full((2, 2), -2.0)}
    theta = rule.init_theta(generator()) | {"logit_beta1": torch.tensor(logit), "log_range": torch.tensor(0.02).log()}
    mine, state = {name: p.clone() for name, p in params.items()}, rule.init(theta, params, infos)
    expected = copy.deepcopy(state)
    with torch.no_grad():
        for step in range(4):
            run = Run(torch.tensor(step), torch.tensor(9))
            state = l2o.fused.step(
                rule, Inputs(theta, grads, state, mine, infos, run), dict.fromkeys(params, (1.0, 1.0))
            )
            updates, expected = rule.update(theta, grads, expected, params, infos, run)
            params = {name: p + updates[name] for name, p in params.items()}
    torch.testing.assert_close(mine, params)
    torch.testing.assert_close(state.shared["log_step"], expected.shared["log_step"])
    assert state.shared["log_step"] == pytest.approx(0.02, rel=1e-5)


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
    """A matrix whose columns lie in another order in memory is the same to every formula.

    One gradient fills its basis: in directions without one rounding has a say.
    """
    theta = rule.init_theta(generator())
    ends = []
    for memory in (torch.contiguous_format, torch.channels_last):
        g = generator()
        params = {"conv": torch.randn(8, 2, 2, 2, generator=g), "bias": torch.randn(5, generator=g)}
        params["conv"] = params["conv"].to(memory_format=memory)
        infos, factors = infos_of(params), dict.fromkeys(params, (1.0, 1.0))
        state = rule.init(theta, params, infos)
        for step in range(4):
            grads = {"conv": torch.randn(8, 2, 2, 2, generator=g), "bias": torch.tensor(0.3).expand(5)}
            run = Run(torch.tensor(step), torch.tensor(20))
            with torch.no_grad():
                state = l2o.fused.step(rule, Inputs(theta, grads, state, params, infos, run), factors)
            assert state is not None
        ends.append({name: p.contiguous() for name, p in params.items()})
    torch.testing.assert_close(*ends, rtol=1e-4, atol=2e-5)


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
    assert ctypes.CDLL(str(library)).sizes(out) == len(steered_tables._Tensor().sums)
    tensor, step = steered_tables._Tensor, steered_tables.Step
    assert list(out) == [ctypes.sizeof(tensor), tensor.sums.offset, ctypes.sizeof(step), step.tensor.offset]


@pytest.mark.parametrize(("size", "limit", "taken"), [(1.0, 5.0, True), (1.0, 3.0, False), (1e30, math.inf, False)])
@pytest.mark.parametrize("rule", [Steered(), Steered(controller="mlp", own=2.0)], ids=["alignment", "mlp"])
def test_gradients_above_the_limit_are_left_to_torch_with_nothing_written(rule, size, limit, taken):
    """Of 16 entries, whose norm is 4 times their size; the square of 1e30 is no float32."""
    params = {"weight": torch.ones(4, 4)}
    theta = rule.init_theta(generator())
    state, grads = rule.init(theta, params, infos_of(params)), {"weight": torch.full((4, 4), size)}
    run = Run(torch.tensor(0), torch.tensor(20))
    with torch.no_grad():
        inputs, before = Inputs(theta, grads, state, params, infos_of(params), run), copy.deepcopy(state)
        found = l2o.fused.step(rule, inputs, {"weight": (1.0, 1.0)}, limit)
    assert (found is not None) == taken
    assert identical(state, before) != taken
    assert params["weight"].eq(1.0).all().item() != taken
