"""DPA-2 (arXiv 2312.15492): a first descriptor from all neighbours, then layers that read the near ones.

Features are named as in the paper: g1 of atoms, g2 and the vectors h2 of edges. An edge j -> i belongs to the
atom i; only g1 is ever read from elsewhere. "Repinit" and its three-body part need the elements of
neighbours only, so they are the first block of the loop. The output reads atoms only: the last layer has no
updates of edges.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from ase.data import chemical_symbols
from torch import Tensor, nn
from torch.nn import functional as F

from gnnmd.graph.geometry import edge_vectors
from gnnmd.graph.graph import AtomGraph
from gnnmd.graph.nearest import cut_between_atoms, nearness
from gnnmd.models.backbone import Backbone, Block, SystemSum
from gnnmd.models.dpa2_config import DPA2Config, RepformerConfig, RepinitConfig
from gnnmd.models.heads import FittingNet
from gnnmd.models.potential import Potential
from gnnmd.nn.activations import activation
from gnnmd.nn.edge_attention import NeighborAttention, PairFeatures, PairVectors, PairWeights
from gnnmd.nn.neighborhood import Neighborhood, Shell
from gnnmd.nn.recompute import recomputed
from gnnmd.nn.resnet_mlp import ResNetMLP, dense
from gnnmd.nn.symmetrise import symmetrised
from gnnmd.nn.type_embedding import TypeEmbedding
from gnnmd.nn.updates import Update


@dataclass(frozen=True)
class Piece:
    """Some consecutive atoms with all their edges.

    Attributes:
        first, n_atoms: rows ``first .. first + n_atoms - 1`` are these atoms.
        shells: of the first descriptor: within its cutoff, and within that of its three-body part.
        near: of the layers.
        g2: ``[E, g2_dim]`` features of the edges in ``near``.
        h2: ``[E, 3]`` their vectors.
    """

    first: int
    n_atoms: int
    shells: list[Shell]
    near: Shell
    g2: Tensor
    h2: Tensor


@dataclass(frozen=True)
class DPA2Basis:
    """Edges of the owned atoms, in the pieces in which they are processed.

    Attributes:
        elements: ``[T, tebd_dim]`` embedding of every type.
        pieces: the pieces.
        recompute: whether what is computed for a piece is computed again in the backward pass.
    """

    elements: Tensor
    pieces: list[Piece]
    recompute: bool


class ElementNet(nn.Module):
    """Embedding network of a number and of the elements that it belongs to.

    Args:
        widths: of its layers.
        tebd_dim: columns of the embedding of elements.
        n_elements: how many elements: one or two.
        config: the rest of its shape.
    """

    def __init__(self, widths: Sequence[int], tebd_dim: int, n_elements: int, config: RepinitConfig):
        super().__init__()
        act, scaled, inputs = activation(config.activation_function), config.resnet_dt, n_elements * tebd_dim
        strip = config.tebd_input_mode == "strip"
        self.net = ResNetMLP([1 if strip else 1 + inputs, *widths], act, scaled=scaled)
        self.factor = ResNetMLP([inputs, *widths], act, scaled=scaled) if strip else None

    def forward(self, x: Tensor, switch: Tensor, elements: Tensor, types: Sequence[Tensor]) -> Tensor:
        """Return ``[..., widths[-1]]``.

        Args:
            x: ``[..., 1]`` the number.
            switch: ``[..., 1]`` what switches the factor of the elements off.
            elements: ``[T, tebd_dim]`` embedding of every type.
            types: of each of the elements ``[...]``, broadcast against each other.
        """
        if self.factor is None:
            parts = [F.embedding(t, elements).expand(*x.shape[:-1], -1) for t in types]
            return self.net(torch.cat([x, *parts], dim=-1))
        n, index = len(elements), types[0]
        inputs = elements
        if len(types) == 2:
            inputs = torch.cat([elements.repeat_interleave(n, dim=0), elements.repeat(n, 1)], dim=1)
            index = types[0] * n + types[1]
        factor = F.embedding(index, self.factor(inputs))  # once for every pair of types
        return self.net(x) * (1 + switch * factor)


class Repinit(Block):
    """First block: what surrounds an atom, from the elements of its neighbours."""

    def __init__(self, config: DPA2Config):
        super().__init__()
        c, out = config.repinit, config.repformer.g1_dim
        self.axis, n_elements = c.axis_neuron, 1 if c.type_one_side else 2
        self.n_elements = n_elements
        self.net = ElementNet(c.neuron, c.tebd_dim, n_elements, c)
        self.three_body_net = ElementNet(c.three_body_neuron, c.tebd_dim, 2, c) if c.use_three_body else None
        self.transform = nn.Identity() if c.channels == out else dense(c.channels, out, bias=False)
        self.transform_element = None
        if config.add_tebd_to_repinit_out:
            self.transform_element = dense(c.tebd_dim, out, bias=False)
        self.act = activation(config.repformer.activation_function)

    def forward(self, h: Tensor, h_all: Tensor, basis: DPA2Basis, g: AtomGraph) -> tuple[Tensor, DPA2Basis]:
        """Map embeddings of elements ``[n_owned, tebd_dim]`` to ``[n_owned, g1_dim]``."""
        rows: list[Tensor] = []
        for piece in basis.pieces:
            found = partial(self._found, piece.shells)
            inputs = [basis.elements, *(x for s in piece.shells for x in (s.switch, s.environment))]
            if basis.recompute:
                rows += recomputed(found, inputs, list(self.parameters()))
            else:
                rows += found(*inputs)
        g1 = torch.cat(rows)
        if self.transform_element is not None:
            g1 = g1 + self.transform_element(h)
        return self.act(g1), basis

    def _found(self, shells: list[Shell], elements: Tensor, *geometry: Tensor) -> tuple[Tensor]:
        """Return the rows of the atoms of a piece as a function of everything that is differentiated."""
        pairs = zip(shells, geometry[::2], geometry[1::2], strict=True)
        wide, *near = [replace(s, switch=switch, environment=r) for s, switch, r in pairs]
        found = [self.two_body(wide, elements)]
        if self.three_body_net is not None:
            found.append(self.three_body(self.three_body_net, near[0], elements))
        return (self.transform(torch.cat(found, dim=1)),)

    def two_body(self, shell: Shell, elements: Tensor) -> Tensor:
        """Return M^T M[:, :axis] flattened, of M = sum_j R_ij (x) net(s_ij, elements) / nsel."""
        r, table = shell.environment, shell.table
        switch = shell.switch[:, None]
        features = self.net(r[:, :1], switch, elements, shell.types[: self.n_elements])  # [E, C]
        m = table.sum_products(r, features) / shell.room  # [n, 4, C]
        return torch.einsum("nxc,nxa->nca", m, m[:, :, : self.axis]).flatten(1)

    def three_body(self, net: ElementNet, shell: Shell, elements: Tensor) -> Tensor:
        """Return sum_jk c_jk net(c_jk, elements) / nsel^2 with c_jk = h_ij . h_ik, ``[n, C]``."""
        h, s, t = (shell.table.fill(x) for x in (shell.environment[:, 1:], shell.switch, shell.types[0]))
        c = (h @ h.transpose(1, 2))[..., None]  # [n, M, M, 1], zero where there is no edge
        both = (s[:, :, None] * s[:, None, :])[..., None]
        features = net(c, both, elements, (t[:, :, None], t[:, None, :]))
        return (c * features).sum((1, 2)) / shell.room**2


class Repformer(Block):
    """One layer; all its updates read what it was given, none reads another.

    Args:
        config: its shape.
        last: whether edges are not read any more, so that they have no updates.
    """

    def __init__(self, config: RepformerConfig, *, last: bool):
        super().__init__()
        c, self.config, self.last = config, config, last
        self.act = activation(c.activation_function)
        update = partial(
            Update, c.update_style, residual=c.update_residual, residual_init=c.update_residual_init
        )
        self.self_mlp = dense(c.g1_dim, c.g1_dim) if c.g1_out_mlp else None
        self.project_conv = None
        if c.update_g1_has_conv:
            widths = (c.g2_dim, c.g1_dim) if c.g1_out_conv else (c.g1_dim, c.g2_dim)
            self.project_conv = dense(*widths, bias=False)
        self.mix = dense(c.mixed_channels, c.g1_dim)
        self.attention = None
        if c.update_g1_has_attn:
            self.attention = NeighborAttention(c.g1_dim, c.attn1_hidden, c.attn1_nhead)
        self.g1_update = update(c.g1_updates, c.g1_dim)
        inside = c.update_g1_has_conv and not c.g1_out_conv
        key_value = (c.attn1_hidden + c.g1_dim) * c.attn1_nhead
        self.sent_widths = [c.g1_dim, c.g2_dim * inside, key_value * c.update_g1_has_attn]
        if last:
            return
        self.edge_mlp = dense(c.g2_dim, c.g2_dim)
        self.project_product = dense(c.g1_dim, c.g2_dim, bias=False) if c.update_g2_has_g1g1 else None
        self.pair_weights = self.pair_features = self.pair_vectors = None
        if c.update_g2_has_attn or c.update_h2:
            self.pair_weights = PairWeights(c.g2_dim, c.attn2_hidden, c.attn2_nhead, gated=c.attn2_has_gate)
        if c.update_g2_has_attn:
            self.pair_features = PairFeatures(c.g2_dim, c.attn2_nhead)
            self.norm = nn.LayerNorm(c.g2_dim, eps=c.ln_eps).requires_grad_(c.trainable_ln)
        self.g2_update = update(c.g2_updates, c.g2_dim)
        if c.update_h2:
            self.pair_vectors = PairVectors(c.attn2_nhead)
            self.h2_update = update(1, 1)

    def forward(self, h: Tensor, h_all: Tensor, basis: DPA2Basis, g: AtomGraph) -> tuple[Tensor, DPA2Basis]:
        """Map ``[n_owned, g1_dim]`` to ``[n_owned, g1_dim]``."""
        rows, pieces, sent = [], [], self._sent(h_all)
        for piece in basis.pieces:
            inputs = sent, piece.near.switch, piece.g2, piece.h2
            layer = partial(self._layer, piece)
            g1, *edges = (
                recomputed(layer, inputs, list(self.parameters())) if basis.recompute else layer(*inputs)
            )
            rows.append(g1)
            pieces.append(piece if self.last else replace(piece, g2=edges[0], h2=edges[1]))
        return torch.cat(rows), replace(basis, pieces=pieces)

    def _sent(self, g1_all: Tensor) -> Tensor:
        """Return what atoms send to their neighbours, ``[n_all, sum of widths]``: g1 and maps of it."""
        sent = [g1_all]
        if self.project_conv is not None and not self.config.g1_out_conv:
            sent.append(self.project_conv(g1_all))
        if self.attention is not None:
            sent.append(self.attention.key_value(g1_all))
        return torch.cat(sent, dim=1)

    def _layer(
        self, piece: Piece, sent: Tensor, switch: Tensor, g2: Tensor, h2: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the new g1 of the atoms of a piece, and g2 and h2 of its edges where they are read again."""
        shell = replace(piece.near, switch=switch)
        g1 = sent.narrow(0, piece.first, piece.n_atoms).narrow(1, 0, self.config.g1_dim)
        received = sent.index_select(0, shell.source).split(self.sent_widths, dim=1)
        new = self._atoms(shell, g1, received, g2, h2)
        return (new,) if self.last else (new, *self._edges(shell, g1, received[0], g2, h2))

    def _atoms(self, shell: Shell, g1: Tensor, received: Sequence[Tensor], g2: Tensor, h2: Tensor) -> Tensor:
        """Return the new g1; learned residuals belong to updates by the order of this list."""
        c, switch = self.config, shell.switch[:, None]
        neighbor, projected, key_value = received
        pull = switch * h2 / (shell.room**0.5 if c.use_sqrt_nnei else shell.room)
        updates, mixed = [], []
        if self.self_mlp is not None:
            updates.append(self.act(self.self_mlp(g1)))
        else:
            mixed.append(g1)
        if self.project_conv is not None and c.g1_out_conv:
            updates.append(shell.table.sum(switch * neighbor * self.project_conv(g2)) / shell.room)
        elif self.project_conv is not None:
            mixed.append(shell.table.sum(switch * projected * g2) / shell.room)
        if c.update_g1_has_grrg:
            mixed.append(symmetrised(shell.table.sum_products(pull, g2), c.axis_neuron))
        if c.update_g1_has_drrd:
            mixed.append(symmetrised(shell.table.sum_products(pull, neighbor), c.axis_neuron))
        updates.append(self.act(self.mix(torch.cat(mixed, dim=1))))
        if self.attention is not None:
            updates.append(self.attention(g1, key_value, shell.switch, shell.room, shell.table))
        return self.g1_update(g1, updates)

    def _edges(
        self, shell: Shell, g1: Tensor, neighbor: Tensor, g2: Tensor, h2: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the new g2 and h2."""
        updates = [self.act(self.edge_mlp(g2))]
        if self.project_product is not None:
            product = g1.index_select(0, shell.table.target) * neighbor
            updates.append(self.project_product(shell.switch[:, None] * product))
        if self.pair_weights is None:
            return self.g2_update(g2, updates), h2
        weights = self.pair_weights(g2, h2, shell.switch, shell.room, shell.table)
        if self.pair_features is not None:
            updates.append(self.norm(self.pair_features(weights, g2, shell.table)))
        if self.pair_vectors is not None:
            h2 = self.h2_update(h2, [self.pair_vectors(weights, h2, shell.table)])
        return self.g2_update(g2, updates), h2


class DPA2(Backbone):
    """The DPA-2 backbone.

    Args:
        config: its shape.
    """

    excluded: Tensor
    needs_statistics = True

    def __init__(self, config: DPA2Config):
        super().__init__()
        self.config, c, near = config, config.repinit, config.repformer
        n_types, protection = len(config.type_map), config.env_protection
        self.type_embedding = TypeEmbedding(
            config.numbers,
            c.tebd_dim,
            electron_configurations=config.use_econf_tebd,
            bias=config.use_tebd_bias,
        )
        pairs = {(a, b) for pair in config.exclude_types for a, b in (pair, pair[::-1])}
        excluded = [[(a, b) in pairs for b in config.type_map] for a in config.type_map]
        self.register_buffer("excluded", torch.tensor(excluded), persistent=False)
        self.wide = Neighborhood(n_types, c.rcut, c.rcut_smth, c.nsel, protection)
        self.three_body = None
        if c.use_three_body:
            shape = c.three_body_rcut, c.three_body_rcut_smth, c.three_body_sel
            self.three_body = Neighborhood(n_types, *shape, protection)
        shape = near.rcut, near.rcut_smth, near.nsel
        self.near = Neighborhood(n_types, *shape, protection, near.direct_dist)
        self.r_cut, self.exchange_cut = max(n.r_cut for n in self.neighborhoods), near.rcut
        self.row_width, self.max_number = near.g1_dim, len(chemical_symbols) - 1
        self.act = activation(near.activation_function)
        self.edge_embedding = dense(1, near.g2_dim)
        layers = [Repformer(near, last=i + 1 == near.nlayers) for i in range(near.nlayers)]
        self.blocks = nn.ModuleList([Repinit(config), *layers])
        self.norm = nn.Unflatten(1, (1, config.channels))

    @property
    def neighborhoods(self) -> list[Neighborhood]:
        """Of the first descriptor, of its three-body part if there is one, and of the layers."""
        return [n for n in (self.wide, self.three_body, self.near) if n is not None]

    def edge_basis(self, g: AtomGraph, n_owned: int, system_sum: SystemSum) -> DPA2Basis:
        """Return the shells of edges and the first features of the nearest."""
        dtype = self.edge_embedding.weight.dtype
        pieces = []
        with torch.autocast(g.cell.device.type, enabled=False):  # geometry is cheap and must stay exact
            limit = self.edge_chunk or g.edge_index.shape[1]
            for first, n_atoms, shells in self._shells(g, n_owned, limit):
                shells = [
                    replace(s, switch=s.switch.to(dtype), environment=s.environment.to(dtype)) for s in shells
                ]
                *wide, near = shells
                radial, h2 = near.environment.split([1, 3], dim=1)
                pieces.append(Piece(first, n_atoms, wide, near, self.act(self.edge_embedding(radial)), h2))
            elements = self.type_embedding.table()
        return DPA2Basis(elements, pieces, recompute=limit < g.edge_index.shape[1])

    def embed(self, g: AtomGraph, basis: DPA2Basis) -> Tensor:
        """Return ``[n_all, tebd_dim]`` from the elements alone."""
        return F.embedding(self.type_embedding.types(g.numbers), basis.elements)

    def after_block(self, i: int, h: Tensor, g: AtomGraph, system_sum: SystemSum) -> Tensor:
        """Append the embedding of the elements to the last features if the configuration says so."""
        if not self.config.concat_output_tebd or i + 1 < len(self.blocks):
            return h
        return torch.cat([h, self.type_embedding(self.type_embedding.types(g.numbers[: len(h)]))], dim=1)

    def statistics(self, g: AtomGraph, n_owned: int) -> Tensor:
        """Return sums ``[neighborhoods, T, 5]`` over the owned atoms of a graph, see `Environment.sums`."""
        owned = self.type_embedding.types(g.numbers[:n_owned])
        [(_, _, shells)] = self._shells(g, n_owned, g.edge_index.shape[1])
        pairs = zip(self.neighborhoods, shells, strict=True)
        return torch.stack([neighborhood.sums(shell, owned) for neighborhood, shell in pairs])

    def set_statistics(self, sums: Tensor) -> None:
        """Set the deviations of the environment matrices from the sum of `statistics` over the data."""
        for neighborhood, mine in zip(self.neighborhoods, sums, strict=True):
            if not neighborhood.direct:
                neighborhood.environment.set_statistics(mine)

    def _shells(self, g: AtomGraph, n_owned: int, limit: int) -> Iterator[tuple[int, int, list[Shell]]]:
        """Cut the edges between atoms; yield first atom, number of atoms and all shells of every piece."""
        cuts = cut_between_atoms(g.edge_index[1], n_owned, limit)
        lengths = [stop - start for (_, start), (_, stop) in pairwise(cuts)]
        types = self.type_embedding.types(g.numbers)
        pieces = zip(
            pairwise(cuts), *(x.split(lengths) for x in (*g.edge_index, edge_vectors(g))), strict=True
        )
        for ((first, _), (end, _)), source, target, vector in pieces:
            target, owned = target - first, types[first:end]
            distance = torch.linalg.vector_norm(vector.detach(), dim=1)
            place = nearness(vector, target, end - first)
            seen = ~self.excluded[owned[target], types[source]]
            shells = []
            for n in self.neighborhoods:
                edges = ((distance < n.r_cut) & (place < n.room) & seen).nonzero().squeeze(1)
                shells.append(n(edges, source, target, vector, types, owned))
            yield first, end - first, shells


def dpa2_potential(config: DPA2Config) -> Potential:
    """Return a potential with fresh weights (float32, from torch's current random state)."""
    head = FittingNet(config.channels, config.fitting_net)
    return Potential(DPA2(config), {"energy": head}, elements=config.numbers)
