"""A plan: everything about a partitioned graph that stays fixed while no atom has moved too far."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gnnmd.graph.atoms import AtomBatch
from gnnmd.graph.geometry import complete_cell, edge_vectors
from gnnmd.graph.graph import AtomGraph
from gnnmd.graph.selection import first_of
from gnnmd.parallel.accounting import copies
from gnnmd.parallel.context import GPContext
from gnnmd.parallel.guards import check_columns, check_each_once, check_finite
from gnnmd.parallel.link import Held, Options, Share, link
from gnnmd.parallel.morton import morton_keys
from gnnmd.parallel.partition import KEYS, PARTITIONERS, Cuts, choose, morton
from gnnmd.parallel.ranks import Ranks, all_gather_rows
from gnnmd.parallel.room import Room, room_of, with_room
from gnnmd.parallel.sites import Sites, find_box

#: A rebuild keeps every atom where it is until the largest number of ghosts or edges has grown by this
#: factor.
REPARTITION = 1.1


@dataclass(frozen=True)
class Plan:
    """One rank's share of one or many systems.

    Use ``potential(positions, plan.graph, plan.gp)``, with positions of the owned atoms in the order of
    `ids`, as long as `moved_too_far` says no; then `rebuild`.

    Attributes:
        graph: owned and ghost atoms and the edges, shorter than ``r_cut + skin``, that end on owned atoms;
            after them spare ghosts and edges, if head-room was asked for.
        gp: how the ghosts' rows are fetched.
        ids: ``[n_all]`` int64 global numbers of owned and ghost atoms; -1 for spare ghosts.
        positions: ``[n_owned, 3]`` at which the plan was built, Angstrom, not wrapped.
        carried: per-atom rows that travel with the owned atoms (labels, velocities).
        cuts: the partition.
        r_cut: cutoff, Angstrom.
        skin: how much farther than the cutoff edges are listed, Angstrom.
        ranks: who shares the systems.
    """

    graph: AtomGraph
    gp: GPContext
    ids: Tensor
    positions: Tensor
    carried: tuple[Tensor, ...]
    cuts: Cuts
    r_cut: float
    skin: float
    ranks: Ranks
    _batch: AtomBatch
    _options: Options
    _load: Tensor

    def moved_too_far(self, positions: Tensor, cell: Tensor) -> Tensor:
        """Tell whether an edge shorter than the cutoff may be missing from the plan; collective.

        Displacements are those of the coordinates as they are, beyond what the cell's own deformation
        explains: an atom that was wrapped to the other side of the cell counts as moved, because the shifts
        of its edges are no longer right.

        Args:
            positions: ``[n_owned, 3]`` Angstrom.
            cell: ``[B, 3, 3]`` Angstrom.

        Returns:
            A bool tensor, the same on every rank.
        """
        pbc = self._batch.pbc
        before, now = complete_cell(self._batch.cell, pbc), complete_cell(cell, pbc)
        same = (before == now).flatten(1).all(1)[:, None, None]
        identity = torch.eye(3, dtype=now.dtype, device=now.device)
        deformation = torch.where(same, identity, torch.linalg.solve(before, now))  # [B, 3, 3]
        shrink = torch.linalg.matrix_norm(torch.linalg.inv(deformation), 2)
        shrink = torch.where(same[:, 0, 0], 1.0, shrink)
        system = self.graph.system[: self.gp.n_owned]
        moved = positions - torch.einsum("na,nab->nb", self.positions, deformation[system])
        allowed = (self.r_cut + self.skin) / shrink - self.r_cut
        # Negated, so that NaN counts as moved.
        exceeded = ~(2 * torch.linalg.vector_norm(moved, dim=1) <= allowed[system]).all()
        exceeded |= ~(allowed >= 0).all()
        return self.ranks.max(exceeded.int()).bool()

    @torch.no_grad()
    def rebuild(
        self, positions: Tensor, cell: Tensor, carried: tuple[Tensor, ...] = (), *, skin: float | None = None
    ) -> "Plan":
        """Build the plan anew at new positions; collective.

        Atoms keep their owner, and their row, until this costs more than 10 % in ghosts or edges on the rank
        that has most: in a liquid of 1e5 atoms per rank less than 1 % leave their brick between two rebuilds.
        Meanwhile shapes stay what they are where there is room; what does not fit gets more, never less.

        Args:
            positions: ``[n_owned, 3]`` Angstrom.
            cell: ``[B, 3, 3]`` Angstrom.
            carried: per-atom rows that travel with the owned atoms.
            skin: of the new plan, Angstrom; None keeps it. Where it changes, atoms keep their owner.
        """
        n = self.gp.n_owned
        held = Held(self.ids[:n], self.graph.numbers[:n], self.graph.system[:n], positions, carried)
        with self.ranks.together("checking its atoms"):
            check_columns(held.columns)
            check_finite(held.positions, held.id)
        batch = replace(self._batch, cell=cell)
        if skin is not None and skin != self.skin:
            options = self._options._replace(skin=skin)
            share = link(held, batch, self.ranks, options)
            return _planned(held, batch, self.cuts, self.ranks, options, share)
        share = link(held, batch, self.ranks, self._options)
        if (share.load > REPARTITION * self._load).any():
            return _build(held, batch, self.ranks, self._options)
        share = share._replace(load=self._load)
        room = room_of(self.graph, self.gp)
        return _planned(held, batch, self.cuts, self.ranks, self._options, share, room)

    def saved(self) -> dict[str, Tensor]:
        """Return what this rank needs, besides its atoms in their order, to make this plan again.

        See the argument ``saved`` of `build_plan`.
        """
        edges, received, sent = room_of(self.graph, self.gp)
        cuts = self.cuts
        numbers = [[edges, *received, *sent], [list(KEYS).index(cuts.keys), cuts.depth]]
        room, kind = (torch.tensor(x, device=self.ids.device) for x in numbers)
        return {
            "positions": self.positions,
            "cell": self.graph.cell,
            "load": self._load,
            "room": room,
            "cuts.kind": kind,
            **{f"cuts.{name}": getattr(cuts, name) for name in _CUTS},
        }

    def within_cutoff(self, positions: Tensor, cell: Tensor, room: int | None = None) -> AtomGraph:
        """Return the graph, with positions, without the edges in the skin now; one exchange of positions.

        Args:
            positions: ``[n_owned, 3]`` Angstrom.
            cell: ``[B, 3, 3]`` Angstrom.
            room: columns of the result, the last of them spare, for which the host does not wait. If
                ``n_edges`` of the result is larger, edges are missing. None = exactly as many as there are.
        """
        with torch.no_grad():
            g = self.graph.with_positions(self.gp.exchange(positions.detach()), cell)
            near = torch.linalg.vector_norm(edge_vectors(g), dim=1) < self.r_cut
            if room is None:
                kept, n_edges = near.nonzero().squeeze(1), None  # here the host waits, once
            else:
                kept, n_edges = first_of(near, room)
            edge_index, shift = g.edge_index.index_select(1, kept), g.shift.index_select(0, kept)
            if n_edges is not None:  # spare ones come last, however edges are sorted
                spare = torch.arange(len(kept), device=kept.device) >= n_edges
                ends = zip(edge_index, (len(g.numbers) - 1, self.gp.n_owned - 1), strict=True)
                edge_index = torch.stack([torch.where(spare, last, rows) for rows, last in ends])
            return replace(g, edge_index=edge_index, shift=shift, n_edges=n_edges)

    @torch.no_grad()
    def gather_owned(self, owned: Tensor) -> Tensor:
        """Return all atoms' rows on every rank, ``[N, ...]`` in the order of the input; for output only."""
        group = self.ranks.group
        n = int(self.graph.n_atoms.sum())
        ids = self.ids[: self.gp.n_owned]
        everything = owned.new_empty(n, *owned.shape[1:])
        if group is None:
            everything[ids] = owned
            return everything
        capacity = int(self.ranks.max(torch.tensor(len(ids), device=ids.device)))
        padded_ids = ids.new_full((capacity,), -1)
        padded_ids[: len(ids)] = ids
        padded = owned.new_zeros(capacity, *owned.shape[1:])
        padded[: len(ids)] = owned
        all_ids = ids.new_empty(self.ranks.size * capacity)
        rows = owned.new_empty(self.ranks.size * capacity, *owned.shape[1:])
        all_gather_rows(all_ids, padded_ids, group=group)
        all_gather_rows(rows, padded, group=group)
        everything[all_ids[all_ids >= 0]] = rows[all_ids >= 0]
        return everything


