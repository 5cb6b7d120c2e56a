"""``python -m meta_train.inspect NAME``: what a rule does: momentum, schedule, clipping, decay.

NAME is a checkpoint, as ``l2o.load`` takes it, or a rule of `l2o.rules` such as ``Adam``, with θ as it is initialised.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from l2o.checkpoints.store import known_rules, load
from l2o.checks import check_seed, lookup
from l2o.disk import atomic_write, user_path
from l2o.evaluation.report import prepare_folder
from l2o.extras import require
from l2o.inspection.experiments import ADAM_LR, Inspection, inspect
from l2o.inspection.findings import Finding, findings
from l2o.inspection.plots import inspection_png
from l2o.tasks import ImageConv, ImageMLP, Quadratic
from l2o.types import ConfigurationError, TaskFamily, Theta, UpdateRule
from meta_train.config.build import import_classes
from meta_train.config.compose import main_guard, resolve_device, wrapped

TASKS: dict[str, type[TaskFamily]] = {"digits_mlp": ImageMLP, "digits_conv": ImageConv, "quadratic": Quadratic}
_ROWS = 5
"""Of the table of effective learning rates."""


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(
        prog="python -m meta_train.inspect",
        description="What a rule does, as a picture and in words: momentum, schedule, effective learning rate, "
        "clipping, decay, and which of its inputs it heeds. Measured on a short run of its own.",
    )
    made.add_argument("source", metavar="NAME", help="a pretrained name, a path, or a rule of l2o.rules such as Adam")
    made.add_argument(
        "--rules", action="append", default=[], metavar="MODULE.CLASS", help="your own rule; may be given several times"
    )
    made.add_argument("--task", default="digits_mlp", help=f"what is trained: {', '.join(TASKS)}")
    made.add_argument("--steps", type=int, default=100, help="length of the run, also what the rule is told (100)")
    made.add_argument("--lanes", type=int, default=4, help="tasks that are trained side by side (4)")
    made.add_argument("--seed", type=int, default=0, help="of tasks, batches, and of θ where NAME is a rule (0)")
    made.add_argument("--device", default="cpu", help="cpu, cuda or auto (cpu)")
    made.add_argument("--out", metavar="FILE.png", help="the picture (inspect-NAME.png)")
    return made


def run(arguments: Sequence[str] | None = None) -> None:
    """Inspect, write the picture and print what was found."""
    given = parser().parse_args(arguments)
    require("matplotlib")
    family = lookup("task", given.task, TASKS)()
    generator = torch.Generator(resolve_device(given.device)).manual_seed(check_seed("seed", given.seed))
    rule, theta = find(given.source, import_classes(given.rules, "rules", UpdateRule), given.seed)
    out = user_path(given.out or f"inspect-{Path(given.source).name}.png", "out")
    if out.suffix.lower() != ".png":
        raise ConfigurationError(f"out={str(out)!r}: expected the name of a .png file")
    prepare_folder(out.parent)
    theta = {name: t.to(generator.device) for name, t in theta.items()}
    inspection = inspect(rule, theta, family, given.steps, generator, given.lanes)
    atomic_write(out, inspection_png(inspection, f"{given.source} on {given.task}, {given.steps} steps"))
    print(wrapped(f"{given.source}: {rule!r}, on {given.task}, {given.steps} steps", 2) + "\n")
    print_findings(findings(inspection))
    print_rates(inspection)
    print_sensitivity(inspection)
    print(f"picture: {out}")


def find(source: str, rules: Sequence[type[UpdateRule]], seed: int) -> tuple[UpdateRule, Theta]:
    """Find a rule by the name of its class, with θ as it is initialised, or a checkpoint."""
    known = known_rules(rules)
    if source not in known:
        return load(source, rules=rules)
    rule = known[source]()
    return rule, rule.init_theta(torch.Generator().manual_seed(seed))


def print_findings(found: Sequence[Finding]) -> None:
    """Print a line each."""
    width = max(len(f.answer) for f in found)
    for f in found:
        print(wrapped(f"{f.topic:<10} {f.answer:<{width}} {f.number:>9.3g}  {f.sentence}", 10 + width + 13))


def print_rates(inspection: Inspection) -> None:
    """Print effective learning rates at a few steps, beside Adam's."""
    columns = ("step", "loss", "rms(u)/rms(g)", "-<u,g>/<g,g>", f"Adam, lr {ADAM_LR:g}", "-<u,g>/<g,g>")
    print(f"\n{columns[0]:>5}" + "".join(f"{column:>15}" for column in columns[1:]))
    run, adam = inspection.run, inspection.adam
    last = len(run.losses) - 1
    for step in dict.fromkeys(round(i * last / (_ROWS - 1)) for i in range(_ROWS)):
        values = (run.losses[step].mean(), run.rates[step], run.descent[step], adam.rates[step], adam.descent[step])
        print(f"{step:>5}" + "".join(f"{float(value):>15.3g}" for value in values))


def print_sensitivity(inspection: Inspection) -> None:
    """Print inputs, the strongest first."""
    print("\ninput               relative change of the update over that of the input")
    for name, value in sorted(inspection.sensitivity.items(), key=lambda item: -item[1]):
        print(f"{name:<19} {value:.3g}")
    print()


@main_guard
def main() -> None:
    """Run the command."""
    run()


if __name__ == "__main__":
    main()
