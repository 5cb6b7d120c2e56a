"""Learned optimizers as a `torch.optim.Optimizer`."""

from l2o.optim.learned import LearnedOptimizer

__all__ = ["LearnedOptimizer"]
