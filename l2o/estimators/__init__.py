"""Estimators of the meta-gradient, one family a file."""

from l2o.estimators.backprop import Backprop

__all__ = ["Backprop"]
