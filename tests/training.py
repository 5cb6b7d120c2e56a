"""What the tests of the training command share: a small run, in this process, and what it leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

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


def command(*arguments: str, base: list[str] = SMALL) -> int:
    """``python -m meta_train``: its exit status.  base: arguments that come first."""
    before = sys.argv
    sys.argv = ["meta_train", *base, *arguments]
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    finally:
        sys.argv = before
    return 0


def outcome(run: str = "run") -> dict[str, bytes]:
    """What has to be equal bit for bit."""
    return {name: Path(run, name).read_bytes() for name in ("metrics.jsonl", "checkpoint/theta.safetensors")}


def snapshot(folder: str = ".") -> dict[str, bytes]:
    """All files, by path."""
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def records(run: str = "run", name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a record."""
    return [json.loads(line) for line in Path(run, name).read_text().splitlines()]
