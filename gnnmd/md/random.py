"""Random numbers that depend on what they are for, not on who draws them or when.

A counter-based generator: the numbers of an atom at a step are a function of (seed, step, stream, atom), so a
trajectory is the same on any number of ranks, after any migration, and when steps are repeated.
"""

import math

import torch
from torch import Tensor

#: What numbers are used for; no two uses share numbers.
VELOCITIES, LANGEVIN, THERMOSTAT, BAROSTAT = range(4)

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
#: Candidates of which a gamma variate takes the first good one: all are bad once in 1e20 times.
_TRIES = 16


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Return four random 32-bit words per counter (Philox 4x32-10, Salmon et al., SC'11).

    Args:
        counter: four int64 tensors of the same shape with values below 2^32.
        seed: 64 bits, the key.

    Returns:
        Four int64 tensors with values below 2^32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply(c0, _MULTIPLIERS[0]), _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
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


def gamma(seed: int, step: int, stream: int, shape: float, device: torch.device) -> Tensor:
    """Return one gamma variate of unit scale and ``shape`` >= 1; never waits for the device.

    Marsaglia and Tsang, ACM Trans. Math. Softw. 26 (2000) 363. Half the sum of k squared standard normals is
    a gamma variate of shape k/2.

    Raises:
        ValueError: shape < 1.
    """
    if shape < 1:
        raise ValueError(f"gamma variates are drawn for shapes of at least 1, got {shape}")
    ids = torch.arange(_TRIES, device=device)
    x = normals(seed, step, stream, ids)[:, 0]
    u = uniforms(seed, step, stream, ids + _TRIES)[0]
    d = shape - 1 / 3
    v = (1 + x / math.sqrt(9 * d)) ** 3
    good = (v > 0) & (torch.log(u) < 0.5 * x**2 + d - d * v + d * torch.log(v.clamp(min=1e-300)))
    return d * v[torch.argmax(good.to(torch.int8))]
