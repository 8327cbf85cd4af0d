"""DPA models that train in a second."""

from gnnmd.models.dpa2_config import DPA2Config, RepformerConfig, RepinitConfig
from gnnmd.models.dpa3_config import DPA3Config
from gnnmd.models.heads import FittingNetConfig

DPA3 = DPA3Config(
    type_map=("Cu",),
    n_dim=8,
    e_dim=6,
    a_dim=4,
    nlayers=2,
    e_rcut=4.0,
    e_rcut_smth=3.5,
    a_rcut=3.0,
    a_rcut_smth=2.5,
    fix_stat_std=0.0,
    fitting_net=FittingNetConfig(neuron=(8,)),
)


DPA2 = DPA2Config(
    type_map=("Cu",),
    repinit=RepinitConfig(
        rcut=4.0,
        rcut_smth=1.0,
        nsel=60,
        neuron=(4, 8),
        axis_neuron=2,
        three_body_rcut=3.0,
        three_body_rcut_smth=1.0,
    ),
    repformer=RepformerConfig(rcut=3.0, rcut_smth=1.0, nsel=20, nlayers=2, g1_dim=8, g2_dim=6, attn2_nhead=2),
    fitting_net=FittingNetConfig(neuron=(8,)),
)
