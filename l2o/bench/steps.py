"""A step of the plug-in with learned rules, beside torch's optimizers in the same run, on the shapes of networks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from l2o import fused
from l2o.bench.cost import USUAL, YARDSTICK, Cost, MakeOptimizer, plug_in, step_cost
from l2o.checks import check_each, check_int, lookup
from l2o.types import ConfigurationError, Theta, UpdateRule

Shapes = Sequence[Sequence[int]]
"""Of the tensors of a network."""

MUON = "Muon + AdamW"


def _linear(rows: int, columns: int) -> list[tuple[int, ...]]:
    return [(rows, columns), (rows,)]


def _transformer(width: int, blocks: int) -> list[tuple[int, ...]]:
    """Attention, a perceptron of four times the width and two normalisations in each block; then one more."""
    attention = [*_linear(3 * width, width), *_linear(width, width)]
    perceptron = [*_linear(4 * width, width), *_linear(width, 4 * width)]
    return blocks * [*attention, *perceptron, *4 * [(width,)]] + 2 * [(width,)]


NETWORKS: dict[str, Shapes] = {
    "matrix": [(1000, 1000)],
    "perceptron": 4 * _linear(1120, 1120),
    "transformer": [(256, 128), *_transformer(128, 4), *_linear(256, 128)],
    "small": 300 * [(16, 16)],
    "vectors": 1000 * [(1000,)],
    "transformer-512": [(12_000, 512), *_transformer(512, 6)],
    "gpt2-small": [(50257, 768), (1024, 768), *_transformer(768, 12)],
}
"""By name; in ``gpt2-small`` (Radford et al. 2019) the output is tied to the embedding."""


def _muon(params: list[nn.Parameter]) -> list[Optimizer]:
    """Muon for what has two axes, AdamW for the rest."""
    matrices, rest = ([p for p in params if (p.ndim == 2) is is_matrix] for is_matrix in (True, False))
    made: list[Optimizer] = [AdamW(rest, fused=True)] if rest else []
    return made + ([Muon(matrices, momentum=0.9, adjust_lr_fn="match_rms_adamw")] if matrices else [])


TORCH: dict[str, MakeOptimizer] = {
    YARDSTICK: USUAL[YARDSTICK],
    "AdamW (foreach)": lambda params: AdamW(params, foreach=True),
    MUON: _muon,
}
_PATHS = {YARDSTICK: "fused", "AdamW (foreach)": "foreach", MUON: "loop"}


def checked_shapes(name: str, network: Any) -> Shapes:
    """Return the shapes of one of `NETWORKS`, by its name, or those that came.  name: of the setting."""
    if isinstance(network, str):
        return lookup(name, network, NETWORKS)
    if not network:
        raise ConfigurationError(f"{name}={network!r}: expected a name, or a list of shapes such as [[32, 64], [32]]")
    check_each(name, network, lambda at, shape: check_each(at, shape, check_int))
    shapes: Shapes = network
    return shapes


def measure_steps(
    learned: Mapping[str, tuple[UpdateRule, Theta]], network: str | Shapes, seconds: float, device: str
) -> list[dict[str, Any]]:
    """Measure a record of each rule, then of each of ``TORCH``, all stepping in turn.

    learned: rules with their θ, by name.     network: see `checked_shapes`.     seconds: for all together, at least.
    """
    shapes = checked_shapes("shapes", network)
    name = network if isinstance(network, str) else ", ".join("x".join(map(str, shape)) for shape in shapes)
    generator = torch.Generator(device).manual_seed(0)
    module = nn.ParameterList(0.02 * torch.randn(*s, generator=generator, device=device) for s in shapes)
    plug_ins = {source: partial(plug_in, rule, theta) for source, (rule, theta) in learned.items()}
    found: dict[str, str] = {}
    with watched(found):
        costs = step_cost({**plug_ins, **TORCH}, module, rounds=10, seconds=seconds)
    paths = {source: found.get(repr(rule), "torch") for source, (rule, _) in learned.items()} | _PATHS
    entries = sum(p.numel() for p in module)
    about = {"shapes": name, "parameters": entries, "tensors": len(shapes), "threads": torch.get_num_threads()}
    return [{"rule": rule, "path": paths[rule], **about, **_figures(costs, rule, entries)} for rule in costs]


@contextlib.contextmanager
def watched(paths: dict[str, str]) -> Iterator[None]:
    """Notes by rule, in ``paths``, whether a kernel took part in its steps or updates."""
    entries = {name: getattr(fused, name) for name in ("update", "step")}

    def call(entry: Callable[..., Any], rule: UpdateRule, *arguments: Any) -> Any:
        result = entry(rule, *arguments)
        paths[repr(rule)] = "torch" if result is None else "kernel"
        return result

    with contextlib.ExitStack() as stack:
        for name, entry in entries.items():
            stack.enter_context(patch.object(fused, name, partial(call, entry)))
        yield


def _figures(costs: Mapping[str, Cost], name: str, entries: int) -> dict[str, Any]:
    """Times are of the processor where that is known, else of the clock on the wall."""
    cost = costs[name]
    seconds = {key: c.seconds if c.cpu_seconds is None else c.cpu_seconds for key, c in costs.items()}
    return {
        "clock": "wall" if cost.cpu_seconds is None else "cpu",
        "ns_per_parameter": 1e9 * seconds[name] / entries,
        "wall_ns_per_parameter": 1e9 * cost.seconds / entries,
        "ratio_to_fused_adamw": seconds[name] / seconds[YARDSTICK],
        "ratio_to_muon": seconds[name] / seconds[MUON],
        "state_bytes_per_parameter": cost.state_bytes,
        "scratch_bytes_per_parameter": cost.scratch_bytes,
    }
