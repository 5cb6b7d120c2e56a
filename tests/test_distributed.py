"""Runs that several processes share: they agree with one process, and go on after one of them was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import l2o

COMMON = ["rule=mlp", "rule.hidden=[8,8]", "estimator.lanes=8", "evaluate_every=0", "logger=none", "outer=sgd"]
PES = ["estimator=pes", "task=digits_mlp", "estimator.horizon=[10,30]", "estimator.truncation=5", "estimator.sigma=0.1"]
ENDS = ["estimator.truncation=null", "estimator.meta_loss=end", "estimator.fitness=standard", "estimator.sigma=0.1"]
WHOLE = ["estimator=pes", "task=quadratic", "estimator.horizon=[4,12]", *ENDS]
TBPTT = ["estimator=tbptt", "task=quadratic", "task.noise=0.1", "estimator.horizon=12", "estimator.truncation=4"]
pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.skipif(os.name != "posix", reason="torchrun with gloo")]


def start(processes: int, *arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]  # a port of its own
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", "meta_train", *arguments, *COMMON]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]


def finish(process: subprocess.Popen[str], seconds: float = 200) -> str:
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output
    return output


def theta(run: str) -> dict[str, torch.Tensor]:
    return l2o.load(f"{run}/checkpoint")[1]


def metrics(run: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("setup", [PES, WHOLE, TBPTT], ids=["pes", "whole runs", "tbptt"])
def test_two_processes_agree_with_one(here: Path, setup: list[str]) -> None:
    one, two = (start(n, *setup, "steps=8", f"run=of{n}") for n in (1, 2))
    finish(one)
    finish(two)
    ours, theirs = theta("of1"), theta("of2")
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= 1e-5, name
    for row, other in zip(metrics("of1"), metrics("of2"), strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    # The state is that of the whole run, whoever saved it: one process goes on from what two have left.
    finish(start(1, *setup, "steps=10", "run=of1"))
    finish(start(1, *setup, "steps=10", "run=of2"))
    ours, theirs = theta("of1"), theta("of2")
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= 1e-5, name


LEAVES = """
import importlib, os, torch
from meta_train.run.processes import agreed, joined
with joined() as ranks:
    importlib.import_module("torch.distributed.nn.functional")  # as whatever torch imports late does
    agreed(3)
threads = os.listdir("/proc/self/task")
print(ranks.size, [name for t in threads if "gloo" in (name := open(f"/proc/self/task/{t}/comm").read())])
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the threads in /proc")
def test_no_thread_of_the_process_group_outlives_the_run() -> None:
    """One that does may wait for an interpreter that is gone, which ends the process by SIGABRT."""
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    elastic = {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0", "LOCAL_RANK": "0"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **place, **elastic}
    command = [sys.executable, "-c", LEAVES]
    done = subprocess.run(command, env=environment, text=True, check=True, capture_output=True)
    assert done.stdout == "1 []\n"


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_a_killed_process_is_started_again_and_the_run_goes_on(here: Path) -> None:
    arguments = [*TBPTT, "steps=60", "checkpoint_every=3"]
    finish(start(2, *arguments, "run=calm"))
    process = start(2, *arguments, "run=killed", restarts=2)
    for saved in (1, 2):  # once the second rank, once the first
        wait_for_saves(process, saved)
        os.kill(children(process.pid)[-saved], signal.SIGKILL)
    output = finish(process)
    assert output.count("Signal 9 (SIGKILL)") >= 2 or output.count("exitcode: -9") >= 2, output
    assert (
        Path("killed/checkpoint/theta.safetensors").read_bytes()
        == Path("calm/checkpoint/theta.safetensors").read_bytes()
    )
    assert metrics("killed") == metrics("calm")


def wait_for_saves(process: subprocess.Popen[str], count: int) -> None:
    """Until the state has been replaced ``count`` times."""
    seen: set[int] = set()
    deadline = time.monotonic() + 100
    while len(seen) < count + 1:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        state = Path("killed/state.safetensors")
        if state.exists() and len(children(process.pid)) >= 2:
            seen.add(state.stat().st_mtime_ns)
        time.sleep(0.005)


def test_a_sweep_through_submitit(here: Path) -> None:
    """On this machine; ``hydra/launcher=submitit_slurm`` sends the same jobs to a cluster."""
    sweep = ["-m", "hydra/launcher=submitit_local", "hydra.launcher.cpus_per_task=1", "seed=0,1", "run=sweep/${seed}"]
    finish(start(1, *sweep, *TBPTT, "steps=2"))
    weights = [theta(f"sweep/{seed}")["w0"] for seed in (0, 1)]
    assert not weights[0].equal(weights[1])
