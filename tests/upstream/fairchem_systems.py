"""The systems of the eSCN-MD reference files, and how fairchem-core is given them."""

import os

import in_float64  # noqa: F401 (first)
import numpy as np
import torch
from ase import Atoms
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.normpath(os.path.join(HERE, "..", "golden", "fairchem"))
BASE_FILE = "conserv_l2m2_gate_spectral.npz"


def base_systems():
    """The five systems of every file: name -> positions, atomic_numbers, cell, pbc, charge, spin, dataset."""
    z = np.load(os.path.join(GOLDEN, BASE_FILE))
    out = {}
    for name in ["ag16_pbc", "nacl2_triclinic", "mol_charged", "slab_mixedpbc", "isolated_noedge"]:
        out[name] = stored_system(z, name)
    return out


def stored_system(z, name):
    """One system of a reference file, as in `base_systems`."""
    p = f"sys/{name}/"
    q, s = (int(v) for v in z[p + "charge_spin"])
    return {
        "positions": z[p + "positions"],
        "atomic_numbers": z[p + "atomic_numbers"],
        "cell": z[p + "cell"],
        "pbc": z[p + "pbc"],
        "charge": q,
        "spin": s,
        "dataset": str(z[p + "dataset"]),
    }


BATCH = ["ag16_pbc", "nacl2_triclinic", "mol_charged", "slab_mixedpbc"]


def charged_variants(systems):
    """Several charges and spins: spin 0 with a charge, negative charges, charge 0 with a spin."""
    for name, (q, s) in {
        "ag16_pbc": (0, 0),
        "nacl2_triclinic": (-1, 2),
        "mol_charged": (2, 3),
        "slab_mixedpbc": (-3, 0),
        "isolated_noedge": (0, 1),
    }.items():
        systems[name].update(charge=q, spin=s)
    return systems


def with_single_atoms(systems):
    eye = np.eye(3)
    systems["single_atom"] = {
        "positions": np.array([[0.3, 0.2, 0.1]]),
        "atomic_numbers": np.array([8]),
        "cell": eye,
        "pbc": np.zeros(3, bool),
        "charge": 0,
        "spin": 3,
        "dataset": "omol",
    }
    systems["single_cation"] = {
        "positions": np.array([[0.0, 0.0, 0.0]]),
        "atomic_numbers": np.array([11]),
        "cell": eye,
        "pbc": np.zeros(3, bool),
        "charge": 1,
        "spin": 1,
        "dataset": "omol",
    }
    systems["single_in_box"] = {
        "positions": np.array([[1.0, 2.0, 3.0]]),
        "atomic_numbers": np.array([29]),
        "cell": 15.0 * eye,
        "pbc": np.ones(3, bool),
        "charge": 0,
        "spin": 0,
        "dataset": "omat",
    }
    return systems


def with_ties(systems):
    """A perfect simple cubic crystal with two species: whole shells of equal distances."""
    g = np.array([[i, j, k] for i in range(2) for j in range(2) for k in range(2)], dtype=float)
    systems["tied_cubic"] = {
        "positions": 2.6 * g,
        "atomic_numbers": np.array([47, 29, 29, 29, 47, 29, 47, 11]),
        "cell": 5.2 * np.eye(3),
        "pbc": np.ones(3, bool),
        "charge": 0,
        "spin": 0,
        "dataset": "omat",
    }
    return systems


def drop_isolated(systems):
    del systems["isolated_noedge"]
    return systems


def boxed_molecules(systems):
    """Molecules in a large box, the slab in a thin cell; the flags stay as they are."""
    for n in ["mol_charged", "isolated_noedge"]:
        s = systems[n]
        s["positions"] = s["positions"] - s["positions"].min(0) + 4.0
        s["cell"] = np.diag([18.0, 17.0, 32.0])
    s = systems["slab_mixedpbc"]  # images across z would come within the cutoff if z were periodic
    z = s["positions"][:, 2] - s["positions"][:, 2].min() + 0.5
    s["positions"] = np.column_stack([s["positions"][:, :2], z])
    s["cell"] = s["cell"].copy()
    s["cell"][2, 2] = z.max() + 2.5
    return systems


def make_data(sys_list):
    out = []
    for s in sys_list:
        at = Atoms(numbers=s["atomic_numbers"], positions=s["positions"], cell=s["cell"], pbc=s["pbc"])
        at.info.update(charge=s["charge"], spin=s["spin"])
        out.append(
            AtomicData.from_ase(
                at,
                task_name=s["dataset"],
                r_data_keys=["spin", "charge"],
                target_dtype=torch.float64,
                r_energy=False,
                r_forces=False,
                r_stress=False,
            )
        )
    return atomicdata_list_to_batch(out)
