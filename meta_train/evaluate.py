"""``python -m meta_train.evaluate``: a learned optimizer, untuned, beside tuned baselines; writes a report."""

from __future__ import annotations

import dataclasses
import datetime
import shlex
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2o._names import unknown
from l2o.evaluation import (
    Report,
    Setting,
    Trials,
    baselines,
    compare,
    optimizer_costs,
    prepare_folder,
    print_tables,
    summary,
    write,
)
from l2o.evaluation.extras import require
from l2o.hub import annotate, check_writable, load
from l2o.types import ConfigurationError, TaskFamily, UpdateRule
from meta_train._build import import_classes, make, probe
from meta_train._config import config_path, main_guard, open_settings, resolve_device
from meta_train.card import commit, hardware

if TYPE_CHECKING:
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
    rule, theta = load(config.source, rules=import_classes(config.rules, "rules", UpdateRule))
    settings = make_settings(config)
    for setting in settings:
        probe(setting.family, ["train", "valid"], device)
    if config.record:
        check_writable(config.source)
    out = Path(config.out)
    prepare_folder(out)
    comparisons = [compare(s, rule, theta, chosen, device, partial(_progress, s)) for s in settings]
    costs = optimizer_costs(rule, theta, device) if config.cost else {}
    facts = {
        "Learned optimizer": f"{config.source}: {rule!r}, size of θ: {sum(t.numel() for t in theta.values()):,}",
        "Hardware": f"device {device}, " + ", ".join(f"{name} {value}" for name, value in hardware(device).items()),
        "Wall time": f"{time.perf_counter() - started:.0f} s",
        "Command": f"`{command}`",
        "Date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Commit": str(commit() or "unknown"),
    }
    report = Report(str(config.source), comparisons, facts, costs, config.loss_label)
    write(report, out)
    if config.record:
        annotate(config.source, {"results": summary(report)})
    print_tables(report)
    print(f"report:  {out / 'report.md'}\npicture: {out / 'curves.png'}\nnumbers: {out / 'results.json'}")
    return report


def make_settings(config: DictConfig) -> list[Setting]:
    """The settings of a configuration: the task as it stands, or each of ``settings`` with what it overrides."""
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    common = {name: plain[name] for name in ("steps", "seeds", "seed", "window")}
    named = plain["settings"] or {"": {}}
    if not isinstance(named, dict) or not all(isinstance(own, dict) for own in named.values()):
        raise ConfigurationError(f"settings={named!r}: expected a mapping such as {{wide: {{task: {{width: 128}}}}}}")
    return [_setting(plain["task"], plain["half"], {**common, **own}, key) for key, own in named.items()]


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
