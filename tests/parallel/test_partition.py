from functools import cache

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from scipy.spatial import cKDTree

from gnnmd.graph import AtomBatch, NeighborList
from gnnmd.parallel.accounting import partition_virtually
from gnnmd.parallel.partition import PARTITIONERS
from gnnmd.parallel.ranks import Ranks
from gnnmd.parallel.sites import Sites, find_box

R_CUT = 6.0

#: Largest ghost count of plain recursive bisection, thermal fcc silver, cutoff 6 A.
BISECTION = {
    "cube": {2: 3997, 3: 4120, 4: 3995, 6: 3731, 8: 3391, 16: 2479, 64: 1068},
    "box": {2: 3955, 3: 3953, 4: 3622, 6: 3950, 8: 3340, 16: 2447},
    "rod": {4: 1001, 8: 1000},
    "slab": {4: 3057, 8: 2592},
}
REPEATS = {"cube": (20, 20, 20), "box": (18, 22, 27), "rod": (10, 10, 80), "slab": (24, 24, 14)}


@cache
def thermal_silver(name: str) -> tuple[AtomBatch, NeighborList]:
    """Return fcc silver with 0.12 A displacements, in shuffled order, and its edges found by scipy."""
    rng = np.random.default_rng(0)
    atoms = bulk("Ag", "fcc", a=4.09, cubic=True) * REPEATS[name]
    atoms.positions += rng.normal(0, 0.12, atoms.positions.shape)
    if name == "slab":
        atoms.set_cell(atoms.cell.array * [[1], [1], [2]])
    atoms = atoms[rng.permutation(len(atoms))]
    return AtomBatch.from_ase(atoms), scipy_neighbors(atoms)


def scipy_neighbors(atoms: Atoms) -> NeighborList:
    """Edges in an orthogonal cell at least two cutoffs wide; shifts are not needed here."""
    size = atoms.cell.lengths()
    inside = atoms.positions % size
    inside[inside >= size] = 0
    pairs = cKDTree(inside, boxsize=size).query_pairs(R_CUT, output_type="ndarray")
    edges = torch.tensor(np.concatenate([pairs, pairs[:, ::-1]]).T)
    return NeighborList(edges, torch.zeros(edges.shape[1], 3), R_CUT)


def ghosts_by_numpy(owner: np.ndarray, edges: np.ndarray, n_parts: int) -> np.ndarray:
    """Count distinct sources that others own, of the edges ending on each rank, without the package."""
    here, there = owner[edges[1]], owner[edges[0]]
    foreign = here != there
    pairs = {*zip(here[foreign].tolist(), edges[0][foreign].tolist(), strict=True)}
    return np.bincount([rank for rank, _ in pairs], minlength=n_parts)


@pytest.mark.parametrize("name", BISECTION)
def test_auto_has_at_most_the_ghosts_of_the_reference_table(name):
    batch, neighbors = thermal_silver(name)
    for n_parts, reference in BISECTION[name].items():
        found = partition_virtually(batch, neighbors, n_parts)
        ghosts = ghosts_by_numpy(found.owner.numpy(), neighbors.edge_index.numpy(), n_parts)
        assert ghosts.max() <= 1.05 * reference, (n_parts, ghosts.max(), reference)
        assert found.all_to_all().received.tolist() == ghosts.tolist()


@pytest.mark.parametrize("name", ["cube", "slab"])
@pytest.mark.parametrize("partition", ["bisection", "bricks", "morton"])
def test_work_is_balanced_on_bulk_and_slab_for_every_number_of_ranks(name, partition):
    batch, neighbors = thermal_silver(name)
    for n_parts in (*range(1, 17), 64):
        assert partition_virtually(batch, neighbors, n_parts, partition).imbalance <= 1.05, n_parts


def test_a_particle_on_a_slab_is_balanced_by_work_not_by_atoms():
    slab = bulk("Ag", "fcc", a=4.09, cubic=True) * (10, 10, 3)
    particle = bulk("Ag", "fcc", a=4.09, cubic=True) * (4, 4, 4)
    particle.positions += [8.0, 8.0, 12.4]
    slab.set_cell(slab.cell.array + np.diag([0, 0, 40.0]))
    batch = AtomBatch.from_ase(slab + particle)
    for n_parts in (2, 3, 5, 8, 16):
        assert partition_virtually(batch, R_CUT, n_parts).imbalance <= 1.05


def sites_of(batch: AtomBatch, weight: torch.Tensor | None = None) -> Sites:
    box = find_box(batch.positions, batch.system, batch.cell, batch.pbc, Ranks())
    n = len(batch.numbers)
    u = box.coordinates(batch.positions, batch.system)
    one = torch.ones(n, dtype=torch.int64) if weight is None else weight
    return Sites(u, batch.system, one, torch.arange(n), box)


