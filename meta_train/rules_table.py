"""``python -m meta_train.rules_table``: what is known of every rule, computed; ``--out docs/rules.md``.

Exit status: 0 if everything is within tolerance, 1 if not.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

import l2o.rules
from l2o.checks import lookup
from l2o.disk import atomic_write, resource, user_path
from l2o.inspection.rules_table import GRADIENT_TOLERANCE, OUTER_STEPS, Replays, Row, cells, markdown, replays, row
from l2o.interop.traces import PARAMS_TOLERANCE, STEP_TOLERANCE
from l2o.types import ConfigurationError
from meta_train.config.compose import main_guard

COPIES = Path(__file__).resolve().parents[1] / "tests" / "golden"
"""In a checkout."""
_LINE = "{:<10} {:>9}  {:<22}  {:<11}  {:<11}  {}"

_TEXT = """# The rules

Written by `python -m meta_train.rules_table --out docs/rules.md`, which computes every cell; a test computes those
again that do not need all recorded runs. Each rule has the hyperparameters of its defaults.

- **replay**: of {runs} recorded runs of the public implementations ({copies} of them are in `tests/golden`), the
  largest error of a tensor's parameters in its largest value (tolerance {params:g}), and of its updates in the largest
  of them ({step:g}); `python -m meta_train.replay FILE.npz` shows each tensor.
- **TBPTT**: {outer} outer steps on a small perceptron, in float64. Each meta-gradient is finite and not 0; in brackets,
  how far the derivative of the meta-loss is from central differences, relative (tolerance {gradient:g}).
- **PES**: the same; in brackets, how far the first estimate of a pair, which is a difference along its noise, is from
  the derivative by backpropagation.
- **converts**: whose files `python -m meta_train.convert` turns into checkpoints of the rule: classes of the JAX
  originals, networks of PyLO. Which have been released, and where: [weights of others](converting.md).
- **plug-in**: steps of `l2o.LearnedOptimizer` and the same updates by hand give equal parameters, to the bit;
  by a kernel, which long runs take, but for rounding (a test has both).

{table}"""


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(
        prog="python -m meta_train.rules_table",
        description="Compute what is known of every rule: replays of recorded runs, meta-gradients, the plug-in.",
        epilog="Exit status 0 if everything is within tolerance, 1 if not.",
    )
    made.add_argument(
        "--golden",
        action="append",
        metavar="FOLDER",
        help="a folder of recorded runs, may be given several times; default: tests/golden, and then L2O_GOLDEN_DIR, "
        "whose files count where a name is in both; without either, what this version published",
    )
    made.add_argument("--only", action="append", metavar="RULE", help="this rule; may be given several times")
    made.add_argument("--out", metavar="FILE.md", help="write the document, instead of printing a table")
    return made


def run(arguments: Sequence[str] | None = None) -> int:
    """Compute and print or write; returns the exit status."""
    given = parser().parse_args(arguments)
    out = user_path(given.out, "out") if given.out else None
    table = {name: name for name in l2o.rules.__all__}
    names = sorted((lookup("rule", name, table) for name in given.only or table), key=str.lower)
    folders = [user_path(each) for each in given.golden] if given.golden is not None else _folders()
    for folder in folders:
        if not folder.is_dir():
            raise ConfigurationError(f"golden={str(folder)!r}: there is no such folder; name that of recorded runs")
    recorded = replays(folders) if folders else published()
    rows = [row(name, recorded) for name in names]
    if out:
        atomic_write(out, document(rows).encode())
    else:
        print_lines(rows)
        if not folders:
            print("replay: as published with this version; --golden FOLDER replays recorded runs")
    missing = [row.rule for row in rows if not row.passes]
    if missing:
        print(f"not within tolerance: {', '.join(missing)}")
    return 1 if missing else 0


def _folders() -> list[Path]:
    """Those that there are by default; one that the environment names has to exist, the copies only in a checkout."""
    copies = [COPIES] if COPIES.is_dir() else []
    return [*copies, *(user_path(named) for named in [os.environ.get("L2O_GOLDEN_DIR")] if named)]


def published() -> dict[str, Replays]:
    """Return what docs/rules.md, which a wheel has, says of the recorded runs, which it has not; by rule."""
    text = (resource(Path(__file__).resolve().parent, "docs") / "rules.md").read_text("utf-8")
    found = re.findall(r"^\| `(\w+)` .*? \| (\S+) / (\S+) \((\d+) runs?\) \|", text, re.M)
    return {rule: Replays(float(params), float(step), int(runs)) for rule, params, step, runs in found}


def print_lines(rows: Sequence[Row]) -> None:
    """Print a line for each rule: what the document has, but for words and names."""
    print(_LINE.format("rule", "size of θ", "replay", "TBPTT", "PES", "plug-in"))
    for each in rows:
        rule, _, size, replay, tbptt, pes, _, plugin = cells(each)
        print(_LINE.format(rule.strip("`"), size, replay, tbptt, pes, plugin))


def document(rows: Sequence[Row]) -> str:
    """Return the content of docs/rules.md."""
    return _TEXT.format(
        runs=sum(row.replays.runs for row in rows if row.replays),
        copies=len(list(COPIES.glob("*.npz"))),
        params=PARAMS_TOLERANCE,
        step=STEP_TOLERANCE,
        outer=OUTER_STEPS,
        gradient=GRADIENT_TOLERANCE,
        table=markdown(rows),
    )


@main_guard
def main() -> None:
    """Run the command."""
    raise SystemExit(run())


if __name__ == "__main__":
    main()
