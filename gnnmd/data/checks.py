"""What a frame must satisfy before anything is trained on it or predicted from it."""

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.geometry import complete_cell
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from scipy.spatial import cKDTree

from gnnmd.graph import LabelKeys

#: Atoms, or a cell's opposite faces, closer than this (Angstrom) are an error of the file, not physics.
CLOSEST = 0.1
LAST_ELEMENT = 118


def checked_frame(atoms: Atoms, where: str, keys: LabelKeys, *, labelled: bool = False) -> Atoms:
    """Check one frame and put its labels where everything downstream looks for them.

    Labels are moved from ``keys`` to a `SinglePointCalculator` under ASE's own names; a label that is missing
    stays missing. A stress without a cell volume has no meaning and is dropped.

    Args:
        atoms: the frame; changed in place.
        where: file and frame, the beginning of every error message.
        keys: names of the labels in ``atoms.arrays``, ``atoms.info`` or the results of ``atoms.calc``.
        labelled: refuse a frame without any label.

    Raises:
        ValueError: with file, frame, what was found and what to do.
    """
    _check_atoms(atoms, where)
    labels = _take_labels(atoms, where, keys)
    if labelled and not labels:
        raise ValueError(_no_labels(atoms, where, keys))
    if atoms.cell.rank < 3:
        labels.pop("stress", None)
    for name in ("energy", "forces", "stress"):  # of another level of theory, where keys named other labels
        atoms.info.pop(name, None)
        atoms.arrays.pop(name, None)
    atoms.calc = SinglePointCalculator(atoms, **labels) if labels else None
    return atoms


def closest_pair(
    positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, r: float
) -> tuple[int, int, float] | None:
    """Return the closest two atoms and their distance if they (or images of them) are nearer than ``r``.

    Args:
        positions: ``[N, 3]`` Angstrom.
        cell: ``[3, 3]`` Angstrom, rows are lattice vectors; rows along open directions are ignored.
        pbc: ``[3]`` bool.
        r: Angstrom, at most the distance between opposite faces of the cell (then one image per face is
            enough).
    """
    box = complete_cell(np.where(pbc[:, None], cell, 0.0))
    inverse = np.linalg.inv(box)
    fractional = positions @ inverse
    fractional -= np.floor(fractional) * pbc
    atom = np.arange(len(positions))
    for axis in np.flatnonzero(pbc):
        margin = r * np.linalg.norm(inverse[:, axis])  # r in units of the distance between the two faces
        near = np.flatnonzero(fractional[:, axis] < margin)
        images = fractional[near]
        images[:, axis] += 1.0
        fractional, atom = np.concatenate([fractional, images]), np.concatenate([atom, atom[near]])
    points = fractional @ box
    pairs = cKDTree(points).query_pairs(r, output_type="ndarray")  # [P, 2]
    if not len(pairs):
        return None
    distances = np.linalg.norm(points[pairs[:, 0]] - points[pairs[:, 1]], axis=1)
    k = int(distances.argmin())
    i, j = sorted(atom[pairs[k]].tolist())
    return i, j, float(distances[k])


def _check_atoms(atoms: Atoms, where: str) -> None:
    if not len(atoms):
        raise ValueError(f"{where}: there are no atoms in it. Remove the frame.")
    unknown = np.flatnonzero((atoms.numbers < 1) | (atoms.numbers > LAST_ELEMENT))
    if len(unknown):
        i = unknown[0]
        raise ValueError(
            f"{where}: atom {i} has the unknown element Z = {atoms.numbers[i]}; atomic numbers go from 1 (H) "
            f"to {LAST_ELEMENT} (Og). Correct the element, or remove the atom."
        )
    _check_finite("positions", atoms.positions, where)
    _check_finite("cell", atoms.cell.array, where, row="lattice vector")
    for key in ("charge", "spin"):
        _check_integer(atoms, key, where)
    periodic = atoms.cell.array[atoms.pbc]
    if len(periodic) and np.linalg.svd(periodic, compute_uv=False)[-1] < CLOSEST:
        axes = "".join("abc"[k] for k in np.flatnonzero(atoms.pbc))
        raise ValueError(
            f"{where}: periodic along {axes} but the cell is singular there (cell = "
            f"{atoms.cell.array.tolist()}). Give every periodic direction its lattice vector, or set pbc to "
            "F where there is none."
        )
    if pair := closest_pair(atoms.positions, atoms.cell.array, atoms.pbc, CLOSEST):
        i, j, distance = pair
        raise ValueError(
            f"{where}: atoms {i} and {j} are {distance:.3g} A apart (closest images; below {CLOSEST} A they "
            "count as duplicates). Remove one of them, or correct the cell and pbc."
        )


