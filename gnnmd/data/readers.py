"""Files to ASE Atoms with checked labels; README.md lists the formats."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from io import StringIO
from itertools import count, islice
from pathlib import Path
from typing import Any

import ase.db
import ase.io
from ase import Atoms
from ase.io.formats import UnknownFileTypeError, filetype, open_with_compression

from gnnmd.data.checks import checked_frame
from gnnmd.data.deepmd import read_system
from gnnmd.graph import LabelKeys

PathLike = str | os.PathLike[str]
Located = tuple[str, Atoms]  # (file and frame, for messages; the frame)

DATABASES = (".db", ".aselmdb")
_INDEX = re.compile(r"@(-?\d+|(-?\d*:-?\d*(:-?\d+)?))$")


def read_frames(
    path: PathLike | Sequence[PathLike],
    *,
    keys: LabelKeys | None = None,
    dataset: str = "",
    type_map: Sequence[str] | None = None,
    labelled: bool = False,
) -> list[Atoms]:
    """Read and check every frame of one or several files or directories.

    Args:
        path: a file ASE reads, an ASE database, a DeePMD system, a directory of such systems or of .aselmdb
            files; or a glob pattern or a list of these. ``path@index`` selects frames as a Python index or
            slice: ``a.xyz@:100``.
        keys: names of the labels in files that name them (DeePMD systems do not).
        dataset: data set name (level of theory) of every frame; "" keeps what the file says.
        type_map: element of each type for DeePMD systems without type_map.raw.
        labelled: refuse frames without any label.

    Returns:
        Frames whose labels (eV, eV/A, eV/A^3) sit in a `SinglePointCalculator` under ASE's names, whatever
        ``keys`` said; labels the file lacks are missing there. ``info`` holds charge, spin and dataset where
        they are given.

    Raises:
        FileNotFoundError: a path or pattern that matches nothing.
        ValueError: an unreadable or unphysical frame, with file, frame and what to do.
    """
    keys = keys or LabelKeys()
    paths = _listed(path)
    frames: list[Atoms] = []
    for source, index in (found for one in paths for found in _sources(os.fspath(one))):
        # DeePMD's labels have fixed file names; its reader has put them under ASE's names already.
        source_keys = LabelKeys() if source.is_dir() else keys
        before = len(frames)
        for where, atoms in _select(_read(source, type_map), index):
            if dataset:
                atoms.info["dataset"] = dataset
            frames.append(checked_frame(atoms, where, source_keys, labelled=labelled))
        if len(frames) == before:
            raise ValueError(
                f"{source}{index}: no frames. Check that the file is complete and the index inside it."
            )
    return frames


def read_sources(path: PathLike | Sequence[PathLike], **options: Any) -> tuple[list[Atoms], list[str]]:
    """Read frames as `read_frames` does, and name the data set that each is of.

    Frames that name several levels of theory are told apart by these, others by the entry of the list
    ``path`` that they come from (a pattern or a directory is one entry, of whatever number of files), without
    the folders that all entries share.
    """
    entries = [os.fspath(entry) for entry in _listed(path)]
    frames: list[Atoms] = []
    sources: list[str] = []
    for entry, name in zip(entries, _distinct(entries), strict=True):
        frames += read_frames(entry, **options)
        sources += [name] * (len(frames) - len(sources))
    levels = [str(atoms.info.get("dataset", "")) for atoms in frames]
    if len(set(levels) - {""}) > 1:
        sources = [level or source for level, source in zip(levels, sources, strict=True)]
    return frames, sources


def _distinct(entries: Sequence[str]) -> list[str]:
    parts = [Path(entry).parts for entry in entries]
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    return ["/".join(p) for p in parts]


def check_exist(path: PathLike | Sequence[PathLike]) -> None:
    """Look for files without reading them; arguments and errors as in `read_frames`."""
    for one in _listed(path):
        _sources(os.fspath(one))


def _listed(path: PathLike | Sequence[PathLike]) -> list[PathLike]:
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    if not paths:
        raise ValueError("read_frames got an empty list of paths; name at least one file")
    return paths


def _sources(path: str) -> list[tuple[Path, str]]:
    """Resolve index, pattern and directories to files or DeePMD systems, each with its index ("" = all)."""
    match = None if os.path.exists(path) else _INDEX.search(path)
    index = match.group(0) if match else ""
    name = os.path.expanduser(path.removesuffix(index))
    names = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
    if not names:
        raise FileNotFoundError(
            f"{path}: no such file or directory (looked in {os.getcwd()}). Check the path; patterns may use "
            "* ? [] **."
        )
    return [(source, index) for name in names for source in _members(Path(name))]


def _members(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    members = sorted(file.parent for file in path.rglob("type.raw")) or sorted(path.rglob("*.aselmdb"))
    if not members:
        raise ValueError(
            f"{path}: this directory holds neither a DeePMD system (type.raw) nor .aselmdb files, at any "
            f"depth. Name the files themselves, for example {path}/*.extxyz."
        )
    return members


def _select(frames: Iterator[Located], index: str) -> Iterator[Located]:
    """Apply ``@index``; frames keep the numbers they have in the file."""
    if not index:
        return frames
    numbers = [int(part) if part else None for part in index[1:].split(":")]
    if ":" not in index:
        first = numbers[0] or 0
        numbers = [first, first + 1 or None]
    if all(number is None or number >= 0 for number in numbers):
        return islice(frames, *numbers)  # stops reading early
    return iter(list(frames)[slice(*numbers)])


def _read(source: Path, type_map: Sequence[str] | None) -> Iterator[Located]:
    if source.is_dir():
        return read_system(source, type_map)
    if not source.stat().st_size:
        raise ValueError(f"{source}: the file is empty. Write it again, or take it off the list.")
    if source.suffix in DATABASES:
        return _read_database(source)
    try:
        file_format = filetype(str(source))
    except UnknownFileTypeError as error:
        raise ValueError(f"{source}: not a format that ASE knows ({error}). Convert it to extxyz.") from error
    return _read_extxyz(source) if file_format == "extxyz" else _read_ase(source, file_format)


def _read_extxyz(source: Path) -> Iterator[Located]:
    """Hand ASE one frame at a time: nothing is scanned twice, and an error knows its frame.

    ASE itself stops at the first empty line and drops what follows without a word.
    """
    with open_with_compression(str(source), "rt") as file:
        for number in count():
            where = f"{source}, frame {number}"
            header = file.readline()
            if not header.strip():
                if file.read().strip():
                    raise ValueError(
                        f"{where}: an empty line where the number of atoms belongs. Remove the line."
                    )
                return
            try:
                lines = [header, *(file.readline() for _ in range(int(header) + 1))]
                (atoms,) = ase.io.iread(StringIO("".join(lines)), ":", format="extxyz")
            except Exception as error:  # whatever ASE's parser meets: the reader adds file and frame
                raise ValueError(_unreadable(where, error)) from error
            yield where, atoms


def _read_ase(source: Path, file_format: str) -> Iterator[Located]:
    number = 0
    try:
        for number, atoms in enumerate(ase.io.iread(str(source), ":", format=file_format)):
            yield f"{source}, frame {number}", atoms
    except Exception as error:  # as above
        raise ValueError(_unreadable(f"{source}, at or after frame {number}", error)) from error


def _read_database(source: Path) -> Iterator[Located]:
    options = {"readonly": True} if source.suffix == ".aselmdb" else {}
    with ase.db.connect(source, **options) as database:
        for number, row in enumerate(database.select()):
            atoms = row.toatoms()
            atoms.info = {**row.key_value_pairs, **row.data}  # charge and spin, and labels under other keys
            yield f"{source}, frame {number} (id {row.id})", atoms


def _unreadable(where: str, error: Exception) -> str:
    return f"{where}: ASE could not read it ({type(error).__name__}: {error}). Correct or remove the frame."
