"""Neighbour lists against ASE, against closed forms, and backends against each other."""

from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.neighborlist import primitive_neighbor_list
from hypothesis import given, settings
from hypothesis import strategies as st

from gnnmd.graph import AtomBatch, NeighborList, neighbor_list
from gnnmd.graph.geometry import pair_distances

MODULES = {"torch": "torch", "vesin": "vesin", "nvalchemi": "nvalchemiops", "torch_cluster": "torch_cluster"}
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(find_spec(MODULES[name]) is None, reason="not installed"))
    for name in ("torch", "vesin", "nvalchemi")
]


def in_order(images: list[Atoms], rows: list[np.ndarray], r_cut: float) -> NeighborList:
    """Join the edges ``[E, 5]`` (target, source, shift) of several systems and sort them."""
    start = np.cumsum([0, *(len(atoms) for atoms in images)])
    edges = np.concatenate([r + [s, s, 0, 0, 0] for r, s in zip(rows, start, strict=False)]).astype(np.int64)
    edges = torch.from_numpy(edges[np.lexsort(edges.T[::-1])])
    return NeighborList(edges[:, [1, 0]].T.contiguous(), edges[:, 2:].contiguous(), r_cut)


def edges_of_ase(images: list[Atoms], r_cut: float) -> NeighborList:
    rows = []
    for atoms in images:
        i, j, shift = primitive_neighbor_list("ijS", atoms.pbc, atoms.cell.array, atoms.positions, r_cut)
        rows.append(np.column_stack([i, j, shift]).reshape(-1, 5))
    return in_order(images, rows, r_cut)


def edges_by_trial(images: list[Atoms], r_cut: float) -> NeighborList:
    """Try every pair at every lattice shift that could matter."""
    rows = []
    for atoms in images:
        vectors = atoms.cell.array * atoms.pbc[:, None]
        inverse = np.linalg.pinv(vectors)
        difference = atoms.positions[None, :] - atoms.positions[:, None]  # [target, source, 3]
        margin = np.ceil(r_cut * np.linalg.norm(inverse, axis=0) + 0.5) * atoms.pbc
        steps = np.stack(np.meshgrid(*(np.arange(-m, m + 1) for m in margin), indexing="ij"), -1)
        shift = -(difference @ inverse).round()[:, :, None] + steps.reshape(-1, 3)
        d = np.linalg.norm(difference[:, :, None] + shift @ vectors, axis=-1)
        itself = np.eye(len(atoms), dtype=bool)[:, :, None] & (shift == 0).all(-1)
        i, j, k = np.nonzero((d < r_cut) & ~itself)
        rows.append(np.column_stack([i, j, shift[i, j, k]]))
    return in_order(images, rows, r_cut)


def assert_same(a: NeighborList, b: NeighborList) -> None:
    assert a.edge_index.shape == b.edge_index.shape
    assert torch.equal(a.edge_index, b.edge_index)
    assert torch.equal(a.shift, b.shift)


def lengths(batch: AtomBatch, edges: NeighborList) -> torch.Tensor:
    source, target = edges.edge_index
    offset = torch.einsum("ea,eab->eb", edges.shift.double(), batch.cell[batch.system[target]])
    return torch.linalg.vector_norm(batch.positions[source] - batch.positions[target] + offset, dim=1)


