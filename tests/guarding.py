"""What the tests of the guard share: a bowl, runs down it, and what was done."""

import warnings

import torch
from plugin import make
from torch import nn

TOTAL = 200


def quiet(call, *arguments, **named):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return call(*arguments, **named)


def bowl(start=1.0):
    return [nn.Parameter(torch.full((4, 3), start)), nn.Parameter(torch.full((3,), -start))]


def descend(optimizer, steps, tell, factor=None):
    """On the sum of squares; ``factor`` gives that of the loss at a step."""
    params = optimizer.param_groups[0]["params"]
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params) * (1.0 if factor is None else factor(step))
        loss.backward()
        quiet(optimizer.step, **({"loss": loss} if tell else {}))
        losses.append(loss.item())
    return losses


def events(optimizer):
    return [(e["step"], e["kind"], e["done"]) for e in optimizer.report()["events"]]


def slow(params, rule=None, **settings):
    return make(params, rule, **{"total_steps": TOTAL, "lr": 1e-4, **settings})
