"""The numerics against their definitions written out."""

import math

import pytest
import torch
from tables import generator

from l2o.ops import factored, features, kinds, moments, networks, numeric, recurrent
from l2o.types import LOCAL, ConfigurationError, ParamInfo, Run


def clock(step: int, total: int = 100) -> Run:
    return Run(torch.tensor(step), torch.tensor(total))


def test_momenta_are_one_average_a_decay():
    decays = (0.1, 0.9, 0.999)
    grads = torch.randn(5, 2, 3, dtype=torch.float64)
    m = moments.init_momenta(grads[0], len(decays))
    assert m.shape == (3, 2, 3)
    for g in grads:
        m = moments.momenta(m, g, decays)
    for decay, got in zip(decays, m, strict=True):
        want = sum((1 - decay) * decay ** (4 - t) * g for t, g in enumerate(grads))
        torch.testing.assert_close(got, want)


def test_decays_near_one_are_rounded_once():
    """A momentum of 0.92 that is one unit off takes a parameter that crosses zero over the tolerance of a replay."""
    logits = torch.linspace(2.0, 9.0, 4001)
    exact = torch.sigmoid(logits.double())
    half_a_unit = 2.0**-25
    assert ((moments.decay(logits).double() - exact).abs() <= 1.5 * half_a_unit).all()  # 1.2; torch.sigmoid: 3


@pytest.mark.parametrize("decay", [0.1, 0.9, 0.9999])
def test_bias_correction_makes_the_average_of_a_constant_that_constant(decay):
    logit = torch.tensor(numeric.logit_of("d", decay), dtype=torch.float64)
    average, value = torch.zeros((), dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    for n in range(1, 6):
        average = moments.ema(average, value, logit)
        corrected = average / moments.bias_correction(logit, torch.tensor(float(n), dtype=torch.float64))
        torch.testing.assert_close(corrected, value)


def test_log_and_sign_of_andrychowicz():
    g = torch.tensor([0.0, 1e-9, -0.001, 0.5, -300.0], dtype=torch.float64)
    magnitude, sign = features.log_and_sign(g)
    eps = 1.1920929e-7
    for value, m, s in zip(g.tolist(), magnitude.tolist(), sign.tolist(), strict=True):
        assert m == pytest.approx(max(math.log(abs(value) + eps) / 5, -1.0))
        assert s == pytest.approx(min(max(value * math.exp(5), -1.0), 1.0))


def test_embeddings_are_those_of_the_references():
    like = torch.zeros((), dtype=torch.float64)
    steps = features.step_embedding(clock(30), like)
    assert steps.tolist() == pytest.approx([math.tanh(30 / tau - 1) for tau in features.TIMESCALES])
    fraction = features.fraction_embedding(clock(30), like)
    assert fraction.tolist() == pytest.approx([math.tanh(10 * (0.3 - c)) for c in features.FRACTIONS])


def test_second_moment_scale_gives_unit_mean_square():
    x = 50 * torch.randn(3, 1000, dtype=torch.float64)
    y = x * features.second_moment_scale(x.square().sum(-1), 1000)[:, None]
    torch.testing.assert_close(y.square().mean(-1), torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=0)


def test_shared_inputs_of_the_mlp_equal_inputs_repeated_an_entry():
    theta = networks.init_mlp(generator(), [5, 7, 2])
    x, shared = torch.randn(3, 11), torch.randn(2)
    whole = torch.cat([x, shared[:, None].expand(2, 11)])
    want = theta["w1"].T @ torch.relu(theta["w0"].T @ whole + theta["b0"][:, None]) + theta["b1"][:, None]
    torch.testing.assert_close(networks.mlp(theta, x, shared), want)


def test_lstm_cell_equals_torch():
    inputs, hidden = 3, 4
    weight, bias = networks.init_linear(generator(), inputs + hidden, 4 * hidden)
    x, h, c = torch.randn(inputs, 6), torch.randn(hidden, 6), torch.randn(hidden, 6)
    cell = torch.nn.LSTMCell(inputs, hidden)
    i, g, f, o = weight.chunk(4, dim=1)
    reordered = torch.cat([i, f, g, o], dim=1).T  # torch's order; it has two biases, and the forget gate's 1 goes there
    forget = torch.zeros(4 * hidden).index_fill(0, torch.arange(hidden, 2 * hidden), 1.0)
    with torch.no_grad():
        cell.weight_ih.copy_(reordered[:, :inputs])
        cell.weight_hh.copy_(reordered[:, inputs:])
        cell.bias_ih.copy_(bias)
        cell.bias_hh.copy_(forget)
        want = cell(x.T, (h.T, c.T))
    got = networks.lstm_cell(x, h, c, weight, bias)
    torch.testing.assert_close(got[0], want[0].T)
    torch.testing.assert_close(got[1], want[1].T)


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_a_coordinatewise_network_does_not_depend_on_the_block(block, monkeypatch):
    monkeypatch.setattr(networks, "BLOCK", block)
    calls = []

    def network(x, y):
        calls.append(x.shape[-1])
        return x.sum(0, keepdim=True) + y, 2 * y

    inputs = {str(n): (torch.randn(3, n), torch.randn(1, n)) for n in (2, 0, 9, 1)}
    outputs = networks.apply_coordinatewise(network, inputs)
    assert list(outputs) == list(inputs)
    assert max(calls) <= max(block, 12)
    for name, (x, y) in inputs.items():
        torch.testing.assert_close(outputs[name][0], x.sum(0, keepdim=True) + y)
        torch.testing.assert_close(outputs[name][1], 2 * y)


def test_safe_sqrt_has_a_finite_derivative_at_zero():
    x = torch.tensor([0.0, 4.0], requires_grad=True)
    y = numeric.safe_sqrt(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == [0.0, 2.0]
    assert grad.tolist() == [0.0, 0.25]


def test_safe_rsqrt_is_the_inverse_root_and_its_derivative_never_overflows():
    x = torch.tensor([1e-33, 4.0], requires_grad=True)
    y = numeric.safe_rsqrt(x)
    (grad,) = torch.autograd.grad((y * torch.tensor([0.0, 1.0])).sum(), x)
    torch.testing.assert_close(y, x.detach().rsqrt(), rtol=0, atol=0)
    assert grad.tolist() == [0.0, -0.0625]


def test_learned_decays_start_at_the_initial_ones_and_stay_under_one():
    initial = (0.9, 0.999)
    start = moments.learned_decays(initial, torch.zeros(2, dtype=torch.float64))
    assert start.tolist() == pytest.approx(initial)
    assert (moments.learned_decays(initial, torch.tensor([3.0, -3.0])) <= 1.0).all()


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((), None), ((7,), None), ((4, 6), (0, 1)), ((9, 3), (1, 0)), ((5, 5), (0, 1)), ((3, 3, 2, 5), (1, 3))],
)
def test_factored_axes_are_the_two_largest(shape, axes):
    assert factored.factored_axes(torch.Size(shape)) == axes


