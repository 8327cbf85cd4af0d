"""Potentials from what is in fairchem-core's inference checkpoints (facts: fairchem-core 2.24.0).

Such a file holds the configuration of a model, its averaged weights and its tasks: which quantities of which
data set it predicts, and how the network's numbers become eV. A potential is made for one of the data sets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.convert import fairchem
from gnnmd.models.heads import ForceHead, StressHead
from gnnmd.models.potential import N_ELEMENTS, Potential

#: Classes of the backbone, by name in upstream's registry or by path, and whether they mix experts.
_BACKBONES = {
    "escnmd_backbone": False,
    "eSCNMDBackbone": False,
    "escnmd_moe_backbone": True,
    "eSCNMDMoeBackbone": True,
}

#: Options beside backbone and heads that do not change the trained function.
_NO_EFFECT = {
    "_target_",
    "otf_graph",
    "pass_through_head_outputs",
    "freeze_backbone",
    "supports_single_atoms",
}

#: Upstream's inference sets these, whatever the model was trained with.
_INFERENCE = {"always_use_pbc": False, "radius_pbc_version": 2}

_TENSORS = {"torch.DoubleTensor": torch.float64, "torch.FloatTensor": torch.float32}


def build(
    model: Mapping[str, Any],
    averaged: Mapping[str, Tensor],
    tasks: Sequence[Mapping[str, Any]],
    task: str | None,
) -> tuple[Potential, dict[str, str]]:
    """Return a potential for one data set, in the precision of the weights, and what it was made from.

    Args:
        model: the field "model_config".
        averaged: the field "ema_state_dict".
        tasks: the field "tasks_config".
        task: name of the data set; None if the file has one only.

    Raises:
        ValueError: a data set that the file does not have, or anything that is not known or not supported.
    """
    options = {key: value for key, value in model.items() if key not in _NO_EFFECT}
    backbone = dict(options.pop("backbone", None) or {})
    heads = {name: dict(head) for name, head in (options.pop("heads", None) or {}).items()}
    model_id = options.pop("model_id", None)
    if options := {key: value for key, value in options.items() if value is not None}:
        raise ValueError(f"options {sorted(options)} of the fairchem model are not known")
    kind = str(backbone.pop("model", None))
    if (name := kind.rpartition(".")[2]) not in _BACKBONES:
        raise ValueError(
            f"the fairchem backbone {kind!r} is not supported, only {', '.join(_BACKBONES)} (UMA, eSEN)"
        )
    if backbone.get("num_experts") and model_id is None and backbone.get("model_version") not in (1.1, "1.1"):
        raise ValueError(
            "a mixture of experts without model_id or model_version 1.1 is UMA 1.0, another function under "
            "the same names; take UMA 1.1 or later"
        )
    dataset, own_tasks = _tasks_of(tasks, task)
    potential = fairchem.build(
        backbone | _INFERENCE,
        _without_wrappers(averaged),
        heads={name: str(head.pop("module", None)) for name, head in heads.items()},
        head_kwargs=heads,
        moe={} if _BACKBONES[name] else None,
        model_id=model_id,
    )
    potential = _for_dataset(potential, dataset)
    _set_units(potential, own_tasks)
    return potential, {"task": dataset} | ({"model_id": model_id} if model_id else {})


def _without_wrappers(averaged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the names of the model, not of its average or of its data-parallel copy."""
    state = {key: value for key, value in averaged.items() if key != "n_averaged"}
    while state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _tasks_of(
    tasks: Sequence[Mapping[str, Any]], task: str | None
) -> tuple[str, dict[str, Mapping[str, Any]]]:
    """Return the name of a data set and its tasks by what they predict."""
    names = list(dict.fromkeys(d for t in tasks if t["property"] == "energy" for d in t["datasets"]))
    if task is None and len(names) != 1:
        raise ValueError(f"the file predicts for {', '.join(names) or 'no data set'}; choose one with task=")
    if task is not None and task not in names:
        raise ValueError(f"task {task!r} is not in the file, which has {', '.join(names)}")
    dataset = task or names[0]
    found: dict[str, Mapping[str, Any]] = {}
    for config in tasks:
        if dataset in config["datasets"]:
            if config["property"] in found:
                raise ValueError(f"two tasks of {dataset} predict the {config['property']}")
            found[config["property"]] = config
    return dataset, found


