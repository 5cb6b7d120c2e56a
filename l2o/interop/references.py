"""Public learned optimizers: the rule of ours that each is, and where its meta-parameters go.

A new entry of `REFERENCES` is enough for the converter and for replays of recorded runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor

from l2o.interop.reference import Reference, hidden_sizes, take, take_layers, take_lstm
from l2o.interop.scheduled import SCHEDULED
from l2o.rules import MLP, RNNMLP, SGD, AdafacMLP, Adam, Momentum, NNAdam
from l2o.types import Theta


def _logit_of_one_minus(log_one_minus: Tensor) -> Tensor:
    """The reference has ``log(1 - beta)`` where l2o has the logit of beta, of the float32 that the former gives."""
    beta = (1.0 - log_one_minus.exp()).double()
    return (beta / (1.0 - beta)).log().to(log_one_minus.dtype)


def _hand_designed(names: Mapping[str, str]) -> Callable[[Theta], Theta]:
    def convert(rest: Theta) -> Theta:
        found = take(rest, names)
        return {name: _logit_of_one_minus(t) if name.startswith("logit") else t for name, t in found.items()}

    return convert


def _adafac_mlp(rest: Theta) -> Theta:
    decays = take(rest, {name: name for name in ("momentum_decays", "rms_decays", "adafactor_decays")})
    groups = list(takewhile(lambda path: path in rest, (f"nn/~/w0__{j}" for j in count())))
    if groups:  # the first layer's matrix, cut into one for each group of inputs
        rest["nn/~/w0"] = torch.cat([rest.pop(path) for path in groups])
    return take_layers(rest, "nn/~/w{}", "nn/~/b{}") | decays


def _nn_adam(rest: Theta) -> Theta:
    raw = {"raw_lr": "lr", "raw_beta1": "beta1", "raw_beta2": "beta2", "raw_eps": "epsilon"}
    out = {f"{kind}_out": f"rnn_to_controls_params/rnn_to_controls/{kind}" for kind in "wb"}
    names = {ours: f"per_layer_{theirs}" for ours, theirs in raw.items()}
    return take_lstm(rest) | take(rest, names | out)


def _rnn_mlp(rest: Theta) -> Theta:
    sent = {"from_mlp": "initial_from_mlp", "from_lstm": "initial_from_lstm"}
    linears = {"mlp": "rnn_to_ff_params/rnn_to_ff", "lstm": "rnn_to_in_params/rnn_to_in"}
    out = {f"{kind}_{ours}": f"{path}/{kind}" for ours, path in linears.items() for kind in "wb"}
    layers = take_layers(rest, "ffmod_params/mlp/~/linear_{}/w", "ffmod_params/mlp/~/linear_{}/b")
    return layers | take_lstm(rest) | take(rest, sent | out)


def _rnn_mlp_sizes(theta: Theta) -> dict[str, Any]:
    sent = {"from_mlp": "from_mlp", "from_lstm": "from_lstm", "to_mlp": "b_mlp", "lstm_hidden": "lstm_h"}
    return hidden_sizes(theta) | {name: len(theta[tensor]) for name, tensor in sent.items()}


REFERENCES: dict[str, Reference] = {
    "LearnableSGD": Reference(SGD, _hand_designed({"log_lr": "log_lr"}), {"initial_lr": "lr"}),
    "LearnableSGDM": Reference(
        Momentum,
        _hand_designed({"log_lr": "log_lr", "logit_momentum": "one_minus_momentum"}),
        {"initial_lr": "lr", "initial_momentum": "momentum"},
    ),
    "LearnableAdam": Reference(
        Adam,
        _hand_designed(
            {
                "log_lr": "log_lr",
                "logit_beta1": "one_minus_beta1",
                "logit_beta2": "one_minus_beta2",
                "log_eps": "log_epsilon",
            }
        ),
        {
            "initial_lr": "lr",
            "initial_beta1": "beta1",
            "initial_beta2": "beta2",
            "initial_epsilon": "eps",
            "epsilon_root_fixed": "eps_root",
        },
        fixed={"eps_root": 1e-8},
        implied=("use_summary",),
    ),
    "MLPLOpt": Reference(
        MLP,
        lambda rest: take_layers(rest, "mlp/~/linear_{}/w", "mlp/~/linear_{}/b"),
        {"exp_mult": "exp_mult", "step_mult": "step_mult", "decays": "decays"},
        sizes=hidden_sizes,
        fixed={"time": "steps", "step_mult": 0.001, "exp_mult": 0.001},
        implied=("hidden_size", "hidden_layers", "compute_summary"),
    ),
    "AdafacMLPLOpt": Reference(
        AdafacMLP,
        _adafac_mlp,
        {
            "exp_mult": "exp_mult",
            "step_mult": "step_mult",
            "initial_momentum_decays": "momentum_decays",
            "initial_rms_decays": "rms_decay",
            "initial_adafactor_decays": "adafactor_decays",
            "mup": "mup",  # of µLO, whose tensors are the same (bentherien/mu_learned_optimization)
        },
        sizes=hidden_sizes,
        implied=("hidden_size", "hidden_layers", "concat_weights"),
        only={"make_separate_weights": False, "split_weights": False},
    ),
    "NNAdam": Reference(
        NNAdam,
        _nn_adam,
        {
            "output_scale": "output_scale",
            "decay_strength": "decay_strength",
            "initial_learning_rate": "lr",
            "initial_beta1": "beta1",
            "initial_beta2": "beta2",
            "initial_epsilon": "eps",
        },
        sizes=lambda theta: {"hidden": len(theta["lstm_h"])},
        implied=("lstm_hidden_size",),
    ),
    "RNNMLPLOpt": Reference(
        RNNMLP,
        _rnn_mlp,
        {"step_multiplier": "step_mult", "magnitude_rate": "exp_mult", "decays": "decays"},
        sizes=_rnn_mlp_sizes,
        implied=("hidden_size", "hidden_layer", "from_mlp_size", "from_lstm_size", "lstm_to_ff", "lstm_hidden_size"),
    ),
    **SCHEDULED,
}
"""By the name of the reference's class. All but `SCHEDULED` are of google/learned_optimization (Apache-2.0)."""
