"""VeLO and what came of it: the entries of `l2o.interop.references` that they share their paths of θ in."""

from __future__ import annotations

import re
from itertools import count, takewhile
from typing import Any

import torch

from l2o.interop.reference import Reference, Settings, hidden_sizes, take, take_layers, take_lstm
from l2o.rules import Celo, Celo2, CeloAdam, VeLO
from l2o.types import Kind, Params, Theta

_MLP = "ff_mod_stack/~"
_INPUTS = {"in": "rnn_params/linear_2", "mix": "rnn_params/linear_1"}
_RATE = {"lr": "rnn_params/step_size"}
_CONTROLS = {"controls": "rnn_params/rnn_to_controls"}


def _entry_mlp(rest: Theta) -> Theta:
    """``w0, b0, ...``. The first matrix is cut into one for each group of inputs; the third output nobody reads."""
    groups = list(takewhile(lambda path: path in rest, (f"{_MLP}/w0__{j}" for j in count())))
    if groups:
        rest[f"{_MLP}/w0"] = torch.cat([rest.pop(path) for path in groups], -2)
    layers = take_layers(rest, f"{_MLP}/w{{}}", f"{_MLP}/b{{}}")
    last = len(layers) // 2 - 1
    return layers | {name: layers[name][..., :2].contiguous() for name in (f"w{last}", f"b{last}")}


def _linears(rest: Theta, paths: dict[str, str]) -> Theta:
    return take(rest, {f"{kind}_{ours}": f"{path}/{kind}" for ours, path in paths.items() for kind in "wb"})


def _velo(rest: Theta) -> Theta:
    return take_lstm(rest) | _linears(rest, _INPUTS | _RATE | _CONTROLS) | _entry_mlp(rest)


def _celo(rest: Theta) -> Theta:
    theta = take_lstm(rest) | _linears(rest, _INPUTS | _RATE) | _entry_mlp(rest)
    controls = _linears(rest, _CONTROLS)
    return theta | (controls if len(theta["w0"]) > 1 else {})  # of one MLP there is no choice


def _celo_adam(rest: Theta) -> Theta:
    return take_lstm(rest) | _linears(rest, _INPUTS | _RATE)


def _scheduled_sizes(theta: Theta) -> dict[str, Any]:
    return {"lstm_hidden": len(theta["lstm_h"])}


def _hyper_sizes(theta: Theta) -> dict[str, Any]:
    return hidden_sizes(theta) | _scheduled_sizes(theta) | {"inits": len(theta["w0"])}


def _celo2_kinds(settings: Settings, params: Params) -> dict[str, Kind]:
    """Adam updates what ``regex_1d`` matches, the MLP everything else, whatever its shape."""
    adam = re.compile(settings["regex_1d"]) if settings.get("regex_1d") else None
    return {
        name: "matrix" if not adam or not adam.search(name) else "embedding" if p.ndim >= 2 else "vector"
        for name, p in params.items()
    }


_FIELDS = {
    "exp_mult": "exp_mult",
    "step_mult": "step_mult",
    "initial_momentum_decays": "decays",
    "initial_rms_decays": "rms_decay",
    "initial_adafactor_decays": "adafactor_decays",
}
_IMPLIED = ("ff_hidden_size", "ff_hidden_layers", "lstm_hidden_size", "param_inits")
_INPUT_GROUPS = {
    f"with_{name}": True
    for name in (
        *("g", "grad_clip_feat", "p", "m", "rms", "rms_norm_g", "rsqrt_rms", "fac_norm_g", "rms_only_norm_g"),
        *("fac_rms", "fac_rsqrt", "fac_mom_mult"),
    )
}
_SWITCHES = {
    **_INPUT_GROUPS,
    "with_m_feat": True,
    "with_rms_feat": True,
    "adafactor_accumulator": True,
    "mix_layers": True,
    "precondition_output": False,
    "rnn_state_decay": 0.0,
    "with_validation_feature_dim": False,
    "constant_loss": False,
    "clip_param_scale_amount": None,
}
_HYPER = {**_SWITCHES, "param_scale_mult": True}
_WITHOUT_EFFECT = ("validation_mode", "reparam_decay", "summarize_each_layer", "summarize_all_control")
_UNUSED = ("rnn_params/linear/",)
_CELO2_FIELDS = {
    **{name: ours for name, ours in _FIELDS.items() if name != "step_mult"},
    "mlp_activation": "activation",
    "bias_correction": "bias_correction",
    "param_scale_mult": "param_scale",
    "orthogonalize": "orthogonalize",
}
_CELO2_ONLY = {
    **_INPUT_GROUPS,
    "precondition_output": False,
    "aggregate_mag": False,
    "rmsmult": 1.0,
    "normalize_input": True,
    "normalize_output": True,
    "ns_coeffs": [3.4445, -4.775, 2.0315],
    "ns_iters": 5,
    "ns_eps": 1e-8,
}

SCHEDULED: dict[str, Reference] = {
    "HyperV2": Reference(
        VeLO,
        _velo,
        _FIELDS,
        translated={"use_bugged_loss_features": lambda bugged: {"loss_horizon": {True: 10, False: None}[bugged]}},
        sizes=_hyper_sizes,
        implied=(*_IMPLIED, *_WITHOUT_EFFECT),
        only={**_HYPER, "use_bugged_next_lstm_state": False},
        unused=_UNUSED,
    ),
    "celo.optimizers.celo.Celo": Reference(
        Celo,
        _celo,
        _FIELDS,
        translated={"train_phase": lambda phase: {"scheduled": phase > 1}},
        sizes=_hyper_sizes,
        implied=(*_IMPLIED, *_WITHOUT_EFFECT),
        only=_HYPER,
        unused=_UNUSED,
    ),
    "celo.optimizers.celo_adam.Celo": Reference(
        CeloAdam,
        _celo_adam,
        {
            "initial_epsilon": "eps",
            "initial_momentum_decays": "beta1",
            "initial_rms_decays": "beta2",
            "step_mult": "step_mult",
        },
        sizes=_scheduled_sizes,
        implied=(*_IMPLIED, *_WITHOUT_EFFECT, "exp_mult", "initial_adafactor_decays"),
        only={**_SWITCHES, "mom_decay": True, "param_scale_mult": False},
        unused=_UNUSED,
    ),
    "celo2_optax.scale_by_celo2": Reference(
        Celo2,
        _entry_mlp,
        {**_CELO2_FIELDS, "learning_rate": "step_mult"},
        sizes=hidden_sizes,
        implied=_IMPLIED,
        only=_CELO2_ONLY,
        kinds=_celo2_kinds,
    ),
    "celo2.Celo2": Reference(
        Celo2,
        _entry_mlp,
        {
            **_CELO2_FIELDS,
            "step_mult": "step_mult",
            "weight_decay": "weight_decay",
            "mult_1d": "adam_mult",
            "adam_b1": "adam_beta1",
            "adam_b2": "adam_beta2",
        },
        sizes=hidden_sizes,
        fixed={"adam": ("vector", "embedding")},
        implied=(*_IMPLIED, "regex_1d", "learning_rate"),
        only={**_CELO2_ONLY, "adam_epsilon": 1e-8, "adam_bias_correction": False},
        kinds=_celo2_kinds,
    ),
}
"""By the name of the reference's class: of google/learned_optimization (HyperV2, Apache-2.0) and amoudgl/celo (MIT)."""
