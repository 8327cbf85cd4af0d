"""Whole runs on tiny data."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase.data import atomic_numbers
from lightning.pytorch import Callback
from rich.console import Console
from rich.progress import Progress

from gnnmd.data.datamodule import AtomsDataModule, DataConfig
from gnnmd.models.dpa2_config import DPA2Config, RepformerConfig, RepinitConfig
from gnnmd.models.dpa3_config import DPA3Config
from gnnmd.models.escn_md import ExpertsConfig
from gnnmd.models.heads import FittingNetConfig
from gnnmd.nn.environment import Environment
from gnnmd.predict import load_checkpoint
from gnnmd.training.callbacks import BEST, LAST, STATE
from gnnmd.training.losses import TermConfig
from gnnmd.training.report import evaluate
from gnnmd.training.run import train
from gnnmd.training.settings import ParallelConfig
from gnnmd.training.stopwatch import PARTS
from tests.training.conftest import columns
from tests.training.jobs import PressCtrlC, fit

CURVES = ("epoch", "step", "lr", "train_", "val_", "grad_norm")  # what no clock or memory enters


class AtStep(Callback):
    """Does something once, after a number of steps."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self.action(trainer)


def ask_to_stop(trainer):
    trainer.should_stop = True


def interrupt(trainer):
    raise KeyboardInterrupt


def press_ctrl_c(trainer):
    os.kill(os.getpid(), signal.SIGINT)


def end_the_job(trainer):
    os.kill(os.getpid(), signal.SIGTERM)


def warn_of_the_end(trainer):
    os.kill(os.getpid(), signal.SIGUSR1)


def weights(path):
    potential, _ = load_checkpoint(path)
    return torch.cat([w.double().flatten() for w in potential.state_dict().values()])


def test_a_run_leaves_everything_behind_that_it_promises(config, pictures):
    result = train(config)
    left = {path.name for path in result.folder.iterdir()}
    assert left == {
        *("config.yaml", "run.json", "metrics.csv", "errors.json", "parity.png", "learning_curve.png"),
        *(BEST, LAST, STATE),
    }
    assert result.folder.name.endswith("-test")
    potential, info = load_checkpoint(result.checkpoint)
    assert potential.elements == (29,)
    assert info.statistics["n_frames"] == 10
    assert info.extra["val_errors"] == result.errors
    errors = json.loads((result.folder / "errors.json").read_text())
    assert errors.pop("split") == "val"
    assert errors == result.errors
    assert yaml.safe_load((result.folder / "config.yaml").read_text())["model"]["channels"] == 8
    assert len(columns(result.folder, "epoch")) == 3


def test_each_epoch_tells_throughput_gradient_and_memory(config):
    folder = train(config).folder
    parts = [f"{part}_seconds" for part in PARTS]
    names = ("seconds", "atoms_per_s", "edges_per_s", "peak_memory_MB", *parts)
    table = {name: columns(folder, name)[:, 0].astype(float) for name in (*names, "grad_norm")}
    assert all((values > 0).all() for values in table.values())
    spent = np.diff(table["seconds"], prepend=0.0)
    atoms = table["atoms_per_s"] * (spent - table["validation_seconds"])
    np.testing.assert_allclose(atoms, 40, rtol=0.2)  # 10 crystals of 4; the clocks are rounded to ms
    split = sum(table[part] for part in parts)
    assert (split < spent + 0.005).all()
    assert split[1:].sum() > 0.8 * spent[1:].sum()  # nothing large is forgotten


@pytest.mark.parametrize(
    ("hook", "part"),
    [
        ("on_after_backward", "forward_backward"),
        ("on_before_optimizer_step", "optimizer"),
        ("on_validation_batch_end", "validation"),
    ],
)
def test_a_delay_shows_in_the_part_that_it_is_in(config, hook, part):
    config.trainer.max_epochs = 1
    late = Callback()
    setattr(late, hook, lambda *_: time.sleep(0.3))
    folder = train(config, callbacks=[late]).folder
    times = {name: float(columns(folder, f"{name}_seconds")[0, 0]) for name in PARTS}
    assert times[part] >= 0.6  # 5 steps, 2 batches of validation
    assert sum(times.values()) < times[part] + 0.6


def test_two_frames_are_learnt_by_heart(config, frames):
    config.data = DataConfig(train=frames["copper"] + "@:2", val=frames["copper"] + "@:2", max_frames=2)
    config.trainer.max_epochs = 80
    result = train(config)
    loss = columns(result.folder, "train_loss")[:, 0].astype(float)
    assert loss[-3:].mean() < 0.1 * loss[0]
    # the exported average of the weights has learnt them too
    assert result.errors["forces_mae"] < 0.1 * load_checkpoint(result.checkpoint)[1].statistics["force_rms"]


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


