"""What users' tasks get wrong: one error that names the method, before anything is trained; and what they may do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from l2o.estimators import Backprop, Evolution
from l2o.rules import MLP, SGD
from l2o.tasks import ModuleTask
from l2o.types import ConfigurationError, Metrics, TaskFamily, Theta
from meta_train.config.build import probe

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(2))
Y = torch.sin(2 * X[:, :1])
both = pytest.mark.parametrize("make", [Backprop, Evolution])


def estimates(
    make: Any, family: TaskFamily, theta: Theta | None = None, rule: Any = None, **settings: Any
) -> list[Any]:
    """Gradients and metrics of four estimates, the last two of them after the first runs have ended."""
    rule, generator = rule or MLP(hidden=(4,)), torch.Generator().manual_seed(0)
    theta = theta or rule.init_theta(torch.Generator().manual_seed(1))
    estimator = make(rule, family, lanes=4, horizon=4, truncation=2, stagger=False, **settings)
    state, found = estimator.init(theta, generator), []
    for _ in range(4):
        grads, state, metrics = estimator.estimate(theta, state, generator)
        found.append((grads, metrics))
    return found


def lanes(data: dict[str, Tensor]) -> int:
    return len(data["a"])


class Centre(TaskFamily):
    """The family that the table below spoils, one method at a time."""

    def sample(self, generator: torch.Generator, lanes: int) -> Any:
        return {"a": torch.randn(lanes, 5, generator=generator)}

    def init(self, data: dict[str, Tensor], generator: torch.Generator) -> Any:
        return {"w": torch.zeros(lanes(data), 5)}, {"seen": torch.zeros(lanes(data))}

    def batch(self, data: dict[str, Tensor], split: str, generator: torch.Generator) -> Any:
        return {"x": torch.ones(lanes(data), 1)}

    def loss(self, params: Any, buffers: Any, data: Any, batch: Any) -> Any:
        return distance(params, data), {"seen": buffers["seen"] + 1}


def distance(params: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
    return (params["w"] - data["a"]).square().sum()


def shrunk(self: Any, params: Any, buffers: Any, data: Any, batch: Any) -> Any:
    with torch.no_grad():
        params["w"].mul_(0.5)
    return distance(params, data), buffers


def start_of(**tensors: Tensor) -> Any:
    return lambda self, data, generator: (tensors, {})


def loss_of(made: Callable[[Tensor, Any], Any]) -> Any:
    return lambda self, params, buffers, data, batch: made(distance(params, data), buffers)


SLIPS: dict[str, tuple[str, Any, str]] = {
    "sample gives nothing": ("sample", lambda self, g, lanes: None, "Mine.sample: None, expected a dict"),
    "sample gives no tensor": ("sample", lambda self, g, lanes: {}, "Mine.sample: no tensors"),
    "sample has no lanes": ("sample", lambda self, g, lanes: {"a": torch.zeros(5)}, r"Mine.sample: 'a' .*shape \[5\]"),
    "sample in numpy": ("sample", lambda self, g, lanes: {"a": torch.zeros(lanes).numpy()}, "'a' is a ndarray"),
    "init without buffers": ("init", lambda self, data, g: {"w": data["a"]}, "Mine.init: returned a dict, expected"),
    "init without parameters": ("init", start_of(), "Mine.init has no parameters"),
    "init without lanes": ("init", start_of(w=torch.zeros(5)), r"Mine.init: 'w' .*\[5\], expected .* leading axis"),
    "whole numbers": ("init", lambda self, data, g: ({"w": data["a"].long()}, {}), "Mine.init has parameters of int64"),
    "half precision": ("init", lambda self, data, g: ({"w": data["a"].half()}, {}), r"float16, expected .*\.float\(\)"),
    "two dtypes": ("init", lambda self, data, g: ({"w": data["a"], "v": data["a"].double()}, {}), "32 and float64"),
    "batch is a tensor": ("batch", lambda self, data, split, g: data["a"], "Mine.batch: a float32 tensor .*expected"),
    "batch without lanes": ("batch", lambda self, data, split, g: {"x": torch.zeros(7)}, "Mine.batch: 'x'"),
    "loss forgets buffers": ("loss", loss_of(lambda loss, buffers: loss), "Mine.loss: returned a float32 tensor"),
    "loss drops buffers": ("loss", loss_of(lambda loss, buffers: (loss, {})), r"Mine.loss \(buffers\): .*'seen': \[\]"),
    "buffers are None": ("loss", loss_of(lambda loss, buffers: (loss, None)), r"Mine.loss \(buffers\): None"),
    "loss is a vector": ("loss", loss_of(lambda loss, b: (loss.expand(3), b)), r"Mine.loss: .*\[3\], expected 0-d"),
    "loss is a number": ("loss", loss_of(lambda loss, b: (1.0, b)), "Mine.loss: .*a float, expected a 0-d"),
    "loss is detached": ("loss", loss_of(lambda loss, b: (loss.detach(), b)), "Mine.loss: .*without derivatives"),
    "loss is read": ("loss", loss_of(lambda loss, b: (loss * loss.item(), b)), "vectorise Mine.loss .*item"),
    "loss branches": ("loss", loss_of(lambda loss, b: (loss if loss > 0 else -loss, b)), "Mine.loss .*torch.where"),
    "loss writes to its parameters": ("loss", shrunk, "Mine.loss writes to its inputs in place.*clones"),
    "gradients alone": ("transform_gradients", lambda self, grads, *rest: grads, "Mine.transform_gradients: returned"),
    "gradients lost": ("transform_gradients", lambda self, grads, b, *rest: ({}, b), "transform_gradients: tensors"),
}


@both
@pytest.mark.parametrize("name", SLIPS)
def test_slips_in_a_family_of_ones_own(name: str, make: Any) -> None:
    method, spoilt, text = SLIPS[name]
    family = type("Mine", (Centre,), {method: spoilt})()
    with pytest.raises(ConfigurationError, match=text):
        estimates(make, family)


@both
def test_a_family_without_slips(make: Any) -> None:
    assert all(metrics["meta_loss"].isfinite() for _, metrics in estimates(make, Centre()))


@pytest.mark.parametrize("split", ["train", "valid"])
def test_commands_find_slips_before_they_begin(split: Any) -> None:
    """In either split: the loss of the other one is all right."""

    def batch(self: Any, data: dict[str, Tensor], drawn: str, generator: torch.Generator) -> Any:
        return {"x": torch.ones(lanes(data), 2 if drawn == split else 1)}

    def loss(self: Any, params: Any, buffers: Any, data: Any, batch: Any) -> Any:
        return distance(params, data) * batch["x"].squeeze(), buffers

    family = type("Mine", (Centre,), {"batch": batch, "loss": loss})()
    with pytest.raises(ConfigurationError, match=r"Mine.loss: a loss of shape \[2\]"):
        probe(family, ["train", "valid"], torch.device("cpu"))


def task(module: Any = lambda: nn.Linear(4, 1), criterion: Any = F.mse_loss, data: Any = (X, Y), size: Any = 6) -> Any:
    return ModuleTask(module, criterion, data, data, batch_size=size)


CRITERIA: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "tuple": (lambda out, y: (F.mse_loss(out, y), 1), "criterion: .*a tuple of Tensor, int, expected a 0-d"),
    "number": (lambda out, y: 0.5, "criterion: .*a float"),
    "None": (lambda out, y: None, "criterion: .*None"),
    "whole numbers": (lambda out, y: (out > y).sum(), "criterion: .*int64"),
    "complex": (lambda out, y: F.mse_loss(out, y) * 1j, "criterion: .*complex64"),
    "one entry": (lambda out, y: F.mse_loss(out, y)[None], r"criterion: .*\[1\].*take its mean"),
    "item": (lambda out, y: F.mse_loss(out, y).item(), "cannot vectorise Linear.*item"),
    "numpy": (lambda out, y: F.mse_loss(out, y).detach().numpy(), "cannot vectorise Linear"),
    "detached": (lambda out, y: F.mse_loss(out, y).detach(), r"loss without derivatives; leave out .detach\(\)"),
}


@both
@pytest.mark.parametrize("name", CRITERIA)
def test_criteria_that_return_something_else(name: str, make: Any) -> None:
    criterion, text = CRITERIA[name]
    with pytest.raises(ConfigurationError, match=text):
        estimates(make, task(criterion=criterion))


class Between(nn.Module):
    """``function`` between two layers."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(4, 4), nn.Linear(4, 1), function
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self, self.first(x)))


