"""The batch files of slurm/, on a real Slurm; on CPUs, as its nodes have GPUs on paper only."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import ase.io
import pytest

from gnnmd.md.shards import steps_in
from tests.slurm.cluster import Unavailable, cluster
from tests.slurm.test_slurm import (
    DYNAMICS,
    EPOCHS,
    REPOSITORY,
    STEPS,
    TRAINING,
    ended,
    epochs,
    slurm,
    start_again,
    wait,
)
from tests.training.conftest import crystals

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster, and a working directory with data; `gnnmd` is that of these tests."""
    before, path, python_path = os.getcwd(), os.environ["PATH"], os.environ.get("PYTHONPATH", "")
    folder = tmp_path_factory.mktemp("scripts")
    command = folder / "bin" / "gnnmd"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m gnnmd "$@"\n')
    command.chmod(0o755)
    try:
        with cluster():
            os.chdir(folder)
            ase.io.write("frames.xyz", crystals("Cu", 6))
            os.environ["PATH"] = f"{command.parent}:{path}"
            os.environ["PYTHONPATH"] = str(REPOSITORY)
            yield
    except Unavailable as reason:
        pytest.skip(f"no real Slurm: {reason}")
    finally:
        os.chdir(before)
        os.environ["PATH"], os.environ["PYTHONPATH"] = path, python_path


def sbatch(script: str, tasks: int, *arguments: str) -> str:
    """Submit a script with GPUs replaced by processes of one core; return the job's number."""
    options = ["--gpus-per-node=0", f"--ntasks-per-node={tasks}", "--cpus-per-task=1", "--time=00:10:00"]
    return slurm("sbatch", "--parsable", *options, str(REPOSITORY / "slurm" / script), *arguments).strip()


def log(job: str) -> str:
    (file,) = Path().glob(f"*-{job}.log")
    return file.read_text()


def warn(job: str) -> None:
    """As Slurm does before the end of a job's time; the job starts again at once."""
    slurm("scancel", "--signal=USR1", job)
    start_again(job)


def test_training_is_saved_queued_again_and_resumed() -> None:
    job = sbatch("train.sbatch", 2, *TRAINING, "parallel.gp=2")
    wait("the run", lambda: any(len(epochs(run)) > 1 for run in Path("runs").glob(f"job-{job}/*")))
    warn(job)
    assert ended(job) == "COMPLETED", log(job)
    (run,) = Path("runs").glob(f"job-{job}/*")
    assert [row.split(",")[0] for row in epochs(run)] == [str(n) for n in range(1, EPOCHS + 1)]
    assert "continuing in" in log(job)


def test_a_failure_ends_the_training() -> None:
    job = sbatch("train.sbatch", 2, *TRAINING, "parallel.gp=2", "data.val=gone.xyz")
    assert ended(job) == "FAILED"
    assert "gone.xyz: no such file" in log(job)


def test_dynamics_are_saved_queued_again_and_resumed() -> None:
    job = sbatch("md.sbatch", 2, *DYNAMICS)
    wait("the run", lambda: steps_in(Path(f"md-{job}.restart")))
    warn(job)
    assert ended(job) == "COMPLETED", log(job)
    frames = ase.io.read(f"md-{job}.extxyz", ":")
    assert [frame.info["step"] for frame in frames] == list(range(0, STEPS + 1, 100))
    assert f"going on from md-{job}.restart with silver to step {STEPS}" in log(job)


def test_strong_scaling_ends_with_a_table() -> None:
    job = sbatch("scaling.sbatch", 2, *TRAINING[:-1])
    assert ended(job) == "COMPLETED", log(job)
    table = log(job).splitlines()[-3:]
    assert table[0].split() == ["ranks", "s/epoch", "speed-up", "efficiency"]
    assert re.match(r" +1 +\d+\.\d{3} +1\.00 +100\.0%", table[1])
    assert re.match(r" +2 +\d+\.\d{3} +\d\.\d\d +\d+\.\d%", table[2])
    assert shutil.which("gnnmd")
