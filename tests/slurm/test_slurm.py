"""Jobs of a real Slurm with two nodes, all submitted at the start; where it cannot run, a skip says why.

``pytest tests/slurm`` takes about two minutes. What the jobs write is in pytest's temporary folder.
"""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, chdir, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import gnnmd
from gnnmd.config import load_config, load_values
from gnnmd.launch import start
from gnnmd.launch.slurm import accounts, job_state, partitions
from gnnmd.md.run import run_md
from gnnmd.md.settings import MDConfig
from gnnmd.md.shards import steps_in
from gnnmd.training.history import COLUMNS, MEASURED
from gnnmd.training.run import train
from tests.slurm.cluster import Unavailable, cluster
from tests.training.conftest import crystals

REPOSITORY = Path(gnnmd.__file__).parents[1]
EPOCHS, STEPS = 30, 600
CPU = ["launch=slurm", "launch.gpus_per_node=0", "launch.cpus_per_task=1", "launch.time=00:10:00"]
TRAINING = [
    "experiment=debug",
    "data=extxyz",
    "data.train=frames.xyz",
    "data.val=frames.xyz@:2",
    "data.max_frames=1",
    "trainer.device=cpu",
    "trainer.precision=float64",
    f"trainer.max_epochs={EPOCHS}",
]
LONGER = "trainer.max_epochs=120"  # where one process makes many epochs in a second
TWO = ["launch.tasks_per_node=2", "parallel.gp=2"]
DYNAMICS = ["repeat=[2,2,2]", "ensemble=nvt", "dtype=float64", "device=cpu", f"steps={STEPS}"]
DYNAMICS += ["restart_interval=20", "skin=0.5"]
LIMIT = 420.0  # seconds, for anything


@dataclass
class Submission:
    """What `gnnmd` said about a job."""

    said: str

    @property
    def job(self) -> str:
        return self.said.split()[1].rstrip(":,")

    def paths(self, word: str) -> list[Path]:
        """Return what is printed behind "run" or "follow"."""
        lines = [line.split() for line in self.said.splitlines()]
        return [Path(words[-1]) for words in lines if words[0] == word]

    @property
    def log(self) -> str:
        return self.paths("follow")[0].read_text()


def submit(name: str, *arguments: str) -> Submission:
    said = io.StringIO()
    with redirect_stdout(said):
        assert start(name, arguments) == 0
    return Submission(said.getvalue())


