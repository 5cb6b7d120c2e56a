"""The outer loop: one step of meta-training, and the whole state that a resumed run needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from l2o.checks import check_float, check_int
from l2o.distributed import gather, local_part
from l2o.ops import schedules
from l2o.random import global_states
from l2o.types import ConfigurationError, MetaGradient, Metrics, ResumeError, Theta

Schedule = Callable[[int], float]
"""Outer step (from 0) to a factor on the outer learning rate."""


def constant_schedule(step: int) -> float:
    """Return the outer learning rate as it stands."""
    return 1.0


def warmup_cosine(step: int, total: int, warmup: int = 0, floor: float = 0.0) -> float:
    """Return `l2o.ops.schedules.warmup_cosine` of one outer step. Raises ConfigurationError unless ``0 <= warmup <
    total``."""
    check_int("warmup", warmup, least=0)
    check_int("total", total, least=warmup + 1)
    check_float("floor", floor, least=0.0)
    now, end, warm = (torch.tensor(float(n), dtype=torch.float64) for n in (step, total, warmup))
    return schedules.warmup_cosine(now, end, warm, floor).item()


def warmup_linear(step: int, total: int, warmup: int = 0, floor: float = 0.0) -> float:
    """Rise linearly from 0 over ``warmup`` steps, then linear down to ``floor`` at ``total``; errors as
    `warmup_cosine`."""
    done, warm = _progress(step, total, warmup)
    check_float("floor", floor, least=0.0)
    return warm * (1.0 - (1.0 - floor) * done)


def warmup_exponential(step: int, total: int, warmup: int = 0, floor: float = 1e-2) -> float:
    """Rise linearly from 0 over ``warmup`` steps, then the same ratio each step, down to ``floor > 0`` at ``total``."""
    done, warm = _progress(step, total, warmup)
    check_float("floor", floor, above=0.0)
    return warm * floor**done


def _progress(step: int, total: int, warmup: int) -> tuple[float, float]:
    """Share of the decay that is done, and the factor of the warm-up, both from 0 to 1."""
    check_int("warmup", warmup, least=0)
    check_int("total", total, least=warmup + 1)
    done = min(max((step - warmup) / (total - warmup), 0.0), 1.0)
    return done, min((step + 1) / warmup, 1.0) if warmup else 1.0


class MetaTraining:
    """A meta-training run: θ, the optimizer that moves it, and the inner problems in flight.

    estimator: of the meta-gradient (`l2o.estimators`).
    theta: initial meta-parameters; copied to the generator's device.
    optimizer: makes the outer optimizer from the tensors of θ, e.g. ``lambda p: torch.optim.Adam(p, lr=1e-3)``; any
        that steps without a closure on dense gradients. It is made twice, the first time of copies, to try it out.
    generator: source of all random numbers of the run; its device is the device of the run.
    schedule: factor on the outer learning rate by outer step.
    clip: largest norm of the meta-gradient that the optimizer gets; None for no limit.
    average: decay d of the exponential average of θ, 0 < d < 1; None for none. It is over θ after each step, not over
        the initial one, and corrected for its start: weights d^age, divided by their sum (as for the moments of Adam,
        Kingma & Ba 2015, section 3).

    The run goes on bit for bit from ``load_state_dict(state_dict())`` on one device and build; a task that draws from
    global generators, which no state holds, is warned of at the first step.
    Raises ConfigurationError for settings that make no sense, and for an optimizer that cannot do this.
    """

    def __init__(
        self,
        estimator: MetaGradient,
        theta: Theta,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        generator: torch.Generator,
        schedule: Schedule = constant_schedule,
        clip: float | None = None,
        average: float | None = None,
    ) -> None:
        self.clip = None if clip is None else check_float("clip", clip, above=0.0)
        self.average = None if average is None else check_float("average", average, above=0.0, below=1.0)
        self.estimator = estimator
        self.theta: Theta = {k: t.detach().to(generator.device, copy=True) for k, t in theta.items()}
        self._slots = _try_optimizer(optimizer, self.theta)
        self.optimizer = optimizer(list(self.theta.values()))
        self.generator = generator
        self.schedule = schedule
        drawn, before = generator.get_state(), global_states()
        self.inner = estimator.init(self.theta, generator)
        self._drew: bool | None = global_states() != before
        if self._drew:  # once more: packages that a task imports may draw, but do so once
            generator.set_state(drawn)
            before = global_states()
            self.inner = estimator.init(self.theta, generator)
            self._drew = global_states() != before
        self.step = 0
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._average: Theta = {} if average is None else {k: t.clone() for k, t in self.theta.items()}

    @property
    def theta_average(self) -> Theta:
        """The θ to evaluate and to save: the average of θ where there is one, else θ itself."""
        return self._average or self.theta

    def outer_step(self) -> Metrics:
        """Estimate the meta-gradient over one truncation and move θ; metrics of the truncation, on the device.

        To the estimator's metrics come ``meta_grad_norm``, before clipping, and ``update_skipped``: 1 where that norm
        is not finite, or 0 because every lane was masked, which leaves θ and the optimizer as they are; else 0. Waits
        for the device, to know which.
        """
        before = None if self._drew is None else global_states()
        grads, self.inner, metrics = self.estimator.estimate(self.theta, self.inner, self.generator)
        if before is not None:
            self._tell_of_global_draws(before)
        norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
        skipped = ~norm.isfinite()
        if "meta_loss" in metrics:  # without a lane there is nothing to follow: weight decay alone would move θ
            skipped |= (norm == 0) & ~metrics["meta_loss"].isfinite()
        if not skipped:
            self._move(grads if self.clip is None else _scaled(grads, (self.clip / norm).clamp(max=1.0)))
        self.step += 1
        if self.average is not None:
            weight = (1.0 - self.average) / (1.0 - self.average**self.step)
            for name, mean in self._average.items():
                mean.lerp_(self.theta[name], weight)
        return {**metrics, "meta_grad_norm": norm, "update_skipped": skipped.long()}

    def _tell_of_global_draws(self, before: tuple[Any, ...]) -> None:
        """Warn where inner problems have drawn from global generators; once, in the first outer step of a sitting."""
        if self._drew or global_states() != before:
            warnings.warn(
                "the task drew from a global generator of torch, NumPy or Python, so that this run neither repeats nor "
                "resumes; draw from the torch.Generator that its methods get (see l2o.random), or do it in a Dataset",
                UserWarning,
                stacklevel=3,
            )
        self._drew = None

    def _move(self, grads: Theta) -> None:
        for name, tensor in self.theta.items():
            tensor.grad = grads[name]
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.schedule(self.step)
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return a snapshot of all that the next outer steps depend on: nested dicts and lists of tensors and scalars.

        Processes that share the run must all call it; each gets the whole, from which any number of them may go on.
        """
        optimizer = self.optimizer.state_dict()
        state = {
            "step": self.step,
            "theta": self.theta,
            "average": self._average,
            "optimizer": {str(k): slots for k, slots in optimizer["state"].items()},
            "groups": [_kept(group) for group in optimizer["param_groups"]],
            "inner": tree_flatten(gather(self.inner))[0],
            "generator": self.generator.get_state(),
        }
        return _copied(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a copy of ``state``. Raises ResumeError, and changes nothing, if it is of another run."""
        structure = tree_flatten(self.inner)[1]
        state = self._checked(_copied(state), tree_flatten(gather(self.inner))[0])
        device = self.generator.device
        self._load_optimizer(state["optimizer"], state["groups"])
        for ours, saved in ((self.theta, state["theta"]), (self._average, state["average"])):
            for name, tensor in ours.items():
                tensor.copy_(saved[name])
        self.inner = tree_unflatten([leaf.to(device) for leaf in local_part(state["inner"])], structure)
        self.generator.set_state(state["generator"])
        self.step = state["step"]

    def _load_optimizer(self, saved_state: dict[str, Any], groups: list[dict[str, Any]]) -> None:
        # Parameters have numbers; a `LearnedOptimizer` also has entries of other names.
        slots = {int(k) if k.isdecimal() else k: value for k, value in saved_state.items()}
        own = self.optimizer.state_dict()["param_groups"]
        # Not what this optimizer has counted by now, where what is saved does not say it.
        settings = [{k: v for k, v in group.items() if not isinstance(v, dict)} for group in own]
        merged = [{**group, **saved} for group, saved in zip(settings, groups, strict=True)]
        try:
            self.optimizer.load_state_dict({"state": slots, "param_groups": merged})
        except ValueError as error:
            raise ResumeError(f"optimizer: {error}") from error
        tensors = [tensor for group in self.optimizer.param_groups for tensor in group["params"]]
        for index, tensor in enumerate(tensors):
            loaded = self.optimizer.state.get(tensor, {})
            for name, value in slots.get(index, {}).items():
                if isinstance(value, Tensor):  # torch has cast it to the dtype of its parameter
                    loaded[name] = value.to(loaded[name].device)

    def _checked(self, state: dict[str, Any], leaves: list[Tensor]) -> dict[str, Any]:
        if not isinstance(state, dict):
            raise ResumeError(f"the saved state is a {type(state).__name__}: expected what state_dict() returned")
        missing = {"step", "theta", "average", "optimizer", "groups", "inner", "generator"} - state.keys()
        if missing:
            raise ResumeError(
                f"the saved state has no {sorted(missing)}: it is not of a meta-training run, or of an older l2o"
            )
        if len(state["groups"]) != len(self.optimizer.param_groups):
            raise ResumeError(
                f"optimizer: the saved state has {len(state['groups'])} groups of parameters, this run has "
                f"{len(self.optimizer.param_groups)}; continue it with the configuration it was started with"
            )
        own = [_kept(group).keys() for group in self.optimizer.param_groups]
        other = own != [group.keys() for group in state["groups"]]  # what groups of another optimizer have differs
        for index, names in enumerate(self._slots):
            saved = state["optimizer"].get(str(index))
            conflict = not names <= saved.keys() if saved and names else other and bool(saved) != bool(names)
            if conflict and state["step"]:
                raise ResumeError(
                    f"optimizer: the saved state has {sorted(saved or ())}, a {type(self.optimizer).__name__} keeps "
                    f"{sorted(names)}; continue it with the configuration it was started with"
                )
        _same_shapes("theta", self.theta, state["theta"])
        _same_shapes("average of theta", self._average, state["average"])
        if len(state["inner"]) != len(leaves):
            raise ResumeError(
                f"inner problems: the saved state has {len(state['inner'])} tensors, this run {len(leaves)}; "
                "continue it with the configuration that it was started with, by the version of l2o that wrote it"
            )
        _same_shapes("inner problems", dict(enumerate(leaves)), dict(enumerate(state["inner"])))
        _same_shapes("generator", {"state": self.generator.get_state()}, {"state": state["generator"]})
        return state


def _try_optimizer(make: Callable[[Iterable[Tensor]], torch.optim.Optimizer], theta: Theta) -> list[set[str]]:
    """One step on a copy of θ, since what an optimizer cannot do shows there only; the names of its slots by tensor."""
    copies = [tensor.clone() for tensor in theta.values()]
    for tensor in copies:
        tensor.grad = torch.zeros_like(tensor)
    try:
        trial = make(copies)
    except Exception as error:  # whatever an optimizer may raise on what it was not made for
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigurationError(
            f"optimizer: no optimizer of θ can be made ({reason}); expected a function from tensors to an optimizer, "
            "such as lambda theta: torch.optim.Adam(theta, lr=1e-3)"
        ) from error
    held = [p for group in getattr(trial, "param_groups", ()) for p in group["params"]]
    if not isinstance(trial, torch.optim.Optimizer) or not {id(p) for p in held} <= {id(t) for t in copies}:
        raise ConfigurationError(
            f"optimizer made a {type(trial).__name__} of {len(held)} tensors: expected a function from the tensors of "
            "θ to a torch.optim.Optimizer that moves them"
        )
    try:
        trial.step()
        [group["lr"] for group in trial.param_groups]  # which schedules are factors on
    except Exception as error:  # whatever an optimizer may raise on what it was not made for
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigurationError(
            f"optimizer: {type(trial).__name__} cannot move θ ({reason}); expected one with a rate lr that steps "
            "without a closure on dense gradients, such as Adam"
        ) from error
    return [set(trial.state.get(p, {})) for p in held]


def _kept(group: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer may count in a group of parameters, in a dict of its own too; the schedule sets ``lr``."""
    return {k: v for k, v in group.items() if k != "lr" and isinstance(v, bool | int | float | str | Tensor | dict)}


def _scaled(grads: Theta, factor: Tensor) -> Theta:
    return {name: g * factor for name, g in grads.items()}


def _copied(tree: Any) -> Any:
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, tree)


def _same_shapes(what: str, own: dict[Any, Tensor], theirs: dict[Any, Tensor]) -> None:
    if own.keys() != theirs.keys():
        raise ResumeError(f"{what}: the saved state has {sorted(theirs)}, this run has {sorted(own)}")
    for name, tensor in own.items():
        if tensor.shape != theirs[name].shape or tensor.dtype != theirs[name].dtype:
            saved = f"{theirs[name].dtype} {tuple(theirs[name].shape)}"
            raise ResumeError(
                f"{what} {name!r}: the saved state has {saved}, this run {tensor.dtype} {tuple(tensor.shape)}; "
                "continue it with the configuration it was started with"
            )
