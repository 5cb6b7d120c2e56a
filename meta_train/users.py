"""``python -m meta_train.users``: small problems as users write them, each with learned optimizers and with Adam.

Needs scikit-learn, scikit-image and MNIST's test images. Some hours on one core; the same command goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from l2o.checkpoints.store import load, read_card
from l2o.checks import check_int
from l2o.disk import atomic_write
from l2o.extras import require
from l2o.optim import LearnedOptimizer
from l2o.types import ConfigurationError
from meta_train.config.compose import if_interrupted, main_guard, writing
from meta_train.problems import NOTES, PROBLEMS, SETS
from meta_train.run.card import commit, hardware

Record = dict[str, Any]
Records = dict[tuple[str, str], Record]
"""By problem and optimizer."""
Curve = NDArray[np.float64]
Make = Callable[[list[nn.Parameter], int], tuple[Any, LambdaLR | None]]
"""Of the parameters and the steps of a run; the schedule steps after the optimizer."""

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
ADAM = {f"Adam {rate:g}": rate for rate in RATES}
COSINE = "AdamW 0.003, warm-up + cosine"
_TEXT = """# Problems as users write them

`{command}`, {date}, commit {commit}; {hardware}, one thread.

{count} problems in plain PyTorch, each a function in `meta_train/problems` with a line on what it is; {seeds} seeds.
Losses are training losses, means over seeds and over the last fiftieth of the run, at least ten steps. The target is
that of Adam at the best of eight constant rates ({rates}), chosen for each problem. A speed-up is the steps of the
run over those to the first step at which such a mean is at the target or under it, and 0 where there is none. Learned
optimizers are what `l2o.LearnedOptimizer(params, NAME, total_steps=T)` makes: guarded, untuned. A run counts as
diverged where a loss is not finite, or where such means end above where they began. **{note}**

{summary}

## Problem by problem

Loss at the end, and speed-up.

