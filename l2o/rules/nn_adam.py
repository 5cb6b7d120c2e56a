"""NNAdam: an LSTM over the tensors moves each tensor's hyperparameters of Adam.

google/learned_optimization, learned_optimizers/nn_adam.py; cf. Metz et al. 2020 (arXiv 2009.11243), whose LSTM sees the
same kind of statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from l2o.checks import check_float, check_int
from l2o.ops.features import clip_log, spreads, tensor_means
from l2o.ops.networks import linear
from l2o.ops.numeric import scalar_like
from l2o.ops.recurrent import init_tensor_lstm, lstm_slots, tensor_lstm
from l2o.types import LOCAL, Grads, Infos, OptState, ParamInfo, Params, Reduce, Run, Slots, Theta, UpdateRule, Updates

_CLIP = 1000.0
"""Of the gradient, on both sides."""
_INPUTS = 19
"""Of the network over tensors: `_features`."""


def _positive(low: float, high: float) -> Callable[[Tensor], Tensor]:
    return lambda raw: torch.exp(10.0 * raw).clamp(low, high)


def _decay(raw: Tensor) -> Tensor:
    return 1.0 - torch.exp((10.0 * raw).clamp(-10.0, 0.0))


_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "raw_lr": _positive(1e-8, 1e3),
    "raw_beta1": _decay,
    "raw_beta2": _decay,
    "raw_eps": _positive(1e-11, 1e4),
}
"""Each hyperparameter as a function of its raw number, in the order of the network's outputs."""


@dataclass(frozen=True)
class NNAdam(UpdateRule):
    """``update = -lr (1 + eps) m / (eps + sqrt(v + 1e-10))``: Adam for small eps, momentum for large, at the same lr.

    Each tensor has raw numbers that lr, beta1, beta2 and eps are functions of. After each update an LSTM, which sees
    them and the means and variances of gradient, momentum, second moment and parameter, adds to them.

    hidden: units of the LSTM.            output_scale: factor on what is added.
    decay_strength: the share of the way back to θ's own raw numbers that follows.
    lr, beta1, beta2, eps: where θ's raw numbers start.
    θ: ``raw_lr, raw_beta1, raw_beta2, raw_eps``, 0-d; ``lstm_w, lstm_b, lstm_h, lstm_c`` (`l2o.ops.recurrent`);
    ``w_out, b_out``, at first 0.
    Slots: ``m, v``; ``h, c``; the raw numbers of the next update, 0-d.
    """

    hidden: int = 32
    output_scale: float = 0.01
    decay_strength: float = 0.0
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    rests = True

    def __post_init__(self) -> None:
        check_int("hidden", self.hidden)
        check_float("output_scale", self.output_scale, above=0.0)
        check_float("decay_strength", self.decay_strength, least=0.0, below=1.0)
        check_float("lr", self.lr, above=0.0)
        check_float("eps", self.eps, above=0.0)
        check_float("beta1", self.beta1, least=0.0, below=1.0)
        check_float("beta2", self.beta2, least=0.0, below=1.0)

    def init_theta(self, generator: torch.Generator) -> Theta:
        starts = {"lr": self.lr, "beta1": 1.0 - self.beta1, "beta2": 1.0 - self.beta2, "eps": self.eps}
        theta = {f"raw_{name}": scalar_like(0.1 * math.log(value), generator) for name, value in starts.items()}
        theta |= init_tensor_lstm(generator, _INPUTS, self.hidden)
        shapes = {"w_out": (self.hidden, len(_VALUES)), "b_out": (len(_VALUES),)}
        return theta | {
            name: torch.zeros(shape, dtype=torch.float32, device=generator.device) for name, shape in shapes.items()
        }

    def init(self, theta: Theta, params: Params, infos: Infos) -> OptState:
        raw = {name: theta[name].clone() for name in _VALUES}
        return OptState(
            {
                name: {"m": torch.zeros_like(p), "v": torch.zeros_like(p), **raw, **lstm_slots(theta)}
                for name, p in params.items()
            },
            {},
        )

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
        clipped = {name: g.clamp(-_CLIP, _CLIP) for name, g in grads.items()}
        slots, updates = {}, {}
        for name, g in clipped.items():
            slots[name], updates[name] = _step(state.per_param[name], g)
        seen = _features(clipped, params, slots, infos, reduce)
        h, cells = tensor_lstm(theta, torch.stack(list(seen.values()), -1), slots)
        deltas = (self.output_scale * linear(h, theta["w_out"], theta["b_out"])).unbind(-1)
        raws = {name: self._moved(theta, slots[name], delta) for name, delta in zip(slots, deltas, strict=True)}
        return updates, OptState({name: {**slots[name], **raws[name], **cells[name]} for name in slots}, {})

    def _moved(self, theta: Theta, slots: Slots, delta: Tensor) -> Slots:
        """The raw numbers plus ``delta [4]``, within the ranges of the values."""
        new = {}
        for name, add in zip(_VALUES, delta, strict=True):
            raw = slots[name] + add
            raw = raw - self.decay_strength * (raw - theta[name])
            value = _VALUES[name](raw)
            new[name] = 0.1 * torch.log(1.0 - value if "beta" in name else value)
        return new


def _step(slots: Slots, grad: Tensor) -> tuple[Slots, Tensor]:
    """Momentum and second moment with the current decays, and the update.  grad: clipped."""
    lr, beta1, beta2, eps = (value(slots[name]) for name, value in _VALUES.items())
    m = torch.lerp(grad, slots["m"], beta1)
    v = torch.lerp(grad.square(), slots["v"], beta2)
    return {**slots, "m": m, "v": v}, -lr * (1.0 + eps) / (eps + torch.sqrt(v + 1e-10)) * m


def _features(
    grads: Grads, params: Params, slots: Mapping[str, Slots], infos: Infos, reduce: Reduce
) -> dict[str, Tensor]:
    """``[19]``, of each tensor.  grads: clipped."""
    seen = {
        name: {"x": torch.stack([g, slots[name]["m"], params[name], slots[name]["v"]])} for name, g in grads.items()
    }
    sizes = {name: {**own, "size": own["x"][:1].abs()} for name, own in seen.items()}
    means = tensor_means(sizes, infos, reduce)
    variances = spreads({name: {"x": own["x"]} for name, own in seen.items()}, means, infos, reduce)
    return {
        name: _of_tensor(slots[name], own["x"], variances[name]["x"], own["size"], infos[name])
        for name, own in means.items()
    }


def _of_tensor(slots: Slots, means: Tensor, variances: Tensor, mean_abs: Tensor, info: ParamInfo) -> Tensor:
    """``[19]``.  means, variances: ``[4]``, of gradient, momentum, parameter, second moment.  mean_abs: ``[1]``."""
    magnitude, sign = 0.5 * clip_log(means), torch.sign(means)
    raw = {name: 0.2 * slots[name].clamp(-5.0, 5.0) for name in _VALUES}
    is_bias, is_scalar = (means.new_full((), 1.0 if len(info.shape) == ndim else -1.0) for ndim in (1, 0))
    head = [raw["raw_beta1"], raw["raw_beta2"], raw["raw_eps"], is_bias, is_scalar, raw["raw_lr"]]
    pairs = torch.stack([magnitude, sign], -1)
    return torch.cat(
        [torch.stack(head), pairs[0], 0.5 * clip_log(mean_abs), pairs[1:].flatten(), 0.5 * clip_log(variances)]
    )