def centred(module: nn.Module, h: Tensor) -> Tensor:
    """By a running mean in a buffer, which the engine takes as a constant."""
    module.mean = 0.9 * module.mean + 0.1 * h.mean(0).detach()
    return h - module.mean


SPECTRAL = nn.utils.parametrizations.spectral_norm
ONCE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no derivative in torch": (lambda: Between(lambda self, h: F.hardsigmoid(h)), "cannot be differentiated twice"),
    "rounding, straight through": (lambda: Between(lambda self, h: h + (h.round() - h).detach()), "wrong second"),
    "a constant norm": (lambda: Between(lambda self, h: h / self.first.weight.norm().detach()), "wrong second"),
    "a running mean": (lambda: Between(centred), "wrong second derivatives"),
    "spectral norm": (lambda: nn.Sequential(SPECTRAL(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 1)), "wrong second"),
}


@pytest.mark.parametrize("name", ONCE)
def test_modules_that_can_be_differentiated_once(name: str) -> None:
    """They are refused where the meta-gradient would be wrong, and the way out that the error names is one."""
    module, text = ONCE[name]
    with pytest.raises(ConfigurationError, match=rf"{text}.*second_order=False.*Evolution"):
        estimates(Backprop, task(module))
    for found in (estimates(Backprop, task(module), second_order=False), estimates(Evolution, task(module))):
        assert all(metrics["meta_loss"].isfinite() for _, metrics in found)


