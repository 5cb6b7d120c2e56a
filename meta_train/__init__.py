"""The commands: ``python -m meta_train`` and ``python -m meta_train.evaluate``."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def stop_early(number: int, frame: FrameType | None) -> None:
    """Do what Ctrl-C does while torch is being imported; later `main_guard` says what is kept."""
    print("\ninterrupted before anything was begun", file=sys.stderr, flush=True)
    os._exit(128 + number)


def begin(command: str) -> None:
    """Give the first sign of life of a command, whose imports take seconds."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in the background
        signal.signal(signal.SIGINT, stop_early)
    if os.environ.get("RANK", "0") == "0":
        print(f"{command}: loading", file=sys.stderr, flush=True)


if sys.argv[0] == "-m" and "l2o" not in sys.modules:  # as long as Python looks for the module to run
    begin(sys.orig_argv[sys.orig_argv.index("-m") + 1])
