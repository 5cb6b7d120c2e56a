"""Ordinary modules as pure functions: dropout from a key, attention and recurrent layers with second derivatives.

`Stateless` intercepts the few functions of torch that are not pure, or that `torch.func.vmap` or a second derivative
cannot pass, while a module runs.
"""

from __future__ import annotations

import contextlib
import random
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from l2o.random import hashes, shift, stream
from l2o.tasks.recurrent import CELLS, run_cell, run_layers
from l2o.types import ConfigurationError

_BITS = 24
"""Resolution of a probability: 2^-24, that of float32 in [0.5, 1)."""


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run code that draws from global generators, seeded by `reseed`; they come back untouched, see `untouched`."""
    with untouched(device):
        reseed(seed, device)
        yield


@contextlib.contextmanager
def untouched(device: torch.device) -> Iterator[None]:
    """Leave the global generators of torch (CPU and ``device``), NumPy and Python as they were."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002


def reseed(seed: int, device: torch.device) -> None:
    """Seed the global generators of torch (CPU and ``device``), NumPy and Python, each to a stream of its own."""
    # Not torch.manual_seed, which reseeds every device there is.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    # All three are the Mersenne Twister: from one key they would draw the same numbers.
    low, high = seed % 2**32, seed // 2**32 % 2**32
    random.seed(low + 2**32 * high)
    np.random.seed([low, high, 1])  # noqa: NPY002


def keep_mask(key: Tensor, call: int, shape: tuple[int, ...], p: float) -> Tensor:
    """Return the bool mask of ``shape`` on the key's device, each entry False with probability ``p``: the same on any
    device.

    key: int64, 0-d.     call: which of the calls that share the key this is; each has its own mask.
    """
    top: Tensor = shift(hashes(stream(key, call), *shape), 64 - _BITS)
    return top.ge(round(p * 2**_BITS))


class Stateless(TorchFunctionMode):
    """While active, dropout takes its masks from ``key`` instead of the global generator.

    key: int64, 0-d, or None in evaluation, where dropout that is on all the same is refused.
    Raises `ConfigurationError` for random functions that have no pure counterpart here.
    """

    def __init__(self, key: Tensor | None) -> None:
        super().__init__()
        self.key = key
        self.calls = 0

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        # vmap has no rule for out=, by which spectral norm writes its buffers.
        out = kwargs.pop("out") if isinstance(kwargs.get("out"), Tensor) else None
        replacement = _REPLACEMENTS.get(func)
        result = func(*args, **kwargs) if replacement is None else replacement(self, *args, **kwargs)
        return result if out is None else out.copy_(result)

    def keep(self, shape: tuple[int, ...], p: float) -> Tensor:
        """Return the mask of the next call, of this shape, see `keep_mask`."""
        if self.key is None:
            raise ConfigurationError(
                f"dropout(p={p}) is on in evaluation; call F.dropout with training=self.training, or use nn.Dropout"
            )
        if not 0.0 <= p <= 1.0:
            raise ConfigurationError(f"dropout p={p}: expected a probability between 0 and 1")
        self.calls += 1
        return keep_mask(self.key, self.calls, shape, p)

    def drop(self, x: Tensor, p: float, training: bool, inplace: bool, shape: tuple[int, ...]) -> Tensor:
        """Return ``x`` with entries zeroed by a mask of ``shape`` (broadcast), the rest scaled so that the mean is
        kept."""
        if not training or p == 0.0:
            return x
        scale = self.keep(shape, p).to(x.dtype) * (0.0 if p == 1.0 else 1.0 / (1.0 - p))
        return x.mul_(scale) if inplace else x * scale


def _dropout(mode: Stateless, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return mode.drop(input, p, training, inplace, input.shape)


def _channel_dropout(
    unbatched: int, mode: Stateless, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Whole channels; an input of ``unbatched`` axes has no batch axis before its channels (-1: always has one)."""
    leading = 1 if input.ndim == unbatched else 2
    shape = (*input.shape[:leading], *[1] * (input.ndim - leading))
    return mode.drop(input, p, training, inplace, shape)


def _attention(
    mode: Stateless,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Plain attention: the fused ones have no second derivative, nor dropout from a key.

    query, key, value: ``[..., length, features]``.     options: ``scale`` and ``enable_gqa``.
    """
    if options.get("enable_gqa"):
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], dim=-3) for t in (key, value))
    scale = options.get("scale")
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    weights = _attention_weights(scores, attn_mask)
    return mode.drop(weights, dropout_p, True, False, weights.shape) @ value


