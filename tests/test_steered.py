"""Steered: directions are what they claim, no scale matters, and the step goes from warm-up to its floor."""

import dataclasses
import math
import warnings

import pytest
import torch
from plugin import source
from tables import generator, one_update
from torch import nn

from l2o.ops.kinds import infos_of
from l2o.ops.orthogonal import newton_schulz, newton_schulz_gram, orthogonalize, polar, row_column_scales
from l2o.optim import LearnedOptimizer
from l2o.rules import Steered
from l2o.types import ConfigurationError

DIRECTIONS = ("eigenbasis", "diagonal", "orthogonal", "normalized", "adam")
SHAPES = {
    "scalar": (),
    "one": (1,),
    "vector": (5,),
    "row": (1, 4),
    "matrix": (6, 9),
    "conv": (4, 3, 2, 2),
    "no": (0, 3),
}
every_direction = pytest.mark.parametrize("direction", DIRECTIONS)


def tensors(seed, dtype=torch.float64):
    g = generator(seed)
    return {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}


def trajectory(rule, grads, total=20, params=None, theta=None):
    """Updates of every step, and the last state."""
    params, theta = params or tensors(0), theta or rule.init_theta(generator())
    theta = {k: t.to(next(iter(params.values())).dtype) for k, t in theta.items()}
    state, updates = rule.init(theta, params, infos_of(params)), []
    for step, g in enumerate(grads):
        new, state = one_update(rule, theta, g, state, params, step, total)
        params = {k: p + new[k] for k, p in params.items()}
        updates.append(new)
    return updates, state


@every_direction
@pytest.mark.parametrize("scale", [1e-6, 1e6, 1e-15])
def test_the_scale_of_gradients_does_not_matter(direction, scale):
    """Beyond rounding, which in float32 has a say in what the basis of a few gradients is."""
    dtype = torch.float64 if direction in ("eigenbasis", "diagonal") else torch.float32
    grads = [tensors(seed, dtype) for seed in range(1, 7)]
    scaled = [{k: scale * g for k, g in each.items()} for each in grads]
    start = tensors(0, dtype)
    plain, other = (trajectory(Steered(direction=direction), each, params=start)[0] for each in (grads, scaled))
    for a, b in zip(plain, other, strict=True):
        for name, u in a.items():
            torch.testing.assert_close(u, b[name], rtol=1e-3, atol=1e-7)


@every_direction
def test_no_gradients_no_steps(direction):
    zeros = {k: torch.zeros_like(p) for k, p in tensors(0).items()}
    updates, state = trajectory(Steered(direction=direction), [zeros, zeros, zeros])
    assert all((u == 0).all() for each in updates for u in each.values())
    assert state.shared["log_step"] == 0.0


@every_direction
def test_entries_and_rows_that_never_had_a_gradient_rest(direction):
    grads = [tensors(seed) for seed in range(1, 5)]
    for g in grads:
        g["matrix"][2], g["matrix"][0, 3], g["vector"][1], g["conv"][:, 1] = 0.0, 0.0, 0.0, 0.0
    for update in trajectory(Steered(direction=direction), grads)[0]:
        assert not update["matrix"][2].any()
        assert update["matrix"][0, 3] == 0.0
        assert update["vector"][1] == 0.0
        assert not update["conv"][:, 1].any()
        assert update["matrix"][0, 4] != 0.0


def test_a_matrix_moves_by_an_orthogonal_matrix_of_the_size_of_the_step():
    """All singular values are near one number, and the root mean square is ``lr matrix (fan-in / 64)^-fan_in``."""
    rule = Steered(controller="none", schedule="constant", warmup=1e-6, iterations=8, relative=1e3)
    update = trajectory(rule, [tensors(1)])[0][0]["matrix"]
    values = torch.linalg.svdvals(update)
    assert values.max() / values.min() < 2.0
    expected = rule.lr * 0.7 * (9 / 64) ** -0.05
    torch.testing.assert_close(update.square().mean().sqrt().item(), expected, rtol=1e-3, atol=0.0)


def test_a_normalized_matrix_has_columns_of_one_size_and_nearly_rows():
    rule = Steered(
        direction="normalized", controller="none", schedule="constant", warmup=1e-6, relative=1e3, fan_in=0.0
    )
    update = trajectory(rule, [tensors(1)])[0][0]["matrix"]
    torch.testing.assert_close(update.norm(dim=0), update.norm(dim=0).mean().expand(9), rtol=0.02, atol=0.0)
    rows = update.norm(dim=1)
    assert rows.max() / rows.min() < 2.0
    torch.testing.assert_close(update.square().mean().sqrt().item(), rule.lr * 0.7, rtol=1e-5, atol=0.0)


