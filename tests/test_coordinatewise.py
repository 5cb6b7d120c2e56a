"""The ops over elements agree with their definition in torch: values, derivatives, lanes, blocks, threads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import INFOS, RECIPES, SEVERAL, SHAPES, Problem, assert_close, every_lanes, every_recipe, in_double
from tables import generator, identical
from torch import Tensor
from torch.func import grad, jacrev, vmap
from torch.utils._pytree import tree_leaves, tree_map

from l2o.kernels import coordinatewise_cpu
from l2o.kernels.coordinatewise import Tensors, feature_sums
from l2o.kernels.moments import advance_statistics
from l2o.ops import coordinatewise as reference
from l2o.ops.coordinatewise import Recipe
from l2o.ops.factored import row_means
from l2o.ops.kinds import param_infos
from l2o.ops.networks import init_mlp, with_shared
from l2o.ops.statistics import Decays
from l2o.types import LOCAL


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Derivatives are those of the ops, not autograd's of what they are made of."""
    monkeypatch.setattr(coordinatewise_cpu, "SMALL", 0)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are had, or it is an error; and used: torch's own operations in float32 are not to be had."""
    monkeypatch.setenv("L2O_KERNELS", "1")


@every_recipe
@every_lanes
@pytest.mark.usefixtures("kernels")
def test_the_kernels_are_their_definition(recipe: Recipe, lanes: int, threads: int) -> None:
    problem = Problem(recipe, lanes)
    assert_close(problem.results(problem.arguments), problem.results(in_double(problem.arguments)), 3e-6)


@pytest.mark.usefixtures("kernels")
def test_every_recipe_has_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    run = coordinatewise_cpu.run
    monkeypatch.setattr(coordinatewise_cpu, "run", lambda *given: called.append(given[1]) or run(*given))  # type: ignore[func-returns-value]
    for recipe in RECIPES.values():
        problem = Problem(recipe, 2)
        problem.results(problem.arguments)
    assert called == ["l2o_feature_sums", "l2o_coordinatewise"] * len(RECIPES)


@pytest.mark.usefixtures("kernels")
@every_lanes
def test_a_network_for_every_tensor(lanes: int) -> None:
    problem = Problem(RECIPES["VeLO"], lanes, per_tensor=True, shapes=SEVERAL)
    assert_close(problem.results(problem.arguments), problem.results(in_double(problem.arguments)), 3e-6)
    assert_close(problem.derivatives(problem.arguments), problem.derivatives(in_double(problem.arguments)), 1e-4)


@every_recipe
@every_lanes
def test_derivatives_are_those_of_the_definition(recipe: Recipe, lanes: int) -> None:
    problem = Problem(recipe, lanes, shapes=SEVERAL)
    assert_close(problem.derivatives(problem.arguments), problem.derivatives(in_double(problem.arguments)), 2e-4)


@pytest.mark.parametrize("name", ["MLP", "AdafacMLP", "Celo2", "RNNMLP", "STAR adam_aggmo"])
@every_lanes
def test_second_derivatives_are_those_of_the_definition(name: str, lanes: int) -> None:
    problem = Problem(replace(RECIPES[name], activation="tanh"), lanes, shapes=SEVERAL)
    want = problem.derivatives(in_double(problem.arguments), order=2)
    assert_close(problem.derivatives(problem.arguments, order=2), want, 3e-3)


