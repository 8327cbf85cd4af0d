"""Operations of eSCN-MD in Triton against operators of torch, on a GPU or in the interpreter."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.testing import assert_close

from gnnmd.graph import AtomBatch
from gnnmd.kernels.operations import edge_operations
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.nn.edge_operations import EdgeOperations, Orders
from gnnmd.nn.norms import NORMS, DegreeNorm
from gnnmd.nn.scatter import Groups
from gnnmd.nn.so3 import degrees, m_major_rows
from tests.kernels.versions import DEVICE, MARKS, TYPES, Random, same
from tests.models.systems import crystal, predict, randomised

pytestmark = MARKS
SHAPES = [(2, 2, 5), (1, 1, 8), (3, 2, 4), (0, 0, 3), (2, 2, 130), (3, 3, 2)]


class Inputs:
    """Random rows; some atoms have no edges, targets begin at row 2."""

    def __init__(self, orders: Orders, c: int, dtype: torch.dtype, n_edges: int = 11):
        random = Random(c)
        r, s, f = sum(orders.rows), (orders.lmax + 1) ** 2, sum(orders.factors)
        self.source = Groups(random.below(8, n_edges), 8, ascending=False)
        self.target = Groups(random.below(5, n_edges).sort().values, 6)
        self.d, self.h = random.normal(n_edges, r, s, dtype=dtype), random.normal(8, s, c, dtype=dtype)
        degree = torch.tensor(degrees(orders.lmax), device=DEVICE)
        rows = degree[m_major_rows(orders.lmax, orders.mmax)]
        self.one_degree = (rows[:, None] == degree).to(dtype)  # rotations mix no others
        self.f = random.normal(n_edges, f * 2 * c, dtype=dtype)
        self.x = [random.normal(n_edges, n * c, dtype=dtype) for n in orders.rows]
        self.gates = random.normal(n_edges, (2 * orders.lmax + 1) * c, dtype=dtype)
        self.orders, self.c = orders, c

    def pairs(self, ops: EdgeOperations) -> Tensor:
        rows = ops.scaled_pairs(
            self.d * self.one_degree, self.h, self.f, self.source, self.target, 2, self.orders
        )
        assert len(rows) == self.orders.mmax + 1
        return torch.cat(rows, dim=1)

    def sums(self, ops: EdgeOperations, n_orders: int) -> Tensor:
        x = self.x[:n_orders]
        rows = sum(t.shape[1] for t in x) // self.c
        return ops.sums((self.d * self.one_degree)[:, :rows], x, self.target, x[0].dtype)

    def gated(self, ops: EdgeOperations) -> Tensor:
        x = ops.gated([self.gates, *self.x[1:]], self.orders.lmax, self.c)
        assert [t.shape for t in x] == [t.shape for t in self.x]
        return torch.cat(x, dim=1)


@pytest.fixture
def fast() -> EdgeOperations:
    ops = edge_operations("triton", DEVICE)
    assert type(ops) is not EdgeOperations
    return ops


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("lmax", "mmax", "c"), SHAPES)
def test_rows_of_both_atoms_in_the_frames_of_edges(fast, lmax, mmax, c, dtype):
    i = Inputs(Orders(lmax, mmax), c, dtype)
    same(i.pairs(fast), i.pairs(EdgeOperations()), [i.d, i.h, i.f])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("lmax", "mmax", "c"), SHAPES)
def test_sums_of_what_goes_back(fast, lmax, mmax, c, dtype):
    i = Inputs(Orders(lmax, mmax), c, dtype)
    for n in (mmax + 1, 1):  # all orders, or m = 0
        same(i.sums(fast, n), i.sums(EdgeOperations(), n), [i.d, *i.x[:n]])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("lmax", "mmax", "c"), SHAPES)
def test_gates(fast, lmax, mmax, c, dtype):
    i = Inputs(Orders(lmax, mmax), c, dtype)
    same(i.gated(fast), i.gated(EdgeOperations()), [i.gates, *i.x[1:]])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n", "c"), [(9, 8), (3, 130), (0, 4)])
def test_activated_norm(fast, n, c, dtype):
    norm = nn.LayerNorm(c).to(DEVICE, dtype).requires_grad_(False)
    norm.weight.normal_(), norm.bias.normal_()
    x = Random(c).normal(n, c, dtype=dtype)
    same(fast.activated_norm(x, norm), EdgeOperations().activated_norm(x, norm), [x])
    norm.requires_grad_()
    same(fast.activated_norm(x, norm), EdgeOperations().activated_norm(x, norm), [x, norm.weight, norm.bias])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(("n", "lmax", "c"), [(4, 2, 8), (3, 3, 130), (2, 0, 5), (1, 1, 4), (0, 2, 4)])
def test_norms_of_degrees(fast, n, lmax, c, kind, dtype):
    norm = degree_norm(kind, lmax, c, dtype)
    x = Random(c).normal(n, (lmax + 1) ** 2, c, dtype=dtype)
    for shift in (None, *(Random(1).normal(rows, c, dtype=dtype).detach() for rows in (1, n))):
        same(fast.degree_norm(x, norm, shift), norm(x, shift), [x])
    norm.requires_grad_()
    same(fast.degree_norm(x, norm), norm(x), [x, norm.weight, norm.bias])


def test_small_rows_are_normalised_to_all_digits(fast):
    """The number that is added to mean squares is not rounded to float32."""
    norm = degree_norm("rms_norm_sh", 2, 8, torch.float64)
    x = 1e-3 * Random(3).normal(4, 9, 8, dtype=torch.float64)
    assert_close(fast.degree_norm(x, norm), norm(x), rtol=1e-13, atol=1e-13)


def degree_norm(kind: str, lmax: int, channels: int, dtype: torch.dtype) -> DegreeNorm:
    norm = DegreeNorm(kind, lmax, channels).to(DEVICE, dtype).requires_grad_(False)
    norm.weight.normal_(), norm.bias.normal_()
    return norm


@pytest.mark.parametrize("operation", ["pairs", "sums", "gated", "activated_norm", "degree_norm"])
def test_derivatives_of_derivatives_are_those_of_the_reference(fast, operation):
    found = []
    norm = nn.LayerNorm(5).to(DEVICE, torch.float64).requires_grad_(False)
    degrees_norm = degree_norm("rms_norm_sh", 2, 5, torch.float64)
    for ops in (fast, EdgeOperations()):
        i = Inputs(Orders(2, 2), 5, torch.float64)
        y, inputs = {
            "pairs": lambda ops, i: (i.pairs(ops), [i.d, i.h, i.f]),
            "sums": lambda ops, i: (i.sums(ops, 3), [i.d, *i.x]),
            "gated": lambda ops, i: (i.gated(ops), [i.gates, *i.x[1:]]),
            "degree_norm": lambda ops, i: (ops.degree_norm(i.h, degrees_norm, i.h[:, 0].detach()), [i.h]),
            "activated_norm": lambda ops, i: (ops.activated_norm(i.x[0].view(-1, 5), norm), [i.x[0]]),
        }[operation](ops, i)
        first = grad((y**2).sum(), inputs, create_graph=True)
        found.append(grad(sum((g**2).sum() for g in first), inputs))
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


def test_no_edges(fast):
    i = Inputs(Orders(2, 2), 4, torch.float64, n_edges=0)
    assert i.pairs(fast).shape == (0, 9 * 8)
    assert i.gated(fast).shape == (0, 9 * 4)
    same(
        i.sums(fast, 3), torch.zeros(6, 9, 4, dtype=torch.float64, device=DEVICE) + 0 * i.x[0].sum(), [i.x[0]]
    )


def test_energy_forces_stress_and_gradients_of_a_model():
    batch = AtomBatch.from_ase(crystal()).to(DEVICE)
    config = EscnMDConfig(
        r_cut=4.0, channels=4, hidden_channels=6, edge_channels=4, num_basis=4, mmax=1, num_layers=2
    )
    potential = randomised(build_potential(PotentialConfig(config)).double()).to(DEVICE).train()
    results = []
    for kernels in ("torch", "triton"):
        potential.backbone.kernels = kernels
        p = predict(potential, batch)
        loss = p.energy.sum() + (p.forces**2).sum() + (p.stress**2).sum()
        gradients = grad(loss, list(potential.parameters()), allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            p = predict(potential.eval(), batch)
        potential.train()
        results.append([p.energy, p.forces, p.stress, *gradients])
    assert results[0][1].abs().max() > 1e-4
    for expected, found in zip(*results, strict=True):
        assert_close(found, expected, rtol=1e-9, atol=1e-11)
