"""``python -m meta_train.ablation``: what each part of `default` is worth on meta-validation; a table and its records.

Rows are those of ``configs/ablation.yaml``, or of a file of yours. What is to be meta-trained takes minutes a row on a
core, in a folder that the same command continues; ``--train-only`` ends there, so that processes can share the rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from l2o.checkpoints.store import load, save
from l2o.checks import lookup
from l2o.disk import atomic_write
from l2o.evaluation import Comparison, RuleEntrant, Store, baselines, comparisons, missing, run_jobs
from l2o.evaluation.scores import log_final
from l2o.types import L2OError, UpdateRule
from meta_train.config.build import make
from meta_train.config.compose import composed, config_path, main_guard, open_settings, writing
from meta_train.run.card import commit, hardware
from meta_train.suites import make_suite

Config = Mapping[str, Any]
_MUCH = 0.05
"""Difference of a problem's score from which it counts as better or worse."""
_USUAL = 1.1
"""Validation loss over tuned Adam's up to which it is as good."""


class Row(NamedTuple):
    """name: in the table.     source: what is evaluated.     settings: as in the configuration.
    folder: of the row's files; of its run, where it has one."""

    name: str
    source: str
    settings: Config
    folder: Path


def rows(config: Config, runs: Path) -> list[Row]:
    """Return all rows of the table, in order."""
    made = []
    for name, settings in config["rows"].items():
        folder = runs / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        made.append(Row(name, settings.get("source", str(folder / "checkpoint")), settings, folder))
    return made


def prepare(row: Row, config: Config) -> None:
    """Make the checkpoint of a row, but for one that is trained: meta-train it, or go on, or save what it starts from.

    Raises `L2OError` where meta-training fails or was stopped.
    """
    if "source" in row.settings or ("train" in row.settings and Path(row.source).exists()):
        return
    rule = {"controller": "alignment"} | row.settings.get("rule", {})
    said = ["experiment=default", *(f"rule.{key}={json.dumps(value)}" for key, value in rule.items())]
    if "train" not in row.settings:
        start = make(composed("train", open_settings(said, ["rule"]))["rule"], row.name, UpdateRule)
        save(row.source, start, start.init_theta(torch.Generator().manual_seed(0)))
        return
    length = row.settings.get("steps", config["steps"])
    said += [f"run={row.folder}", f"steps={length}", *config["common"], *row.settings["train"]]
    command = [sys.executable, "-m", "meta_train", *said]
    print(shlex.join(["python", *command[1:]]), flush=True)
    if status := subprocess.call(command):
        raise L2OError(f"meta-training of the row {row.name!r} ended with {status}; the same command goes on with it")


def compute(row: Row) -> dict[str, float]:
    """Return outer steps, inner steps and hours of a row's meta-training; zeros where there was none."""
    numbers = {"outer_steps": 0.0, "inner_steps": 0.0, "seconds": 0.0}
    for file, key in (("metrics", "inner_steps"), ("timing", "seconds")):
        path = row.folder / f"{file}.jsonl"
        if path.exists():
            last = json.loads(path.read_text("utf-8").splitlines()[-1])
            numbers |= {"outer_steps": float(last["step"]), key: float(last[key])}
    return numbers


def validate(found: Sequence[Row], config: Config, folder: Path) -> list[Comparison]:
    """Run all rows on meta-validation beside Adam at its best rate; curves are kept in ``folder``."""
    suite = make_suite(composed("evaluate", config["validation"]))
    entrants = {f"learned {row.name}": RuleEntrant(row.name, *load(row.source)) for row in found}
    every, store = {**entrants, **baselines(["adam"])}, Store(folder)
    for done in run_jobs(missing(suite, every, store), store, torch.device("cpu"), 1, lambda steps: None):
        print(f"{done.job}: {done.seconds:.0f} s", flush=True)
    return comparisons(suite, every, store)


def records(found: Sequence[Row], made: Sequence[Comparison], reference: str) -> list[dict[str, Any]]:
    """Return a record a row: its figures beside those of the row ``reference``."""
    base = f"learned {reference}"
    return [{"row": row.name, **compute(row), **_figures(made, f"learned {row.name}", base)} for row in found]


