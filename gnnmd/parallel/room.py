"""Spare rows and edges, with which shapes stay the same when the numbers of atoms and edges change."""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from gnnmd.graph.graph import AtomGraph
from gnnmd.parallel.context import GPContext
from gnnmd.parallel.halo import expand_ranges
from gnnmd.parallel.link import Share


class Room(NamedTuple):
    """How many edges fit into a plan, and how many rows from and to each rank (see `_sections`)."""

    edges: int
    received: list[int]
    sent: list[int]


def room_of(graph: AtomGraph, gp: GPContext) -> Room:
    """Return the room that a share has, spare rows included."""
    return Room(graph.edge_index.shape[1], *_sections(gp))


def with_room(share: Share, headroom: float, before: Room | None) -> Share:
    """Add spare ghosts and edges: as many as there was room for before, more where that is too little.

    Sender and receiver know how many rows there are and how much room there was, so both find the same new
    room without a word. Spare ghosts are copies of their owner's first atom. Spare edges lead from the last
    row to the last owned atom, so that they are the last ones of both in any order (see `Groups.count`).

    Args:
        share: without spare rows.
        headroom: how much more than there is, as a part of it, where there is too little room; 0 = none.
        before: the room there was.
    """
    graph, gp = share.graph, share.gp
    if not headroom:
        return share
    n_edges, device = graph.edge_index.shape[1], share.ids.device
    edges = _room([n_edges], [before.edges] if before else [], headroom)
    received, sent = _sections(gp)
    recv = _room(received, before.received if before else [], headroom)
    send = _room(sent, before.sent if before else [], headroom)
    row = torch.cat((torch.arange(gp.n_owned, device=device), gp.n_owned + _slots(received, recv, device)))

    def spread(column: Tensor, spare: Tensor | int) -> Tensor:
        wide = column.new_empty(gp.n_owned + sum(recv))
        wide[:] = spare
        wide[row] = column
        return wide

    spare, (source, target) = edges[0] - n_edges, graph.edge_index
    edge_index = torch.stack(
        (
            pad(row[source], (0, spare), value=gp.n_owned + sum(recv) - 1),
            pad(target, (0, spare), value=gp.n_owned - 1),
        )
    )
    graph = replace(
        graph,
        numbers=spread(graph.numbers, graph.numbers[:1]),
        system=spread(graph.system, graph.system[:1]),
        edge_index=edge_index,
        shift=pad(graph.shift, (0, 0, 0, spare)),
        n_edges=torch.tensor(n_edges, device=device),
    )
    ids = spread(share.ids, -1)
    return share._replace(graph=graph, gp=_roomy_context(gp, sent, send, recv), ids=ids)


def _sections(gp: GPContext) -> tuple[list[int], list[int]]:
    """Return how many rows come from and go to each rank: first the near ones of all, then the rest."""
    near = gp if gp.near is None else gp.near
    sections = []
    for all_of_them, first in ((gp.recv_splits, near.recv_splits), (gp.send_splits, near.send_splits)):
        sections.append([*first, *(n - k for n, k in zip(all_of_them, first, strict=True))])
    return sections[0], sections[1]


def _roomy_context(gp: GPContext, sent: list[int], send: list[int], recv: list[int]) -> GPContext:
    """Return a context whose sections (see `_sections`) have the given room."""
    if gp.send_idx is None:
        return gp
    device, size = gp.send_idx.device, len(gp.recv_splits)
    # On the wire, a rank's near rows come before its others.
    on_wire = [section for rank in range(size) for section in (rank, size + rank)]

    def roomy(context: GPContext, sections: list[int]) -> GPContext:
        assert context.send_idx is not None
        there, room = [sent[i] for i in sections], [send[i] for i in sections]
        send_idx = context.send_idx.new_zeros(sum(room))
        send_idx[_slots(there, room, device)] = context.send_idx
        return replace(
            context,
            n_ghost=sum(recv[i] for i in sections),
            send_idx=send_idx,
            send_splits=tuple(sum(send[i] for i in sections if i % size == rank) for rank in range(size)),
            recv_splits=tuple(sum(recv[i] for i in sections if i % size == rank) for rank in range(size)),
        )

    wide = roomy(gp, on_wire)
    if gp.near is None:
        return wide
    room = torch.tensor(recv, device=device)
    start = room.cumsum(0) - room
    return replace(
        wide,
        recv_idx=expand_ranges(start[on_wire], room[on_wire])[1],
        near=roomy(gp.near, list(range(size))),
    )


def _room(counts: Sequence[int], before: Sequence[int], headroom: float) -> list[int]:
    """Return room for ``counts`` rows: what there was before if that is enough."""
    there = before or [0] * len(counts)
    return [b if n <= b else ceil(n * (1 + headroom)) for n, b in zip(counts, there, strict=True)]


def _slots(counts: Sequence[int], room: Sequence[int], device: torch.device) -> Tensor:
    """Return where rows that lay close together come to lie when every part gets its room."""
    n, wide = (torch.tensor(x, dtype=torch.int64, device=device) for x in (counts, room))
    return expand_ranges(wide.cumsum(0) - wide, n)[1]