{table}
"""


def adam(rate: float, params: list[nn.Parameter], steps: int) -> tuple[Optimizer, None]:
    """Return Adam at one rate throughout."""
    return torch.optim.Adam(params, lr=rate), None


def adamw_cosine(params: list[nn.Parameter], steps: int) -> tuple[Optimizer, LambdaLR]:
    """Return AdamW at 0.003, warmed up over a twentieth of the run and then down to 0 by a cosine."""
    optimizer = torch.optim.AdamW(params, lr=3e-3)
    return optimizer, LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )


def learned(source: str, params: list[nn.Parameter], steps: int) -> tuple[Optimizer, None]:
    """Return the plug-in, guarded, which is told how long the run is."""
    return LearnedOptimizer(params, source, total_steps=steps), None


def optimizers(sources: Sequence[str]) -> dict[str, Make]:
    """Return how to make each optimizer; Adam comes first, since its losses are the targets of the others."""
    hand_made: dict[str, Make] = {label: partial(adam, rate) for label, rate in ADAM.items()}
    return {**hand_made, COSINE: adamw_cosine, **{source: partial(learned, source) for source in sources}}


def train(name: str, seed: int, make: Make, steps: int) -> tuple[Curve, list[Record]]:
    """Return the loss of every step ``[steps]``, ``inf`` from where one is not finite, and what the guard did."""
    begun = PROBLEMS[name].begin(seed)
    optimizer, schedule = make([p for p in begun.model.parameters() if p.requires_grad], steps)
    needs_loss = isinstance(optimizer, LearnedOptimizer) and optimizer.rule.needs_loss
    losses = np.full(steps, np.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the guard, whose events are in the record
        for step in range(steps):
            optimizer.zero_grad()
            loss = begun.loss()
            if not math.isfinite(loss.item()):
                break
            losses[step] = loss.item()
            loss.backward()
            optimizer.step(**({"loss": loss} if needs_loss else {}))
            if schedule is not None:
                schedule.step()
    return losses, optimizer.report()["events"] if isinstance(optimizer, LearnedOptimizer) else []


def smooth(losses: Curve) -> Curve:
    """Return means over the last fiftieth of the run, at least ten steps, ``[steps]``; ``inf`` before there are so
    many."""
    window = min(len(losses), max(10, round(0.02 * len(losses))))
    means = np.lib.stride_tricks.sliding_window_view(losses, window).mean(1)
    return np.concatenate([np.full(window - 1, np.inf), means])


def lost(losses: Curve) -> bool:
    """Return whether a loss was not finite, or the smoothed ones end above where they began."""
    means = smooth(losses)
    return not (np.isfinite(means[-1]) and means[-1] <= means[np.isfinite(means)][0])


def measure(names: Sequence[str], given: argparse.Namespace, records: Records) -> Iterator[Record]:
    """Run each problem with each optimizer, but for those that ``records`` have; to be entered there one by one."""
    checkpoints = {source: _identity(source) for source in given.sources}
    for name in names:
        own = PROBLEMS[name].steps
        steps = min(own, given.steps or own)
        for label, make in optimizers(given.sources).items():
            about = {"problem": name, "optimizer": label, "steps": steps, "seeds": given.seeds, "limit": given.steps}
            target = None if label in ADAM else best(records, name)["final"]
            about |= {"checkpoint": checkpoints.get(label), "target": target}
            old = records.get((name, label), {})
            if about.items() <= old.items():  # the checkpoint as well: a name may mean another one by now
                continue
            runs = [train(name, seed, make, steps) for seed in range(given.seeds)]
            yield {**about, **_outcome(runs, target)}


def _identity(source: str) -> str:
    """A hash of what decides its steps: the rule, its hyperparameters and θ."""
    card = read_card(source)
    return hashlib.sha256(json.dumps([card[key] for key in ("rule", "hyperparameters", "theta")]).encode()).hexdigest()


def _outcome(runs: list[tuple[Curve, list[Record]]], target: float | None) -> Record:
    """``step``, counted from 1: the first at which the mean over seeds, smoothed, is at the target, or None."""
    curve = smooth(np.mean([losses for losses, _ in runs], 0))
    reached = np.isfinite(curve) & (curve <= (-math.inf if target is None else target))
    whole = bool(np.isfinite(curve[-1]))
    step = int(reached.argmax()) + 1 if whole and reached.any() else None
    return {
        "final": float(curve[-1]) if whole else None,
        "step": step,
        "diverged": [lost(losses) for losses, _ in runs],
        "events": [events for _, events in runs],
    }


def best(records: Records, name: str) -> Record:
    """Return the record of Adam at the rate with the lowest final loss."""
    return min((records[name, label] for label in ADAM), key=lambda record: _final(record, math.inf))


def _final(record: Record, lost: float) -> float:
    return lost if record["final"] is None else float(record["final"])


def speed_up(record: Record) -> float:
    """Return the steps of the run over those to the target; 0 for a miss."""
    return record["steps"] / record["step"] if record["step"] else 0.0


def page(records: Records, command: str) -> str:
    """Return tables in Markdown, of problems of a set that all of Adam's rates were tried on."""
    names = [name for name in PROBLEMS if all((name, label) in records for label in ADAM)]
    others = list(dict.fromkeys(label for _, label in records if label not in ADAM))
    keys = ("date", "commit", "hardware", "seeds")
    about = {key: ", ".join(dict.fromkeys(str(record[key]) for record in records.values())) for key in keys}
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    summary, table = _summary(records, names, others), _table(records, names, others)
    about["note"] = next((NOTES[key] for key, known in SETS.items() if set(names) & set(known)), "")
    return _TEXT.format(command=command, count=len(names), rates=rates, summary=summary, table=table, **about)


