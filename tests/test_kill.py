"""``kill -9`` at random moments of a run: what is continued in the end is the run that was never killed.

``L2O_KILLS`` says how often, 5 without it; ``make soak`` kills 50 times.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import yaml  # type: ignore[import-untyped]
from conftest import ROOT
from training import SMALL, outcome, snapshot

import l2o
from l2o.disk import load_tree

pytestmark = pytest.mark.usefixtures("here")

KILLS = int(os.environ.get("L2O_KILLS", "5"))
STEPS = 12 * KILLS
SETTINGS = [f"steps={STEPS}", "log_every=1", "checkpoint_every=2", "evaluate_every=3", "outer.lr=0.01"]
RUN = Path("run")
BEGIN = "meta_train: loading\n"


def start(*arguments: str) -> subprocess.Popen[str]:
    """The command in a process group of its own."""
    line = [sys.executable, "-m", "meta_train", *SMALL, *SETTINGS, *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(line, env=env, text=True, start_new_session=True, **pipes)


def finish(*arguments: str) -> None:
    """To the end, without a complaint."""
    run = start(*arguments)
    _, said = run.communicate()
    assert (run.returncode, said) == (0, BEGIN)


def lines() -> int:
    metrics = RUN / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def moment(kind: int, draw: random.Random) -> tuple[Callable[[], bool], float]:
    """What to wait for, a number of steps and then a file that is being written, and how many seconds after that."""
    files = (".state.*.tmp", "checkpoint/.*.tmp", "metrics.jsonl", "", "best/.*.tmp")
    pattern = files[kind % len(files)]
    if not pattern:
        return lambda: True, draw.uniform(0.0, 5.0)  # start-up
    goal = lines() + draw.randint(1, 12)
    return lambda: lines() >= goal and any(RUN.glob(pattern)), draw.uniform(0.0, 0.004)


def kill_at(reached: Callable[[], bool], after: float) -> bool:
    """Start the command, and kill it then; whether it was still running."""
    run = start()
    while run.poll() is None and not reached():
        time.sleep(2e-4)
    time.sleep(after)
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)
    _, said = run.communicate()
    assert said in ("", BEGIN)
    assert run.returncode in (0, -signal.SIGKILL)
    return run.returncode != 0


def check_files() -> None:
    """Each file is absent or whole; θ and card that do not belong together are noticed."""
    if (RUN / "config.yaml").exists():
        assert yaml.safe_load((RUN / "config.yaml").read_text())["config"]["steps"] == STEPS
    if (RUN / "state.safetensors").exists():
        step = load_tree(RUN / "state.safetensors")[0]["training"]["step"]
        assert step % 2 == 0
        assert lines() >= step
    for folder in (RUN / "checkpoint", RUN / "best"):
        if (folder / "theta.safetensors").exists():
            safetensors.torch.load((folder / "theta.safetensors").read_bytes())
        if (folder / "card.json").exists():
            check_pair(folder)


def check_pair(folder: Path) -> None:
    """θ and card of one step, or an error that says they are not."""
    theta = hashlib.sha256((folder / "theta.safetensors").read_bytes()).hexdigest()
    if json.loads((folder / "card.json").read_text())["theta"]["sha256"] == theta:
        l2o.load(folder)
    else:
        with pytest.raises(l2o.CheckpointError, match="the card says"):
            l2o.load(folder)


@pytest.mark.timeout(60 + 30 * KILLS)
def test_a_run_that_is_killed_again_and_again_is_the_run_that_was_not() -> None:
    finish("run=whole")
    draw, killed = random.Random(0), 0
    for kind in range(KILLS):
        killed += kill_at(*moment(kind, draw))
        check_files()
    assert killed > KILLS // 2  # the others had ended
    finish()
    assert outcome() == outcome("whole")
    names = [{Path(name).relative_to(folder) for name in snapshot(folder)} for folder in ("run", "whole")]
    assert names[0] == names[1]  # and nothing is left of writes that were cut short
