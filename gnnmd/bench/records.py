"""What every record of a measurement says besides its numbers, and the crystal that is measured."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk

from gnnmd.models.potential import Potential

LATTICE, RATTLE = 4.09, 0.1  # Angstrom


def silver(n_atoms: int, rattle: float = RATTLE, seed: int = 0) -> Atoms:
    """Return a cube of displaced fcc silver with the number 4 k^3 of atoms that is nearest.

    Args:
        n_atoms: wanted number of atoms.
        rattle: standard deviation of every coordinate, Angstrom.
        seed: of the displacements.
    """
    atoms = bulk("Ag", "fcc", a=LATTICE, cubic=True).repeat(max(1, round((n_atoms / 4) ** (1 / 3))))
    atoms.positions += np.random.default_rng(seed).normal(0, rattle, atoms.positions.shape)
    return atoms


def provenance() -> dict[str, str | None]:
    """Return commit and command of this process.

    The commit is GNNMD_COMMIT where it is set (for copies of the tree without its history), else what git
    says, with "-dirty" if files differ from it, else None.
    """
    command = " ".join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])
    return {"commit": os.environ.get("GNNMD_COMMIT") or _git_commit(), "command": command}


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:  # no git
        return None
    return answer.stdout.strip() or None


def describe(potential: Potential, device: torch.device) -> dict[str, Any]:
    """Return number of parameters and dtype of a potential, and what it runs on."""
    weights = list(potential.parameters())
    return {
        "parameters": sum(w.numel() for w in weights),
        "dtype": str(weights[0].dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def print_record(*parts: dict[str, Any]) -> None:
    """Print one JSON line; floats get six digits."""
    record = {key: value for part in parts for key, value in part.items()}
    rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in record.items()}
    print(json.dumps(rounded), flush=True)
