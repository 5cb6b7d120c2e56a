"""Whether a state that was saved is one of this optimizer: of its checkpoint, its groups, its parameters."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import numbers
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from l2o.ops.eigenbasis import into_basis
from l2o.optim.members import settings
from l2o.optim.slots import RUN
from l2o.types import ConfigurationError, ResumeError, Theta, UpdateRule

Group = dict[str, Any]
Layout = dict[str, tuple[int, ...]]
"""The shapes of a rule's slots of one parameter."""
_IN_STATE = ("clock", "origin", "shared")
"""Where an older l2o kept what of a run is of no single parameter, beside the parameters in the state."""


def layout(slots: Mapping[str, Tensor]) -> Layout:
    """Return their shapes."""
    return {name: tuple(t.shape) for name, t in slots.items()}


def origin(name: str, rule: UpdateRule, theta: Theta) -> dict[str, str]:
    """Return what a run's state says about where its steps come from: the checkpoint's name, the SHA-256 of rule and θ.

    Hyperparameters at their defaults do not count, so that a rule may get new ones.
    """
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(rule) if dataclasses.is_dataclass(rule) else ()
    chosen = {f.name: getattr(rule, f.name) for f in fields if getattr(rule, f.name) != f.default}
    digest = hashlib.sha256(repr((type(rule).__name__, sorted(chosen.items()))).encode())
    for key in sorted(theta):
        digest.update(key.encode() + theta[key].detach().float().cpu().contiguous().numpy().tobytes())
    return {"checkpoint": name, "fingerprint": digest.hexdigest()}


def check_kind(state_dict: Any) -> None:
    """Raise `ResumeError` for what is no dict."""
    if not isinstance(state_dict, Mapping):
        raise ResumeError(f"state_dict is a {type(state_dict).__name__}: expected what state_dict() returned")


