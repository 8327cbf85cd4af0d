"""Records in files: each step once, whatever was interrupted; slow writing beside the simulation."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from gnnmd.md.reporters.base import Reporter, View
from gnnmd.parallel import Ranks


class Recorder(Reporter):
    """A reporter that writes one record per reported step.

    A run that begins at step 0 replaces the file of an earlier one. A run that is resumed keeps the records
    up to its first step, and drops those after it: they come again.
    """

    _newest: int | None = None
    _ranks = Ranks()

    def begin(self, view: View) -> None:
        """Cut the file back, unless it ends where the run begins. Collective."""
        self._ranks = view.engine.ranks
        if self._newest is None or view.step == 0 or view.step < self._newest:
            self._newest = self._open(view, keep=view.step if view.step else -1)

    def report(self, view: View) -> dict[str, Any] | None:
        """Write a record, unless the file has it. Collective."""
        if self._newest is not None and view.step <= self._newest:
            return None
        self._newest = view.step
        return self._write(view)

    def _open(self, view: View, keep: int) -> int:
        """Drop records of steps after ``keep``; return the last step there is, -1 if none. Collective."""
        raise NotImplementedError

    def _write(self, view: View) -> dict[str, Any] | None:
        """Write the record of this step; see `Reporter.report`. Collective."""
        raise NotImplementedError


class Beside:
    """One job at a time on a thread of its own; Python waits for the last one before it ends."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gnnmd-writer")
        self._job: Future[None] | None = None

    def start(self, job: Callable[..., None], *args: Any) -> None:
        """Start a job; `finish` the one before first."""
        self._job = self._thread.submit(job, *args)

    def finish(self) -> None:
        """Wait for the job, if there is one, and raise what it raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()


def cannot_write(path: object, step: int, error: OSError) -> OSError:
    """Return the error to raise when a record could not be written."""
    return OSError(
        error.errno,
        f"{path} could not be written at step {step}: {error.strerror or error}. Earlier steps are "
        "complete. Make room or choose another path, then go on from the last restart",
    )
