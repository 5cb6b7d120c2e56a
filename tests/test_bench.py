"""The benchmark command: what its records hold, that parts add up, and what is refused."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import command

from l2o.bench.engine import RULES, Engine, measure, measure_sharing
from l2o.bench.memory import peak_memory_mb, scratch_bytes
from l2o.bench.steps import NETWORKS
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


def test_records_of_a_mixture(here: Path) -> None:
    assert bench("suite=mixture", "lanes=2", "steps=3", "rounds=1", "threads=[1]", "out=records.json") == 0
    *families, whole = read("records.json")
    assert (whole["recipe"], whole["rule"], whole["family"], whole["steps"]) == ("demo", "Steered", "all", 3)
    assert [record["family"] for record in families][:2] == ["mlp", "deep_ln"]
    slowest, *_, fastest = sorted(record["steps_per_second"] for record in families)
    assert slowest < whole["steps_per_second"] < fastest
    mean = sum(1.0 / record["yardstick_steps_per_second"] for record in families) / len(families)
    assert whole["yardstick_steps_per_second"] == pytest.approx(1.0 / mean)


def test_records_of_a_step(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a rule with a kernel and one that has none, on shapes that are named and on shapes that are not."""
    small = [
        "seconds=0.001",
        "sources=[default,lstm-quadratics]",
        "rules=[AdafacMLP]",
        "shapes=[[[8,4],[3]],[[5],[5]]]",
        "threads=[1,2]",
    ]
    assert bench("suite=step", *small, "out=records.json") == 0
    records = read("records.json")
    assert [record["rule"] for record in records[:6]] == [
        "default",
        "lstm-quadratics",
        "AdafacMLP",
        "AdamW (fused)",
        "AdamW (foreach)",
        "Muon + AdamW",
    ]
    assert [record["path"] for record in records[:6]] == ["kernel", "torch", "kernel", "fused", "foreach", "loop"]
    assert [(record["shapes"], record["threads"]) for record in records[::6]] == [
        ("8x4, 3", 1),
        ("8x4, 3", 2),
        ("5, 5", 1),
        ("5, 5", 2),
    ]
    for record in records:
        assert record["hardware"]["threads"] == record["threads"]
        assert record["clock"] == ("cpu" if record["threads"] == 1 else "wall")
        assert record["ns_per_parameter"] > 0 < record["wall_ns_per_parameter"]
        assert (record["parameters"], record["tensors"]) == ((35, 2) if record["shapes"] == "8x4, 3" else (10, 2))
    assert records[3]["ratio_to_fused_adamw"] == records[5]["ratio_to_muon"] == 1.0
    of_muon = 4 * 32 + (8 * 3 + 4)  # a momentum of the matrix; moments and a count of the vector
    assert records[5]["state_bytes_per_parameter"] == pytest.approx(of_muon / 35)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + len(records)
    assert max(map(len, table)) <= 80


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        ("matrix", 1_000_000),
        ("perceptron", 4 * 1121 * 1120),
        ("transformer", 2 * 256 * 128 + 256 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128),
        ("small", 76_800),
        ("vectors", 1_000_000),
        ("gpt2-small", 124_439_808),  # as published
    ],
)
def test_the_networks_have_their_numbers_of_parameters(network: str, parameters: int) -> None:
    assert sum(math.prod(shape) for shape in NETWORKS[network]) == parameters


def test_scratch_is_what_work_takes_while_it_is_done() -> None:
    def work() -> Tensor:
        return torch.ones(10_000_000)

    kept = work()
    assert scratch_bytes(work, kept.device) == pytest.approx(40e6, rel=0.05)
    assert scratch_bytes(lambda: kept.mul_(2.0), kept.device) < 1e6


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
        (["suite=mixture", "lanes=0"], "lanes=0"),
        (["suite=mixture", "recipe=demmo"], "demmo"),
        (["suite=step", "sources=default"], "sources='default' (str): expected a tuple or list"),
        (["suite=step", "sources=[defaul]"], "'defaul'"),
        (["suite=step", "rules=[AdafacMPL]"], "unknown rules[0] 'AdafacMPL', did you mean 'AdafacMLP'"),
        (["suite=step", "threads=[0]"], "threads[0]=0"),
        (["suite=step", "shapes=[matrx]"], "unknown shapes[0] 'matrx', did you mean 'matrix'"),
        (["suite=step", "shapes=[[]]"], "shapes[0]=[]: expected a name, or a list of shapes"),
        (["suite=step", "shapes=[[[3,-1]]]"], "shapes[0][0][1]=-1"),
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
