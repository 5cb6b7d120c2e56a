"""Analytic families: their formulas and minima, what is sampled, and that lanes are drawn on their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from analytic import ANALYTIC, LANDSCAPES
from conftest import ROOT
from scipy.optimize import rosen
from tables import double, generator
from torch import Tensor
from torch.func import jacrev, vmap

from l2o.tasks import ConvexQuadratic, Lasso, Plateau, Rastrigin, Rosenbrock, Saddle
from l2o.tasks.analytic import Landscape, rotations
from l2o.types import ConfigurationError, TaskFamily
from meta_train.config.build import make

LANES = 60
every_family = pytest.mark.parametrize("family", ANALYTIC.values(), ids=ANALYTIC.keys())
every_landscape = pytest.mark.parametrize("family", LANDSCAPES.values(), ids=LANDSCAPES.keys())


def draw(family: TaskFamily, lanes: int = LANES, split: str = "valid", g: torch.Generator | None = None) -> Any:
    """Parameters in float64, buffers, data and batch."""
    g = g or generator(3)
    data = family.sample(g, lanes)
    params, buffers = family.init(data, g)
    return double(params), buffers, data, family.batch(data, split, g)  # type: ignore[arg-type]


def losses(family: TaskFamily, x: Tensor, drawn: Any) -> Tensor:
    return vmap(family.loss)({"x": x}, *drawn[1:])[0]


def active(data: dict[str, Tensor]) -> Tensor:
    return data["active" if "active" in data else "penalty"] > 0


def minimum(family: TaskFamily, data: dict[str, Tensor]) -> Tensor:
    if isinstance(family, Lasso):
        return data["solution"].double()
    z = data["falling"] if isinstance(family, Saddle) else torch.zeros_like(data["origin"])
    return (data["origin"] + torch.einsum("lij,li->lj", data["rotation"], z)).double()


@every_family
def test_the_minimum_is_zero_and_where_it_is_said_to_be(family: TaskFamily) -> None:
    drawn = draw(family)
    x = minimum(family, drawn[2])
    assert losses(family, x, drawn).abs().max() < 1e-10
    for scale in (1e-3, 1e-1, 1.0, 1e2):
        away = x + scale * torch.randn(x.shape, generator=generator(), dtype=x.dtype)
        assert (losses(family, away, drawn) > 1e-10).all()
        assert (losses(family, away, draw(family, split="train")) > 0).all()


@every_family
def test_runs_start_above_the_minimum_in_float32_too(family: TaskFamily) -> None:
    drawn = draw(family, 2000, "train")
    start = losses(family, drawn[0]["x"].float(), drawn)
    assert start.dtype == torch.float32
    assert (start > 0).all()
    assert (start < 1e3).all()


@every_family
def test_gradients_and_their_gradients_equal_finite_differences(family: TaskFamily) -> None:
    drawn = draw(family, 3, "train")
    x = drawn[0]["x"].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses(family, x, drawn), (x,))
    assert torch.autograd.gradgradcheck(lambda x: losses(family, x, drawn), (x,))


@every_family
def test_entries_beyond_the_sampled_dimension_have_no_part(family: TaskFamily) -> None:
    drawn = draw(family, split="train")
    x, inside = drawn[0]["x"].requires_grad_(), active(drawn[2])
    low, high = family.dims  # type: ignore[attr-defined]
    sizes = inside.sum(1)
    assert x.shape == (LANES, high)
    assert set(sizes.tolist()) == set(range(low, high + 1))
    assert inside.equal(torch.arange(high) < sizes.unsqueeze(1))
    value = losses(family, x, drawn)
    (grad,) = torch.autograd.grad(value.sum(), x)
    assert (grad[~inside] == 0).all()
    assert (grad[inside] != 0).all()
    assert losses(family, torch.where(inside, x, 17.0), drawn).equal(value)


@every_landscape
def test_spectra_have_the_sampled_condition(family: Landscape) -> None:
    data = family.sample(generator(), 500)
    low, high = family.conditions
    condition, inside = data["condition"], data["active"] > 0
    assert condition.min() >= low
    assert condition.max() <= high
    middle = (condition.log().mean() - torch.tensor(low).log()) / (torch.tensor(high) / low).log()
    assert abs(middle - 0.5) < 0.05
    assert (data["spectrum"][~inside] == 0).all()
    assert (data["spectrum"].amax(1) == 1).all()
    smallest = torch.where(inside, data["spectrum"], 1.0).amin(1)
    torch.testing.assert_close(smallest, torch.where(inside.sum(1) > 1, 1 / condition, 1.0))


def test_rotations_are_orthogonal_and_uniform() -> None:
    mask = (torch.arange(5) < torch.tensor([2, 5, 1] * 2000).unsqueeze(1)).float()
    r = rotations(generator(), mask)
    torch.testing.assert_close(r @ r.mT, torch.diag_embed(mask))
    # Of a uniform one every entry has mean 0 and variance 1/n.
    for n, rows in ((2, r[0::3]), (5, r[1::3]), (1, r[2::3])):
        entries = rows[:, :n, :n]
        assert entries.mean(0).abs().max() < 4 * (1 / n / 2000) ** 0.5
        assert (entries.square().mean(0) - 1 / n).abs().max() < 0.04


def test_a_convex_quadratic_has_its_spectrum_for_curvature() -> None:
    family = ConvexQuadratic(dims=(4, 4))
    drawn = draw(family)
    curvature = vmap(jacrev(jacrev(lambda x, *rest: family.loss({"x": x}, *rest)[0])))(drawn[0]["x"], *drawn[1:])
    want = drawn[2]["spectrum"].double().sort(1).values
    torch.testing.assert_close(torch.linalg.eigvalsh(curvature), want, atol=1e-5, rtol=1e-5)


def test_noise_moves_the_origin() -> None:
    family = ConvexQuadratic(dims=(3, 3), noise=0.5)
    params, buffers, data, batch = draw(family, split="train")
    moved = data | {"origin": data["origin"] + 0.5 * torch.einsum("lij,li->lj", data["rotation"], batch["noise"])}
    still = {"noise": torch.zeros_like(batch["noise"])}
    want = vmap(family.loss)(params, buffers, moved, still)[0]
    torch.testing.assert_close(vmap(family.loss)(params, buffers, data, batch)[0], want, rtol=1e-5, atol=1e-6)
    assert not draw(family)[3]["noise"].any()


def z_frame(family: Landscape, z: Tensor, **data: float) -> Tensor:
    """The value at z ``[dim]``, all entries active, the spectrum 1."""
    given = {"active": torch.ones_like(z), "spectrum": torch.ones_like(z)}
    return family.value(z, given | {name: torch.tensor(value) for name, value in data.items()})


def test_rosenbrock_is_scipys_over_the_condition() -> None:
    u = torch.randn(7, generator=generator(), dtype=torch.float64)
    got = z_frame(Rosenbrock(), u - 1, condition=100.0)
    torch.testing.assert_close(100 * got, torch.tensor(rosen(u.numpy())))


def test_rastrigin_is_the_classic_one() -> None:
    z = 3 * torch.randn(7, generator=generator(), dtype=torch.float64)
    want = 10 * 7 + (z.square() - 10 * torch.cos(2 * torch.pi * z)).sum()
    torch.testing.assert_close(z_frame(Rastrigin(), z, amplitude=10.0), want)


def test_a_plateau_is_flat_far_away() -> None:
    z = torch.tensor([[0.1, 0.0], [1.0, 1.0], [1e3, 1e3]], requires_grad=True)
    value = vmap(lambda z: z_frame(Plateau(), z))(z)
    torch.testing.assert_close(value.detach(), torch.tensor([0.005 / 1.005, 0.5, 1 - 1e-6]))
    (grad,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(grad[2], torch.full((2,), 1e-9), rtol=1e-3, atol=0.0)


def test_a_saddle_falls_in_some_directions_and_rises_in_others() -> None:
    family = Saddle(dims=(1, 6), distances=(1e-2, 1e-2))
    drawn = draw(family)
    data = double(drawn[2])
    curvature = vmap(jacrev(jacrev(family.value)))(torch.zeros_like(data["origin"]), data)
    sign = torch.where(data["falling"] > 0, -1.0, 1.0)
    torch.testing.assert_close(curvature, torch.diag_embed(sign * data["spectrum"]))
    assert (data["falling"][:, 0] == 1).all()
    assert (data["falling"] <= data["active"]).all()
    assert 0.3 < data["falling"][:, 1:].sum() / data["active"][:, 1:].sum() < 0.7
    z = torch.einsum("lij,lj->li", data["rotation"], drawn[0]["x"] - data["origin"])
    assert abs(z[data["falling"] > 0].std() / 1e-2 - 1) < 0.2
    rising = (data["active"] - data["falling"]) > 0
    assert abs(z[rising].std() - 1) < 0.2


@pytest.mark.parametrize(
    ("family", "name", "ends"),
    [(Rastrigin(amplitudes=(0.5, 2.0)), "amplitude", (0.5, 2.0)), (Lasso(penalties=(0.1, 0.3)), "penalty", (0.1, 0.3))],
    ids=["rastrigin", "lasso"],
)
def test_what_is_sampled_is_spread_over_its_range(family: TaskFamily, name: str, ends: tuple[float, float]) -> None:
    drawn = family.sample(generator(), 2000)[name].reshape(2000, -1)[:, 0]
    assert ends[0] <= drawn.min() < 1.05 * ends[0]
    assert 0.95 * ends[1] < drawn.max() <= ends[1]
    assert abs(drawn.median() / (ends[0] * ends[1]) ** 0.5 - 1) < 0.05


@pytest.mark.parametrize(
    ("family", "low", "high"),
    [(Rosenbrock(dims=(4, 4)), -3.0, 1.0), (Rastrigin(dims=(4, 4)), -5.12, 5.12)],
    ids=["rosenbrock", "rastrigin"],
)
def test_runs_start_all_over_the_usual_box(family: Landscape, low: float, high: float) -> None:
    params, _, data, _ = draw(family, 500)
    z = torch.einsum("lij,lj->li", data["rotation"], (params["x"] - data["origin"]).float())
    assert low - 1e-4 <= z.min() < low + 0.05
    assert high - 0.05 < z.max() < high + 1e-4
    assert abs(z.mean() - (low + high) / 2) < 0.05 * (high - low)


def test_the_rows_of_lasso_have_the_sampled_condition_and_its_targets_the_noise() -> None:
    family = Lasso(rows=4, dims=(400, 400), conditions=(100.0, 100.0), noise=0.3)
    drawn = draw(family, 20, "train")
    lengths = drawn[2]["a"].norm(dim=2)
    assert (lengths[:, 0] / lengths[:, 1] / 100 - 1).abs().max() < 0.3
    at_minimum = losses(family, minimum(family, drawn[2]), drawn)
    torch.testing.assert_close(at_minimum, 0.5 * (0.3 * drawn[3]["noise"].double()).square().sum(1))


def test_plateaus_start_at_their_radii() -> None:
    params, _, data, _ = draw(Plateau(dims=(64, 64), radii=(1.0, 10.0)), 300)
    radius = (params["x"] - data["origin"]).square().mean(1).sqrt()
    assert 0.7 < radius.min() < 1.5
    assert 7 < radius.max() < 13


@pytest.mark.parametrize("rows", [4, 20], ids=["wide", "tall"])
def test_lasso_is_the_penalised_regression_less_its_minimum(rows: int) -> None:
    family = Lasso(rows=rows, dims=(3, 9))
    drawn = draw(family)
    data = double(drawn[2])
    a, solution, inside = data["a"], data["solution"], data["penalty"] > 0
    subgradient = (data["penalty"] * data["subgradient"]).unsqueeze(2)
    residual = torch.linalg.lstsq(a.mT, subgradient, driver="gelsd").solution  # b - A x*, of which s tells
    torch.testing.assert_close(a.mT @ residual, subgradient, atol=1e-5, rtol=1e-4)

    def objective(x: Tensor) -> Tensor:
        fit = (a @ (x - solution).unsqueeze(2) - residual).square().sum((1, 2))
        return 0.5 * fit + (data["penalty"] * x.abs()).sum(1)

    for x in (drawn[0]["x"], torch.zeros_like(solution)):
        want = objective(x) - objective(solution)
        torch.testing.assert_close(losses(family, x, drawn), want, atol=1e-5, rtol=1e-4)
    count, n = (solution != 0).sum(1), inside.sum(1)
    assert (solution[~inside] == 0).all()
    assert (count >= 1).all()
    assert (count <= (0.5 * n + 0.5)).all()
    assert (data["subgradient"].abs() <= 1).all()
    assert data["subgradient"][solution != 0].equal(solution[solution != 0].sign())


@pytest.mark.parametrize("cls", [ConvexQuadratic, Rosenbrock, Saddle, Plateau, Rastrigin, Lasso])
def test_families_stand_by_themselves(cls: type[TaskFamily]) -> None:
    family = cls()
    assert (losses(family, (drawn := draw(family, 4))[0]["x"], drawn) > 0).all()


def test_a_preset_is_built() -> None:
    from omegaconf import OmegaConf

    node = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "task" / "ill_conditioned.yaml"))
    assert make(node, "task", TaskFamily) == ConvexQuadratic(conditions=(1e3, 1e6))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "make"),
    [
        (r"dims=\[5, 4\]: expected \[lowest, highest\]", lambda: ConvexQuadratic(dims=(5, 4))),
        (r"dims=\[\]", lambda: ConvexQuadratic(dims=None)),
        (r"dims=4 \(int\): expected a tuple or list", lambda: Saddle(dims=4)),
        (r"dims\[0\]=0 ", lambda: Lasso(dims=(0, 4))),
        (r"dims\[0\]=1 .*at least 2", lambda: Rosenbrock(dims=(1, 4))),
        (r"dims\[1\]=2.5 .*whole number", lambda: Plateau(dims=(1, 2.5))),
        (r"conditions\[0\]=0.5 .*at least 1", lambda: ConvexQuadratic(conditions=(0.5, 4))),
        (r"conditions\[1\]=inf", lambda: Lasso(conditions=(1, float("inf")))),
        (r"amplitudes\[0\]=0 .*over 0", lambda: Rastrigin(amplitudes=(0, 1))),
        (r"distances=\[2, 1\]", lambda: Saddle(distances=(2, 1))),
        (r"radii\[1\]='far'", lambda: Plateau(radii=(1.0, "far"))),
        (r"densities=\[0.1, 1.5\].*<= 1", lambda: Lasso(densities=(0.1, 1.5))),
        (r"penalties\[0\]=-1", lambda: Lasso(penalties=(-1, 1))),
        ("rows=0", lambda: Lasso(rows=0)),
        ("noise=-1", lambda: Rosenbrock(noise=-1)),
    ],
)
def test_bad_settings_are_named(text: str, make: Any) -> None:
    with pytest.raises(ConfigurationError, match=text):
        make()
