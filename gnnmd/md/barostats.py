"""Constant pressure: stochastic cell rescaling, and the equations of Martyna, Tobias and Klein.

Row vectors: a strain e takes positions x to x exp(e) and the cell h to h exp(e). Strains and their rates are
symmetric, and what they add up to is kept so: cells do not turn. Isotropic and anisotropic cells follow the
same equations, projected.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gnnmd.md import random
from gnnmd.md.cells import (
    WAYS,
    check_can_change,
    check_way,
    deform,
    exponential,
    identity,
    project,
    spread,
    squares,
    turn_back,
)
from gnnmd.md.engine import Engine
from gnnmd.md.integrators import Ramp, drift, kick, value_at
from gnnmd.md.state import State
from gnnmd.md.thermostats import Chain, Thermostatted, check_chain, highest_kt, particle_chain, rescale
from gnnmd.units import FEMTOSECOND, GPA_PER_EV_A3


@dataclass(frozen=True)
class Barostatted(Thermostatted):
    """What ensembles of constant pressure share.

    Attributes:
        timestep: fs.
        temperature: K, constant or a `Ramp`.
        time_constant: fs, of the temperature.
        pressure: GPa, positive = compression, constant or a `Ramp`.
        pressure_time_constant: fs.
        cell: "isotropic" (the volume changes), "anisotropic" (lengths along x, y and z too) or
            "flexible" (all but rotation).
    """

    pressure: float | Ramp = 0.0
    pressure_time_constant: float = 1000.0
    cell: str = "isotropic"

    needs_stress = True
    changes_cell = True

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_way(self.cell, self.pressure)
        if not self.pressure_time_constant > 0:
            raise ValueError(f"pressure_time_constant must be positive, got {self.pressure_time_constant} fs")

    def begin(self, s: State, engine: Engine) -> None:
        """Stop the centre of mass; start the accounts of heat and of work against the pressure.

        Raises:
            ValueError: the cell cannot change, or fewer than three degrees of freedom.
        """
        check_can_change(s, engine, type(self).__name__)
        super().begin(s, engine)
        s.variables["work"] = torch.zeros_like(s.energy)
        s.variables["first cell"] = s.cell.clone()

    def wanted(self, s: State) -> float:
        """Return the pressure of the bath at the current step, eV/A^3."""
        return value_at(self.pressure, s.step) / GPA_PER_EV_A3


@dataclass(frozen=True)
class StochasticCell(Barostatted):
    """Constant pressure and temperature: stochastic cell rescaling, velocities by `Bussi`.

    First order in time: volumes relax without oscillation. Isotropic: Bernetti and Bussi, J. Chem. Phys. 153
    (2020) 114107, eq. 5; other cells: Del Tatto, Raiteri, Bernetti and Bussi, Appl. Sci. 12 (2022) 1139,
    eq. 11, written for the strain e of one step and its symmetric part:
    de = -(c / 3 tau) (P 1 - P_int) dt + sqrt(2 c kT / 3 V tau) dW (in this form without a term in kT).

    Attributes:
        timestep: fs.
        temperature: K, constant or a `Ramp`.
        time_constant: fs, of the temperature.
        pressure: GPa, positive = compression, constant or a `Ramp`.
        pressure_time_constant: tau, fs.
        cell: see `Barostatted`.
        compressibility: c, 1/GPa, roughly that of the material (metals 0.01, water 0.45). It sets the pace
            only: volumes relax in tau kappa / c, with kappa that of the material.
    """

    compressibility: float = 0.01

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if not self.compressibility > 0:
            raise ValueError(f"compressibility must be positive, got {self.compressibility} 1/GPa")

    def begin(self, s: State, engine: Engine) -> None:
        """See `Barostatted`."""
        super().begin(s, engine)
        s.variables["motion"] = momentum_flux(s, engine)

    def step(self, s: State, engine: Engine) -> None:
        """Velocity Verlet with a change of the cell in the middle, then scale velocities."""
        known = s.variables
        virial = known["motion"] - s.stress * s.volume  # [3, 3] P_int V
        strain = self._strain(s, engine, virial)
        kick(s, 0.5 * self.dt)
        drift(s, 0.5 * self.dt)
        deform(s, strain)
        s.velocities = s.velocities @ exponential(-strain)
        if self.cell == "flexible":
            turn_back(s)
        drift(s, 0.5 * self.dt)
        s.step += 1
        engine.evaluate(s, stress=True)
        kick(s, 0.5 * self.dt)
        motion = momentum_flux(s, engine)
        known["work"] += 0.5 * ((virial + motion - s.stress * s.volume) * strain).sum()
        factor = rescale(self, s, engine, torch.trace(motion) / 2)
        known["motion"] = motion * factor.square()

    def conserved(self, s: State, engine: Engine) -> Tensor:
        """Return the effective energy: less the heat, plus the work done on the bath, eV. Collective."""
        return super().conserved(s, engine) - s.variables["heat"] + s.variables["work"]

    def _strain(self, s: State, engine: Engine, virial: Tensor) -> Tensor:
        """Return the change of the cell in one step."""
        numbers = random.Numbers(engine.seed, s.step, random.BAROSTAT)
        noise = torch.empty_like(virial)
        for row in noise:
            for entry in row:
                entry.fill_(numbers.normals()[0])  # a copy from the host would wait for the device
        pace = self.compressibility * GPA_PER_EV_A3 * self.timestep / (3 * self.pressure_time_constant)
        pull = virial / s.volume - identity(virial) * self.wanted(s)
        width = torch.sqrt(2 * pace * self.kt(s.step) / s.volume)
        return project(pace * pull + width * noise, self.cell)


@dataclass(frozen=True)
class MTK(Barostatted):
    """Constant pressure and temperature, deterministic: Martyna, Tobias and Klein with Nose-Hoover chains.

    Equations: J. Chem. Phys. 101 (1994) 4177; integrated by the factorisation of Tuckerman, Alejandre,
    Lopez-Rendon, Jochim and Martyna, J. Phys. A 39 (2006) 5629. The cell has the mass (f + 3) kT tau^2 / 3
    per strain; each of its strains has a chain of its own, since they hardly exchange energy.

    The cell oscillates with a period of about 2 pi tau sqrt(N kT / 3 B V), B the bulk modulus: 0.19 tau for
    silver at 300 K. That should be 20 time steps or more: after tau = 200 fs (7 time steps of 5 fs) the
    fluctuations of the volume were 10 % too large.

    Attributes:
        timestep: fs.
        temperature: K, constant or a `Ramp`; above 0.
        time_constant: fs, of all chains.
        pressure: GPa, positive = compression, constant or a `Ramp`.
        pressure_time_constant: tau, fs.
        cell: see `Barostatted`.
        length: number of thermostats in each chain.
    """

    length: int = 3

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_chain(self.temperature, self.length)

    def begin(self, s: State, engine: Engine) -> None:
        """See `Barostatted`; let the cell and the thermostats rest."""
        super().begin(s, engine)
        s.variables["thermostat"] = s.energy.new_zeros(self.length)
        s.variables["cell thermostat"] = s.energy.new_zeros(WAYS[self.cell], self.length)
        s.variables["strain rate"] = torch.zeros_like(s.cell)

    def step(self, s: State, engine: Engine) -> None:
        """Thermostats, cell and velocities for half a step, positions, and the halves in reverse."""
        known, before = s.variables, s.volume
        motion = self._thermostats(s, engine, momentum_flux(s, engine))
        self._push_cell(s, engine, motion)
        self._push_atoms(s, engine)
        rate = known["strain rate"]
        half = exponential(rate * (0.5 * self.dt))
        s.positions = (s.positions @ half + s.velocities * self.dt) @ half
        s.cell = s.cell @ half @ half
        if self.cell == "flexible":
            turn_back(s)
        known["work"] += self.wanted(s) * (s.volume - before)
        s.step += 1
        engine.evaluate(s, stress=True)
        self._push_atoms(s, engine)
        motion = momentum_flux(s, engine)
        self._push_cell(s, engine, motion)
        self._thermostats(s, engine, motion)

    def conserved(self, s: State, engine: Engine) -> Tensor:
        """Return the energy of atoms, cell, thermostats and the bath of pressure, eV. Collective."""
        known = s.variables
        moving = 0.5 * self._cell_mass(engine) * known["strain rate"].square().sum()
        thermostats = particle_chain(self, engine, self.length).energy(known["thermostat"])
        thermostats = thermostats + self._cell_chain().energy(known["cell thermostat"])
        return super().conserved(s, engine) + known["work"] + moving + thermostats - known["heat"]

    def _cell_mass(self, engine: Engine) -> float:
        """Return the mass of a strain, eV times the square of the unit of time."""
        tau = self.pressure_time_constant * FEMTOSECOND
        return (self.freedom(engine) + 3) * highest_kt(self.temperature) * tau**2 / 3

    def _cell_chain(self) -> Chain:
        return Chain(1, highest_kt(self.temperature), self.time_constant * FEMTOSECOND, self.length)

    def _thermostats(self, s: State, engine: Engine, motion: Tensor) -> Tensor:
        """Let all chains act for half a step; return the new momentum flux."""
        known, kt, dt = s.variables, self.kt(s.step), 0.5 * self.dt
        moving = self._cell_mass(engine) * squares(known["strain rate"], self.cell)
        slower, known["cell thermostat"], heat = self._cell_chain().act(
            known["cell thermostat"], moving, kt, dt
        )
        known["strain rate"] = known["strain rate"] * spread(slower, self.cell)
        chain = particle_chain(self, engine, self.length)
        factor, known["thermostat"], more = chain.act(known["thermostat"], torch.trace(motion), kt, dt)
        s.velocities.mul_(factor)
        known["heat"] += heat + more
        return motion * factor.square()

    def _push_cell(self, s: State, engine: Engine, motion: Tensor) -> None:
        """Let the difference of pressures act on the strain rate for half a step."""
        excess = motion - (s.stress + identity(motion) * self.wanted(s)) * s.volume
        excess = excess + identity(motion) * (torch.trace(motion) / self.freedom(engine))
        push = project(excess, self.cell) * (0.5 * self.dt / self._cell_mass(engine))
        s.variables["strain rate"] = s.variables["strain rate"] + push

    def _push_atoms(self, s: State, engine: Engine) -> None:
        """Let forces and the strain rate act on the velocities for half a step."""
        rate = s.variables["strain rate"]
        rate = rate + identity(rate) * (torch.trace(rate) / self.freedom(engine))
        half = exponential(rate * (-0.25 * self.dt))
        s.velocities = s.velocities @ half
        kick(s, 0.5 * self.dt)
        s.velocities = s.velocities @ half


def momentum_flux(s: State, engine: Engine) -> Tensor:
    """Return ``[3, 3]`` sum m v v of all atoms, eV. Collective."""
    momentum = s.masses[:, None] * s.velocities
    return engine.total(momentum[:, :, None] * s.velocities[:, None])
