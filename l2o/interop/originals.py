"""Learned optimizers of google/learned_optimization and amoudgl/celo, by the tensors of their θ, and their rules here.

The one table of what the converter knows. Paths are those of the originals, components joined by ``/``; their matrices
are ``[in, out]``, as ours. What an original keeps without using it is left out: ``rnn_params/linear``, the third output
of the networks of VeLO, Celo and Celo2, and the mixture's weights where Celo mixes a single network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import count, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

import l2o.rules
from l2o.types import CheckpointError, Theta, UpdateRule

Fields = dict[str, Any]

_MLP = r"nn/~/[wb]\d+"
_DECAYS = r"(momentum|rms|adafactor)_decays"
_STACK = r"ff_mod_stack/~/([wb]\d+|w0__\d+)"
_SCHEDULER = r"(rnn_params/(linear|linear_1|linear_2|rnn/linear|step_size)/[wb]|lstm_init_state/(hidden|cell))"
_CONTROLS = r"rnn_params/rnn_to_controls/[wb]"


class Original(NamedTuple):
    """names: patterns of which each tensor matches one, and which all match a tensor.

    rule: the class here.     width: ``(tensor, axis, size)``, where names alone do not tell it from another original.
    fields: hyperparameters that shapes tell.     theta: ours from the original's.
    """

    rule: str
    names: tuple[str, ...]
    fields: Callable[[Theta], Fields]
    theta: Callable[[Theta], Theta]
    width: tuple[str, int, int] | None = None

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these are its tensors, by name and, where that leaves it open, by width."""
        matched = [{pattern for pattern in self.names if re.fullmatch(pattern, name)} for name in tensors]
        if not all(matched) or set().union(*matched) != set(self.names):
            return False
        if self.width is None:
            return True
        name, axis, size = self.width
        return name in tensors and tensors[name].shape[axis : axis + 1] == (size,)

    def make(self, tensors: Theta, settings: Mapping[str, Any]) -> tuple[UpdateRule, Theta]:
        """The rule, with ``settings`` over what shapes tell, and its θ."""
        rule = getattr(l2o.rules, self.rule)(**{**self.fields(tensors), **settings})
        return rule, self.theta(tensors)


def recognize(tensors: Mapping[str, Tensor]) -> tuple[str, Original]:
    """The original that these tensors are of, and its name; raises `CheckpointError`, which says what came."""
    for name, original in ORIGINALS.items():
        if original.fits(tensors):
            return name, original
    saw = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    raise CheckpointError(
        f"tensors of no learned optimizer that is known here: {saw:.2000}; known are {', '.join(ORIGINALS)}, in the "
        "paths of the originals or in the state dicts of PyLO (both of VeLO's together)"
    )


def _layers(tensors: Theta, root: str, outputs: int) -> Theta:
    """``w0, b0, w1, ...`` of the MLP under ``root``, its first layer in groups or whole, with its first ``outputs``."""
    groups = [tensors[name] for name in takewhile(tensors.__contains__, (f"{root}/w0__{j}" for j in count()))]
    theta = {"w0": torch.cat(groups, -2)} if groups else {}
    for i in takewhile(lambda i: f"{root}/b{i}" in tensors, count()):
        theta[f"w{i}"] = theta[f"w{i}"] if f"w{i}" in theta else tensors[f"{root}/w{i}"]
        theta[f"b{i}"] = tensors[f"{root}/b{i}"]
    return {**theta, **{name: theta[name][..., :outputs] for name in list(theta)[-2:]}}


def _hidden(tensors: Theta, root: str) -> tuple[int, ...]:
    biases = list(takewhile(tensors.__contains__, (f"{root}/b{i}" for i in count())))
    return tuple(tensors[name].shape[-1] for name in biases[:-1])


def _adafac(tensors: Theta, outputs: int) -> Theta:
    return {**_layers(tensors, "nn/~", outputs), **{n: t for n, t in tensors.items() if n.endswith("_decays")}}


def _scheduler(tensors: Theta) -> Theta:
    theta = {}
    for ours, theirs in {"in": "linear_2", "mix": "linear_1", "lstm": "rnn/linear", "lr": "step_size"}.items():
        theta[f"w_{ours}"], theta[f"b_{ours}"] = (tensors[f"rnn_params/{theirs}/{kind}"] for kind in "wb")
    return {**theta, **{f"{name[0]}_init": tensors[f"lstm_init_state/{name}"][0] for name in ("hidden", "cell")}}


def _hyper(tensors: Theta) -> Theta:
    """θ of VeLO and Celo."""
    controls = {f"{kind}_controls": tensors[f"rnn_params/rnn_to_controls/{kind}"] for kind in "wb"}
    own = controls if _inits(tensors) > 1 else {}
    return {**_scheduler(tensors), **own, **_layers(tensors, "ff_mod_stack/~", 2)}


def _inits(tensors: Theta) -> int:
    return tensors["ff_mod_stack/~/b0"].shape[0]


def _hyper_fields(tensors: Theta) -> Fields:
    return {**_units(tensors), "inits": _inits(tensors), "units": _hidden(tensors, "ff_mod_stack/~")}


def _units(tensors: Theta) -> Fields:
    return {"hidden": tensors["lstm_init_state/hidden"].shape[-1]}


_INPUTS = "rnn_params/linear_2/w"

ORIGINALS = {
    "AdafacMLPLOpt": Original(
        "AdafacMLP",
        (_MLP, _DECAYS),
        lambda tensors: {"hidden": _hidden(tensors, "nn/~")},
        lambda tensors: _adafac(tensors, 2),
    ),
    "HyperV2": Original("VeLO", (_STACK, _SCHEDULER, _CONTROLS), _hyper_fields, _hyper, (_INPUTS, 0, 30)),
    "Celo": Original("Celo", (_STACK, _SCHEDULER, _CONTROLS), _hyper_fields, _hyper, (_INPUTS, 0, 18)),
    "Celo-Adam": Original("CeloAdam", (_SCHEDULER,), _units, _scheduler, (_INPUTS, 0, 18)),
    "Celo2": Original(
        "Celo2",
        (_STACK,),
        lambda tensors: {"units": _hidden(tensors, "ff_mod_stack/~")},
        lambda tensors: _layers(tensors, "ff_mod_stack/~", 2),
    ),
}
"""By the name in the sources, or in the paper where the sources call it otherwise."""
