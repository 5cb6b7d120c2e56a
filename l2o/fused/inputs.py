"""What kernels of whole steps are given."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, TypeVar, cast

import torch
from torch.utils._pytree import tree_map

from l2o.types import Grads, Infos, OptState, Params, Run, Theta

Tree = TypeVar("Tree")


class Inputs(NamedTuple):
    """The arguments of `UpdateRule.update`, but for ``reduce``."""

    theta: Theta
    grads: Grads
    state: OptState
    params: Params
    infos: Infos
    run: Run


def copied(tree: Tree) -> Tree:
    """Return a nested structure with copies of all its tensors, contiguous, for a kernel to write to."""
    return cast("Tree", tree_map(partial(torch.clone, memory_format=torch.contiguous_format), tree))
