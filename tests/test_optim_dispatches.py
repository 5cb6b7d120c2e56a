"""How many operations a step is on a GPU, where beginning each takes longer than small ones do; counted on the CPU."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from l2o import LearnedOptimizer, fused
from l2o.bench.steps import NETWORKS
from l2o.optim import learned
from l2o.rules import Adam, steered

MOST = {"default": 700, "steered-mlp": 800, "light": 515, "steered": 490, "mlp-digits": 1600, Adam(): 720}
"""For a transformer of 53 tensors in 9 shapes. Views are not counted, which launch nothing. A processor without units
for bfloat16 orthogonalises in another form, twenty operations more, and converts nothing for bases, forty fewer."""
VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze"}
VIEWS |= {
    "detach",
    "alias",
    "unbind",
    "split",
    "split_with_sizes",
    "as_strided",
    "_reshape_alias",
    "diagonal",
    "unfold",
}
VIEWS |= {"unfold", "_record_function_enter_new", "_record_function_exit"}


class Dispatches(TorchDispatchMode):
    """Counts operations, but for views, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.counts[name] += name not in VIEWS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("source", MOST, ids=str)
def test_a_step_is_few_operations(source, monkeypatch):
    monkeypatch.setenv("L2O_KERNELS", "0")
    monkeypatch.setattr(learned, "readable", lambda device: False)
    monkeypatch.setattr(fused, "step", lambda *_: None)
    monkeypatch.setattr(steered, "is_due", lambda *_: False)  # as in most steps, but not in the first ones
    params = [nn.Parameter(0.02 * torch.randn(*shape)) for shape in NETWORKS["transformer"]]
    rule = source if isinstance(source, str) else (source, source.init_theta(torch.Generator()))
    optimizer = LearnedOptimizer(params, rule, total_steps=1000)
    for p in params:
        p.grad = torch.randn_like(p)
    for _ in range(2):
        optimizer.step()
    with Dispatches() as found:
        optimizer.step()
    assert found.counts.total() <= MOST[source], found.counts.most_common(10)
