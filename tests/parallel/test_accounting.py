import numpy as np
import pytest
import torch
from ase.build import bulk
from scipy.sparse import csr_array

from gnnmd.graph import AtomBatch
from gnnmd.graph.neighbors import neighbor_list
from gnnmd.parallel import Ranks, build_plan, share_of
from gnnmd.parallel.accounting import (
    INFINIBAND,
    NVLINK,
    UMA_S,
    VirtualPartition,
    efficiency,
    partition_virtually,
    step_bytes,
)
from tests.parallel.structures import structure

R_CUT = 5.0


@pytest.fixture(scope="module")
def divided() -> VirtualPartition:
    """A bar of 640 silver atoms over 6 ranks."""
    atoms = bulk("Ag", "fcc", a=4.09, cubic=True) * (4, 4, 10)
    atoms.rattle(0.1, seed=0)
    return partition_virtually(AtomBatch.from_ase(atoms), R_CUT, 6)


def adjacency(divided: VirtualPartition) -> csr_array:
    """``[N, N]``, target by source."""
    source, target = divided.edge_index.numpy()
    n = len(divided.owner)
    return csr_array((np.ones(len(source)), (target, source)), shape=(n, n))


def owner_matrix(divided: VirtualPartition) -> csr_array:
    """``[P, N]``, one where the rank owns the atom."""
    owner = divided.owner.numpy()
    return csr_array(
        (np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(divided.n_parts, len(owner))
    )


def test_rows_between_every_pair_of_ranks_equal_an_independent_count(divided):
    own = owner_matrix(divided)
    reads = ((own @ adjacency(divided)).toarray() > 0).astype(int)  # [P, N] rank reads atom
    expected = own.toarray() @ reads.T  # [P owner, P reader]
    np.fill_diagonal(expected, 0)
    rows = divided.all_to_all()
    assert np.array_equal(rows.table().numpy(), expected)
    assert rows.received.tolist() == expected.sum(0).tolist()
    assert rows.sent.tolist() == expected.sum(1).tolist()
    assert rows.partners.tolist() == (expected > 0).sum(0).tolist()


def test_a_wide_halo_reaches_as_many_edges_as_there_are_layers(divided):
    own = owner_matrix(divided)
    step = adjacency(divided)
    degree = step.sum(1)
    reached, work = own.toarray() > 0, np.zeros(divided.n_parts)
    for _ in range(3):
        work += reached @ degree
        reached = reached | ((reached.astype(float) @ step) > 0)
    halo = divided.wide_halo(3)
    assert halo.rows.received.tolist() == (reached.sum(1) - own.sum(1)).astype(int).tolist()
    assert halo.edges.tolist() == work.astype(int).tolist()


def test_one_layer_needs_the_ghosts_of_one_exchange_and_no_more_work(divided):
    halo = divided.wide_halo(1)
    assert torch.equal(halo.rows.table(), divided.all_to_all().table())
    assert torch.equal(halo.edges, divided.edges)


def test_all_gather_sends_everything_to_everyone(divided):
    assert divided.all_gather().received.tolist() == [5 * int(divided.owned.max())] * 6


def real_splits(group, batch: AtomBatch) -> tuple[tuple[int, ...], int, int]:
    ranks = Ranks(group)
    plan = build_plan(*share_of(batch, ranks), R_CUT, ranks)
    return plan.gp.recv_splits, plan.gp.n_owned, plan.graph.edge_index.shape[1]


@pytest.mark.parametrize("name", ["bulk several cutoffs long", "batch", "one primitive cell"])
def test_virtual_ranks_count_what_real_ranks_exchange(pool, name):
    batch = structure(name)
    virtual = partition_virtually(batch, R_CUT, 4)
    table = virtual.all_to_all().table()
    for rank, (splits, n_owned, n_edges) in enumerate(pool.run(4, real_splits, batch)):
        assert list(splits) == table[:, rank].tolist()
        assert n_owned == virtual.owned[rank]
        assert n_edges == virtual.edges[rank]


def test_bytes_of_a_step_are_those_of_the_cost_model():
    """5,100 ghosts, four layers of 4.6 kB rows: three feature exchanges and positions, there and back."""
    assert int(step_bytes(torch.tensor(5100), UMA_S)) == 5100 * 2 * (3 * 4608 + 24)


def test_thousands_of_virtual_ranks_fit_into_one_process():
    """4,096 ranks of 8 atoms, too little work for any link: the prediction must say so, and be ordered."""
    batch = AtomBatch.from_ase(bulk("Ag", "fcc", a=4.09, cubic=True) * (32, 16, 16))
    neighbors = neighbor_list(batch, R_CUT)
    few = partition_virtually(batch, neighbors, 8, "bisection")
    many = partition_virtually(batch, neighbors, 4096, "bisection")
    assert int(many.owned.max()) <= 16
    assert efficiency(many, NVLINK) < 0.2
    assert efficiency(many, NVLINK) < efficiency(few, INFINIBAND) < efficiency(few, NVLINK) < 1
    assert efficiency(few, NVLINK) > 0.95
