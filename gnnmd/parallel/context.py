"""The graph-parallel context: the only thing a model is told about other ranks.

Model code is bipartite message passing (owned + ghost atoms in, owned atoms out) and calls three operators.
On one rank each of them is the identity, so the same model code runs on one device and on many.
"""

from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gnnmd.parallel.exchange import Flight, Pending, WaitClock, exchange_rows, sum_ranks, sum_shared
from gnnmd.parallel.ranks import all_gather_rows, reduce_scatter_rows


class PendingRows(Protocol):
    """An exchange that was started."""

    def finish(self) -> Tensor:
        """Wait and return owned and ghost rows, ``[n_owned + n_ghost, ...]``."""


@dataclass(frozen=True)
class GPContext:
    """Plain data describing this rank's share of one partitioned graph; built outside the model.

    Attributes:
        n_owned: number of atoms this rank owns; rows ``[:n_owned]`` of every per-atom tensor.
        n_ghost: number of copies of other ranks' atoms that this rank's edges read; rows ``[n_owned:]``,
            ordered by the rank that owns them unless there is a `recv_idx`.
        send_idx: ``[sum(send_splits)]`` int64, owned rows that others copy, ordered by receiver; None on one
            rank.
        send_splits: how many rows each rank of the group receives from this one.
        recv_splits: how many rows each rank of the group sends to this one; they sum to ``n_ghost``.
        group: the ranks that share the graph; None on one rank.
        recv_idx: ``[n_ghost]`` int64 permutation, ghost number of each received row; None if they arrive in
            the ghosts' order.
        near: the context of the ghosts that come first because they are near enough for what happens
            between layers; None if that needs all of them.
    """

    n_owned: int
    n_ghost: int = 0
    send_idx: Tensor | None = None
    send_splits: tuple[int, ...] = ()
    recv_splits: tuple[int, ...] = ()
    group: dist.ProcessGroup | None = None
    recv_idx: Tensor | None = None
    near: "GPContext | None" = None

    def __post_init__(self) -> None:
        """Refuse contradictory split tables: inside a collective they would kill the other ranks."""
        if self.group is None:
            if self.n_ghost or self.send_idx is not None:
                raise ValueError(
                    "a context without process group has no ghosts and sends nothing; pass group="
                )
            return
        size = self.group.size()
        n_send = 0 if self.send_idx is None else len(self.send_idx)
        if self.send_idx is None or self.send_idx.dtype != torch.int64:
            raise ValueError(
                "send_idx must be an int64 tensor in a context with a process group (empty is fine)"
            )
        for name, splits, rows in (
            ("send_splits", self.send_splits, n_send),
            ("recv_splits", self.recv_splits, self.n_ghost),
        ):
            if len(splits) != size or min(splits) < 0 or sum(splits) != rows:
                raise ValueError(
                    f"{name} = {splits} must hold one count >= 0 for each of the {size} ranks and sum to "
                    f"{rows} rows; build the context with gnnmd.parallel.build_plan"
                )

    @classmethod
    def single(cls, n_atoms: int) -> "GPContext":
        """Return the context of one rank that owns every atom."""
        return cls(n_owned=n_atoms)

    @property
    def between_layers(self) -> "GPContext":
        """The context through which layers exchange their features."""
        return self if self.near is None else self.near

    def exchange(self, owned: Tensor) -> Tensor:
        """Append the ghosts' rows: ``[n_owned, ...] -> [n_owned + n_ghost, ...]``.

        The backward pass is the transpose: gradients of ghost rows return to their owner and are added there.
        """
        self._check_rows(owned)
        return owned if self.group is None else exchange_rows(owned, self)

    def start_exchange(self, owned: Tensor) -> PendingRows:
        """Start an exchange; ``.finish()`` returns what `exchange` would.

        Work on the owned rows that stands between the two overlaps with the communication, forward and
        backward.
        """
        self._check_rows(owned)
        return _Here(owned) if self.group is None else Pending(owned, self)

    def sum_ranks(self, partial: Tensor) -> Tensor:
        """Sum over ranks a result that leaves the model (energy, stress, a loss).

        All-reduce forward, identity backward: the cotangent of such a result is already the same on every
        rank.
        """
        return partial if self.group is None else sum_ranks(partial, self)

    def sum_shared(self, partial: Tensor) -> Tensor:
        """Sum over ranks what every rank feeds back into its own atoms (channel balancing, routing).

        All-reduce forward and all-reduce backward: each rank's energy depends on the sum, so the cotangents
        of all ranks add.
        """
        return partial if self.group is None else sum_shared(partial, self)

    def ghost_owners(self) -> Tensor:
        """Return ``[n_ghost]`` int64, the rank that owns each ghost."""
        device = None if self.send_idx is None else self.send_idx.device
        owner = torch.repeat_interleave(torch.tensor(self.recv_splits or [0], device=device))
        return (
            owner if self.recv_idx is None else torch.empty_like(owner).index_copy_(0, self.recv_idx, owner)
        )

    def fetch(self, owned: Tensor) -> Flight:
        """Start sending owned rows to their copies (see `Route`); not differentiable."""
        assert self.send_idx is not None
        packed = owned.index_select(0, self.send_idx)
        ghosts = owned.new_empty(self.n_ghost, *owned.shape[1:])
        work = dist.all_to_all_single(
            ghosts, packed, self.recv_splits, self.send_splits, group=self.group, async_op=True
        )
        place = self.recv_idx
        if place is None:
            return Flight(work, lambda: ghosts)
        return Flight(work, lambda: torch.empty_like(ghosts).index_copy_(0, place, ghosts))

    def give_back(self, ghosts: Tensor) -> Flight:
        """Start sending ghosts' rows home, where they are added (see `Route`); not differentiable."""
        assert self.send_idx is not None
        index = self.send_idx
        packed = ghosts.new_empty(len(index), *ghosts.shape[1:])
        if self.recv_idx is not None:
            ghosts = ghosts.index_select(0, self.recv_idx)

        def add() -> Tensor:
            return ghosts.new_zeros(self.n_owned, *ghosts.shape[1:]).index_add(0, index, packed)

        work = dist.all_to_all_single(
            packed, ghosts.contiguous(), self.send_splits, self.recv_splits, group=self.group, async_op=True
        )
        return Flight(work, add)

    def add(self, partial: Tensor) -> Tensor:
        """Return the sum over ranks, leaving ``partial`` as it is; not differentiable."""
        total = partial.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def _check_rows(self, owned: Tensor) -> None:
        if owned.shape[0] != self.n_owned:
            raise ValueError(
                f"exchange takes the {self.n_owned} rows this rank owns, got shape {tuple(owned.shape)}"
            )


