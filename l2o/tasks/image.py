"""Image classification by small multi-layer perceptrons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from l2o._checks import whole
from l2o._names import choose
from l2o.draws import integers, uniform
from l2o.kernels import perceptron
from l2o.tasks.data import HALVES, IMAGE_SETS, image_split
from l2o.types import Batch, Buffers, Grads, Params, Split, TaskData, TaskFamily

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "tanh": torch.tanh, "gelu": F.gelu}


@dataclass(frozen=True)
class ImageMLP(TaskFamily):
    """A perceptron with ``depth`` hidden layers of ``width`` units, trained by cross-entropy.

    dataset, half: the images, see `l2o.tasks.data.image_split`.     activation: a key of ``ACTIVATIONS``.
    batch_size: images a batch, drawn with replacement.

    Parameters: ``{layer}.weight [lanes, out, in]`` and ``{layer}.bias [lanes, out]``, layers counted from 0; lanes
    differ in their initialisation and batches. Batches: ``x [lanes, batch, pixels]`` and int64 ``y [lanes, batch]``.
    Raises `UnknownNameError` for an unknown name, `ConfigurationError` for a size that is not a positive whole number.
    """

    dataset: str = "digits"
    half: str = "meta_train"
    width: int = 32
    depth: int = 1
    activation: str = "relu"
    batch_size: int = 128

    keyed = True

    def __post_init__(self) -> None:
        choose("dataset", self.dataset, IMAGE_SETS)
        choose("half", self.half, HALVES)
        choose("activation", self.activation, ACTIVATIONS)
        for name, least in (("width", 1), ("depth", 0), ("batch_size", 1)):
            whole(name, getattr(self, name), least)

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        return {"lane": torch.arange(lanes, device=generator.device)}

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        """As `torch.nn.Linear` does by default: weights and biases uniform within ±1/√fan_in."""
        images = IMAGE_SETS[self.dataset]
        sizes = [images.pixels, *[self.width] * self.depth, images.classes]
        lanes = len(data["lane"])
        params = {}
        for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            bound = fan_in**-0.5
            params[f"{layer}.weight"] = uniform(generator, lanes, fan_out, fan_in, low=-bound, high=bound)
            params[f"{layer}.bias"] = uniform(generator, lanes, fan_out, low=-bound, high=bound)
        return params, {}

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        images, labels = image_split(self.dataset, self.half, split, generator.device)
        index = integers(generator, len(images), len(data["lane"]), self.batch_size)
        return {"x": images[index], "y": labels[index]}

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        activation = ACTIVATIONS[self.activation]
        # Images are float32; parameters of another dtype (float64 in gradient checks) decide the arithmetic.
        x = batch["x"].to(params["0.weight"].dtype)
        for layer in range(self.depth):
            x = activation(F.linear(x, params[f"{layer}.weight"], params[f"{layer}.bias"]))
        logits = F.linear(x, params[f"{self.depth}.weight"], params[f"{self.depth}.bias"])
        return F.cross_entropy(logits, batch["y"]), buffers

    def fused_gradient(
        self, params: Params, buffers: Buffers, data: TaskData, batch: Batch
    ) -> tuple[Tensor, Buffers, Grads] | None:
        layers = [(params[f"{i}.weight"], params[f"{i}.bias"]) for i in range(self.depth + 1)]
        result = perceptron.gradient(self.activation, layers, batch["x"], batch["y"])
        if result is None:
            return None
        losses, grads = result
        by_name = {f"{i}.{kind}": g for i, (w, b) in enumerate(grads) for kind, g in (("weight", w), ("bias", b))}
        return losses, buffers, {name: by_name[name] for name in params}
