"""Potentials from the weights of deepmd-kit's PyTorch models DPA-2 and DPA-3 (facts: deepmd-kit 3.2.0).

Every option and every tensor is either used or refused by name, but for options that change no number.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from ase.data import atomic_numbers
from torch import Tensor

from gnnmd.models.build import PotentialConfig
from gnnmd.models.convert.deepmd_dpa2 import dpa2
from gnnmd.models.convert.deepmd_dpa3 import dpa3
from gnnmd.models.convert.deepmd_parts import DeepmdWeights, Options, State
from gnnmd.models.heads import FittingNet, FittingNetConfig
from gnnmd.models.potential import Potential

#: Returns a potential and the weights of its backbone; by the type of the descriptor.
_DESCRIPTORS: dict[
    str, Callable[[Options, Sequence[str], FittingNetConfig, DeepmdWeights], tuple[Potential, State]]
] = {"dpa2": dpa2, "dpa3": dpa3}

#: Options of how upstream computes, trains or begins; the trained function is the same.
_NO_EFFECT = ("seed", "trainable", "precision")

#: Options of the whole model that are like them: statistics, names, and what other options switch on.
_OF_TRAINING = (
    *("data_stat_nbatch", "data_stat_protect", "data_bias_nsample", "preset_out_bias", "srtab_add_bias"),
    *("model_prob", "model_branch_alias", "finetune_head", "info"),
    *("bridging_r_inner", "bridging_r_outer"),
)


def build(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Potential:
    """Return a potential with published weights, in their precision (the highest, where they have several).

    Args:
        config: upstream's section "model": type_map, descriptor, fitting_net.
        state: upstream's state dict, keys "atomic_model. ...", all with or all without a prefix such as
            "model.Default.". Statistics may be given under their key followed by "[:,0]", one row per type.

    Raises:
        ValueError: an option or tensor that is not known or not supported, contradicts another one or is
            missing.
    """
    weights = DeepmdWeights(_without_prefix(state))
    model = Options(config, "model")
    model.ignore(*_OF_TRAINING)
    for option in ("pair_exclude_types", "atom_exclude_types"):
        model.require(option, [], None)
    model.require("bridging_method", "none", "NONE", "None", None)
    for option in ("spin", "use_srtab", "hessian_mode"):
        model.require(option, None, False)
    model.require("type", "standard")
    type_map = list(model.take("type_map", []))
    fitting = Options(model.take("fitting_net", {}), "fitting_net")
    descriptor = Options(model.take("descriptor", {}), "descriptor")
    model.check_complete()

    head = _fitting_net(fitting)
    kind = descriptor.take("type", None)
    if kind not in _DESCRIPTORS:
        raise ValueError(f"descriptor type {kind!r} is not supported, only {', '.join(_DESCRIPTORS)}")
    descriptor.ignore(*_NO_EFFECT)
    descriptor.require("type_map", type_map, None)
    descriptor.require("ntypes", len(type_map))
    potential, backbone = _DESCRIPTORS[kind](descriptor, type_map, head, weights)
    descriptor.check_complete()

    own = {f"backbone.{key}": value for key, value in backbone.items()}
    own |= _head(potential, weights)
    own["element_energies"] = _element_energies(type_map, weights)
    own["energy_scale"] = potential.energy_scale
    for unused in ("atomic_model.out_std", "min_nbor_dist"):
        if unused in weights.state:
            weights.read.add(unused)
    weights.check_complete()
    shape: Any = potential.backbone.config
    potential.config = PotentialConfig(model=shape, elements=potential.elements)
    return _loaded(potential, own)


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors under names that begin with "atomic_model.", or "min_nbor_dist"."""
    prefixes = {key.partition("atomic_model.")[0] for key in state if "atomic_model." in key}
    if len(prefixes) != 1:
        raise ValueError(
            f"the weights are those of {len(prefixes)} models ({', '.join(sorted(prefixes))}), not of one; "
            "give the tensors of one model, keys 'atomic_model. ...'"
        )
    (prefix,) = prefixes
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _fitting_net(options: Options) -> FittingNetConfig:
    """Return the shape of the network, after refusing inputs and outputs that it does not have here."""
    options.require("type", "ener")
    options.ignore(*_NO_EFFECT, "rcond", "tot_ener_zero", "spin")
    for count in ("numb_fparam", "numb_aparam", "dim_case_embd"):
        options.require(count, 0)
    options.require("atom_ener", [], None)
    options.require("use_aparam_as_mask", False)
    for option in ("layer_name", "default_fparam"):
        options.require(option, None)
    config = FittingNetConfig(
        **options.take_all({"neuron": (120, 120, 120), "activation_function": "tanh", "resnet_dt": True})
    )
    options.check_complete()
    return config


def _head(potential: Potential, weights: DeepmdWeights) -> State:
    head, up = potential.heads["energy"], weights.network("atomic_model.fitting_net.filter_layers")
    assert isinstance(head, FittingNet)
    own = weights.residual_network("heads.energy.hidden", up, head.widths, scaled=head.config.resnet_dt)
    return own | weights.linear("heads.energy.output", f"{up}.layers.{len(head.config.neuron)}")


def _element_energies(type_map: Sequence[str], weights: DeepmdWeights) -> Tensor:
    """Return ``[119]``, eV: what upstream adds per atom of a type."""
    energies = torch.zeros(119, dtype=torch.float64)
    bias = weights["atomic_model.out_bias"].to(torch.float64).reshape(-1)
    bias = bias + weights["atomic_model.fitting_net.bias_atom_e"].to(torch.float64).reshape(-1)
    if len(bias) != len(type_map):
        raise ValueError(f"atomic_model.out_bias has {len(bias)} entries for {len(type_map)} types")
    energies[[atomic_numbers[symbol] for symbol in type_map]] = bias
    return energies


def _loaded(potential: Potential, own: State) -> Potential:
    expected = potential.state_dict()
    for key, value in own.items():
        if key not in expected or value.shape != expected[key].shape:
            shape = tuple(expected[key].shape) if key in expected else "not there"
            raise ValueError(
                f"the weights of {key} have shape {tuple(value.shape)}, but by the options it is {shape}"
            )
    stored = (own[name].dtype for name, _ in potential.named_parameters() if name in own)
    potential.to(reduce(torch.promote_types, stored)).load_state_dict(own)
    return potential
