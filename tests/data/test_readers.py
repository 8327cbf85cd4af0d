import sqlite3
from pathlib import Path

import ase.db
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from gnnmd.data import read_frames
from gnnmd.data.readers import read_sources
from gnnmd.graph import AtomBatch, LabelKeys


def crystal(k: int = 0) -> Atoms:
    atoms = bulk("Ag", cubic=True)
    rng = np.random.default_rng(k)
    atoms.rattle(0.1, rng=rng)
    atoms.calc = SinglePointCalculator(
        atoms, energy=-1.5 - k, forces=rng.normal(size=(4, 3)), stress=rng.normal(size=6)
    )
    return atoms


def same(a: Atoms, b: Atoms, atol: float = 0.0) -> bool:
    x, y = AtomBatch.from_ase(a), AtomBatch.from_ase(b)
    fields = ("positions", "numbers", "cell", "pbc", "charge", "spin", "energy", "forces", "stress")
    return x.dataset == y.dataset and all(
        np.allclose(getattr(x, f), getattr(y, f), rtol=0, atol=atol, equal_nan=True) for f in fields
    )


def energies(frames: list[Atoms]) -> list[float]:
    return [a.get_potential_energy() for a in frames]


@pytest.mark.parametrize(("name", "atol"), [("a.extxyz", 1e-8), ("a.xyz.gz", 1e-8), ("a.traj", 0.0)])
def test_positions_cell_and_labels_survive_the_file(tmp_path: Path, name: str, atol: float) -> None:
    frames = [crystal(k) for k in range(3)]
    write(tmp_path / name, frames)
    for read, written in zip(read_frames(tmp_path / name, labelled=True), frames, strict=True):
        assert same(read, written, atol)


@pytest.mark.parametrize("suffix", ["db", "aselmdb"])
def test_databases_keep_labels_charge_spin_and_data_set(tmp_path: Path, suffix: str) -> None:
    frames = [crystal(k) for k in range(3)]
    with ase.db.connect(tmp_path / f"a.{suffix}") as database:
        for k, atoms in enumerate(frames):
            data = {"charge": k - 1, "spin": k, "dataset": "omol"}
            database.write(atoms, data=data)
            atoms.info = data
    read = read_frames(tmp_path / f"a.{suffix}")
    assert [same(a, b) for a, b in zip(read, frames, strict=True)] == [True] * 3
    assert energies(read_frames(f"{tmp_path}/a.{suffix}@1:")) == [-2.5, -3.5]


def test_a_database_takes_labels_from_its_data_under_other_keys(tmp_path: Path) -> None:
    atoms = crystal()
    reference = np.full((4, 3), 0.25)
    with ase.db.connect(tmp_path / "a.db") as database:
        database.write(
            atoms,
            key_value_pairs={"e_dft": 7.5},
            data={"f_dft": reference, "energy": -9.0, "stress": [1] * 6},
        )
    (read,) = read_frames(tmp_path / "a.db", keys=LabelKeys("e_dft", "f_dft", "s_dft"))
    batch = AtomBatch.from_ase(read)
    assert batch.energy.item() == 7.5
    assert (batch.forces == 0.25).all()
    assert batch.stress.isnan().all()
    (other,) = read_frames(tmp_path / "a.db")
    assert AtomBatch.from_ase(other).energy.item() == -9.0  # what is written beside the results was meant


def test_an_aselmdb_file_is_not_changed_by_reading(tmp_path: Path) -> None:
    with ase.db.connect(tmp_path / "a.aselmdb") as database:
        database.write(crystal())
    before = (tmp_path / "a.aselmdb").read_bytes()
    (tmp_path / "a.aselmdb-lock").unlink(missing_ok=True)
    read_frames(tmp_path)
    assert (tmp_path / "a.aselmdb").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.aselmdb"]


