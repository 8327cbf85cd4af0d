from pathlib import Path

import numpy as np
import pytest
import torch
from ase.data import atomic_numbers
from torch.testing import assert_close

from gnnmd.nn.type_embedding import (
    TypeEmbedding,
    VectorEmbedding,
    electron_configuration,
    electron_configuration_vector,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "deepmd" / "econf_O_H_Cu_Ag.npz"


def test_reference_vectors():
    """Those of deepmd-kit, exactly."""
    for symbol, vector in zip(("O", "H", "Cu", "Ag"), np.load(GOLDEN)["econf"], strict=True):
        assert electron_configuration_vector(atomic_numbers[symbol]).numpy().tolist() == vector.tolist()


def test_every_atom_is_neutral():
    vectors = [electron_configuration_vector(z) for z in range(1, 119)]
    for z, vector in enumerate(vectors, start=1):
        assert int((vector > 0).sum()) == z == sum(electron_configuration(z).values())
        assert_close(vector.norm(), torch.tensor(1.0, dtype=torch.float64))
    assert len({tuple(v.tolist()) for v in vectors}) == 118


@pytest.mark.parametrize(
    ("symbol", "outer"),
    [
        ("Fe", {"3d": 6, "4s": 2}),
        ("Cr", {"3d": 5, "4s": 1}),
        ("Pd", {"4d": 10}),
        ("Gd", {"4f": 7, "5d": 1, "6s": 2}),
        ("Pt", {"4f": 14, "5d": 9, "6s": 1}),
        ("U", {"5f": 3, "6d": 1, "7s": 2}),
        ("Ds", {"5f": 14, "6d": 9, "7s": 1}),
        ("Rg", {"5f": 14, "6d": 10, "7s": 1}),
    ],
)
def test_open_shells(symbol, outer):
    found = electron_configuration(atomic_numbers[symbol])
    noble = max(z for z in (2, 10, 18, 36, 54, 86) if z < atomic_numbers[symbol])
    core = electron_configuration(noble)
    assert {k: n for k, n in found.items() if k not in core} == outer


def test_the_input_is_added_where_the_widths_fit():
    """Four types in eight columns have it twice, three types have not."""
    torch.manual_seed(0)
    for n, channels, copies in [(4, 8, 2), (4, 4, 1), (3, 8, 0)]:
        embedding = VectorEmbedding(torch.eye(n, dtype=torch.float64), channels, bias=True)
        linear = embedding.layer.linear
        expected = linear.weight.T + linear.bias
        if copies:
            expected = expected + torch.eye(n).repeat(1, copies)
        assert_close(embedding.table(), expected)
        assert_close(embedding(torch.tensor([2, 0])), expected[[2, 0]])


def test_types_go_by_the_given_order():
    torch.manual_seed(0)
    embedding = TypeEmbedding([47, 1, 8], 5)
    assert embedding.types(torch.tensor([8, 47, 1, 1])).tolist() == [2, 0, 1, 1]
    assert embedding.layer.linear.bias is None
    assert TypeEmbedding([47, 1], 5, electron_configurations=True).vectors.shape == (2, 118)
