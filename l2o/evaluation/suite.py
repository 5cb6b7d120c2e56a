"""A suite: problems with a version, what is missing of it, and the runs that fill the gap, over several processes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from l2o.evaluation.compare import Comparison
from l2o.evaluation.curves import Advance, silent
from l2o.evaluation.entrants import Entrant
from l2o.evaluation.scores import condense
from l2o.evaluation.store import Store
from l2o.evaluation.trials import Setting, run_entrant
from l2o.evaluation.wall import relative_step
from l2o.types import ConfigurationError

_DRIFT = 1e-2
"""First losses that differ by more, relatively, are of different problems; rounding over 2 to 10 steps is far below."""
_POLL = 0.5
"""Seconds between looks at what the processes have done."""


@dataclass(frozen=True)
class Suite:
    """Problems on which optimizers are compared.

    name, version: results of suites that differ in either never meet.
    tasks: each with its own name; the ``revision`` of a `Setting` says which curves may be taken from a store.
    """

    name: str
    version: int
    tasks: tuple[Setting, ...]

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ConfigurationError(f"tasks of suite {self.name}: {names}: expected a name of its own for each")


class Job(NamedTuple):
    """Learning rates of one optimizer that are to be run in one setting, on all its seeds.  suite: its name."""

    suite: str
    setting: Setting
    entrant: Entrant

    @property
    def steps(self) -> int:
        """Inner steps of all its runs."""
        return self.setting.steps * self.setting.seeds * len(self.entrant.rates)

    def __str__(self) -> str:
        return f"{self.setting.name}: {self.entrant.label}"


class Done(NamedTuple):
    """A job that is in the store, and the wall-clock time that it took."""

    job: Job
    seconds: float


def missing(suite: Suite, entrants: Mapping[str, Entrant], store: Store) -> list[Job]:
    """Return what has to be run before the suite can be scored, by task; nothing that is stored is run again."""
    jobs = []
    for setting in suite.tasks:
        for entrant in entrants.values():
            rates = store.lacking(suite.name, setting, entrant)
            if rates:
                jobs.append(Job(suite.name, setting, _only(entrant, tuple(rates))))
    return jobs


def _only(entrant: Any, rates: tuple[float | None, ...]) -> Entrant:
    only: Entrant = entrant if rates == entrant.rates else dataclasses.replace(entrant, rates=rates)
    return only


def run_jobs(
    jobs: list[Job],
    store: Store,
    device: torch.device | str = "cpu",
    processes: int = 1,
    advance: Callable[[int], None] = silent,
) -> Iterator[Done]:
    """Run jobs and store each as soon as it is done, which is when it is yielded.

    processes: of one thread each, where there are several.     advance: told how many further inner steps are done.
    Raises `ConfigurationError` for several processes and a job that cannot be handed to another.
    """
    if processes > 1:
        yield from _in_processes(jobs, store, device, processes, advance)
        return
    for job in jobs:
        yield _run(job, store, device, advance)


def _in_processes(
    jobs: list[Job], store: Store, device: torch.device | str, processes: int, advance: Callable[[int], None]
) -> Iterator[Done]:
    """What each has done is looked at now and then; whatever ends this, Ctrl-C among it, ends them."""
    _check_portable(jobs)
    context: Any = multiprocessing.get_context("spawn")
    counter, reported = context.Value("q", 0), 0
    with context.Pool(processes, _begin, (counter, store.folder, str(device))) as pool:
        results = pool.imap_unordered(_work, jobs)
        for _ in jobs:
            while (done := _next(results)) is None:
                now = counter.value
                advance(now - reported)
                reported = now
            store.refresh()
            yield done


def _next(results: Any) -> Done | None:
    try:
        done: Done = results.next(timeout=_POLL)
    except multiprocessing.TimeoutError:
        return None
    return done


def _run(job: Job, store: Store, device: torch.device | str, advance: Advance) -> Done:
    try:
        trials = run_entrant(job.entrant, job.setting, device, advance)
    except Exception as error:  # whatever an optimizer or a task of the user's raises
        error.add_note(f"in {job}; what was done before is kept, and the same command goes on from there")
        raise
    kept = condense(trials, job.setting.smoothing)
    if not trials.timed_out:
        kept = kept._replace(relative_step=relative_step(job.entrant, job.setting, device))
    store.add(job.suite, job.setting, job.entrant, kept)
    return Done(job, trials.seconds)


_worker: dict[str, Any] = {}


def _begin(counter: Any, folder: Path, device: str) -> None:
    """Make ready a process. Ctrl-C is the parent's to answer: it ends the pool."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _worker.update(counter=counter, store=Store(folder), device=device)


def _work(job: Job) -> Done:
    def advance(steps: int) -> None:
        with _worker["counter"].get_lock():
            _worker["counter"].value += steps

    return _run(job, _worker["store"], _worker["device"], advance)


def _check_portable(jobs: list[Job]) -> None:
    for job in jobs:
        try:
            pickle.dumps(job)
        except Exception as error:  # whatever an object of the user's raises there
            raise ConfigurationError(
                f"{job} cannot be handed to another process ({error}); run it with jobs=1, or make it of functions and "
                "classes that have a name in a module"
            ) from error


def comparisons(suite: Suite, entrants: Mapping[str, Entrant], store: Store) -> list[Comparison]:
    """Return each task of the suite for which everything is stored, with scores; pure, runs nothing.

    Raises `ConfigurationError` where stored curves are of another problem than their task is now.
    """
    found = []
    for setting in suite.tasks:
        if not any(store.lacking(suite.name, setting, entrant) for entrant in entrants.values()):
            kept = {name: store.kept(suite.name, setting, entrant) for name, entrant in entrants.items()}
            found.append(_checked(Comparison.of(setting, kept), suite))
    return found


def _checked(comparison: Comparison, suite: Suite) -> Comparison:
    """All optimizers meet the same problems, so that all losses at step 0 agree."""
    kept = comparison.trials
    firsts = {name: k.train[0].mean(1) for name, k in kept.items()}
    expected = next(iter(firsts.values()))
    for name, first in firsts.items():
        if not np.allclose(first, expected, rtol=_DRIFT, atol=1e-9, equal_nan=True):
            raise ConfigurationError(
                f"{comparison.setting.name}: the first losses of {kept[name].label} in the store are {first}, "
                f"those of others {expected}: its task has changed; raise the version of suite {suite.name}, or take "
                "another store"
            )
    return comparison


def run_suite(
    suite: Suite,
    entrants: Mapping[str, Entrant],
    store: Store,
    device: torch.device | str = "cpu",
    processes: int = 1,
) -> list[Comparison]:
    """Run what is missing and score everything: the suite in one call, for a notebook."""
    for _ in run_jobs(missing(suite, entrants, store), store, device, processes, partial(silent)):
        pass
    return comparisons(suite, entrants, store)
