"""The ranks that share a graph, and the few collectives that building a plan needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

#: torch 2.13 renamed these two and warns about the old names.
all_gather_rows = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_rows = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class RankFailure(RuntimeError):
    """Something failed on at least one rank; raised on every rank, with the cause and the rank."""


@dataclass(frozen=True)
class Ranks:
    """Processes that share one graph.

    Attributes:
        group: their process group; None is this process alone.
    """

    group: dist.ProcessGroup | None = None

    @property
    def device(self) -> torch.device:
        """Where tensors must live that travel between the ranks."""
        if self.group is not None and "nccl" in dist.get_backend(self.group):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """This rank, 0 <= rank < size."""
        return 0 if self.group is None else self.group.rank()

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over ranks of tensors of the same shape."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        """Return the elementwise maximum over ranks."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def min(self, x: Tensor) -> Tensor:
        """Return the elementwise minimum over ranks."""
        return self._reduce(x, dist.ReduceOp.MIN)

    def _reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.group is None:
            return x
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, op, group=self.group)
        return total

    def from_first(self, value: T) -> T:
        """Return rank 0's value, an object that can be pickled, on every rank."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.group, group_src=0, device=self.device)
        return values[0]

    def send_counts(self, counts: Tensor) -> Tensor:
        """Tell every rank how many rows it will get: ``[P]`` int64 to each -> ``[P]`` from each."""
        if self.group is None:
            return counts
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts.contiguous(), group=self.group)
        return received

    def send_rows(self, columns: tuple[Tensor, ...], receiver: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Send each row to a rank; rows from one rank keep their order.

        Args:
            columns: tensors ``[n, ...]`` whose rows belong together.
            receiver: ``[n]`` int64, the rank each row goes to.

        Returns:
            The received columns ``[m, ...]``, ordered by sender, and ``[P]`` the number of rows from each
            rank.
        """
        order = torch.argsort(receiver, stable=True)
        counts = torch.bincount(receiver, minlength=self.size)
        received = self.send_counts(counts)
        if self.group is None:
            return tuple(c[order] for c in columns), received
        splits, into = counts.tolist(), received.tolist()
        arrived = []
        for column in columns:
            rows = column.new_empty(sum(into), *column.shape[1:])
            dist.all_to_all_single(rows, column[order].contiguous(), into, splits, group=self.group)
            arrived.append(rows)
        return tuple(arrived), received

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Run local work; if it raises on one rank, raise on every rank. No collective may stand inside.

        Raises:
            RankFailure: names the first rank that failed, what it was doing and why.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as e:
            error = e
        if self.group is None:
            if error is not None:
                raise error
            return
        failed = torch.tensor(self.size if error is None else self.rank, device=self.device)
        first = int(self.min(failed))
        if first == self.size:
            return
        cause = [f"{type(error).__name__}: {error}" if first == self.rank else ""]
        dist.broadcast_object_list(cause, group=self.group, group_src=first, device=self.device)
        raise RankFailure(f"rank {first} of {self.size} failed while {doing}: {cause[0]}") from error
