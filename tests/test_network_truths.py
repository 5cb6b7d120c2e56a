"""What networks are: layers as torch has them, adapters where they start, words, targets and shifted images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import LANES, SMALL, draw, lane
from tables import generator
from torch import nn

from l2o.tasks import (
    CharRNN,
    CharTransformer,
    ImageFineTune,
    ImageLoRA,
    ImageMLP,
    ImageResNet,
    LinearNetwork,
    WordMLP,
)
from l2o.tasks.conv import conv
from l2o.tasks.data import HALVES, SPLITS, image_split
from l2o.tasks.layers import init_norm, norm
from l2o.tasks.lora import linear_discriminant
from l2o.tasks.text import VOCABULARY
from l2o.tasks.words import word_split


@pytest.mark.parametrize("axes", [(), (4,)])
@pytest.mark.parametrize("kind", ["layer", "batch"])
def test_norms_are_torchs(kind: str, axes: tuple[int, ...]) -> None:
    x = torch.randn(6, 3, *axes, dtype=torch.float64)
    params = {k: t[0].double() for k, t in init_norm(kind, "n", 1, 3, x.device).items()}
    expected = F.batch_norm(x, None, None, training=True) if kind == "batch" else F.layer_norm(x, x.shape[1:])
    torch.testing.assert_close(norm(kind, params, "n", x), expected)
    share = torch.full((6,), 1 / 6, dtype=torch.float64)
    torch.testing.assert_close(norm(kind, params, "n", x, share), expected)
    moved = {"n.gain": torch.tensor([2.0, 3.0, 4.0]), "n.offset": torch.tensor([-1.0, 0.0, 1.0])}
    per_channel = (1, 3, *[1] * len(axes))
    by_hand = expected * moved["n.gain"].view(per_channel) + moved["n.offset"].view(per_channel)
    torch.testing.assert_close(norm(kind, moved, "n", x), by_hand)


@pytest.mark.parametrize(("features", "groups"), [(8, 4), (6, 2), (3, 1)])
def test_group_norm_is_torchs(features: int, groups: int) -> None:
    x = torch.randn(5, features, 7, dtype=torch.float64)
    params = {k: t[0].double() for k, t in init_norm("group", "n", 1, features, x.device).items()}
    torch.testing.assert_close(norm("group", params, "n", x), F.group_norm(x, groups))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [2, 5, 8])
def test_conv_is_torchs(side: int, stride: int) -> None:
    x, weight = torch.randn(2, 3, side, side), torch.randn(4, 3, 3, 3)
    expected = F.conv2d(x, weight, stride=stride, padding=1).flatten(2)
    torch.testing.assert_close(conv(x.flatten(2), weight, stride), expected)


@pytest.mark.parametrize(("cell", "layer"), [("gru", nn.GRU), ("lstm", nn.LSTM), ("rnn_tanh", nn.RNN)])
def test_recurrent_models_are_torchs(cell: str, layer: Callable[..., nn.Module]) -> None:
    family = CharRNN(cell=cell, width=4, batch_size=2, length=6)
    params, _, _, batch = lane(draw(family))
    tokens = batch["tokens"][:, :-1]
    reference = layer(VOCABULARY, 4, batch_first=True)
    reference.load_state_dict(
        {
            "weight_ih_l0": params["embedding.weight"].T,
            "weight_hh_l0": params["hidden.weight"],
            "bias_ih_l0": torch.zeros_like(params["hidden.bias"]),
            "bias_hh_l0": params["hidden.bias"],
        }
    )
    states = reference(F.one_hot(tokens, VOCABULARY).float())[0]
    expected = F.linear(states, params["output.weight"], params["output.bias"])
    torch.testing.assert_close(family.logits(params, tokens), expected)


@pytest.mark.parametrize(
    "family",
    [
        CharTransformer(width=8, depth=2, length=6),
        CharTransformer(width=8, length=6, norm_first=False),
        CharRNN(width=8, length=6),
    ],
)
def test_no_prediction_sees_the_characters_after_it(family: Any) -> None:
    params, _, _, batch = lane(draw(family))
    tokens = batch["tokens"][:, :-1]
    changed = tokens.clone()
    changed[:, 3] = (tokens[:, 3] + 1) % VOCABULARY
    before, after = family.logits(params, tokens), family.logits(params, changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).flatten(2).any(2).all()


@pytest.mark.parametrize("shift", ["labels", "images"])
def test_lora_starts_at_its_frozen_network(shift: str) -> None:
    family = ImageLoRA(width=8, shift=shift)
    params, frozen, data, batch = lane(draw(family))
    hidden = F.relu(F.linear(batch["x"], frozen["0.weight"], frozen["0.bias"]))
    logits = F.linear(hidden, frozen["1.weight"], frozen["1.bias"])
    loss, buffers = family.loss(params, frozen, data, batch)
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch["y"]))
    assert buffers is frozen


@pytest.mark.parametrize("shift", ["labels", "images"])
def test_fine_tuning_starts_where_adapters_do(shift: str) -> None:
    adapted, whole = ImageLoRA(width=8, shift=shift), ImageFineTune(width=8, shift=shift)
    params, frozen, data, batch = lane(draw(adapted))
    own, _ = whole.init(whole.sample(generator(), 1), generator())
    loss = whole.loss({k: p[0] for k, p in own.items()}, {}, data, batch)[0]
    torch.testing.assert_close(loss, adapted.loss(params, frozen, data, batch)[0])


def test_residual_blocks_that_give_nothing_leave_a_convolution() -> None:
    family = ImageResNet(channels=3, depth=2, **SMALL)
    params, _, _, batch = lane(draw(family))
    for layer in (2, 4):
        params[f"{layer}.weight"], params[f"{layer}.bias"] = torch.zeros(3, 3, 3, 3), torch.zeros(3)
    x = F.conv2d(batch["x"].view(-1, 1, 4, 4), params["0.weight"], params["0.bias"], stride=2, padding=1)
    logits = F.linear(F.relu(x).mean((2, 3)), params["output.weight"], params["output.bias"])
    torch.testing.assert_close(family.loss(params, {}, {}, batch)[0], F.cross_entropy(logits, batch["y"]))


def test_words_are_the_texts_most_frequent_ones_and_no_window_is_in_two_parts() -> None:
    parts = [word_split("topics", half, split, 32, "cpu") for half in HALVES for split in SPLITS]
    counts = torch.bincount(torch.cat([p.flatten() for p in parts]), minlength=32)[1:]
    assert (counts[:-1] >= 0.9 * counts[1:]).all()
    rows = [tuple(row) for part in parts for row in part.tolist()]
    assert len(set(rows)) == len(rows)


def test_rows_of_words_that_no_batch_holds_have_no_gradient_unless_tied() -> None:
    for tied in (True, False):
        family = WordMLP(words=200, batch_size=4, tied=tied)
        params, _, data, batch = lane(draw(family))
        table = params["embedding.weight"].requires_grad_()
        (grad,) = torch.autograd.grad(family.loss(params, {}, data, batch)[0], table)
        seen = torch.zeros(200, dtype=torch.bool)
        seen[batch["words"][:, :-1].flatten()] = True
        assert grad[seen].any(1).all()
        assert grad[~seen].any(1).all() == tied


def test_a_linear_network_that_is_its_target_has_no_loss_but_the_noise() -> None:
    family = LinearNetwork(batch_size=4000, noise=0.3, conditions=(100.0, 100.0))
    params, _, data, batch = lane(draw(family))
    loss = family.loss({"0.weight": data["target"]}, {}, data, batch)[0].item()
    assert loss == pytest.approx(0.5 * 8 * 0.09, rel=0.05)
    assert (data["root"].max() / data["root"].min()).item() == pytest.approx(10.0)
    weight = params["0.weight"].double().requires_grad_()
    data = {k: t.double() for k, t in data.items()}
    curvature = torch.autograd.functional.hessian(lambda w: family.loss({"0.weight": w}, {}, data, batch)[0], weight)
    assert torch.linalg.cond(curvature[0, :, 0]).item() == pytest.approx(100.0, rel=0.3)


@pytest.mark.parametrize("shift", ["labels", "images"])
def test_loras_tasks_are_the_images_shifted(shift: str) -> None:
    family = ImageLoRA(shift=shift)
    data, plain = family.sample(generator(), LANES), ImageMLP()
    shifted, same = (f.batch(data, "valid", generator(1)) for f in (family, plain))
    order = data["order"]
    assert all(torch.equal(row.sort().values, torch.arange(len(row))) for row in order)
    for k in range(LANES):
        if shift == "labels":
            assert torch.equal(shifted["x"], same["x"])
            assert torch.equal(shifted["y"][k], order[k][same["y"][k]])
        else:
            assert torch.equal(shifted["y"], same["y"])
            rolls = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]
            images, target = same["x"][k].view(-1, 8, 8), shifted["x"][k].view(-1, 8, 8)
            assert any(torch.equal(images.roll(by, (1, 2)), target) for by in rolls)


def test_the_frozen_network_classifies() -> None:
    x, y = image_split("digits", "meta_train", "train", "cpu")
    weight, bias = linear_discriminant(x.double(), y, 10)
    held_out, labels = image_split("digits", "meta_train", "valid", "cpu")
    logits = held_out.double() @ weight.T + bias
    assert (logits.argmax(1) == labels).double().mean() > 0.85
    assert F.cross_entropy(logits, labels) < 0.6


def test_linear_discriminant_is_the_posterior_of_normal_classes() -> None:
    """Two classes of one feature: the log-odds are (μ₁ - μ₀)(x - (μ₀ + μ₁) / 2) / σ² plus those of the counts."""
    x, labels = torch.tensor([[-1.5], [-0.5], [0.0], [1.0], [2.0]]).double(), torch.tensor([0, 0, 1, 1, 1])
    weight, bias = linear_discriminant(x, labels, 2)
    variance = 2 * (2 * 0.25 + 2 * 1.0) / 5  # the ridge doubles it
    point = 0.3
    expected = (1.0 + 1.0) * (point - 0.0) / variance + math.log(3 / 2)
    logits = weight[:, 0] * point + bias
    assert (logits[1] - logits[0]).item() == pytest.approx(expected)
