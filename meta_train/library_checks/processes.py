"""Checks in several processes on this machine, by gloo: each function here runs in all of them."""

from __future__ import annotations

import contextlib
import copy
import datetime
import json
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import l2o
from l2o.rules import ByKind, Steered
from l2o.types import ConfigurationError, ParameterError, UpdateRule
from meta_train.library_checks.problem import STEPS, Net, alone, check_same, loss_at, make, theta_of, train, values

SECONDS = 60
"""That a process waits for the others."""
Job = tuple[Callable[..., None], tuple[Any, ...]]
"""A function of a module and its arguments, which can be pickled."""


def in_processes(jobs: Mapping[str, Job], count: int = 2) -> dict[str, str]:
    """What each job's first failure says, by its name; "" where it works in all of ``count`` processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_work, (count, folder, dict(jobs)), nprocs=count)
        said = [json.loads(Path(folder, f"{rank}.json").read_text("utf-8")) for rank in range(count)]
    return {name: next((own[name] for own in said if own[name]), "") for name in jobs}


def _work(rank: int, count: int, folder: str, jobs: Mapping[str, Job]) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", f"file://{folder}/group", wait, world_size=count, rank=rank)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # whose layer returns a view
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # torch's, by itself
    said = {}
    for name, (check, arguments) in jobs.items():
        try:
            check(*arguments)
            said[name] = ""
        except Exception:
            said[name] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(said), "utf-8")
    dist.monitored_barrier()  # not `barrier`, which gloo's threads may let go of as Python ends: they would abort
    dist.destroy_process_group()


def sharded_net() -> Net:
    """`Net` under FSDP2, its layers in groups of their own."""
    from torch.distributed.fsdp import fully_shard

    model, mesh = Net(), dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model.wide, model.conv):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fully_sharded(rule: UpdateRule) -> None:
    """Training under FSDP2's `fully_shard` is training in one process, and each process keeps a share of the state,
    which can be copied."""
    model = sharded_net()
    optimizer = make(model.parameters(), rule)
    train(model, optimizer)
    check_same(values(model), alone(rule))
    for p in model.parameters():
        momentum = optimizer.state[p].get("m", p)
        assert p.ndim < 2 or momentum.to_local().numel() < momentum.numel(), "each process keeps all of the state"
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def resharded(rule: UpdateRule) -> None:
    """A run under FSDP2 goes on from `torch.distributed.checkpoint` with as many processes, and with one; and a run of
    one process goes on under FSDP2."""
    model, want = sharded_net(), alone(rule)
    optimizer = make(model.parameters(), rule)
    train(model, optimizer, range(2))
    with _folder() as folder:
        _save(model, optimizer, folder)
        for again, one in ((sharded_net(), False), (Net(), True)):
            check_same(_resumed(again, rule, folder, one), want)
    whole = Net()
    optimizer = make(whole.parameters(), rule)
    train(whole, optimizer, range(2))
    with _folder() as folder:
        _save(whole, optimizer, folder)
        check_same(_resumed(sharded_net(), rule, folder), want)


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """An empty one, the same in all processes, until all have done with it."""
    with tempfile.TemporaryDirectory() as own:
        first: list[Any] = [own]
        dist.broadcast_object_list(first)
        yield first[0]
        dist.barrier()


def _state(model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def _save(model: torch.nn.Module, optimizer: Any, folder: str) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(_state(model, optimizer), checkpoint_id=folder)


def _resumed(
    model: torch.nn.Module, rule: UpdateRule, folder: str, alone: bool = False, **settings: Any
) -> dict[str, torch.Tensor]:
    """The parameters after the rest of the run."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    optimizer = make(model.parameters(), rule, **settings)
    state = _state(model, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as was asked for
        dcp.load(state, checkpoint_id=folder, no_dist=alone)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(model, optimizer, range(2, STEPS))
    return values(model)


def narrow_state(rule: UpdateRule) -> None:
    """Shards of state in bfloat16 go on from `torch.distributed.checkpoint` as if never stopped, to the bit."""
    narrow: dict[str, Any] = {"state_dtype": torch.bfloat16}
    model = sharded_net()
    optimizer = make(model.parameters(), rule, **narrow)
    train(model, optimizer, range(2))
    with _folder() as folder:
        _save(model, optimizer, folder)
        again = _resumed(sharded_net(), rule, folder, **narrow)
    train(model, optimizer, range(2, STEPS))
    torch.testing.assert_close(again, values(model), rtol=0, atol=0)
    assert optimizer.state[model.wide.weight]["m"].dtype == torch.bfloat16


def hybrid_sharded(rule: UpdateRule) -> None:
    """Shards in groups that are copies of each other (HSDP), four processes two by two, train as one process does."""
    from torch.distributed.fsdp import fully_shard

    model = Net()
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))
    train(model, make(model.parameters(), rule))
    check_same(values(model), alone(rule))


