"""Learned optimizers as a `torch.optim.Optimizer`."""

from l2o.optim.learned import LearnedOptimizer
from l2o.optim.routing import param_groups

__all__ = ["LearnedOptimizer", "param_groups"]
