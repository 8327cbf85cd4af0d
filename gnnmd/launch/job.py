"""What every process of a job does: the run, and what follows from its end."""

import os
import shutil
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from gnnmd.launch.commands import COMMANDS
from gnnmd.launch.slurm import job_state, requeue

#: The first error of a job, in its folder; ``%j`` is the job's number.
ERROR = "%j_error.txt"
#: Asks the batch script to queue the job again.
AGAIN = "%j_again"
_STOPPING = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """A signal came while there was nothing to save."""


@dataclass(frozen=True)
class Job:
    """A run in a job; submitit calls it in every process, once more after every requeue.

    Attributes:
        command: key of `COMMANDS`.
        config: its configuration, a file.
        folder: the run folder.
        jobs: the job folder.
        requeues: how often it may be queued again.
    """

    command: str
    config: Path
    folder: Path
    jobs: Path
    requeues: int

    def __call__(self) -> str:
        """Run; returns the run folder if it came to its end, else the process ends here.

        Raises:
            Exception: what went wrong; the first process that fails writes it down.
        """
        sys.argv = ["gnnmd", self.command, str(self.config)]  # what does the same again, for the run's record
        first = int(os.environ.get("SLURM_PROCID", "0")) == 0
        _listen(first)
        try:
            command = COMMANDS[self.command]
            finished = command.run(command.load([str(self.config)]), self.folder) == 0
        except Stopped:
            finished = False
        except BaseException as error:
            self._report(error)
            raise
        if finished:
            return str(self.folder)
        if first:
            self._again()
        sys.exit(0)  # submitit keeps no result then: the job is not done

    def _again(self) -> None:
        """Queue the job again, unless Slurm is taking it away itself: cancelled, preempted, requeued.

        Containers have no commands of Slurm; there the batch script does it, after the last process.
        """
        number = job_number()  # SLURM_JOB_ID of one element of an array is that of the whole array
        able = shutil.which("scontrol") is not None
        if able and job_state(number) != "RUNNING":
            print("stopped by Slurm; if it queues this job again, the run goes on from here", flush=True)
            return
        if int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= self.requeues:
            error = TimeoutError(
                f"the run is not done after {self.requeues} requeues: go on with resume={self.folder} and "
                "more launch.requeues or launch.time"
            )
            self._report(error)
            raise error
        print("queueing this job again; the run goes on from here", flush=True)
        if able:
            requeue(number)
        else:
            (self.jobs / AGAIN.replace("%j", number)).touch()

    def _report(self, error: BaseException) -> None:
        """Write the error down if no other process has written one."""
        rank, size = (os.environ.get(f"SLURM_{name}", "?") for name in ("PROCID", "STEP_NUM_TASKS"))
        text = "".join(traceback.format_exception(error))
        head = f"FAILED: rank {rank} of {size} on {socket.gethostname()}: {type(error).__name__}: {error}"
        try:
            with (self.jobs / ERROR.replace("%j", job_number())).open("x") as file:
                file.write(f"{head}\n\n{text}\n")
        except FileExistsError:
            return


def job_number() -> str:
    """Return the number of this job, as submitit writes it into names of files."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def _listen(first: bool) -> None:
    """Let a signal end the first process while it prepares the run, and none of the others.

    The run itself has better answers and sets them. Others that left would leave the first one waiting for
    them; when it has queued the job again, Slurm ends them.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if first:
            raise Stopped

    for number in _STOPPING:
        signal.signal(number, stop)
