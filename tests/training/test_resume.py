"""Runs that stop and go on, and what is refused to go on."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from gnnmd.models.dpa3_config import DPA3Config
from gnnmd.models.escn_md import ExpertsConfig
from gnnmd.predict import load_checkpoint
from gnnmd.training.callbacks import BEST, LAST, STATE
from gnnmd.training.losses import TermConfig
from gnnmd.training.run import train
from gnnmd.training.settings import ParallelConfig
from tests.training.conftest import columns
from tests.training.interruptions import (
    CURVES,
    AtStep,
    ask_to_stop,
    end_the_job,
    interrupt,
    press_ctrl_c,
    warn_of_the_end,
)
from tests.training.test_run import weights


@pytest.mark.parametrize("step", [10, 7], ids=["after an epoch", "inside an epoch"])
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_last_digit(config, step):
    whole = train(config).folder
    stopped = train(config, callbacks=[AtStep(step, ask_to_stop)]).folder
    assert len(columns(stopped, "epoch")) == 2
    resumed = train(replace(config, resume=str(stopped))).folder
    assert resumed == stopped
    np.testing.assert_array_equal(columns(resumed, *CURVES), columns(whole, *CURVES))
    assert columns(resumed, "seconds")[:, 0].astype(float).max() < 60
    assert torch.equal(weights(resumed / LAST), weights(whole / LAST))
    assert torch.equal(weights(resumed / BEST), weights(whole / BEST))


def test_a_run_of_several_elements_and_files_tells_them_apart_and_is_resumed(config, frames):
    config.data = replace(config.data, train=frames["alloy"], val=[frames["alloy"], frames["copper_val"]])
    whole, stopped = train(config), train(config, callbacks=[AtStep(4, ask_to_stop)]).folder
    assert len(columns(stopped, "epoch")) == 2  # inside the second epoch
    header = (whole.folder / "metrics.csv").read_text().splitlines()[0].split(",")
    for name in ("forces_rmse_Cu", "forces_mae_Ag", "energy_mae@copper_val.xyz", "forces_cosine@alloy.xyz"):
        assert f"val_{name}" in header
        assert name in whole.errors
    errors = json.loads((whole.folder / "errors.json").read_text())
    assert errors["forces_mae"] == pytest.approx(
        (24 * errors["forces_mae@alloy.xyz"] + 12 * errors["forces_mae@copper_val.xyz"]) / 36
    )
    assert load_checkpoint(whole.checkpoint)[1].extra["val_errors"] == whole.errors
    resumed = train(replace(config, resume=str(stopped))).folder
    np.testing.assert_array_equal(columns(resumed, *CURVES), columns(whole.folder, *CURVES))


def test_a_table_without_the_columns_of_today_is_continued(config, frames):
    config.data = replace(config.data, train=frames["alloy"], val=frames["alloy"])
    folder = train(config, callbacks=[AtStep(3, ask_to_stop)]).folder
    (folder / "metrics.csv").write_text("epoch,step,seconds,val_loss\n1,3,1.5,0.25\n")
    train(replace(config, resume=str(folder)))
    assert columns(folder, "val_loss")[0] == ["0.25"]
    told_apart = columns(folder, "val_forces_mae_Ag")[:, 0]
    assert told_apart[0] == ""
    assert all(told_apart[1:])


def test_a_job_that_starts_again_goes_on_in_its_folder(config, tmp_path):
    whole, mine = train(config).folder, tmp_path / "mine"
    train(config, folder=mine, callbacks=[AtStep(7, ask_to_stop)])
    assert train(config, folder=mine).folder == mine
    np.testing.assert_array_equal(columns(mine, *CURVES), columns(whole, *CURVES))
    done = weights(mine / LAST)
    assert train(config, folder=mine).folder == mine  # once more after its end
    assert torch.equal(weights(mine / LAST), done)


@pytest.mark.parametrize(
    ("section", "changes", "named"),
    [
        ("loss", {"forces": TermConfig("l2", weight=7.0)}, "loss.forces.weight=1.0"),
        ("data", {"energy_key": "E"}, "data.energy_key=energy"),
        ("data", {"val": None}, "data.val=.*copper_val.xyz"),
        ("data", {"max_frames": 4}, "data.max_frames x parallel.dp=2"),
        ("optim", {"lr": 0.5, "ema_decay": 0.5}, "optim.lr=0.01, optim.ema_decay="),
        ("trainer", {"precision": "float64"}, "trainer.precision=float32"),
        ("trainer", {"accumulate": 2}, "trainer.accumulate=1"),
        ("model", {"experts": ExpertsConfig()}, "model.experts=null"),
        (None, {"seed": 5}, "seed=0"),
    ],
)
def test_a_run_is_not_resumed_as_another_one(config, tmp_path, section, changes, named):
    config.trainer.max_epochs = 1
    mine = train(config, folder=tmp_path / "mine").folder
    changed = {section: replace(getattr(config, section), **changes)} if section else changes
    other = replace(config, **changed)
    for resume in (lambda: train(replace(other, resume=str(mine))), lambda: train(other, folder=mine)):
        with pytest.raises(
            ValueError, match=rf"that run has {named}.*Drop the change.*init_from="
        ) as refused:
            resume()
        assert "\n" not in str(refused.value)


def test_a_run_may_go_on_elsewhere_and_for_longer(config):
    config.trainer.max_epochs = 1
    mine = train(config).folder
    other = replace(
        config,
        resume=str(mine),
        name="other",
        runs="elsewhere",
        parallel=ParallelConfig(dp=2),
        data=replace(config.data, max_frames=1, num_workers=1),
        trainer=replace(config.trainer, max_epochs=2, max_time="01:00:00", edge_chunk=1000),
    )
    assert train(other).folder == mine
    assert columns(mine, "epoch")[:, 0].tolist() == ["1", "2"]


def test_many_differences_are_counted(config):
    config.trainer.max_epochs = 1
    mine = train(config).folder
    other = replace(config.data, train="a", val="b", energy_key="E", forces_key="F", val_split=0.3)
    with pytest.raises(
        ValueError, match=r"has seed=0, data.train=\S*, data.val=\S*, data.val_split=0.1 and 2 mo"
    ):
        train(replace(config, resume=str(mine), data=other, seed=1))


def test_a_job_that_continues_from_a_checkpoint_can_start_again(config, tmp_path):
    source, mine = train(config).folder, tmp_path / "mine"
    other = replace(config, init_from=str(source), model=replace(config.model, channels=16))
    train(other, folder=mine, callbacks=[AtStep(7, ask_to_stop)])
    whole = train(other).folder
    train(other, folder=mine)
    another = replace(other, init_from=str(whole))
    with pytest.raises(ValueError, match=f"that run has init_from={source}, this configuration has not"):
        train(another, folder=mine)
    np.testing.assert_array_equal(columns(mine, *CURVES), columns(whole, *CURVES))


def test_a_run_folder_without_its_configuration_is_not_resumed(config):
    folder = train(config, callbacks=[AtStep(5, ask_to_stop)]).folder
    (folder / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="Copy the whole run folder"):
        train(replace(config, resume=str(folder)))


def test_dropout_goes_on_with_the_same_random_numbers(config):
    config.model = replace(config.model, experts=ExpertsConfig(count=2, dropout=0.5))
    whole = train(config).folder
    stopped = train(config, callbacks=[AtStep(5, ask_to_stop)]).folder
    resumed = train(replace(config, resume="auto")).folder
    assert resumed == stopped
    assert torch.equal(weights(resumed / LAST), weights(whole / LAST))


@pytest.mark.parametrize("action", [interrupt, press_ctrl_c, end_the_job, warn_of_the_end])
def test_ctrl_c_keeps_what_it_has_and_can_be_resumed(config, action, console):
    whole = train(config).folder
    handler = signal.getsignal(signal.SIGINT)
    result = train(config, callbacks=[AtStep(7, action)], console=console)
    assert result.interrupted
    assert result.errors == {}
    assert signal.getsignal(signal.SIGINT) is handler
    assert {BEST, LAST, STATE} <= {path.name for path in result.folder.iterdir()}
    assert f"gnnmd train resume={result.folder}" in console.export_text()
    assert weights(result.folder / LAST).isfinite().all()
    resumed = train(replace(config, resume=str(result.folder))).folder
    np.testing.assert_array_equal(columns(resumed, *CURVES), columns(whole, *CURVES))


def test_a_run_does_not_stop_between_batches_of_one_step(config):
    config.trainer.accumulate = 3
    whole = train(config).folder

    class AfterABatch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop |= trainer.current_epoch == 1 and batch_idx == 0

    stopped = train(config, callbacks=[AfterABatch()]).folder
    assert torch.load(stopped / STATE, weights_only=True)["global_step"] == 3
    resumed = train(replace(config, resume=str(stopped))).folder
    np.testing.assert_array_equal(columns(resumed, *CURVES), columns(whole, *CURVES))


def test_saved_state_is_read_without_running_code(config, tmp_path):
    folder = train(config, callbacks=[AtStep(5, ask_to_stop)]).folder

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    state = torch.load(folder / STATE, weights_only=True)  # plain values and tensors only
    state["callbacks"]["evil"] = Evil()
    torch.save(state, folder / STATE)
    with pytest.raises(Exception, match="[Ww]eights"):
        train(replace(config, resume=str(folder)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"junk", b"a: [", b"model: 3\n", b"\xff\xfe\x00"])
@pytest.mark.parametrize("name", ["config.yaml", STATE])
def test_damaged_files_of_a_run_to_resume_are_named_with_the_remedy(config, name, content, tmp_path):
    config.trainer.max_epochs = 1
    folder = train(config).folder
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged.*init_from=") as refused:
        train(replace(config, resume=str(folder)))
    assert "\n" not in str(refused.value)


def test_another_model_is_named_by_its_type_alone(config):
    config.trainer.max_epochs = 1
    folder = train(config).folder
    other = replace(config, model=DPA3Config(), resume=str(folder))
    with pytest.raises(ValueError, match="that run has model.type=escn_md, this configuration has not"):
        train(other)


def test_a_run_of_another_shape_is_not_resumed(config):
    folder = train(replace(config, trainer=replace(config.trainer, max_epochs=1))).folder
    other = replace(config, resume=str(folder), model=replace(config.model, channels=16))
    with pytest.raises(ValueError, match=r"model\.channels=8.*init_from"):
        train(other)


def test_resume_names_what_is_missing(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="last.ckpt"):
        train(replace(config, resume=str(tmp_path)))
    assert train(replace(config, resume="auto")).folder.exists()  # nothing to resume: a new run
