"""The training command: a run that is stopped and continued is the run that never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from training import OWN_RULE, SMALL, command, outcome, records, snapshot

import l2o
from l2o import MetaTraining
from l2o.disk import load_tree, save_tree
from l2o.evaluation.baselines import baselines
from l2o.evaluation.scores import score
from l2o.evaluation.trials import Setting, run_baseline, run_learned
from l2o.tasks import Quadratic

pytestmark = pytest.mark.usefixtures("here")


def test_a_run_leaves_its_folder_and_nothing_else() -> None:
    assert command("steps=5", "evaluate_every=2", "log_every=2") == 0
    assert {path.name for path in Path().iterdir()} == {"run"}
    files = {"config.yaml", "state.safetensors", "metrics.jsonl", "timing.jsonl", ".lock"}
    files |= {"start", "checkpoint", "best"}
    assert {path.name for path in Path("run").iterdir()} == files
    assert [row["step"] for row in records()] == [1, 2, 2, 3, 4, 4, 5, 5]
    steps = [row for row in records() if "meta_loss" in row]
    assert [row["inner_steps"] for row in steps] == [9 * step for step in range(1, 6)]
    lanes = {"lanes_masked", "lanes_broken", "lane_grad_norm"}
    assert set(steps[0]) == {"step", "meta_loss", "meta_grad_norm", "update_skipped", "inner_steps"} | lanes
    assert [row["step"] for row in records(name="timing.jsonl")] == [2, 4, 5]


def test_the_checkpoint_holds_theta_and_says_where_it_comes_from() -> None:
    assert command("steps=3", "seed=7") == 0
    rule, theta = l2o.load("run/checkpoint")
    state, _ = load_tree("run/state.safetensors")
    assert type(rule).__name__ == "Momentum"
    assert all(torch.equal(theta[name], tensor) for name, tensor in state["training"]["theta"].items())
    card = l2o.read_card("run/checkpoint")
    assert card["seeds"] == {"meta_training": 7, "held_out": 1000003}
    assert card["data"] == {"class": "Quadratic", "dim": 3, "noise": 0.0, "init_scale": 0.01}
    assert "rule=momentum" in card["recipe"]["command"]
    assert card["recipe"]["config"]["estimator"]["horizon"] == 6
    assert card["compute"]["outer_steps"] == 3
    assert card["compute"]["inner_steps"] == 27
    assert {"cpu", "cores", "torch"} <= card["hardware"].keys()
    assert card["results"] == {key: value for key, value in records()[-1].items() if key != "step"}
    start = l2o.load("run/start")[1]
    assert l2o.read_card("run/start")["compute"]["outer_steps"] == 0
    assert command("steps=4", "seed=7") == 0
    again = l2o.load("run/start")[1]
    assert all(torch.equal(again[name], t) and not torch.equal(theta[name], t) for name, t in start.items())


def test_held_out_losses_are_those_of_a_stream_of_their_own() -> None:
    assert command("steps=2", "evaluation.seed=11", "evaluation.task.dim=4") == 0
    rule, theta = l2o.load("run/checkpoint")
    setting = Setting("", Quadratic(dim=4), steps=6, seeds=2, seed=11)
    learned = score(run_learned(rule, theta, setting), setting.smoothing)
    adam = score(run_baseline(baselines(["adam"])["adam"], setting), setting.smoothing)
    last = records()[-1]
    assert (last["held_out_loss"], last["adam_loss"]) == pytest.approx((learned.mean, adam.mean), rel=1e-6)
    assert last["adam_lr"] == adam.rate


@pytest.mark.parametrize(
    "settings",
    [
        ["evaluate_every=2"],
        ["evaluate_every=3", "rule=mlp", "rule.hidden=[4]", "outer=sgd"],
        ["outer=adamw", "schedule=warmup_cosine", "schedule.total=7", "meta.clip=0.1", "meta.average=0.9"],
        ["estimator=bptt", "task.noise=0.1", "rule=lstm", "rule.hidden=[3]"],
    ],
    ids=["momentum", "mlp", "schedule", "lstm"],
)
@pytest.mark.parametrize("stops", [[4], [1, 3, 7]], ids=str)
def test_continuing_equals_never_having_stopped(settings: list[str], stops: list[int]) -> None:
    assert command(*settings, "steps=7", "run=whole") == 0
    for steps in [*stops, 7]:
        assert command(*settings, f"steps={steps}") == 0
    assert outcome() == outcome("whole")
    assert records(name="timing.jsonl")[-1]["step"] == 7


@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGINT, 3)])
def test_a_signal_ends_the_run_after_the_step_in_hand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, at: int
) -> None:
    settings = ["steps=5", "evaluate_every=2", "log_every=4"]
    assert command(*settings, "run=whole") == 0

    def interrupted(training: MetaTraining, step: Callable[..., Any] = MetaTraining.outer_step) -> Any:
        if training.step + 1 == at:
            os.kill(os.getpid(), number)
        return step(training)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(MetaTraining, "outer_step", interrupted)
        assert command(*settings) == 128 + number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert load_tree("run/state.safetensors")[0]["training"]["step"] == at
    assert "to continue:\n  python -m meta_train rule=momentum" in capsys.readouterr().out
    assert command(*settings) == 0
    assert outcome() == outcome("whole")


def test_a_crash_loses_only_what_came_after_the_last_save(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["steps=7", "checkpoint_every=2", "evaluate_every=4", "log_every=1"]
    assert command(*settings, "run=whole") == 0

    def crash(training: MetaTraining, step: Callable[..., Any] = MetaTraining.outer_step) -> Any:
        if training.step == 5:
            raise MemoryError
        return step(training)

    with monkeypatch.context() as patch:
        patch.setattr(MetaTraining, "outer_step", crash)
        with pytest.raises(MemoryError):
            command(*settings)
    with Path("run/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "meta_')  # as a machine that goes down may leave it
    assert load_tree("run/state.safetensors")[0]["training"]["step"] == 4
    assert command(*settings) == 0
    assert outcome() == outcome("whole")


def _line(*arguments: str) -> dict[str, Any]:
    """The command as a process of its own, with a rule from the current folder, which ``python -m`` can import."""
    settings = [*SMALL, "rule._target_=own.Own", "rule.width=3", "evaluate_every=0", "log_every=1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "meta_train", *settings, *arguments]
    return {"args": line, "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def test_a_process_that_is_told_to_stop_can_be_continued(here: Path) -> None:
    (here / "own.py").write_text(OWN_RULE)
    metrics, size = Path("run/metrics.jsonl"), 0
    for number in (signal.SIGTERM, signal.SIGINT):
        run = subprocess.Popen(**_line("steps=1000000"))
        while run.poll() is None and not (metrics.exists() and metrics.stat().st_size > size):
            time.sleep(0.05)
        run.send_signal(number)
        out, err = run.communicate()
        assert (run.returncode, err) == (128 + number, "meta_train: loading\n")
        assert "to continue" in out
        size = metrics.stat().st_size
    steps = f"steps={load_tree('run/state.safetensors')[0]['training']['step'] + 2}"
    for folder in ("run=run", "run=whole"):
        done = subprocess.run(**_line(steps, folder), check=True)
        assert "rules=[Own]" in done.stdout
    assert outcome() == outcome("whole")


@pytest.mark.parametrize("every", [0, 2])
def test_a_finished_run_typed_again_says_so_and_changes_nothing(capsys: pytest.CaptureFixture[str], every: int) -> None:
    line = ["steps=3", f"evaluate_every={every}"]
    assert command(*line) == 0
    before = snapshot()
    for again in (line, ["steps=2", line[1]]):
        capsys.readouterr()
        assert command(*again) == 0
        said = capsys.readouterr().out
        assert "run=run is finished, all 3 outer steps, and nothing was trained" in said
        assert "raise steps=, as in steps=6" in said
        assert snapshot() == before
    assert command("steps=4", line[1]) == 0
    assert "run=run goes on from outer step 3 of 4" in capsys.readouterr().out


def test_a_run_that_stopped_before_its_last_evaluation_is_not_finished() -> None:
    for folder in ("run", "whole"):
        assert command("steps=2", "evaluate_every=2", f"run={folder}") == 0
    Path("run/checkpoint/theta.safetensors").unlink()
    assert command("steps=2") == 0
    assert outcome() == outcome("whole")


@pytest.mark.parametrize("name", ["cosine", "linear", "exponential"])
def test_a_schedule_alone_has_the_length_that_the_run_begins_with(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert command("steps=3", f"schedule=warmup_{name}") == 0
    assert command("steps=3", f"schedule=warmup_{name}", "schedule.total=3", "run=named") == 0
    assert outcome() == outcome("named")
    floor = name == "exponential"  # which never is 0
    assert command("steps=5") == (0 if floor else 2)
    assert floor or "in another run=; this one keeps the schedule that it began with" in capsys.readouterr().err


def test_evaluation_and_logging_do_not_touch_training() -> None:
    assert command("steps=5", "evaluate_every=0", "log_every=5") == 0
    assert command("steps=5", "evaluate_every=1", "log_every=2", "checkpoint_every=1", "run=busy") == 0
    assert outcome()["checkpoint/theta.safetensors"] == outcome("busy")["checkpoint/theta.safetensors"]
    assert records() == [row for row in records("busy") if "meta_loss" in row]


def test_metrics_are_read_from_the_device_once_in_log_every_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def counted(tensor: torch.Tensor, tolist: Callable[..., Any] = torch.Tensor.tolist) -> Any:
        reads.append(tensor)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    assert command("steps=8", "log_every=4", "evaluate_every=0") == 0
    shapes = [tuple(tensor.shape) for tensor in reads]
    assert shapes.count((3,)) == 9  # the seeds of a truncation's streams, and those of the first runs
    assert [shape for shape in shapes if shape != (3,)] == [(4,)] * 2 * 7  # seven metrics, twice


def test_adams_grid_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def counted(*arguments: Any) -> Any:
        runs.append(arguments)
        return run_baseline(*arguments)

    monkeypatch.setattr("meta_train.run.held_out.run_baseline", counted)
    for steps in (5, 8):
        assert command(f"steps={steps}", "evaluate_every=2") == 0
    assert len(runs) == 1
    assert len({row["adam_loss"] for row in records() if "adam_loss" in row}) == 1


def test_a_warm_start_begins_with_the_theta_of_the_checkpoint() -> None:
    assert command("steps=3") == 0
    for source in ("run/checkpoint", "run/checkpoint/theta.safetensors"):
        assert command("steps=1", f"init_from={source}", "outer=sgd", "outer.lr=0", f"run={len(source)}") == 0
        assert outcome(str(len(source)))["checkpoint/theta.safetensors"] == outcome()["checkpoint/theta.safetensors"]


def test_a_run_goes_on_on_another_device() -> None:
    """A GPU's generator has a state of another kind; the state of one, as far as a CPU can tell."""
    assert command("steps=2") == 0
    state, metadata = load_tree("run/state.safetensors")
    state["training"]["generator"], state["device"] = torch.zeros(16, dtype=torch.uint8), "cuda"
    save_tree("run/state.safetensors", state, metadata)
    assert command("steps=3") == 0
    assert load_tree("run/state.safetensors")[0]["device"] == "cpu"


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml")))
def test_experiments_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    small = ["estimator.lanes=2", "estimator.horizon=2", "estimator.truncation=2", "evaluation.seeds=1"]
    if name in ("default", "demo"):  # whole runs; what it compiles is tried in test_evolution
        small[1:3] = ["estimator.horizon=[2,3]", "estimator.compile=false"]
    assert command(f"experiment={name}", "run=run", "steps=1", "logger=none", "device=cpu", *small, base=[]) == 0
    assert load_file("run/checkpoint/theta.safetensors")
