"""Training runs whose trouble is known: what is said of them, and since which step."""

import numpy as np
import pytest
import torch

import l2o
from l2o.evaluation.diagnosis import Diagnosis, gravest
from l2o.types import ConfigurationError

N = 1000
T = np.arange(1, N + 1)
FALLING = 2.3 * np.exp(-T / 300) + 0.05
NOISE = np.random.default_rng(0).normal(size=N)
INF = np.inf


def noisy(losses, amount=0.1):
    return losses * (1 + amount * NOISE)


def with_spikes(at, factor=10.0):
    losses = noisy(FALLING)
    losses[at] *= factor
    return losses


RUNS = {
    "smooth": (FALLING, None, "descending", None),
    "noisy": (noisy(FALLING), None, "descending", None),
    "very noisy": (noisy(FALLING, 0.3), None, "descending", None),
    "solved": (np.exp(-T / 20.0), None, "descending", None),
    "one spike": (with_spikes([500]), None, "descending", None),
    "early spikes": (with_spikes([20, 40, 60]), None, "descending", None),
    "negative": (-T / 10.0, None, "descending", None),
    "flat from the start": (noisy(np.full(N, 2.3), 0.01), None, "stalled", 1),
    "a plateau": (np.maximum(FALLING, 0.8), None, "stalled", 330),
    "a noisy plateau": (noisy(np.maximum(FALLING, 0.8), 0.05), None, "stalled", 330),
    "a NaN": (np.where(T == 417, np.nan, FALLING), None, "diverged", 417),
    "infinite from some step": (np.where(T >= 417, INF, FALLING), None, "diverged", 417),
    "rising for good": (np.where(T < 600, FALLING, 2.0 * T / 600), None, "diverged", 720),
    "rising at once": (1.0 + T / 100, None, "diverged", 2),
    "spikes": (with_spikes([400, 600, 800]), None, "unstable", 401),
    "overfitting": (FALLING, [2.0, 1.5, 1.0, 1.1, 1.3, 1.6], "overfitting", 500),
    "validation that stays": (FALLING, [2.0, 1.5, 1.0, 1.02, 1.0, 1.05], "descending", None),
    "validation with a gap": (FALLING, [4.0, 3.5, 3.0, 2.9, 2.8], "descending", None),
    "spikes, and overfitting": (with_spikes([400, 600, 800]), [1.0, 2.0, 3.0], "unstable", 401),
}


@pytest.mark.parametrize(("losses", "valid", "state", "step"), RUNS.values(), ids=RUNS.keys())
def test_what_is_wrong_is_said_and_since_when(losses, valid, state, step):
    found = l2o.diagnose(losses, valid)
    assert (found.state, found.step is None) == (state, step is None)
    assert step is None or found.step == pytest.approx(step, abs=0.04 * N if step > 1 else 1)


def test_lists_and_short_runs_are_taken():
    assert l2o.diagnose([2.0, 1.0]).state == "descending"
    assert l2o.diagnose([2.0, 1.0, float("inf")]) == l2o.diagnose(np.array([2.0, 1.0, np.inf]))


def test_a_diagnosis_is_a_sentence():
    assert str(l2o.diagnose([2.0, np.nan])).startswith("diverged since step 2; try a smaller learning rate")


def test_the_gravest_of_several_seeds_is_shown():
    found = [Diagnosis("stalled", 3, ""), Diagnosis("diverged", 9, ""), Diagnosis("diverged", 5, "")]
    assert gravest(found) == found[2]


@pytest.mark.parametrize(
    ("losses", "valid", "says"),
    [
        ([1.0], None, r"losses has shape \[1\]"),
        ([[1.0, 2.0]], None, "row"),
        (["a", "b"], None, "losses: expected a row"),
        ([2.0, 1.0], [[1.0]], r"valid has shape \[1, 1\]"),
        (None, None, "losses"),
        ([torch.ones((), requires_grad=True)] * 3, None, r"losses: expected a row of numbers, as loss\.item"),
    ],
)
def test_what_is_no_row_of_numbers_is_refused(losses, valid, says):
    with pytest.raises(ConfigurationError, match=says):
        l2o.diagnose(losses, valid)
