"""Neighbour lists: one function, interchangeable backends, the same edges in the same order."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from gnnmd.graph.atoms import AtomBatch
from gnnmd.graph.boxed import DISTANCE_ERROR, BoxedAtoms, Pairs, box_atoms
from gnnmd.graph.cell_list import cell_list_pairs
from gnnmd.graph.geometry import pair_distances
from gnnmd.graph.neighbor_backends import nvalchemi_pairs, torch_cluster_pairs, vesin_pairs


@dataclass(frozen=True)
class NeighborList:
    """Directed edges j -> i of one or many systems, sorted by target i, then source j, then shift.

    Attributes:
        edge_index: ``[2, E]`` int64, row 0 the source j, row 1 the target i.
        shift: ``[E, 3]`` int64 lattice shifts: ``r_ij = positions[j] + shift @ cell - positions[i]``, for the
            positions as given (wrapped or not).
        r_cut: cutoff, Angstrom; every edge is strictly shorter.
    """

    edge_index: Tensor
    shift: Tensor
    r_cut: float

    def row_pointers(self, n_atoms: int) -> Tensor:
        """Return ``[n_atoms + 1]`` int64 p: the edges of target i are ``p[i] .. p[i + 1] - 1``."""
        rows = torch.arange(n_atoms + 1, device=self.edge_index.device)
        return torch.searchsorted(self.edge_index[1].contiguous(), rows)

    def to(self, device: torch.device | str) -> "NeighborList":
        """Return the list with its tensors on ``device``."""
        return NeighborList(self.edge_index.to(device), self.shift.to(device), self.r_cut)


@dataclass(frozen=True)
class _Backend:
    """A way to find pairs: the function, the module it needs, and how to install that."""

    pairs: Callable[[BoxedAtoms, float], Pairs]
    module: str
    remedy: str


_BACKENDS = {
    "torch": _Backend(cell_list_pairs, "torch", ""),
    "vesin": _Backend(vesin_pairs, "vesin", "pip install 'vesin>=0.6,<0.7'"),
    "nvalchemi": _Backend(nvalchemi_pairs, "nvalchemiops", "pip install 'gnnmd[gpu]'"),
    "torch_cluster": _Backend(
        torch_cluster_pairs,
        "torch_cluster",
        "pip install --no-build-isolation torch_cluster (compiles for minutes)",
    ),
}


@torch.no_grad()
def neighbor_list(
    batch: AtomBatch,
    r_cut: float,
    *,
    backend: str = "auto",
    max_neighbors: int | None = None,
    targets: Tensor | None = None,
) -> NeighborList:
    """Find all directed pairs closer than the cutoff, periodic images included.

    Pairs of an atom with its own images are edges; an atom with itself is not. Whether a pair is closer than
    the cutoff is decided in float64 by the same formula for every backend.

    Args:
        batch: one or many systems; positions need not lie inside the cell.
        r_cut: cutoff, Angstrom.
        backend: "torch" (cell list of this package, any device), "vesin" (compiled, CPU), "nvalchemi"
            (nvalchemi-toolkit-ops, made for GPUs), "torch_cluster" (open boundaries only), or "auto": vesin
            on the CPU; on a GPU nvalchemi where it is installed, else torch.
        max_neighbors: keep about this many nearest sources per target M: those with
            d^2 <= d_(M+1)^2 + 0.01 A^2, where d_(M+1) belongs to the (M+1)-th nearest (eSCN-MD's rule).
            Makes the energy discontinuous; None keeps all.
        targets: ``[N]`` bool, list only edges that end on these atoms; None lists all.

    Raises:
        ValueError: a cutoff or max_neighbors that is not positive, an unknown backend, positions that are not
            finite or beyond 1e8 A, a periodic axis without lattice vector, a singular cell.
        ImportError: the backend is not installed.
    """
    if not 0 < r_cut < float("inf"):
        raise ValueError(f"r_cut must be a positive distance in Angstrom, got {r_cut}")
    if max_neighbors is not None and max_neighbors < 1:
        raise ValueError(f"max_neighbors must be at least 1, or None for no limit, got {max_neighbors}")
    find_pairs = _find_backend(backend, batch.positions.device).pairs
    reach = r_cut + DISTANCE_ERROR
    atoms = box_atoms(batch, reach)
    if not len(atoms.positions):
        return _sorted_edges(_no_pairs(atoms), atoms, r_cut, targets)
    pairs = find_pairs(atoms, reach)
    near = pairs.distance < r_cut - DISTANCE_ERROR
    close_call = (~near & (pairs.distance < r_cut + DISTANCE_ERROR)).nonzero().squeeze(1)
    near[close_call] = _distances(batch, atoms, pairs.select(close_call)) < r_cut
    edges = _sorted_edges(pairs.select(near.nonzero().squeeze(1)), atoms, r_cut, targets)
    return edges if max_neighbors is None else _nearest(edges, batch, max_neighbors)


def _find_backend(name: str, device: torch.device) -> _Backend:
    if name == "auto":
        on_gpu = "nvalchemi" if find_spec("nvalchemiops") else "torch"
        name = "vesin" if device.type == "cpu" else on_gpu
    if name not in _BACKENDS:
        raise ValueError(
            f"unknown neighbour-list backend {name!r}; choose 'auto' or one of {sorted(_BACKENDS)}"
        )
    backend = _BACKENDS[name]
    if find_spec(backend.module) is None:
        raise ImportError(
            f"neighbour-list backend {name!r} needs {backend.module}, which is not installed: "
            f"{backend.remedy}, or use backend='torch'"
        )
    return backend


def _no_pairs(atoms: BoxedAtoms) -> Pairs:
    none = atoms.system[:0]
    return Pairs(none, none, none[:, None].expand(-1, 3), none.double())


def _distances(batch: AtomBatch, atoms: BoxedAtoms, pairs: Pairs) -> Tensor:
    """Return ``[P]`` distances between the atoms as given; these decide."""
    shift = pairs.shift + atoms.image[pairs.target] - atoms.image[pairs.source]
    return pair_distances(batch.positions, batch.cell, batch.system, pairs.target, pairs.source, shift)


def _sorted_edges(pairs: Pairs, atoms: BoxedAtoms, r_cut: float, targets: Tensor | None) -> NeighborList:
    """List both directions of every pair, sorted by one int64 key made of target, source and shift."""
    t, s, shift = pairs.target, pairs.source, pairs.shift.long()
    span = int(shift.abs().max()) if len(shift) else 0
    atom_bits, shift_bits = len(atoms.positions).bit_length(), (2 * span).bit_length()
    if 2 * atom_bits + 3 * shift_bits > 63:
        raise ValueError(
            f"{len(atoms.positions)} atoms with lattice shifts up to {span} do not fit the 63-bit sort key "
            "of a neighbour list; give fewer systems at a time, or a supercell of the thin one"
        )

    # Boxed shifts of one pair are all moved by the same image difference, so they sort like the final ones.
    code = (shift[:, 0] << 2 * shift_bits) + (shift[:, 1] << shift_bits) + shift[:, 2]
    zero = (span << 2 * shift_bits) + (span << shift_bits) + span
    forward = ((t << atom_bits | s) << 3 * shift_bits) + (zero + code)
    backward = ((s << atom_bits | t) << 3 * shift_bits) + (zero - code)
    if targets is not None:
        forward, backward = forward[targets[t]], backward[targets[s]]
    key = torch.sort(torch.cat([forward, backward])).values

    pair = key >> 3 * shift_bits
    source, target = pair & (1 << atom_bits) - 1, pair >> atom_bits
    wrapped = bool(atoms.image.any())
    columns = []
    for axis, image in enumerate(atoms.image.t().contiguous()):
        column = ((key >> (2 - axis) * shift_bits) & (1 << shift_bits) - 1).sub_(span)
        if wrapped:
            column += image.index_select(0, target) - image.index_select(0, source)
        columns.append(column)
    return NeighborList(torch.stack([source, target]), torch.stack(columns, dim=1), r_cut)


def _nearest(edges: NeighborList, batch: AtomBatch, max_neighbors: int) -> NeighborList:
    """Drop the far sources of targets that have more than ``max_neighbors``; rule: see `neighbor_list`."""
    source, target = edges.edge_index
    squared = pair_distances(batch.positions, batch.cell, batch.system, target, source, edges.shift) ** 2
    order = squared.argsort()
    order = order[target[order].argsort(stable=True)]  # by target, nearest first
    first = edges.row_pointers(len(batch.positions))
    crowded = first.diff() > max_neighbors
    limit = torch.full_like(batch.positions[:, 0], torch.inf)
    limit[crowded] = squared[order[first[:-1][crowded] + max_neighbors]] + 0.01
    keep = squared <= limit[target]
    return NeighborList(edges.edge_index[:, keep], edges.shift[keep], edges.r_cut)
