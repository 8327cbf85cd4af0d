"""How a process of a job ends, and what follows."""

import os
import signal
from pathlib import Path

import pytest

from gnnmd.launch import job as jobs
from gnnmd.launch.commands import Command
from gnnmd.launch.job import Job
from gnnmd.launch.slurm import duration, job_state
from gnnmd.runs.record import command
from tests.launch.conftest import Commands


def job_of(monkeypatch: pytest.MonkeyPatch, folder: Path, run, **variables: str) -> Job:
    """Return a job whose run is a function of the run folder; this process is one of it."""
    test = Command(lambda a: a, lambda c: c, lambda c: (c, folder), lambda c, f: 0 if run(f) else 138, str)
    monkeypatch.setitem(jobs.COMMANDS, "test", test)
    monkeypatch.setattr("sys.argv", ["_submit.py", str(folder)])
    given = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", **variables}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return Job("test", folder / "config.yaml", folder / "run", folder, requeues=3)


@pytest.fixture(autouse=True)
def _signals(monkeypatch: pytest.MonkeyPatch):
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def requeued(commands: Commands) -> list[str]:
    return [call for call in commands.calls if call.startswith("scontrol requeue")]


def test_a_run_that_comes_to_its_end_is_the_result(commands: Commands, tmp_path, monkeypatch) -> None:
    assert job_of(monkeypatch, tmp_path, lambda folder: True)() == str(tmp_path / "run")
    assert not commands.calls


def test_the_record_of_a_job_holds_a_command_to_type(commands: Commands, tmp_path, monkeypatch) -> None:
    found: list[str] = []
    job_of(monkeypatch, tmp_path, lambda folder: found.append(command()) or True)()
    assert found == [f"gnnmd test {tmp_path}/config.yaml"]


def test_a_saved_run_is_queued_again_by_the_first_process(commands: Commands, tmp_path, monkeypatch) -> None:
    commands.says("scontrol", "JobId=17 JobState=RUNNING Reason=None")
    for rank in ("0", "1"):
        with pytest.raises(SystemExit) as end:
            job_of(monkeypatch, tmp_path, lambda folder: False, SLURM_PROCID=rank)()
        assert end.value.code == 0  # no failure: the others go on saving
    assert requeued(commands) == ["scontrol requeue 17"]


def test_in_a_container_the_batch_script_is_asked_to_queue_the_job_again(
    commands: Commands, tmp_path, monkeypatch
) -> None:
    for path in commands.folder.iterdir():
        path.unlink()  # all commands of Slurm
    with pytest.raises(SystemExit):
        job_of(monkeypatch, tmp_path, lambda folder: False)()
    assert (tmp_path / "17_again").exists()
    with pytest.raises(TimeoutError):
        job_of(monkeypatch, tmp_path, lambda folder: False, SLURM_RESTART_COUNT="3")()


def test_one_run_of_a_sweep_is_queued_again_without_the_others(
    commands: Commands, tmp_path, monkeypatch
) -> None:
    commands.says("scontrol", "JobId=17 ArrayJobId=17 ArrayTaskId=4 JobState=RUNNING")
    array = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "4"}
    with pytest.raises(SystemExit):
        job_of(monkeypatch, tmp_path, lambda folder: False, **array)()
    assert requeued(commands) == ["scontrol requeue 17_4"]


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", "PREEMPTED"])
def test_a_job_that_slurm_ends_is_not_queued_again(
    state: str, commands: Commands, tmp_path, monkeypatch, capsys
) -> None:
    commands.says("scontrol", f"JobId=17 JobState={state} Reason=None")
    with pytest.raises(SystemExit):
        job_of(monkeypatch, tmp_path, lambda folder: False)()
    assert not requeued(commands)
    assert "stopped by Slurm" in capsys.readouterr().out


def test_a_run_that_never_ends_is_not_queued_for_ever(commands: Commands, tmp_path, monkeypatch) -> None:
    commands.says("scontrol", "JobId=17 JobState=RUNNING Reason=None")
    with pytest.raises(TimeoutError, match="not done after 3 requeues: go on with resume=.*/run"):
        job_of(monkeypatch, tmp_path, lambda folder: False, SLURM_RESTART_COUNT="3")()
    assert not requeued(commands)
    assert (tmp_path / "17_error.txt").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_ends_the_first_process_only(
    number: int, commands: Commands, tmp_path, monkeypatch
) -> None:
    commands.says("scontrol", "JobId=17 JobState=RUNNING Reason=None")

    def prepare(folder: Path) -> bool:
        os.kill(os.getpid(), number)
        return True

    assert job_of(monkeypatch, tmp_path, prepare, SLURM_PROCID="1")()
    with pytest.raises(SystemExit):
        job_of(monkeypatch, tmp_path, prepare)()
    assert requeued(commands) == ["scontrol requeue 17"]


def test_the_first_error_of_a_job_is_kept(commands: Commands, tmp_path, monkeypatch) -> None:
    def fail(folder: Path) -> bool:
        raise ValueError(f"bad data on rank {os.environ['SLURM_PROCID']}")

    for rank in ("1", "0"):
        with pytest.raises(ValueError, match="bad data"):
            job_of(
                monkeypatch,
                tmp_path,
                fail,
                SLURM_PROCID=rank,
                SLURM_ARRAY_JOB_ID="17",
                SLURM_ARRAY_TASK_ID="4",
            )()
    text = (tmp_path / "17_4_error.txt").read_text()
    assert text.startswith("FAILED: rank 1 of 2 on ")
    assert "ValueError: bad data on rank 1\n\nTraceback" in text


def test_the_state_of_a_job_is_known_with_and_without_accounting(commands: Commands) -> None:
    commands.says("scontrol", "JobId=5 JobName=a JobState=FAILED Reason=NonZeroExitCode")
    assert job_state("5") == "FAILED"
    commands.says("scontrol", "slurm_load_jobs error: Invalid job id specified", code=1)
    assert job_state("5") == "UNKNOWN"
    commands.says("sacct", "CANCELLED by 0\n")
    assert job_state("5") == "CANCELLED"
    (commands.folder / "sacct").unlink()
    (commands.folder / "scontrol").unlink()
    assert job_state("5") == "UNKNOWN"


def test_durations_are_written_as_they_are_read() -> None:
    assert duration(90 * 60) == "01:30:00"
    assert duration(2 * 86_400 + 60) == "2:00:01:00"
