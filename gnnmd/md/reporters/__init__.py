"""What a simulation tells while it runs.

Reading order: base, files, thermo, extxyz, zarr, observable, rdf, the others.
"""

from gnnmd.md.reporters.average import Average, Mean
from gnnmd.md.reporters.base import Reporter, View
from gnnmd.md.reporters.callback import Callback
from gnnmd.md.reporters.correlation import MSD, VACF, MeanSquaredDisplacement, VelocityCorrelation
from gnnmd.md.reporters.extxyz import Trajectory
from gnnmd.md.reporters.frames import Frame
from gnnmd.md.reporters.profile import Profile, Profiles
from gnnmd.md.reporters.rdf import RDF, RadialDistribution
from gnnmd.md.reporters.thermo import Thermo
from gnnmd.md.reporters.zarr import Frames, ZarrTrajectory, read_trajectory

__all__ = [
    "MSD",
    "RDF",
    "VACF",
    "Average",
    "Callback",
    "Frame",
    "Frames",
    "Mean",
    "MeanSquaredDisplacement",
    "Profile",
    "Profiles",
    "RadialDistribution",
    "Reporter",
    "Thermo",
    "Trajectory",
    "VelocityCorrelation",
    "View",
    "ZarrTrajectory",
    "read_trajectory",
]
