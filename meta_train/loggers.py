"""Where a run's numbers go: JSON lines and the terminal always, wandb and TensorBoard where ``logger=`` says so."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from l2o.types import ConfigurationError
from meta_train.config.compose import one_line, writing

RECORDS = ("metrics.jsonl", "timing.jsonl")
"""What a continued run repeats bit for bit, and what it cannot: seconds."""
Values = Mapping[str, float | None]
"""Numbers by name; None stands for one that is not finite, which JSON cannot say."""


class Logger(Protocol):
    """What ``logger=`` chooses: made, which fails early where a package is missing, and then started."""

    def start(self, folder: Path, config: Mapping[str, Any], run_id: str, step: int) -> None:
        """Begin, or go on after outer step ``step``, in the run's folder."""

    def log(self, step: int, values: Values) -> None:
        """Take the values of one outer step."""

    def close(self) -> None:
        """Write what is left."""


class JsonLines:
    """A file of one JSON object a line. size: bytes to keep of what is there, the rest is cut off."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        with writing(path):
            # Unbuffered, so that nothing is left for `close` to write, which a full disk would make it fail at.
            self._file = path.open("ab", buffering=0)
            self._file.truncate(size)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line; it is on disk after ``sync``."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with writing(self._path):
            while line:
                line = line[self._file.write(line) :]

    def sync(self) -> int:
        """Have all lines on disk; the size of the file."""
        with writing(self._path):
            os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass
class Wandb:
    """Weights & Biases: online with an account, else offline in the run's folder (``wandb sync`` uploads it later).

    mode: as in ``wandb.init``; it, or the variable ``WANDB_MODE``, overrides that choice.
    A run that is continued keeps its id; offline, its folder has all of it from the first step on.
    """

    project: str = "l2o"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    mode: str | None = None

    def __post_init__(self) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", "train") from error
        self._wandb: Any = wandb
        own: dict[str, Any] = {"mode": self.mode} if self.mode else {}
        with _said_by_wandb():
            wandb.Settings(**own).update_from_env_vars(dict(os.environ))

    def start(self, folder: Path, config: Mapping[str, Any], run_id: str, step: int) -> None:
        wandb, where = self._wandb, {"project": self.project, "entity": self.entity, "group": self.group}
        quiet = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, init_timeout=30)
        run = {**where, "name": self.name, "id": run_id, "resume": "allow", "config": dict(config), "dir": folder}
        with _said_by_wandb():
            try:
                self._run = wandb.init(**run, mode=self._choose_mode(), settings=quiet)
            except wandb.errors.Error as error:
                print(f"wandb: {error}; recording offline in {folder / 'wandb'}", file=sys.stderr)
                self._run = wandb.init(**run, mode="offline", settings=quiet)
        here = Path(self._run.dir).parent
        self._offline = here if here.name.startswith("offline-run-") else None
        if self._offline and step:
            self._repeat(folder)
            for earlier in here.parent.glob(f"offline-run-*-{run_id}*"):
                if earlier != here:
                    shutil.rmtree(earlier)

    def _repeat(self, folder: Path) -> None:
        """Record anew what the run has recorded so far: offline, wandb goes on with no run, and begins another."""
        for row in sorted(_rows(folder), key=itemgetter("step")):
            self.log(row.pop("step"), row)

    def _choose_mode(self) -> str | None:
        if self.mode or "WANDB_MODE" in os.environ:
            return self.mode
        try:  # asks nobody, neither the user nor the server
            logged_in = self._wandb.login(prompt=False, verify=False)
        except TypeError:  # older versions cannot be kept from prompting
            logged_in = self._wandb.api.api_key
        return None if logged_in else "offline"

    def log(self, step: int, values: Values) -> None:
        self._run.log({name: value for name, value in values.items() if value is not None}, step=step)

    def close(self) -> None:
        self._run.finish()
        if self._offline:
            print(f"wandb: recorded offline; to upload it: wandb sync {shlex.quote(str(self._offline))}")


@dataclass
class TensorBoard:
    """TensorBoard event files. What was recorded past the step that a run is continued from is hidden."""

    subfolder: str = "tensorboard"

    def __post_init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", "tensorboard") from error
        self._make = SummaryWriter

    def start(self, folder: Path, config: Mapping[str, Any], run_id: str, step: int) -> None:
        self._writer = self._make(folder / self.subfolder, purge_step=step + 1 if step else None)
        self._writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```", step)

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _missing(package: str, extra: str) -> ConfigurationError:
    return ConfigurationError(
        f"logger={package} is not installed: pip install 'l2o[{extra}]', or go without: logger=none"
    )


@contextlib.contextmanager
def _said_by_wandb() -> Iterator[None]:
    """What wandb has against its settings, which the environment may hold, becomes a line."""
    try:
        yield
    except Exception as error:  # its own, pydantic's, the disk's
        reason = one_line(error).partition(" For further information")[0]
        raise ConfigurationError(
            f"wandb: {reason}; mend or unset the variable of the environment (WANDB_…, HOME), or go "
            "without: logger=none"
        ) from error


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of a run, by file."""
    for name in RECORDS:
        for line in (folder / name).read_text("utf-8").splitlines():
            row = json.loads(line)
            row.pop("seconds", None)  # which is no metric
            yield row


class Terminal:
    """Progress of the run: a bar on a terminal, elsewhere a line every few seconds.

    start, total: outer steps at the beginning and in all.
    """

    every = 10.0
    """Seconds between lines."""

    def __init__(self, start: int, total: int, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", completed=start, total=total)
        self._bar.start()
        self._start, self._total = start, total
        self._began = self._said = time.monotonic()

    def advance(self, step: int, meta_loss: float, rate: float) -> None:
        """Show a step.  meta_loss: mean of the last steps, NaN where there is none.     rate: inner steps a second."""
        text = f"meta-loss {meta_loss:.4g}  {rate:,.0f} inner steps/s"
        self._bar.update(self._task, completed=step, description=text)
        now = time.monotonic()
        if self._bar.disable and now - self._said >= self.every:
            self._said = now
            left = (now - self._began) / (step - self._start) * (self._total - step)
            self.say(f"step {step}/{self._total}  {text}  {duration(left)} left")

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self._console.print(text, markup=False)

    def close(self) -> None:
        """Take the bar down, so that the terminal is as it was."""
        self._bar.stop()


def duration(seconds: float) -> str:
    """Return ``90 s`` up to two minutes, then ``3 min``, ``1 h 05 min``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
