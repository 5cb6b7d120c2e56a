"""``python -m meta_train.guard``: runs that go wrong, with the guard of the plug-in and without; tables and records.

Needs scikit-learn, for digits and a table. Half an hour on two cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch
from torch import nn

from l2o.checkpoints.store import load
from l2o.checks import check_int, lookup
from l2o.disk import atomic_write
from l2o.evaluation.hazards import CASES, Begun, Hazard, begin, begin_family, train
from l2o.extras import require
from l2o.optim import LearnedOptimizer
from meta_train.config.compose import composed, main_guard, writing
from meta_train.run.card import commit, hardware
from meta_train.suites import make_settings

Record = dict[str, Any]
ADAMW = "AdamW 1e-3"
MODES = {"unguarded": (False, True), "with the loss": (True, True), "without": (True, False)}
"""Whether there is a guard, and whether it is told the loss."""
WORST = 1.1
"""A guarded run is to end at no more than so many times AdamW's loss."""
_BLOCK = 50
"""Steps that are timed together, of which every tenth has a look."""


def cases(rules: list[str], names: list[str], seeds: int) -> Iterator[Record]:
    """Run every case with AdamW, and with each rule in each of ``MODES``."""
    for name in names:
        hazard = CASES[name]
        runs = [(ADAMW, ""), *product(rules, MODES)]
        for rule, mode in runs:
            found = [_run(hazard, rule, mode, seed) for seed in range(seeds)]
            yield {"table": "cases", "case": name, "rule": rule, "mode": mode, "steps": hazard.steps, **_joined(found)}


def _run(hazard: Hazard, rule: str, mode: str, seed: int) -> Record:
    begun = begin(hazard, seed)
    if rule == ADAMW:
        return _final(train(begun, hazard.steps, torch.optim.AdamW(begun.params, lr=1e-3), tell=False))
    guard, tell = MODES[mode]
    optimizer = LearnedOptimizer(begun.params, rule, total_steps=hazard.steps, lr=hazard.lr, guard=guard)
    return {**_final(_trained(begun, hazard.steps, optimizer, tell)), **optimizer.report()}


