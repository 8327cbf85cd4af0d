import subprocess
import sys
from pathlib import Path

import pytest

from gnnmd.parallel.world import World

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-07,9],login1",
}


def test_torchrun_says_who_is_who() -> None:
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    assert World.from_environment(variables) == World(5, 8, 1, "a", 7)
    assert World.from_environment({**variables, **SRUN}) == World(5, 8, 1, "a", 7)  # torchrun within srun


def test_srun_says_who_is_who() -> None:
    world = World.from_environment(SRUN)
    assert world is not None
    assert (world.rank, world.size, world.local_rank, world.address) == (5, 8, 1, "gpu03")
    alone = World.from_environment({**SRUN, "SLURM_STEP_NUM_NODES": "1"})
    assert alone is not None
    assert alone.address == "127.0.0.1"
    assert World.from_environment({**SRUN, "MASTER_ADDR": "b", "MASTER_PORT": "9"}) == World(5, 8, 1, "b", 9)


def test_steps_that_run_side_by_side_do_not_meet() -> None:
    worlds = [
        World.from_environment({**SRUN, "SLURM_STEP_ID": step, "SLURM_JOB_ID": job})
        for step in ("0", "1", "2")
        for job in ("4711", "4712")
    ]
    ports = {world.port for world in worlds if world}
    assert len(ports) == 6
    assert all(1024 < port < 32_768 for port in ports)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "4", "LOCAL_RANK": "0"},
        {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
    ids=["nothing", "half of torchrun", "a batch script without srun", "srun of one task"],
)
def test_a_process_that_is_alone(variables: dict[str, str]) -> None:
    assert World.from_environment(variables) is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one' is not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2 processes: check RANK and WORLD_SIZE"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST='' names no host; set MASTER_ADDR"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_PROCID"}, "SLURM_PROCID=None is not a number"),
    ],
)
def test_variables_that_make_no_sense_are_named(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        World.from_environment(variables)


JOINING = """
import torch
from gnnmd.parallel import World
world = World.from_environment()
with world.joined("cpu") as ranks, world.joined("cpu") as again:  # the second stays in the first
    assert ranks.group is again.group
    print("sum", int(ranks.sum(torch.tensor(ranks.rank + 1))))
assert not torch.distributed.is_initialized()
"""


def test_srun_processes_find_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Slurm starts them, without torchrun's server."""
    script = tmp_path / "script.py"
    script.write_text(JOINING)
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "localhost")
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    processes = []
    for rank in ("0", "1"):
        monkeypatch.setenv("SLURM_PROCID", rank)
        processes.append(subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True))
    assert [process.communicate(timeout=60)[0] for process in processes] == ["sum 3\n", "sum 3\n"]
