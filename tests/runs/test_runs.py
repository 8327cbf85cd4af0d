import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gnnmd import cli
from gnnmd.runs import record
from gnnmd.runs.process import is_gone, this_process
from gnnmd.runs.record import RECORD, RunRecord, command
from gnnmd.runs.table import differences, read_run


def read(folder):
    return json.loads((folder / RECORD).read_text())


def make_run(folder, lr, error):
    with RunRecord() as run:
        run.start(folder, "train", {"name": folder.name, "seed": 0})
    (folder / "config.yaml").write_text(
        f"model: {{type: escn_md}}\ndata: {{train: [/data/a.xyz]}}\nparallel: {{gp: 2, dp: 1}}\n"
        f"optim: {{lr: {lr}}}\n"
    )
    (folder / "metrics.csv").write_text(
        "epoch,step,seconds,val_loss,val_energy_mae,val_forces_mae\n"
        f"1,5,10.0,0.1,0.002,{error}\n2,10,3661.0,0.2,0.003,0.9\n"
    )
    (folder / "errors.json").write_text('{"split": "test", "energy_mae": 0.001, "forces_mae": 0.25}')


def test_record_tells_state_code_and_machine_while_running_and_after(tmp_path):
    with RunRecord() as run:
        run.start(tmp_path, "train", {"name": "a", "seed": 3})
        assert read(tmp_path)["state"] == "running"
        run.finish("finished", errors={"energy_mae": 0.5})
    said = read(tmp_path)
    session = said["sessions"][0]
    assert (said["state"], said["seed"], said["results"]) == ("finished", 3, {"errors": {"energy_mae": 0.5}})
    assert {"torch", "python", "gnnmd", "lightning", "numpy"} <= set(session["versions"])
    assert session["command"]
    assert session["host"]
    assert session["end"] >= session["start"]
    assert [path.name for path in tmp_path.iterdir()] == [RECORD]  # nothing partial is left


@pytest.mark.parametrize(("error", "state"), [(KeyboardInterrupt, "interrupted"), (ValueError, "failed")])
def test_record_tells_how_a_run_broke_and_a_resumed_one_keeps_it(tmp_path, error, state):
    def break_down():
        with RunRecord() as run:
            run.start(tmp_path, "train", {})
            raise error("why")

    with pytest.raises(error):
        break_down()
    assert read(tmp_path)["state"] == state
    with RunRecord() as run:
        run.start(tmp_path, "train", {})
    first, second = read(tmp_path)["sessions"]
    assert (first["state"], second["state"]) == (state, "finished")
    assert "why" in first["error"]


def test_record_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with RunRecord() as run:
        run.start(tmp_path, "train", {})
    assert "secret-key" not in (tmp_path / RECORD).read_text()
    assert read(tmp_path)["sessions"][0]["environment"]["OMP_NUM_THREADS"] == "1"


def test_git_state_sees_a_change_and_not_a_foreign_repository(tmp_path):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        record.subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True)

    (tmp_path / "__init__.py").write_text("")
    assert record.git_state(tmp_path) is None
    git("init")
    assert record.git_state(tmp_path) is None  # not tracked
    git("add", ".")
    git("commit", "-m", "a")
    state = record.git_state(tmp_path)
    assert len(state["commit"]) == 40
    assert not state["dirty"]
    (tmp_path / "__init__.py").write_text("1")
    assert record.git_state(tmp_path)["dirty"]


def test_a_row_holds_the_errors_of_the_best_epoch(tmp_path):
    make_run(tmp_path / "a", 0.01, 0.125)
    row = read_run(tmp_path / "a")["row"]
    assert (row["state"], row["epochs"], row["steps"], row["duration"]) == ("finished", "2", "10", "1:01:01")
    assert (row["val meV/atom"], row["val meV/A"], row["test meV/A"]) == ("2", "125", "250")
    assert (row["model"], row["data"], row["gp x dp"]) == ("escn_md", "a.xyz", "2 x 1")


