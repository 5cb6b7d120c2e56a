"""Replays of runs that were recorded from the public implementations: the copies in tests/golden."""

import dataclasses

import pytest
import torch
from conftest import ROOT

from l2o.interop.references import REFERENCES
from l2o.interop.traces import read_trace, replay

COPIES = {path.stem: path for path in sorted((ROOT / "tests" / "golden").glob("*.npz"))}
SENSITIVE = [
    *("mlp_lopt", "adafac_mlp_lopt", "nn_adam_decay", "rnn_mlp_lopt"),
    *("velo_hyperv2_small", "celo_adam_random", "celo2"),
]
every_copy = pytest.mark.parametrize("path", COPIES.values(), ids=COPIES.keys())


@every_copy
def test_replay_agrees_with_the_reference(path):
    errors = replay(read_trace(path))
    assert len(errors) >= 5
    assert all(error.within for error in errors), errors


def test_runs_that_are_not_copied_agree_too(golden):
    """The large ones and those of released weights."""
    paths = [path for path in sorted(golden.glob("*.npz")) if path.stem not in COPIES]
    assert {"celo", "celo_adam", "velo_hyperv2"} <= {path.stem for path in paths}
    for path in paths:
        errors = replay(read_trace(path))
        assert all(error.within for error in errors), (path, errors)


def test_every_reference_was_recorded():
    rules = {type(read_trace(path).rule) for path in COPIES.values()}
    assert rules == {reference.rule for reference in REFERENCES.values()}


@pytest.mark.parametrize("name", SENSITIVE)
def test_a_replay_sees_each_tensor_of_theta(name):
    trace = read_trace(COPIES[name])
    assert all(error.within for error in replay(trace))
    for leaf, t in trace.theta.items():
        noise = torch.randn(t.shape, generator=torch.Generator().manual_seed(3))
        changed = dataclasses.replace(trace, theta={**trace.theta, leaf: 1.02 * t + 0.01 * noise})
        assert not all(error.within for error in replay(changed)), leaf
