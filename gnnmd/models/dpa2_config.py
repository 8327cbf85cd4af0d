"""Shape of a DPA-2 network, by the names that DeePMD-kit gave."""

from dataclasses import dataclass, field
from typing import Literal

from ase.data import atomic_numbers, chemical_symbols

from gnnmd.models.heads import FittingNetConfig
from gnnmd.nn.activations import activation
from gnnmd.nn.updates import RESIDUAL_INITS, UPDATE_STYLES

#: How embedding networks learn of elements: as further inputs, or by a factor from a network of their own.
TEBD_INPUT_MODES = ("concat", "strip")


@dataclass
class RepinitConfig:
    """Shape of the first descriptor, by the names that DeePMD-kit gave; defaults: its "medium" example.

    Attributes:
        rcut, rcut_smth: cutoff, and where its switch begins to fall, Angstrom.
        nsel: room for neighbours; divides sums over them. The nearest nsel count, which makes the energy
            discontinuous where there are more.
        neuron: widths of the embedding network.
        axis_neuron: columns of the sums over neighbours that are multiplied with all others.
        tebd_dim: columns of the embedding of elements.
        tebd_input_mode: one of `TEBD_INPUT_MODES`.
        activation_function: by name, see `nn.activations.activation`.
        resnet_dt: whether layers that add their input have a learned factor per column.
        type_one_side: the element of the neighbour matters, that of the atom does not (three-body: both do).
        use_three_body: whether there is a three-body part.
        three_body_rcut, three_body_rcut_smth, three_body_sel, three_body_neuron: the same for this part.
    """

    rcut: float = 6.0
    rcut_smth: float = 0.5
    nsel: int = 120
    neuron: tuple[int, ...] = (25, 50, 100)
    axis_neuron: int = 12
    tebd_dim: int = 8
    tebd_input_mode: str = "concat"
    activation_function: str = "tanh"
    resnet_dt: bool = False
    type_one_side: bool = False
    use_three_body: bool = True
    three_body_rcut: float = 4.0
    three_body_rcut_smth: float = 3.5
    three_body_sel: int = 48
    three_body_neuron: tuple[int, ...] = (2, 4, 8)

    def __post_init__(self) -> None:
        self.neuron, self.three_body_neuron = tuple(self.neuron), tuple(self.three_body_neuron)
        _check_shell("repinit", self.rcut, self.rcut_smth, self.nsel)
        if self.use_three_body:
            _check_shell("three_body", self.three_body_rcut, self.three_body_rcut_smth, self.three_body_sel)
        if self.tebd_input_mode not in TEBD_INPUT_MODES:
            raise ValueError(
                f"tebd_input_mode={self.tebd_input_mode!r} must be one of {', '.join(TEBD_INPUT_MODES)}"
            )
        if not self.neuron or not 0 < self.axis_neuron <= self.neuron[-1]:
            raise ValueError(f"axis_neuron={self.axis_neuron} must lie in 1..{self.neuron[-1:]} (neuron)")
        activation(self.activation_function)

    @property
    def channels(self) -> int:
        """Columns of what it finds per atom."""
        three_body = self.three_body_neuron[-1] if self.use_three_body else 0
        return self.neuron[-1] * self.axis_neuron + three_body


