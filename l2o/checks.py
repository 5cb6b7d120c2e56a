"""Checks of settings, each with one message: what came, what was expected."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from typing import Any, TypeVar

from l2o.types import ConfigurationError, UnknownNameError


def check_int(name: str, value: Any, least: int = 1) -> int:
    """Return ``value`` as an int, if it is a whole number of at least ``least``; raises `ConfigurationError`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or int(value) < least:
        raise ConfigurationError(
            f"{name}={value!r} ({type(value).__name__}): expected a whole number of at least {least}"
        )
    return int(value)


def check_seed(name: str, value: Any) -> int:
    """Return ``value`` as an int, if it is one of 0 to 2^63 - 1; torch takes a bit more, to which outer steps are
    added."""
    if check_int(name, value, 0) >= 2**63:
        raise ConfigurationError(f"{name}={value}: expected a seed of at most 63 bits, {2**63 - 1}")
    return int(value)


def check_float(
    name: str, value: Any, least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> float:
    """Return ``value`` as a float, if it is finite, at least ``least``, over ``above`` and under ``below``; else an
    error."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not (least <= value and above < value < below):
        bounds = (("of at least", least), ("over", above), ("under", below))
        said = " and ".join(f"{words} {bound:g}" for words, bound in bounds if math.isfinite(bound))
        raise ConfigurationError(f"{name}={value!r} ({type(value).__name__}): expected a finite number {said}".rstrip())
    return float(value)


def check_choice(name: str, value: Any, valid: Iterable[str]) -> None:
    """Raises `ConfigurationError` for what is none of ``valid``."""
    if value not in (valid := list(valid)):
        raise ConfigurationError(f"{name}={value!r}: expected one of {', '.join(valid)}")


def check_each(name: str, values: Any, check: Callable[[str, Any], Any]) -> None:
    """Return ``check`` every number of a tuple or list; raises `ConfigurationError`, also for what is neither."""
    if not isinstance(values, tuple | list):
        raise ConfigurationError(
            f"{name}={values!r} ({type(values).__name__}): expected a tuple or list, as in {name}=[{values}]"
        )
    for i, value in enumerate(values):
        check(f"{name}[{i}]", value)


def check_same_length(name: str, values: Sized, partner: str, others: Sized) -> None:
    """Raises `ConfigurationError` unless there are as many ``values`` as ``others``, the setting ``partner``."""
    if len(values) != len(others):
        raise ConfigurationError(
            f"{name}={values!r}: expected as many as {partner}, {len(others)}, because they are multiplied with each "
            "other"
        )


T = TypeVar("T")


def unknown(kind: str, name: str, valid: Collection[str]) -> str:
    """Return the message for a name that does not exist: the nearest ones and all valid ones."""
    near = difflib.get_close_matches(str(name), list(valid))
    hint = f", did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"unknown {kind} {name!r}{hint}; valid: {', '.join(sorted(valid)) or 'none'}"


def lookup(kind: str, name: str, table: Mapping[str, T]) -> T:
    """Return ``table[name]``; where there is none, `UnknownNameError` with the nearest names and all valid ones."""
    if name in table:
        return table[name]
    raise UnknownNameError(unknown(kind, name, table))


def listed(names: Mapping[str, object], base: type, apart: Sequence[type] = ()) -> list[str]:
    """Return the names of a module's subclasses of ``base`` but those set ``apart``; acronyms first, then by letter."""
    classes = {name: x for name, x in names.items() if isinstance(x, type) and issubclass(x, base)}
    return sorted((name for name, x in classes.items() if x not in (base, *apart)), key=lambda n: (not n.isupper(), n))
