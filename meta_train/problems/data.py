"""The data of the problems: MNIST, and what Python, scikit-learn and scikit-image carry; each loaded once.

Texts are those of ``help()`` (`pydoc_data.topics`), which differ a little between versions of Python.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from itertools import chain
from pydoc_data import topics
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l2o.tasks.data import from_scikit_learn
from l2o.tasks.mnist import load_mnist

STRETCH = 40
"""Words of a text that is to be classified."""


def single(array: NDArray[Any]) -> Tensor:
    """Return a NumPy array as a float32 tensor of its shape."""
    return torch.tensor(array, dtype=torch.float32)


@cache
def mnist() -> tuple[Tensor, Tensor]:
    """Return MNIST's test images, float32 ``[n, 1, 28, 28]`` in [0, 1], and labels, int64 ``[n]``; raises
    `DataError`."""
    images, labels = load_mnist("t10k")
    return single(images.reshape(-1, 1, 28, 28) / 255.0), torch.tensor(labels.astype(np.int64))


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return digits, float32 ``[1797, 64]`` in [0, 1], and labels, int64 ``[1797]``."""
    found = from_scikit_learn("digits")
    return single(found.data / 16), torch.tensor(found.target)


@cache
def table(name: str) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """Return features ``[n, columns]`` and targets ``[n]`` of a table of scikit-learn, as they are."""
    found = from_scikit_learn(name)
    return found.data, found.target


def standardised(array: NDArray[np.float64]) -> Tensor:
    """Return columns with mean 0 and deviation 1, float32 of the array's shape."""
    return single((array - array.mean(0)) / array.std(0))


def diabetes() -> tuple[Tensor, NDArray[np.float64]]:
    """Return features of deviation near one, float32 ``[442, 10]``, and targets as they are, ``[442]``."""
    features, targets = table("diabetes")
    return single(features * 20), targets


@cache
def points(shape: str, count: int, **settings: float) -> Tensor:
    """Return points of scikit-learn's ``make_<shape>``, a little noisy: float32 ``[count, 2]``."""
    from sklearn import datasets

    return single(getattr(datasets, f"make_{shape}")(count, noise=0.05, random_state=0, **settings)[0])


@cache
def astronaut(side: int) -> Tensor:
    """Return a picture in colour, float32 ``[side, side, 3]`` in [0, 1]."""
    from skimage import data, transform

    return single(transform.resize(data.astronaut(), (side, side), anti_aliasing=True))


@cache
def camera() -> Tensor:
    """Return a grey picture, float32 ``[512, 512]`` in [0, 1]."""
    from skimage import data

    return single(data.camera() / 255.0)


@cache
def words(vocabulary: int) -> Tensor:
    """Return Python's help as the numbers of its words, int64 ``[n]``; 0 stands for all that are rarer."""
    found = re.findall(r"[a-z]+|[^\sa-z]", " ".join(topics.topics.values()).lower())
    numbers = {word: i + 1 for i, (word, _) in enumerate(Counter(found).most_common(vocabulary - 1))}
    return torch.tensor([numbers.get(word, 0) for word in found])


@cache
def characters() -> tuple[Tensor, int]:
    """Return Python's help as the numbers of its characters, int64 ``[n]``, and how many different ones there are."""
    text = " ".join(topics.topics.values())
    numbers = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([numbers[character] for character in text]), len(numbers)


@cache
def stretches(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return stretches of the eight longest texts of Python's help, int64 ``[n, STRETCH]``, and from which they are,
    int64 ``[n]``."""
    texts = [re.findall(r"[a-z]+", text.lower()) for text in topics.topics.values()]
    common = Counter(chain.from_iterable(texts)).most_common(vocabulary)
    numbers = {word: i for i, (word, _) in enumerate(common)}
    known = [[numbers[word] for word in text if word in numbers] for text in texts]
    cut = [(text[i : i + STRETCH], k) for k, text in enumerate(known) for i in range(0, len(text) - STRETCH, STRETCH)]
    longest = [k for k, _ in Counter(k for _, k in cut).most_common(8)]
    kept = [(stretch, longest.index(k)) for stretch, k in cut if k in longest]
    return torch.tensor([stretch for stretch, _ in kept]), torch.tensor([label for _, label in kept])
