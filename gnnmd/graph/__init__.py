"""Atoms, geometry and neighbour lists."""

from gnnmd.graph.atoms import AtomBatch, LabelKeys
from gnnmd.graph.graph import AtomGraph
from gnnmd.graph.neighbors import NeighborList, neighbor_list
from gnnmd.graph.verlet import VerletList

__all__ = ["AtomBatch", "AtomGraph", "LabelKeys", "NeighborList", "VerletList", "neighbor_list"]
