"""What the tests of ``python -m meta_train.evaluate`` share: the command in this process, and what a line means."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import training

from l2o.evaluation import Setting
from meta_train import evaluate, suites

command = partial(training.command, base=["source=sgd", "out=out"], main=evaluate.main)


def configuration(*arguments: str) -> Any:
    """What the command would have worked on."""
    with mock.patch.object(evaluate, "evaluate") as called:
        assert command(*arguments) == 0
    return called.call_args[0][0]


def settings(*arguments: str) -> dict[str, Setting]:
    """The settings that a command line means, by name."""
    return {setting.name: setting for setting in suites.make_settings(configuration(*arguments)).values()}
