from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT

from gnnmd.data import load_silver, read_frames
from gnnmd.data.silver import generate, silver_file

COUNTS = {"train": (270, 25830), "val": (30, 2870), "test": (60, 5740)}


@pytest.mark.parametrize("split", COUNTS)
def test_every_split_is_complete_and_fully_labelled(split: str) -> None:
    frames = load_silver(split)
    assert (len(frames), sum(map(len, frames))) == COUNTS[split]
    for atoms in frames:
        assert set(atoms.calc.results) == {"energy", "forces", "stress"}
        assert set(atoms.numbers) == {47}
        assert atoms.pbc.all()


@pytest.mark.parametrize("split", COUNTS)
def test_the_labels_are_those_of_emt(split: str) -> None:
    frames = load_silver(split)
    for atoms in (frames[0], frames[-1]):  # 71 atoms at 300 K, 108 molten ones at 8000 K
        again = atoms.copy()
        again.calc = EMT()
        assert abs(again.get_potential_energy() - atoms.get_potential_energy()) < 1e-7
        np.testing.assert_allclose(again.get_forces(), atoms.get_forces(), atol=1e-7)
        np.testing.assert_allclose(again.get_stress(), atoms.get_stress(), atol=1e-9)


def test_no_trajectory_is_in_two_splits() -> None:
    names = {split: {a.info["traj"] for a in load_silver(split)} for split in COUNTS}
    assert [len(names[split]) for split in COUNTS] == [45, 15, 30]
    starts = [a.positions[0].tolist() for split in COUNTS for a in load_silver(split)]
    assert len(set.union(*names.values())) == 90
    assert len({tuple(x) for x in starts}) == 360


def order(atoms: Atoms) -> float:
    """Return the mean of |sum exp(i k x)|^2 / N^2 over the 111 and 200 peaks of 3x3x3 cells of fcc.

    1 at rest, about 1 / N without order; strain changes nothing.
    """
    peaks = 3 * np.array([(1, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1), (2, 0, 0), (0, 2, 0), (0, 0, 2)])
    phases = np.exp(2j * np.pi * atoms.get_scaled_positions() @ peaks.T)  # [N, 7]
    return float((np.abs(phases.mean(0)) ** 2).mean())


@pytest.mark.parametrize("split", COUNTS)
def test_liquids_have_no_order_and_crystals_do(split: str) -> None:
    frames = load_silver(split)
    liquids = [a for a in frames if a.info["config"] == "liquid108"]
    assert len(liquids) == {"train": 90, "val": 10, "test": 20}[split]
    assert {a.info["T"] for a in liquids} == {1400, 1800, 2600, 4000, 8000}
    assert max(order(a) for a in liquids) < 0.1
    assert min(order(a) for a in frames if a.info["config"] == "fcc108") > 0.2


def test_it_is_small_enough_to_ship() -> None:
    assert sum(silver_file(split).stat().st_size for split in COUNTS) < 1_000_000


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="silver has no split 'valid'; choose one of train, val, test"):
        load_silver("valid")


@pytest.mark.filterwarnings("ignore:The implementation of `fixcm=True`:FutureWarning")
@pytest.mark.filterwarnings("ignore:Use thermalize_momenta:DeprecationWarning")
def test_the_generator_writes_the_same_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "EQUILIBRATION", 1)
    monkeypatch.setattr(generate, "STRIDE", 1)
    monkeypatch.setattr(generate, "MELTING", 30)
    monkeypatch.setattr(
        generate, "TEMPERATURES", {"vac71": (300.0,), "fcc108": (300.0,), "liquid108": (300.0,)}
    )
    monkeypatch.setattr(generate, "SPLITS", {"train": ((0, 1), 2), "val": ((1,), 1)})
    generate.main(["--out", str(tmp_path)])
    made, shipped = read_frames(tmp_path / "train.extxyz.xz", labelled=True), load_silver("train")
    assert [len(a) for a in made] == [71] * 4 + [108] * 8
    assert [a.info["traj"] for a in made[::2]] == [f"train-{i}" for i in range(6)]
    assert [a.info["strained"] for a in made] == [0, 0, 1, 1] * 3
    assert made[0].info.keys() == shipped[0].info.keys()
    assert made[0].arrays.keys() == shipped[0].arrays.keys()
    assert made[0].calc.results.keys() == shipped[0].calc.results.keys()
    assert [order(a) > 0.7 for a in made[4:]] == [True] * 4 + [False] * 4  # "liquid108" is being melted
    assert len(read_frames(tmp_path / "val.extxyz.xz")) == 3
    again = made[2].copy()
    again.calc = EMT()
    np.testing.assert_allclose(again.get_forces(), made[2].get_forces(), atol=1e-7)


def test_the_vacancy_the_strain_and_the_density_are_those_of_the_shipped_set() -> None:
    """The start cells depend on numpy's generator only, so they survive new versions of ase."""
    first = {a.info["traj"]: a for a in reversed(load_silver("val"))}
    start = {
        i: generate.start_cell(kind, t, np.random.default_rng([generate.SEED, 1, i]), strained=True)
        for i, kind, t in ((0, "vac71", 300.0), (10, "liquid108", 1400.0))
    }
    for i in start:
        np.testing.assert_allclose(start[i].cell.array, first[f"val-{i}"].cell.array, atol=1e-8)
    moved = np.abs(start[0].positions - first["val-0"].positions)
    assert moved.max() < 0.8  # thermal motion, not another vacancy
