"""Networks that are a picture: from coordinates to colours."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from l2o.checks import check_float, check_int, lookup
from l2o.random import integers
from l2o.tasks.layers import ACTIVATIONS, init_linear, linear
from l2o.tasks.pictures import PICTURES, SIDE, pictures, pixel_split
from l2o.types import Batch, Buffers, ConfigurationError, Params, Split, TaskData, TaskFamily

_SINE = "sine"


@dataclass(frozen=True)
class CoordinateMLP(TaskFamily):
    """A perceptron from a place in a picture to the colour there, by the mean squared error over red, green and blue.

    half: which pictures, see `l2o.tasks.pictures.PICTURES`. A lane has a random crop of ``side`` × ``side`` pixels
        of one of them, four fifths of the pixels for training, the rest for validation.
    batch_size: pixels a batch, drawn with replacement.
    width, depth: of the hidden layers.
    activation: ``sine``, which makes a SIREN (Sitzmann et al. 2020, arXiv 2006.09661): layers ``sin(ω (W x + c))``,
        their initialisation by section 3.2 (biases as in its code); or a key of ``ACTIVATIONS``, initialised as
        `init_linear` does.
    frequency: ω. The paper has 30 for pictures of 512 × 512; the smaller the crop, the lower the frequencies in it.

    Data: int64 ``picture``, ``top`` and ``left``, each ``[lanes]``. Parameters: ``{layer}.weight [lanes, out, in]``
    and ``{layer}.bias [lanes, out]``, layers counted from 0. Batches: ``x [lanes, batch, 2]``, row and column in
    [-1, 1], and ``y [lanes, batch, 3]`` in [0, 1].
    Raises `UnknownNameError` for an unknown name, `ConfigurationError` for a number out of its range.
    """

    half: str = "meta_train"
    _: KW_ONLY
    side: int = 32
    batch_size: int = 128
    width: int = 32
    depth: int = 2
    activation: str = _SINE
    frequency: float = 30.0

    keyed = True

    def __post_init__(self) -> None:
        lookup("half", self.half, PICTURES)
        lookup("activation", self.activation, {_SINE: None, **ACTIVATIONS})
        for name in ("batch_size", "width", "depth"):
            check_int(name, getattr(self, name))
        check_float("frequency", self.frequency, above=0.0)
        if check_int("side", self.side, 4) > SIDE:
            raise ConfigurationError(f"side={self.side}: expected at most {SIDE}, the side of the pictures")

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        places = SIDE - self.side + 1
        return {
            "picture": integers(generator, len(PICTURES[self.half]), lanes),
            "top": integers(generator, places, lanes),
            "left": integers(generator, places, lanes),
        }

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        params: Params = {}
        lanes = len(data["picture"])
        for layer, (fan_in, fan_out) in enumerate(pairwise([2, *[self.width] * self.depth, 3])):
            params |= init_linear(f"{layer}", generator, lanes, fan_out, fan_in)
            if self.activation == _SINE:
                # Section 3.2: 1/in in the first layer; √(6/in)/ω in those behind a sine.
                bound = math.sqrt(6 / fan_in) / self.frequency if layer else 1 / fan_in
                params[f"{layer}.weight"] = params[f"{layer}.weight"] * (bound * math.sqrt(fan_in))
        return params, {}

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        pixels = pixel_split(self.side, split, generator.device)
        chosen = pixels[integers(generator, len(pixels), len(data["picture"]), self.batch_size)]
        row, column = chosen // self.side, chosen % self.side
        index = (data["picture"].unsqueeze(1) * SIDE + data["top"].unsqueeze(1) + row) * SIDE
        colours = pictures(self.half, generator.device).flatten(0, 2)
        place = torch.stack([row, column], 2) * (2.0 / (self.side - 1)) - 1.0
        return {"x": place, "y": colours[index + data["left"].unsqueeze(1) + column]}

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        dtype = params["0.weight"].dtype
        x = batch["x"].to(dtype)
        for layer in range(self.depth):
            x = self._activate(linear(params, f"{layer}", x))
        return F.mse_loss(linear(params, f"{self.depth}", x), batch["y"].to(dtype)), buffers

    def _activate(self, x: Tensor) -> Tensor:
        return torch.sin(self.frequency * x) if self.activation == _SINE else ACTIVATIONS[self.activation](x)
