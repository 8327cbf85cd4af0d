"""Checks that a partition is what it should be; cheap enough to run whenever a plan is built."""

import torch
from torch import Tensor

from gnnmd.graph.graph import AtomGraph
from gnnmd.parallel.context import GPContext
from gnnmd.parallel.ranks import Ranks


def check_columns(columns: tuple[Tensor, ...]) -> None:
    """Refuse per-atom columns of different lengths."""
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"ids, numbers, system, positions and carried rows have lengths {lengths}; they must agree"
        )


def check_finite(positions: Tensor, ids: Tensor) -> None:
    """Refuse positions that are not finite."""
    bad = ~torch.isfinite(positions).all(1)
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"atom {int(ids[at])} is at {positions[at].tolist()} A; positions must be finite. The structure "
            "is damaged or the simulation has exploded."
        )


def check_each_once(ids: Tensor, ranks: Ranks) -> None:
    """Refuse ids that are not, over all ranks, 0 .. N-1 each once; collective.

    Compares the sums of x and of x^3 + x^2, exact modulo 2^64, so that nobody needs all ids.
    """
    n = int(ranks.sum(torch.tensor(len(ids), device=ids.device)))
    found = ranks.sum(torch.stack((ids.sum(), (ids * ids * ids + ids * ids).sum())))
    total = n * (n - 1) // 2
    expected = [_as_int64(total), _as_int64(total**2 + (n - 1) * n * (2 * n - 1) // 6)]
    if found.tolist() != expected:
        own = ids[(ids >= 0) & (ids < n)]
        times = ranks.sum(torch.bincount(own, minlength=n))
        wrong = [f"{i} ({times[i]} times)" for i in (times != 1).nonzero()[:10, 0].tolist()]
        raise ValueError(
            f"the ids of the {n} atoms on all ranks are not 0 .. {n - 1}, each once: an atom is missing or "
            f"was given to two ranks: {', '.join(wrong)}"
        )


def check_share(graph: AtomGraph, gp: GPContext, ids: Tensor, ranks: Ranks, *, symmetric: bool) -> None:
    """Refuse a plan that lost or doubled something; collective.

    Every atom has one owner, every ghost is the copy of the atom it should be and somebody reads it, no row
    is sent twice to the same rank, and as many edges lead from rank p to q as from q to p.

    Args:
        graph: this rank's share.
        gp: its ghosts.
        ids: ``[n_all]`` global numbers of owned and ghost atoms.
        ranks: who shares the graph.
        symmetric: whether every edge has its opposite (not so with a limited number of neighbours).

    Raises:
        RankFailure: on every rank.
    """
    n_owned, device = gp.n_owned, ids.device
    check_each_once(ids[:n_owned], ranks)
    arrived, near = gp.exchange(ids[:n_owned]), gp.between_layers.exchange(ids[:n_owned])
    source, target = graph.edge_index
    owner = torch.cat((ids.new_full((n_owned,), ranks.rank), gp.ghost_owners().to(device)))
    inward = torch.bincount(owner[source], minlength=ranks.size)
    outward = ranks.send_counts(inward)
    with ranks.together("checking its plan"):
        if not (torch.equal(arrived, ids) and torch.equal(near, ids[: len(near)])):
            raise ValueError("ghosts receive other atoms' rows than those they are copies of")
        if len(torch.unique(ids)) != len(ids):
            raise ValueError("an atom is owned and a ghost, or a ghost twice, on the same rank")
        used = torch.zeros(len(ids), dtype=torch.bool, device=device)
        used[source] = True
        if not used[n_owned:].all():
            raise ValueError("a ghost is fetched that no edge reads")
        if len(target) and not (int(target.min()) >= 0 and int(target.max()) < n_owned):
            raise ValueError("an edge ends on an atom of another rank")
        if symmetric and not torch.equal(inward, outward):
            raise ValueError(
                f"{inward.tolist()} edges come from other ranks but {outward.tolist()} go there: the halo "
                "is incomplete"
            )


def _as_int64(x: int) -> int:
    """Return x as it overflows in int64 arithmetic."""
    return (x + 2**63) % 2**64 - 2**63
