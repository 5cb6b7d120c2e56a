"""Dropout as a pure function of a key, and the random functions that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from l2o.tasks.stateless import Stateless, keep_mask, seeded
from l2o.types import ConfigurationError

KEYS = torch.tensor([0, 1, 2**62 + 12345, -7])


def masks(keys: Tensor, call: int, p: float, n: int = 20000) -> Tensor:
    return vmap(lambda key: keep_mask(key, call, (n,), p))(keys)


@pytest.mark.parametrize("p", [0.0, 0.01, 0.5, 0.9, 1.0])
def test_masks_keep_what_they_should(p: float) -> None:
    """Within five standard deviations in each of 100 masks of neighbouring keys and calls, a hash's worst case."""
    kept = torch.cat([masks(torch.arange(20), call, p) for call in range(5)]).double()
    tolerance = 5 * (p * (1 - p) / kept.shape[1]) ** 0.5
    assert ((kept.mean(1) - (1 - p)).abs() <= tolerance + 1e-12).all()


@pytest.mark.parametrize("keys", [KEYS, torch.arange(20)])
def test_masks_of_keys_and_calls_are_unrelated(keys: Tensor) -> None:
    kept = torch.cat([masks(keys, call, 0.5) for call in range(5)]).double() * 2 - 1
    correlation = kept @ kept.T / kept.shape[1]
    assert (correlation - torch.eye(len(kept))).abs().max() < 5 / kept.shape[1] ** 0.5
    shifted = (kept[:, 1:] * kept[:, :-1]).mean(1)
    assert shifted.abs().max() < 5 / kept.shape[1] ** 0.5