@st.composite
def systems(draw: st.DrawFn, missing: bool = True) -> Atoms:
    """Any cell shape and periodicity, thin boxes, missing vectors of open axes, unwrapped and far atoms."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pbc = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    thinnest = draw(st.sampled_from([1.5, 4.0, 9.0]))
    cell = np.diag(rng.uniform(thinnest, 12.0, 3))
    if draw(st.booleans()):  # triclinic, in any orientation
        cell += np.tril(rng.uniform(-0.6, 0.6, (3, 3)) * cell.diagonal(), -1)
        cell = cell @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    if draw(st.booleans()):  # the other hand
        cell = cell[[1, 0, 2]]
    n = draw(st.integers(1, 10))
    positions = rng.random((n, 3)) @ cell + rng.normal(size=3) * draw(st.sampled_from([0.0, 50.0]))
    if draw(st.booleans()):
        positions += rng.integers(-3, 4, (n, 3)) @ cell
    if missing and draw(st.booleans()):
        cell[~np.array(pbc)] = 0.0
    return Atoms(numbers=rng.integers(1, 90, n), positions=positions, cell=cell, pbc=pbc)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=150, deadline=None)
@given(images=st.lists(systems(), min_size=1, max_size=4), r_cut=st.sampled_from([1.7, 3.1, 5.3]))
def test_edges_are_all_pairs_within_the_cutoff(backend, images, r_cut):
    edges = neighbor_list(AtomBatch.from_ase(images), r_cut, backend=backend)
    assert_same(edges, edges_by_trial(images, r_cut))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
# ASE can need minutes where open axes have no cell vector; such cells are in the test above.
@given(images=st.lists(systems(missing=False), min_size=1, max_size=2), r_cut=st.sampled_from([3.1, 5.3]))
def test_edges_are_those_of_ase(backend, images, r_cut):
    edges = neighbor_list(AtomBatch.from_ase(images), r_cut, backend=backend)
    assert_same(edges, edges_of_ase(images, r_cut))


@pytest.mark.parametrize("backend", BACKENDS)
def test_crystal_of_several_bins_has_the_edges_of_ase(backend):
    atoms = bulk("Ag", cubic=True).repeat((5, 4, 6))
    atoms.rattle(0.1, seed=0)
    slab = atoms.copy()
    slab.center(vacuum=40.0, axis=2)
    slab.pbc = (True, True, False)
    images = [atoms, slab, molecule("CH3CH2OH")]
    assert_same(neighbor_list(AtomBatch.from_ase(images), 6.0, backend=backend), edges_of_ase(images, 6.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_edges_are_symmetric_sorted_and_shorter_than_the_cutoff(backend):
    rng = np.random.default_rng(3)
    images = [
        Atoms("H9", rng.normal(size=(9, 3)) * 8, cell=rng.normal(size=(3, 3)) * 4, pbc=True) for _ in range(3)
    ]
    batch = AtomBatch.from_ase(images)
    edges = neighbor_list(batch, 4.0, backend=backend)
    assert lengths(batch, edges).max() < 4.0
    forward = torch.cat([edges.edge_index.flip(0), edges.shift.T]).T.tolist()  # target, source, shift
    backward = torch.cat([edges.edge_index, -edges.shift.T]).T.tolist()
    assert all(a < b for a, b in pairwise(forward))  # strictly: no edge twice
    assert forward == sorted(backward)


@pytest.mark.parametrize("max_neighbors", [None, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_edges_of_some_targets_are_those_of_the_whole_list(backend, max_neighbors):
    rng = np.random.default_rng(4)
    images = [
        Atoms("H9", rng.normal(size=(9, 3)) * 8, cell=rng.normal(size=(3, 3)) * 4, pbc=True) for _ in range(2)
    ]
    batch = AtomBatch.from_ase(images)
    targets = torch.from_numpy(rng.random(18) < 0.4)
    whole = neighbor_list(batch, 4.0, backend=backend, max_neighbors=max_neighbors)
    some = neighbor_list(batch, 4.0, backend=backend, max_neighbors=max_neighbors, targets=targets)
    keep = targets[whole.edge_index[1]]
    assert 0 < keep.sum() < len(keep)
    assert torch.equal(some.edge_index, whole.edge_index[:, keep])
    assert torch.equal(some.shift, whole.shift[keep])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [0.0, 0.1, 1234.567])
def test_pairs_exactly_at_the_cutoff_are_no_edges(backend, offset):
    atoms = Atoms("H", cell=[3.0, 3.0, 3.0], pbc=True).repeat(3)
    atoms.positions += offset
    edges = neighbor_list(AtomBatch.from_ase(atoms), 6.0, backend=backend)
    assert_same(edges, neighbor_list(AtomBatch.from_ase(atoms), 6.0, backend="torch"))
    if (
        offset == 0.0
    ):  # exact arithmetic: 26 lattice vectors are shorter than two lattice constants, 6 just as long
        assert edges.edge_index.shape[1] == 27 * 26
    closer = neighbor_list(AtomBatch.from_ase(atoms), np.nextafter(6.0, 7.0) + 1e-12, backend=backend)
    assert closer.edge_index.shape[1] == 27 * 32


@pytest.mark.parametrize("backend", BACKENDS)
def test_cutoff_is_decided_to_the_last_bit(backend):
    """For the distance of the positions as given; wrapped positions round differently."""
    atoms = Atoms("H6", np.random.default_rng(0).random((6, 3)) * 5, cell=[5.0, 5.0, 5.0], pbc=True)
    atoms.positions += np.random.default_rng(1).integers(-9999, 9999, (6, 3)) * 5.0 / 3.0
    batch = AtomBatch.from_ase(atoms)
    edges = neighbor_list(batch, 6.0, backend=backend)
    source, target = edges.edge_index
    distances = pair_distances(batch.positions, batch.cell, batch.system, target, source, edges.shift)
    for d in distances[::17].tolist():
        for r_cut, inside in ((d, distances < d), (np.nextafter(d, 9.0), distances <= d)):
            expected = NeighborList(edges.edge_index[:, inside], edges.shift[inside], r_cut)
            assert_same(neighbor_list(batch, r_cut, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_box_thinner_than_the_cutoff_holds_every_image(backend):
    """Fault 9: an atom is its own neighbour, many times over."""
    edges = neighbor_list(
        AtomBatch.from_ase(Atoms("H", cell=[1.0, 1.0, 1.0], pbc=True)), 6.5, backend=backend
    )
    reach = np.arange(-7, 8)
    vectors = np.stack(np.meshgrid(reach, reach, reach, indexing="ij"), -1).reshape(-1, 3)
    squared = (vectors**2).sum(1)
    expected = vectors[(squared > 0) & (squared < 6.5**2)]
    assert edges.shift.tolist() == expected.tolist()
    assert not edges.edge_index.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_thin_box_has_the_edges_of_its_supercell(backend):
    rng = np.random.default_rng(5)
    thin = Atoms("HHe", rng.random((2, 3)), cell=rng.normal(size=(3, 3)) + 2.2 * np.eye(3), pbc=True)
    large = thin.repeat((7, 7, 7))
    a, b = (neighbor_list(AtomBatch.from_ase(x), 4.0, backend=backend) for x in (thin, large))
    per_atom = a.row_pointers(2).diff()
    assert per_atom.tolist() * 343 == b.row_pointers(686).diff().tolist()
    assert per_atom.min() >= 30


@pytest.mark.parametrize("backend", BACKENDS)
def test_unwrapped_atoms_keep_their_pairs(backend):
    """Fault 4: an atom that left the cell must still find the neighbour half an Angstrom away."""
    cell = np.diag([9.0, 10.0, 11.0])
    atoms = Atoms("H2", [[0.1, 5.0, 5.0], [9.0 * 4 - 0.4, 5.0 - 30.0, 5.0]], cell=cell, pbc=True)
    edges = neighbor_list(AtomBatch.from_ase(atoms), 2.0, backend=backend)
    assert edges.edge_index.tolist() == [[1, 0], [0, 1]]
    assert edges.shift.tolist() == [[-4, 3, 0], [4, -3, 0]]
    assert lengths(AtomBatch.from_ase(atoms), edges).tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_lattice_translations_change_shifts_only(backend):
    atoms = bulk("Cu", cubic=True).repeat(3)
    atoms.rattle(0.1, seed=1)
    moves = np.random.default_rng(1).integers(-5, 6, (len(atoms), 3))
    a = neighbor_list(AtomBatch.from_ase(atoms), 5.0, backend=backend)
    atoms.positions += moves @ atoms.cell.array
    b = neighbor_list(AtomBatch.from_ase(atoms), 5.0, backend=backend)
    source, target = a.edge_index
    moves = torch.from_numpy(moves)
    assert torch.equal(a.edge_index, b.edge_index)
    assert torch.equal(a.shift + moves[target] - moves[source], b.shift)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_atoms_far_from_the_origin_keep_their_edges(backend, offset):
    """Fault 17: in float32 positions this far out are wrong by 6e-5 A and more."""
    atoms = bulk("Ag", cubic=True).repeat(3)
    atoms.rattle(0.1, seed=2)
    near = neighbor_list(AtomBatch.from_ase(atoms), 5.0, backend=backend)
    atoms.positions += offset * atoms.cell.lengths()  # whole lattice vectors
    assert_same(neighbor_list(AtomBatch.from_ase(atoms), 5.0, backend=backend), near)
    atoms.pbc = False
    open_far = neighbor_list(AtomBatch.from_ase(atoms), 5.0, backend=backend)
    inside = (near.shift == 0).all(1)
    assert torch.equal(open_far.edge_index, near.edge_index[:, inside])


@pytest.mark.parametrize("backend", BACKENDS)
def test_isolated_atoms_have_no_edges(backend):
    """Fault 10."""
    far_apart = Atoms("H2", [[0, 0, 0], [0, 0, 9e7]])
    in_a_box = Atoms("H", cell=np.eye(3) * 20, pbc=True)
    for images in ([Atoms("H")], [in_a_box], [far_apart], [Atoms(), Atoms("H"), Atoms()]):
        edges = neighbor_list(AtomBatch.from_ase(images), 6.0, backend=backend)
        assert edges.edge_index.shape == (2, 0)
        assert edges.shift.shape == (0, 3)
        assert edges.edge_index.dtype == edges.shift.dtype == torch.int64


def test_no_atoms_at_all_give_an_empty_list():
    edges = neighbor_list(AtomBatch.from_ase(Atoms()), 6.0)
    assert edges.edge_index.shape == (2, 0)
    assert edges.row_pointers(0).tolist() == [0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_atoms_at_the_same_place_are_neighbors(backend):
    edges = neighbor_list(AtomBatch.from_ase(Atoms("H2", np.zeros((2, 3)))), 1.0, backend=backend)
    assert edges.edge_index.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_systems_of_a_batch_do_not_see_each_other(backend):
    """Fault 16: the same place in another system is no neighbour."""
    images = [molecule("H2O"), molecule("H2O"), bulk("Cu"), Atoms("H"), molecule("CH4")]
    edges = neighbor_list(AtomBatch.from_ase(images), 4.0, backend=backend)
    start, parts = 0, []
    for atoms in images:
        one = neighbor_list(AtomBatch.from_ase(atoms), 4.0, backend=backend)
        parts.append((one.edge_index + start, one.shift))
        start += len(atoms)
    assert torch.equal(edges.edge_index, torch.cat([e for e, _ in parts], 1))
    assert torch.equal(edges.shift, torch.cat([s for _, s in parts]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_cluster_loses_no_edge(backend):
    """Fault 13: 400 atoms within reach of each other, far above any guess of a capacity."""
    atoms = Atoms("H400", np.random.default_rng(0).random((400, 3)) * 2)
    edges = neighbor_list(AtomBatch.from_ase(atoms), 4.0, backend=backend)
    assert edges.edge_index.shape[1] == 400 * 399


def test_row_pointers_bound_the_edges_of_each_target():
    images = [Atoms("H"), molecule("H2O"), Atoms("H")]
    edges = neighbor_list(AtomBatch.from_ase(images), 3.0)
    assert edges.row_pointers(5).tolist() == [0, 0, 2, 4, 6, 6]


def nearest_by_loop(batch: AtomBatch, edges: NeighborList, most: int) -> torch.Tensor:
    """eSCN-MD's rule, one target after the other."""
    squared, keep = lengths(batch, edges) ** 2, torch.ones(edges.edge_index.shape[1], dtype=torch.bool)
    for i in range(len(batch.numbers)):
        rows = (edges.edge_index[1] == i).nonzero().squeeze(1)
        if len(rows) > most:
            keep[rows] = squared[rows] <= squared[rows].sort().values[most] + 0.01
    return keep


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("most", [1, 11, 20, 1000])
def test_max_neighbors_keeps_the_next_nearest_and_all_within_the_tolerance(backend, most):
    atoms = bulk("Ag", cubic=True).repeat(2)
    atoms.rattle(0.05, seed=0)
    cluster = Atoms("H30", np.random.default_rng(0).random((30, 3)) * 6)
    batch = AtomBatch.from_ase([atoms, Atoms("H"), cluster])
    everything = neighbor_list(batch, 6.0, backend=backend)
    some = neighbor_list(batch, 6.0, backend=backend, max_neighbors=most)
    keep = nearest_by_loop(batch, everything, most)
    assert torch.equal(some.edge_index, everything.edge_index[:, keep])
    assert torch.equal(some.shift, everything.shift[keep])


