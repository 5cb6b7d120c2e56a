"""``python -m meta_train.replay FILE.npz …``: repeat recorded runs of public learned optimizers by the rules of l2o.

Each file is rebuilt from its own metadata and θ (`l2o.interop.traces` says what it holds); the largest errors of each
tensor are printed. Exit status: 0 all within tolerance, 1 not, 2 a file cannot be replayed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from l2o.interop.traces import PARAMS_TOLERANCE, STEP_TOLERANCE, TensorError, read_trace, replay
from l2o.types import L2OError
from meta_train.config.compose import main_guard, wrapped

_COLUMNS = "{:<26} {:>16} {:>8} {:>8}  {}"
_NAME = 26


def run(arguments: Sequence[str] | None = None) -> int:
    """Replay and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m meta_train.replay",
        description="Replay recorded runs of public learned optimizers.",
        epilog=f"Errors: of the parameters after each update, in the tensor's largest value then (tolerance "
        f"{PARAMS_TOLERANCE:g}); of the updates, in the largest of them ({STEP_TOLERANCE:g}). Exit status 0 if all are "
        "within tolerance, 1 if not, 2 if a file cannot be replayed.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE.npz")
    return max(_replay_file(path) for path in parser.parse_args(arguments).files)


def _replay_file(path: str) -> int:
    try:
        trace = read_trace(path)
    except L2OError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    errors = replay(trace)
    print(wrapped(f"{path}: {trace.rule!r}, {len(trace.losses)} updates", 2))
    _print_table(errors)
    return 0 if all(error.within for error in errors) else 1


def _print_table(errors: Sequence[TensorError]) -> None:
    print(_COLUMNS.format("tensor", "shape", "params", "step", "").rstrip())
    for error in errors:
        verdict = "" if error.within else "over tolerance"
        numbers = (f"{error.params:.1e}", f"{error.step:.1e}")
        name = error.tensor
        if len(name) > _NAME:  # a line of its own
            print(name)
            name = ""
        print(_COLUMNS.format(name, str(error.shape), *numbers, verdict).rstrip())


@main_guard
def main() -> None:
    """Run the command."""
    sys.exit(run())


if __name__ == "__main__":
    main()
