"""From the atoms that a rank owns to its share of the graph: halo, edges, ghosts and who sends what."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gnnmd.graph.atoms import AtomBatch
from gnnmd.graph.geometry import pair_distances
from gnnmd.graph.graph import AtomGraph
from gnnmd.graph.neighbors import neighbor_list
from gnnmd.parallel.context import GPContext
from gnnmd.parallel.guards import check_share
from gnnmd.parallel.halo import halo_receivers
from gnnmd.parallel.ranks import Ranks
from gnnmd.parallel.sites import find_box


@dataclass(frozen=True)
class Held:
    """Atoms a rank holds; every column is ``[n, ...]``."""

    id: Tensor
    numbers: Tensor
    system: Tensor
    positions: Tensor
    carried: tuple[Tensor, ...]

    def select(self, rows: Tensor) -> "Held":
        """Return the atoms picked by a mask or by indices."""
        return self._from(tuple(c[rows] for c in self.columns))

    def send(self, receiver: Tensor, ranks: Ranks) -> "Held":
        """Send every atom to a rank and return those that arrive."""
        columns, _ = ranks.send_rows(self.columns, receiver)
        return self._from(columns)

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """All columns, those carried along last."""
        return (self.id, self.numbers, self.system, self.positions, *self.carried)

    @staticmethod
    def _from(columns: tuple[Tensor, ...]) -> "Held":
        return Held(columns[0], columns[1], columns[2], columns[3], columns[4:])


class Options(NamedTuple):
    """What a plan is made with; see the arguments of `build_plan`."""

    r_cut: float
    skin: float
    near: float | None
    partition: str
    max_neighbors: int | None
    backend: str
    dataset: Tensor
    headroom: float

    @property
    def reach(self) -> float:
        """How far neighbours are listed, Angstrom."""
        return self.r_cut + self.skin


class Share(NamedTuple):
    """What a rank has of a graph.

    Attributes:
        graph: owned and ghost atoms, and the edges that end on owned ones.
        gp: how the ghosts' rows are fetched.
        ids: ``[n_all]`` int64 global numbers of owned and ghost atoms.
        load: ``[2]`` the largest numbers of ghosts and of edges of all ranks.
    """

    graph: AtomGraph
    gp: GPContext
    ids: Tensor
    load: Tensor


def link(held: Held, batch: AtomBatch, ranks: Ranks, options: Options) -> Share:
    """Find the halo, the edges and the ghosts of the atoms a rank owns; collective."""
    n_owned = len(held.id)
    box = find_box(held.positions, held.system, batch.cell, batch.pbc, ranks)
    u = box.coordinates(held.positions, held.system)
    row, receiver = halo_receivers(u, held.system, box, options.reach, ranks)
    whole = torch.stack((held.id, held.numbers, held.system), 1)[row]
    (whole, row, positions), counts = ranks.send_rows((whole, row, held.positions[row]), receiver)
    owner = torch.repeat_interleave(counts)

    with ranks.together("listing its neighbours"):
        ids, numbers, system = (
            torch.cat((mine, other)) for mine, other in zip(held.columns[:3], whole.unbind(1), strict=True)
        )
        positions = torch.cat((held.positions, positions))
        source, target, shift = _edges(n_owned, numbers, system, positions, batch, options)

    # Ghosts are the halo atoms that an edge starts from, ordered by owner; those near come before the others.
    kind = torch.zeros(len(ids), dtype=torch.int8, device=ids.device)
    kind[source] = 1
    if options.near is not None:
        distance = pair_distances(positions, batch.cell, system, target, source, shift)
        kind[source[distance < options.near + options.skin]] = 2
    kind[:n_owned] = 0
    parts = [(kind == k).nonzero()[:, 0] for k in (2, 1)]
    ghosts = torch.cat(parts)
    new_row = torch.arange(len(ids), device=ids.device)
    new_row[ghosts] = n_owned + torch.arange(len(ghosts), device=ids.device)
    gp = _context(n_owned, ghosts - n_owned, row, owner, ranks)
    if options.near is not None:
        gp = replace(gp, near=_context(n_owned, parts[0] - n_owned, row, owner, ranks))

    kept = torch.cat((torch.arange(n_owned, device=ids.device), ghosts))
    n_systems = len(batch.cell)
    graph = AtomGraph(
        numbers=numbers[kept],
        system=system[kept],
        edge_index=torch.stack((new_row[source], target)),
        shift=shift,
        cell=batch.cell,
        n_atoms=ranks.sum(torch.bincount(held.system, minlength=n_systems)),
        charge=batch.charge,
        spin=batch.spin,
        dataset=options.dataset,
    )
    check_share(graph, gp, ids[kept], ranks, symmetric=options.max_neighbors is None)
    load = ranks.max(torch.tensor([len(ghosts), len(source)], device=ids.device))
    return Share(graph, gp, ids[kept], load)


def _context(n_owned: int, halo: Tensor, row: Tensor, owner: Tensor, ranks: Ranks) -> GPContext:
    """Tell the owners of some halo atoms to send their rows from now on.

    Args:
        n_owned: atoms of this rank.
        halo: ``[n_ghost]`` which atoms of the halo, in the order that their rows shall have.
        row: ``[H]`` row of every halo atom at its owner.
        owner: ``[H]`` its owner.
        ranks: who shares the systems.
    """
    if ranks.group is None:
        return GPContext.single(n_owned)
    (send_idx,), send_counts = ranks.send_rows((row[halo],), owner[halo])
    order = torch.argsort(owner[halo], stable=True)  # in which they arrive
    in_order = torch.equal(order, torch.arange(len(order), device=order.device))
    return GPContext(
        n_owned=n_owned,
        n_ghost=len(halo),
        send_idx=send_idx,
        send_splits=tuple(send_counts.tolist()),
        recv_splits=tuple(torch.bincount(owner[halo], minlength=ranks.size).tolist()),
        group=ranks.group,
        recv_idx=None if in_order else order,
    )


def _edges(
    n_owned: int, numbers: Tensor, system: Tensor, positions: Tensor, batch: AtomBatch, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Return source, target and shift of the edges among owned and halo atoms that end on owned ones."""
    if not n_owned:
        none = system.new_empty(0)
        return none, none, none.new_empty(0, 3)
    order = torch.argsort(system, stable=True)
    local = replace(
        batch,
        positions=positions[order],
        numbers=numbers[order],
        system=system[order],
        forces=torch.full_like(positions, torch.nan),
    )
    found = neighbor_list(
        local,
        options.reach,
        backend=options.backend,
        max_neighbors=options.max_neighbors,
        targets=order < n_owned,
    )
    source, target = order[found.edge_index]
    return source, target, found.shift
