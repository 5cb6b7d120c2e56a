"""Network families: derivatives, lanes, what is sampled, data, the networks they name, and bad settings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from networks import LANES, NETWORKS, SMALL, draw
from tables import generator
from torch import Tensor
from torch.func import vmap

from l2o.evaluation.curves import run
from l2o.rules import SGD, Adam
from l2o.tasks import (
    CharRNN,
    CharTransformer,
    CoordinateMLP,
    ImageAutoencoder,
    ImageConv,
    ImageLoRA,
    ImageMLP,
    ImageResNet,
    LinearNetwork,
    WordMLP,
)
from l2o.tasks.image import image_mlps
from l2o.tasks.layers import ACTIVATIONS
from l2o.tasks.text import VOCABULARY
from l2o.types import ConfigurationError, TaskFamily, UnknownNameError
from l2o.unroll import sample_runs, unroll

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
    state = sample_runs(rule, {"log_lr": torch.zeros(LANES)}, family, torch.full((LANES,), 10), generator())
    state = state._replace(params=shaken(state.params), first_loss=state.first_loss.double())

    def total(log_lr: Tensor) -> Tensor:
        return unroll(rule, {"log_lr": log_lr}, family, state, 3, generator(4))[1].sum(0)

    log_lr = torch.full((LANES,), math.log(0.1), dtype=torch.float64, requires_grad=True)
    (by_backprop,) = torch.autograd.grad(total(log_lr).sum(), log_lr)
    with torch.no_grad():
        differences = (total(log_lr + 1e-6) - total(log_lr - 1e-6)) / 2e-6
    assert by_backprop.abs().min() > 1e-7
    torch.testing.assert_close(by_backprop, differences, rtol=1e-4, atol=1e-8)


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
        (ImageResNet(), math.log(10), 0.4),
        (WordMLP(), math.log(256), 0.05),
        (WordMLP(tied=False), math.log(256), 0.05),
        (CharRNN(), math.log(VOCABULARY), 0.1),
        (CharTransformer(), math.log(VOCABULARY), 0.25),
    ],
    ids=repr,
)
def test_the_first_loss_is_that_of_guessing(family: TaskFamily, expected: float, tolerance: float) -> None:
    losses = vmap(family.loss)(*draw(family, lanes=8))[0]
    assert abs(losses.mean().item() - expected) < tolerance


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
        (ConfigurationError, "channels=0", lambda: ImageResNet(channels=0)),
        (ConfigurationError, "words=1", lambda: WordMLP(words=1)),
        (ConfigurationError, "context=512: expected less than 512", lambda: WordMLP(context=512)),
        (ConfigurationError, r"conditions\[0\]=0.5", lambda: LinearNetwork(conditions=(0.5, 2.0))),
        (ConfigurationError, "init_scale=0", lambda: LinearNetwork(init_scale=0)),
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
