"""Stopping on SIGINT (Ctrl-C) or SIGTERM (a scheduler) between groups of steps that belong together, never within
one."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Ctrl-C reaches a process under torchrun twice: from the terminal and from torchrun.
SAME_REQUEST_SECONDS = 1.0


def _say(message: bytes) -> None:
    """Write to stderr directly: the signal may have interrupted a print, or ended the reader of stderr too."""
    with contextlib.suppress(OSError):
        os.write(2, message)


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """Hold back both signals from this thread until the end of the block."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Handlers:
    """While entered, SIGINT and SIGTERM go to `_handle`.

    Python handles signals in its main thread only: entered in another thread, this does nothing.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            try:
                with _blocked():
                    for number in SIGNALS:
                        self._previous[number] = signal.getsignal(number)
                        signal.signal(number, self._handle)
            except BaseException:  # from a signal that arrived meanwhile
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        with _blocked():
            for number, handler in self._previous.items():
                # None: a handler that was not installed from Python and cannot be restored from Python either
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._on_first(number, frame)
        elif now - self._first > SAME_REQUEST_SECONDS:
            self._on_later(number, frame)

    def _on_first(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError

    def _on_later(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class StopRequest(_Handlers):
    """While entered, the first SIGINT or SIGTERM is only noted in `signal`; a later SIGINT interrupts at once.

    Args:
        announce: say on stderr that the signal was received, as the iteration in progress may take a while.
    """

    def __init__(self, announce: bool = True) -> None:
        super().__init__()
        self.signal = 0
        self._announce = announce

    def _on_first(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if self._announce:
            _say(b"\nStopping after this iteration; Ctrl-C again stops at once, without saving.\n")

    def _on_later(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt


class Interruptible(_Handlers):
    """While entered, SIGTERM raises `SystemExit(143)`, as SIGINT raises `KeyboardInterrupt`, so that the block can
    clean up. A handler that was set before gets the signal instead.

    Within `held` the first signal takes effect at the end of that block, a later one at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0
        self._waiting = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For steps that belong together. Can be nested."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._waiting and not self._depth:
                number, self._waiting = self._waiting, 0
                self._act(number, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._previous[number] is not signal.SIG_IGN:
            super()._handle(number, frame)

    def _on_first(self, number: int, frame: FrameType | None) -> None:
        if self._depth:
            self._waiting = number
        else:
            self._act(number, frame)

    def _on_later(self, number: int, frame: FrameType | None) -> None:
        self._waiting = 0
        self._act(number, frame)

    def _act(self, number: int, frame: FrameType | None) -> None:
        before = self._previous[number]
        if callable(before):
            before(number, frame)
            self._first = None  # that handler did not end the process
        else:
            _say(b"\nterminated\n")
            raise SystemExit(128 + number)
