"""Models of text, character by character: a recurrent network and a transformer."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from l2o.checks import check_int, lookup
from l2o.random import integers, normal, uniform
from l2o.tasks.data import HALVES
from l2o.tasks.layers import init_linear, init_norm, linear, norm
from l2o.tasks.recurrent import CELLS
from l2o.tasks.text import BLOCK, TEXTS, VOCABULARY, text_split
from l2o.types import Batch, Buffers, ConfigurationError, Kind, Params, Split, TaskData, TaskFamily

_GATES = {"lstm": 4, "gru": 3}
_STATES = {"lstm": 2}
_EMBEDDING_STD = 0.02
"""Of token and position embeddings (Radford et al. 2019, GPT-2, as in its released code)."""


@dataclass(frozen=True)
class CharTask(TaskFamily):
    """Prediction of the next character in windows of a text, by cross-entropy.

    text: a key of `l2o.tasks.text.TEXTS`.     half: ``meta_train`` or ``meta_test``.
    length: characters that are predicted in each window.     batch_size: windows a batch, drawn with replacement.

    Lanes differ in their initialisation and batches. Batches: int64 ``tokens [lanes, batch, length + 1]``.
    Raises `UnknownNameError` for an unknown name, `ConfigurationError` for a number out of its range.
    """

    text: str = "topics"
    half: str = "meta_train"
    _: KW_ONLY
    length: int = 32
    batch_size: int = 16

    keyed = True

    def __post_init__(self) -> None:
        lookup("text", self.text, TEXTS)
        lookup("half", self.half, HALVES)
        check_int("batch_size", self.batch_size)
        if check_int("length", self.length) >= BLOCK:
            raise ConfigurationError(f"length={self.length}: expected less than {BLOCK}, the length of a block of text")

    @abc.abstractmethod
    def logits(self, params: Params, tokens: Tensor) -> Tensor:
        """Return ``[batch, length, VOCABULARY]`` for the characters after each of ``tokens [batch, length]``; of one
        lane."""

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        return {"lane": torch.arange(lanes, device=generator.device)}

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        blocks = text_split(self.text, self.half, split, generator.device)
        starts = BLOCK - self.length
        window = integers(generator, len(blocks) * starts, len(data["lane"]), self.batch_size, 1)
        begin = window // starts * BLOCK + window % starts
        return {"tokens": blocks.flatten()[begin + torch.arange(self.length + 1, device=begin.device)]}

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        tokens = batch["tokens"]
        logits = self.logits(params, tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), buffers


@dataclass(frozen=True)
class CharRNN(CharTask):
    """A recurrent network of one layer; its state is zero where a window begins.

    cell: a key of `l2o.tasks.recurrent.CELLS`: gru, lstm, rnn_tanh or rnn_relu.     width: of its state.
    Text and windows: see `CharTask`.

    Parameters: ``embedding.weight [lanes, VOCABULARY, gates * width]``, whose rows are what a character adds to the
    gates; ``hidden`` and ``output``, a ``weight [lanes, out, width]`` and a ``bias [lanes, out]`` each. Initially
    uniform within ±1/√width, as those of `torch.nn.GRU` are.
    """

    cell: str = "gru"
    width: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        lookup("cell", self.cell, CELLS)
        check_int("width", self.width)

    @property
    def kinds(self) -> Mapping[str, Kind]:
        return {"embedding.weight": "embedding"}

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        lanes, bound = len(data["lane"]), self.width**-0.5
        gates = _GATES.get(self.cell, 1) * self.width
        table = uniform(generator, lanes, VOCABULARY, gates, low=-bound, high=bound)
        hidden = init_linear("hidden", generator, lanes, gates, self.width)
        return {"embedding.weight": table} | hidden | init_linear(
            "output", generator, lanes, VOCABULARY, self.width
        ), {}

    def logits(self, params: Params, tokens: Tensor) -> Tensor:
        cell, inputs = CELLS[self.cell], params["embedding.weight"][tokens]
        state = tuple(inputs.new_zeros(len(tokens), self.width) for _ in range(_STATES.get(self.cell, 1)))
        outputs = []
        for each in inputs.unbind(1):
            state = cell(each, linear(params, "hidden", state[0]), state)
            outputs.append(state[0])
        return linear(params, "output", torch.stack(outputs, 1))


@dataclass(frozen=True)
class CharTransformer(CharTask):
    """A causal transformer (Vaswani et al. 2017, arXiv 1706.03762).

    norm_first: normalise before the sublayers and the output, as GPT-2 does, or else after each sublayer, as the paper.
    width: of the embeddings, a multiple of ``heads``.     depth: blocks of attention and a perceptron of 4 × width.
    Text and windows: see `CharTask`.

    Parameters: ``token`` and ``position`` embeddings ``[lanes, VOCABULARY or length, width]``; in each block
    ``{block}.qkv``, ``{block}.mix``, ``{block}.up`` and ``{block}.down``, and at last ``output``: a ``weight [lanes,
    out, in]`` and a ``bias [lanes, out]`` each; ``{block}.before_qkv``, ``{block}.before_up`` and ``before_output``, or
    ``{block}.after_mix`` and ``{block}.after_down``: a ``gain`` and an ``offset [lanes, width]`` each.
    """

    width: int = 32
    depth: int = 1
    heads: int = 2
    norm_first: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("depth", self.depth)
        if check_int("width", self.width) % check_int("heads", self.heads):
            raise ConfigurationError(f"width={self.width}: expected a multiple of heads={self.heads}")

    @property
    def kinds(self) -> Mapping[str, Kind]:
        return {"token.weight": "embedding", "position.weight": "embedding"}

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        lanes, width = len(data["lane"]), self.width
        params = {
            "token.weight": _EMBEDDING_STD * normal(generator, lanes, VOCABULARY, width),
            "position.weight": _EMBEDDING_STD * normal(generator, lanes, self.length, width),
        }
        layers = {
            "qkv": (3 * width, width),
            "mix": (width, width),
            "up": (4 * width, width),
            "down": (width, 4 * width),
        }
        for block in range(self.depth):
            for name, shape in layers.items():
                params |= init_linear(f"{block}.{name}", generator, lanes, *shape)
        for name in self._norms():
            params |= init_norm("layer", name, lanes, width, generator.device)
        return params | init_linear("output", generator, lanes, VOCABULARY, width), {}

    def _norms(self) -> list[str]:
        places = ("before_qkv", "before_up") if self.norm_first else ("after_mix", "after_down")
        each = [f"{block}.{place}" for block in range(self.depth) for place in places]
        return [*each, "before_output"] if self.norm_first else each

    def logits(self, params: Params, tokens: Tensor) -> Tensor:
        norms = self._norms()

        def normed(name: str, x: Tensor) -> Tensor:
            return norm("layer", params, name, x) if name in norms else x

        # Positions are rows like any other but in attention.
        x = (params["token.weight"][tokens] + params["position.weight"]).flatten(0, 1)
        for block in range(self.depth):
            mixed = self._attention(params, f"{block}", normed(f"{block}.before_qkv", x))
            x = normed(f"{block}.after_mix", x + mixed)
            up = linear(params, f"{block}.up", normed(f"{block}.before_up", x))
            x = normed(f"{block}.after_down", x + linear(params, f"{block}.down", F.gelu(up)))
        output = linear(params, "output", normed("before_output", x))
        return output.view(*tokens.shape, VOCABULARY)

    def _attention(self, params: Params, block: str, x: Tensor) -> Tensor:
        """Causal attention over ``x [batch * length, width]`` by plain products: the fused ones have no second
        derivatives."""
        split = (-1, self.length, 3, self.heads, self.width // self.heads)
        q, k, v = linear(params, f"{block}.qkv", x).view(split).permute(2, 0, 3, 1, 4)
        future = torch.ones(self.length, self.length, dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        return linear(params, f"{block}.mix", mixed)
