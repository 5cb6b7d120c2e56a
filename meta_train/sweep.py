"""``python -m meta_train.sweep``: one number of a rule's θ at several values, on every family of an experiment.

All values of a family share its problems, initialisations and batches, as lanes of one unroll beside the best of Adam's
rates: what a constant is worth shows in a minute or two on a core, on the problems that meta-training has.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from l2o.checks import check_int, lookup
from l2o.disk import atomic_write
from l2o.evaluation import baselines
from l2o.evaluation.curves import Begun, begin
from l2o.evaluation.entrants import Entrant
from l2o.evaluation.scores import Kept, condense, log_final, score_kept, speed_up
from l2o.evaluation.trials import Setting, run_entrant
from l2o.tasks import Repeated
from l2o.types import ConfigurationError, Mixture, TaskFamily, Theta, UpdateRule
from l2o.unroll import expand_theta
from meta_train.config.assemble import families
from meta_train.config.build import make
from meta_train.config.compose import TRAINING, composed, main_guard, open_settings, writing
from meta_train.run.card import commit, hardware


@dataclass(frozen=True)
class Swept:
    """A rule whose ``name`` in θ is that of ``theta`` plus each of ``rates``, a trial each; an `Entrant`."""

    label: str
    rule: UpdateRule
    theta: Theta
    name: str
    rates: tuple[float, ...]

    def begin(self, family: TaskFamily, steps: int, seeds: int, generator: torch.Generator) -> Begun:
        theta = expand_theta(self.theta, seeds * len(self.rates))
        shifts = torch.tensor(self.rates).repeat(seeds)
        theta[self.name] = theta[self.name] + shifts.view(-1, *[1] * (theta[self.name].ndim - 1))
        return begin(self.rule, theta, Repeated(family, len(self.rates)), steps, generator)


def record(setting: Setting, swept: Entrant, adam: Entrant) -> dict[str, Any]:
    """Run both, and return of each value its speed-up over Adam at its best rate, and its `log_final` less Adam's."""
    kept, against = (condense(run_entrant(e, setting), setting.smoothing) for e in (swept, adam))
    reference = score_kept(against)
    scores = [score_kept(_trial(kept, i)) for i in range(len(swept.rates))]
    return {
        "family": setting.name,
        "speed_up": [speed_up(each, reference) for each in scores],
        "end": [log_final(each) - log_final(reference) for each in scores],
    }


def _trial(kept: Kept, i: int) -> Kept:
    parts = {name: getattr(kept, name)[..., i : i + 1] for name in ("train", "peak", "valid")}
    return kept._replace(rates=(kept.rates[i],), accuracy=None, timed_out=None, **parts)


def table(made: Sequence[dict[str, Any]], rates: Sequence[float]) -> str:
    """Return rows of families and of all together, as text."""
    speeds, ends = (np.array([row[key] for row in made]) for key in ("speed_up", "end"))
    rows = [(row["family"], row["speed_up"], row["end"]) for row in made]
    rows += [("median", np.median(speeds, 0), np.median(ends, 0)), ("reached", (speeds > 0).sum(0), (ends <= 0).sum(0))]
    width = max(len(name) for name, *_ in rows)
    head = f"{'':{width}}  {' '.join(f'{rate:+7.2f}' for rate in rates)}  | log(final / Adam's)"
    lines = [
        f"{n:{width}}  {' '.join(f'{x:7.2f}' for x in s)}  | {' '.join(f'{x:+6.2f}' for x in e)}" for n, s, e in rows
    ]
    return "\n".join([head, *lines])


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(prog="python -m meta_train.sweep", description=(__doc__ or "").partition(": ")[2])
    made.add_argument("name", help="in θ, such as log_lr")
    made.add_argument("shifts", nargs="+", type=float, help="what is added to it")
    made.add_argument("--set", nargs="+", default=["experiment=default"], metavar="SETTING", help="as of meta_train")
    made.add_argument("--steps", type=int, default=300)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--seed", type=int, default=5200)
    made.add_argument("--only", default="", metavar="REGEX", help="of names of families")
    made.add_argument("--out", type=Path, metavar="FILE", help="for records, as JSON")
    return made


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    from omegaconf import OmegaConf

    given = parser().parse_args(arguments)
    config: Any = OmegaConf.to_container(composed("train", open_settings(given.set, TRAINING)), resolve=True)
    rule, problems = make(config["rule"], "rule", UpdateRule), make(config["task"], "task", TaskFamily, Mixture)
    theta = rule.init_theta(torch.Generator().manual_seed(check_int("--seed", given.seed, 0)))
    lookup("tensor of θ", given.name, theta)
    swept = Swept("swept", rule, theta, given.name, tuple(given.shifts))
    (adam,) = baselines(["adam"]).values()
    found = {name: family for name, family in families(problems).items() if re.search(given.only, name)}
    if not found:
        raise ConfigurationError(f"--only {given.only}: expected a part of one of {', '.join(families(problems))}")
    made = []
    for name, family in found.items():
        made.append(record(Setting(name, family, given.steps, given.seeds, given.seed), swept, adam))
        print(table(made[-1:], given.shifts).splitlines()[1], flush=True)
    print(table(made, given.shifts))
    if given.out:
        command = shlex.join(["python", "-m", "meta_train.sweep", *(sys.argv[1:] if arguments is None else arguments)])
        about = {"command": command, "commit": commit(), "hardware": hardware(torch.device("cpu"))}
        with writing(f"--out {given.out}"):
            given.out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(given.out, (json.dumps([about, *made], indent=1) + "\n").encode())


@main_guard
def main() -> None:
    """Run the command."""
    run()


if __name__ == "__main__":
    main()
