"""Learned update rules, one a file. A line in ``__all__`` makes one known to checkpoints and tests, a line in
``configs/rule/<name>.yaml`` to the command line.
"""

from l2o.rules.adagrad import AdaGrad
from l2o.rules.adam import Adam
from l2o.rules.lstm import LSTM
from l2o.rules.mlp import MLP
from l2o.rules.momentum import Momentum
from l2o.rules.rmsprop import RMSProp
from l2o.rules.sgd import SGD

__all__ = ["LSTM", "MLP", "SGD", "AdaGrad", "Adam", "Momentum", "RMSProp"]
