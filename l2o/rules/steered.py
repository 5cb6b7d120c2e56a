"""Momentum of which only the direction counts, under a schedule and a controller that needs no loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from l2o.checks import check_float, check_int
from l2o.ops.alignment import init_alignment, init_controller
from l2o.ops.controller import init_decisions, init_seen, init_shown, steer
from l2o.ops.eigenbasis import init_basis, is_due, whiten
from l2o.ops.entries import init_entries, weigh
from l2o.ops.groups import Group, by_shape, matrix_sums, shard_sums, stack, unstacked
from l2o.ops.moments import bias_correction, decay, ema
from l2o.ops.numeric import log_of, logit_of, of_shapes, over_root, safe_sqrt, scalar_like
from l2o.ops.orthogonal import as_matrix, is_matrix, matrices, polar, row_column_scales
from l2o.ops.schedules import linear_warmup, power_decay
from l2o.types import (
    LOCAL,
    ConfigurationError,
    Grads,
    Infos,
    OptState,
    ParamInfo,
    Params,
    Reduce,
    Run,
    Slots,
    Sum,
    Theta,
    UpdateRule,
    Updates,
)

Direction = Literal["eigenbasis", "diagonal", "orthogonal", "normalized", "adam"]
Controller = Literal["alignment", "mlp", "lstm", "none"]
Schedule = Literal["decay", "constant"]

_FAN_IN = 64.0
"""Inputs of the matrix whose step has no factor."""
_LEAST_LIMIT = 3e-4
"""Of the root mean square of a matrix' step, so that matrices of zeros get on."""
_FLOOR = 0.01
"""Share of the step that is left at the end of the run, and after it."""


