"""What can be known here of systems that CI does not run: names of files, encodings, modules that Windows lacks."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

RESERVED = {"con", "prn", "aux", "nul", *(f"{name}{i}" for name in ("com", "lpt") for i in range(10))}
SOURCES = [path for package in ("l2o", "meta_train", "examples") for path in sorted((ROOT / package).rglob("*.py"))]
# Modules and functions that Python has on POSIX systems alone, and the names that it has for the other.
AS_ON_WINDOWS = """
import os, sys, types
import hydra, numpy, omegaconf, rich.console, safetensors.torch, torch, torch._dynamo

for name in ("fcntl", "grp", "pwd", "resource", "termios", "syslog"):
    sys.modules[name] = None
absent = {"geteuid", "getuid", "getgid", "fork", "uname", "fchmod", "chown", "O_DIRECTORY", "sched_getaffinity"}
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda file, mode, count: None)
import signal
for name in ("SIGPIPE", "SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "setitimer"):
    delattr(signal, name)
windows = types.ModuleType("os")
windows.__dict__.update({name: value for name, value in vars(os).items() if name not in absent})
windows.name = "nt"
sys.modules["os"] = windows
sys.platform = "win32"

import l2o
from meta_train.train import main

layer = torch.nn.Linear(3, 2)
optimizer = l2o.LearnedOptimizer(layer.parameters(), "default", total_steps=10)
layer(torch.ones(1, 3)).square().sum().backward()
optimizer.step()
l2o.save("mine", *l2o.load("steered"))
print(float(layer.weight.sum()))
sys.argv = ["meta_train", "rule=sgd", "task=quadratic", "steps=4", "checkpoint_every=2", "logger=none", "run=run"]
main()
"""


def problem(path: str) -> str | None:
    """What Windows has against a path, if anything."""
    for part in path.split("/"):
        if re.search(r'[<>:"\\|?*\x00-\x1f]', part) or part.endswith((".", " ")):
            return f"{part!r} has what no name may have"
        if part.split(".")[0].lower() in RESERVED:
            return f"{part!r} is a device"
    return "too long" if len(path) > 180 else None


@pytest.mark.parametrize(
    ("path", "reason"),
    [("a/b.py", None), ("a/aux.py", "device"), ("a:b", "no name"), ("a./b", "no name"), ("x" * 181, "long")],
)
def test_a_name_that_windows_refuses_is_found(path: str, reason: str | None) -> None:
    found = problem(path)
    assert found is None if reason is None else reason in str(found)


def test_every_file_can_be_checked_out_anywhere() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = listed.stdout.splitlines()
    assert len(names) > 300
    assert {name: found for name in names if (found := problem(name))} == {}
    assert len({name.lower() for name in names}) == len(names)  # also where case counts for nothing


def test_text_files_have_an_encoding() -> None:
    """Windows' own is not UTF-8."""
    found = {path: lines for path in SOURCES if (lines := without_encoding(path.read_text("utf-8")))}
    assert found == {}


def without_encoding(source: str) -> list[int]:
    """Lines of calls that read or write text in the encoding of the system."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if _is_text(call) and not _has_encoding(call)]


def _is_text(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name != "open":
        return name in ("read_text", "write_text") and isinstance(call.func, ast.Attribute)
    builtin = isinstance(call.func, ast.Name)  # open(path, mode); else path.open(mode), or what is another open
    mode = "".join(ast.unparse(argument) for argument in call.args[builtin : builtin + 1])
    return (builtin or re.search("^'[rwax]", mode) is not None) and "b'" not in mode


def _has_encoding(call: ast.Call) -> bool:
    place = {"read_text": 0, "write_text": 1}.get(getattr(call.func, "attr", ""), 3)
    return len(call.args) > place or any(keyword.arg == "encoding" for keyword in call.keywords)


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("open(p)", [1]),
        ("p.open('w')", [1]),
        ("os.open(p, flags)", []),
        ("archive.open(entry, 'w')", []),
        ("open(p, 'rb' if old else 'wb')", []),
        ("open(p, encoding='utf-8')", []),
        ("p.read_text()", [1]),
        ("p.read_text('utf-8')", []),
        ("p.write_text(x)", [1]),
        ("p.write_text(x, 'utf-8')", []),
    ],
)
def test_a_call_without_an_encoding_is_found(source: str, lines: list[int]) -> None:
    assert without_encoding(source) == lines


def test_l2o_steps_saves_and_meta_trains_without_what_windows_lacks(here: Path) -> None:
    """Not Windows: its modules and functions are gone, `os.name` and `sys.platform` say so, the rest is Linux'."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "L2O_KERNELS": ""}
    done = subprocess.run([sys.executable, "-c", AS_ON_WINDOWS], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    left = {path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file()}
    assert {"mine/theta.safetensors", "mine/card.json", "run/checkpoint/theta.safetensors"} <= left
    assert {name: found for name in left if (found := problem(name))} == {}
