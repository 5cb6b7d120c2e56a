"""Recorded runs of public learned optimizers, and their replay by the rules of l2o.

A trace is an ``.npz`` file of ``theta/<path>``, ``init/<tensor>``, ``grads/<tensor> [steps, ...]``, ``losses [steps]``
(may be missing where the rule reads none), ``params/<tensor> [steps, ...]`` (after each update), ``step/<tensor>``
(what each update subtracted) or ``direction/<tensor>`` (the same, over the learning rate), and ``meta``, JSON with
``hyperparameters``, whose ``cls`` is a name in `REFERENCES`, with or without modules before it, and ``num_steps``, by
default as many as there are.
"""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from l2o.checks import check_int, unknown
from l2o.disk import user_path
from l2o.interop.reference import Reference
from l2o.interop.references import REFERENCES
from l2o.ops.kinds import infos_of
from l2o.types import CheckpointError, Kind, L2OError, Params, Run, Theta, UpdateRule, Updates

PARAMS_TOLERANCE = 1e-5
"""Of a tensor's parameters after each update, in its largest value then."""
STEP_TOLERANCE = 1e-4
"""Of a tensor's updates, in the largest of all of them."""


@dataclass(frozen=True)
class Trace:
    """A recorded run and the rule that should repeat it.

    theta: ours.    init: parameters before the first update.    kinds: what they are for.
    grads, params, steps: by tensor, ``[steps, ...]``.            losses: ``[steps]``; zeros where none were recorded.
    total_steps: the length that the optimizer was told.
    """

    rule: UpdateRule
    theta: Theta
    init: Params
    kinds: dict[str, Kind]
    grads: Params
    params: Params
    steps: Updates
    losses: Tensor
    total_steps: int


class TensorError(NamedTuple):
    """The largest errors of one tensor, ``params`` and ``step`` as the tolerances have them; NaN if there was one."""

    tensor: str
    shape: tuple[int, ...]
    params: float
    step: float

    @property
    def within(self) -> bool:
        """Whether both are within tolerance; NaN is not."""
        return self.params <= PARAMS_TOLERANCE and self.step <= STEP_TOLERANCE


def read_trace(path: str | Path) -> Trace:
    """Read a trace and rebuild its rule; raises `CheckpointError`, naming the file, for anything that is amiss."""
    try:
        arrays = _arrays(user_path(path))
        meta = _meta(arrays)
        return _trace(_groups(arrays), arrays.get("losses"), meta)
    except L2OError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except ValueError as error:  # whose text advises to unpickle whatever NumPy does not know
        raise CheckpointError("cannot be read as an .npz file of plain arrays, and nothing is unpickled") from error
    except (OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise CheckpointError(f"cannot be read as an .npz file ({error})") from error


def _meta(arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    if "meta" not in arrays:
        raise CheckpointError("has no 'meta': it is no recorded run of an optimizer")
    try:
        meta = json.loads(str(arrays["meta"]))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"meta is no JSON ({error})") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("hyperparameters"), dict):
        raise CheckpointError("meta has no 'hyperparameters'")
    if meta.get("num_steps") is not None:
        check_int("num_steps", meta["num_steps"])
    return meta


def _reference(cls: Any) -> Reference:
    """By the name of its class, which may have more modules before it than the name in `REFERENCES`."""
    for name, reference in REFERENCES.items():
        if f".{cls}".endswith(f".{name}"):
            return reference
    raise CheckpointError(unknown("optimizer", cls, REFERENCES) + " (meta['hyperparameters']['cls'])")


def _groups(arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, dict[str, Tensor]]:
    """Tensors by the first component of their names."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, array in arrays.items():
        group, _, rest = name.partition("/")
        if rest and array.dtype.kind == "f":
            groups.setdefault(group, {})[rest] = torch.from_numpy(np.array(array, dtype=np.float32))
    return groups


def _trace(groups: dict[str, Params], losses: Any, meta: dict[str, Any]) -> Trace:
    settings = dict(meta["hyperparameters"])
    reference = _reference(settings.get("cls"))
    rule, theta = reference.rebuild(groups.get("theta", {}), settings)
    init, params, grads = (groups.get(group, {}) for group in ("init", "params", "grads"))
    steps = _steps(groups, rule)
    losses = _losses(losses, grads, rule)
    if not len(losses) or not init:
        raise CheckpointError("has no 'init/...', or no steps: nothing can be replayed")
    for group, tensors in {"grads": grads, "params": params, "step": steps}.items():
        _check_shapes(group, tensors, init, len(losses))
    total = meta.get("num_steps")
    return Trace(
        rule=rule,
        theta=theta,
        init=init,
        kinds=reference.kinds(settings, init),
        grads=grads,
        params=params,
        steps=steps,
        losses=losses,
        total_steps=len(losses) if total is None else total,
    )


def _losses(losses: Any, grads: Params, rule: UpdateRule) -> Tensor:
    if losses is None and not rule.needs_loss:
        return torch.zeros(len(next(iter(grads.values()), ())))
    if losses is None or losses.ndim != 1:
        raise CheckpointError(f"has no 'losses' of one axis, which {type(rule).__name__} reads")
    return torch.from_numpy(losses.astype(np.float32))


def _steps(groups: dict[str, Params], rule: UpdateRule) -> Updates:
    if "step" in groups:
        return groups["step"]
    lr = getattr(rule, "step_mult", 1.0)  # Celo2's learning rate
    return {name: lr * direction for name, direction in groups.get("direction", {}).items()}


def _check_shapes(group: str, tensors: Params, init: Params, steps: int) -> None:
    for name in sorted(init.keys() | tensors.keys()):
        found = tuple(tensors[name].shape) if name in tensors else None
        expected = (steps, *init[name].shape) if name in init else None
        if found != expected:
            raise CheckpointError(f"{group}/{name} has shape {found}, expected {expected}")


def replay(trace: Trace) -> list[TensorError]:
    """Run the rule from ``init`` on the recorded gradients and losses, in float32, and compare with the record."""
    params, total = trace.init, torch.tensor(trace.total_steps)
    infos = infos_of(params, trace.kinds)
    state = trace.rule.init(trace.theta, params, infos)
    worst = dict.fromkeys(params, 0.0)
    updates = []
    with torch.no_grad():
        for t, loss in enumerate(trace.losses):
            grads = {name: g[t] for name, g in trace.grads.items()}
            seen = loss if trace.rule.needs_loss else None
            new, state = trace.rule.update(trace.theta, grads, state, params, infos, Run(torch.tensor(t), total, seen))
            params = {name: p + new[name] for name, p in params.items()}
            updates.append(new)
            for name, p in params.items():
                worst[name] = _larger(worst[name], _error(p, trace.params[name][t]))
    # What was recorded is what was subtracted.
    steps = {name: _error(torch.stack([-u[name] for u in updates]), want) for name, want in trace.steps.items()}
    return [TensorError(name, tuple(p.shape), worst[name], steps[name]) for name, p in trace.init.items()]


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in the largest value expected; of zeros, any difference is infinite."""
    if not found.numel() or found.equal(expected):
        return 0.0
    difference, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    return difference / scale if scale else float("inf")


def _larger(a: float, b: float) -> float:
    """The maximum, NaN if either is."""
    return b if math.isnan(b) or b > a else a  # once NaN, nothing is larger
