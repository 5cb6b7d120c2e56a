"""Learned optimizers as a `torch.optim.Optimizer`."""

from __future__ import annotations

import math
import numbers
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from l2o import hub
from l2o.ops.kinds import default_kinds
from l2o.types import (
    Clock,
    ConfigurationError,
    GradientError,
    Kind,
    L2OError,
    OptState,
    ParameterError,
    Params,
    ResumeError,
    Slots,
    Theta,
    Updates,
    UpdateRule,
)

Closure = Callable[[], Any]


class _Member(NamedTuple):
    """A parameter and its group; ``key`` is its name in the dicts of a rule, by its place in the optimizer."""

    key: str
    param: Tensor
    group: dict[str, Any]


class LearnedOptimizer(torch.optim.Optimizer):
    """A learned update rule in the place of any torch optimizer::

        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)                         # before
        optimizer = l2o.LearnedOptimizer(model.parameters(), "default", total_steps=10_000)  # after

    params: parameters, named parameters, or groups. A group may have its own ``lr`` and ``weight_decay``, and a ``kind``
        (``"matrix"``, ``"vector"``, ``"embedding"``, ``"output"``) where its tensors are not what their axes suggest:
        by default a matrix from two axes on, otherwise a vector.
    source: name or path of a checkpoint (`l2o.load`), or a pair ``(rule, theta)``.
    total_steps: how many steps the run will have. It may go on after them, with a warning.
    lr: factor on the rule's own step, without a unit: 1 is the step that was learned. Schedulers may change it.
    weight_decay: decoupled and measured over the run: λ shrinks a parameter by ``exp(-λ)`` in ``total_steps`` steps
        at lr 1, which is AdamW's ``lr * weight_decay * total_steps``. Each step: ``p <- p exp(-λ lr / total_steps)``.
    rules: classes of rules of your own that the checkpoint may name.

    Arithmetic and state are float64 if any parameter is, else float32, whatever the parameters' own precision.
    ``state[p]`` has the rule's slots as plain tensors from p's first gradient on, ``state["shared"]`` those of no single
    parameter, ``state["clock"]["step"]`` the number of steps taken. All groups go through the rule together; parameters
    without a gradient stay as they are. Tensors of ``state_dict()`` are never written to afterwards, so it is a snapshot.
    ``total_steps`` is not part of it: a run that is resumed can be given another length.

    Raises `ConfigurationError`, `ParameterError` (not floating point, sparse, or on several devices: make one optimizer
    a device), and what `l2o.load` raises.
    """

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
        self.total_steps = _positive_int("total_steps", total_steps)
        defaults = {name: _factor(name, value) for name, value in [("lr", lr), ("weight_decay", weight_decay)]}
        self.rule, self.theta = _resolve(source, rules)
        self._theta_on: dict[tuple[torch.dtype, torch.device], Theta] = {}
        self._warned = False
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; its parameters get their state with their first gradient."""
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            group.update({name: _factor(name, group[name]) for name in ("lr", "weight_decay")})
            _check_kind(group)
            _check_params(self._members())
        except L2OError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Closure | None = None, *, loss: Tensor | float | None = None) -> Any:  # type: ignore[override]
        """Take one step and return the loss, if there is one.

        closure: as in torch, computes loss and gradients anew; called with grad mode on.
        loss: the loss that the gradients are of, 0-d, where there is no closure. Some rules need it (``needs_loss``).

        Raises `GradientError`, `ParameterError` or `ConfigurationError` before a parameter or any state is written.
        Does not wait for the device.
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

    def _step(self, members: Sequence[_Member], loss: Any) -> None:
        _check_params(members)
        _check_gradients(members)
        dtype, device = self._dtype(), members[0].param.device
        theta = self._theta(dtype, device)
        params = {m.key: m.param.detach().to(dtype) for m in members}
        grads = {m.key: m.param.grad.detach().to(dtype) for m in members}  # type: ignore[union-attr]
        state = self._opt_state(theta, members, params)
        seen = _scalar(loss, dtype, device) if self.rule.needs_loss else None
        updates, state = self.rule.update(theta, grads, state, params, self._clock(device), seen)
        self._store(members, params, state)
        self._write(members, params, updates)

    def _members(self) -> list[_Member]:
        """Every parameter once, also one that a group has twice."""
        unique: dict[int, _Member] = {}
        pairs = ((p, group) for group in self.param_groups for p in group["params"])
        for i, (p, group) in enumerate(pairs):
            unique.setdefault(id(p), _Member(str(i), p, group))
        return list(unique.values())

    def _dtype(self) -> torch.dtype:
        """Of the arithmetic; asked at each step, because modules are also converted after their optimizer was made."""
        float64 = any(p.dtype == torch.float64 for group in self.param_groups for p in group["params"])
        return torch.float64 if float64 else torch.float32

    def _theta(self, dtype: torch.dtype, device: torch.device) -> Theta:
        if (dtype, device) not in self._theta_on:
            self._theta_on[dtype, device] = {k: t.to(device, dtype) for k, t in self.theta.items()}
        return self._theta_on[dtype, device]

    def _opt_state(self, theta: Theta, members: Sequence[_Member], params: Params) -> OptState:
        """The state of ``members``, and what the rule starts with for those that have none. Nothing is written."""
        dtype = next(iter(params.values())).dtype
        old = {m.key: _cast(self.state[m.param], dtype) for m in members if self.state.get(m.param)}
        new = [m for m in members if m.key not in old]
        fresh = self.rule.init(theta, {m.key: params[m.key] for m in new}, _kinds(new)) if new else OptState({}, {})
        per_param = {m.key: old[m.key] if m.key in old else fresh.per_param[m.key] for m in members}
        return OptState(per_param, _cast(self.state.get("shared") or fresh.shared, dtype))

    def _clock(self, device: torch.device) -> Clock:
        step = self.state.get("clock", {"step": 0})["step"]
        if step >= self.total_steps and not self._warned:
            self._warned = True
            message = f"step {step + 1} of a run of total_steps={self.total_steps}: the rule was told that it would end"
            warnings.warn(message, UserWarning, stacklevel=6)  # the line that calls step
        # A fill, not a copy of a host tensor: the host would wait for that.
        return Clock(*(torch.full((), n, dtype=torch.int64, device=device) for n in (step, self.total_steps)))

    def _store(self, members: Sequence[_Member], params: Params, state: OptState) -> None:
        """Keep the new state. Dicts are replaced, not changed, so that ``state_dict()`` stays what it was."""
        # A rule may return an input as a slot (the last gradient, say), and inputs are written to after this.
        inputs = {_storage(t) for m in members for t in (params[m.key], m.param.grad) if t is not None}
        for m in members:
            self.state[m.param] = _apart(state.per_param[m.key], inputs)
        if state.shared:
            self.state["shared"] = _apart(state.shared, inputs)
        self.state["clock"] = {"step": self.state.get("clock", {"step": 0})["step"] + 1}

    def _write(self, members: Sequence[_Member], params: Params, updates: Updates) -> None:
        for m in members:
            lr, value = m.group["lr"], params[m.key]
            keep = math.exp(-m.group["weight_decay"] * lr / self.total_steps)
            if keep != 1.0:
                value.mul_(keep)
            value.add_(updates[m.key], alpha=lr)
            if value.dtype != m.param.dtype:  # else it is the parameter itself
                m.param.copy_(value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of another optimizer's ``state_dict()``, which is left as it is, to the bit.

        Raises ValueError, as torch does, where groups differ in number or size, and `ResumeError` where the state is of
        another rule or optimizer; both before anything is changed.
        """
        loaded: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
            loaded.update(final)
            self._check_state(final)

        # torch casts the state of a bf16 parameter to bf16, so it is put in place once more. As hooks, because those of
        # the user may exchange the dict before, and want to see the result after.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(lambda _: self._restore(loaded), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _check_state(self, state_dict: Mapping[str, Any]) -> None:
        saved, own = state_dict["param_groups"], self.param_groups
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in own]:
            return  # torch has its error for that
        state = state_dict["state"]
        if state and not isinstance(state.get("clock", {}).get("step"), int):
            raise ResumeError("state_dict has no state['clock']['step']: it is of another optimizer")
        ids = list(chain.from_iterable(g["params"] for g in saved))
        for member in self._members():
            found = {k: getattr(t, "shape", None) for k, t in state.get(ids[int(member.key)], {}).items()}
            if found and found != (expected := self._slot_shapes(member)):
                raise ResumeError(
                    f"state_dict has for {_label(member)} the slots {_shapes(found)}, {self.rule!r} has "
                    f"{_shapes(expected)}; make the optimizer with the rule and the model that were saved"
                )

    def _slot_shapes(self, member: _Member) -> dict[str, torch.Size]:
        dtype = self._dtype()
        params = {member.key: member.param.detach().to(dtype)}
        state = self.rule.init(self._theta(dtype, member.param.device), params, _kinds([member]))
        return {k: t.shape for k, t in state.per_param[member.key].items()}

    def _restore(self, state_dict: Mapping[str, Any]) -> None:
        """Copies of the tensors of ``state_dict``, in the dtypes that they have."""
        ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        params = chain.from_iterable(g["params"] for g in self.param_groups)
        owners: dict[Any, Any] = dict(zip(ids, params, strict=True))
        device = self.param_groups[0]["params"][0].device
        for key, slots in state_dict["state"].items():
            self.state[owners.get(key, key)] = {
                k: v.detach().to(device, copy=True) if isinstance(v, Tensor) else v for k, v in slots.items()
            }

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in ("rule", "theta", "total_steps", "_warned")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also load_state_dict calls this, with part of the state
        self.__dict__.setdefault("_theta_on", {})

    def __repr__(self) -> str:
        step = self.state.get("clock", {"step": 0})["step"]
        header = f"LearnedOptimizer (\nRule: {self.rule!r}\nStep {step} of {self.total_steps}"
        return super().__repr__().replace("LearnedOptimizer (", header, 1)


def _resolve(source: Any, rules: Sequence[type[UpdateRule]]) -> tuple[UpdateRule, Theta]:
    match source:
        case str() | os.PathLike():
            return hub.load(source, rules)
        case (UpdateRule() as rule, Mapping() as theta):
            hub.check_theta(rule, dict(theta))
            return rule, {k: t.detach().clone() for k, t in theta.items()}
    raise ConfigurationError(f"source={source!r}: expected a checkpoint's name or path, or a pair (rule, theta)")


def _positive_int(name: str, value: Any) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value <= 0:
        raise ConfigurationError(
            f"{name}={value!r} ({type(value).__name__}): expected a positive int, the number of steps of the whole run"
        )
    return int(value)


def _factor(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0.0 <= value < math.inf:
        raise ConfigurationError(f"{name}={value!r}: expected a finite number of at least 0")
    return float(value)  # numpy's numbers would keep torch.load(weights_only=True) from reading a state_dict


def _check_kind(group: Mapping[str, Any]) -> None:
    if "kind" in group and group["kind"] not in get_args(Kind):
        raise ConfigurationError(f"kind={group['kind']!r}: expected one of {', '.join(get_args(Kind))}")


def _check_params(members: Sequence[_Member]) -> None:
    for m in members:
        if not m.param.is_floating_point() or m.param.layout != torch.strided:
            raise ParameterError(
                f"{_label(m)} is {m.param.dtype}, {m.param.layout}: expected a dense floating-point tensor; leave it out, "
                "or optimize the real view of a complex one"
            )
        if m.param.device != members[0].param.device:
            raise ParameterError(
                f"{_label(m)} is on {m.param.device}, {_label(members[0])} on {members[0].param.device}: "
                "make one optimizer for each device"
            )


def _check_gradients(members: Sequence[_Member]) -> None:
    for m in members:
        grad = m.param.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise GradientError(
                f"{_label(m)}: its gradient is {grad.layout}, expected a dense one; sparse=False gives it"
            )
        if not grad.is_floating_point():
            raise GradientError(f"{_label(m)}: its gradient is {grad.dtype}, expected a real floating-point one")
        if grad.shape != m.param.shape or grad.device != m.param.device:
            raise GradientError(
                f"{_label(m)}: its gradient is {tuple(grad.shape)} on {grad.device}, expected {tuple(m.param.shape)} "
                f"on {m.param.device}; call zero_grad() and backward() after resizing or moving a parameter"
            )


def _label(member: _Member) -> str:
    names = member.group.get("param_names")
    if names is None:
        return f"parameter {member.key}"
    (place, *_) = (i for i, p in enumerate(member.group["params"]) if p is member.param)
    return f"parameter {names[place]!r}"


def _kinds(members: Iterable[_Member]) -> dict[str, Kind]:
    default = default_kinds({m.key: m.param for m in members})
    return {**default, **{m.key: m.group["kind"] for m in members if "kind" in m.group}}


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


def _shapes(slots: Mapping[str, torch.Size | None]) -> dict[str, Any]:
    return {k: shape if shape is None else tuple(shape) for k, shape in slots.items()}
