"""The op of moments agrees with its definition in torch: values and derivatives, with and without lanes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tables import generator
from test_coordinatewise import (
    INFOS,
    RECIPES,
    Problem,
    _small_ones_too,  # noqa: F401
    assert_close,
    decays,
    every_lanes,
    in_double,
)
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from l2o.kernels import moments
from l2o.kernels.moments import advance_moments, advance_statistics
from l2o.ops.factored import factored_axes
from l2o.ops.statistics import Decays, advanced
from l2o.types import LOCAL


@every_lanes
@pytest.mark.parametrize("clip", [float("inf"), 1.5])
def test_moments_are_their_definition(lanes: int, clip: float, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L2O_KERNELS", "1")
    problem = Problem(RECIPES["AdafacMLP"], lanes)
    _, grads, _, slots, *_ = problem.arguments

    def both(slots: Any, grads: Any) -> Any:
        own = Decays(*(d.to(grads["vector"].dtype) for d in decays()))
        return advance_statistics(slots, grads, INFOS, own, LOCAL, clip), advance_moments(slots, grads, own)

    both = vmap(both) if lanes else both
    arguments = slots, grads
    assert_close(tree_leaves(both(*arguments)), tree_leaves(both(*in_double(arguments))), 1e-6)


@every_lanes
@pytest.mark.usefixtures("_small_ones_too")
def test_moments_have_the_derivatives_of_their_definition(lanes: int) -> None:
    problem = Problem(RECIPES["AdafacMLP"], lanes)
    _, grads, _, slots, *_ = problem.arguments
    slots = {name: {s: x for s, x in own.items() if s in ("m", "v", "diag")} for name, own in slots.items()}
    own = [d.expand(lanes, -1).clone() if lanes else d for d in decays()]

    def by_op(slots: Any, grads: Any, *own: Tensor) -> Any:
        axes = [axis for info in INFOS.values() for axis in factored_axes(info.shape) or (-1, -1)]
        return moments._advance(slots, grads, Decays(*own), axes, 1.5)

    def by_definition(slots: Any, grads: Any, *own: Tensor) -> Any:
        return {
            name: advanced(slots[name], g, Decays(*own), factored_axes(INFOS[name].shape), 1.5)
            for name, g in grads.items()
        }

    def derivatives(f: Any, arguments: Any) -> list[Tensor]:
        arguments = tree_map(lambda t: t.clone().requires_grad_(), arguments)
        found = (vmap(f) if lanes else f)(*arguments)
        g, order = generator(4), [found[name][slot] for name in found for slot in sorted(found[name])]
        first = sum((t * torch.randn(t.shape, generator=g)).sum() for t in order)
        grads_ = torch.autograd.grad(first, tree_leaves(arguments), create_graph=True)
        second = sum((t.square() * torch.randn(t.shape, generator=g)).sum() for t in grads_)
        twice = torch.autograd.grad(second, tree_leaves(arguments), materialize_grads=True)
        return [t.detach() for t in (*grads_, *twice)]

    arguments = slots, grads, *own
    assert_close(derivatives(by_op, arguments), derivatives(by_definition, in_double(arguments)), 1e-4)