def test_a_terminal_shows_errors_and_speed_of_the_running_epoch(config, monkeypatch):
    now, shown = [100.0], []
    monkeypatch.setattr("gnnmd.training.history.time.monotonic", lambda: now[0])
    monkeypatch.setattr(Progress, "update", lambda *_, description="", **__: shown.append(description))
    config.trainer.progress = "auto"

    class TwoSeconds(Callback):
        def on_train_batch_start(self, *_):
            now[0] += 2.0

        def on_validation_end(self, *_):
            now[0] += 50.0

    train(config, console=Console(file=io.StringIO(), force_terminal=True), callbacks=[TwoSeconds()])
    told = [text for text in shown if text]
    assert len(told) == 15
    assert all(re.search(r"epoch \d/3 .*energy .*forces .* 4 atoms/s", text) for text in told)


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


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(config):
    with pytest.raises(
        ValueError, match=r"cannot write to /proc/runs/.*\(/proc: .*choose another place with runs="
    ):
        train(replace(config, runs="/proc/runs"))


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


def test_time_limit_stops_and_keeps(config):
    config.trainer.max_time, config.trainer.max_epochs = "00:00:01", 1000
    result = train(config)
    assert not result.interrupted
    assert result.errors
    assert 0 < len(columns(result.folder, "epoch")) < 500


def test_early_stop_waits_as_long_as_it_was_told(config):
    config.optim.lr = 1e-12  # nothing improves
    config.trainer.max_epochs, config.trainer.early_stop = 20, 2
    config.optim.ema_decay = 0.0
    assert len(columns(train(config).folder, "epoch")) < 8


def test_divergence_is_reported_and_not_exported(config):
    config.optim.lr, config.optim.clip_norm, config.trainer.max_epochs = 1e8, 0.0, 20
    with pytest.raises(FloatingPointError, match=r"diverged.*optim\.lr"):
        train(config)


@pytest.mark.parametrize("precision", ["bf16-mixed", "float64"])
def test_other_precisions_train(config, precision):
    config.trainer.precision = precision
    result = train(config)
    potential, info = load_checkpoint(result.checkpoint)
    assert info.dtype == ("float64" if precision == "float64" else "float32")
    assert potential.element_energies.dtype == torch.float64
    reference = train(replace(config, trainer=replace(config.trainer, precision="float32")))
    loss, expected = (float(columns(r.folder, "train_loss")[0, 0]) for r in (result, reference))
    assert loss == pytest.approx(expected, rel=0.1 if precision == "bf16-mixed" else 1e-3)
    assert loss != expected


def test_molecules_without_cell_and_stress_are_trained_on(config, frames):
    config.data = DataConfig(train=frames["molecules"], val_split=2, max_frames=3)
    result = train(config)
    assert "stress_mae" not in result.errors
    assert result.errors["forces_mae"] > 0
    assert load_checkpoint(result.checkpoint)[0].elements == (1, 6, 8)


DPA3 = DPA3Config(
    type_map=("Cu",),
    n_dim=8,
    e_dim=6,
    a_dim=4,
    nlayers=2,
    e_rcut=4.0,
    e_rcut_smth=3.5,
    a_rcut=3.0,
    a_rcut_smth=2.5,
    fix_stat_std=0.0,
    fitting_net=FittingNetConfig(neuron=(8,)),
)
DPA2 = DPA2Config(
    type_map=("Cu",),
    repinit=RepinitConfig(
        rcut=4.0,
        rcut_smth=1.0,
        nsel=60,
        neuron=(4, 8),
        axis_neuron=2,
        three_body_rcut=3.0,
        three_body_rcut_smth=1.0,
    ),
    repformer=RepformerConfig(rcut=3.0, rcut_smth=1.0, nsel=20, nlayers=2, g1_dim=8, g2_dim=6, attn2_nhead=2),
    fitting_net=FittingNetConfig(neuron=(8,)),
)


@pytest.mark.parametrize("model", [DPA3, DPA2], ids=lambda model: model.type)
def test_dpa_models_take_statistics_from_the_data_and_learn_new_elements(config, frames, model):
    config = replace(config, model=model, trainer=replace(config.trainer, max_epochs=2))
    first = train(config)
    potential, _ = load_checkpoint(first.checkpoint)
    spreads = [m.std for m in potential.backbone.modules() if isinstance(m, Environment)]
    assert spreads
    assert all((std > 0.01).all() and (std != 1).all() for std in spreads)
    alloy = replace(
        config, init_from=str(first.folder), data=replace(config.data, train=frames["alloy"], val=None)
    )
    alloy.data.val_split = 2
    second, _ = load_checkpoint(train(alloy).checkpoint)
    assert second.elements == (29, 47)
    assert second.backbone.config.type_map == ("Cu", "Ag")
    old, new = (p.backbone.type_embedding.layer.linear.weight for p in (potential, second))
    assert new.shape[1] == old.shape[1] + 1


