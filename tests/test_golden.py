"""Replays of runs that were recorded from google/learned_optimization (the `golden` fixture says where they lie)."""

import json

import numpy as np
import pytest
import torch

from l2o.ops.kinds import default_kinds
from l2o.rules import MLP, SGD, Adam, Momentum
from l2o.types import Clock


def logit_of_one_minus(log_one_minus: torch.Tensor) -> torch.Tensor:
    """The reference has ``log(1 - beta)`` where l2o has the logit of beta."""
    one_minus = log_one_minus.double().exp()
    return ((1 - one_minus) / one_minus).log().float()


def mlp(theta):
    return {f"{name}{i}": theta[f"mlp/~/linear_{i}/{name}"] for i in range(3) for name in "wb"}


def hand_designed(names):
    return lambda theta: {
        ours: logit_of_one_minus(theta[theirs]) if ours.startswith("logit") else theta[theirs]
        for ours, theirs in names.items()
    }


ADAM = {
    "log_lr": "log_lr",
    "logit_beta1": "one_minus_beta1",
    "logit_beta2": "one_minus_beta2",
    "log_eps": "log_epsilon",
}
TRACES = {
    "mlp_lopt": (MLP(time="steps", step_mult=0.001, exp_mult=0.001), mlp),
    "learnable_sgd": (SGD(), hand_designed({"log_lr": "log_lr"})),
    "learnable_sgdm": (Momentum(), hand_designed({"log_lr": "log_lr", "logit_momentum": "one_minus_momentum"})),
    "learnable_adam": (Adam(eps_root=1e-8), hand_designed(ADAM)),
    "learnable_adam_bigeps": (Adam(eps_root=1e-8), hand_designed(ADAM)),
}


@pytest.mark.parametrize(("name", "rule", "convert"), [(k, *v) for k, v in TRACES.items()], ids=TRACES)
def test_replay_agrees_with_the_reference(golden, name, rule, convert):
    """Parameters to 1e-5 of the tensor's largest value after every step, updates to 1e-4 of the largest update."""
    with np.load(golden / f"{name}.npz") as file:
        trace = {key: torch.from_numpy(np.array(file[key])) for key in file.files if key != "meta"}
        tensors = [key.removeprefix("init/") for key in file.files if key.startswith("init/")]
        assert json.loads(str(file["meta"]))
    theta = convert({k.removeprefix("theta/"): t for k, t in trace.items() if k.startswith("theta/")})
    params = {k: trace[f"init/{k}"] for k in tensors}
    state = rule.init(theta, params, default_kinds(params))
    total = torch.tensor(len(trace["losses"]))
    steps = []
    for t in range(len(trace["losses"])):
        grads = {k: trace[f"grads/{k}"][t] for k in tensors}
        updates, state = rule.update(theta, grads, state, params, Clock(torch.tensor(t), total))
        params = {k: p + updates[k] for k, p in params.items()}
        steps.append(updates)
        for k, p in params.items():
            want = trace[f"params/{k}"][t]
            assert (p - want).abs().max() <= 1e-5 * want.abs().max(), (k, t)
    for k in tensors:
        want = trace[f"step/{k}"]  # what the reference subtracts
        error = (torch.stack([-u[k] for u in steps]) - want).abs().max()
        assert error <= 1e-4 * want.abs().max(), k
