"""Simulations on the ranks of a pool, as under torchrun: every rank makes the same calls."""

import os
import resource
import signal
from dataclasses import replace

import torch

from gnnmd import InferenceSettings, PredictUnit
from gnnmd.md import Reporter, signals
from gnnmd.models.emt import emt
from gnnmd.models.potential import Potential
from gnnmd.parallel import Ranks
from gnnmd.predict.partitioned import PartitionedPotential

EXACT = InferenceSettings(dtype="float64")


def unit_on(group, potential=None) -> PredictUnit:
    """Return a unit whose systems are shared by the ranks of a group; None is this process alone."""
    unit = PredictUnit(potential or emt(), device="cpu", settings=EXACT)
    if group is not None:
        unit._together = PartitionedPotential(unit.potential, EXACT, Ranks(group))
    return unit


class Squares(Reporter):
    """Sums squared displacements since its first report; remembers where atoms were, and its steps."""

    interval = 4

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.total = torch.zeros((), dtype=torch.float64)

    def report(self, view):
        s = view.state
        if "start" not in s.columns:
            s.columns["start"] = s.positions.clone()
        self.total += view.engine.total((s.positions - s.columns["start"]).square().sum(1)).sum()
        self.steps.append(view.step)

    def saved(self):
        return {"steps": torch.tensor(self.steps), "total": self.total}

    def restore(self, saved):
        self.steps, self.total = saved["steps"].tolist(), saved["total"].clone()


class Lines(Reporter):
    """Writes a line per report on the first rank; cuts what is behind a restart."""

    interval = 4

    def __init__(self, path) -> None:
        self.path = path

    def begin(self, view):
        if view.first:
            self.path.touch()
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if int(line.split()[0]) <= view.step]
            self.path.write_text("".join(line + "\n" for line in kept))

    def report(self, view):
        energy = view.scalars()["potential_energy"]
        if view.first:
            with self.path.open("a") as file:
                file.write(f"{view.step} {energy!r}\n")


class Stop(Reporter):
    """A signal comes to one rank after a step, which stops all of them at the next."""

    interval = 1

    def __init__(self, step: int, number: int = signal.SIGTERM, rank: int = 0) -> None:
        self.at, self.number, self.rank = step - 1, number, rank

    def report(self, view):
        if view.step == self.at and view.engine.ranks.rank == self.rank:
            signals.note(self.number)


class Alive(Reporter):
    """Says in files of a folder which processes the ranks are, and how far they are."""

    interval = 5

    def __init__(self, folder) -> None:
        self.folder = folder

    def begin(self, view):
        (self.folder / f"pid-{view.engine.ranks.rank}").write_text(str(os.getpid()))

    def report(self, view):
        (self.folder / f"step-{view.engine.ranks.rank}").write_text(str(view.step))


class Breaks(Potential):
    """Effective medium theory that knows no forces on atoms beyond a plane."""

    beyond = 1e9

    def forward(self, pos, g, gp, **options):
        p = super().forward(pos, g, gp, **options)
        lost = pos.detach()[:, :1] > self.beyond
        return replace(p, forces=torch.where(lost, torch.nan, p.forces))


def breaking(beyond: float) -> Potential:
    potential = emt()
    potential.__class__ = Breaks
    potential.beyond = beyond
    return potential


class SmallFiles(Reporter):
    """From a step on, one rank cannot write files of more than 1000 bytes."""

    interval = 5

    def __init__(self, step: int, rank: int) -> None:
        self.at, self.rank = step, rank

    def report(self, view):
        if view.step == self.at and view.engine.ranks.rank == self.rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
