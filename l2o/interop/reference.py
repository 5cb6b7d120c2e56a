"""What a public learned optimizer is made of, and how the rule of ours that it is is rebuilt from it.

Paths of θ are those of the JAX originals, components joined by ``/``, as flax files have them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from typing import Any

from l2o.checkpoints.store import check_theta
from l2o.types import CheckpointError, ConfigurationError, Kind, Params, Theta, UpdateRule

Settings = Mapping[str, Any]
"""Hyperparameters of a reference, under its own names, as JSON has them."""


def _default_kinds(settings: Settings, params: Params) -> dict[str, Kind]:
    return {}


@dataclass(frozen=True)
class Reference:
    """A public learned optimizer.

    rule: the class of ours.
    theta: takes the tensors that the rule reads out of a dict by the reference's paths; returns them by our names.
    fields: names of its hyperparameters, and our fields for them.
    translated: further names, and our fields with values, given the reference's value.
    sizes: fields that follow from the shapes of our θ.
    fixed: fields that the reference has no hyperparameter for.
    implied: names of hyperparameters that the above say already.
    only: values of further hyperparameters, the only ones that the rule knows.
    unused: beginnings of paths that the reference has and does not read.
    kinds: what each parameter tensor is for, where its axes do not say it.
    """

    rule: type[UpdateRule]
    theta: Callable[[Theta], Theta]
    fields: Mapping[str, str] = field(default_factory=dict)
    translated: Mapping[str, Callable[[Any], dict[str, Any]]] = field(default_factory=dict)
    sizes: Callable[[Theta], dict[str, Any]] = lambda theta: {}
    fixed: Settings = field(default_factory=dict)
    implied: Sequence[str] = ()
    only: Settings = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    kinds: Callable[[Settings, Params], dict[str, Kind]] = _default_kinds

    def rebuild(self, theta: Theta, settings: Settings | None = None) -> tuple[UpdateRule, Theta]:
        """Return the rule and its θ, from the reference's.

        settings: those that are known; what is left out has our default. Raises `CheckpointError` where a tensor is
        missing, left over or of another shape, or a setting is none of this optimizer; `ConfigurationError` for a value
        that makes no sense.
        """
        rest = dict(theta)
        try:
            ours = self.theta(rest)
        except KeyError as error:
            missing = f"θ has no {error}, which {self.rule.__name__} needs; it has {_some(theta)}"
            raise CheckpointError(missing) from None
        surplus = [path for path in rest if not path.startswith(self.unused)]
        if surplus:
            raise CheckpointError(f"θ has {_some(surplus)}, which {self.rule.__name__} has no place for")
        rule = self.rule(**{**self.fixed, **self.sizes(ours), **self._fields(settings or {})})
        return rule, check_theta(rule, ours)

    def _fields(self, settings: Settings) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in settings.items():
            if name in self.fields:
                found[self.fields[name]] = self._value(self.fields[name], value)
            elif name in self.translated:
                found |= self.translated[name](value)
            elif name in self.only and self.only[name] != value:
                raise CheckpointError(f"{name}={value!r}: {self.rule.__name__} knows {self.only[name]!r} only")
            elif name not in {"cls", *self.only, *self.implied}:
                raise CheckpointError(f"{name}={value!r}: {self.rule.__name__} has no such setting")
        return found

    def _value(self, name: str, value: Any) -> Any:
        """Lists as tuples, or as their one number where our field is one."""
        default = next(f.default for f in dataclasses.fields(self.rule) if f.name == name)  # type: ignore[arg-type]
        if isinstance(default, bool) and not isinstance(value, bool):  # the text "False" would count as true
            raise ConfigurationError(f"{name}={value!r}: expected true or false")
        if not isinstance(value, list):
            return value
        return value[0] if isinstance(default, float) and len(value) == 1 else tuple(value)


def _some(names: Collection[str], most: int = 6) -> str:
    listed = ", ".join(repr(name) for name in list(names)[:most])
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed or "nothing"


def take(rest: Theta, names: Mapping[str, str]) -> Theta:
    """Take tensors out of ``rest``, by our names, given the reference's for each."""
    return {ours: rest.pop(theirs) for ours, theirs in names.items()}


def take_layers(rest: Theta, weight: str, bias: str) -> Theta:
    """Take ``w0, b0, w1, ...`` of a network: ``weight`` and ``bias`` are paths with ``{}`` for the number of the
    layer."""
    layers = list(takewhile(lambda i: weight.format(i) in rest, count()))
    names = [(f"{kind}{i}", path.format(i)) for i in layers or [0] for kind, path in (("w", weight), ("b", bias))]
    return take(rest, dict(names))


def take_lstm(rest: Theta, cell: str = "rnn_params/rnn/linear") -> Theta:
    """Take `l2o.ops.recurrent`'s names. The reference's first state is one row of a batch, ``[1, hidden]``."""
    weights = take(rest, {"lstm_w": f"{cell}/w", "lstm_b": f"{cell}/b"})
    state = take(rest, {"lstm_h": "lstm_init_state/hidden", "lstm_c": "lstm_init_state/cell"})
    return weights | {name: t.reshape(-1) for name, t in state.items()}


def hidden_sizes(theta: Theta) -> dict[str, Any]:
    """Return ``hidden``, the units between the first and the last layer of ``w0, w1, ...``."""
    layers = takewhile(lambda name: name in theta, (f"w{i}" for i in count()))
    return {"hidden": tuple(theta[name].shape[-1] for name in layers)[:-1]}
