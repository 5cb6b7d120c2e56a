"""The table of network families, tiny, with the variants that take another path; and what their tests share."""

from __future__ import annotations

from typing import Any

from tables import generator
from torch import Tensor

from l2o.tasks import (
    CharRNN,
    CharTransformer,
    CoordinateMLP,
    ImageAutoencoder,
    ImageConv,
    ImageFineTune,
    ImageLoRA,
    ImageMLP,
    ImageResNet,
    LinearNetwork,
    WordMLP,
)
from l2o.types import TaskFamily

LANES = 4

SMALL: dict[str, Any] = {"batch_size": 8, "pool": 2}
SAMPLED: dict[str, Any] = {
    "effective_batch": (3, 7),
    "subset": (5, 50),
    "init_scale": (0.5, 2.0),
    "label_noise": (0.1, 0.5),
    "input_scale": (0.5, 2.0),
}
UNLABELLED = {name: SAMPLED[name] for name in ("effective_batch", "subset", "init_scale")}
WINDOW: dict[str, Any] = {"length": 5, "batch_size": 3}
PIXELS: dict[str, Any] = {"side": 8, "batch_size": 8, "width": 4}

NETWORKS: dict[str, TaskFamily] = {
    "MLP": ImageMLP(width=4, depth=2, **SMALL),
    "MLP layer norm": ImageMLP(width=4, depth=2, norm="layer", activation="tanh", **SMALL),
    "MLP batch norm, mse": ImageMLP(width=4, depth=2, norm="batch", activation="gelu", criterion="mse", **SMALL),
    "MLP sampled": ImageMLP(width=4, activation="silu", **SMALL, **SAMPLED),
    "MLP sampled, batch norm, mse": ImageMLP(width=4, norm="batch", criterion="mse", **SMALL, **SAMPLED),
    "conv": ImageConv(channels=(2, 3), activation="elu", **SMALL),
    "conv layer norm": ImageConv(channels=(2, 3), norm="layer", activation="sigmoid", **SMALL),
    "conv batch norm": ImageConv(channels=(2, 3), norm="batch", **SMALL),
    "conv sampled, batch norm": ImageConv(channels=(2,), norm="batch", activation="leaky_relu", **SMALL, **SAMPLED),
    "autoencoder": ImageAutoencoder(hidden=(4,), code=2, activation="tanh", **SMALL),
    "autoencoder mse": ImageAutoencoder(hidden=(5, 4), code=2, criterion="mse", **SMALL),
    "autoencoder sampled": ImageAutoencoder(hidden=(4,), code=2, **SMALL, **UNLABELLED),
    "GRU": CharRNN(width=3, **WINDOW),
    "LSTM": CharRNN(width=3, cell="lstm", **WINDOW),
    "RNN": CharRNN(width=3, cell="rnn_tanh", **WINDOW),
    "transformer": CharTransformer(width=4, depth=2, **WINDOW),
    "LoRA labels": ImageLoRA(width=8, rank=2, **SMALL),
    "LoRA images": ImageLoRA(width=8, depth=2, rank=2, shift="images", activation="tanh", **SMALL, **SAMPLED),
    "conv group norm": ImageConv(channels=(2, 8), norm="group", **SMALL, **SAMPLED),
    "residual": ImageResNet(channels=2, depth=1, **SMALL),
    "residual sampled, group norm": ImageResNet(channels=4, norm="group", activation="tanh", **SMALL, **SAMPLED),
    "transformer post-norm": CharTransformer(width=4, norm_first=False, **WINDOW),
    "fine-tuning": ImageFineTune(width=8, **SMALL, **SAMPLED),
    "words": WordMLP(words=12, context=2, width=3, hidden=4, batch_size=5),
    "words untied": WordMLP(words=12, context=2, width=3, hidden=4, batch_size=5, tied=False),
    "linear": LinearNetwork(inputs=4, outputs=3, batch_size=5, noise=0.1),
    "deep linear": LinearNetwork(inputs=4, outputs=2, width=3, depth=3, batch_size=5),
    "coordinates": CoordinateMLP(frequency=3.0, **PIXELS),
    "coordinates relu": CoordinateMLP(activation="relu", **PIXELS),
}


def draw(family: TaskFamily, split: str = "train", lanes: int = LANES, seed: int = 0) -> list[dict[str, Tensor]]:
    """Parameters, buffers, data and batch: the arguments of ``loss``."""
    g = generator(seed)
    data = family.sample(g, lanes)
    params, buffers = family.init(data, g)
    return [params, buffers, data, family.batch(data, split, g)]  # type: ignore[arg-type]


def lane(arguments: list[dict[str, Tensor]], k: int = 0) -> list[dict[str, Tensor]]:
    return [{name: t[k] for name, t in each.items()} for each in arguments]