def test_two_runs_are_compared_by_what_differs_and_by_all_results(tmp_path, capsys):
    make_run(tmp_path / "a", 0.01, 0.125)
    make_run(tmp_path / "b", 0.02, 0.125)
    rows = {key: values for key, *values in differences([read_run(tmp_path / n) for n in "ab"])}
    assert rows["optim.lr"] == ["0.01", "0.02"]
    assert rows["val forces_mae"] == ["0.125", "0.125"]
    assert not {"model.type", "parallel.gp"} & set(rows)
    assert cli.main(["runs", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "optim.lr" in capsys.readouterr().out


def test_damaged_and_foreign_folders_are_listed_as_such(tmp_path, capsys):
    broken = {
        **{"run.json": b'{"state": ', "config.yaml": b"a: [", "errors.json": b"[]"},
        "metrics.csv": b"epoch,step\n1\n",
    }
    for name, content in broken.items():
        make_run(tmp_path / name, 0.01, 0.1)
        (tmp_path / name / name).write_bytes(content)
    make_run(tmp_path / "binary", 0.01, 0.1)
    for name in broken:
        (tmp_path / "binary" / name).write_bytes(b"\xff\xfe\x00")
    make_run(tmp_path / "odd", 0.01, 0.1)
    (tmp_path / "odd" / RECORD).write_text('{"state": 3, "sessions": [5]}')
    (tmp_path / "odd" / "config.yaml").write_text("model: 3\nparallel: [1]\n")
    (tmp_path / "photos").mkdir()
    assert cli.main(["runs", "--json", str(tmp_path)]) == 0
    states = {r["row"]["name"]: r["row"]["state"] for r in json.loads(capsys.readouterr().out)}
    assert {name: states[name] for name in broken} == {name: f"damaged ({name})" for name in broken}
    assert states["photos"] == "foreign"
    assert states["binary"].startswith("damaged")
    assert cli.main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(states)


def test_a_folder_that_is_missing_ends_in_one_line(tmp_path, capsys):
    assert cli.main(["runs", str(tmp_path / "none")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_copy_of_the_code_knows_the_commit_it_is_of(tmp_path):
    code = Path(record.__file__).parents[1]
    record.keep_git_state(code, tmp_path)
    assert record.git_state(tmp_path) == record.git_state(code)


@pytest.fixture
def other():
    """Another process, and what it says of itself."""
    script = (
        "import json, sys; from gnnmd.runs.process import this_process as this; "
        "print(json.dumps(this()), flush=True); sys.stdin.read()"
    )
    started = subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True)
    started.said = json.loads(started.stdout.readline())
    yield started
    started.kill()
    started.communicate()


def left_running(folder, process):
    """Make a run whose process has not told its end."""
    make_run(folder, 0.01, 0.1)
    content = read(folder)
    content["state"] = content["sessions"][0]["state"] = "running"
    content["sessions"][0] |= {"process": process, "end": None}
    (folder / RECORD).write_text(json.dumps(content))


def test_a_run_whose_process_was_killed_is_told_from_one_that_runs(tmp_path, other):
    left_running(tmp_path / "a", other.said)
    assert read_run(tmp_path / "a")["row"]["state"] == "running"
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, and not collected yet
    assert read_run(tmp_path / "a")["row"]["state"] == "killed"
    other.wait()
    assert read_run(tmp_path / "a")["row"]["state"] == "killed"
    with RunRecord() as run:
        run.start(tmp_path / "a", "train", {})
        assert read_run(tmp_path / "a")["row"]["state"] == "running"
    assert [session["state"] for session in read(tmp_path / "a")["sessions"]] == ["killed", "finished"]


def test_a_session_that_goes_on_beside_a_new_one_is_not_called_killed(tmp_path, other):
    left_running(tmp_path, other.said)
    with RunRecord() as run:
        run.start(tmp_path, "md", {})
    assert [session["state"] for session in read(tmp_path)["sessions"]] == ["running", "finished"]


def test_a_number_that_another_process_has_now_is_not_the_process_of_then(other):
    assert is_gone(other.said) is False
    assert is_gone({**other.said, "began": other.said["began"] - 1}) is True


def elsewhere(process, what):
    return {**process, what: "another"}


@pytest.mark.parametrize(
    "process",
    [elsewhere(this_process(), "boot"), elsewhere(this_process(), "namespace"), {"pid": 1}, None, 3],
)
def test_of_a_process_elsewhere_only_the_last_change_is_told(tmp_path, process):
    left_running(tmp_path, process)
    assert read_run(tmp_path)["row"]["state"].startswith("running? last change 20")
    with RunRecord() as run:
        run.start(tmp_path, "train", {})
    assert read(tmp_path)["sessions"][0]["state"] == "unknown end"


@pytest.mark.parametrize(
    ("arguments", "typed"),
    [
        (["/opt/venv/bin/gnnmd", "train", "name=a b"], "gnnmd train 'name=a b'"),
        (["/home/me/gnnmd/__main__.py", "md", "steps=3"], "python -m gnnmd md steps=3"),
        (["mine/fit.py", "--fast"], "python mine/fit.py --fast"),
    ],
)
def test_the_command_of_a_run_can_be_typed_again(monkeypatch, arguments, typed):
    monkeypatch.setattr(sys, "argv", arguments)
    assert command() == typed