@dataclass(frozen=True)
class Steered(UpdateRule):
    """``update = -lr * factor * schedule(t / T) * exp(z) * direction``, whatever the scale of the gradients.

    direction: of tensors of two and more axes, as matrices of the first by the others; a row or column alone counts as
        a vector. The root mean square of a matrix' direction is one, over all its rows, also where few have gradients.
        ``eigenbasis``: Nesterov's momentum, over the root of second moments, in the eigenbasis of the products of
        gradients (SOAP, Vyas et al. 2024, arXiv 2409.11321); matrices with a side over ``widest`` are orthogonal.
        Vectors of up to ``turned`` entries follow it as well, at its own size, which is Adam's.
        ``diagonal``: the same without a basis: second moments are those of entries.
        ``orthogonal``: Nesterov's momentum, singular values brought near one by Newton-Schulz (Muon, Jordan 2024).
        ``normalized``: momentum, its rows, then its columns, of one size (Scetbon et al. 2025, arXiv 2502.06742).
        ``adam``: like scalars and all other vectors, Adam (Kingma and Ba 2015, arXiv 1412.6980) without eps.
    controller: of ``z``, one number for all tensors. ``alignment``: `l2o.ops.alignment`; ``none``: 0; ``mlp`` and
        ``lstm``: ``alignment``, and a network that adds to its push and gives tensors factors (`l2o.ops.controller`).
    network: whether a perceptron over entries weighs momentum and gradient (`l2o.ops.entries`): in the basis, of
        entries, or of entries before they are orthogonalised. The other two directions have none.
    reads_loss: whether the controller's network sees how the loss goes, besides.
    schedule: ``decay``: linear warm-up over the share ``warmup`` of the run, times ``(1 - t / T) ** power``, which ends
        at 0.01; ``constant``: warm-up alone.
    iterations: of Newton-Schulz.    period: steps from one look at the basis to the next.
    lr: without a unit, as the parameters.    momentum: of matrices.    beta1, beta2: of Adam.
    memory: share of the means of products and second moments of a basis that a step keeps.
    matrix, fan_in: the factor of matrices is ``matrix * (fan-in / 64) ** -fan_in``; all else has 1.
    relative: soft limit of a matrix' step: its root mean square is at most this share of the matrix' own, plus 3e-4.
        Sine networks, whose weights are small for what they do, need it; to most others it makes no difference.
    by_gain: power of the matrix' gain, its root mean square times the root of its fan-in, at most one, that is a factor
        of ``relative``: what a matrix with inputs of size one puts out. A sine network's is a twentieth of others'.
        Unless it is 0, the 3e-4 are times ``(64 / fan-in) ** 0.5``, too, for adapters of low rank that start at zero.
    θ: those of ``log_lr, log_matrix, log_relative, logit_momentum, logit_beta1, logit_beta2, fan_in, logit_warmup,
    log_power, logit_memory`` that the parts need, and those of the controller, ``log_*``; all 0-d.
    Slots: ``m, d`` (direction) of an orthogonal matrix, with those of `init_basis` where there is one, ``m, row, col``
    (scales) of a normalized one, else ``m, v, count``; shared: ``log_step`` (z), ``fast, slow, square``.
    The controller sums over all tensors, of which it sees no ``lr``: freeze by ``requires_grad``, not by lr=0.
    """

    direction: Direction = "orthogonal"
    controller: Controller = "alignment"
    schedule: Schedule = "decay"
    iterations: int = 3
    lr: float = 3e-3
    matrix: float = 0.7
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.99
    fan_in: float = 0.05
    relative: float = 0.03
    warmup: float = 0.03
    power: float = 1.0
    memory: float = 0.95
    period: int = 10
    widest: int = 1024
    turned: int = 0
    by_gain: float = 0.0
    network: bool = False
    reads_loss: bool = False

    learned_init = False
    rests = True

    def __post_init__(self) -> None:
        for name, literal in {"direction": Direction, "controller": Controller, "schedule": Schedule}.items():
            value, valid = getattr(self, name), get_args(literal)
            if value not in valid:
                raise ConfigurationError(f"{name}={value!r}: expected one of {', '.join(valid)}")
        for name in ("iterations", "period", "widest"):
            check_int(name, getattr(self, name))
        check_int("turned", self.turned, least=0)
        for name in ("fan_in", "by_gain"):
            check_float(name, getattr(self, name))
        check_float("memory", self.memory, above=0.0, below=1.0)
        if self.network and self.direction in ("normalized", "adam"):
            raise ConfigurationError(
                f"network=True: expected direction=eigenbasis, diagonal or orthogonal, not {self.direction}"
            )
        if self.reads_loss and not self.decides:
            raise ConfigurationError(f"reads_loss=True: expected controller=mlp or lstm, not {self.controller}")
        self.init_theta(torch.Generator())  # the transforms know what they take

    @property
    def decides(self) -> bool:
        """Whether a network has a part in the controller."""
        return self.controller in ("mlp", "lstm")

    @property
    def needs_loss(self) -> bool:  # type: ignore[override]
        return self.reads_loss

    @property
    def stride(self) -> float:
        return self.lr

    def init_theta(self, generator: torch.Generator) -> Theta:
        start = {f"log_{name}": log_of(name, getattr(self, name)) for name in ("lr", "matrix", "relative", "power")}
        shares = ("momentum", "beta1", "beta2", "warmup", *(["memory"] if self._has_squares else []))
        start |= {f"logit_{name}": logit_of(name, getattr(self, name)) for name in shares} | {"fan_in": self.fan_in}
        unused = ["log_matrix", "log_relative", "logit_momentum", "fan_in"] if self.direction == "adam" else []
        unused += ["log_power"] if self.schedule == "constant" else []
        theta = {name: scalar_like(value, generator) for name, value in start.items() if name not in unused}
        theta |= init_controller(generator) if self.controller != "none" else {}
        theta |= init_decisions(generator, self.controller, self.reads_loss) if self.decides else {}
        return theta | (init_entries(generator) if self.network else {})

    @property
    def _has_squares(self) -> bool:
        return self.direction in ("eigenbasis", "diagonal") or self.network

    def init(self, theta: Theta, params: Params, infos: Infos) -> OptState:
        slots = {name: self._init_slots(p, infos[name]) for name, p in params.items()}
        shared = init_alignment(theta["log_lr"]) if self.controller != "none" else {}
        return OptState(slots, shared | (init_shown(shared["slow"], self.reads_loss) if self.decides else {}))

    def _init_slots(self, param: Tensor, info: ParamInfo) -> Slots:
        own = self._init_direction(param, info)
        return own | init_seen(param, self.controller) if self.decides else own

    def _init_direction(self, param: Tensor, info: ParamInfo) -> Slots:
        m = torch.zeros_like(param)
        match self.path(info.shape):
            case "eigenbasis":
                return {"m": m, "d": torch.zeros_like(m), **init_basis(param, info.shape)}
            case "diagonal" | "orthogonal":
                squares = {"v": torch.zeros_like(m)} if self._has_squares else {}
                return {"m": m, "d": torch.zeros_like(m), **squares}
            case "normalized":
                rows, columns = as_matrix(param.shape)
                return {"m": m, "row": param.new_zeros(rows), "col": param.new_zeros(columns)}
        return {"m": m, "v": torch.zeros_like(m), "count": param.new_zeros(())}

    def needs_whole(self, info: ParamInfo) -> bool:
        return self.path(info.shape) in ("eigenbasis", "diagonal", "orthogonal")

    def exact_slots(self, info: ParamInfo) -> frozenset[str]:
        # Where hardly a gradient lies second moments are small, and would make rounded momentum as long as any.
        return frozenset({"m"} if self.path(info.shape) == "eigenbasis" else ())

    def path(self, shape: tuple[int, ...]) -> Direction:
        """Return the direction of a tensor."""
        if not is_matrix(shape):
            return "eigenbasis" if self.direction == "eigenbasis" and 1 < math.prod(shape) <= self.turned else "adam"
        wide = self.direction == "eigenbasis" and max(as_matrix(shape)) > self.widest
        return "orthogonal" if wide else self.direction

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
        groups = by_shape(grads, state, infos)
        sums = shard_sums(groups, [self._sums(theta, group, params) for group in groups], reduce)
        factors = [self.factors(theta, [group.shape]) for group in groups]
        shared, decided = steer(theta, state.shared, groups, sums, factors, run, reduce)
        size, due = self.size(theta, shared, run), self.is_due(run)
        slots: dict[str, Slots] = {}
        updates: Updates = {}
        for group, own, more in zip(groups, sums, decided, strict=True):
            new = self._advance(theta, group, due, reduce) | more
            d = self._direction(theta, new, group)
            own_size = size * more["factor"].exp() if more else size
            squares = own.get("params", own_size)  # Adam's direction does not read them
            scales = self.scales(theta, own_size, squares, [group.shape] * len(d))
            steps = -scales.view(-1, *[1] * (d.ndim - 1)) * d
            updates.update(zip(group.names, steps.unbind(), strict=True))
            slots.update(zip(group.names, unstacked(new, len(d)), strict=True))
        return {name: updates[name] for name in grads}, OptState({name: slots[name] for name in grads}, shared)

    def _sums(self, theta: Theta, group: Group, params: Params) -> dict[str, Sum]:
        """Products of gradients and the step before, and squares, ``[k]``; those that somebody reads."""
        seen = {}
        if self.controller != "none":
            g, d = _flat(group.grad), _flat(self._direction(theta, group.slots, group))
            seen = {"dots": g * d, "grads": g.square(), "directions": d.square()}
        if self.direction != "adam" or self.decides:
            seen["params"] = _flat(stack([params[name] for name in group.names])).square()
        if self.decides:
            seen["momenta"] = _flat(group.slots["m"]).square()
        return {name: Sum(x.sum(1), tuple(range(len(group.shape)))) for name, x in seen.items()}

    def _advance(self, theta: Theta, group: Group, due: Tensor | bool, reduce: Reduce) -> Slots:
        """New slots, ``[k, ...]``."""
        grad, slots = group.grad, group.slots
        match self.path(group.shape):
            case "eigenbasis" | "diagonal" | "orthogonal" as path:
                m = ema(slots["m"], grad, theta["logit_momentum"])
                d = matrices(ema(m, grad, theta["logit_momentum"]))
                basis: Slots = {}  # calling Slots would break a compiled step
                if self._has_squares and "v" in slots:
                    d, basis = self.whitened(theta, d, matrices(grad), slots, due)
                if path == "orthogonal":
                    d = polar(d, self.iterations)
                d = torch.where(matrices(m) != 0, d, 0.0)  # an entry that never had a gradient rests
                if is_matrix(group.shape):
                    d = over_root(d, d.square().mean((-2, -1), keepdim=True))
                return {"m": m, "d": d.view_as(grad), **basis}
            case "normalized":
                m = ema(slots["m"], grad, theta["logit_momentum"])
                complete = partial(matrix_sums, group, reduce)
                row, col = row_column_scales(matrices(m), as_matrix(group.shape), complete)
                return {"m": m, "row": row, "col": col}
        m = ema(slots["m"], grad, theta["logit_beta1"])
        v = ema(slots["v"], grad.square(), theta["logit_beta2"])
        return {"m": m, "v": v, "count": slots["count"] + 1.0}

    def _direction(self, theta: Theta, slots: Slots, group: Group) -> Tensor:
        """Of slots ``[k, *shape]``; 0 before the first gradient."""
        match self.path(group.shape):
            case "eigenbasis" | "diagonal" | "orthogonal":
                return slots["d"]
            case "normalized":
                scaled = matrices(slots["m"]) * slots["row"].unsqueeze(-1) * slots["col"].unsqueeze(-2)
                return scaled.view_as(group.grad)
        count = slots["count"].view(-1, *[1] * (group.grad.ndim - 1)).clamp(min=1.0)
        m = slots["m"] / bias_correction(theta["logit_beta1"], count)
        return over_root(m, slots["v"] / bias_correction(theta["logit_beta2"], count))

    def is_due(self, run: Run) -> Tensor | bool:
        """Say whether bases follow in this step: 0-d where it is no bool. See `l2o.ops.eigenbasis.is_due`."""
        return self.direction == "eigenbasis" and is_due(run, self.period)

    def whitened(
        self, theta: Theta, momentum: Tensor, grad: Tensor, slots: Slots, due: Tensor | bool
    ) -> tuple[Tensor, Slots]:
        """Return `whiten` of ``grad`` and slots of tensors ``[k, *shape]``, with the constants of θ."""
        network = partial(weigh, theta) if self.network else None
        return whiten(momentum, grad, slots, decay(theta["logit_memory"]), due, network)

    def factors(self, theta: Theta, shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """Return those of the steps of tensors, ``[len(shapes)]``."""
        if self.direction == "adam":
            return torch.ones_like(theta["log_lr"]).expand(len(shapes))
        fans = of_shapes(lambda shape: math.log(_fan_in(shape) / _FAN_IN), shapes, theta["log_lr"])
        factors = torch.exp(theta["log_matrix"] - fans * theta["fan_in"])
        return torch.where(_are_matrices(shapes, theta["log_lr"]), factors, 1.0)

    def scales(self, theta: Theta, size: Tensor, squares: Tensor, shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """Return those of the directions of tensors, ``[len(shapes)]``.  squares: as many sums over parameters."""
        scales = size * self.factors(theta, shapes)
        if self.direction == "adam":
            return scales
        entries = of_shapes(lambda shape: float(max(math.prod(shape), 1)), shapes, squares)
        sizes = safe_sqrt(squares / entries)
        roots = of_shapes(lambda shape: _fan_in(shape) ** 0.5, shapes, squares)
        share = theta["log_relative"].exp() * (sizes * roots).clamp(max=1.0) ** self.by_gain
        limits = share * sizes + _LEAST_LIMIT * (_FAN_IN**0.5 / roots if self.by_gain else 1.0)
        limited = scales / (1.0 + (scales / limits).square()).sqrt()
        return torch.where(_are_matrices(shapes, size), limited, scales)

    def size(self, theta: Theta, shared: Slots, run: Run) -> Tensor:
        """Return that of the step of all tensors, 0-d."""
        step, total = (t.to(theta["log_lr"].dtype) for t in run[:2])
        schedule = linear_warmup(step, total * torch.sigmoid(theta["logit_warmup"]))
        if self.schedule == "decay":
            schedule = schedule * power_decay(step, total, theta["log_power"].exp(), _FLOOR)
        return schedule * (theta["log_lr"] + shared.get("log_step", 0.0)).exp()


def _are_matrices(shapes: Sequence[tuple[int, ...]], like: Tensor) -> Tensor:
    """Bool ``[len(shapes)]``."""
    return of_shapes(lambda shape: float(is_matrix(shape)), shapes, like) > 0.0


def _fan_in(shape: tuple[int, ...]) -> int:
    return max(as_matrix(shape)[1], 1)


def _flat(tensors: Tensor) -> Tensor:
    """``[k, entries]`` of ``[k, *shape]``."""
    return tensors.reshape(len(tensors), math.prod(tensors.shape[1:]))
