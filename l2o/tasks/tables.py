"""Regression and classification on tables."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import cache, cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o.checks import check_int, lookup
from l2o.tasks.data import HALVES, from_scikit_learn, split_indices
from l2o.tasks.layers import CRITERIA
from l2o.tasks.module import ModuleTask
from l2o.types import Batch, Buffers, Params, Split, TaskData, TaskFamily

CLASSIFIED = {"breast_cancer": 2, "wine": 3}
"""Tables with classes, and how many there are."""


@dataclass(frozen=True)
class TableTask(TaskFamily):
    """A perceptron, with ReLU, on the columns of a table of scikit-learn's.

    half: of the rows, ``meta_train`` or ``meta_test``.     batch_size: rows a batch; None for all of them.
    width, depth: of the hidden layers.

    Lanes differ in their initialisation and batches: see `ModuleTask`, which this is one of.
    Raises `UnknownNameError` for an unknown name, `ConfigurationError` for a number out of its range, `DataError` where
    scikit-learn is missing.
    """

    half: str = "meta_train"
    _: KW_ONLY
    batch_size: int | None = 32
    width: int = 32
    depth: int = 2

    keyed = True

    def __post_init__(self) -> None:
        lookup("half", self.half, HALVES)
        least = {"width": 1, "depth": 0} | ({} if self.batch_size is None else {"batch_size": 1})
        for name, bound in least.items():
            check_int(name, getattr(self, name), bound)

    @property
    @abc.abstractmethod
    def outputs(self) -> int:
        """Of the network."""

    @abc.abstractmethod
    def measure(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the loss, 0-d, of outputs ``[batch, outputs]`` and targets."""

    @abc.abstractmethod
    def part(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return columns float32 ``[n, columns]`` and targets of the rows of a split; not to be written to."""

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        return self._task.sample(generator, lanes)

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        return self._task.init(data, generator)

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        return self._task.batch(data, split, generator)

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        return self._task.loss(params, buffers, data, batch)

    @cached_property
    def _task(self) -> ModuleTask:
        return ModuleTask(self._module, self.measure(), self.part("train"), self.part("valid"), self.batch_size)

    def _module(self) -> nn.Module:
        sizes = [self.part("train")[0].shape[1], *[self.width] * self.depth]
        hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(sizes[-1], self.outputs))


@dataclass(frozen=True)
class DiabetesMLP(TableTask):
    """From ten measurements of a patient to the course of the disease, by the mean squared error.

    The table is ``load_diabetes`` (Efron et al. 2004, "Least angle regression"): 442 patients, 221 in each half.
    Columns and target are standardised by the patients for training, so that a constant scores about 1.
    Everything else as in `TableTask`.
    """

    @property
    def outputs(self) -> int:
        return 1

    def measure(self) -> Callable[[Tensor, Tensor], Tensor]:
        return F.mse_loss

    def part(self, split: Split) -> tuple[Tensor, Tensor]:
        return diabetes_split(self.half, split)


@dataclass(frozen=True)
class TableClassifier(TableTask):
    """From measurements to classes; of depth 0 logistic regression, which is convex.

    dataset: a key of ``CLASSIFIED``. Of scikit-learn's ``load_breast_cancer`` (Street et al. 1993, "Nuclear feature
        extraction for breast tumor diagnosis") 284 or 285 of 569 tumours make a half, of ``load_wine`` (Aeberhard et
        al. 1992) 89 of 178 wines. Columns are standardised by the rows for training.
    criterion: a key of ``CRITERIA``.
    Everything else as in `TableTask`.
    """

    _: KW_ONLY
    dataset: str = "breast_cancer"
    criterion: str = "cross_entropy"

    def __post_init__(self) -> None:
        super().__post_init__()
        lookup("dataset", self.dataset, CLASSIFIED)
        lookup("criterion", self.criterion, CRITERIA)
        self._task  # noqa: B018  made now: its first use may be inside `torch.func.vmap`, where no module can be made

    @property
    def outputs(self) -> int:
        return CLASSIFIED[self.dataset]

    def measure(self) -> Callable[[Tensor, Tensor], Tensor]:
        return CRITERIA[self.criterion]

    def part(self, split: Split) -> tuple[Tensor, Tensor]:
        return classified_split(self.dataset, self.half, split)


@cache
def diabetes_split(half: str, split: str) -> tuple[Tensor, Tensor]:
    """Return one part of the table: columns float32 ``[n, 10]`` and target ``[n, 1]``; not to be written to."""
    columns, target = _load("diabetes", scaled=False)
    known, part = _rows(len(target), half, split)
    return _standardised(columns, known)[part], _standardised(target.unsqueeze(1), known)[part]


@cache
def classified_split(dataset: str, half: str, split: str) -> tuple[Tensor, Tensor]:
    """Return one part of a table: columns float32 ``[n, columns]`` and classes int64 ``[n]``; not to be written to."""
    columns, target = _load(dataset)
    known, part = _rows(len(target), half, split)
    return _standardised(columns, known)[part], target[part].long()


def _load(dataset: str, **settings: bool) -> tuple[Tensor, Tensor]:
    """Columns ``[n, columns]`` and targets ``[n]`` of a whole table."""
    columns, target = from_scikit_learn(dataset, return_X_y=True, **settings)
    return torch.from_numpy(columns), torch.from_numpy(target)


def _rows(n: int, half: str, split: str) -> tuple[Tensor, Tensor]:
    """Which of ``n`` rows are for training, and which are those of a split."""
    known, part = (torch.from_numpy(split_indices(n, half, name)) for name in ("train", split))
    return known, part


def _standardised(table: Tensor, known: Tensor) -> Tensor:
    return ((table - table[known].mean(0)) / table[known].std(0)).float()
