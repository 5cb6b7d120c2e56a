"""Any ``nn.Module`` with a loss and data as an inner problem."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from l2o.checks import check_int
from l2o.family_checks import check_scalar, check_trainable, vectorised
from l2o.ops.kinds import kinds_of
from l2o.random import LaneGenerator, keys
from l2o.tasks.sources import Examples, Source, as_source
from l2o.tasks.stateless import Stateless, seeded
from l2o.types import Batch, Buffers, ConfigurationError, Kind, L2OError, Params, Split, TaskData, TaskFamily

_EXPECTED = {
    "module": "an nn.Module, or a function that makes one",
    "criterion": "a function of the module's output and the target, such as nn.functional.mse_loss",
}


@dataclass(frozen=True, eq=False, repr=False)
class ModuleTask(TaskFamily):
    """Train ``module`` on ``train`` to a low ``criterion``; lanes differ in their initialisation, batches and dropout.

    module: an ``nn.Module``, or a function of no arguments (such as a class) that makes one. Of an instance, each
        lane is a copy on which every ``reset_parameters`` is called; parameters of a submodule without one are the same
        in all lanes. A function is called once a lane. Neither disturbs the global generator.
    criterion: ``criterion(output, target) -> 0-d loss``.
    train, valid: a tuple of tensors, a map-style ``Dataset`` or a ``DataLoader`` each. An item's last tensor is the
        target, those before it go to the module in their order. Tuples and datasets become tensors once and stay on
        the device of the run; a ``DataLoader`` gathers each batch on the host (see `l2o.tasks.sources.LoaderSource`).
    batch_size: None for that of the ``DataLoader``, or else for all examples in each batch.

    Training batches carry a ``key``, which puts the module into training mode and from which dropout makes its masks;
    validation batches have none and evaluate. Frozen parameters (``requires_grad=False``) travel with the buffers.
    Attention and recurrent layers run unfused (see `l2o.tasks.stateless`).

    Raises `ConfigurationError` for data that do not follow this; for parameters that are not all float32 or all
    float64; for a module that writes to them in ``forward``, draws random numbers other than by dropout, or is
    scripted, lazy, on the meta device or replicated over devices; and, when it first runs, for one that
    `torch.func.vmap` cannot vectorise, as with control flow that depends on data. Inputs that a module writes to in
    place are copies.
    """

    module: nn.Module | Callable[[], nn.Module]
    criterion: Callable[[Tensor, Tensor], Tensor]
    train: Examples
    valid: Examples | None = None
    batch_size: int | None = None

    keyed = True

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            check_int("batch_size", self.batch_size)
        for name in ("module", "criterion"):
            if not callable(getattr(self, name)):
                came = type(getattr(self, name)).__name__
                raise ConfigurationError(f"{name} is a {came}: expected {_EXPECTED[name]}")
        _check_module(self._template)
        check_trainable(f"module: this {self._name}", (p for p in self._template.parameters() if p.requires_grad))
        self._sources  # noqa: B018  made now, so that unusable data are refused now
        self._written  # noqa: B018  likewise modules

    def __repr__(self) -> str:
        """What logs, cards and reports say: no tensors."""
        count = sum(p.numel() for p in self._template.parameters() if p.requires_grad)
        criterion = getattr(self.criterion, "__name__", type(self.criterion).__name__)
        data = "".join(f", {name}={source!r}" for name, source in self._sources.items())
        return f"ModuleTask({self._name} of {count} parameters, {criterion}{data}, batch_size={self.batch_size})"

    @cached_property
    def kinds(self) -> Mapping[str, Kind]:
        """See `l2o.ops.kinds.kinds_of`."""
        return kinds_of(self._template)

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        return {"lane": torch.arange(lanes, device=generator.device)}

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        """Waits for the device once: modules draw their parameters on the host."""
        seeds = keys(generator, len(data["lane"])).tolist()
        lanes = [self._draw(seed, generator.device) for seed in seeds]
        trained = {name for name, p in self._template.named_parameters() if p.requires_grad}
        stacked = {name: torch.stack([lane[name] for lane in lanes]).to(generator.device) for name in lanes[0]}
        params = {name: t for name, t in stacked.items() if name in trained}
        return params, {name: t for name, t in stacked.items() if name not in trained}

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        """Draw ``input.0``, ``input.1``, … and ``target``, each ``[lanes, batch, ...]``, for ``train`` a ``key
        [lanes]``."""
        if split not in self._sources:
            raise ConfigurationError(f"split={split!r}: this ModuleTask was given no data for it; pass {split}=")
        lanes = len(data["lane"])
        *inputs, target = self._sources[split].draw(generator, lanes)
        batch = {f"input.{i}": x for i, x in enumerate(inputs)} | {"target": target}
        return batch | {"key": keys(generator, lanes)} if split == "train" else batch

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        batch = {name: t.clone() if name in self._written else t for name, t in batch.items()}
        # Clones, because BatchNorm writes its running statistics in place; functional_call leaves the new ones here.
        # Detached, because it has no derivative in them and refuses those that could have one (torch 2.13).
        tensors = {**params, **{name: b.detach().clone() for name, b in buffers.items()}}
        with vectorised(self._name):
            loss = self._run(self._template, tensors, batch)
        check_scalar("criterion", loss)
        return loss, {name: tensors[name] for name in buffers}

    def _run(self, module: nn.Module, tensors: dict[str, Tensor], batch: Batch) -> Tensor:
        inputs = tuple(batch[f"input.{i}"] for i in range(sum(name.startswith("input.") for name in batch)))
        with Stateless(batch.get("key")):
            output = functional_call(module.train("key" in batch), tensors, inputs)
            return self.criterion(output, batch["target"])

    @property
    def _name(self) -> str:
        return type(self._template).__name__

    @cached_property
    def _template(self) -> nn.Module:
        """A module that no one else sees, into which parameters are put for the time of a call."""
        with seeded(0, torch.device("cpu")):
            made = _copied(self.module) if isinstance(self.module, nn.Module) else self.module()
        if not isinstance(made, nn.Module):
            raise ConfigurationError(f"module: the function made a {type(made).__name__}, expected an nn.Module")
        return made

    @cached_property
    def _written(self) -> set[str]:
        """Tensors of a batch that the module writes to in place, found by running it once on each split.

        Raises `ConfigurationError` where it writes to parameters or does not run.
        """
        module, written = self._template, set()
        held = dict((*module.named_parameters(), *module.named_buffers()))
        for split, source in self._sources.items():
            batch = self.batch({"lane": torch.zeros(1)}, split, LaneGenerator(source.device))  # type: ignore[arg-type]
            batch = {name: t[0].clone() for name, t in batch.items()}
            given = {name: t.detach().to(source.device, copy=True) for name, t in held.items()}
            watched = {name: t for name, t in given.items() if held[name].requires_grad} | batch
            before, after = {name: t._version for name, t in watched.items()}, dict(given)
            self._try(after, batch)
            written |= {name for name, t in watched.items() if t._version != before[name]}
            written |= {name for name in watched.keys() & given.keys() if after[name] is not given[name]}
        if own := sorted(written & held.keys()):
            raise ConfigurationError(
                f"module: forward of this {self._name} writes to its parameter {own[0]} in place (max_norm, clipping), "
                "which a loss must not; compute a new tensor from it instead, as torch.nn.utils.parametrize does"
            )
        return written

    def _try(self, tensors: dict[str, Tensor], batch: Batch) -> None:
        try:
            with torch.no_grad(), seeded(0, batch["target"].device):
                self._run(self._template, tensors, batch)
        except (L2OError, Warning):
            return  # the first step says it, of all lanes
        except Exception as error:  # whatever a user's module or criterion raises
            dtype = next(p.dtype for p in self._template.parameters() if p.requires_grad)
            came = ", ".join(f"{name} {list(t.shape)} {t.dtype}" for name, t in batch.items() if name != "key")
            reason = str(error).strip().partition("\n")[0]
            ways = "; .float(), .double() or, for classes, .long() one of them" if "ype" in reason else ""
            raise ConfigurationError(
                f"module: this {self._name}, in {dtype}, and its criterion do not run on {came} "
                f"({type(error).__name__}: {reason}){ways}"
            ) from error

    @cached_property
    def _sources(self) -> dict[str, Source]:
        given = {"train": self.train, "valid": self.valid}
        return {name: as_source(name, x, self.batch_size) for name, x in given.items() if x is not None}

    def _draw(self, seed: int, device: torch.device) -> dict[str, Tensor]:
        """Parameters and buffers of one fresh module; tied ones once, under their first name."""
        with seeded(seed, device):
            module = _redrawn(self.module) if isinstance(self.module, nn.Module) else self.module()
        return {name: t.detach() for name, t in (*module.named_parameters(), *module.named_buffers())}


def _copied(module: nn.Module) -> nn.Module:
    _check_module(module)
    try:
        return copy.deepcopy(module)
    except Exception as error:  # whatever a user's module raises, the answer is the same
        raise ConfigurationError(
            f"module: this {type(module).__name__} cannot be copied ({error}); hand over a function that makes one"
        ) from error


def _check_module(module: nn.Module) -> None:
    """Raises `ConfigurationError` for modules that cannot be run as a function of their parameters."""
    for part in module.modules():
        name = f"module: {type(part).__name__}"
        if isinstance(part, torch.jit.ScriptModule):
            raise ConfigurationError(f"{name} is scripted or traced; hand over the module that it was made from")
        if isinstance(part, DataParallel | DistributedDataParallel):
            raise ConfigurationError(f"{name} is replicated over devices; hand over its .module, lanes take the device")
        own = (*part.parameters(recurse=False), *part.buffers(recurse=False))
        if any(is_lazy(t) for t in own):
            raise ConfigurationError(f"{name} does not know its shapes yet; run it once on an example, or state them")
        if any(t.is_meta for t in own):
            raise ConfigurationError(f"{name} is on the meta device, without values; make it on the CPU")


def _redrawn(module: nn.Module) -> nn.Module:
    """A copy with new parameters; children first, as some parents (nn.MultiheadAttention) then refine theirs."""
    fresh = _copied(module)
    for part in reversed(list(fresh.modules())):
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if reset is not None:
            _reset(part, reset)
    return fresh


def _reset(part: nn.Module, reset: Callable[[], Any]) -> None:
    """Call ``reset``; what it drew for a parametrized tensor, in place of the value, becomes what it is made from."""
    with parametrize.cached():
        drawn = {name: getattr(part, name) for name in getattr(part, "parametrizations", ())}
        reset()
    for name, value in drawn.items():
        setattr(part, name, value)
