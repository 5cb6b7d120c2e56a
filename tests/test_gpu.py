"""What has to hold on a GPU, here on the CPU where there is none, and the command that measures one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import nn

import l2o.fused
from l2o.bench.checks import (
    CHECKS,
    FAMILY,
    RULES,
    UNROLL,
    Drawn,
    distance,
    meta_gradient,
    no_waiting,
    smooth_family,
)
from l2o.bench.gpu import with_large_blocks
from l2o.bench.steps import NETWORKS
from l2o.checkpoints.store import list_pretrained
from l2o.kernels import mlp_gpu, mlp_triton
from l2o.ops.coordinatewise import blocks
from l2o.ops.kinds import infos_of, lane_infos
from l2o.optim import LearnedOptimizer
from l2o.rules import MLP, Steered
from l2o.types import Run as InnerRun
from l2o.types import UpdateRule
from l2o.unroll import expand_theta
from meta_train.gpu import FULL, Run, Step, run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:.*Dynamo", "ignore:.*deprecated")  # torch's own, where it compiles
@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str) -> None:
    CHECKS[name](DEVICE)


@pytest.mark.cuda
@pytest.mark.parametrize("wait", [torch.Tensor.item, torch.nonzero, lambda t: t[t > 0], lambda t: t.new_tensor([1.0])])
def test_waiting_is_seen(wait: Any) -> None:
    x = torch.ones((), device=DEVICE)
    with no_waiting(DEVICE):
        x + 1.0
    with pytest.raises((AssertionError, RuntimeError)), no_waiting(DEVICE):
        wait(x)


@pytest.mark.parametrize(
    ("got", "want", "expected"),
    [
        ([[1.0, 2.0], [3.0]], [[1.0, 4.0], [3.0]], 0.5),
        ([[1.0], []], [[1.0], []], 0.0),
        ([[1.0], [math.nan]], [[2.0], [1.0]], math.inf),
        ([[math.nan], [1.0]], [[math.nan], [1.0]], math.inf),
        ([[math.inf], [1.0]], [[math.inf], [1.0]], math.inf),
        ([[1.0], [math.inf]], [[1.0], [1.0]], math.inf),
    ],
)
def test_distance(got: list[list[float]], want: list[list[float]], expected: float) -> None:
    assert distance([*map(torch.tensor, got)], [*map(torch.tensor, want)]) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["plug-in", "unroll and meta-gradient"])
def test_a_check_fails_where_a_rule_is_another_on_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def update(self: Any, theta: Any, grads: Any, *others: Any) -> Any:
        wrong = 1.001 if next(iter(grads.values())).dtype == torch.float32 else 1.0
        return own(self, theta, {k: g * wrong for k, g in grads.items()}, *others)

    own = type(RULES["SGD"]).update
    monkeypatch.setattr(type(RULES["SGD"]), "update", update)
    monkeypatch.setattr("l2o.bench.checks.UNROLL", {torch.float32: 1e-5})
    with pytest.raises(AssertionError, match="apart from the CPU"):
        CHECKS[f"{kind}: SGD, float32"](DEVICE)


class Nudged(Drawn):
    """Starts some units in the last place beside where `Drawn` does."""

    def init(self, data: Any, generator: torch.Generator) -> Any:
        params, buffers = super().init(data, generator)
        signs = torch.Generator().manual_seed(1)
        unit = 8.0 * torch.finfo(self.dtype).eps
        nudges = {k: unit * torch.randn(p.shape, generator=signs, dtype=p.dtype).sign() for k, p in params.items()}
        return {k: p * (1.0 + nudges[k]) for k, p in params.items()}, buffers


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_rounding_does_not_decide_what_is_compared(rule: UpdateRule) -> None:
    family = smooth_family(rule)
    got, want = (
        meta_gradient(rule, kind(family, CPU, torch.float64), CPU, torch.Generator()) for kind in (Nudged, Drawn)
    )
    assert distance(got, want) <= UNROLL[torch.float64]
    data = family.sample(torch.Generator(), 3)
    nudged, drawn = (kind(family, CPU, torch.float64).init(data, torch.Generator())[0] for kind in (Nudged, Drawn))
    assert any((nudged[name] != drawn[name]).any() for name in drawn)


META = torch.device("meta")
"""Has no values to be read, and takes no tensor of the CPU beside its own, as a GPU does not: for what has none."""


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_rules_stay_on_the_device_of_their_tensors(rule: UpdateRule) -> None:
    family = Drawn(FAMILY, META, torch.float32)
    losses, grads = meta_gradient(rule, family, META, torch.Generator())
    assert {t.device for t in (losses, *grads.values())} == {META}
    params = [nn.Parameter(torch.zeros(shape, device=META)) for shape in ((12, 8), (4, 3, 2, 2), (7,), ())]
    theta = rule.init_theta(torch.Generator())
    optimizer = LearnedOptimizer(params, (rule, theta), total_steps=10**6)  # which is worth a kernel
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step(loss=torch.ones((), device=META))
    assert {t.device for slots in (optimizer.state[p] for p in params) for t in slots.values()} <= {META}


def test_a_kernel_that_does_not_fit_reads_nothing() -> None:
    rule, params = Steered(), {"x": torch.zeros(3, 3, device=META)}
    theta = {k: t.to(META) for k, t in rule.init_theta(torch.Generator()).items()}
    run = InnerRun(*(torch.zeros((), dtype=torch.int64, device=META) for _ in range(2)))
    infos = infos_of(params)
    state = rule.init(theta, params, infos)
    assert l2o.fused.step(rule, l2o.fused.Inputs(theta, params, state, params, infos, run), {"x": (1.0, 1.0)}) is None


# The packages that a machine with a GPU may lack; None there makes an import fail.
BARE = """
import sys
sys.modules.update(dict.fromkeys(["hydra", "omegaconf", "yaml", "wandb", "higher", "rich", "matplotlib", "pytest"]))
from meta_train.gpu import main
main()
"""


def test_the_whole_run(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BARE, "--device=cpu", "--small", f"--out={tmp_path}/made/record.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "made/record.json").read_text())
    assert record.keys() == {"device", "hardware", "versions", "commit", "date", "small", "finished", "steps"}
    assert record["finished"]
    steps = {step["name"]: step for step in record["steps"]}
    assert {f"check: {name}" for name in CHECKS} <= steps.keys()
    left_out = {name for name, step in steps.items() if step["status"] == "left out"}
    graphs = {name for name in steps if "graph" in name and not name.startswith("language model")}
    assert left_out == graphs  # the only thing that a CPU has not
    assert {step["status"] for step in record["steps"]} == {"ok", "left out"}
    costs = {name: step for name, step in steps.items() if name.startswith("optimizer") and name not in left_out}
    assert costs.keys() >= {f"optimizer: {name}, small" for name in list_pretrained()}
    assert all(cost["ms"] > 0 < cost["ratio_to_fused_adamw"] and len(cost["beside"]) == 3 for cost in costs.values())
    assert steps["main job"]["held_out_loss_after"] < steps["main job"]["held_out_loss_before"]
    assert all(step["steps_per_second"] > 0 for step in steps.values() if step["name"].startswith("engine"))


def test_what_fails_or_does_not_fit_is_recorded_and_the_run_goes_on(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def hang() -> dict[str, Any]:
        time.sleep(60)
        return {}

    def stop() -> dict[str, Any]:
        raise KeyboardInterrupt

    made = Run(tmp_path / "record.json", {"device": "cpu"}, time.monotonic() + 2.5)
    for name, seconds, work in [("a", 0.0, fail), ("b", 9.0, fail), ("c", 0.0, dict)]:
        made.step(Step(name, seconds, work), CPU)
    with pytest.raises(KeyboardInterrupt):
        made.step(Step("d", 0.0, stop), CPU)
    made.step(Step("e", 0.0, hang), CPU)
    record = json.loads((tmp_path / "record.json").read_text())
    assert not record["finished"]
    assert [step["status"] for step in record["steps"]] == ["failed", "left out", "ok", "interrupted", "failed"]
    errors = [step.get("error", "") for step in record["steps"]]
    assert errors[0] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert errors[1].endswith("expected 9")
    assert errors[4].startswith("TimeoutError")
    assert made.finish() == 2


def test_no_time_at_all_is_a_whole_record(tmp_path: Path) -> None:
    assert run(["--device=cpu", "--minutes=0", f"--out={tmp_path}/record.json"]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert {step["status"] for step in record["steps"]} == {"left out"}


def test_the_sizes_are_those_of_their_names() -> None:
    sizes = {name: sum(map(math.prod, NETWORKS[network])) for name, network in FULL.networks.items()}
    assert sizes == {name: pytest.approx(1e6 * int(name.removesuffix("M")), rel=0.15) for name in sizes}


def test_large_blocks_are_fewer() -> None:
    def work() -> dict[str, Any]:
        return {"blocks": len(list(blocks((1 << 20,))))}

    assert (work(), with_large_blocks(work)) == ({"blocks": 16}, {"blocks": 1})


class Launches:
    """In the place of a kernel: the grids that it was to be launched on."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, int]] = []

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        self.grids.append(grid)
        return lambda *_, **__: None


def test_a_large_tensor_is_within_the_limits_of_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA takes 65,535 programs on the second axis, and 2^31 - 1 on the first."""
    launches, rule = Launches(), MLP(hidden=(2,), decays=())
    monkeypatch.setattr(mlp_triton, "_look", launches)
    monkeypatch.setattr(mlp_triton, "_apply", launches)
    theta = expand_theta(rule.init_theta(torch.Generator()), 1)
    large = {"x": torch.zeros(1, 9_000_000)}
    state = rule.init(theta, {"x": large["x"][0]}, lane_infos(large))
    slots = {"x": {"m": state.per_param["x"]["m"].unsqueeze(0)}}
    run = InnerRun(torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    monkeypatch.setenv("L2O_KERNELS", "1")
    monkeypatch.setattr("l2o.kernels.mlp_rule.update", mlp_gpu.update)
    l2o.fused.update(rule, theta, large, state._replace(per_param=slots), large, run)
    assert launches.grids == [(70_313, 1)] * 2