def _take_labels(atoms: Atoms, where: str, keys: LabelKeys) -> dict[str, float | np.ndarray]:
    """Remove the labels from their places and return those that are there under ASE's names."""
    labels: dict[str, float | np.ndarray] = {}
    if (energy := _take(atoms, where, "energy", keys.energy)) is not None:
        if energy.size != 1:
            raise ValueError(_shape(where, "energy", keys.energy, energy.shape, "one number per frame"))
        labels["energy"] = float(energy.reshape(()))
    if (forces := _take(atoms, where, "forces", keys.forces)) is not None:
        if forces.shape != (len(atoms), 3):
            raise ValueError(_shape(where, "forces", keys.forces, forces.shape, f"{(len(atoms), 3)}"))
        labels["forces"] = forces
    virial = _take_tensor(atoms, where, "virial", keys.virial)
    if (stress := _take_tensor(atoms, where, "stress", keys.stress)) is not None:
        labels["stress"] = stress
    elif virial is not None and atoms.cell.rank == 3:
        labels["stress"] = -virial / atoms.get_volume()
    for name, value in labels.items():
        _check_finite(name, np.asarray(value), where)
    return labels


def _take_tensor(atoms: Atoms, where: str, name: str, key: str) -> np.ndarray | None:
    """Remove a symmetric tensor of the frame and return it in Voigt order (xx yy zz yz xz xy)."""
    if (tensor := _take(atoms, where, name, key)) is None:
        return None
    if tensor.size not in (6, 9):
        raise ValueError(_shape(where, name, key, tensor.shape, "(3, 3), 9 or 6 (Voigt: xx yy zz yz xz xy)"))
    full = voigt_6_to_full_3x3_stress(tensor.ravel()) if tensor.size == 6 else tensor.reshape(3, 3)
    return full_3x3_to_voigt_6_stress(full)


def _take(atoms: Atoms, where: str, name: str, key: str) -> np.ndarray | None:
    results = getattr(atoms.calc, "results", {})
    places = [place for place in (atoms.arrays, atoms.info, results) if place.get(key) is not None]
    if not places:
        return None
    value = places[0].pop(key)
    try:
        return np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(
            f"{where}: {name} (key '{key}') is {value!r}, not a number. Correct it or remove the frame."
        ) from None


def _check_finite(name: str, values: np.ndarray, where: str, row: str = "atom") -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        what = "NaN" if np.isnan(values[tuple(bad[0])]) else "inf"
        place = f" ({row} {bad[0][0]})" if values.ndim == 2 else ""
        raise ValueError(
            f"{where}: {name} contains {what}{place}. Correct or remove the frame; a label that is unknown "
            "must be left out (it is then masked), not written as NaN."
        )


def _check_integer(atoms: Atoms, key: str, where: str) -> None:
    value = atoms.info.get(key, 0)
    try:
        whole = int(value) == value
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(
            f"{where}: {key} is {value}, expected one integer"
            f"{' (multiplicity 2S+1)' if key == 'spin' else ''}. Correct it, or remove it from the frame."
        )


def _shape(where: str, name: str, key: str, found: tuple[int, ...], expected: str) -> str:
    return (
        f"{where}: {name} (key '{key}') has shape {found}, expected {expected}. Correct the frame, or name "
        "another key."
    )


def _no_labels(atoms: Atoms, where: str, keys: LabelKeys) -> str:
    results = getattr(atoms.calc, "results", {})
    found = sorted(
        {*atoms.info, *atoms.arrays, *results} - {"numbers", "positions", "charge", "spin", "dataset"}
    )
    return (
        f"{where}: there are no labels under the keys '{keys.energy}', '{keys.forces}', '{keys.stress}' "
        f"(energy, forces, stress). It has: {', '.join(found) or 'nothing else'}. Name the keys the file "
        "uses, or remove the frame."
    )
