"""Network families: derivatives, lanes, what is sampled, data, the networks they name, and bad settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT
from networks import NETWORKS, SMALL, draw, lane
from tables import generator
from torch import Tensor, nn
from torch.func import vmap

from l2o.draws import LaneGenerator
from l2o.evaluation.curves import run
from l2o.rules import SGD, Adam
from l2o.tasks import CharRNN, CharTransformer, CoordinateMLP, ImageAutoencoder, ImageConv, ImageLoRA, ImageMLP
from l2o.tasks.conv import conv
from l2o.tasks.data import image_split
from l2o.tasks.image import image_mlps
from l2o.tasks.layers import ACTIVATIONS, init_norm, norm
from l2o.tasks.lora import linear_discriminant
from l2o.tasks.text import VOCABULARY
from l2o.types import ConfigurationError, TaskFamily, UnknownNameError
from l2o.unroll import start, unroll

LANES = 3
every_network = pytest.mark.parametrize("family", NETWORKS.values(), ids=NETWORKS.keys())


def shaken(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """In float64 and off the special points of the initialisation: LoRA's zeros, the offsets and gains of norms."""
    g = generator(9)
    return {k: p.double() + 0.1 * torch.randn(p.shape, generator=g, dtype=torch.float64) for k, p in params.items()}


def check_gradient(family: TaskFamily) -> None:
    """Along a random direction, in each lane."""
    params, *rest = draw(family)
    params = shaken(params)
    g = generator(1)
    way = {k: torch.randn(p.shape, generator=g, dtype=p.dtype) for k, p in params.items()}

    def at(step: float) -> Tensor:
        return vmap(family.loss)({k: p + step * way[k] for k, p in params.items()}, *rest)[0]

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    by_autograd = torch.stack([torch.autograd.grad(x, step, retain_graph=True)[0] for x in at(step)])
    assert at(0.0).dtype == torch.float64
    torch.testing.assert_close(by_autograd, (at(1e-6) - at(-1e-6)) / 2e-6, rtol=1e-5, atol=1e-8)


@every_network
def test_gradients_agree_with_finite_differences(family: TaskFamily) -> None:
    check_gradient(family)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_has_its_gradient(activation: str) -> None:
    check_gradient(ImageMLP(width=4, activation=activation, **SMALL))


@every_network
def test_two_differentiated_steps_agree_with_finite_differences(family: TaskFamily) -> None:
    """The derivative of the losses of an unroll in the learning rate of SGD, lane by lane."""
    rule = SGD()
    state = start(rule, {"log_lr": torch.zeros(LANES)}, family, torch.full((LANES,), 10), generator())
    state = state._replace(params=shaken(state.params), first_loss=state.first_loss.double())

    def total(log_lr: Tensor) -> Tensor:
        return unroll(rule, {"log_lr": log_lr}, family, state, 3, generator(4))[1].sum(0)

    log_lr = torch.full((LANES,), math.log(0.1), dtype=torch.float64, requires_grad=True)
    (by_backprop,) = torch.autograd.grad(total(log_lr).sum(), log_lr)
    with torch.no_grad():
        differences = (total(log_lr + 1e-6) - total(log_lr - 1e-6)) / 2e-6
    assert by_backprop.abs().min() > 1e-7
    torch.testing.assert_close(by_backprop, differences, rtol=1e-4, atol=1e-8)


@every_network
def test_a_lane_is_drawn_the_same_beside_any_others(family: TaskFamily) -> None:
    def drawn(ids: list[int]) -> list[Tensor]:
        g = LaneGenerator(seed=7, ids=torch.tensor(ids))
        data = family.sample(g, len(ids))
        found = [data, *family.init(data, g), family.batch(data, "train", g), family.batch(data, "valid", g)]
        return [t for each in found for name, t in each.items() if name != "lane"]  # which numbers those drawn

    for whole, part in zip(drawn([0, 1, 2, 3, 4]), drawn([3, 1]), strict=True):
        assert torch.equal(whole[[3, 1]], part)


NETWORK_CLASSES = {type(family).__name__: type(family) for family in NETWORKS.values()}


def presets() -> dict[str, TaskFamily]:
    """The presets of these families by the names of their files, without those that would download MNIST."""
    files = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / "configs" / "task").glob("*.yaml")}
    names = {stem: str(settings.pop("_target_")).removeprefix("l2o.tasks.") for stem, settings in sorted(files.items())}
    return {
        stem: NETWORK_CLASSES[name](**files[stem])
        for stem, name in names.items()
        if name in NETWORK_CLASSES and files[stem].get("dataset") != "mnist"
    }


PRESETS = presets()


@pytest.mark.parametrize("name", PRESETS)
def test_adam_lowers_the_loss_of_a_preset(name: str) -> None:
    rule = Adam(lr=0.01)
    theta = {k: t.expand(2) for k, t in rule.init_theta(generator()).items()}
    train = run(rule, theta, PRESETS[name], 30, generator(1), evaluations=1).train
    assert train.min() > 0
    assert train[-5:].mean() < 0.9 * train[:2].mean()


TINY = 0.02  # initial parameters are scaled by it, so that the outputs are near 0


