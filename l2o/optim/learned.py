"""Learned optimizers as a `torch.optim.Optimizer`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from l2o import fused
from l2o.checkpoints import store
from l2o.distributed import ranks
from l2o.fused import Inputs
from l2o.ops.numeric import finite
from l2o.optim import guarded, resume, slots
from l2o.optim.apply import Ready, apart, in_place, write
from l2o.optim.guard import beside, culprit, masked, plain, readable, rest
from l2o.optim.inputs import check_scalar, evaluated, known_kinds, length, resolved, scalar
from l2o.optim.locate import check_flat, zero_group
from l2o.optim.members import Member, check_params, checked_gradient, infos, settings
from l2o.optim.precision import checked_dtype
from l2o.optim.state import RuleState
from l2o.types import ConfigurationError, L2OError, Run, Theta, UpdateRule

_LOOK = 1000
"""Steps between two looks at the number of skipped ones, on devices that have to be waited for."""
_COUNTED = "nothing has changed by it. optimizer.skipped_steps counts such steps, of which no more is said"


class LearnedOptimizer(RuleState):
    """A learned update rule in the place of any torch optimizer::

        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)                            # before
        optimizer = l2o.LearnedOptimizer(model.parameters(), "default", total_steps=10_000)  # after

    params: parameters, named parameters, or groups. A group may have its own ``lr``, ``weight_decay`` and ``kind``
        (matrix, vector, embedding, output); by default a tensor of two and more axes is a matrix, others are vectors.
    source: name, path or address of a checkpoint (`l2o.load`), or a pair ``(rule, theta)``.
    total_steps: how many steps the run will have. It may go on after them, with a warning.
    lr: factor on the rule's own step, without a unit: 1 is the step that was learned. Schedulers may change it. A
        tensor of one number stays one; a step waits for its device.
    weight_decay: decoupled and measured over the run: λ shrinks a parameter by ``exp(-λ)`` in ``total_steps`` steps at
        lr 1 (AdamW's ``lr * weight_decay * steps``). Each step: ``p <- p exp(-λ lr / total_steps)``.
    rules: classes of rules of your own that the checkpoint may name.
    guard: whether a run that goes wrong is helped, by smaller steps, then by AdamW (`l2o.optim.guarded`), where it has
        one process. By default for checkpoints, not for ``(rule, theta)``, whose users want to see what the rule does.
        AdamW acts from the start where the checkpoint's card says that its rule has met no such ``kinds``.
    state_dtype: ``torch.bfloat16`` to keep slots of their parameter's shape so between steps, rounded at random: half
        the memory (`l2o.optim.precision`). Other slots, those of no single parameter, and all arithmetic stay.

    ``optimizer.cuda_graph = True``, on a GPU: steps that are alike are captured once and replayed (`l2o.optim.graphs`),
    one launch instead of hundreds, for a copy of gradients and state, and what a step computes stays allocated.

    Arithmetic and state are float64 if any parameter is, else float32, whatever the parameters' precision and
    autocast. All groups go through the rule together; parameters without a gradient stay as they are, and so do entries
    that never had one other than 0 (padding, pruned weights), but for ``weight_decay``. A step is skipped as a whole
    where a gradient, the loss that the rule reads or an update is not finite, or its square is not: nothing but
    `skipped_steps` changes, the rule's clock does not advance, and a warning says so once.

    ``state[p]`` has the rule's slots from p's first gradient on, ``param_groups[0]["run"]`` all else: the numbers of
    steps that were called and, of these, skipped, the slots of no single parameter, the names of rule and θ. What other
    code keeps there stays. Where the rule has a kernel, long runs use it (``L2O_KERNELS=0``: never), with
    equal steps but for rounding. ``state_dict()`` is a snapshot, which later steps leave as it is. ``total_steps`` is
    not in it, so that a run can be resumed with another length.

    Parameters may be shards (FSDP2's ``fully_shard``) or one process' share of all (``ZeroRedundancyOptimizer``): steps
    are those of one process that has all, the loss is the mean of theirs, all skip a step or none, and slots are shards
    as their parameters are, which ``torch.distributed.checkpoint`` saves and loads with any number of processes.

    Raises `ConfigurationError`, `ParameterError` (not floating point, sparse, expanded, made in inference mode, on
    several devices, or flat shards of FSDP1), and what `l2o.load` raises.
    """

    def __init__(
        self,
        params: ParamsT,
        source: store.Source | tuple[UpdateRule, Theta] | None = None,
        *,
        total_steps: int | None = None,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        rules: Sequence[type[UpdateRule]] = (),
        guard: bool | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        self.guard = not isinstance(source, tuple) if guard is None else bool(guard)
        self.state_dtype = checked_dtype(state_dtype)
        name, self.rule, self.theta = resolved(source, rules)
        self._kinds = known_kinds(source) if self.guard else None
        self.total_steps = length(total_steps)
        defaults = {"lr": lr, "weight_decay": weight_decay}
        settings(defaults)
        self._origin = resume.origin(name, self.rule, self.theta)
        self._warned, self._others = set(), zero_group()
        self._forget()
        super().__init__(params, defaults)
        self._count(0, called=0)  # from the start, so that each state_dict of ours shows whose it is

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; its parameters get their state with their first gradient."""
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            # As Python's floats: torch.load(weights_only=True) would not read numpy's in a state_dict. Tensors stay,
            # for schedulers and others to write to.
            group.update({k: v for k, v in settings(group).items() if not isinstance(group[k], Tensor)})
            check_params(self._members())
        except L2OError:
            self.param_groups.pop()
            raise

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped, because something was not finite. Waits for the device."""
        return int(slots.counts(self)[1])

    def report(self) -> dict[str, Any]:
        """Return what the guard did: ``stage``, ``skipped_steps`` and ``events``, each with ``step``, ``kind``,
        ``done``."""
        return {**guarded.report(slots.run_of(self)), "skipped_steps": self.skipped_steps}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None) -> Any:
        """Take one step and return the loss, if there is one. Does not wait for the device, but for a guard's looks.

        closure: as in torch, computes loss and gradients anew, or returns a loss that has been computed: what wrappers
            of other libraries pass on. Called with grad mode on.
        loss: the loss that the gradients are of, 0-d, where there is no closure. Some rules need it (``needs_loss``).

        Raises `GradientError`, `ParameterError` or `ConfigurationError` before a parameter or any state is written.
        """
        if torch.compiler.is_compiling():
            from l2o.optim import compiled  # what it imports takes seconds, and is there by now

            return compiled.step(self, closure, loss)
        loss, members = self._asked(closure, loss)
        if members:
            with plain(members[0].param.device):
                ready = self._ready(members, loss)
                if ready is not None:
                    self._step(members, ready)
        return loss

    def _asked(self, closure: Callable[[], Any] | None, loss: Any) -> tuple[Any, Sequence[Member]]:
        """The loss, and the parameters to be moved."""
        if self._guards:
            said = guarded.begin(self, self._members(), self._kinds)
            if said:
                self._warn("kinds", said)
        if closure is None and loss is None and self._is_start():
            return None, []
        if self.rule.needs_loss and closure is None and loss is None:
            raise ConfigurationError(f"{self.rule!r} reads the loss: call step(loss=loss), or step(closure)")
        loss = evaluated(closure, loss)
        if self.rule.needs_loss:
            check_scalar(loss)  # before a guard keeps anything
        return loss, self._here()

    def _ready(self, members: Sequence[Member], loss: Any) -> Ready | None:
        """What a step needs to know; None where the guard has put good parameters in place instead."""
        if slots.renew(self):
            self._layouts = {}  # the rule acts, whoever did
        self._look()
        if ranks().size > 1:
            check_flat(members)
        check_params(members)
        if self._guards and self._watched(members, loss):
            return None
        factors = {key: self._factors(group) for key, group in {id(m.group): m.group for m in members}.items()}
        limit = guarded.limit(slots.run_of(self), members)
        return Ready(*self._inputs(members, loss), factors, limit)

    def _step(self, members: Sequence[Member], ready: Ready) -> None:
        rule, inputs, factors, limit = ready
        if self.cuda_graph and self._graphs.step(self, members, ready):
            return
        if self._stepped_in_place(rule, members, inputs, factors, limit):
            return
        grads, old, loss = inputs.grads, inputs.state, inputs.run.loss
        updates, new = self._place.update(rule, inputs, self.total_steps)
        if not rule.rests:
            seen = self._seen(members)
            updates, now = rest(updates, grads, seen)
            old, new = beside(old, seen), beside(new, now)
        told = [] if loss is None else [loss]
        ok = self._place.agree(finite(list(grads.values()), [*updates.values(), *told], limit))
        if not readable(ok.device):
            updates, new = masked(ok, updates, new, old)
        elif not ok:
            self._skip(culprit(members, grads, updates, loss, limit))
            return
        new = slots.apart(members, inputs.params, grads, new)
        self._keep(members, new)
        write(members, inputs.params, updates, factors, None if readable(ok.device) else ok)
        self._count(0 if readable(ok.device) else (~ok).long())

    def _stepped_in_place(
        self,
        rule: UpdateRule,
        members: Sequence[Member],
        inputs: Inputs,
        factors: Mapping[int, tuple[float, float]],
        limit: float,
    ) -> bool:
        """Take the step by the rule's kernel, if there is one for it."""
        here = self._place.alone and readable(members[0].param.device)
        if not (here and in_place(rule, inputs, members, self.total_steps)):
            return False
        state = inputs.state if rule.rests else beside(inputs.state, self._seen(members))
        if self._lent:
            # Once, because kernels need not look for what finite gradients never make.
            if not finite([], [t for own in inputs.state.per_param.values() for t in own.values()]):
                return False
            state = apart(state)
        own = {m.key: factors[id(m.group)] for m in members}
        new = fused.step(rule, inputs._replace(state=state), own, limit)
        if new is None:
            return False
        self._keep(members, new)
        self._lent = False
        self._count(0)
        return True

    def _watched(self, members: Sequence[Member], loss: Any) -> bool:
        """Whether the guard has put good parameters in place: this gradient is of others."""

        def names() -> dict[Tensor, tuple[str, ...]]:
            return {m.param: tuple(self._layout(m)) for m in self._members()}

        event = guarded.watch_step(self, members, self._members(), names, loss, self.total_steps, self.rule.stride)
        if event is None:
            return False
        self._layouts, self._lent = {}, True
        if event.restored:
            self._warn(event.done, str(event))
            self._count(0)
        return event.restored

    def _inputs(self, members: Sequence[Member], loss: Any) -> tuple[UpdateRule, Inputs]:
        """Who makes the step, and what it gets, all of it checked and in one dtype."""
        dtype, device = self._dtype(), members[0].param.device
        grads = slots.cast({m.key: checked_gradient(m) for m in members}, dtype)
        params = slots.cast({m.key: m.here.detach() for m in members}, dtype)
        rule, theta = self._acting(dtype, device)
        loss = self._place.mean(scalar(loss, dtype, device)) if rule.needs_loss else None
        state = self._opt_state(rule, theta, members, params)
        return rule, Inputs(theta, grads, state, params, infos(members), self._run(device, loss))

    def _factors(self, group: Mapping[str, Any]) -> tuple[float, float]:
        """On the updates of a group's parameters, and on the parameters."""
        now = settings(group)
        lr = guarded.rate(slots.run_of(self), now["lr"], self.total_steps)
        return lr, math.exp(-now["weight_decay"] * lr / self.total_steps)

    def _run(self, device: torch.device, loss: Tensor | None) -> Run:
        called, skipped = slots.counts(self)
        # Fills, not copies of host tensors: the host would wait for those.
        step, total = (torch.full((), n, dtype=torch.int64, device=device) for n in (called, self.total_steps))
        return Run(step - skipped, total, loss, called - skipped if isinstance(skipped, int) else called)

    def _skip(self, reason: str) -> None:
        self._count(1)
        skipped = f"step {slots.counts(self)[0]} was skipped: {reason}"
        self._warn("skipped", f"{skipped}; {_COUNTED}")

    def _look(self) -> None:
        """Say when the run is over, and now and then whether steps were skipped, where it takes waiting."""
        resume.check_same(slots.run_of(self), self._origin)
        called, skipped = slots.counts(self)
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

    def __repr__(self) -> str:
        what = dict.fromkeys([self._origin["checkpoint"], repr(self.rule)])  # once, where the rule was handed over
        header = f"LearnedOptimizer (\n{', '.join(what)}, step {slots.counts(self)[0]} of {self.total_steps}"
        lines = super().__repr__().splitlines()
        return "\n".join([header, *(line for line in lines[1:] if not line.startswith(f"    {slots.RUN}: "))])