def submit_here(name: str, *arguments: str) -> Submission:
    """Submit from a checkout, as people do: the current folder comes first in sys.path."""
    command = [sys.executable, "-m", "gnnmd", name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Submission(done.stdout)


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def wait(what: str, condition: Callable[[], Any], limit: float = LIMIT) -> Any:
    """Return the first true answer."""
    deadline = time.monotonic() + limit
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited {limit:.0f} s for {what}"
        time.sleep(0.1)
    return answer


def ended(job: str) -> str:
    """Wait for the end of a job; return its state."""
    final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    return wait(f"the end of job {job}", lambda: (s := job_state(job)) in final and s)


def epochs(run: Path) -> list[str]:
    file = run / "metrics.csv"
    return file.read_text().splitlines()[1:] if file.exists() else []


def interrupt(submission: Submission, *command: str, begun: Callable[[], object]) -> None:
    """Disturb a job in the middle of its run, and let it start again at once, not two minutes later."""
    wait(f"steps of job {submission.job}", begun)
    slurm(*command, submission.job)
    start_again(submission.job)


def start_again(job: str) -> None:
    """Start a requeued job now; Slurm waits two minutes, so that the end of its first start is not taken for
    that of the second.
    """
    wait(f"job {job} in the queue again", lambda: job_state(job) == "PENDING")
    time.sleep(3.0)
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Submission]]:
    folder = tmp_path_factory.mktemp("slurm")
    with ExitStack() as stack:
        try:
            stack.enter_context(cluster())
        except Unavailable as reason:
            pytest.skip(f"no real Slurm: {reason}")
        stack.enter_context(chdir(folder))
        ase.io.write("frames.xyz", crystals("Cu", 6))
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / "gnnmd", "gnnmd", ignore=ignored)
        shutil.copytree(REPOSITORY / "configs", "configs", ignore=ignored)
        pool = stack.enter_context(ThreadPoolExecutor())
        held = pool.submit(
            submit_here,
            "train",
            "-m",
            *TRAINING,
            *CPU,
            "trainer.max_epochs=1",
            "seed=1,2",
            "launch.sbatch=[hold]",
        )
        submitted = {  # short ones first
            "killed": submit("train", *TRAINING, *CPU, *TWO, "trainer.max_epochs=1000"),
            "broken": submit("train", *TRAINING, *CPU, "launch.gpus_per_node=1", "trainer.device=auto"),
            "whole": submit("train", *TRAINING, *CPU, *TWO),
            "preempted": submit(
                "train", *TRAINING, *CPU, "launch.nodes=2", "parallel.gp=2",
                "launch.setup=['export MASTER_ADDR=127.0.0.1']",
            ),
            "warned": submit("train", *TRAINING, *CPU, LONGER),
            "md preempted": submit("md", *DYNAMICS, *CPU, "launch.tasks_per_node=2"),
        }  # fmt: skip
        submitted["held"] = held.result()
        # Nothing of this edit must reach the jobs, not even those that wait.
        Path("gnnmd/__init__.py").write_text("raise RuntimeError('edited after the submission')")
        Path("configs/experiment/debug.yaml").write_text("name: edited\n")
        slurm("scontrol", "release", submitted["held"].job)
        list(pool.map(lambda disturb: disturb(submitted), (preempt, warn, preempt_dynamics, kill_one)))
        yield submitted


def preempt(jobs: dict[str, Submission]) -> None:
    """As a job of more importance does."""
    run = jobs["preempted"].paths("run")[0]
    interrupt(jobs["preempted"], "scontrol", "requeue", begun=lambda: epochs(run))


def warn(jobs: dict[str, Submission]) -> None:
    """As Slurm does some time before the end of a job's time."""
    run = jobs["warned"].paths("run")[0]
    interrupt(jobs["warned"], "scancel", "--signal=USR1", begun=lambda: epochs(run))


def preempt_dynamics(jobs: dict[str, Submission]) -> None:
    restart = jobs["md preempted"].paths("run")[0] / "md.restart"
    interrupt(jobs["md preempted"], "scontrol", "requeue", begun=lambda: steps_in(restart))


def kill_one(jobs: dict[str, Submission]) -> None:
    """As a machine that runs out of memory does."""
    killed = jobs["killed"]
    wait("steps of the job to kill", lambda: epochs(killed.paths("run")[0]))
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        mine = {f"SLURM_JOB_ID={killed.job}".encode(), b"SLURM_PROCID=1"} <= set(variables)
        if mine and b"submitit" in command and b"python" in command.split(b"\0")[0]:
            os.kill(int(process.name), signal.SIGKILL)


def same_run(run: Path, expected: Path) -> None:
    """Check that two runs made the same steps and ended with the same weights."""
    table, reference = (np.genfromtxt(r / "metrics.csv", delimiter=",", names=True) for r in (run, expected))
    for column in set(COLUMNS) - set(MEASURED):
        # Sums over an epoch begin anew when it goes on.
        np.testing.assert_allclose(table[column], reference[column], rtol=1e-12, err_msg=column)
    weights, others = (load_file(r / "last.safetensors") for r in (run, expected))
    assert all(np.array_equal(weights[name], others[name]) for name in others)


def restarts(job: str) -> int:
    return int(re.search(r"Restarts=(\d+)", slurm("scontrol", "show", "job", job))[1])


def test_training_on_two_processes_comes_to_its_end(jobs: dict[str, Submission]) -> None:
    whole = jobs["whole"]
    assert ended(whole.job) == "COMPLETED", whole.log
    assert "2 processes: dp=1 replicas of gp=2 ranks" in whole.log
    assert f"scancel {whole.job}" in whole.said
    assert len(epochs(whole.paths("run")[0])) == EPOCHS


