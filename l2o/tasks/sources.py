"""Where a `ModuleTask` gets its examples: tensors, a ``Dataset``, or a ``DataLoader``."""

from __future__ import annotations

import abc
import warnings
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from l2o.random import integers, keys
from l2o.tasks.stateless import reseed, seeded, untouched
from l2o.types import ConfigurationError

_TRIED = 8
"""Examples of a dataset that are read a second time."""

Examples = Sequence[Tensor] | Dataset[Any] | DataLoader[Any]


class Source(abc.ABC):
    """Examples, drawn with replacement; ``device`` is where they lie."""

    device = torch.device("cpu")

    @abc.abstractmethod
    def draw(self, generator: torch.Generator, lanes: int) -> tuple[Tensor, ...]:
        """Draw the tensors of a batch for every lane, inputs before the target, each ``[lanes, batch, ...]``."""


class TensorSource(Source):
    """Tensors with one entry an example, copied once to each device that asks; no ``batch_size``: all, in order."""

    def __init__(self, tensors: tuple[Tensor, ...], batch_size: int | None) -> None:
        self._batch_size = batch_size
        self.device = tensors[0].device
        self._by_device = {self.device: tensors}
        self._host = tensors

    def __repr__(self) -> str:
        return " ".join(f"{list(t.shape)}" for t in self._host)

    def draw(self, generator: torch.Generator, lanes: int) -> tuple[Tensor, ...]:
        tensors = self._on(generator.device)
        if self._batch_size is None:
            return tuple(t.expand(lanes, *t.shape) for t in tensors)
        index = integers(generator, len(tensors[0]), lanes, self._batch_size)
        return tuple(t[index] for t in tensors)

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._by_device:
            self._by_device[device] = tuple(t.to(device) for t in self._host)
        return self._by_device[device]


class LoaderSource(Source):
    """The dataset and ``collate_fn`` of a ``DataLoader``; a batch is gathered on the host, which waits for the device.

    Its sampler, shuffling and workers are not used: the order comes from the run's generator, so that a resumed run
    goes on as it would have. Random transforms of the dataset (by the global generators of torch, NumPy or Python) are
    seeded from there, too; one that draws otherwise is warned of at the first batch.
    """

    def __init__(self, name: str, loader: DataLoader[Any], batch_size: int) -> None:
        self._name = name
        self._dataset: Any = loader.dataset
        self._collate = loader.collate_fn
        self._batch_size = batch_size
        self._tried = False

    def __repr__(self) -> str:
        return f"{type(self._dataset).__name__} of {len(self._dataset)}"

    def draw(self, generator: torch.Generator, lanes: int) -> tuple[Tensor, ...]:
        index = integers(generator, len(self._dataset), lanes, self._batch_size).tolist()
        own = [int(key) for key in keys(generator, lanes)]
        with untouched(generator.device):
            batches = [self._gather(row, key, generator.device) for row, key in zip(index, own, strict=True)]
            if not self._tried:
                again = [self._gather(row, key, generator.device) for row, key in zip(index, own, strict=True)]
                _warn_unless_same(self._name, self._dataset, chain(*batches), chain(*again))
            self._tried = True
        return tuple(torch.stack(each).to(generator.device) for each in zip(*batches, strict=True))

    def _gather(self, rows: list[int], seed: int, device: torch.device) -> tuple[Tensor, ...]:
        reseed(seed, device)
        return _items(self._name, self._collate([self._dataset[i] for i in rows]))


def as_source(name: str, examples: Examples, batch_size: int | None) -> Source:
    """Return ``examples`` as a `Source`; raises `ConfigurationError`, which calls them ``name``, if they cannot be
    one."""
    dataset = examples.dataset if isinstance(examples, DataLoader) else examples
    if isinstance(dataset, IterableDataset):
        raise ConfigurationError(
            f"{name}: an IterableDataset cannot be resumed nor drawn from at random; hand over a map-style Dataset"
        )
    if isinstance(examples, DataLoader):
        return LoaderSource(name, examples, _loader_batch_size(name, examples, batch_size))
    return TensorSource(_stack(name, examples), batch_size)


def _loader_batch_size(name: str, loader: DataLoader[Any], batch_size: int | None) -> int:
    if not len(loader.dataset):  # type: ignore[arg-type]
        raise ConfigurationError(f"{name}: the dataset of this DataLoader is empty, expected at least one example")
    size = batch_size or loader.batch_size
    if size is None:
        raise ConfigurationError(f"{name}: this DataLoader has no batch_size; give ModuleTask one")
    return size


def _stack(name: str, examples: Sequence[Tensor] | Dataset[Any]) -> tuple[Tensor, ...]:
    """All examples as tensors, checked. A dataset's random transforms are drawn once, here."""
    if isinstance(examples, TensorDataset):
        examples = examples.tensors
    tensors = _items(name, _read(name, examples) if isinstance(examples, Dataset) else examples)
    lengths = [len(t) if t.ndim else 0 for t in tensors]
    if min(lengths) == 0 or min(lengths) != max(lengths):
        raise ConfigurationError(f"{name}: tensors with {lengths} entries, expected as many in each, and at least one")
    if isinstance(examples, Dataset):
        _warn_unless_same(name, examples, (t[:_TRIED] for t in tensors), _items(name, _read(name, examples, _TRIED)))
    return tensors


def _read(name: str, dataset: Any, most: int | None = None) -> Any:
    """The first examples, collated: at most ``most``, or all."""
    try:
        with seeded(0, torch.device("cpu")):
            return default_collate([dataset[i] for i in range(len(dataset))[:most]])
    except (TypeError, RuntimeError, IndexError) as error:
        raise ConfigurationError(
            f"{name}: the examples of this {type(dataset).__name__} cannot be stacked to tensors ({error}); "
            "hand over a DataLoader with a collate_fn that can"
        ) from error


def _warn_unless_same(name: str, dataset: Any, first: Iterable[Tensor], again: Iterable[Tensor]) -> None:
    """Warns of a dataset that gives other tensors when it is read a second time from one seed."""
    if all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(first, again, strict=True)):
        return
    warnings.warn(
        f"{name}: this {type(dataset).__name__} gave other tensors when read again with the same seed, so that a run "
        "neither repeats nor resumes; random transforms have to draw from the global generators of torch, NumPy or "
        "Python, which are seeded here, not from one of their own",
        UserWarning,
        stacklevel=2,
    )


def _items(name: str, items: Any) -> tuple[Tensor, ...]:
    if isinstance(items, tuple | list) and len(items) > 1 and all(isinstance(item, Tensor) for item in items):
        return tuple(items)
    came = type(items).__name__
    if isinstance(items, tuple | list):
        kinds = sorted({type(item).__name__ for item in items})
        came = f"a {came} of {len(items)} ({', '.join(kinds)})"
    raise ConfigurationError(
        f"{name}: {came}, expected two or more tensors: the module's inputs in their order, then the target "
        "(a DataLoader's collate_fn can make them so)"
    )
