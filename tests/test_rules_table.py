"""docs/rules.md is what its command would write, and what it claims of each rule is so."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from conftest import ROOT
from torch import Tensor
from training import status

import l2o.interop.pylo
from l2o import rules
from l2o.inspection.rules_table import (
    GRADIENT_TOLERANCE,
    Replays,
    Row,
    backprop_error,
    cells,
    converts,
    evolution_error,
    plugin_error,
    replays,
    row,
    source,
)
from l2o.interop.references import REFERENCES
from l2o.interop.traces import PARAMS_TOLERANCE, STEP_TOLERANCE, read_trace
from l2o.rules import SGD, VeLO
from l2o.types import Grads, OptState, Params, Run, Theta, UpdateRule
from meta_train import rules_table as command

GOLDEN = ROOT / "tests" / "golden"
DOCUMENT = (ROOT / "docs" / "rules.md").read_text("utf-8")
LINES = [line[2:-2].split(" | ") for line in DOCUMENT.splitlines() if line.startswith("| `")]
TABLE = {line[0].strip("`"): line for line in LINES}
KNOWN = Row("SGD", "what", 1, Replays(1e-7, 1e-6, 2), 1e-9, 1e-9, (), 0.0)


def test_the_document_has_every_rule() -> None:
    assert list(TABLE) == sorted(rules.__all__, key=str.lower)


@pytest.mark.parametrize("name", rules.__all__)
def test_a_line_of_the_document_is_so(name: str) -> None:
    """All but the recorded runs is computed again; errors to rounding, so that other machines agree."""
    found = row(name, {})
    assert found.passes
    _, what, size, _, tbptt, pes, converted, plugin = TABLE[name]
    assert cells(found)[1:3] == (what, size)
    assert cells(found)[6:] == (converted, plugin)
    assert re.fullmatch(r"yes \(\de[-+]\d\d\)", tbptt)
    assert re.fullmatch(r"yes \(\de[-+]\d\d\)", pes)


def test_the_recorded_runs_of_the_document_are_within_tolerance_and_include_the_copies() -> None:
    copies: dict[str, int] = {}
    for path in GOLDEN.glob("*.npz"):
        name = type(read_trace(path).rule).__name__
        copies[name] = copies.get(name, 0) + 1
    for name, line in TABLE.items():
        if name not in copies:
            assert line[3] == "not recorded"
            continue
        params, step, runs = re.fullmatch(r"(\S+) / (\S+) \((\d+) runs?\)", line[3]).groups()  # type: ignore[union-attr]
        assert float(params) <= PARAMS_TOLERANCE
        assert float(step) <= STEP_TOLERANCE
        assert int(runs) >= copies[name]


def test_replays_are_counted_by_rule_and_a_later_folder_replaces_a_file(tmp_path) -> None:
    for name in ("mlp_lopt", "learnable_adam", "learnable_adam_bigeps"):
        (tmp_path / f"{name}.npz").write_bytes((GOLDEN / f"{name}.npz").read_bytes())
    found = replays([tmp_path, tmp_path])
    assert {name: r.runs for name, r in found.items()} == {"MLP": 1, "Adam": 2}
    assert all(0.0 < r.params <= PARAMS_TOLERANCE and 0.0 < r.step <= STEP_TOLERANCE for r in found.values())


@dataclasses.dataclass(frozen=True)
class Doubled(SGD):
    """Right values, a derivative twice as large."""

    def step(self, theta: Theta, grad: Tensor, slots: dict[str, Tensor]) -> Tensor:
        update = super().step(theta, grad, slots)
        return 2.0 * update - update.detach()


@dataclasses.dataclass(frozen=True)
class Constant(SGD):
    """θ has no part in it."""

    def step(self, theta: Theta, grad: Tensor, slots: dict[str, Tensor]) -> Tensor:
        return -0.01 * grad + 0.0 * theta["log_lr"]


def test_a_wrong_derivative_is_found() -> None:
    assert backprop_error(SGD()) < GRADIENT_TOLERANCE
    assert evolution_error(SGD()) < GRADIENT_TOLERANCE
    assert backprop_error(Doubled()) > 0.3
    assert evolution_error(Doubled()) > 0.3


@pytest.mark.parametrize("check", [backprop_error, evolution_error])
def test_a_meta_gradient_of_zero_is_found(check) -> None:
    assert check(Constant()) == math.inf


@dataclasses.dataclass(frozen=True)
class Impure(UpdateRule):
    """Not a function of its inputs: every second update is another one."""

    calls: list[int] = dataclasses.field(default_factory=list)

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"lr": torch.tensor(0.1)}

    def init(self, theta: Theta, params: Params, infos) -> OptState:
        return OptState({name: {} for name in params}, {})

    def update(self, theta, grads: Grads, state: OptState, params: Params, infos, run: Run, reduce=None):
        self.calls.append(1)
        return {name: -theta["lr"] * g * (len(self.calls) % 2) for name, g in grads.items()}, state


def test_a_plug_in_that_steps_otherwise_is_found() -> None:
    assert plugin_error(SGD()) == 0.0
    assert plugin_error(Impure()) > 0.01


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        ({}, True),
        ({"replays": None}, True),
        ({"replays": Replays(2e-5, 0.0, 1)}, False),
        ({"replays": Replays(0.0, math.nan, 1)}, False),
        ({"tbptt": math.inf}, False),
        ({"pes": 1e-3}, False),
        ({"pes": math.nan}, False),
        ({"plugin": 1e-7}, False),
    ],
)
def test_what_is_over_a_tolerance_does_not_pass(change: dict, passes: bool) -> None:
    assert KNOWN._replace(**change).passes == passes


def test_cells_say_no() -> None:
    bad = KNOWN._replace(source="a | b, arXiv 1412.6980", tbptt=math.inf, pes=0.5, plugin=0.25)
    _, what, _, replayed, tbptt, pes, converted, plugin = cells(bad)
    assert what == r"a \| b, [arXiv 1412.6980](https://arxiv.org/abs/1412.6980)"
    assert replayed == "1e-07 / 1e-06 (2 runs)"
    assert (tbptt, pes, converted, plugin) == ("no (inf)", "no (5e-01)", "-", "no (2e-01)")


def test_what_converts_is_in_the_tables_of_the_converter() -> None:
    assert l2o.interop.pylo.ORIGINALS.keys() == l2o.interop.pylo._NETWORKS.keys()
    assert set(l2o.interop.pylo.ORIGINALS.values()) <= REFERENCES.keys()
    listed = [name for rule in rules.__all__ for name in converts(getattr(rules, rule))]
    assert sorted(listed) == sorted([*REFERENCES, *(f"PyLO {network}" for network in l2o.interop.pylo.ORIGINALS)])
    assert converts(VeLO) == ("HyperV2", "PyLO VeLORNN", "PyLO VeLOMLP")
    assert source(VeLO).startswith("VeLO (Metz et al. 2022, arXiv 2211.09760)")


def test_the_command_prints_a_line_or_writes_the_document(here, capsys) -> None:
    arguments = ["--only", "SGD", "--golden", str(GOLDEN)]
    assert command.run(arguments) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["rule", "SGD"]
    assert max(map(len, said)) <= 80
    assert command.run([*arguments, "--out", "rules.md"]) == 0
    assert capsys.readouterr().out == ""
    written, committed = (text.partition("\n| ")[0] for text in ((here / "rules.md").read_text("utf-8"), DOCUMENT))
    assert re.sub(r"of \d+ recorded", "", written) == re.sub(r"of \d+ recorded", "", committed)


def test_without_recorded_runs_the_published_ones_count(capsys, monkeypatch) -> None:
    """As in a wheel; a row has them as the document does."""
    monkeypatch.setattr(command, "_folders", list)
    assert command.run(["--only", "VeLO", "--only", "AdaGrad"]) == 0
    said = capsys.readouterr().out
    assert "as published with this version" in said
    assert TABLE["VeLO"][3] in said
    assert {name for name, line in TABLE.items() if line[3] != "not recorded"} == set(command.published())
    assert max(map(len, said.splitlines())) <= 80


def test_the_command_fails_where_a_rule_does(monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "row", lambda name, recorded: KNOWN._replace(pes=math.inf))
    assert command.run(["--only", "SGD", "--golden", str(GOLDEN)]) == 1
    assert "not within tolerance: SGD" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "SDG"], "unknown rule 'SDG', did you mean 'SGD'"),
        (["--only", "SGD", "--golden", "nowhere"], "golden='nowhere': there is no such folder"),
    ],
)
def test_bad_input_is_one_line(here, capsys, arguments: list[str], message: str) -> None:
    assert status(command.main, *arguments) == 2
    assert message in capsys.readouterr().err
