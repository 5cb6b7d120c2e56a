"""The plug-in in real libraries: the checks of ``python -m meta_train.libraries``, over rules and their variants."""

from __future__ import annotations

import os

import pytest
import torch
from plugin import Mixing
from tables import RULES

from l2o.types import UnknownNameError
from meta_train import libraries
from meta_train.library_checks import processes
from meta_train.library_checks.table import CHECKS, Check, markdown, row

EVERY = {**RULES, "Mixing": Mixing()}
FEW = {name: RULES[name] for name in ("MLP", "AdafacMLP", "Celo2", "RNNMLP", "Steered")}
VARIED = ("fully_sharded", "zero_redundancy")
"""Checks in several processes that run over variants, too."""
SHARDED = {check.function.__name__: check for check in CHECKS if check.processes == 2}  # type: ignore[union-attr]

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning"),  # Lightning's
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's
]


def single() -> list[object]:
    """A row for each check in one process and rule; few rules where the settings are what differs."""
    return [
        pytest.param(check, rule, id=f"{i} {check.library} {rule}".strip())
        for i, check in enumerate(CHECKS)
        if check.processes == 1
        for rule in check.rules(FEW if check.settings else EVERY) or [""]
    ]


@pytest.mark.parametrize(("check", "rule"), single())
def test_it_works_in(check: Check, rule: str) -> None:
    function, arguments = check.jobs(EVERY)[rule]
    function(*arguments)


def jobs(name: str) -> dict[str, processes.Job]:
    """Of a check in two processes, over few rules where it says the same of more of them."""
    return {f"{name} {rule}": job for rule, job in SHARDED[name].jobs(EVERY if name in VARIED else FEW).items()}


EACH = {key: job for name in SHARDED for key, job in jobs(name).items()}


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What the checks in two processes say, which start once for all of them."""
    return processes.in_processes(EACH)


@pytest.mark.xdist_group("processes")
@pytest.mark.skipif(os.name != "posix", reason="gloo")
@pytest.mark.parametrize("name", EACH)
def test_it_works_in_two_processes(said: dict[str, str], name: str) -> None:
    assert not said[name]


@pytest.mark.xdist_group("processes")
@pytest.mark.skipif(os.name != "posix", reason="gloo")
def test_it_works_in_four_processes() -> None:
    (check,) = [check for check in CHECKS if check.processes == 4]
    assert not any(processes.in_processes(check.jobs(EVERY), 4).values())


def fails(rule: object) -> None:
    raise ValueError(f"not with {type(rule).__name__}")


@pytest.mark.parametrize(
    ("check", "cells"),
    [
        (Check("torch", "a", lambda rule: None), [torch.__version__, "a", "yes (SGD, Adam)"]),
        (Check("torch", "a|b", fails), [torch.__version__, r"a\|b", "**no**: SGD ValueError: not with SGD; Adam Val"]),
        (Check("no-such-library", "a", "trainers.low_rank"), ["", "a", "not installed"]),
    ],
)
def test_the_table_says_what_works(check: Check, cells: list[str]) -> None:
    line = markdown([row(check, {name: RULES[name] for name in ("SGD", "Adam")})]).splitlines()[-1]
    assert line.startswith(f"| {check.library} | {' | '.join(cells)}")


def test_a_library_that_has_no_check_is_named() -> None:
    with pytest.raises(UnknownNameError, match="unknown library 'lightnin', did you mean 'lightning'"):
        libraries.run(["--only", "lightnin"])


def test_the_command_writes_the_table(tmp_path, capsys) -> None:
    assert libraries.run(["--only", "peft", "--out", str(tmp_path / "table.md")]) == 0
    assert "LoRA | yes |" in (tmp_path / "table.md").read_text()
    assert "LoRA  yes" in capsys.readouterr().out
