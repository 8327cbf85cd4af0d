from pathlib import Path

import numpy as np
import pytest
from ase.calculators.emt import EMT

from gnnmd.data import load_silver, read_frames
from gnnmd.data.silver import generate, silver_file

COUNTS = {"train": (180, 16110), "val": (20, 1790), "test": (40, 3580)}


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
    for atoms in (frames[0], frames[-1]):  # 71 atoms at 300 K, 108 at 1500 K
        again = atoms.copy()
        again.calc = EMT()
        assert abs(again.get_potential_energy() - atoms.get_potential_energy()) < 1e-7
        np.testing.assert_allclose(again.get_forces(), atoms.get_forces(), atol=1e-7)
        np.testing.assert_allclose(again.get_stress(), atoms.get_stress(), atol=1e-9)


def test_no_trajectory_is_in_two_splits() -> None:
    names = {split: {a.info["traj"] for a in load_silver(split)} for split in COUNTS}
    assert [len(names[split]) for split in COUNTS] == [30, 10, 20]
    starts = [a.positions[0].tolist() for split in COUNTS for a in load_silver(split)]
    assert len(set.union(*names.values())) == 60
    assert len({tuple(x) for x in starts}) == 240


def test_it_is_small_enough_to_ship() -> None:
    assert sum(silver_file(split).stat().st_size for split in COUNTS) < 800_000


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="silver has no split 'valid'; choose one of train, val, test"):
        load_silver("valid")


@pytest.mark.filterwarnings("ignore:The implementation of `fixcm=True`:FutureWarning")
@pytest.mark.filterwarnings("ignore:Use thermalize_momenta:DeprecationWarning")
def test_the_generator_writes_the_same_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "EQUILIBRATION", 1)
    monkeypatch.setattr(generate, "STRIDE", 1)
    monkeypatch.setattr(generate, "TEMPERATURES", (300.0,))
    monkeypatch.setattr(generate, "SPLITS", {"train": ((0, 1), 2), "val": ((1,), 1)})
    generate.main(["--out", str(tmp_path)])
    made, shipped = read_frames(tmp_path / "train.extxyz.xz", labelled=True), load_silver("train")
    assert [len(a) for a in made] == [71] * 4 + [108] * 4
    assert [a.info["traj"] for a in made[::2]] == [f"train-{i}" for i in range(4)]
    assert [a.info["strained"] for a in made] == [0, 0, 1, 1] * 2
    assert made[0].info.keys() == shipped[0].info.keys()
    assert made[0].arrays.keys() == shipped[0].arrays.keys()
    assert made[0].calc.results.keys() == shipped[0].calc.results.keys()
    assert len(read_frames(tmp_path / "val.extxyz.xz")) == 2
    again = made[2].copy()
    again.calc = EMT()
    np.testing.assert_allclose(again.get_forces(), made[2].get_forces(), atol=1e-7)


def test_the_vacancy_and_the_strain_are_those_of_the_shipped_set() -> None:
    """The start crystals depend on numpy's generator only, so they survive new versions of ase."""
    first = [a for a in load_silver("val") if a.info["traj"] == "val-0"][0]
    start = generate.start_crystal(
        "vac71", 300.0, np.random.default_rng([generate.SEED, 1, 0]), strained=True
    )
    np.testing.assert_allclose(start.cell.array, first.cell.array, atol=1e-8)
    assert np.abs(start.positions - first.positions).max() < 0.8  # thermal motion, not another vacancy
