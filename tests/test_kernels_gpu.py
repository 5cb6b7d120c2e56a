"""Triton's kernels agree with the formulas they restate, in Triton's interpreter: no GPU has run them."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from tables import identical
from test_kernels import RULES, arguments, as_double, assert_close, reference
from torch.utils._pytree import tree_map_only

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
    assert_close(rule.fused_update(*args), reference(rule, *as_double(args)), 1e-4)


def test_the_deepest_that_fits():
    rule = MLP(hidden=(7, 32, 3), decays=())
    args = arguments(rule, 2)
    assert_close(rule.fused_update(*args), reference(rule, *as_double(args)), 1e-4)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from l2o.kernels.mlp_triton import _apply, _look

settings = {"DECAYS": 6, "CHANNELS": 16, "WIDTH": 32, "MIDDLE": 1, "BLOCK": 128}
for kernel in (_look, _apply):
    constants = {name: n for name, n in settings.items() if name in kernel.arg_names}
    types = {name: "*fp32" for name in kernel.arg_names} | {"n": "i32"} | {name: "constexpr" for name in constants}
    types |= {name: "fp32" for name in ("step_mult", "exp_mult") if name in types}
    for architecture in (80, 90):
        assert compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", architecture, 32)).asm["cubin"]
"""


def test_they_compile_for_gpus(monkeypatch, tmp_path):
    """Ampere and Hopper; in a process that does not interpret them."""
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_strided_tensors_give_the_same():
    rule = MLP(hidden=(8,))
    args = arguments(rule, 2)
    strided = tree_map_only(torch.Tensor, lambda t: t.unsqueeze(-1).expand(*t.shape, 2).contiguous()[..., 0], args)
    assert identical(rule.fused_update(*strided), rule.fused_update(*args))


def test_a_diverged_lane_is_nan_alone():
    rule = MLP(hidden=(8,))
    theta, grads, state, params, run = arguments(rule, 3)
    grads["matrix"][1, 0, 0] = torch.nan
    updates, _ = rule.fused_update(theta, grads, state, params, run)
    assert updates["matrix"].isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert updates["matrix"][[0, 2]].isfinite().all()
    assert updates["conv"].isfinite().all()


def test_what_a_kernel_does_not_fit_is_left_to_torch(monkeypatch):
    for rule in (MLP(hidden=()), MLP(hidden=(33,)), MLP(mup=True)):
        assert rule.fused_update(*arguments(rule, 2)) is None
    args = arguments(MLP(), 2)
    assert MLP().fused_update(*as_double(args)) is None
    args[0]["w0"].requires_grad_()
    assert MLP().fused_update(*args) is None
    with torch.no_grad():
        assert MLP().fused_update(*args) is not None
        monkeypatch.delenv("L2O_KERNELS")
        assert MLP().fused_update(*args) is None


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "l2o.kernels.mlp_triton", None)
    monkeypatch.delattr("l2o.kernels.mlp_triton", raising=False)  # if no other test has imported it
    with pytest.raises(L2OError, match=r"Triton cannot be imported .*pip install triton"):
        MLP().fused_update(*arguments(MLP(), 1))
