"""Several processes at one run, as ``torchrun`` starts them: they share its lanes, and rank 0 alone writes."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from l2o.distributed import Ranks, ranks
from l2o.meta import MetaTraining
from meta_train.run.plan import Plan

PATIENCE = datetime.timedelta(hours=1)
"""The others wait for so long while rank 0 evaluates and writes."""


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Return this process among those that ``torchrun`` started; alone where there are none."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Ranks()
        return
    # Its functions have the default group as a default from when it is imported, which an optimizer does: the group
    # would outlive its destruction, and its threads the interpreter, which then may abort (torch 2.13, seen once).
    importlib.import_module("torch.distributed.nn.functional")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(iter(dist.rendezvous("env://")))
    # The agent's store outlives its workers: without a name of their own, those that are started again may find the
    # addresses of the dead, and be refused or wait for ever (torch 2.13).
    store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield ranks()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Return once every process has come here."""
    if ranks().size > 1:
        dist.barrier()


def agreed(number: int) -> int:
    """Return the largest of the numbers that the processes give, the same in all of them."""
    if ranks().size == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


class Worker:
    """What a process other than rank 0 does in a run: its share of the lanes, and nothing on disk."""

    def __init__(self, training: MetaTraining, plan: Plan) -> None:
        self.training, self.plan = training, plan

    @property
    def step(self) -> int:
        """Outer steps done."""
        return self.training.step

    def begin(self) -> None:
        """Do nothing."""

    def outer_step(self) -> None:
        """Take one outer step."""
        self.training.outer_step()

    def save(self) -> None:
        """Hand rank 0 this process' lanes."""
        self.training.state_dict()

    def evaluate(self) -> None:
        """Do nothing: rank 0 does, and whatever the next step sends waits for it."""

    def save_checkpoint(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
