"""Checks with torch alone, and with `higher`."""

from __future__ import annotations

import io
import math
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel

from l2o.optim import LearnedOptimizer
from l2o.rules import SGD
from l2o.types import UpdateRule
from meta_train.library_checks.problem import (
    STEPS,
    TOTAL,
    Net,
    alone,
    check_equal,
    check_same,
    loss_at,
    make,
    theta_of,
    train,
    values,
)

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.5**step),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=2),
    "LinearLR": schedulers.LinearLR,
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.2, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.2, total_steps=10, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=1.0),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1), schedulers.ExponentialLR(o, 0.9)]
    ),
}


def scheduled(lr: float | torch.Tensor) -> None:
    """Schedules make of gradient descent as a rule what they make of torch's, also where ``lr`` is a tensor."""
    for name in SCHEDULERS:
        _scheduled(name, lr)


def _scheduled(name: str, lr: float | torch.Tensor) -> None:
    ends, rates = [], []
    for descend in (_descent, torch.optim.SGD):
        model = Net()
        optimizer: Any = descend(model.parameters(), lr=lr.clone() if isinstance(lr, torch.Tensor) else lr)
        schedule = SCHEDULERS[name](optimizer)
        for step in range(2 * STEPS):
            train(model, optimizer, [step])
            schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        ends.append(values(model))
        rates.append(optimizer.param_groups[0]["lr"])
    assert type(rates[0]) is type(rates[1]), name
    assert math.isclose(rates[0], rates[1], rel_tol=1e-6), (name, rates)
    check_same(*ends)


def _descent(params: Any, lr: float | torch.Tensor) -> torch.optim.Optimizer:
    """Gradient descent at ``lr``."""
    rule = SGD(lr=1.0)
    return LearnedOptimizer(params, (rule, rule.init_theta(torch.Generator())), total_steps=TOTAL, lr=lr)


def averaged() -> None:
    """Stochastic weight averaging of gradient descent as a rule and of torch's are the same."""
    ends = []
    for descend in (_descent, torch.optim.SGD):
        model = Net()
        optimizer: Any = descend(model.parameters(), lr=0.1)
        mean, schedule = AveragedModel(model), SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        for step in range(STEPS):
            train(model, optimizer, [step])
            mean.update_parameters(model)
            schedule.step()
        ends.append(values(mean))
    check_same(*ends)


def accumulated(rule: UpdateRule) -> None:
    """Gradients of two halves of a batch, added up, are those of the batch."""
    model = Net()
    optimizer = make(model.parameters(), rule)
    for step in range(STEPS):
        optimizer.zero_grad()
        halves = [loss_at(model, step, slice(start, start + 4)) / 2 for start in (0, 4)]
        for half in halves:
            half.backward()
        whole = torch.stack(halves).sum().detach()
        optimizer.step(lambda whole=whole: whole)  # type: ignore[misc]
    check_same(values(model), alone(rule))


def scaled(rule: UpdateRule) -> None:
    """Scaled gradients of float32 parameters under autocast take the steps of gradients that were not scaled, and a
    step whose gradients overflow is not taken."""
    ends = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100), None):
        model = Net().float()
        optimizer = make(model.parameters(), rule)
        for step in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_at(model, step).float()
            overflows = step == 1
            if scaler is None:
                loss.backward()
                if not overflows:
                    optimizer.step(loss=loss.detach()) if rule.needs_loss else optimizer.step()
                continue
            (scaler.scale(loss) * (math.inf if overflows else 1.0)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer, **({"loss": loss.detach()} if rule.needs_loss else {}))
            scaler.update()
        ends.append({name: p.double() for name, p in values(model).items()})
    for name, want in ends[1].items():
        torch.testing.assert_close(ends[0][name], want, rtol=1e-4, atol=1e-5)


def loaded_weights_only(rule: UpdateRule) -> None:
    """What ``torch.save`` writes is read with ``weights_only=True``, and the run goes on as if never stopped."""
    model = Net()
    optimizer = make(model.parameters(), rule)
    train(model, optimizer, range(2))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Net()
    again.load_state_dict(saved["model"])
    resumed = make(again.parameters(), rule)
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, range(2, STEPS))
    check_equal(values(again), alone(rule))


DCP_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "on the CPU": {"cpu_offload": True},
}


def distributed_checkpoint(rule: UpdateRule, options: str = "plain") -> None:
    """A run goes on from `torch.distributed.checkpoint` as if never stopped, here in one process."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as portable

    chosen = portable.StateDictOptions(**DCP_OPTIONS[options])
    model = Net()
    optimizer = make(model.parameters(), rule)
    train(model, optimizer, range(2))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as was asked for
        saved = portable.get_optimizer_state_dict(model, optimizer, options=chosen)
        dcp.save({"optimizer": saved}, checkpoint_id=folder, no_dist=True)
        again = Net()
        again.load_state_dict(model.state_dict())
        resumed = make(again.parameters(), rule)
        state = {"optimizer": portable.get_optimizer_state_dict(again, resumed, options=chosen)}
        dcp.load(state, checkpoint_id=folder, no_dist=True)
        portable.set_optimizer_state_dict(again, resumed, state["optimizer"], options=chosen)
    train(again, resumed, range(2, STEPS))
    check_equal(values(again), alone(rule))


def _groups(model: Net) -> list[dict[str, Any]]:
    """The convolution as an embedding, which its axes do not say."""
    others = [p for p in model.parameters() if p is not model.conv.weight]
    return [{"params": [model.conv.weight], "kind": "embedding"}, {"params": others}]


def unrolled_by_higher(rule: UpdateRule) -> None:
    """`higher` unrolls what the plug-in trains, in float64, with kinds of groups, and gives derivatives for θ."""
    import higher

    import l2o.integrations.higher  # noqa: F401 - which registers the optimizer

    model, trained = Net(), Net()
    train(trained, make(_groups(trained), rule))
    optimizer = make(_groups(model), rule)
    theta = {name: t.requires_grad_() for name, t in theta_of(rule).items()}
    with higher.innerloop_ctx(model, optimizer, override={"theta": [theta]}) as (unrolled, steps):
        for step in range(STEPS):
            steps.step(loss_at(unrolled, step))
        check_same({name: p.detach() for name, p in unrolled.named_parameters()}, values(trained))
        derivatives = torch.autograd.grad(loss_at(unrolled, STEPS), list(theta.values()), allow_unused=True)
    assert any(d is not None and bool(d.isfinite().all()) and bool(d.any()) for d in derivatives)
