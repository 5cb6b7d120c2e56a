"""Regression on tables."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cache, cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o.checks import check_int, lookup
from l2o.tasks.data import HALVES, split_indices
from l2o.tasks.module import ModuleTask
from l2o.types import Batch, Buffers, DataError, Params, Split, TaskData, TaskFamily

_COLUMNS = 10


@dataclass(frozen=True)
class DiabetesMLP(TaskFamily):
    """A perceptron from ten measurements of a patient to the course of the disease, by the mean squared error.

    The table is scikit-learn's ``load_diabetes`` (Efron et al. 2004, "Least angle regression"): 442 patients, 221 in
    each half. Columns and target are standardised by the patients for training, so that a constant scores about 1.

    half: ``meta_train`` or ``meta_test``.     batch_size: patients a batch; None for all of them.
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
        train, valid = (diabetes_split(self.half, split) for split in ("train", "valid"))
        return ModuleTask(self._module, F.mse_loss, train, valid, self.batch_size)

    def _module(self) -> nn.Module:
        sizes = [_COLUMNS, *[self.width] * self.depth]
        hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(sizes[-1], 1))


@cache
def diabetes_split(half: str, split: str) -> tuple[Tensor, Tensor]:
    """One part of the table: columns float32 ``[n, 10]`` and target ``[n, 1]``; not to be written to."""
    try:
        from sklearn.datasets import load_diabetes
    except ImportError as error:
        raise DataError("DiabetesMLP's table comes with scikit-learn: pip install l2o[train]") from error
    columns, target = load_diabetes(return_X_y=True, scaled=False)
    table = torch.from_numpy(columns), torch.from_numpy(target).unsqueeze(1)
    known, part = (torch.from_numpy(split_indices(len(target), half, name)) for name in ("train", split))
    x, y = (((t - t[known].mean(0)) / t[known].std(0))[part].float() for t in table)
    return x, y
