"""Ops over elements: recipes, random arguments of tensors of every shape, and what the ops make of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tables import generator
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from l2o.kernels.coordinatewise import Tensors, completed_sums, network
from l2o.ops.coordinatewise import NOMINAL, Nominal, Product, Recipe
from l2o.ops.factored import row_means
from l2o.ops.kinds import param_infos
from l2o.ops.networks import init_mlp
from l2o.ops.statistics import SMALL_FC_GROUPS, UNFACTORED_GROUPS, VELO_GROUPS, init_statistics
from l2o.types import LOCAL

SHAPES = {
    "scalar": (),
    "vector": (37,),
    "matrix": (13, 50),  # rows lack the later axis
    "tall": (500, 3),  # the earlier
    "conv": (6, 5, 3, 3),
    "swapped": (3, 3, 6, 5),
    "one": (1, 1),
    "empty": (0, 3),
}
INFOS = param_infos(SHAPES)
SEVERAL = {name: shape for name, shape in SHAPES.items() if name not in ("scalar", "one")}
"""Of a single element the network sees the sign alone: in float32 its gradient is what cancels."""
DECAYS = 3
NOMINALS = {
    name: Nominal(name, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, i != 4, i != 3, i == 0, i == 1, i == 2, i > 2)  # type: ignore[arg-type]
    for i, name in enumerate(NOMINAL)
}
RECIPES = {
    "MLP": Recipe(("grad", "param", "m"), Product(0.1)),
    "AdafacMLP": Recipe(SMALL_FC_GROUPS, Product(0.1)),
    "VeLO": Recipe(VELO_GROUPS, Product(0.1), diag_eps=0.0, clip=1.5),
    "Celo2": Recipe(VELO_GROUPS, Product(0.1), "tanh", rms_eps=1e-8, scale_eps=1e-9, matrices=True),
    "Celo2 vectors": Recipe(UNFACTORED_GROUPS, Product(0.1), rms_eps=1e-8, scale_eps=1e-9, matrices=True),
    "RNNMLP": Recipe(("grad", "param", "log_param", "m", "v", "m_over_rms", "inv_rms"), Product(0.1)),
    "sums alone": Recipe(SMALL_FC_GROUPS),
    **{f"STAR {name}": Recipe(SMALL_FC_GROUPS, head) for name, head in NOMINALS.items()},
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
every_lanes = pytest.mark.parametrize("lanes", [0, 3])


class Problem:
    """Random arguments, those of ``lanes`` lanes together, and what the ops make of them."""

    def __init__(self, recipe: Recipe, lanes: int, per_tensor: bool = False, shapes: Any = SHAPES) -> None:
        self.recipe, self.lanes, self.infos, g = recipe, lanes, param_infos(shapes), generator(1)

        def randn(*shape: int) -> Tensor:
            return torch.randn((*((lanes,) if lanes else ()), *shape), generator=g)

        seconds = DECAYS if "log_param" in recipe.groups else 1
        slots: dict[str, dict[str, Tensor]] = {}
        for name, shape in shapes.items():
            zeros = init_statistics(torch.zeros(shape), self.infos[name], DECAYS)
            slots[name] = {slot: randn(*t.shape).square() + 1e-3 for slot, t in zeros.items()}
            slots[name] |= {"m": randn(DECAYS, *shape), "v": randn(seconds, *shape).square()}
        counts = dict.fromkeys(("grad", "clipped_grad", "param", "log_param"), 1)
        counts |= dict.fromkeys(("v", "inv_rms", "grad_over_rms"), seconds)
        width = sum(counts.get(group, DECAYS) for group in recipe.groups)
        nets = (len(shapes),) if per_tensor else ()
        theta = init_mlp(g, [width, 9, 5, 5])
        self.arguments: Any = (
            {name: t + 0.1 * randn(*nets, *t.shape) for name, t in theta.items()},
            {name: 2.0 * randn(*shape) for name, shape in shapes.items()},
            {name: randn(*shape) for name, shape in shapes.items()},
            slots,
            randn(len(shapes)),
            randn(len(shapes), 5),
        )

    def results(self, arguments: Any) -> list[Tensor]:
        """Sums of squares, updates, sums of outputs."""

        def both(theta: Any, grads: Any, params: Any, slots: Any, gains: Tensor, means: Tensor) -> Any:
            tensors = Tensors(grads, params, slots, self.infos, row_means(slots, self.infos, LOCAL))
            sums = completed_sums(self.recipe, tensors, LOCAL)
            return sums, *network(self.recipe, theta, tensors, sums, gains, means)

        return tree_leaves((vmap(both) if self.lanes else both)(*arguments))

    def derivatives(self, arguments: Any, order: int = 1) -> list[Tensor]:
        """Of a random combination, by all arguments; then of a combination of these."""
        arguments = tree_map(lambda t: t.detach().clone().requires_grad_(), arguments)
        found, g, leaves = self.results(arguments), generator(2), tree_leaves(arguments)
        for left in reversed(range(order)):
            draws = [torch.randn(t.shape, generator=g).to(t.dtype) for t in found]
            sizes = [t.detach().abs().sum().clamp(min=1e-9) for t in found]
            total = torch.stack([(t * d).sum() / s for t, d, s in zip(found, draws, sizes, strict=True)]).sum()
            found = list(torch.autograd.grad(total, leaves, create_graph=left > 0, materialize_grads=True))
        return found


def in_double(arguments: Any) -> Any:
    return tree_map(lambda t: t.double(), arguments)


def assert_close(got: list[Tensor], want: list[Tensor], rtol: float) -> None:
    """Relative to the largest entry of each tensor."""
    assert [t.shape for t in got] == [t.shape for t in want]
    for a, b in zip(got, want, strict=True):
        if b.numel():
            torch.testing.assert_close(a.double(), b, rtol=0, atol=rtol * b.abs().max().item() + 1e-12)
