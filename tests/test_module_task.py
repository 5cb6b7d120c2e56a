"""`ModuleTask`: lanes against plain modules, second derivatives against finite differences, data, and bad input."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tables import generator
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from l2o.tasks import ModuleTask
from l2o.types import ConfigurationError

LANES, BATCH = 3, 6


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Scalars(nn.Module):
    """0-d parameters, a frozen one, and a buffer that is replaced rather than written to."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(0.1))
        self.frozen = nn.Parameter(torch.tensor([1.0, 2.0, 0.5, 0.3]), requires_grad=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + x.detach().mean()
        return torch.tanh(self.slope * self.frozen * x) + self.offset


class Attention(nn.Module):
    def __init__(self, p: float = 0.0, **options: Any) -> None:
        super().__init__()
        self.project, self.p, self.options = nn.Linear(4, 12), p, options

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).chunk(3, -1)
        p = self.p if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, dropout_p=p, **self.options)


class Calls(nn.Module):
    """``function(module, x)`` between two layers: for what a user's forward may do."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Any], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.function = layer or nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def first(layer: nn.Module) -> nn.Module:
    """A module that returns the first of the outputs of a recurrent layer."""
    return Calls(lambda self, x: self.layer(x)[0], layer)


def cell_steps(module: nn.Module, x: Tensor) -> Tensor:
    state = None
    for step in x.unbind(1):
        state = module.layer(step, state)
    return state[0] if isinstance(state, tuple) else state


def two_conv(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 2), norm, nn.Tanh(), nn.Conv2d(4, 3, 2))


def dense(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 3))


def normed(norm: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """Between the direction and the size of the weights of a layer; the older of torch's functions says it is old."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return dense(norm(nn.Linear(6, 6), **options))


def padded(module: nn.Module, x: Tensor) -> Tensor:
    padding = torch.zeros(x.shape[:2], dtype=torch.bool)
    padding[:, 3:] = True
    return module.layer(x, src_key_padding_mask=padding)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), 2)


VECTOR, SEQUENCE, IMAGE = (4,), (5, 4), (2, 4, 4)
# name -> (module, shape of an example). The output is compared with zeros, squared.
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: dense(nn.BatchNorm1d(6)), VECTOR),
    "BatchNorm2d": (lambda: two_conv(nn.BatchNorm2d(4)), IMAGE),
    "BatchNorm without statistics": (lambda: dense(nn.BatchNorm1d(6, track_running_stats=False)), VECTOR),
    "LayerNorm": (lambda: dense(nn.LayerNorm(6)), VECTOR),
    "RMSNorm": (lambda: dense(nn.RMSNorm(6)), VECTOR),
    "GroupNorm": (lambda: two_conv(nn.GroupNorm(2, 4)), IMAGE),
    "InstanceNorm2d": (lambda: two_conv(nn.InstanceNorm2d(4, affine=True)), IMAGE),
    "InstanceNorm with statistics": (lambda: two_conv(nn.InstanceNorm2d(4, track_running_stats=True)), IMAGE),
    "pooled convolutions": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 2)),
        IMAGE,
    ),
    "tied weights": (Tied, VECTOR),
    "scalars, frozen, replaced buffer": (Scalars, VECTOR),
    "attention": (Attention, SEQUENCE),
    "causal, scaled attention": (partial(Attention, is_causal=True, scale=0.3), SEQUENCE),
    "masked attention": (partial(Attention, attn_mask=torch.ones(5, 5).tril(-1) > 0), SEQUENCE),
    "transformer layer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), SEQUENCE),
    "padded transformer": (lambda: Calls(padded, encoder()), SEQUENCE),
    "weight norm": (lambda: normed(parametrizations.weight_norm), VECTOR),
    "weight norm of one size": (lambda: normed(parametrizations.weight_norm, dim=None), VECTOR),
    "weight norm by column": (lambda: normed(parametrizations.weight_norm, dim=1), VECTOR),
    "weight norm by hooks": (lambda: normed(nn.utils.weight_norm), VECTOR),
    "orthogonal weights": (lambda: normed(parametrizations.orthogonal), VECTOR),
    "sparse embedding": (
        lambda: Calls(lambda self, x: x * self.layer((x > 0).long()).sum(-1), nn.Embedding(2, 3, sparse=True)),
        VECTOR,
    ),
    "GRU": (lambda: first(nn.GRU(4, 3, num_layers=2, batch_first=True)), SEQUENCE),
    "LSTM": (lambda: first(nn.LSTM(4, 3, num_layers=2, bidirectional=True)), SEQUENCE),
    "RNN": (lambda: first(nn.RNN(4, 3, bias=False, bidirectional=True, batch_first=True)), SEQUENCE),
    "RNN with relu": (lambda: first(nn.RNN(4, 3, nonlinearity="relu")), SEQUENCE),
    "GRUCell": (lambda: Calls(cell_steps, nn.GRUCell(4, 3)), SEQUENCE),
    "LSTMCell": (lambda: Calls(cell_steps, nn.LSTMCell(4, 3)), SEQUENCE),
}
NORMS = [name for name in MODULES if "Norm" in name]


def energy(output: Tensor, target: Tensor) -> Tensor:
    return (output - 0.3).square().mean() + 0.0 * target.mean()


def examples(shape: tuple[int, ...], n: int = 20) -> tuple[Tensor, Tensor]:
    return torch.randn(n, *shape, dtype=torch.float64, generator=generator(3)), torch.zeros(n)


