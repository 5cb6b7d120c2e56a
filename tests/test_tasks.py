"""What holds for every task family, and the analytic and image families in particular."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from analytic import ANALYTIC, AUGMENTED
from networks import LANES, NETWORKS, draw, lane
from tables import generator
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.data import DataLoader, TensorDataset

from l2o.bench.checks import HostReads
from l2o.random import LaneGenerator
from l2o.tasks import DiabetesMLP, ImageMLP, ModuleTask, Quadratic, Repeated, TableClassifier
from l2o.tasks.data import image_split
from l2o.types import ConfigurationError, TaskFamily, UnknownNameError

DRAW = torch.Generator().manual_seed(1)
EXAMPLES = (torch.randn(24, 3, generator=DRAW), torch.randint(5, (24,), generator=DRAW))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 5))


def module_task(module: Any, examples: Any) -> ModuleTask:
    return ModuleTask(module, nn.CrossEntropyLoss(), examples, examples, batch_size=8)


FAMILIES: dict[str, TaskFamily] = {
    "quadratic": Quadratic(dim=4, noise=0.5),
    "image": ImageMLP(width=8, depth=2, activation="gelu", batch_size=16),
    "module": module_task(net(), EXAMPLES),
    "factory": module_task(net, TensorDataset(*EXAMPLES)),
    "loader": module_task(net, DataLoader(TensorDataset(*EXAMPLES))),
    "table": DiabetesMLP(width=4, batch_size=8),
    "table classes": TableClassifier(width=4, batch_size=8),
    "repeated": Repeated(module_task(net, EXAMPLES), copies=2),
} | {**NETWORKS, **ANALYTIC, **AUGMENTED}
SPLITS = ("train", "valid")


def flat(arguments: list[dict[str, Tensor]]) -> list[Tensor]:
    return [t for each in arguments for t in each.values()]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> TaskFamily:
    return FAMILIES[request.param]


@pytest.mark.parametrize("split", SPLITS)
def test_every_tensor_has_a_lane_axis_and_lies_where_the_generator_does(family: TaskFamily, split: str) -> None:
    arguments = draw(family, split)
    params, _, data, batch = arguments
    assert params
    assert data
    assert batch
    assert all(len(t) == LANES and t.device == DRAW.device and not t.requires_grad for t in flat(arguments))
    assert all(p.is_floating_point() for p in params.values())


@pytest.mark.parametrize("split", SPLITS)
def test_the_generator_decides_everything(family: TaskFamily, split: str) -> None:
    one, same, other = (draw(family, split, seed=seed) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(flat(one), flat(same), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one[0].values(), other[0].values(), strict=True))


@pytest.mark.parametrize("split", SPLITS)
def test_the_global_generators_are_left_alone(family: TaskFamily, split: str) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    vmap(family.loss)(*draw(family, split))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "repeated"])
def test_lanes_are_independent(name: str) -> None:
    params, _, _, batch = draw(FAMILIES[name], "train")
    varying = [t for t in params.values() if not torch.equal(t, t[:1].expand_as(t))]  # BatchNorm starts at 1 and 0
    assert varying
    varied = [t for k, t in batch.items() if k != "share"]  # effective batch sizes may be equal by chance
    for drawn in (varying, varied):
        assert all(not torch.equal(t[i], t[j]) for t in drawn for i in range(LANES) for j in range(i))


@pytest.mark.parametrize("split", SPLITS)
def test_loss_writes_to_none_of_its_inputs(family: TaskFamily, split: str) -> None:
    arguments = draw(family, split)
    before = [t.clone() for t in flat(arguments)]
    vmap(family.loss)(*arguments)
    family.loss(*lane(arguments, 0))
    assert all(torch.equal(a, b) for a, b in zip(before, flat(arguments), strict=True))


@pytest.mark.parametrize("split", SPLITS)
def test_a_lane_among_many_equals_that_lane_alone(family: TaskFamily, split: str) -> None:
    arguments = draw(family, split)
    losses, buffers = vmap(family.loss)(*arguments)
    assert losses.shape == (LANES,)
    for k in range(LANES):
        loss, alone = family.loss(*lane(arguments, k))
        torch.testing.assert_close(losses[k], loss)
        torch.testing.assert_close({name: t[k] for name, t in buffers.items()}, alone)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.keyed and name != "repeated"])
def test_a_lane_is_drawn_the_same_beside_any_others(name: str) -> None:
    def drawn(ids: list[int]) -> list[Tensor]:
        g, family = LaneGenerator("cpu", 7, torch.tensor(ids)), FAMILIES[name]
        data = family.sample(g, len(ids))
        found = [data, *family.init(data, g), *(family.batch(data, split, g) for split in SPLITS)]
        return [t for each in found for key, t in each.items() if not key.endswith("lane")]  # which numbers those drawn

    for whole, part in zip(drawn([0, 1, 2, 3, 4]), drawn([3, 1]), strict=True):
        assert torch.equal(whole[[3, 1]], part)


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_and_loss_do_not_wait_for_the_device(name: str) -> None:
    family = FAMILIES[name]
    params, buffers, data, _ = draw(family, "train")
    with HostReads() as reads:
        vmap(family.loss)(params, buffers, data, family.batch(data, "train", generator()))
    assert (reads.count > 0) == (name == "loader")  # which says that it waits


def test_quadratic_is_the_papers() -> None:
    family = Quadratic(dim=3, noise=0.5)
    params, buffers, data, batch = lane(draw(family, "train"), 0)
    loss, _ = family.loss(params, buffers, data, batch)
    residual = data["w"] @ params["x"] - data["y"] - 0.5 * batch["noise"]
    torch.testing.assert_close(loss, residual @ residual)


def test_quadratic_is_noiseless_in_validation() -> None:
    noisy, plain = Quadratic(noise=3.0), Quadratic()
    arguments = draw(noisy, "valid")
    assert torch.equal(vmap(noisy.loss)(*arguments)[0], vmap(plain.loss)(*arguments)[0])


def test_quadratic_scales_and_distribution() -> None:
    params, _, data, batch = draw(Quadratic(dim=10, init_scale=0.01), "train", lanes=2000)
    for drawn, scale in ((data["w"], 1.0), (data["y"], 1.0), (batch["noise"], 1.0), (params["x"], 0.01)):
        assert abs(drawn.mean().item()) < 0.05 * scale
        assert abs(drawn.std().item() / scale - 1) < 0.05


def test_image_mlp_equals_the_module_it_names() -> None:
    family = ImageMLP(width=8, depth=2, activation="tanh", batch_size=16)
    params, buffers, data, batch = lane(draw(family, "train"), 1)
    layers = [nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 10)]
    assert {name: p.shape for name, p in nn.ModuleList(layers).named_parameters()} == {
        name: p.shape for name, p in params.items()
    }
    nn.ModuleList(layers).load_state_dict(params)
    logits = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])(batch["x"])
    torch.testing.assert_close(family.loss(params, buffers, data, batch)[0], F.cross_entropy(logits, batch["y"]))


def test_image_mlp_starts_as_linear_does() -> None:
    params = draw(ImageMLP(width=16, depth=1), "train", lanes=200)[0]
    for name, fan_in in (("0.weight", 64), ("0.bias", 64), ("1.weight", 16), ("1.bias", 16)):
        bound = fan_in**-0.5
        assert params[name].abs().max() <= bound
        assert abs(params[name].std().item() / (bound / 3**0.5) - 1) < 0.05  # the deviation of a uniform distribution


@pytest.mark.parametrize("split", SPLITS)
def test_image_batches_come_from_their_own_part(split: str) -> None:
    x, y = (draw(ImageMLP(half="meta_test", batch_size=500), split)[3][name].flatten(0, 1) for name in "xy")
    images, labels = image_split("digits", "meta_test", split, "cpu")
    known = {(*image.tolist(), int(label)) for image, label in zip(images, labels, strict=True)}
    drawn = {(*image.tolist(), int(label)) for image, label in zip(x, y, strict=True)}
    assert drawn <= known
    assert len(drawn) > 0.9 * len(known)


class StartsAtY(Quadratic):
    """Its initial parameters depend on the task that was sampled."""

    def init(self, data: dict[str, Tensor], generator: torch.Generator) -> Any:
        return {"x": data["y"].clone()}, {}


@pytest.mark.parametrize("inner", [StartsAtY(dim=3), FAMILIES["factory"]])
def test_repeated_lanes_share_their_problem(inner: TaskFamily) -> None:
    repeated, once = draw(Repeated(inner, 2), "train", lanes=6), draw(inner, "train", lanes=3)
    for r, o in zip(flat(repeated), flat(once), strict=True):
        assert all(torch.equal(r[i], o[i // 2]) for i in range(6))


@pytest.mark.parametrize(
    ("error", "text", "make"),
    [
        (ConfigurationError, "dim=0", lambda: Quadratic(dim=0)),
        (ConfigurationError, "dim=2.5 .*whole number", lambda: Quadratic(dim=2.5)),
        (ConfigurationError, "dim='abc' .*whole number", lambda: Quadratic(dim="abc")),
        (ConfigurationError, "noise='abc' .*finite number", lambda: Quadratic(noise="abc")),
        (ConfigurationError, "noise=-1", lambda: Quadratic(noise=-1.0)),
        (ConfigurationError, "init_scale=nan", lambda: Quadratic(init_scale=float("nan"))),
        (ConfigurationError, "width=0", lambda: ImageMLP(width=0)),
        (ConfigurationError, "width=1.5 .*whole number", lambda: ImageMLP(width=1.5)),
        (ConfigurationError, "depth=True", lambda: ImageMLP(depth=True)),
        (ConfigurationError, "batch_size='1'", lambda: ImageMLP(batch_size="1")),
        (ConfigurationError, "batch_size=8.0", lambda: ModuleTask(net, F.mse_loss, EXAMPLES, batch_size=8.0)),
        (ConfigurationError, "copies=None", lambda: Repeated(Quadratic(), None)),
        (ConfigurationError, "depth=-1", lambda: ImageMLP(depth=-1)),
        (ConfigurationError, "batch_size=0", lambda: ImageMLP(batch_size=0)),
        (UnknownNameError, "'digit'.*did you mean 'digits'.*digits, mnist, mnist_t10k", lambda: ImageMLP("digit")),
        (UnknownNameError, "'test'.*valid: meta_test, meta_train", lambda: ImageMLP(half="test")),
        (UnknownNameError, "'swish'.*valid: elu, gelu, .*relu.*tanh", lambda: ImageMLP(activation="swish")),
        (ConfigurationError, "copies=0", lambda: Repeated(Quadratic(), 0)),
        (ConfigurationError, "lanes=5.*copies=2", lambda: Repeated(Quadratic(), 2).sample(generator(), 5)),
    ],
)
def test_bad_settings_are_named(error: type[Exception], text: str, make: Any) -> None:
    with pytest.raises(error, match=text):
        make()
