"""Constant temperature by scaling all velocities: stochastic (Bussi), and Nose-Hoover chains."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gnnmd.md import random
from gnnmd.md.engine import Engine
from gnnmd.md.integrators import (
    Integrator,
    Ramp,
    check_temperature,
    drift,
    kick,
    kinetic_energy,
    remove_drift,
    value_at,
)
from gnnmd.md.state import State
from gnnmd.units import BOLTZMANN, FEMTOSECOND

#: Parts of a time step that make a symmetric splitting one of fourth order (Suzuki and Yoshida).
_FOURTH_ORDER = (1 / (2 - 2 ** (1 / 3)), 1 - 2 / (2 - 2 ** (1 / 3)), 1 / (2 - 2 ** (1 / 3)))
#: Least kinetic energy that is divided by, eV.
_TINY = 1e-200


@dataclass(frozen=True)
class Thermostatted(Integrator):
    """What ensembles share that control the temperature of all atoms together.

    The motion of the centre of mass is stopped at the beginning (unless atoms are held fixed) and never
    starts again; the angular momentum of a cluster is left alone.

    Attributes:
        timestep: fs.
        temperature: K, constant or a `Ramp`.
        time_constant: fs, in which the kinetic energy forgets where it was.
    """

    temperature: float | Ramp = 300.0
    time_constant: float = 100.0

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_temperature(self.temperature)
        if not self.time_constant > 0:
            raise ValueError(f"time_constant must be positive, got {self.time_constant} fs")

    def start_temperature(self) -> float:
        """Return the temperature at step 0, K."""
        return value_at(self.temperature, 0)

    def kt(self, step: int) -> float:
        """Return k T at a step, eV."""
        return BOLTZMANN * value_at(self.temperature, step)

    def begin(self, s: State, engine: Engine) -> None:
        """Stop the centre of mass; start the account of the heat that the bath gave.

        Raises:
            ValueError: fewer than three degrees of freedom.
        """
        if self.freedom(engine) < 3:
            raise ValueError(
                f"{type(self).__name__} needs at least 3 degrees of freedom, but {engine.n_mobile} mobile of "
                f"{engine.n_atoms} atoms have {self.freedom(engine)}; use Langevin"
            )
        remove_drift(s, engine)
        s.variables["heat"] = torch.zeros_like(s.energy)


@dataclass(frozen=True)
class Bussi(Thermostatted):
    """Constant temperature: stochastic velocity rescaling.

    Bussi, Donadio and Parrinello, J. Chem. Phys. 126 (2007) 014101, eq. A7. Samples the canonical ensemble
    and disturbs the dynamics of single atoms little.

    Attributes:
        timestep: fs.
        temperature: K, constant or a `Ramp`.
        time_constant: fs.
    """

    def step(self, s: State, engine: Engine) -> None:
        """Velocity Verlet, then scale."""
        kick(s, 0.5 * self.dt)
        drift(s, self.dt)
        s.step += 1
        engine.evaluate(s)
        kick(s, 0.5 * self.dt)
        rescale(self, s, engine, kinetic_energy(s, engine))

    def conserved(self, s: State, engine: Engine) -> Tensor:
        """Return the effective energy: less the heat that the bath gave, eV. Collective."""
        return super().conserved(s, engine) - s.variables["heat"]


def rescale(ensemble: Thermostatted, s: State, engine: Engine, kinetic: Tensor) -> Tensor:
    """Scale velocities as `Bussi` does after a time step; return the factor.

    Args:
        ensemble: its time constant and temperature.
        s: the state.
        engine: for the seed.
        kinetic: kinetic energy now, eV.
    """
    freedom, keep = ensemble.freedom(engine), math.exp(-ensemble.timestep / ensemble.time_constant)
    numbers = random.Numbers(engine.seed, s.step, random.THERMOSTAT)
    along, across = numbers.normals()[0], 2 * numbers.gamma((freedom - 1) / 2)
    per_noise = (1 - keep) * ensemble.kt(s.step) / 2 / kinetic.clamp(min=_TINY)
    root = math.sqrt(keep) + along * per_noise.sqrt()
    factor = torch.copysign(torch.sqrt(root.square() + across * per_noise), root)
    s.velocities.mul_(factor)
    s.variables["heat"] += kinetic * (factor.square() - 1)
    return factor


@dataclass(frozen=True)
class Chain:
    """Chains of Nose-Hoover thermostats, each on some kinetic energy.

    Martyna, Klein and Tuckerman, J. Chem. Phys. 97 (1992) 2635; integrated as in Martyna, Tuckerman, Tobias
    and Klein, Mol. Phys. 87 (1996) 1117. Masses are f kT tau^2, kT tau^2, kT tau^2, ...

    Attributes:
        freedom: degrees of freedom f that hold each kinetic energy.
        kt: eV, that sets the masses (of the highest temperature of a ramp).
        tau: time constant, A sqrt(amu/eV).
        length: number of thermostats in a chain.
    """

    freedom: int
    kt: float
    tau: float
    length: int

    @property
    def masses(self) -> list[float]:
        """Masses of the thermostats, eV A^2 amu/eV."""
        return [(1 if j else self.freedom) * self.kt * self.tau**2 for j in range(self.length)]

    def energy(self, rates: Tensor) -> Tensor:
        """Return the kinetic energy of all thermostats, eV."""
        parts = (0.5 * q * v.square().sum() for q, v in zip(self.masses, rates.unbind(-1), strict=True))
        return sum(parts, torch.zeros_like(rates.sum()))

    def act(
        self, rates: Tensor, twice_kinetic: Tensor, kt: float, dt: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Let the thermostats act for a time.

        Args:
            rates: ``[..., length]`` of the thermostats, 1/time.
            twice_kinetic: ``[...]`` twice the kinetic energies they control, eV.
            kt: wanted, eV.
            dt: time.

        Returns:
            The factors ``[...]`` of the velocities, the new rates, the heat that flowed in, less the kinetic
            energy of the thermostats (minus the growth of their potential energy), eV.
        """
        q, v = self.masses, list(rates.unbind(-1))
        scale, heat = torch.ones_like(twice_kinetic), torch.zeros_like(twice_kinetic)

        def push(j: int, h: float) -> None:
            now = q[j - 1] * v[j - 1] ** 2 - kt if j else twice_kinetic * scale**2 - self.freedom * kt
            if j + 1 == self.length:
                v[j] = v[j] + now * (h / 2 / q[j])
            else:
                damp = torch.exp(v[j + 1] * (-h / 4))
                v[j] = (v[j] * damp + now * (h / 2 / q[j])) * damp

        for part in _FOURTH_ORDER:
            h = part * dt
            for j in reversed(range(self.length)):
                push(j, h)
            scale = scale * torch.exp(v[0] * -h)
            heat = heat - (h * kt) * (self.freedom * v[0] + sum(v[1:]))
            for j in range(self.length):
                push(j, h)
        return scale, torch.stack(v, -1), heat.sum()


