"""The recurrent scheduler of VeLO and Celo, and the orthogonalisation of Celo2, against what they are said to be."""

import pytest
import torch
from tables import generator

from l2o.ops import scheduler
from l2o.ops.networks import lstm_cell
from l2o.ops.orthogonal import orthogonalize


def weights(inputs=5, hidden=3):
    g = generator(1)
    theta = scheduler.init_scheduler(g, inputs, hidden, {})
    return {k: t.double() + 0.3 * torch.randn(t.shape, generator=g, dtype=torch.float64) for k, t in theta.items()}


def test_a_schedule_is_an_lstm_over_each_tensor_and_the_largest_activation_of_all():
    theta, x = weights(), torch.randn(5, 4, dtype=torch.float64)
    slots = {name: {slot: torch.randn(3, dtype=torch.float64) for slot in "hc"} for name in "abcd"}
    loudest = torch.relu(theta["w_mix"].T @ x + theta["b_mix"][:, None]).max(1).values
    for i, (name, new) in enumerate(scheduler.schedule(theta, x, slots).items()):
        seen = theta["w_in"].T @ x[:, i] + theta["b_in"] + loudest
        before = (t[:, None] for t in (seen, slots[name]["h"], slots[name]["c"]))
        h, c = lstm_cell(*before, theta["lstm_w"], theta["lstm_b"])
        torch.testing.assert_close(new["h"], h[:, 0])
        torch.testing.assert_close(new["c"], c[:, 0])


@pytest.mark.parametrize("shape", [(4, 6), (9, 3), (5, 5), (2, 3, 4, 6), (1, 1)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_singular_vectors(shape):
    x = torch.randn(shape, generator=generator(2), dtype=torch.float64)
    got = orthogonalize(x)
    assert got.shape == x.shape
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    core = u.mT @ got @ vh.mT
    values = core.diagonal(dim1=-2, dim2=-1)
    assert ((values > 0.6) & (values < 1.3)).all()
    torch.testing.assert_close(core, torch.diag_embed(values))
    torch.testing.assert_close(orthogonalize(x.mT), got.mT)


def test_orthogonalize_has_a_finite_derivative_at_zero():
    x = torch.zeros(2, 3, requires_grad=True)
    got = orthogonalize(x)
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert got.equal(torch.zeros(2, 3))
    assert grad.isfinite().all()