@pytest.mark.parametrize("model", [DPA3, DPA2], ids=lambda model: model.type)
def test_dpa_models_train_on_two_ranks_as_on_one(config, pool, model):
    """Statistics of the data, references and steps."""
    config = replace(config, model=model, trainer=replace(config.trainer, max_epochs=1, precision="float64"))
    one = pool.run(1, fit, config)[0]
    two = pool.run(2, fit, replace(config, parallel=ParallelConfig(gp=2)))[0]
    torch.testing.assert_close(two.average, one.average, rtol=1e-8, atol=1e-10)


def test_fine_tuning_knows_a_new_element_and_starts_from_the_old_weights(config, frames, console):
    config.trainer.max_epochs = 20
    first = train(config)
    tuned = replace(config, init_from=str(first.folder), data=DataConfig(train=frames["alloy"], val_split=2))
    tuned.trainer = replace(tuned.trainer, max_epochs=1)
    tuned.optim = replace(tuned.optim, lr=1e-12)
    result = train(tuned, console=console)
    assert "elements it has not seen: Ag" in console.export_text()
    old, new = load_checkpoint(first.checkpoint)[0], load_checkpoint(result.checkpoint)[0]
    assert new.elements == (29, 47)
    for name, w in new.backbone.state_dict().items():
        torch.testing.assert_close(w, old.backbone.state_dict()[name], rtol=0, atol=1e-6)
    assert new.energy_scale == old.energy_scale
    assert old.element_energies[atomic_numbers["Ag"]] == 0
    # without references of its own for silver, the energies would be off by what the fit has found
    shift = (new.element_energies - old.element_energies)[[29, 47]].abs()
    assert result.errors["energy_mae"] < 0.5 * shift.max()


def test_references_follow_labels_that_are_shifted(config, frames, tmp_path):
    first = train(config)
    images = ase.io.read(frames["copper"], ":")
    for atoms in images:
        atoms.calc.results["energy"] += 1000.0 * len(atoms)
    ase.io.write(tmp_path / "shifted.xyz", images)
    tuned = replace(config, init_from=str(first.folder))
    tuned.data = replace(config.data, train=str(tmp_path / "shifted.xyz"), val=str(tmp_path / "shifted.xyz"))
    tuned.optim = replace(tuned.optim, lr=1e-12)
    tuned.trainer = replace(tuned.trainer, max_epochs=1)
    result = train(tuned)
    assert result.errors["energy_mae"] < 1.0
    shift = (
        load_checkpoint(result.checkpoint)[0].element_energies
        - load_checkpoint(first.checkpoint)[0].element_energies
    )
    assert shift[29].item() == pytest.approx(1000.0, abs=1.0)


def test_direct_pretraining_then_conservative_fine_tuning(config, console):
    config.model = replace(config.model, lmax=2)
    direct = train(replace(config, heads="direct"))
    pretrained = load_checkpoint(direct.checkpoint)[0]
    assert set(pretrained.heads) == {"energy", "forces", "stress"}
    tuned = replace(config, init_from=str(direct.checkpoint), optim=replace(config.optim, lr=1e-12))
    tuned.trainer = replace(tuned.trainer, max_epochs=1)
    result = train(tuned, console=console)
    assert "left behind: heads.forces, heads.stress" in console.export_text()
    conservative = load_checkpoint(result.checkpoint)[0]
    assert set(conservative.heads) == {"energy"}
    for name, w in conservative.backbone.state_dict().items():
        torch.testing.assert_close(w, pretrained.backbone.state_dict()[name], rtol=0, atol=1e-6)


def test_validation_uses_the_average_and_the_average_is_exported(config):
    config.optim.ema_decay = 0.9
    result = train(config)
    state = torch.load(result.folder / STATE, weights_only=True)["state_dict"]
    exported = load_checkpoint(result.folder / LAST)[0].state_dict()
    last = load_checkpoint(result.folder / LAST)[1].extra["val_errors"]
    data = AtomsDataModule(config.data, config.model.r_cut)
    data.setup()
    errors, _ = evaluate(load_checkpoint(result.folder / LAST)[0], data.val_dataloader(), torch.device("cpu"))
    assert last["forces_mae"] == pytest.approx(errors["forces_mae"], rel=1e-6)
    assert float(columns(result.folder, "val_forces_mae")[-1, 0]) == last["forces_mae"]
    differ = 0
    for name, w in exported.items():
        assert torch.equal(w, state[f"average.{name}"])
        differ += not torch.equal(w, state[f"potential.{name}"])
    assert differ > 10


def assert_same_curves(folder, expected):
    np.testing.assert_allclose(
        columns(folder, *CURVES).astype(float), columns(expected, *CURVES).astype(float), rtol=1e-8
    )


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
