"""Stopping on SIGINT or SIGTERM at the end of an iteration instead of in the middle of one."""

import os
import signal
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A terminal's Ctrl-C reaches a process of torchrun twice, from the terminal and from torchrun.
SAME_REQUEST_SECONDS = 1.0


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is only noted in `signal`; a later SIGINT interrupts at once.

    Signals reach Python's main thread alone: entered in another thread, this does nothing.

    Args:
        announce: say on stderr that the signal has been seen, as the iteration in progress may take a while.
    """

    def __init__(self, announce: bool = True) -> None:
        self.signal = 0
        self._announce = announce
        self._first = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python, which cannot be put back from Python either
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._first = number, now
            if self._announce:  # not print: the signal may have interrupted one
                os.write(2, b"\nStopping after this iteration; Ctrl-C again stops at once, without saving.\n")
        elif number == signal.SIGINT and now - self._first > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt
