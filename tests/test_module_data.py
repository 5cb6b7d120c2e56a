"""`ModuleTask`: initialisations, data in every form, and bad input."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from l2o.estimators import Backprop, Evolution
from l2o.meta import MetaTraining
from l2o.rules import SGD
from l2o.tasks import ModuleTask
from l2o.tasks.stateless import seeded
from l2o.types import ConfigurationError, TaskFamily

X, Y = torch.arange(40.0).reshape(20, 2), torch.arange(20)


class Rows(Dataset[Any]):
    """Map-style; the target is a Python number, the input random by ``noise``."""

    def __init__(self, noise: float = 0.0, draw: Callable[[], float] | None = None) -> None:
        self.noise, self.draw = noise, draw

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i >= len(X):
            raise IndexError(i)
        return X[i] + self.noise * (self.draw() if self.draw else torch.randn(2)), int(Y[i])


class Ragged(Rows):
    def __getitem__(self, i: int) -> Any:
        return torch.ones(i + 1), 0


class Named(Rows):
    def __getitem__(self, i: int) -> Any:
        return {"x": X[i], "y": int(Y[i])}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


def to_pair(items: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    return torch.stack([item["x"] for item in items]), torch.tensor([item["y"] for item in items])


def task(train: Any = (X, Y), **options: Any) -> ModuleTask:
    given = {"module": nn.Linear(2, 20), "criterion": nn.CrossEntropyLoss(), "batch_size": 5} | options
    return ModuleTask(train=train, **given)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_batch(family: TaskFamily, split: Any = "train", seed: int = 0, lanes: int = 3) -> dict[str, Tensor]:
    g = generator(seed)
    return family.batch(family.sample(g, lanes), split, g)


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


class Forward(nn.Module):
    """A layer, and a forward of one's own: ``function(layer, x)``."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Any], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.function = layer or nn.Linear(2, 20), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer, x)


def recurrent(layer: nn.Module, pack: bool = False) -> nn.Module:
    def forward(layer: nn.Module, x: Tensor) -> Tensor:
        sequence = x.unsqueeze(1)
        lengths = torch.ones(len(x), dtype=torch.int64)
        return layer(pack_padded_sequence(sequence, lengths, batch_first=True) if pack else sequence)[0]

    return Forward(forward, layer)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (Forward(lambda f, x: f(x) if x.sum() > 0 else f(-x)), "cannot vectorise Forward.*torch.where"),
        (Forward(lambda f, x: f(x) * x.sum().item()), "cannot vectorise Forward.*item"),
        (nn.Sequential(nn.Linear(2, 20), nn.BatchNorm1d(20, momentum=None)), "cannot vectorise Sequential.*item"),
        (Forward(lambda f, x: f(x + torch.rand_like(x))), "rand_like draws"),
        (recurrent(nn.LSTM(2, 4, proj_size=3, batch_first=True)), "proj_size"),
        (recurrent(nn.GRU(2, 4, batch_first=True), pack=True), "packed sequences"),
    ],
)
def test_modules_that_cannot_be_vectorised(module: nn.Module, text: str) -> None:
    family = task(module=module)
    params, buffers = family.init({"lane": torch.arange(3)}, generator())
    with pytest.raises(ConfigurationError, match=f"(?s){text}"):
        vmap(family.loss)(params, buffers, {"lane": torch.arange(3)}, one_batch(family))


