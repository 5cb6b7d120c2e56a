"""The training command: a run that is stopped and continued is the run that never stopped; bad input writes nothing."""

from __future__ import annotations

import fcntl
import json
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
import yaml  # type: ignore[import-untyped]
from conftest import ROOT
from safetensors.torch import load_file, save_file

import l2o.hub
from l2o._files import load_tree, save_tree
from l2o.evaluation.baselines import baselines
from l2o.evaluation.scores import score
from l2o.evaluation.trials import Setting, run_baseline, run_learned
from l2o.meta import MetaTraining
from l2o.rules import SGD
from l2o.tasks import Quadratic
from meta_train.loggers import Wandb, duration
from meta_train.train import main

SMALL = [
    "rule=momentum",
    "task=quadratic",
    "task.dim=3",
    "estimator.lanes=3",
    "estimator.horizon=6",
    "estimator.truncation=3",
    "evaluation.seeds=2",
    "logger=none",
    "run=run",
]
OWN_RULE = """
from dataclasses import dataclass

from l2o.rules import SGD

open("imported", "w").close()


@dataclass(frozen=True)
class Own(SGD):
    width: int = 1
"""

Command = Callable[..., int]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """``python -m meta_train``, in this process: its exit status."""

    def run(*arguments: str) -> int:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", ["meta_train", *SMALL, *arguments])
        try:
            main()
        except SystemExit as stopped:
            return int(stopped.code or 0)
        return 0

    return run


def outcome(run: str = "run") -> dict[str, bytes]:
    """What has to be equal bit for bit."""
    return {name: Path(run, name).read_bytes() for name in ("metrics.jsonl", "checkpoint/theta.safetensors")}


def snapshot(folder: str = ".") -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def records(run: str = "run", name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run, name).read_text().splitlines()]


def test_a_run_leaves_its_folder_and_nothing_else(command: Command) -> None:
    assert command("steps=5", "evaluate_every=2", "log_every=2") == 0
    assert {path.name for path in Path().iterdir()} == {"run"}
    files = {".lock", "config.yaml", "state.safetensors", "metrics.jsonl", "timing.jsonl", "checkpoint"}
    assert {path.name for path in Path("run").iterdir()} == files
    assert [row["step"] for row in records()] == [1, 2, 2, 3, 4, 4, 5, 5]
    steps = [row for row in records() if "meta_loss" in row]
    assert [row["inner_steps"] for row in steps] == [9 * step for step in range(1, 6)]
    assert set(steps[0]) == {"step", "meta_loss", "meta_grad_norm", "lanes_masked", "lane_grad_norm", "inner_steps"}
    assert [row["step"] for row in records(name="timing.jsonl")] == [2, 4, 5]


def test_the_checkpoint_holds_theta_and_says_where_it_comes_from(command: Command) -> None:
    assert command("steps=3", "seed=7") == 0
    rule, theta = l2o.hub.load("run/checkpoint")
    state, _ = load_tree("run/state.safetensors")
    assert type(rule).__name__ == "Momentum"
    assert all(torch.equal(theta[name], tensor) for name, tensor in state["training"]["theta"].items())
    card = l2o.hub.read_card("run/checkpoint")
    assert card["seeds"] == {"meta_training": 7, "held_out": 1000003}
    assert card["data"] == {"class": "Quadratic", "dim": 3, "noise": 0.0, "init_scale": 0.01}
    assert "rule=momentum" in card["recipe"]["command"]
    assert card["recipe"]["config"]["estimator"]["horizon"] == 6
    assert card["compute"]["outer_steps"] == 3
    assert card["compute"]["inner_steps"] == 27
    assert {"cpu", "cores", "torch"} <= card["hardware"].keys()
    assert card["results"] == {key: value for key, value in records()[-1].items() if key != "step"}


def test_held_out_losses_are_those_of_a_stream_of_their_own(command: Command) -> None:
    assert command("steps=2", "evaluation.seed=11", "evaluation.task.dim=4") == 0
    rule, theta = l2o.hub.load("run/checkpoint")
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
        ["outer=adamw", "schedule=warmup_cosine", "schedule.total=7", "schedule.warmup=2"],
        ["estimator=bptt", "task.noise=0.1", "rule=lstm", "rule.hidden=[3]"],
    ],
    ids=["momentum", "mlp", "schedule", "lstm"],
)
@pytest.mark.parametrize("stops", [[4], [1, 3, 7]], ids=str)
def test_continuing_equals_never_having_stopped(command: Command, settings: list[str], stops: list[int]) -> None:
    assert command(*settings, "steps=7", "run=whole") == 0
    for steps in [*stops, 7]:
        assert command(*settings, f"steps={steps}") == 0
    assert outcome() == outcome("whole")
    assert records(name="timing.jsonl")[-1]["step"] == 7


