"""Rules of which no run was recorded, recomputed entry by entry in numpy from their papers and public code."""

import numpy as np
import pytest
import torch
from tables import generator, random_theta

from l2o.ops.kinds import infos_of
from l2o.rules import MLP, STAR, AdafacMLP, RNNprop
from l2o.types import Run

SHAPES = {"scalar": (), "vector": (5,), "matrix": (3, 4), "tall": (4, 3), "conv": (2, 3, 2, 5)}
TIMESCALES = np.array([1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000], float)
DECAYS = np.array([0.9, 0.99, 0.999])
STEPS = 4


def draw(seed):
    g = generator(seed)
    return {k: torch.randn(s, generator=g, dtype=torch.float64) for k, s in SHAPES.items()}


def trajectory(rule, theta, kinds=None):
    """The updates of every step, from ``draw(0)`` by the gradients ``draw(1)``, ..., as numpy arrays."""
    params, updates = draw(0), []
    infos = infos_of(params, kinds)
    state = rule.init(theta, params, infos)
    for t in range(STEPS):
        new, state = rule.update(theta, draw(t + 1), state, params, infos, Run(torch.tensor(t), torch.tensor(9)))
        params = {k: p + new[k] for k, p in params.items()}
        updates.append({k: u.numpy() for k, u in new.items()})
    return updates


def agree(updates, expected):
    """``expected(name)`` is the list of a tensor's updates."""
    for name in SHAPES:
        for t, want in enumerate(expected(name)):
            np.testing.assert_allclose(updates[t][name], want, rtol=1e-9, atol=1e-13, err_msg=f"{name}, step {t}")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm_numpy(theta, i, x, h, c):
    i, j, f, o = np.split(np.concatenate([x, h], -1) @ theta[f"w{i}"] + theta[f"b{i}"], 4, -1)
    c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(j)
    return np.tanh(c) * sigmoid(o), c


@pytest.mark.parametrize("rule", [RNNprop(), RNNprop(hidden=(3,), projected=4, scale=0.2, beta1=0.8, beta2=0.7)])
def test_rnnprop(rule):
    theta = random_theta(rule)
    weights = {k: t.numpy() for k, t in theta.items()}

    def expected(name):
        m = v = np.zeros(SHAPES[name])
        state = [(np.zeros((*SHAPES[name], n)), np.zeros((*SHAPES[name], n))) for n in rule.hidden]
        for t in range(STEPS):
            g = draw(t + 1)[name].numpy()
            m = rule.beta1 * m + (1 - rule.beta1) * g
            v = rule.beta2 * v + (1 - rule.beta2) * g**2
            root = np.sqrt(v / (1 - rule.beta2 ** (t + 1))) + 1e-8
            x = np.stack([m / (1 - rule.beta1 ** (t + 1)) / root, g / root], -1) @ weights["w_in"] + weights["b_in"]
            x = np.where(x > 0, x, np.exp(x) - 1)
            for i, (h, c) in enumerate(state):
                state[i] = lstm_numpy(weights, i, x, h, c)
                x = state[i][0]
            yield rule.scale * np.tanh(x @ weights["w_out"] + weights["b_out"])[..., 0]

    agree(trajectory(rule, theta), expected)


class SmallFC:
    """Moments, factored moments and normalised channels of one tensor; channels last."""

    def __init__(self, shape, theta):
        def decays(initial, name):
            return 1 - np.exp(10 * (np.log(1 - np.array(initial)) / 10 + theta[name]))

        self.theta, self.shape = theta, shape or (1,)
        self.momentum, self.rms = decays(DECAYS, "momentum_decays"), decays([0.999], "rms_decays")
        self.adafactor = decays(DECAYS, "adafactor_decays")
        self.m = self.v = self.row = self.col = 0.0

    def see(self, g):
        g = g.reshape(self.shape)
        self.m = self.momentum * self.m + (1 - self.momentum) * g[..., None]
        self.v = self.rms * self.v + (1 - self.rms) * g[..., None] ** 2
        q, d = g[..., None] ** 2 + 1e-30, self.adafactor
        if g.ndim == 1:
            self.row = self.col = d * self.row + (1 - d) * q
            self.for_g, self.for_m = 1 / np.sqrt(self.row + 1e-9), 1 / np.sqrt(self.row + 1e-6)
            return
        d1, d0 = np.argsort(self.shape, kind="stable")[-2:]
        self.row = d * self.row + (1 - d) * q.mean(d0, keepdims=True)
        self.col = d * self.col + (1 - d) * q.mean(d1, keepdims=True)
        row = self.row / (self.row.mean(d1, keepdims=True) + 1e-9)
        self.for_g = self.for_m = 1 / np.sqrt(np.maximum(row, 1e-9)) / np.sqrt(np.maximum(self.col, 1e-9))

    def outputs(self, g, p, t):
        g, p = g.reshape(*self.shape, 1), p.reshape(*self.shape, 1)
        self.r = 1 / np.sqrt(self.v + 1e-6)
        row, col = (x + np.zeros((*self.shape, 1)) for x in (self.row, self.col))
        roots = [1 / np.sqrt(row + 1e-8), 1 / np.sqrt(col + 1e-8)]
        seen = [g, p, self.m, self.v, self.m * self.r, self.r, g * self.for_g, row, col, *roots, self.m * self.for_m]
        x = np.concatenate(seen, -1)
        assert x.shape[-1] == 28
        x = x / np.sqrt(1e-5 + (x**2).mean(tuple(range(x.ndim - 1)), keepdims=True))
        time = np.tanh(t / TIMESCALES - 1)
        x = np.concatenate([x, np.broadcast_to(time, (*self.shape, 11))], -1)
        layers = sum(name[0] == "w" for name in self.theta)
        for i in range(layers):
            x = (x if i == 0 else np.maximum(x, 0)) @ self.theta[f"w{i}"] + self.theta[f"b{i}"]
        return np.moveaxis(x, -1, 0)


