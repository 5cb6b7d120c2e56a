"""The outer loop: one step of meta-training, and the whole state that a resumed run needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from l2o._checks import real, whole
from l2o.ops import schedules
from l2o.ranks import gather, own
from l2o.types import MetaGradient, Metrics, ResumeError, Theta

Schedule = Callable[[int], float]
"""Outer step (from 0) to a factor on the outer learning rate."""


def constant_schedule(step: int) -> float:
    """The outer learning rate as it stands."""
    return 1.0


def warmup_cosine(step: int, total: int, warmup: int = 0, floor: float = 0.0) -> float:
    """`l2o.ops.schedules.warmup_cosine` of one outer step. Raises ConfigurationError unless ``0 <= warmup < total``."""
    whole("warmup", warmup, least=0)
    whole("total", total, least=warmup + 1)
    real("floor", floor, least=0.0)
    now, end, warm = (torch.tensor(float(n), dtype=torch.float64) for n in (step, total, warmup))
    return schedules.warmup_cosine(now, end, warm, floor).item()


class MetaTraining:
    """A meta-training run: θ, the optimizer that moves it, and the inner problems in flight.

    estimator: of the meta-gradient (`l2o.estimators`).
    theta: initial meta-parameters; copied to the generator's device.
    optimizer: makes the outer optimizer from the tensors of θ, e.g. ``lambda p: torch.optim.Adam(p, lr=1e-3)``.
    generator: source of all random numbers of the run; its device is the device of the run.
    schedule: factor on the outer learning rate by outer step.

    The run goes on bit for bit from ``load_state_dict(state_dict())`` on one device and build.
    """

    def __init__(
        self,
        estimator: MetaGradient,
        theta: Theta,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        generator: torch.Generator,
        schedule: Schedule = constant_schedule,
    ) -> None:
        self.estimator = estimator
        self.theta: Theta = {k: t.detach().to(generator.device, copy=True) for k, t in theta.items()}
        self.optimizer = optimizer(list(self.theta.values()))
        self.generator = generator
        self.schedule = schedule
        self.inner = estimator.init(self.theta, generator)
        self.step = 0
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def outer_step(self) -> Metrics:
        """Estimate the meta-gradient over one truncation and move θ; metrics of the truncation, on the device."""
        grads, self.inner, metrics = self.estimator.estimate(self.theta, self.inner, self.generator)
        for name, tensor in self.theta.items():
            tensor.grad = grads[name]
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.schedule(self.step)
        self.optimizer.step()
        self.step += 1
        norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
        return {**metrics, "meta_grad_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """A snapshot of all that the next outer steps depend on: nested dicts and lists of tensors and scalars.

        Processes that share the run must all call it; each gets the whole, from which any number of them may go on.
        """
        optimizer = self.optimizer.state_dict()
        state = {
            "step": self.step,
            "theta": self.theta,
            "optimizer": {str(k): slots for k, slots in optimizer["state"].items()},
            "inner": tree_flatten(gather(self.inner))[0],
            "generator": self.generator.get_state(),
        }
        return _copied(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a copy of ``state``. Raises ResumeError, and changes nothing, if it is of another run."""
        structure = tree_flatten(self.inner)[1]
        state = self._checked(_copied(state), tree_flatten(gather(self.inner))[0])
        device = self.generator.device
        groups = self.optimizer.state_dict()["param_groups"]
        slots = {int(k): slots for k, slots in state["optimizer"].items()}
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        for name, tensor in self.theta.items():
            tensor.copy_(state["theta"][name])
        self.inner = tree_unflatten([leaf.to(device) for leaf in own(state["inner"])], structure)
        self.generator.set_state(state["generator"])
        self.step = state["step"]

    def _checked(self, state: dict[str, Any], leaves: list[Tensor]) -> dict[str, Any]:
        missing = {"step", "theta", "optimizer", "inner", "generator"} - state.keys()
        if missing:
            raise ResumeError(f"the saved state has no {sorted(missing)}: it is not the state of a meta-training run")
        _same_shapes("theta", self.theta, state["theta"])
        _same_shapes("inner problems", dict(enumerate(leaves)), dict(enumerate(state["inner"])))
        _same_shapes("generator", {"state": self.generator.get_state()}, {"state": state["generator"]})
        return state


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
