"""``python -m meta_train.evaluate``: a learned optimizer, untuned, beside tuned baselines; writes a report."""

from __future__ import annotations

import datetime
import shlex
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from l2o.evaluation import (
    Report,
    Setting,
    Trials,
    baselines,
    compare,
    optimizer_costs,
    prepare_folder,
    print_tables,
    write,
)
from l2o.hub import load
from l2o.types import ConfigurationError, TaskFamily, UpdateRule
from meta_train._config import build, config_path, import_classes, main_guard, open_settings, resolve_device, unknown
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
    hydra.main(version_base="1.3", config_path=config_path(), config_name="evaluate")(
        lambda config: evaluate(config, command)
    )()


def evaluate(config: DictConfig, command: str) -> Report:
    """Run what the configuration says and write its report; bad input raises before anything is run."""
    started = time.perf_counter()
    device = resolve_device(config.device)
    chosen = baselines(config.baselines)
    rule, theta = load(config.source, rules=_rules(config))
    settings = make_settings(config)
    for setting in settings:
        _probe(setting, device)
    out = Path(config.out)
    prepare_folder(out)
    comparisons = [compare(s, rule, theta, chosen, device, partial(_progress, s)) for s in settings]
    costs = optimizer_costs(rule, theta, device) if config.cost else {}
    facts = {
        "Learned optimizer": f"{config.source}: {rule!r}, {sum(t.numel() for t in theta.values()):,} numbers in θ",
        "Hardware": ", ".join(f"{name} {value}" for name, value in hardware(device).items()),
        "Wall time": f"{time.perf_counter() - started:.0f} s",
        "Command": f"`{command}`",
        "Date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Commit": str(commit() or "unknown"),
    }
    report = Report(str(config.source), comparisons, facts, costs, config.loss_label)
    write(report, out)
    print_tables(report)
    print(f"report:  {out / 'report.md'}\npicture: {out / 'curves.png'}\nnumbers: {out / 'results.json'}")
    return report


def make_settings(config: DictConfig) -> list[Setting]:
    """The settings of a configuration: the task as it stands, or each of ``settings`` with what it overrides."""
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    common = {name: plain[name] for name in ("steps", "seeds", "seed", "window")}
    named = plain["settings"] or {"": {}}
    return [_setting(plain["task"], {**common, **(own or {})}, key) for key, own in named.items()]


def _setting(task: Mapping[str, Any], own: dict[str, Any], key: str) -> Setting:
    from omegaconf import OmegaConf

    valid = ("name", "task", "steps", "seeds", "seed", "window")
    for name in own:
        if name not in valid:
            raise ConfigurationError(f"settings.{key}: {unknown('key', name, valid)}")
    family = build(OmegaConf.create({**task, **own.pop("task", {})}), f"settings.{key}.task" if key else "task")
    if not isinstance(family, TaskFamily):
        raise ConfigurationError(f"task: {type(family).__name__} is not a TaskFamily")
    return Setting(own.pop("name", key or type(family).__name__), family, **own)


def _probe(setting: Setting, device: torch.device) -> None:
    """Draw a batch of each split, so that missing data is noticed before anything is run."""
    generator = torch.Generator(device).manual_seed(0)
    data = setting.family.sample(generator, 1)
    setting.family.batch(data, "train", generator)
    setting.family.batch(data, "valid", generator)


def _rules(config: DictConfig) -> tuple[type[UpdateRule], ...]:
    classes = import_classes(config.rules, "rules")
    for cls in classes:
        if not issubclass(cls, UpdateRule):
            raise ConfigurationError(f"rules: {cls.__name__} is not an UpdateRule")
    return classes


def _progress(setting: Setting, trials: Trials) -> None:
    runs = setting.seeds * len(trials.rates)
    print(f"{setting.name}: {trials.label}, {runs} runs of {setting.steps} steps in {trials.seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
