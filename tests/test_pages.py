"""Every page's Python runs in the order of reading, and every documented command is one for zsh, too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from torch.optim.optimizer import register_optimizer_step_post_hook

from l2o.optim import LearnedOptimizer

DOCS = ROOT / "docs"
PAGES = [p for p in sorted(DOCS.rglob("*.md")) if "```python" in p.read_text("utf-8") and "results" not in p.parts]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md"), *(ROOT / "pretrained").rglob("*.md")]
LENGTHS = re.compile(r"\brange\(\d+\)")
COMMANDS = ("python ", "pip ", "make ", "torchrun ", "l2o ")


@pytest.mark.filterwarnings("ignore:::(lightning|torch|accelerate|transformers|peft)")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_the_code_of_a_page_runs(page: Path, here: Path) -> None:
    """In an empty folder, one block after the other; loops take three turns. An optimizer has taken steps."""
    text = page.read_text("utf-8")
    taken: list[type] = []
    counting = register_optimizer_step_post_hook(lambda optimizer, *_: taken.append(type(optimizer)))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for fence in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
        code = "\n" * (text[: fence.start()].count("\n") + 1) + LENGTHS.sub("range(3)", fence[1])
        if file := re.match(r"\s*# (\w+\.py)\n", code):  # which a command of the page runs
            Path(file[1]).write_text(code, "utf-8")
        else:
            exec(compile(code, str(page), "exec"), namespace)
    counting.remove()
    launched = [line for line in commands(text) if line.startswith("torchrun") and Path(line.split()[-1]).exists()]
    for line in launched:
        launch(line.split()[1:])
    assert LearnedOptimizer in taken or launched or ".step(" not in text


def launch(arguments: list[str]) -> None:
    """torchrun, of this environment and this checkout."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "torch.distributed.run", *arguments]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    losses = re.findall(r"rank \d: loss (\d+\.\d{4})", done.stdout)  # of which two may stand on one line
    assert losses
    assert all(float(loss) < 2.0 for loss in losses)


def commands(text: str) -> Iterator[str]:
    """Lines of shell blocks, and commands within sentences, as one line each."""
    for code in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S):
        yield from filter(None, map(str.strip, code.replace("\\\n", " ").splitlines()))
    sentences = re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.M | re.S)
    spans = (" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", sentences))
    yield from (span for span in spans if span.startswith(COMMANDS) and "..." not in span)


def read_otherwise(command: str) -> list[str]:
    """What zsh reads as patterns, expansions or words where a reader does not mean it: outside quotes."""
    bare = re.sub(r"'[^']*'|\"[^\"$`]*\"", "Q", command)
    return re.findall(r"[\[\]{}?*^()<>]| #|(?<= )~(?!/)", bare)


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("pip install l2o[train]", ["[", "]"]),
        ("pip install 'l2o[train]'", []),
        ("make demo   # says what", [" #"]),
        ('python -c "f(x)[0]"', []),
        ("python -m x 'a={b: 2}' c={d}", ["{", "}"]),
    ],
)
def test_what_zsh_reads_otherwise_is_found(command: str, found: list[str]) -> None:
    assert read_otherwise(command) == found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_are_for_zsh_too(document: Path) -> None:
    bad = {line: found for line in commands(document.read_text("utf-8")) if (found := read_otherwise(line))}
    assert not bad
