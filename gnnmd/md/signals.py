"""Signals that ask a simulation to stop between two steps: Ctrl-C, and those of schedulers."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: Ctrl-C; the end of a job (Slurm, Kubernetes); the warning before it (sbatch --signal=USR1@60).
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

#: torchrun passes Ctrl-C on to processes that the terminal has told already; seconds.
_SAME_PRESS = 1.0

_asked = 0
_since = 0.0
_active = False


def asked() -> int:
    """Return the signal that asked this process to stop; 0 if none did."""
    return _asked


def note(number: int) -> None:
    """Take it that a signal has come, if the number is not 0; the first one counts."""
    global _asked, _since
    if number and not _asked:
        _asked, _since = number, time.monotonic()


@contextmanager
def listening() -> Iterator[None]:
    """Note the first signal that asks to stop; a second Ctrl-C raises KeyboardInterrupt.

    Within another such context nothing changes, nor outside the main thread, to which Python delivers
    signals.
    """
    global _asked, _active

    def handle(number: int, frame: FrameType | None) -> None:
        if _asked and number == signal.SIGINT and time.monotonic() - _since > _SAME_PRESS:
            raise KeyboardInterrupt
        note(number)

    if _active or threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked, _active = 0, True
    ours = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in ours}
    try:
        yield
    finally:
        _active = False
        for number, handler in before.items():
            signal.signal(number, handler)