@every_direction
def test_vectors_follow_adam(direction):
    rule = Steered(direction=direction, controller="none", schedule="constant", warmup=1e-6)
    grads = [tensors(seed) for seed in range(1, 5)]
    param = nn.Parameter(tensors(0)["vector"])
    adam = torch.optim.Adam([param], lr=rule.lr, betas=(0.9, 0.99), eps=0.0)
    for update, g in zip(trajectory(rule, grads)[0], grads, strict=True):
        before = param.detach().clone()
        param.grad = g["vector"]
        adam.step()
        torch.testing.assert_close(update["vector"], param.detach() - before, rtol=1e-5, atol=0.0)


def test_small_matrices_take_small_steps_and_zeros_get_on():
    """The limit is a share of the matrix' own root mean square."""
    rule = Steered(controller="none", schedule="constant", warmup=1e-6)
    sizes = {}
    for scale in (10.0, 1e-2, 0.0):
        start = {k: scale * p for k, p in tensors(0).items()}
        sizes[scale] = trajectory(rule, [tensors(1)], params=start)[0][0]["matrix"].square().mean().sqrt().item()
    assert sizes[10.0] > 2.2e-3
    assert 4e-4 < sizes[1e-2] < 8e-4
    assert 2e-4 < sizes[0.0] < 3e-4


def test_the_schedule_warms_up_decays_to_its_floor_and_stays_there():
    rule = Steered(controller="none", warmup=0.1)
    grad = tensors(1)
    updates, _ = trajectory(rule, [grad] * 130, total=100)
    sizes = [u["one"].abs().item() for u in updates]
    assert sizes[0] == pytest.approx(0.1 * rule.lr, rel=1e-3)
    assert max(sizes) == sizes[9]
    assert sizes[50] == pytest.approx(rule.lr * (0.01 + 0.99 * 0.5**rule.power), rel=1e-3)
    assert sizes[100] == pytest.approx(sizes[129]) == pytest.approx(0.01 * rule.lr, rel=1e-3)


def test_equal_gradients_make_the_step_grow_and_opposite_ones_shrink():
    grad = tensors(1)
    _, agree = trajectory(Steered(), [grad] * 50, total=1000)
    flips = [{k: (-1.0) ** t * g for k, g in grad.items()} for t in range(200)]
    _, bounce = trajectory(Steered(), flips, total=200)
    assert agree.shared["log_step"] > 0.5
    assert bounce.shared["log_step"] < -0.5


