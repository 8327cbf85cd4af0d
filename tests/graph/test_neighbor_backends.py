"""What is special to one backend: capacities, limits of the library, choice of the default, GPUs."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import torch
import vesin
from ase import Atoms
from ase.build import bulk, molecule

from gnnmd.graph import AtomBatch, neighbor_list


@pytest.fixture
def stand_in(monkeypatch):
    """A torch_cluster that cuts rows at ``max_num_neighbors`` without a word, as the real one does."""
    limits = []

    def radius(x, y, r, batch_x, batch_y, max_num_neighbors=32):
        limits.append(max_num_neighbors)
        near = (torch.cdist(y, x) <= r) & (batch_y[:, None] == batch_x)
        return (near & (near.cumsum(1) <= max_num_neighbors)).nonzero().T

    module = ModuleType("torch_cluster")
    module.__spec__ = ModuleSpec("torch_cluster", None)
    module.radius = radius
    monkeypatch.setitem(sys.modules, "torch_cluster", module)
    return limits


def open_systems() -> AtomBatch:
    dense = Atoms("H200", np.random.default_rng(0).random((200, 3)) * 2)
    return AtomBatch.from_ase([molecule("C6H6"), dense, Atoms("H"), molecule("CH4")])


def test_torch_cluster_cannot_cut_a_row(stand_in):
    """Fault 13: a dense target needs several tries, and the limit that is left was never reached."""
    edges = neighbor_list(open_systems(), 4.0, backend="torch_cluster")
    assert stand_in == [64, 128, 256]
    expected = neighbor_list(open_systems(), 4.0, backend="torch")
    assert torch.equal(edges.edge_index, expected.edge_index)
    assert torch.equal(edges.shift, expected.shift)


def test_torch_cluster_row_that_is_exactly_full_is_not_trusted(stand_in):
    row = Atoms("H64", np.random.default_rng(0).random((64, 3)))  # 64 atoms within reach, itself counted
    assert neighbor_list(AtomBatch.from_ase(row), 4.0, backend="torch_cluster").edge_index.shape[1] == 64 * 63
    assert stand_in == [64, 128]


@pytest.mark.skipif(find_spec("torch_cluster") is None, reason="torch_cluster is not installed")
def test_torch_cluster_has_the_edges_of_torch():
    edges = neighbor_list(open_systems(), 4.0, backend="torch_cluster")
    expected = neighbor_list(open_systems(), 4.0, backend="torch")
    assert torch.equal(edges.edge_index, expected.edge_index)


def test_torch_cluster_refuses_periodic_systems(stand_in):
    with pytest.raises(ValueError, match="open boundaries only; use backend='torch'"):
        neighbor_list(AtomBatch.from_ase([molecule("H2O"), bulk("Cu")]), 4.0, backend="torch_cluster")


@pytest.mark.parametrize(
    ("cell", "pbc"),
    [([7.0, 2000.0, 2000.0], True), ([7.0, 7.0, 1e6], True), ([7.0, 7.0, 1e6], False)],
    ids=["sheet", "wire", "two far clusters"],
)
def test_vesin_survives_thin_boxes_of_many_bins(cell, pbc):
    """vesin 0.6 kills the process (SIGFPE) for these: more than 1e5 bins, less than two along one axis."""
    rng = np.random.default_rng(0)
    near = rng.random((30, 3)) * 7
    atoms = Atoms("H60", np.concatenate([near, near + np.array(cell) - 7]), cell=cell, pbc=pbc)
    edges = neighbor_list(AtomBatch.from_ase(atoms), 6.0, backend="vesin")
    expected = neighbor_list(AtomBatch.from_ase(atoms), 6.0, backend="torch")
    assert edges.edge_index.shape[1] > 500
    assert torch.equal(edges.edge_index, expected.edge_index)
    assert torch.equal(edges.shift, expected.shift)


def test_default_on_the_cpu_is_vesin(monkeypatch):
    called = []

    class Spy(vesin.NeighborList):
        def compute(self, *args, **kwargs):
            called.append(len(args[0]))
            return super().compute(*args, **kwargs)

    monkeypatch.setattr(vesin, "NeighborList", Spy)
    neighbor_list(AtomBatch.from_ase([molecule("H2O"), bulk("Cu")]), 4.0)
    assert called == [3, 1]


def mixed_batch() -> AtomBatch:
    crystal = bulk("Ag", cubic=True).repeat((6, 5, 4))
    crystal.rattle(0.1, seed=0)
    slab = bulk("Cu", cubic=True).repeat((3, 3, 2))
    slab.center(vacuum=30.0, axis=2)
    slab.pbc = (True, True, False)
    dense = Atoms("H400", np.random.default_rng(0).random((400, 3)) * 2)
    thin = Atoms("He", cell=np.eye(3) * 1.9, pbc=True)
    return AtomBatch.from_ase([crystal, slab, dense, Atoms("H"), thin])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["torch", "vesin", "nvalchemi", "auto"])
def test_edges_on_the_gpu_are_those_on_the_cpu(backend):
    if backend == "nvalchemi":
        pytest.importorskip("nvalchemiops")
    expected = neighbor_list(mixed_batch(), 6.0)
    edges = neighbor_list(mixed_batch().to("cuda"), 6.0, backend=backend)
    assert edges.edge_index.device.type == "cuda"
    assert torch.equal(edges.edge_index.cpu(), expected.edge_index)
    assert torch.equal(edges.shift.cpu(), expected.shift)
