"""Molecular dynamics of one system that lives on the ranks which own its atoms."""

from gnnmd.md.engine import Counters, Limits, SimulationError
from gnnmd.md.integrators import NVE, Integrator, Langevin, Ramp
from gnnmd.md.reporters import Reporter, View
from gnnmd.md.simulation import Simulation

__all__ = [
    "NVE",
    "Counters",
    "Integrator",
    "Langevin",
    "Limits",
    "Ramp",
    "Reporter",
    "Simulation",
    "SimulationError",
    "View",
]
