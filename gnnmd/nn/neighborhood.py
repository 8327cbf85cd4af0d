"""What an atom sees of its neighbours within one cutoff (DPA-2, arXiv 2312.15492)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gnnmd.nn.edge_attention import EdgeTable
from gnnmd.nn.environment import Environment
from gnnmd.nn.switch import poly_switch


@dataclass(frozen=True)
class Shell:
    """All edges of some consecutive atoms that are shorter than one of the cutoffs.

    Attributes:
        source: ``[E]`` rows of the sources.
        types: ``[E]`` types of the sources and ``[E]`` of the targets.
        table: the edges by their targets, counted from the first of the atoms.
        room: neighbours an atom has room for.
        switch: ``[E]`` s(r).
        environment: ``[E, 4]`` radial and angular components.
    """

    source: Tensor
    types: tuple[Tensor, Tensor]
    table: EdgeTable
    room: int
    switch: Tensor
    environment: Tensor


class Neighborhood(nn.Module):
    """The neighbours within one cutoff and how an atom sees them.

    Args:
        n_types: number of types.
        rcut, rcut_smth, nsel: see `RepinitConfig`.
        protection: added to distances, Angstrom.
        direct: components are r / rcut and r_ij / rcut in place of the environment matrix.
    """

    def __init__(
        self, n_types: int, rcut: float, rcut_smth: float, nsel: int, protection: float, direct: bool = False
    ):
        super().__init__()
        self.r_cut, self.r_smooth, self.room, self.direct = rcut, rcut_smth, nsel, direct
        self.environment = Environment(n_types, protection)

    def forward(
        self, edges: Tensor, source: Tensor, target: Tensor, vector: Tensor, types: Tensor, owned: Tensor
    ) -> Shell:
        """Return the shell made of some edges, in float64.

        Args:
            edges: ``[E]`` which ones.
            source: ``[E_all]`` rows of their sources.
            target: ``[E_all]`` targets, counted from the first of the atoms.
            vector: ``[E_all, 3]`` float64, Angstrom.
            types: ``[n_all]`` types of all rows.
            owned: ``[n]`` types of the atoms.
        """
        source, target, vector = (x.index_select(0, edges) for x in (source, target, vector))
        kinds = types.index_select(0, source), owned.index_select(0, target)
        distance = torch.linalg.vector_norm(vector, dim=1)
        switch = poly_switch(distance, self.r_smooth, self.r_cut)
        if self.direct:
            environment = torch.cat([distance[:, None], vector], dim=1) / self.r_cut
        else:
            environment = self.environment(vector, distance, switch, kinds[1])
        table = EdgeTable.of(target, len(owned))
        return Shell(source, kinds, table, self.room, switch, environment)

    def sums(self, shell: Shell, owned: Tensor) -> Tensor:
        """Return `Environment.sums` ``[T, 4]`` of a shell and the types of its atoms."""
        centre = shell.types[1]
        std, mean = (x.index_select(0, centre) for x in (self.environment.std, self.environment.mean))
        raw = shell.environment.detach() * std + mean
        return self.environment.sums(raw, centre, owned, self.room)