def in_half(module: nn.Module, h: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.linear(h, module.first.weight).to(h.dtype)


KINKS: dict[str, Callable[[], nn.Module]] = {
    "ReLU of zeros": lambda: Between(lambda self, h: F.relu(0.0 * h + self.first.bias)),
    "many ReLUs": lambda: nn.Sequential(
        nn.Linear(4, 500), nn.ReLU(), nn.Linear(500, 100), nn.ReLU(), nn.Linear(100, 1)
    ),
    "maxima": lambda: Between(lambda self, h: h * h.amax(-1, keepdim=True)),
    "rounding": lambda: Between(lambda self, h: h + h.round()),
    "single precision inside": lambda: Between(lambda self, h: h.float().tanh().to(h.dtype)),
    "autocast": lambda: Between(in_half),
    "dropout": lambda: Between(lambda self, h: F.dropout(h, 0.3, self.training)),
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)),
}


@pytest.mark.parametrize("name", KINKS)
def test_kinks_are_no_reason_to_refuse_a_module(name: str) -> None:
    def make() -> nn.Module:
        module = KINKS[name]()
        for part in module.modules():
            if isinstance(part, nn.Linear):
                nn.init.zeros_(part.bias)
        return module

    assert all(metrics["meta_loss"].isfinite() for _, metrics in estimates(Backprop, task(make)))


def test_padding_rows_are_constants_where_they_rest() -> None:
    """Their gradient is cut off on purpose, and SGD leaves them where they are; the other rule moves them."""
    words = torch.randint(0, 5, (24, 3), generator=torch.Generator().manual_seed(3))
    family = task(nn.Sequential(nn.Embedding(5, 2, padding_idx=0), nn.Flatten(), nn.Linear(6, 1)), data=(words, Y))
    assert all(metrics["meta_loss"].isfinite() for _, metrics in estimates(Backprop, family, rule=SGD()))
    with pytest.raises(ConfigurationError, match=r"padding_idx whose row the rule moves.*second_order=False"):
        estimates(Backprop, family)


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_refused_by_name(make: Any, reentrant: bool) -> None:
    module = Between(lambda self, h: checkpoint(torch.tanh, h, use_reentrant=reentrant))
    with pytest.raises(ConfigurationError, match=r"torch\.utils\.checkpoint \(estimators have checkpoint=True"):
        estimates(make, task(module))


def scalars(found: list[tuple[Theta, Metrics]]) -> list[Tensor]:
    return [t for grads, metrics in found for t in (*grads.values(), metrics["meta_loss"])]


@both
def test_double_precision_throughout(make: Any) -> None:
    """A float64 module under a float32 θ: the arithmetic is that of θ in float64, the gradient has the dtype of θ."""
    family = task(lambda: nn.Linear(4, 1).double(), data=(X.double(), Y.double()))
    theta = MLP(hidden=(4,)).init_theta(torch.Generator().manual_seed(1))
    single, double = estimates(make, family, theta), estimates(make, family, {k: t.double() for k, t in theta.items()})
    assert all(g.dtype == torch.float32 for grads, _ in single for g in grads.values())
    assert all(g.dtype == torch.float64 for grads, _ in double for g in grads.values())
    for a, b in zip(scalars(single), scalars(double), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-7)


@both
def test_targets_of_double_precision_change_nothing_but_rounding(make: Any) -> None:
    found = estimates(make, task(data=(X, Y.double())))
    for a, b in zip(scalars(found), scalars(estimates(make, task())), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@both
def test_a_default_dtype_of_double_precision(make: Any) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        found = estimates(make, task(lambda: nn.Linear(4, 1), data=(X.double(), Y.double())))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(g.dtype == torch.float32 for grads, _ in found for g in grads.values())  # of θ, which is float32 always
    assert all(t.isfinite().all() for t in scalars(found))


def written(x: Tensor) -> Tensor:
    return x.sub_(1.0).relu_()


class Writes(nn.Linear):
    """A layer that writes to its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(written(x))


@both
@pytest.mark.parametrize("size", [6, None])
def test_a_module_that_writes_to_its_input_leaves_the_data_alone(make: Any, size: int | None) -> None:
    x, y = X.clone(), Y.clone()
    found = estimates(make, task(lambda: Writes(4, 1), lambda out, t: F.mse_loss(out, t.mul_(2.0)), (x, y), size))
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    plain = estimates(make, task(data=(written(X.clone()), 2.0 * Y), size=size))
    for a, b in zip(scalars(found), scalars(plain), strict=True):
        torch.testing.assert_close(a, b)