def star_numpy(rule, theta, name):
    weights = {k: t.numpy() for k, t in theta.items()}
    fc, p = SmallFC(SHAPES[name], weights), draw(0)[name].numpy()
    for t in range(STEPS):
        g = draw(t + 1)[name].numpy()
        fc.see(g)
        d, s, n, r = fc.outputs(g, p, t)
        n = n if rule.nominal_controller else 1.0
        r = r if rule.decay_controller else 0.0
        s = s.mean() if rule.mean_magnitude else s
        n = np.mean(n) if rule.mean_nominal else n
        r = np.mean(r) if rule.mean_decay else r
        direction = {
            "sgd": g.reshape(fc.shape),
            "sgdm": fc.m[..., -1],
            "aggmo": fc.m.mean(-1),
            "adam": (fc.m * fc.r)[..., -1],
            "adam_aggmo": (fc.m * fc.r).mean(-1),
        }[rule.nominal]
        learned = d * np.exp(s * rule.exp_mult) * rule.step_mult * (fc.r[..., 0] if rule.normalise else 1.0)
        nominal = rule.nominal_lr * np.exp(n * rule.nominal_exp_mult) * direction
        flat = p.reshape(fc.shape)
        new = flat * (1 - rule.weight_decay * np.exp(r * rule.decay_exp_mult)) - learned - nominal
        yield (new - flat).reshape(SHAPES[name])
        p = new.reshape(SHAPES[name])


CONTROLS = {"nominal_controller": True, "decay_controller": True, "nominal_exp_mult": 0.2, "decay_exp_mult": 0.3}
TERMS = {"nominal_lr": 0.02, "weight_decay": 0.03, "step_mult": 0.1, "exp_mult": 0.4}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        TERMS,
        TERMS | CONTROLS,
        TERMS | CONTROLS | {"normalise": True, "nominal": "adam", "hidden": (6,)},
        TERMS | CONTROLS | {"mean_magnitude": True, "mean_nominal": True, "mean_decay": True},
        *(TERMS | {"nominal": nominal} for nominal in ("sgd", "sgdm", "aggmo")),
    ],
)
def test_star(settings):
    rule = STAR(**settings)
    theta = random_theta(rule)
    agree(trajectory(rule, theta), lambda name: star_numpy(rule, theta, name))


KINDS = {"scalar": "vector", "vector": "vector", "matrix": "matrix", "tall": "output", "conv": "matrix"}
FACTORS = {"scalar": 1.0, "vector": 1.0, "matrix": 1 / 4, "tall": 1.0, "conv": 1 / 30}


@pytest.mark.parametrize("rule", [MLP, AdafacMLP, STAR])
def test_width_multipliers_are_one_over_fan_in_for_hidden_matrices_only(rule):
    """Of the first update, after which the runs are different ones."""
    settings = {"hidden": (3,)}
    theta = random_theta(rule(**settings))
    plain, scaled = (trajectory(rule(**settings, mup=mup), theta, KINDS)[0] for mup in (False, True))
    for name, factor in FACTORS.items():
        np.testing.assert_allclose(scaled[name], factor * plain[name], rtol=1e-12)


def test_width_multipliers_leave_weight_decay_alone():
    """As in AdamW with µP: a step depends on the width, the time in which a parameter forgets does not."""
    rules = [STAR(step_mult=1e-300, weight_decay=0.1, mup=mup) for mup in (False, True)]
    plain, scaled = (trajectory(rule, random_theta(rule), KINDS)[0] for rule in rules)
    for name in SHAPES:
        np.testing.assert_allclose(scaled[name], plain[name], rtol=1e-12)
