"""What the methods of a task family return, checked where the engine receives it.

Only names, types, shapes and dtypes are looked at, so that a check costs microseconds and waits for no device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from l2o.types import Batch, Buffers, ConfigurationError, Grads, L2OError, Params, Split, TaskData, TaskFamily

_TRAINABLE = (torch.float32, torch.float64)
_OF_VMAP = ("vmap", "functorch", "data pointer")
"""Words by which errors of torch.func.vmap are told from those of the loss; the last one is what .numpy() gets."""


def name_of(family: TaskFamily) -> str:
    """Return the class that a user wrote: what repeats or augments a family is passed through to it."""
    while isinstance(inner := getattr(family, "family", None), TaskFamily):
        family = inner
    return type(family).__name__


def check_lanes(what: str, tensors: Any, lanes: int) -> None:
    """Raises `ConfigurationError` unless ``tensors``, which ``what`` returned, are ``[lanes, ...]`` by name."""
    if not isinstance(tensors, Mapping):
        raise ConfigurationError(f"{what}: {_described(tensors)}, expected a dict of tensors [lanes, ...] by name")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.ndim or len(tensor) != lanes:
            raise ConfigurationError(
                f"{what}: {name!r} is {_described(tensor)}, expected a tensor with a leading axis of {lanes} lanes"
            )


def checked_sample(family: TaskFamily, generator: torch.Generator, lanes: int) -> TaskData:
    """Return what ``family.sample`` draws; raises `ConfigurationError` unless it is at least one tensor ``[lanes,
    ...]``."""
    what, data = f"{name_of(family)}.sample", family.sample(generator, lanes)
    check_lanes(what, data, lanes)
    if not data:
        raise ConfigurationError(f"{what}: no tensors, expected at least one; a number of each lane will do")
    return data


def checked_init(family: TaskFamily, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
    """Return what ``family.init`` makes; raises `ConfigurationError` unless it is parameters and buffers ``[lanes,
    ...]``."""
    what, lanes = f"{name_of(family)}.init", len(next(iter(data.values())))
    params, buffers = _pair(what, family.init(data, generator), "(params, buffers)")
    check_lanes(what, params, lanes)
    check_lanes(f"{what} (buffers)", buffers, lanes)
    check_trainable(what, params.values())
    return params, buffers


def checked_batch(family: TaskFamily, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
    """Return what ``family.batch`` draws; raises `ConfigurationError` unless it is tensors ``[lanes, ...]``."""
    batch = family.batch(data, split, generator)
    check_lanes(f"{name_of(family)}.batch", batch, len(next(iter(data.values()))))
    return batch


def check_trainable(what: str, params: Iterable[Tensor]) -> None:
    """Raise `ConfigurationError` unless there are ``params``, of any shape, all float32 or all float64."""
    dtypes = {p.dtype for p in params}
    if not dtypes:
        raise ConfigurationError(f"{what} has no parameters to train, expected at least one tensor")
    if len(dtypes) > 1 or not dtypes <= set(_TRAINABLE):
        came = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ConfigurationError(
            f"{what} has parameters of {came}, expected all float32 or all float64: .float() makes them so, and "
            "torch.autocast in the loss computes in a shorter dtype"
        )


def check_scalar(what: str, loss: Any) -> None:
    """Raises `ConfigurationError` unless ``loss``, which ``what`` returned, is a 0-d floating-point tensor."""
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        raise ConfigurationError(f"{what}: a loss that is {_described(loss)}, expected a 0-d floating-point tensor")
    if loss.ndim:
        raise ConfigurationError(f"{what}: a loss of shape {list(loss.shape)}, expected 0-d; take its mean")


def checked_gradients(family: TaskFamily, grads: Grads, buffers: Buffers, data: TaskData, batch: Batch) -> Any:
    """Return what ``family.transform_gradients`` does; raises `ConfigurationError` unless names and shapes stay as they
    are."""
    what = f"{name_of(family)}.transform_gradients"
    made, after = _pair(what, family.transform_gradients(grads, buffers, data, batch), "(grads, buffers)")
    _check_like(what, made, grads)
    _check_like(f"{what} (buffers)", after, buffers)
    return made, after


def checked_loss(
    family: TaskFamily, params: Params, buffers: Buffers, data: TaskData, batch: Batch
) -> tuple[Tensor, Buffers]:
    """Return ``family.loss`` of one lane: the loss in the dtype of the parameters, buffers in their own.

    Raises `ConfigurationError` where it returns something else than a 0-d loss and the buffers.
    """
    what = f"{name_of(family)}.loss"
    loss, after = _pair(what, family.loss(params, buffers, data, batch), "(loss, buffers)")
    check_scalar(what, loss)
    _check_like(f"{what} (buffers)", after, buffers)
    loss = loss.to(next(iter(params.values())).dtype)
    return loss, {name: t.to(buffers[name].dtype) for name, t in after.items()}


@contextlib.contextmanager
def vectorised(what: str) -> Iterator[None]:
    """Turn what `torch.func.vmap` raises for ``what`` into a `ConfigurationError`; other errors stay as they are."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if isinstance(error, L2OError) or not any(word in text for word in _OF_VMAP):
            raise
        raise ConfigurationError(
            f"torch.func.vmap cannot vectorise {what} over lanes: {text}; write control flow that depends on data with "
            "torch.where, and leave out .item(), .data, data-dependent shapes and torch.utils.checkpoint (estimators "
            "have checkpoint=True)"
        ) from error


def _pair(what: str, came: Any, expected: str) -> tuple[Any, Any]:
    if not isinstance(came, tuple) or len(came) != 2:
        raise ConfigurationError(f"{what}: returned {_described(came)}, expected the tuple {expected}")
    return came


def _check_like(what: str, tensors: Any, like: Mapping[str, Tensor]) -> None:
    if not isinstance(tensors, Mapping):
        raise ConfigurationError(f"{what}: {_described(tensors)}, expected a dict of tensors by name")
    came = {name: _shape(t) for name, t in tensors.items()}
    expected = {name: _shape(t) for name, t in like.items()}
    if came != expected:
        raise ConfigurationError(f"{what}: tensors of shapes {came}, expected those that it was given, {expected}")


def _shape(value: Any) -> list[int] | str:
    return list(value.shape) if isinstance(value, Tensor) else _described(value)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(type(each).__name__ for each in value) or 'nothing'}"
    return "None" if value is None else f"a {type(value).__name__}"
