from itertools import pairwise

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close

from gnnmd.nn.scatter import Groups, pair_rows, weighted_sums

GENERATOR = torch.Generator().manual_seed(0)
INDEX = torch.tensor([0, 0, 1, 3, 3, 3, 3])
GROUPS = Groups(INDEX, 5)


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR, requires_grad=True)


@pytest.mark.parametrize("n_weights", [1, 3])
def test_sums_and_their_derivatives(n_weights):
    """Against the products, written out; the sums 2 and 4 are empty."""
    w, x = rows(7, n_weights), rows(7, 4)
    products = w[:, :, None] * x[:, None, :]
    expected = torch.zeros(5, n_weights, 4, dtype=torch.float64).index_add(0, INDEX, products)
    assert_close(weighted_sums(w, x, GROUPS), expected)
    assert gradcheck(lambda a, b: weighted_sums(a, b, GROUPS), (w, x))
    assert gradgradcheck(lambda a, b: weighted_sums(a, b, GROUPS), (w, x))


def test_sums_of_gathered_rows():
    """They are the same as gathering first; so are their derivatives."""
    w, x, j = rows(7, 3), rows(6, 4), torch.tensor([2, 5, 0, 0, 2, 2, 1])
    gathered = Groups(j, 6, ascending=False)
    assert_close(weighted_sums(w, x, GROUPS, gathered), weighted_sums(w, x[j], GROUPS))
    assert gradcheck(lambda a, b: weighted_sums(a, b, GROUPS, gathered), (w, x))
    assert gradgradcheck(lambda a, b: weighted_sums(a, b, GROUPS, gathered), (w, x))


def test_groups_that_do_not_ascend_are_brought_into_order():
    groups = Groups(torch.tensor([2, 0, 3, 0]), 5, ascending=False)
    assert groups.order.tolist() == [1, 3, 0, 2]
    assert groups.first.tolist() == [0, 2, 2, 3, 4, 4]
    assert Groups(torch.tensor([1, 1]), 2).first.tolist() == [0, 0, 2]


def test_third_derivatives():
    """The gradient of a force loss differentiates a second derivative once more."""
    w, x = rows(7, 3), rows(7, 4)

    def slope(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        energy = weighted_sums(a, b, GROUPS).pow(3).sum()
        forces = torch.autograd.grad(energy, (a, b), create_graph=True)
        return sum(force.square().sum() for force in forces)

    assert gradcheck(slope, (w, x))
    assert gradgradcheck(slope, (w, x))


def test_nothing_to_sum():
    w, x, none = rows(0, 3), rows(0, 4), INDEX[:0]
    s = weighted_sums(w, x, Groups(none, 2))
    assert s.shape == (2, 3, 4)
    s.square().sum().backward()
    assert x.grad.shape == (0, 4)
    assert weighted_sums(w, x, Groups(none, 0)).shape == (0, 3, 4)


def test_products_are_not_kept():
    """Neither in the backward pass that is recorded."""
    w, x = rows(100, 3), rows(100, 50)
    index = torch.arange(100) // 25
    kept: dict[int, torch.Tensor] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        energy = weighted_sums(w, x, Groups(index, 4)).square().sum()
        torch.autograd.grad(energy, (w, x), create_graph=True)
    assert sum(t.numel() for t in kept.values()) < 100 * 3 * 50


def test_mixed_types_are_promoted():
    w, x = rows(7, 1).float(), rows(7, 4).bfloat16()
    assert weighted_sums(w, x, GROUPS).dtype == torch.float32


def test_pairs_of_rows_and_their_derivatives():
    x, y, j = rows(5, 4), rows(3, 4), torch.tensor([2, 0, 0, 1, 2, 2, 0])
    pairs = Groups(j, 3, ascending=False)
    assert_close(pair_rows(x, GROUPS, y, pairs), x[INDEX] + y[j])

    def energy(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return pair_rows(a, GROUPS, b, pairs).pow(3).sum()

    assert gradcheck(energy, (x, y))
    assert gradgradcheck(energy, (x, y))


def test_no_pairs():
    x, y = rows(5, 4), rows(3, 4)
    found = pair_rows(x, Groups(INDEX[:0], 5), y, Groups(INDEX[:0], 3))
    assert found.shape == (0, 4)
    found.sum().backward()
    assert x.grad.abs().max() == y.grad.abs().max() == 0
    assert pair_rows(x[:0], Groups(INDEX[:0], 0), y[:0], Groups(INDEX[:0], 0)).shape == (0, 4)


@pytest.mark.parametrize("ascending", [True, False])
def test_spare_rows_are_in_no_group(ascending):
    index = torch.tensor([0, 0, 2, 3, 3, 3] if ascending else [3, 0, 2, 0, 3, 3])
    groups = Groups(index, 4, ascending, count=torch.tensor(4))
    order = torch.arange(6) if groups.order is None else groups.order
    members = [order[a:b].tolist() for a, b in pairwise(groups.first.tolist())]
    assert members == ([[0, 1], [], [2], [3]] if ascending else [[1, 3], [], [2], [0]])
