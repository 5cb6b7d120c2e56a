"""Update rules, one a file. A line here makes one known to checkpoints, tests and the command line."""

from l2o.checks import listed
from l2o.rules.adafac_mlp import AdafacMLP as AdafacMLP
from l2o.rules.adagrad import AdaGrad as AdaGrad
from l2o.rules.adam import Adam as Adam
from l2o.rules.celo import Celo as Celo
from l2o.rules.celo2 import Celo2 as Celo2
from l2o.rules.celo_adam import CeloAdam as CeloAdam
from l2o.rules.combinators import ByKind as ByKind
from l2o.rules.combinators import Scheduled as Scheduled
from l2o.rules.combinators import Wrapped as Wrapped
from l2o.rules.lstm import LSTM as LSTM
from l2o.rules.mlp import MLP as MLP
from l2o.rules.momentum import Momentum as Momentum
from l2o.rules.nn_adam import NNAdam as NNAdam
from l2o.rules.rmsprop import RMSProp as RMSProp
from l2o.rules.rnn_mlp import RNNMLP as RNNMLP
from l2o.rules.rnnprop import RNNprop as RNNprop
from l2o.rules.sgd import SGD as SGD
from l2o.rules.star import STAR as STAR
from l2o.rules.steered import Steered as Steered
from l2o.rules.velo import VeLO as VeLO
from l2o.types import UpdateRule

__all__ = listed(globals(), UpdateRule, apart=(ByKind, Scheduled, Wrapped))