class Pair(nn.Linear):
    """A module that returns more than one tensor, as recurrent ones do."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"module": nn.Linear(3, 20)}, r"RuntimeError: mat1 and mat2 shapes cannot be multiplied \(5x2 and 3x20\)"),
        ({"module": nn.Linear(2, 4)}, "IndexError: Target [0-9]+ is out of bounds"),
        ({"module": Pair(2, 20)}, "(TypeError|AttributeError): "),
        ({"criterion": lambda output: output.sum()}, "TypeError: .*takes 1 positional argument"),
    ],
)
def test_what_does_not_run_is_refused_at_once(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"and its criterion do not run on input.0 \[5, 2\] torch.float32"
    ) as told:
        task(**settings)
    assert re.search(reason, str(told.value))


def test_a_criterion_that_does_not_reduce() -> None:
    family = task(criterion=nn.CrossEntropyLoss(reduction="none"))
    params, buffers = family.init({"lane": torch.arange(3)}, generator())
    with pytest.raises(ConfigurationError, match=r"criterion: a loss of shape \[5\], expected 0-d"):
        vmap(family.loss)(params, buffers, {"lane": torch.arange(3)}, one_batch(family))


def writes(change: Callable[[Tensor], Any]) -> nn.Module:
    """A layer that changes its weight before it uses it."""

    def forward(layer: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            change(layer.weight)
        return layer(x)

    return Forward(forward)


def replaces(layer: nn.Module, x: Tensor) -> Tensor:
    layer.weight = nn.Parameter(layer.weight / layer.weight.norm())
    return layer(x)


def ran(module: nn.Module) -> nn.Module:
    """It keeps what it computed, so that torch does not copy it."""
    module.kept = module(X)
    return module


def words(layer: Callable[..., nn.Module], width: int, max_norm: float) -> nn.Module:
    return nn.Sequential(layer(50, 4, max_norm=max_norm), nn.Flatten(), nn.Linear(width, 20))


BAD_MODULES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "clipping": (
        lambda: writes(lambda w: w.clamp_(-1, 1)),
        "this Forward writes to its parameter layer.weight",
    ),
    "standardising": (lambda: writes(lambda w: w.sub_(w.mean())), "writes to its parameter layer.weight"),
    "copying": (lambda: writes(lambda w: w.copy_(w / w.norm())), "writes to its parameter layer.weight"),
    "replacing": (lambda: Forward(replaces), "writes to its parameter layer.weight"),
    "small embedding": (lambda: words(nn.Embedding, 8, 0.1), "writes to its parameter 0.weight"),
    "large embedding": (lambda: words(nn.Embedding, 8, 1e3), "writes to its parameter 0.weight .*max_norm"),
    "bag": (lambda: words(nn.EmbeddingBag, 4, 0.1), "writes to its parameter 0.weight"),
    "scripted": (lambda: torch.jit.script(nn.Linear(2, 20)), "scripted or traced; hand over the module"),
    "scripted part": (lambda: nn.Sequential(torch.jit.script(nn.Linear(2, 20))), "scripted or traced"),
    "replicas": (lambda: nn.DataParallel(nn.Linear(2, 20)), "DataParallel is replicated.*its .module"),
    "lazy": (lambda: nn.LazyLinear(20), "LazyLinear does not know its shapes.*run it once"),
    "lazy buffers": (lambda: nn.Sequential(nn.Linear(2, 20), nn.LazyBatchNorm1d()), "LazyBatchNorm1d does not know"),
    "no values": (lambda: nn.Linear(2, 20, device="meta"), "Linear is on the meta device"),
    "complex": (lambda: nn.Linear(2, 20, dtype=torch.complex64), "parameters of complex64, expected all float32 or"),
    "bfloat16": (lambda: nn.Linear(2, 20).bfloat16(), r"bfloat16, expected .*\.float\(\).*autocast"),
    "half": (lambda: nn.Linear(2, 20).half(), "parameters of float16"),
    "two dtypes": (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 20).double()), "of float32 and float64"),
    "another dtype": (lambda: nn.Linear(2, 20).double(), r"in torch.float64, and its criterion do not run on input.0"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", BAD_MODULES)
def test_modules_that_are_refused_at_once(name: str) -> None:
    """Whether a function makes them or they are handed over themselves."""
    make, text = BAD_MODULES[name]
    data = (X.long(), Y) if "embedding" in name or name == "bag" else (X, Y)
    for module in (make, make()):
        with pytest.raises(ConfigurationError, match=text):
            task(data, module=module)


def test_modules_that_cannot_be_copied_can_be_made_by_a_function() -> None:
    with pytest.raises(ConfigurationError, match=r"this Linear cannot be copied.*hand over a function that makes one"):
        task(module=ran(nn.Linear(2, 20)))
    family = task(module=lambda: ran(nn.Linear(2, 20)))
    assert sorted(family.init({"lane": torch.arange(3)}, generator())[0]) == ["bias", "weight"]


@pytest.mark.parametrize(
    ("text", "make"),
    [
        ("train: an IterableDataset", lambda: task(Stream())),
        ("valid: an IterableDataset", lambda: task(valid=DataLoader(Stream()))),
        ("train: .*DataLoader has no batch_size", lambda: task(DataLoader(Rows(), batch_size=None), batch_size=None)),
        ("train: Tensor, expected two or more", lambda: task(X)),
        (r"train: a tuple of 1 \(Tensor\), expected two or more", lambda: task((X,))),
        ("train: dict, expected two or more.*collate_fn", lambda: task(Named())),
        ("train: dict, expected two or more", lambda: one_batch(task(DataLoader(Named())))),
        ("Ragged cannot be stacked.*collate_fn", lambda: task(Ragged())),
        (r"train: tensors with \[20, 19\] entries", lambda: task((X, Y[1:]))),
        (r"train: tensors with \[0, 0\] entries", lambda: task((X[:0], Y[:0]))),
        ("batch_size=0", lambda: task(batch_size=0)),
        ("Identity has no parameters to train", lambda: task(module=nn.Identity())),
        ("made a int, expected an nn.Module", lambda: task(module=lambda: 3)),
        ("split='valid'.*no data.*pass valid=", lambda: one_batch(task(), "valid")),
    ],
)
def test_bad_settings_are_named(text: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"(?s){text}"):
        make()