@dataclass
class RepformerConfig:
    """Shape of the layers, by the names that DeePMD-kit gave; defaults: its "medium" example.

    Attributes:
        rcut, rcut_smth, nsel: see `RepinitConfig`.
        nlayers: number of layers.
        g1_dim, g2_dim: features of an atom and of an edge.
        axis_neuron: see `RepinitConfig`.
        direct_dist: edges start from r / rcut and r_ij / rcut; else from the environment matrix.
        update_g1_has_conv: atoms receive products of neighbours and edges.
        update_g1_has_grrg: they receive invariants of edge features and vectors.
        update_g1_has_drrd: they receive invariants of neighbours and vectors.
        update_g1_has_attn: they attend to their neighbours.
        update_g2_has_g1g1: edges receive the product of their atoms.
        update_g2_has_attn: edges of an atom attend to each other.
        update_h2: vectors do so too.
        attn1_hidden, attn1_nhead: columns of a query and heads of the attention to neighbours.
        attn2_hidden, attn2_nhead: the same among edges.
        attn2_has_gate: weights among edges are multiplied by the product of their vectors first.
        use_sqrt_nnei: sums over vectors are divided by the root of nsel, else by nsel.
        g1_out_conv: these products are an update of their own; else a linear map of invariants reads them.
        g1_out_mlp: atoms have a network of their own; else this linear map reads them too.
        activation_function: by name, see `nn.activations.activation`.
        update_style, update_residual, update_residual_init: see `nn.updates.Update`.
        trainable_ln, ln_eps: of the layer norm after the attention among edges.
    """

    rcut: float = 4.0
    rcut_smth: float = 3.5
    nsel: int = 48
    nlayers: int = 6
    g1_dim: int = 128
    g2_dim: int = 32
    axis_neuron: int = 4
    direct_dist: bool = False
    update_g1_has_conv: bool = True
    update_g1_has_grrg: bool = True
    update_g1_has_drrd: bool = True
    update_g1_has_attn: bool = False
    update_g2_has_g1g1: bool = False
    update_g2_has_attn: bool = True
    update_h2: bool = False
    attn1_hidden: int = 128
    attn1_nhead: int = 4
    attn2_hidden: int = 32
    attn2_nhead: int = 4
    attn2_has_gate: bool = True
    use_sqrt_nnei: bool = True
    g1_out_conv: bool = True
    g1_out_mlp: bool = True
    activation_function: str = "tanh"
    update_style: str = "res_residual"
    update_residual: float = 0.01
    update_residual_init: str = "norm"
    trainable_ln: bool = True
    ln_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_shell("repformer", self.rcut, self.rcut_smth, self.nsel)
        if self.nlayers < 1:
            raise ValueError(f"nlayers={self.nlayers} must be at least 1")
        if self.update_style not in UPDATE_STYLES or self.update_residual_init not in RESIDUAL_INITS:
            raise ValueError(
                f"update_style={self.update_style!r} must be one of {', '.join(UPDATE_STYLES)}, and "
                f"update_residual_init={self.update_residual_init!r} one of {', '.join(RESIDUAL_INITS)}"
            )
        if not self.mixed_channels:
            raise ValueError(
                "with g1_out_mlp and g1_out_conv one of update_g1_has_grrg and update_g1_has_drrd must be set"
            )
        activation(self.activation_function)

    @property
    def g1_updates(self) -> int:
        """Number of updates of an atom."""
        convolution = self.update_g1_has_conv and self.g1_out_conv
        return 1 + self.g1_out_mlp + convolution + self.update_g1_has_attn

    @property
    def g2_updates(self) -> int:
        """Number of updates of an edge."""
        return 1 + self.update_g2_has_g1g1 + self.update_g2_has_attn

    @property
    def mixed_channels(self) -> int:
        """Columns that the linear map of each layer reads."""
        return (
            self.g1_dim * (not self.g1_out_mlp)
            + self.g2_dim * (self.update_g1_has_conv and not self.g1_out_conv)
            + self.axis_neuron
            * (self.g2_dim * self.update_g1_has_grrg + self.g1_dim * self.update_g1_has_drrd)
        )


@dataclass
class DPA2Config:
    """Shape of a DPA-2 network.

    Attributes:
        type: which model this is.
        type_map: symbols of the elements it knows; () = all 118.
        repinit: the first descriptor.
        repformer: the layers.
        concat_output_tebd: append the embedding of the element to the output.
        add_tebd_to_repinit_out: add it, mapped, to the first descriptor.
        use_econf_tebd: embed electron configurations instead of unit vectors.
        use_tebd_bias: whether this embedding has a bias.
        env_protection: added to distances in the environment matrix, Angstrom.
        exclude_types: pairs of elements that do not see each other (they still count for nsel).
        fitting_net: the network from features to energies.
    """

    type: Literal["dpa2"] = "dpa2"
    type_map: tuple[str, ...] = ()
    repinit: RepinitConfig = field(default_factory=RepinitConfig)
    repformer: RepformerConfig = field(default_factory=RepformerConfig)
    concat_output_tebd: bool = True
    add_tebd_to_repinit_out: bool = False
    use_econf_tebd: bool = False
    use_tebd_bias: bool = False
    env_protection: float = 0.0
    exclude_types: tuple[tuple[str, str], ...] = ()
    fitting_net: FittingNetConfig = field(default_factory=FittingNetConfig)

    def __post_init__(self) -> None:
        self.type_map = tuple(self.type_map) or tuple(chemical_symbols[1:])
        self.exclude_types = tuple((a, b) for a, b in self.exclude_types)
        excluded = {symbol for pair in self.exclude_types for symbol in pair}
        for holds, complaint in [
            (
                set(self.type_map) <= set(chemical_symbols[1:]),
                f"type_map={self.type_map} must hold symbols of elements",
            ),
            (
                len(set(self.type_map)) == len(self.type_map),
                f"type_map={self.type_map} names an element twice",
            ),
            (
                excluded <= set(self.type_map),
                f"exclude_types={self.exclude_types} must hold elements of type_map",
            ),
        ]:
            if not holds:
                raise ValueError(complaint)

    @property
    def r_cut(self) -> float:
        """Cutoff of the neighbour list, Angstrom."""
        three_body = self.repinit.three_body_rcut if self.repinit.use_three_body else 0.0
        return max(self.repinit.rcut, three_body, self.repformer.rcut)

    @property
    def max_neighbors(self) -> None:
        """No limit: the model itself counts the nearest where it was trained so."""
        return None

    @property
    def numbers(self) -> list[int]:
        """Atomic number of each type."""
        return [atomic_numbers[symbol] for symbol in self.type_map]

    @property
    def channels(self) -> int:
        """Features of an atom after the last layer."""
        return self.repformer.g1_dim + self.concat_output_tebd * self.repinit.tebd_dim


def _check_shell(name: str, rcut: float, rcut_smth: float, nsel: int) -> None:
    if not 0 <= rcut_smth < rcut or nsel < 1:
        raise ValueError(
            f"{name}: rcut_smth={rcut_smth} A must lie below rcut={rcut} A, and nsel={nsel} be at least 1"
        )
