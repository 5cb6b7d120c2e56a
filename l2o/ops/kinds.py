"""What parameter tensors are, where nobody says so, and what a tensor's width makes of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from l2o.types import Kind, ParamInfo

_TABLES = (nn.Embedding, nn.EmbeddingBag)


def param_infos(shapes: Mapping[str, Sequence[int]], kinds: Mapping[str, Kind] | None = None) -> dict[str, ParamInfo]:
    """Return what is known of tensors of such ``shapes``.

    kinds: by name; by default tensors of two and more axes are a ``matrix``, the others a ``vector``.
    """
    said, known = kinds or {}, {}  # most tensors are like others
    found = {}
    for name, shape in shapes.items():
        fact = (*shape, said.get(name))
        if fact not in known:
            known[fact] = ParamInfo(tuple(shape), said.get(name, "matrix" if len(shape) >= 2 else "vector"))
        found[name] = known[fact]
    return found


def kinds_of(model: nn.Module) -> dict[str, Kind]:
    """Return what each parameter of ``model`` is for, by name; those that several layers share once, by their first
    name.

    ``embedding``: the tables of `torch.nn.Embedding`, also where an output shares them. ``output``: the weight of the
    last `torch.nn.Linear` of the model, where it is not the only one, and not parametrized. ``vector``: what has fewer
    than two axes of more than one entry. ``matrix``: all else.
    """
    # Not by the attribute, which a parametrization computes anew: spectral norms advance, dropout draws.
    tables = {id(part._parameters.get("weight")) for part in model.modules() if isinstance(part, _TABLES)}
    linear = [id(part._parameters.get("weight")) for part in model.modules() if isinstance(part, nn.Linear)]
    outputs = set(linear[-1:] if len(linear) > 1 else ())

    def kind(p: Tensor) -> Kind:
        if id(p) in tables:
            return "embedding"
        if id(p) in outputs:
            return "output"
        return "matrix" if sum(length > 1 for length in p.shape) >= 2 else "vector"

    return {name: kind(p) for name, p in model.named_parameters()}


def infos_of(params: Mapping[str, Tensor], kinds: Mapping[str, Kind] | None = None) -> dict[str, ParamInfo]:
    """Return `param_infos` of whole tensors without lanes, for their shapes."""
    return param_infos({name: p.shape for name, p in params.items()}, kinds)


def lane_infos(params: Mapping[str, Tensor], kinds: Mapping[str, Kind] | None = None) -> dict[str, ParamInfo]:
    """Return `param_infos` of the single lanes of ``params [lanes, ...]``."""
    return param_infos({name: p.shape[1:] for name, p in params.items()}, kinds)


def size(info: ParamInfo) -> int:
    """Return how many entries the whole tensor has; 1 for an empty one, so that means over it are 0."""
    return max(math.prod(info.shape), 1)


def width_multiplier(param: Tensor, info: ParamInfo) -> Tensor:
    """Return ``1 / fan_in`` of a ``param`` that is a hidden matrix, else 1, 0-d: the factor on a step under which
    widths train alike.

    Maximal update parametrisation of learned optimizers (µLO, arXiv 2406.00153, section 4): hidden matrices 1 / fan_in,
    input, output and bias tensors 1. Of ``[out, in, ...]``, as `torch.nn` has it, fan_in is all but the first axis. The
    model itself is the user's: variance 1 / fan_in at hidden layers, output layer zero at first and divided by width.
    What a matrix is for says the ``kind`` of its parameter group, in meta-training its family.
    """
    fan_in = math.prod(info.shape[1:]) if info.kind == "matrix" else 1
    return param.new_full((), 1.0 / max(fan_in, 1))
