"""Requests to stop, as schedulers and Ctrl-C send them: noted when they come, obeyed after the step in hand."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Context manager that notes SIGTERM, SIGUSR1 and SIGINT instead of dying of them; of a second SIGINT it dies.

    Python hands signals to the main thread only; in another thread nothing is installed and nothing is ever requested.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(number, self._previous[signal.SIGINT])
        logger.info("%s received: checkpointing and leaving after this step.", signal.Signals(number).name)
