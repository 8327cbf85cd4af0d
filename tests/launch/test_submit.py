"""What is queued, what is refused before, and what the user is told."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import gnnmd
from gnnmd import cli
from gnnmd.config import load_config, load_values
from gnnmd.launch import start
from gnnmd.launch.commands import COMMANDS, place_groups
from gnnmd.launch.freeze import freeze
from gnnmd.launch.submit import _TEARDOWN
from gnnmd.md.settings import MDConfig
from gnnmd.parallel.settings import LaunchConfig
from tests.launch.conftest import Commands


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], name: str = "train") -> str:
    """Return the one line that a command ends with; nothing is queued and nothing is left behind."""
    before = sorted(os.listdir())
    assert cli.main([name, *arguments]) == 1
    assert sorted(os.listdir()) == before
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["launch.partition=gpus"], "launch.partition=gpus: no such partition; there are debug, gpu, old"),
        (
            ["launch.partition=old"],
            "partition old is down (sinfo -p old): set launch.partition to another one",
        ),
        (["launch.nodes=4"], "launch.gpus_per_node=1, but the nodes of partition debug have no GPUs"),
        (
            ["launch.gpus_per_node=0", "launch.nodes=5"],
            "launch.nodes=5, but partition debug has 4: take fewer",
        ),
        (["launch.partition=gpu", "launch.gpus_per_node=9"], "gpu have 8 GPUs: take 8 at most"),
        (["launch.gpus_per_node=0", "launch.time=02:00:00"], "more than partition debug allows, 01:00:00"),
        (["launch.nodes=2", "launch.gpus_per_node=4", "parallel.gp=3"], "gp=3 x parallel.dp=2 needs 6"),
        (
            ["launch.nodes=3", "launch.gpus_per_node=4", "parallel.gp=3"],
            "gp=3 does not divide the 4 processes",
        ),
        (
            ["launch.gpus_per_node=2", "launch.tasks_per_node=3"],
            "launch: gpus_per_node=2 starts one process per",
        ),
        (["launch.warn=5"], "launch: warn=5 must be at least 10 s and less than time=00:30:00"),
        (["resume=gone"], "resume=gone: no last.ckpt there"),
        (["init_from=gone.safetensors"], "gone.safetensors"),
        (["data.val=gone.xyz"], "gone.xyz: no such file or directory"),
        (["launch.gpus_per_node=0", "runs=/proc/runs"], "cannot write to /proc/runs/"),
        (["launch.gpus_per_node=0", "launch.folder=/proc/jobs"], "cannot write to /proc/jobs (/proc: "),
        (["launch.partiton=gpu"], "did you mean 'launch.partition'?"),
        (["launch=slrum"], "launch=slrum: no such preset, did you mean 'slurm'?"),
        (["launch=local", "launch.nodes=2"], "launch: nodes=2, but kind=local is this machine alone"),
        (["launch=local", "launch.tasks_per_node=3", "parallel.gp=2"], "launch.tasks_per_node=3 starts 3"),
        (["launch=local", "launch.gpus_per_node=2"], "trainer.device=cuda, but torch finds no GPU"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_queued(
    arguments: list[str],
    message: str,
    data: list[str],
    commands: Commands,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in refused([*data, *arguments], capsys)
    assert not commands.submitted


def test_a_foreign_account_is_refused_where_slurm_keeps_accounts(
    data: list[str], commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [*data, "launch.gpus_per_node=0", "launch.account=rich"]
    commands.says("sacctmgr", "physics\nchemistry\n")
    assert refused(data, capsys).endswith("launch.account=rich is not one of yours: chemistry, physics")
    commands.says("sacctmgr", "", code=1)
    assert start("train", data) == 0


def test_a_machine_without_slurm_is_told_from_one_whose_slurm_is_silent(
    data: list[str], commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.says("sinfo", "slurm_load_partitions: Unable to contact slurm controller", code=1)
    assert "Slurm does not answer sinfo (slurm_load_partitions: Unable" in refused(data, capsys)
    (commands.folder / "sbatch").unlink()
    assert "there is no sbatch here: log in to the cluster, or use launch=local" in refused(data, capsys)


def test_what_sbatch_says_is_shown_in_one_line(
    data: list[str], commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.says("sbatch", "sbatch: error: QOSMaxWallDurationPerJobLimit\nsbatch: error: policy", code=1)
    message = refused([*data, "launch.gpus_per_node=0"], capsys)
    assert "Slurm refuses the job: QOSMaxWallDurationPerJobLimit policy; see launch.*" in message


def test_a_run_of_another_model_is_not_resumed(data: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *data[:-2], "launch=local", "trainer.device=cpu"]) == 0
    (run,) = Path("runs").iterdir()
    capsys.readouterr()
    arguments = [f"resume={run}", "launch.kind=slurm", "launch.time=00:30:00", "model.channels=8"]
    message = refused(arguments, capsys)
    assert "that run has model.channels=4, this configuration has not. Drop the change" in message
    message = refused([*arguments[:-1], "optim.lr=1", "loss.forces.weight=2"], capsys)
    assert "that run has loss.forces.weight=1.0, optim.lr=" in message


@pytest.mark.parametrize("name", ["train", "md"])
def test_a_local_run_takes_as_many_processes_as_a_job_would(
    name: str, data: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    command = replace(COMMANDS[name], run=lambda config, folder: taken.append(config) or 0)
    monkeypatch.setitem(COMMANDS, name, command)
    arguments = data[:-2] if name == "train" else ["structure=Ag"]
    for more in ([], ["launch.tasks_per_node=2"]):
        assert cli.main([name, *arguments, "launch.kind=local", *more]) == 0
    if name == "train":
        assert [c.parallel.dp for c in taken] == [None, 2]
    else:
        assert [c.workers for c in taken] == [None, 2]


def test_processes_of_srun_do_not_submit(
    data: list[str], commands: Commands, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun or srun has started this process" in refused(data, capsys)


def test_graphs_stay_on_one_host_or_fill_several() -> None:
    eight = LaunchConfig("slurm", nodes=4, gpus_per_node=8)
    for gp in (1, 2, 4, 8, 16, 32):
        place_groups(gp, eight)
    with pytest.raises(ValueError, match="gp=3 does not divide the 8 processes of a host.*one of 1, 2, 4, 8"):
        place_groups(3, eight)
    with pytest.raises(ValueError, match="gp=12 is more than the 8 processes of a host.*set gp to 8 or 16"):
        place_groups(12, eight)


def test_the_mesh_follows_from_the_nodes(
    data: list[str], commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["launch.partition=gpu", "launch.nodes=2", "launch.gpus_per_node=8", "parallel.gp=4"]
    assert start("train", [*data, *arguments, "launch.cpus_per_task=6"]) == 0
    (script,) = commands.submitted
    for option in (
        "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=6", "--partition=gpu",
        "--time=30", "--signal=USR1@120", "--requeue", "--open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH {option}\n" in script
    assert "--kill-on-bad-exit=1 --distribution=block --cpus-per-task 6" in script
    (config,) = Path("jobs").glob("*/config_0.yaml")
    frozen = load_config([str(config)])
    assert (frozen.parallel.gp, frozen.parallel.dp) == (4, 4)
    assert frozen.trainer.device == "cuda"  # a node without its GPUs must not compute on CPUs
    said = capsys.readouterr().out
    (run,) = Path("runs").iterdir()
    for words in (
        "job 17: training debug as dp=4 x gp=4 (2 x 8 processes, at most 00:30:00)", f"run     {run}",
        f"tail -F {config.parent.absolute()}/17_0_log.out", "squeue -j 17", "scancel 17",
    ):  # fmt: skip
        assert words in said


def test_options_of_a_site_reach_the_script(data: list[str], commands: Commands) -> None:
    arguments = [
        "launch.gpus_per_node=0",
        "launch.setup=[module load cuda]",
        "launch.sbatch=[exclusive, '--reservation=mine']",
        "launch.srun=['--container-image=gnnmd.sqsh']",
        "launch.python=apptainer exec --nv gnnmd.sif python",
    ]
    assert start("train", [*data, *arguments]) == 0
    (script,) = commands.submitted
    for line in ("#SBATCH --exclusive", "#SBATCH --reservation=mine", "module load cuda"):
        assert f"\n{line}\n" in script
    assert "--container-image=gnnmd.sqsh" in script
    assert "apptainer exec --nv gnnmd.sif python -P -u -m submitit" in script


@pytest.mark.parametrize(
    ("srun", "top"),
    [
        (
            "srun: error: n1: task 1: Exited with exit code 1\nsrun: error: n1: task 0: Killed",
            "rank 1: bad data",
        ),
        (
            "srun: error: n1: task 1: Killed\nsrun: error: n1: task 0: Exited with exit code 1",
            "FAILED: n1: task 1: Killed",
        ),
    ],
    ids=["raised", "killed"],
)
def test_the_first_error_goes_to_the_top_of_the_log(srun: str, top: str, tmp_path: Path) -> None:
    error, log = tmp_path / "error", tmp_path / "log"
    error.write_text("rank 1: bad data\n")
    log.write_text(f"epoch 1\n{srun}\n")
    script = f"error={error} log={log}\n(exit 7)\n{_TEARDOWN}"
    assert subprocess.run(["/bin/bash", "-c", script], check=False).returncode == 7
    lines = log.read_text().splitlines()
    assert lines[0] == top
    assert lines[-3:] == ["epoch 1", *srun.splitlines()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["error", "log"]


@pytest.mark.parametrize("state", ["RUNNING", "CANCELLED"])
def test_the_batch_script_queues_a_saved_run_again_unless_slurm_ends_it(
    state: str, tmp_path: Path, commands: Commands
) -> None:
    commands.says("scontrol", f"JobId=17 JobState={state} Reason=None")
    (tmp_path / "log").touch()
    (tmp_path / "again").touch()
    environment = f"error={tmp_path}/error log={tmp_path}/log again={tmp_path}/again number=17_4"
    environment += f" PATH={commands.folder}:/usr/bin:/bin"
    code = subprocess.run(
        ["/bin/bash", "-c", f"{environment}\n(exit 3)\n{_TEARDOWN}"], check=False
    ).returncode
    assert ("scontrol requeue 17_4" in commands.calls) == (state == "RUNNING")
    assert code == (0 if state == "RUNNING" else 3)


def test_a_log_without_errors_stays_as_it_is(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("epoch 1\n")
    script = f"error={tmp_path}/error log={log}\n(exit 0)\n{_TEARDOWN}"
    assert subprocess.run(["/bin/bash", "-c", script], check=False).returncode == 0
    assert log.read_text() == "epoch 1\n"


def test_a_sweep_is_one_array_per_kind_of_machine(
    data: list[str], commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["launch.partition=gpu", "launch.gpus_per_node=1,2", "optim.lr=1e-3,1e-4", "seed=range(0,2)"]
    assert start("train", ["-m", *data, *arguments, "launch.at_once=3"]) == 0
    assert [s.count("#SBATCH --array=0-3%3\n") for s in commands.submitted] == [1, 1]
    configs = [load_config([str(file)]) for file in Path("jobs").glob("*/config_*.yaml")]
    assert len(configs) == 8
    assert len({(c.parallel.dp, c.optim.lr, c.seed) for c in configs}) == 8
    runs = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  run ")]
    assert len(set(runs)) == 8


def test_a_sweep_with_one_mistake_queues_nothing(
    data: list[str], commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["-m", *data, "launch.partition=gpu,gpus"], capsys)
    assert "launch.partition=gpus: no such partition" in line
    assert not commands.submitted


def test_a_sweep_here_runs_one_after_the_other(
    data: list[str], capsys: pytest.CaptureFixture[str], commands: Commands
) -> None:
    small = [*data[:-2], "trainer.device=cpu", "name=one", "seed=0,1", "trainer.precision=bf16-mixed,float32"]
    Path("frames2.xyz").write_text("no frames")
    arguments = ["-m", *small[:2], "data.train=frames.xyz,frames2.xyz", *small[3:5], "trainer.progress=none"]
    assert start("train", arguments) == 1
    captured = capsys.readouterr()
    assert "run 1 of 2: data.train=frames.xyz" in captured.out
    assert "run 2 of 2: data.train=frames2.xyz" in captured.out
    assert captured.err.endswith("failed: data.train=frames2.xyz\n")
    (run,) = Path("runs").glob("*-one")
    assert (run / "best.safetensors").exists()


def test_dynamics_get_a_folder_of_their_own(commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["launch=slurm", "launch.gpus_per_node=0", "launch.time=00:30:00", "temperature=300,600"]
    assert start("md", ["-m", *arguments, "steps=10"]) == 0
    assert "job 17, an array of 2: nve of Ag, 10 steps" in capsys.readouterr().out
    configs = [load_values(MDConfig, [str(file)]) for file in sorted(Path("jobs").glob("*/config_*.yaml"))]
    assert [config.temperature for config in configs] == [300, 600]
    folders = [Path(str(config.restart)).parent for config in configs]
    assert sorted(folders) == sorted(path.absolute() for path in Path("runs").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["structure=gone.xyz"], "structure='gone.xyz' is neither a file"),
        (["model=gone.safetensors"], "gone.safetensors"),
        (["resume=true"], "resume=true, but md.restart holds no restart: leave resume out"),
        (["launch.tasks_per_node=2", "workers=4"], "workers=4, but the workers of a job are its 2 processes"),
    ],
)
def test_dynamics_that_cannot_run_are_refused_before_they_are_queued(
    arguments: list[str], message: str, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu = ["launch=slurm", "launch.gpus_per_node=0", "launch.time=00:30:00"]
    assert message in refused([*cpu, *arguments], capsys, "md")
    assert not commands.submitted


def test_dynamics_that_would_be_others_are_not_queued(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["md", "repeat=[2,2,2]", "ensemble=nvt", "steps=2", "device=cpu"]) == 0
    capsys.readouterr()
    cpu = ["launch=slurm", "launch.gpus_per_node=0", "launch.time=00:30:00", "resume=true"]
    line = refused([*cpu, "timestep=2", "repeat=[3,3,3]"], capsys, "md")
    assert "the run in md.restart has repeat=(2, 2, 2), timestep=5.0, this configuration has not" in line
    assert start("md", [*cpu, "steps=9", "launch.tasks_per_node=2", "trajectory=null"]) == 0
    (file,) = Path("jobs").glob("*/config_0.yaml")
    queued = load_values(MDConfig, [str(file)])
    assert (queued.repeat, queued.ensemble, queued.steps) == ((2, 2, 2), "nvt", 9)  # as that run was


def test_frozen_code_comes_first_wherever_python_starts(tmp_path: Path) -> None:
    code = freeze(tmp_path)
    assert not list(code.rglob("__pycache__"))
    (code / "gnnmd" / "__init__.py").write_text("__version__ = 'frozen'")
    show = "import gnnmd, sys; print(gnnmd.__version__)"
    found = subprocess.run(
        [sys.executable, "-P", "-c", show],
        cwd=Path(gnnmd.__file__).parents[1],  # where another gnnmd lies
        env={**os.environ, "PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "frozen\n"


def test_frozen_code_finds_its_own_presets(tmp_path: Path) -> None:
    code = freeze(tmp_path)
    (code / "gnnmd" / "configs" / "launch" / "mine.yaml").write_text("kind: local\n")
    show = "from gnnmd.config import groups; print(groups()['launch'])"
    found = subprocess.run(
        [sys.executable, "-P", "-c", show],
        env={**os.environ, "PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "['local', 'mine', 'slurm']\n"