@pytest.mark.parametrize("name", ["AdafacMLP", "Celo2", "STAR adam_aggmo"])
@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_are_those_of_finite_differences(name: str, order: int) -> None:
    shapes = {"vector": (3,), "matrix": (2, 3)}
    problem = Problem(replace(RECIPES[name], activation="tanh"), 0, shapes=shapes)
    theta, grads, params, slots, *rest = in_double(problem.arguments)
    slots = {name: {slot: x if slot == "m" else x + 0.5 for slot, x in own.items()} for name, own in slots.items()}
    arguments, g = (theta, grads, params, slots, *rest), generator(3)
    direction = tree_map(lambda t: torch.randn(t.shape, generator=g).double(), arguments)

    def combined(found: list[Tensor], seed: int) -> Tensor:
        draws = generator(seed)
        return torch.stack([(t * torch.randn(t.shape, generator=draws)).sum() for t in found]).sum()

    def gradient(moved: Any) -> list[Tensor]:
        moved = tree_map(lambda t: t if t.requires_grad else t.clone().requires_grad_(), moved)
        first = combined(problem.results(moved), 4)
        return list(torch.autograd.grad(first, tree_leaves(moved), create_graph=True, materialize_grads=True))

    f = problem.results if order == 1 else gradient

    def at(distance: float) -> Tensor:
        return combined(f(tree_map(lambda t, d: t + distance * d, arguments, direction)), 5).detach()

    moving = tree_map(lambda t: t.clone().requires_grad_(), arguments)
    grads = torch.autograd.grad(combined(f(moving), 5), tree_leaves(moving), materialize_grads=True)
    got = torch.stack([(a * b).sum() for a, b in zip(grads, tree_leaves(direction), strict=True)]).sum()
    torch.testing.assert_close(got, (at(1e-6) - at(-1e-6)) / 2e-6, rtol=2e-5, atol=1e-6)


