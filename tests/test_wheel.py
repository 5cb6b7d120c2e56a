"""The wheel, built from the source archive, is whole: it works in an empty environment, away from the repository.

Installing needs a package index (or pip's cache of one), as the set-up of the repository itself does.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# One worker builds and installs for all tests here; installing takes minutes where pip's cache is empty.
pytestmark = [pytest.mark.xdist_group("wheel"), pytest.mark.timeout(1200)]

USE_THE_DEFAULT = """
import torch
import l2o

rule, theta = l2o.load("default")
layer = torch.nn.Linear(3, 2)
before = layer.weight.detach().clone()
optimizer = l2o.LearnedOptimizer(layer.parameters(), "default", total_steps=10)
layer(torch.ones(1, 3)).square().sum().backward()
optimizer.step()
assert theta and not torch.equal(before, layer.weight)
print(l2o.__file__)
"""


def _run(*command: str | Path, cwd: Path) -> str:
    """What the command prints. PYTHONPATH is dropped, so that the repository cannot stand in for the wheel."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} in {cwd}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as it is released: from the unpacked source archive, not from the working tree."""
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path) -> Iterator[Path]:
    """The interpreter of an environment that holds ``wheel[train]`` and nothing else; removed afterwards (1 GB)."""
    with tempfile.TemporaryDirectory(prefix="l2o-wheel-") as folder:
        env = Path(folder) / "env"
        _run(sys.executable, "-m", "venv", "--without-pip", env, cwd=Path(folder))
        pip = [sys.executable, "-m", "pip", "--python", env, "install", "--no-compile", "--quiet"]
        _run(*pip, "--constraint", ROOT / "constraints.txt", f"{wheel}[train]", cwd=Path(folder))
        yield env / "bin" / "python"


def test_it_carries_code_types_configs_and_pretrained(wheel: Path) -> None:
    moved = {"l2o": "l2o", "meta_train": "meta_train", "configs": "meta_train/configs", "pretrained": "l2o/pretrained"}
    moved["benchmarks/suite"] = "meta_train/benchmarks/suite"
    files = {
        f"{there}/{path.relative_to(ROOT / here).as_posix()}"
        for here, there in moved.items()
        for path in (ROOT / here).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    files.add("meta_train/docs/rules.md")
    assert {"l2o/py.typed", "meta_train/py.typed", "meta_train/configs/train.yaml"} <= files
    assert any(name.startswith("l2o/pretrained/") and name.endswith("/theta.safetensors") for name in files)
    carried = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert carried == files


def test_the_description_has_no_links_into_the_repository(wheel: Path) -> None:
    """A package index has nothing there."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(name).decode()
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert text.count("```python") > 3
    assert targets
    assert not [target for target in targets if not target.startswith("https://")]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (None, "see figures (`pretrained/README.md`), [x](https://a.b)\n"),
        (
            "https://s",
            "![p](https://s/raw/main/d.png)\n\nsee [figures](https://s/blob/main/pretrained/README.md), [x](https://a.b)\n",
        ),
    ],
)
def test_links_are_absolute_where_the_repository_has_an_address(source: str | None, expected: str) -> None:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "![p](d.png)\n\nsee [figures](pretrained/README.md), [x](https://a.b)\n"
    assert module.description(text, source) == expected


def test_meta_train_runs(python: Path, tmp_path: Path) -> None:
    assert "meta_train" in _run(python, "-m", "meta_train", "--help", cwd=tmp_path)
    settings = ["rule=sgd", "task=quadratic", "steps=2", f"run={tmp_path / 'run'}", "logger=none"]
    _run(python, "-m", "meta_train", *settings, cwd=tmp_path)
    assert [path.name for path in (tmp_path / "run").rglob("theta.safetensors")]


def test_the_table_of_rules_has_the_recorded_runs_that_the_wheel_has_not(python: Path, tmp_path: Path) -> None:
    said = _run(python, "-m", "meta_train.rules_table", "--only", "SGD", "--only", "AdaGrad", cwd=tmp_path)
    replays = {line.split()[0]: line for line in said.splitlines() if line.startswith(("SGD ", "AdaGrad "))}
    assert "not recorded" in replays["AdaGrad"]
    assert "(1 run)" in replays["SGD"]


def test_the_default_checkpoint_loads_and_steps(python: Path, tmp_path: Path) -> None:
    imported = Path(_run(python, "-c", USE_THE_DEFAULT, cwd=tmp_path).strip()).resolve()
    assert imported.is_relative_to(python.parents[1].resolve())