def test_a_virial_becomes_the_stress_of_a_frame_that_has_none(tmp_path: Path) -> None:
    atoms = crystal()
    stress = atoms.get_stress(voigt=False)
    atoms.info["virial"] = -stress * atoms.get_volume()
    atoms.info["w"] = 2 * atoms.info["virial"]
    del atoms.calc.results["stress"]
    open_cluster = atoms.copy()
    open_cluster.cell, open_cluster.pbc = None, False
    write(tmp_path / "a.extxyz", [atoms, open_cluster])
    read, cluster = read_frames(tmp_path / "a.extxyz")
    np.testing.assert_allclose(read.get_stress(voigt=False), stress, atol=1e-8)
    assert "virial" not in read.info
    assert cluster.calc is None
    (read,) = read_frames(tmp_path / "a.extxyz@0", keys=LabelKeys(virial="w"))
    np.testing.assert_allclose(read.get_stress(voigt=False), 2 * stress, atol=1e-8)
    atoms.info["stress"] = np.eye(3)  # what is given as a stress comes first
    write(tmp_path / "a.extxyz", atoms)
    (read,) = read_frames(tmp_path / "a.extxyz")
    np.testing.assert_allclose(read.get_stress(voigt=False), np.eye(3), atol=1e-8)


def test_label_keys_choose_among_levels_of_theory(tmp_path: Path) -> None:
    atoms = crystal()  # labels under ASE's names, others beside them
    atoms.info.update(e_ccsd=-40.0, s_ccsd=np.arange(9.0).reshape(3, 3))
    atoms.arrays["f_ccsd"] = np.ones((4, 3))
    write(tmp_path / "a.extxyz", atoms)
    (read,) = read_frames(tmp_path / "a.extxyz", keys=LabelKeys("e_ccsd", "f_ccsd", "s_ccsd"))
    batch = AtomBatch.from_ase(read)
    assert batch.energy.item() == -40.0
    assert (batch.forces == 1).all()
    np.testing.assert_allclose(batch.stress[0], [[0, 2, 4], [2, 4, 6], [4, 6, 8]])  # symmetric part
    (mixed,) = read_frames(tmp_path / "a.extxyz", keys=LabelKeys(energy="e_ccsd"))
    assert AtomBatch.from_ase(mixed).energy.item() == -40.0
    np.testing.assert_allclose(mixed.get_forces(), crystal().get_forces(), atol=1e-8)


def test_a_molecule_set_without_cell_or_stress_is_open_and_its_stress_masked(tmp_path: Path) -> None:
    frames = []
    for name in ("H2O", "CH4"):
        atoms = molecule(name)
        atoms.info.update(charge=1, spin=2)
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((len(atoms), 3)))
        frames.append(atoms)
    write(tmp_path / "a.xyz", frames, format="extxyz")
    batch = AtomBatch.from_ase(read_frames(tmp_path / "a.xyz", labelled=True))
    assert not batch.pbc.any()
    assert not batch.cell.any()
    assert batch.charge.tolist() == [1, 1]
    assert batch.spin.tolist() == [2, 2]
    assert batch.stress.isnan().all()
    assert not batch.forces.isnan().any()


def test_missing_labels_are_nan_and_not_zero(tmp_path: Path) -> None:
    only_energy, only_forces = crystal(), crystal()
    only_energy.calc = SinglePointCalculator(only_energy, energy=-3.0)
    only_forces.calc = SinglePointCalculator(only_forces, forces=np.ones((4, 3)))
    write(tmp_path / "a.extxyz", [only_energy, only_forces])
    batch = AtomBatch.from_ase(read_frames(tmp_path / "a.extxyz", labelled=True))
    assert batch.energy[0] == -3.0
    assert batch.energy[1].isnan()
    assert batch.forces[:4].isnan().all()
    assert (batch.forces[4:] == 1).all()
    assert batch.stress.isnan().all()


