"""What the checks train: a small network of every kind of tensor, on data that are the same wherever they are drawn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import l2o
from l2o.types import UpdateRule

STEPS, TOTAL = 4, 20
"""Steps of a check, and the length of the run that optimizers are told."""
TOLERANCE = 1e-5
"""Of parameters, in the largest step of their tensor."""


class Net(nn.Module):
    """An embedding, matrices, a convolution, vectors, a scalar, in float64; none of its axes are of one length."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed, self.wide, self.conv = nn.Embedding(5, 4), nn.Linear(4, 7), nn.Conv1d(7, 6, 2)
        self.gain, self.out, self.scale = nn.Parameter(torch.ones(6)), nn.Linear(6, 3), nn.Parameter(torch.ones(1))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator) + (p.ndim == 1))
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        """``[batch, 2, 3]`` of int64 ``[batch, 3]``."""
        x = self.conv(self.wide(self.embed(tokens)).relu().mT).mT
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3)
        return self.out(self.gain * x) * self.scale


def loss_at(model: nn.Module, step: int, part: slice = slice(None)) -> Tensor:
    """0-d, on the batch of that step, or a part of its 8 examples."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 5, (8, 3), generator=generator)
    target = torch.randn(8, 2, 3, generator=generator, dtype=torch.float64)
    return (model(tokens[part]) - target[part]).square().mean()


def train(model: nn.Module, optimizer: Any, steps: Sequence[int] = range(STEPS)) -> None:
    """Steps with closures, which rules that read the loss need."""
    for step in steps:
        optimizer.zero_grad()
        loss = loss_at(model, step)
        loss.backward()
        optimizer.step(lambda loss=loss: loss.detach())


def theta_of(rule: UpdateRule) -> dict[str, Tensor]:
    """Meta-parameters off the symmetric points of the initialisation, where parts of a rule have no effect."""
    generator = torch.Generator().manual_seed(1)
    theta = rule.init_theta(generator)
    return {name: t + 0.01 * torch.randn(t.shape, generator=generator) for name, t in theta.items()}


def make(params: Any, rule: UpdateRule, **settings: Any) -> l2o.LearnedOptimizer:
    """The plug-in with a rule of some θ."""
    return l2o.LearnedOptimizer(params, (rule, theta_of(rule)), total_steps=TOTAL, **settings)


def values(model: nn.Module) -> dict[str, Tensor]:
    """Whole parameters, copied."""
    params: dict[str, Any] = dict(model.named_parameters())
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in params.items()}
    return {re.sub(r"(_fsdp_wrapped_)?module\.", "", name): p.detach().clone() for name, p in whole.items()}


def alone(rule: UpdateRule) -> dict[str, Tensor]:
    """The parameters after training in one process, without any library."""
    known = f"{type(rule).__module__}.{rule!r}"
    if known not in _ALONE:
        model = Net()
        train(model, make(model.parameters(), rule))
        _ALONE[known] = values(model)
    return _ALONE[known]


_ALONE: dict[str, dict[str, Tensor]] = {}


def check_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """Raise AssertionError unless parameters are equal but for rounding, and have moved."""
    start = values(Net())
    for name, expected in want.items():
        largest = (expected - start[name]).abs().max()
        assert largest > 0, f"{name} has not moved"
        error = ((got[name] - expected).abs().max() / largest).item()
        assert error <= TOLERANCE, f"{name} differs by {error:.1e} of its largest step"


def check_equal(got: Any, want: Any) -> None:
    """Raise AssertionError unless nested structures of tensors and numbers are equal to the bit."""
    torch.testing.assert_close(got, want, rtol=0, atol=0)