def _figures(comparisons: Sequence[Comparison], name: str, base: str) -> dict[str, Any]:
    """Figures of one optimizer.  score: see `_PAGE`; error: of its mean, over problems."""
    apart = np.array([log_final(c.scores[name]) - log_final(c.scores[base]) for c in comparisons])
    speed_ups = [c.speed_up(name) or 0.0 for c in comparisons]
    valid = [c.scores[name].valid.mean() / c.scores["adam"].valid.mean() for c in comparisons]
    return {
        "problems": len(comparisons),
        "reached": int(np.sum(np.array(speed_ups) > 0.0)),
        "speed_up": float(np.median(speed_ups)),
        "score": float(apart.mean()),
        "error": float(apart.std(ddof=1) / len(apart) ** 0.5),
        "better": int((apart < -_MUCH).sum()),
        "worse": int((apart > _MUCH).sum()),
        "validation": float(np.median(valid)),
        "as_good": int(np.sum(np.array(valid) <= _USUAL)),
        "finals": {c.setting.name: float(c.scores[name].mean) for c in comparisons},
    }


_PAGE = """# What each part of `default` is worth

`{command}`, {date}, commit {commit}; {hardware}, one thread a row.

{problems} problems of `experiment=meta_validation`, {steps} steps, {seeds} seeds; nothing of the suite. Speed-up: the
median beside the best of Adam's rates, a miss as 0. Score: mean over problems and seeds of `log(final / first + 1e-3)`,
minus that of the row "{reference}", and its standard error over problems; lower is better. Better, worse: problems on
which it differs by more than {much}. Validation: loss over tuned Adam's, median, and on how many it is at most {usual}.
Compute: outer steps, million inner steps, hours of a core shared with others.

{table}

Final training losses:

{finals}
"""


def page(made: Sequence[dict[str, Any]], about: Mapping[str, Any]) -> str:
    """Return the tables in Markdown."""
    heading = "| row | reached | speed-up | score | better, worse | validation | compute |\n|" + "---|" * 7
    problems = list(made[0]["finals"])
    losses = [f"| row | {' | '.join(problems)} |\n|" + "---|" * (len(problems) + 1)]
    losses += [f"| {r['row']} | {' | '.join(f'{x:.2g}' for x in r['finals'].values())} |" for r in made]
    return _PAGE.format(
        **about, much=_MUCH, usual=_USUAL, table="\n".join([heading, *map(_line, made)]), finals="\n".join(losses)
    )


def _line(r: Mapping[str, Any]) -> str:
    trained = f"{r['outer_steps']:.0f}, {r['inner_steps'] / 1e6:.2f}, {r['seconds'] / 3600:.1f}"
    cells = (
        r["row"],
        f"{r['reached']} of {r['problems']}",
        f"{r['speed_up']:.2f}",
        f"{r['score']:+.3f} ± {r['error']:.3f}",
        f"{r['better']}, {r['worse']}",
        f"{r['validation']:.2f}, {r['as_good']}",
        trained if r["outer_steps"] else "",
    )
    return f"| {' | '.join(cells)} |"


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    said = (__doc__ or "").partition(": ")[2]
    made = argparse.ArgumentParser(prog="python -m meta_train.ablation", description=said)
    made.add_argument("rows", nargs="*", metavar="ROW", help="of the table; all of them by default")
    made.add_argument("--config", type=Path, metavar="FILE", help="of rows (default configs/ablation.yaml)")
    made.add_argument("--runs", type=Path, default=Path("runs/ablation"), metavar="FOLDER", help="what is trained")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="for README.md and results.json (default RUNS/table)")
    made.add_argument("--train-only", action="store_true", help="meta-train the rows, and make no table")
    return made


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    from omegaconf import OmegaConf

    given = parser().parse_args(arguments)
    config: Any = OmegaConf.to_container(OmegaConf.load(given.config or Path(config_path()) / "ablation.yaml"))
    every = rows(config, given.runs)
    chosen = {lookup("row", name, {row.name: row for row in every}).name for name in given.rows}
    found = [row for row in every if not chosen or row.name in {*chosen, config["reference"]}]
    for row in found:
        prepare(row, config)
    if given.train_only:
        return
    out = given.out or given.runs / "table"
    command = shlex.join(["python", "-m", "meta_train.ablation", *(sys.argv[1:] if arguments is None else arguments)])
    done = validate(found, config, given.runs / "validation")
    setting, made = done[0].setting, records(found, done, config["reference"])
    about: dict[str, Any] = {"command": command, "date": datetime.date.today().isoformat(), "commit": commit()}
    about |= {"hardware": hardware(torch.device("cpu")), "reference": config["reference"]}
    about |= {"problems": len(done), "steps": setting.steps, "seeds": setting.seeds}
    with writing(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / "results.json", (json.dumps([about, *made], indent=1) + "\n").encode())
        atomic_write(out / "README.md", page(made, about).encode())
    print(f"table: {out / 'README.md'}")


@main_guard
def main() -> None:
    """Run the command."""
    run()


if __name__ == "__main__":
    main()