def _trained(begun: Begun, steps: int, optimizer: LearnedOptimizer, tell: bool) -> list[float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of events, which are in the report
        return train(begun, steps, optimizer, tell)


def _final(losses: list[float]) -> Record:
    """The mean over a fiftieth of the run, at least ten steps."""
    window = losses[-max(10, len(losses) // 50) :]
    return {"final": sum(window) / len(window)}


def _joined(found: list[Record]) -> Record:
    """Of all seeds: finals, and what guards did."""
    finals = [each["final"] for each in found]
    return {"finals": finals, "events": [each.get("events", []) for each in found]}


def false_alarms(rules: list[str], suite: str, names: list[str] | None = None) -> Iterator[Record]:
    """Run rules for use on the problems of a suite, guarded: there should be nothing to report."""
    for setting, rule, mode in product(_settings(suite, names), rules, list(MODES)[1:]):
        begun = begin_family(setting.family, setting.seed)
        optimizer = LearnedOptimizer(begun.params, rule, total_steps=setting.steps, guard=True)
        losses = _trained(begun, setting.steps, optimizer, MODES[mode][1])
        about = {"table": "false alarms", "suite": suite, "case": setting.name, "rule": rule, "mode": mode}
        yield {**about, "steps": setting.steps, **_final(losses), "events": optimizer.report()["events"]}


def _settings(suite: str, names: list[str] | None) -> list[Any]:
    settings = make_settings(composed("evaluate", [f"evaluate/suite={suite}"]))
    return [setting for setting in settings.values() if names is None or setting.name in names]


def costs(rules: list[str], width: int) -> Iterator[Record]:
    """Measure a step with a guard over one without, on a perceptron of three layers of this width, in turn."""
    for rule in rules:
        steppers = [_stepper(rule, width, guard) for guard in (False, True)]
        times: list[tuple[float, ...]] = [tuple(step() for step in steppers) for _ in range(6)]
        plain, guarded = (median(each) for each in zip(*times[1:], strict=True))
        yield {"table": "costs", "rule": rule, "width": width, "seconds": plain, "guarded": guarded / plain}


def _stepper(rule: str, width: int, guard: bool) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(3)])
    optimizer = LearnedOptimizer(model.parameters(), rule, total_steps=10**6, lr=1e-6, guard=guard)
    for p in model.parameters():
        p.grad = torch.randn_like(p)

    def block() -> float:
        began = time.thread_time()
        for _ in range(_BLOCK):
            optimizer.step(loss=1.0)
        return (time.thread_time() - began) / _BLOCK

    return block


def ratio(record: Record, records: list[Record]) -> float:
    """Return its loss over AdamW's, geometric means over seeds; 0 where AdamW's is not finite, inf where its own is
    not."""
    (adamw,) = [r for r in records if r["table"] == "cases" and r["rule"] == ADAMW and r["case"] == record["case"]]
    own, theirs = _mean(record["finals"]), _mean(adamw["finals"])
    return own if math.isinf(own) else own / theirs


def _mean(finals: list[float]) -> float:
    return geometric_mean([max(x, 1e-30) for x in finals]) if all(map(math.isfinite, finals)) else math.inf


def page(records: list[Record], command: str) -> str:
    """Return tables in Markdown."""
    of = {name: [r for r in records if r["table"] == name] for name in ("cases", "false alarms", "costs")}
    guarded = [r for r in of["cases"] if r["mode"] in list(MODES)[1:]]
    missed = [r for r in guarded if ratio(r, records) > WORST]
    about = next((r for r in of["cases"]), records[0])
    seeds = len(about.get("finals", []))
    parts = [
        "# What the guard does",
        f"`{command}`, {about['date']}, commit {about['commit']}; {about['hardware']}, one thread.",
        f"Final training loss (mean over the last fiftieth of the run, at least ten steps; geometric mean over "
        f"{seeds} seeds) over that of AdamW at 1e-3; **bold** above {WORST}, the goal. "
        f"{len(guarded) - len(missed)} of {len(guarded)} guarded runs reach it. "
        "The thresholds of the guard were chosen with these cases in sight: this is no held-out test. "
        "Where AdamW, which is not guarded, is lost, a ratio is 0.",
        _cases_table(of["cases"], records),
        "## What was done, seed 0\n\n" + _events_table(guarded),
    ]
    if of["false alarms"]:
        fired = [r for r in of["false alarms"] if r["events"]]
        which = "; ".join(f"{r['case']}, {r['rule']}, {r['mode']}: {_said(r['events'])}" for r in fired)
        suites = dict.fromkeys(r["suite"] for r in of["false alarms"])
        problems = len({(r["suite"], r["case"]) for r in of["false alarms"]})
        head = f"## False alarms\n\n{len(fired)} of {len(of['false alarms'])} guarded runs of `default` and `light` on "
        parts.append(
            head + f"{problems} problems of the suites {', '.join(suites)} fired{': ' + which if which else ''}."
        )
    if of["costs"]:
        lines = [f"| {r['rule']} | {1e3 * r['seconds']:.3g} | {r['guarded']:.3f} |" for r in of["costs"]]
        what = f"Three matrices of {of['costs'][0]['width']}², time of the thread"
        head = f"## Cost\n\n{what}, medians of blocks of {_BLOCK} steps."
        parts.append(
            "\n".join([head, "", "| rule | ms a step, unguarded | guarded over unguarded |", "|---|---|---|", *lines])
        )
    return "\n\n".join(parts) + "\n"


def _cases_table(found: list[Record], records: list[Record]) -> str:
    rules = list(dict.fromkeys(r["rule"] for r in found if r["rule"] != ADAMW))
    head = ["case", "steps", ADAMW, *(f"`{rule}`: {', '.join(MODES)}" for rule in rules)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for case in dict.fromkeys(r["case"] for r in found):
        own = {(r["rule"], r["mode"]): r for r in found if r["case"] == case}
        adamw = own[ADAMW, ""]
        cells = [case, str(adamw["steps"]), f"{_mean(adamw['finals']):.3g}"]
        for rule in rules:
            cells.append(", ".join(_cell(ratio(own[rule, mode], records)) for mode in MODES if (rule, mode) in own))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float) -> str:
    text = f"{value:.2g}" if value < 100 else f"{value:.1e}"
    return f"**{text}**" if value > WORST else text


def _events_table(guarded: list[Record]) -> str:
    lines = ["| case | rule | the guard is told | events |", "|---|---|---|---|"]
    for r in guarded:
        told = "the loss" if MODES[r["mode"]][1] else "nothing"
        lines.append(f"| {r['case']} | {r['rule']} | {told} | {_said(r['events'][0]) or 'none'} |")
    return "\n".join(lines)


def _said(events: list[Record]) -> str:
    return ", ".join(f"{e['step']}: {e['kind']}, {e['done']}" for e in events[:6]) + (" …" if len(events) > 6 else "")


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(prog="python -m meta_train.guard", description=(__doc__ or "").partition(": ")[2])
    made.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for README.md and results.json")
    made.add_argument("--seeds", type=int, default=2)
    made.add_argument(
        "--rules", nargs="+", default=["default", "light", "mlp-digits", "mlp-mixture", "lstm-quadratics"]
    )
    made.add_argument("--cases", nargs="*", default=list(CASES), metavar="CASE", help=", ".join(CASES))
    made.add_argument("--suites", nargs="*", default=["quick"], help="for false alarms of default and light")
    made.add_argument("--width", type=int, default=512, help="of the matrices on which a step is timed")
    return made


def measure(given: argparse.Namespace) -> Iterator[Record]:
    """Measure all records."""
    use = ["default", "light"]
    for suite in given.suites:
        yield from false_alarms(use, suite)
    yield from costs(use, given.width)
    yield from cases(given.rules, given.cases, given.seeds)


def check(given: argparse.Namespace) -> None:
    """Raise an `L2OError` for what would be found out after the first half of an hour."""
    check_int("--seeds", given.seeds)
    for suite in given.suites:
        _settings(suite, [])
    for name in given.cases:
        lookup("case", name, CASES)
    for name in given.rules:
        load(name)


@main_guard
def main() -> None:
    """Run the command."""
    require("sklearn", "hydra")
    torch.set_num_threads(1)
    given = parser().parse_args()
    check(given)
    about = {"hardware": hardware(torch.device("cpu")), "commit": commit(), "date": datetime.date.today().isoformat()}
    command = " ".join(["python -m meta_train.guard", *sys.argv[1:]])
    records: list[Record] = []
    for record in measure(given):
        records.append({**about, **record})
        print({k: v for k, v in record.items() if k != "events"}, flush=True)
        with writing(f"--out {given.out}"):  # after each, so that an interrupted run has left what it found
            atomic_write(given.out / "results.json", (json.dumps(records, indent=1) + "\n").encode())
            atomic_write(given.out / "README.md", page(records, command).encode())


if __name__ == "__main__":
    main()
