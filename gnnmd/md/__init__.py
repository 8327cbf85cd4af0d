"""Molecular dynamics of one system that lives on the ranks which own its atoms."""

from gnnmd.md.barostats import MTK, StochasticCell
from gnnmd.md.engine import Counters
from gnnmd.md.guards import Limits, SimulationError
from gnnmd.md.integrators import NVE, Integrator, Langevin, Ramp
from gnnmd.md.minimize import FIRE
from gnnmd.md.reporters import Reporter, View
from gnnmd.md.simulation import Simulation
from gnnmd.md.thermostats import Bussi, NoseHoover

__all__ = [
    "FIRE",
    "MTK",
    "NVE",
    "Bussi",
    "Counters",
    "Integrator",
    "Langevin",
    "Limits",
    "NoseHoover",
    "Ramp",
    "Reporter",
    "Simulation",
    "SimulationError",
    "StochasticCell",
    "View",
]