def test_masks_are_the_same_everywhere_and_for_ever() -> None:
    """Against splitmix64 in Python's unlimited integers: what wraps and shifts must do so as in uint64."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    for key in KEYS.tolist():
        stream = mix((key + 4 * 0x9E3779B97F4A7C15) % 2**64)
        expected = [mix((stream + i * 0x9E3779B97F4A7C15) % 2**64) / 2**64 >= 0.3 for i in range(50)]
        assert keep_mask(torch.tensor(key), 3, (5, 10), 0.3).flatten().tolist() == expected


def run(module: nn.Module, x: Tensor, key: int | None) -> Tensor:
    with Stateless(None if key is None else torch.tensor(key)):
        return module.train(key is not None)(x)


# name -> (module of dropout alone, shape of its input, axes over which a mask is constant)
DROPOUTS: dict[str, tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = {
    "Dropout": (nn.Dropout(0.4), (50, 40), ()),
    "Dropout in place": (nn.Dropout(0.4, inplace=True), (50, 40), ()),
    "Dropout of a scalar": (nn.Dropout(0.4), (), ()),
    "Dropout1d": (nn.Dropout1d(0.4), (50, 40, 3), (2,)),
    "Dropout1d without batch": (nn.Dropout1d(0.4), (900, 3), (1,)),
    "Dropout2d": (nn.Dropout2d(0.4), (50, 40, 3, 2), (2, 3)),
    "Dropout3d": (nn.Dropout3d(0.4), (50, 40, 3, 2, 2), (2, 3, 4)),
    "Dropout3d without batch": (nn.Dropout3d(0.4), (900, 3, 2, 2), (1, 2, 3)),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_layers(name: str) -> None:
    module, shape, constant = DROPOUTS[name]
    x = torch.rand(shape) + 1
    ratio = run(module, x.clone(), 7) / x
    assert all(any(abs(r - e) < 1e-5 for e in (0, 1 / 0.6)) for r in ratio.unique().tolist())
    assert ratio.numel() == 1 or abs((ratio > 0).double().mean().item() - 0.6) < 0.1
    if constant:
        assert torch.equal(ratio.amax(constant) > 0, ratio.amin(constant) > 0)
    assert torch.equal(run(module, x.clone(), None), x)


MODULES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "Dropout": (nn.Dropout(0.4), (5, 8)),
    "transformer layer": (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True), (2, 5, 8)),
    "transformer": (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True), 2),
        (2, 5, 8),
    ),
    "attention": (nn.MultiheadAttention(8, 2, dropout=0.3), (5, 8)),
    "GRU": (nn.GRU(8, 4, num_layers=2, dropout=0.5), (5, 8)),
}


def output(module: nn.Module, x: Tensor, key: int | None) -> Tensor:
    result = run(_self_attention(module), x, key)
    return result[0] if isinstance(result, tuple) else result


def _self_attention(module: nn.Module) -> Any:
    if not isinstance(module, nn.MultiheadAttention):
        return module
    wrapped = nn.Module()
    wrapped.attention = module
    wrapped.forward = lambda x: module(x, x, x)
    return wrapped


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_modules_with_dropout_depend_on_the_key_alone(name: str, grad: bool) -> None:
    module, shape = MODULES[name]
    x = torch.randn(shape)
    state = torch.get_rng_state()
    with torch.set_grad_enabled(grad):
        one, same, other = (output(module, x, key) for key in (3, 3, 4))
        assert torch.equal(one, same)
        assert not torch.allclose(one, other)
        assert torch.equal(state, torch.get_rng_state())
        plain = _self_attention(module).eval()(x)
    torch.testing.assert_close(output(module, x, None), plain[0] if isinstance(plain, tuple) else plain)


def test_calls_in_one_forward_have_their_own_masks() -> None:
    x = torch.ones(100)
    with Stateless(torch.tensor(1)):
        assert not torch.equal(F.dropout(x, 0.5), F.dropout(x, 0.5))


@pytest.mark.parametrize("gqa", [False, True])
def test_attention_drops_weights_and_keeps_their_mean(gqa: bool) -> None:
    query, key = torch.randn(4, 3, 8), torch.randn(2 if gqa else 4, 20, 8)
    value = torch.eye(20).expand(len(key), 20, 20)  # the output then is the weights
    kept = F.scaled_dot_product_attention(query, key, value, enable_gqa=gqa)
    outputs = []
    for seed in range(400):
        with Stateless(torch.tensor(seed)):
            outputs.append(F.scaled_dot_product_attention(query, key, value, dropout_p=0.25, enable_gqa=gqa))
    ratio = torch.stack(outputs) / kept
    assert ((ratio.abs() < 1e-4) | ((ratio - 1 / 0.75).abs() < 1e-4)).all()
    assert (ratio.mean(0) - 1).abs().max() < 5 * (0.25 / 0.75 / 400) ** 0.5


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: F.alpha_dropout(x, 0.5, training=True), "alpha_dropout"),
        (lambda x: F.rrelu(x, training=True), "rrelu"),
        (lambda x: nn.FeatureAlphaDropout()(x), "feature_alpha_dropout"),
        (F.gumbel_softmax, "gumbel_softmax"),
        (torch.rand_like, "rand_like"),
        (lambda x: torch.rand(3), "rand"),
        (lambda x: x + torch.empty(2, 3).normal_(), "normal_"),
        (lambda x: torch.dropout(x, 0.5, True), "dropout"),
        (torch.bernoulli, "bernoulli"),
    ],
)
def test_other_random_functions_are_refused(function: Callable[[Tensor], Tensor], name: str) -> None:
    x = torch.rand(2, 3)
    with Stateless(torch.tensor(1)), pytest.raises(ConfigurationError, match=f"^{name} draws from torch's global"):
        function(x)


def test_random_layers_are_the_identity_or_fixed_in_evaluation() -> None:
    x = torch.randn(2, 3)
    with Stateless(None):
        assert torch.equal(F.alpha_dropout(x, 0.5, training=False), x)
        torch.testing.assert_close(F.rrelu(x, 0.2, 0.4), F.leaky_relu(x, 0.3))


@pytest.mark.parametrize(
    ("key", "p", "text"),
    [(None, 0.5, "on in evaluation.*training=self.training"), (1, 1.5, "p=1.5"), (1, -1.0, "p=-1")],
)
def test_dropout_that_makes_no_sense(key: int | None, p: float, text: str) -> None:
    with Stateless(None if key is None else torch.tensor(key)), pytest.raises(ConfigurationError, match=text):
        F.dropout(torch.ones(3), p)


def test_seeded_restores_the_global_generator() -> None:
    before = torch.get_rng_state()
    drawn = []
    for seed in (1, 1, 2):
        with seeded(seed, torch.device("cpu")):
            drawn.append(torch.rand(3))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
