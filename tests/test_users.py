"""``python -m meta_train.users``: its problems train, alike from one seed; the command goes on where it was stopped."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import snapshot, status

from l2o.checkpoints.store import save
from l2o.rules import SGD
from meta_train import users
from meta_train.problems import PROBLEMS, SETS, data
from meta_train.problems.common import Draw

TRY = ["--out", "made", "--only", "^deep_linear$", "--sources", "sgd", "--seeds", "1", "--steps", "12"]
"""A short run of the command: ten optimizers, a run of each."""


@pytest.fixture(scope="module", autouse=True)
def _mnist(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Random images instead of MNIST's, in the tests of this file."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (folder / "mnist").mkdir()
    for name, shape, below in (("images-idx3", (200, 28, 28), 256), ("labels-idx1", (200,), 10)):
        head = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
        content = rng.integers(0, below, shape, np.uint8).tobytes()
        (folder / "mnist" / f"t10k-{name}-ubyte").write_bytes(head + content)
    data.mnist.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("L2O_DATA_DIR", str(folder))
        yield
    data.mnist.cache_clear()


def losses(name: str, seed: int) -> list[float]:
    """Of two steps, in which every parameter gets a gradient that is not 0."""
    begun = PROBLEMS[name].begin(seed)
    params = {key: p for key, p in begun.model.named_parameters() if p.requires_grad}
    optimizer, found, still = torch.optim.Adam(params.values(), lr=1e-2), [], set(params)
    for _ in range(2):
        optimizer.zero_grad()
        loss = begun.loss()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in params.values())
        still -= {key for key, p in params.items() if p.grad.any()}  # type: ignore[union-attr]
        optimizer.step()
        found.append(loss.item())
    assert still == set()
    return found


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_trains_all_its_parameters_and_is_the_same_for_the_same_seed(name: str) -> None:
    first = losses(name, 0)
    assert all(map(math.isfinite, first))
    assert losses(name, 0) == first
    nothing_drawn = ("kernel_logistic_digits", "lotka_volterra")
    assert (losses(name, 1) == first) == (name in nothing_drawn)


def test_there_are_as_many_problems_as_documents_say() -> None:
    assert {name: len(some) for name, some in SETS.items()} == {"first": 72, "second": 40, "third": 40}


def test_spans_and_patches_stay_inside() -> None:
    draw = Draw(0)
    spans = draw.spans(5, 200, 3)
    assert {tuple(each) for each in spans.tolist()} == {(0, 1, 2), (1, 2, 3)}
    patches = draw.patches(torch.arange(16).view(4, 4), 200, 2)
    assert {tuple(each) for each in patches.flatten(1).tolist()} == {(i, i + 1, i + 4, i + 5) for i in (0, 1, 4, 5)}


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([3.0] * 12 + [1.0] * 12, False),
        ([1.0] * 12 + [3.0] * 12, True),
        ([3.0] * 12 + [1.0] * 8 + [math.inf] * 4, True),
        ([math.inf] * 24, True),
        ([1.0, 2.0], False),
    ],
)
def test_a_run_is_lost_where_it_is_not_finite_or_ends_above_where_it_began(curve: list[float], expected: bool) -> None:
    assert users.lost(np.array(curve)) == expected


def test_a_mean_is_over_ten_steps_or_a_fiftieth_of_the_run() -> None:
    assert [np.isfinite(users.smooth(np.ones(steps))).argmax() for steps in (4, 50, 1000)] == [3, 9, 19]
    assert users.smooth(np.arange(1000.0))[-1] == np.arange(980, 1000).mean()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list of two numbers: runs that were begun, and at which one Ctrl-C is pressed."""
    counted, train = [0, 10**6], users.train

    def counting(*arguments: Any) -> Any:
        counted[0] += 1
        if counted[0] > counted[1]:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(users, "train", counting)
    return counted


@pytest.mark.usefixtures("sgd")
def test_records_and_page() -> None:
    assert status(users.main, *TRY) == 0
    records = json.loads(Path("made/results.json").read_text("utf-8"))
    assert [r["optimizer"] for r in records] == [*users.ADAM, users.COSINE, "sgd"]
    target = min(r["final"] for r in records[:8])
    assert [r["target"] for r in records] == [None] * 8 + [target] * 2
    assert all((users.speed_up(r) > 0) >= (r["final"] <= target) for r in records[8:])
    assert f"| deep_linear | 12 | 0.03 | {target:.4g} | " in Path("made/README.md").read_text("utf-8")


