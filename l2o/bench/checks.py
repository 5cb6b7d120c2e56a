"""What has to hold on a GPU as it does on the CPU: functions of a device, for tests and where there is no pytest.

Each raises AssertionError where it does not hold, and returns what it measured.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from l2o import fused, rules
from l2o.fused.mlp import reference
from l2o.kernels import mlp_gpu, mlp_rule
from l2o.optim import LearnedOptimizer, learned
from l2o.rules import MLP, RNNMLP, NNAdam, Steered, VeLO
from l2o.tasks import ImageMLP
from l2o.types import Batch, Buffers, Grads, OptState, Params, Run, Split, TaskData, TaskFamily, Theta, UpdateRule
from l2o.unroll import expand_theta, init_state, sample_runs, unroll

Figures = dict[str, Any]
Check = Callable[[torch.device], Figures]

RULES = {name: getattr(rules, name)() for name in rules.__all__} | {
    "Steered-normalized": Steered(direction="normalized"),
    "MLP-steps": MLP(time="steps"),
    "VeLO": VeLO(lstm_hidden=32, inits=8),
}
"""Of each, what its paper has, but for VeLO, whose size would take seconds and show nothing more."""
PLUG_IN = {torch.float64: 1e-7, torch.float32: 2e-4, torch.bfloat16: 2e-2}
UNROLL = {torch.float64: 1e-7, torch.float32: 2e-3}
"""By dtype, how far apart tensors may be, relative to their largest entry. Ten and three times as much as float32 is
from float64 on the CPU, where some meta-gradients are small differences of large terms; bfloat16 has 8 bits."""
_REFERENCES = {torch.bfloat16: torch.bfloat16}
"""Dtypes that are held against themselves on the CPU; all others, against float64."""
COMPILERS = {"cpu": "aot_eager", "cuda": "inductor"}
"""Of `torch.compile`; that for the CPU generates no code, which would take half a minute."""

FAMILY = ImageMLP(width=6, batch_size=16)
_CPU = torch.device("cpu")
_SHAPES = {"matrix": (12, 8), "convolution": (4, 3, 2, 2), "vector": (7,), "scalar": ()}


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a value, or a shape that depends on values.

    copies: how many tensors were made of Python's numbers, which waits too. Of constants that is once a process.
    """

    WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += by_mask or name in self.WAITS
        self.copies += name == "lift_fresh"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Fails where the host waits for the device: at once on CUDA, else at the end."""
    on_cuda = device.type == "cuda"
    before = torch.cuda.get_sync_debug_mode() if on_cuda else 0
    try:
        if on_cuda:
            torch.cuda.set_sync_debug_mode("error")
        with HostReads() as reads:
            yield
    finally:
        if on_cuda:
            torch.cuda.set_sync_debug_mode(before)
    waits = reads.count + reads.copies
    assert not waits, f"the host waits for the device {waits} times"


def distance(got: Any, want: Any) -> float:
    """The largest difference of two nested structures of tensors, relative to the largest entry of its tensor.

    Infinite where either has entries that are not finite.
    """
    pairs = zip(tree_leaves(got), tree_leaves(want), strict=True)
    return max((_distance(a, b) for a, b in pairs if isinstance(b, Tensor) and b.numel()), default=0.0)


def _distance(got: Tensor, want: Tensor) -> float:
    a, b = (t.detach().to("cpu", torch.float64) for t in (got, want))
    ratio = float((a - b).abs().max() / (b.abs().max() + 1e-12))
    return math.inf if math.isnan(ratio) else ratio  # for `max`, which may pass over NaN


def _agreement(got: Any, want: Any, tolerance: float) -> Figures:
    error = distance(got, want)
    assert error <= tolerance, f"{error:.2g} apart from the CPU, expected at most {tolerance:g}"
    return {"error": error}


def plug_in(rule: UpdateRule, dtype: torch.dtype, device: torch.device) -> Figures:
    """Four steps move every parameter as on the CPU; after the first, the host does not wait."""
    want = _steps(rule, _REFERENCES.get(dtype, torch.float64), _CPU)
    with patch.object(learned, "readable", lambda device: False):  # on the CPU too, as where reading would wait
        got = _steps(rule, dtype, device, guard=partial(no_waiting, device))
    return _agreement(got, want, PLUG_IN[dtype])


def _steps(
    rule: UpdateRule, dtype: torch.dtype, device: torch.device, guard: Callable[[], Any] = contextlib.nullcontext
) -> Any:
    """Parameters and state after four steps.  guard: entered around those after the first."""
    generator = torch.Generator().manual_seed(0)
    theta = {k: t + 0.01 * torch.randn(t.shape, generator=generator) for k, t in rule.init_theta(generator).items()}
    drawn = [0.05 * torch.randn(shape, generator=generator) for shape in _SHAPES.values()]
    params = [nn.Parameter(t.to(device, dtype, copy=True)) for t in drawn]
    optimizer = LearnedOptimizer(params, (rule, theta), total_steps=10)
    for step in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
        loss = torch.full((), 1.0 / (1 + step), device=device)
        with guard() if step else contextlib.nullcontext():
            optimizer.step(loss=loss)
    assert all(p.dtype == dtype and p.device.type == device.type for p in params)
    assert distance(params, [t.to(dtype) for t in drawn]) > 0.0, "nothing moves"
    return params, [list(optimizer.state[p].values()) for p in params]


@dataclass(frozen=True)
class Drawn(TaskFamily):
    """``family`` as the CPU draws it, on ``device``: the same everywhere. Parameters are of ``dtype``.

    The generators are of the CPU.
    """

    family: TaskFamily
    device: torch.device
    dtype: torch.dtype

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        return self._moved(self._on_host(lanes))

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        params, buffers = self.family.init(self._on_host(_lanes(data)), generator)
        return {k: p.to(self.device, self.dtype) for k, p in params.items()}, self._moved(buffers)

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        return self._moved(self.family.batch(self._on_host(_lanes(data)), split, generator))

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        return self.family.loss(params, buffers, data, batch)

    def _on_host(self, lanes: int) -> TaskData:
        return self.family.sample(torch.Generator().manual_seed(0), lanes)

    def _moved(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: t.to(self.device) for k, t in tensors.items()}


fused.GRADIENTS[Drawn] = lambda drawn, *arguments: fused.gradient(drawn.family, *arguments)


def _lanes(data: TaskData) -> int:
    return len(next(iter(data.values())))


def smooth_family(rule: UpdateRule) -> TaskFamily:
    """Return tasks on which rounding does not decide what ``rule`` sees.

    RNNMLP and NNAdam see the sign of the mean of each tensor's gradient. With cross-entropy, whose gradients sum to 0
    over the classes, the last layer's mean is a rounding error, and the sign random: parameters moved by a unit in the
    last place change the meta-gradient by a twentieth, on the CPU alone.
    """
    return replace(FAMILY, criterion="mse") if isinstance(rule, RNNMLP | NNAdam) else FAMILY


def unrolled(rule: UpdateRule, dtype: torch.dtype, device: torch.device) -> Figures:
    """Losses and meta-gradient of three lanes are those of the CPU."""
    got, want = (
        meta_gradient(rule, Drawn(smooth_family(rule), where, to), where, torch.Generator())
        for where, to in ((device, dtype), (_CPU, torch.float64))
    )
    return _agreement(got, want, UNROLL[dtype])


def does_not_wait(rule: UpdateRule, device: torch.device) -> Figures:
    """An unroll and its derivative, on batches that the device draws, are queued without waiting for it."""
    meta_gradient(rule, FAMILY, device, torch.Generator(device))  # constants are copied to the device once
    meta_gradient(rule, FAMILY, device, torch.Generator(device), guard=partial(no_waiting, device))
    return {}


def meta_gradient(
    rule: UpdateRule,
    family: TaskFamily,
    device: torch.device,
    generator: torch.Generator,
    guard: Callable[[], Any] = contextlib.nullcontext,
) -> tuple[Tensor, Theta]:
    """Losses ``[steps, lanes]`` of an unroll, and their derivative with respect to θ.  guard: entered around both."""
    generator.manual_seed(0)
    theta = expand_theta({k: t.to(device) for k, t in rule.init_theta(torch.Generator().manual_seed(1)).items()}, 3)
    state = sample_runs(rule, theta, family, torch.tensor([2, 9, 9], device=device), generator)
    leaves = {k: t.requires_grad_() for k, t in theta.items()}
    with guard():
        _, losses = unroll(rule, leaves, family, init_state(rule, leaves, family, state), 4, generator)
        grads = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
    return losses.detach(), dict(zip(leaves, grads, strict=True))


def trains_a_model(device: torch.device) -> Figures:
    """A compiled model under autocast, by way of GradScaler: the loss falls, and infinite gradients are skipped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1)).to(device)
    compiled = torch.compile(model, backend=COMPILERS[device.type])
    x = torch.randn(64, 8, device=device)
    rule, scaler = Steered(), torch.amp.GradScaler(device.type)
    optimizer = LearnedOptimizer(model.parameters(), (rule, rule.init_theta(torch.Generator())), total_steps=100)
    losses = []
    for step in range(100):
        with torch.autocast(device.type):
            loss = nn.functional.mse_loss(compiled(x).float(), x[:, :1] * x[:, 1:2])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        before = [p.detach().clone() for p in model.parameters()]
        if step == 50:
            next(model.parameters()).grad.fill_(torch.inf)  # type: ignore[union-attr]  # backward has made it
        scaler.step(optimizer)
        assert step != 50 or distance(list(model.parameters()), before) == 0.0, "an infinite gradient moves parameters"
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], f"the loss goes from {losses[0]:.3g} to {losses[-1]:.3g}"
    return {"first_loss": losses[0], "last_loss": losses[-1]}


