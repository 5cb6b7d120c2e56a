"""The whole numbers of a run: read from its configuration, and checked, here alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from l2o.checks import check_int, check_seed


class Plan(NamedTuple):
    """How many outer steps there are in all, and from one of each to the next; 0 evaluations are none.

    seed: of all that is drawn.
    """

    steps: int
    log_every: int
    checkpoint_every: int
    evaluate_every: int
    seed: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Plan:
        """Read and check those of a configuration; raises `ConfigurationError`."""
        numbers = {
            name: check_int(name, config[name], least=int(name != "evaluate_every")) for name in cls._fields[:-1]
        }
        return cls(**numbers, seed=check_seed("seed", config["seed"]))
