"""Learned optimizers as a `torch.optim.Optimizer`."""

from __future__ import annotations

import math
import numbers
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, cast, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.utils._pytree import tree_map_only

from l2o import hub
from l2o._checks import real, whole
from l2o.optim.members import Member, check_params, checked_gradient, kinds, label
from l2o.types import (
    Clock,
    ConfigurationError,
    Grads,
    Kind,
    L2OError,
    OptState,
    Params,
    ResumeError,
    Slots,
    Theta,
    UpdateRule,
    Updates,
)

_WORTH_A_KERNEL = 10**8
"""Updates of single entries in a run, which torch's operations take some 10 s longer for than a kernel, on a CPU."""


class LearnedOptimizer(torch.optim.Optimizer):
    """A learned update rule in the place of any torch optimizer::

        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)                            # before
        optimizer = l2o.LearnedOptimizer(model.parameters(), "default", total_steps=10_000)  # after

    params: parameters, named parameters, or groups. A group may have its own ``lr``, ``weight_decay`` and ``kind``
        (matrix, vector, embedding, output); by default a tensor of two and more axes is a matrix, others are vectors.
    source: name, path or address of a checkpoint (`l2o.load`), or a pair ``(rule, theta)``.
    total_steps: how many steps the run will have. It may go on after them, with a warning.
    lr: factor on the rule's own step, without a unit: 1 is the step that was learned. Schedulers may change it.
    weight_decay: decoupled and measured over the run: λ shrinks a parameter by ``exp(-λ)`` in ``total_steps`` steps at
        lr 1 (AdamW's ``lr * weight_decay * steps``). Each step: ``p <- p exp(-λ lr / total_steps)``.
    rules: classes of rules of your own that the checkpoint may name.

    Arithmetic and state are float64 if any parameter is, else float32, whatever the parameters' precision. All groups
    go through the rule together; parameters without a gradient stay as they are. ``state[p]`` has the rule's slots from
    p's first gradient on, ``state["shared"]`` those of no single parameter, ``state["clock"]["step"]`` the number of
    steps taken. Where the rule has a kernel, long runs use it (``L2O_KERNELS=0``: never), with equal steps but for
    rounding. ``state_dict()`` is a snapshot: later steps replace its tensors. ``total_steps`` is not in it, so that
    a run can be resumed with another length.

    Raises `ConfigurationError`, `ParameterError` (not floating point, sparse, or on several devices), and what
    `l2o.load` raises.
    """

    state: defaultdict[Any, Any]

    def __init__(
        self,
        params: ParamsT,
        source: hub.Source | tuple[UpdateRule, Theta],
        *,
        total_steps: int,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        rules: Sequence[type[UpdateRule]] = (),
    ) -> None:
        self.total_steps = whole("total_steps", total_steps)
        defaults = {"lr": real("lr", lr, least=0.0), "weight_decay": real("weight_decay", weight_decay, least=0.0)}
        self.rule, self.theta = _resolve(source, rules)
        self._theta_on: dict[tuple[torch.dtype, torch.device], Theta] = {}
        self._warned = False
        super().__init__(params, defaults)
        self.state["clock"] = {"step": 0}  # from the start, so that each state_dict of ours shows whose it is

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; its parameters get their state with their first gradient."""
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            # As Python's floats: torch.load(weights_only=True) would not read numpy's in a state_dict.
            group.update({name: real(name, group[name], least=0.0) for name in ("lr", "weight_decay")})
            if group.get("kind", "vector") not in get_args(Kind):
                raise ConfigurationError(f"kind={group['kind']!r}: expected one of {', '.join(get_args(Kind))}")
            check_params(self._members())
        except L2OError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None) -> Any:
        """Take one step and return the loss, if there is one. Does not wait for the device.

        closure: as in torch, computes loss and gradients anew; called with grad mode on.
        loss: the loss that the gradients are of, 0-d, where there is no closure. Some rules need it (``needs_loss``).

        Raises `GradientError`, `ParameterError` or `ConfigurationError` before a parameter or any state is written.
        """
        if closure is not None and loss is not None:
            raise ConfigurationError("step got a closure and loss=; the closure returns the loss, so leave loss= out")
        if self.rule.needs_loss and closure is None and loss is None:
            raise ConfigurationError(f"{self.rule!r} reads the loss: call step(loss=loss), or step(closure)")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members = [member for member in self._members() if member.param.grad is not None]
        if members:
            self._step(members, loss)
        return loss

    def _step(self, members: Sequence[Member], loss: Any) -> None:
        check_params(members)
        grads = {m.key: checked_gradient(m) for m in members}
        dtype, device = self._dtype(), members[0].param.device
        theta = self._theta(dtype, device)
        params = {m.key: m.param.detach().to(dtype) for m in members}
        state = self._opt_state(theta, members, params)
        seen = _scalar(loss, dtype, device) if self.rule.needs_loss else None
        grads = {key: g.to(dtype) for key, g in grads.items()}
        updates, state = self._update(theta, grads, state, params, self._clock(device), seen)
        self._store(members, params, state)
        self._write(members, params, updates)

    def _update(
        self, theta: Theta, grads: Grads, state: OptState, params: Params, clock: Clock, loss: Tensor | None
    ) -> tuple[Updates, OptState]:
        """The rule's update, by its kernel where there is one and the run is worth the seconds of compiling it."""
        inputs = (theta, grads, state, params, clock, loss)
        entries = sum(p.numel() for p in params.values())
        if (
            type(self.rule).fused_update is not UpdateRule.fused_update
            and entries * self.total_steps >= _WORTH_A_KERNEL
        ):
            fused = self.rule.fused_update(*tree_map_only(Tensor, lambda t: t.unsqueeze(0), inputs))
            if fused is not None:
                return cast("tuple[Updates, OptState]", tree_map_only(Tensor, lambda t: t.squeeze(0), fused))
        return self.rule.update(*inputs)

    def _members(self) -> list[Member]:
        """Every parameter once, also one that a group has twice."""
        unique: dict[int, Member] = {}
        pairs = ((p, group) for group in self.param_groups for p in group["params"])
        for i, (p, group) in enumerate(pairs):
            unique.setdefault(id(p), Member(str(i), p, group))
        return list(unique.values())

    def _dtype(self) -> torch.dtype:
        """Of the arithmetic; asked at each step, because modules are also converted after their optimizer was made."""
        float64 = any(p.dtype == torch.float64 for group in self.param_groups for p in group["params"])
        return torch.float64 if float64 else torch.float32

    def _theta(self, dtype: torch.dtype, device: torch.device) -> Theta:
        if (dtype, device) not in self._theta_on:
            self._theta_on[dtype, device] = {k: t.to(device, dtype) for k, t in self.theta.items()}
        return self._theta_on[dtype, device]

    def _opt_state(self, theta: Theta, members: Sequence[Member], params: Params) -> OptState:
        """The state of ``members``, and what the rule starts with for those that have none. Nothing is written."""
        dtype = next(iter(params.values())).dtype
        old = {m.key: _cast(self.state[m.param], dtype) for m in members if self.state.get(m.param)}
        new = [m for m in members if m.key not in old]
        fresh = self.rule.init(theta, {m.key: params[m.key] for m in new}, kinds(new)) if new else OptState({}, {})
        per_param = {m.key: old[m.key] if m.key in old else fresh.per_param[m.key] for m in members}
        return OptState(per_param, _cast(self.state.get("shared") or fresh.shared, dtype))

    def _clock(self, device: torch.device) -> Clock:
        step = self._steps_taken()
        if step >= self.total_steps and not self._warned:
            self._warned = True
            message = f"step {step + 1} of a run of total_steps={self.total_steps}: the rule was told it would be over"
            warnings.warn(message, UserWarning, stacklevel=6)  # the line that calls step
        # Fills, not copies of host tensors: the host would wait for those.
        return Clock(*(torch.full((), n, dtype=torch.int64, device=device) for n in (step, self.total_steps)))

    def _steps_taken(self) -> int:
        return self.state["clock"]["step"] if "clock" in self.state else 0

    def _store(self, members: Sequence[Member], params: Params, state: OptState) -> None:
        """Keep the new state. Dicts are replaced, not changed, so that ``state_dict()`` stays what it was."""
        # A rule may return an input as a slot (the last gradient, say), and inputs are written to after this.
        inputs = {_storage(t) for m in members for t in (params[m.key], m.param.grad) if t is not None}
        for m in members:
            self.state[m.param] = _apart(state.per_param[m.key], inputs)
        if state.shared:
            self.state["shared"] = _apart(state.shared, inputs)
        self.state["clock"] = {"step": self._steps_taken() + 1}

    def _write(self, members: Sequence[Member], params: Params, updates: Updates) -> None:
        for m in members:
            lr, value = m.group["lr"], params[m.key]
            keep = math.exp(-m.group["weight_decay"] * lr / self.total_steps)
            if keep != 1.0:
                value.mul_(keep)
            value.add_(updates[m.key], alpha=lr)
            if value.dtype != m.param.dtype:  # else it is the parameter itself
                m.param.copy_(value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict()`` returned, to the bit and in copies.

        Raises ValueError, as torch does, where groups differ in number or size, and `ResumeError` where the state is of
        another rule or optimizer; both before anything is changed.
        """
        loaded: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
            loaded.update(final)
            self._check_state(final)

        # torch rounds the state of a bf16 parameter to bf16, so it is put in place once more. In hooks, because those
        # of users may exchange the dict before, and want to see the result after.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(lambda _: self._restore(loaded), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _check_state(self, state_dict: Mapping[str, Any]) -> None:
        saved, state = state_dict["param_groups"], state_dict["state"]
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in self.param_groups]:
            return  # torch has its error for that
        clock = state.get("clock")
        if not isinstance(clock, Mapping) or not isinstance(clock.get("step"), int):
            raise ResumeError("state_dict has no state['clock']['step']: it is of another optimizer")
        ids = list(chain.from_iterable(g["params"] for g in saved))
        for member in self._members():
            found = _shapes(state.get(ids[int(member.key)], {}))
            expected = _shapes(self._initial_slots(member)) if found else found
            if found != expected:
                raise ResumeError(
                    f"state_dict has the slots {found} for {label(member)}, {self.rule!r} has {expected}; "
                    "make the optimizer with the rule and the model that were saved"
                )

    def _initial_slots(self, member: Member) -> Slots:
        key, dtype = member.key, self._dtype()
        theta = self._theta(dtype, member.param.device)
        return self.rule.init(theta, {key: member.param.detach().to(dtype)}, kinds([member])).per_param[key]

    def _restore(self, state_dict: Mapping[str, Any]) -> None:
        """Copies of the state in ``state_dict``, in the dtypes that it has there."""
        ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        params = [p for group in self.param_groups for p in group["params"]]
        owners: dict[Any, Any] = dict(zip(ids, params, strict=True))
        for key, slots in state_dict["state"].items():
            self.state[owners.get(key, key)] = {
                k: v.detach().to(params[0].device, copy=True) if isinstance(v, Tensor) else v for k, v in slots.items()
            }

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in ("rule", "theta", "total_steps", "_warned")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # load_state_dict calls this too, with part of the state
        self.__dict__.setdefault("_theta_on", {})

    def __repr__(self) -> str:
        header = f"LearnedOptimizer (\n{self.rule!r}, step {self._steps_taken()} of {self.total_steps}"
        return super().__repr__().replace("LearnedOptimizer (", header, 1)


def _resolve(source: Any, rules: Sequence[type[UpdateRule]]) -> tuple[UpdateRule, Theta]:
    match source:
        case str() | os.PathLike():
            return hub.load(source, rules)
        case (UpdateRule() as rule, Mapping() as theta):
            return rule, {k: t.detach().clone() for k, t in hub.check_theta(rule, dict(theta)).items()}
    # The types alone: θ printed would bury the message.
    came = f"({', '.join(type(x).__name__ for x in source)})" if isinstance(source, tuple) else type(source).__name__
    raise ConfigurationError(f"source={came}: expected a checkpoint's name, path or address, or a pair (rule, theta)")


def _scalar(loss: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.detach().to(device, dtype, copy=True).reshape(())
    if isinstance(loss, numbers.Real):
        return torch.full((), float(loss), dtype=dtype, device=device)
    got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
    raise ConfigurationError(f"loss is {got}: expected a 0-d tensor or a number, also from a closure")


def _cast(slots: Slots, dtype: torch.dtype) -> Slots:
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in slots.items()}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _apart(slots: Slots, inputs: set[int]) -> Slots:
    """``slots``, copied where they are views of the storages ``inputs``."""
    return {k: t.clone() if _storage(t) in inputs else t for k, t in slots.items()}


def _shapes(slots: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    return {k: tuple(t.shape) if isinstance(t, Tensor) else None for k, t in slots.items()}
