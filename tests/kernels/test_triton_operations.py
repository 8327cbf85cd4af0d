"""Operations in Triton against their references, on a GPU or in the interpreter (TRITON_INTERPRET=1)."""

import pytest
import torch
from torch.autograd import grad
from torch.testing import assert_close

from gnnmd.graph import AtomBatch
from gnnmd.kernels.operations import Operations, operations
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.dpa3_config import DPA3Config
from gnnmd.nn.activations import activation
from gnnmd.nn.scatter import Groups
from tests.kernels.versions import DEVICE, MARKS, TYPES, Random, same
from tests.models.systems import crystal, predict, randomised

pytestmark = MARKS
REFERENCE = operations("torch", "silut:1.5", DEVICE)


@pytest.fixture
def fast() -> Operations:
    return operations("triton", "silut:1.5", DEVICE)


class Inputs:
    """Random rows and groups; some groups are empty, one has more rows than a program reads at a time."""

    def __init__(self, columns: int = 5, k: int = 1, n_rows: int = 40, dtype: torch.dtype = torch.float64):
        random = Random(columns + k)
        index = random.below(9, n_rows)
        index[n_rows // 2 :] = 4
        self.groups = Groups(index.sort().values, 10)
        self.rows = Groups(random.below(7, n_rows), 8, False)
        self.w, self.x = random.normal(n_rows, k, dtype=dtype), random.normal(n_rows, columns, dtype=dtype)
        self.y, self.z = random.normal(8, columns, dtype=dtype), random.normal(10, columns, dtype=dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("columns", "k"), [(5, 1), (3, 3), (130, 3)])
def test_weighted_sums(fast, columns, k, dtype):
    i = Inputs(columns, k, dtype=dtype)
    found, expected = (o.weighted_sums(i.w, i.x, i.groups) for o in (fast, REFERENCE))
    same(found, expected, [i.w, i.x])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("columns", "k"), [(5, 1), (3, 3), (130, 3)])
def test_weighted_sums_of_gathered_rows(fast, columns, k, dtype):
    i = Inputs(columns, k, dtype=dtype)
    found, expected = (o.weighted_sums(i.w, i.y, i.groups, i.rows) for o in (fast, REFERENCE))
    same(found, expected, [i.w, i.y])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("columns", [5, 130])
def test_pairs_of_rows(fast, columns, dtype):
    i = Inputs(columns, dtype=dtype)
    found, expected = (o.pair_rows(i.z, i.groups, i.y, i.rows) for o in (fast, REFERENCE))
    same(found, expected, [i.z, i.y])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("columns", [5, 130])
def test_activated_sums(fast, columns, dtype):
    """Both sides of the threshold are there."""
    i = Inputs(columns, dtype=dtype)
    assert (i.x > 1.5).any()
    found, expected = (o.activated_sums(i.w[:, 0], i.x, i.groups) for o in (fast, REFERENCE))
    same(found, expected, [i.w, i.x])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["silut:1.5", "silut:10", "silut", "silu", "tanh"])
def test_activations(name, dtype):
    x = torch.cat([torch.linspace(-30, 30, 1101), torch.tensor([-1e3, 1e3])])
    x = x.to(DEVICE, dtype).requires_grad_()
    same(operations("triton", name, DEVICE).act(x), activation(name)(x), [x])


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_gradients(fast, transposed):
    """Training differentiates forces, which are derivatives; also of rows that do not lie together."""
    i = Inputs(3, 1, n_rows=12)
    x = i.x.detach().t().contiguous().t().requires_grad_() if transposed else i.x
    inputs, results = (i.w, x, i.y, i.z), []
    for o in (fast, REFERENCE):
        pairs = o.act(o.pair_rows(i.z, i.groups, i.y, i.rows) + x)
        sums = o.weighted_sums(i.w, i.y, i.groups, i.rows).squeeze(1)
        w = i.w.square().squeeze(1)
        features = x + pairs + w[:, None]  # as in the second layer of a model
        energy = (o.activated_sums(w, features, i.groups) + sums).pow(3).sum()
        forces = grad(energy, inputs, create_graph=True)
        results.append([*forces, *grad(sum(f.square().sum() for f in forces), inputs)])
    for found, expected in zip(*results, strict=True):
        assert expected.abs().max() > 0.1
        assert_close(found, expected)


def test_nothing_to_sum(fast):
    i = Inputs()
    none, rows = Groups(i.groups.index[:0], 3), Groups(i.rows.index[:0], 8, False)
    assert fast.weighted_sums(i.w[:0], i.x[:0], none).eq(0).all()
    assert fast.activated_sums(i.w[:0, 0], i.x[:0], none).eq(0).all()
    assert fast.pair_rows(i.z, none, i.y, rows).shape == (0, 5)
    s = fast.weighted_sums(i.w[:0], i.y, none, rows)
    assert s.shape == (3, 1, 5)
    s.sum().backward()
    assert i.y.grad.eq(0).all()


def test_a_model_of_angles_and_its_training_gradient():
    torch.manual_seed(0)
    shape = {"n_dim": 8, "e_dim": 4, "a_dim": 4, "nlayers": 3, "e_rcut": 4.5, "a_rcut": 3.2}
    switches = {"e_rcut_smth": 4.0, "a_rcut_smth": 2.8, "activation_function": "silut:1"}
    potential = build_potential(PotentialConfig(DPA3Config(type_map=("Ag", "Cu"), **shape, **switches)))
    potential = randomised(potential.double()).to(DEVICE).train()
    batch, results = AtomBatch.from_ase(crystal()).to(DEVICE), []
    for kernels in ("torch", "triton"):
        potential.backbone.kernels = kernels
        potential.zero_grad()
        p = predict(potential, batch)
        (p.energy.sum() + p.forces.square().sum() + p.stress.square().sum()).backward()
        gradients = [w.grad.clone() for w in potential.parameters() if w.grad is not None]
        results.append([p.energy, p.forces, p.stress, *gradients])
    assert results[0][1].abs().max() > 1e-4
    for expected, found in zip(*results, strict=True):
        assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["fast", "triton "])
def test_names_that_are_not_known(name):
    with pytest.raises(ValueError, match="auto, torch, triton"):
        operations(name, "silut", DEVICE)
