"""Which public learned optimizer some tensors are of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from l2o.interop.references import REFERENCES
from l2o.types import CheckpointError, L2OError, Theta, UpdateRule


def recognize(theta: Theta, settings: Mapping[str, Any]) -> tuple[str, UpdateRule, Theta]:
    """The name in `REFERENCES` of what has exactly these tensors, our rule for it, and its θ.

    theta: by the reference's paths.     settings: hyperparameters under the reference's names.
    Raises `CheckpointError`, which says what came and what is known, and `ConfigurationError` for a value of a setting.
    """
    # The sizes of some tensors are those of lists among the settings, so that these belong to what is tried first.
    known = [name for name in REFERENCES if _fits(name, theta, settings)]
    known = known or [name for name in REFERENCES if _fits(name, theta, {})]
    if not known:
        came = ", ".join(f"{path} {tuple(tensor.shape)}" for path, tensor in sorted(theta.items()))
        raise CheckpointError(
            f"tensors of no learned optimizer that is known here: {came:.2000}; known are {', '.join(REFERENCES)}, "
            "under the paths of the originals or in the state dicts of PyLO (both of VeLO's together)"
        )
    return known[0], *REFERENCES[known[0]].rebuild(theta, settings)


def _fits(name: str, theta: Theta, settings: Mapping[str, Any]) -> bool:
    try:
        REFERENCES[name].rebuild(theta, settings)
    except (L2OError, LookupError, RuntimeError, TypeError, ValueError):  # tensors of other shapes than it expects
        return False
    return True
