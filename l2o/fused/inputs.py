"""What kernels of whole steps are given."""

from __future__ import annotations

from typing import NamedTuple

from l2o.types import Grads, Infos, OptState, Params, Run, Theta


class Inputs(NamedTuple):
    """The arguments of `UpdateRule.update`, but for ``reduce``."""

    theta: Theta
    grads: Grads
    state: OptState
    params: Params
    infos: Infos
    run: Run
