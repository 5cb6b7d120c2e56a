"""Kernels are built once and kept, belong to who built them, and where there are none torch stands in and says so."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_kernels import arguments

import l2o.fused
from l2o.kernels import build
from l2o.rules import MLP
from l2o.types import ConfigurationError, L2OError


class Number(ctypes.Structure):
    _fields_ = (("value", ctypes.c_int),)


ANSWER = """
extern "C" int answer(const int* x) { return *x; }
extern "C" void l2o_layout_Number(long long* out) { out[0] = sizeof(int), out[1] = 0; }
"""


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A small kernel and a broken one in place of those of l2o, an empty cache, a process that has built nothing."""
    (tmp_path / "mlp_rule.cpp").write_text(ANSWER)
    (tmp_path / "perceptron.cpp").write_text("#error this is not built")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setattr(build, "_said", set())
    monkeypatch.setenv("L2O_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("L2O_KERNELS", raising=False)
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_compared", set())
    return tmp_path


def test_kernels_are_built_once_when_asked_for_and_kept(sources):
    assert build.available("mlp_rule")
    assert build.run("mlp_rule", "answer", Number(42)) == 42
    (built,) = (sources / "cache" / "kernels").iterdir()
    before = built.stat().st_mtime_ns
    assert build.build("mlp_rule") == built
    assert built.stat().st_mtime_ns == before
    assert built.parent.stat().st_mode & 0o777 == 0o700
    (sources / "mlp_rule.cpp").write_text('extern "C" int answer(const int* x) { return *x + 1; }')
    assert ctypes.CDLL(str(build.build("mlp_rule"))).answer(ctypes.byref(Number(42))) == 43


@pytest.mark.parametrize("told", ["out[1] = 8", "out[1] = 0, out[2] = 4", "out[0] = 8"])
def test_a_structure_that_is_laid_out_otherwise_is_refused(sources, told):
    (sources / "mlp_rule.cpp").write_text(ANSWER.replace("out[1] = 0", told))
    assert build.available("mlp_rule")
    with pytest.raises(L2OError, match=r"Number of mlp_rule\.cpp is laid out"):
        build.run("mlp_rule", "answer", Number(42))


def test_several_are_had_together_or_not_at_all(sources):
    with pytest.warns(RuntimeWarning, match="this is not built"):
        assert not build.available("mlp_rule", "perceptron")
    assert build.available("mlp_rule")


def test_builds_at_the_same_time_do_no_harm(sources):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(build.build, ["mlp_rule"] * 4))
    assert paths == set((sources / "cache" / "kernels").iterdir())


def _no_compiler(sources, monkeypatch):
    monkeypatch.setenv("CXX", str(sources / "absent"))


def _broken_source(sources, monkeypatch):
    (sources / "mlp_rule.cpp").write_text("#error this cannot be compiled")


def _open_folder(sources, monkeypatch):
    build.cache_folder().chmod(0o777)


def _another_owner(sources, monkeypatch):
    monkeypatch.setattr(build.os, "geteuid", lambda: 12345)


def _another_system(sources, monkeypatch):
    monkeypatch.setattr(build.sys, "platform", "darwin")


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        (_no_compiler, r"no C\+\+ compiler '.*absent'; install"),
        (_broken_source, "this cannot be compiled"),
        (_open_folder, "can be written by others; .*L2O_CACHE_DIR"),
        (_another_owner, "belongs to .*L2O_CACHE_DIR"),
        (_another_system, "for Linux, this is darwin"),
    ],
)
def test_where_there_are_no_kernels_torch_stands_in_and_says_so_once(sources, monkeypatch, obstacle, reason):
    obstacle(sources, monkeypatch)
    monkeypatch.setenv("L2O_KERNELS", "0")
    assert not build.available("mlp_rule")
    monkeypatch.delenv("L2O_KERNELS")
    with pytest.warns(RuntimeWarning, match=f"(?s){reason}.*slower"):
        assert l2o.fused.update(MLP(), *arguments(MLP(), 1)) is None
    assert not build.available("mlp_rule")
    monkeypatch.setenv("L2O_KERNELS", "1")
    with pytest.raises(L2OError, match=f"(?s)L2O_KERNELS=1.*{reason}"):
        build.available("mlp_rule")


def test_another_setting_is_refused(monkeypatch):
    monkeypatch.setenv("L2O_KERNELS", "yes")
    with pytest.raises(ConfigurationError, match=r"L2O_KERNELS='yes'.*expected 0"):
        build.available("mlp_rule")
