"""Generate the silver data set, labelled by ASE's effective-medium potential (EMT).

``python -m gnnmd.data.silver.generate --out DIR`` writes train, val and test.extxyz.xz (eV, eV/A, eV/A^3) in
about five minutes on one core. Every trajectory has its own random stream, seeded by (seed, split,
trajectory), so the splits share no trajectory and a run is reproducible for fixed versions of ase and numpy.
"""

import argparse
import lzma
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary

A0 = 4.06355  # lattice constant of EMT's fcc silver at 0 K, Angstrom
ALPHA = 2.0e-5  # linear expansion that places the start cell at a temperature, 1/K
LIQUID_A = 4.30  # lattice constant of the crystal that is melted, at every temperature
LIQUID_RANGE = (4.20, 4.65)  # of its uniform distribution in strained liquids
#: Per kind of start, K: 3x3x2 conventional cells minus one atom; 3x3x3; 3x3x3, melted.
TEMPERATURES = {
    "vac71": (300.0, 600.0, 900.0, 1200.0, 1500.0),
    "fcc108": (300.0, 600.0, 900.0, 1200.0, 1500.0),
    "liquid108": (1400.0, 1800.0, 2600.0, 4000.0, 8000.0),
}
STRAIN = 0.03  # half-width of the uniform distribution of each strain component
TIME_STEP = 5.0  # fs
FRICTION = 0.02  # 1/fs
MELTING = 400  # steps at MELTING_TEMPERATURE before a liquid is equilibrated (2 ps)
MELTING_TEMPERATURE = 4000.0  # K
EQUILIBRATION = 200  # steps before the first frame (1 ps)
STRIDE = 40  # steps between frames (0.2 ps)
DECIMALS = 8  # of positions and cell in the file; labels belong to the rounded values
#: Per split: strain variants of each (cell, temperature), 0 = unstrained; frames per trajectory.
SPLITS = {"train": ((0, 1, 2), 6), "val": ((1,), 2), "test": ((0, 1), 2)}
SEED = 20240


def start_cell(kind: str, temperature: float, rng: np.random.Generator, *, strained: bool) -> Atoms:
    """Return the crystal a trajectory starts from (or melts), expanded and perhaps strained."""
    if kind == "liquid108":
        a = rng.uniform(*LIQUID_RANGE) if strained else LIQUID_A
        return bulk("Ag", "fcc", a=a, cubic=True) * 3
    atoms = bulk("Ag", "fcc", a=A0 * (1.0 + ALPHA * temperature), cubic=True)
    atoms *= (3, 3, 2) if kind == "vac71" else (3, 3, 3)
    if kind == "vac71":
        del atoms[int(rng.integers(len(atoms)))]
    if strained:
        strain = rng.uniform(-STRAIN, STRAIN, (3, 3))
        strain = 0.5 * (strain + strain.T)
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    return atoms


def labelled(atoms: Atoms) -> Atoms:
    """Return a copy, rounded as the file rounds it, that carries EMT's energy, forces and stress."""
    frame = atoms.copy()
    frame.arrays.pop("momenta", None)
    frame.positions = np.round(frame.positions, DECIMALS)
    frame.cell = np.round(frame.cell.array, DECIMALS)
    frame.calc = EMT()
    energy, forces, stress = frame.get_potential_energy(), frame.get_forces(), frame.get_stress()
    frame.calc = SinglePointCalculator(frame, energy=energy, forces=forces, stress=stress)
    return frame


def trajectory(
    kind: str, temperature: float, variant: int, n_frames: int, seed: Sequence[int]
) -> list[Atoms]:
    """Return ``n_frames`` labelled frames of one Langevin trajectory."""
    rng = np.random.default_rng(seed)
    atoms = start_cell(kind, temperature, rng, strained=variant > 0)
    atoms.calc = EMT()
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)
    Stationary(atoms)
    dynamics = Langevin(
        atoms, TIME_STEP * units.fs, temperature_K=temperature, friction=FRICTION / units.fs, rng=rng
    )
    if kind == "liquid108":
        dynamics.set_temperature(temperature_K=MELTING_TEMPERATURE)
        dynamics.run(MELTING)
        dynamics.set_temperature(temperature_K=temperature)
    dynamics.run(EQUILIBRATION)
    frames = [labelled(atoms)]
    for _ in range(n_frames - 1):
        dynamics.run(STRIDE)
        frames.append(labelled(atoms))
    return frames


def split_frames(split: str, seed: int = SEED) -> list[Atoms]:
    """Return all frames of one split in the order of the file; ``info["traj"]`` names their trajectory."""
    variants, n_frames = SPLITS[split]
    kinds = TEMPERATURES.items()
    runs = [(kind, temperature, v) for kind, values in kinds for temperature in values for v in variants]
    frames = []
    for i, (kind, temperature, variant) in enumerate(runs):
        for frame in trajectory(kind, temperature, variant, n_frames, [seed, list(SPLITS).index(split), i]):
            frame.info.update(config=kind, T=temperature, strained=int(variant > 0), traj=f"{split}-{i}")
            frames.append(frame)
    return frames


def main(argv: Sequence[str] | None = None) -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(), help="directory for the three files")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        frames = split_frames(split, args.seed)
        with lzma.open(args.out / f"{split}.extxyz.xz", "wt", preset=9 | lzma.PRESET_EXTREME) as file:
            write(file, frames, format="extxyz")
        print(f"{split}: {len(frames)} frames, {sum(map(len, frames))} atoms", flush=True)


if __name__ == "__main__":
    main()
