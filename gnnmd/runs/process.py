"""Which process a record is of, and whether that one is gone; without imports that take time."""

import os
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """Return what tells this process from all others; where the kernel says less (macOS), only its number."""
    known: dict[str, Any] = {"pid": os.getpid()}
    try:
        return {**known, "began": _began(os.getpid()), **_kernel()}
    except OSError:
        return known


def is_gone(process: Any) -> bool | None:
    """Return whether the process of a record has ended; None where this machine or container cannot know."""
    if not isinstance(process, dict):
        return None
    try:
        if any(process.get(name) != value for name, value in _kernel().items()):
            return None
        pid = int(process["pid"])
        try:
            return bool(process["began"] != _began(pid))
        except FileNotFoundError:  # or hidden from other users, who learn by a signal that is none
            os.kill(pid, 0)
            return None
    except ProcessLookupError:
        return True
    except (OSError, KeyError, TypeError, ValueError, OverflowError):
        return None


def _kernel() -> dict[str, str]:
    """Return what numbers of processes belong to: a start of the machine, and a container on it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"boot": boot, "namespace": os.readlink("/proc/self/ns/pid")}


def _began(pid: int) -> int:
    """Return when a process began, in ticks since the start of the machine: numbers are used again."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if fields[0] in "ZX":  # dead, and not yet collected by its parent
        raise ProcessLookupError
    return int(fields[19])
