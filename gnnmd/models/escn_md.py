"""eSCN-MD, the network of the eSEN and UMA potentials (arXiv 2502.12147, 2506.23971).

Features of an atom are spherical-harmonic coefficients ``[S, C]``. A message rotates the rows of both atoms
into the frame of their edge, where equivariant maps are small dense matrices per order m, and rotates the
result back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnnmd.graph.geometry import edge_vectors
from gnnmd.graph.graph import AtomGraph
from gnnmd.graph.nearest import cut_between_atoms
from gnnmd.kernels.operations import edge_operations
from gnnmd.models.backbone import Backbone, Block, SystemSum
from gnnmd.nn.activations import SphereSiLU, degree_gate, node_grid
from gnnmd.nn.edge_operations import EdgeOperations, Orders
from gnnmd.nn.embeddings import (
    CHARGE_RANGE,
    CHARGE_SPIN_EMBEDDINGS,
    SPIN_RANGE,
    UNKNOWN_SPIN,
    SystemEmbedding,
)
from gnnmd.nn.experts import EXPERT_NORMS, ExpertLinear, Router, Routing
from gnnmd.nn.mlp import RadialMLP
from gnnmd.nn.norms import NORMS, DegreeNorm
from gnnmd.nn.radial import GaussianBasis, envelope
from gnnmd.nn.recompute import recomputed
from gnnmd.nn.scatter import Groups
from gnnmd.nn.so2 import SO2Linear
from gnnmd.nn.so3 import SO3Linear, n_rows, split_degrees
from gnnmd.nn.wigner import WignerD, edge_frames

#: Divides the sum of the edge-degree embedding, so that it stays of order one for usual numbers of
#: neighbours.
EDGE_DEGREE_SCALE = 5.0

#: On a CPU messages are computed for so many numbers [edges, S, C] at a time that they stay in its caches:
#: 12 to 18 % less time at 100 to 250 atoms. The number of pieces is limited, because each has a gradient of
#: all atoms.
CACHE_VALUES = 2**20
MOST_CACHE_PIECES = 8

#: A captured evaluation has so many numbers [n, S, C] of all layers at most: 8,000 atoms of UMA-S.
CAPTURED_VALUES = 8000 * 9 * 128 * 4

#: Which linear maps of a layer have experts: SO(2) maps of m = 0, of m > 0, radial networks, feed-forward.
EXPERT_PLACES = {
    "so2": (True, True, False, False),
    "so2m0": (True, False, False, False),
    "all": (True, True, True, True),
    "notso2": (False, False, False, True),
}


@dataclass
class ExpertsConfig:
    """Mixture of linear experts: the weights of some linear maps are mixed per system.

    Attributes:
        count: number of experts.
        norm: "softmax", or "pnorm", whose coefficients depend on the number of systems in the batch (as
            published).
        composition: route by the mean embedding of the elements too, not only by charge, spin and data set.
        layers: indices of the layers that have experts; None = all.
        where: a key of `EXPERT_PLACES`.
        dropout: of the routing network's output, in training.
        mean_counts_one_more: divide the composition's sum over n atoms by n + 1, a quirk of UMA-S-1.2 that
            breaks extensivity.
    """

    count: int = 8
    norm: str = "softmax"
    composition: bool = True
    layers: tuple[int, ...] | None = None
    where: str = "so2"
    dropout: float = 0.0
    mean_counts_one_more: bool = False

    def __post_init__(self) -> None:
        if self.layers is not None:
            self.layers = tuple(self.layers)
        if self.count < 1:
            raise ValueError(
                f"experts.count={self.count} must be at least 1; leave experts out for a plain model"
            )
        _one_of("experts.norm", self.norm, EXPERT_NORMS)
        _one_of("experts.where", self.where, EXPERT_PLACES)


@dataclass
class EscnMDConfig:
    """Shape of an eSCN-MD network.

    Attributes:
        type: which model this is.
        r_cut: cutoff, Angstrom.
        lmax: largest degree of the features.
        mmax: largest order used in the frame of an edge.
        channels: features per coefficient, C; even.
        hidden_channels: the same inside a layer, H.
        edge_channels: width of the radial networks and of their element embeddings.
        num_layers: message-passing layers.
        num_basis: Gaussians of the distance, at least 2.
        norm: "rms_norm_sh", "layer_norm" or "layer_norm_sh".
        activation: of messages, "gate" or "s2".
        feed_forward: of atoms, "spectral" or "grid" (equivariant up to about 1e-8 only).
        grid_resolution: points per angle of the sphere grids, even; None = the smallest.
        charge_spin_embedding: "rand_emb" (a table), "pos_emb" (waves) or "lin_emb" (linear).
        dataset_embedding: whether a model that knows several data sets embeds them.
        freeze_charge_spin: keep the charge and spin embeddings as they are in training.
        freeze_dataset: keep the data-set embedding as it is in training.
        charge_balanced_channels: scalar channels that are shifted after every layer so that they sum to the
            charge.
        spin_balanced_channels: the same for spin - 1; done after the charge.
        max_number: element tables hold atomic numbers up to this one.
        max_neighbors: neighbours kept per atom, nearest first; None = all. A limit makes the energy
            discontinuous.
        experts: mixture of linear experts, or None.
    """

    type: Literal["escn_md"] = "escn_md"
    r_cut: float = 6.0
    lmax: int = 2
    mmax: int = 2
    channels: int = 64
    hidden_channels: int = 64
    edge_channels: int = 64
    num_layers: int = 2
    num_basis: int = 64
    norm: str = "rms_norm_sh"
    activation: str = "gate"
    feed_forward: str = "spectral"
    grid_resolution: int | None = None
    charge_spin_embedding: str = "rand_emb"
    dataset_embedding: bool = True
    freeze_charge_spin: bool = False
    freeze_dataset: bool = False
    charge_balanced_channels: tuple[int, ...] = ()
    spin_balanced_channels: tuple[int, ...] = ()
    max_number: int = 118
    max_neighbors: int | None = None
    experts: ExpertsConfig | None = None

    def __post_init__(self) -> None:
        self.charge_balanced_channels = tuple(self.charge_balanced_channels)
        self.spin_balanced_channels = tuple(self.spin_balanced_channels)
        _one_of("norm", self.norm, NORMS)
        _one_of("activation", self.activation, ("gate", "s2"))
        _one_of("feed_forward", self.feed_forward, ("spectral", "grid"))
        _one_of("charge_spin_embedding", self.charge_spin_embedding, CHARGE_SPIN_EMBEDDINGS)
        smallest_grid = 2 * (self.lmax + 1)
        grid = self.grid_resolution or smallest_grid
        balanced = self.charge_balanced_channels + self.spin_balanced_channels
        layers = (self.experts and self.experts.layers) or ()
        for holds, complaint in [
            (self.r_cut > 0, f"r_cut={self.r_cut} A must be positive"),
            (0 <= self.mmax <= self.lmax, f"mmax={self.mmax} must lie in 0..lmax={self.lmax}"),
            (
                self.channels > 0 and self.channels % 2 == 0,
                f"channels={self.channels} must be even and positive",
            ),
            (self.num_basis >= 2, f"num_basis={self.num_basis} must be at least 2"),
            (
                grid % 2 == 0 and grid >= smallest_grid,
                f"grid_resolution={grid} must be even and at least {smallest_grid} for lmax={self.lmax}",
            ),
            (
                all(0 <= c < self.channels for c in balanced),
                f"balanced channels {balanced} must lie in 0..{self.channels - 1}",
            ),
            (
                all(-self.num_layers <= i < self.num_layers for i in layers),
                f"experts.layers={layers} must lie in 0..{self.num_layers - 1}",
            ),
        ]:
            if not holds:
                raise ValueError(complaint)

    def experts_in(self, layer: int) -> tuple[int, int, int, int]:
        """Return the number of experts in the places of `EXPERT_PLACES` in one layer, 0 = plain maps."""
        e = self.experts
        if e is None or (
            e.layers is not None and layer not in e.layers and layer - self.num_layers not in e.layers
        ):
            return (0, 0, 0, 0)
        m0, m, radial, feed_forward = (e.count * place for place in EXPERT_PLACES[e.where])
        return m0, m, radial, feed_forward


def _one_of(name: str, value: str, known: Sequence[str] | dict) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(known)}")


@dataclass(frozen=True)
class Piece:
    """All edges of some consecutive atoms.

    Attributes:
        first: row of the first of these atoms.
        source: ``[E]`` rows of the sources.
        target: ``[E]`` targets, counted from ``first``, ascending.
    """

    first: int
    source: Groups
    target: Groups


@dataclass(frozen=True)
class Edges:
    """A piece of the edges, and what messages read of them.

    Attributes:
        piece: which ones.
        ops: what messages consist of besides matrix products.
        to_edge: ``[E, R, S]`` rotation into the frame of the edge, rows with |m| <= mmax in m-major order.
        damped: ``[E, R, S]`` the same times the envelope, for the way back: every message carries it once.
        gaussians: ``[E, num_basis]`` of the distance.
        source_elements: ``[n_all, edge_channels]`` embedding of the element of each source.
        target_elements: ``[n, edge_channels]`` another one, of the atoms of this piece.
        routing: experts of the edges, or None.
    """

    piece: Piece
    ops: EdgeOperations
    to_edge: Tensor
    damped: Tensor
    gaussians: Tensor
    source_elements: Tensor
    target_elements: Tensor
    routing: Routing | None

    def differentiated(self) -> list[Tensor]:
        """Return what of it a gradient goes through."""
        tensors = [self.to_edge, self.damped, self.gaussians, self.source_elements, self.target_elements]
        return tensors if self.routing is None else [*tensors, self.routing.coefficients]

    def with_differentiated(self, tensors: Sequence[Tensor]) -> "Edges":
        """Return the same with these in their place."""
        to_edge, damped, gaussians, sources, targets, *coefficients = tensors
        routing = self.routing and replace(self.routing, coefficients=coefficients[0])
        return Edges(self.piece, self.ops, to_edge, damped, gaussians, sources, targets, routing)

    def radial(self, network: RadialMLP, routing: Routing | None) -> Tensor:
        """Return what a network makes of lengths and elements, ``[E, c_out]``."""
        sources = self.source_elements, self.piece.source
        targets = self.target_elements, self.piece.target
        return network(self.gaussians, sources, targets, routing, self.ops)


@dataclass(frozen=True)
class EscnBasis:
    """What all layers read and none changes.

    Attributes:
        edges: of the owned atoms, in the pieces in which they are processed.
        recompute: whether what is computed for a piece is computed again in the backward pass.
        system: ``[B, C]`` embedding of charge, spin and data set.
        routing: experts of the owned atoms, or None.
        ops: what layers consist of besides matrix products.
    """

    edges: list[Edges]
    recompute: bool
    system: Tensor
    routing: Routing | None
    ops: EdgeOperations


class EdgeSum(nn.Module):
    """Sum of messages over the edges of each atom."""

    def messages(self, h: Tensor, edges: Edges) -> list[Tensor]:
        """Return ``[E, rows * C]`` of each order in the frames of the edges, last ones left out if zero.

        Args:
            h: ``[n_all, S, C]`` rows of owned and ghost atoms.
            edges: a piece of the edges.
        """
        raise NotImplementedError

    def forward(self, h: Tensor, basis: EscnBasis) -> Tensor:
        """Return ``[n_owned, S, C]``."""
        sums: list[Tensor] = []
        for edges in basis.edges:
            inputs = [h, *edges.differentiated()]
            summed = partial(self._summed, edges)
            if basis.recompute:
                sums += recomputed(summed, inputs, list(self.parameters()))
            else:
                sums += summed(*inputs)
        return torch.cat(sums)

    def _summed(self, edges: Edges, h: Tensor, *tensors: Tensor) -> tuple[Tensor]:
        """Return the sums of one piece as a function of everything in it that is differentiated."""
        edges = edges.with_differentiated(tensors)
        x = self.messages(h, edges)
        rows = sum(xm.shape[1] for xm in x) // h.shape[2]
        return (edges.ops.sums(edges.damped[:, :rows], x, edges.piece.target, h.dtype),)


class EdgeDegree(EdgeSum):
    """First block: what surrounds an atom before any message, radial functions times spherical harmonics."""

    def __init__(self, config: EscnMDConfig):
        super().__init__()
        width = config.edge_channels
        self.radial = RadialMLP(config.num_basis, width, width, (config.lmax + 1) * config.channels)

    def messages(self, h: Tensor, edges: Edges) -> list[Tensor]:
        """Return the rows of m = 0."""
        return [edges.radial(self.radial, None)]


class EdgeConvolution(EdgeSum):
    """Messages of one layer: rotate both atoms, convolve, activate, convolve, rotate back."""

    def __init__(self, config: EscnMDConfig, experts: tuple[int, int, int, int]):
        super().__init__()
        m0, m, radial, _ = experts
        lmax, mmax, c, hidden = config.lmax, config.mmax, config.channels, config.hidden_channels
        self.hidden, self.orders = hidden, Orders(lmax, mmax)
        self.sphere = None  # gates instead
        if config.activation == "s2":
            self.sphere = SphereSiLU(lmax, mmax, hidden, config.grid_resolution)
        width, factors = config.edge_channels, sum(self.orders.factors) * 2 * c
        self.radial = RadialMLP(config.num_basis, width, width, factors, experts=radial)
        extra, places = lmax * hidden if self.sphere is None else hidden, {"experts_m0": m0, "experts_m": m}
        self.conv_1 = SO2Linear(lmax, mmax, 2 * c, hidden, extra=extra, **places)
        self.conv_2 = SO2Linear(lmax, mmax, hidden, c, **places)

    def messages(self, h: Tensor, edges: Edges) -> list[Tensor]:
        """Return all rows."""
        factors = edges.radial(self.radial, edges.routing)
        ends = edges.piece.source, edges.piece.target, edges.piece.first
        x = edges.ops.scaled_pairs(edges.to_edge, h, factors, *ends, self.orders)
        y = self.conv_1(x, edges.routing)
        x = edges.ops.gated(y, self.orders.lmax, self.hidden) if self.sphere is None else self.sphere(y)
        return self.conv_2(x, edges.routing)


class SpectralFeedForward(nn.Module):
    """Per atom: a map per degree, gates from the scalars, a map per degree."""

    def __init__(self, config: EscnMDConfig, experts: int):
        super().__init__()
        lmax, c, hidden = config.lmax, config.channels, config.hidden_channels
        self.gates = ExpertLinear(c, lmax * hidden, experts=experts)
        self.linear_1 = SO3Linear(lmax, c, hidden)
        self.linear_2 = SO3Linear(lmax, hidden, c)

    def forward(self, x: Tensor, routing: Routing | None) -> Tensor:
        """Map ``[n, S, C]`` to ``[n, S, C]``."""
        rows = split_degrees(x)
        gates = F.silu(self.gates(rows[0].squeeze(1), routing))
        return torch.cat(self.linear_2(degree_gate(self.linear_1(rows), gates)), dim=1)


class GridFeedForward(nn.Module):
    """Per atom: a dense network at every point of a sphere grid."""

    def __init__(self, config: EscnMDConfig, experts: int):
        super().__init__()
        c, hidden = config.channels, config.hidden_channels
        self.grid = node_grid(config.lmax, config.grid_resolution)
        widths = [(c, hidden), (hidden, hidden), (hidden, c)]
        self.layers = nn.ModuleList(ExpertLinear(*w, bias=False, experts=experts) for w in widths)

    def forward(self, x: Tensor, routing: Routing | None) -> Tensor:
        """Map ``[n, S, C]`` to ``[n, S, C]``."""
        f = self.grid.to_values(x)  # [n, G, C]
        n, points = f.shape[:2]
        if routing is not None and routing.rows is not None:
            routing = routing.of_rows([points * rows for rows in routing.rows])
        f = f.flatten(0, 1)
        f = F.silu(self.layers[0](f, routing))
        f = F.silu(self.layers[1](f, routing))
        return self.grid.to_coefficients(self.layers[2](f, routing).unflatten(0, (n, points)))


class EdgeDegreeBlock(Block):
    """Adds the edge-degree embedding.

    It is the first block of the loop, not part of the embedding of atoms: it needs the edges of a row, which
    a rank has for the atoms it owns only.
    """

    def __init__(self, config: EscnMDConfig):
        super().__init__()
        self.edge_degree = EdgeDegree(config)

    def forward(self, h: Tensor, x_all: Tensor, basis: EscnBasis, g: AtomGraph) -> tuple[Tensor, EscnBasis]:
        """Map ``[n_owned, S, C]`` to ``[n_owned, S, C]``."""
        return h + self.edge_degree(x_all, basis) / EDGE_DEGREE_SCALE, basis


class EscnBlock(Block):
    """One layer: messages, then a network per atom, each on normalised features and added on."""

    def __init__(self, config: EscnMDConfig, layer: int):
        super().__init__()
        experts = config.experts_in(layer)
        self.norm_1 = DegreeNorm(config.norm, config.lmax, config.channels)
        self.edge_convolution = EdgeConvolution(config, experts)
        self.norm_2 = DegreeNorm(config.norm, config.lmax, config.channels)
        feed_forward = SpectralFeedForward if config.feed_forward == "spectral" else GridFeedForward
        self.feed_forward = feed_forward(config, experts[3])

    def outgoing(self, h: Tensor, basis: EscnBasis, g: AtomGraph) -> Tensor:
        """Return normalised rows, with their system in the scalars."""
        system = basis.system
        system = system if len(system) == 1 else system.index_select(0, g.system[: len(h)])
        return basis.ops.degree_norm(h, self.norm_1, system)

    def forward(self, h: Tensor, x_all: Tensor, basis: EscnBasis, g: AtomGraph) -> tuple[Tensor, EscnBasis]:
        """Map ``[n_owned, S, C]`` to ``[n_owned, S, C]``."""
        h = h + self.edge_convolution(x_all, basis)
        return h + self.feed_forward(basis.ops.degree_norm(h, self.norm_2), basis.routing), basis


class EscnMD(Backbone):
    """The eSCN-MD backbone.

    Args:
        config: its shape.
        dataset_rows: row of the data-set embedding that each of the potential's data sets reads; () = none.
    """

    compilable = spares_are_free = True

    def __init__(self, config: EscnMDConfig, dataset_rows: Sequence[int] = ()):
        super().__init__()
        self.config = config
        self.r_cut, self.max_neighbors = config.r_cut, config.max_neighbors
        self.row_width = n_rows(config.lmax) * config.channels
        self.largest_captured = min(CAPTURED_VALUES // (self.row_width * max(config.num_layers, 1)), 64_000)
        self.max_number = config.max_number
        if config.charge_spin_embedding == "rand_emb":
            self.charge_range, self.spin_range = CHARGE_RANGE, SPIN_RANGE
        c, width, n_elements = config.channels, config.edge_channels, config.max_number + 1
        self.atom_embedding = nn.Embedding(n_elements, c)
        self.system_embedding = SystemEmbedding(c, config.charge_spin_embedding, dataset_rows)
        self.system_embedding.freeze(charge_spin=config.freeze_charge_spin, dataset=config.freeze_dataset)
        self.source_embedding = nn.Embedding(n_elements, width)
        self.target_embedding = nn.Embedding(n_elements, width)
        for embedding in (self.source_embedding, self.target_embedding):
            nn.init.uniform_(embedding.weight, -1e-3, 1e-3)
        self.gaussians = GaussianBasis(config.r_cut, config.num_basis)
        self.wigner = WignerD(config.lmax, config.mmax)
        self.router = None
        if config.experts is not None:
            e = config.experts
            self.router = Router(c, e.count, e.norm, config.max_number if e.composition else None, e.dropout)
        layers = [EscnBlock(config, i) for i in range(config.num_layers)]
        self.blocks = nn.ModuleList([EdgeDegreeBlock(config), *layers])
        self.norm = DegreeNorm(config.norm, config.lmax, c)

    def edge_basis(self, g: AtomGraph, n_owned: int, system_sum: SystemSum) -> EscnBasis:
        """Return the rotations, edge scalars and system embeddings of a graph with positions."""
        dtype = self.atom_embedding.weight.dtype
        target = g.edge_index[1]
        with torch.autocast(g.cell.device.type, enabled=False):  # geometry is cheap and must stay exact
            vector = edge_vectors(g).to(dtype)
            distance = torch.linalg.vector_norm(vector, dim=1)
            to_edge = self.wigner(edge_frames(vector / distance[:, None]))
            damped = to_edge * envelope(distance, self.r_cut)[:, None, None]
            gaussians = self.gaussians(distance)
        system = self.system_embedding(g.charge, g.spin, g.dataset)
        coefficients = self.coefficients(g, n_owned, system, system_sum)

        def routing(rows: Tensor) -> Routing | None:
            return None if coefficients is None else Routing.of(coefficients, g.system[rows])

        ops = edge_operations(self.kernels, g.cell.device)
        pieces = g.links or self._pieces(g, n_owned)
        lengths = [len(piece.target.index) for piece in pieces]
        tensors = [t.split(lengths) for t in (target, to_edge, damped, gaussians)]
        sources = self.source_embedding(g.numbers)
        targets = self.target_embedding(g.numbers[:n_owned]).split([piece.target.n for piece in pieces])
        edges = [
            Edges(piece, ops, to_edge, damped, gaussians, sources, elements, routing(target))
            for piece, target, to_edge, damped, gaussians, elements in zip(
                pieces, *tensors, targets, strict=True
            )
        ]
        recompute = self.edge_chunk is not None and self.edge_chunk < len(target)
        owned = torch.arange(n_owned, device=target.device)
        return EscnBasis(edges, recompute, system, routing(owned), ops)

    def links(
        self, g: AtomGraph, n_owned: int, skin: float = 0.0, room: Sequence[int] | None = None
    ) -> list[Piece] | None:
        """Return the edges in pieces; see `Backbone.links`. Those in the skin add zero."""
        c = self.config
        if c.charge_balanced_channels or c.spin_balanced_channels or (self.router and g.n_systems > 1):
            return None  # lists of the host are read
        pieces = self._pieces(g, n_owned)
        for piece in pieces:
            piece.source.make()
            piece.target.make()
        return pieces

    def embed(self, g: AtomGraph, basis: EscnBasis) -> Tensor:
        """Return ``[n_all, S, C]``: element and system in the scalars, zero elsewhere."""
        scalars = self.atom_embedding(g.numbers) + basis.system.index_select(0, g.system)
        return F.pad(scalars[:, None], (0, 0, 0, n_rows(self.config.lmax) - 1))

    def after_block(self, i: int, h: Tensor, g: AtomGraph, system_sum: SystemSum) -> Tensor:
        """Shift the balanced channels so that they sum to the charge, and to spin - 1, of their system."""
        if i == 0:
            return h  # the edge-degree embedding is no layer
        spin = g.spin
        if self.config.charge_spin_embedding == "lin_emb":
            spin = torch.where(spin == 0, UNKNOWN_SPIN, spin)  # as published
        for channels, total in [
            (self.config.charge_balanced_channels, g.charge),
            (self.config.spin_balanced_channels, spin - 1),
        ]:
            if channels:
                x = h[:, 0, list(channels)]  # [n_owned, k]
                missing = (total[:, None] - system_sum(x)) / g.n_atoms.clamp(min=1)[:, None]
                shift = torch.zeros_like(h[:, 0])
                shift[:, list(channels)] = missing[g.system[: len(h)]]
                h = torch.cat([h[:, :1] + shift[:, None], h[:, 1:]], dim=1)
        return h

    def coefficients(
        self, g: AtomGraph, n_owned: int, system: Tensor, system_sum: SystemSum
    ) -> Tensor | None:
        """Return the weight of each expert in each system, ``[B, K]``, from its embedding ``[B, C]``."""
        if self.router is None or self.config.experts is None:
            return None
        if self.router.composition is None:
            return self.router(system, None)
        total = system_sum(self.router.composition(g.numbers[:n_owned]))  # [B, C]
        counted = g.n_atoms + 1 if self.config.experts.mean_counts_one_more else g.n_atoms.clamp(min=1)
        return self.router(system, total / counted[:, None])

    def _pieces(self, g: AtomGraph, n_owned: int) -> list[Piece]:
        """Cut the edges between atoms; those that are computed again in the backward pass as told."""
        source, target = g.edge_index
        longest = len(target)
        if self.edge_chunk is not None and self.edge_chunk < longest:
            longest = self.edge_chunk
        elif target.device.type == "cpu" and not torch.compiler.is_compiling():
            row = n_rows(self.config.lmax) * self.config.channels
            longest = max(CACHE_VALUES // row, longest // MOST_CACHE_PIECES)
        pieces = []
        for (first, start), (end, stop) in pairwise(cut_between_atoms(target, n_owned, longest)):
            j, i = source[start:stop], target[start:stop] - first
            count = None if g.n_edges is None else (g.n_edges - start).clamp(0, stop - start)
            groups = Groups(j, len(g.numbers), ascending=False, count=count)
            pieces.append(Piece(first, groups, Groups(i, end - first, count=count)))
        return pieces
