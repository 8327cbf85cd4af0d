"""The environment matrix of the DeePMD family: what an atom sees of a neighbour, normalised by its type."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gnnmd.nn.float64 import Float64Buffers

#: Smallest standard deviation that statistics give, and the one of types that do not occur.
SMALLEST_STD = 1e-2
ABSENT_STD = 0.1


class Environment(Float64Buffers):
    """R_ij = (s(r) [1 / (r + p), r_ij / (r + p)^2] - mean) / std, by the type of the centre i.

    From DPA-2 (arXiv 2312.15492); computed in float64, because the vectors are exact.

    Args:
        n_types: number of types T.
        protection: p, Angstrom.
        std: first value of every standard deviation.

    Attributes:
        mean: ``[T, 4]`` float64 of the radial and the three angular components.
        std: ``[T, 4]`` float64.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, n_types: int, protection: float = 0.0, std: float = 1.0):
        super().__init__()
        self.protection = protection
        self.register_buffer("mean", torch.zeros(n_types, 4, dtype=torch.float64))
        self.register_buffer("std", torch.full((n_types, 4), std, dtype=torch.float64))

    def forward(self, vector: Tensor, distance: Tensor, switch: Tensor, centre_type: Tensor) -> Tensor:
        """Return ``[E, 4]`` float64: the radial and the three angular components, normalised.

        Args:
            vector: ``[E, 3]`` float64 r_ij, Angstrom.
            distance: ``[E]`` its length.
            switch: ``[E]`` s(r), 0 for edges that do not count.
            centre_type: ``[E]`` type of the atom i.
        """
        raw = self.raw(vector, distance, switch)
        return (raw - self.mean.index_select(0, centre_type)) / self.std.index_select(0, centre_type)

    def raw(self, vector: Tensor, distance: Tensor, switch: Tensor) -> Tensor:
        """Return the same ``[E, 4]`` before it is normalised."""
        inverse = 1 / (distance + self.protection)
        radial = switch * inverse
        return torch.cat([radial[:, None], (radial * inverse)[:, None] * vector], dim=1)

    def copy_types(self, other: "Environment", mine: Sequence[int], theirs: Sequence[int]) -> None:
        """Normalise types ``mine`` as another environment does its types ``theirs``."""
        for own, source in ((self.mean, other.mean), (self.std, other.std)):
            own[list(mine)] = source[list(theirs)]

    def sums(self, raw: Tensor, centre_type: Tensor, owned_type: Tensor, slots: int) -> Tensor:
        """Return the sums for `set_statistics` over some atoms; they add over batches and ranks.

        Args:
            raw: ``[E, 4]`` of `raw`, all edges of the atoms.
            centre_type: ``[E]`` type of the atom i.
            owned_type: ``[n]`` types of the atoms.
            slots: neighbours an atom has room for; those it does not have count as zero.

        Returns:
            ``[T, 5]`` float64: slots of all atoms of a type, the sum of radial components, the sum of their
            squares, the same two sums of all angular components.
        """
        raw, zeros = raw.detach(), raw.new_zeros(len(self.mean))
        counts = zeros.index_add(0, owned_type, raw.new_ones(len(owned_type)))
        columns = [f(part).sum(1) for part in (raw[:, :1], raw[:, 1:]) for f in (torch.clone, torch.square)]
        values = [zeros.index_add(0, centre_type, x) for x in columns]
        return torch.stack([slots * counts, *values], dim=1)

    @torch.no_grad()
    def set_statistics(self, sums: Tensor, *, keep_mean_zero: bool = True) -> None:
        """Set mean and standard deviation per type from `sums` ``[T, 5]`` over data.

        As deepmd-kit does: one scalar serves the three angular components, whose mean enters it although it
        is taken as zero afterwards. Deviations are at least `SMALLEST_STD`; a type that does not occur has
        `ABSENT_STD`.

        Args:
            sums: over all data.
            keep_mean_zero: whether the radial mean is left at zero (it enters the deviation all the same).
        """
        slots = sums[:, 0]
        n = slots.clamp(min=1)[:, None] * torch.tensor([1.0, 3.0]).to(sums)  # [T, 2]
        means = sums[:, [1, 3]] / n
        variances = sums[:, [2, 4]] / n - means.square()
        std = variances.clamp(min=0).sqrt().clamp(min=SMALLEST_STD)  # [T, 2]
        std = torch.where(slots[:, None] > 0, std, ABSENT_STD)
        self.std.copy_(std[:, [0, 1, 1, 1]])
        self.mean.zero_()
        if not keep_mean_zero:
            self.mean[:, 0] = means[:, 0]
