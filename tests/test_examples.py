"""The examples and notebooks run, and the line at the end is true of the figures before it."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

EXAMPLES = ROOT / "examples"
SCRIPTS = [path for path in sorted(EXAMPLES.glob("*.py")) if path.stem != "compare"]
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
RESULT = re.compile(r"^(.+?) +training (\S+), validation (\S+), seconds", re.M)
WINNER = re.compile(r"^(.+) has the lower (\w+) loss; one run each, seed 0, nothing tuned\.$", re.M)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_says_who_ends_lower(
    script: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script.name, "--steps", "60"])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    found = {name: {"training": float(t), "validation": float(v)} for name, t, v in RESULT.findall(said)}
    assert {"default", "AdamW 0.001"} <= found.keys()
    assert found["default"]["training"] < found["AdamW 0.001"]["training"]
    winners = {kind: name for name, kind in WINNER.findall(said)}
    assert winners.keys() == {"training", "validation"}
    for kind, name in winners.items():
        assert found[name][kind] == min(result[kind] for result in found.values())


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_is_kept_without_outputs(
    notebook: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    read = nbformat.read(notebook, as_version=4)
    nbformat.validate(read)
    cells = [cell for cell in read.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    NotebookClient(read, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(here)}}).execute()
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert re.search(r"default: training 0\.\d+, validation", printed)


def test_what_is_listed_is_there() -> None:
    listed = re.findall(r'"examples/(\w+\.py)"', (ROOT / "docs" / "examples.md").read_text("utf-8"))
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert {path.stem for path in NOTEBOOKS} == {"use", "meta_train"}
