"""Benchmarks of the field are as hard as they are known to be: solved, as fast as FISTA does, or not by descent."""

import math

import numpy as np
import pytest
import torch

from l2o.evaluation import (
    Baseline,
    Setting,
    condense,
    run_entrant,
)
from l2o.rules import SGD, Adam
from l2o.tasks import Lasso, Quadratic, Rastrigin

SOLVABLE = {
    "quadratic 10": (Quadratic(dim=10), 0.1),  # random matrices are ill-conditioned
    "lasso 5x10": (Lasso(rows=5, dims=(10, 10)), 1e-2),
    "lasso 25x50": (Lasso(rows=25, dims=(50, 50)), 1e-2),
}
"""With the share of the first loss that is left after 400 steps; the minimum of each is 0 by construction."""


@pytest.mark.parametrize(("family", "left"), SOLVABLE.values(), ids=SOLVABLE.keys())
def test_tuned_adam_solves_what_is_convex(family, left):
    kept = condense(run_entrant(Baseline("Adam", Adam(), (0.01, 0.1, 1.0)), Setting("", family, 400, 8, window=1)), 1)
    best = kept.train[-1].min(1)
    assert (best >= 0).all()
    assert np.median(best / kept.train[0, :, 0]) < left


def test_random_quadratics_begin_at_ten():
    """The expected loss at the origin is the number of dimensions; that of the first step is a little above."""
    generator = torch.Generator().manual_seed(0)
    family = Quadratic(dim=10)
    data = family.sample(generator, 4000)
    params, _ = family.init(data, generator)
    first = torch.func.vmap(family.loss)(params, {}, data, family.batch(data, "train", generator))[0]
    assert first.mean() == pytest.approx(10.0, abs=4 * math.sqrt(20 / 4000))


@pytest.mark.parametrize(("rows", "columns"), [(5, 10), (25, 50)])
def test_lasso_is_solved_as_fast_as_fista_is_known_to(rows, columns):
    """Excess at most ``2 L |x_0 - x*|² / (k + 1)²`` (Beck and Teboulle 2009, theorem 4.4), down to rounding."""
    generator = torch.Generator().manual_seed(0)
    family = Lasso(rows=rows, dims=(columns, columns))
    data = {name: t.double() for name, t in family.sample(generator, 8).items()}
    first = family.init(data, generator)[0]["x"].double()
    a, solution, penalty = data["a"], data["solution"], data["penalty"]
    lipschitz = torch.linalg.matrix_norm(a, 2).square().unsqueeze(1)
    x, y, t = first, first, 1.0
    for k in range(1, 201):
        gradient = torch.einsum("lri,lrj,lj->li", a, a, y - solution) - penalty * data["subgradient"]
        after = torch.nn.functional.relu((z := y - gradient / lipschitz).abs() - penalty / lipschitz) * z.sign()
        t, before = (1 + math.sqrt(1 + 4 * t**2)) / 2, t
        x, y = after, after + (before - 1) / t * (after - x)
        noise = torch.zeros(8, rows, dtype=torch.float64)
        excess = torch.func.vmap(family.loss)({"x": x}, {}, data, {"noise": noise})[0]
        bound = 2 * lipschitz[:, 0] * (first - solution).square().sum(1) / (k + 1) ** 2
        assert (excess >= -1e-12).all()
        assert (excess <= bound + 1e-6).all()


@pytest.mark.parametrize("n", [2, 10])
def test_descent_ends_in_local_minima_of_the_egg_crate(n):
    """Near whole numbers, where ``Σ λ z²`` is what is left: Rastrigin's function is not solved by going down."""
    family = Rastrigin(dims=(n, n), conditions=(1.0, 1.0), amplitudes=(10.0, 10.0))
    setting = Setting("", family, 300, 8, window=1)
    final = condense(run_entrant(Baseline("SGD", SGD(), (1e-3,)), setting), 1).train[-1, :, 0]
    # At a local minimum near the whole numbers k the function is Σ k² (1 - 1/(1 + 2 π² α)) up to third order in k/α.
    whole = final / (1 - 1 / (1 + 2 * math.pi**2 * 10.0))
    np.testing.assert_allclose(whole, whole.round(), atol=0.02 * n)
    assert whole.round().max() >= 1
