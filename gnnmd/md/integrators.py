"""Equations of motion: constant energy (velocity Verlet) and Langevin dynamics (BAOAB).

An integrator is plain data. `Integrator.step` moves a `State` by one time step with whole-array operations
on the owned atoms; sums over all atoms come from the engine. Nothing here waits for the device or knows of
ranks.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gnnmd.md import random
from gnnmd.md.engine import Engine
from gnnmd.md.guards import Limits
from gnnmd.md.state import State
from gnnmd.units import BOLTZMANN, FEMTOSECOND


@dataclass(frozen=True)
class Ramp:
    """A quantity that moves linearly from one value to another, and stays there.

    Attributes:
        start: value at step 0.
        end: value from step ``steps`` on.
        steps: length of the ramp.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a ramp takes at least one step, got steps={self.steps}")


def value_at(quantity: float | Ramp, step: int) -> float:
    """Return the value of a constant or ramped quantity at a step."""
    if isinstance(quantity, Ramp):
        part = min(step / quantity.steps, 1.0)
        return quantity.start + (quantity.end - quantity.start) * part
    return quantity


@dataclass(frozen=True)
class Integrator:
    """What all ensembles share.

    Attributes:
        timestep: fs.
    """

    timestep: float = 1.0

    #: Whether the total momentum stays what it is (three degrees of freedom less).
    conserves_momentum = True
    #: Whether every step needs the stress.
    needs_stress = False
    #: Whether the cell may change from step to step.
    changes_cell = False
    #: Steps between two questions whether there is nothing more to do; None never asks.
    done_interval: ClassVar[int | None] = None
    #: What stops a simulation that was given no limits.
    limits = Limits()

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.timestep > 0:
            raise ValueError(f"timestep must be positive, got {self.timestep} fs")

    @property
    def dt(self) -> float:
        """The time step in A sqrt(amu/eV)."""
        return self.timestep * FEMTOSECOND

    def freedom(self, engine: Engine) -> int:
        """Return the number of degrees of freedom that hold kinetic energy."""
        conserved = 3 if self.conserves_momentum and _can_drift(engine) else 0
        return 3 * engine.n_mobile - conserved

    def start_temperature(self) -> float | None:
        """Return the temperature of the first velocities, K; None if the ensemble has none."""
        return None

    def begin(self, s: State, engine: Engine) -> None:
        """Set up ``s.variables`` at the beginning of a run (not when it is resumed). Forces are known."""

    def step(self, s: State, engine: Engine) -> None:
        """Move the state from ``s.step`` to the next; evaluates forces once. Collective."""
        raise NotImplementedError

    def converged(self, s: State, engine: Engine) -> bool:
        """Tell whether there is nothing more to do; asked every `done_interval` steps. Collective."""
        return False

    def conserved(self, s: State, engine: Engine) -> Tensor:
        """Return the quantity that exact integration would keep, eV. Collective."""
        return s.energy + kinetic_energy(s, engine)


def kinetic_energy(s: State, engine: Engine) -> Tensor:
    """Return the kinetic energy of all atoms, eV; the same on every rank. Collective."""
    return 0.5 * engine.total(s.masses * s.velocities.square().sum(1))


def kinetic_stress(s: State, engine: Engine) -> Tensor:
    """Return ``[3, 3]`` -sum m v v / V of all atoms, eV/A^3. Collective."""
    momentum = s.masses[:, None] * s.velocities
    return -engine.total(momentum[:, :, None] * s.velocities[:, None]) / s.volume


def remove_drift(s: State, engine: Engine) -> None:
    """Stop the motion of the centre of mass, unless atoms are held fixed. Collective."""
    if _can_drift(engine):
        momentum = engine.total(s.masses[:, None] * s.velocities)
        s.velocities.sub_(momentum / engine.total(s.masses))


def _can_drift(engine: Engine) -> bool:
    return engine.n_mobile == engine.n_atoms > 1


def kick(s: State, dt: float) -> None:
    """Let the forces act on the velocities for a time."""
    s.velocities.addcdiv_(s.forces * s.mobile, s.masses[:, None], value=dt)


def drift(s: State, dt: float) -> None:
    """Let the atoms fly for a time."""
    s.positions.add_(s.velocities, alpha=dt)


@dataclass(frozen=True)
class NVE(Integrator):
    """Constant energy: velocity Verlet (Swope et al., J. Chem. Phys. 76 (1982) 637).

    Attributes:
        timestep: fs.
    """

    def step(self, s: State, engine: Engine) -> None:
        """Kick, drift, kick."""
        kick(s, 0.5 * self.dt)
        drift(s, self.dt)
        s.step += 1
        engine.evaluate(s)
        kick(s, 0.5 * self.dt)


@dataclass(frozen=True)
class Langevin(Integrator):
    """Constant temperature with friction and noise: BAOAB (Leimkuhler and Matthews, AMRX 2013, 34).

    Configurations are sampled with an error of fourth order at high friction. The centre of mass diffuses
    like every other degree of freedom; nothing is removed from it.

    Attributes:
        timestep: fs.
        temperature: K, constant or a `Ramp`.
        friction: 1/fs.
    """

    temperature: float | Ramp = 300.0
    friction: float = 0.01

    conserves_momentum = False

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_temperature(self.temperature)
        if not self.friction >= 0:
            raise ValueError(f"friction must not be negative, got {self.friction} 1/fs")

    def start_temperature(self) -> float:
        """Return the temperature of the bath at step 0, K."""
        return value_at(self.temperature, 0)

    def begin(self, s: State, engine: Engine) -> None:
        """Start the account of the heat that the bath gave."""
        s.variables["heat"] = torch.zeros_like(s.energy)

    def step(self, s: State, engine: Engine) -> None:
        """Kick, half drift, friction and noise, half drift, kick."""
        kick(s, 0.5 * self.dt)
        drift(s, 0.5 * self.dt)
        before = kinetic_energy(s, engine)
        keep = math.exp(-self.friction * self.timestep)
        kt = BOLTZMANN * value_at(self.temperature, s.step)
        noise = random.normals(engine.seed, s.step, random.LANGEVIN, s.ids)[:, :3] * s.mobile
        width = torch.sqrt((1 - keep**2) * kt / s.masses)
        s.velocities.mul_(keep).addcmul_(noise, width[:, None])
        s.variables["heat"] += kinetic_energy(s, engine) - before
        drift(s, 0.5 * self.dt)
        s.step += 1
        engine.evaluate(s)
        kick(s, 0.5 * self.dt)

    def conserved(self, s: State, engine: Engine) -> Tensor:
        """Return the energy less the heat that the bath gave, eV. Collective."""
        return super().conserved(s, engine) - s.variables["heat"]


def check_temperature(temperature: float | Ramp) -> None:
    """Refuse negative temperatures.

    Raises:
        ValueError: with the value.
    """
    ends = (temperature.start, temperature.end) if isinstance(temperature, Ramp) else (temperature,)
    if not all(t >= 0 for t in ends):
        raise ValueError(f"temperature must not be negative, got {temperature} K")