@pytest.fixture(params=MODULES)
def task(request: pytest.FixtureRequest) -> ModuleTask:
    make, shape = MODULES[request.param]
    data = examples(shape)
    return ModuleTask(lambda: make().double(), energy, data, data, batch_size=BATCH)


def start(task: ModuleTask, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    g = generator(seed)
    data = task.sample(g, LANES)
    return *task.init(data, g), data


def engine_step(
    task: ModuleTask, params: dict[str, Tensor], buffers: dict[str, Tensor], batch: dict[str, Tensor], lr: Any = 0.1
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Losses, and parameters and buffers after a step of gradient descent; differentiable, as the engine does it."""
    params = {name: p if p.requires_grad else p.clone().requires_grad_() for name, p in params.items()}
    losses, buffers = vmap(task.loss)(params, buffers, {"lane": torch.arange(LANES)}, batch)
    grads = torch.autograd.grad(losses.sum(), list(params.values()), create_graph=True, materialize_grads=True)
    return losses, {name: p - lr * g for (name, p), g in zip(params.items(), grads, strict=True)}, buffers


def plain_steps(module: nn.Module, batches: list[dict[str, Tensor]], k: int) -> Iterator[Tensor]:
    """The losses of lane ``k`` trained by `torch.optim.SGD`, and the loss in evaluation after the last batch."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for batch in batches:
        module.train("key" in batch)
        optimizer.zero_grad()
        loss = energy(module(batch["input.0"][k]), batch["target"][k])
        yield loss.detach()
        if "key" in batch:
            loss.backward()
            optimizer.step()


def test_lanes_train_as_plain_modules_do(task: ModuleTask) -> None:
    assert_trains_as_plain_modules(task)


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_lanes_under_a_spectral_norm_do(norm: Callable[..., nn.Module]) -> None:
    """Its second derivative is not that of the loss, see test_contracts.py; once it can be differentiated."""
    data = examples(VECTOR)
    assert_trains_as_plain_modules(ModuleTask(lambda: normed(norm).double(), energy, data, data, batch_size=BATCH))


def assert_trains_as_plain_modules(task: ModuleTask) -> None:
    """Parameters and buffers after three steps, and the loss in evaluation."""
    params, buffers, data = start(task)
    modules = [task.module() for _ in range(LANES)]
    for k, module in enumerate(modules):
        module.load_state_dict({n: t[k] for n, t in (params | buffers).items()}, strict=False)
    batches = [task.batch(data, split, generator(i)) for i, split in enumerate(["train"] * 3 + ["valid"])]
    expected = [torch.stack(list(plain_steps(module, batches, k))) for k, module in enumerate(modules)]
    losses = []
    for batch in batches[:-1]:
        loss, params, buffers = engine_step(task, params, buffers, batch)
        losses.append(loss.detach())
    evaluated, after = vmap(task.loss)(params, buffers, data, batches[-1])
    torch.testing.assert_close(torch.stack([*losses, evaluated.detach()], 1), torch.stack(expected))
    for k, module in enumerate(modules):
        plain = dict([*module.named_parameters(), *module.named_buffers()])
        for name, t in (params | after).items():
            torch.testing.assert_close(t[k].detach(), plain[name].detach())


def test_second_derivatives_agree_with_finite_differences(task: ModuleTask) -> None:
    """Of the loss after two steps of gradient descent, along a direction in the initial parameters and step size."""
    params, buffers, data = start(task)
    batches = [task.batch(data, "train", generator(i)) for i in range(3)]
    direction = {name: torch.randn(p.shape, dtype=p.dtype, generator=generator(9)) for name, p in params.items()}

    def loss_at(t: Tensor) -> Tensor:
        moved, state, lr = {n: p + t * direction[n] for n, p in params.items()}, buffers, 0.3 * t.exp()
        for batch in batches[:2]:
            _, moved, state = engine_step(task, moved, state, batch, lr)
        return vmap(task.loss)(moved, state, data, batches[2])[0].sum()

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(loss_at(t), t)
    h = 1e-5
    difference = (loss_at(torch.full_like(t, h)) - loss_at(torch.full_like(t, -h))) / (2 * h)
    torch.testing.assert_close(derivative, difference.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("module", "criterion", "message"),
    [
        (None, F.mse_loss, "module is a NoneType: expected an nn.Module"),
        (torch.ones(2), F.mse_loss, "module is a Tensor: expected an nn.Module"),
        (nn.Linear(2, 1), None, "criterion is a NoneType: expected a function"),
        (nn.Linear(2, 1), "mse", "criterion is a str: expected a function"),
    ],
)
def test_what_cannot_be_called_is_named(module: Any, criterion: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ModuleTask(module, criterion, (torch.ones(4, 2), torch.ones(4, 1)), batch_size=2)


def test_pairs_in_a_list_are_counted_not_listed() -> None:
    pairs = [(torch.ones(2), torch.ones(1))] * 5000
    with pytest.raises(ConfigurationError, match=r"a list of 5000 \(tuple\)") as told:
        ModuleTask(nn.Linear(2, 1), F.mse_loss, pairs, batch_size=2)
    assert len(str(told.value)) < 300


def test_a_loader_of_nothing_is_refused() -> None:
    loader = DataLoader(TensorDataset(torch.ones(0, 2), torch.ones(0, 1)), batch_size=4)
    with pytest.raises(ConfigurationError, match="empty, expected at least one example"):
        ModuleTask(nn.Linear(2, 1), F.mse_loss, loader)