def test_a_stress_without_volume_is_dropped(tmp_path: Path) -> None:
    atoms = molecule("H2O")
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, stress=np.zeros(6))
    write(tmp_path / "a.extxyz", atoms)
    (read,) = read_frames(tmp_path / "a.extxyz")
    assert set(read.calc.results) == {"energy"}


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ("@1", [-2.5]),
        ("@-1", [-5.5]),
        ("@:2", [-1.5, -2.5]),
        ("@::2", [-1.5, -3.5, -5.5]),
        ("@-2:", [-4.5, -5.5]),
    ],
)
def test_an_index_selects_frames_as_python_does(tmp_path: Path, index: str, expected: list[float]) -> None:
    write(tmp_path / "a.extxyz", [crystal(k) for k in range(5)])
    assert energies(read_frames(f"{tmp_path}/a.extxyz{index}")) == expected


def test_frames_keep_their_number_in_the_file_under_an_index(tmp_path: Path) -> None:
    frames = [crystal(k) for k in range(5)]
    frames[3].calc.results["energy"] = np.nan
    write(tmp_path / "a.extxyz", frames)
    assert len(read_frames(f"{tmp_path}/a.extxyz@:3")) == 3
    for index in ("@2:", "@-2:", "@3"):
        with pytest.raises(ValueError, match=r"a\.extxyz, frame 3: energy contains NaN"):
            read_frames(f"{tmp_path}/a.extxyz{index}")


def test_patterns_and_lists_are_read_in_order(tmp_path: Path) -> None:
    for k in range(3):
        write(tmp_path / f"run{k}.extxyz", [crystal(k), crystal(k)])
    assert energies(read_frames(f"{tmp_path}/run*.extxyz@:1")) == [-1.5, -2.5, -3.5]
    assert energies(read_frames([tmp_path / "run2.extxyz", f"{tmp_path}/run0.extxyz@0"])) == [
        -3.5,
        -3.5,
        -1.5,
    ]


def test_a_file_name_may_hold_an_at_sign(tmp_path: Path) -> None:
    write(tmp_path / "ag@300", [crystal(0), crystal(1)], format="extxyz")
    assert len(read_frames(tmp_path / "ag@300")) == 2
    assert energies(read_frames(f"{tmp_path}/ag@300@1")) == [-2.5]


def test_the_data_set_name_is_given_or_kept(tmp_path: Path) -> None:
    atoms = crystal()
    atoms.info["dataset"] = "omat"
    write(tmp_path / "a.extxyz", [atoms, crystal()])
    assert AtomBatch.from_ase(read_frames(tmp_path / "a.extxyz")).dataset == ("omat", "")
    assert AtomBatch.from_ase(read_frames(tmp_path / "a.extxyz", dataset="oc20")).dataset == ("oc20", "oc20")


def extxyz(path: Path, *frames: str) -> Path:
    good = '2\nLattice="9 0 0 0 9 0 0 0 9" energy=1.0\nAg 0 0 0\nAg 3 0 0\n'
    path.write_text(good + good + "".join(frames))
    return path