def loss_averaged(rule: UpdateRule) -> None:
    """Where each process has data of its own, rules that read the loss see the mean under FSDP2."""
    model, whole = sharded_net(), Net()
    optimizer, expected = make(model.parameters(), rule), make(whole.parameters(), rule)
    share = slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4)
    for step in range(STEPS):
        for net, each, part in ((model, optimizer, share), (whole, expected, slice(None))):
            each.zero_grad()
            loss = loss_at(net, step, part)
            loss.backward()
            each.step(lambda loss=loss: loss.detach())  # type: ignore[misc]
    check_same(values(model), values(whole))


def skipped_together(rule: UpdateRule) -> None:
    """A gradient that is not finite in one process skips the step in all."""
    model = sharded_net()
    optimizer = make(model.parameters(), rule)
    train(model, optimizer, range(2))
    before = values(model)
    loss_at(model, 0).backward()
    grad: Any = model.wide.weight.grad
    if dist.get_rank() == 0:
        grad.to_local().fill_(torch.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a step was skipped
        optimizer.step(lambda: torch.ones(()))
    assert optimizer.skipped_steps == 1
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)


def loaded_whole(rule: UpdateRule) -> None:
    """What ``state_dict()`` of one process says loads under FSDP2, where each process keeps its part."""
    alone_, model = Net(), sharded_net()
    saved, optimizer = make(alone_.parameters(), rule), make(model.parameters(), rule)
    train(alone_, saved, range(2))
    train(model, optimizer, range(2))
    kept = {p: dict(optimizer.state[p]) for p in model.parameters()}
    optimizer.load_state_dict(saved.state_dict())
    for p, slots in kept.items():
        for name, slot in slots.items():
            now = optimizer.state[p][name]
            assert type(now) is type(slot), name
            assert getattr(now, "placements", None) == getattr(slot, "placements", None), name
    train(model, optimizer, range(2, STEPS))
    check_same(values(model), alone(rule))


def tensor_parallel() -> None:
    """Tensors that are cut over two dimensions of a mesh, or over two meshes, are an error that says so."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    meshes = [dist.init_device_mesh("cpu", shape) for shape in ((2,), (1, 2))]
    cut = [distribute_tensor(torch.ones(4, 4), mesh, [Shard(i) for i in range(mesh.ndim)]) for mesh in meshes]
    for params in (cut[1:], [cut[0], distribute_tensor(torch.ones(4), meshes[1], [Shard(0), Replicate()])]):
        try:
            make([torch.nn.Parameter(p) for p in params], Steered())
            said = "no error"
        except ParameterError as error:
            said = str(error)
        assert "over one dimension of one mesh" in said, said


def zero_redundancy(rule: UpdateRule) -> None:
    """`ZeroRedundancyOptimizer` trains as one process does, and goes on from its state dict as if never stopped."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def wrapped(model: Net) -> Any:
        settings: Any = {"source": (rule, theta_of(rule)), "total_steps": 20}
        return ZeroRedundancyOptimizer(model.parameters(), l2o.LearnedOptimizer, **settings)

    model = Net()
    optimizer = wrapped(model)
    train(model, optimizer, range(2))
    optimizer.consolidate_state_dict(0)
    saved = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved)
    resumed = wrapped(model)
    resumed.load_state_dict(saved[0])
    train(model, resumed, range(2, STEPS))
    check_same(values(model), alone(rule))


def zero_redundancy_without_work() -> None:
    """A process of ZeRO that has nothing to update, or nothing of a kind that the rule treats apart, is an error."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    rule = ByKind({"vector": Steered(direction="adam")}, Steered())
    for shapes in ([(3,)], [(3,), (2, 2)]):
        params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        settings: Any = {"source": (rule, theta_of(rule)), "total_steps": 20}
        optimizer = ZeroRedundancyOptimizer(params, l2o.LearnedOptimizer, **settings)
        for p in params:
            p.grad = torch.ones_like(p)
        try:
            optimizer.step()
        except ConfigurationError as error:
            said = str(error)
        else:
            said = f"no error for {shapes}"
        assert "fully_shard" in said, said


def flat_shards() -> None:
    """FSDP1's flat shards are an error that names `fully_shard`; where it does not shard, training is that of one."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    for strategy, works in ((ShardingStrategy.FULL_SHARD, False), (ShardingStrategy.NO_SHARD, True)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, that FSDP1 is to go
            warnings.filterwarnings("ignore", ".*NO_SHARD", UserWarning)
            device: Any = {"device_id": torch.device("cpu")}
            model = FullyShardedDataParallel(Net(), sharding_strategy=strategy, use_orig_params=True, **device)
            optimizer = make(model.parameters(), Steered())
            try:
                train(model, optimizer)
                said = ""
            except ParameterError as error:
                said = str(error)
            assert ("fully_shard" in said) is not works, said or "no error"
            if works:
                check_same(values(model), alone(Steered()))


def data_parallel(rule: UpdateRule) -> None:
    """Under DDP, of which each process has half of a batch, training is that of one process with the whole batch."""
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(Net())
    optimizer = make(model.parameters(), rule)
    share = slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_at(model, step, share)
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)  # what a rule reads has to be the same everywhere
        optimizer.step(lambda mean=mean: mean / dist.get_world_size())  # type: ignore[misc]
    check_same(values(model), alone(rule))
