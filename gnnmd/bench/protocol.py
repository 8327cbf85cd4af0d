"""Structures, clock and memory that timings of gnnmd and of its peers share; needs ase and numpy only.

The scripts in ``peers`` run in environments without gnnmd and import this file as it lies here.
"""

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule

LATTICE = 4.09  # fcc silver, Angstrom
RATTLE = 0.1  # Angstrom
JITTER = 0.01  # positions differ in every call, so that nothing can be reused
BOX_OF_A_MOLECULE = 3.104  # Angstrom; 1 g/cm^3 of water


def silver(n_atoms: int) -> Atoms:
    """Return a rattled cubic supercell of ``n_atoms`` = 4 n^3 silver atoms."""
    n = round((n_atoms / 4) ** (1 / 3))
    if 4 * n**3 != n_atoms:
        raise SystemExit(f"{n_atoms} is not 4 n^3")
    atoms = bulk("Ag", "fcc", a=LATTICE, cubic=True).repeat(n)
    atoms.positions += np.random.default_rng(17).normal(0.0, RATTLE, atoms.positions.shape)
    atoms.wrap()
    return atoms


def water(n_atoms: int) -> Atoms:
    """Return ``n_atoms`` = 3 n^3 atoms of randomly turned molecules on a grid with the density of water."""
    n = round((n_atoms / 3) ** (1 / 3))
    if 3 * n**3 != n_atoms:
        raise SystemExit(f"{n_atoms} is not 3 n^3")
    rng, atoms = np.random.default_rng(17), Atoms(pbc=True, cell=3 * [n * BOX_OF_A_MOLECULE])
    for place in np.ndindex(n, n, n):
        one = molecule("H2O")
        one.rotate(rng.uniform(0, 360), rng.normal(size=3))
        one.positions += BOX_OF_A_MOLECULE * np.array(place) + rng.normal(0.0, RATTLE, 3)
        atoms += one
    return atoms


STRUCTURES = {"silver": silver, "water": water}


def jittered(atoms: Atoms) -> Iterator[Atoms]:
    """Yield the same atoms, each time moved a little."""
    rng, start = np.random.default_rng(0), atoms.positions.copy()
    while True:
        atoms.positions = start + rng.normal(0.0, JITTER, start.shape)
        yield atoms


def milliseconds(call: Callable[[int], object], n_warmup: int, n_iters: int) -> list[float]:
    """Return the wall times of ``call(i)`` after ``n_warmup`` untimed calls."""
    for i in range(n_warmup):
        call(i)
    times = []
    for i in range(n_iters):
        began = time.perf_counter()
        call(i)
        times.append((time.perf_counter() - began) * 1e3)
    return times


def rss_mib() -> float:
    """Return the largest resident memory of this process so far (Linux: ru_maxrss is in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cpu_name() -> str:
    """Return the processor's model name."""
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def in_processes(script: Sequence[str], sizes: Sequence[object], rest: Sequence[str], threads: int) -> int:
    """Run every size in a process of its own, so that the peak memory belongs to it.

    Args:
        script: what follows the interpreter: a file, or "-m" and a module.
        sizes: values of the last argument, ``--atoms``.
        rest: arguments of all of them.
        threads: what libraries are told.

    Returns:
        0 if all of them succeed.
    """
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    code = 0
    for size in sizes:
        command = [sys.executable, *script, *rest, "--atoms", str(size)]
        code |= subprocess.run(command, env=environment, check=False).returncode
    return code
