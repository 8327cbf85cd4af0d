"""Signals that ask a simulation to stop between two steps: Ctrl-C, and those of schedulers."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: Ctrl-C; the end of a job (Slurm, Kubernetes); the warning before it (sbatch --signal=USR1@60).
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

#: torchrun passes Ctrl-C on to processes that the terminal has told already; seconds.
_SAME_PRESS = 1.0
#: A process that SIGTERM reaches in a call that takes longer waits for a rank that has died. Schedulers and
#: torchrun give it 30 s. Seconds.
PATIENCE = 25.0

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
    signals. It delivers them between two instructions of its own, to which a rank whose GPU waits for one
    that was killed never comes: `PATIENCE` after SIGTERM the process is ended.
    """
    global _asked, _active

    delivered = threading.Event()  # SIGTERM, or the end

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            delivered.set()
        if _asked and number == signal.SIGINT and time.monotonic() - _since > _SAME_PRESS:
            raise KeyboardInterrupt
        note(number)

    if _active or threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked, _active = 0, True
    ours = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in ours}
    read, write = os.pipe()
    os.set_blocking(write, False)
    fd_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read, delivered), daemon=True).start()
    try:
        yield
    finally:
        _asked, _active = 0, False
        signal.set_wakeup_fd(fd_before)
        delivered.set()
        os.close(write)  # which ends the thread
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(arriving: int, delivered: threading.Event) -> None:
    """Read signals as they arrive; end the process if SIGTERM does not reach its handler."""
    with open(arriving, "rb", buffering=0) as stream:
        while number := stream.read(1):
            if number[0] == signal.SIGTERM and not delivered.wait(PATIENCE):
                print(
                    f"SIGTERM found this process waiting, for {PATIENCE:.0f} s now: a rank has died. It ends "
                    "without a restart; go on from the last one",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(128 + signal.SIGTERM)
