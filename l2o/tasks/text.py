"""Text as tensors, split once and for all into meta-training and meta-test blocks."""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from l2o.checks import lookup
from l2o.tasks.data import HALVES, SPLITS, split_indices
from l2o.types import DataError

BLOCK = 4096
"""Characters of a block. Blocks are dealt out to the parts, so that no window of text lies in two of them."""

CHARACTERS = "\n" + string.printable[: -len(string.whitespace)] + " "
VOCABULARY = len(CHARACTERS) + 1
"""The printable characters of ASCII, a space, a line's end, and one token for all others."""


def _load_topics() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "text='topics' is pydoc_data.topics of the standard library, which this Python lacks"
        ) from error
    return "\n".join(topics[name] for name in sorted(topics))


TEXTS: dict[str, Callable[[], str]] = {"topics": _load_topics}
"""``topics``: CPython's language reference as pydoc shows it, half a million characters; versions of Python differ."""


def encode(text: str) -> Tensor:
    """Return tokens, int64 ``[len(text)]``, from 0 to ``VOCABULARY - 1``, of which the last stands for unknown
    characters."""
    known = {character: token for token, character in enumerate(CHARACTERS)}
    return torch.tensor([known.get(character, VOCABULARY - 1) for character in text])


def text_split(text: str, half: str, split: str, device: torch.device | str) -> Tensor:
    """Return one part of a text: tokens, int64 ``[blocks, BLOCK]``, each block a connected piece; not to be written to.

    text: a key of ``TEXTS``.     half: ``meta_train`` or ``meta_test``.     split: ``train`` or ``valid``.

    The four parts are disjoint and the same in every process; what does not fill a block at the end is left out.
    Raises `UnknownNameError` for an unknown name, `DataError` where the text is missing.
    """
    lookup("text", text, TEXTS)
    lookup("half", half, HALVES)
    lookup("split", split, SPLITS)
    return _text_split(text, half, split, torch.device(device))


@cache
def _text_split(text: str, half: str, split: str, device: torch.device) -> Tensor:
    blocks = _blocks(text)
    return blocks[np.sort(split_indices(len(blocks), half, split))].to(device)


@cache
def _blocks(text: str) -> Tensor:
    tokens = encode(TEXTS[text]())
    return tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)
