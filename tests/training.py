"""What the tests of the training command share: a small run, in this process, and what it leaves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import l2o
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


def command(*arguments: str, base: list[str] = SMALL, main: Callable[[], None] = main) -> int:
    """``python -m meta_train``: its exit status.  base: arguments that come first.  main: of another command."""
    before = sys.argv
    sys.argv = ["meta_train", *base, *arguments]
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    finally:
        sys.argv = before
    return 0


def status(main: Callable[[], None], *arguments: str) -> int:
    """The exit status of another command."""
    return command(*arguments, base=[], main=main)


def outcome(run: str = "run") -> dict[str, bytes]:
    """What has to be equal bit for bit."""
    files = {name: Path(run, name).read_bytes() for name in ("metrics.jsonl", "checkpoint/theta.safetensors")}
    best = Path(run, "best")
    if best.exists():
        l2o.load(best)  # θ and card belong together
        files["best/theta.safetensors"] = (best / "theta.safetensors").read_bytes()
        files["best/card.json"] = json.dumps(origin(best)).encode()
    return files


def origin(checkpoint: str | Path) -> dict[str, Any]:
    """What a card says of its outer step, and of the results there."""
    card = l2o.read_card(checkpoint)
    return {"step": card["compute"]["outer_steps"], **card["results"]}


def snapshot(folder: str = ".") -> dict[str, bytes]:
    """All files, by path."""
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def records(run: str = "run", name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a record."""
    return [json.loads(line) for line in Path(run, name).read_text().splitlines()]
