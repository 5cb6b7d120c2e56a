"""The tables that tests are parametrised over: every rule, with the variants that take another path."""

import dataclasses

import pytest
import torch

from l2o import rules
from l2o.ops.kinds import infos_of
from l2o.rules import LSTM, MLP, STAR, AdafacMLP, Adam, Celo, Celo2, CeloAdam, Momentum, NNAdam, RNNprop, Steered, VeLO
from l2o.types import Batch, Buffers, Params, Run, Split, TaskData, TaskFamily, Theta

SMALL = {
    "VeLO": VeLO(lstm_hidden=6, inits=3, hidden=(8,), step_mult=0.003),
    "Celo": Celo(lstm_hidden=6, step_mult=0.1),
    "CeloAdam": CeloAdam(lstm_hidden=6),
}
"""In place of presets that would make the tests slow, or whose steps parameters in float32 would hardly show."""
VARIANTS = {
    "Momentum-nesterov": Momentum(nesterov=True),
    "Adam-eps_root": Adam(eps_root=1e-8),
    "LSTM-raw": LSTM(hidden=(7,), preprocess=False),
    "LSTM-0.01": LSTM(scale=0.01),
    "MLP-steps": MLP(time="steps", step_mult=0.001, exp_mult=0.001),
    "MLP-mup": MLP(hidden=(4,), mup=True),
    "AdafacMLP-deep": AdafacMLP(hidden=(5, 3, 4), step_mult=0.01, exp_mult=0.1, mup=True),
    "STAR-stable": STAR(
        nominal_lr=0.01, nominal_controller=True, weight_decay=0.02, decay_controller=True, normalise=True
    ),
    "NNAdam-decay": NNAdam(hidden=5, output_scale=0.1, decay_strength=0.05),
    "RNNprop-small": RNNprop(hidden=(4,), projected=3),
    "VeLO-horizon": VeLO(lstm_hidden=5, inits=2, hidden=(6,), step_mult=0.01, loss_horizon=10),
    "Celo-mixed": Celo(lstm_hidden=6, inits=3, hidden=(8, 8), step_mult=0.1),
    "Celo2-base": Celo2(orthogonalize=False),
    "Celo2-options": Celo2(
        activation="tanh", exp_mult=0.1, bias_correction=True, param_scale=True, weight_decay=0.1, adam=("embedding",)
    ),
    "Steered-eigenbasis": Steered(direction="eigenbasis", period=2),
    "Steered-turned": Steered(direction="eigenbasis", period=2, turned=64, widest=8),
    "Steered-normalized": Steered(direction="normalized", fan_in=0.3),
    "Steered-adam": Steered(direction="adam"),
    "Steered-diagonal": Steered(direction="diagonal"),
    "Steered-network": Steered(direction="eigenbasis", period=2, turned=64, network=True),
    "Steered-tall": Steered(
        direction="eigenbasis", period=2, turned=64, widest=6, tall=2, tables=True, free_zeros=True, deep=1, rows=1.5
    ),
    "Steered-loss": Steered(controller="mlp", reads_loss=True),
    "Steered-mlp": Steered(controller="mlp"),
    "Steered-lstm": Steered(controller="lstm"),
    "Steered-uncontrolled": Steered(controller="none", schedule="constant", iterations=5),
}
SEE_SHAPES = ("AdafacMLP", "STAR", "NNAdam", "RNNMLP", "MLP-mup", "VeLO", "Celo", "Celo2", "Steered")
"""Rules to which the shape of a tensor is more than its number of entries, by the beginnings of their names."""
RULES = {name: SMALL[name] if name in SMALL else getattr(rules, name)() for name in rules.__all__} | VARIANTS
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def identical(a, b) -> bool:
    """The same nested structures bit for bit, NaN equal to NaN."""
    leaves_a, leaves_b = (torch.utils._pytree.tree_leaves(tree) for tree in (a, b))
    return len(leaves_a) == len(leaves_b) and all(
        x.dtype == y.dtype and torch.equal(x.nan_to_num(nan=12345.0), y.nan_to_num(nan=12345.0))
        if torch.is_tensor(x) and torch.is_tensor(y)
        else x == y
        for x, y in zip(leaves_a, leaves_b, strict=True)
    )


