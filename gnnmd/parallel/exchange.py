"""The two differentiable operators between ranks, and how their rows travel.

A `Route` moves rows: `fetch` brings owners' rows to the ghosts, `give_back` is its transpose and adds ghosts'
rows to their owners'. Each is the other's derivative, so an exchange can be differentiated any number of
times, as training on forces does twice. `add` sums what all ranks have.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

#: Is entered while this rank (on a GPU: its stream) waits for others.
WaitClock = Callable[[], AbstractContextManager[None]]


@dataclass
class Flight:
    """Rows on their way: `land` waits for them and puts them in place."""

    work: dist.Work
    unpack: Callable[[], Tensor]
    clock: WaitClock = nullcontext

    def land(self) -> Tensor:
        """Return the rows; on a GPU only the stream waits, not the host."""
        with self.clock():
            self.work.wait()
        return self.unpack()


class Route(Protocol):
    """How rows get from owned atoms to their ghosts and back.

    All methods are collective: every rank of the group calls them in the same order, also with no rows.
    """

    @property
    def n_owned(self) -> int:
        """Number of rows this rank owns."""

    @property
    def n_ghost(self) -> int:
        """Number of rows it copies from other ranks."""

    def fetch(self, owned: Tensor) -> Flight:
        """Send ``[n_owned, ...]``; ghosts' rows ``[n_ghost, ...]`` land."""

    def give_back(self, ghosts: Tensor) -> Flight:
        """Send ``[n_ghost, ...]``; their sums over all copies of each owned row ``[n_owned, ...]`` land."""

    def add(self, partial: Tensor) -> Tensor:
        """Return the sum over ranks, leaving ``partial`` as it is."""


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, owned: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return torch.cat((owned, route.fetch(owned).land()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Transpose.apply(grads[0], ctx.route), None


class _Transpose(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route) -> Tensor:
        ctx.route = route
        home = route.give_back(rows[route.n_owned :])
        return rows[: route.n_owned] + home.land()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grads[0], ctx.route), None


def exchange_rows(owned: Tensor, route: Route) -> Tensor:
    """Append the ghosts' rows: ``[n_owned, ...] -> [n_owned + n_ghost, ...]``, differentiable."""
    return _Exchange.apply(owned, route)


class Pending:
    """An exchange that was started; work on owned rows may run until `finish`.

    The backward pass overlaps in the same place: gradients of the ghosts leave when that of `finish` is
    known, and are waited for only after the work in between has been differentiated.
    """

    def __init__(self, owned: Tensor, route: Route):
        self.route = route
        self.homeward: Flight | None = None
        self._owned = owned
        self.outward = route.fetch(owned.detach())
        self._ghosts = _Depart.apply(owned, self)

    def finish(self) -> Tensor:
        """Wait and return owned and ghost rows, ``[n_owned + n_ghost, ...]``."""
        return _Arrive.apply(self._owned, self._ghosts, self)


class _Depart(Function):
    """Stand-in for the ghosts' rows while they fly: takes no memory, carries the gradient."""

    @staticmethod
    def forward(ctx: Any, owned: Tensor, pending: Pending) -> Tensor:
        ctx.pending = pending
        return owned.new_zeros(()).expand(pending.route.n_ghost, *owned.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        flight = ctx.pending.homeward
        return _Land.apply(grads[0], ctx.pending.route, flight), None


class _Arrive(Function):
    @staticmethod
    def forward(ctx: Any, owned: Tensor, ghosts: Tensor, pending: Pending) -> Tensor:
        ctx.pending = pending
        return torch.cat((owned, pending.outward.land()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        route = ctx.pending.route
        owned, ghosts = grads[0].split((route.n_owned, route.n_ghost))
        ctx.pending.homeward = route.give_back(ghosts.detach())
        return owned, ghosts, None


class _Land(Function):
    """Gradients of the ghosts come home; a function of them, so that it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, ghosts: Tensor, route: Route, flight: Flight) -> Tensor:
        ctx.route = route
        return flight.land()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Exchange.apply(grads[0], ctx.route)[ctx.route.n_owned :], None, None


class _SumRanks(Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, route: Route) -> Tensor:
        return route.add(partial)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _SumShared(Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return route.add(partial)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _SumShared.apply(grads[0], ctx.route), None


def sum_ranks(partial: Tensor, route: Route) -> Tensor:
    """Sum over ranks a result that leaves the model: all-reduce forward, identity backward."""
    return _SumRanks.apply(partial, route)


def sum_shared(partial: Tensor, route: Route) -> Tensor:
    """Sum over ranks what every rank feeds back into its atoms: all-reduce forward and backward."""
    return _SumShared.apply(partial, route)
