"""`ModuleTask`: initialisations, data in every form, and bad input."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from modules import Forward, Named, Rows, X, Y, one_batch, task, to_pair
from tables import generator
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from l2o.estimators import Backprop, Evolution
from l2o.meta import MetaTraining
from l2o.rules import SGD
from l2o.tasks.stateless import seeded

SOURCES: dict[str, Any] = {
    "tensors": (X, Y),
    "list": [X, Y],
    "TensorDataset": TensorDataset(X, Y),
    "Dataset": Rows(),
    "DataLoader": DataLoader(Rows(), batch_size=5),
    "DataLoader with collate_fn": DataLoader(Named(), batch_size=5, collate_fn=to_pair, shuffle=True),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_batches(name: str) -> None:
    """Rows stay with their targets, and a seed draws the same ones whatever form the data came in."""
    batch = one_batch(task(SOURCES[name], batch_size=None if name.startswith("DataLoader") else 5))
    assert batch["input.0"].shape == (3, 5, 2)
    assert batch["target"].dtype == torch.int64
    assert torch.equal(batch["input.0"], X[batch["target"]])
    assert torch.equal(batch["target"], one_batch(task())["target"])


def test_without_a_batch_size_a_batch_is_everything_in_order() -> None:
    batch = one_batch(task(batch_size=None))
    assert torch.equal(batch["input.0"], X.expand(3, 20, 2))
    assert torch.equal(batch["target"], Y.expand(3, 20))


def test_a_batch_size_of_ones_own_replaces_the_loaders() -> None:
    assert one_batch(task(SOURCES["DataLoader"], batch_size=7))["target"].shape == (3, 7)


def global_states() -> tuple[Any, ...]:
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002


DRAWS: dict[str, Callable[[], float] | None] = {
    "torch": None,
    "NumPy": np.random.rand,
    "NumPy's normal": np.random.randn,
    "Python": random.random,
    "Python's gauss": lambda: random.gauss(0.0, 1.0),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_random_transforms_of_a_loader_follow_the_generator(draw: str) -> None:
    families = [task(DataLoader(Rows(1.0, DRAWS[draw]))) for _ in range(2)]
    before = global_states()
    one, other = (one_batch(families[0], seed=seed)["input.0"] for seed in (0, 1))
    one_batch(families[1], seed=3)
    same = one_batch(families[1], seed=0)["input.0"]
    assert before == global_states()
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])


@pytest.mark.parametrize("draw", DRAWS)
def test_random_transforms_of_a_dataset_are_drawn_once_and_for_all(draw: str) -> None:
    assert one_batch(task(Rows(1.0, DRAWS[draw])))["input.0"].equal(one_batch(task(Rows(1.0, DRAWS[draw])))["input.0"])


def test_global_generators_of_one_seed_draw_different_numbers() -> None:
    with seeded(7, torch.device("cpu")):
        drawn = {
            round(x, 4)
            for x in (
                *torch.rand(9).tolist(),
                *torch.rand(9, dtype=torch.float64).tolist(),
                *np.random.rand(9),  # noqa: NPY002
                *(random.random() for _ in range(9)),
            )
        }
    assert len(drawn) == 36


@pytest.mark.parametrize("own", [np.random.default_rng(0).random, random.Random(0).random])
def test_a_dataset_with_a_generator_of_its_own_is_told_once(own: Callable[[], float]) -> None:
    with pytest.warns(UserWarning, match=r"^train: this Rows gave other tensors .* neither repeats nor resumes"):
        one_batch(family := task(DataLoader(Rows(1.0, own))))
    one_batch(family)
    with pytest.warns(UserWarning, match=r"^valid: this Rows"):
        task(valid=Rows(1.0, own))


@pytest.mark.parametrize("make", [Backprop, Evolution])
@pytest.mark.parametrize("draw", [np.random.rand, random.random])
def test_a_module_that_draws_from_numpy_or_python_is_told_once(make: Any, draw: Callable[[], float]) -> None:
    rule, family = SGD(), task(module=Forward(lambda layer, x: layer(x) * draw()))
    estimator = make(rule, family, lanes=2, horizon=4, truncation=2)
    run = MetaTraining(estimator, rule.init_theta(generator()), torch.optim.SGD, generator())
    with pytest.warns(UserWarning, match="the task drew from a global generator of torch, NumPy or Python"):
        run.outer_step()
    run.outer_step()


def test_what_is_missing_in_a_dataset_is_no_random_number() -> None:
    one_batch(task(DataLoader(Rows(1.0, lambda: torch.nan))))


def test_several_inputs_go_to_the_module_in_order() -> None:
    bilinear = nn.Bilinear(2, 2, 1)
    family = task((X, X.flip(1) / 9, Y[:, None].float()), module=bilinear, criterion=nn.MSELoss())
    g = generator()
    data = family.sample(g, 1)
    params, buffers = family.init(data, g)
    batch = {name: t[0] for name, t in family.batch(data, "train", g).items()}
    loss, _ = family.loss({name: p[0] for name, p in params.items()}, buffers, {}, batch)
    bilinear.load_state_dict({name: p[0] for name, p in params.items()})
    expected = nn.functional.mse_loss(bilinear(batch["input.0"], batch["input.1"]), batch["target"])
    torch.testing.assert_close(loss, expected)


class Attends(nn.Sequential):
    """A layer, attention of the batch to itself, and normalisation."""

    def forward(self, x: Tensor) -> Tensor:
        linear, attention, norm = self
        h = linear(x)
        return norm(attention(h, h, h, need_weights=False)[0])


def test_an_instance_is_redrawn_for_every_lane_and_left_alone() -> None:
    module = Attends(nn.Linear(2, 20), nn.MultiheadAttention(20, 2), nn.BatchNorm1d(20))
    before = {name: t.clone() for name, t in module.state_dict().items()}
    params, buffers = task(module=module).init({"lane": torch.arange(3)}, generator())
    for name in ("0.weight", "0.bias", "1.in_proj_weight", "1.out_proj.weight"):
        assert not torch.equal(params[name][0], params[name][1])
        assert not torch.equal(params[name][0], before[name])
    assert torch.equal(params["1.out_proj.bias"], torch.zeros(3, 20))  # as nn.MultiheadAttention starts
    assert buffers["2.num_batches_tracked"].tolist() == [0, 0, 0]
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_a_lane_starts_as_its_seed_says() -> None:
    """An instance and a function that makes it start alike: reset_parameters draws what the constructor does."""
    by_instance, _ = task(module=nn.Linear(2, 20)).init({"lane": torch.arange(3)}, generator())
    by_function, _ = task(module=lambda: nn.Linear(2, 20)).init({"lane": torch.arange(3)}, generator())
    assert all(torch.equal(p, by_function[name]) for name, p in by_instance.items())


def test_modules_that_draw_from_numpy_or_python_start_as_their_seed_says() -> None:
    def make() -> nn.Module:
        layer = nn.Linear(2, 20)
        nn.init.constant_(layer.weight, np.random.rand())  # noqa: NPY002
        nn.init.constant_(layer.bias, random.random())
        return layer

    first, again = (task(module=make).init({"lane": torch.arange(2)}, generator())[0] for _ in range(2))
    assert all(torch.equal(p, again[name]) for name, p in first.items())
    assert not any(torch.equal(p[0], p[1]) for p in first.values())


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_what_parametrized_weights_are_made_from_is_redrawn(norm: Callable[[nn.Module], nn.Module]) -> None:
    """As if the layer had been drawn and parametrized afterwards."""
    by_instance, _ = task(module=norm(nn.Linear(2, 20))).init({"lane": torch.arange(3)}, generator())
    by_function, _ = task(module=lambda: norm(nn.Linear(2, 20))).init({"lane": torch.arange(3)}, generator())
    for name, p in by_instance.items():
        torch.testing.assert_close(p, by_function[name])
        assert not torch.equal(p[0], p[1])


def test_the_text_of_a_task_names_its_parts_and_prints_no_tensors() -> None:
    family = task(module=nn.Linear(2, 20), train=(X, Y), valid=DataLoader(Rows(), batch_size=5))
    assert repr(family) == (
        "ModuleTask(Linear of 60 parameters, CrossEntropyLoss, train=[20, 2] [20], valid=Rows of 20, batch_size=5)"
    )


def test_frozen_parameters_travel_with_the_buffers() -> None:
    module = nn.Linear(2, 20)
    module.bias.requires_grad_(False)
    params, buffers = task(module=module).init({"lane": torch.arange(3)}, generator())
    assert set(params) == {"weight"}
    assert set(buffers) == {"bias"}
