"""An LSTM over the tensors conditions a per-parameter MLP, and hears back from it.

Metz et al. 2020, "Tasks, stability, architecture, and compute: Training more effective learned optimizers, and using
them to train themselves" (arXiv 2009.11243, section 3 and app. A); RNNMLPLOpt of google/learned_optimization,
learned_optimizers/rnn_mlp_lopt.py, from which the constants are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from l2o._checks import each, real, whole
from l2o.ops.features import TIMESCALES, clip_log, normalised, sine_embedding, square_sums
from l2o.ops.moments import init_momenta, momenta
from l2o.ops.networks import init_linear, init_mlp, linear, mlp, over_entries
from l2o.ops.numeric import channel_means, safe_sqrt
from l2o.ops.recurrent import init_tensor_lstm, lstm_slots, tensor_lstm
from l2o.types import Clock, Grads, Kind, OptState, Params, Slots, Stats, Theta, UpdateRule, Updates

_LOSS_DECAY = 0.9
_CLIP_DECAY = 0.99
_CLIP_MULT = 10.0
"""A gradient is clipped at this multiple of the average root mean square."""
_TENSOR_FEATURES = 18
"""What the LSTM sees of a tensor, besides what it is sent."""
_AXES = 4
"""As many axes have their length in those features."""


@dataclass(frozen=True)
class RNNMLP(UpdateRule):
    """``update = -step_mult * o0 * exp(exp_mult * o1)``; the means of the MLP's other outputs go to the LSTM.

    The LSTM sees statistics of each tensor, the loss, and what MLP and LSTM sent in the last update. It would see
    validation losses too, which nobody has here: it gets the value of none.

    The MLP runs in the first pass, because what it sends is part of the state; the update is a slot therefore.

    hidden: units of the MLP's hidden layers.          lstm_hidden: of the LSTM.
    from_mlp, from_lstm, to_mlp: sizes of what goes from the MLP to the LSTM, from the LSTM (a mean over the tensors) to
        itself, and from the LSTM to the MLP.
    decays: of momenta and second moments.          step_mult, exp_mult: of the two outputs.
    θ: ``w0, b0, ...`` of the MLP; ``lstm_w, lstm_b, lstm_h, lstm_c`` (`l2o.ops.recurrent`); ``w_mlp, b_mlp`` and
    ``w_lstm, b_lstm``, from the LSTM to the MLP and to itself; ``from_mlp, from_lstm``, what is sent at first.
    Slots: ``m, v [decays, *shape]``; ``h, c``; ``from_mlp``; ``update [*shape]``. Shared: ``from_lstm``; averages
    ``loss_mean, loss_variance`` and ``grad_rms``, 0-d.
    """

    needs_loss: ClassVar[bool] = True

    hidden: tuple[int, ...] = (32, 32)
    lstm_hidden: int = 64
    from_mlp: int = 16
    from_lstm: int = 18
    to_mlp: int = 17
    decays: tuple[float, ...] = (0.5, 0.9, 0.99, 0.999, 0.9999)
    step_mult: float = 0.001
    exp_mult: float = 0.001

    def __post_init__(self) -> None:
        each("hidden", self.hidden, whole)
        for name in ("lstm_hidden", "from_mlp", "from_lstm", "to_mlp"):
            whole(name, getattr(self, name))
        each("decays", self.decays, partial(real, least=0.0, below=1.0))
        real("step_mult", self.step_mult, above=0.0)
        real("exp_mult", self.exp_mult, least=0.0)

    def init_theta(self, generator: torch.Generator) -> Theta:
        entry = 3 + 4 * len(self.decays) + len(TIMESCALES) + 3 + self.to_mlp
        theta = init_mlp(generator, [entry, *self.hidden, 2 + self.from_mlp])
        theta |= init_tensor_lstm(generator, _TENSOR_FEATURES + self.from_lstm + self.from_mlp, self.lstm_hidden)
        theta["w_mlp"], theta["b_mlp"] = init_linear(generator, self.lstm_hidden, self.to_mlp)
        theta["w_lstm"], theta["b_lstm"] = init_linear(generator, self.lstm_hidden, self.from_lstm)
        for name in ("from_mlp", "from_lstm"):  # of the deviation 1 / sqrt(size), as a column of weights
            theta[name] = init_linear(generator, getattr(self, name), 1)[0].squeeze(1)
        return theta

    def init(self, theta: Theta, params: Params, kinds: Mapping[str, Kind]) -> OptState:
        per_param = {
            name: {
                "m": init_momenta(p, self.decays),
                "v": init_momenta(p, self.decays),
                "from_mlp": theta["from_mlp"].clone(),
                "update": torch.zeros_like(p),
                **lstm_slots(theta),
            }
            for name, p in params.items()
        }
        zero = theta["from_lstm"].new_zeros(())
        averages = {"loss_mean": zero, "loss_variance": zero.clone(), "grad_rms": zero + (1.0 - _CLIP_DECAY)}
        return OptState(per_param, {"from_lstm": theta["from_lstm"].clone(), **averages})

    def accumulate(
        self, theta: Theta, grads: Grads, state: OptState, params: Params, clock: Clock, loss: Tensor | None
    ) -> tuple[OptState, Stats]:
        assert loss is not None  # needs_loss
        averages, loss_features = _normalised_loss(state.shared, loss, clock)
        averages["grad_rms"], grads = _clipped(state.shared["grad_rms"], grads, clock)
        slots = {name: self._moments(state.per_param[name], g) for name, g in grads.items()}
        h, cells = self._advance(theta, grads, OptState(slots, state.shared), params, loss_features)
        from_lstm = linear(h, theta["w_lstm"], theta["b_lstm"]).mean(-1)
        to_mlp = linear(h, theta["w_mlp"], theta["b_mlp"]).unbind(-1)
        inputs = {}
        for (name, g), given in zip(grads.items(), to_mlp, strict=True):
            same = torch.cat([_run_features(params[name], clock, len(grads)), given])
            inputs[name] = (_entry_features(g, params[name], slots[name], same),)
        outputs = over_entries(lambda x: (mlp(theta, x),), inputs)
        new = {name: slots[name] | cells[name] | self._results(outputs[name][0], g.shape) for name, g in grads.items()}
        return OptState(new, {"from_lstm": from_lstm, **averages}), {}

    def _advance(
        self, theta: Theta, grads: Grads, state: OptState, params: Params, loss_features: list[Tensor]
    ) -> tuple[Tensor, dict[str, Slots]]:
        """The LSTM's output and its new state; see `tensor_lstm`."""
        sent = state.shared["from_lstm"]
        seen = []
        for name, g in grads.items():
            slots = state.per_param[name]
            seen.append(torch.cat([sent, slots["from_mlp"], _tensor_features(g, params[name], slots, loss_features)]))
        return tensor_lstm(theta, torch.stack(seen, -1), state.per_param)

    def apply(self, theta: Theta, state: OptState, stats: Stats, grads: Grads, params: Params, clock: Clock) -> Updates:
        return {name: state.per_param[name]["update"] for name in grads}

    def _moments(self, slots: Slots, grad: Tensor) -> Slots:
        m, v = momenta(slots["m"], grad, self.decays), momenta(slots["v"], grad.square(), self.decays)
        return {**slots, "m": m, "v": v}

    def _results(self, outputs: Tensor, shape: torch.Size) -> Slots:
        """outputs: ``[2 + from_mlp, entries]``."""
        step = outputs[0] * (outputs[1] * self.exp_mult).exp() * -self.step_mult
        return {"update": step.reshape(shape), "from_mlp": channel_means(outputs[2:])}


