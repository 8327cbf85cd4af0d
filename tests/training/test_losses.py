"""Losses against numpy, with labels missing here and there."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gnnmd.graph import AtomBatch
from gnnmd.models.potential import Prediction
from gnnmd.parallel import GPContext, Mesh, Ranks
from gnnmd.training.losses import ForcesConfig, LossConfig, TermConfig, loss_sums, weighted_sum

COUNTS = [2, 3, 1, 4]
TERMS = {"energy", "forces", "stress"}


@pytest.fixture
def labels():
    rng = np.random.default_rng(0)
    n, b = sum(COUNTS), len(COUNTS)
    energy, forces, stress = rng.normal(size=b), rng.normal(size=(n, 3)), rng.normal(size=(b, 3, 3))
    energy[1] = np.nan
    forces[4] = np.nan
    forces[7, 1] = np.nan  # one component unknown: the atom does not count
    stress[0] = np.nan
    return AtomBatch(
        positions=torch.zeros(n, 3, dtype=torch.float64),
        numbers=torch.ones(n, dtype=torch.int64),
        system=torch.repeat_interleave(torch.arange(b), torch.tensor(COUNTS)),
        cell=torch.eye(3, dtype=torch.float64).repeat(b, 1, 1),
        pbc=torch.ones(b, 3, dtype=torch.bool),
        charge=torch.zeros(b, dtype=torch.int64),
        spin=torch.zeros(b, dtype=torch.int64),
        dataset=("",) * b,
        energy=torch.tensor(energy),
        forces=torch.tensor(forces),
        stress=torch.tensor(stress),
    )


@pytest.fixture
def prediction(labels):
    rng = np.random.default_rng(1)

    def leaf(shape):
        return torch.tensor(rng.normal(size=shape), requires_grad=True)

    return Prediction(
        energy=leaf(len(COUNTS)),
        forces=leaf((sum(COUNTS), 3)),
        stress=leaf((len(COUNTS), 3, 3)),
        node_energies=torch.zeros(sum(COUNTS), dtype=torch.float64),
    )


def sums_of(config, prediction, labels, terms=TERMS):
    return loss_sums(config, set(terms), prediction, labels, labels.n_atoms)


def mean(sums, name, gp=None, mesh=None):
    """Return one term alone, as the loss counts it."""
    return weighted_sum({name: sums[name]}, {name: 1.0}, gp or GPContext.single(10), mesh).item()


def numpy_errors(prediction, labels):
    n_atoms = np.array(COUNTS)
    energy = (prediction.energy.detach().numpy() - labels.energy.numpy()) / n_atoms
    forces = prediction.forces.detach().numpy() - labels.forces.numpy()
    stress = prediction.stress.detach().numpy() - labels.stress.numpy()
    return (
        energy[np.isfinite(energy)],
        forces[np.isfinite(forces).all(1)],
        stress[np.isfinite(stress).all((1, 2))],
    )


def huber(error, width):
    size = np.abs(error)
    return np.where(size < width, 0.5 * size**2 / width, size - 0.5 * width)


@pytest.mark.parametrize(
    ("kind", "reference"),
    [("mae", np.abs), ("mse", np.square), ("huber", lambda e: huber(e, 0.3))],
)
def test_energy_and_stress_terms_are_means_over_known_labels(labels, prediction, kind, reference):
    config = LossConfig(energy=TermConfig(kind, huber_width=0.3), stress=TermConfig(kind, huber_width=0.3))
    sums = sums_of(config, prediction, labels)
    energy, _, stress = numpy_errors(prediction, labels)
    assert sums["energy"].count == 3
    assert sums["stress"].count == 27
    assert mean(sums, "energy") == pytest.approx(reference(energy).mean(), rel=1e-13)
    assert mean(sums, "stress") == pytest.approx(reference(stress).mean(), rel=1e-13)


@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        ("l2", lambda f: np.linalg.norm(f, axis=1).mean()),
        ("mae", lambda f: np.abs(f).mean()),
        ("mse", lambda f: np.square(f).mean()),
    ],
)
def test_force_terms_are_means_over_atoms_with_all_three_components(labels, prediction, kind, reference):
    sums = sums_of(LossConfig(forces=ForcesConfig(kind)), prediction, labels)
    _, forces, _ = numpy_errors(prediction, labels)
    assert len(forces) == 8
    assert mean(sums, "forces") == pytest.approx(reference(forces), rel=1e-13)


def test_gradients_reach_known_labels_only_and_are_never_nan(labels, prediction):
    for kind, force_kind in (("mae", "l2"), ("mse", "mse"), ("huber", "mae")):
        config = LossConfig(TermConfig(kind), ForcesConfig(force_kind), TermConfig(kind))
        loss = weighted_sum(
            sums_of(config, prediction, labels), config.weights(0.0), GPContext.single(sum(COUNTS))
        )
        leaves = (prediction.energy, prediction.forces, prediction.stress)
        energy, forces, stress = torch.autograd.grad(loss, leaves)
        assert (energy != 0).tolist() == [True, False, True, True]
        assert (forces != 0).any(1).tolist() == [i not in (4, 7) for i in range(10)]
        assert (stress != 0).any(-1).any(-1).tolist() == [False, True, True, True]
        assert all(g.isfinite().all() for g in (energy, forces, stress))


def test_only_known_labels_change_the_loss(labels, prediction):
    config = LossConfig()

    def loss(p):
        return weighted_sum(sums_of(config, p, labels), config.weights(0.0), GPContext.single(10)).item()

    def moved(name, index):
        values = getattr(prediction, name).detach().clone()
        values[index] += 1.0
        return replace(prediction, **{name: values})

    start = loss(prediction)
    for name, masked, known in (("energy", 1, 0), ("forces", 4, 3), ("forces", 7, 8), ("stress", 0, 1)):
        assert loss(moved(name, masked)) == start
        assert loss(moved(name, known)) != start


def test_exact_forces_have_a_gradient_of_zero_and_not_nan(labels, prediction):
    exact = replace(prediction, forces=labels.forces.nan_to_num().requires_grad_())
    sums = sums_of(LossConfig(), exact, labels, {"forces"})
    (gradient,) = torch.autograd.grad(sums["forces"].total, exact.forces)
    assert (gradient == 0).all()


def test_a_batch_without_labels_gives_zero_loss_and_zero_gradient(labels, prediction):
    unknown = replace(
        labels,
        energy=labels.energy * torch.nan,
        forces=labels.forces * torch.nan,
        stress=labels.stress * torch.nan,
    )
    config = LossConfig()
    loss = weighted_sum(sums_of(config, prediction, unknown), config.weights(0.0), GPContext.single(10))
    loss.backward()
    assert loss.item() == 0
    assert (prediction.forces.grad == 0).all()


def test_stress_of_a_system_without_volume_does_not_count(labels, prediction):
    stress = prediction.stress.detach().clone()
    stress[2] = torch.nan
    sums = sums_of(LossConfig(), replace(prediction, stress=stress), labels)
    assert sums["stress"].count == 18
    assert sums["stress"].total.isfinite()


class Twins(Ranks):
    """Stands for two ranks with equal sums."""

    size, rank = 2, 0

    def sum(self, x):
        return 2 * x


class TwinContext(GPContext):
    """Its context, if they share a graph."""

    def sum_ranks(self, partial):
        return 2 * partial


def test_equal_sums_on_two_ranks_have_the_mean_of_one(labels, prediction):
    """Sharing a graph, sums over atoms add up; sharing the data, all do."""
    sums, world = sums_of(LossConfig(), prediction, labels), Twins()
    assert mean(sums, "forces", TwinContext(10), Mesh(world, world)) == pytest.approx(mean(sums, "forces"))
    for name in TERMS:
        assert sums[name].partial is (name == "forces")
        assert mean(sums, name, mesh=Mesh(world)) == pytest.approx(mean(sums, name))


def test_a_loss_without_any_term_is_refused():
    zero = LossConfig(TermConfig(weight=0.0), ForcesConfig(weight=0.0), TermConfig(weight=0.0))
    with pytest.raises(ValueError, match="weight 0"):
        zero.weights(0.0)