def _for_dataset(potential: Potential, dataset: str) -> Potential:
    """Return the same function for one data set, without the embeddings and heads of the others.

    References and scale are those of one data set, so that the others would give wrong energies.
    """
    config: PotentialConfig = potential.config
    if config.datasets and dataset not in config.datasets:
        raise ValueError(f"task {dataset!r} has no weights; the model has {', '.join(config.datasets)}")
    used = dict(zip(config.datasets, config.dataset_representatives(), strict=True))
    state = potential.state_dict()
    if (key := "backbone.system_embedding.dataset.weight") in state:
        state[key] = state[key][[config.datasets.index(used[dataset])]]
    if config.dataset_heads == "experts":
        expert = sorted(set(used.values())).index(used[dataset])
        for key in state:
            if key.startswith("heads.energy.") and key.endswith(".weight"):
                state[key] = state[key][expert]
    one = build_potential(replace(config, datasets=(dataset,), dataset_mapping={}, dataset_heads="shared"))
    one.to(next(potential.parameters()).dtype).load_state_dict(state)
    return one


def _set_units(potential: Potential, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the potential the scale of the energy, the references, and what direct heads need beside them."""
    scale = _scale(tasks["energy"])
    potential.energy_scale.fill_(scale)
    references = _references(tasks["energy"].get("element_references"))
    potential.element_energies[: len(references)] = references
    for quantity in ("forces", "stress"):
        if quantity not in tasks or (ratio := _scale(tasks[quantity]) / scale) == 1:
            continue
        if quantity not in potential.heads:
            raise ValueError(
                f"{tasks[quantity]['name']} has another rmsd than the energy, so that the {quantity} would "
                "be no derivatives of the energy"
            )
        _multiply(potential.heads[quantity], ratio)


@torch.no_grad()
def _multiply(head: torch.nn.Module, factor: float) -> None:
    """Multiply what a direct head returns, by its last layers."""
    assert isinstance(head, ForceHead | StressHead)
    last = [head.linear.weight]
    if isinstance(head, StressHead):
        last += head.scalar.layers[-1].parameters()
    for parameter in last:
        parameter.mul_(factor)


def _scale(task: Mapping[str, Any]) -> float:
    """Return by how many eV (eV/A, eV/A^3) the network's numbers are multiplied."""
    config = {key: value for key, value in task["normalizer"].items() if value is not None}
    kind = config.pop("_target_", None)
    mean, rmsd = float(config.pop("mean", 0.0)), float(config.pop("rmsd", 1.0))
    if str(kind).rpartition(".")[2] not in ("Normalizer", "create_normalizer") or config:
        raise ValueError(
            f"the normalizer of {task['name']} ({kind}, options {sorted(config)}) is not supported, only a "
            "Normalizer with mean and rmsd"
        )
    if mean != 0:
        raise ValueError(
            f"the normalizer of {task['name']} adds a mean ({mean}) whatever the number of atoms, which is "
            "not supported"
        )
    return rmsd


def _references(config: Mapping[str, Any] | None) -> Tensor:
    """Return ``[n]`` float64, eV: the energy of each atomic number below n."""
    if config is None:
        return torch.zeros(0, dtype=torch.float64)
    kind, values = config.get("_target_"), config.get("element_references")
    if isinstance(values, Mapping) and values.get("_target_") in _TENSORS:
        values = torch.tensor(values["_args_"][0], dtype=_TENSORS[values["_target_"]])
    if str(kind).rpartition(".")[2] != "ElementReferences" or not isinstance(values, Tensor):
        raise ValueError(
            f"element references of the kind {kind} with {values!r:.200} are not supported, only "
            f"ElementReferences with a tensor ({', '.join(_TENSORS)})"
        )
    if values.ndim != 1 or len(values) > N_ELEMENTS:
        raise ValueError(
            f"element references have shape {tuple(values.shape)}, not one energy for each of at most "
            f"{N_ELEMENTS} atomic numbers"
        )
    return values.to(torch.float64)
