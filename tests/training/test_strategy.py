"""Many ranks against one: the same steps, errors and weights, however the processes share the work."""

import shutil
from dataclasses import replace

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk

from gnnmd.data.datamodule import DataConfig
from gnnmd.training.callbacks import STATE
from gnnmd.training.settings import ParallelConfig
from tests.parallel.pool import RankError
from tests.training.conftest import labelled
from tests.training.jobs import LATE, fail, fit, reduced, stop_one

MESHES = [(2, 1), (1, 2), (2, 2)]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Crystals of different size, some without forces or stress: ranks and replicas have different counts.

    Two elements, and validation frames of two files.
    """
    folder = tmp_path_factory.mktemp("uneven")
    images = []
    for i in range(11):
        atoms = bulk("Cu", cubic=True) * (1, 1, 1 + i % 3)
        atoms.symbols[: i % 3] = "Ag"
        images.append(labelled(atoms, i))
        for name in ("forces",) * (i % 4 == 1) + ("stress",) * (i % 3 == 1):
            images[-1].calc.results.pop(name)
    ase.io.write(folder / "train.xyz", images[:8])
    ase.io.write(folder / "val_a.xyz", images[8:10])
    ase.io.write(folder / "val_b.xyz", images[10:])
    val = [str(folder / f"val_{name}.xyz") for name in "ab"]
    return DataConfig(train=str(folder / "train.xyz"), val=val, max_frames=2)


@pytest.fixture
def config(config, uneven):
    """20 steps of two frames in float64; the two layers exchange ghosts."""
    config.data = uneven
    config.model = replace(config.model, lmax=2, channels=4, hidden_channels=4, num_layers=2)
    config.trainer = replace(config.trainer, max_epochs=5, validate_every=5, precision="float64")
    config.optim = replace(config.optim, clip_norm=1.0)
    return config


def meshed(config, gp, dp, **trainer):
    """Return the configuration for gp x dp processes with the same frames in every step."""
    data = replace(config.data, max_frames=config.data.max_frames // dp)
    parallel, trainer = ParallelConfig(gp, dp), replace(config.trainer, **trainer)
    return replace(config, data=data, parallel=parallel, trainer=trainer)


def on_ranks(pool, config, fault=""):
    """Train and return what the first rank has and what all have seen."""
    first, *others = pool.run(config.parallel.processes, fit, config, fault, timeout=100.0)
    return first, [first.seen, *others]


def relative(found, expected):
    """Return the largest deviation, relative to the largest entry."""
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def gradient_deviation(found, expected):
    """Return the largest relative deviation of a parameter's gradient; the same ones must have none."""
    assert [g is None for g in found] == [g is None for g in expected]
    pairs = [(g, e) for g, e in zip(found, expected, strict=True) if e is not None and e.any()]
    return max(relative(g, e) for g, e in pairs)


def assert_same(found, ranks, expected, tolerance):
    """Compare everything that a run leaves."""
    steps = np.mean([seen.losses for seen in ranks], axis=0)
    assert relative(steps, expected.seen.losses) < tolerance
    assert found.table.keys() == expected.table.keys()
    for name, column in expected.table.items():
        assert relative(found.table[name], column) < tolerance, name
    assert relative(found.weights, expected.weights) < tolerance
    assert relative(found.average, expected.average) < tolerance
    assert relative(list(found.errors.values()), list(expected.errors.values())) < tolerance
    for name, pairs in expected.pairs.items():
        assert relative(found.pairs[name], pairs) < tolerance, name


@pytest.mark.parametrize(
    ("heads", "kind"), [("conservative", "adamw"), ("direct", "adamw"), ("conservative", "muon")]
)
def test_loss_curves_errors_and_weights_do_not_depend_on_the_mesh(config, pool, heads, kind):
    config = replace(config, heads=heads, optim=replace(config.optim, kind=kind))
    expected = fit(None, config)
    assert len(expected.seen.losses) == 20
    assert expected.table["val_stress_mae"]
    told_apart = ("forces_mae_Ag", "energy_rmse@val_a.xyz", "stress_mae@val_a.xyz", "forces_cosine@val_b.xyz")
    assert all(expected.table[f"val_{name}"] and name in expected.errors for name in told_apart)
    norm = torch.cat([g.flatten() for g in expected.seen.gradient if g is not None]).norm()
    assert norm > config.optim.clip_norm  # else clipping is not compared
    for gp, dp in MESHES:
        found, ranks = on_ranks(pool, meshed(config, gp, dp))
        assert (ranks[0].n_ghost > 0) == (gp > 1)
        assert sum(seen.n_owned for seen in ranks) == expected.seen.n_owned
        for seen in ranks:
            assert gradient_deviation(seen.gradient, expected.seen.gradient) < 1e-10
        assert_same(found, ranks, expected, 1e-8)


@pytest.mark.parametrize(
    ("fault", "gp", "dp"),
    [
        ("no sum over ranks", 2, 1),
        ("no mean over replicas", 1, 2),
        ("counts of one rank", 1, 2),
        ("repeated frames count", 1, 2),
    ],
)
def test_a_forgotten_sum_would_be_noticed(config, pool, fault, gp, dp):
    """Adam hides a wrong factor of the gradient: the curves alone would not do."""
    config.trainer = replace(config.trainer, max_epochs=1, validate_every=1)
    expected = fit(None, config)
    found, ranks = on_ranks(pool, meshed(config, gp, dp), fault)
    if fault == "repeated frames count":
        assert abs(found.errors["forces_mae"] / expected.errors["forces_mae"] - 1) > 1e-3
    else:
        assert gradient_deviation(ranks[0].gradient, expected.seen.gradient) > 1e-3


