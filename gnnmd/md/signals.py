"""Signals that ask a simulation to stop between two steps: Ctrl-C, and those of schedulers."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

#: Ctrl-C; the end of a job (Slurm, Kubernetes); the warning before it (sbatch --signal=USR1@60).
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

_asked = 0


def asked() -> int:
    """Return the signal that asked this process to stop; 0 if none did."""
    return _asked


@contextmanager
def listening(then: Callable[[int], None] | None = None) -> Iterator[None]:
    """Note the first signal that asks to stop; a second Ctrl-C raises KeyboardInterrupt.

    Outside the main thread, to which Python delivers signals, nothing changes.

    Args:
        then: called with the number of the first signal, to pass it on.
    """
    global _asked

    def note(number: int, frame: FrameType | None) -> None:
        global _asked
        if _asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, _asked = not _asked, _asked or number
        if first and then:
            then(number)

    _asked = 0
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in ours}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
