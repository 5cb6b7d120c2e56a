"""What the plug-in refuses, with which words, and that nothing has changed then."""

import math
from types import SimpleNamespace

import pytest
import torch
from plugin import Mixing, make, parameters, source, untouched
from torch import nn

from l2o.optim import LearnedOptimizer
from l2o.optim.members import Member, checked_gradient
from l2o.rules import MLP, SGD, Adam
from l2o.types import CheckpointError, ConfigurationError, GradientError, ParameterError, ResumeError, UnknownNameError


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"total_steps": value}, "total_steps") for value in (0, -1, 100.0, True, "10", None)]
    + [({name: value}, name) for name in ("lr", "weight_decay") for value in (-1.0, math.nan, math.inf, "1", True)],
)
def test_settings_that_make_no_sense(settings, named):
    with pytest.raises(ConfigurationError, match=f"{named}=.*expected"):
        make(parameters(), **settings)


@pytest.mark.parametrize("group", [{"kind": "tensor"}, {"lr": -1.0}, {"weight_decay": math.nan}])
def test_settings_of_a_group_that_make_no_sense(group):
    optimizer = make([nn.Parameter(torch.ones(1))])
    with pytest.raises(ConfigurationError, match="expected"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **group})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"source=NoneType: .*mlp-digits.*LearnedOptimizer\(params, \"default\", total_steps="),
        ({"total_steps": 9}, r"source=NoneType: .*mlp-digits.*LearnedOptimizer\(params, \"default\", total_steps="),
        ({"source": "default"}, "total_steps=None: .*share of it"),
        ({"source": "defualt", "total_steps": 9}, "did you mean 'default'.*start with 'default'"),
        ({"source": 1000, "total_steps": 9}, r"source=int: .*\"default\""),
    ],
)
def test_what_is_missing_says_how_to_start(settings, message):
    with pytest.raises((ConfigurationError, UnknownNameError), match=message):
        LearnedOptimizer(parameters(), **settings)


@pytest.mark.parametrize("wrong", [None, 3, (SGD(),), (SGD, {}), {"w": 1}])
def test_sources_that_are_none(wrong):
    with pytest.raises(ConfigurationError, match="source="):
        LearnedOptimizer(parameters(), wrong, total_steps=1)


def test_a_pair_the_wrong_way_round_shows_types_and_not_theta():
    with pytest.raises(
        ConfigurationError, match=r"^source=\(dict, MLP\): expected .* a pair \(rule, theta\); start with [^;]*$"
    ):
        LearnedOptimizer(parameters(), tuple(reversed(source(MLP()))), total_steps=1)


def test_theta_of_another_rule_names_the_tensor():
    with pytest.raises(CheckpointError, match="'log_eps' is missing"):
        LearnedOptimizer(parameters(), (Adam(), {"log_lr": torch.zeros(())}), total_steps=1)


@pytest.mark.parametrize(
    "bad",
    [
        torch.ones(2, dtype=torch.int64),
        torch.ones(2, dtype=torch.complex64, requires_grad=True),
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, device="meta", requires_grad=True),
    ],
    ids=["int", "complex", "sparse", "device"],
)
def test_parameters_that_cannot_be_optimized(bad):
    good = nn.Parameter(torch.ones(2))
    with pytest.raises(ParameterError, match="parameter 1"):
        make([good, bad])
    optimizer = make([good])
    with pytest.raises(ParameterError, match="parameter 1"):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1


def sparse(p):
    p.grad = torch.ones(2, 2).to_sparse()


def complex_(p):
    p.grad_dtype = None
    p.grad = torch.ones(2, 2, dtype=torch.complex64)


def resized(p):
    p.grad = torch.ones(2, 2)
    p.data = torch.ones(3)


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("spoil", [sparse, complex_, resized])
def test_a_bad_gradient_changes_nothing(spoil, guard):
    good, bad = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2))
    optimizer = make([("first", good), ("second", bad)], Adam(), guard=guard)
    good.grad = torch.ones(2)
    spoil(bad)
    with pytest.raises(GradientError, match=r"gradient of parameter 1 \('second'\)"):
        optimizer.step()
    assert torch.equal(good, torch.ones(2))
    assert untouched(optimizer)


def test_a_gradient_on_another_device():
    # torch itself refuses to make such a pair of devices that a test can count on.
    stub = SimpleNamespace(grad=torch.ones(2, device="meta"), shape=torch.Size([2]), device=torch.device("cpu"))
    with pytest.raises(GradientError, match=r"\(2,\) on meta, expected \(2,\) on cpu"):
        checked_gradient(Member("0", stub, {"params": [stub]}, stub))


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "loss=loss"),
        ({"closure": lambda: None}, "loss is NoneType"),
        ({"loss": torch.ones(2)}, r"loss is \(2,\)"),
        ({"loss": 1.0, "closure": lambda: 1.0}, "loss=, and a closure"),
        ({"closure": torch.tensor(1.0)}, r"got a Tensor as closure, expected a function.*step\(lambda: loss\)"),
        ({"closure": 1.0}, "got a float as closure"),
    ],
)
def test_a_loss_that_is_missing_or_none_changes_nothing(arguments, named, guard):
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = make([p], Mixing(), guard=guard)
    with pytest.raises(ConfigurationError, match=named):
        optimizer.step(**arguments)
    assert torch.equal(p, torch.ones(2))
    assert untouched(optimizer)


def test_torchs_own_errors_stay():
    p = nn.Parameter(torch.ones(2))
    optimizer = make([p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [p]})
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])
    with pytest.raises(ValueError, match="non-leaf"):
        make([p * 2])
    with pytest.raises(TypeError, match="iterable"):
        make(p)


def test_lazy_parameters_are_refused_whole():
    optimizer = LearnedOptimizer([nn.Parameter(torch.ones(2))], "default", total_steps=9)
    with pytest.raises(ParameterError, match="run its lazy module once"):
        optimizer.add_param_group({"params": nn.LazyLinear(3).parameters()})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ParameterError, match="run its lazy module once"):
        LearnedOptimizer(nn.LazyLinear(3).parameters(), "default", total_steps=9)


def test_runs_have_an_end_that_int64_can_count():
    with pytest.raises(ConfigurationError, match="at most 9,223,372,036,854,775,807"):
        LearnedOptimizer([nn.Parameter(torch.ones(2))], "default", total_steps=10**20)


@pytest.mark.parametrize("wrong", [None, [], "x", {"state": None, "param_groups": None}, {"state": {}}])
def test_what_is_no_state_dict_is_refused(wrong):
    optimizer = LearnedOptimizer([nn.Parameter(torch.ones(2))], "default", total_steps=9)
    with pytest.raises(ResumeError, match=r"expected what state_dict\(\) returned"):
        optimizer.load_state_dict(wrong)
