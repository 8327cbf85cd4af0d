"""DeePMD npy systems: one directory of arrays per composition.

The layout (deepmd-kit documentation, "Data conversion"): ``type.raw`` holds the type of each atom,
``type_map.raw`` the element of each type, ``set.*/{coord,box,energy,force,virial}.npy`` one row per frame in
A, eV and eV/A. A file ``nopbc`` means open boundaries. In mixed_type systems ``set.*/real_atom_types.npy``
gives the types per frame, -1 for padding.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_numbers
from ase.stress import full_3x3_to_voigt_6_stress


def read_system(system: Path, type_map: Sequence[str] | None = None) -> Iterator[tuple[str, Atoms]]:
    """Yield (file and frame, Atoms with labels) of one system directory, sets in alphabetical order.

    Args:
        system: directory that holds ``type.raw``.
        type_map: element of each type, used where the directory has no ``type_map.raw``.

    Raises:
        ValueError: files that do not fit together, with the file and what was expected.
    """
    types = _types(system / "type.raw")  # [n]
    elements = _elements(system, type_map)
    periodic = not (system / "nopbc").exists()
    sets = sorted(folder for folder in system.glob("set.*") if folder.is_dir())
    if not sets:
        raise ValueError(
            f"{system}: no set.* directory. A DeePMD system needs at least one, with coord.npy in it."
        )
    for folder in sets:
        yield from _read_set(folder, types, elements, periodic)


def _read_set(
    folder: Path, types: np.ndarray, elements: list[str], periodic: bool
) -> Iterator[tuple[str, Atoms]]:
    n = len(types)
    coord = _load(folder / "coord.npy", None, 3 * n)
    count = len(coord)
    box = _load(folder / "box.npy", count, 9) if periodic else None
    energy = _load_if_there(folder / "energy.npy", count, 1)
    force = _load_if_there(folder / "force.npy", count, 3 * n)
    virial = _load_if_there(folder / "virial.npy", count, 9)
    mixed = _load_if_there(folder / "real_atom_types.npy", count, n)
    for k in range(count):
        where = f"{folder}, frame {k}"
        kinds = types if mixed is None else mixed[k].astype(int)
        real = kinds >= 0  # padding of mixed_type frames is -1
        atoms = Atoms(
            numbers=_numbers(kinds[real], elements, where),
            positions=coord[k].reshape(n, 3)[real],
            cell=None if box is None else box[k].reshape(3, 3),
            pbc=periodic,
        )
        labels: dict[str, float | np.ndarray] = {}
        if energy is not None:
            labels["energy"] = float(energy[k, 0])
        if force is not None:
            labels["forces"] = force[k].reshape(n, 3)[real]
        if virial is not None and atoms.cell.rank == 3:
            # virial = -dE/dstrain (eV), stress = dE/dstrain / V
            labels["stress"] = full_3x3_to_voigt_6_stress(-virial[k].reshape(3, 3) / atoms.get_volume())
        atoms.calc = SinglePointCalculator(atoms, **labels)
        yield where, atoms


def _types(file: Path) -> np.ndarray:
    words = file.read_text().split()
    try:
        types = np.array(words, dtype=int)
    except ValueError as error:
        raise ValueError(f"{file}: {error}. Every entry must be the integer type of an atom.") from None
    if not len(types):
        raise ValueError(f"{file}: the file is empty. It must hold the integer type of every atom.")
    return types


def _load_if_there(file: Path, frames: int, width: int) -> np.ndarray | None:
    return _load(file, frames, width) if file.exists() else None


def _load(file: Path, frames: int | None, width: int) -> np.ndarray:
    """Return the array as float64 ``[frames, width]``; None takes the number of frames from the file."""
    if not file.exists():
        raise ValueError(
            f"{file}: no such file. Every set needs coord.npy, and box.npy unless the system directory holds "
            "a file named nopbc (open boundaries)."
        )
    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{file}: could not be read as a numpy array ({error}). Write it again with np.save."
        ) from error
    rows = array.shape[0] if frames is None and array.ndim else frames
    if rows is None or array.size != rows * width or array.shape[0] != rows:
        raise ValueError(
            f"{file}: shape {array.shape}, expected ({'frames' if rows is None else rows}, {width}). Frames "
            "and atoms must agree with coord.npy and type.raw."
        )
    return array.reshape(rows, width).astype(np.float64)


def _elements(system: Path, type_map: Sequence[str] | None) -> list[str]:
    file = system / "type_map.raw"
    if file.exists():
        return file.read_text().split()
    if type_map is None:
        raise ValueError(
            f"{system}: no type_map.raw, so the elements of the types in type.raw are unknown. Pass "
            "type_map, "
            'for example type_map=["O", "H"], or write that file.'
        )
    return list(type_map)


def _numbers(kinds: np.ndarray, elements: list[str], where: str) -> np.ndarray:
    above = np.flatnonzero(kinds >= len(elements))
    if len(above):
        i = above[0]
        raise ValueError(
            f"{where}: atom {i} has type {kinds[i]}, but the type map ({' '.join(elements)}) ends at "
            f"{len(elements) - 1}. Add the missing elements to type_map.raw."
        )
    numbers = np.array([atomic_numbers.get(name, 0) for name in elements])[kinds]
    unknown = np.flatnonzero(numbers == 0)
    if len(unknown):
        i = unknown[0]
        raise ValueError(
            f"{where}: atom {i} has the unknown element '{elements[kinds[i]]}' (type {kinds[i]} of the type "
            "map). Use chemical symbols in type_map.raw."
        )
    return numbers
