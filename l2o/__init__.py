"""l2o: meta-train, ship and use learned optimizers in PyTorch.

    optimizer = l2o.LearnedOptimizer(model.parameters(), "default", total_steps=10_000)

`l2o.rules`, `l2o.tasks` and `l2o.estimators` list what there is; `l2o.types` has the contracts for your own.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from l2o import estimators, rules, tasks
from l2o.checkpoints.store import list_pretrained, load, read_card, save
from l2o.meta import MetaTraining, constant_schedule, warmup_cosine, warmup_exponential, warmup_linear
from l2o.optim import LearnedOptimizer, param_groups
from l2o.rules.elementwise import ElementwiseRule
from l2o.types import (
    CheckpointError,
    ConfigurationError,
    DataError,
    DownloadError,
    GradientError,
    L2OError,
    MetaGradient,
    Mixture,
    OptState,
    ParameterError,
    ParamInfo,
    Reduce,
    ResumeError,
    Run,
    RunConflictError,
    TaskFamily,
    UnknownNameError,
    UpdateRule,
    WriteError,
)

if TYPE_CHECKING:
    from l2o.evaluation.diagnosis import diagnose


def __getattr__(name: str) -> Any:
    """Import what few need when it is asked for."""
    if name == "diagnose":
        from l2o.evaluation.diagnosis import diagnose

        return diagnose
    raise AttributeError(f"module 'l2o' has no attribute {name!r}")


try:
    __version__ = version("l2o")
except PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "DownloadError",
    "ElementwiseRule",
    "GradientError",
    "L2OError",
    "LearnedOptimizer",
    "MetaGradient",
    "MetaTraining",
    "Mixture",
    "OptState",
    "ParamInfo",
    "ParameterError",
    "Reduce",
    "ResumeError",
    "Run",
    "RunConflictError",
    "TaskFamily",
    "UnknownNameError",
    "UpdateRule",
    "WriteError",
    "constant_schedule",
    "diagnose",
    "estimators",
    "list_pretrained",
    "load",
    "param_groups",
    "read_card",
    "rules",
    "save",
    "tasks",
    "warmup_cosine",
    "warmup_exponential",
    "warmup_linear",
]
