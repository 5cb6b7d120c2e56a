"""Every code block of the README runs, as it stands but for its length."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from torch import nn

from l2o.checkpoints import remote
from l2o.evaluation.markdown import results_block
from meta_train import documents, evaluate, sweep
from meta_train.config.compose import TRAINING, config_path, open_settings
from meta_train.convert import parser

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.finditer(r"^```(\w+)\n(.*?)^```", TEXT, re.M | re.S)
BLOCKS = [(fence[1], fence[2], TEXT[: fence.start()].count("\n") + 1) for fence in FENCES]
SETUP = {"make demo", "make test"}
SHORT = {
    "meta_train": ["steps=2", "evaluate_every=0", "logger=none", "estimator.lanes=2"],
    "meta_train.evaluate": ["steps=10", "seeds=2", "cost=false"],
    "meta_train.inspect": ["--steps", "30", "--lanes", "1"],
}


def test_every_block_runs_in_the_order_of_reading(tmp_path, monkeypatch):
    """One after the other in one folder, as blocks build on those before."""
    model = nn.Linear(3, 1)
    model(torch.randn(8, 3)).square().mean().backward()
    namespace = {"__name__": "__main__", "model": model}
    monkeypatch.chdir(tmp_path)
    for kind, code, line in BLOCKS:
        if kind == "python":
            run_python(code, line, namespace)
        elif kind == "bash":
            run_commands(code, line)
    assert not list(tmp_path.glob("**/*.tmp"))


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLES = [
    (path, block[1], block[2])
    for path in DOCUMENTS
    for block in re.finditer(
        r"<!-- table of (\S+) -->\n(.*?)<!-- end of table -->", path.read_text(encoding="utf-8"), re.S
    )
]


@pytest.mark.parametrize(("document", "results", "shown"), TABLES, ids=lambda value: getattr(value, "name", None))
def test_tables_of_results_are_those_of_the_records(document, results, shown):
    """What a document shows is made of the file that it names: `results_block` prints what has to stand there."""
    assert shown.strip() == results_block(json.loads((ROOT / results).read_text(encoding="utf-8")))


def test_there_are_tables_of_results():
    assert TABLES


def run_python(code, line, namespace):
    for name in re.findall(r"^# (\w+\.py)", code):  # a file that commands further down import
        Path(name).write_text(code, encoding="utf-8")
        return
    exec(compile(re.sub(r"range\(\d+\)", "range(3)", code), f"README.md, line {line}", "exec"), namespace)
    if "optimizer" in code and "optimizer" in namespace:
        namespace["optimizer"].step()


def run_commands(code, line):
    for text in code.replace("\\\n", " ").splitlines():
        words = shlex.split(text, comments=True)
        if not words or " ".join(words) in SETUP:
            continue
        assert words[:2] == ["python", "-m"], f"line {line}: no test knows how to run {text}"
        command = [sys.executable, *words[1:], *SHORT[words[2]]]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"


DOCUMENTS = {
    f"{path.name}: {line}": shlex.split(line)
    for path in sorted((ROOT / "docs").glob("*.md"))
    for code in re.findall(r"^```bash\n(.*?)^```", path.read_text("utf-8"), re.M | re.S)
    for line in code.replace("\\\n", " ").splitlines()
    if not line.startswith(("pip install ", "python examples/"))  # the first are for users; tests run the others
}


@pytest.mark.parametrize("words", DOCUMENTS.values(), ids=DOCUMENTS)
def test_the_commands_of_the_documents_are_read(words):
    """They want a network, a cluster or hours: what they say is understood, as far as that goes without."""
    assert words[0] == "torchrun" or words[:2] == ["python", "-m"]
    module, *arguments = words[words.index("-m") + 1 :]
    if module == "meta_train.convert":
        addresses = parser().parse_args(arguments).files
        assert all(remote.parse_weights(address) for address in addresses)
        return
    if module == "meta_train.documents":
        assert documents.parser().parse_args(arguments).card
        return
    if module == "meta_train.sweep":
        assert sweep.parser().parse_args(arguments).shifts
        module, arguments = "meta_train", sweep.parser().parse_args(arguments).set
    read = {"meta_train": lambda words: open_settings(words, TRAINING), "meta_train.evaluate": evaluate.read}[module]
    one_of_a_sweep = [re.sub(r"=(\w+)(,\w+)+$", r"=\1", each) for each in arguments if each != "-m"]
    with initialize_config_dir(config_path(), version_base="1.3"):
        compose("evaluate" if module == "meta_train.evaluate" else "train", read(one_of_a_sweep))


def test_the_readme_has_both_set_up_commands_and_no_other_languages():
    assert {" ".join(line.split("#")[0].split()) for _, code, _ in BLOCKS for line in code.splitlines()} >= SETUP
    assert {kind for kind, _, _ in BLOCKS} <= {"python", "bash", "text"}


LENGTHS = {"class RandomRegression": 20, "class SignDescent": 20, "MetaTraining(": 30}


@pytest.mark.parametrize(("marker", "limit"), LENGTHS.items(), ids=LENGTHS)
def test_the_examples_are_as_short_as_they_say(marker, limit):
    (code,) = [code for _, code, _ in BLOCKS if marker in code]
    assert len([line for line in code.splitlines() if line.strip()]) < limit


def test_the_file_tree_is_that_of_the_repository():
    (tree,) = [code for kind, code, _ in BLOCKS if kind == "text" and "pyproject.toml" in code]
    listed = {name.rstrip("/") for line in tree.splitlines() for name in line.split("   ")[0].split()}
    assert {name for name in listed if not (ROOT / name).exists()} == set()
    packages = {f"l2o/{p.name}" for p in (ROOT / "l2o").iterdir() if p.is_dir() and not p.name.startswith("__")}
    assert packages <= listed


def test_pictures_and_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target
