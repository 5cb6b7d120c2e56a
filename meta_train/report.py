"""``python -m meta_train.report run=runs/first``: pictures of meta-training; several runs: their comparison."""

from __future__ import annotations

import glob
import sys
from collections.abc import Sequence
from pathlib import Path

from l2o.disk import atomic_write, user_path
from l2o.evaluation.training_plots import Rows, column, training_png
from l2o.evaluation.verdicts import number
from l2o.extras import require
from l2o.types import ConfigurationError
from meta_train.config.compose import main_guard, writing
from meta_train.pictures import differing_settings, draw, read_rows

USAGE = """Pictures of meta-training: meta-loss, held-out loss, norm of the meta-gradient, lost lanes.

  python -m meta_train.report run=runs/first                     training.png in its folder
  python -m meta_train.report run=runs/first run=runs/second     each of them, and a picture of both
  python -m meta_train.report run='runs/sweep-*' out=sweep.png   likewise; out: the picture of all (runs.png)
"""


def run(arguments: Sequence[str]) -> None:
    """Draw what is named, and print a table of it."""
    if not arguments or set(arguments) & {"-h", "--help"}:
        print(USAGE, end="")
        return
    patterns, out = _parsed(arguments)
    require("matplotlib")
    folders = _folders(patterns)
    rows = {name: read_rows(folder) for name, folder in folders.items()}
    for folder in folders.values():
        print(f"picture: {draw(folder)}")
    if len(folders) > 1:
        with writing(out):
            atomic_write(out, training_png(rows))
        print(f"all:     {out}\n")
        for key, values in differing_settings(folders).items():
            print(f"{key}: " + ", ".join(f"{value!r} in {name}" for name, value in values.items()))
    for name, each in rows.items():
        print(f"{name}: {_summary(each)}")


def _parsed(arguments: Sequence[str]) -> tuple[list[str], Path]:
    """The patterns of ``run=`` and the file of ``out=``."""
    said: dict[str, list[str]] = {"run": [], "out": ["runs.png"]}
    for argument in arguments:
        key, mark, value = argument.partition("=")
        if key not in said or not mark or not value:
            raise ConfigurationError(f"{argument!r}: expected run=FOLDER, several times, or out=FILE.png")
        said[key].append(value)
    if not said["run"]:
        raise ConfigurationError("run= is missing: name the folder of a run, as in run=runs/first")
    out = user_path(said["out"][-1], "out")
    if out.suffix != ".png":
        raise ConfigurationError(f"out={str(out)!r}: expected the name of a .png file")
    return said["run"], out


def _folders(patterns: Sequence[str]) -> dict[str, Path]:
    """Folders by their shortest names; a pattern may stand for several."""
    found: list[Path] = []
    for pattern in patterns:
        path = user_path(pattern, "run")
        found += [path] if path.exists() else [Path(each) for each in sorted(glob.glob(str(path)))] or [path]
    unique = list(dict.fromkeys(found))
    short = [path.name for path in unique]
    return {p.name if short.count(p.name) == 1 else str(p): p for p in unique}


def _summary(rows: Rows) -> str:
    """How far a run is, and how good it was at its best."""
    steps, losses = column(rows, "meta_loss")
    text = f"{int(steps[-1]):,} outer steps, meta-loss {number(float(losses[-1]))}"
    at, held_out = column(rows, "held_out_loss")
    if len(at) and (held_out == held_out).any():
        best = min(range(len(at)), key=lambda i: (held_out[i] != held_out[i], held_out[i]))
        text += f", best held-out loss {number(float(held_out[best]))} at {int(at[best]):,}"
    skipped = int((column(rows, "update_skipped")[1] > 0).sum())
    masked = int(column(rows, "lanes_masked")[1].sum())
    return f"{text}; {masked:,} lanes masked, {skipped:,} steps skipped"


@main_guard
def main() -> None:
    """Run the command."""
    run(sys.argv[1:])


if __name__ == "__main__":
    main()
