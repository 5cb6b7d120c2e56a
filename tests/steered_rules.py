"""Rules of all directions and parts of `Steered`, for tests of its kernel."""

import pytest

from l2o.rules import Steered

RULES = {
    "orthogonal": Steered(),
    "eigenbasis": Steered(direction="eigenbasis", period=2, widest=64),
    "turned": Steered(direction="eigenbasis", period=2, widest=64, turned=6),
    "tall": Steered(direction="eigenbasis", period=2, widest=16, turned=6, tall=2, free_zeros=True),
    "wide": Steered(direction="eigenbasis", pace=2, widest=64, tall=10, wide=0.5, carried=True),
    "signal": Steered(direction="eigenbasis", period=2, widest=64, turned=6, cautious=True, by_signal=0.5, deep=2),
    "table": Steered(direction="eigenbasis", by_gain=2.0, rows=1.6, tables=True, haste=0.8, widest=64, tall=10),
    "normalized": Steered(direction="normalized", fan_in=0.3),
    "diagonal": Steered(direction="diagonal"),
    "light": Steered(direction="diagonal", cautious=True, by_signal=0.5, tall=2, widest=16, free_zeros=True, deep=2),
    "adam": Steered(direction="adam"),
    "own": Steered(direction="eigenbasis", period=2, widest=64, turned=6, own=2.0),
    "own diagonal": Steered(direction="diagonal", free_zeros=True, own=0.5),
    "mlp": Steered(direction="eigenbasis", controller="mlp", period=2, widest=64, turned=6, deep=2, own=2.0),
    "lstm": Steered(direction="diagonal", controller="lstm", free_zeros=True, cautious=True),
    "uncontrolled": Steered(controller="none", schedule="constant"),
}
every_direction = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
