"""Ctrl-C between steps that belong together, not within one."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def interrupt_held() -> Iterator[None]:
    """Ctrl-C within the block takes effect at its end; a second one at once.

    Of the main thread, which is where Python delivers signals; in others, and where SIGINT is handled outside Python,
    the block runs as it is.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    held = False

    def hold(*_: object) -> None:
        nonlocal held
        held = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)
