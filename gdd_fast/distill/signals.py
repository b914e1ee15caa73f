"""Stopping on SIGINT or SIGTERM at the end of an iteration instead of in the middle of one."""

import signal
from types import FrameType


class StopRequest:
    """While entered, the first SIGINT or SIGTERM only sets `received`; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
