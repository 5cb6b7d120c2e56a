"""From a configuration to a session: everything it names is built here, and nothing is written."""

from __future__ import annotations

import re
from typing import Any

import torch

from l2o.checkpoints.store import load
from l2o.distributed import ranks
from l2o.estimators import Mixed
from l2o.evaluation.trials import Setting
from l2o.meta import MetaTraining, Schedule
from l2o.types import ConfigurationError, MetaGradient, Mixture, TaskFamily, Theta, UpdateRule
from meta_train.config.build import make, partial, probe, refused, source_digest
from meta_train.config.compose import resolve_device
from meta_train.run.folder import RunFolder
from meta_train.run.held_out import HeldOut
from meta_train.run.plan import Plan
from meta_train.run.processes import Worker
from meta_train.run.session import Session, restore


def make_session(folder: RunFolder) -> Session | Worker:
    """Build all that the configuration names, and put it where the folder's state left off.

    Of several processes rank 0 has the session.

    Raises the errors of `l2o.types`, for whatever does not exist, does not fit, or makes no sense.
    """
    config, plan = folder.config, Plan.of(folder.config)
    device = resolve_device(config["device"])
    rule, problems = make(config["rule"], "rule", UpdateRule), make(config["task"], "task", TaskFamily, Mixture)
    folder.compare_sources({"rule": source_digest(rule), "task": source_digest(*families(problems).values())})
    estimator = _make_estimator(config["estimator"], rule, problems)
    held_out = HeldOut(rule, _held_out_settings(config, estimator), device)
    for family in families(problems).values():
        probe(family, ["train"], device)
    for setting in held_out.settings if plan.evaluate_every else ():
        probe(setting.family, ["train", "valid"], device)
    generator = torch.Generator(device).manual_seed(plan.seed)
    with refused("rule"):
        theta = rule.init_theta(generator)
    if config["init_from"] and folder.state is None:
        theta = _warm_start(config["init_from"], rule)
    optimizer, schedule = partial(config["outer"], "outer", "params"), partial(config["schedule"], "schedule", "step")
    _check_schedule(plan.steps, schedule, folder.state is not None)
    with refused("meta"):
        training = MetaTraining(estimator, theta, optimizer, generator, schedule, **config["meta"])
    if folder.state is not None:
        restore(training, folder.state, plan.seed, folder.path)
    if ranks().rank:
        return Worker(training, plan)
    loggers = [make(node, f"logger.{name}", object) for name, node in (config["logger"] or {}).items()]
    return Session(folder, plan, training, held_out, loggers)


def _make_estimator(node: dict[str, Any], rule: UpdateRule, problems: TaskFamily | Mixture) -> MetaGradient:
    """The estimator, or one for each family of a mixture."""
    call = partial(node, "estimator", "rule", "family")

    def estimator_of(family: TaskFamily) -> MetaGradient:
        made: MetaGradient = call(rule=rule, family=family)
        return made

    return Mixed.over(problems, estimator_of) if isinstance(problems, Mixture) else estimator_of(problems)


def families(problems: TaskFamily | Mixture) -> dict[str, TaskFamily]:
    """Return those of a mixture by name; a family alone is called ``held out``."""
    return dict(problems.families) if isinstance(problems, Mixture) else {"held out": problems}


def _held_out_settings(config: dict[str, Any], estimator: MetaGradient) -> list[Setting]:
    """The tasks of ``evaluation``: those of the run, but for the settings that it overrides, by family in a mixture."""
    own, task = config["evaluation"], config["task"]
    if not re.fullmatch(r"held_out(_valid)?_loss(/.+)?", str(own["best_by"])):
        raise ConfigurationError(
            f"evaluation.best_by={own['best_by']!r}: expected held_out_loss or held_out_valid_loss, of one family with "
            "/FAMILY behind it"
        )
    members = estimator.members.values() if isinstance(estimator, Mixed) else [estimator]
    steps = own["steps"] or max((getattr(each, "longest", 0) for each in members), default=0)
    if not steps:
        raise ConfigurationError(f"evaluation.steps: {type(estimator).__name__} has no horizon of its own; give one")
    if not isinstance(estimator, Mixed):
        named = {"held out": make({**task, **own["task"]}, "evaluation.task", TaskFamily)}
    else:
        named = {name: member.family for name, member in estimator.members.items()}
        nodes = {name: task["families"][name] for name in named if name in task["families"]}  # not of image_mlps
        if own["task"].keys() - nodes.keys():
            raise ConfigurationError(
                f"evaluation.task={own['task']!r}: expected settings by family, of {sorted(nodes)}"
            )
        for name, settings in own["task"].items():
            named[name] = make({**nodes[name], **settings}, f"evaluation.task.{name}", TaskFamily)
    return [Setting(name, family, steps, own["seeds"], own["seed"]) for name, family in named.items()]


def _warm_start(source: str, rule: UpdateRule) -> Theta:
    saved, theta = load(source, rules=(type(rule),))
    if saved != rule:
        raise ConfigurationError(f"init_from={source!r} is of {saved}, this run of {rule}: give both the same settings")
    return theta


def _check_schedule(steps: int, schedule: Schedule, continues: bool) -> None:
    """Outer steps at a learning rate of 0 would only look like training."""
    if not schedule(0) > 0.0 or not schedule(steps - 1) > 0.0:
        begun = " in another run=; this one keeps the schedule that it began with" if continues else ""
        raise ConfigurationError(
            f"steps={steps}: the schedule has the outer learning rate at 0 by then; "
            f"give schedule.total={steps}, or a schedule.floor{begun}"
        )
