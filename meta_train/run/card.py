"""What a checkpoint says about where it comes from."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import l2o
from l2o.meta import MetaTraining


def make_card(config: dict[str, Any], command: str, training: MetaTraining) -> dict[str, Any]:
    """Return entries for `l2o.save`: how θ was made, of what and where.  command: the one that began the run."""
    return {
        "recipe": {
            "command": command,
            "config": config,
            "estimator": _settings(training.estimator, ("rule", "family")),
        },
        "data": _settings(training.estimator.family),
        "seeds": {"meta_training": config["seed"], "held_out": config["evaluation"]["seed"]},
        "commit": commit(),
        "hardware": hardware(training.generator.device),
    }


def _settings(made: Any, apart: tuple[str, ...] = ()) -> Any:
    """Class and fields, defaults included, since they may change; what JSON has no word for is left out.

    apart: fields that the card has elsewhere.
    """
    if isinstance(made, Mapping):
        return {str(key): _settings(value, apart) for key, value in made.items()}
    if isinstance(made, tuple | list):
        return [_settings(value, apart) for value in made]
    if not dataclasses.is_dataclass(made):
        return made if isinstance(made, bool | int | float | str | None) else type(made).__name__
    fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made) if field.name not in apart}
    return {"class": type(made).__name__, **{name: _settings(value, apart) for name, value in fields.items()}}


def commit() -> str | None:
    """Return the commit of the checkout that the code comes from, with ``+changes`` where files differ; None in a
    wheel."""
    root = Path(l2o.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+changes" if _git(root, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):  # no git here, or no commit yet
        return None


def hardware(device: torch.device) -> dict[str, Any]:
    """Return processor, cores and threads, the GPU where it was used, and the versions that numbers may depend on."""
    found = {"cpu": _cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return {**found, "system": f"{platform.system()} {platform.machine()}", "torch": torch.__version__}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True, text=True).stdout.strip()
