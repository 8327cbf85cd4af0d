"""What every potential must pass, whatever its network; tolerances are those of a float64 model.

A test class inherits `Conformance` and gives a fixture ``potential`` (float64, evaluation mode) that knows
H, C, O, Cu and Ag.
"""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import units
from ase.calculators.calculator import Calculator, all_changes
from ase.md.verlet import VelocityVerlet
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.testing import assert_close

from gnnmd.graph import AtomBatch
from gnnmd.graph.neighbors import NeighborList, neighbor_list
from gnnmd.models.build import build_potential, from_dict, to_dict
from gnnmd.models.potential import Potential, Prediction
from gnnmd.parallel import GPContext
from tests.models.systems import crystal, dimer, ethanol, moved, predict, slab


def assert_same(found: Prediction, expected: Prediction, tolerance: float = 1e-10) -> None:
    """Compare energies, forces and stress."""
    limits = {"rtol": 0.0, "atol": tolerance}
    assert_close(found.energy, expected.energy, **limits)
    assert_close(found.forces, expected.forces, **limits)
    if found.stress is not None and expected.stress is not None:
        assert_close(found.stress, expected.stress, equal_nan=True, **limits)


def rotation(seed: int) -> Tensor:
    return torch.tensor(Rotation.random(random_state=seed).as_matrix())


