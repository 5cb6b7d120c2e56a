"""What processes are given of tensors that rules take as a whole, and how the slots of shards are cut."""

from __future__ import annotations

import math

import pytest
import torch
from tables import RULES

from l2o.ops.kinds import param_infos
from l2o.optim.exchange import chunks, holders
from l2o.optim.sharded import slot_axes
from l2o.types import ParamInfo


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("length", [0, 1, 4, 7])
def test_shards_are_those_of_torch(length: int, count: int) -> None:
    theirs = [len(part) for part in torch.arange(length).chunk(count)] if length else []
    ours = chunks(length, count)
    assert ours == theirs + [0] * (count - len(theirs))
    assert sum(ours) == length


SHAPES = {"a": (8, 8), "b": (8, 8), "c": (4, 4), "d": (2, 2), "bias": (8,)}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_matrix_is_one_processs_work_and_none_has_much_more_than_another(count: int) -> None:
    infos = param_infos(SHAPES)
    found = holders(["a", "b", "c", "d"], ["bias"], infos, count)
    work = [sum(math.prod(SHAPES[key]) for key, own in found.items() if own[0] == rank) for rank in range(count)]
    assert list(found) == ["a", "b", "c", "d"]
    assert max(work) - min(work) <= 64
    assert (count == 1) == (max(work) > 84)


@pytest.mark.parametrize(("others", "smallest"), [(["bias"], 3), ([], 3), (["c"], 1)])
def test_a_process_without_a_tensor_of_a_kind_gets_the_smallest(others: list[str], smallest: int) -> None:
    """So that all of them ask for the same sums; its update does not count."""
    whole = [key for key in ("a", "d") if key not in others]
    found = holders(whole, others, param_infos(SHAPES), 4)
    assert len(found["d"]) == smallest
    assert {own for ranks in found.values() for own in ranks} == (set(range(4)) if smallest > 1 else {0, 1})


@pytest.mark.parametrize(
    ("rule", "shape", "axis", "expected"),
    [
        ("Adam", (6, 5), 0, {"m": 0, "v": 0, "count": None}),
        ("MLP", (6, 5), 1, {"m": 2}),
        ("Steered", (6, 5, 2), 0, {"m": 0, "d": 0}),
        ("Steered-normalized", (6, 5), 0, {"m": 0, "row": 0, "col": None}),
        ("Steered-normalized", (6, 5), 1, {"m": 1, "row": None, "col": 0}),
        ("AdafacMLP", (6, 5), 1, {"m": 2, "row": 1, "col": None}),
    ],
)
def test_slots_are_cut_with_their_parameter(rule: str, shape: tuple[int, ...], axis: int, expected: object) -> None:
    theta = {name: t.to("meta") for name, t in RULES[rule].init_theta(torch.Generator()).items()}
    found = slot_axes(RULES[rule], theta, ParamInfo(shape, "matrix"), axis)
    assert found.pop("had_gradient") == axis
    assert {name: found[name] for name in expected} == expected