@dataclass(frozen=True)
class AllGatherContext(GPContext):
    """The same ghosts fetched the simple way: every rank receives the rows of all ranks and picks its own.

    The baseline to measure against, and a second oracle for `GPContext`.

    Attributes:
        capacity: largest ``n_owned`` of all ranks; rows are padded to it.
        ghost_idx: ``[n_ghost]`` int64, place of each ghost in the gathered rows: owner * capacity + row at
            owner.
    """

    capacity: int = 0
    ghost_idx: Tensor | None = None

    @classmethod
    def like(cls, gp: GPContext) -> "AllGatherContext":
        """Return the all-gather form of a context with a process group; collective."""
        if gp.group is None or gp.send_idx is None:
            raise ValueError("there is nothing to gather on one rank; use the context itself")
        device = gp.send_idx.device
        capacity = torch.tensor(gp.n_owned, device=device)
        dist.all_reduce(capacity, dist.ReduceOp.MAX, group=gp.group)
        row = gp.exchange(torch.arange(gp.n_owned, device=device))[gp.n_owned :]
        return cls(
            n_owned=gp.n_owned,
            n_ghost=gp.n_ghost,
            send_idx=gp.send_idx,
            send_splits=gp.send_splits,
            recv_splits=gp.recv_splits,
            group=gp.group,
            capacity=int(capacity),
            ghost_idx=gp.ghost_owners() * int(capacity) + row,
            near=None if gp.near is None else cls.like(gp.near),
        )

    def fetch(self, owned: Tensor) -> Flight:
        """Start gathering the rows of all ranks."""
        assert self.group is not None
        assert self.ghost_idx is not None
        index = self.ghost_idx
        mine = owned.new_zeros(self.capacity, *owned.shape[1:])
        mine[: self.n_owned] = owned
        rows = owned.new_empty(self.group.size() * self.capacity, *owned.shape[1:])
        work = all_gather_rows(rows, mine, group=self.group, async_op=True)
        return Flight(work, lambda: rows.index_select(0, index))

    def give_back(self, ghosts: Tensor) -> Flight:
        """Start adding the rows of all ranks and scattering the sums to the owners."""
        assert self.group is not None
        assert self.ghost_idx is not None
        rows = ghosts.new_zeros(self.group.size() * self.capacity, *ghosts.shape[1:])
        rows.index_add_(0, self.ghost_idx, ghosts)
        mine = ghosts.new_empty(self.capacity, *ghosts.shape[1:])
        work = reduce_scatter_rows(mine, rows, group=self.group, async_op=True)
        return Flight(work, lambda: mine[: self.n_owned])


@dataclass(frozen=True)
class TimedContext(GPContext):
    """The same share of the graph, and a clock that runs while this rank waits for others.

    Attributes:
        clock: entered for every wait, of forward and backward passes; on a GPU what is issued in it stands
            before and after the wait of the stream.
    """

    clock: WaitClock = nullcontext

    @classmethod
    def of(cls, gp: GPContext, clock: WaitClock) -> "TimedContext":
        """Return ``gp`` with a clock."""
        given = {f.name: getattr(gp, f.name) for f in fields(GPContext)}
        given["near"] = None if gp.near is None else cls.of(gp.near, clock)
        return cls(**given, clock=clock)

    def fetch(self, owned: Tensor) -> Flight:
        """Start sending owned rows to their copies."""
        return replace(super().fetch(owned), clock=self.clock)

    def give_back(self, ghosts: Tensor) -> Flight:
        """Start sending ghosts' rows home."""
        return replace(super().give_back(ghosts), clock=self.clock)

    def add(self, partial: Tensor) -> Tensor:
        """Return the sum over ranks."""
        with self.clock():
            return super().add(partial)


@dataclass(frozen=True)
class _Here:
    """An exchange on one rank: nothing to wait for."""

    owned: Tensor

    def finish(self) -> Tensor:
        """Return the rows."""
        return self.owned
