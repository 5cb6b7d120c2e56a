"""Update rules, one a file. A line in ``__all__`` makes one known to checkpoints, tests and the command line."""

from l2o.rules.adafac_mlp import AdafacMLP
from l2o.rules.adagrad import AdaGrad
from l2o.rules.adam import Adam
from l2o.rules.celo import Celo
from l2o.rules.celo2 import Celo2
from l2o.rules.celo_adam import CeloAdam
from l2o.rules.combinators import ByKind as ByKind
from l2o.rules.combinators import Scheduled as Scheduled
from l2o.rules.combinators import Wrapped as Wrapped
from l2o.rules.lstm import LSTM
from l2o.rules.mlp import MLP
from l2o.rules.momentum import Momentum
from l2o.rules.nn_adam import NNAdam
from l2o.rules.rmsprop import RMSProp
from l2o.rules.rnn_mlp import RNNMLP
from l2o.rules.rnnprop import RNNprop
from l2o.rules.sgd import SGD
from l2o.rules.star import STAR
from l2o.rules.steered import Steered
from l2o.rules.velo import VeLO

__all__ = [
    "LSTM",
    "MLP",
    "RNNMLP",
    "SGD",
    "STAR",
    "AdaGrad",
    "AdafacMLP",
    "Adam",
    "Celo",
    "Celo2",
    "CeloAdam",
    "Momentum",
    "NNAdam",
    "RMSProp",
    "RNNprop",
    "Steered",
    "VeLO",
]