CUBE = 'Lattice="9 0 0 0 9 0 0 0 9"'
FORCES = "Properties=species:S:1:pos:R:3:forces:R:3"


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (f"1\n{CUBE} energy=nan\nAg 0 0 0\n", "energy contains NaN"),
        (f"1\n{CUBE} energy=inf\nAg 0 0 0\n", "energy contains inf"),
        (f"2\n{CUBE} {FORCES}\nAg 0 0 0 1 1 1\nAg 3 0 0 1 nan 1\n", r"forces contains NaN \(atom 1\)"),
        (f'1\n{CUBE} stress="0 0 0 0 nan 0 0 0 0"\nAg 0 0 0\n', "stress contains NaN"),
        (f"2\n{CUBE} energy=1\nAg 0 0 0\nAg 0 nan 0\n", r"positions contains NaN \(atom 1\)"),
        ('1\nLattice="9 0 0 0 inf 0 0 0 9" energy=1\nAg 0 0 0\n', r"cell contains inf \(lattice vector 1\)"),
        (
            f"2\n{CUBE} Properties=species:S:1:pos:R:3:forces:R:2\nAg 0 0 0 1 1\nAg 3 0 0 1 1\n",
            r"forces \(key 'forces'\) has shape \(2, 2\), expected \(2, 3\)",
        ),
        (f'1\n{CUBE} energy="1 2"\nAg 0 0 0\n', r"energy \(key 'energy'\) has shape \(2,\)"),
        (f"1\n{CUBE} energy=low\nAg 0 0 0\n", r"energy \(key 'energy'\) is 'low', not a number"),
        (f'1\n{CUBE} stress="1 2 3 4"\nAg 0 0 0\n', "ASE could not read it.*stress"),
        ('1\npbc="T T T" energy=1\nAg 0 0 0\n', "periodic along abc but the cell is singular"),
        ('1\npbc="F F T" energy=1 Lattice="9 0 0 0 9 0 0 0 0"\nAg 0 0 0\n', "periodic along c but"),
        ('1\nenergy=1 Lattice="9 0 0 9 0 0 0 0 9"\nAg 0 0 0\n', "the cell is singular"),
        (f"1\n{CUBE} energy=1 Properties=Z:I:1:pos:R:3\n0 0 0 0\n", "atom 0 has the unknown element Z = 0"),
        (f"1\n{CUBE} energy=1 Properties=Z:I:1:pos:R:3\n119 0 0 0\n", "unknown element Z = 119"),
        (f"1\n{CUBE} energy=1\nXx 0 0 0\n", "ASE could not read it"),
        (f"2\n{CUBE} energy=1\nAg 0 0 0\nAg 0.05 0 8.99\n", "atoms 0 and 1 are 0.051 A apart"),
        (f"1\n{CUBE} energy=1 charge=0.5\nAg 0 0 0\n", "charge is 0.5, expected one integer"),
        (f"1\n{CUBE} energy=1 spin=up\nAg 0 0 0\n", r"spin is up, expected one integer \(multiplicity"),
        ("0\nenergy=1\n", "there are no atoms"),
        (
            f"1\n{CUBE} e=1 config=a\nAg 0 0 0\n",
            "no labels under the keys 'energy', 'forces', 'stress'.*config, e",
        ),
        (f"3\n{CUBE} energy=1\nAg 0 0 0\n", "ASE could not read it"),
        (f"{CUBE} energy=1\nAg 0 0 0\n", "ASE could not read it"),
        (f"\n1\n{CUBE} energy=1\nAg 0 0 0\n", "an empty line where the number of atoms belongs"),
    ],
)
def test_a_bad_frame_is_refused_with_file_and_frame(tmp_path: Path, frame: str, message: str) -> None:
    file = extxyz(tmp_path / "train.extxyz", frame)
    with pytest.raises(ValueError, match=rf"train\.extxyz, frame 2: .*{message}.*\.$"):
        read_frames(file, labelled=True)
    assert len(read_frames(f"{file}@:2", labelled=True)) == 2  # the frames before it are fine


def test_frames_without_labels_are_fine_for_prediction(tmp_path: Path) -> None:
    write(tmp_path / "a.extxyz", molecule("H2O"))
    (atoms,) = read_frames(tmp_path / "a.extxyz")
    assert atoms.calc is None


def test_a_bad_database_row_is_named(tmp_path: Path) -> None:
    frames = [crystal(), crystal()]
    frames[1].calc.results["energy"] = np.nan
    with ase.db.connect(tmp_path / "a.aselmdb") as database:
        for atoms in frames:
            database.write(atoms)
    with pytest.raises(ValueError, match=r"a\.aselmdb, frame 1 \(id 2\): energy contains NaN"):
        read_frames(tmp_path / "a.aselmdb")


