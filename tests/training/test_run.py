"""Whole runs on tiny data."""

import io
import json
import re
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
from gnnmd.nn.environment import Environment
from gnnmd.predict import load_checkpoint
from gnnmd.training.callbacks import BEST, LAST, STATE
from gnnmd.training.report import evaluate
from gnnmd.training.run import train
from gnnmd.training.stopwatch import PARTS
from tests.training.conftest import columns
from tests.training.small_models import DPA2, DPA3


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


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(config):
    with pytest.raises(
        ValueError, match=r"cannot write to /proc/runs/.*\(/proc: .*choose another place with runs="
    ):
        train(replace(config, runs="/proc/runs"))


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
