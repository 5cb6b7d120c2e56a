"""``python -m meta_train.evaluate``: optimizers beside their baselines, on a suite or a task; writes a report."""

from __future__ import annotations

import contextlib
import datetime
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from l2o.checkpoints.store import annotate, check_writable
from l2o.checks import check_int
from l2o.disk import user_path
from l2o.evaluation import (
    Entrant,
    Report,
    RuleEntrant,
    Store,
    Suite,
    baselines,
    comparisons,
    missing,
    new_console,
    optimizer_costs,
    prepare_folder,
    print_tables,
    run_jobs,
    summary,
    write,
)
from l2o.extras import require
from meta_train.config.build import probe
from meta_train.config.compose import config_path, main_guard, open_settings, resolve_device
from meta_train.optimizers import check, describe, judged
from meta_train.run.card import commit, hardware
from meta_train.suites import make_store, make_suite

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

OPEN = ("task", "settings")
"""Nodes that take keys which the YAML does not mention: fields of a task, names of settings."""


def read(arguments: Sequence[str]) -> list[str]:
    """Read the command line as Hydra takes it.

    Other commands have experiments and suites too; those of this one lie in a folder of their own.
    """
    return open_settings([f"evaluate/{a}" if a.startswith(("experiment=", "suite=")) else a for a in arguments], OPEN)


@main_guard
def main() -> None:
    """Run the command."""
    import hydra

    command = shlex.join(["python", "-m", "meta_train.evaluate", *sys.argv[1:]])
    sys.argv[1:] = read(sys.argv[1:])
    composed: list[DictConfig] = []
    # Hydra only composes: where what it runs fails, it adds a message of its own.
    compose = hydra.main(version_base="1.3", config_path=config_path(), config_name="evaluate")
    compose(lambda config: composed.append(config))()
    for config in composed:
        evaluate(config, command)


def evaluate(config: DictConfig, command: str) -> Report:
    """Run what of the configuration is not stored yet and write its report; bad input raises before anything is run."""
    started = time.perf_counter()
    require("matplotlib", "rich")
    device, processes = resolve_device(config.device), check_int("jobs", config.jobs)
    chosen, ours = baselines(config.baselines, config.wider), judged(config)
    suite, entrants = make_suite(config), {**ours, **chosen}
    out = user_path(config.out, "out")
    store = make_store(config, out)
    check(job.entrant for job in missing(suite, entrants, store))
    for setting in suite.tasks:
        probe(setting.family, ["train", "valid"], device)
    rules = {name: e for name, e in ours.items() if isinstance(e, RuleEntrant)}
    recorded = next((e.label for e in rules.values()), None) if config.record else None
    if recorded:
        check_writable(recorded)
    prepare_folder(out)
    facts = _facts(ours, device, command) | _place(suite, store)
    report = Report(", ".join(e.label for e in ours.values()), [], facts, {}, config.loss_label)
    report = _run(suite, entrants, store, device, processes, report, out)
    if config.pack is not None:
        store.pack(user_path(config.pack, "pack"), suite.name, suite.tasks, chosen)
    if config.cost:
        report = report._replace(costs=optimizer_costs({n: (e.rule, e.theta) for n, e in rules.items()}, device))
    runs = sum(k.valid.shape[1] * k.valid.shape[2] for c in report.comparisons for k in c.trials.values())
    facts["Runs"] = f"{runs:,}, which took {sum(c.seconds for c in report.comparisons):,.0f} s when they were made"
    _leave(report._replace(facts={**facts, "Wall time": f"{time.perf_counter() - started:.0f} s"}), out, recorded)
    return report


def _leave(report: Report, out: Path, recorded: str | None) -> None:
    """Write the report, into a checkpoint's card too, and show it."""
    write(report, out)
    if recorded:
        annotate(recorded, {"results": summary(report)})
    print_tables(report)
    print(f"report:  {out / 'report.md'}\npicture: {out / 'curves.png'}\nnumbers: {out / 'results.json'}")
    print(f"page:    {out / 'report.html'}  (open it in a browser)")


def _facts(ours: Mapping[str, Entrant], device: torch.device, command: str) -> dict[str, str]:
    return {
        **{f"{name.split()[0].capitalize()} optimizer {e.label}": describe(e) for name, e in ours.items()},
        "Hardware": f"device {device}, " + ", ".join(f"{name} {value}" for name, value in hardware(device).items()),
        "Command": f"`{command}`",
        "Date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Commit": str(commit() or "unknown"),
    }


def _place(suite: Suite, store: Store) -> dict[str, str]:
    """Which suite it was, and where its curves are."""
    return {"Suite": f"{suite.name}, version {suite.version}", "Curves": str(store.folder)} if suite.version else {}


def _run(
    suite: Suite,
    entrants: Mapping[str, Entrant],
    store: Store,
    device: torch.device,
    processes: int,
    report: Report,
    out: Path,
) -> Report:
    """``report`` with the comparisons of all settings, after what was missing of them has been run."""
    jobs = missing(suite, entrants, store)
    with _interruptible(suite, entrants, store, report, out), _bar(sum(job.steps for job in jobs)) as advance:
        for done in run_jobs(jobs, store, device, processes, advance):
            runs = done.job.steps // done.job.setting.steps
            print(f"{done.job}, {runs} runs of {done.job.setting.steps} steps in {done.seconds:.1f} s", flush=True)
    return report._replace(comparisons=comparisons(suite, entrants, store))


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar over all runs, where there is a terminal: to be told how many further inner steps are done."""
    from rich.progress import Progress

    console = new_console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("inner steps", total=total)
        yield lambda steps: bar.update(task, advance=steps)


@contextlib.contextmanager
def _interruptible(
    suite: Suite, entrants: Mapping[str, Entrant], store: Store, report: Report, out: Path
) -> Iterator[None]:
    """Ctrl-C ends the command with the status of the signal, and a line on what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        found, left = comparisons(suite, entrants, store), missing(suite, entrants, store)
        said = f"interrupted with {len(left)} of {len(suite.tasks) * len(entrants)} runs to do"
        if found:
            done = {"Settings done": f"{len(found)} of {len(suite.tasks)}"}
            write(report._replace(comparisons=found, facts={**report.facts, **done}), out)
            said += f"; the report of {done['Settings done']} settings is {out / 'report.md'}"
        print(f"{said}; what is done is kept, and the same command with store={store.folder} goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
