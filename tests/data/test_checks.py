import numpy as np
from ase import Atoms
from hypothesis import given, settings
from hypothesis import strategies as st

from gnnmd.data.checks import closest_pair
from gnnmd.graph import AtomBatch, neighbor_list


@given(seed=st.integers(0, 10_000), pbc=st.tuples(st.booleans(), st.booleans(), st.booleans()))
@settings(max_examples=60, deadline=None)
def test_the_closest_pair_is_the_shortest_edge_of_the_neighbour_list(
    seed: int, pbc: tuple[bool, bool, bool]
) -> None:
    rng = np.random.default_rng(seed)
    cell = np.eye(3) * 2.0 + rng.uniform(-0.6, 0.6, (3, 3))
    positions = rng.uniform(-5, 5, (40, 3))  # far outside the cell, too
    r = 0.4
    found = closest_pair(positions, cell, np.array(pbc), r)
    atoms = Atoms(f"H{len(positions)}", positions, cell=cell, pbc=pbc)
    edges = neighbor_list(AtomBatch.from_ase(atoms), r, backend="torch")
    source, target = edges.edge_index.numpy()
    lengths = np.linalg.norm(positions[source] + edges.shift.numpy() @ cell - positions[target], axis=1)
    if not len(lengths):
        assert found is None
    else:
        assert found is not None
        k = lengths.argmin()
        assert {found[0], found[1]} == {source[k], target[k]}
        assert abs(found[2] - lengths[k]) < 1e-12


def test_a_duplicate_across_an_open_boundary_is_none() -> None:
    positions = np.array([[0.0, 0, 0], [0, 0, 4.99]])
    cell = 5 * np.eye(3)
    assert closest_pair(positions, cell, np.array([True, True, False]), 0.1) is None
    assert closest_pair(positions, cell, np.array([False, False, True]), 0.1) is not None
