"""Ctrl-C and SIGTERM end a run after the step in hand; a second one ends the process at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """While entered, takes note of the first signal to stop: ``number``, 0 for none."""

    number = 0

    def __enter__(self) -> StopRequest:
        self._previous: dict[int, Any] = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