def test_a_file_ase_cannot_parse_is_named(tmp_path: Path) -> None:
    (tmp_path / "POSCAR").write_text("Ag\n1.0\n9 0 0\n0 nine 0\n")
    with pytest.raises(ValueError, match=r"POSCAR, at or after frame 0: ASE could not read it"):
        read_frames(tmp_path / "POSCAR")
    (tmp_path / "notes").write_text("nothing that looks like atoms")
    with pytest.raises(ValueError, match=r"notes: not a format that ASE knows"):
        read_frames(tmp_path / "notes")


def test_a_stress_under_another_key_is_checked_too(tmp_path: Path) -> None:
    file = extxyz(tmp_path / "train.extxyz", f'1\n{CUBE} energy=1 s="1 2 3 4"\nAg 0 0 0\n')
    with pytest.raises(
        ValueError, match=r"frame 2: stress \(key 's'\) has shape \(4,\), expected \(3, 3\), 9 or 6"
    ):
        read_frames(file, keys=LabelKeys(stress="s"))


def test_files_that_are_missing_or_empty_are_named(tmp_path: Path) -> None:
    for path in (f"{tmp_path}/no.extxyz", f"{tmp_path}/no.extxyz@:3", f"{tmp_path}/*.nothing"):
        with pytest.raises(FileNotFoundError, match=r"no such file or directory \(looked in"):
            read_frames(path)
    (tmp_path / "a.extxyz").write_text("")
    with pytest.raises(ValueError, match=r"a\.extxyz: the file is empty"):
        read_frames(tmp_path / "a.extxyz")
    (tmp_path / "b.extxyz").write_text("\n")
    with pytest.raises(ValueError, match=r"b\.extxyz: no frames"):
        read_frames(tmp_path / "b.extxyz")
    write(tmp_path / "c.extxyz", crystal())
    with pytest.raises(ValueError, match=r"c\.extxyz@5:: no frames"):
        read_frames(f"{tmp_path}/c.extxyz@5:")
    with pytest.raises(ValueError, match="empty list of paths"):
        read_frames([])
    with pytest.raises(ValueError, match="neither a DeePMD system"):
        read_frames(tmp_path)
    sqlite3.connect(tmp_path / "d.db").close()
    with pytest.raises(ValueError, match=r"d\.db: the file is empty"):
        read_frames(tmp_path / "d.db")


def test_sources_are_the_entries_of_the_list_without_what_they_share(tmp_path: Path) -> None:
    for name in ("x/a", "x/b", "y/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.extxyz", [crystal(1), crystal(2)])
    entries = [f"{tmp_path}/x/*.extxyz", f"{tmp_path}/y/a.extxyz@:1"]  # a pattern is one, whatever it finds
    frames, sources = read_sources(entries)
    assert energies(frames) == energies(read_frames(entries))
    assert sources == ["x/*.extxyz"] * 4 + ["y/a.extxyz@:1"]
    assert read_sources(tmp_path / "y" / "a.extxyz")[1] == ["a.extxyz"] * 2


def test_sources_are_levels_of_theory_where_frames_name_several(tmp_path: Path) -> None:
    def write_levels(name: str, *levels: str) -> str:
        frames = [crystal(k) for k in range(len(levels))]
        for atoms, level in zip(frames, levels, strict=True):
            atoms.info |= {"dataset": level} if level else {}
        write(tmp_path / name, frames)
        return str(tmp_path / name)

    one, two = write_levels("a.extxyz", "pbe", ""), write_levels("b.extxyz", "pbe", "hse")
    assert read_sources([one, two])[1] == ["pbe", "a.extxyz", "pbe", "hse"]
    assert read_sources([one, one])[1] == ["a.extxyz"] * 4
    assert read_sources([one, two], dataset="pbe")[1] == ["a.extxyz"] * 2 + ["b.extxyz"] * 2