#: The tensors of `Cuts`.
_CUTS = ("root", "column", "threshold", "child")


def share_of(batch: AtomBatch, ranks: Ranks) -> tuple[AtomBatch, Tensor]:
    """Return one rank's slice of a batch that every rank was given, and the slice's global numbers.

    For structures that fit into one process; larger ones are read in pieces and handed to `build_plan`
    directly.
    """
    n = len(batch.numbers)
    rows = torch.arange(
        ranks.rank * n // ranks.size, (ranks.rank + 1) * n // ranks.size, device=batch.numbers.device
    )
    piece = replace(
        batch,
        positions=batch.positions[rows],
        numbers=batch.numbers[rows],
        system=batch.system[rows],
        forces=batch.forces[rows],
    )
    return piece, rows


@torch.no_grad()
def build_plan(
    piece: AtomBatch,
    ids: Tensor,
    r_cut: float,
    ranks: Ranks,
    *,
    skin: float = 0.0,
    near: float | None = None,
    partition: str = "auto",
    carried: tuple[Tensor, ...] = (),
    dataset: Tensor | None = None,
    max_neighbors: int | None = None,
    backend: str = "auto",
    headroom: float = 0.0,
    saved: dict[str, Tensor] | None = None,
) -> Plan:
    """Partition systems over ranks and build every rank's share; collective, O(N/P) memory and work per rank.

    Args:
        piece: all systems, with the atoms that this rank holds at first: any part of them, in any order.
            Cells and other properties of systems are the same on every rank.
        ids: ``[n]`` int64 global numbers of these atoms; over all ranks each of 0 .. N-1 once.
        r_cut: cutoff, Angstrom.
        ranks: who shares the systems.
        skin: how much farther edges are listed so that the plan survives motion, Angstrom.
        near: ghosts nearer than this (plus the skin) come first and are all that layers exchange, Angstrom;
            see `Backbone.exchange_cut`. None is the cutoff.
        partition: "auto" (counts the ghosts of several and takes the best), "bisection", "bricks", "morton",
            "index".
        carried: per-atom rows ``[n, ...]`` that travel with the atoms.
        dataset: ``[B]`` index into the model's data sets.
        max_neighbors: see `neighbor_list`.
        backend: see `neighbor_list`.
        headroom: spare ghosts and edges, as a part of those there are, so that shapes survive rebuilds
            (captured and compiled code): 0.1, say.
        saved: what `Plan.saved` said on this rank. That plan is made again as it stood, with its edges in
            their order: atoms are not partitioned anew, and ``piece`` has them as the plan had, at any
            positions. All other arguments must be those of then.

    Raises:
        RankFailure: the input of some rank is unusable; raised on every rank.
    """
    held = Held(ids, piece.numbers, piece.system, piece.positions, carried)
    with ranks.together("checking its atoms"):
        if partition != "auto" and partition not in PARTITIONERS:
            raise ValueError(f"unknown partition {partition!r}; choose one of {['auto', *PARTITIONERS]}")
        if not (r_cut > 0 and skin >= 0 and headroom >= 0):
            raise ValueError(
                f"r_cut must be positive, skin and headroom not negative; got {r_cut} A, {skin} A, {headroom}"
            )
        if max_neighbors is not None and skin > 0:
            raise ValueError(
                f"max_neighbors={max_neighbors} keeps those that are nearest now; a skin of {skin} A would "
                "keep them while atoms move. Build a plan with skin=0 at every step"
            )
        if saved is not None:
            held = replace(held, positions=saved["positions"])
        check_columns(held.columns)
        check_finite(held.positions, held.id)
    check_each_once(held.id, ranks)
    if dataset is None:
        dataset = torch.zeros(len(piece.cell), dtype=torch.int64, device=ids.device)
    options = Options(r_cut, skin, near, partition, max_neighbors, backend, dataset, headroom)
    if saved is not None:
        return _restored(held, replace(piece, cell=saved["cell"]), ranks, options, saved)
    return _build(held, piece, ranks, options)


