"""``python -m meta_train.evaluate``: learned optimizers, untuned, beside their baselines; writes a report."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import shlex
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2o.checkpoints.store import annotate, check_writable, load
from l2o.checks import lookup, unknown
from l2o.disk import user_path
from l2o.evaluation import (
    LEARNED,
    Comparison,
    Entrant,
    Report,
    RuleEntrant,
    Setting,
    Trials,
    baselines,
    compare,
    new_console,
    optimizer_costs,
    prepare_folder,
    print_tables,
    summary,
    write,
    write_text,
)
from l2o.extras import require
from l2o.types import ConfigurationError, TaskFamily, UpdateRule
from meta_train.config.build import import_classes, make, probe
from meta_train.config.compose import config_path, main_guard, open_settings, resolve_device
from meta_train.run.card import commit, hardware

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

OPEN = ("task", "settings")
"""Nodes that take keys which the YAML does not mention: fields of a task, names of settings."""


@main_guard
def main() -> None:
    """The command."""
    import hydra

    command = shlex.join(["python", "-m", "meta_train.evaluate", *sys.argv[1:]])
    # Both commands have experiments of the same names; those of this one lie in a folder of their own.
    arguments = [f"evaluate/{a}" if a.startswith("experiment=") else a for a in sys.argv[1:]]
    sys.argv[1:] = open_settings(arguments, OPEN)
    composed: list[DictConfig] = []
    # Hydra only composes: where what it runs fails, it adds a message of its own.
    compose = hydra.main(version_base="1.3", config_path=config_path(), config_name="evaluate")
    compose(lambda config: composed.append(config))()
    for config in composed:
        evaluate(config, command)


def evaluate(config: DictConfig, command: str) -> Report:
    """Run what the configuration says and write its report; bad input raises before anything is run."""
    started = time.perf_counter()
    require("matplotlib", "rich")
    device = resolve_device(config.device)
    chosen = baselines(config.baselines)
    learned = load_learned(config)
    settings = make_settings(config)
    for setting in settings.values():
        probe(setting.family, ["train", "valid"], device)
    first = learned[LEARNED]
    if config.record:
        check_writable(first.label)
    out = user_path(config.out, "out")
    prepare_folder(out)
    facts = _facts(learned.values(), device, command)
    report = Report(", ".join(e.label for e in learned.values()), [], facts, {}, config.loss_label)
    report = _compare_all(report, settings, {**learned, **chosen}, device, out)
    costs = optimizer_costs({n: (e.rule, e.theta) for n, e in learned.items()}, device) if config.cost else {}
    wall = {"Wall time": f"{time.perf_counter() - started:.0f} s"}
    report = report._replace(costs=costs, facts={**facts, **wall})
    write(report, out)
    if config.record:
        annotate(first.label, {"results": summary(report)})
    print_tables(report)
    print(f"report:  {out / 'report.md'}\npicture: {out / 'curves.png'}\nnumbers: {out / 'results.json'}")
    return report


def load_learned(config: DictConfig) -> dict[str, RuleEntrant]:
    """The learned optimizers of ``source``, one or a list of several, by their names in a comparison."""
    one = isinstance(config.source, str) or not isinstance(config.source, Sequence)
    sources = [str(config.source)] if one else list(map(str, config.source))
    if not sources or len(set(sources)) < len(sources):
        raise ConfigurationError(f"source={sources}: expected a name, or several different ones, as [default,light]")
    classes = import_classes(config.rules, "rules", UpdateRule)
    loaded = {source: RuleEntrant(source, *load(source, rules=classes)) for source in sources}
    return {LEARNED if source == sources[0] else f"{LEARNED} {source}": e for source, e in loaded.items()}


def _facts(learned: Collection[RuleEntrant], device: torch.device, command: str) -> dict[str, str]:
    sizes = {e.label: sum(t.numel() for t in e.theta.values()) for e in learned}
    return {
        **{f"Learned optimizer {e.label}": f"{e.rule!r}, size of θ: {sizes[e.label]:,}" for e in learned},
        "Hardware": f"device {device}, " + ", ".join(f"{name} {value}" for name, value in hardware(device).items()),
        "Command": f"`{command}`",
        "Date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Commit": str(commit() or "unknown"),
    }


def _compare_all(
    report: Report, settings: Mapping[str, Setting], entrants: Mapping[str, Entrant], device: torch.device, out: Path
) -> Report:
    """``report`` with the comparison of each setting, written into ``out`` as soon as it is done."""
    runs = sum(s.steps * s.seeds * len(e.rates) for s in settings.values() for e in entrants.values())
    comparisons: list[Comparison] = []
    report = report._replace(comparisons=comparisons)
    with _interruptible(report, settings, out), _bar(runs) as advance:
        for setting in settings.values():
            told = partial(_progress, setting), partial(advance, setting.name)
            comparisons.append(compare(setting, entrants, device, *told))
            write_text(_unfinished(report, settings), out)
    return report


def _unfinished(report: Report, settings: Collection[str]) -> Report:
    """``report`` with a word on how many of the settings are in it."""
    return report._replace(facts={**report.facts, "Settings done": f"{len(report.comparisons)} of {len(settings)}"})


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[str, str, int], None]]:
    """A bar over all runs, where there is a terminal: to be told setting, optimizer, and how many further steps."""
    from rich.progress import Progress

    console = new_console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda name, label, steps: bar.update(task, advance=steps, description=f"{name}: {label}")


@contextlib.contextmanager
def _interruptible(report: Report, settings: Mapping[str, Setting], out: Path) -> Iterator[None]:
    """Ctrl-C ends the command with the status of the signal, and a line on what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        done = len(report.comparisons)
        kept, others = "nothing is kept", "the same command begins again"
        if done:
            write(_unfinished(report, settings), out)
            left = ",".join(list(settings)[done:])
            kept = f"their report is {out / 'report.md'}"
            others = f"the same command with only=[{left}], and another out=, runs the others"
        print(f"interrupted after {done} of {len(settings)} settings; {kept}; {others}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def make_settings(config: DictConfig) -> dict[str, Setting]:
    """The settings of a configuration: the task as it stands, or each of ``settings`` with what it overrides."""
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    common = {name: plain[name] for name in ("steps", "seeds", "seed", "window")}
    named = plain["settings"] or {"": {}}
    if not isinstance(named, dict) or not all(isinstance(own, dict) for own in named.values()):
        raise ConfigurationError(f"settings={named!r}: expected a mapping such as {{wide: {{task: {{width: 128}}}}}}")
    only = {key: lookup("setting", key, named) for key in _listed("only", plain["only"])} or named
    return {key: _setting(plain["task"], plain["half"], {**common, **own}, key) for key, own in only.items()}


def _listed(name: str, value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ConfigurationError(f"{name}={value!r}: expected a list, such as [{value}]")
    return value


def _setting(task: Mapping[str, Any], half: str, own: dict[str, Any], key: str) -> Setting:
    """One setting.  half: of the images, for a task that has halves and does not name one.  own: `Setting`'s fields."""
    valid = ("name", "task", "steps", "seeds", "seed", "window")
    for name in own:
        if name not in valid:
            raise ConfigurationError(f"settings.{key}: {unknown('key', name, valid)}")
    overrides = own.pop("task", {})
    if not isinstance(overrides, dict):
        raise ConfigurationError(f"settings.{key}.task={overrides!r}: expected settings such as {{width: 128}}")
    task = overrides if "_target_" in overrides else {**task, **overrides}
    family = make(task, f"settings.{key}.task" if key else "task", TaskFamily)
    return Setting(own.pop("name", key or type(family).__name__), _of_half(family, task, half), **own)


def _of_half(family: Any, node: Mapping[str, Any], half: str) -> TaskFamily:
    """``family``, made from ``node``, on that half of its images, also inside augmentations, where none is named."""
    changes: dict[str, Any] = {}
    if isinstance(getattr(family, "family", None), TaskFamily):
        changes["family"] = _of_half(family.family, node.get("family", {}), half)
    if hasattr(family, "half") and "half" not in node:
        changes["half"] = half
    changed: TaskFamily = dataclasses.replace(family, **changes) if changes else family
    return changed


def _progress(setting: Setting, trials: Trials) -> None:
    runs = setting.seeds * len(trials.rates)
    print(f"{setting.name}: {trials.label}, {runs} runs of {setting.steps} steps in {trials.seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
