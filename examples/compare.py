"""What the examples share: a loop, and `default` beside AdamW at 0.001, one untuned run each."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import l2o

OptimizerOf = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Result(NamedTuple):
    """Mean loss over the last tenth of the steps, loss on validation data after them, seconds of the loop."""

    training: float
    validation: float
    seconds: float


def train(
    params: Iterable[nn.Parameter],
    make: OptimizerOf,
    steps: int,
    training_loss: Callable[[], Tensor],
    validation_loss: Callable[[], Tensor],
) -> Result:
    """Take ``steps`` steps.  training_loss: of a fresh batch, 0-d.  validation_loss: of all validation data, 0-d."""
    optimizer = make(params)
    losses, begun = [], time.perf_counter()
    for _ in range(steps):
        loss = training_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - begun
    last = losses[-max(1, steps // 10) :]
    with torch.no_grad():
        return Result(sum(last) / len(last), validation_loss().item(), seconds)


def settings(description: str | None, steps: int) -> argparse.Namespace:
    """Read ``--steps`` and ``--seed`` from the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def compare(run: Callable[[OptimizerOf, int], Result], given: argparse.Namespace) -> None:
    """Run twice from the same seed, and say who ends lower."""
    makers: dict[str, OptimizerOf] = {
        "default": lambda params: l2o.LearnedOptimizer(params, "default", total_steps=given.steps),
        "AdamW 0.001": lambda params: torch.optim.AdamW(params, lr=1e-3),
    }
    found = {}
    for name, make in makers.items():
        torch.manual_seed(given.seed)
        found[name] = run(make, given.steps)
    tell(found, given.seed)


def tell(found: dict[str, Result], seed: int) -> None:
    """Print the results and who ends lower."""
    for name, result in found.items():
        numbers = ", ".join(f"{key} {value:.3g}" for key, value in result._asdict().items())
        print(f"{name:<12} {numbers}")
    for key in ("training", "validation"):
        winner = min(found, key=lambda name: getattr(found[name], key))
        print(f"{winner} has the lower {key} loss; one run each, seed {seed}, nothing tuned.")
