"""Small training checkpoints of deepmd-kit and what its own evaluation says, for tests/golden/deepmd_files.

Trains for a few steps with deepmd-kit's PyTorch trainer, single-task and multi-task, so that the files are
exactly what users have. Needs deepmd-kit 3.2.0 with its PyTorch backend (the compiled operators are not
needed), e3nn and ase:

    python make_deepmd_files.py ../golden/deepmd_files
"""

import argparse
import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule

STEPS = 3
ALLOY, WATER = ["O", "H", "Cu", "Ag"], ["Ag", "H", "O"]

FITTING = {"neuron": [8, 8], "resnet_dt": True, "seed": 1}
DPA3_SINGLE = {
    "type_map": ALLOY,
    "descriptor": {
        "type": "dpa3",
        "repflow": {
            **{"n_dim": 10, "e_dim": 8, "a_dim": 4, "nlayers": 2, "axis_neuron": 2},
            **{
                "e_rcut": 4.5,
                "e_rcut_smth": 3.9,
                "e_sel": 60,
                "a_rcut": 3.2,
                "a_rcut_smth": 2.8,
                "a_sel": 20,
            },
            **{"fix_stat_std": 0.0, "a_compress_use_split": False, "update_residual": 0.5},
            **{
                "update_residual_init": "norm",
                "n_multi_edge_message": 2,
                "sequential_update": True,
                "a_compress_rate": 1,
            },
        },
        "use_econf_tebd": True,
        "use_tebd_bias": True,
        "concat_output_tebd": True,
        "exclude_types": [[0, 2]],
        "seed": 1,
    },
    "fitting_net": FITTING,
}
DPA3_SHARED = {
    "type": "dpa3",
    "repflow": {
        **{"n_dim": 10, "e_dim": 8, "a_dim": 4, "nlayers": 3, "axis_neuron": 2},
        **{"e_rcut": 4.5, "e_rcut_smth": 3.9, "e_sel": 60, "a_rcut": 3.2, "a_rcut_smth": 2.8, "a_sel": 20},
        **{"use_dynamic_sel": True, "sel_reduce_factor": 1.5, "smooth_edge_update": True},
        **{"use_exp_switch": True, "edge_init_use_dist": True, "update_residual": 0.5},
        **{"a_compress_rate": 1, "a_compress_e_rate": 2, "a_compress_use_split": True},
    },
    "activation_function": "silut:10.0",
    "seed": 1,
}
DPA2_SINGLE = {
    "type_map": ALLOY,
    "descriptor": {
        "type": "dpa2",
        "repinit": {
            **{"rcut": 4.5, "rcut_smth": 1.0, "nsel": 60, "neuron": [4, 8], "axis_neuron": 3, "tebd_dim": 4},
            **{"tebd_input_mode": "strip", "type_one_side": True, "use_three_body": True},
            **{"three_body_sel": 20, "three_body_rcut": 3.2, "three_body_rcut_smth": 2.0},
        },
        "repformer": {
            **{"rcut": 3.2, "rcut_smth": 2.2, "nsel": 20, "nlayers": 2, "g1_dim": 10, "g2_dim": 6},
            **{"axis_neuron": 2, "attn1_hidden": 6, "attn1_nhead": 2, "attn2_hidden": 4, "attn2_nhead": 2},
            **{"update_h2": True, "attn2_has_gate": True, "g1_out_conv": False, "g1_out_mlp": False},
        },
        "add_tebd_to_repinit_out": True,
        "seed": 1,
    },
    "fitting_net": FITTING,
}
DPA2_SHARED = {
    "type": "dpa2",
    "repinit": {
        **{"rcut": 4.5, "rcut_smth": 1.0, "nsel": 60, "neuron": [4, 8], "axis_neuron": 3, "tebd_dim": 4},
        **{"use_three_body": True, "three_body_sel": 20, "three_body_rcut": 3.2, "three_body_rcut_smth": 2.0},
    },
    "repformer": {
        **{"rcut": 3.2, "rcut_smth": 2.2, "nsel": 20, "nlayers": 2, "g1_dim": 10, "g2_dim": 6},
        **{"axis_neuron": 2, "attn2_hidden": 4, "attn2_nhead": 2, "attn2_has_gate": True},
        **{"update_g1_has_attn": False, "update_g2_has_g1g1": False, "update_style": "res_residual"},
        **{"update_residual": 0.3},
    },
    "seed": 1,
}


def two_heads(descriptor: dict[str, Any]) -> dict[str, Any]:
    """Return a model with two heads: one descriptor, and one fitting network that is told its head."""
    shared = {
        "type_map_all": ["O", "H", "Cu", "Ag"],
        "dpa": descriptor,
        "net": {**FITTING, "dim_case_embd": 2},
    }
    head = {"type_map": "type_map_all", "descriptor": "dpa", "fitting_net": "net"}
    return {
        "shared_dict": shared,
        "model_dict": {
            "Alloy": {**head, "model_branch_alias": ["metal"], "info": {"observed-type": ["Cu", "Ag"]}},
            "Water": dict(head),
        },
    }


MODELS: dict[str, dict[str, Any]] = {
    "dpa3": DPA3_SINGLE,
    "dpa3_heads": two_heads(DPA3_SHARED),
    "dpa2": DPA2_SINGLE,
    "dpa2_heads": two_heads(DPA2_SHARED),
}


def crystal(seed: int, *, charged: bool = False) -> Atoms:
    """Eight atoms of three elements in a cell thinner than the cutoff."""
    rng = np.random.default_rng(seed)
    atoms = bulk("Ag", "fcc", a=4.09, cubic=True).repeat((2, 1, 1))
    atoms.numbers[::3] = 29
    atoms.numbers[1] = 8
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.03 * rng.normal(size=(3, 3))), scale_atoms=True)
    atoms.positions += 0.1 * rng.normal(size=(8, 3))
    return atoms


