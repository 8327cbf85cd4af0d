"""DPA-2 from deepmd-kit's options and weights."""

from collections.abc import Sequence

from gnnmd.models.convert.deepmd_parts import DeepmdWeights, Options, State
from gnnmd.models.dpa2 import dpa2_potential
from gnnmd.models.dpa2_config import DPA2Config, RepformerConfig, RepinitConfig
from gnnmd.models.heads import FittingNetConfig
from gnnmd.models.potential import Potential

#: Options of both sections that have no default.
_REQUIRED = ("rcut", "rcut_smth", "nsel")

#: Options of the section "repinit" that are fields of `RepinitConfig`, with upstream's defaults.
_REPINIT = {
    "neuron": (25, 50, 100),
    "axis_neuron": 16,
    "tebd_dim": 8,
    "tebd_input_mode": "concat",
    "activation_function": "tanh",
    "resnet_dt": False,
    "type_one_side": False,
    "use_three_body": False,
    "three_body_rcut": 4.0,
    "three_body_rcut_smth": 0.5,
    "three_body_sel": 40,
    "three_body_neuron": (2, 4, 8),
}

#: The same for the section "repformer" and `RepformerConfig`.
_REPFORMER = {
    "nlayers": 3,
    "g1_dim": 128,
    "g2_dim": 16,
    "axis_neuron": 4,
    "direct_dist": False,
    "update_g1_has_conv": True,
    "update_g1_has_drrd": True,
    "update_g1_has_grrg": True,
    "update_g1_has_attn": True,
    "update_g2_has_g1g1": True,
    "update_g2_has_attn": True,
    "update_h2": False,
    "attn1_hidden": 64,
    "attn1_nhead": 4,
    "attn2_hidden": 16,
    "attn2_nhead": 4,
    "attn2_has_gate": False,
    "use_sqrt_nnei": True,
    "g1_out_conv": True,
    "g1_out_mlp": True,
    "activation_function": "tanh",
    "update_style": "res_avg",
    "update_residual": 0.001,
    "update_residual_init": "norm",
    "trainable_ln": True,
    "ln_eps": 1e-5,
}

#: The same for the section "descriptor".
_DESCRIPTOR = {
    "concat_output_tebd": True,
    "add_tebd_to_repinit_out": False,
    "use_econf_tebd": False,
    "use_tebd_bias": False,
    "env_protection": 0.0,
}


def dpa2(
    descriptor: Options, type_map: Sequence[str], fitting_net: FittingNetConfig, weights: DeepmdWeights
) -> tuple[Potential, State]:
    """Return a potential of the same shape, and the weights of its backbone under their names here.

    Raises:
        ValueError: an option that is not known or contradicts another one, a model that was compressed or
            that subtracts means from the environment matrix.
    """
    sections = []
    for name, defaults in [("repinit", _REPINIT), ("repformer", _REPFORMER)]:
        section = Options(descriptor.take(name, {}), f"descriptor.{name}")
        section.ignore("set_davg_zero")  # says how the means were found; they are looked at below
        missing = [option for option in _REQUIRED if option not in section.left]
        if missing:
            raise ValueError(f"{section.name} lacks {', '.join(missing)}")
        sections.append(section.take_all({**dict.fromkeys(_REQUIRED), **defaults}))
        if "ln_eps" in sections[-1] and sections[-1]["ln_eps"] is None:  # how files say "the default"
            sections[-1]["ln_eps"] = _REPFORMER["ln_eps"]
        section.check_complete()
    descriptor.require("smooth", True)
    excluded = descriptor.take("exclude_types", [])
    config = DPA2Config(
        **descriptor.take_all(_DESCRIPTOR),
        type_map=tuple(type_map),
        repinit=RepinitConfig(**sections[0]),
        repformer=RepformerConfig(**sections[1]),
        exclude_types=tuple((type_map[a], type_map[b]) for a, b in excluded),
        fitting_net=fitting_net,
    )
    return dpa2_potential(config), _backbone(config, weights, "atomic_model.descriptor.")


