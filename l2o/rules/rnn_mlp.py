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
from typing import NamedTuple

import torch
from torch import Tensor

from l2o.checks import check_each, check_float, check_int
from l2o.kernels.coordinatewise import Tensors, completed_means, completed_sums, network
from l2o.kernels.moments import advance_moments
from l2o.ops.coordinatewise import Product, Recipe
from l2o.ops.features import TIMESCALES, clip_log, sine_embedding, spreads, square_sums, tensor_means
from l2o.ops.kinds import size
from l2o.ops.moments import init_momenta
from l2o.ops.networks import init_linear, init_mlp, linear, with_shared
from l2o.ops.numeric import constant, safe_sqrt
from l2o.ops.recurrent import init_tensor_lstm, lstm_slots, tensor_lstm
from l2o.ops.statistics import Decays
from l2o.types import LOCAL, Grads, Infos, OptState, ParamInfo, Params, Reduce, Run, Slots, Theta, UpdateRule, Updates

_LOSS_DECAY = 0.9
_CLIP_DECAY = 0.99
_CLIP_MULT = 10.0
"""A gradient is clipped at this multiple of the average root mean square."""
_TENSOR_FEATURES = 18
"""What the LSTM sees of a tensor, besides what it is sent."""
_AXES = 4
"""As many axes have their length in those features."""
_GROUPS = ("grad", "param", "log_param", "m", "v", "m_over_rms", "inv_rms")
"""What the MLP sees of each element (`l2o.ops.statistics`)."""


@dataclass(frozen=True)
class RNNMLP(UpdateRule):
    """``update = -step_mult * o0 * exp(exp_mult * o1)``; the means of the MLP's other outputs go to the LSTM.

    The LSTM sees statistics of each tensor, the loss, and what MLP and LSTM sent in the last update. It would see
    validation losses too, which nobody has here: it gets the value of none.

    hidden: units of the MLP's hidden layers.          lstm_hidden: of the LSTM.
    from_mlp, from_lstm, to_mlp: sizes of what goes from the MLP to the LSTM, from the LSTM (a mean over the tensors) to
        itself, and from the LSTM to the MLP.
    decays: of momenta and second moments.          step_mult, exp_mult: of the two outputs.
    θ: ``w0, b0, ...`` of the MLP; ``lstm_w, lstm_b, lstm_h, lstm_c`` (`l2o.ops.recurrent`); ``w_mlp, b_mlp`` and
    ``w_lstm, b_lstm``, from the LSTM to the MLP and to itself; ``from_mlp, from_lstm``, what is sent at first.
    Slots: ``m, v [decays, *shape]``; ``h, c``; ``from_mlp``. Shared: ``from_lstm``; averages
    ``loss_mean, loss_variance`` and ``grad_rms``, 0-d.
    """

    needs_loss = True

    hidden: tuple[int, ...] = (32, 32)
    lstm_hidden: int = 64
    from_mlp: int = 16
    from_lstm: int = 18
    to_mlp: int = 17
    decays: tuple[float, ...] = (0.5, 0.9, 0.99, 0.999, 0.9999)
    step_mult: float = 0.001
    exp_mult: float = 0.001

    def __post_init__(self) -> None:
        check_each("hidden", self.hidden, check_int)
        for name in ("lstm_hidden", "from_mlp", "from_lstm", "to_mlp"):
            check_int(name, getattr(self, name))
        check_each("decays", self.decays, partial(check_float, least=0.0, below=1.0))
        check_float("step_mult", self.step_mult, above=0.0)
        check_float("exp_mult", self.exp_mult, least=0.0)

    def init_theta(self, generator: torch.Generator) -> Theta:
        entry = 3 + 4 * len(self.decays) + len(TIMESCALES) + 3 + self.to_mlp
        theta = init_mlp(generator, [entry, *self.hidden, 2 + self.from_mlp])
        theta |= init_tensor_lstm(generator, _TENSOR_FEATURES + self.from_lstm + self.from_mlp, self.lstm_hidden)
        theta["w_mlp"], theta["b_mlp"] = init_linear(generator, self.lstm_hidden, self.to_mlp)
        theta["w_lstm"], theta["b_lstm"] = init_linear(generator, self.lstm_hidden, self.from_lstm)
        for name in ("from_mlp", "from_lstm"):  # of the deviation 1 / sqrt(size), as a column of weights
            theta[name] = init_linear(generator, getattr(self, name), 1)[0].squeeze(1)
        return theta

    def init(self, theta: Theta, params: Params, infos: Infos) -> OptState:
        per_param = {
            name: {
                "m": init_momenta(p, len(self.decays)),
                "v": init_momenta(p, len(self.decays)),
                "from_mlp": theta["from_mlp"].clone(),
                **lstm_slots(theta),
            }
            for name, p in params.items()
        }
        zero = theta["from_lstm"].new_zeros(())
        averages = {"loss_mean": zero, "loss_variance": zero.clone(), "grad_rms": zero + (1.0 - _CLIP_DECAY)}
        return OptState(per_param, {"from_lstm": theta["from_lstm"].clone(), **averages})

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
        averages, loss = _normalised_loss(state.shared, run)
        averages["grad_rms"], grads = _clipped(state.shared["grad_rms"], grads, infos, run, reduce)
        constants = constant(self.decays, averages["grad_rms"])
        moments = advance_moments(state.per_param, grads, Decays(constants, constants, constants[:0]))
        slots = {name: {**state.per_param[name], **own} for name, own in moments.items()}
        seen = _means(grads, params, slots, infos, reduce)
        sent = state.shared["from_lstm"]
        x = [torch.cat([sent, slots[name]["from_mlp"], own.features(loss, infos[name])]) for name, own in seen.items()]
        h, cells = tensor_lstm(theta, torch.stack(x, -1), slots)
        count = reduce.tensors({name: sent.new_ones(()) for name in grads})
        from_lstm = linear(h, theta["w_lstm"], theta["b_lstm"]).unbind(-1)
        shared = {"from_lstm": reduce.tensors(dict(zip(grads, from_lstm, strict=True))) / count, **averages}
        to_mlp = linear(h, theta["w_mlp"], theta["b_mlp"]).unbind(-1)
        given = {
            name: torch.cat([_run_features(seen[name].param_norm, infos[name], run, count), own])
            for name, own in zip(grads, to_mlp, strict=True)
        }
        recipe, tensors = Recipe(_GROUPS, Product(self.exp_mult)), Tensors(grads, params, slots, infos)
        sums = completed_sums(recipe, tensors, reduce)
        weights = with_shared(theta, 3 + 4 * len(self.decays), torch.stack(list(given.values())))
        gains = constant([-self.step_mult] * len(grads), sent)
        updates, totals = network(recipe, weights, tensors, sums, gains)
        said = completed_means(totals, infos, grads, reduce)[:, 2:].unbind()
        new = {name: slots[name] | cells[name] | {"from_mlp": own} for name, own in zip(grads, said, strict=True)}
        return updates, OptState(new, shared)


