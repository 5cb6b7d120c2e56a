"""Estimators of the meta-gradient, one family a file."""

from l2o.estimators.backprop import Backprop
from l2o.estimators.evolution import Evolution
from l2o.estimators.mixed import Mixed

__all__ = ["Backprop", "Evolution", "Mixed"]
