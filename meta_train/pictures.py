"""What a run's records look like: ``training.png`` in its folder, and several runs in one picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from l2o.disk import atomic_write
from l2o.evaluation.training_plots import Rows, training_png
from l2o.types import ConfigurationError
from meta_train.config.compose import writing

PICTURE = "training.png"
LEAST = 50
"""Of fewer outer steps no picture is made unasked: there is nothing to see."""


def read_rows(folder: Path) -> Rows:
    """Return the records of a run. Raises `ConfigurationError` for a folder that is none, or that has none yet."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ConfigurationError(f"run={folder}: no metrics.jsonl in it; name the folder of a run of meta_train")
    lines = path.read_text("utf-8").splitlines()
    rows = []
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if i + 1 < len(lines):  # the last line may be half written, in a run that goes on
                raise ConfigurationError(f"{path}, line {i + 1}, is damaged ({error})") from error
    if not any("meta_loss" in row for row in rows):
        raise ConfigurationError(f"run={folder}: nothing is recorded in it yet; wait for its first log_every steps")
    return rows


def draw(folder: Path) -> Path:
    """Write the picture of a run into its folder."""
    path = folder / PICTURE
    with writing(path):
        atomic_write(path, training_png({folder.name: read_rows(folder)}))
    return path


def differing_settings(folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Return settings that are not the same in all runs, by dotted name, then by run."""
    flat = {name: dict(_leaves(_config(folder))) for name, folder in folders.items()}
    keys = dict.fromkeys(key for settings in flat.values() for key in settings)
    values = {key: {name: settings.get(key) for name, settings in flat.items()} for key in keys if key != "run"}
    return {key: each for key, each in values.items() if len(set(map(repr, each.values()))) > 1}


def _config(folder: Path) -> Any:
    try:
        return yaml.safe_load((folder / "config.yaml").read_bytes())["config"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):  # records can be drawn without it
        return {}


def _leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{path}.{key}" if path else str(key))]