def _summary(records: Records, names: list[str], others: list[str]) -> str:
    head = "| optimizer | problems reached | median speed-up | diverged runs | events of the guard |"
    lines = [head, "|---" * 5 + "|"]
    for label in others:
        own = [records[name, label] for name in names if (name, label) in records]
        gains = [speed_up(record) for record in own] or [0.0]
        diverged = [each for record in own for each in record["diverged"]]
        events = [len(each) for record in own for each in record["events"]]
        said = f"{sum(events)} in {sum(n > 0 for n in events)} of {len(events)} runs" if any(events) else "none"
        cells = [_shown(label), f"{sum(gain > 0 for gain in gains)} of {len(own)}", f"{median(gains):.2f}"]
        cells += [f"{sum(diverged)} of {len(diverged)}", "–" if label == COSINE else said]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _table(records: Records, names: list[str], others: list[str]) -> str:
    head = ["problem", "steps", "best rate of Adam", "Adam", *map(_shown, others)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in names:
        adam = best(records, name)
        cells = [name, str(adam["steps"]), f"{ADAM[adam['optimizer']]:g}", f"{_final(adam, math.nan):.4g}"]
        for label in others:
            own = records.get((name, label))
            cells.append(f"{_final(own, math.nan):.4g}, {speed_up(own):.2f}" if own else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(label: str) -> str:
    return label if label == COSINE else f"`{label}`"


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(prog="python -m meta_train.users", description=(__doc__ or "").partition(": ")[2])
    made.add_argument("--out", type=Path, default=Path("docs/results/users"), metavar="FOLDER", help="for both files")
    made.add_argument("--sources", nargs="*", default=["default", "light"], metavar="NAME", help="or path: checkpoints")
    made.add_argument("--set", choices=SETS, default="first", help="of problems; an --out is of one")
    made.add_argument("--only", default="", metavar="REGEX", help="of names of problems, to be found in them")
    made.add_argument("--seeds", type=int, default=2)
    made.add_argument("--steps", type=int, metavar="MOST", help="of a run, where the problem's own are more; for a try")
    return made


def check(given: argparse.Namespace) -> list[str]:
    """Return the names of the problems; raises an `L2OError` for what would be found out after the first hour."""
    check_int("--seeds", given.seeds)
    if given.steps is not None:
        check_int("--steps", given.steps)
    for source in given.sources:
        load(source)
    try:
        names = [name for name in SETS[given.set] if re.search(given.only, name)]
    except re.error as error:
        raise ConfigurationError(f"--only {given.only!r}: no regular expression ({error})") from error
    if not names:
        raise ConfigurationError(f"--only {given.only!r} is in no name of {', '.join(SETS[given.set])}")
    for name in names:
        PROBLEMS[name].begin(0)  # where data are missing, it says so
    return names


def found(path: Path, given: argparse.Namespace) -> Records:
    """Return the records of an earlier run; raises `ConfigurationError` where it was another's."""
    if not path.exists():
        return {}
    try:
        records = {(r["problem"], r["optimizer"]): r for r in json.loads(path.read_text("utf-8"))}
        settings = {(r["seeds"], r["limit"]) for r in records.values()}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}); move it away, or name another --out") from error
    if others := {name for name, _ in records} - SETS[given.set].keys():
        raise ConfigurationError(f"{path} has {min(others)}, which is not of --set {given.set}; name another --out")
    for seeds, limit in settings - {(given.seeds, given.steps)}:
        raise ConfigurationError(
            f"{path} has runs with --seeds {seeds} and {f'--steps {limit}' if limit else 'no --steps'}; "
            "give the same, or name another --out"
        )
    return records


@main_guard
def main() -> None:
    """Run the command."""
    given = parser().parse_args()
    require("sklearn", "skimage")
    torch.set_num_threads(1)
    names = check(given)
    about = {"hardware": hardware(torch.device("cpu")), "commit": commit(), "date": datetime.date.today().isoformat()}
    command = " ".join(["python -m meta_train.users", *sys.argv[1:]])
    records = found(given.out / "results.json", given)
    if_interrupted(f"{given.out} has all runs that were finished; the same command goes on from there")
    for record in measure(names, given, records):
        records[record["problem"], record["optimizer"]] = {**about, **record}
        print(f"{record['problem']}, {record['optimizer']}: {_final(record, math.nan):.4g}", flush=True)
        _write(given.out, records, command)
    _write(given.out, records, command)  # where nothing was to be run, the page may have been made by another version


def _write(out: Path, records: Records, command: str) -> None:
    with writing(f"--out {out}"):
        lines = ",\n".join(json.dumps(record, allow_nan=False) for record in records.values())
        atomic_write(out / "results.json", f"[\n{lines}\n]\n".encode())
        atomic_write(out / "README.md", page(records, command).encode())


if __name__ == "__main__":
    main()
