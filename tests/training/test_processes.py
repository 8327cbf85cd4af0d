"""Runs of several processes, and who starts them."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from gnnmd.training.callbacks import STATE
from gnnmd.training.run import train
from gnnmd.training.settings import ParallelConfig
from tests.training.interruptions import assert_same_curves
from tests.training.jobs import PressCtrlC, fit
from tests.training.small_models import DPA2, DPA3


@pytest.mark.parametrize("model", [DPA3, DPA2], ids=lambda model: model.type)
def test_dpa_models_train_on_two_ranks_as_on_one(config, pool, model):
    """Statistics of the data, references and steps."""
    config = replace(config, model=model, trainer=replace(config.trainer, max_epochs=1, precision="float64"))
    one = pool.run(1, fit, config)[0]
    two = pool.run(2, fit, replace(config, parallel=ParallelConfig(gp=2)))[0]
    torch.testing.assert_close(two.average, one.average, rtol=1e-8, atol=1e-10)


def test_ctrl_c_reaches_the_processes_of_the_run(config):
    config.trainer.precision = "float64"
    whole = train(config).folder
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    shared = replace(config, parallel=ParallelConfig(gp=2))
    result = train(shared, callbacks=[PressCtrlC(os.getpid(), 7)])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert result.interrupted
    assert 7 <= torch.load(result.folder / STATE, weights_only=True)["global_step"] < 15
    assert_same_curves(train(replace(config, resume=str(result.folder))).folder, whole)


def test_torchrun_starts_the_ranks(config):
    config.trainer.precision = "float64"
    expected = train(config).folder
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "gnnmd",
    ]
    arguments = ["train", f"{expected}/config.yaml", "parallel.dp=2", "data.max_frames=1", "name=torchrun"]
    done = subprocess.run(
        [*command, *arguments, "trainer.progress=lines"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("errors on the val set") == 1  # one rank talks
    (folder,) = expected.parent.glob("*-torchrun")
    assert_same_curves(folder, expected)


def test_another_number_of_processes_than_was_started_is_refused(config, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"gp=3 x parallel.dp=1 needs 3 processes, but 4 were started"):
        train(replace(config, parallel=ParallelConfig(gp=3)))
    with pytest.raises(ValueError, match="gp must be at least 1, got 0"):
        ParallelConfig(gp=0)


def test_replicas_are_as_many_as_there_are_processes_for():
    assert ParallelConfig(gp=2).over(8, "") == ParallelConfig(gp=2, dp=4)
    assert ParallelConfig(gp=2, dp=4).over(8, "") == ParallelConfig(gp=2, dp=4)
    with pytest.raises(
        ValueError, match=r"gp=3 x parallel.dp=2 needs 6 processes, but 8 came.*\(1, 2, 4, 8\)"
    ):
        ParallelConfig(gp=3).over(8, "8 came")
    with pytest.raises(ValueError, match=r"dp=2 needs 4 processes, but 8 came.*or start 4"):
        ParallelConfig(gp=2, dp=2).over(8, "8 came")