class Conformance:
    """Inherit and give the fixture ``potential``.

    Attributes:
        conservative: whether forces and stress are derivatives.
        rotation_tolerance: for networks that are equivariant only up to a grid.
        strain_tolerance: of stress against differences of energies, for networks with a steep switch.
    """

    conservative = True
    rotation_tolerance = 1e-10
    strain_tolerance = 1e-8

    @pytest.fixture
    def potential(self) -> Potential:
        raise NotImplementedError

    def test_neighbours_matter(self, potential):
        """Negative control for everything below: a constant would pass most of it."""
        near, far = predict(potential, dimer(2.5)), predict(potential, dimer(2 * potential.r_cut))
        assert abs(near.energy - far.energy) > 1e-3
        assert near.forces.abs().max() > 1e-3
        assert predict(potential, crystal()).stress.abs().max() > 1e-5

    def test_translation(self, potential):
        batch = AtomBatch.from_ase(crystal())
        shift = torch.tensor([3.1, -20.3, 7.7], dtype=torch.float64)
        assert_same(predict(potential, moved(batch, batch.positions + shift)), predict(potential, batch))

    @pytest.mark.parametrize("seed", [0, 1])
    @pytest.mark.parametrize("system", [crystal, ethanol, slab])
    def test_rotation(self, potential, system, seed):
        batch, r = AtomBatch.from_ase(system()), rotation(seed)
        expected = predict(potential, batch)
        found = predict(potential, moved(batch, batch.positions @ r.T, batch.cell @ r.T))
        turned = Prediction(
            expected.energy, expected.forces @ r.T, r @ expected.stress @ r.T, expected.energy
        )
        assert_same(found, turned, self.rotation_tolerance)

    def test_edges_along_the_axes(self, potential):
        """Edges of a perfect crystal lie on every singular direction that a frame can have."""
        atoms = crystal()
        atoms.set_cell(np.diag([8.18, 4.09, 4.09]))
        atoms.set_scaled_positions(
            np.array([[i / 2, j, k] for i in (0, 1) for j, k in [(0, 0), (0.5, 0.5)]] * 2)
        )
        atoms.positions[4:] += [1.0, 2.045, 0.0]
        found = predict(potential, atoms)
        r = torch.tensor(Rotation.from_euler("xyz", [90, 180, 90], degrees=True).as_matrix())
        batch = AtomBatch.from_ase(atoms)
        turned = predict(potential, moved(batch, batch.positions @ r.T, batch.cell @ r.T))
        assert found.forces.isfinite().all()
        assert_close(turned.forces, found.forces @ r.T, rtol=0, atol=self.rotation_tolerance)

    def test_permutation(self, potential):
        atoms, order = slab(), [3, 0, 4, 1, 2]
        expected, found = predict(potential, atoms), predict(potential, atoms[order])
        assert_close(found.energy, expected.energy, rtol=0, atol=1e-10)
        assert_close(found.forces, expected.forces[order], rtol=0, atol=1e-10)

    def test_extensivity(self, potential):
        """A cell repeated is as many times the energy, with the same forces."""
        atoms = slab()
        atoms.info["spin"] = 1  # no unpaired electron: a total that is shared out must grow with the system
        one, many = predict(potential, atoms), predict(potential, atoms.repeat((2, 3, 1)))
        assert_close(many.energy, 6 * one.energy, rtol=0, atol=1e-9)
        assert_close(many.forces, one.forces.repeat(6, 1), rtol=0, atol=1e-10)

    def test_smoothness_at_the_cutoff(self, potential):
        r, width = potential.r_cut, 3e-5
        inside, outside = predict(potential, dimer(r - width)), predict(potential, dimer(r + width))
        assert abs(inside.energy - outside.energy) < 1e-9
        assert (inside.forces - outside.forces).abs().max() < 1e-7
        if self.conservative:
            assert outside.forces.abs().max() == 0

    def test_forces_are_the_gradient(self, potential):
        if not self.conservative:
            pytest.skip("forces have a head of their own")
        for system in (crystal, ethanol):
            batch = AtomBatch.from_ase(system())
            forces, h = predict(potential, batch).forces, 1e-4
            rng = np.random.default_rng(0)
            for _ in range(5):
                i, axis = rng.integers(len(batch.numbers)), rng.integers(3)
                step = torch.zeros_like(batch.positions)
                step[i, axis] = h
                up = predict(potential, moved(batch, batch.positions + step)).energy
                down = predict(potential, moved(batch, batch.positions - step)).energy
                assert_close(-(up - down)[0] / (2 * h), forces[i, axis], rtol=0, atol=1e-7)

    def test_stress_is_the_strain_derivative(self, potential):
        if not self.conservative:
            pytest.skip("the stress has a head of its own")
        batch, h = AtomBatch.from_ase(crystal()), 1e-4
        stress, v = predict(potential, batch).stress[0], torch.linalg.det(batch.cell[0]).abs()
        for a, b in [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]:
            strain = torch.zeros(3, 3, dtype=torch.float64)
            strain[a, b] += h / 2
            strain[b, a] += h / 2
            energies = [
                predict(potential, moved(batch, batch.positions @ f, batch.cell @ f)).energy[0]
                for f in (torch.eye(3) + strain, torch.eye(3) - strain)
            ]
            assert_close(
                (energies[0] - energies[1]) / (2 * h) / v, stress[a, b], rtol=0, atol=self.strain_tolerance
            )
        assert_close(stress, stress.T, rtol=0, atol=1e-14)

    def test_momentum_and_torque_are_conserved(self, potential):
        if not self.conservative:
            pytest.skip("forces have a head of their own")
        assert predict(potential, crystal()).forces.sum(0).abs().max() < 1e-12
        batch = AtomBatch.from_ase(ethanol())
        forces = predict(potential, batch).forces
        torque = torch.linalg.cross(batch.positions, forces).sum(0)
        assert torque.abs().max() < self.rotation_tolerance

    def test_whole_lattice_translation_of_one_atom(self, potential):
        batch = AtomBatch.from_ase(crystal())
        positions = batch.positions.clone()
        positions[3] += torch.tensor([2.0, -1.0, 3.0], dtype=torch.float64) @ batch.cell[0]
        assert_same(predict(potential, moved(batch, positions)), predict(potential, batch))

    def test_lone_atom(self, potential):
        """No edge: an energy, no force, and a stress only where there is a volume."""
        atoms = dimer(100.0)
        alone = predict(potential, atoms[[0]])
        assert alone.energy.isfinite().all()
        assert_close(alone.node_energies.sum(), alone.energy[0])
        assert alone.stress.isnan().all()
        boxed = atoms[[0]]
        boxed.cell, boxed.pbc = 50 * np.eye(3), True
        found = predict(potential, boxed)
        assert_close(found.energy, alone.energy, rtol=0, atol=1e-12)
        assert found.stress.isfinite().all()
        if self.conservative:
            assert alone.forces.abs().max() == 0
            assert found.stress.abs().max() == 0

    def test_molecule_without_periodicity(self, potential):
        """Open space is a box that is large enough, and a stress without volume is not a number."""
        atoms = ethanol()
        open_space = predict(potential, atoms)
        atoms.set_cell(40 * np.eye(3))
        atoms.pbc = True
        boxed = predict(potential, atoms)
        assert_close(boxed.energy, open_space.energy, rtol=0, atol=1e-10)
        assert_close(boxed.forces, open_space.forces, rtol=0, atol=1e-10)
        assert open_space.stress.isnan().all()

    def test_batch_equals_singles(self, potential):
        systems = [crystal(), dimer(100.0), ethanol(), slab(), crystal(3)]
        together = predict(potential, systems)
        singles = [predict(potential, atoms) for atoms in systems]
        assert_close(together.energy, torch.cat([p.energy for p in singles]), rtol=0, atol=1e-10)
        assert_close(together.forces, torch.cat([p.forces for p in singles]), rtol=0, atol=1e-10)
        stress = torch.cat([p.stress for p in singles])
        assert_close(together.stress, stress, rtol=0, atol=1e-10, equal_nan=True)

    def test_a_system_without_atoms(self, potential):
        """An empty row of a batch changes nothing."""
        batch = AtomBatch.from_ase([slab(), crystal()])
        expected = predict(potential, batch)
        n, gap = len(slab()), torch.tensor([0, 0, 1])
        with_gap = AtomBatch(
            **{k: getattr(batch, k)[gap] for k in ("cell", "pbc", "charge", "spin", "energy", "stress")},
            **{k: getattr(batch, k) for k in ("positions", "numbers", "forces")},
            system=2 * batch.system,
            dataset=("", "", ""),
        )
        found = predict(potential, with_gap)
        assert found.energy[1] == 0
        assert_close(found.energy[[0, 2]], expected.energy, rtol=0, atol=1e-12)
        assert_close(found.forces[n:], expected.forces[n:], rtol=0, atol=1e-12)

    def test_edges_of_a_skin_contribute_nothing(self, potential):
        batch = AtomBatch.from_ase(crystal())
        expected = predict(potential, batch)
        wide = neighbor_list(batch, potential.r_cut + 1.0)
        graph = potential.graph(batch, NeighborList(wide.edge_index, wide.shift, potential.r_cut))
        found = potential(batch.positions, graph, GPContext.single(len(batch.numbers)))
        assert_same(found, expected, 1e-12)

    def test_spare_edges_contribute_nothing(self, potential):
        """Also to gradients of the weights: compiled code keeps its shapes by such edges."""
        atoms = crystal()
        batch, n = AtomBatch.from_ase(atoms), len(atoms)
        graph = potential.graph(batch)
        again = [-1] * 7  # repeated edges: they would count if they were taken for real ones
        wide = {
            "edge_index": torch.cat([graph.edge_index, graph.edge_index[:, again]], dim=1),
            "shift": torch.cat([graph.shift, graph.shift[again]]),
            "n_edges": torch.tensor(graph.edge_index.shape[1]),
        }
        potential = copy.deepcopy(potential).train()
        gradients = []
        for g in (graph, replace(graph, **wide)):
            found = potential(batch.positions, g, GPContext.single(n))
            loss = found.energy.sum() + found.forces.square().sum()
            gradients.append(torch.autograd.grad(loss, potential.parameters(), allow_unused=True))
            assert_same(found, predict(potential, atoms), 1e-12)
        for one, other in zip(*gradients, strict=True):
            assert_close(one, other, rtol=1e-10, atol=1e-12)

    def test_checkpoint_round_trip(self, potential):
        """Configuration through JSON and the state dict rebuild the same function, to the last bit."""
        if potential.config is None:
            pytest.skip("not built from a configuration")
        potential.element_energies[47] = -1.25
        again = build_potential(from_dict(json.loads(json.dumps(to_dict(potential.config)))))
        again.double().eval().load_state_dict(potential.state_dict())
        found, expected = predict(again, crystal()), predict(potential, crystal())
        assert_same(found, expected, 0.0)
        assert again.config == potential.config

    def test_casting_forth_and_back_keeps_the_tables(self, potential):
        """Constants survive `.float()`: weights that are exact in float32 give the same function again."""
        exact = copy.deepcopy(potential).float().double()
        again = copy.deepcopy(exact).float().double()
        assert_same(predict(again, crystal()), predict(exact, crystal()), 0.0)
        fresh = copy.deepcopy(potential)
        fresh.load_state_dict(exact.state_dict())
        assert_same(predict(fresh, crystal()), predict(exact, crystal()), 0.0)

    @pytest.mark.parametrize("system", [crystal, ethanol])
    def test_float32_is_close(self, potential, system):
        expected = predict(potential, system())
        found = predict(copy.deepcopy(potential).float(), system())
        assert found.energy.dtype == found.forces.dtype == torch.float64
        scale = expected.forces.abs().max()
        assert (found.forces - expected.forces).abs().max() < 1e-4 * max(1.0, float(scale))
        assert (found.energy - expected.energy).abs().max() / len(expected.forces) < 1e-5

    def test_far_from_the_origin_in_float32(self, potential):
        """Positions are subtracted in float64; rounding them first would be wrong at 10,000 A."""
        single = copy.deepcopy(potential).float()
        batch = AtomBatch.from_ase(crystal())
        away = batch.positions + 1e4
        expected, found = predict(single, batch), predict(single, moved(batch, away))
        rounded = predict(single, moved(batch, away.float().double()))
        error, error_rounded = ((p.forces - expected.forces).abs().max() for p in (found, rounded))
        assert error < 1e-5
        assert error_rounded > 10 * error

    def test_training_differentiates_forces(self, potential):
        """The gradient of a force and stress loss by the weights is its finite difference."""
        batch = AtomBatch.from_ase([crystal(), slab()])
        model = copy.deepcopy(potential).train()

        def loss() -> Tensor:
            p = predict(model, batch)
            return p.energy.square().sum() + p.forces.square().sum() + 100 * p.stress.square().sum()

        loss().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        assert all(g.isfinite().all() for g in gradients.values())
        largest = sorted(gradients, key=lambda n: -gradients[n].abs().max())[::6]
        for name in largest:
            weight, h = model.get_parameter(name), 1e-5
            i = int(gradients[name].abs().argmax())
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    weight.view(-1)[i] += sign * h
                values.append(loss().item())
                with torch.no_grad():
                    weight.view(-1)[i] -= sign * h
            expected = gradients[name].view(-1)[i].item()
            assert (values[0] - values[1]) / (2 * h) == pytest.approx(expected, rel=1e-5, abs=1e-7), name

    def test_missing_stress_does_not_poison_gradients(self, potential):
        """Systems without volume have no stress; the others' gradients stay finite."""
        model = copy.deepcopy(potential).train()
        p = predict(model, [crystal(), ethanol()])
        (p.stress[~p.stress.isnan()].square().sum() + p.forces.square().sum()).backward()
        assert all(w.grad.isfinite().all() for w in model.parameters() if w.grad is not None)

    def test_edge_chunks_change_nothing(self, potential):
        batch = AtomBatch.from_ase([crystal(), ethanol(), slab()])
        expected = predict(potential, batch)
        chunked = copy.deepcopy(potential)
        for chunk in (1, 100):
            chunked.backbone.edge_chunk = chunk
            assert_same(predict(chunked, batch), expected, 1e-12)

    def test_edge_chunks_leave_training_gradients(self, potential):
        batch = AtomBatch.from_ase([crystal(), slab()])
        gradients = []
        for chunk in (None, 60):
            model = copy.deepcopy(potential).train()
            model.backbone.edge_chunk = chunk
            p = predict(model, batch)
            (p.energy.square().sum() + p.forces.square().sum() + p.stress.square().sum()).backward()
            gradients.append([w.grad for w in model.parameters() if w.grad is not None])
        assert len(gradients[0]) == len(gradients[1])
        for whole, pieces in zip(*gradients, strict=True):
            assert_close(pieces, whole, rtol=1e-10, atol=1e-10)

    def test_deterministic(self, potential):
        assert_same(predict(potential, crystal()), predict(potential, crystal()), 0.0)

    def test_energy_is_conserved(self, potential):
        """The error of velocity Verlet is of second order: half the step, a quarter of the fluctuation."""
        if not self.conservative:
            pytest.skip("forces have a head of their own")
        short, long = (fluctuation(potential, dt, 160) for dt in (2.0, 4.0))
        assert long / short == pytest.approx(4.0, abs=0.4)


class _Calculator(Calculator):
    implemented_properties = ("energy", "forces")

    def __init__(self, potential: Potential):
        super().__init__()
        self.potential = potential

    def calculate(self, atoms=None, properties=None, system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        p = predict(self.potential, self.atoms, stress=False)
        self.results = {"energy": float(p.energy), "forces": p.forces.numpy()}


def fluctuation(potential: Potential, dt: float, duration: float) -> float:
    """Return the rms deviation of the total energy (eV) in NVE with a time step and duration in fs."""
    atoms = slab()
    atoms.calc = _Calculator(potential)
    thermal = np.sqrt(units.kB * 300 / atoms.get_masses())[:, None]
    atoms.set_velocities(thermal * np.random.default_rng(5).normal(size=(len(atoms), 3)))
    energies = []
    dynamics = VelocityVerlet(atoms, timestep=dt * units.fs)
    for _ in range(round(duration / dt)):
        dynamics.run(1)
        energies.append(atoms.get_total_energy())
    return float(np.std(energies))