def test_waiting_for_a_late_rank_counts_as_communication(config, pool):
    """Rank 1 is late before each exchange of a forward pass; rank 0 waits for it."""
    config.trainer = replace(config.trainer, max_epochs=2)
    found, _ = on_ranks(pool, meshed(config, 2, 1), "rank 1 is late")
    for communication, whole in zip(
        found.times["communication"], found.times["forward_backward"], strict=True
    ):
        assert 4 * LATE / 2 < communication < whole  # steps of an epoch; the mean of both ranks
    alone, _ = on_ranks(pool, config)
    assert alone.times["communication"] == [0.0, 0.0]


def test_rank_0_decides_where_the_weights_start(config, pool):
    config.trainer = replace(config.trainer, max_epochs=1, validate_every=1)
    assert_same(*on_ranks(pool, meshed(config, 1, 2), "other random start"), fit(None, config), 1e-8)


def test_parameters_without_gradient_are_zero_where_others_have_one(pool):
    """And keep none where nobody has, or weight decay would move what one rank leaves alone."""
    present = [[True, False, False, True], [True, True, False, False]]
    assert pool.run(2, reduced, present) == [[1.5, 10.0, None, 500.0]] * 2


def test_accumulated_batches_on_a_mesh(config, pool):
    config.trainer = replace(config.trainer, max_epochs=2, validate_every=1, accumulate=2)
    expected = fit(None, config)
    assert len(expected.seen.losses) == 8
    assert expected.table["step"] == [2, 4]
    assert_same(*on_ranks(pool, meshed(config, 2, 2)), expected, 1e-8)


def test_equal_batches_may_be_accumulated_or_taken_at_once(config, frames):
    config.data = DataConfig(train=frames["copper"] + "@:8", val=frames["copper_val"], max_frames=2)
    at_once = fit(None, config)
    config.data = replace(config.data, max_frames=1)
    bit_by_bit = fit(None, replace(config, trainer=replace(config.trainer, accumulate=2)))
    assert relative(bit_by_bit.table["train_loss"], at_once.table["train_loss"]) < 1e-10
    assert relative(bit_by_bit.weights, at_once.weights) < 1e-8


def test_chunks_of_edges_change_nothing(config, pool):
    config.trainer = replace(config.trainer, max_epochs=2, validate_every=2)
    expected = fit(None, config)
    chunked = meshed(config, 2, 1, edge_chunk=16)
    assert_same(*on_ranks(pool, chunked), expected, 1e-8)


def test_bfloat16_stays_close_on_a_mesh(config, pool):
    config.trainer = replace(config.trainer, max_epochs=2, validate_every=2, precision="bf16-mixed")
    expected, (found, _) = fit(None, config), on_ranks(pool, meshed(config, 2, 2))
    assert relative(found.table["train_loss"], expected.table["train_loss"]) < 0.02
    assert relative(found.table["val_forces_mae"], expected.table["val_forces_mae"]) < 0.02


def test_a_run_is_continued_on_another_mesh(config, pool, tmp_path):
    """One rank alone wants to stop, inside an epoch; all stop after the same step."""
    train = shutil.copy(config.data.train, tmp_path / "train.xyz")
    config = replace(config, data=replace(config.data, train=str(train)))
    whole = fit(None, config)
    (folder, other) = pool.run(2, stop_one, meshed(config, 2, 1), 1, 10, timeout=100.0)
    assert folder == other
    assert torch.load(f"{folder}/{STATE}", weights_only=True)["global_step"] == 10
    found, _ = on_ranks(pool, replace(meshed(config, 1, 2), resume=folder))
    for name, column in whole.table.items():
        assert relative(found.table[name], column) < 1e-8, name
    assert relative(found.weights, whole.weights) < 1e-8
    assert relative(found.average, whole.average) < 1e-8
    with pytest.raises(ValueError, match=r"that run has data.max_frames x parallel.dp=2.*init_from"):
        fit(None, replace(config, resume=folder, data=replace(config.data, max_frames=1)))
    ase.io.write(train, ase.io.read(train, ":4"))  # the same configuration, other data
    with pytest.raises(
        ValueError, match=r"took 4 batches per epoch and 1 per step.* would take 2 and 1.*init_from"
    ):
        fit(None, replace(config, resume=folder))


@pytest.mark.parametrize("heads", ["conservative", "direct"])
def test_a_rank_without_atoms_trains_along(config, pool, heads, tmp_path):
    """One or two atoms on three ranks."""
    images = [labelled(bulk("Cu", cubic=True)[:n], n, stress=False) for n in (1, 2)]
    ase.io.write(tmp_path / "few.xyz", images)
    files = {"train": str(tmp_path / "few.xyz"), "val": str(tmp_path / "few.xyz")}
    config = replace(config, heads=heads, data=DataConfig(**files, max_frames=1))
    config.trainer = replace(config.trainer, max_epochs=2, validate_every=1)
    found, ranks = on_ranks(pool, meshed(config, 3, 1))
    assert_same(found, ranks, fit(None, config), 1e-8)


def test_memory_that_runs_out_on_one_rank_ends_all(config, pool):
    with pytest.raises(RankError, match="no memory left on this rank"):
        pool.run(2, fail, meshed(config, 2, 1), 1)
