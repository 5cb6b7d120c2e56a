"""The benchmark command: what its records hold, that parts add up, and what is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from training import command

from l2o.evaluation.engine import RULES, Engine, measure, measure_sharing, peak_memory_mb
from l2o.types import ConfigurationError, UnknownNameError
from meta_train.bench import _alone, main

KEYS = {"setup", "rule", "lanes", "steps_per_second", "yardstick_steps_per_second", "first_step_seconds", "peak_rss_mb"}


bench = partial(command, base=["seconds=0.01"], main=main)


def read(path: str) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(Path(path).read_text())
    return records


def test_a_record_of_the_engine(here: Path) -> None:
    assert bench("engines=[{setup: pes, rule: small, lanes: 4}]", "out=made/records.json") == 0
    (record,) = read("made/records.json")
    assert record.keys() >= KEYS | {"hardware", "commit", "date", "share_of_time"}
    assert (record["setup"], record["lanes"], record["tasks"], record["network"]) == ("pes", 4, 2, [30, 8, 8, 2])
    assert record["yardstick_steps_per_second"] > 0
    low, high = record["steps_per_second_range"]
    assert 0 < low <= record["steps_per_second"] <= high
    assert record["peak_rss_mb"] > 50
    assert record["first_step_seconds"] > 0.5  # the imports and the compiler are in it
    assert sum(record["share_of_time"].values()) == pytest.approx(1.0)


def test_records_of_checkpointing(here: Path) -> None:
    assert bench("suite=checkpointing", "lengths=[40]", "out=records.json") == 0
    whole, parts = read("records.json")
    assert (whole["setup"], parts["setup"]) == ("whole graph", "checkpointing")
    assert parts["unroll_mb"] < 0.7 * whole["unroll_mb"]


def test_memory_is_that_of_the_process_alone() -> None:
    """Linux starts a process with its parent's `ru_maxrss`, which would hide all that a small measurement needs."""
    large = torch.ones(300_000_000)
    assert peak_memory_mb() > 1_200
    assert _alone(peak_memory_mb) < 1_000
    del large


@pytest.mark.parametrize("setup", ["pes", "tbptt"])
def test_the_yardstick_does_the_same_kind_of_work(setup: str) -> None:
    """In this process; figures are not judged, only that all parts run with and without derivatives."""
    record = measure(Engine(setup, "small", 2), seconds=0.001, device="cpu", began=0.0)
    assert record["steps_per_second"] > 0 < record["yardstick_steps_per_second"]


def test_one_process_sends_nothing() -> None:
    record = measure_sharing(4, seconds=0.001, device="cpu")
    assert (record["processes"], record["messages_per_outer_step"], record["bytes_per_outer_step"]) == (1, 0, 0)
    assert record["theta"] == sum(t.numel() for t in RULES["mlp"].init_theta(torch.Generator()).values())


def test_bad_input_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["suite=engin"], "unknown suite 'engin', did you mean 'engine'"),
        (["engines=[{setup: pess}]"], "unknown setup 'pess', did you mean 'pes'"),
        (["engines=[{setup: pes, lane: 4}]"], "engines: "),
        (["seconds=0"], "seconds=0"),
    ):
        assert bench(*arguments) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1


def test_an_engine_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="rule"):
        Engine("pes", "large")
    with pytest.raises(ConfigurationError, match="lanes"):
        Engine("pes", "mlp", 0)
