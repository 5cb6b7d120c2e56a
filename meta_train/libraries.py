"""``python -m meta_train.libraries``: the plug-in in real libraries, each checked; ``--out docs/results/libraries.md``.

Exit status: 0 if all works that is installed, 1 if not.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence

import torch

import l2o.rules
from l2o.checks import lookup
from l2o.disk import atomic_write, user_path
from l2o.types import UpdateRule
from meta_train.config.compose import main_guard
from meta_train.library_checks.table import CHECKS, markdown, row
from meta_train.run.card import commit, hardware

_TEXT = """# In other libraries

Written by `python -m meta_train.libraries --out docs/results/libraries.md` on {date}, at commit {commit}
({hardware}). The same checks are tests.

Each trains a small network of an embedding, matrices, a convolution, vectors and a scalar, or a small language model:
parameters equal those of a plain loop in one process (to 1e-5 of the largest step of each tensor), and a run that was
saved and loaded goes on as if never stopped. Several processes: gloo, on one machine. "n rules": the shipped ones with
the hyperparameters of their defaults (18: and a `ByKind` of two).

{table}

- A rule that reads the loss takes it as a closure, `optimizer.step(lambda: loss)`, which Accelerate and Lightning pass
  on; `transformers.Trainer` passes no loss on. Under DDP pass the mean over the processes (each has to read the same
  number); under FSDP2 and `ZeroRedundancyOptimizer` it is taken for you.
- "full" is without gradient descent as a rule: torch asks for a tensor with axes in the state, which it does not have,
  nor `torch.optim.SGD` without momentum.
- FSDP1 keeps flat pieces of tensors, of which a rule cannot tell rows from columns: use `fully_shard`.
- Tensors that a rule takes as a whole only (orthogonalised ones) are sent to one process each, updated there, and sent
  back, in two messages a step of about 4 and 3 numbers an entry. One dimension of a mesh is sharded; tensor parallelism
  is an error.
"""


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(
        prog="python -m meta_train.libraries",
        description="Check the plug-in in the real libraries that are installed.",
        epilog="Exit status 0 if all works that is installed, 1 if not.",
    )
    made.add_argument("--only", action="append", metavar="LIBRARY", help="torch, say; may be given several times")
    made.add_argument("--out", metavar="FILE", help="Markdown file to write")
    return made


def shipped() -> dict[str, UpdateRule]:
    """Return every rule that stands by itself, with the hyperparameters of its defaults."""
    return {name: getattr(l2o.rules, name)() for name in l2o.rules.__all__}


def run(arguments: Sequence[str] | None = None) -> int:
    """Do what the command does; return its exit status."""
    options = parser().parse_args(arguments)
    out = None if options.out is None else user_path(options.out, "--out")
    for library in options.only or ():
        lookup("library", library, {check.library: check for check in CHECKS})
    rows = []
    for check in CHECKS:
        if options.only is None or check.library in options.only:
            rows.append(row(check, shipped()))
            print("  ".join(rows[-1]), flush=True)
    if out:
        machine = ", ".join(f"{name} {value}" for name, value in hardware(torch.device("cpu")).items())
        about = {"date": datetime.date.today().isoformat(), "commit": commit(), "hardware": machine}
        atomic_write(out, _TEXT.format(table=markdown(rows), **about).encode())
    return int(any(each[-1].startswith("**no**") for each in rows))


@main_guard
def main() -> None:
    """Run the command."""
    raise SystemExit(run())


if __name__ == "__main__":
    main()
