"""Minimisation of energy by positions, and of enthalpy by positions and cell."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gnnmd.md.cells import check_can_change, check_way, deform, identity, project, turn_back
from gnnmd.md.engine import Engine
from gnnmd.md.guards import Limits
from gnnmd.md.integrators import Integrator
from gnnmd.md.state import State
from gnnmd.units import GPA_PER_EV_A3

#: Constants of Bitzek et al.: downhill steps before the time step grows, by how much it grows and shrinks,
#: how strongly velocities turn to the forces at first, and how this fades.
_PATIENCE, _GROW, _SHRINK, _MIX, _FADE = 5, 1.1, 0.5, 0.1, 0.99
#: The first time step, as a part of the largest.
_FIRST = 0.1
#: Least square that is divided by.
_TINY = 1e-200


@dataclass(frozen=True)
class FIRE(Integrator):
    """Minimisation: the fast inertial relaxation engine (Bitzek et al., Phys. Rev. Lett. 97 (2006) 170201).

    All atoms move as if they had the mean mass. With a cell, strains move with the atoms; they are scaled
    so that an elastic mode is about as stiff as a bond. Forces and stress are looked at every ten steps;
    the run ends where they are small enough, and reporters see that step.

    Attributes:
        timestep: fs, the largest. Time has no meaning here.
        max_force: eV/A; done when no mobile atom feels more.
        cell: None keeps it; else "isotropic", "anisotropic" or "flexible", see `Barostatted`.
        pressure: GPa, positive = compression, that acts on the cell from outside.
        max_stress: GPa; done when no component of the stress that the cell follows differs from the pressure
            by more.
        max_move: Angstrom, the farthest that an atom moves in a step.
    """

    timestep: float = 20.0
    max_force: float = 0.01
    cell: str | None = None
    pressure: float = 0.0
    max_stress: float = 0.01
    max_move: float = 0.1

    done_interval = 10
    limits = Limits(temperature=math.inf, energy=math.inf)

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_way(self.cell or "flexible", self.pressure)
        if self.cell is None and self.pressure != 0:
            raise ValueError(
                f'a pressure of {self.pressure} GPa needs a cell that changes: set cell="flexible"'
            )
        for name in ("max_force", "max_stress", "max_move"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def needs_stress(self) -> bool:  # type: ignore[override]
        """Whether the cell changes."""
        return self.cell is not None

    @property
    def changes_cell(self) -> bool:  # type: ignore[override]
        """Whether the cell changes."""
        return self.cell is not None

    def start_temperature(self) -> float:
        """Start at rest."""
        return 0.0

    def begin(self, s: State, engine: Engine) -> None:
        """Stop all atoms.

        Raises:
            ValueError: the cell shall change but cannot.
        """
        if self.cell is not None:
            check_can_change(s, engine, "FIRE with a cell")
        s.velocities = torch.zeros_like(s.velocities)
        full = torch.full_like
        s.variables.update(
            timestep=full(s.energy, _FIRST * self.dt),
            mixing=full(s.energy, _MIX),
            downhill=torch.zeros_like(s.energy),
            mass=engine.total(s.masses) / engine.n_atoms,
            # by which a strain becomes a length: the root of N times the spacing of atoms
            reach=engine.n_atoms ** (1 / 6) * s.volume ** (1 / 3),
        )
        s.variables["first cell"] = s.cell.clone()
        s.variables["strain rate"] = torch.zeros_like(s.cell)

    def step(self, s: State, engine: Engine) -> None:
        """Turn velocities to the forces, or stop where they lead uphill; then move."""
        known = s.variables
        forces, velocities = s.forces * s.mobile, s.velocities
        sums = torch.stack((forces * velocities, forces.square(), velocities.square()), -1)  # [n, 3, 3]
        power, force2, speed2 = engine.total(sums).sum(0)
        pull, rate = self._pull(s), known["strain rate"] * known["reach"]  # [3, 3] eV/A, A/time
        power = power + (pull * rate).sum()
        force2, speed2 = force2 + pull.square().sum(), speed2 + rate.square().sum()

        good, patient = power >= 0, known["downhill"] >= _PATIENCE
        mix = known["mixing"]
        to_force = torch.where(good, mix * torch.sqrt(speed2 / force2.clamp(min=_TINY)), 0.0)
        keep = torch.where(good, 1 - mix, 0.0)
        dt = known["timestep"]
        dt = torch.where(good, torch.where(patient, (dt * _GROW).clamp(max=self.dt), dt), dt * _SHRINK)
        known["mixing"] = torch.where(good, torch.where(patient, mix * _FADE, mix), _MIX)
        known["downhill"] = torch.where(good, known["downhill"] + 1, 0.0)
        known["timestep"] = dt

        to_force = to_force + dt / known["mass"]
        velocities = keep * velocities + to_force * forces
        rate = (keep * rate + to_force * pull) / known["reach"]
        # no atom, and no corner of a cell of this reach, may go too far at once
        farthest = torch.cat((velocities.square().sum(1), (rate * known["reach"]).square().sum()[None]))
        shorten = (self.max_move / (dt * engine.ranks.max(farthest.amax().sqrt()).clamp(min=_TINY))).clamp(
            max=1
        )
        s.velocities, known["strain rate"] = velocities * shorten, rate * shorten
        s.positions.add_(s.velocities * dt)
        if self.cell is not None:
            deform(s, known["strain rate"] * dt)
        if self.cell == "flexible":
            turn_back(s)
        s.step += 1
        engine.evaluate(s, stress=self.cell is not None)

    def converged(self, s: State, engine: Engine) -> bool:
        """Tell whether forces and stress are small. Collective; waits for the device."""
        squared = torch.cat(((s.forces * s.mobile).square().sum(1), s.energy.new_zeros(1)))
        done = engine.ranks.max(squared.amax()) < self.max_force**2
        if self.cell is not None:
            excess = self._pull(s) * s.variables["reach"] / s.volume * GPA_PER_EV_A3
            done = done & (excess.abs().amax() < self.max_stress)
        return bool(done)

    def conserved(self, s: State, engine: Engine) -> Tensor:
        """Return what is minimised, the energy or enthalpy, eV: nothing is conserved."""
        return s.energy + self.pressure / GPA_PER_EV_A3 * s.volume if self.cell is not None else s.energy

    def _pull(self, s: State) -> Tensor:
        """Return ``[3, 3]`` the force on the strain as a length, eV/A."""
        if self.cell is None:
            return torch.zeros_like(s.cell)
        excess = s.stress + identity(s.stress) * (self.pressure / GPA_PER_EV_A3)
        return project(excess, self.cell) * (-s.volume / s.variables["reach"])
