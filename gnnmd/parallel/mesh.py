"""Processes that train together: replicas with data of their own, each of ranks that share its graphs."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from gnnmd.parallel.ranks import Ranks


@dataclass(frozen=True)
class Mesh:
    """This process among all (``world``) and among those that share its graphs (``gp``).

    Neighbouring ranks share graphs: they are on one host, and talk more than replicas do.

    Attributes:
        world: all processes.
        gp: the ranks of this process's replica.
    """

    world: Ranks = field(default_factory=Ranks)
    gp: Ranks = field(default_factory=Ranks)

    @classmethod
    def of(cls, world: Ranks, gp: int) -> "Mesh":
        """Divide all processes into replicas of ``gp`` ranks; collective.

        Raises:
            ValueError: gp does not divide the number of processes.
        """
        if gp < 1 or world.size % gp:
            raise ValueError(f"gp={gp} ranks per graph do not divide {world.size} processes")
        if gp == 1 or world.group is None:
            return cls(world)
        if gp == world.size:
            return cls(world, world)
        members = dist.get_process_group_ranks(world.group)
        groups = [dist.new_group(members[first : first + gp]) for first in range(0, world.size, gp)]
        return cls(world, Ranks(groups[world.rank // gp]))

    @property
    def n_replicas(self) -> int:
        """Number of replicas (dp)."""
        return self.world.size // self.gp.size

    @property
    def replica(self) -> int:
        """The replica this process belongs to."""
        return self.world.rank // self.gp.size

    def once(self, x: Tensor, *, partial: bool) -> Tensor:
        """Return what this process adds to a sum over the world.

        Args:
            x: a sum over this replica's data.
            partial: it covers the atoms of this rank; else all ranks of the replica know it in full, and only
                one of them counts.
        """
        return x if partial or self.gp.rank == 0 else torch.zeros_like(x)
