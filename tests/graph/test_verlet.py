"""A list with a skin equals a fresh list, whatever moves."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from hypothesis import given, settings
from hypothesis import strategies as st

from gnnmd.graph import AtomBatch, NeighborList, VerletList, neighbor_list, verlet


def assert_same(a: NeighborList, b: NeighborList) -> None:
    assert torch.equal(a.edge_index, b.edge_index)
    assert torch.equal(a.shift, b.shift)
    assert a.r_cut == b.r_cut


def silver() -> AtomBatch:
    atoms = bulk("Ag", cubic=True).repeat((3, 2, 2))
    atoms.rattle(0.1, seed=0)
    return AtomBatch.from_ase(atoms)


def shifted(batch: AtomBatch, atom: int, by: float) -> AtomBatch:
    positions = batch.positions.clone()
    positions[atom, 0] += by
    return replace(batch, positions=positions)


def lattice_jumps(batch: AtomBatch, rng: np.random.Generator, share: float) -> torch.Tensor:
    """Whole lattice vectors along periodic axes for a share of the atoms, ``[N, 3]`` Angstrom."""
    jumps = rng.integers(-2, 3, batch.positions.shape) * (rng.random((len(batch.numbers), 1)) < share)
    cell = batch.cell * batch.pbc[..., None]
    return torch.einsum("na,nab->nb", torch.from_numpy(jumps).double(), cell[batch.system])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    pbc=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    strain=st.sampled_from([0.0, 0.002]),
    skin=st.sampled_from([0.0, 0.6, 1.5]),
)
def test_reused_list_equals_a_fresh_one_along_a_trajectory(seed, pbc, strain, skin):
    """Random walk of two systems with wrapping by the caller and a fluctuating cell."""
    rng = np.random.default_rng(seed)
    cell = rng.uniform(3.0, 9.0, 3) * np.eye(3) + np.tril(rng.uniform(-1, 1, (3, 3)), -1)
    images = [Atoms("H12", rng.random((12, 3)) @ cell, cell=cell, pbc=pbc), molecule("CH3OH")]
    batch = AtomBatch.from_ase(images)
    standing = VerletList(3.5, skin)
    for _ in range(12):
        assert_same(standing.update(batch), neighbor_list(batch, 3.5))
        positions = batch.positions + 0.04 * torch.from_numpy(rng.normal(size=batch.positions.shape))
        deformation = torch.eye(3) + strain * torch.from_numpy(rng.normal(size=(2, 3, 3)))
        positions = torch.einsum("na,nab->nb", positions, deformation[batch.system])
        batch = replace(batch, positions=positions, cell=batch.cell @ deformation)
        batch = replace(batch, positions=positions + lattice_jumps(batch, rng, 0.2))
    assert standing.n_updates == 12
    assert standing.n_builds == 12 if skin == 0.0 else standing.n_builds < 12


def test_displacement_ignored_loses_pairs(monkeypatch):
    """Negative control: without the displacement test the trajectory test would fail."""
    monkeypatch.setattr(
        VerletList, "_jumps", lambda self, before, now: torch.zeros_like(now.positions).long()
    )
    batch, standing = silver(), VerletList(5.0, 0.5)
    standing.update(batch)
    moved = shifted(batch, 7, 1.5)
    assert standing.update(moved).edge_index.shape[1] < neighbor_list(moved, 5.0).edge_index.shape[1]


def test_list_stands_until_an_atom_moved_half_the_skin():
    batch, standing = silver(), VerletList(5.0, 1.0)
    for by, builds in ((0.0, 1), (0.3, 1), (0.499, 1), (0.501, 2), (0.9, 2), (0.501, 2), (0.0, 3)):
        moved = shifted(batch, 3, by)
        assert_same(standing.update(moved), neighbor_list(moved, 5.0))
        assert standing.n_builds == builds


def test_jump_by_lattice_vectors_costs_no_build():
    """Fault 5: wrapping by the caller is no displacement, and the wrapped pairs stay right."""
    rng = np.random.default_rng(0)
    for images in (bulk("Ag", cubic=True).repeat((2, 2, 3)), [bulk("Cu").repeat(3), molecule("H2O")]):
        batch = AtomBatch.from_ase(images)
        standing = VerletList(4.5, 1.0)
        standing.update(batch)
        for _ in range(3):
            moved = batch.positions + 0.1 * torch.from_numpy(rng.normal(size=batch.positions.shape))
            moved = replace(batch, positions=moved + lattice_jumps(batch, rng, 0.7))
            assert_same(standing.update(moved), neighbor_list(moved, 4.5))
        assert standing.n_builds == 1


def test_small_strain_is_covered_by_the_skin_and_large_strain_is_not():
    """Fault 1: the cell changes under the standing list, atoms following or not."""
    batch, standing = silver(), VerletList(5.0, 1.0)
    standing.update(batch)
    for stretch, builds in ((0.99, 1), (1.02, 1), (0.84, 1), (0.82, 2), (1.10, 2), (0.65, 3)):
        affine = replace(batch, positions=batch.positions * stretch, cell=batch.cell * stretch)
        assert_same(standing.update(affine), neighbor_list(affine, 5.0))
        assert standing.n_builds == builds
    cell_only = replace(affine, cell=affine.cell * 0.97)
    assert_same(standing.update(cell_only), neighbor_list(cell_only, 5.0))


def test_compression_brings_outside_pairs_in():
    """Every pair inside the cutoff after the strain was in the list, though no atom moved in its cell."""
    sheared = [4.99, 8.0, 6.5]
    for lengths in ((4.99, 6.5, 5.45, 4.99), (sheared, 6.5, sheared), (6.2, 4.9, sheared)):
        atoms = Atoms("H", cell=[6.5, 6.5, 6.5], pbc=True)
        standing = VerletList(5.0, 1.0)
        assert standing.update(AtomBatch.from_ase(atoms)).edge_index.shape[1] == 0
        for length in lengths:
            atoms.set_cell(np.broadcast_to(length, 3), scale_atoms=True)
            expected = 2 * int((atoms.cell.lengths() < 5.0).sum())
            assert standing.update(AtomBatch.from_ase(atoms)).edge_index.shape[1] == expected


def test_cell_vectors_of_open_axes_do_not_matter():
    batch, standing = AtomBatch.from_ase(molecule("C6H6", cell=[9.0, 9.0, 9.0])), VerletList(3.0, 0.5)
    standing.update(batch)
    changed = replace(batch, cell=batch.cell * 3)
    assert_same(standing.update(changed), neighbor_list(batch, 3.0))
    assert standing.n_builds == 1


@pytest.mark.parametrize("change", ["numbers", "pbc", "charge", "spin", "dataset", "size"])
def test_changed_systems_get_a_new_list(change):
    """Fault 15."""
    atoms = bulk("Ag", cubic=True)
    batch, standing = AtomBatch.from_ase(atoms), VerletList(5.0, 1.0)
    standing.update(batch)
    if change == "size":
        changed = AtomBatch.from_ase(atoms[1:])
    elif change == "dataset":
        changed = replace(batch, dataset=("omat",))
    else:
        changed = replace(
            batch, **{change: batch.pbc.logical_not() if change == "pbc" else getattr(batch, change) + 1}
        )
    assert_same(standing.update(changed), neighbor_list(changed, 5.0))
    assert standing.n_builds == 2
    standing.update(changed)
    assert standing.n_builds == 2


def test_atoms_moved_in_place_are_noticed():
    batch, standing = silver(), VerletList(5.0, 0.5)
    standing.update(batch)
    batch.positions[4] += 2.0
    assert_same(standing.update(batch), neighbor_list(batch, 5.0))
    batch.cell.mul_(0.9)
    assert_same(standing.update(batch), neighbor_list(batch, 5.0))
    assert standing.n_builds == 3


@pytest.mark.parametrize("where", ["positions", "cell"])
def test_numbers_that_are_not_finite_are_refused(where):
    batch, standing = silver(), VerletList(5.0, 0.5)
    standing.update(batch)
    broken = replace(batch, **{where: getattr(batch, where) * float("nan")})
    with pytest.raises(ValueError, match="finite"):
        standing.update(broken)
    assert_same(standing.update(batch), neighbor_list(batch, 5.0))


def test_backend_is_passed_on(monkeypatch):
    asked = []
    monkeypatch.setattr(
        verlet, "neighbor_list", lambda *args, backend: asked.append(backend) or neighbor_list(*args)
    )
    VerletList(5.0, 0.5, "torch").update(silver())
    assert asked == ["torch"]


def test_negative_skin_is_refused():
    with pytest.raises(ValueError, match="skin must be a distance of at least 0"):
        VerletList(5.0, -0.1)
