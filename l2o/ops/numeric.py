"""Small pieces: constants on a device, transforms that keep hyperparameters valid, a root with a gradient at 0."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from l2o.checks import check_float


def constant(values: Sequence[float] | float, like: Tensor) -> Tensor:
    """Return ``values`` as a 1-d tensor, or one as a 0-d tensor, of the dtype and device of ``like``, copied to the
    device once and then cached. (Of a number that is no tensor, `torch.where` makes one each time.)"""
    # A compiler, which makes it a constant of its own, looks through caches and warns of them.
    make = _constant.__wrapped__ if torch.compiler.is_compiling() else _constant
    return make(values if isinstance(values, float) else tuple(values), like.dtype, like.device)


@functools.lru_cache(maxsize=256)
def _constant(values: tuple[float, ...] | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor born in inference mode could never be used in a differentiated unroll
        return torch.tensor(values, dtype=dtype, device=device)


def of_shapes(fact: Callable[[tuple[int, ...]], float], shapes: Sequence[tuple[int, ...]], like: Tensor) -> Tensor:
    """Return a fact about each of ``shapes``, ``[len(shapes)]``, as `constant`; asked once for equal ones, as most
    are."""
    known = {shape: fact(shape) for shape in dict.fromkeys(shapes)}
    return constant([known[shape] for shape in shapes], like)


def entries_of(shape: tuple[int, ...]) -> float:
    """Return how many entries a tensor of ``shape`` has, at least one, for means of what may be empty."""
    return float(max(math.prod(shape), 1))


def scalar_like(value: float, generator: torch.Generator) -> Tensor:
    """Return a 0-d float32 tensor on the generator's device: a scalar meta-parameter."""
    return torch.tensor(value, dtype=torch.float32, device=generator.device)


def log_of(name: str, value: float) -> float:
    """Return the logarithm of a positive hyperparameter, or `ConfigurationError`; ``exp`` undoes it, whatever was
    learned."""
    return math.log(check_float(name, value, above=0.0))


def logit_of(name: str, value: float) -> float:
    """Return the logit of a hyperparameter strictly between 0 and 1, or `ConfigurationError`; ``sigmoid`` undoes it."""
    value = check_float(name, value, above=0.0, below=1.0)
    return math.log(value) - math.log1p(-value)


def finite(grads: list[Tensor], others: list[Tensor], limit: float | Tensor = math.inf) -> Tensor:
    """Return bool, 0-d: whether the sum of all squares is finite, and the norm of ``grads`` at most ``limit``.

    grads, others: of one device, one gradient at least.

    Rules square what they see: a gradient of 1e20 is finite in float32, but its second moment would stay infinite.
    """
    squares = torch.stack(torch._foreach_norm([*grads, *others])).square()
    ok = squares.sum().isfinite()
    return ok if isinstance(limit, float) and limit == math.inf else ok & (squares[: len(grads)].sum() <= limit * limit)


def safe_sqrt(x: Tensor) -> Tensor:
    """Return the square root of ``x >= 0``, of any shape, whose derivative at 0 is 0 instead of infinite.

    A dead unit's gradient is exactly 0, its second moment too, and ``inf * 0`` would make the meta-gradient NaN. Where
    the root stands in ``m / (sqrt(v) + eps)`` with ``v`` a sum of squares, 0 is also what finite differences give.
    """
    if not _is_differentiated():
        return x.sqrt().nan_to_num(0.0, math.inf)
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, constant(1.0, x)).sqrt(), constant(0.0, x))


def over_root(x: Tensor, squares: Tensor) -> Tensor:
    """Return ``x / sqrt(squares)``, of shapes that broadcast; 0, with derivative 0, where ``squares`` is 0: no epsilon,
    so no scale is too small."""
    if not _is_differentiated():
        return x * squares.rsqrt().nan_to_num(0.0, 0.0, 0.0)
    positive = squares > 0
    roots = torch.where(positive, squares, constant(1.0, squares)).rsqrt()
    return x * torch.where(positive, roots, constant(0.0, squares))


def _is_differentiated() -> bool:
    """Whether a derivative may be asked for, or a compiler joins operations; else one does for what takes three."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or forward_ad._current_level >= 0


def watched() -> bool:
    """Say whether a compiler or a transform of torch, forward mode included, sees what is done to tensors, which then
    have no memory to look at."""
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def unit(x: Tensor, axes: tuple[int, ...], size: float = 1.0) -> Tensor:
    """Return ``x [*shape]`` at the norm ``size`` along axes; zeros stay zero."""
    if _is_differentiated():
        return over_root(x, x.square().sum(axes, keepdim=True) / size**2)
    norms = torch.linalg.vector_norm(x, dim=axes, keepdim=True)
    return x * (constant(size, norms) / norms).nan_to_num(0.0, 0.0, 0.0)


def flat(tensors: Tensor) -> Tensor:
    """Return ``tensors [k, *shape]`` as ``[k, entries]``."""
    return tensors.reshape(len(tensors), math.prod(tensors.shape[1:]))


def square_sums(parts: Iterable[Tensor]) -> Tensor:
    """Return sums of squares of all tensors, ``[k, *shape]`` a part: where nothing is differentiated, without writing
    all squares."""
    rows = map(flat, parts)
    if _is_differentiated():
        return torch.cat([x.square().sum(1) for x in rows])
    return torch.cat([torch.linalg.vector_norm(x, dim=1) for x in rows]).square()


def safe_rsqrt(x: Tensor) -> Tensor:
    """Return ``1 / sqrt(x)``, like ``x > 0``, whose derivative is 0 where the true one would overflow float32.

    The second moment of a gradient that is exactly 0 is 1e-33 or so where the reference adds its epsilon to the square
    only; that of the root is then infinite, and times the momentum's 0 it would be NaN.
    """
    return torch.where(x > 1e-24, x, x.detach()).rsqrt()