def double(tree: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: t.double() if t.is_floating_point() else t for k, t in tree.items()}


def random_theta(rule, seed: int = 0, noise: float = 0.05) -> Theta:
    """A float64 θ off the symmetric points of the initialisation (biases start at zero)."""
    g = generator(seed)
    theta = rule.init_theta(g)
    return {k: t.double() + noise * torch.randn(t.shape, generator=g, dtype=torch.float64) for k, t in theta.items()}


@dataclasses.dataclass(frozen=True)
class Shapes(TaskFamily):
    """A float64 regression whose parameters have 0, 1 and 2 axes; one unit is dead, its gradients exactly 0.

    The decoder is the transposed encoder, so the weights are tied. Tasks of different lanes differ.
    """

    dead: bool = True

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        return {"target": torch.randn(lanes, 4, generator=generator, dtype=torch.float64)}

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(len(data["target"]), *shape, generator=generator, dtype=torch.float64)

        bias = randn(3).abs() + 0.5
        if self.dead:
            bias[:, 0] = -100.0
        return {"weight": randn(3, 4), "bias": bias, "gain": randn()}, {}

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        return {"x": torch.randn(len(data["target"]), 5, 4, generator=generator, dtype=torch.float64)}

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[torch.Tensor, Buffers]:
        hidden = torch.relu(batch["x"] @ params["weight"].T + params["bias"])
        output = params["gain"] * (torch.tanh(hidden) @ params["weight"])
        return (output - data["target"]).square().mean(), buffers


TOTAL = 3


@dataclasses.dataclass(frozen=True)
class Recorded(TaskFamily):
    """Another family's tasks, initialisations and batches, drawn once and handed out again: the same for every θ."""

    family: TaskFamily
    lanes: tuple[int, ...] = (0, 1, 2)
    seed: int = 0

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        return self._cut(self.family.sample(self._generator(1), TOTAL), lanes)

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        whole = self.family.sample(self._generator(1), TOTAL)
        params, buffers = self.family.init(whole, self._generator(2))
        return self._cut(params, _lanes(data)), self._cut(buffers, _lanes(data))

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        whole = self.family.sample(self._generator(1), TOTAL)
        seed = int(torch.randint(1 << 30, (), generator=generator))
        return self._cut(self.family.batch(whole, split, self._generator(seed)), _lanes(data))

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[torch.Tensor, Buffers]:
        return self.family.loss(params, buffers, data, batch)

    def transform_gradients(self, *arguments: dict[str, torch.Tensor]) -> tuple[Params, Buffers]:
        return self.family.transform_gradients(*arguments)

    def _cut(self, tree: dict[str, torch.Tensor], lanes: int) -> dict[str, torch.Tensor]:
        return {k: t[list(self.lanes[:lanes])] for k, t in tree.items()}

    def _generator(self, salt: int) -> torch.Generator:
        return generator(self.seed * 1_000_003 + salt)


def _lanes(data: TaskData) -> int:
    return len(next(iter(data.values())))


def one_update(rule, theta, grads, state, params, step=0, total=9, loss=None):
    """``rule.update`` at a step of a run, of whole tensors of the default kinds."""
    run = Run(torch.tensor(step), torch.tensor(total), loss if rule.needs_loss else None)
    return rule.update(theta, grads, state, params, infos_of(params), run)


def first_estimate(estimator, theta, seed=0):
    """Gradients, state and metrics of one truncation from fresh problems."""
    g = generator(seed)
    return estimator.estimate(theta, estimator.init(theta, g), g)


def in_eigenbasis(rule) -> bool:
    """Whether matrices have a basis, which follows every so many steps."""
    return getattr(rule, "direction", "") == "eigenbasis"
