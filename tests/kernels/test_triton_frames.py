"""Both ends of a message in Triton against operators of torch, on a GPU or in the interpreter."""

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.testing import assert_close

from gnnmd.graph import AtomBatch
from gnnmd.kernels.operations import frames_for
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.nn.frames import Frames, Orders
from gnnmd.nn.scatter import Groups
from tests.kernels.versions import DEVICE, MARKS, TYPES, Random, same
from tests.models.systems import crystal, predict, randomised

pytestmark = MARKS
SHAPES = [(2, 2, 5), (1, 1, 8), (3, 2, 4), (0, 0, 3), (2, 2, 130)]


class Inputs:
    """Random rows; some atoms have no edges, targets begin at row 2."""

    def __init__(self, orders: Orders, c: int, dtype: torch.dtype, n_edges: int = 11):
        random = Random(c)
        r, s, f = sum(orders.rows), (orders.lmax + 1) ** 2, sum(orders.factors)
        self.source = Groups(random.below(8, n_edges), 8, ascending=False)
        self.target = Groups(random.below(5, n_edges).sort().values, 6)
        self.d, self.h = random.normal(n_edges, r, s, dtype=dtype), random.normal(8, s, c, dtype=dtype)
        self.f, self.x = (
            random.normal(n_edges, f, 2 * c, dtype=dtype),
            random.normal(n_edges, r, c, dtype=dtype),
        )
        self.orders = orders

    def pairs(self, frames: Frames) -> Tensor:
        rows = frames.scaled_pairs(self.d, self.h, self.f, self.source, self.target, 2, self.orders)
        assert len(rows) == self.orders.mmax + 1
        return torch.cat(rows, dim=1)

    def sums(self, frames: Frames, rows: int) -> Tensor:
        return frames.sums(self.d[:, :rows], self.x[:, :rows], self.target, self.x.dtype)


@pytest.fixture
def fast() -> Frames:
    frames = frames_for("triton", DEVICE)
    assert type(frames) is not Frames
    return frames


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("lmax", "mmax", "c"), SHAPES)
def test_rows_of_both_atoms_in_the_frames_of_edges(fast, lmax, mmax, c, dtype):
    i = Inputs(Orders(lmax, mmax), c, dtype)
    same(i.pairs(fast), i.pairs(Frames()), [i.d, i.h, i.f])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("lmax", "mmax", "c"), SHAPES)
def test_sums_of_what_goes_back(fast, lmax, mmax, c, dtype):
    i = Inputs(Orders(lmax, mmax), c, dtype)
    for rows in (i.d.shape[1], lmax + 1):  # all, or those of m = 0
        same(i.sums(fast, rows), i.sums(Frames(), rows), [i.d, i.x])


@pytest.mark.parametrize("operation", ["pairs", "sums"])
def test_derivatives_of_derivatives_are_those_of_the_reference(fast, operation):
    found = []
    for frames in (fast, Frames()):
        i = Inputs(Orders(2, 2), 5, torch.float64)
        y, inputs = (
            (i.pairs(frames), [i.d, i.h, i.f]) if operation == "pairs" else (i.sums(frames, 9), [i.d, i.x])
        )
        first = grad((y**2).sum(), inputs, create_graph=True)
        found.append(grad(sum((g**2).sum() for g in first), inputs))
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


def test_no_edges(fast):
    i = Inputs(Orders(2, 2), 4, torch.float64, n_edges=0)
    assert i.pairs(fast).shape == (0, 9 * 8)
    same(i.sums(fast, 9), torch.zeros(6, 9, 4, dtype=torch.float64, device=DEVICE) + 0 * i.x.sum(), [i.x])


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
