"""The graph-parallel context: the only thing a model is told about other ranks.

Model code is bipartite message passing (owned + ghost atoms in, owned atoms out) and calls three operators. On one
rank each of them is the identity, so the same model code runs on one device and on many.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GPContext:
    """Plain data describing this rank's share of one partitioned graph; built outside the model and passed in.

    Attributes:
        n_owned: number of atoms this rank owns; rows ``[:n_owned]`` of every per-atom tensor.
        n_ghost: number of copies of other ranks' atoms that this rank's edges read; rows ``[n_owned:]``.
    """

    n_owned: int
    n_ghost: int = 0

    @classmethod
    def single(cls, n_atoms: int) -> "GPContext":
        """Return the context of one rank that owns every atom."""
        return cls(n_owned=n_atoms)

    def exchange(self, owned: Tensor) -> Tensor:
        """Append the ghosts' rows: ``[n_owned, ...] -> [n_owned + n_ghost, ...]``.

        The backward pass is the transpose: gradients of ghost rows return to their owner and are added there.
        """
        return owned

    def sum_ranks(self, partial: Tensor) -> Tensor:
        """Sum over ranks a result that leaves the model (energy, stress, a loss).

        All-reduce forward, identity backward: the cotangent of such a result is already the same on every rank.
        """
        return partial

    def sum_shared(self, partial: Tensor) -> Tensor:
        """Sum over ranks a quantity that every rank feeds back into its own atoms (channel balancing, routing).

        All-reduce forward and all-reduce backward: each rank's energy depends on the sum, so the cotangents of all
        ranks add.
        """
        return partial
