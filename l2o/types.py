"""The contracts: what every module of l2o hands to every other.

Data flows one way: task sample -> unroll -> meta-gradient -> outer step -> checkpoint -> plug-in. Conventions:

* **One container.** Parameters, gradients, updates and meta-parameters θ are flat dicts of named tensors,
  which is what ``torch.func.functional_call``, ``torch.func.vmap`` and safetensors take.
* **Lanes.** In meta-training every tensor carries a leading axis of ``lanes`` (independent inner problems, θ
  included: one copy a lane, so that a diverged lane cannot poison the gradient of the others). Rules and losses
  are written for a single lane; the engine vectorises them. The plug-in has no lane axis.
* **One sign.** ``new = params + updates``. Nobody subtracts.
* **One dtype.** Where a docstring names no other, a tensor has the dtype of the parameters it belongs to, and no unit.
* **The generator is the device.** Whatever draws random numbers takes a ``torch.Generator``, never the global one, and
  makes its tensors on ``generator.device``.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from l2o.errors import CheckpointError as CheckpointError
from l2o.errors import ConfigurationError as ConfigurationError
from l2o.errors import DataError as DataError
from l2o.errors import DownloadError as DownloadError
from l2o.errors import GradientError as GradientError
from l2o.errors import L2OError as L2OError
from l2o.errors import ParameterError as ParameterError
from l2o.errors import ResumeError as ResumeError
from l2o.errors import RunConflictError as RunConflictError
from l2o.errors import UnknownNameError as UnknownNameError
from l2o.errors import WriteError as WriteError

Params = dict[str, Tensor]
Grads = dict[str, Tensor]
Updates = dict[str, Tensor]
Theta = dict[str, Tensor]
Buffers = dict[str, Tensor]
Slots = dict[str, Tensor]
"""The optimizer state of one parameter tensor, by slot name."""
TaskData = dict[str, Tensor]
Batch = dict[str, Tensor]
Metrics = dict[str, Tensor]
"""0-d tensors on the device of the run; reading them is the caller's synchronisation, not the engine's."""

Split = Literal["train", "valid"]
Kind = Literal["matrix", "vector", "embedding", "output"]


class OptState(NamedTuple):
    """The state of an update rule.

    per_param: slots of each parameter tensor, ``{parameter: {slot: Tensor}}``.
    shared: slots that belong to no single parameter tensor (loss buffers, for example).
    """

    per_param: dict[str, Slots]
    shared: Slots


class Run(NamedTuple):
    """Where in its run an update happens, and how the run goes; tensors, because horizons differ from lane to lane.

    step: int64, 0-d: number of updates already applied (the first update sees 0).
    total_steps: int64, 0-d: the length of the run that the rule was told.
    loss: 0-d, at the parameters before the update; None where the rule does not ask for it (``needs_loss``).
    called: what the host knows of ``step`` without waiting for a device: skipped steps may be in it.
    """

    step: Tensor
    total_steps: Tensor
    loss: Tensor | None = None
    called: int | None = None


@dataclass(frozen=True)
class ParamInfo:
    """A parameter tensor, unseen.  shape: of the whole, also where a process holds a shard of it.  kind: its use."""

    shape: tuple[int, ...]
    kind: Kind


Infos = Mapping[str, ParamInfo]


class Sum(NamedTuple):
    """A sum over entries of a parameter tensor.  value: over those that are here.  axes: of the tensor, summed over."""

    value: Tensor
    axes: tuple[int, ...]


class Reduce:
    """Completes sums where each process of a run holds some tensors or shards of tensors; here, one holds all.

    Rules call its methods in the same order in all processes, once for all tensors. Each process has to hold a part
    of some tensor: without one a rule calls nothing, and the others wait.
    """

    def shards(self, sums: Mapping[str, Mapping[str, Sum]]) -> dict[str, Slots]:
        """Return the sums over whole tensors, by parameter and name, on every process that holds a part of the tensor.

        Entries along axes that were not summed over stay with the process that holds them.
        """
        return {name: {key: each.value for key, each in own.items()} for name, own in sums.items()}

    def part(self, name: str) -> Reduce:
        """Return that for a rule that is a part of another: its sums are over the tensors of that part alone."""
        return self

    def tensors(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the sum over all tensors of the run of what is known of each as a whole, ``[...]`` by parameter."""
        return torch.stack(list(values.values())).sum(0)

    def largest(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the largest over all tensors of the run, entry by entry, of ``[...]`` by parameter."""
        return torch.stack(list(values.values())).amax(0)


LOCAL = Reduce()


class InnerState(NamedTuple):
    """Inner problems in flight, all tensors ``[lanes, ...]``; the state of an unroll and of its resume.

    data: what was sampled for each lane's task.     params, buffers, opt: the inner training run itself.
    step, total_steps: int64 ``[lanes]``.            first_loss: ``[lanes]``, the loss of step 0 (NaN before it).
    """

    data: TaskData
    params: Params
    buffers: Buffers
    opt: OptState
    step: Tensor
    total_steps: Tensor
    first_loss: Tensor


class UpdateRule(abc.ABC):
    """A learned update rule: pure functions of tensors. Subclasses are frozen dataclasses of hyperparameters.

    Everything is written for one lane, without a lane axis, in the dtype of ``params`` (the caller sees to it that
    θ, gradients and state have that dtype too). No method writes to its inputs or reads a tensor's value on the host;
    none draws random numbers (``init_theta`` aside) or logs. Differentiable simply means that grad mode is on.
    """

    @property
    def needs_loss(self) -> bool:
        """Whether ``update`` reads ``run.loss``; the plug-in then asks for one."""
        return False

    @property
    def learned_init(self) -> bool:
        """Whether ``init`` may depend on ``theta``, which meta-training then differentiates; False saves some time."""
        return True

    @property
    def rests(self) -> bool:
        """Whether an entry whose gradients were all 0 stays (padding, pruned weights); else the plug-in sees to it."""
        return False

    @property
    def stride(self) -> float:
        """The root mean square of a step that is nothing unusual, in the unit of parameters; 1e-3, that of Adam at its
        usual rate."""
        return 1e-3

    def is_usual(self, called: int) -> bool:
        """Say whether the update that `Run` calls so does what most do, so that a CUDA graph of one is one of all."""
        return True

    def needs_whole(self, info: ParamInfo) -> bool:
        """Say whether ``update`` takes such a tensor as a whole only (Newton-Schulz, say), not in shards."""
        return False

    def exact_slots(self, info: ParamInfo) -> frozenset[str]:
        """Return slots of such a tensor that keep the precision of the arithmetic where state is kept in bfloat16."""
        return frozenset()

    @abc.abstractmethod
    def init_theta(self, generator: torch.Generator) -> Theta:
        """Draw random meta-parameters, float32, on the generator's device."""

    @abc.abstractmethod
    def init(self, theta: Theta, params: Params, infos: Infos) -> OptState:
        """Return the state before the first update of ``params``. Slots have the dtype of their parameter."""

    @abc.abstractmethod
    def update(
        self,
        theta: Theta,
        grads: Grads,
        state: OptState,
        params: Params,
        infos: Infos,
        run: Run,
        reduce: Reduce = LOCAL,
    ) -> tuple[Updates, OptState]:
        """Return one update, and the new state: what meta-training differentiates and all else must equal.

        theta: meta-parameters.                       grads, params: same names and shapes.
        state: from ``init`` or the last ``update``.   infos: of ``params``.
        reduce: completes sums over entries and tensors, of which a process may hold a part.
        """


class TaskFamily(abc.ABC):
    """A distribution of inner problems that share shapes. Subclasses are frozen dataclasses of static settings.

    Settings (architecture, width, activation, kind of loss) define a family; what is sampled is tensors only.
    """

    @property
    def keyed(self) -> bool:
        """Whether all random numbers come from the functions of `l2o.random`. Processes that share the lanes of a run
        then draw only their own; for any other family each of them draws for all lanes."""
        return False

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """What tensors are for, by name, where their axes do not say it (`l2o.ops.kinds.param_infos`)."""
        return {}

    @abc.abstractmethod
    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        """Draw ``lanes`` tasks: at least one tensor, each ``[lanes, ...]``; what does not vary is not repeated here."""

    @abc.abstractmethod
    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        """Draw initial parameters and buffers of every lane, ``[lanes, ...]``."""

    @abc.abstractmethod
    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        """Draw one mini-batch for every lane, ``[lanes, ...]``; whatever randomness the loss needs is in it, as
        tensors."""

    @abc.abstractmethod
    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        """Return the loss (0-d) of **one lane** and its new buffers; pure, no random numbers, no writes to its
        inputs."""

    def transform_gradients(
        self, grads: Grads, buffers: Buffers, data: TaskData, batch: Batch
    ) -> tuple[Grads, Buffers]:
        """Return what the optimizer sees of the gradients, and new buffers; all lanes at once, ``[lanes, ...]``.

        Pure, and differentiable where grad mode is on. Losses and their derivatives with respect to θ stay honest,
        which they would not if noise, say, were put into the gradient of ``loss`` itself.
        """
        return grads, buffers


@dataclass(frozen=True)
class Mixture:
    """Several families to meta-train on at once, and the way to vary what a family holds fixed: widths, depths, losses.

    families: by name.     weights: by name, positive; what is not named has 1.
    """

    families: Mapping[str, TaskFamily]
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        wrong = {name: w for name, w in (self.weights or {}).items() if name not in self.families or not w > 0}
        if wrong or not self.families:
            raise ConfigurationError(
                f"weights={dict(self.weights or {})!r}: expected positive numbers for some of the families "
                f"{sorted(self.families)}, of which there must be at least one"
            )


class MetaGradient(abc.ABC):
    """An estimator of the gradient of the meta-loss with respect to θ.

    Subclasses are frozen dataclasses that hold the rule, the family and the settings of the estimator. Where several
    processes share a run, each calls the methods with the same ``theta`` and a generator in the same state.
    """

    rule: UpdateRule
    family: TaskFamily
    lanes: int = 0
    """Inner problems at once."""

    @abc.abstractmethod
    def init(self, theta: Theta, generator: torch.Generator) -> Any:
        """Draw fresh inner problems: the estimator's state, a nested structure (tuples, dicts) of tensors.

        Where processes share a run, 0-d tensors are the same in all of them; the others have this process' rows.
        """

    @abc.abstractmethod
    def estimate(self, theta: Theta, state: Any, generator: torch.Generator) -> tuple[Theta, Any, Metrics]:
        """Return, of one truncation, the gradient of the meta-loss by the names of θ, the next state, and as metrics at
        least ``meta_loss``, ``lanes_masked``, ``lanes_broken`` (no finite loss at step 0) and ``inner_steps``; gradient
        and metrics are those of all processes together."""
