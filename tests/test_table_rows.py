"""How far rows of tables go in a step, and all parameters in a short run."""

import pytest
import torch
from tables import generator
from torch import nn

from l2o import LearnedOptimizer
from l2o.ops.scales import lengthened, unheld
from l2o.ops.schedules import hastened
from l2o.rules import Steered
from l2o.types import ConfigurationError

SHAPES = [(4000, 32), (32, 4000), (500, 16), (64, 64)]
FORMS = [(128_000,), (128_000,), (500, 16), (64, 64)]


@pytest.mark.parametrize(("size", "factor"), [(0.0, 1.5), (0.5, 2.25), (1.0, 3.0), (20.0, 3.0)])
def test_rows_go_as_far_as_they_are_long(size, factor):
    """A table, of which one is said to be one; neither a wide first layer nor what is no table."""
    squares = torch.tensor([size**2 * rows * columns for rows, columns in SHAPES])
    found = lengthened(torch.full((4,), 2.0), squares, SHAPES, FORMS, [False, False, True, False], 1.5)
    assert torch.allclose(found, 2.0 * torch.tensor([factor, 1.0, factor, 1.0]))


def test_a_table_that_began_as_zeros_has_no_size():
    squares = unheld(torch.tensor([8.0, 8.0]), [({"free": torch.tensor([1.0, 0.0])}, 2)])
    found = lengthened(torch.ones(2), squares, [(4, 2)] * 2, [(4, 2)] * 2, [True, True], 1.5)
    assert torch.allclose(found, torch.tensor([1.5, 3.0]))


@pytest.mark.parametrize("name", ["rows", "haste"])
def test_a_factor_that_would_turn_steps_around_is_refused(name):
    with pytest.raises(ConfigurationError, match=f"{name}=-1.0"):
        Steered(**{name: -1.0})


def test_short_runs_take_longer_steps():
    found = [hastened(torch.tensor(2.0), torch.tensor(float(steps)), 0.5).item() for steps in (0, 50, 75, 150, 2000)]
    assert found == pytest.approx([2 * 3**0.5, 2 * 3**0.5, 2 * 2**0.5, 2.0, 2.0])


def test_steps_of_an_embedding_and_of_a_short_run_are_what_the_fields_say():
    """The first step of the plug-in, of parameters that `torch.nn.Embedding` begins; neither is limited here."""

    def first(steps, **fields):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 3))
        before = [p.detach().clone() for p in model.parameters()]
        rule = Steered(direction="eigenbasis", relative=1e3, tables=True, **fields)
        optimizer = LearnedOptimizer(model.parameters(), (rule, rule.init_theta(generator(0))), total_steps=steps)
        model(torch.arange(30)).square().sum().backward()
        optimizer.step()
        sizes = before[0].square().mean().sqrt().clamp(max=1.0)
        return sizes, [(p.detach() - old).norm() for p, old in zip(model.parameters(), before, strict=True)]

    size, plain = first(50)
    _, rows = first(50, rows=1.5)
    _, hasty = first(50, haste=0.5)
    assert torch.allclose(rows[0], 1.5 * (1.0 + size) * plain[0], rtol=1e-3)
    assert all(torch.allclose(a, b) for a, b in zip(rows[1:], plain[1:], strict=True))
    assert all(torch.allclose(a, 3**0.5 * b, rtol=1e-3) for a, b in zip(hasty, plain, strict=True))
