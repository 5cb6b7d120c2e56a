"""``l2o COMMAND ...`` and ``python -m l2o COMMAND ...``: those of ``python -m meta_train`` for users."""

from __future__ import annotations

import importlib
import sys

from meta_train import begin

COMMANDS = {
    "train": "meta-train a learned optimizer; the same command with the same run= goes on",
    "evaluate": "compare optimizers, learned or not, on a suite or a task; writes a report",
    "inspect": "tell what a learned optimizer does, by experiments on it",
    "report": "draw runs of meta-training",
    "landscape": "draw the paths of optimizers over contours",
    "convert": "make a checkpoint of the released weights of another project",
    "replay": "repeat recorded runs of public learned optimizers",
    "bench": "measure how fast this machine meta-trains and steps",
    "gpu": "check and measure a GPU",
    "list": "name rules, task families, estimators and checkpoints",
}


def main() -> None:
    """Run the command."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        print(_usage())
        return
    begin(f"l2o {name}")
    from l2o.checks import unknown

    if name not in COMMANDS:
        print(f"error: {unknown('command', name, COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"l2o {name}", *sys.argv[2:]]
    from meta_train.config.compose import EXTRA, INSTALL

    try:
        command = importlib.import_module(f"meta_train.{name}")
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] not in EXTRA:
            raise
        sys.exit(f"error: {error.name} is not installed; the commands need: {INSTALL}")
    command.main()


def _usage() -> str:
    lines = [f"  l2o {name:<10} {what}" for name, what in COMMANDS.items()]
    head, tail = "Meta-train, ship, use and judge learned optimizers.\n", "\nl2o COMMAND --help says more."
    return "\n".join([head, *lines, tail])
