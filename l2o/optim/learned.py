"""Learned optimizers as a `torch.optim.Optimizer`."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from l2o import fused
from l2o.checkpoints import store
from l2o.optim import guarded, resume, slots
from l2o.optim.apply import Inputs, apart, in_place, updated, write
from l2o.optim.guard import beside, culprit, finite, masked, plain, readable, rest
from l2o.optim.inputs import length, resolved, scalar
from l2o.optim.members import Member, check_params, checked_gradient, infos, label, settings
from l2o.types import ConfigurationError, L2OError, OptState, Params, Run, Slots, Theta, UpdateRule

_LOOK = 1000
"""Steps between two looks at the number of skipped ones, on devices that have to be waited for."""
_COUNTED = "nothing has changed by it. optimizer.skipped_steps counts such steps, of which no more is said"


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
    guard: whether a run that goes wrong is helped, by smaller steps, then by AdamW (`l2o.optim.guarded`). By default
        for checkpoints alone, not for ``(rule, theta)``, whose users want to see what the rule itself does.

    Arithmetic and state are float64 if any parameter is, else float32, whatever the parameters' precision and
    autocast. All groups go through the rule together; parameters without a gradient stay as they are, and so do entries
    that never had one other than 0 (padding, pruned weights), but for ``weight_decay``. A step is skipped as a whole
    where a gradient, the loss that the rule reads or an update is not finite, or its square is not: nothing but
    `skipped_steps` changes, the rule's clock does not advance, and a warning says so once.

    ``state[p]`` has the rule's slots from p's first gradient on, ``state["shared"]`` those of no single parameter,
    ``state["clock"]`` the numbers of steps that were called and, of these, skipped; ``state["origin"]`` names rule and
    θ. What other code keeps there stays. Where the rule has a kernel, long runs use it (``L2O_KERNELS=0``: never), with
    equal steps but for rounding. ``state_dict()`` is a snapshot, which later steps leave as it is. ``total_steps`` is
    not in it, so that a run can be resumed with another length.

    Raises `ConfigurationError`, `ParameterError` (not floating point, sparse, expanded, made in inference mode, or on
    several devices), and what `l2o.load` raises.
    """

    state: defaultdict[Any, Any]

    def __init__(
        self,
        params: ParamsT,
        source: store.Source | tuple[UpdateRule, Theta] | None = None,
        *,
        total_steps: int | None = None,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        rules: Sequence[type[UpdateRule]] = (),
        guard: bool | None = None,
    ) -> None:
        self.guard = not isinstance(source, tuple) if guard is None else bool(guard)
        name, self.rule, self.theta = resolved(source, rules)
        self.total_steps = length(total_steps)
        defaults = settings({"lr": lr, "weight_decay": weight_decay})
        self._origin = resume.origin(name, self.rule, self.theta)
        self._warned: set[str] = set()
        self._forget()
        super().__init__(params, defaults)
        self._count(0, called=0)  # from the start, so that each state_dict of ours shows whose it is

    def _forget(self) -> None:
        """Forget what is kept for speed alone."""
        self._theta_on: dict[tuple[int, torch.dtype, torch.device], Theta] = {}
        self._places: list[tuple[int, ...]] = []
        self._all: list[Member] = []
        self._layouts: dict[str, resume.Layout] = {}
        self._lent = True  # others may hold the state's tensors, which steps in place would write to

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; its parameters get their state with their first gradient."""
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            # As Python's floats: torch.load(weights_only=True) would not read numpy's in a state_dict.
            group.update(settings(group))
            check_params(self._members())
        except L2OError:
            self.param_groups.pop()
            raise

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped, because something was not finite. Waits for the device."""
        return int(slots.counts(self.state)[1])

    def report(self) -> dict[str, Any]:
        """What the guard did: ``stage``, ``skipped_steps`` and ``events``, each with ``step``, ``kind``, ``done``."""
        return {**guarded.report(self.state), "skipped_steps": self.skipped_steps}

    @property
    def _acting(self) -> tuple[UpdateRule, Theta]:
        return guarded.acting(self.state, self.rule, self.theta)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None) -> Any:
        """Take one step and return the loss, if there is one. Does not wait for the device.

        closure: as in torch, computes loss and gradients anew; called with grad mode on.
        loss: the loss that the gradients are of, 0-d, where there is no closure. Some rules need it (``needs_loss``).

        Raises `GradientError`, `ParameterError` or `ConfigurationError` before a parameter or any state is written.
        """
        if closure is not None and not callable(closure):
            raise ConfigurationError(
                f"step got a {type(closure).__name__} as closure, expected a function; a loss goes by name: "
                "step(loss=loss)"
            )
        if closure is not None and loss is not None:
            raise ConfigurationError("step got a closure and loss=; the closure returns the loss, so leave loss= out")
        if self.rule.needs_loss and closure is None and loss is None:
            raise ConfigurationError(f"{self.rule!r} reads the loss: call step(loss=loss), or step(closure)")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members = [member for member in self._members() if member.param.grad is not None]
        if members:
            with plain(members[0].param.device):
                self._step(members, loss)
        return loss

    def _step(self, members: Sequence[Member], loss: Any) -> None:
        self._look()
        check_params(members)
        if self.guard and self._watched(members, loss):
            return
        factors = {key: self._factors(group) for key, group in {id(m.group): m.group for m in members}.items()}
        inputs = self._inputs(members, loss)
        in_place = self._stepped_in_place(members, inputs, factors)
        if in_place is False:
            self._skip(culprit(members, inputs.grads, {}, None, guarded.limit(self.state)))
        if in_place is not None:
            return
        grads, old, loss = inputs.grads, inputs.state, inputs.run.loss
        rule = self._acting[0]
        updates, new = updated(rule, inputs, self.total_steps)
        if not rule.rests:
            seen = {m.key: slots.seen(self.state, m, bool(self._own(m))) for m in members}
            updates, now = rest(updates, grads, seen)
            old, new = beside(old, seen), beside(new, now)
        others = [*updates.values(), *([] if loss is None else [loss])]
        ok = finite(list(grads.values()), others, guarded.limit(self.state))
        if not readable(ok.device):
            updates, new = masked(ok, updates, new, old)
        elif not ok:
            self._skip(culprit(members, grads, updates, loss, guarded.limit(self.state)))
            return
        slots.store(self.state, members, inputs.params, new)
        write(members, inputs.params, updates, factors, None if readable(ok.device) else ok)
        self._count(0 if readable(ok.device) else (~ok).long())

    def _stepped_in_place(
        self, members: Sequence[Member], inputs: Inputs, factors: Mapping[int, tuple[float, float]]
    ) -> bool | None:
        """Take the step by the rule's kernel: False where a gradient is not finite, None where there is no kernel."""
        rule = self._acting[0]
        if not (readable(members[0].param.device) and in_place(rule, inputs, members, self.total_steps)):
            return None
        if not finite(list(inputs.grads.values()), [], guarded.limit(self.state)):
            return False
        inputs = inputs._replace(state=apart(inputs.state)) if self._lent else inputs
        new = fused.step(rule, *inputs, {m.key: factors[id(m.group)] for m in members})
        if new is None:
            return None
        slots.keep(self.state, members, new)
        self._lent = False
        self._count(0)
        return True

    def _watched(self, members: Sequence[Member], loss: Any) -> bool:
        """Whether the guard has put good parameters in place: this gradient is of others."""
        names = {m.param: tuple(self._layout(m)) for m in self._members()}.__getitem__
        event = guarded.watch_step(self.state, members, names, loss, self.total_steps)
        if event is None:
            return False
        self._layouts, self._lent = {}, True
        if event.restored:
            self._warn(event.done, str(event))
            self._count(0)
        return event.restored

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and a snapshot: later steps leave its tensors as they are."""
        self._lent = True
        return super().state_dict()

    def _inputs(self, members: Sequence[Member], loss: Any) -> Inputs:
        """What the rule gets, all of it checked and in one dtype."""
        dtype, device = self._dtype(), members[0].param.device
        grads = slots.cast({m.key: checked_gradient(m) for m in members}, dtype)
        params = slots.cast({m.key: m.param.detach() for m in members}, dtype)
        rule, theta = self._acting
        loss = scalar(loss, dtype, device) if rule.needs_loss else None
        theta = self._cast(theta, dtype, device)
        state = self._opt_state(theta, members, params)
        return Inputs(theta, grads, state, params, infos(members), self._run(device, loss))

    def _factors(self, group: Mapping[str, Any]) -> tuple[float, float]:
        """On the updates of a group's parameters, and on the parameters."""
        now = settings(group)
        lr = guarded.rate(self.state, now["lr"], self.total_steps)
        return lr, math.exp(-now["weight_decay"] * lr / self.total_steps)

    def _members(self) -> list[Member]:
        """Every parameter once, also one that a group has twice."""
        places = [(id(group), *map(id, group["params"])) for group in self.param_groups]
        if places != self._places:
            unique: dict[int, Member] = {}
            for i, (group, p) in enumerate((g, p) for g in self.param_groups for p in g["params"]):
                unique.setdefault(id(p), Member(str(i), p, group))
            self._places, self._all, self._layouts = places, list(unique.values()), {}
        return self._all

    def _dtype(self) -> torch.dtype:
        """Of the arithmetic; asked at each step, because modules are also converted after their optimizer was made."""
        float64 = any(m.param.dtype == torch.float64 for m in self._members())
        return torch.float64 if float64 else torch.float32

    def _cast(self, theta: Theta, dtype: torch.dtype, device: torch.device) -> Theta:
        key = (id(theta), dtype, device)
        if key not in self._theta_on:
            self._theta_on[key] = {k: t.to(device, dtype) for k, t in theta.items()}
        return self._theta_on[key]

    def _opt_state(self, theta: Theta, members: Sequence[Member], params: Params) -> OptState:
        """The state of ``members``, and what the rule starts with for those that have none. Nothing is written."""
        dtype = next(iter(params.values())).dtype
        old = {m.key: slots.cast(own, dtype) for m in members if (own := self._own(m))}
        new = [m for m in members if m.key not in old]
        fresh = (
            self._acting[0].init(theta, {m.key: params[m.key] for m in new}, infos(new)) if new else OptState({}, {})
        )
        per_param = {m.key: old[m.key] if m.key in old else fresh.per_param[m.key] for m in members}
        return OptState(per_param, slots.cast(self.state.get("shared") or fresh.shared, dtype))

    def _start(self, member: Member, state: slots.State) -> OptState:
        """What the rule that acts in a run of such a state would start with, had it this parameter alone."""
        dtype, (rule, theta) = self._dtype(), guarded.acting(state, self.rule, self.theta)
        params = {member.key: member.param.detach().to(dtype)}
        return rule.init(self._cast(theta, dtype, member.param.device), params, infos([member]))

    def _layout(self, member: Member) -> resume.Layout:
        if member.key not in self._layouts:
            self._layouts[member.key] = resume.layout(self._start(member, self.state).per_param[member.key])
        return self._layouts[member.key]

    def _own(self, member: Member) -> Slots:
        """The rule's slots of a parameter, without what other code keeps beside them; none before its first step."""
        kept = self.state.get(member.param)
        return slots.own(kept, self._layout(member)) if kept else {}

    def _run(self, device: torch.device, loss: Tensor | None) -> Run:
        called, skipped = slots.counts(self.state)
        # Fills, not copies of host tensors: the host would wait for those.
        step, total = (torch.full((), n, dtype=torch.int64, device=device) for n in (called, self.total_steps))
        return Run(step - skipped, total, loss)

    def _count(self, skipped: int | Tensor, called: int = 1) -> None:
        steps, before = slots.counts(self.state)
        self.state["clock"] = {"step": steps + called, "skipped": before + skipped}
        self.state["origin"] = self._origin

    def _skip(self, reason: str) -> None:
        self._count(1)
        skipped = f"step {slots.counts(self.state)[0]} was skipped: {reason}"
        self._warn("skipped", f"{skipped}; {_COUNTED}")

    def _look(self) -> None:
        """Say when the run is over, and now and then whether steps were skipped, where it takes waiting."""
        called, skipped = slots.counts(self.state)
        if called >= self.total_steps:
            end = f"step {called + 1} of a run of total_steps={self.total_steps}: the rule was told it would be over"
            self._warn("over", end)
        if isinstance(skipped, Tensor) and called % _LOOK == 0 and skipped:
            self._warn("skipped", f"{int(skipped)} of {called} steps were skipped, not being finite; {_COUNTED}")

    def _warn(self, what: str, message: str) -> None:
        """Warn of ``what`` once."""
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message, UserWarning, stacklevel=7)  # the line that calls step

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict()`` returned, to the bit and in copies.

        Where both sides have names, parameters and groups are found by them, whatever their order.
        Raises ValueError, as torch does, where groups differ in number or size, and `ResumeError` where the state is of
        another rule, θ or optimizer, or a group lacks a setting; both before anything is changed.
        """
        resume.check_kind(state_dict)
        loaded: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            loaded.update(self._checked(final))
            return loaded

        # torch rounds the state of a bf16 parameter to bf16, so it is put in place once more. In hooks, because those
        # of users may exchange the dict before, and want to see the result after.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(lambda _: self._restore(loaded), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _checked(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """``state_dict`` in the order of the optimizer; raises `ResumeError`."""
        resume.check_origin(state_dict, self._origin)
        guarded.check(state_dict["state"], self.guard)
        resume.check_groups(state_dict["param_groups"])
        groups, state = resume.in_order(self.param_groups, state_dict["param_groups"]), state_dict["state"]
        if resume.sizes(groups) == resume.sizes(self.param_groups):  # else torch has its error
            ids = list(chain.from_iterable(group["params"] for group in groups))
            if any(state.get(ids[int(m.key)]) for m in self._members()):
                shared = resume.layout(self._start(self._members()[0], state).shared)
                resume.check_shared(state, shared, repr(self.rule))
            for m in self._members():
                found = state.get(ids[int(m.key)], {})
                layout = resume.layout(self._start(m, state).per_param[m.key])
                resume.check_slots(found, layout, "origin" not in state, label(m), repr(self.rule))
        return {**state_dict, "param_groups": groups}

    def _restore(self, state_dict: Mapping[str, Any]) -> None:
        self.state.update(resume.copies(self.param_groups, state_dict))
        self._layouts = {}
        if not self.guard:
            self.state.pop("guard", None)
        called, skipped = slots.counts(self.state)
        self.state.update(clock={"step": called, "skipped": int(skipped)}, origin=self._origin)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in ("rule", "theta", "total_steps", "guard", "_origin", "_warned")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # load_state_dict calls this too, with part of the state
        self._forget()

    def __repr__(self) -> str:
        what = dict.fromkeys([self._origin["checkpoint"], repr(self.rule)])  # once, where the rule was handed over
        header = f"LearnedOptimizer (\n{', '.join(what)}, step {slots.counts(self.state)[0]} of {self.total_steps}"
        return super().__repr__().replace("LearnedOptimizer (", header, 1)
