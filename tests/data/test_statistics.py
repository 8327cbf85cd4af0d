import json
import math

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from gnnmd.data import load_silver
from gnnmd.data.dataset import AtomsDataset
from gnnmd.data.statistics import Statistics, element_references


def with_energy(atoms: Atoms, energy: float) -> Atoms:
    atoms.calc = SinglePointCalculator(atoms, energy=energy)
    return atoms


def test_references_are_recovered_where_the_compositions_determine_them() -> None:
    true = {1: -13.6, 6: -1030.0, 8: -2040.0}
    frames = []
    for name in ("H2O", "CH4", "CO2", "H2", "CH3OH"):
        atoms = molecule(name)
        frames.append(with_energy(atoms, sum(true[z] for z in atoms.numbers)))
    statistics = Statistics.from_dataset(AtomsDataset(frames, 2.0))
    for z in range(119):
        assert statistics.element_energies[z] == pytest.approx(true.get(z, 0.0), abs=1e-8)
    assert statistics.elements == (1, 6, 8)
    assert statistics.energy_std < 1e-10


@pytest.mark.parametrize("repeat", [1, 2, 64])
def test_a_fixed_stoichiometry_takes_the_minimum_norm(repeat: int) -> None:
    """Water: E/n = (o + 2 h)/3 has a line of solutions; the shortest is (o, h) along (1, 2)."""
    composition = torch.zeros(repeat + 1, 119, dtype=torch.int64)
    composition[:, 8], composition[:, 1] = torch.arange(1, repeat + 2), 2 * torch.arange(1, repeat + 2)
    per_water = -468.0
    references, std = element_references(per_water * composition[:, 8].double(), composition)
    assert references[8].item() == pytest.approx(per_water / 5)
    assert references[1].item() == pytest.approx(2 * per_water / 5)
    assert std < 1e-10


def test_silver_has_the_known_statistics() -> None:
    dataset = AtomsDataset(load_silver("train"), 6.0)
    statistics = Statistics.from_dataset(dataset)
    assert statistics.elements == (47,)
    assert (statistics.n_frames, statistics.n_atoms) == (270, 25830)
    assert (statistics.n_energies, statistics.n_forces, statistics.n_stresses) == (270, 25830, 270)
    per_atom = [a.get_potential_energy() / len(a) for a in load_silver("train")]
    assert statistics.element_energies[47] == pytest.approx(np.mean(per_atom))
    assert statistics.energy_std == pytest.approx(np.std(per_atom))
    assert statistics.force_rms == pytest.approx(1.145, abs=1e-3)
    assert statistics.mean_edges == pytest.approx(48.2, abs=0.1)


def test_missing_labels_do_not_count() -> None:
    """One frame has only an energy, one only forces, one half of everything masked."""
    a, b = Atoms("He", [[0, 0, 0]]), Atoms("He2", [[0, 0, 0], [0, 0, 3]])
    a.calc = SinglePointCalculator(a, energy=-5.0)
    b.calc = SinglePointCalculator(b, forces=np.array([[3.0, 0, 0], [0, 4, 0]]))
    statistics = Statistics.from_dataset(AtomsDataset([a, b], 5.0))
    assert statistics.element_energies[2] == -5.0
    assert statistics.energy_std == 0.0
    assert statistics.force_rms == pytest.approx(math.sqrt(25 / 6))
    assert (statistics.n_energies, statistics.n_forces, statistics.n_stresses) == (1, 2, 0)
    assert statistics.mean_edges == pytest.approx(2 / 3)


def test_statistics_survive_json() -> None:
    lone = Atoms("He", [[0, 0, 0]])
    lone.calc = SinglePointCalculator(lone, energy=-1.0)
    statistics = Statistics.from_dataset(AtomsDataset([lone], 3.0))
    assert math.isnan(statistics.force_rms)
    text = json.dumps(statistics.to_dict(), allow_nan=False)
    restored = Statistics.from_dict(json.loads(text))
    assert restored.to_dict() == statistics.to_dict()
    assert restored.element_energies == statistics.element_energies
    assert restored.elements == (2,)
    assert math.isnan(restored.force_rms)