@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGINT, 3)])
def test_a_signal_ends_the_run_after_the_step_in_hand(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, at: int
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


def test_a_crash_loses_only_what_came_after_the_last_save(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert (run.returncode, err) == (128 + number, "")
        assert "to continue" in out
        size = metrics.stat().st_size
    steps = f"steps={load_tree('run/state.safetensors')[0]['training']['step'] + 2}"
    for folder in ("run=run", "run=whole"):
        done = subprocess.run(**_line(steps, folder), check=True)
        assert "rules=[Own]" in done.stdout
    assert outcome() == outcome("whole")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rule=adam"], "rule: saved 'momentum', given 'adam'"),
        (["+rule.lr=0.5"], "rule.lr: saved nothing, given 0.5"),
        (["task.dim=4"], "task.dim: saved 3, given 4"),
        (["estimator.lanes=4", "seed=1"], "estimator.lanes: saved 3, given 4\n  seed: saved 0, given 1"),
        (["outer.lr=0.1"], "outer.lr: saved 0.001, given 0.1"),
        (["evaluate_every=1"], "evaluate_every: saved 250, given 1"),
        (["evaluation.seeds=3"], "evaluation.seeds: saved 2, given 3"),
        (["init_from=elsewhere"], "init_from: saved nothing, given 'elsewhere'"),
        (["experiment=digits_demo"], "experiment: saved nothing, given 'digits_demo'"),
    ],
    ids=str,
)
def test_another_configuration_is_refused(
    command: Command, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert command("steps=2") == 0
    before = snapshot()
    assert command("steps=4", *arguments) == 2
    assert expected in capsys.readouterr().err
    assert snapshot() == before


def test_what_is_not_said_again_stays_as_it_was(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("steps=4", "rule=adam", "rule.beta1=0.8", "outer=sgd", "outer.lr=0.02", "run=whole") == 0
    assert command("steps=2", "rule=adam", "rule.beta1=0.8", "outer=sgd", "outer.lr=0.02") == 0
    monkeypatch.setattr("test_train.SMALL", [])
    free = ["device=cpu", "log_every=3", "checkpoint_every=1", "logger=[]"]
    assert command("run=run", "steps=4", "outer=sgd", *free) == 0
    assert outcome() == outcome("whole")
    config = yaml.safe_load(Path("run/config.yaml").read_text())["config"]
    assert (config["steps"], config["log_every"], config["outer"]["lr"]) == (4, 3, 0.02)


def test_a_saved_configuration_imports_nothing_by_itself(
    here: Path, command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "own.py").write_text(OWN_RULE)
    monkeypatch.syspath_prepend(here)
    assert command("steps=2", "rule._target_=own.Own", "rule.width=3") == 0
    assert command("steps=3", "rule._target_=own.Own") == 0
    Path("imported").unlink()
    monkeypatch.delitem(sys.modules, "own")
    before = snapshot()
    assert command("steps=4") == 2
    assert "repeat rule._target_=own.Own" in capsys.readouterr().err
    assert snapshot() == before


@pytest.mark.parametrize(
    "planted",
    [{"_target_": "torch.optim.optimizer.warnings.sys.exit"}, {"_target_": "os.getcwd"}, {"lr": "${oc.env:HOME}"}],
)
def test_a_planted_configuration_is_refused(
    command: Command, capsys: pytest.CaptureFixture[str], planted: dict[str, str]
) -> None:
    assert command("steps=2") == 0
    path = Path("run/config.yaml")
    saved = yaml.safe_load(path.read_text())
    saved["config"]["outer"] |= planted
    path.write_text(yaml.safe_dump(saved))
    assert command("steps=3") == 2
    assert "only where the command line names it" in capsys.readouterr().err


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _another_theta(path: Path) -> None:
    state, metadata = load_tree(path)
    state["training"]["theta"]["log_lr"] = torch.zeros(2)
    save_tree(path, state, metadata)


def _without_sizes(path: Path) -> None:
    state, metadata = load_tree(path)
    save_tree(path, {name: value for name, value in state.items() if name != "sizes"}, metadata)


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "truncated state": ("state.safetensors", _truncate, "state.safetensors"),
    "text for a state": ("state.safetensors", lambda path: path.write_text("hello"), "state.safetensors"),
    "pickle for a state": ("state.safetensors", lambda path: torch.save({"a": 1}, path), "state.safetensors"),
    "foreign safetensors": ("state.safetensors", lambda path: save_file({"a": torch.ones(1)}, path), "format"),
    "state of another run": (
        "state.safetensors",
        lambda path: path.write_bytes(Path("other/state.safetensors").read_bytes()),
        "was not saved under the configuration",
    ),
    "another theta": ("state.safetensors", _another_theta, "log_lr"),
    "state without an entry": ("state.safetensors", _without_sizes, "'sizes'"),
    "short metrics": ("metrics.jsonl", _truncate, "metrics.jsonl has"),
    "no metrics": ("metrics.jsonl", Path.unlink, "metrics.jsonl has 0 bytes"),
    "no configuration": ("config.yaml", Path.unlink, "but no config.yaml"),
    "broken configuration": ("config.yaml", lambda path: path.write_text("a: [1"), "is damaged"),
    "foreign configuration": ("config.yaml", lambda path: path.write_text("a: 1"), "not the configuration of a run"),
    "tag in the configuration": ("config.yaml", lambda path: path.write_text("!!python/name:os.system"), "is damaged"),
    "version of the future": (
        "config.yaml",
        lambda path: path.write_text(path.read_text().replace("version: 1", "version: 9")),
        "format version 9",
    ),
    "edited configuration": (
        "config.yaml",
        lambda path: path.write_text(path.read_text().replace("seed: 0", "seed: 5")),
        "was not saved under the configuration",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_run_is_left_alone(command: Command, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    name, damage, expected = DAMAGE[kind]
    assert command("steps=2") == 0
    assert command("steps=2", "run=other", "seed=1") == 0
    damage(Path("run", name))
    before = snapshot()
    assert command("steps=3") == 2
    assert expected in capsys.readouterr().err
    assert snapshot() == before


def test_two_processes_cannot_write_to_one_run(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("steps=2") == 0
    before = snapshot()
    with Path("run/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert command("steps=3") == 2
    assert "another process is writing" in capsys.readouterr().err
    assert snapshot() == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rule=momentun"], "unknown rule 'momentun', did you mean 'momentum'"),
        (["task=quadratics"], "did you mean 'quadratic'?; valid: digits_mlp"),
        (["estimator=es"], "unknown estimator 'es'; valid: bptt, tbptt"),
        (["logger=[wandb,tensorbord]"], "unknown logger 'tensorbord'"),
        (["experiment=nothing"], "unknown experiment 'nothing'"),
        (["init_from=nothing"], "'nothing'"),
        (["rule._target_=nowhere.Rule"], "rule"),
        (["rule._target_=l2o.tasks.Quadratic"], "expected a UpdateRule"),
        (["task._target_=l2o.rules.SGD", "~task.dim"], "expected a TaskFamily"),
        (["rule.width=3"], "unexpected keyword argument 'width'"),
        (["rule.lr=abc"], "rule"),
        (["estimator.lanez=3"], "unexpected keyword argument 'lanez'; it takes lanes, horizon"),
        (["estimator.lanes=many"], "estimator"),
        (["estimator.lanes=0"], "lanes=0"),
        (["outer.lr=-1"], "outer: Invalid learning rate: -1"),
        (["outer.rate=1"], "unexpected keyword argument 'rate'"),
        (["schedule=warmup_cosine"], "schedule.total has no default"),
        (["schedule.total=3"], "unexpected keyword argument 'total'"),
        (["evaluation.seeds=0"], "seeds=0"),
        (["evaluation.task.width=3"], "evaluation.task"),
        (["steps=0"], "steps=0: expected a whole number of at least 1"),
        (["steps=1.5"], "steps=1.5"),
        (["seed=true"], "seed=True"),
        (["log_every=0"], "log_every=0"),
        (["device=tpu"], "device='tpu'"),
        (["step=3"], "step"),
    ],
    ids=str,
)
def test_bad_input_is_one_error_before_anything_is_written(
    command: Command, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert command(*arguments) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert snapshot() == {}


@pytest.mark.parametrize(
    ("logger", "module", "extra"),
    [("wandb", "wandb", "train"), ("tensorboard", "torch.utils.tensorboard", "tensorboard")],
)
def test_a_logger_that_is_not_installed_names_its_extra(
    command: Command,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    logger: str,
    module: str,
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert command(f"logger=[{logger}]") == 2
    assert f"pip install l2o[{extra}]" in capsys.readouterr().err
    assert snapshot() == {}


def test_evaluation_and_logging_do_not_touch_training(command: Command) -> None:
    assert command("steps=5", "evaluate_every=0", "log_every=5") == 0
    assert command("steps=5", "evaluate_every=1", "log_every=2", "checkpoint_every=1", "run=busy") == 0
    assert outcome()["checkpoint/theta.safetensors"] == outcome("busy")["checkpoint/theta.safetensors"]
    assert records() == [row for row in records("busy") if "meta_loss" in row]


def test_adams_grid_is_run_once(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def counted(*arguments: Any) -> Any:
        runs.append(arguments)
        return run_baseline(*arguments)

    monkeypatch.setattr("meta_train.held_out.run_baseline", counted)
    for steps in (5, 8):
        assert command(f"steps={steps}", "evaluate_every=2") == 0
    assert len(runs) == 1
    assert len({row["adam_loss"] for row in records() if "adam_loss" in row}) == 1


def test_a_warm_start_begins_with_the_theta_of_the_checkpoint(command: Command) -> None:
    assert command("steps=3") == 0
    for source in ("run/checkpoint", "run/checkpoint/theta.safetensors"):
        assert command("steps=1", f"init_from={source}", "outer=sgd", "outer.lr=0", f"run={len(source)}") == 0
        assert outcome(str(len(source)))["checkpoint/theta.safetensors"] == outcome()["checkpoint/theta.safetensors"]


def test_a_warm_start_from_another_rule_is_refused(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    rule = SGD(lr=0.5)
    l2o.hub.save("saved", rule, rule.init_theta(torch.Generator()))
    before = snapshot()
    for own in (["rule=momentum"], ["rule=sgd"]):
        assert command("init_from=saved", *own) == 2
        assert "init_from='saved' is of SGD(lr=0.5)" in capsys.readouterr().err
    assert snapshot() == before


def test_a_run_goes_on_on_another_device(command: Command) -> None:
    """A GPU's generator has a state of another kind; the state of one, as far as a CPU can tell."""
    assert command("steps=2") == 0
    state, metadata = load_tree("run/state.safetensors")
    state["training"]["generator"], state["device"] = torch.zeros(16, dtype=torch.uint8), "cuda"
    save_tree("run/state.safetensors", state, metadata)
    assert command("steps=3") == 0
    assert load_tree("run/state.safetensors")[0]["device"] == "cpu"


def test_steps_that_lose_all_lanes_are_said_once(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("steps=4", "rule.lr=1e12", "log_every=1") == 0
    said = capsys.readouterr().out
    assert said.count("all lanes of l2o.tasks.Quadratic exploded") == 1
    steps = [row for row in records() if "lanes_masked" in row]
    assert all(row["meta_loss"] is None and row["lanes_masked"] == 3 for row in steps)
    assert records()[-1]["held_out_loss"] is None
    assert records()[-1]["held_out_diverged"] == 2


def test_tensorboard_gets_every_step_once(command: Command) -> None:
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
    assert done.stderr == ""
    (recorded,) = Path("run/wandb").glob("offline-run-*")
    run_id = yaml.safe_load(Path("run/config.yaml").read_text())["id"]
    assert (recorded / f"run-{run_id}.wandb").stat().st_size
    assert {path.name for path in here.iterdir() if not path.name.startswith(".")} == {"run"}


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


def test_a_logger_of_ones_own(here: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_help_says_what_there_is_to_choose(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--help") == 0
    said = capsys.readouterr().out
    assert "rule: adagrad, adam, lstm, mlp, momentum, rmsprop, sgd" in said
    assert "checkpoint_every" in said
    assert snapshot() == {}


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml")))
def test_experiments_run(command: Command, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("test_train.SMALL", [])
    small = ["estimator.lanes=2", "estimator.horizon=2", "estimator.truncation=1", "evaluation.seeds=1"]
    assert command(f"experiment={name}", "run=run", "steps=1", "logger=none", "device=cpu", *small) == 0
    assert load_file("run/checkpoint/theta.safetensors")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119.4, "119 s"), (120, "2 min"), (3599, "1 h 00 min"), (3901, "1 h 06 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
