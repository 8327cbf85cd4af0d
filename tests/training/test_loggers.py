import io
import os
import subprocess
import sys
from dataclasses import replace

import ase.io
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gnnmd.training.loggers import WANDB_ID, is_offline, wandb_id
from gnnmd.training.run import train
from gnnmd.training.settings import LoggerConfig
from tests.training.conftest import columns
from tests.training.interruptions import AtStep, ask_to_stop


@pytest.fixture(autouse=True)
def _nobody_to_ask(monkeypatch, tmp_path):
    """No key, no home, no keyboard: reading an answer would raise."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))


def offline_runs(folder):
    return sorted((folder / "wandb").glob("offline-run-*"))


@pytest.fixture
def two_sets(config, frames):
    """Two elements, two files to validate on; three steps per epoch."""
    config.data = replace(config.data, train=frames["alloy"], val=[frames["alloy"], frames["copper_val"]])
    return config


def test_wandb_without_a_key_keeps_everything_here_and_a_resumed_run_goes_on(two_sets):
    config = two_sets
    config.logger = LoggerConfig(kind="wandb")
    folder = train(config, callbacks=[AtStep(6, ask_to_stop)]).folder
    (first,) = offline_runs(folder)
    stored = next(first.glob("*.wandb")).read_bytes()
    told_apart = (b"val_forces_mae_Ag", b"val_energy_mae@copper_val.xyz", b"communication_seconds")
    for expected in (*told_apart, b"hidden_channels", f"{folder.name}-last".encode()):
        assert expected in stored
    assert train(replace(config, resume=str(folder))).folder == folder
    both = offline_runs(folder)
    assert len(both) == 2
    assert len({path.name.rpartition("-")[2] for path in both}) == 1  # one run of W&B


def test_runs_of_the_same_name_in_two_places_are_two_in_wandb(tmp_path):
    a, b = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert wandb_id(a) != wandb_id(b)
    assert wandb_id(a) == wandb_id(a)
    assert [path.name for path in a.iterdir()] == [WANDB_ID]  # nothing partial is left


def test_the_next_run_of_a_process_is_a_run_of_its_own(config):
    config.logger = LoggerConfig(kind="wandb")
    config.trainer.max_epochs = 1
    a, b = train(config).folder, train(config).folder
    assert [len(offline_runs(folder)) for folder in (a, b)] == [1, 1]


def test_wandb_never_asks_with_a_closed_keyboard(config, frames, tmp_path):
    """As a job of a cluster: through the command, with nothing to read from."""
    small = ("model.channels=8", "model.hidden_channels=8", "model.num_layers=1", "trainer.max_epochs=1")
    data = ("data=extxyz", f"data.train={frames['copper']}", f"data.val={frames['copper_val']}")
    done = subprocess.run(
        [sys.executable, "-m", "gnnmd", "train", "logger=wandb", f"runs={tmp_path / 'jobs'}", *small, *data],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "jobs").iterdir()
    assert len(offline_runs(folder)) == 1


def test_only_the_first_rank_logs(config):
    config.logger = LoggerConfig(kind="wandb")
    config.trainer.max_epochs = 1
    folder = train(replace(config, parallel=replace(config.parallel, gp=2))).folder
    assert len(offline_runs(folder)) == 1


def test_tensorboard_gets_the_curves_and_a_resumed_run_continues_them(two_sets):
    two_sets.logger = LoggerConfig(kind="tensorboard")
    folder = train(two_sets, callbacks=[AtStep(3, ask_to_stop)]).folder
    train(replace(two_sets, resume=str(folder)))
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    for name in ("val_forces_mae_Ag", "val_energy_mae@copper_val.xyz", "communication_seconds"):
        assert [event.step for event in events.Scalars(name)] == [3, 6, 9]
    table = columns(folder, "val_forces_mae_Ag")[:, 0].astype(float)
    assert [event.value for event in events.Scalars("val_forces_mae_Ag")] == pytest.approx(table)


def test_tensorboard_that_is_missing_is_named_with_the_remedy(config, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.loggers.TensorBoardLogger", missing)
    config.logger = LoggerConfig(kind="tensorboard")
    with pytest.raises(ValueError, match="pip install tensorboard"):
        train(config)


def missing(*_, **__):
    raise ModuleNotFoundError


def test_a_key_from_the_environment_or_a_login_goes_online(monkeypatch, tmp_path):
    assert is_offline(LoggerConfig(kind="wandb"))
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    assert not is_offline(LoggerConfig(kind="wandb"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert is_offline(LoggerConfig(kind="wandb"))  # the key is another server's
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert not is_offline(LoggerConfig(kind="wandb"))
    assert is_offline(LoggerConfig(kind="wandb", offline=True))


def test_a_run_folder_tells_how_it_was_made(config):
    folder = train(config, callbacks=[AtStep(7, ask_to_stop)]).folder
    said = yaml.safe_load((folder / "run.json").read_text())
    assert (said["kind"], said["name"], said["seed"]) == ("train", "test", 0)
    assert said["state"] == "finished"
    assert (said["gp"], said["dp"]) == (1, 1)
    assert (said["results"]["steps"], said["results"]["epochs"]) == (7, 1)
    assert said["results"]["errors"]["forces_mae"] > 0


def test_errors_of_each_data_set_are_those_of_its_frames_alone(config, frames, tmp_path):
    images = ase.io.read(frames["copper"], ":6")
    for i, atoms in enumerate(images):
        atoms.info["dataset"] = "ab"[i % 3 == 0]
    ase.io.write(tmp_path / "two.xyz", images)
    config.data = replace(config.data, train=str(tmp_path / "two.xyz"), val=str(tmp_path / "two.xyz"))
    config.trainer.max_epochs = 1
    errors = train(config).errors
    assert errors["forces_mae@a"] != errors["forces_mae@b"]
    for kind in ("energy", "forces"):  # four frames of a, two of b, of equal size
        mean = (4 * errors[f"{kind}_mae@a"] + 2 * errors[f"{kind}_mae@b"]) / 6
        assert errors[f"{kind}_mae"] == pytest.approx(mean)
