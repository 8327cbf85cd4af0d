"""Random numbers that depend on what they are for, not on who draws them or when.

A counter-based generator: the numbers of an atom at a step are a function of (seed, step, stream, atom), so a
trajectory is the same on any number of ranks, after any migration, and when steps are repeated.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor

_Word = TypeVar("_Word", int, Tensor)

#: What numbers are used for; no two uses share numbers.
VELOCITIES, LANGEVIN, THERMOSTAT, BAROSTAT = range(4)

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[_Word, _Word, _Word, _Word], seed: int) -> tuple[_Word, ...]:
    """Return four random 32-bit words per counter (Philox 4x32-10, Salmon et al., SC'11).

    Args:
        counter: four int64 tensors of the same shape with values below 2^32, or four such numbers.
        seed: 64 bits, the key.

    Returns:
        The like, below 2^32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply(c0, _MULTIPLIERS[0]), _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(x: _Word, m: int) -> tuple[_Word, _Word]:
    """Return the high and low words of a 32-bit product; int64 wraps as uint64 does."""
    product = x * m
    return product >> 32 & _MASK, product & _MASK


def uniforms(seed: int, step: int, stream: int, ids: Tensor) -> tuple[Tensor, ...]:
    """Return four columns ``[n]`` of float64 numbers in (0, 1) for each id."""
    step_word = torch.full_like(ids, step & _MASK)
    high = torch.full_like(ids, (step >> 32 & 0xFFFFFF) << 8 | stream)
    words = philox((ids & _MASK, ids >> 32 & _MASK, step_word, high), seed)
    return tuple((w.to(torch.float64) + 0.5) * 2.0**-32 for w in words)


def normals(seed: int, step: int, stream: int, ids: Tensor) -> Tensor:
    """Return standard normal numbers ``[n, 4]`` float64 for each id (Box and Muller)."""
    u0, u1, u2, u3 = uniforms(seed, step, stream, ids)
    r, s = torch.sqrt(-2 * torch.log(u0)), torch.sqrt(-2 * torch.log(u2))
    a, b = 2 * math.pi * u1, 2 * math.pi * u3
    return torch.stack((r * torch.cos(a), r * torch.sin(a), s * torch.cos(b), s * torch.sin(b)), 1)


class Numbers:
    """Random numbers for what is the same on every rank (a thermostat), drawn on the host one by one.

    Whoever makes them for the same purpose draws the same; a device would need 150 kernels for each.

    Args:
        seed: the key.
        step: of the simulation.
        stream: what they are for.
    """

    def __init__(self, seed: int, step: int, stream: int) -> None:
        self._seed, self._step, self._high = seed, step & _MASK, (step >> 32 & 0xFFFFFF) << 8 | stream
        self._drawn = 0

    def uniforms(self) -> tuple[float, ...]:
        """Return four numbers in (0, 1)."""
        self._drawn += 1
        words = philox((self._drawn, 0, self._step, self._high), self._seed)
        return tuple((w + 0.5) * 2.0**-32 for w in words)

    def normals(self) -> tuple[float, float]:
        """Return two standard normal numbers (Box and Muller)."""
        u = self.uniforms()
        r, a = math.sqrt(-2 * math.log(u[0])), 2 * math.pi * u[1]
        return r * math.cos(a), r * math.sin(a)

    def gamma(self, shape: float) -> float:
        """Return a gamma variate of unit scale and ``shape`` >= 1.

        Marsaglia and Tsang, ACM Trans. Math. Softw. 26 (2000) 363. Half the sum of k squared standard normals
        is a gamma variate of shape k/2.

        Raises:
            ValueError: shape < 1.
        """
        if shape < 1:
            raise ValueError(f"gamma variates are drawn for shapes of at least 1, got {shape}")
        d = shape - 1 / 3
        while True:
            x, u = self.normals()[0], self.uniforms()[0]
            v = (1 + x / math.sqrt(9 * d)) ** 3
            if v > 0 and math.log(u) < 0.5 * x**2 + d - d * v + d * math.log(v):
                return d * v
