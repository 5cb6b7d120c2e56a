"""`ModuleTask`: modules and settings that are refused, each with its way out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from modules import Forward, Named, Rows, X, Y, one_batch, task
from tables import generator
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, IterableDataset

from l2o.types import ConfigurationError


class Ragged(Rows):
    def __getitem__(self, i: int) -> Any:
        return torch.ones(i + 1), 0


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


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