def modern(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``state_dict`` with momenta in their bases, and all of the run in a group, which an older l2o had in the
    state: clock, origin, shared slots.

    Raises `ResumeError` for what has neither groups nor state.
    """
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(groups, list):
        raise ResumeError("state_dict has no 'state' and 'param_groups': expected what state_dict() returned")
    state = {key: into_basis(kept) if isinstance(kept, Mapping) else kept for key, kept in state.items()}
    state_dict = {**state_dict, "state": state}
    run: dict[str, Any] = {}
    for name in _IN_STATE:
        kept = state.get(name)
        run |= {} if not isinstance(kept, Mapping) else {"shared": kept} if name == "shared" else kept
    if any(RUN in group for group in groups) or "step" not in run:
        return state_dict
    rest = {key: kept for key, kept in state.items() if key not in _IN_STATE}
    return {**state_dict, "state": rest, "param_groups": [{**groups[0], RUN: run}, *groups[1:]]}


def checked_run(state_dict: Mapping[str, Any], own: Mapping[str, str]) -> Mapping[str, Any]:
    """Return what ``state_dict`` has of the run; raises `ResumeError` where it is of no run of ours, or of another rule
    or θ.

    own: `origin` of the optimizer. State of an older l2o does not say which it is of, and passes.
    """
    run: Mapping[str, Any] = next((group[RUN] for group in state_dict["param_groups"] if RUN in group), {})
    if not isinstance(run, Mapping) or not _is_count(run.get("step")) or not _is_count(run.get("skipped", 0)):
        raise ResumeError(
            f"state_dict has no numbers of steps as {RUN!r} of a group: expected that of a LearnedOptimizer, not of "
            "another optimizer; begin without it, or make the optimizer that was saved"
        )
    check_same(run, own)
    return {**run, "skipped": int(run.get("skipped", 0))}


def check_same(run: Mapping[str, Any], own: Mapping[str, str]) -> None:
    """Raise `ResumeError` where what was kept of a run says that it is of another rule or θ than ``own``."""
    if run.get("fingerprint", own["fingerprint"]) != own["fingerprint"]:
        raise ResumeError(
            f"state_dict is of a run with {run['checkpoint']}, this optimizer has {own['checkpoint']}, another rule "
            f"or θ; make it with the one that was saved, or delete state_dict['param_groups'][0][{RUN!r}]"
            "['fingerprint'] to go on with this one, where it has the same slots"
        )


def _is_count(value: Any) -> bool:
    whole = isinstance(value, numbers.Integral) or (isinstance(value, Tensor) and not value.is_floating_point())
    return whole and int(value) >= 0


def check_groups(groups: Sequence[Group]) -> None:
    """Raise `ResumeError` where a saved group lacks a setting, or has one that makes no sense."""
    for i, group in enumerate(groups):
        if "params" not in group:
            raise ResumeError(f"state_dict['param_groups'][{i}] has no 'params': expected what state_dict() returned")
        try:
            settings(group)
        except ConfigurationError as error:
            raise ResumeError(f"state_dict['param_groups'][{i}]: {error}") from error


def in_order(own: Sequence[Group], saved: list[Group]) -> list[Group]:
    """Return ``saved`` in the order of ``own``, groups and parameters, where both name all their parameters.

    Names that are in the state alone or in the optimizer alone are taken by their place, as torch takes all, if the
    others are where they were; else raises `ResumeError`.
    """
    if not all("param_names" in group for group in (*own, *saved)):
        return saved
    ours, theirs = ([group["param_names"] for group in groups] for groups in (own, saved))
    by_names = {frozenset(names): group for names, group in zip(theirs, saved, strict=True)}
    if sorted(sizes(own)) == sorted(sizes(saved)) and by_names.keys() == {frozenset(names) for names in ours}:
        return [_sorted(by_names[frozenset(names)], names) for names in ours]
    place, before = ({name: i for i, name in enumerate(chain.from_iterable(names))} for names in (ours, theirs))
    moved = [name for name in place if before.get(name, place[name]) != place[name]]
    if moved:
        raise ResumeError(
            f"state_dict has other named parameters, and {moved[0]!r} at another place; make the optimizer with the "
            "parameters and groups that were saved"
        )
    return saved


def _sorted(group: Group, names: Sequence[str]) -> Group:
    ids = dict(zip(group["param_names"], group["params"], strict=True))
    return {**group, "param_names": list(names), "params": [ids[name] for name in names]}


def sizes(groups: Sequence[Group]) -> list[int]:
    """Return how many parameters each group has."""
    return [len(group["params"]) for group in groups]


def check_slots(found: Mapping[str, Any], own: Layout, exact: bool, label: str, rule: str) -> None:
    """Raise `ResumeError` unless the slots ``found`` of a parameter are all of the rule's, or none.

    exact: whether others show that the state is of another rule; else they are of other code.
    """
    if not isinstance(found, Mapping):
        raise ResumeError(f"state_dict has a {type(found).__name__} for {label}, expected slots by name")
    shapes = {k: tuple(t.shape) if isinstance(t, Tensor) else None for k, t in found.items() if exact or k in own}
    if shapes and shapes != own:
        raise ResumeError(
            f"state_dict has the slots {shapes} for {label}, {rule} has {own}; "
            "make the optimizer with the rule and the model that were saved"
        )


def copies(groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """Return the state in ``state_dict``, copied, in the dtypes that it has there, by the parameters of ``groups``.

    What other code keeps there may be nested.
    """
    ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
    params = [p for group in groups for p in group["params"]]
    owners: dict[Any, Any] = dict(zip(ids, params, strict=True))
    return {
        owners.get(key, key): {k: tree_map(lambda t: _copied(t, params[0].device), v) for k, v in kept.items()}
        for key, kept in state_dict["state"].items()
        if isinstance(kept, Mapping)  # else of other code, and torch has it
    }


def _copied(value: Any, device: torch.device) -> Any:
    return value.detach().to(device, copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)


def check_shared(run: Mapping[str, Any], own: Layout, rule: str) -> None:
    """Raises `ResumeError` unless the slots that belong to no single parameter are those of the rule."""
    found = run.get("shared") or {}
    shapes = {k: tuple(t.shape) if isinstance(t, Tensor) else None for k, t in found.items()}
    if shapes != own:
        raise ResumeError(
            f"state_dict has the shared slots {shapes or 'missing'}, {rule} has {own or 'none'}; make the optimizer "
            "with the rule that was saved, and load what state_dict() returns as a whole"
        )