def test_max_neighbors_of_a_perfect_lattice_takes_whole_shells():
    batch = AtomBatch.from_ase(bulk("Ag", cubic=True))
    for most, kept in ((1, 12), (11, 12), (12, 18), (17, 18), (18, 42), (53, 54), (54, 54)):
        edges = neighbor_list(batch, 6.0, max_neighbors=most)
        assert edges.row_pointers(4).diff().tolist() == [kept] * 4


def test_one_more_neighbor_than_the_limit_is_kept():
    line = Atoms("H4", [[0, 0, 0], [1, 0, 0], [2.5, 0, 0], [4.5, 0, 0]])
    edges = neighbor_list(AtomBatch.from_ase(line), 10.0, max_neighbors=1)
    assert edges.edge_index[0, edges.edge_index[1] == 0].tolist() == [1, 2]


@pytest.mark.parametrize("r_cut", [0.0, -1.0, float("nan"), float("inf")])
def test_cutoff_that_is_no_distance_is_refused(r_cut):
    with pytest.raises(ValueError, match="r_cut must be a positive distance"):
        neighbor_list(AtomBatch.from_ase(Atoms("H")), r_cut)


def test_limit_of_no_neighbors_is_refused():
    with pytest.raises(ValueError, match="max_neighbors must be at least 1"):
        neighbor_list(AtomBatch.from_ase(Atoms("H")), 5.0, max_neighbors=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2e8])
