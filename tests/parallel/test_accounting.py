from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from scipy.sparse import csr_array
from torch.utils._python_dispatch import TorchDispatchMode

from gnnmd.graph import AtomBatch
from gnnmd.graph.neighbors import neighbor_list
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.parallel import AllGatherContext, Ranks, build_plan, share_of
from gnnmd.parallel.accounting import (
    INFINIBAND,
    NVLINK,
    UMA_S,
    Link,
    ModelCost,
    VirtualPartition,
    efficiency,
    partition_virtually,
    strategies,
)
from tests.parallel.structures import structure

R_CUT = 5.0
SHAPE = EscnMDConfig(
    r_cut=R_CUT, channels=8, hidden_channels=8, edge_channels=8, num_basis=8, lmax=1, mmax=1, num_layers=2
)


def silver_bar() -> AtomBatch:
    """640 atoms."""
    atoms = bulk("Ag", "fcc", a=4.09, cubic=True) * (4, 4, 10)
    atoms.rattle(0.1, seed=0)
    return AtomBatch.from_ase(atoms)


@pytest.fixture(scope="module")
def divided() -> VirtualPartition:
    return partition_virtually(silver_bar(), R_CUT, 6)


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


@pytest.mark.parametrize("n_parts", [6, 100])
def test_a_wide_halo_reaches_one_edge_farther_in_every_pass(divided, n_parts):
    if n_parts != divided.n_parts:  # more than the 64 ranks that are followed at a time
        divided = partition_virtually(silver_bar(), R_CUT, n_parts)
    own = owner_matrix(divided)
    step = adjacency(divided)
    degree = step.sum(1)
    reached, work = own.toarray() > 0, []
    for _ in range(3):
        work.append((reached @ degree).astype(int).tolist())
        reached = reached | ((reached.astype(float) @ step) > 0)
    expected = own.toarray() @ reached.T  # [P owner, P reader]
    np.fill_diagonal(expected, 0)
    halo = divided.wide_halo(3)
    assert halo.edges.tolist() == work
    assert np.array_equal(halo.rows.table().numpy(), expected)


def test_one_pass_needs_the_ghosts_of_one_exchange_and_no_more_work(divided):
    halo = divided.wide_halo(1)
    assert torch.equal(halo.rows.table(), divided.all_to_all().table())
    assert torch.equal(halo.edges[0], divided.edges)


def test_lone_atoms_need_no_halo_and_leave_that_of_a_dimer_alone():
    batch = AtomBatch.from_ase(Atoms("Ag4", [[0, 0, z] for z in (20, 0, 2.5, 40)]))
    halo = replace(partition_virtually(batch, R_CUT, 4), owner=torch.arange(4)).wide_halo(2)
    assert halo.rows.received.tolist() == [0, 1, 1, 0]
    assert halo.edges.tolist() == [[0, 1, 1, 0], [0, 2, 2, 0]]
    alone = partition_virtually(AtomBatch.from_ase(Atoms("Ag")), R_CUT, 2).wide_halo(2)
    assert alone.rows.received.tolist() == [0, 0]


def test_all_gather_sends_the_largest_share_from_everyone_to_everyone(divided):
    rows = divided.all_gather()
    largest = int(divided.owned.max())
    expected = np.full((6, 6), largest) - largest * np.eye(6, dtype=int)
    assert np.array_equal(rows.table().numpy(), expected)
    assert rows.received.tolist() == rows.sent.tolist() == expected.sum(0).tolist()
    assert rows.partners.tolist() == [5] * 6


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