def drops(seed: int) -> Atoms:
    """Three molecules of water in open space."""
    rng, atoms = np.random.default_rng(seed), Atoms()
    for k in range(3):
        water = molecule("H2O")
        water.rotate(rng.uniform(0, 360), rng.normal(size=3))
        water.positions += [2.9 * k, rng.normal(scale=0.3), rng.normal(scale=0.3)]
        atoms += water
    atoms.positions += 0.03 * rng.normal(size=(9, 3))
    return atoms


STRUCTURES = {"crystal": crystal(10), "crystal 2": crystal(11), "drops": drops(12)}


def write_data(folder: Path, frames: list[Atoms], type_map: list[str]) -> str:
    """Write a DeePMD npy system with random labels: what is learnt does not matter."""
    rng = np.random.default_rng(0)
    (folder / "set.000").mkdir(parents=True)
    first = frames[0]
    (folder / "type_map.raw").write_text("\n".join(type_map))
    types = [type_map.index(s) for s in first.get_chemical_symbols()]
    (folder / "type.raw").write_text("\n".join(map(str, types)))
    if not first.pbc.any():
        (folder / "nopbc").touch()
    n = len(first)
    arrays = {
        "coord": np.array([atoms.positions.reshape(-1) for atoms in frames]),
        "box": np.array(
            [
                atoms.cell.array.reshape(-1) if atoms.pbc.any() else 20 * np.eye(3).reshape(-1)
                for atoms in frames
            ]
        ),
        "energy": -3.0 * n + rng.normal(size=(len(frames), 1)),
        "force": rng.normal(size=(len(frames), 3 * n)),
    }
    for name, array in arrays.items():
        np.save(folder / "set.000" / f"{name}.npy", array)
    return str(folder)


def train(name: str, model: dict[str, Any], folder: Path) -> Path:
    """Train as ``dp --pt train`` does, and return the checkpoint."""
    from deepmd.pt.entrypoints.main import train as run

    alloy = write_data(folder / "alloy", [crystal(s) for s in range(3)], ALLOY)
    water = write_data(folder / "water", [drops(s) for s in range(3)], WATER)
    loss = {"type": "ener", "start_pref_e": 1, "limit_pref_e": 1, "start_pref_f": 1, "limit_pref_f": 1}
    training: dict[str, Any] = {"numb_steps": STEPS, "save_freq": STEPS, "disp_freq": 1, "seed": 1}
    training |= {"save_ckpt": str(folder / "model.ckpt"), "disp_file": str(folder / "lcurve.out")}
    config: dict[str, Any] = {
        "model": copy.deepcopy(model),
        "learning_rate": {"type": "exp", "start_lr": 0.01, "stop_lr": 0.001, "decay_steps": 1},
        "training": training,
    }
    if "model_dict" in model:
        config["loss_dict"] = {"Alloy": loss, "Water": loss}
        training["model_prob"] = {"Alloy": 0.5, "Water": 0.5}
        training["data_dict"] = {
            "Alloy": {"training_data": {"systems": [alloy], "batch_size": 1}},
            "Water": {"training_data": {"systems": [water], "batch_size": 1}},
        }
    else:
        config["loss"] = loss
        training["training_data"] = {"systems": [alloy, water], "batch_size": 1}
    path = folder / "input.json"
    path.write_text(json.dumps(config))
    here = Path.cwd()
    os.chdir(folder)  # the trainer writes beside where it runs
    try:
        run(str(path), None, None, None, None, "", skip_neighbor_stat=True)
    finally:
        os.chdir(here)
    return folder / f"model.ckpt-{STEPS}.pt"


def said(path: Path, head: str | None) -> dict[str, np.ndarray]:
    """Return energy, atomic energies, forces and virial of all structures by upstream's own evaluation."""
    from deepmd.infer.deep_pot import DeepPot
    from deepmd.pt.utils import env

    env.CUSTOM_OP_USE_JIT = False  # the trainer has set it, but TorchScript takes no functions of Python
    potential, found = DeepPot(str(path), head=head), {}
    type_map = potential.get_type_map()
    for system, atoms in STRUCTURES.items():
        types = [type_map.index(s) for s in atoms.get_chemical_symbols()]
        cell = atoms.cell.array.reshape(1, 9) if atoms.pbc.any() else None
        out = potential.eval(atoms.positions.reshape(1, -1), cell, types, atomic=True)
        names = ("energy", "forces", "virial", "node_energies")
        shapes = ((), (-1, 3), (3, 3), (-1,))
        for key, shape, array in zip(names, shapes, out[:4], strict=True):
            found[f"{head or 'Default'}/{system}/{key}"] = array.reshape(shape)
    return found


def main(folder: Path) -> None:
    """Write every model and what it says."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for system, atoms in STRUCTURES.items():
        columns = {"numbers": atoms.numbers, "positions": atoms.positions, "cell": atoms.cell.array}
        arrays |= {f"{system}/{key}": x for key, x in {**columns, "pbc": atoms.pbc}.items()}
    np.savez_compressed(folder / "structures.npz", **arrays)
    for name, model in MODELS.items():
        with tempfile.TemporaryDirectory() as scratch:
            trained = train(name, model, Path(scratch))
            (folder / f"{name}.pt").write_bytes(trained.read_bytes())
        heads = list(model.get("model_dict", {None: None}))
        results = [said(folder / f"{name}.pt", head) for head in heads]
        np.savez_compressed(folder / f"{name}.npz", **{k: x for found in results for k, x in found.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    torch.set_num_threads(1)
    main(parser.parse_args().folder)
