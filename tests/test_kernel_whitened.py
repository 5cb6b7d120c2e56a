"""The kernel's passes over entries in a basis do what torch's operations do, and refuse what they would misread."""

import pytest
import torch
from tables import generator

from l2o.kernels.build import available
from l2o.kernels.whitened import follow, settle, weigh
from l2o.ops.eigenbasis import BASES, MEANS, Turned, Whitening, followed, weighed
from l2o.ops.moments import Shares
from l2o.ops.numeric import unit
from l2o.ops.scales import tempered
from l2o.types import L2OError

SHAPES = [(1, 3, 1), (3, 20, 17), (2, 300, 230), (1, 7, 1)]  # of several blocks, too
LEAST = {torch.float32: 1e-10, torch.bfloat16: 1e-5}


@pytest.fixture(autouse=True)
def kernels() -> None:
    assert available("steered")


def drawn(shape: tuple[int, ...], count: int, scale: float = 1.0) -> list[torch.Tensor]:
    return [scale * torch.randn(shape, generator=generator(seed)) for seed in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("dtype", LEAST)
def test_weigh_is_weighed(shape: tuple[int, ...], cautious: bool, dtype: torch.dtype) -> None:
    seen, m, v = drawn(shape, 3, 1e-3)
    v = v.square() * torch.rand(shape, generator=generator(9)) ** 8  # of axes with hardly a gradient, too
    seen[:, 0] = 0.0
    how = Whitening(Shares(torch.tensor(0.9), torch.tensor(0.1)), torch.tensor(0.95), cautious=cautious)
    turned = Turned(seen, m.clone(), v.clone(), {"rows": torch.eye(2, dtype=dtype)}, {})
    assert turned.least == LEAST[dtype]
    expected = weighed(how, turned)
    scaled = weigh(seen, m, v, 0.9, 0.95, cautious, turned.least)
    for own, theirs in zip((scaled, m, v), expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_settle_brings_to_size_what_had_a_gradient(shape: tuple[int, ...]) -> None:
    direction, grad, before = drawn(shape, 3)
    grad[:, 0], before[:, 0] = 0.0, 0.0
    chosen = torch.where((grad != 0) | (before != 0), direction, 0.0)
    root = (shape[1] * shape[2]) ** 0.5
    for power, expected in ((None, chosen), (0.0, unit(chosen, (-2, -1), root)), (0.5, tempered(chosen, 0.5))):
        d = before.clone()
        settle(direction, grad, d, power)
        torch.testing.assert_close(d, expected)


def side(matrices: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A mean of products of condition 10, and a basis near its eigenvectors, but of one matrix all zeros."""
    vectors, turn = (torch.linalg.qr(t)[0] for t in drawn((matrices, n, n), 2))
    mean = vectors * torch.logspace(0, -1, n) @ vectors.mT
    mean[-1] *= matrices == 1
    near = torch.linalg.qr(vectors + 0.1 * turn)[0]
    return mean, near.contiguous()


@pytest.mark.parametrize(
    "shape", [(1, 2, 3), (2, 16, 17), (2, 33, 50), (1, 300, 70), (2, 9, 1), (2, 1, 20), (1, 3, 530)]
)
@pytest.mark.parametrize("carried", [False, True])
def test_bases_follow_in_place(shape: tuple[int, int, int], carried: bool) -> None:
    matrices, *sizes = shape
    sides = {at: side(matrices, n) for at, n in enumerate(sizes) if n > 1}
    means = {MEANS[at]: mean for at, (mean, _) in sides.items()}
    turned, v = drawn(shape, 2)
    kept = {BASES[at]: basis for at, (_, basis) in sides.items()} | {"turned": turned, "v": v.square()}
    how = Whitening(Shares(torch.tensor(0.9), torch.tensor(0.1)), torch.tensor(0.95), carried=carried)
    double = [{name: t.double() for name, t in each.items()} for each in (kept, means)]
    expected = followed(how, *double)
    to = {name: t.clone() for name, t in kept.items()}
    follow([means.get(name) for name in MEANS], [to.get(name) for name in BASES], to["turned"], to["v"], carried)
    for name, want in expected.items():
        torch.testing.assert_close(to[name], want.float(), rtol=1e-4, atol=3e-5)
    assert torch.equal(to["v"], kept["v"]) == (not carried)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_bases_follow_whatever_the_scale(scale: float) -> None:
    mean, basis = side(1, 40)
    small, large = [t.clone() for t in (basis, basis)]
    for to, of in ((small, mean), (large, scale * mean)):
        follow([None, of], [None, to], torch.zeros(1, 1, 40), torch.zeros(1, 1, 40), True)
    torch.testing.assert_close(small, large, rtol=0.0, atol=1e-5)


def test_a_side_that_is_none_of_the_matrix_is_refused() -> None:
    mean, basis = side(1, 3)
    with pytest.raises(L2OError, match=r"expected means of \(1, 4, 4\), got \(1, 3, 3\)"):
        follow([mean, None], [basis, None], torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), True)


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(2, 3, 4, dtype=torch.float64), torch.zeros(2, 4, 3), torch.zeros(2, 4, 3).mT, torch.zeros(3, 4)],
    ids=["float64", "shape", "transposed", "one"],
)
def test_what_would_be_misread_is_refused(wrong: torch.Tensor) -> None:
    right = torch.zeros(2, 3, 4)
    with pytest.raises(L2OError, match=r"expected contiguous float32 of \(2, 3, 4\)"):
        settle(right, right.clone(), wrong, None)


def test_there_may_be_no_matrix() -> None:
    empty = torch.zeros(0, 3, 4)
    assert weigh(empty, empty.clone(), empty.clone(), 0.9, 0.9, True, 1e-10).shape == (0, 3, 4)
