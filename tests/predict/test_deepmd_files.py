"""Files that deepmd-kit wrote, and what it says of them; see tests/golden/deepmd_files/README.md."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

from gnnmd import cli
from gnnmd.interfaces.ase import GNNMDCalculator
from gnnmd.predict import InferenceSettings, PredictUnit, load_checkpoint
from gnnmd.predict.upstream import load_upstream

FILES = Path(__file__).parents[1] / "golden" / "deepmd_files"
FLOAT64 = InferenceSettings(dtype="float64")
CASES = [("dpa3", None), ("dpa2", None)]
CASES += [(name, head) for name in ("dpa3_heads", "dpa2_heads") for head in ("Alloy", "Water")]


@cache
def structures() -> dict[str, Atoms]:
    arrays, found = dict(np.load(FILES / "structures.npz")), {}
    for system in sorted({key.split("/")[0] for key in arrays}):
        z, x, cell, pbc = (arrays[f"{system}/{key}"] for key in ("numbers", "positions", "cell", "pbc"))
        found[system] = Atoms(z, x, cell=cell, pbc=pbc)
    return found


def compare(unit: PredictUnit, name: str, head: str | None) -> None:
    arrays = dict(np.load(FILES / f"{name}.npz"))
    for system, atoms in structures().items():
        expected = {
            key: arrays[f"{head or 'Default'}/{system}/{key}"]
            for key in ("energy", "forces", "virial", "node_energies")
        }
        found, largest = unit.predict(atoms), abs(expected["forces"]).max()
        assert largest > 1e-3
        assert abs(found.energy.item() - expected["energy"]) < 1e-9
        assert abs(found.node_energies.numpy() - expected["node_energies"]).max() < 1e-9
        assert abs(found.forces.numpy() - expected["forces"]).max() < 1e-9 * max(1.0, largest)
        if atoms.pbc.any():
            virial = -found.stress[0].numpy() * atoms.cell.volume
            assert abs(virial - expected["virial"]).max() < 1e-9 * max(1.0, abs(expected["virial"]).max())


@pytest.mark.parametrize(("name", "head"), CASES)
def test_a_file_gives_what_deepmd_kit_says(name: str, head: str | None) -> None:
    unit = PredictUnit.from_upstream(FILES / f"{name}.pt", head=head, device="cpu", settings=FLOAT64)
    compare(unit, name, head)


@pytest.mark.parametrize(("name", "head"), [("dpa3", None), ("dpa2_heads", "metal")])
def test_a_converted_file_says_the_same(name: str, head: str | None, tmp_path: Path) -> None:
    output = str(tmp_path / "a.safetensors")
    arguments = ["convert", str(FILES / f"{name}.pt"), output, *(["--head", head] if head else [])]
    assert cli.main(arguments) == 0
    with PredictUnit.from_checkpoint(output, device="cpu", settings=FLOAT64) as unit:
        compare(unit, name, "Alloy" if head else None)
    assert load_checkpoint(output)[0].elements == (1, 8, 29, 47)


def test_heads_are_different_potentials() -> None:
    """Negative control: of two heads with one descriptor and one network."""
    with pytest.raises(ValueError, match="heads Alloy, Water; choose one with head="):
        load_upstream(FILES / "dpa3_heads.pt")
    unit = PredictUnit.from_upstream(FILES / "dpa3_heads.pt", head="Water", device="cpu", settings=FLOAT64)
    with pytest.raises(AssertionError):
        compare(unit, "dpa3_heads", "Alloy")


@pytest.mark.upstream
@pytest.mark.parametrize(("name", "head"), CASES)
def test_calculators_agree_on_random_structures(name: str, head: str | None) -> None:
    """Where deepmd-kit is installed: 20 structures, energies, forces and stress to 1e-10 of the largest."""
    pytest.importorskip("deepmd.pt", reason="needs deepmd-kit with its PyTorch backend")
    from deepmd.calculator import DP

    path, rng = FILES / f"{name}.pt", np.random.default_rng(0)
    theirs = DP(str(path), head=head)
    unit = PredictUnit.from_upstream(path, head=head, device="cpu", settings=FLOAT64)
    ours, worst = GNNMDCalculator(unit), np.zeros(3)
    for _ in range(20):
        n = int(rng.integers(2, 12))
        cell = 6 * np.eye(3) + rng.normal(scale=0.5, size=(3, 3))
        fractions = (np.indices((3, 3, 3)).reshape(3, -1).T / 3)[rng.permutation(27)[:n]]
        positions = fractions @ cell + rng.normal(scale=0.2, size=(n, 3))
        atoms, found = Atoms(rng.choice([1, 8, 29, 47], n), positions, cell=cell, pbc=True), []
        for calculator in (theirs, ours):
            atoms.calc = calculator
            found.append([atoms.get_potential_energy() / n, atoms.get_forces(), atoms.get_stress()])
        difference = [np.abs(a - b).max() / max(1.0, np.abs(a).max()) for a, b in zip(*found, strict=True)]
        worst = np.maximum(worst, difference)
    print(f"{name} {head}: energy per atom {worst[0]:.1e} eV, forces {worst[1]:.1e}, stress {worst[2]:.1e}")
    assert worst.max() < 1e-10
