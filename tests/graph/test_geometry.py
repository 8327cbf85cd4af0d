"""Edge vectors, distances, strain, volume, completed cells."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import bulk
from hypothesis import given, settings
from hypothesis import strategies as st

from gnnmd.graph import AtomBatch, AtomGraph, neighbor_list
from gnnmd.graph.geometry import complete_cell, edge_vectors, pair_distances, strained, volume


def graph_of(batch: AtomBatch, r_cut: float = 4.0) -> AtomGraph:
    edges = neighbor_list(batch, r_cut)
    return AtomGraph(
        numbers=batch.numbers,
        system=batch.system,
        edge_index=edges.edge_index,
        shift=edges.shift,
        cell=batch.cell,
        n_atoms=batch.n_atoms,
        charge=batch.charge,
        spin=batch.spin,
        dataset=torch.zeros_like(batch.charge),
        positions=batch.positions,
    )


def crystals(n: int) -> AtomBatch:
    images = [bulk(name, cubic=True) for name in ("Ag", "Cu", "Al")[:n]]
    for k, atoms in enumerate(images):
        atoms.set_cell(atoms.cell.array + np.triu(np.full((3, 3), 0.3), 1), scale_atoms=True)
        atoms.rattle(0.1, seed=k)
    return AtomBatch.from_ase(images)


@pytest.mark.parametrize("n", [1, 3])
def test_edge_vectors_point_from_target_to_source(n):
    g = graph_of(crystals(n))
    for e in range(0, g.edge_index.shape[1], 7):
        j, i = g.edge_index[:, e].tolist()
        expected = g.positions[j] + g.shift[e].double() @ g.cell[g.system[i]] - g.positions[i]
        torch.testing.assert_close(edge_vectors(g)[e], expected)
    source, target = g.edge_index
    distances = pair_distances(g.positions, g.cell, g.system, target, source, g.shift)
    torch.testing.assert_close(distances, torch.linalg.vector_norm(edge_vectors(g), dim=1))


@pytest.mark.parametrize("n", [1, 3])
def test_edge_vectors_are_differentiable_by_positions_and_cell_twice(n):
    g = graph_of(crystals(n), 2.9)

    def lengths_squared(positions: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
        return edge_vectors(g.with_positions(positions, cell)).square().sum(1)[::11]

    inputs = (g.positions.requires_grad_(), g.cell.requires_grad_())
    assert torch.autograd.gradcheck(lengths_squared, inputs)
    assert torch.autograd.gradgradcheck(lengths_squared, inputs)


def test_edge_vectors_far_from_the_origin_keep_their_digits():
    """Fault 17: differences are taken in float64; casting positions first would cost 1e-3 A here."""
    g = graph_of(crystals(1))
    far = g.with_positions(g.positions + 2.0**14, g.cell)
    torch.testing.assert_close(edge_vectors(far), edge_vectors(g), rtol=0, atol=1e-11)
    cast = far.with_positions(far.positions.float(), g.cell.float())
    assert (edge_vectors(cast) - edge_vectors(g)).abs().max() > 1e-4


def test_graph_without_positions_has_no_edge_vectors():
    g = graph_of(crystals(1)).with_positions(None, torch.eye(3)[None])
    with pytest.raises(ValueError, match="no positions; call with_positions"):
        edge_vectors(g)


def test_distance_is_the_same_to_the_last_bit_from_both_ends():
    rng = torch.Generator().manual_seed(0)
    positions = torch.randn(50, 3, dtype=torch.float64, generator=rng) * 100
    cell = torch.randn(2, 3, 3, dtype=torch.float64, generator=rng)
    system = torch.arange(50) // 25
    i, j = torch.randint(25, (2, 1000), generator=rng)
    shift = torch.randint(-9, 10, (1000, 3), generator=rng)
    forward = pair_distances(positions, cell, system, i, j, shift)
    assert torch.equal(forward, pair_distances(positions, cell, system, j, i, -shift))
    assert torch.equal(forward[::3], pair_distances(positions, cell, system, i[::3], j[::3], shift[::3]))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), pbc=st.lists(st.tuples(*[st.booleans()] * 3), min_size=1, max_size=4))
def test_completed_cell_is_orthonormal_along_open_axes(seed, pbc):
    rng = np.random.default_rng(seed)
    cell = torch.from_numpy(rng.normal(size=(len(pbc), 3, 3)) * 10.0 ** rng.integers(-1, 5))
    pbc = torch.tensor(pbc)
    completed = complete_cell(cell, pbc)
    assert torch.equal(completed[pbc], cell[pbc])
    overlap = completed @ completed.transpose(1, 2)
    scale = torch.linalg.vector_norm(completed, dim=2)
    overlap = overlap / (scale[:, :, None] * scale[:, None, :])
    open_pairs = ~(pbc[:, :, None] & pbc[:, None, :])
    torch.testing.assert_close(overlap[open_pairs], torch.eye(3).double().expand_as(overlap)[open_pairs])
    torch.testing.assert_close(scale[~pbc], torch.ones_like(scale[~pbc]))


def test_zero_strain_moves_nothing_and_has_a_symmetric_derivative():
    batch = crystals(2)
    positions, cell, strain = strained(batch.positions, batch.cell, batch.system)
    assert torch.equal(positions, batch.positions)
    assert torch.equal(cell, batch.cell)
    weights = torch.randn(positions.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad((positions * weights).sum() + cell[:, 0].pow(3).sum(), strain)
    torch.testing.assert_close(slope, slope.transpose(1, 2))
    dyad = torch.einsum("na,nb->ab", batch.positions[:4], weights[:4])
    row = batch.cell[0, 0]
    dyad = dyad + torch.outer(row, 3 * row**2)
    torch.testing.assert_close(slope[0], 0.5 * (dyad + dyad.T))


def test_volume_is_positive_for_both_hands_and_zero_without_a_cell():
    right = torch.diag(torch.tensor([2.0, 3.0, 4.0]))
    assert volume(torch.stack([right, right[[1, 0, 2]], torch.zeros(3, 3)])).tolist() == [24.0, 24.0, 0.0]


def test_graph_moves_to_a_device_with_everything_it_has():
    g = replace(graph_of(crystals(2)), n_edges=torch.tensor(7))
    moved = g.to("meta")
    assert moved.n_systems == 2
    assert {t.device.type for name, t in vars(moved).items() if name != "links"} == {"meta"}
    assert g.with_positions(None, g.cell).to("meta").positions is None
