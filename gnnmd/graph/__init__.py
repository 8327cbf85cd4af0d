"""Atoms, geometry and neighbour lists."""

from gnnmd.graph.atoms import AtomBatch, LabelKeys
from gnnmd.graph.graph import AtomGraph
from gnnmd.graph.neighbors import NeighborList

__all__ = ["AtomBatch", "AtomGraph", "LabelKeys", "NeighborList"]
