"""``python -m meta_train.landscape default light``: the paths of optimizers over contours, as a picture and a film."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from l2o.checkpoints.store import load
from l2o.checks import check_seed, lookup
from l2o.disk import atomic_write, user_path
from l2o.evaluation import Baseline, Entrant, RuleEntrant
from l2o.evaluation.landscape import LANDSCAPES, landscape_gif, landscape_paths, landscape_png, network_paths
from l2o.evaluation.plots import COLOURS, LEARNED_COLOURS
from l2o.evaluation.report import prepare_folder
from l2o.extras import require
from l2o.rules import SGD, Adam, Momentum
from l2o.tasks import ImageMLP
from l2o.types import UpdateRule
from meta_train.config.build import import_classes
from meta_train.config.compose import main_guard

NETWORK = "network"
"""Among the tasks, a small perceptron on digits."""
USUAL: dict[str, Entrant] = {
    "sgd": Baseline("SGD 0.1", SGD(), (0.1,)),
    "momentum": Baseline("momentum 0.01", Momentum(), (0.01,)),
    "adam": Baseline("Adam 0.05", Adam(), (0.05,)),
}
"""Drawn beside the learned ones: textbook rates, since nothing is judged by a picture."""


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(
        prog="python -m meta_train.landscape",
        description="Paths of optimizers over functions of two parameters, and over a slice through the loss of a "
        "network, beside SGD, momentum and Adam at textbook rates. A picture shows how they move; what they are worth "
        "says meta_train.evaluate.",
    )
    made.add_argument("sources", nargs="*", default=["default"], metavar="NAME", help="pretrained names or paths")
    made.add_argument("--task", action="append", metavar="TASK", help=f"of {', '.join([*LANDSCAPES, NETWORK])} (all)")
    made.add_argument("--rules", action="append", default=[], metavar="MODULE.CLASS", help="your own rule")
    made.add_argument("--steps", type=int, default=200, help="length of the runs (200)")
    made.add_argument("--seed", type=int, default=0, help="of the functions and the starts (0)")
    made.add_argument("--out", default="landscapes", metavar="FOLDER", help="where the pictures go (landscapes)")
    return made


def run(arguments: Sequence[str] | None = None) -> None:
    """Walk, then write ``landscape.png``, ``landscape.gif`` and ``network.png``."""
    given = parser().parse_args(arguments)
    require("matplotlib")
    known = dict.fromkeys([*LANDSCAPES, NETWORK], True)
    tasks = given.task or list(known)
    for task in tasks:
        lookup("task", task, known)
    classes = import_classes(given.rules, "rules", UpdateRule)
    ours: dict[str, Entrant] = {name: RuleEntrant(name, *load(name, rules=classes)) for name in given.sources}
    out = user_path(given.out, "out")
    prepare_folder(out)
    entrants = {**ours, **USUAL}
    colours = {e.label: COLOURS[i] for i, e in enumerate(USUAL.values())}
    colours |= {e.label: LEARNED_COLOURS[i % len(LEARNED_COLOURS)] for i, e in enumerate(ours.values())}
    start = check_seed("seed", given.seed)
    flat = [landscape_paths(task, entrants, given.steps, start) for task in tasks if task != NETWORK]
    if flat:
        atomic_write(out / "landscape.png", landscape_png(flat, colours))
        atomic_write(out / "landscape.gif", landscape_gif(flat, colours))
        print(f"picture: {out / 'landscape.png'}\nfilm:    {out / 'landscape.gif'}")
    if NETWORK in tasks:
        found = network_paths(ImageMLP(width=16, half="meta_test"), entrants, given.steps, start)
        atomic_write(out / "network.png", landscape_png([found], colours))
        print(f"network: {out / 'network.png'}")


@main_guard
def main() -> None:
    """Run the command."""
    run()


if __name__ == "__main__":
    main()
