"""The state of an optimizer whose steps are a rule's: where it is kept, how it is saved, loaded and copied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from l2o.distributed import ranks
from l2o.optim import graphs, guarded, precision, resume, slots
from l2o.optim.apply import apart
from l2o.optim.guard import beside, plain
from l2o.optim.locate import placed
from l2o.optim.members import Member, checked_gradient, infos, label, settings, unique
from l2o.optim.place import WHOLE, Others
from l2o.types import OptState, ParamInfo, Params, Slots, Theta, UpdateRule


class RuleState(torch.optim.Optimizer):
    """What `LearnedOptimizer` keeps: slots with each parameter, all else as ``run`` of the first group.

    ``state`` is empty before the first step and has parameters alone as keys, and groups travel whole: what torch's
    tools for distributed runs ask for.
    """

    state: defaultdict[Any, Any]
    rule: UpdateRule
    theta: Theta
    total_steps: int
    guard: bool
    state_dtype: torch.dtype | None = None
    cuda_graph: bool = False
    """Whether steps are captured as CUDA graphs (`l2o.optim.graphs`); to be set at any time."""
    _origin: dict[str, str]
    _warned: set[str]
    _kinds: guarded.Kinds | None = None
    _others: Others | None = None

    def _forget(self) -> None:
        """Forget what is kept for speed alone."""
        self._theta_on: dict[tuple[int, torch.dtype, torch.device], Theta] = {}
        self._places: list[tuple[int, ...]] = []
        self._place = WHOLE
        self._all: list[Member] = []
        self._layouts: dict[str, resume.Layout] = {}
        self._entrywise: dict[tuple[int, ParamInfo], frozenset[str]] = {}
        self._graphs = graphs.Graphs()
        self._lent = True  # others may hold the state's tensors, which steps in place would write to

    def _members(self) -> list[Member]:
        """Every parameter once, also one that a group has twice."""
        places = [(id(group), *map(id, group["params"])) for group in self.param_groups]
        if places != self._places:
            found = unique(self.param_groups)
            self._place = placed(found, self.rule, self.theta, self._others)
            self._places, self._all, self._layouts = places, found, {}
        return self._all

    def _here(self) -> Sequence[Member]:
        """Those that have a gradient, with what of each is in this process."""
        # First, because it is what finds out about the place.
        members = [member for member in self._members() if member.param.grad is not None]
        return self._place.here(members)

    @property
    def _guards(self) -> bool:
        """Whether a guard is at work: in one process alone, since others would see other losses, and go other ways."""
        return self.guard and self._place.alone and ranks().size == 1

    def _dtype(self) -> torch.dtype:
        """Of the arithmetic; asked at each step, because modules are also converted after their optimizer was made."""
        float64 = any(m.param.dtype == torch.float64 for m in self._members())
        return torch.float64 if float64 else torch.float32

    def _acting(
        self, dtype: torch.dtype, device: torch.device, run: guarded.Facts | None = None
    ) -> tuple[UpdateRule, Theta]:
        """Who makes the steps, now or in a ``run`` that was saved: the rule, or what the guard put there; with θ."""
        rule, theta = guarded.acting(slots.run_of(self) if run is None else run, self.rule, self.theta)
        key = (id(theta), dtype, device)
        if key not in self._theta_on:
            self._theta_on[key] = {k: t.to(device, dtype) for k, t in theta.items()}
        return rule, self._theta_on[key]

    def _opt_state(self, rule: UpdateRule, theta: Theta, members: Sequence[Member], params: Params) -> OptState:
        """The state of ``members``, and what the rule starts with for those that have none. Nothing is written."""
        like = next(iter(params.values()))
        old = slots.at_hand({m.key: own for m in members if (own := self._own(m))}, like)
        new = [m for m in members if m.key not in old]
        fresh = rule.init(theta, {m.key: params[m.key] for m in new}, infos(new)) if new else OptState({}, {})
        per_param = {m.key: old[m.key] if m.key in old else fresh.per_param[m.key] for m in members}
        shared = slots.run_of(self).get("shared")
        return OptState(per_param, slots.at_hand({"": shared or fresh.shared}, like)[""])

    def _start(self, member: Member, run: guarded.Facts | None = None) -> OptState:
        """What who makes the steps (see `_acting`) would start with, had it this parameter alone."""
        dtype, device = self._dtype(), member.param.device
        if not self._place.alone:
            device = torch.device("meta")  # nothing is here of the whole parameter but its shape
        whole = torch.empty(member.param.shape, dtype=dtype, device=device) if device.type == "meta" else None
        params = {member.key: member.param.detach().to(dtype) if whole is None else whole}
        rule, theta = self._acting(dtype, device, run)
        return rule.init(theta, params, infos([member]))

    def _layout(self, member: Member) -> resume.Layout:
        if member.key not in self._layouts:
            self._layouts[member.key] = resume.layout(self._start(member).per_param[member.key])
        return self._layouts[member.key]

    def _own(self, member: Member) -> Slots:
        """The rule's slots of a parameter, without what other code keeps beside them; none before its first step."""
        kept = self.state.get(member.param)
        return self._place.local(slots.own(kept, self._layout(member))) if kept else {}

    def _keep(self, members: Sequence[Member], new: OptState) -> None:
        """Keep the new slots of what is here, in the precision of the state."""
        if self.state_dtype is not None:
            who = guarded.acting(slots.run_of(self), self.rule, self.theta)
            narrow = {key: self._narrow(*who, info) for key, info in infos(members).items()}
            new = precision.stored(new, narrow, slots.counts(self)[0])
        slots.keep(self, members, self._place.kept(members, new))

    def _narrow(self, rule: UpdateRule, theta: Theta, info: ParamInfo) -> frozenset[str]:
        """See `precision.entrywise`."""
        if (id(rule), info) not in self._entrywise:
            self._entrywise[id(rule), info] = precision.entrywise(rule, theta, info)
        return self._entrywise[id(rule), info]

    def _seen(self, members: Sequence[Member]) -> Slots:
        """Bool ``[*shape]`` by parameter: which entries have had a gradient."""
        seen = {m.key: slots.seen(self.state, m, bool(self._own(m))) for m in members}
        return self._place.local(seen)

    def _is_start(self) -> bool:
        """Make the state, and nothing else, where the first step has ``lr=0`` and no gradient but zeros.

        So distributed checkpoints ask for tensors to load into (torch/distributed/checkpoint/state_dict.py). Others see
        no difference: nothing would move, and the rule's state would still be that of no gradient.
        """
        if self.state or slots.counts(self)[0] or any(settings(group)["lr"] for group in self.param_groups):
            return False
        members = self._here()
        if not members:
            return False
        dtype, device = self._dtype(), members[0].param.device
        with plain(device):
            if not self._place.agree(~torch.stack([checked_gradient(m).any() for m in members]).any()):
                return False
            params = slots.cast({m.key: m.here.detach() for m in members}, dtype)
            # Apart, because tensors are loaded into: a rule may start several slots with one tensor, or with θ's.
            rule, theta = self._acting(dtype, device)
            new = apart(self._opt_state(rule, theta, members, params))
            new = new if rule.rests else beside(new, self._seen(members))
            self._keep(members, new)
            if self._guards:
                guarded.keep_good(self.state, members)
        return True

    def _count(self, skipped: int | Tensor, called: int = 1) -> None:
        steps, before = slots.counts(self)
        slots.record(self, step=steps + called, skipped=before + skipped, **self._origin)

    def state_dict(self) -> dict[str, Any]:
        """Return what torch's does, and a snapshot: later steps leave its tensors as they are. Waits for the device."""
        self._lent = True
        called, skipped = slots.counts(self)
        slots.record(self, step=called, skipped=int(skipped))  # as in any other state_dict, on whatever device
        saved = super().state_dict()
        run = saved["param_groups"][0][slots.RUN]
        saved["param_groups"][0][slots.RUN] = {**run, "guard": guarded.saved(run)}
        return saved

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
        """``state_dict`` in the order of the optimizer and today's layout; raises `ResumeError`."""
        state_dict = resume.modern(state_dict)
        run = guarded.loaded(resume.checked_run(state_dict, self._origin))
        guarded.check(run, self.guard)
        resume.check_groups(state_dict["param_groups"])
        groups, state = resume.in_order(self.param_groups, state_dict["param_groups"]), state_dict["state"]
        if resume.sizes(groups) == resume.sizes(self.param_groups):  # else torch has its error
            ids = list(chain.from_iterable(group["params"] for group in groups))
            if any(state.get(ids[int(m.key)]) for m in self._members()):
                shared = resume.layout(self._start(self._members()[0], run).shared)
                resume.check_shared(run, shared, repr(self.rule))
            for m in self._members():
                found = state.get(ids[int(m.key)], {})
                layout = resume.layout(self._start(m, run).per_param[m.key])
                resume.check_slots(found, layout, "fingerprint" not in run, label(m), repr(self.rule))
        groups = [{name: v for name, v in group.items() if name != slots.RUN} for group in groups]
        run = run if self.guard else {name: fact for name, fact in run.items() if name != "guard"}
        return {**state_dict, "param_groups": [{**groups[0], slots.RUN: {**run, **self._origin}}, *groups[1:]]}

    def _restore(self, state_dict: Mapping[str, Any]) -> None:
        copies, members = resume.copies(self.param_groups, state_dict), self._members()
        if not self._place.alone:
            copies |= {m.param: self._place.taken(m, copies[m.param]) for m in members if m.param in copies}
        self.state.update(copies)
        self._layouts = {}

    def __getstate__(self) -> dict[str, Any]:
        names = ("rule", "theta", "total_steps", "guard", "state_dtype", "cuda_graph", "_origin", "_warned", "_kinds")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # load_state_dict calls this too, with part of the state
        self._forget()