def _build(held: Held, batch: AtomBatch, ranks: Ranks, options: Options) -> Plan:
    held, cuts = _partition(held, batch, ranks, options)
    return _planned(held, batch, cuts, ranks, options, link(held, batch, ranks, options))


def _planned(
    held: Held,
    batch: AtomBatch,
    cuts: Cuts,
    ranks: Ranks,
    options: Options,
    share: Share,
    room: Room | None = None,
) -> Plan:
    """Return the plan of a share, with the room that there was before, or more."""
    graph, gp, ids, load = with_room(share, options.headroom, room)
    return Plan(
        graph=graph,
        gp=gp,
        ids=ids,
        positions=held.positions,
        carried=held.carried,
        cuts=cuts,
        r_cut=options.r_cut,
        skin=options.skin,
        ranks=ranks,
        _batch=batch,
        _options=options,
        _load=load,
    )


def _restored(held: Held, batch: AtomBatch, ranks: Ranks, options: Options, saved: dict[str, Tensor]) -> Plan:
    """Link the atoms of a plan where they were when it was built."""
    kind, depth = saved["cuts.kind"].tolist()
    cuts = Cuts(keys=list(KEYS)[kind], depth=depth, **{name: saved[f"cuts.{name}"] for name in _CUTS})
    edges, *rows = saved["room"].tolist()
    room = Room(edges, rows[: len(rows) // 2], rows[len(rows) // 2 :])
    share = link(held, batch, ranks, options)._replace(load=saved["load"])
    return _planned(held, batch, cuts, ranks, options, share, room)


def _partition(held: Held, batch: AtomBatch, ranks: Ranks, options: Options) -> tuple[Held, Cuts]:
    """Partition twice, by number of atoms to see the edges and then by edges; return the owned atoms."""
    sites = _sites(held, batch, ranks, torch.ones_like(held.id))
    first = morton(sites, ranks.size, options.reach, ranks)
    held = _migrate(held, sites, first, ranks)
    draft = link(held, batch, ranks, options)
    edges = torch.bincount(draft.graph.edge_index[1], minlength=len(held.id))
    sites = _sites(held, batch, ranks, edges + 1)
    cuts = choose(
        options.partition,
        sites,
        ranks.size,
        options.reach,
        ranks,
        lambda owner: _count_ghosts(draft, owner, ranks),
    )
    return _migrate(held, sites, cuts, ranks), cuts


def _sites(held: Held, batch: AtomBatch, ranks: Ranks, weight: Tensor) -> Sites:
    box = find_box(held.positions, held.system, batch.cell, batch.pbc, ranks)
    return Sites(box.coordinates(held.positions, held.system), held.system, weight, held.id, box)


def _migrate(held: Held, sites: Sites, cuts: Cuts, ranks: Ranks) -> Held:
    """Send every atom to its owner; sort what arrives by system and along the curve."""
    arrived = held.send(cuts.owner(sites), ranks)
    u = sites.box.coordinates(arrived.positions, arrived.system)
    # The id decides between atoms at the same place: the order must not depend on who sent them.
    order = torch.argsort(arrived.id)
    for key in (morton_keys(u, sites.box.edge, arrived.system), arrived.system):
        order = order[torch.argsort(key[order], stable=True)]
    return arrived.select(order)


def _count_ghosts(share: Share, owner: Tensor, ranks: Ranks) -> Tensor:
    """Return ``[P]``, the ghosts each rank would have if ``owner`` ``[n_owned]`` owned the atoms of a share.

    Edges come in both directions: the ranks that need a copy of an atom own the sources of its own edges.
    """
    _, needer = copies(share.graph.edge_index, share.gp.exchange(owner), ranks.size)
    return ranks.sum(torch.bincount(needer, minlength=ranks.size))