def _normalised_loss(shared: Slots, run: Run) -> tuple[Slots, list[Tensor]]:
    """The averages with the loss in them; loss, and 0 for the validation loss, over the averages' deviation."""
    loss = run.loss
    assert loss is not None  # needs_loss
    mean = _LOSS_DECAY * shared["loss_mean"] + (1.0 - _LOSS_DECAY) * loss
    variance = _LOSS_DECAY * shared["loss_variance"] + (1.0 - _LOSS_DECAY) * (mean - loss).square()
    correction = 1.0 / (1.0 - _LOSS_DECAY ** (run.step.to(loss.dtype) + 1.0) + 1e-8)
    scale = torch.rsqrt(variance * correction + 1e-8)
    features = [((x - mean * correction) * scale).clamp(-5.0, 5.0) for x in (loss, torch.zeros_like(loss))]
    return {"loss_mean": mean, "loss_variance": variance}, features


def _clipped(grad_rms: Tensor, grads: Grads, infos: Infos, run: Run, reduce: Reduce) -> tuple[Tensor, Grads]:
    """The average with the gradients in it, and they, clipped by what was seen before them."""
    limit = _CLIP_MULT * grad_rms / (1.0 - _CLIP_DECAY ** (run.step.to(grad_rms.dtype) + 1.0))
    grads = {name: torch.clamp(g, -limit, limit) for name, g in grads.items()}
    sums = reduce.shards({name: {"g": square_sums(g.unsqueeze(0))} for name, g in grads.items()})
    means = {name: own["g"] / size(infos[name]) for name, own in sums.items()}
    squares = reduce.tensors({name: torch.cat([own, torch.ones_like(own)]) for name, own in means.items()})
    return _CLIP_DECAY * grad_rms + (1.0 - _CLIP_DECAY) * torch.sqrt(1e-8 + squares[0] / squares[1]), grads


class _Means(NamedTuple):
    """Of one tensor, ``[1]`` each.  means, variances: of momenta and second moments, over the decays too, parameter."""

    grad_norm: Tensor
    param_norm: Tensor
    means: list[Tensor]
    variances: list[Tensor]

    def features(self, loss: list[Tensor], info: ParamInfo) -> Tensor:
        """Return the ``[18]`` inputs of the tensor's network."""
        signed = [feature for mean in self.means for feature in (clip_log(mean), torch.sign(mean))]
        lengths = [math.log(max(length, 1)) - 1.0 for length in [*info.shape, *[1] * _AXES][:_AXES]]
        is_scalar = [-1.0 if info.shape else 1.0]
        return torch.cat(
            [
                clip_log(self.grad_norm),
                constant(is_scalar, self.grad_norm),
                *signed,
                clip_log(self.param_norm),
                constant(lengths, self.grad_norm),
                *(x.unsqueeze(0) for x in loss),
                *(clip_log(variance) for variance in self.variances),
            ]
        )


def _means(grads: Grads, params: Params, slots: Mapping[str, Slots], infos: Infos, reduce: Reduce) -> dict[str, _Means]:
    seen = {name: {"m": slots[name]["m"], "v": slots[name]["v"], "p": p.unsqueeze(0)} for name, p in params.items()}
    first = tensor_means(seen, infos, reduce)
    means = {name: {key: x.mean(0, keepdim=True) for key, x in own.items()} for name, own in first.items()}
    second = spreads(seen, means, infos, reduce)
    squares = reduce.shards(
        {
            name: {"grad": square_sums(grads[name].unsqueeze(0)), "param": square_sums(p.unsqueeze(0))}
            for name, p in params.items()
        }
    )
    found = {}
    for name, own in means.items():
        norms = {key: safe_sqrt(x) for key, x in squares[name].items()}
        variances = [second[name][key].mean(0, keepdim=True) for key in own]
        found[name] = _Means(norms["grad"], norms["param"], list(own.values()), variances)
    return found


def _run_features(param_norm: Tensor, info: ParamInfo, run: Run, tensors: Tensor) -> Tensor:
    """``[14]``: age of the run, number of tensors, norm and number of entries of this one."""
    count, entries = torch.log(tensors).unsqueeze(0) - 1.0, constant([math.log(size(info))], param_norm)
    return torch.cat([sine_embedding(run, param_norm), count, torch.log(param_norm + 1e-8), entries])
