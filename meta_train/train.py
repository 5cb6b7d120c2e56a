"""``python -m meta_train``: meta-train a rule on a task, in a folder that the same command continues."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf

from l2o.types import ConfigurationError
from meta_train.config.assemble import make_session
from meta_train.config.compose import TRAINING, config_path, main_guard, open_settings
from meta_train.loggers import duration
from meta_train.pictures import LEAST, PICTURE, draw
from meta_train.run.folder import Request, RunFolder
from meta_train.run.processes import Worker, agreed, joined, wait_for_all
from meta_train.run.session import Session
from meta_train.run.signals import StopRequest


@main_guard
def main() -> None:
    """Run the command."""
    sys.argv[1:] = open_settings(sys.argv[1:], TRAINING)
    composed: list[tuple[DictConfig, Any]] = []

    def take(config: DictConfig) -> None:
        context = HydraConfig.get()
        if context.mode == RunMode.MULTIRUN and "BasicLauncher" not in context.launcher._target_:
            run_job(config, context)  # on a machine that the launcher has chosen: nothing comes back from there
        else:
            composed.append((config, context))

    # Hydra only composes: where what it runs fails, it adds a message of its own.
    hydra.main(version_base="1.3", config_path=config_path(), config_name="train")(take)()
    for config, context in composed:
        run_job(config, context)


def run_job(config: DictConfig, context: Any) -> None:
    """Meta-train one configuration of a sweep, or the only one; exits where a signal has stopped it."""
    with joined():
        status = train(read_request(config, context))
    if status:
        sys.exit(status)


def read_request(config: DictConfig, context: Any) -> Request:
    """Return what Hydra composed, and which of it the command line said.  context: Hydra's own configuration."""
    overrides = list(context.overrides.task)
    explicit = tuple(override.key_or_group for override in OverridesParser.create().parse_overrides(overrides))
    choices = {group: name for group, name in context.runtime.choices.items() if "/" not in group}
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigurationError(f"{error.full_key} has no default: give it, as in {error.full_key}=...") from error
    if plain["schedule"].get("total", ...) is None:
        plain["schedule"]["total"] = plain["steps"]
    said = [override.removeprefix("++") for override in overrides]
    if "run" not in explicit:
        said.append(f"run={plain['run']}")
    return Request(plain, choices, explicit, shlex.join(["python", "-m", "meta_train", *said]))


def train(request: Request) -> int:
    """Meta-train, or go on, until ``steps`` or a signal to stop; the exit status, 128 + number for a signal."""
    session = make_session(RunFolder(request))
    if agreed(isinstance(session, Session) and session.finished):
        if isinstance(session, Session):
            drawn = (session.folder.path / PICTURE).exists()  # not, where it was killed between its end and its picture
            print(_finished(session) + ("" if drawn else _picture(session)))
        return 0
    wait_for_all()  # until then nobody writes, so that all have read the same
    with StopRequest() as stop:
        try:
            session.begin()
            stopped = _loop(session, stop)
            if not stopped:
                _finish(session)
        finally:
            session.close()
    if isinstance(session, Session):
        print(_farewell(session) if stopped else _summary(session) + _picture(session))
    return 128 + stopped if stopped else 0


def _loop(session: Session | Worker, stop: StopRequest) -> int:
    """Outer steps until all are done; or until a signal to stop, whose number it returns."""
    plan, stopped = session.plan, agreed(stop.number)
    while session.step < plan.steps and not stopped:
        if plan.evaluate_every and session.step and session.step % plan.evaluate_every == 0:
            session.evaluate()
        session.outer_step()
        if session.step % plan.checkpoint_every == 0 and session.step < plan.steps:
            session.save()
        stopped = agreed(stop.number)
    session.save()
    return stopped


def _finish(session: Session | Worker) -> None:
    if session.plan.evaluate_every:
        session.evaluate()
    else:
        session.save_checkpoint()


def _finished(session: Session) -> str:
    steps = session.plan.steps
    return (
        f"run={session.folder.path} is finished, all {session.step} outer steps, and nothing was trained\n"
        f"checkpoint: {session.checkpoint}\n"
        f"to train on, raise steps=, as in steps={max(session.step, steps) * 2}; to begin anew, name another run=\n"
        f"to measure it: python -m meta_train.evaluate source={shlex.quote(str(session.checkpoint))}"
    )


def _farewell(session: Session) -> str:
    return f"stopped at outer step {session.step} and saved; to continue:\n  {session.folder.command}"


def _summary(session: Session) -> str:
    rule = type(session.held_out.rule)
    own = "" if rule.__module__.startswith("l2o.") else f", rules=[{rule.__name__}]"
    source = str(session.checkpoint)
    return (
        f"{session.step} outer steps, {session.inner_steps:,} inner steps, {duration(session.seconds)}\n"
        f"checkpoint: {source}\n"
        f"{_best(session)}"
        f"use it: l2o.LearnedOptimizer(model.parameters(), {source!r}, total_steps={session.horizon}{own})"
    )


def _picture(session: Session) -> str:
    """Draw a run that is long enough to be seen; without matplotlib there is none."""
    if session.step < LEAST:
        return ""
    try:
        return f"\npicture: {draw(session.folder.path)}"
    except ConfigurationError as error:
        return f"\nno picture: {error}"


def _best(session: Session) -> str:
    if not session.plan.evaluate_every:
        return ""
    best = session.best
    if not best.kept:
        return f"best: none, since no evaluation had a finite {best.key} without a diverged run\n"
    return f"best: {best.folder} ({best.key} {best.kept['loss']:.4g} at outer step {best.step})\n"
