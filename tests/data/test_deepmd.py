from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms

from gnnmd.data import read_frames
from gnnmd.graph import AtomBatch

WATER = ("O", "H", "H")
CELL = np.array([[4.0, 0, 0], [0.5, 5.0, 0], [0, 0.25, 6.0]])


def write_set(folder: Path, frames: int, n: int = 3, **extra: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(frames)
    arrays = {
        "coord": np.tile(np.arange(3 * n) * 1.1, (frames, 1)) + 0.01 * rng.normal(size=(frames, 3 * n)),
        "box": np.tile(CELL.ravel(), (frames, 1)),
        "energy": rng.normal(size=frames),
        "force": rng.normal(size=(frames, 3 * n)),
        **extra,
    }
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return arrays


def write_system(system: Path, sets: tuple[int, ...] = (2,)) -> list[dict[str, np.ndarray]]:
    arrays = [write_set(system / f"set.{k:03d}", frames) for k, frames in enumerate(sets)]
    (system / "type.raw").write_text("0\n1\n1\n")
    (system / "type_map.raw").write_text("O\nH\n")
    return arrays


def test_sets_follow_each_other_and_keep_every_digit(tmp_path: Path) -> None:
    sets = write_system(tmp_path / "a", (2, 3))
    frames = read_frames(tmp_path / "a", labelled=True)
    batch = AtomBatch.from_ase(frames)
    assert len(frames) == 5
    assert all(a.get_chemical_symbols() == list(WATER) and a.pbc.all() for a in frames)
    for field, name in ((batch.positions, "coord"), (batch.energy, "energy"), (batch.forces, "force")):
        assert np.array_equal(field.numpy().ravel(), np.concatenate([s[name].ravel() for s in sets]))
    assert np.array_equal(batch.cell[4].numpy(), CELL)
    assert batch.stress.isnan().all()


def test_the_virial_becomes_minus_a_stress(tmp_path: Path) -> None:
    """A Lennard-Jones-like pair in a cell: virial = sum of r (x) f, stress = -virial / V, dE/dstrain / V."""
    write_system(tmp_path / "a")
    virial = np.array([[1.0, 2, 3], [2, 4, 5], [3, 5, 6]])
    np.save(tmp_path / "a/set.000/virial.npy", np.tile(virial.ravel(), (2, 1)))
    batch = AtomBatch.from_ase(read_frames(tmp_path / "a"))
    torch.testing.assert_close(batch.stress[1], torch.tensor(-virial / np.linalg.det(CELL)))


def test_without_boundaries_there_is_no_cell_and_no_stress(tmp_path: Path) -> None:
    write_system(tmp_path / "a")
    (tmp_path / "a/nopbc").touch()
    np.save(tmp_path / "a/set.000/virial.npy", np.ones((2, 9)))
    batch = AtomBatch.from_ase(read_frames(tmp_path / "a"))
    assert not batch.pbc.any()
    assert not batch.cell.any()
    assert batch.stress.isnan().all()
    (tmp_path / "a/set.000/box.npy").unlink()
    assert len(read_frames(tmp_path / "a")) == 2


def test_mixed_types_change_per_frame_and_padding_is_no_atom(tmp_path: Path) -> None:
    arrays = write_system(tmp_path / "a")[0]
    (tmp_path / "a/type.raw").write_text("0 0 0")
    np.save(tmp_path / "a/set.000/real_atom_types.npy", np.array([[1, 0, 1], [0, 1, -1]]))
    first, second = read_frames(tmp_path / "a")
    assert first.get_chemical_formula("reduce") == "HOH"
    assert second.get_chemical_formula("reduce") == "OH"
    np.testing.assert_array_equal(second.get_forces(), arrays["force"][1].reshape(3, 3)[:2])


def test_missing_energies_or_forces_are_masked(tmp_path: Path) -> None:
    write_system(tmp_path / "a")
    (tmp_path / "a/set.000/force.npy").unlink()
    batch = AtomBatch.from_ase(read_frames(tmp_path / "a", labelled=True))
    assert batch.forces.isnan().all()
    assert not batch.energy.isnan().any()


def test_a_directory_of_systems_a_list_and_a_pattern_are_read(tmp_path: Path) -> None:
    write_system(tmp_path / "water/data_0", (1,))
    write_system(tmp_path / "water/deep/data_1", (2, 1))
    assert len(read_frames(tmp_path / "water")) == 4
    assert len(read_frames([tmp_path / "water/data_0", tmp_path / "water/deep"])) == 4
    assert len(read_frames(f"{tmp_path}/water/deep/*@:2")) == 2
    assert len(read_frames(f"{tmp_path}/water/deep/data_1@1:")) == 2


def test_a_missing_type_map_is_asked_for(tmp_path: Path) -> None:
    write_system(tmp_path / "a")
    (tmp_path / "a/type_map.raw").unlink()
    with pytest.raises(ValueError, match=r"a: no type_map\.raw.*Pass type_map"):
        read_frames(tmp_path / "a")
    assert read_frames(tmp_path / "a", type_map=["O", "H"])[0].get_chemical_symbols() == list(WATER)


def test_names_that_no_atom_has_need_not_be_elements(tmp_path: Path) -> None:
    write_system(tmp_path / "a")
    (tmp_path / "a/type_map.raw").write_text("O H MW")
    assert len(read_frames(tmp_path / "a")) == 2


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("set.001/coord.npy", np.zeros((3, 6)), r"set\.001/coord\.npy: shape \(3, 6\), expected \(3, 9\)"),
        ("set.001/force.npy", np.zeros((2, 9)), r"set\.001/force\.npy: shape \(2, 9\), expected \(3, 9\)"),
        ("set.001/energy.npy", np.zeros(9), r"set\.001/energy\.npy: shape \(9,\), expected \(3, 1\)"),
        ("set.001/box.npy", np.zeros((3, 3)), r"set\.001/box\.npy: shape \(3, 3\), expected \(3, 9\)"),
        ("set.001/coord.npy", np.array(1.0), r"set\.001/coord\.npy: shape \(\), expected \(frames, 9\)"),
        ("set.001/energy.npy", "not an array", r"set\.001/energy\.npy: could not be read as a numpy array"),
        ("set.001/energy.npy", np.array([1, np.nan, 1]), r"set\.001, frame 1: energy contains NaN"),
        ("set.001/box.npy", np.zeros((3, 9)), r"set\.001, frame 0: periodic along abc but the cell"),
        ("set.001/coord.npy", np.zeros((3, 9)), r"set\.001, frame 0: atoms \d and \d are 0 A apart"),
        ("type.raw", "0 1 2", r"set\.000, frame 0: atom 2 has type 2, but the type map \(O H\) ends at 1"),
        ("type.raw", "O H H", r"type\.raw: .*'O'.* Every entry must be the integer type"),
        ("type.raw", "", r"type\.raw: the file is empty"),
        ("type_map.raw", "O MW", r"set\.000, frame 0: atom 1 has the unknown element 'MW'"),
    ],
)
def test_files_that_do_not_fit_are_named(
    tmp_path: Path, file: str, content: str | np.ndarray, message: str
) -> None:
    write_system(tmp_path / "a", (2, 3))
    if isinstance(content, str):
        (tmp_path / "a" / file).write_text(content)
    else:
        np.save(tmp_path / "a" / file, content)
    with pytest.raises(ValueError, match=message):
        read_frames(tmp_path / "a")


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    write_system(tmp_path / "a")
    (tmp_path / "a/set.000/box.npy").unlink()
    with pytest.raises(ValueError, match=r"set\.000/box\.npy: no such file.*nopbc"):
        read_frames(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/type.raw").write_text("0")
    (tmp_path / "b/type_map.raw").write_text("H")
    with pytest.raises(ValueError, match=r"b: no set\.\* directory"):
        read_frames(tmp_path / "b")


def test_a_system_and_an_extxyz_file_make_one_list(tmp_path: Path) -> None:
    write_system(tmp_path / "a")
    Atoms("H", [[0, 0, 0]]).write(tmp_path / "b.extxyz")
    assert len(read_frames([tmp_path / "a", tmp_path / "b.extxyz"])) == 3