def test_a_training_preempted_on_two_hosts_ends_like_one_that_was_not(jobs: dict[str, Submission]) -> None:
    preempted = jobs["preempted"]
    assert ended(preempted.job) == "COMPLETED", preempted.log
    assert restarts(preempted.job) == 1
    assert "NodeList=n[1-2]" in slurm("scontrol", "show", "job", preempted.job)
    assert "stopped by Slurm" in preempted.log  # which queues the job again itself
    assert "continuing in" in preempted.log
    assert ended(jobs["whole"].job) == "COMPLETED"
    same_run(preempted.paths("run")[0], jobs["whole"].paths("run")[0])


def test_a_training_at_the_end_of_its_time_goes_on_in_the_next_job(jobs: dict[str, Submission]) -> None:
    warned = jobs["warned"]
    assert ended(warned.job) == "COMPLETED", warned.log
    assert restarts(warned.job) == 1
    assert "queueing this job again" in warned.log
    assert "continuing in" in warned.log
    reference = train(load_config([*TRAINING, LONGER, "runs=reference", "trainer.progress=none"])).folder
    same_run(warned.paths("run")[0], reference)


def test_preempted_dynamics_end_like_those_that_were_not(jobs: dict[str, Submission]) -> None:
    preempted = jobs["md preempted"]
    assert ended(preempted.job) == "COMPLETED", preempted.log
    assert restarts(preempted.job) == 1
    files = ["trajectory=whole.extxyz", "restart=null", "log=null", "workers=2"]
    reference = run_md(load_values(MDConfig, [*DYNAMICS, *files])).simulation
    frames, expected = (
        ase.io.read(f, ":") for f in (preempted.paths("run")[0] / "md.extxyz", "whole.extxyz")
    )
    assert [frame.info["step"] for frame in frames] == [frame.info["step"] for frame in expected]
    assert reference.step == frames[-1].info["step"] == STEPS
    assert np.array_equal(frames[-1].positions, expected[-1].positions)


def test_a_sweep_is_an_array_and_edits_after_its_submission_do_not_reach_it(
    jobs: dict[str, Submission],
) -> None:
    held = jobs["held"]
    runs = held.paths("run")
    for i, run in enumerate(runs):
        assert ended(f"{held.job}_{i}") == "COMPLETED", held.paths("follow")[i].read_text()
        assert f"seed: {i + 1}\n" in (run / "config.yaml").read_text()
        assert len(epochs(run)) == 1
    assert len(runs) == 2
    assert epochs(runs[0]) != epochs(runs[1])


def test_a_job_that_fails_shows_its_first_error_first(jobs: dict[str, Submission]) -> None:
    """It finds no GPU, and does not take the CPU instead."""
    broken = jobs["broken"]
    if torch.cuda.is_available():
        pytest.skip("the GPUs of this Slurm are on paper, but there are real ones")
    assert ended(broken.job) == "FAILED"
    first = wait("the error in the log", lambda: (t := broken.log).startswith("FAILED") and t.splitlines()[0])
    assert re.match(
        r"FAILED: rank 0 of 1 on \S+: ValueError: trainer.device=cuda, but torch finds no GPU", first
    )


def test_the_death_of_one_process_ends_the_job(jobs: dict[str, Submission]) -> None:
    assert ended(jobs["killed"].job) == "FAILED"
    first = wait(
        "the error in the log", lambda: (t := jobs["killed"].log).startswith("FAILED") and t.splitlines()[0]
    )
    assert re.match(r"FAILED: n[12]: task 1: Killed", first)


def test_what_slurm_says_is_understood(jobs: dict[str, Submission]) -> None:
    known = partitions()
    assert known["debug"].default
    assert (known["debug"].nodes, known["debug"].gpus, known["debug"].limit) == (2, 2, 3600)
    assert not known["down"].up
    assert known["down"].limit is None
    assert accounts() == set()  # there is no accounting
    assert job_state("99999") == "UNKNOWN"
