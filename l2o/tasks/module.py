"""Any ``nn.Module`` with a loss and data as an inner problem."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call

from l2o._checks import whole
from l2o.draws import keys
from l2o.tasks.sources import Examples, Source, as_source
from l2o.tasks.stateless import Stateless, seeded
from l2o.types import Batch, Buffers, ConfigurationError, Params, Split, TaskData, TaskFamily


@dataclass(frozen=True, eq=False)
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

    Raises `ConfigurationError` for data that do not follow this, for a module that draws random numbers other than by
    dropout, and for one that `torch.func.vmap` cannot vectorise, as with control flow that depends on data.
    """

    module: nn.Module | Callable[[], nn.Module]
    criterion: Callable[[Tensor, Tensor], Tensor]
    train: Examples
    valid: Examples | None = None
    batch_size: int | None = None

    keyed = True

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            whole("batch_size", self.batch_size)
        if not any(p.requires_grad for p in self._template.parameters()):
            raise ConfigurationError(f"module: this {self._name} has no parameters to train")
        self._sources  # noqa: B018  made now, so that unusable data are refused now

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
        """``input.0``, ``input.1``, … and ``target``, each ``[lanes, batch, ...]``, for ``train`` a ``key [lanes]``."""
        if split not in self._sources:
            raise ConfigurationError(f"split={split!r}: this ModuleTask was given no data for it; pass {split}=")
        lanes = len(data["lane"])
        *inputs, target = self._sources[split].draw(generator, lanes)
        batch = {f"input.{i}": x for i, x in enumerate(inputs)} | {"target": target}
        return batch | {"key": keys(generator, lanes)} if split == "train" else batch

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        module = self._template.train("key" in batch)
        # Clones, because BatchNorm writes its running statistics in place; functional_call leaves the new ones here.
        # Detached, because it has no derivative in them and refuses those that could have one (torch 2.13).
        tensors = {**params, **{name: b.detach().clone() for name, b in buffers.items()}}
        inputs = tuple(batch[f"input.{i}"] for i in range(sum(name.startswith("input.") for name in batch)))
        try:
            with Stateless(batch.get("key")):
                loss = self.criterion(functional_call(module, tensors, inputs), batch["target"])
        except RuntimeError as error:
            raise self._explain(error) from error
        if loss.ndim:
            raise ConfigurationError(f"criterion: a loss of shape {list(loss.shape)}, expected 0-d; take its mean")
        return loss, {name: tensors[name] for name in buffers}

    @property
    def _name(self) -> str:
        return type(self._template).__name__

    @cached_property
    def _template(self) -> nn.Module:
        """A module that no one else sees, into which parameters are put for the time of a call."""
        if isinstance(self.module, nn.Module):
            return copy.deepcopy(self.module)
        with seeded(0, torch.device("cpu")):
            made = self.module()
        if not isinstance(made, nn.Module):
            raise ConfigurationError(f"module: the function made a {type(made).__name__}, expected an nn.Module")
        return made

    @cached_property
    def _sources(self) -> dict[str, Source]:
        given = {"train": self.train, "valid": self.valid}
        return {name: as_source(name, x, self.batch_size) for name, x in given.items() if x is not None}

    def _draw(self, seed: int, device: torch.device) -> dict[str, Tensor]:
        """Parameters and buffers of one fresh module; tied ones once, under their first name."""
        with seeded(seed, device):
            module = _redrawn(self.module) if isinstance(self.module, nn.Module) else self.module()
        return {name: t.detach() for name, t in (*module.named_parameters(), *module.named_buffers())}

    def _explain(self, error: RuntimeError) -> Exception:
        if "vmap" not in str(error):
            return error
        return ConfigurationError(
            f"torch.func.vmap cannot vectorise {self._name} over lanes: {error}\n"
            "Write control flow that depends on data with torch.where, and leave out .item() and data-dependent shapes"
        )


def _redrawn(module: nn.Module) -> nn.Module:
    """A copy with new parameters; children first, as some parents (nn.MultiheadAttention) then refine theirs."""
    fresh = copy.deepcopy(module)
    for part in reversed(list(fresh.modules())):
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if reset is not None:
            reset()
    return fresh
