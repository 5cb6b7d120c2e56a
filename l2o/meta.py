"""The outer loop: one step of meta-training, and the whole state that a resumed run needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from l2o.ops import schedules
from l2o.types import MetaGradient, Metrics, ResumeError, Theta

Schedule = Callable[[int], float]
"""Outer step (from 0) to a factor on the outer learning rate."""


def constant_schedule(step: int) -> float:
    """The outer learning rate as it stands."""
    return 1.0


def warmup_cosine(step: int, total: int, warmup: int = 0, floor: float = 0.0) -> float:
    """`l2o.ops.schedules.warmup_cosine` of one outer step."""
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
        """Everything that the next outer steps depend on: nested dicts and lists of tensors and plain scalars."""
        optimizer = self.optimizer.state_dict()
        return {
            "step": self.step,
            "theta": dict(self.theta),
            "optimizer": {str(k): dict(slots) for k, slots in optimizer["state"].items()},
            "inner": tree_flatten(self.inner)[0],
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``. Raises ResumeError, with nothing changed, if it is of another rule or task."""
        leaves, structure = tree_flatten(self.inner)
        _same_shapes("theta", self.theta, state["theta"])
        _same_shapes("inner problems", dict(enumerate(leaves)), dict(enumerate(state["inner"])))
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(
            {"state": {int(k): slots for k, slots in state["optimizer"].items()}, "param_groups": groups}
        )
        for name, tensor in self.theta.items():
            tensor.copy_(state["theta"][name])
        device = self.generator.device
        self.inner = tree_unflatten([leaf.to(device) for leaf in state["inner"]], structure)
        self.generator.set_state(state["generator"])
        self.step = state["step"]


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