@pytest.mark.parametrize("shape", [(4, 6), (9, 3), (2, 4, 5)])
def test_factors_of_a_square_of_rank_one_are_its_root(shape):
    """The second moment of ``g = a b^T`` is the product of its rows' and columns' means over the mean of them all."""
    along = [n if i == factored.factored_axes(torch.Size(shape))[1] else 1 for i, n in enumerate(shape)]
    across = [n // m for n, m in zip(shape, along, strict=True)]
    g = (0.5 + torch.rand(along, dtype=torch.float64)) * (0.5 + torch.rand(across, dtype=torch.float64))
    slots = averaged(g, torch.zeros(1, dtype=torch.float64))
    infos = kinds.infos_of({"g": g})
    mean = factored.row_means({"g": slots}, infos, LOCAL)["g"]
    factors = factored.factors(slots, mean, factored.factored_axes(g.shape))
    torch.testing.assert_close((factors["row_factor"] * factors["col_factor"])[0], 1 / g, rtol=1e-6, atol=0)


def averaged(g, decays):
    infos = kinds.infos_of({"g": g})
    start = factored.init_factored(g, infos["g"], len(decays))
    sums = {"g": factored.square_sums(g, factored.factored_axes(g.shape))}
    return factored.averaged({"g": start}, sums, infos, decays, LOCAL)["g"]


def test_rows_and_columns_are_means_of_squares():
    g = torch.randn(3, 4, dtype=torch.float64)
    slots = averaged(g, torch.tensor([0.0, 0.9], dtype=torch.float64))
    torch.testing.assert_close(slots["row"][0], g.square().mean(1))
    torch.testing.assert_close(slots["col"][1], 0.1 * g.square().mean(0))


def test_a_row_of_the_tensor_lstm_is_a_tensor():
    theta = recurrent.init_tensor_lstm(generator(), 3, 2)
    theta |= {"lstm_h": torch.randn(2), "lstm_c": torch.randn(2)}
    slots = {"a": recurrent.lstm_slots(theta), "b": {"h": torch.randn(2), "c": torch.randn(2)}}
    x = torch.randn(3, 2)
    h, new = recurrent.tensor_lstm(theta, x, slots)
    for i, (name, old) in enumerate(slots.items()):
        want = networks.lstm_cell(x[:, [i]], old["h"][:, None], old["c"][:, None], theta["lstm_w"], theta["lstm_b"])
        torch.testing.assert_close(new[name]["h"], want[0][:, 0])
        torch.testing.assert_close(new[name]["c"], want[1][:, 0])
        torch.testing.assert_close(h[:, i], want[0][:, 0])


def test_width_multiplier_of_an_empty_tensor_is_a_number():
    assert kinds.width_multiplier(torch.zeros(3, 0), ParamInfo((3, 0), "matrix")) == 1.0
    assert kinds.width_multiplier(torch.zeros(2, 3, 5), ParamInfo((2, 3, 5), "matrix")) == pytest.approx(1 / 15)


def test_constants_made_in_inference_mode_can_be_differentiated_with():
    like = torch.zeros((), dtype=torch.float64)
    with torch.inference_mode():
        numeric.constant((0.123, 0.456), like)
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (x * numeric.constant((0.123, 0.456), like)).sum().backward()
    assert x.grad.tolist() == [0.123, 0.456]


@pytest.mark.parametrize(
    ("transform", "value"),
    [
        (numeric.log_of, 0.0),
        (numeric.log_of, -1.0),
        (numeric.log_of, math.inf),
        (numeric.logit_of, 1.0),
        (numeric.logit_of, 0.0),
        (numeric.logit_of, math.nan),
        *((transform, value) for transform in (numeric.log_of, numeric.logit_of) for value in ("0.5", None, True)),
    ],
)
def test_hyperparameters_out_of_range_are_named(transform, value):
    with pytest.raises(ConfigurationError, match="beta1="):
        transform("beta1", value)
