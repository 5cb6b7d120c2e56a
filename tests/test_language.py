"""The language model of the GPU command: real text, and optimizers that train it."""

import sysconfig
from pathlib import Path

import pytest
import torch

from l2o.bench.language import OPTIMIZERS, text, train
from l2o.bench.share import Decoder

SMALL = Decoder(300, 16, 16, 1, 2)
FIRST = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))[0]


def test_text_is_that_of_the_standard_library():
    found = text(200, 1 << 16)
    spelt = bytes(b for pair in found.tolist() for b in (pair % 256, pair // 256))
    assert (FIRST.read_bytes() + spelt)[: len(spelt)] == spelt


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name):
    found = train(name, SMALL, 40, (4, 2), torch.device("cpu"))
    assert found["tokens"] == 4 * 2 * 16
    assert found["losses"][-1] < found["losses"][0] - 0.05
    assert 0.0 < found["time_share"] < 1.0
