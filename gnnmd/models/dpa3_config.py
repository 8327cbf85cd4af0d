"""Shape of a DPA-3 network."""

from dataclasses import dataclass, field
from typing import Literal

from ase.data import atomic_numbers, chemical_symbols

from gnnmd.models.heads import FittingNetConfig
from gnnmd.nn.activations import activation
from gnnmd.nn.updates import RESIDUAL_INITS, UPDATE_STYLES


@dataclass
class DPA3Config:
    """Shape of a DPA-3 network, by the names that DeePMD-kit gave; defaults are those of its example.

    Attributes:
        type: which model this is.
        type_map: symbols of the elements it knows; () = all 118.
        n_dim, e_dim, a_dim: features of an atom, an edge and an angle.
        nlayers: layers L.
        e_rcut, e_rcut_smth: cutoff of the edges, and where their switch falls, Angstrom.
        a_rcut, a_rcut_smth: the same for the edges that form angles.
        e_sel, a_sel: usual numbers of edges and of edges that form angles per atom; they divide sums.
        use_dynamic_sel: whether all neighbours count; else the nearest e_sel (for angles a_sel) do, and the
            energy is discontinuous where there are more.
        sel_reduce_factor: divides e_sel and a_sel in sums if all neighbours count.
        axis_neuron: columns of the sums over vectors that are multiplied with all others.
        n_multi_edge_message: messages of an edge to its atom, each with a residual of its own.
        update_angle: whether there are angles.
        a_compress_rate: 0 = angles read all features of atoms and edges; c > 0 = a_dim / c of the atom's and
            a_compress_e_rate * a_dim / (2 c) of each edge's.
        a_compress_e_rate: see there.
        a_compress_use_split: read the first of them; else linear combinations.
        smooth_edge_update: edges without angles get zero in place of the sum over angles; else their own
            features.
        edge_init_use_dist: edges start from their length; else from s(r) / r, normalised.
        use_exp_switch: which switch function, see `nn.switch`.
        taper: width in Angstrom over which the exponential switch is brought to zero at the cutoff with two
            continuous derivatives; 0 = a step of 8e-7, as published.
        update_style, update_residual, update_residual_init: see `nn.updates.Update`.
        sequential_update: edges, then angles, then atoms, each from what the step before gave.
        fix_stat_std: standard deviation of the environment matrix; 0 = `DPA3.set_statistics` sets it.
        env_protection: added to distances in the environment matrix, Angstrom.
        exclude_types: pairs of elements that do not see each other.
        activation_function: by name, see `nn.activations.activation`.
        use_econf_tebd: embed electron configurations instead of unit vectors.
        use_tebd_bias: whether this embedding has a bias.
        concat_output_tebd: append it to the output.
        add_chg_spin_ebd: embed charge and spin.
        fitting_net: the network from features to energies.
    """

    type: Literal["dpa3"] = "dpa3"
    type_map: tuple[str, ...] = ()
    n_dim: int = 128
    e_dim: int = 64
    a_dim: int = 32
    nlayers: int = 6
    e_rcut: float = 6.0
    e_rcut_smth: float = 5.3
    a_rcut: float = 4.0
    a_rcut_smth: float = 3.5
    e_sel: int = 1200
    a_sel: int = 300
    use_dynamic_sel: bool = True
    sel_reduce_factor: float = 10.0
    axis_neuron: int = 4
    n_multi_edge_message: int = 1
    update_angle: bool = True
    a_compress_rate: int = 1
    a_compress_e_rate: int = 2
    a_compress_use_split: bool = True
    smooth_edge_update: bool = True
    edge_init_use_dist: bool = True
    use_exp_switch: bool = True
    taper: float = 0.0
    update_style: str = "res_residual"
    update_residual: float = 0.1
    update_residual_init: str = "const"
    sequential_update: bool = False
    fix_stat_std: float = 0.3
    env_protection: float = 0.0
    exclude_types: tuple[tuple[str, str], ...] = ()
    activation_function: str = "silut:10"
    use_econf_tebd: bool = False
    use_tebd_bias: bool = False
    concat_output_tebd: bool = False
    add_chg_spin_ebd: bool = False
    fitting_net: FittingNetConfig = field(
        default_factory=lambda: FittingNetConfig(activation_function="silut:10")
    )

    def __post_init__(self) -> None:
        self.type_map = tuple(self.type_map) or tuple(chemical_symbols[1:])
        self.exclude_types = tuple((a, b) for a, b in self.exclude_types)
        excluded = {symbol for pair in self.exclude_types for symbol in pair}
        c = self.a_compress_rate
        parts = (self.a_dim, self.a_compress_e_rate * self.a_dim)
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
            (
                0 < self.a_rcut <= self.e_rcut and self.a_sel <= self.e_sel,
                f"angles (a_rcut={self.a_rcut} A, a_sel={self.a_sel}) must be among the edges (e_rcut="
                f"{self.e_rcut} A, e_sel={self.e_sel})",
            ),
            (
                0 < self.e_rcut_smth < self.e_rcut and 0 < self.a_rcut_smth < self.a_rcut,
                f"switches must fall before their cutoff: e_rcut_smth={self.e_rcut_smth} A, a_rcut_smth="
                f"{self.a_rcut_smth} A",
            ),
            (self.nlayers >= 1, f"nlayers={self.nlayers} must be at least 1"),
            (
                c == 0 or (parts[0] % c == 0 and parts[1] % (2 * c) == 0),
                f"a_compress_rate={c} must divide a_dim={self.a_dim}, and twice of it must divide "
                f"a_compress_e_rate * a_dim={parts[1]}",
            ),
            (
                self.update_style in UPDATE_STYLES and self.update_residual_init in RESIDUAL_INITS,
                f"update_style={self.update_style!r} must be one of {', '.join(UPDATE_STYLES)}, and "
                f"update_residual_init={self.update_residual_init!r} one of {', '.join(RESIDUAL_INITS)}",
            ),
            (
                not self.sequential_update or self.update_style == "res_residual",
                "sequential_update is known with update_style='res_residual' only",
            ),
            (
                self.smooth_edge_update or not self.use_dynamic_sel,
                "use_dynamic_sel needs smooth_edge_update",
            ),
        ]:
            if not holds:
                raise ValueError(complaint)
        activation(self.activation_function)

    @property
    def r_cut(self) -> float:
        """Cutoff of the neighbour list, Angstrom."""
        return self.e_rcut

    @property
    def max_neighbors(self) -> None:
        """No limit: the model itself counts the nearest where it was trained so."""
        return None

    @property
    def numbers(self) -> list[int]:
        """Atomic number of each type."""
        return [atomic_numbers[symbol] for symbol in self.type_map]

    @property
    def usual_edges(self) -> float:
        """N_e, which divides sums over edges."""
        return self.e_sel / self.sel_reduce_factor if self.use_dynamic_sel else self.e_sel

    @property
    def usual_angles(self) -> float:
        """N_a, whose root divides sums over angles."""
        return self.a_sel / self.sel_reduce_factor if self.use_dynamic_sel else self.a_sel

    @property
    def compressed(self) -> tuple[int, int]:
        """Features of an atom and of an edge that angles read."""
        c = self.a_compress_rate
        if c == 0:
            return self.n_dim, self.e_dim
        return self.a_dim // c, self.a_compress_e_rate * self.a_dim // (2 * c)

    @property
    def channels(self) -> int:
        """Features of an atom after the last layer."""
        return 2 * self.n_dim if self.concat_output_tebd else self.n_dim