def _attention_weights(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the last axis where ``mask`` is True, or with it added where it is a float; no key, no weight."""
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    # As torch has it, a query that may see nothing gets zeros; twice masked, so that no NaN is in the derivatives.
    blind = scores.isneginf().all(-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


# A mode is off while it handles a function, so what multi_head_attention_forward calls would go unseen. This is
# the same code, only that it does not ask for modes on entry and can thus run with the mode on.
_multi_head_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def _multi_head(mode: Stateless, *args: Any, **kwargs: Any) -> Any:
    with mode:
        return _multi_head_attention(*args, **kwargs)


def _recurrent(cell: Any, mode: Stateless, *args: Any, **kwargs: Any) -> Any:
    return run_layers(cell, partial(_dropout, mode), *args, **kwargs)


def _recurrent_cell(cell: Any, mode: Stateless, *args: Any, **kwargs: Any) -> Any:
    return run_cell(cell, *args, **kwargs)


def _embedding(
    mode: Stateless,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """With a dense gradient: sparse ones have neither lanes nor second derivatives."""
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse=False)


def _weight_norm(mode: Stateless, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / |v|``, by its formula: the derivative of torch's own is wrong when differentiated again (torch 2.13)."""
    if dim == -1:  # one size for all of it
        return v * (g / torch.linalg.vector_norm(v))
    sizes = torch.linalg.vector_norm(v.transpose(0, dim).reshape(v.shape[dim], -1), dim=1)
    return v * (g / sizes.view([-1 if axis == dim else 1 for axis in range(v.ndim)]))


def _not_left_aligned(mode: Stateless, *args: Any, **kwargs: Any) -> bool:
    """Keeps nn.TransformerEncoder off nested tensors, which cannot be vectorised."""
    return False


def _refuse_packing(mode: Stateless, *args: Any, **kwargs: Any) -> NoReturn:
    raise ConfigurationError("packed sequences cannot be vectorised over lanes; hand the padded ones to the layer")


def _refuse(func: Any, mode: Stateless, *args: Any, **kwargs: Any) -> NoReturn:
    raise ConfigurationError(
        f"{func.__name__} draws from torch's global generator, so the loss would not be a function of its inputs; "
        "use nn.Dropout (1d, 2d, 3d), or put the random numbers into the data"
    )


def _refuse_in_training(func: Any, mode: Stateless, *args: Any, **kwargs: Any) -> Any:
    """In evaluation these draw nothing. torch.nn.functional passes ``training`` on by its name."""
    return _refuse(func, mode) if kwargs["training"] else func(*args, **kwargs)


_RANDOM = (
    *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.rand_like, torch.randn_like, torch.randint_like),
    *(torch.bernoulli, torch.multinomial, torch.normal, torch.poisson, F.gumbel_softmax),
    *(torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout, torch.native_dropout),
    *(Tensor.bernoulli, Tensor.bernoulli_, Tensor.normal_, Tensor.uniform_, Tensor.random_, Tensor.exponential_),
    *(Tensor.multinomial, Tensor.cauchy_, Tensor.geometric_, Tensor.log_normal_),
)
_RANDOM_IN_TRAINING = (F.alpha_dropout, F.feature_alpha_dropout, F.rrelu)

_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    **{func: partial(_refuse, func) for func in _RANDOM},
    **{func: partial(_refuse_in_training, func) for func in _RANDOM_IN_TRAINING},
    **{getattr(torch, name): partial(_recurrent, cell) for name, cell in CELLS.items()},
    **{getattr(torch, f"{name}_cell"): partial(_recurrent_cell, cell) for name, cell in CELLS.items()},
    torch._pack_padded_sequence: _refuse_packing,
    torch._weight_norm: _weight_norm,
    F.embedding: _embedding,
    torch._nested_tensor_from_mask_left_aligned: _not_left_aligned,
    F.dropout: _dropout,
    F.dropout1d: partial(_channel_dropout, 2),
    F.dropout2d: partial(_channel_dropout, -1),  # torch, too, takes 3 axes for batch, channel and length
    F.dropout3d: partial(_channel_dropout, 4),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head,
}
