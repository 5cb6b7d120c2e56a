"""``python -m meta_train.list``: rules, task families, estimators and checkpoints, each with a line on what it is."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping

import l2o
from meta_train.config.compose import main_guard, wrapped


@main_guard
def main() -> None:
    """Run the command."""
    description = (__doc__ or "").partition(": ")[2]
    argparse.ArgumentParser(prog="python -m meta_train.list", description=description).parse_args()
    for title, lines in _lists().items():
        print(f"{title}\n")
        for name, what in lines.items():
            print(wrapped(f"  {name}: {what}", 6))
        print()


def _lists() -> dict[str, Mapping[str, str]]:
    cards = {name: l2o.read_card(name) for name in l2o.list_pretrained()}
    return {
        "Checkpoints, for l2o.LearnedOptimizer(params, NAME, total_steps=T)": {
            name: str(card.get("for", card["rule"])) for name, card in cards.items()
        },
        "Rules, l2o.rules": _classes(l2o.rules),
        "Task families, l2o.tasks": _classes(l2o.tasks),
        "Estimators, l2o.estimators": _classes(l2o.estimators),
    }


def _classes(package: object) -> dict[str, str]:
    """The first line of each listed class' docstring, by its name."""
    names: list[str] = package.__all__  # type: ignore[attr-defined]
    members = {name: getattr(package, name) for name in names}
    classes = {name: each for name, each in members.items() if isinstance(each, type)}
    return {name: (inspect.getdoc(each) or "").partition("\n")[0] for name, each in classes.items()}


if __name__ == "__main__":
    main()
