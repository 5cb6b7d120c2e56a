"""How fast a rule goes through whole runs of many kinds of problems, as evolution strategies need them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from statistics import fmean
from typing import Any

import torch

from l2o.rules import SGD
from l2o.types import TaskFamily, Theta, UpdateRule
from l2o.unroll import expand_theta, sample_runs, unroll


def measure_mixture(
    rule: UpdateRule, families: Mapping[str, TaskFamily], lanes: int, steps: int, rounds: int, device: str
) -> Iterator[dict[str, Any]]:
    """Give a record for each family, and one for all: inner steps a second in runs of ``steps``, without derivatives.

    Those of all are as meta-training has it that draws every family as often. Beside them those of `SGD`, a rule that
    takes no time: what problems and the engine leave.

    lanes: runs at once.     rounds: runs of each rule, in turn; the fastest counts, for others only take time away.
    """
    rules: dict[str, UpdateRule] = {"rule": rule, "sgd": SGD(lr=1e-3)}
    spent: dict[str, list[float]] = {name: [] for name in rules}
    common = {"rule": type(rule).__name__, "lanes": lanes, "steps": steps, "threads": torch.get_num_threads()}
    for name, family in families.items():
        run = {of: _run(each, family, lanes, steps, device) for of, each in rules.items()}
        for of in run:
            run[of]()  # compiles, loads data and allocates
        times = [{of: _timed(run[of]) for of in run} for _ in range(rounds)]
        for of in run:
            spent[of].append(min(each[of] for each in times))
        yield {"family": name, **common, **_rates({of: each[-1] for of, each in spent.items()}, lanes * steps)}
    yield {"family": "all", **common, **_rates({of: fmean(each) for of, each in spent.items()}, lanes * steps)}


def _rates(seconds: Mapping[str, float], taken: int) -> dict[str, float]:
    names = {"rule": "steps_per_second", "sgd": "yardstick_steps_per_second"}
    return {names[of]: taken / each for of, each in seconds.items()}


def _run(rule: UpdateRule, family: TaskFamily, lanes: int, steps: int, device: str) -> Callable[[], None]:
    """A run of every lane from its start, the same each time."""

    @torch.no_grad()
    def run() -> None:
        generator = torch.Generator(device).manual_seed(0)
        theta: Theta = expand_theta(rule.init_theta(generator), lanes)
        horizon = torch.full((lanes,), steps, device=device)
        unroll(rule, theta, family, sample_runs(rule, theta, family, horizon, generator), steps, generator)
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    return run


def _timed(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
