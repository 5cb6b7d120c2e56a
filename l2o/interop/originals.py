"""Learned optimizers of google/learned_optimization and amoudgl/celo, by the tensors of their θ, and their rules here.

The one table of what the converter knows. Paths are those of the originals, components joined by ``/``; their matrices
are ``[in, out]``, as ours. What an original keeps without using it is left out: ``rnn_params/linear``, the third output
of the networks of VeLO, Celo and Celo2, and the mixture's weights where Celo mixes a single network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

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

    rule: the class here.     fields: hyperparameters that shapes tell.     theta: ours from the original's.
    mark: a number of the shapes, and what it is here, where names alone do not tell one original from another.
    Both functions raise LookupError where the tensors are not whole.
    """

    rule: str
    names: tuple[str, ...]
    fields: Callable[[Theta], Fields]
    theta: Callable[[Theta], Theta]
    mark: tuple[Callable[[Theta], int], int]

    def fits(self, tensors: Theta) -> bool:
        """Whether these are its tensors."""
        matched = [{pattern for pattern in self.names if re.fullmatch(pattern, name)} for name in tensors]
        if not all(matched) or set().union(*matched) != set(self.names):
            return False
        number, expected = self.mark
        try:
            return bool(self.fields(tensors)) and number(tensors) == expected
        except LookupError:
            return False

    def make(self, tensors: Theta, settings: Mapping[str, Any]) -> tuple[UpdateRule, Theta]:
        """The rule, with ``settings`` over what shapes tell, and its θ."""
        rule = getattr(l2o.rules, self.rule)(**{**self.fields(tensors), **settings})
        return rule, self.theta(tensors)


def recognize(tensors: Theta) -> tuple[str, Original]:
    """The original that these tensors are of, and its name; raises `CheckpointError`, which says what came."""
    for name, original in ORIGINALS.items():
        if original.fits(tensors):
            return name, original
    saw = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    raise CheckpointError(
        f"tensors of no learned optimizer that is known here: {saw:.2000}; known are {', '.join(ORIGINALS)}, in the "
        "paths of the originals or in the state dicts of PyLO (both of VeLO's together)"
    )


def _hidden(tensors: Theta, root: str) -> tuple[int, ...]:
    """Units of the hidden layers of the MLP under ``root``; LookupError where a weight or a bias is missing."""
    names = {name.removeprefix(f"{root}/") for name in tensors if name.startswith(f"{root}/")}
    depth = sum(name.startswith("b") for name in names)
    first = {name for name in names if name.startswith("w0__")} or {"w0"}
    if names != first | {f"{kind}{i}" for i in range(depth) for kind in "wb"} - {"w0"}:
        raise LookupError(root)
    return tuple(tensors[f"{root}/b{i}"].shape[-1] for i in range(depth - 1))


def _layers(tensors: Theta, root: str, outputs: int) -> Theta:
    """``w0, b0, w1, ...`` of the MLP under ``root``, its first layer in groups or whole, with its first ``outputs``."""
    last = len(_hidden(tensors, root))
    groups = sum(name.startswith(f"{root}/w0__") for name in tensors)
    if groups:
        tensors = {**tensors, f"{root}/w0": torch.cat([tensors[f"{root}/w0__{j}"] for j in range(groups)], -2)}
    theta = {f"{kind}{i}": tensors[f"{root}/{kind}{i}"] for i in range(last + 1) for kind in "wb"}
    return theta | {name: theta[name][..., :outputs] for name in (f"w{last}", f"b{last}")}


def _adafac(rule: str, outputs: int) -> Original:
    """small_fc, or STAR, which has the same inputs and more outputs."""

    def theta(tensors: Theta) -> Theta:
        return {**_layers(tensors, "nn/~", outputs), **{n: t for n, t in tensors.items() if n.endswith("_decays")}}

    def size(tensors: Theta) -> int:
        return tensors[f"nn/~/b{len(_hidden(tensors, 'nn/~'))}"].shape[-1]

    return Original(rule, (_MLP, _DECAYS), lambda tensors: {"hidden": _hidden(tensors, "nn/~")}, theta, (size, outputs))


def _scheduler(tensors: Theta) -> Theta:
    theta = {f"lstm_{kind}": tensors[f"rnn_params/rnn/linear/{kind}"] for kind in "wb"}
    for ours, theirs in {"in": "linear_2", "mix": "linear_1", "lr": "step_size"}.items():
        theta |= {f"{kind}_{ours}": tensors[f"rnn_params/{theirs}/{kind}"] for kind in "wb"}
    return {**theta, **{f"lstm_{name[0]}": tensors[f"lstm_init_state/{name}"][0] for name in ("hidden", "cell")}}


def _hyper(tensors: Theta) -> Theta:
    """θ of VeLO and Celo."""
    controls = {f"{kind}_controls": tensors[f"rnn_params/rnn_to_controls/{kind}"] for kind in "wb"}
    own = controls if _inits(tensors) > 1 else {}
    return {**_scheduler(tensors), **own, **_layers(tensors, "ff_mod_stack/~", 2)}


def _inits(tensors: Theta) -> int:
    return tensors["ff_mod_stack/~/b0"].shape[0]


def _hyper_fields(tensors: Theta) -> Fields:
    return {**_lstm(tensors), "inits": _inits(tensors), "hidden": _hidden(tensors, "ff_mod_stack/~")}


def _lstm(tensors: Theta) -> Fields:
    return {"lstm": tensors["lstm_init_state/hidden"].shape[-1]}


def _inputs(tensors: Theta) -> int:
    return tensors["rnn_params/linear_2/w"].shape[0]


ORIGINALS = {
    "AdafacMLPLOpt": _adafac("AdafacMLP", 2),
    "MLPNomLOpt": _adafac("STAR", 4),
    "HyperV2": Original("VeLO", (_STACK, _SCHEDULER, _CONTROLS), _hyper_fields, _hyper, (_inputs, 30)),
    "Celo": Original("Celo", (_STACK, _SCHEDULER, _CONTROLS), _hyper_fields, _hyper, (_inputs, 18)),
    "Celo-Adam": Original("CeloAdam", (_SCHEDULER,), _lstm, _scheduler, (_inputs, 18)),
    "Celo2": Original(
        "Celo2",
        (_STACK,),
        lambda tensors: {"hidden": _hidden(tensors, "ff_mod_stack/~")},
        lambda tensors: _layers(tensors, "ff_mod_stack/~", 2),
        (lambda tensors: tensors["ff_mod_stack/~/b0"].ndim, 1),
    ),
}
"""By the name in the sources, or in the paper where the sources call it otherwise."""