def _backbone(config: DPA2Config, weights: DeepmdWeights, up: str) -> State:
    c = config.repinit
    blocks = {"wide": "repinit", "near": "repformers"}
    if c.use_three_body:
        blocks["three_body"] = "repinit_three_body"
    state = weights.embedding("type_embedding", up + "type_embedding", bias=config.use_tebd_bias)
    for neighborhood, block in blocks.items():
        _refuse_compressed(weights, up + block)
        state |= _statistics(f"{neighborhood}.environment", up + block, weights)
    n_elements = 1 if c.type_one_side else 2
    state |= _element_net("blocks.0.net", up + "repinit", c.neuron, n_elements, c, weights)
    if c.use_three_body:
        own, theirs = "blocks.0.three_body_net", up + "repinit_three_body"
        state |= _element_net(own, theirs, c.three_body_neuron, 2, c, weights)
    if c.channels != config.repformer.g1_dim:
        state |= weights.linear("blocks.0.transform", up + "g1_shape_tranform", bias=False)
    if config.add_tebd_to_repinit_out:
        state |= weights.linear("blocks.0.transform_element", up + "tebd_transform", bias=False)
    state |= weights.linear("edge_embedding", up + "repformers.g2_embd")
    for i in range(config.repformer.nlayers):
        last = i + 1 == config.repformer.nlayers
        state |= _layer(config.repformer, f"blocks.{i + 1}.", f"{up}repformers.layers.{i}.", last, weights)
    return state


def _element_net(
    own: str, up: str, widths: Sequence[int], n_elements: int, c: RepinitConfig, weights: DeepmdWeights
) -> State:
    inputs, net = n_elements * c.tebd_dim, weights.network(f"{up}.filter_layers")
    if c.tebd_input_mode == "concat":
        return weights.residual_network(f"{own}.net", net, [1 + inputs, *widths], scaled=c.resnet_dt)
    factor = weights.network(f"{up}.filter_layers_strip")
    return {
        **weights.residual_network(f"{own}.net", net, [1, *widths], scaled=c.resnet_dt),
        **weights.residual_network(f"{own}.factor", factor, [inputs, *widths], scaled=c.resnet_dt),
    }


def _layer(c: RepformerConfig, own: str, up: str, last: bool, weights: DeepmdWeights) -> State:
    state = weights.linear(own + "mix", up + "linear1")
    if c.g1_out_mlp:
        state |= weights.linear(own + "self_mlp", up + "g1_self_mlp")
    if c.update_g1_has_conv:
        state |= weights.linear(own + "project_conv", up + "proj_g1g2", bias=False)
    if c.update_g1_has_attn:
        state |= weights.linear(own + "attention.query", up + "loc_attn.mapq", bias=False)
        state |= weights.linear(own + "attention.key_value", up + "loc_attn.mapkv", bias=False)
        state |= weights.linear(own + "attention.head_map", up + "loc_attn.head_map")
    residuals = {"g1": c.g1_updates}
    if not last:
        state |= _edge_updates(c, own, up, weights)
        residuals |= {"g2": c.g2_updates} | ({"h2": 1} if c.update_h2 else {})
    if c.update_style == "res_residual":
        for what, n in residuals.items():
            state |= weights.residuals(f"{own}{what}_update", f"{up}{what}_residual", n)
    return state


def _edge_updates(c: RepformerConfig, own: str, up: str, weights: DeepmdWeights) -> State:
    state = weights.linear(own + "edge_mlp", up + "linear2")
    if c.update_g2_has_g1g1:
        state |= weights.linear(own + "project_product", up + "proj_g1g1g2", bias=False)
    if c.update_g2_has_attn or c.update_h2:
        state |= weights.linear(own + "pair_weights.query_key", up + "attn2g_map.mapqk", bias=False)
    if c.update_g2_has_attn:
        state |= weights.linear(own + "pair_features.value", up + "attn2_mh_apply.mapv", bias=False)
        state |= weights.linear(own + "pair_features.head_map", up + "attn2_mh_apply.head_map")
        state[own + "norm.weight"] = weights[up + "attn2_lm.matrix"]
        state[own + "norm.bias"] = weights[up + "attn2_lm.bias"]
    if c.update_h2:
        state |= weights.linear(own + "pair_vectors.head_map", up + "attn2_ev_apply.head_map", bias=False)
    return state


def _statistics(own: str, up: str, weights: DeepmdWeights) -> State:
    """Return mean and deviations, after refusing means with which neighbours that are not there have a say.

    Those have the components -mean / std there, and the element of the first atom. Only the first descriptor
    reads radial components without a switch.
    """
    state = weights.statistics(own, up)
    mean = state[f"{own}.mean"].reshape(-1, 4)
    if mean[:, 1:].any() or (mean.any() and up.endswith("repinit")):
        raise ValueError(
            f"{up}.mean is not zero, so that neighbours that are not there contribute, as the element of the "
            "first atom; this is not supported. Train with set_davg_zero"
        )
    return state


def _refuse_compressed(weights: DeepmdWeights, up: str) -> None:
    for name in ("type_embd_data", "compress_info.0", "compress_data.0"):
        if (key := f"{up}.{name}") in weights.state and weights[key].numel():
            raise ValueError(f"{key} is not empty: the model was compressed; convert it from before that")