def test_positions_that_are_no_numbers_are_refused(bad):
    images = [Atoms("H"), Atoms("H2", [[0, 0, 0], [0, bad, 0]])]
    with pytest.raises(ValueError, match="atom 2 of system 1 is at"):
        neighbor_list(AtomBatch.from_ase(images), 5.0)


def test_single_precision_is_refused():
    batch = AtomBatch.from_ase(Atoms("H"))
    with pytest.raises(ValueError, match="must be float64"):
        neighbor_list(AtomBatch(**{**vars(batch), "positions": batch.positions.float()}), 5.0)


@pytest.mark.parametrize(
    "cell",
    [
        np.zeros((3, 3)),
        np.diag([5.0, 5.0, 0.0]),
        np.array([[5.0, 0, 0], [0, 5.0, 0], [5.0, 5.0, 0]]),
        np.diag([5.0, 5.0, 1e-9]),
    ],
    ids=["none", "one missing", "coplanar", "flat"],
)
def test_periodic_axis_without_lattice_vector_is_refused(cell):
    images = [bulk("Cu"), Atoms("H", cell=cell, pbc=True)]
    with pytest.raises(ValueError, match="cell of system 1 is singular"):
        neighbor_list(AtomBatch.from_ase(images), 5.0)


def test_cell_that_is_not_finite_is_refused():
    batch = AtomBatch.from_ase([bulk("Cu"), Atoms("H")])
    batch.cell[1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="cell of system 1 is not finite"):
        neighbor_list(batch, 5.0)


def test_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown neighbour-list backend 'vesin2'; choose 'auto' or one of"):
        neighbor_list(AtomBatch.from_ase(Atoms("H")), 5.0, backend="vesin2")


@pytest.mark.parametrize(
    ("backend", "remedy"), [("nvalchemi", r"gnnmd\[gpu\]"), ("torch_cluster", "torch_cluster")]
)
def test_missing_backend_is_refused_with_the_remedy(backend, remedy, monkeypatch):
    monkeypatch.setattr("gnnmd.graph.neighbors.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"not installed: pip install .*{remedy}"):
        neighbor_list(AtomBatch.from_ase(Atoms("H")), 5.0, backend=backend)


def test_list_follows_positions_that_require_gradients():
    batch = AtomBatch.from_ase(molecule("H2O"))
    batch.positions.requires_grad_()
    assert neighbor_list(batch, 3.0).edge_index.shape == (2, 6)
