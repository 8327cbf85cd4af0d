"""Cells that change: in which ways they may, and how atoms follow."""

import torch
from torch import Tensor

from gnnmd.md.engine import Engine
from gnnmd.md.integrators import Ramp
from gnnmd.md.state import State

#: Ways in which a cell may change, with their number: the volume only; lengths along x, y and z; everything
#: but rotation.
WAYS = {"isotropic": 1, "anisotropic": 3, "flexible": 6}

#: `exponential` halves its argument this often, and takes this many terms.
_HALVINGS, _TERMS = 4, 8
#: Iterations for a rotation: errors of 0.1, 5e-3, 1e-5, 1e-10, 1e-20.
_NEWTON = 6


def identity(like: Tensor) -> Tensor:
    """Return the ``[3, 3]`` identity, made on the device."""
    return torch.eye(3, dtype=like.dtype, device=like.device)


def project(m: Tensor, cell: str) -> Tensor:
    """Return the part of a ``[3, 3]`` strain, stress or rate that a cell may follow, symmetric.

    Args:
        m: any matrix.
        cell: one of `WAYS`.
    """
    if cell == "isotropic":
        return identity(m) * (torch.trace(m) / 3)
    if cell == "anisotropic":
        return torch.diag(torch.diagonal(m))
    return (m + m.T) / 2


def squares(m: Tensor, cell: str) -> Tensor:
    """Return the squares of the independent parts of a matrix as `project` returns it; they add up to all.

    Args:
        m: ``[3, 3]``.
        cell: one of `WAYS`, which gives their number.
    """
    diagonal = torch.diagonal(m).square()
    if cell == "isotropic":
        return diagonal.sum()[None]
    if cell == "anisotropic":
        return diagonal
    return torch.cat((diagonal, 2 * torch.stack((m[0, 1], m[0, 2], m[1, 2])).square()))


def spread(factors: Tensor, cell: str) -> Tensor:
    """Return by what to multiply a matrix so that its independent parts (see `squares`) get these factors."""
    if cell == "isotropic":
        return factors
    if cell == "anisotropic":
        return torch.diag(factors)
    xx, yy, zz, xy, xz, yz = factors.unbind()
    return torch.stack((xx, xy, xz, xy, yy, yz, xz, yz, zz)).view(3, 3)


def exponential(m: Tensor) -> Tensor:
    """Return the exponential of a ``[3, 3]`` matrix with entries below 1; never waits for the device."""
    one = identity(m)
    m = m / 2**_HALVINGS
    result = one
    for k in range(_TERMS, 0, -1):
        result = one + m @ result / k
    for _ in range(_HALVINGS):
        result = result @ result
    return result


def deform(s: State, strain: Tensor) -> None:
    """Multiply cell and positions by the exponential of a symmetric ``[3, 3]`` strain."""
    change = exponential(strain)
    s.positions, s.cell = s.positions @ change, s.cell @ change


def turn_back(s: State) -> None:
    """Turn cell, positions, velocities and strain rate so that the strain since the first cell is symmetric.

    Symmetric strains in turn add up to a rotation: 0.01 in 3 ps of 32 atoms at 300 K. The rotation is the
    orthogonal factor of the deformation, found by Newton's iteration (Higham, SIAM J. Sci. Stat. Comput. 7
    (1986) 1160).
    """
    rotation = torch.linalg.inv_ex(s.variables["first cell"])[0] @ s.cell
    for _ in range(_NEWTON):
        rotation = (rotation + torch.linalg.inv_ex(rotation)[0].T) / 2
    back = rotation.T
    s.cell, s.positions, s.velocities = s.cell @ back, s.positions @ back, s.velocities @ back
    if "strain rate" in s.variables:
        rate = rotation @ s.variables["strain rate"] @ back
        s.variables["strain rate"] = (rate + rate.T) / 2  # thermostats would let the rounding grow


def check_way(cell: str, pressure: float | Ramp) -> None:
    """Refuse unknown ways to change a cell, and pressures that are not numbers.

    Raises:
        ValueError: with the value.
    """
    if cell not in WAYS:
        raise ValueError(f"cell={cell!r} is not known; choose one of {list(WAYS)}")
    ends = (pressure.start, pressure.end) if isinstance(pressure, Ramp) else (pressure,)
    if not all(abs(p) < float("inf") for p in ends):
        raise ValueError(f"pressure must be a finite number of GPa, got {pressure}")


def check_can_change(s: State, engine: Engine, who: str) -> None:
    """Refuse systems whose cell cannot change.

    Raises:
        ValueError: a direction is not periodic, atoms are held fixed, or the potential has no stress.
    """
    if not bool(s.pbc.all()):
        raise ValueError(
            f"{who} changes the cell, which must be periodic in all directions, but pbc is {s.pbc.tolist()}; "
            "use an ensemble of constant volume"
        )
    if engine.n_mobile < engine.n_atoms:
        raise ValueError(
            f"{who} changes the cell and all positions with it, but {engine.n_atoms - engine.n_mobile} atoms "
            "are held fixed; remove the constraint or use an ensemble of constant volume"
        )
    if not engine.potential.has_stress:
        raise ValueError(
            f"{who} needs the stress, which this potential does not give: it predicts forces only"
        )
