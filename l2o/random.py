"""Random numbers of lanes: a lane's are its own, whatever other lanes are drawn beside it, on whatever machine.

A draw takes one number, the salt, from a ``torch.Generator``; the numbers of a lane are hashes of the salt, the lane's
id and a counter (as in Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). So processes that share the
lanes of a run among them draw, each for its own lanes only, what one process would have drawn for all of them.
"""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

# splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", OOPSLA, section 5.1;
# constants of the reference implementation, https://prng.di.unimi.it/splitmix64.c). int64 wraps as uint64 does.
_GAMMA, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SALTS = 2**63 - 1
_FINE = 24
"""Bits of a uniform number: 2^-24 is the resolution of float32 in [0.5, 1)."""


class LaneGenerator(torch.Generator):
    """A generator that knows which lanes of the run are being drawn: ``ids``, int64 ``[lanes]``, None for 0, 1, ….

    Only the functions of this module look at the ids; other draws take from it as from any generator.
    """

    ids: Tensor | None = None

    def __new__(cls, device: torch.device | str = "cpu", seed: int = 0, ids: Tensor | None = None) -> LaneGenerator:
        made = super().__new__(cls, device)  # type: ignore[call-arg]
        made.manual_seed(seed)
        made.ids = ids
        return made

    def __init__(self, device: torch.device | str = "cpu", seed: int = 0, ids: Tensor | None = None) -> None:
        super().__init__()


def global_states() -> tuple[Any, ...]:
    """Return what changes when the global generators of torch (of the CPU), NumPy or Python are drawn from; to be
    compared."""
    of_numpy = np.random.get_state()  # noqa: NPY002
    return (
        random.getstate(),
        *(x if isinstance(x, str | int | float) else x.tobytes() for x in of_numpy),
        (torch.get_rng_state().numpy().tobytes()),
    )


def draw_seeds(generator: torch.Generator, count: int) -> Tensor:
    """Draw int64 ``[count]`` on the generator's device, none of them negative; the same whichever lanes are drawn."""
    return torch.randint(_SALTS, (count,), generator=generator, device=generator.device)


def keys(generator: torch.Generator, lanes: int) -> Tensor:
    """Draw one number for each lane, int64 ``[lanes]``, from which more may be hashed (`stream`)."""
    return several_keys(generator, lanes, 1)[0]


def several_keys(generator: torch.Generator, lanes: int, calls: int) -> Tensor:
    """Draw what ``calls`` calls of `keys` draw, int64 ``[calls, lanes]``; on the CPU the very same numbers."""
    ids = getattr(generator, "ids", None)
    if ids is None:
        ids = torch.arange(lanes, device=generator.device)
    return mix(draw_seeds(generator, calls).unsqueeze(1) + (ids + 1) * signed(_GAMMA))


def stream(key: Tensor, call: int) -> Tensor:
    """Return a new key from ``key`` (int64, any shape) for each ``call``, a whole number from 0."""
    return mix(key + signed((call + 1) * _GAMMA))


def hashes(key: Tensor, *shape: int) -> Tensor:
    """Draw int64 ``[*key.shape, *shape]``: numbers of all 64 bits, hashed from each key and a counter."""
    counter = torch.arange(math.prod(shape), device=key.device).reshape(shape) * signed(_GAMMA)
    return mix(key.reshape((*key.shape, *[1] * len(shape))) + counter)


def integers(generator: torch.Generator, high: Tensor | int, lanes: int, *shape: int) -> Tensor:
    """Draw int64 ``[lanes, *shape]``, each from 0 to ``high - 1``.  high: at most 2^31; ``[lanes]`` where lanes
    differ."""
    high = high.reshape(-1, *[1] * len(shape)) if isinstance(high, Tensor) else high
    return hashed_integers(keys(generator, lanes), high, *shape)


def hashed_integers(key: Tensor, high: Tensor | int, *shape: int) -> Tensor:
    """Draw int64 ``[*key.shape, *shape]``, each from 0 to ``high - 1``, hashed from each key; ``high`` broadcasts."""
    return shift(shift(hashes(key, *shape), 33) * high, 31)  # 31 bits, scaled to the range


def uniform(generator: torch.Generator, lanes: int, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Draw float32 ``[lanes, *shape]``, uniform in [low, high), but that rounding may reach ``high`` where it is not
    1."""
    return shift(hashes(keys(generator, lanes), *shape), 64 - _FINE).float() * ((high - low) * 2.0**-_FINE) + low


def log_uniform(generator: torch.Generator, lanes: int, *shape: int, low: float, high: float) -> Tensor:
    """Draw float32 ``[lanes, *shape]``, positive; the logarithm is uniform from that of ``low`` to that of ``high``."""
    drawn = uniform(generator, lanes, *shape, low=math.log(low), high=math.log(high)).exp()
    return drawn.clamp(low, high)  # which rounding may leave


def normal(generator: torch.Generator, lanes: int, *shape: int) -> Tensor:
    """Draw float32 ``[lanes, *shape]``, N(0, 1)."""
    return hashed_normal(keys(generator, lanes), *shape)


def hashed_normal(key: Tensor, *shape: int) -> Tensor:
    """Draw float32 ``[*key.shape, *shape]``, N(0, 1), hashed from each key, by the transform of Box and Muller
    (1958)."""
    bits = hashes(key, *shape)
    # 32 bits for the radius, never 0, and 24 for the angle.
    radius = (shift(bits, 32).double().add_(0.5).mul_(2.0**-32).log_().mul_(-2.0)).sqrt_().float()
    return radius * (shift(bits, 8) & (2**_FINE - 1)).float().mul_(2.0**-_FINE * 2.0 * math.pi).cos_()


def mix(z: Tensor) -> Tensor:
    """Return the output function of splitmix64 of ``z``, int64 to int64, in any shape."""
    z = (z ^ shift(z, 30)) * signed(_MIX1)
    z = (z ^ shift(z, 27)) * signed(_MIX2)
    return z ^ shift(z, 31)


def shift(z: Tensor, bits: int) -> Tensor:
    """Return the logical shift to the right of ``z``, int64 of any shape: torch's own copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def signed(constant: int) -> int:
    """Return the int64 of the same bits as a uint64, whose overflow wraps."""
    return (constant + 2**63) % 2**64 - 2**63