class Received(TorchDispatchMode):
    """Notes for every collective on rows what it brings from each rank, bytes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.legs = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.c10d.alltoall_base_.default:
            output, _, _, splits, *_ = args
            row = output.nbytes // max(len(output), 1)
            self.legs.append([n * row for n in splits])
        elif function is torch.ops.c10d._allgather_base_.default:
            self.legs.append([args[1].nbytes] * self.size)
        elif function is torch.ops.c10d._reduce_scatter_base_.default:
            self.legs.append([args[0].nbytes] * self.size)
        return function(*args, **(kwargs or {}))


def bytes_of_a_step(group, batch: AtomBatch, gather: bool) -> list[list[int]]:
    torch.manual_seed(0)
    potential = build_potential(PotentialConfig(SHAPE)).eval()
    ranks = Ranks(group)
    plan = build_plan(*share_of(batch, ranks), R_CUT, ranks)
    gp = AllGatherContext.like(plan.gp) if gather else plan.gp
    with Received(group.size()) as received:
        potential(plan.positions, plan.graph, gp)
    return received.legs


@pytest.mark.parametrize(("gather", "name"), [(False, "all-to-all"), (True, "all-gather")])
def test_energy_and_forces_of_a_real_model_send_the_counted_bytes_leg_by_leg(pool, gather, name):
    """Positions, features before each of two layers, and their gradients in the opposite order."""
    batch = structure("bulk several cutoffs long")
    cost = ModelCost(n_layers=2, n_exchanges=2, row_bytes=4 * 8 * 4, edge_seconds=1.0)
    (strategy,) = (s for s in strategies(partition_virtually(batch, R_CUT, 3), cost) if s.name == name)
    assert [leg.what for leg in strategy.legs] == [
        "positions",
        "features 1",
        "features 2",
        "gradients of features 2",
        "gradients of features 1",
        "gradients of positions",
    ]
    for rank, legs in enumerate(pool.run(3, bytes_of_a_step, batch, gather)):
        for sent in legs:
            sent[rank] = 0  # to itself
        assert legs == [(leg.rows.table()[:, rank] * leg.row_bytes).tolist() for leg in strategy.legs]
        assert sum(map(sum, legs)) == strategy.received[rank]


def test_a_wide_halo_sends_positions_only_and_works_more(divided):
    exchange, _, halo = strategies(divided, UMA_S)
    there, back = halo.legs
    assert there.rows.table().equal(divided.wide_halo(5).rows.table())
    assert back.rows.table().equal(there.rows.table().T)
    assert there.row_bytes == back.row_bytes == 24
    assert halo.edges.tolist() == divided.wide_halo(5).edges[:4].double().mean(0).tolist()
    assert (halo.edges > exchange.edges).all()


def test_bytes_of_a_step_in_the_uma_s_shape():
    """An atom with 5,100 neighbours on the other rank: 4.6 kB rows before each of four layers, and back."""
    leaf, hub = torch.arange(5100), torch.full((5100,), 5100)
    edge_index = torch.cat((torch.stack((hub, leaf)), torch.stack((leaf, hub))), 1)
    star = partition_virtually(AtomBatch.from_ase(Atoms("Ag")), R_CUT, 2)
    star = replace(star, owner=(torch.arange(5101) == 5100).long(), edge_index=edge_index)
    assert star.all_to_all().received.tolist() == [1, 5100]
    assert strategies(star, UMA_S)[0].received.tolist() == [5101 * (4 * 4608 + 24)] * 2


def test_one_rank_sends_nothing_and_is_efficient(divided):
    alone = partition_virtually(silver_bar(), R_CUT, 1)
    for strategy in strategies(alone):
        assert not strategy.legs
        assert strategy.edges.tolist() == alone.edges.tolist()
        assert efficiency(alone, strategy, NVLINK) == 1.0


def test_the_predicted_efficiency_is_ideal_time_over_that_of_the_slowest_rank(divided):
    link, cost = Link("slow", bandwidth=1e6, latency=1e-3), ModelCost(1, 1, 100, 1e-6)
    for strategy in strategies(divided, cost):
        seconds = [
            edges * 1e-6
            + sum(1e-3 + max(int(leg.received[p]), int(leg.sent[p])) / 1e6 for leg in strategy.legs)
            for p, edges in enumerate(strategy.edges.tolist())
        ]
        ideal = divided.edge_index.shape[1] / 6 * 1e-6
        assert efficiency(divided, strategy, link, cost) == pytest.approx(ideal / max(seconds))


def test_thousands_of_virtual_ranks_fit_into_one_process():
    """4,096 ranks of 8 atoms, too little work for any link: the prediction must say so, and be ordered."""
    batch = AtomBatch.from_ase(bulk("Ag", "fcc", a=4.09, cubic=True) * (32, 16, 16))
    neighbors = neighbor_list(batch, R_CUT)
    few = partition_virtually(batch, neighbors, 8, "bisection")
    many = partition_virtually(batch, neighbors, 4096, "bisection")
    assert int(many.owned.max()) <= 16
    assert int(many.all_gather().received.max()) == 4095 * int(many.owned.max())
    small, large = (strategies(p)[0] for p in (few, many))
    assert efficiency(many, large, NVLINK) < 0.25
    assert efficiency(many, large, NVLINK) < efficiency(few, small, INFINIBAND)
    assert efficiency(few, small, INFINIBAND) < efficiency(few, small, NVLINK) < 1
    assert efficiency(few, small, NVLINK) > 0.95
