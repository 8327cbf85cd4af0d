"""Frames as PyG data with their edges."""

from collections.abc import Sequence
from copy import copy
from typing import Literal

import torch
from ase import Atoms
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset
from torch_geometric.data import Data

from gnnmd.graph import AtomBatch
from gnnmd.graph.neighbors import neighbor_list

#: Below this many atoms the neighbour lists take a few seconds and no progress is shown.
SHOW_PROGRESS_ABOVE = 200_000


class AtomsDataset(Dataset[Data]):
    """Frames with their neighbour lists, built once and kept in memory (unless told otherwise).

    An item has the fields of `AtomBatch.to_data` and ``edge_index [2, E]``, ``shift [E, 3]`` (int64) and
    ``n_edges``, and ``source [1]``. Collated by PyG, a batch feeds `AtomBatch.from_data` and
    ``NeighborList(batch.edge_index, batch.shift, r_cut)``: the edges of later frames are renumbered, so the
    list stays sorted by target.

    Attributes:
        r_cut: Angstrom.
        n_atoms: ``[F]`` int64, atoms per frame.
        n_edges: ``[F]`` int64, edges per frame; None if they were not counted.
        sources: names of the data sets that the frames are of, in order of appearance; an item's ``source``
            is one of their numbers.
    """

    def __init__(
        self,
        frames: Sequence[Atoms],
        r_cut: float,
        *,
        max_neighbors: int | None = None,
        edges: Literal["keep", "count", "skip"] = "keep",
        progress: bool = True,
        sources: Sequence[str] | None = None,
    ):
        """Build the neighbour lists.

        Args:
            frames: as `read_frames` returns them (labels in ``atoms.calc``).
            r_cut: cutoff of the model, Angstrom.
            max_neighbors: of the model, see `neighbor_list`.
            edges: keep them; count them only; or neither, for ranks that share a graph and list its edges
                together (items then have none).
            progress: show a bar if it takes long.
            sources: data set of each frame, as `read_sources` names it; None takes them for one.

        Raises:
            ValueError: no frames.
        """
        if not frames:
            raise ValueError("AtomsDataset got no frames; read at least one")
        self.r_cut = r_cut
        quiet = not progress or edges == "skip" or sum(map(len, frames)) < SHOW_PROGRESS_ABOVE
        self._items = [
            _item(atoms, r_cut, max_neighbors, edges)
            for atoms in track(frames, "neighbour lists", transient=True, disable=quiet)
        ]
        sources = sources or [""] * len(frames)
        self.sources = tuple(dict.fromkeys(sources))
        for item, source in zip(self._items, sources, strict=True):
            item.source = torch.tensor([self.sources.index(source)])
        self.n_atoms = torch.tensor([len(item.z) for item in self._items])
        self.n_edges = None if edges == "skip" else torch.tensor([item.n_edges for item in self._items])

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self._items)

    def __getitem__(self, i: int) -> Data:
        """Return frame ``i``."""
        item = copy(self._items[i])
        if "edge_index" in item:
            item.edge_index, item.shift = item.edge_index.long(), item.shift.long()
        return item

    def labels(self, name: str) -> list[Tensor]:
        """Return the field ``name`` of every frame ("energy", "forces", "z", ...) without copying edges."""
        return [item[name] for item in self._items]


def _item(
    atoms: Atoms, r_cut: float, max_neighbors: int | None, edges: Literal["keep", "count", "skip"]
) -> Data:
    batch = AtomBatch.from_ase(atoms)
    (item,) = batch.to_data()
    if edges == "skip":
        return item
    neighbors = neighbor_list(batch, r_cut, max_neighbors=max_neighbors)
    item.n_edges = neighbors.edge_index.shape[1]
    if edges == "keep":
        # int32 halves the cache: 20 bytes per edge, about 1 kB per atom at 50 neighbours.
        item.edge_index, item.shift = neighbors.edge_index.int(), neighbors.shift.int()
    return item