@pytest.mark.parametrize("partition", PARTITIONERS)
def test_any_number_of_ranks_gets_its_share_also_of_a_perfect_crystal(partition):
    """Ties: thousands of atoms have exactly the same coordinate."""
    atoms = bulk("Ag", "fcc", a=4.0, cubic=True) * (6, 6, 6)
    sites = sites_of(AtomBatch.from_ase(atoms))
    for n_parts in (1, 2, 3, 5, 7, 11, 32, 100):
        counts = torch.bincount(
            PARTITIONERS[partition](sites, n_parts, R_CUT, Ranks()).owner(sites), minlength=n_parts
        )
        assert len(counts) == n_parts
        assert counts.max() - counts.min() <= 2 * np.log2(2 * n_parts), n_parts


@pytest.mark.parametrize("partition", PARTITIONERS)
def test_more_ranks_than_atoms_leaves_ranks_empty(partition):
    sites = sites_of(AtomBatch.from_ase(Atoms("Ag3", [[0, 0, 0], [3, 0, 0], [0, 3, 0]])))
    owner = PARTITIONERS[partition](sites, 16, R_CUT, Ranks()).owner(sites)
    assert len(owner.unique()) == 3
    assert ((owner >= 0) & (owner < 16)).all()


@pytest.mark.parametrize("partition", ["bisection", "bricks", "morton"])
def test_owners_do_not_depend_on_lattice_translations_or_the_order_of_atoms(partition):
    atoms = bulk("Ag", "fcc", a=4.09, cubic=True) * (5, 6, 7)
    rng = np.random.default_rng(1)
    atoms.positions += rng.normal(0, 0.1, atoms.positions.shape)
    here = sites_of(AtomBatch.from_ase(atoms))
    owner = PARTITIONERS[partition](here, 6, R_CUT, Ranks()).owner(here)

    order = rng.permutation(len(atoms))
    moved = atoms[order]
    moved.positions += rng.integers(-2, 3, (len(atoms), 3)) @ atoms.cell.array
    there = sites_of(AtomBatch.from_ase(moved))
    assert torch.equal(PARTITIONERS[partition](there, 6, R_CUT, Ranks()).owner(there), owner[order])


def test_the_cuts_are_as_many_numbers_as_ranks():
    sites = sites_of(thermal_silver("rod")[0])
    for partition in PARTITIONERS.values():
        cuts = partition(sites, 64, R_CUT, Ranks())
        assert len(cuts.threshold) == 64  # 63 cuts and one row of padding


def test_vacuum_is_at_the_seam_and_not_inside_the_box():
    atoms = bulk("Ag", "fcc", a=4.0, cubic=True) * (2, 2, 3)
    atoms.set_cell(atoms.cell.array + np.diag([0, 0, 28.0]))
    atoms.positions[:, 2] += 33.0  # half of the slab sticks out of the top and comes back at the bottom
    box = sites_of(AtomBatch.from_ase(atoms)).box
    assert box.height[0, 2] == pytest.approx(10.0, abs=0.1)
    assert box.seam[0, 2] == pytest.approx(30.0, abs=0.1)


def test_rounding_does_not_move_the_first_layer_of_a_slab_to_its_other_end():
    """Atoms lie on the edge of a bin of the gap search, give or take the last digit."""
    z = 40.0 * 256 / 1024
    layer = [[0.0, 0.0, np.nextafter(z, side)] for side in (0.0, z, 99.0)]
    atoms = Atoms("Ag6", [*layer, *([x, y, h + 5.0] for x, y, h in layer)], cell=[9, 9, 40], pbc=True)
    box = sites_of(AtomBatch.from_ase(atoms)).box
    for shift in (0.0, 1e-13, -1e-13, 40.0, -40.0):
        moved = torch.tensor(atoms.positions) + torch.tensor([0.0, 0.0, shift])
        u = box.coordinates(moved, torch.zeros(6, dtype=torch.int64))[:, 2]
        assert (u[:3] < 0.1).all()
        assert (u[3:] > 0.9).all()


def test_equal_systems_of_a_batch_are_not_cut():
    """Two molecules per rank: no molecule is shared, so there is no ghost."""
    molecules = [bulk("Ag", "fcc", a=4.09, cubic=True) * (2, 1, 1) for _ in range(8)]
    for m in molecules:
        m.pbc = False
    batch = AtomBatch.from_ase(molecules)
    found = partition_virtually(batch, R_CUT, 4)
    assert found.owned.tolist() == [16] * 4
    assert found.all_to_all().received.sum() == 0


def test_systems_of_a_batch_are_partitioned_one_by_one():
    """All systems lie at the same place; as one cloud every rank would get a part of each of them."""
    systems = [bulk("Ag", "fcc", a=4.09, cubic=True) * (6, 2, 2) for _ in range(3)]
    found = partition_virtually(AtomBatch.from_ase(systems), R_CUT, 6)
    for b in range(3):
        assert found.owner[b * 96 : (b + 1) * 96].unique().tolist() == [2 * b, 2 * b + 1]
