"""Models of text, word by word."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from l2o.checks import check_int, lookup
from l2o.random import integers, normal
from l2o.tasks.data import HALVES, split_indices
from l2o.tasks.layers import init_linear, linear
from l2o.tasks.text import TEXTS
from l2o.types import Batch, Buffers, ConfigurationError, Kind, Params, Split, TaskData, TaskFamily

BLOCK = 512
"""Words of a block; blocks are dealt out to the parts."""
_EMBEDDING_STD = 0.1


@dataclass(frozen=True)
class WordMLP(TaskFamily):
    """The next word from the ones before it (Bengio et al. 2003), by cross-entropy.

    A perceptron of one hidden layer takes the embeddings of ``context`` words to a code; the scores of words are its
    products with their embeddings, so that rows of the table get gradients from both ends.

    text: a key of `l2o.tasks.text.TEXTS`.     half: ``meta_train`` or ``meta_test``.
    words: size of the vocabulary, the most frequent words of the text and one token for all others.
    tied: whether the output has the embeddings' weights, or ``output.weight [lanes, words, width]`` of its own; then
        rows that no batch holds have no gradient.
    width: of the embeddings.     hidden: of the perceptron.     batch_size: windows a batch, drawn with replacement.

    Lanes differ in their initialisation and batches. Batches: int64 ``words [lanes, batch, context + 1]``. Parameters:
    ``embedding.weight [lanes, words, width]``, ``hidden``, ``code``, a ``weight`` and a ``bias`` each, ``output.bias``.
    Raises `UnknownNameError` for an unknown name, `ConfigurationError` for a number out of its range.
    """

    text: str = "topics"
    half: str = "meta_train"
    _: KW_ONLY
    words: int = 256
    context: int = 3
    width: int = 16
    hidden: int = 32
    tied: bool = True
    batch_size: int = 32

    keyed = True

    def __post_init__(self) -> None:
        lookup("text", self.text, TEXTS)
        lookup("half", self.half, HALVES)
        for name, least in {"words": 2, "width": 1, "hidden": 1, "batch_size": 1}.items():
            check_int(name, getattr(self, name), least)
        if check_int("context", self.context) >= BLOCK:
            raise ConfigurationError(f"context={self.context}: expected less than {BLOCK}, the words of a block")

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        return {"lane": torch.arange(lanes, device=generator.device)}

    @property
    def kinds(self) -> Mapping[str, Kind]:
        return {"embedding.weight": "embedding"}

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        lanes, table = len(data["lane"]), (self.words, self.width)
        params = {"embedding.weight": _EMBEDDING_STD * normal(generator, lanes, *table)}
        params |= init_linear("hidden", generator, lanes, self.hidden, self.context * self.width)
        params |= init_linear("code", generator, lanes, self.width, self.hidden)
        params["output.bias"] = torch.zeros(lanes, self.words, dtype=torch.float32, device=generator.device)
        return params if self.tied else params | {
            "output.weight": _EMBEDDING_STD * normal(generator, lanes, *table)
        }, {}

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        blocks = word_split(self.text, self.half, split, self.words, generator.device)
        starts = BLOCK - self.context
        window = integers(generator, len(blocks) * starts, len(data["lane"]), self.batch_size, 1)
        begin = window // starts * BLOCK + window % starts
        return {"words": blocks.flatten()[begin + torch.arange(self.context + 1, device=begin.device)]}

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        before, target = batch["words"][:, :-1], batch["words"][:, -1]
        hidden = torch.relu(linear(params, "hidden", params["embedding.weight"][before].flatten(1)))
        table = params["embedding.weight" if self.tied else "output.weight"]
        logits = F.linear(linear(params, "code", hidden), table, params["output.bias"])
        return F.cross_entropy(logits, target), buffers


def word_split(text: str, half: str, split: str, words: int, device: torch.device | str) -> Tensor:
    """Return one part of a text: int64 ``[blocks, BLOCK]`` from 0, unknown, to ``words - 1``; not to be written to."""
    return _word_split(text, half, split, words, torch.device(device))


@cache
def _word_split(text: str, half: str, split: str, words: int, device: torch.device) -> Tensor:
    blocks = _blocks(text, words)
    return blocks[np.sort(split_indices(len(blocks), half, split))].to(device)


@cache
def _blocks(text: str, words: int) -> Tensor:
    found = re.findall(r"[a-z]+|[.,]", TEXTS[text]().lower())
    # Ties in the order of the text, as Counter has them: the same in every process.
    number = {word: i for i, (word, _) in enumerate(Counter(found).most_common(words - 1), 1)}
    tokens = torch.tensor([number.get(word, 0) for word in found])
    return tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)
