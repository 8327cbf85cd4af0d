"""Embedding of chemical elements as the types of the DeePMD family."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from gnnmd.nn.activations import activation
from gnnmd.nn.float64 import Float64Buffers
from gnnmd.nn.resnet_mlp import ResidualLayer

_LETTERS = "spdf"

#: Subshells in the order of the components of an electron-configuration vector.
_SHELLS = [
    f"{n}{x}" for n, letters in enumerate(("s", "sp", "spd", "spdf", "spdf", "spd", "sp"), 1) for x in letters
]

#: Ground states that do not follow the order of n + l: what differs from it.
_EXCEPTIONS = {
    24: "3d5 4s1",
    29: "3d10 4s1",
    41: "4d4 5s1",
    42: "4d5 5s1",
    44: "4d7 5s1",
    45: "4d8 5s1",
    46: "4d10 5s0",
    47: "4d10 5s1",
    57: "4f0 5d1",
    58: "4f1 5d1",
    64: "4f7 5d1",
    78: "5d9 6s1",
    79: "5d10 6s1",
    89: "5f0 6d1",
    90: "5f0 6d2",
    91: "5f2 6d1",
    92: "5f3 6d1",
    93: "5f4 6d1",
    96: "5f7 6d1",
    110: "6d9 7s1",  # as published; relativistic calculations say 6d8 7s2
    111: "6d10 7s1",  # likewise
}


def electron_configuration(number: int) -> dict[str, int]:
    """Return how many electrons each subshell of a neutral atom holds, e.g. ``{"1s": 2, "2s": 1}`` of Li."""
    left, found = number, {}
    for shell in sorted(_SHELLS, key=lambda s: (int(s[0]) + _LETTERS.index(s[1]), int(s[0]))):
        found[shell] = min(left, 2 * _orbitals(shell))
        left -= found[shell]
    for change in _EXCEPTIONS.get(number, "").split():
        found[change[:2]] = int(change[2:])
    return {shell: found[shell] for shell in _SHELLS if found[shell]}


@cache
def electron_configuration_vector(number: int) -> Tensor:
    """Return ``[118]`` float64 of length 1: + for every spin-orbital that is filled, - for the empty ones.

    Of the two slots of an orbital the second is filled first, and every orbital of a subshell holds one
    electron before any holds two (Hund).
    """
    electrons, slots = electron_configuration(number), []
    for shell in _SHELLS:
        n, k = _orbitals(shell), electrons.get(shell, 0)
        pairs = [(i < k - n, i < k) for i in range(n)]
        slots += [filled for pair in pairs for filled in pair]
    return (
        torch.tensor([1.0 if filled else -1.0 for filled in slots], dtype=torch.float64) / len(slots) ** 0.5
    )


def _orbitals(shell: str) -> int:
    return 2 * _LETTERS.index(shell[1]) + 1


class VectorEmbedding(Float64Buffers):
    """A linear map of a constant vector per kind, with the skip of a residual layer.

    The skip matters where the widths fit: four unit vectors and eight columns have it, three have not.

    Args:
        vectors: ``[T, V]`` float64, one per kind.
        channels: C.
        bias: whether the map has a bias.
    """

    vectors: Tensor

    def __init__(self, vectors: Tensor, channels: int, *, bias: bool = False):
        super().__init__()
        self.register_buffer("vectors", vectors, persistent=False)
        self.layer = ResidualLayer(vectors.shape[1], channels, activation("linear"), bias=bias)

    def table(self) -> Tensor:
        """Return the embedding of every kind, ``[T, C]``."""
        return self.layer(self.vectors.to(self.layer.linear.weight.dtype))

    def forward(self, kinds: Tensor) -> Tensor:
        """Return ``[n, C]`` of kinds ``[n]``."""
        return F.embedding(kinds, self.table())


class TypeEmbedding(VectorEmbedding):
    """Embedding of types from unit vectors or from electron configurations.

    Args:
        numbers: atomic number of each type, T of them.
        channels: C.
        electron_configurations: which vectors.
        bias: whether the map has a bias.

    Attributes:
        type_of: ``[119]`` int64 type of each atomic number; 0 for elements it does not know, which
            `Potential` refuses.
    """

    type_of: Tensor

    def __init__(
        self,
        numbers: Sequence[int],
        channels: int,
        *,
        electron_configurations: bool = False,
        bias: bool = False,
    ):
        vectors = torch.eye(len(numbers), dtype=torch.float64)
        if electron_configurations:
            vectors = torch.stack([electron_configuration_vector(z) for z in numbers])
        super().__init__(vectors, channels, bias=bias)
        self.electron_configurations = electron_configurations
        type_of = torch.zeros(119, dtype=torch.int64)
        type_of[list(numbers)] = torch.arange(len(numbers))
        self.register_buffer("type_of", type_of, persistent=False)

    @torch.no_grad()
    def copy_elements(self, other: "TypeEmbedding", mine: Sequence[int], theirs: Sequence[int]) -> None:
        """Embed types ``mine`` as another embedding embeds its types ``theirs``.

        Unit vectors have a row of weights per type, and a skip that depends on the number of types: what
        is copied is the embedding, not the weights. Electron configurations share all weights.
        """
        linear, source = self.layer.linear, other.layer.linear
        if self.electron_configurations:
            linear.load_state_dict(source.state_dict())
            return
        if linear.bias is not None:
            linear.bias.copy_(source.bias)
        rows = list(mine)
        missing = other.table()[list(theirs)] - self.table()[rows]  # [n, C]
        linear.weight[:, rows] += missing.t()

    def types(self, numbers: Tensor) -> Tensor:
        """Return the types ``[n]`` of atomic numbers ``[n]``."""
        return self.type_of.index_select(0, numbers)
