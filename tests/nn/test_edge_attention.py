import pytest
import torch
from torch.testing import assert_close

from gnnmd.nn.edge_attention import (
    EdgeTable,
    NeighborAttention,
    PairFeatures,
    PairVectors,
    PairWeights,
    switched_softmax,
)

TARGET = torch.tensor([0, 0, 2, 2, 2, 4])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_table_has_a_row_for_every_atom():
    """Also for atoms without edges, and zeros where there is no edge."""
    table = EdgeTable.of(TARGET, 6)
    x = random(6, 2)
    filled = table.fill(x)
    assert filled.shape == (6, 3, 2)
    assert_close(filled[2], x[2:5])
    assert_close(filled[0], torch.cat([x[:2], torch.zeros(1, 2)]))
    assert not filled[[1, 3, 5]].any()
    assert_close(table.read(filled), x)
    assert_close(table.sum(x)[2], x[2:5].sum(0))
    h = random(6, 3, seed=1)
    assert_close(table.sum_products(h, x)[2], h[2:5].T @ x[2:5])


@pytest.mark.parametrize("n_atoms", [0, 3])
def test_a_table_without_edges(n_atoms):
    table = EdgeTable.of(TARGET[:0], n_atoms)
    x = random(0, 2)
    assert table.read(table.fill(x)).shape == (0, 2)
    assert table.sum_products(x, x).shape == (n_atoms, 2, 2)
    weights = switched_softmax(table.fill(x)[..., 0], table.fill(x)[..., 0], 5)
    assert weights.isfinite().all()


@pytest.mark.parametrize("shift", [0.0, 30.0, -30.0])
def test_neighbours_that_are_not_there_are_part_of_the_sum(shift):
    """As many as there is room for, each with the logit of a neighbour at the cutoff, -20."""
    logits, switch = random(4, 3) + shift, torch.rand(4, 3, dtype=torch.float64)
    padded = torch.cat([(logits + 20) * switch - 20, torch.full((4, 5), -20.0)], dim=1)
    assert_close(switched_softmax(logits, switch, 8), torch.softmax(padded, dim=1)[:, :3])


def test_cells_without_an_edge_are_neighbours_that_are_not_there():
    """How long the rows of a table are makes no difference, not even if there is less room than that."""
    logits, switch = random(4, 3), torch.rand(4, 3, dtype=torch.float64)
    expected = switched_softmax(logits, switch, 4)
    zeros = torch.zeros(4, 6)
    found = switched_softmax(torch.cat([logits, zeros], dim=1), torch.cat([switch, zeros], dim=1), 4)
    assert_close(found[:, :3], expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("room", [2, 9])
@pytest.mark.parametrize("logit", [-3e4, -1e3, 1e3, 3e4])
def test_large_logits_stay_finite(logit, room):
    """In float32, with derivatives: edges that repel or attract each other, with room for more or not."""
    logits = torch.full((1, 2), logit, requires_grad=True)
    weights = switched_softmax(logits, torch.ones(1, 2), room)
    expected = 0.0 if logit < 0 and room > 2 else 0.5
    assert_close(weights, torch.full((1, 2), expected))
    (gradient,) = torch.autograd.grad(weights[0, 0], logits, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), logits)
    assert gradient.isfinite().all()
    assert second.isfinite().all()


def attention(heads: int = 2):
    torch.manual_seed(0)
    modules = (
        PairWeights(4, 3, heads, gated=True),
        PairFeatures(4, heads),
        PairVectors(heads),
        NeighborAttention(4, 3, heads),
    )
    return tuple(module.double() for module in modules)


def test_vectors_turn_with_the_structure_and_features_do_not():
    weights, features, vectors, _ = attention()
    x, h, switch, table = (
        random(6, 4),
        random(6, 3, seed=1),
        random(6, seed=2).sigmoid(),
        EdgeTable.of(TARGET, 5),
    )
    turn = torch.linalg.qr(random(3, 3, seed=3)).Q
    a, b = (weights(x, v, switch, 9, table) for v in (h, h @ turn))
    assert_close(features(a, x, table), features(b, x, table))
    assert_close(vectors(a, h, table) @ turn, vectors(b, h @ turn, table))
    assert vectors(a, h, table).abs().max() > 1e-3


def test_an_edge_at_the_cutoff_is_as_if_it_were_not_there():
    weights, features, _, neighbors = attention()
    x, h, switch = random(6, 4), random(6, 3, seed=1), random(6, seed=2).sigmoid()
    switch[3] = 0.0
    kept = torch.tensor([0, 1, 2, 4, 5])
    table, rest = EdgeTable.of(TARGET, 5), EdgeTable.of(TARGET[kept], 5)
    found = features(weights(x, h, switch, 9, table), x, table)[kept]
    expected = features(weights(x[kept], h[kept], switch[kept], 9, rest), x[kept], rest)
    assert_close(found, expected)
    atoms = random(5, 4, seed=4)
    sent = neighbors.key_value(x)
    found = neighbors(atoms, sent, switch, 9, table)
    assert_close(found, neighbors(atoms, sent[kept], switch[kept], 9, rest))
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_an_atom_attends_to_neighbours_not_to_their_order():
    _, _, _, neighbors = attention()
    switch, table = random(6, seed=2).sigmoid(), EdgeTable.of(TARGET, 5)
    order, atoms, sent = [1, 0, 4, 2, 3, 5], random(5, 4, seed=4), neighbors.key_value(random(6, 4))
    expected = neighbors(atoms, sent, switch, 9, table)
    assert_close(neighbors(atoms, sent[order], switch[order], 9, table), expected)
