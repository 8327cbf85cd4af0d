#!/usr/bin/env python
"""Write inference checkpoints as fairchem-core writes them, and what its predict unit says with them.

Needs an environment of its own with ``fairchem-core==2.24.0``; gnnmd is neither needed nor imported.

    python make_fairchem_checkpoint.py

For every file ``tests/golden/fairchem_files/<name>.pt`` there is ``<name>.npz``; format: README.md beside.
Weights are random and small. The averaged weights differ from the last ones, as after a training.
"""

import copy
import json
import os
import tempfile

import numpy as np
import torch
import torch.distributed.checkpoint as dcp  # noqa: TID251 (upstream's files, one process)
from fairchem.core.units.mlip_unit import MLIPPredictUnit
from fairchem.core.units.mlip_unit.api.inference import InferenceSettings, MLIPInferenceCheckpoint
from fairchem.core.units.mlip_unit.mlip_unit import convert_train_checkpoint_to_inference_checkpoint
from fairchem_cases import moe_kw
from fairchem_model import BB, HEAD_PATH, build, randomise
from fairchem_systems import BATCH, base_systems, make_data
from omegaconf import OmegaConf

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.normpath(os.path.join(HERE, "..", "golden", "fairchem_files"))

MD, MOE = "fairchem.core.models.uma.escn_md.", "fairchem.core.models.uma.escn_moe."
NORMALIZATION = "fairchem.core.modules.normalization."


def task(name, quantity, datasets, rmsd, references=None):
    """One entry of "tasks" in a training configuration."""
    config = {
        "_target_": "fairchem.core.units.mlip_unit.mlip_unit.Task",
        "name": name,
        "level": "atom" if quantity == "forces" else "system",
        "property": quantity,
        "loss_fn": {"_target_": "torch.nn.L1Loss"},
        "out_spec": {"dim": {"energy": [1], "forces": [3], "stress": [1, 9]}[quantity], "dtype": "float32"},
        "normalizer": {"_target_": NORMALIZATION + "normalizer.Normalizer", "mean": 0.0, "rmsd": rmsd},
        "datasets": datasets,
        "metrics": ["mae"],
    }
    if references is not None:
        config["element_references"] = {
            "_target_": NORMALIZATION + "element_references.ElementReferences",
            "element_references": {"_target_": "torch.DoubleTensor", "_args_": [references]},
        }
    return config


def references(seed):
    return [0.0, *(-50 * np.random.default_rng(seed).random(99)).tolist()]


def weights(backbone, heads, moe=None, model_id=None, seed=0):
    """Return the model section, the last and the averaged weights."""
    systems = base_systems()
    states = []
    for k in (0, 1):
        model = build(backbone, heads, moe, model_id, seed=seed)
        randomise(model, systems, seed + k)
        states.append({key: x.clone() for key, x in model.float().state_dict().items()})
    last, averaged = states
    config = {
        "_target_": "fairchem.core.models.base.HydraModel",
        "pass_through_head_outputs": True,
        "otf_graph": True,
        "backbone": {
            "model": (MOE + "eSCNMDMoeBackbone") if moe else (MD + "eSCNMDBackbone"),
            **backbone,
            **(moe or {}),
        },
        "heads": {},
    }
    for name, (cls, options) in heads.items():
        options = dict(options)
        if "head_cls" in options:
            options["head_cls"] = HEAD_PATH[options["head_cls"]]
        config["heads"][name] = {"module": HEAD_PATH[cls], **options}
    if model_id:
        config["model_id"] = model_id
    return config, last, averaged


def average(state, prefix="module."):
    return {"n_averaged": torch.tensor(7), **{prefix + key: x for key, x in state.items()}}


