import pytest
import torch
from ase.calculators.emt import EMT

from gnnmd.models.emt import emt
from tests.parallel.parity import deviations, many_ranks, one_rank
from tests.parallel.structures import STRUCTURES, images, structure

SIZES = {
    2: STRUCTURES,
    3: STRUCTURES,
    4: STRUCTURES,
    8: ("bulk several cutoffs long", "molecule", "lone atom", "batch"),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_one_rank_equals_ase(name):
    batch = structure(name)
    found = one_rank(emt(), batch)
    start = 0
    for b, atoms in enumerate(images(name)):
        atoms.calc = EMT()
        rows = slice(start, start + len(atoms))
        start += len(atoms)
        # Coordinates of 1e5 A carry rounding errors of 1e-11 A.
        tolerance = {"rtol": 0, "atol": 1e-9}
        torch.testing.assert_close(float(found["energy"][b]), atoms.get_potential_energy(), **tolerance)
        torch.testing.assert_close(found["forces"][rows], torch.tensor(atoms.get_forces()), **tolerance)
        energies = torch.tensor(atoms.get_potential_energies())
        torch.testing.assert_close(found["node energies"][rows], energies, **tolerance)
        if atoms.cell.rank == 3:
            stress = torch.tensor(atoms.get_stress(voigt=False))
            torch.testing.assert_close(found["stress"][b], stress, **tolerance)


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in SIZES.items() for name in names])
def test_many_ranks_equal_one(pool, size, name):
    batch = structure(name)
    expected = one_rank(emt(), batch)
    results = pool.run(size, many_ranks, emt, batch)
    for found in results:
        assert max(deviations(found, expected).values()) < 1e-10, deviations(found, expected)
    assert sum(int(r["n_owned"]) for r in results) == len(batch.numbers)
    if name == "bulk several cutoffs long":
        # Parity would be vacuous if every atom were everyone's ghost.
        assert all(
            int(r["n_owned"]) and r["n_owned"] + r["n_ghost"] < len(batch.numbers) for r in results[:3]
        )


@pytest.mark.parametrize("partition", ["bisection", "bricks", "morton", "index"])
def test_every_partition_gives_the_same_physics(pool, partition):
    batch = structure("batch")
    expected = one_rank(emt(), batch)
    found = pool.run(4, many_ranks, emt, batch, partition)[0]
    assert max(deviations(found, expected).values()) < 1e-10


def test_all_gather_gives_the_same_physics(pool):
    batch = structure("bulk several cutoffs long")
    found = pool.run(3, many_ranks, emt, batch, "auto", "all_gather")[0]
    assert max(deviations(found, one_rank(emt(), batch)).values()) < 1e-10


@pytest.mark.parametrize(
    ("fault", "right", "wrong"),
    [
        ("NoGhosts", (), ("energy", "forces", "stress", "gradient of backbone.table")),
        ("DroppedBackward", ("energy", "node energies"), ("forces", "stress")),
        ("DoubledSum", ("energy", "forces", "stress"), ("gradient of backbone.table",)),
    ],
)
def test_a_broken_operator_is_noticed(pool, fault, right, wrong):
    batch = structure("bulk several cutoffs long")
    found = deviations(pool.run(2, many_ranks, emt, batch, "auto", fault)[0], one_rank(emt(), batch))
    assert all(found[name] < 1e-10 for name in right), found
    assert all(found[name] > 1e-4 for name in wrong), found