@pytest.mark.parametrize("shape", [(7, 7), (5, 9), (9, 5), (4, 40), (40, 4), (3, 4, 6)])
def test_polar_is_orthogonalize_in_its_cheapest_form(shape):
    x = torch.randn(shape, generator=generator(), dtype=torch.float64, requires_grad=True)
    result = polar(x, 4)
    torch.testing.assert_close(result, orthogonalize(x, 4), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(polar(1e-12 * x, 4), result)
    torch.autograd.gradcheck(lambda x: polar(x, 2), x)
    assert not polar(torch.zeros(shape), 4).any()


def test_bfloat16_products_change_rounding_alone():
    x = torch.randn(150, 200, generator=generator())
    x = x / x.norm()
    for form in (newton_schulz, newton_schulz_gram):
        exact, rounded = form(x, 3), form(x.bfloat16(), 3).float()
        assert (exact - rounded).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("form", [newton_schulz, newton_schulz_gram])
def test_bfloat16_products_of_long_matrices_of_low_rank_stay_bounded(form):
    """Rounding puts eigenvalues of the Gram matrix below 0, which is not to grow."""
    x = torch.randn(128, 1, generator=generator()) @ torch.randn(1, 2100, generator=generator())
    x = (x / x.norm()).bfloat16()
    exact = newton_schulz(x.double(), 6)
    assert (form(x, 6).double() - exact).norm() < 3.0 * exact.norm()


def test_rows_and_columns_of_zeros_do_not_move():
    x = torch.randn(4, 5, generator=generator())
    x[1], x[:, 2] = 0.0, 0.0
    row, col = row_column_scales(x)
    direction = x * row[:, None] * col
    assert not direction[1].any()
    assert not direction[:, 2].any()
    assert direction.square().mean() == pytest.approx(1.0)
    assert not any(scale.any() for scale in row_column_scales(torch.zeros(3, 4)))


@every_direction
def test_a_row_whose_gradients_end_stops(direction):
    """An embedding that a run has seen once is not to drift for as long as its momentum can be told from 0."""
    grads = [{"matrix": tensors(seed)["matrix"]} for seed in range(1, 90)]
    for g in grads[10:]:
        g["matrix"][2] = 0.0
    start = {"matrix": tensors(0)["matrix"]}
    updates, _ = trajectory(Steered(direction=direction, schedule="constant"), grads, params=start)
    sizes = torch.stack([u["matrix"][2].norm() for u in updates])
    assert sizes[60:].max() < 0.2 * sizes[5:10].mean()


def test_no_parameters_yet_is_a_state_too():
    state = Steered().init(Steered().init_theta(generator()), {}, {})
    assert state.per_param == {}
    assert state.shared["log_step"] == 0.0


def test_parameters_that_join_late_start_as_the_first_did():
    joined = nn.Linear(3, 4), nn.Linear(3, 4)
    optimizer = LearnedOptimizer([p for m in joined for p in m.parameters()], source(Steered()), total_steps=10)
    for step in range(6):
        for module in joined[: 1 + (step >= 3)]:
            for p in module.parameters():
                p.grad = torch.randn(p.shape, generator=generator(step))
        before = joined[1].weight.detach().clone()
        optimizer.step()
        assert torch.equal(before, joined[1].weight) == (step < 3)
    assert all(p.isfinite().all() for m in joined for p in m.parameters())


def test_a_run_past_its_end_goes_on_in_small_steps_and_says_so_once():
    param = nn.Parameter(torch.ones(3, 4))
    optimizer = LearnedOptimizer([param], source(Steered()), total_steps=3)
    moved = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(8):
            param.grad, before = torch.randn(3, 4, generator=generator(step)), param.detach().clone()
            optimizer.step()
            moved.append((param.detach() - before).square().mean().sqrt().item())
    assert [str(w.message).split(":")[0] for w in said] == ["step 4 of a run of total_steps=3"]
    assert all(0.0 < m < 0.02 * moved[1] for m in moved[3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@every_direction
def test_every_dtype_descends(dtype, direction):
    goal = torch.randn(6, 4, generator=generator())
    param = nn.Parameter(torch.zeros(6, 4, dtype=dtype))
    optimizer = LearnedOptimizer([param], source(Steered(direction=direction, lr=0.1)), total_steps=200)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (param - goal.to(dtype)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"direction": "muon"}, "direction='muon': expected one of eigenbasis, diagonal, orthogonal, normalized, adam"),
        ({"controller": None}, "controller=None: expected one of alignment, mlp, lstm, none"),
        ({"schedule": "cosine"}, "schedule='cosine': expected one of decay, constant"),
        ({"iterations": 0}, "iterations=0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"fan_in": math.nan}, "fan_in=nan"),
        ({"network": True, "direction": "adam"}, "network=True: expected direction=eigenbasis, diagonal or orthogonal"),
        ({"reads_loss": True}, "reads_loss=True: expected controller=mlp or lstm, not alignment"),
        ({"deep": 6, "controller": "none"}, "deep, own: expected controller=alignment, mlp or lstm"),
        ({"own": 2.0, "controller": "none"}, "deep, own: expected controller=alignment, mlp or lstm"),
        ({"own": -1.0}, "own=-1.0"),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(ConfigurationError, match=message):
        Steered(**setting)


def test_theta_holds_what_the_parts_need_and_no_more():
    full = Steered().init_theta(generator()).keys()
    for change in ({"direction": "adam"}, {"controller": "none"}, {"schedule": "constant"}):
        assert dataclasses.replace(Steered(), **change).init_theta(generator()).keys() < full


def test_a_tall_matrix_moves_as_a_vector_does():
    """Its rows are words, of which few have gradients: none of it goes by the size of the whole."""
    rule = Steered(direction="eigenbasis", widest=8, tall=4, controller="none")
    start, grads = torch.full((40, 3), 0.1), [torch.randn(40, 3, generator=generator(i)) for i in range(4)]
    tall, _ = trajectory(rule, [{"x": g} for g in grads], params={"x": start})
    flat, _ = trajectory(rule, [{"x": g.flatten()} for g in grads], params={"x": start.flatten()})
    for a, b in zip(tall, flat, strict=True):
        torch.testing.assert_close(a["x"].flatten(), b["x"])
    assert rule.path((40, 3)) == "adam"
    assert [rule.path(shape) for shape in ((40, 11), (8, 2), (3, 40))] == ["orthogonal", "eigenbasis", "adam"]


@pytest.mark.parametrize(("began", "free"), [(0.0, True), (1e-3, False)])
def test_a_matrix_that_begins_as_zeros_has_no_limit(began, free):
    plain, loose, freed = (
        Steered(controller="none", schedule="constant", warmup=1e-6, relative=relative, free_zeros=zeros)
        for relative, zeros in ((0.03, False), (1e9, False), (0.03, True))
    )
    params, grads = {"x": torch.full((6, 9), began)}, [{"x": torch.randn(6, 9, generator=generator(3))}] * 3
    held, far, got = (trajectory(rule, grads, params=params)[0][-1]["x"] for rule in (plain, loose, freed))
    torch.testing.assert_close(got, far if free else held)
    assert far.norm() > 1.5 * held.norm()
