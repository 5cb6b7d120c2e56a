"""Every check: of which library, of what, with which rules; and the table of what they say."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from l2o.rules import ByKind, Steered
from l2o.types import UpdateRule
from meta_train.library_checks import plain, processes

Rules = Mapping[str, UpdateRule]


def every(rules: Rules) -> Rules:
    """All."""
    return rules


def without_loss(rules: Rules) -> Rules:
    """Those that do not read the loss."""
    return {name: rule for name, rule in rules.items() if not rule.needs_loss}


def two(rules: Rules) -> Rules:
    """The default's, and one that reads the loss."""
    return {"Steered": Steered(), "RNNMLP": rules["RNNMLP"]}


def default(rules: Rules) -> Rules:
    """The default's."""
    return {"Steered": Steered()}


def kinds(rules: Rules) -> Rules:
    """All, and one that treats kinds of tensors apart."""
    return {**rules, "ByKind": ByKind({"vector": Steered(direction="adam")}, Steered())}


def none(rules: Rules) -> Rules:
    """The check has rules of its own."""
    return {}


@dataclass(frozen=True)
class Check:
    """function: of a rule, or of nothing, and of ``settings``; by name of its module where that needs the library.

    library: its distribution.    what: for the table.    rules: that it is for.    processes: that it runs in.
    """

    library: str
    what: str
    function: Callable[..., None] | str
    rules: Callable[[Rules], Rules] = every
    settings: tuple[Any, ...] = ()
    processes: int = 1

    def jobs(self, rules: Rules) -> dict[str, tuple[Callable[..., None], tuple[Any, ...]]]:
        """The calls that it consists of, by the rule; raises ModuleNotFoundError without the library."""
        metadata.version(self.library)
        function = self.function
        if isinstance(function, str):
            module, name = function.rsplit(".", 1)
            function = getattr(importlib.import_module(f"meta_train.library_checks.{module}"), name)
        chosen = self.rules(rules)
        return {name: (function, (rule, *self.settings)) for name, rule in chosen.items()} or {
            "": (function, self.settings)
        }


def _checkpoints() -> Iterator[Check]:
    for name in plain.DCP_OPTIONS:
        # torch asks for one tensor with axes in the state, which gradient descent does not have.
        rules = every if name != "full" else lambda rules: {k: r for k, r in rules.items() if k != "SGD"}
        what = f"`torch.distributed.checkpoint`, one process, {name}"
        yield Check("torch", what, plain.distributed_checkpoint, rules, () if name == "plain" else (name,))


CHECKS: Sequence[Check] = [
    Check("torch", "gradient accumulation", plain.accumulated),
    Check("torch", "`autocast` to bfloat16 and `GradScaler`", plain.scaled),
    Check("torch", "`torch.save`, `torch.load(weights_only=True)`", plain.loaded_weights_only),
    Check("torch", "`AveragedModel` and `SWALR`", plain.averaged, none),
    Check("torch", f"{len(plain.SCHEDULERS)} schedulers", plain.scheduled, none, (0.1,)),
    Check("torch", "the same, with `lr` as a tensor", plain.scheduled, none, (torch.tensor(0.1),)),
    *_checkpoints(),
    Check("torch", "`DistributedDataParallel`", processes.data_parallel, processes=2),
    Check("torch", "FSDP2 `fully_shard`", processes.fully_sharded, kinds, processes=2),
    Check("torch", "FSDP2, each process with its own data and loss", processes.loss_averaged, two, processes=2),
    Check("torch", "FSDP2, a gradient of one process not finite", processes.skipped_together, two, processes=2),
    Check("torch", "FSDP2, `state_dict()` of one process loaded", processes.loaded_whole, two, processes=2),
    Check("torch", "FSDP2 with tensor parallelism: an error", processes.tensor_parallel, none, processes=2),
    Check("torch", "FSDP2, copies of groups of shards (HSDP)", processes.hybrid_sharded, two, processes=4),
    Check("torch", "`torch.distributed.checkpoint`: FSDP2, to one process and back", processes.resharded, processes=2),
    Check("torch", "the same, sharded state in bfloat16", processes.narrow_state, two, processes=2),
    Check("torch", "`ZeroRedundancyOptimizer`, resumed", processes.zero_redundancy, kinds, processes=2),
    Check("torch", "the same, an error without work", processes.zero_redundancy_without_work, none, processes=2),
    Check("torch", "FSDP1: an error, but with `NO_SHARD`", processes.flat_shards, none, processes=2),
    Check("higher", "`innerloop_ctx` in float64, with kinds", plain.unrolled_by_higher, without_loss),
    Check("transformers", "`Trainer`, with a schedule, resumed", "trainers.hugging_face", default),
    Check("peft", "LoRA", "trainers.low_rank", none),
    Check("accelerate", "accumulation, a loss as closure, resumed", "trainers.accelerated", two),
    Check("lightning", "`Trainer`, resumed", "lit.lightning", two),
    Check("lightning", "`Trainer`, steps by hand, with `step(loss=...)`", "lit.lightning", two, (True,)),
]


def failures(check: Check, rules: Rules) -> dict[str, str]:
    """What fails, by the rule: the end of its traceback; "" where it works."""
    jobs = check.jobs(rules)
    if check.processes > 1:
        return processes.in_processes(jobs, check.processes)
    return {name: _said(function, arguments) for name, (function, arguments) in jobs.items()}


def _said(function: Callable[..., None], arguments: tuple[Any, ...]) -> str:
    try:
        function(*arguments)
    except Exception:
        return traceback.format_exc()
    return ""


def row(check: Check, rules: Rules) -> list[str]:
    """Library, version, what was checked, and whether it works: with how many rules, or what fails."""
    try:
        version, found = metadata.version(check.library), failures(check, rules)
    except (ModuleNotFoundError, metadata.PackageNotFoundError):
        return [check.library, "", check.what, "not installed"]
    wrong = [f"{name} {text.strip().splitlines()[-1]}".strip() for name, text in found.items() if text]
    if wrong:
        return [check.library, version, check.what, f"**no**: {'; '.join(wrong)}"]
    names = [name for name in found if name]
    which = ", ".join(names) if len(names) <= 2 else f"{len(names)} rules"
    return [check.library, version, check.what, f"yes ({which})" if names else "yes"]


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """The table."""
    lines = [["library", "version", "what", "works"], ["---"] * 4, *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
