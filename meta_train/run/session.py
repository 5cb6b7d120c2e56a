"""A meta-training run in progress: its steps, its records, its checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from l2o.checkpoints.store import load, read_card, save
from l2o.estimators import Mixed
from l2o.meta import MetaTraining
from l2o.types import ConfigurationError, L2OError, Metrics, ResumeError
from meta_train.config.compose import writing
from meta_train.loggers import RECORDS, JsonLines, Logger, Terminal, Values
from meta_train.run.best import Best
from meta_train.run.card import make_card
from meta_train.run.folder import RunFolder
from meta_train.run.held_out import HeldOut, describe, finite
from meta_train.run.plan import Plan


class Session:
    """One sitting of a run, from its first or its last saved outer step on.

    The rule that makes continuing exact: a state that was saved at step k goes with the first bytes of the records, as
    many as they had then, and these end with step k; an evaluation at k comes later, before step k + 1 is made.

    Nothing is written before ``begin``. Raises ResumeError if the saved state, or a record, does not fit.
    """

    def __init__(
        self, folder: RunFolder, plan: Plan, training: MetaTraining, held_out: HeldOut, loggers: Sequence[Logger]
    ) -> None:
        self.folder, self.plan, self.training, self.held_out, self.loggers = folder, plan, training, held_out, loggers
        self.config = folder.config
        self.best = Best(folder.path / "best", held_out.rule, self.config["evaluation"]["best_by"])
        self.inner_steps = 0
        self.seconds = 0.0
        self._sizes = dict.fromkeys(RECORDS, 0)
        self._pending: list[Metrics] = []
        self._warned: set[str] = set()
        self._open = contextlib.ExitStack()
        if folder.state is not None:
            self._restore(folder.state)

    @property
    def step(self) -> int:
        """Outer steps done."""
        return self.training.step

    @property
    def horizon(self) -> int:
        """Length of the inner runs that θ was measured on."""
        return self.held_out.settings[0].steps

    @property
    def checkpoint(self) -> Path:
        """The folder of the checkpoint that the plug-in loads; ``start``, beside it, is what the run began with."""
        return self.folder.path / "checkpoint"

    @property
    def finished(self) -> bool:
        """Whether all outer steps are done, and the θ they led to is measured and left as the checkpoint."""
        if self.step < self.plan.steps:
            return False
        try:
            _, theta = load(self.checkpoint, rules=(type(self.held_out.rule),))
            card = read_card(self.checkpoint)
        except L2OError:
            return False
        same = all(torch.equal(tensor.cpu(), theta[name]) for name, tensor in self.training.theta_average.items())
        return same and (bool(card.get("results")) or not self.plan.evaluate_every)

    def begin(self) -> None:
        """Make the folder, put the best θ and the records back to the saved step, start the loggers."""
        self.folder.begin()
        self._open.callback(self.folder.end)
        self.best.restore()
        if not self.step:
            self._save_checkpoint(self._card({}), "start")
        self._metrics, self._timing = map(self._open_record, RECORDS)
        for logger in self.loggers:
            logger.start(self.folder.path, self.config, self.folder.id, self.step)
            self._open.callback(logger.close)
        self.terminal = Terminal(self.step, self.plan.steps)
        self._open.callback(self.terminal.close)
        if self.step:
            self.terminal.say(f"run={self.folder.path} goes on from outer step {self.step} of {self.plan.steps}")
        for name in self.folder.changed:
            self._warn(
                f"source of {name}",
                f"the source of the {name} has changed since the run began: what follows may fit neither version; to "
                "begin with the new one, name another run=",
            )
        self._since = time.monotonic()

    def outer_step(self) -> None:
        """Take one outer step. Its metrics stay on the device until there are ``log_every`` of them."""
        self._pending.append(self.training.outer_step())
        if self.step % self.plan.log_every == 0:
            self.flush()

    def flush(self) -> None:
        """Read the pending metrics from the device, all at once, and record them: a line for each step."""
        if not self._pending:
            return
        first, before = self.step - len(self._pending) + 1, self.inner_steps
        columns = {name: torch.stack([m[name] for m in self._pending]).tolist() for name in self._pending[0]}
        self._pending.clear()
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for step, row in enumerate(rows, first):
            self._record(step, row)
        rate = (self.inner_steps - before) / self._lap()
        self._timing.write({"step": self.step, "seconds": self.seconds, "inner_steps_per_second": rate})
        self._log(self.step, {"inner_steps_per_second": rate})
        self.terminal.advance(self.step, _mean([row["meta_loss"] for row in rows]), rate)

    def evaluate(self) -> None:
        """Measure θ on held-out tasks beside Adam, record it, and leave θ as the run's checkpoint, and as its best.

        It is the average of θ, where the run keeps one, that is measured and left.
        """
        self.flush()
        results = self.held_out.measure(self.training.theta_average)
        self._metrics.write({"step": self.step, **results})
        self._log(self.step, results)
        self.terminal.say(f"step {self.step}: {describe(results)}")
        self._lap()
        card = self._card(results)
        self.best.offer(self.training.theta_average, results, card)
        self._save_checkpoint(card)  # last: by it an evaluation is known to be whole

    def save_checkpoint(self) -> None:
        """Write θ and its card for the plug-in, without a measurement."""
        self._save_checkpoint(self._card({}))

    def _card(self, results: Mapping[str, Any]) -> dict[str, Any]:
        compute = {"outer_steps": self.step, "inner_steps": self.inner_steps, "seconds": round(self.seconds, 1)}
        card = make_card(self.config, self.folder.header["command"], self.training)
        return card | {"compute": compute, "results": dict(results)}

    def _save_checkpoint(self, card: Mapping[str, Any], name: str = "checkpoint") -> None:
        with writing(path := self.folder.path / name):
            save(path, self.held_out.rule, self.training.theta_average, card)

    def save(self) -> None:
        """Save the whole outer state, once the records that belong to it are on disk."""
        self.flush()
        self.folder.save(
            {
                "training": self.training.state_dict(),
                "device": self.training.generator.device.type,
                "inner_steps": self.inner_steps,
                "seconds": self.seconds,
                "adam": self.held_out.adam,
                "best": self.best.kept,
                "sizes": {"metrics.jsonl": self._metrics.sync(), "timing.jsonl": self._timing.sync()},
            }
        )

    def close(self) -> None:
        """Undo ``begin``, as far as it got: close the terminal, the loggers, the records and the folder."""
        self._open.close()

    def _record(self, step: int, row: dict[str, Any]) -> None:
        self.inner_steps += row.pop("inner_steps")
        self._check_lanes(step, row)
        if row["update_skipped"]:
            self._warn("skipped", f"at step {step} the meta-gradient was not finite, and θ stayed as it was")
        values = {name: finite(value) for name, value in row.items()}
        self._metrics.write({"step": step, **values, "inner_steps": self.inner_steps})
        self._log(step, {**values, "inner_steps": self.inner_steps})

    def _open_record(self, name: str) -> JsonLines:
        record = JsonLines(self.folder.path / name, self._sizes[name])
        self._open.callback(record.close)
        return record

    def _check_lanes(self, step: int, row: Mapping[str, Any]) -> None:
        """A task that is broken from the start ends the run; one that is at times, or loses all lanes, is said."""
        estimator = self.training.estimator
        members = estimator.members if isinstance(estimator, Mixed) else {"": estimator}
        for name, member in members.items():
            broken, masked = (row.get(key + f"/{name}" * bool(name)) for key in ("lanes_broken", "lanes_masked"))
            lanes = getattr(member, "lanes", None)
            task = f"task{'.' * bool(name)}{name}={member.family!r}"
            if broken:
                text = (
                    f"{task}: its loss at inner step 0, where no rule has acted yet, was not finite in {broken} of "
                    f"{lanes or 'its'} lanes at outer step {step}"
                )
                if step == 1 and broken == lanes:
                    raise ConfigurationError(f"{text}; check its data and its initial parameters")
                self._warn(f"broken {name}", f"{text}; such lanes are masked and drawn anew")
            elif masked and masked == lanes:
                self._warn(
                    f"exploded {name}",
                    f"{task}: all of its {lanes} lanes exploded at outer step {step} and were drawn anew; if it "
                    "recurs, lower the rule's step size or outer.lr",
                )

    def _warn(self, kind: str, text: str) -> None:
        """Say it the first time; the metrics count the others."""
        if kind not in self._warned:
            self.terminal.say(f"warning: {text}")
        self._warned.add(kind)

    def _log(self, step: int, values: Values) -> None:
        for logger in self.loggers:
            logger.log(step, values)

    def _lap(self) -> float:
        """Seconds since the last lap, which are added to the run's."""
        now = time.monotonic()
        lap, self._since = max(now - self._since, 1e-9), now
        self.seconds += lap
        return lap

    def _restore(self, state: dict[str, Any]) -> None:
        with _of_this_run(self.folder.path):
            self.inner_steps, self.seconds = state["inner_steps"], state["seconds"]
            self.held_out.adam, self._sizes = state["adam"], {name: state["sizes"][name] for name in RECORDS}
            self.best.kept = state["best"]
        for name, size in self._sizes.items():
            record = self.folder.path / name
            found = record.stat().st_size if record.exists() else 0
            if found < size:
                raise ResumeError(f"{record} has {found} bytes, {size} when last saved; restore it, or start over")


def restore(training: MetaTraining, state: dict[str, Any], seed: int, folder: Path) -> None:
    """Put ``training`` where the saved state of a session left off. Raises ResumeError where it does not fit."""
    with _of_this_run(folder):
        if state["device"] != training.generator.device.type:
            # Generators of different devices have states of different kinds; the stream starts anew.
            training.generator.manual_seed(seed + state["training"]["step"])
            state["training"]["generator"] = training.generator.get_state()
        training.load_state_dict(state["training"])


@contextlib.contextmanager
def _of_this_run(folder: Path) -> Iterator[None]:
    try:
        yield
    except L2OError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        path = folder / "state.safetensors"
        raise ResumeError(f"{path} is not the state of this run ({error!r}); restore it, or start over") from error


def _mean(values: Sequence[float]) -> float:
    """Of those that are finite; NaN where none is."""
    kept = [value for value in values if math.isfinite(value)]
    return sum(kept) / len(kept) if kept else math.nan