def _normalised_loss(shared: Slots, loss: Tensor, clock: Clock) -> tuple[Slots, list[Tensor]]:
    """The averages with ``loss`` in them; ``loss``, and 0 for the validation loss, over the averages' deviation."""
    mean = _LOSS_DECAY * shared["loss_mean"] + (1.0 - _LOSS_DECAY) * loss
    variance = _LOSS_DECAY * shared["loss_variance"] + (1.0 - _LOSS_DECAY) * (mean - loss).square()
    correction = 1.0 / (1.0 - _LOSS_DECAY ** (clock.step.to(loss.dtype) + 1.0) + 1e-8)
    scale = torch.rsqrt(variance * correction + 1e-8)
    features = [((x - mean * correction) * scale).clamp(-5.0, 5.0) for x in (loss, torch.zeros_like(loss))]
    return {"loss_mean": mean, "loss_variance": variance}, features


def _clipped(grad_rms: Tensor, grads: Grads, clock: Clock) -> tuple[Tensor, Grads]:
    """The gradients, clipped by what was seen before them, and the average with them in it."""
    limit = _CLIP_MULT * grad_rms / (1.0 - _CLIP_DECAY ** (clock.step.to(grad_rms.dtype) + 1.0))
    grads = {name: torch.minimum(torch.maximum(g, -limit), limit) for name, g in grads.items()}
    squares = torch.stack([channel_means(g.square().unsqueeze(0)) for g in grads.values()]).mean()
    return _CLIP_DECAY * grad_rms + (1.0 - _CLIP_DECAY) * torch.sqrt(1e-8 + squares), grads


def _tensor_features(grad: Tensor, param: Tensor, slots: Slots, loss: list[Tensor]) -> Tensor:
    """``[18]``."""
    tensors = (slots["m"], slots["v"], param)
    means = [channel_means(x.unsqueeze(0)) for x in tensors]  # over the decays too
    variances = [channel_means((x - mean).square().unsqueeze(0)) for x, mean in zip(tensors, means, strict=True)]
    mean_features = [feature for mean in means for feature in (clip_log(mean), torch.sign(mean))]
    lengths = [*param.shape, *[1] * _AXES][:_AXES]
    return torch.cat(
        [
            clip_log(_norm(grad)),
            grad.new_full((1,), 1.0 if grad.ndim == 0 else -1.0),
            *mean_features,
            clip_log(_norm(param)),
            *(grad.new_full((1,), math.log(max(length, 1)) - 1.0) for length in lengths),
            *(x.unsqueeze(0) for x in loss),
            *(clip_log(variance) for variance in variances),
        ]
    )


def _run_features(param: Tensor, clock: Clock, tensors: int) -> Tensor:
    """``[14]``: age of the run, number of tensors, norm and number of entries of this one."""
    counts = [param.new_full((1,), math.log(tensors) - 1.0), param.new_full((1,), math.log(max(param.numel(), 1)))]
    return torch.cat([sine_embedding(clock, param), counts[0], torch.log(_norm(param) + 1e-8), counts[1]])


def _entry_features(grad: Tensor, param: Tensor, slots: Slots, given: Tensor) -> Tensor:
    """``[3 + 4 decays + len(given), entries]``; ``given [k]`` is the same for all entries, and not normalised."""
    m, v = slots["m"], slots["v"]
    inv_rms = torch.rsqrt(v + 1e-6)
    plain = torch.stack([grad, param, torch.log(param.abs() + 1e-8)])
    own = torch.cat([plain, m, v, m * inv_rms, inv_rms])
    own = normalised(own, square_sums(own))
    return torch.cat([own, given.unsqueeze(-1).expand(-1, own.shape[-1])])


def _norm(x: Tensor) -> Tensor:
    return safe_sqrt(x.square().sum()).unsqueeze(0)
