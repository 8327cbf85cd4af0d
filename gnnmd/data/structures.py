"""Structures that users name on a command line."""

from pathlib import Path

from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers
from ase.io import iread

#: Copies of the cubic cell of a crystal that is given by its symbol.
CRYSTAL_REPEAT = (4, 4, 4)


def read_structure(structure: str, repeat: tuple[int, int, int] | None = None) -> Atoms:
    """Return the last frame of a file that ASE reads, or the cubic crystal of an element.

    Args:
        structure: a file, or a chemical symbol.
        repeat: copies along each lattice vector; None is 4 4 4 for a symbol and 1 1 1 for a file.

    Raises:
        FileNotFoundError: neither a file nor the symbol of an element.
        ValueError: a file without atoms that ASE can read, or copies that are not three positive numbers.
    """
    if repeat is not None and (len(repeat) != 3 or min(repeat) < 1):
        raise ValueError(f"repeat must be three positive integers, e.g. 4 4 4; got {repeat}")
    if Path(structure).is_file():
        try:
            atoms, repeat = next(iread(structure, index=-1)), repeat or (1, 1, 1)
        except Exception as error:  # ASE raises whatever its many readers raise
            raise ValueError(f"ASE cannot read a structure from {structure}: {error!r}") from error
    elif structure in atomic_numbers and structure != "X":
        atoms, repeat = bulk(structure, cubic=True), repeat or CRYSTAL_REPEAT
    else:
        raise FileNotFoundError(
            f"structure={structure!r} is neither a file (seen from {Path.cwd()}) nor a chemical symbol"
        )
    return atoms.repeat(repeat)
