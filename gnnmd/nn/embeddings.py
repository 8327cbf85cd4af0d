"""Embeddings of what belongs to a whole system: charge, spin, data set."""

from collections.abc import Sequence
from math import pi

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHARGE_SPIN_EMBEDDINGS = ("rand_emb", "pos_emb", "lin_emb")

#: Range of the tables of "rand_emb"; the other kinds take any number.
CHARGE_RANGE = (-100, 100)
SPIN_RANGE = (0, 100)

#: What "lin_emb" puts in place of a spin that is not given.
UNKNOWN_SPIN = -100


class _TableEmbedding(nn.Module):
    """One row per value."""

    def __init__(self, lowest: int, highest: int, channels: int):
        super().__init__()
        self.lowest = lowest
        self.table = nn.Embedding(highest - lowest + 1, channels)

    def forward(self, value: Tensor) -> Tensor:
        return self.table(value - self.lowest)


class _WaveEmbedding(nn.Module):
    """Sines, then cosines, of random multiples of the value."""

    def __init__(self, channels: int, *, zero_is_unknown: bool):
        super().__init__()
        self.zero_is_unknown = zero_is_unknown
        self.frequency = nn.Parameter(torch.randn(channels // 2))

    def forward(self, value: Tensor) -> Tensor:
        phase = 2 * pi * value[:, None].to(self.frequency.dtype) * self.frequency
        wave = torch.cat([phase.sin(), phase.cos()], dim=1)
        return wave * (value != 0)[:, None] if self.zero_is_unknown else wave


class _LinearEmbedding(nn.Module):
    """A linear function of the value."""

    def __init__(self, channels: int, *, zero_means: int = 0):
        super().__init__()
        self.zero_means = zero_means
        self.linear = nn.Linear(1, channels)

    def forward(self, value: Tensor) -> Tensor:
        value = torch.where(value == 0, self.zero_means, value)
        return self.linear(value[:, None].to(self.linear.weight.dtype))


class SystemEmbedding(nn.Module):
    """Mixes the embeddings of charge, spin and data set into one vector per system.

    Args:
        channels: C, even.
        kind: one of `CHARGE_SPIN_EMBEDDINGS`.
        dataset_rows: row of the data-set table that each of the model's data sets reads; () = no such table.
    """

    dataset_row: Tensor

    def __init__(self, channels: int, kind: str, dataset_rows: Sequence[int] = ()):
        super().__init__()
        if kind == "rand_emb":
            self.charge: nn.Module = _TableEmbedding(*CHARGE_RANGE, channels)
            self.spin: nn.Module = _TableEmbedding(*SPIN_RANGE, channels)
        elif kind == "pos_emb":
            self.charge = _WaveEmbedding(channels, zero_is_unknown=False)
            self.spin = _WaveEmbedding(channels, zero_is_unknown=True)
        else:
            self.charge = _LinearEmbedding(channels)
            self.spin = _LinearEmbedding(channels, zero_means=UNKNOWN_SPIN)
        self.dataset = nn.Embedding(len(dataset_rows), channels) if dataset_rows else None
        self.register_buffer(
            "dataset_row", torch.tensor(list(dataset_rows), dtype=torch.int64), persistent=False
        )
        self.mix = nn.Linear((3 if dataset_rows else 2) * channels, channels)

    def freeze(self, *, charge_spin: bool, dataset: bool) -> None:
        """Keep the charge and spin embeddings, or the data-set embedding, as they are in training."""
        for module, frozen in [(self.charge, charge_spin), (self.spin, charge_spin), (self.dataset, dataset)]:
            if module is not None:
                module.requires_grad_(not frozen)

    def forward(self, charge: Tensor, spin: Tensor, dataset: Tensor) -> Tensor:
        """Return ``[B, C]`` of charges, spin multiplicities (0 = not given) and data-set indices ``[B]``."""
        parts = [self.charge(charge), self.spin(spin)]
        if self.dataset is not None:
            parts.append(self.dataset(self.dataset_row[dataset]))
        return F.silu(self.mix(torch.cat(parts, dim=1)))