@pytest.mark.parametrize(
    ("family", "expected", "tolerance"),
    [
        (ImageMLP(), math.log(10), 0.15),
        (ImageMLP(init_scale=(TINY, TINY)), math.log(10), 1e-3),
        (ImageMLP(criterion="mse", init_scale=(TINY, TINY)), 0.1, 1e-3),
        (ImageMLP(norm="batch", init_scale=(TINY, TINY)), math.log(10), 0.05),
        (ImageConv(), math.log(10), 0.15),
        (ImageConv(norm="batch"), math.log(10), 0.15),
        (ImageAutoencoder(), math.log(2), 0.05),
        (CharRNN(), math.log(VOCABULARY), 0.1),
        (CharTransformer(), math.log(VOCABULARY), 0.25),
    ],
    ids=repr,
)
def test_the_first_loss_is_that_of_guessing(family: TaskFamily, expected: float, tolerance: float) -> None:
    losses = vmap(family.loss)(*draw(family, lanes=8))[0]
    assert abs(losses.mean().item() - expected) < tolerance


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


@pytest.mark.parametrize("side", [2, 5, 8])
def test_conv_is_torchs(side: int) -> None:
    x, weight = torch.randn(2, 3, side, side), torch.randn(4, 3, 3, 3)
    expected = F.conv2d(x, weight, stride=2, padding=1).flatten(2)
    torch.testing.assert_close(conv(x.flatten(2), weight), expected)


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


@pytest.mark.parametrize("family", [CharTransformer(width=8, depth=2, length=6), CharRNN(width=8, length=6)])
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


def test_image_mlps_are_all_combinations() -> None:
    families = image_mlps(widths=(8, 16), depths=[1, 2], norms=("none", "layer"), half="meta_test", batch_size=4)
    assert len(families) == 8
    expected = ImageMLP(width=16, depth=1, norm="layer", half="meta_test", batch_size=4)
    assert families["mlp_16x1_relu_layer_cross_entropy"] == expected


@pytest.mark.parametrize(
    ("error", "text", "make"),
    [
        (UnknownNameError, "norm 'batchnorm'.*did you mean 'batch'", lambda: ImageMLP(norm="batchnorm")),
        (UnknownNameError, "criterion 'l2'.*cross_entropy, error, mse", lambda: ImageMLP(criterion="l2")),
        (ConfigurationError, "pool=3: expected a divisor of 8, the side of digits", lambda: ImageMLP(pool=3)),
        (ConfigurationError, r"effective_batch=\[1, 129\].*highest <= 128", lambda: ImageMLP(effective_batch=(1, 129))),
        (ConfigurationError, r"effective_batch\[0\]=0", lambda: ImageConv(effective_batch=[0, 4])),
        (ConfigurationError, r"effective_batch\[0\]=1.5 .*whole", lambda: ImageMLP(effective_batch=(1.5, 4))),
        (ConfigurationError, r"subset=\[9, 3\].*lowest <= highest", lambda: ImageMLP(subset=(9, 3))),
        (ConfigurationError, "subset=9 .*tuple or list", lambda: ImageMLP(subset=9)),
        (ConfigurationError, r"init_scale\[0\]=0.0 .*over 0", lambda: ImageAutoencoder(init_scale=(0.0, 1.0))),
        (ConfigurationError, r"input_scale=\[1.0\].*lowest, highest", lambda: ImageMLP(input_scale=(1.0,))),
        (ConfigurationError, r"label_noise=\[0.0, 1.5\].*highest <= 1", lambda: ImageMLP(label_noise=(0.0, 1.5))),
        (ConfigurationError, r"label_noise\[0\]=-0.1", lambda: ImageMLP(label_noise=(-0.1, 0.5))),
        (ConfigurationError, "norm='batch' with batches of 1", lambda: ImageMLP(norm="batch", batch_size=1)),
        (ConfigurationError, "norm='batch' with batches of 1", lambda: ImageConv(norm="batch", effective_batch=(1, 8))),
        (ConfigurationError, r"channels\[1\]=0", lambda: ImageConv(channels=(4, 0))),
        (ConfigurationError, "channels=8 .*tuple or list", lambda: ImageConv(channels=8)),
        (UnknownNameError, "activation 'swish'", lambda: ImageConv(activation="swish")),
        (UnknownNameError, "criterion 'cross_entropy'", lambda: ImageAutoencoder(criterion="cross_entropy")),
        (ConfigurationError, "code=0", lambda: ImageAutoencoder(code=0)),
        (ConfigurationError, r"hidden\[0\]=-1", lambda: ImageAutoencoder(hidden=[-1])),
        (UnknownNameError, "text 'topic'.*did you mean 'topics'", lambda: CharRNN("topic")),
        (UnknownNameError, "half 'test'", lambda: CharTransformer(half="test")),
        (UnknownNameError, "cell 'gur'.*did you mean 'gru'", lambda: CharRNN(cell="gur")),
        (ConfigurationError, "length=4096: expected less than 4096", lambda: CharRNN(length=4096)),
        (ConfigurationError, "width=10: expected a multiple of heads=4", lambda: CharTransformer(width=10, heads=4)),
        (ConfigurationError, "rank=0", lambda: ImageLoRA(rank=0)),
        (ConfigurationError, "depth=0", lambda: ImageLoRA(depth=0)),
        (UnknownNameError, "shift 'pixels'.*images, labels", lambda: ImageLoRA(shift="pixels")),
        (UnknownNameError, "half 'both'", lambda: CoordinateMLP("both")),
        (ConfigurationError, "side=129: expected at most 128", lambda: CoordinateMLP(side=129)),
        (ConfigurationError, "frequency=0", lambda: CoordinateMLP(frequency=0)),
        (UnknownNameError, "activation 'sin'.*did you mean 'sine'", lambda: CoordinateMLP(activation="sin")),
    ],
)
def test_bad_settings_are_named(error: type[Exception], text: str, make: Any) -> None:
    with pytest.raises(error, match=text):
        make()
