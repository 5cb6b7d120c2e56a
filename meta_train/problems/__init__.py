"""Small training problems as users write them, in plain PyTorch, by kind; ``PROBLEMS`` has all of them by name,
``SETS`` by when they were written."""

from meta_train.problems import (
    embeddings,
    functions,
    generative,
    images,
    physics,
    pictures,
    second,
    sequences,
    tables,
    third,
    words,
)
from meta_train.problems.common import PROBLEMS, Begun, Problem

__all__ = ["KINDS", "NOTES", "PROBLEMS", "SETS", "Begun", "Problem"]

KINDS = (embeddings, functions, generative, images, physics, pictures, second, sequences, tables, third, words)
"""The modules, each of which enters its problems as it is imported."""

NOTES = {
    "first": "These problems were looked at while `default` was chosen: they are no held-out test.",
    "second": "These problems were written by somebody who knew neither the rules nor what they miss, and held out "
    "until `steered-paced`. What it missed of them is what `own` of `Steered` is for: since then they are no held-out "
    "test.",
    "third": "These problems were written by somebody who knew neither the rules nor what they miss, and were run once "
    "`default` was chosen: a held-out test of it. They had a part in turning down `steered-mlp`, and chose nothing "
    "else.",
}
"""What a set of problems may say, by its name."""


def _set_of(problem: Problem) -> str:
    package = problem.make.__module__.removeprefix(f"{__name__}.").partition(".")[0]
    return package if package in NOTES else "first"


SETS = {name: {key: p for key, p in PROBLEMS.items() if _set_of(p) == name} for name in NOTES}
