"""Triton's kernels agree with the formulas they restate, in Triton's interpreter."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from tables import identical
from test_kernels import RULES, arguments, as_double, assert_close, reference
from torch.utils._pytree import tree_map_only

import l2o.fused
from l2o.kernels import mlp_gpu, mlp_rule
from l2o.rules import MLP
from l2o.types import L2OError


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """The kernels interpreted, on the CPU, as if it were a GPU."""
    monkeypatch.setenv("L2O_KERNELS", "1")
    monkeypatch.setattr(mlp_rule, "update", mlp_gpu.update)


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("linear", "deep")])
def test_the_mlp_kernel_is_the_mlp_rule(name):
    rule = RULES[name]
    args = arguments(rule, 3)
    assert_close(l2o.fused.update(rule, *args), reference(rule, *as_double(args)), 1e-4)


def test_the_deepest_that_fits():
    rule = MLP(hidden=(7, 32, 3), decays=())
    args = arguments(rule, 2)
    assert_close(l2o.fused.update(rule, *args), reference(rule, *as_double(args)), 1e-4)


# `forward` as on a GPU, up to the launch: arguments are bound, specialised and compiled for by Triton itself.
LAUNCH = """
import sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from l2o.kernels import mlp_triton
from l2o.kernels.mlp_rule import Constants, Tensors

class Driver:
    get_current_device = get_current_stream = lambda self, *device: 0
    get_current_target = lambda self: GPUTarget("cuda", int(sys.argv[1]), 32)

def without_launch(kernel, *args, grid, warmup, **kwargs):
    compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
    assert compiled.asm["cubin"] and compiled.metadata.shared <= 160 << 10  # of Ampere; Hopper has more
    launched.append((kernel.__name__, *grid))

driver.set_active(Driver())
run, JITFunction.run, launched = JITFunction.run, without_launch, []
for widths, decays in ([32, 32], (0.1, 0.9)), ([8], ()), ([7, 20, 3], (0.5,)):
    sizes = [2 + len(decays) + 1, *widths, 2]
    theta = [torch.ones(3, *s) for i, o in zip(sizes, sizes[1:]) for s in ((i, o), (o,))]
    shapes = [(), (7,), (9, 40)]
    values = [torch.ones(3, *s) for s in shapes]
    momenta = [torch.ones(3, len(decays), *s) for s in shapes]
    tensors = Tensors(theta, values, values, momenta)
    mlp_triton.forward(Constants(decays, 0.001, 0.01, 1e-5), tensors, torch.ones(3, 1))
assert launched == [(name, blocks, 3) for blocks in (1, 1, 3) for name in ("_look", "_apply")] * 3, launched
"""


@pytest.mark.parametrize("architecture", ["80", "90"], ids=["Ampere", "Hopper"])
def test_gpus_are_handed_what_they_take(architecture, monkeypatch, tmp_path):
    """In a process that does not interpret the kernels."""
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    command = [sys.executable, "-c", LAUNCH, architecture]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_strided_tensors_give_the_same():
    rule = MLP(hidden=(8,))
    args = arguments(rule, 2)
    strided = tree_map_only(torch.Tensor, lambda t: t.unsqueeze(-1).expand(*t.shape, 2).contiguous()[..., 0], args)
    assert identical(l2o.fused.update(rule, *strided), l2o.fused.update(rule, *args))


def test_a_diverged_lane_is_nan_alone():
    rule = MLP(hidden=(8,))
    theta, grads, state, params, run = arguments(rule, 3)
    grads["matrix"][1, 0, 0] = torch.nan
    updates, _ = l2o.fused.update(rule, theta, grads, state, params, run)
    assert updates["matrix"].isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert updates["matrix"][[0, 2]].isfinite().all()
    assert updates["conv"].isfinite().all()


def test_what_a_kernel_does_not_fit_is_left_to_torch(monkeypatch):
    for rule in (MLP(hidden=()), MLP(hidden=(33,)), MLP(mup=True)):
        assert l2o.fused.update(rule, *arguments(rule, 2)) is None
    args = arguments(MLP(), 2)
    assert l2o.fused.update(MLP(), *as_double(args)) is None
    args[0]["w0"].requires_grad_()
    assert l2o.fused.update(MLP(), *args) is None
    with torch.no_grad():
        assert l2o.fused.update(MLP(), *args) is not None
        monkeypatch.setenv("L2O_KERNELS", "0")
        assert l2o.fused.update(MLP(), *args) is None


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "l2o.kernels.mlp_triton", None)
    monkeypatch.delattr("l2o.kernels.mlp_triton", raising=False)  # if no other test has imported it
    with pytest.raises(L2OError, match=r"Triton cannot be imported .*pip install triton"):
        l2o.fused.update(MLP(), *arguments(MLP(), 1))
    monkeypatch.delenv("L2O_KERNELS")
    assert l2o.fused.update(MLP(), *arguments(MLP(), 1)) is None
