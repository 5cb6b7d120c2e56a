"""Momentum of which only the direction counts, under a schedule and a controller that needs no loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from l2o.checks import check_choice, check_float, check_int
from l2o.ops import directions
from l2o.ops.alignment import OF_HELD, init_alignment, init_controller
from l2o.ops.controller import init_decisions, init_seen, init_shown, own_factors, steer
from l2o.ops.directions import Age, Now, direction_of
from l2o.ops.eigenbasis import Whitening, due_at, is_due, whiten
from l2o.ops.entries import init_entries, weigh
from l2o.ops.groups import Group, by_shape, split, stack, unstacked, whole_sums
from l2o.ops.moments import nesterov
from l2o.ops.numeric import constant, log_of, logit_of, scalar_like, square_sums, unit
from l2o.ops.orthogonal import as_matrix, is_matrix, matrices, polar
from l2o.ops.scales import lengthened, limited, matrix_factors, tempered, unheld, width_factors
from l2o.ops.schedules import hastened, linear_warmup, power_decay
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
    Theta,
    UpdateRule,
    Updates,
)

Direction = Literal["eigenbasis", "diagonal", "orthogonal", "normalized", "adam"]
Controller = Literal["alignment", "mlp", "lstm", "none"]
Schedule = Literal["decay", "constant"]


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
    network: whether a perceptron weighs momentum and gradient (`l2o.ops.entries`): in the basis, or of entries, before
        they are orthogonalised.     reads_loss: whether the controller's network sees how the loss goes.
    tall: ratio of sides from which a matrix with one over ``widest`` moves as vectors do, for few rows have gradients.
    free_zeros: whether a matrix that begins as zeros has no limit: there is no size that it could be held to.
    wide: power by which factors fall with inputs above 64: a matrix' fan-in, the short side of one that is ``tall``.
    carried, cautious: whether second moments follow the basis, and momentum rests where the gradient contradicts it.
    by_signal: power of a whitened matrix' own size over 0.3, which its size is instead of one; limits are of one.
    schedule: ``decay``: linear warm-up over the share ``warmup`` of the run, times ``(1 - t / T) ** power``, which ends
        at 0.01; ``constant``: warm-up alone.    iterations: of Newton-Schulz.
    deep, own: see `l2o.ops.alignment`: `begin`, and the range of `control_each`; 0 for neither.
    period, early, pace: of looks at the basis, see `l2o.ops.eigenbasis.due_at`.
    lr: without a unit, as the parameters.    momentum: of matrices.    beta1, beta2: of Adam.    memory: of a basis.
    matrix, fan_in: the factor of matrices is ``matrix * (fan-in / 64) ** -fan_in``; all else has 1.
    relative: soft limit of a matrix' step: its root mean square is at most this share of the matrix' own, plus 3e-4.
    by_gain: power of the matrix' gain, its root mean square times the root of its fan-in, at most one, that is a factor
        of ``relative``: a sine network's is a twentieth. Unless it is 0, the 3e-4 are times ``(64 / fan-in) ** 0.5``.
    tables: leave the gain out for embeddings (`l2o.ops.groups.tables_of`), whose inputs are one entry, not all columns.
    rows: of `l2o.ops.scales.lengthened`, for these and the like; 0 for none.    haste: of `l2o.ops.schedules.hastened`.
    θ: those of ``log_lr, log_matrix, log_relative, logit_momentum, logit_beta1, logit_beta2, fan_in, logit_warmup,
    log_power, logit_memory`` that the parts need, and those of the controller, ``log_*``; all 0-d.
    Slots: ``m, d`` (direction) of an orthogonal matrix, ``d`` and those of `init_basis` in a basis, ``m, row, col``
        (scales) of a normalized one, else ``m, v, count``; ``free`` (began as 0); ``own``; shared: the controller's.
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
    early: int = 0
    pace: int = 0
    widest: int = 1024
    turned: int = 0
    by_gain: float = 0.0
    network: bool = False
    reads_loss: bool = False
    tall: int = 0
    tables: bool = False
    free_zeros: bool = False
    wide: float = 0.0
    carried: bool = False
    cautious: bool = False
    by_signal: float = 0.0
    deep: int = 0
    rows: float = 0.0
    haste: float = 0.0
    own: float = 0.0

    learned_init = False
    rests = True

    def __post_init__(self) -> None:
        for name, literal in {"direction": Direction, "controller": Controller, "schedule": Schedule}.items():
            check_choice(name, getattr(self, name), get_args(literal))
        for name in ("iterations", "period", "widest", "turned", "early", "pace", "tall", "deep"):
            check_int(name, getattr(self, name), int(name in ("iterations", "period", "widest")))
        for name in ("fan_in", "by_gain", "wide", "by_signal", "rows", "haste", "own"):
            check_float(name, getattr(self, name), 0.0 if name in ("rows", "haste", "own") else -math.inf)
        check_float("memory", self.memory, above=0.0, below=1.0)
        if self.network and (came := self.direction) in ("normalized", "adam"):
            raise ConfigurationError(f"network=True: expected direction=eigenbasis, diagonal or orthogonal, not {came}")
        if self.reads_loss and not self.decides:
            raise ConfigurationError(f"reads_loss=True: expected controller=mlp or lstm, not {self.controller}")
        if (self.deep or self.own) and self.controller == "none":
            raise ConfigurationError("deep, own: expected controller=alignment, mlp or lstm, not none")
        self.init_theta(torch.Generator())  # the transforms know what they take

    @property
    def decides(self) -> bool:
        """Whether a network has a part in the controller."""
        return self.controller in ("mlp", "lstm")

    @property
    def needs_loss(self) -> bool:
        return self.reads_loss

    @property
    def stride(self) -> float:
        return self.lr * math.exp(OF_HELD * self.own)  # as far as matrices may find that they have to go

    def init_theta(self, generator: torch.Generator) -> Theta:
        start = {f"log_{name}": log_of(name, getattr(self, name)) for name in ("lr", "matrix", "relative", "power")}
        squares = self.direction in ("eigenbasis", "diagonal") or self.network
        shares = ("momentum", "beta1", "beta2", "warmup", *(["memory"] if squares else []))
        start |= {f"logit_{name}": logit_of(name, getattr(self, name)) for name in shares} | {"fan_in": self.fan_in}
        unused = ["log_matrix", "log_relative", "logit_momentum", "fan_in"] if self.direction == "adam" else []
        unused += ["log_power"] if self.schedule == "constant" else []
        theta = {name: scalar_like(value, generator) for name, value in start.items() if name not in unused}
        theta |= init_controller(generator) if self.controller != "none" else {}
        theta |= {"log_own": scalar_like(math.log(self.own), generator)} if self.own else {}
        theta |= init_decisions(generator, self.controller, self.reads_loss) if self.decides else {}
        return theta | (init_entries(generator) if self.network else {})

    def init(self, theta: Theta, params: Params, infos: Infos) -> OptState:
        slots = {name: self._init_slots(p, infos[name]) for name, p in params.items()}
        shared = init_alignment(theta["log_lr"], self.deep > 0) if self.controller != "none" else {}
        return OptState(slots, shared | (init_shown(shared["slow"], self.reads_loss) if self.decides else {}))

    def _init_slots(self, param: Tensor, info: ParamInfo) -> Slots:
        own = directions.init_direction(self.path(info.shape), param, info.shape, self.network)
        own |= {"free": (param == 0).all().to(param.dtype)} if self.keeps_free(info) else {}
        own |= {"own": param.new_zeros(4)} if self.own else {}
        return own | init_seen(param, self.controller) if self.decides else own

    def keeps_free(self, info: ParamInfo) -> bool:
        """Return whether a tensor has a slot that says whether it began as zeros."""
        return self.free_zeros and self.needs_whole(info) and is_matrix(info.shape)

    def needs_whole(self, info: ParamInfo) -> bool:
        return self.path(info.shape) in ("eigenbasis", "diagonal", "orthogonal")

    def exact_slots(self, info: ParamInfo) -> frozenset[str]:
        # As axes turn, second moments of those with hardly a gradient would make what was rounded as long as any.
        return frozenset({"turned"} if self.path(info.shape) == "eigenbasis" else ())

    def path(self, shape: tuple[int, ...]) -> Direction:
        """Return the direction of a tensor."""
        if not is_matrix(shape):
            return "eigenbasis" if self.direction == "eigenbasis" and 1 < math.prod(shape) <= self.turned else "adam"
        wide = self.direction == "eigenbasis" and max(as_matrix(shape)) > self.widest
        return "adam" if self.form(shape) != shape else "orthogonal" if wide else self.direction

    def form(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a tensor is sized as."""
        short, long = sorted(as_matrix(shape))
        return (short * long,) if self.tall and long > self.widest and long >= self.tall * short else shape

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
        shapes, tables = zip(*((group.shape, group.table) for group in groups for _ in group.names), strict=True)
        counts = [len(group.names) for group in groups]
        times = directions.ages(groups, [theta[name] for name in ("logit_beta1", "logit_beta2")])
        sums = whole_sums(groups, self._sums(groups, times, params), reduce)
        factors = self.factors(theta, shapes)
        shared, decided = steer(theta, state.shared, groups, sums, factors, run, reduce, self.deep)
        sizes = self.size(theta, shared, run) * own_factors(decided)
        squares = unheld(sums["params"], [(g.slots, len(g.names)) for g in groups]) if "params" in sums else sizes
        scales = -self.scales(theta, sizes * factors, squares, shapes, tables)
        now = self.now(theta, run, reduce)
        slots: dict[str, Slots] = {}
        updates: Updates = {}
        for group, age, own in zip(groups, times, split({"scale": scales, **decided}, counts), strict=True):
            scale = own.pop("scale")
            new = self._advance(now, group, age) | own | {k: t for k, t in group.slots.items() if k == "free"}
            d = direction_of(new, group, age and age.after)
            updates.update(zip(group.names, (scale.view(-1, *[1] * (d.ndim - 1)) * d).unbind(), strict=True))
            slots.update(zip(group.names, unstacked(new, len(d)), strict=True))
        return {name: updates[name] for name in grads}, OptState({name: slots[name] for name in grads}, shared)

    def _sums(self, groups: Sequence[Group], times: Sequence[Age | None], params: Params) -> Slots:
        """Products of gradients and the step before, and squares, ``[tensors]``; those that somebody reads."""
        seen: Slots = {}
        if self.controller != "none":
            steps = (direction_of(g.slots, g, age and age.before) for g, age in zip(groups, times, strict=True))
            seen = directions.seen_of(groups, steps)
        if self.direction != "adam" or self.decides:
            seen["params"] = square_sums(stack([params[name] for name in group.names]) for group in groups)
        if self.decides:
            seen["momenta"] = square_sums(g.slots["turned" if "turned" in g.slots else "m"] for g in groups)
        return seen

    def _advance(self, now: Now, group: Group, age: Age | None) -> Slots:
        """New slots, ``[k, ...]``."""
        if age is not None:
            return directions.adam_moments(now, group, age)
        grad, slots, path = group.grad, group.slots, self.path(group.shape)
        if path == "normalized":
            return directions.normalized_moments(now, group)
        if now.whitening is not None and "v" in slots:
            d, new = whiten(now.whitening, matrices(grad), slots)
        else:
            m, ahead = nesterov(slots["m"], grad, now.decays["momentum"])
            d, new = matrices(ahead), {"m": m}
        d = polar(d, self.iterations) if path == "orthogonal" else d
        had_gradient = matrices(torch.logical_or(slots["d"], grad))  # other entries rest
        d = torch.where(had_gradient, d, constant(0.0, d))
        if is_matrix(grad.shape[1:]):
            sized = self.by_signal and path != "orthogonal"
            d = tempered(d, self.by_signal) if sized else unit(d, (-2, -1), math.prod(d.shape[-2:]) ** 0.5)
        return {**new, "d": d.view_as(grad)}

    def is_usual(self, called: int) -> bool:
        return self.direction != "eigenbasis" or not due_at(called, self.period, self.early, self.pace)

    def now(self, theta: Theta, run: Run, reduce: Reduce = LOCAL) -> Now:
        """Return what a step has for all groups."""
        decays, network = directions.decays_of(theta), partial(weigh, theta) if self.network else None
        if "memory" not in decays:
            return Now(theta, decays, None, reduce)
        due = self.direction == "eigenbasis" and is_due(run, self.period, self.early, self.pace)
        parts = (decays["momentum"], decays["memory"].keep, due, network, self.carried, self.cautious)
        return Now(theta, decays, Whitening(*parts), reduce)

    def factors(self, theta: Theta, shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """Return those of the steps of tensors, ``[len(shapes)]``."""
        if self.direction == "adam":
            return torch.ones_like(theta["log_lr"]).expand(len(shapes))
        forms = [self.form(shape) for shape in shapes]
        factors = matrix_factors(theta, forms)
        return factors * constant(width_factors(shapes, forms, self.wide), factors) if self.wide else factors

    def scales(
        self, theta: Theta, sizes: Tensor, squares: Tensor, shapes: Sequence[tuple[int, ...]], tables: Sequence[bool]
    ) -> Tensor:
        """Return those of the directions, ``[len(shapes)]``: ``sizes`` that are in bounds, of sums ``squares`` of the
        parameters, of as many, some of which are ``tables``."""
        if self.direction == "adam":
            return sizes
        forms, relative = [self.form(shape) for shape in shapes], theta["log_relative"].exp()
        held = limited(sizes, squares, forms, relative, self.by_gain, tables if self.tables else ())
        return lengthened(held, squares, shapes, forms, tables, self.rows) if self.rows else held

    def size(self, theta: Theta, shared: Slots, run: Run) -> Tensor:
        """Return that of the step of all tensors, 0-d."""
        step, total = (t.to(theta["log_lr"].dtype) for t in run[:2])
        schedule = hastened(linear_warmup(step, total * torch.sigmoid(theta["logit_warmup"])), total, self.haste)
        decay = power_decay(step, total, theta["log_power"].exp()) if self.schedule == "decay" else 1.0
        return schedule * decay * (theta["log_lr"] + shared.get("log_step", 0.0) + shared.get("missing", 0.0)).exp()
