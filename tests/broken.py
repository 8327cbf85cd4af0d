"""Potentials with one fault each, in a module that worker processes can import."""

from dataclasses import fields, replace

import torch

from gnnmd.models.potential import Potential
from gnnmd.parallel import GPContext
from tests.lennard_jones import FirstFeature, LennardJones


class Distorted(LennardJones):
    """Space is stretched along z, consistently in energy, forces and stress."""

    def forward(self, g, gp):
        stretch = torch.tensor([1.0, 1.0, 1.00001], dtype=torch.float64)
        return super().forward(replace(g, positions=g.positions * stretch, cell=g.cell * stretch), gp)


class Numbered(LennardJones):
    """The energy of an atom depends on its row, consistently in forces and stress."""

    def forward(self, g, gp):
        energies = super().forward(g, gp)
        return energies * torch.linspace(1, 1.001, len(energies)).to(energies)[:, None, None]


class Sound(Potential):
    """Lennard-Jones; subclasses get something wrong."""

    backbone_type: type[LennardJones] = LennardJones

    def __init__(self) -> None:
        super().__init__(self.backbone_type(5.0, 0.3, 2.63), {"energy": FirstFeature()})

    @property
    def is_single(self) -> bool:
        return self.backbone.sigma.dtype == torch.float32


class SpaceHasAnAxis(Sound):
    backbone_type = Distorted


class AtomsAreNumbered(Sound):
    backbone_type = Numbered


class SpaceHasACentre(Sound):
    """A weak spring to the origin, with the forces that belong to it."""

    def forward(self, pos, g, gp, **options):
        p, pos = super().forward(pos, g, gp, **options), pos.detach()
        spring = 1e-5 * pos.square().sum(1) / 2
        return replace(
            p,
            energy=p.energy + gp.sum_ranks(spring.sum()),
            node_energies=p.node_energies + spring,
            forces=p.forces - 1e-5 * pos,
        )


class Faulty(Sound):
    """Changes what Lennard-Jones says."""

    def forward(self, pos, g, gp, **options):
        p = super().forward(pos, g, gp, **options)
        return replace(p, **self.wrong(p, gp))


class ForcesHaveTheWrongSign(Faulty):
    def wrong(self, p, gp):
        return {"forces": -p.forces}


class OneForceIsTooLarge(Faulty):
    def wrong(self, p, gp):
        forces = p.forces.clone()
        forces[-1] *= 1.01
        return {"forces": forces}


class StressIsTwiceTooLarge(Faulty):
    def wrong(self, p, gp):
        return {"stress": 2 * p.stress}


class ShearStressIsHalved(Faulty):
    def wrong(self, p, gp):
        return {"stress": p.stress * (1 + torch.eye(3)) / 2}


class StressIsNotANumber(Faulty):
    def wrong(self, p, gp):
        return {"stress": p.stress * torch.nan}


class EnergyIsNotTheSumOfItsAtoms(Faulty):
    def wrong(self, p, gp):
        return {"energy": p.energy + 1e-6}


class SinglePrecisionIsCoarse(Faulty):
    def wrong(self, p, gp):
        return {"forces": p.forces * 1.01} if self.is_single else {}


class SinglePrecisionRaises(Faulty):
    def wrong(self, p, gp):
        if self.is_single:
            raise RuntimeError("no such kernel")
        return {}


class StressIsSummedTwice(Faulty):
    def wrong(self, p, gp):
        return {"stress": gp.sum_ranks(p.stress)}


class RanksHaveTheirOwnEnergy(Faulty):
    """Rank 0 is right."""

    def wrong(self, p, gp):
        return {"energy": p.energy + (0 if gp.group is None else 1e-6 * gp.group.rank())}


class RaisesOnAllRanks(Faulty):
    def wrong(self, p, gp):
        if gp.n_ghost:
            raise RuntimeError("out of everything")
        return {}


class GhostsAreLate(GPContext):
    def exchange(self, owned):
        rows = super().exchange(owned)
        return torch.cat((rows[: self.n_owned], rows[self.n_owned :] * 1.00001))


class GradientsStayAbroad(GPContext):
    def exchange(self, owned):
        rows = super().exchange(owned)
        return torch.cat((owned, rows[self.n_owned :].detach()))


class Miscommunicating(Sound):
    """Uses a context that errs."""

    context: type[GPContext]

    def forward(self, pos, g, gp, **options):
        given = {f.name: getattr(gp, f.name) for f in fields(gp)}
        return super().forward(pos, g, self.context(**given), **options)


class ReadsStaleGhosts(Miscommunicating):
    context = GhostsAreLate


class ForgetsForcesOfGhosts(Miscommunicating):
    context = GradientsStayAbroad