def test_a_page_sums_up() -> None:
    about = {"date": "d", "commit": "c", "hardware": "here", "seeds": 2, "steps": 500, "diverged": [False, False]}
    quiet = {**about, "step": None, "final": 2.0, "events": [[], []]}
    fired = {**quiet, "step": 250, "final": 0.5, "events": [[], ["rise", "leap"]], "diverged": [False, True]}
    records = {(name, label): quiet for name in ("nmf", "hmm") for label in (*users.ADAM, users.COSINE, "light")}
    records["nmf", "Adam 0.01"] = {**quiet, "final": 1.0}
    records["nmf", "light"] = fired
    records["moe", "Adam 0.1"] = quiet  # has yet to be finished
    text = users.page({k: {**r, "problem": k[0], "optimizer": k[1]} for k, r in records.items()}, "the command")
    assert "`the command`, d, commit c; here" in text
    assert "no held-out test" in text
    assert f"| {users.COSINE} | 0 of 2 | 0.00 | 0 of 4 | – |" in text
    assert "| `light` | 1 of 2 | 1.00 | 1 of 4 | 2 in 1 of 4 runs |" in text
    assert "| nmf | 500 | 0.01 | 1 | 2, 0.00 | 0.5, 2.00 |" in text
    assert "moe" not in text


@pytest.mark.usefixtures("sgd")
def test_the_command_goes_on_where_it_was_stopped(runs: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert status(users.main, *TRY) == 0
    whole = snapshot("made")
    shutil.rmtree("made")
    runs[:] = 0, 4
    assert status(users.main, *TRY) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert len(json.loads(Path("made/results.json").read_text("utf-8"))) == 4
    runs[:] = 0, 6
    assert status(users.main, *TRY) == 0
    assert snapshot("made") == whole
    runs[:] = 0, 0
    assert status(users.main, *TRY) == 0
    assert snapshot("made") == whole


@pytest.mark.usefixtures("sgd")
def test_a_checkpoint_that_has_changed_is_run_again_alone(runs: list[int]) -> None:
    assert status(users.main, *TRY) == 0
    save("sgd", SGD(), SGD(lr=0.05).init_theta(torch.Generator()))
    runs[:] = 0, 1
    assert status(users.main, *TRY) == 0
    assert runs[0] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--only", "["], "--only '[': no regular expression"),
        (["--only", "no such thing"], "is in no name of simclr, "),
        (["--sources", "ligth"], "unknown checkpoint 'ligth', did you mean 'light'"),
        (["--seeds", "0"], "--seeds=0"),
        (["--steps", "0"], "--steps=0"),
        (["--out", "old"], "has runs with --seeds 3 and no --steps; give the same"),
        (
            ["--out", "old", "--set", "second", "--only", "tsne"],
            "has nmf, which is not of --set second; name another --out",
        ),
        (["--out", "bad"], "bad/results.json cannot be read"),
    ],
)
@pytest.mark.usefixtures("sgd")
def test_what_is_wrong_is_said_before_hours_of_work(
    given: list[str], message: str, runs: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    old = [{"problem": "nmf", "optimizer": "Adam 0.1", "seeds": 3, "limit": None}]
    for folder, text in (("old", json.dumps(old)), ("bad", "{")):
        Path(folder).mkdir()
        Path(folder, "results.json").write_text(text, "utf-8")
    assert status(users.main, *TRY, *given) == 2
    assert message in capsys.readouterr().err
    assert runs[0] == 0
    assert not Path("made").exists()


@pytest.mark.usefixtures("sgd")
def test_data_that_are_missing_are_said_at_once(
    runs: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("L2O_DATA_DIR", "nowhere")
    data.mnist.cache_clear()
    assert status(users.main, *TRY, "--only", "short|nmf") == 2
    assert "t10k-images-idx3-ubyte.gz: no such file" in capsys.readouterr().err
    assert runs[0] == 0
