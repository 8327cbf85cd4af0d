"""DPA-3 from deepmd-kit's options and weights."""

from collections.abc import Sequence

from gnnmd.models.convert.deepmd_parts import DeepmdWeights, Options, State
from gnnmd.models.dpa3 import dpa3_potential
from gnnmd.models.dpa3_config import DPA3Config
from gnnmd.models.heads import FittingNetConfig
from gnnmd.models.potential import Potential

#: Options of the section "repflow" that are fields of `DPA3Config`, with upstream's defaults.
_REPFLOW = {
    "n_dim": 128,
    "e_dim": 64,
    "a_dim": 64,
    "nlayers": 6,
    "e_rcut": 6.0,
    "e_rcut_smth": 5.0,
    "e_sel": 120,
    "a_rcut": 4.0,
    "a_rcut_smth": 3.5,
    "a_sel": 20,
    "a_compress_rate": 0,
    "a_compress_e_rate": 1,
    "a_compress_use_split": False,
    "n_multi_edge_message": 1,
    "axis_neuron": 4,
    "update_angle": True,
    "update_style": "res_residual",
    "update_residual": 0.1,
    "update_residual_init": "const",
    "fix_stat_std": 0.3,
    "smooth_edge_update": False,
    "edge_init_use_dist": False,
    "use_exp_switch": False,
    "use_dynamic_sel": False,
    "sel_reduce_factor": 10.0,
    "sequential_update": False,
}

#: The same for the section "descriptor".
_DESCRIPTOR = {
    "activation_function": "silu",
    "env_protection": 0.0,
    "concat_output_tebd": False,
    "use_econf_tebd": False,
    "use_tebd_bias": False,
    "add_chg_spin_ebd": False,
}


def dpa3(
    descriptor: Options, type_map: Sequence[str], fitting_net: FittingNetConfig, weights: DeepmdWeights
) -> tuple[Potential, State]:
    """Return a potential of the same shape, and the weights of its backbone under their names here.

    Raises:
        ValueError: an option that is not known or contradicts another one.
    """
    repflow = Options(descriptor.take("repflow", {}), "descriptor.repflow")
    repflow.ignore("optim_update", "skip_stat")  # the same numbers by other products; of training
    excluded = descriptor.take("exclude_types", [])
    config = DPA3Config(
        **repflow.take_all(_REPFLOW),
        **descriptor.take_all(_DESCRIPTOR),
        type_map=tuple(type_map),
        exclude_types=tuple((type_map[a], type_map[b]) for a, b in excluded),
        fitting_net=fitting_net,
    )
    # charge and spin are those of the atoms here, never those of the file
    descriptor.ignore("use_loc_mapping", "default_chg_spin")
    repflow.check_complete()
    return dpa3_potential(config), _backbone(config, weights, "atomic_model.descriptor.")


def _backbone(config: DPA3Config, weights: DeepmdWeights, up: str) -> State:
    embedding = weights.embedding("type_embedding", up + "type_embedding", bias=config.use_tebd_bias)
    state = embedding | weights.statistics("environment", up + "repflows")
    state |= weights.linear("edge_embedding", up + "repflows.edge_embd")
    state |= weights.linear("angle_embedding", up + "repflows.angle_embd", bias=False)
    if config.add_chg_spin_ebd:
        state |= weights.embedding("charge_embedding", up + "chg_embedding")
        state |= weights.embedding("spin_embedding", up + "spin_embedding")
        state |= weights.linear("mix_charge_spin", up + "mix_cs_mlp")
    for i in range(config.nlayers):
        state |= _layer(config, weights, f"blocks.{i}.", f"{up}repflows.layers.{i}.")
    return state


def _layer(config: DPA3Config, weights: DeepmdWeights, own: str, up: str) -> State:
    names = {
        "node_self": "node_self_mlp",
        "node_sym": "node_sym_linear",
        "node_edge.linear": "node_edge_linear",
        "edge_self.linear": "edge_self_linear",
    }
    residuals = {"node": 2 + config.n_multi_edge_message, "edge": 1}
    if config.update_angle:
        names |= {
            "edge_angle_1.linear": "edge_angle_linear1",
            "edge_angle_2": "edge_angle_linear2",
            "angle_self.linear": "angle_self_linear",
        }
        residuals |= {"edge": 2, "angle": 1}
    state: State = {}
    for ours, theirs in names.items():
        state |= weights.linear(own + ours, up + theirs)
    if config.update_angle and config.a_compress_rate and not config.a_compress_use_split:
        for ours, theirs in [
            ("compress_node", "a_compress_n_linear"),
            ("compress_edge", "a_compress_e_linear"),
        ]:
            state |= weights.linear(own + ours, up + theirs, bias=False)
    if config.update_style == "res_residual":
        for what, n in residuals.items():
            state |= weights.residuals(f"{own}{what}_update", f"{up}{what[0]}_residual", n)
    return state