def esen(path):
    """A conservative model, converted from a sharded training checkpoint by upstream's own function."""
    backbone = dict(BB, chg_spin_emb_type="pos_emb", dataset_mapping={"omat": "omat"}, always_use_pbc=True)
    model, last, averaged = weights(backbone, {"efs_head": ("MLP_EFS_Head", {})}, seed=11)
    model["backbone"]["dataset_mapping"] = {"omat": "omat"}
    tasks = [
        task("energy", "energy", ["omat"], "${normalizer_rmsd}", "${element_refs.omat}"),
        task("forces", "forces", ["omat"], "${normalizer_rmsd}"),
        task("stress", "stress", ["omat"], "${normalizer_rmsd}"),
    ]
    config = OmegaConf.create(
        {
            "normalizer_rmsd": 1.423,
            "element_refs": {"omat": references(1)},
            "runner": {"train_eval_unit": {"model": model, "tasks": tasks}},
            "job": {"run_name": "${oc.env:USER,nobody}"},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(
            {"unit_state": {"model": last, "ema": average(averaged)}, "config": config}, checkpoint_id=folder
        )
        convert_train_checkpoint_to_inference_checkpoint(folder, path)
    return ["omat"]


def esen_direct(path):
    """Direct heads with normalisers of their own, and keys of the average of a data-parallel model."""
    heads = {
        "energy": ("MLP_Energy_Head", {}),
        "forces": ("Linear_Force_Head", {}),
        "stress": ("MLP_Stress_Head", {}),
    }
    backbone = dict(BB, direct_forces=True, direct_stress=True)
    backbone["dataset_mapping"] = {"omat": "omat", "salex": "omat"}
    model, last, averaged = weights(backbone, heads, seed=12)
    model["pass_through_head_outputs"] = False
    tasks = [
        task("energy", "energy", ["omat", "salex"], 1.9, references(2)),
        task("forces", "forces", ["omat", "salex"], 2.7),
        task("stress", "stress", ["omat", "salex"], 0.4),
    ]
    torch.save(MLIPInferenceCheckpoint(model, last, average(averaged, "module.module."), tasks), path)
    return ["omat", "salex"]


def uma(path):
    """A mixture of experts with an energy head and references for each data set, as UMA is published."""
    names = ["omol", "omat", "oc20"]
    head = {"dataset_names": names, "head_cls": "MLP_EFS_Head", "head_kwargs": {"wrap_property": False}}
    heads = {"energyandforcehead": ("DatasetSpecificMoEWrapper", head)}
    moe = dict(moe_kw(), model_version=1.2)
    model, last, averaged = weights(dict(BB), heads, moe, "UMA-S-1.2", seed=13)
    tasks = []
    for k, name in enumerate(names):
        rmsd = [1.423, 1.1, 2.5][k]
        tasks.append(task(f"{name}_energy", "energy", [name], rmsd, references(3 + k) if k else None))
        tasks.append(task(f"{name}_forces", "forces", [name], rmsd))
    torch.save(MLIPInferenceCheckpoint(model, last, average(averaged), tasks), path)
    return names


def predictions(path, tasks):
    """Return what upstream's predict unit says about every system in every task, in float64."""
    settings = InferenceSettings(base_precision_dtype="float64", activation_checkpointing=False)
    unit = MLIPPredictUnit(path, device="cpu", inference_settings=settings)
    arrays = {}
    for name, system in base_systems().items():
        if name not in BATCH:
            continue
        for key in ("positions", "atomic_numbers", "cell", "pbc"):
            arrays[f"sys/{name}/{key}"] = system[key]
        arrays[f"sys/{name}/charge_spin"] = np.array([system["charge"], system["spin"]])
        for dataset in tasks:
            found = unit.predict(make_data([dict(copy.deepcopy(system), dataset=dataset)]))
            for key, x in found.items():
                arrays[f"out/{dataset}/{name}/{key}"] = x.detach().numpy()
    return arrays


def main():
    torch.set_default_dtype(torch.float64)
    os.makedirs(OUT, exist_ok=True)
    for make in (esen, esen_direct, uma):
        path = os.path.join(OUT, f"{make.__name__}.pt")
        arrays = predictions(path, make(path))
        np.savez_compressed(path.replace(".pt", ".npz"), **arrays)
        energies = {key: float(x.ravel()[0]) for key, x in arrays.items() if key.endswith("/energy")}
        print(path, os.path.getsize(path), json.dumps(energies))


if __name__ == "__main__":
    main()
