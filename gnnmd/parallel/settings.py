"""Where a run takes place: the ``launch`` section of every command that can be given to a scheduler."""

from dataclasses import dataclass
from typing import Literal

from gnnmd.units import seconds


@dataclass
class LaunchConfig:
    """Where and with how much a run is started.

    Attributes:
        kind: "local" runs here and now; "slurm" submits the run as a job, with code and configuration frozen.
            The number of processes follows from nodes and gpus_per_node or tasks_per_node either way; where
            none is said, a local run takes what ``parallel`` or ``workers`` says.
        nodes: hosts of the job.
        gpus_per_node: GPUs of each, with one process for each GPU; 0 computes on CPUs.
        tasks_per_node: processes per host of a job without GPUs.
        cpus_per_task: cores of every process; None is the cluster's default.
        mem: memory per host, "64G"; None is the cluster's default.
        time: longest duration, "[days:]hours:minutes:seconds". A run that is not done by then is saved,
            queued again, and goes on where it stopped.
        partition: of the cluster; None is its default.
        account: who pays; None is the user's default.
        qos: quality of service.
        constraint: features that the hosts must have.
        warn: seconds before the end of the time at which the run is told to save and stop.
        requeues: how often a run that reached the end of its time is queued again.
        at_once: jobs of a sweep that may run at the same time.
        join_timeout: seconds that the processes of a job wait for each other at its start.
        setup: lines of shell before the run, ["module load cuda"].
        sbatch: further options of sbatch, ["reservation=mine", "exclusive"].
        srun: further options of srun, ["--container-image=gnnmd.sqsh"]. On a command line a list with an =
            takes two pairs of quotes: 'launch.srun=["--container-image=gnnmd.sqsh"]'.
        python: command that starts Python in the job, "apptainer exec --nv gnnmd.sif python"; None is the
            Python of the submission.
        folder: where jobs keep their code, configuration and logs.
    """

    kind: Literal["local", "slurm"] = "local"
    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int = 1
    cpus_per_task: int | None = None
    mem: str | None = None
    time: str = "04:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    warn: int = 120
    requeues: int = 100
    at_once: int = 256
    join_timeout: int = 300
    setup: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    python: str | None = None
    folder: str = "jobs"

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("nodes", "tasks_per_node", "cpus_per_task", "at_once", "join_timeout"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("gpus_per_node", "requeues"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.gpus_per_node and self.tasks_per_node not in (1, self.gpus_per_node):
            raise ValueError(
                f"gpus_per_node={self.gpus_per_node} starts one process per GPU: leave tasks_per_node="
                f"{self.tasks_per_node} out, or set gpus_per_node=0 to compute on CPUs"
            )
        if not 10 <= self.warn < seconds(self.time):
            raise ValueError(f"warn={self.warn} must be at least 10 s and less than time={self.time}")
        if self.kind == "local" and self.nodes > 1:
            raise ValueError(f"nodes={self.nodes}, but kind=local is this machine alone; add launch=slurm")

    @property
    def per_node(self) -> int:
        """Processes of each host."""
        return self.gpus_per_node or self.tasks_per_node

    @property
    def processes(self) -> int:
        """Processes of the job."""
        return self.nodes * self.per_node

    @property
    def chosen(self) -> bool:
        """Whether the number of processes was said here."""
        return self.gpus_per_node > 0 or self.processes > 1
