"""Potentials from the weights of fairchem-core's eSCN-MD, eSEN and UMA models (facts: fairchem-core 2.24.0).

Every option and every tensor is either used or refused by name; the options in `_NO_EFFECT` change no number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.convert.weights import Weights
from gnnmd.models.escn_md import EscnMDConfig, ExpertsConfig
from gnnmd.models.potential import Potential

#: Options of the backbone that are fields of `EscnMDConfig` under another name, with upstream's defaults.
_BACKBONE = {
    "cutoff": ("r_cut", 5.0),
    "lmax": ("lmax", 2),
    "mmax": ("mmax", 2),
    "sphere_channels": ("channels", 128),
    "hidden_channels": ("hidden_channels", 128),
    "edge_channels": ("edge_channels", 128),
    "num_layers": ("num_layers", 2),
    "num_distance_basis": ("num_basis", 512),
    "norm_type": ("norm", "rms_norm_sh"),
    "act_type": ("activation", "gate"),
    "ff_type": ("feed_forward", "grid"),
    "grid_resolution": ("grid_resolution", None),
    "chg_spin_emb_type": ("charge_spin_embedding", "pos_emb"),
    "use_dataset_embedding": ("dataset_embedding", True),
}

#: The same for the mixture of experts.
_EXPERTS = {
    "num_experts": ("count", 8),
    "moe_expert_coefficient_norm": ("norm", "softmax"),
    "use_composition_embedding": ("composition", False),
    "layers_moe": ("layers", None),
    "moe_type": ("where", "so2"),
    "moe_dropout": ("dropout", 0.0),
}

#: Options that need more than a new name.
_TREATED = {
    "max_num_elements",
    "max_neighbors",
    "dataset_mapping",
    "dataset_list",
    "cs_emb_grad",
    "dataset_emb_grad",
    "charge_balanced_channels",
    "spin_balanced_channels",
    "distance_function",
    "always_use_pbc",
    "radius_pbc_version",
    "moe_layer_type",
    "direct_forces",
    "direct_stress",
}

#: Options of how upstream computes or trains; the trained function is the same. Shared expert layers
#: (moe_single) are stored under each of their names and become separate copies.
_NO_EFFECT = {
    "otf_graph",
    "regress_forces",
    "regress_stress",
    "regress_hessian",
    "hessian_vmap",
    "use_quaternion_wigner",
    "activation_checkpointing",
    "edge_chunk_size",
    "execution_mode",
    "model_version",
    "composition_dropout",
    "use_global_embedding",
    "moe_single",
    "use_pbc",  # this and the next three are read by nobody
    "use_pbc_single",
    "num_sphere_samples",
    "use_cuda_graph_wigner",
}

#: Prefix of the published model whose composition mean counts one atom too many.
_MEAN_COUNTS_ONE_MORE = "UMA-S-1.2"

_ROLES = {
    "MLP_EFS_Head": "energy",
    "MLP_Energy_Head": "energy",
    "Linear_Energy_Head": "energy",
    "Linear_Force_Head": "forces",
    "MLP_Stress_Head": "stress",
}
_WRAPPERS = ("DatasetSpecificMoEWrapper", "DatasetSpecificSingleHeadWrapper")


def build(
    backbone: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    heads: Mapping[str, str],
    moe: Mapping[str, Any] | None = None,
    model_id: str | None = None,
    head_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
) -> Potential:
    """Return the potential that upstream's configuration and weights describe, in the dtype of the weights.

    Args:
        backbone: arguments of upstream's backbone; what is left out has upstream's default.
        state: upstream's state dict, keys "backbone. ..." and "output_heads. ...".
        heads: class of each head, by the name under which its weights are stored.
        moe: arguments of the mixture of linear experts; None = none (unless they are among the backbone's).
        model_id: name of the published model; matters for UMA-S-1.2 only.
        head_kwargs: arguments of the heads, where they are not upstream's defaults.

    Raises:
        ValueError: an option, class or tensor that is not known, contradicts another one or is missing.
    """
    options = {**backbone, **(moe or {})}
    if moe is not None:
        options.setdefault("num_experts", _EXPERTS["num_experts"][1])
    known = {*_BACKBONE, *_EXPERTS, *_TREATED, *_NO_EFFECT}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"options {unknown} of the fairchem backbone are not known; known are {sorted(known)}"
        )
    tables = "backbone.Jd_"  # of rotations
    weights = Weights({key: x for key, x in state.items() if not key.startswith(tables)})
    roles = _roles(heads, head_kwargs or {}, weights)
    config = _config(options, roles, model_id)
    own = {**_backbone_state(config, weights), **_heads_state(config, roles, weights)}
    weights.check_complete()
    potential = build_potential(config).to(own["backbone.atom_embedding.weight"].dtype)
    own["element_energies"], own["energy_scale"] = potential.element_energies, potential.energy_scale
    for key, expected in potential.state_dict().items():
        if own[key].shape != expected.shape:
            raise ValueError(
                f"the weights of {key} have shape {tuple(own[key].shape)}, but by the options it is "
                f"{tuple(expected.shape)}"
            )
    potential.load_state_dict(own)
    return potential


@dataclass(frozen=True)
class _Head:
    """One upstream head: the prefix of its weights, its class without wrapper, its arguments."""

    prefix: str
    cls: str
    experts: bool
    mapping: Mapping[str, str] | None
    reduce: str | None


def _roles(
    heads: Mapping[str, str], kwargs: Mapping[str, Mapping[str, Any]], weights: Weights
) -> dict[str, _Head]:
    """Return the heads by what they predict: "energy", "forces", "stress"."""
    roles: dict[str, _Head] = {}
    for name, path in heads.items():
        head = _head(name, path.rsplit(".", 1)[-1], dict(kwargs.get(name, {})), weights)
        role = _ROLES[head.cls]
        if role in roles:
            raise ValueError(f"heads {dict(heads)} predict the {role} twice")
        roles[role] = head
    if "energy" not in roles:
        raise ValueError(
            f"heads {dict(heads)} have no energy; one of them must be one of {_classes('energy')}"
        )
    return roles


def _head(name: str, cls: str, options: dict[str, Any], weights: Weights) -> _Head:
    prefix = f"output_heads.{name}."
    wrapper = cls if cls in _WRAPPERS else None
    mapping = None
    if wrapper:
        prefix += "head."
        names = options.pop("dataset_names", None)
        mapping = options.pop("dataset_mapping", None) or (names and {n: n for n in names})
        inner = options.pop("head_kwargs", None) or {}
        cls = options.pop("head_cls", None) or _class_inside(prefix, weights)
        cls, options = cls.rsplit(".", 1)[-1], {**options, **inner}
    if cls not in _ROLES:
        raise ValueError(f"head {name!r} has class {cls!r}; known are {[*_ROLES, *_WRAPPERS]}")
    experts = wrapper == "DatasetSpecificMoEWrapper"
    reduce = options.pop("reduce", None)
    for harmless in ("prefix", "wrap_property"):  # names of outputs
        options.pop(harmless, None)
    if options:
        raise ValueError(f"arguments {sorted(options)} of head {name!r} ({cls}) are not known")
    if _ROLES[cls] == "energy" and reduce == "mean":
        raise ValueError(
            f"head {name!r} has reduce='mean': its forces are no derivatives of its energy. Load it "
            f"with 'sum' and "
            "divide the energy by the number of atoms"
        )
    if cls == "MLP_Stress_Head" and experts:
        raise ValueError(f"head {name!r}: a stress head with an expert per data set is not supported")
    return _Head(prefix, cls, experts, mapping, reduce)


def _class_inside(prefix: str, weights: Weights) -> str:
    """Guess the class in a wrapper from its weights."""
    for key, cls in [
        ("energy_block.0.", "MLP_EFS_Head"),
        ("energy_block.weight", "Linear_Energy_Head"),
        ("linear.", "Linear_Force_Head"),
        ("l2_linear.", "MLP_Stress_Head"),
    ]:
        if weights.has(prefix + key):
            return cls
    raise ValueError(f"no weights of a known head under {prefix!r}")


def _classes(role: str) -> list[str]:
    return [cls for cls, its_role in _ROLES.items() if its_role == role]


def _config(options: Mapping[str, Any], roles: Mapping[str, _Head], model_id: str | None) -> PotentialConfig:
    """Return the configuration of the same model here."""
    fixed = {"distance_function": "gaussian", "moe_layer_type": "pytorch"}
    for name, value in fixed.items():
        if options.get(name, value) != value:
            raise ValueError(f"{name}={options[name]!r} is not supported, only {value!r}")
    version = options.get("radius_pbc_version", 2)
    if version == 1 and options.get("always_use_pbc", True):
        raise ValueError("radius_pbc_version=1 with always_use_pbc makes molecules periodic; use version 2")
    if version not in (1, 2):
        raise ValueError(f"radius_pbc_version={version!r} is not known")
    if "forces" in roles and roles["energy"].cls == "MLP_EFS_Head" and not options.get("direct_forces", True):
        raise ValueError(
            "both the energy head (MLP_EFS_Head, direct_forces=False) and a force head give forces"
        )

    experts = None
    if options.get("num_experts"):
        experts = ExpertsConfig(
            **{own: options.get(name, default) for name, (own, default) in _EXPERTS.items()},
            mean_counts_one_more=model_id == _MEAN_COUNTS_ONE_MORE,
        )
    max_neighbors = options.get("max_neighbors", 300)
    model = EscnMDConfig(
        **{own: options.get(name, default) for name, (own, default) in _BACKBONE.items()},
        freeze_charge_spin=not options.get("cs_emb_grad", False),
        freeze_dataset=not options.get("dataset_emb_grad", False),
        charge_balanced_channels=options.get("charge_balanced_channels") or (),
        spin_balanced_channels=options.get("spin_balanced_channels") or (),
        max_number=options.get("max_num_elements", 100) - 1,
        max_neighbors=max_neighbors if max_neighbors and max_neighbors > 0 else None,
        experts=experts,
    )
    mapping = _dataset_mapping(options, roles["energy"])
    if model.dataset_embedding and not mapping:
        raise ValueError("use_dataset_embedding needs dataset_mapping (name -> name whose embedding it uses)")
    stress = roles.get("stress")
    return PotentialConfig(
        model=model,
        heads="direct" if "forces" in roles else "conservative",
        energy_head="linear" if roles["energy"].cls == "Linear_Energy_Head" else "mlp",
        stress_head=stress is not None,
        stress_reduce=(stress and stress.reduce) or "mean",
        datasets=tuple(mapping),
        dataset_mapping={name: used for name, used in mapping.items() if name != used},
        dataset_heads="experts" if roles["energy"].experts else "shared",
    )


def _dataset_mapping(options: Mapping[str, Any], energy: _Head) -> dict[str, str]:
    """Return which data set's weights each data set uses, in the order of the embeddings."""
    mapping, names = options.get("dataset_mapping"), options.get("dataset_list")
    if mapping and names:
        raise ValueError("give dataset_mapping or dataset_list, not both")
    mapping = dict(mapping or {name: name for name in names or ()})
    if energy.mapping and mapping and energy.experts and dict(energy.mapping) != mapping:
        raise ValueError(
            f"the energy head maps data sets by {dict(energy.mapping)}, the backbone by {mapping}"
        )
    return mapping or dict(energy.mapping or {})


def _backbone_state(config: PotentialConfig, weights: Weights) -> dict[str, Tensor]:
    """Return the backbone's weights under the names of `EscnMD`."""
    model, up = config.model, "backbone."
    assert isinstance(model, EscnMDConfig)
    own = {
        "atom_embedding.weight": weights[up + "sphere_embedding.weight"],
        "source_embedding.weight": weights[up + "source_embedding.weight"],
        "target_embedding.weight": weights[up + "target_embedding.weight"],
        **_linear("system_embedding.mix", up + "mix_csd", weights),
        **_radial("blocks.0.edge_degree.radial", up + "edge_degree_embedding.rad_func", weights, 0),
        **_norm("norm", up + "norm", model.norm, weights),
    }
    kind = {"rand_emb": ("table.weight", "rand_emb.weight"), "pos_emb": ("frequency", "W")}
    for name in ("charge", "spin"):
        if model.charge_spin_embedding == "lin_emb":
            own |= _linear(f"system_embedding.{name}.linear", f"{up}{name}_embedding.lin_emb", weights)
        else:
            ours, theirs = kind[model.charge_spin_embedding]
            own[f"system_embedding.{name}.{ours}"] = weights[f"{up}{name}_embedding.{theirs}"]
    if model.dataset_embedding:
        rows = [weights[f"{up}dataset_embedding.dataset_emb_dict.{name}.weight"] for name in config.datasets]
        own["system_embedding.dataset.weight"] = torch.cat(rows)
    if model.experts:
        for i in (0, 2, 4):
            own |= _linear(f"router.network.{i}", f"{up}routing_mlp.{i}", weights)
        if model.experts.composition:
            own["router.composition.weight"] = weights[up + "composition_embedding.weight"]
    for i in range(model.num_layers):
        own |= _layer(f"blocks.{i + 1}.", f"{up}blocks.{i}.", model, model.experts_in(i), weights)
    return {f"backbone.{key}": value for key, value in own.items()}


def _layer(
    own: str, up: str, model: EscnMDConfig, experts: tuple[int, int, int, int], weights: Weights
) -> dict[str, Tensor]:
    m0, m, radial, feed_forward = experts
    state = _norm(own + "norm_1", up + "norm_1", model.norm, weights)
    state |= _norm(own + "norm_2", up + "norm_2", model.norm, weights)
    state |= _radial(own + "edge_convolution.radial", up + "edge_wise.so2_conv_1.rad_func", weights, radial)
    for conv in ("conv_1", "conv_2"):
        ours, theirs = f"{own}edge_convolution.{conv}.", f"{up}edge_wise.so2_{conv}."
        state |= _linear(ours + "m0", theirs + "fc_m0", weights, experts=m0)
        for k in range(model.mmax):
            state |= _linear(f"{ours}m.{k}", f"{theirs}so2_m_conv.{k}.fc", weights, experts=m, bias=False)
    if model.feed_forward == "spectral":
        state |= _linear(
            own + "feed_forward.gates", up + "atom_wise.scalar_mlp.0", weights, experts=feed_forward
        )
        for k in (1, 2):
            state |= _linear(f"{own}feed_forward.linear_{k}", f"{up}atom_wise.so3_linear_{k}", weights)
    else:
        for k in range(3):
            theirs = f"{up}atom_wise.grid_mlp.{2 * k}"
            state |= _linear(
                f"{own}feed_forward.layers.{k}", theirs, weights, experts=feed_forward, bias=False
            )
    return state


def _linear(own: str, up: str, weights: Weights, *, experts: int = 0, bias: bool = True) -> dict[str, Tensor]:
    state = {f"{own}.weight": weights[f"{up}.{'weights' if experts else 'weight'}"]}
    return state | ({f"{own}.bias": weights[f"{up}.bias"]} if bias else {})


def _radial(own: str, up: str, weights: Weights, experts: int) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for k in (1, 2, 3):
        state |= _linear(f"{own}.linear_{k}", f"{up}.net.{3 * k - 3}", weights, experts=experts)
    for k in (1, 2):
        state |= _linear(f"{own}.norm_{k}", f"{up}.net.{3 * k - 2}", weights)
    return state


def _norm(own: str, up: str, kind: str, weights: Weights) -> dict[str, Tensor]:
    weight = weights[f"{up}.affine_weight"]
    if kind != "layer_norm_sh":
        return {f"{own}.weight": weight, f"{own}.bias": weights[f"{up}.affine_bias"]}
    scalar, bias = weights[f"{up}.norm_l0.weight"], weights[f"{up}.norm_l0.bias"]
    return {f"{own}.weight": torch.cat([scalar.reshape(1, -1), weight]), f"{own}.bias": bias}


def _heads_state(config: PotentialConfig, roles: Mapping[str, _Head], weights: Weights) -> dict[str, Tensor]:
    """Return the heads' weights under the names of `Potential`."""
    energy = roles["energy"]
    state = _mlp("heads.energy", energy.prefix + "energy_block", weights, energy)
    if energy.experts:  # experts of data sets that use another one's come last and are never used
        used = len(set(config.dataset_representatives()))
        state = {k: v[:used] if k.endswith(".weight") else v for k, v in state.items()}
    if "forces" in roles:
        prefix = roles["forces"].prefix + "linear."
        state["heads.forces.linear.weight"] = weights[prefix + "weight"][1]
        weights[prefix + "bias"]  # of l = 0 only: no effect
    if "stress" in roles:
        prefix = roles["stress"].prefix
        state |= _mlp("heads.stress.scalar", prefix + "scalar_block", weights, roles["stress"])
        state["heads.stress.linear.weight"] = weights[prefix + "l2_linear.weight"][2]
        weights[prefix + "l2_linear.bias"]
    return state


def _mlp(own: str, up: str, weights: Weights, head: _Head) -> dict[str, Tensor]:
    if head.cls == "Linear_Energy_Head":
        return _linear(f"{own}.layers.0", up, weights, experts=head.experts)
    state: dict[str, Tensor] = {}
    for k in range(3):
        state |= _linear(f"{own}.layers.{k}", f"{up}.{2 * k}", weights, experts=head.experts)
    return state
