"""Which public learned optimizer some tensors are of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from l2o.interop.references import REFERENCES
from l2o.types import CheckpointError, L2OError, Theta


def recognize(theta: Theta, settings: Mapping[str, Any]) -> list[str]:
    """Return the names in `REFERENCES` of all that have exactly these tensors, the one that is meant by default first.

    theta: by the reference's paths.     settings: hyperparameters under the reference's names.
    Raises `CheckpointError`, which says what came and what is known.
    """
    # The sizes of some tensors are those of lists among the settings, so that these belong to what is tried first.
    for known in (settings, {}):
        if names := [name for name in REFERENCES if _fits(name, theta, known)]:
            return names
    came = ", ".join(f"{path!r} {tuple(tensor.shape)}" for path, tensor in sorted(theta.items()))
    raise CheckpointError(
        f"tensors of no learned optimizer that is known here: {came:.2000}; known are {', '.join(REFERENCES)}, "
        "under the paths of the originals or in the state dicts of PyLO (both of VeLO's together). Which of them they "
        "should be, name it (--as NAME), and what does not fit is said"
    )


def _fits(name: str, theta: Theta, settings: Mapping[str, Any]) -> bool:
    try:
        REFERENCES[name].rebuild(theta, settings)
    except (L2OError, LookupError, RuntimeError, TypeError, ValueError):  # tensors of other shapes than it expects
        return False
    return True
