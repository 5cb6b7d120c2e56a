"""Where the numbers of a run go: wandb, TensorBoard, a logger of one's own, the terminal."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from conftest import ROOT
from training import SMALL, command, records, snapshot

from meta_train.loggers import Terminal, Wandb, duration

pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.parametrize(
    ("logger", "module", "extra"),
    [("wandb", "wandb", "train"), ("tensorboard", "torch.utils.tensorboard", "tensorboard")],
)
def test_a_logger_that_is_not_installed_names_its_extra(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    logger: str,
    module: str,
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert command(f"logger=[{logger}]") == 2
    assert f"pip install 'l2o[{extra}]'" in capsys.readouterr().err
    assert snapshot() == {}


def test_tensorboard_gets_every_step_once() -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (3, 5):
        assert command(f"steps={steps}", "logger=[tensorboard]", "evaluate_every=2") == 0
    events = EventAccumulator("run/tensorboard").Reload()
    losses = {row["step"]: row["meta_loss"] for row in records() if "meta_loss" in row}
    assert [event.step for event in events.Scalars("meta_loss")] == list(losses)
    assert [event.value for event in events.Scalars("meta_loss")] == pytest.approx(list(losses.values()), rel=1e-6)
    # The first sitting ended with an evaluation, at 3; one that never stops has none there.
    assert [event.step for event in events.Scalars("held_out_loss")] == [2, 3, 4, 5]


def test_wandb_records_offline_where_there_is_no_account(here: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(here), "NETRC": str(here / "netrc")}
    env |= {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}  # the network is away
    line = [sys.executable, "-m", "meta_train", *SMALL, "logger=[wandb]", "steps=2"]
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "meta_train: loading\n"
    (recorded,) = Path("run/wandb").glob("offline-run-*")
    run_id = yaml.safe_load(Path("run/config.yaml").read_text())["id"]
    assert (recorded / f"run-{run_id}.wandb").stat().st_size
    assert {path.name for path in here.iterdir() if not path.name.startswith(".")} == {"run"}


def test_wandb_offline_keeps_one_run_in_one_folder(capsys: pytest.CaptureFixture[str]) -> None:
    for steps in (2, 3, 5):
        assert command(f"steps={steps}", "logger=[wandb]") == 0
        (recorded,) = Path("run/wandb").glob("offline-run-*")
        assert f"to upload it: wandb sync {recorded}\n" in capsys.readouterr().out


def test_wandb_offline_records_a_continued_run_from_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[dict[int, dict[str, float]]] = []

    def init(**given: Any) -> Any:
        rows: dict[int, dict[str, float]] = {}
        runs.append(rows)
        folder = Path(given["dir"], "wandb", f"offline-run-{len(runs)}-{given['id']}", "files")
        folder.mkdir(parents=True)

        def log(values: dict[str, float], step: int) -> None:
            rows.setdefault(step, {}).update(values)

        return SimpleNamespace(dir=str(folder), log=log, finish=lambda: None)

    monkeypatch.setattr("wandb.init", init)
    for steps in (2, 3, 5):
        assert command(f"steps={steps}", "logger=[wandb]", "evaluate_every=2") == 0
    assert [list(run) for run in runs] == [[1, 2], [1, 2, 3], [1, 2, 3, 4, 5]]
    for row in records():
        recorded = runs[-1][row["step"]]
        assert row.items() <= {**recorded, "step": row["step"]}.items()
        assert recorded.keys() >= {"meta_loss"}
    assert "inner_steps_per_second" in runs[-1][2]
    assert [path.name[:13] for path in Path("run/wandb").iterdir()] == ["offline-run-3"]


@pytest.mark.parametrize(
    ("variable", "said"), [("WANDB_MODE", "mode Input should be 'online'"), ("WANDB_BASE_URL", "base_url Input should")]
)
def test_wandb_in_a_broken_environment_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str, said: str
) -> None:
    monkeypatch.setenv(variable, "nonsense")
    assert command("logger=[wandb]") == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert snapshot() == {}


@pytest.mark.parametrize(
    ("setting", "variable", "logged_in", "mode"),
    [
        (None, None, True, None),
        (None, None, False, "offline"),
        (None, "disabled", False, None),
        ("online", None, False, "online"),
    ],
)
def test_wandb_is_online_with_an_account(
    monkeypatch: pytest.MonkeyPatch, setting: str | None, variable: str | None, logged_in: bool, mode: str | None
) -> None:
    """None leaves it to wandb, which then goes by ``WANDB_MODE``, and else online."""
    logger = Wandb(mode=setting)
    monkeypatch.setattr(logger._wandb, "login", lambda **_: logged_in)
    monkeypatch.delenv("WANDB_MODE")
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert logger._choose_mode() == mode


def test_a_logger_of_ones_own(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "own_logger.py").write_text(
        "class Recorder:\n"
        "    seen = []\n"
        "    def start(self, folder, config, run_id, step): self.seen.append(('start', step))\n"
        "    def log(self, step, values): self.seen.append((step, dict(values)))\n"
        "    def close(self): self.seen.append('close')\n"
    )
    monkeypatch.syspath_prepend(here)
    assert command("steps=2", "logger.own._target_=own_logger.Recorder") == 0
    seen = sys.modules["own_logger"].Recorder.seen
    assert seen[0] == ("start", 0)
    assert seen[-1] == "close"
    values = [{"step": step, **values} for step, values in seen[1:-1] if "inner_steps_per_second" not in values]
    assert values == records()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119.4, "119 s"), (120, "2 min"), (3599, "1 h 00 min"), (3901, "1 h 06 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("terminal", [False, True])
def test_the_terminal_shows_progress(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(Terminal, "every", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    shown = Terminal(4, 8, stream)
    shown.advance(6, 0.5, 1234.5)
    shown.say("half [way]")
    shown.close()
    text = stream.getvalue()
    assert "meta-loss 0.5  1,234 inner steps/s" in text
    assert "half [way]\n" in text
    assert ("step 6/8" in text) is not terminal
    assert ("\x1b[?25h" in text) is terminal  # the cursor is given back