@dataclass(frozen=True)
class NoseHoover(Thermostatted):
    """Constant temperature, deterministic: velocity Verlet with Nose-Hoover chains (see `Chain`).

    Attributes:
        timestep: fs.
        temperature: K, constant or a `Ramp`; above 0.
        time_constant: fs; the mass of the first thermostat is f kT time_constant^2.
        length: number of thermostats in the chain.
    """

    length: int = 3

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_chain(self.temperature, self.length)

    def begin(self, s: State, engine: Engine) -> None:
        """Stop the centre of mass; let the thermostats rest."""
        super().begin(s, engine)
        s.variables["thermostat"] = s.energy.new_zeros(self.length)

    def step(self, s: State, engine: Engine) -> None:
        """Half a step of the thermostat, velocity Verlet, half a step of the thermostat."""
        self._thermostat(s, engine)
        kick(s, 0.5 * self.dt)
        drift(s, self.dt)
        s.step += 1
        engine.evaluate(s)
        kick(s, 0.5 * self.dt)
        self._thermostat(s, engine)

    def conserved(self, s: State, engine: Engine) -> Tensor:
        """Return the energy of atoms and thermostats, eV. Collective."""
        thermostats = particle_chain(self, engine, self.length).energy(s.variables["thermostat"])
        return super().conserved(s, engine) + thermostats - s.variables["heat"]

    def _thermostat(self, s: State, engine: Engine) -> None:
        chain, known = particle_chain(self, engine, self.length), s.variables
        factor, known["thermostat"], heat = chain.act(
            known["thermostat"], 2 * kinetic_energy(s, engine), self.kt(s.step), 0.5 * self.dt
        )
        s.velocities.mul_(factor)
        known["heat"] += heat


def particle_chain(ensemble: Thermostatted, engine: Engine, length: int) -> Chain:
    """Return the chain on the kinetic energy of all atoms."""
    return Chain(
        ensemble.freedom(engine),
        highest_kt(ensemble.temperature),
        ensemble.time_constant * FEMTOSECOND,
        length,
    )


def highest_kt(temperature: float | Ramp) -> float:
    """Return the largest k T that a ramp comes to, eV."""
    highest = max(temperature.start, temperature.end) if isinstance(temperature, Ramp) else temperature
    return BOLTZMANN * highest


def check_chain(temperature: float | Ramp, length: int) -> None:
    """Refuse chains without thermostats or without mass.

    Raises:
        ValueError: with the value.
    """
    if length < 1:
        raise ValueError(f"a chain has at least one thermostat, got length={length}")
    if not highest_kt(temperature) > 0:
        raise ValueError(f"Nose-Hoover chains need a temperature above 0, got {temperature} K")