def triton_kernels(rule: MLP, device: torch.device) -> Figures:
    """Updates and momenta of three lanes by the kernels are those of the rule in float64, and nothing waits."""
    arguments = _update_arguments(rule)
    want = reference(rule, *tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, arguments))
    arguments = tree_map_only(Tensor, lambda t: t.to(device), arguments)
    with patch.dict(os.environ, L2O_KERNELS="1"), patch.object(mlp_rule, "update", mlp_gpu.update):
        fused.update(rule, *arguments)
        guard = no_waiting(device) if device.type == "cuda" else contextlib.nullcontext()  # the interpreter reads
        with guard:
            got = fused.update(rule, *arguments)
    assert got is not None, "the kernels do not take it"
    return _agreement(got, want, 1e-4)


def _update_arguments(rule: MLP) -> tuple[Theta, Grads, OptState, Params, Run]:
    generator = torch.Generator().manual_seed(0)
    theta = {k: t + 0.05 * torch.randn(3, *t.shape, generator=generator) for k, t in rule.init_theta(generator).items()}
    params, grads = (
        {k: torch.randn(3, *shape, generator=generator) for k, shape in (_SHAPES | {"large": (9, 40)}).items()}
        for _ in range(2)
    )
    slots = {k: {"m": torch.randn(3, len(rule.decays), *p.shape[1:], generator=generator)} for k, p in params.items()}
    return theta, grads, OptState(slots, {}), params, Run(torch.tensor([0, 3, 9]), torch.tensor([10, 20, 30]))


_NETWORKS = {"32, 32": MLP(), "8, 8": MLP(hidden=(8, 8)), "7, 32, 3": MLP(hidden=(7, 32, 3), decays=())}

CHECKS: dict[str, Check] = {
    **{
        f"plug-in: {name}, {str(dtype).removeprefix('torch.')}": partial(plug_in, rule, dtype)
        for name, rule in RULES.items()
        for dtype in PLUG_IN
    },
    **{
        f"unroll and meta-gradient: {name}, {str(dtype).removeprefix('torch.')}": partial(unrolled, rule, dtype)
        for name, rule in RULES.items()
        for dtype in UNROLL
    },
    **{f"no waiting in an unroll: {name}": partial(does_not_wait, rule) for name, rule in RULES.items()},
    "GradScaler and torch.compile": trains_a_model,
    **{f"Triton kernels: {name}": partial(triton_kernels, rule) for name, rule in _NETWORKS.items()},
}
"""By name."""