@every_lanes
def test_blocks_change_nothing(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for recipe in (RECIPES["AdafacMLP"], RECIPES["Celo2"], RECIPES["STAR adam_aggmo"]):
        problem = Problem(recipe, lanes, shapes=SEVERAL)
        arguments = in_double(problem.arguments)
        monkeypatch.setattr(reference, "BLOCK", 1 << 16)
        want = problem.results(arguments), problem.derivatives(arguments)
        monkeypatch.setattr(reference, "BLOCK", 20)
        assert_close(problem.results(arguments), want[0], 1e-12)
        assert_close(problem.derivatives(arguments), want[1], 1e-12)
        assert_close(problem.derivatives(problem.arguments), want[1], 2e-4)  # which computes blocks again


@pytest.mark.parametrize("shape", [(), (7,), (41,), (3, 4), (2, 50), (5, 3, 4), (0, 30), (30, 0), (1, 1, 21)], ids=str)
def test_blocks_are_a_tensor_in_order(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK", 20)
    x = torch.arange(float(torch.Size(shape).numel())).view(shape)
    parts = [reference.cut({"x": x}, index)["x"] for index in reference.blocks(shape)]
    assert all(part.numel() <= 20 for part in parts)
    assert torch.equal(reference.joined(parts, shape), x)


@pytest.mark.usefixtures("kernels")
def test_strides_do_not_matter() -> None:
    problem = Problem(RECIPES["AdafacMLP"], 0)
    scattered = tree_map(lambda t: torch.stack([t, t], -1)[..., 0], problem.arguments)
    assert_close(problem.results(scattered), problem.results(in_double(problem.arguments)), 3e-6)


@pytest.mark.usefixtures("kernels")
def test_lanes_within_lanes_are_lanes() -> None:
    problem = Problem(RECIPES["AdafacMLP"], 6)
    nested = tree_map(lambda t: t.unflatten(0, (2, 3)), problem.arguments)
    problem.lanes = 3
    inner = vmap(lambda *arguments: tuple(problem.results(arguments)))(*nested)
    problem.lanes = 6
    assert all(map(identical, [t.flatten(0, 1) for t in inner], problem.results(problem.arguments)))


@pytest.mark.usefixtures("kernels")
def test_lanes_may_share_a_network() -> None:
    problem = Problem(RECIPES["AdafacMLP"], 3)
    theta, *rest = problem.arguments
    shared = {name: t[:1].expand_as(t) for name, t in theta.items()}
    copied = {name: t.clone() for name, t in shared.items()}
    assert all(map(identical, problem.results((shared, *rest)), problem.results((copied, *rest))))


@pytest.mark.usefixtures("kernels")
def test_the_same_bits_on_any_number_of_threads() -> None:
    shapes = {**SHAPES, "large": (90, 700)}
    infos, found, before = param_infos(shapes), [], torch.get_num_threads()
    problems = [Problem(recipe, lanes, shapes=shapes) for recipe in RECIPES.values() for lanes in (0, 3)]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append([t for problem in problems for t in problem.results(problem.arguments)])
        _, grads, _, slots, *_ = problems[2].arguments
        found[-1] += tree_leaves(advance_statistics(slots, grads, infos, decays(), LOCAL))
    torch.set_num_threads(before)
    assert all(identical(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_what_the_kernel_does_not_fit_is_left_to_torch() -> None:
    problem = Problem(RECIPES["AdafacMLP"], 0)
    theta, grads, params, slots, gains, means = problem.arguments
    tensors = Tensors(grads, params, slots, INFOS, row_means(slots, INFOS, LOCAL))
    sources, axes = tensors.sources(problem.recipe), tensors.axes
    assert coordinatewise_cpu.feature_sums(problem.recipe, 0, axes, [t.double() for t in sources]) is None
    assert (
        coordinatewise_cpu.feature_sums(problem.recipe, 0, axes, [sources[0], sources[1][None], *sources[2:]]) is None
    )
    assert coordinatewise_cpu.feature_sums(problem.recipe, 0, [9] * len(axes), sources) is None
    sums = [s.value for s in feature_sums(problem.recipe, tensors).values()]
    layers = [theta[f"{kind}{i}"].unsqueeze(0) for i in range(3) for kind in "wb"]
    counts = [1] * len(sums)
    fits = coordinatewise_cpu.Inputs(layers, gains, means, sums, sources)
    for wrong in (
        fits._replace(weights=[layers[0][:, 1:], *layers[1:]]),
        fits._replace(gains=gains[1:]),
        fits._replace(means=means[:, 1:]),
        fits._replace(sums=[s[1:] for s in sums]),
    ):
        assert coordinatewise_cpu.coordinatewise(problem.recipe, 0, axes, counts, wrong) is None


@pytest.mark.parametrize("lanes", [0, 2])
def test_small_tensors_have_a_graph_of_torch(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, called, run = Problem(RECIPES["AdafacMLP"], lanes, shapes=SEVERAL), [], coordinatewise_cpu.run
    monkeypatch.setattr(coordinatewise_cpu, "run", lambda *given: called.append(given[1]) or run(*given))  # type: ignore[func-returns-value]
    want = problem.derivatives(problem.arguments)
    assert called
    called.clear()
    monkeypatch.setattr(coordinatewise_cpu, "SMALL", 1 << 16)
    assert_close(problem.derivatives(problem.arguments), [t.double() for t in want], 1e-4)
    assert not called


TRANSFORMS: dict[str, Any] = {
    "grad": (0, grad),
    "jacrev": (0, jacrev),
    "vmap of grad": (2, lambda f: vmap(grad(f))),
    "grad of vmap": (2, lambda f: grad(lambda arguments: vmap(f)(arguments).sum())),
}


@pytest.mark.parametrize(("lanes", "transform"), TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms_of_torch_are_derivatives_as_well(lanes: int, transform: Any) -> None:
    problem = Problem(RECIPES["AdafacMLP"], lanes, shapes=SEVERAL)
    arguments = tree_map(lambda t: t.clone().requires_grad_(), problem.arguments)
    torch.stack([t.square().mean() * (lanes or 1) for t in problem.results(arguments) if t.numel()]).sum().backward()
    want = [t.grad.double() for t in tree_leaves(arguments)]
    problem.lanes = 0

    def f(arguments: Any) -> Tensor:
        return torch.stack([t.square().mean() for t in problem.results(arguments) if t.numel()]).sum()

    assert_close(tree_leaves(transform(f)(problem.arguments)), want, 1e-4)


def test_inputs_that_all_elements_share_are_a_bias() -> None:
    g = generator()
    theta = {name: t.double() for name, t in init_mlp(g, [7, 4, 2]).items()}
    x, shared = torch.randn(5, 3, generator=g).double(), torch.randn(4, generator=g).double()
    own = with_shared(theta, 3, shared)
    want = torch.cat([x, shared.expand(5, 4)], -1) @ theta["w0"] + theta["b0"]
    torch.testing.assert_close(x @ own["w0"] + own["b0"], want)


def decays() -> Decays:
    return Decays(torch.tensor([0.2, 0.9, 0.999]), torch.tensor([0.95]), torch.tensor([0.4, 0.5, 0.99]))
