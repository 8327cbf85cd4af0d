"""DPA-3 (arXiv 2506.01686): messages between atoms, edges and angles ("RepFlow").

Atoms, edges and angles have features n_i, e_ij and a_ijk. An edge j -> i and an angle (ij, ik) belong to the
atom i, so that only the features of atoms are ever read from elsewhere. The output reads atoms only: the last
layer updates no edges and no angles, the last but one no angles. Their weights are kept, because published
models have them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import pi, sqrt

import torch
from ase.data import chemical_symbols
from torch import Tensor, nn
from torch.nn import functional as F

from gnnmd.graph.angles import angle_pairs
from gnnmd.graph.geometry import edge_vectors
from gnnmd.graph.graph import AtomGraph
from gnnmd.graph.nearest import cut_between_atoms, nearness
from gnnmd.graph.selection import first_of
from gnnmd.kernels.operations import Operations, operations
from gnnmd.models.backbone import Backbone, Block, SystemSum
from gnnmd.models.dpa3_config import DPA3Config
from gnnmd.models.heads import FittingNet
from gnnmd.models.potential import Potential
from gnnmd.nn.activations import activation
from gnnmd.nn.environment import Environment
from gnnmd.nn.recompute import recomputed
from gnnmd.nn.resnet_mlp import dense
from gnnmd.nn.scatter import Groups
from gnnmd.nn.split_linear import SplitLinear
from gnnmd.nn.switch import exp_switch, poly_switch
from gnnmd.nn.symmetrise import symmetrised
from gnnmd.nn.type_embedding import TypeEmbedding, VectorEmbedding
from gnnmd.nn.updates import Update

#: Devices on which edges that do not count are removed. Elsewhere their switch is zero, which gives the same;
#: on a GPU the host would have to wait for their number.
REMOVING_DEVICES = ("cpu",)

#: Charges and spins that the embedding of "add_chg_spin_ebd" can hold.
CHARGE_RANGE = (-100, 99)
SPIN_RANGE = (0, 99)


@dataclass(frozen=True)
class Links:
    """Which edges and angles some consecutive atoms have: what does not depend on positions.

    Attributes:
        first, n_atoms: rows ``first .. first + n_atoms - 1`` are these atoms.
        n_edges: edges of the graph that end on them.
        kept: ``[E]`` which of these there are here; None = all.
        source: ``[E]`` rows of the sources.
        target: ``[E]`` targets, counted from ``first``, ascending.
        near: ``[F]`` which edges form angles; others after them, where there is room.
        near_target: ``[F]`` their targets.
        n_near: scalar int64, how many form angles; None = all.
        ij, ik: ``[A]`` edges of each angle, as places in ``near``; sorted by ij.
    """

    first: int
    n_atoms: int
    n_edges: int
    kept: Tensor | None
    source: Groups
    target: Groups
    near: Tensor
    near_target: Tensor
    n_near: Tensor | None
    ij: Groups
    ik: Groups


@dataclass(frozen=True)
class Shell:
    """Some consecutive atoms with all their edges and angles.

    Attributes:
        links: which these are.
        ops: how sums over them and activations are computed.
        switch: ``[E]`` s_ij / N_e; 0 for edges that do not count.
        pull: ``[E, 3]`` s_ij h_ij / sqrt(N_e).
        weight: ``[A]`` s_ij s_ik / sqrt(N_a) with the switch of the angles.
        e: ``[E, e_dim]`` features of the edges.
        a: ``[A, a_dim]`` features of the angles.
    """

    links: Links
    ops: Operations
    switch: Tensor
    pull: Tensor
    weight: Tensor
    e: Tensor
    a: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what depends on positions and weights."""
        return self.switch, self.pull, self.weight, self.e, self.a

    def with_tensors(self, switch: Tensor, pull: Tensor, weight: Tensor, e: Tensor, a: Tensor) -> "Shell":
        """Return the same atoms, edges and angles with other `tensors`."""
        return replace(self, switch=switch, pull=pull, weight=weight, e=e, a=a)

    def with_features(self, e: Tensor | None = None, a: Tensor | None = None) -> "Shell":
        """Return the same with those features that are given."""
        return replace(self, e=self.e if e is None else e, a=self.a if a is None else a)


@dataclass(frozen=True)
class DPA3Basis:
    """Edges and angles of the owned atoms, in the pieces in which they are processed.

    Attributes:
        shells: the pieces.
        recompute: whether what is computed for a piece is computed again in the backward pass.
    """

    shells: list[Shell]
    recompute: bool


class RepFlow(Block):
    """One layer: updates of atoms, edges and angles, added to their features."""

    def __init__(self, config: DPA3Config, layer: int):
        super().__init__()
        c, self.config = config, config
        left = c.nlayers - 1 - layer
        self.moves_edges = c.sequential_update or left > 0
        self.moves_angles = c.update_angle and (c.sequential_update or left > 1)
        n, e, a, heads = c.n_dim, c.e_dim, c.a_dim, c.n_multi_edge_message

        def update(n_updates: int, channels: int) -> Update:
            return Update(c.update_style, n_updates, channels, c.update_residual, c.update_residual_init)

        self.node_self = dense(n, n)
        self.node_sym = dense(c.axis_neuron * (e + n), n)
        self.node_edge = SplitLinear([n, n, e], heads * n)
        self.node_update = update(2 + heads, n)
        self.edge_self = SplitLinear([n, n, e], e)
        self.edge_update = update(2 if c.update_angle else 1, e)
        self.compress_node = self.compress_edge = None
        if c.update_angle:
            n_read, e_read = c.compressed
            if c.a_compress_rate and not c.a_compress_use_split:
                self.compress_node = dense(n, n_read, bias=False)
                self.compress_edge = dense(e, e_read, bias=False)
            self.edge_angle_1 = SplitLinear([a, n_read, e_read, e_read], e)
            self.edge_angle_2 = dense(e, e)
            self.angle_self = SplitLinear([a, n_read, e_read, e_read], a)
            self.angle_update = update(1, a)

    def forward(self, h: Tensor, h_all: Tensor, basis: DPA3Basis, g: AtomGraph) -> tuple[Tensor, DPA3Basis]:
        """Map ``[n_owned, n_dim]`` to ``[n_owned, n_dim]``."""
        sent = self.node_edge.part(1, h_all)  # [n_all, heads * n_dim]
        sent_to_edges = self.edge_self.part(1, h_all) if self.moves_edges else sent[:, :0]
        atoms, shells = [], []
        for shell in basis.shells:
            inputs, layer = (h_all, sent, sent_to_edges, *shell.tensors()), partial(self._layer, shell)
            n, *moved = recomputed(layer, inputs, self._weights()) if basis.recompute else layer(*inputs)
            atoms.append(n)
            shells.append(shell.with_features(*moved))
        return torch.cat(atoms), replace(basis, shells=shells)

    def _layer(
        self, shell: Shell, h_all: Tensor, sent: Tensor, sent_to_edges: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Return new features of a piece: of its atoms, and of its edges and angles where these move."""
        old = new = shell.with_tensors(*tensors)
        n = h_all.narrow(0, shell.links.first, shell.links.n_atoms)
        if self.config.sequential_update:
            new = replace(new, e=self.edge_update.add(new.e, 0, self._edge_self(new, n, sent_to_edges)))
            if self.config.update_angle:
                new = replace(new, a=self.angle_update.add(new.a, 0, self._angle_self(new, n)))
                new = replace(new, e=self.edge_update.add(new.e, 1, self._edge_angle(new, n)))
            atoms = self._atoms(new, h_all, n, sent)
        else:
            atoms = self._atoms(old, h_all, n, sent)
            if self.moves_edges:
                updates = [self._edge_self(old, n, sent_to_edges)]
                if self.config.update_angle:
                    updates.append(self._edge_angle(old, n))
                new = replace(new, e=self.edge_update(old.e, updates))
            if self.moves_angles:
                new = replace(new, a=self.angle_update(old.a, [self._angle_self(old, n)]))
        return (atoms, *([new.e] if self.moves_edges else []), *([new.a] if self.moves_angles else []))

    def _atoms(self, shell: Shell, h_all: Tensor, n: Tensor, sent: Tensor) -> Tensor:
        """n_i + updates from itself, from the vectors to its neighbours and from their messages."""
        links, ops = shell.links, shell.ops
        sums = (
            ops.weighted_sums(shell.pull, shell.e, links.target),
            ops.weighted_sums(shell.pull, h_all, links.target, links.source),
        )
        invariants = torch.cat([symmetrised(x, self.config.axis_neuron) for x in sums], dim=1)
        messages = self._of_edges(self.node_edge, shell, n, sent)
        received = ops.activated_sums(shell.switch, messages, links.target)
        heads = received.split(self.config.n_dim, dim=1)
        return self.node_update(n, [ops.act(self.node_self(n)), ops.act(self.node_sym(invariants)), *heads])

    def _edge_self(self, shell: Shell, n: Tensor, sent: Tensor) -> Tensor:
        """Update of e_ij from both atoms and the edge, ``[E, e_dim]``."""
        return shell.ops.act(self._of_edges(self.edge_self, shell, n, sent))

    def _edge_angle(self, shell: Shell, n: Tensor) -> Tensor:
        """Update of e_ij from its angles with all other edges of atom i, ``[E, e_dim]``."""
        near, act, linear = shell.links.near, shell.ops.act, self.edge_angle_2
        messages = self._of_angles(self.edge_angle_1, shell, n)
        reduced = shell.ops.activated_sums(shell.weight, messages, shell.links.ij)
        if not self.config.smooth_edge_update:
            return act(linear(shell.e.index_copy(0, near, reduced.to(shell.e.dtype))))
        without, updates = act(linear.bias), act(linear(reduced))
        return without.to(updates.dtype).expand(len(shell.e), -1).index_copy(0, near, updates)

    def _angle_self(self, shell: Shell, n: Tensor) -> Tensor:
        """Update of a_ijk from its edges and its atom, ``[A, a_dim]``."""
        return shell.ops.act(self._of_angles(self.angle_self, shell, n))

    def _of_edges(self, linear: SplitLinear, shell: Shell, n: Tensor, sent: Tensor) -> Tensor:
        """W [n_i, n_j, e_ij] + b, ``[E, out]``, with the part of n_j given."""
        received = linear.part(0, n, bias=True)
        y = shell.ops.pair_rows(received, shell.links.target, sent, shell.links.source)
        return linear.add_part(2, shell.e, y)

    def _of_angles(self, linear: SplitLinear, shell: Shell, n: Tensor) -> Tensor:
        """W [a_ijk, n_i, e_ik, e_ij] + b, ``[A, out]``, of compressed n and e."""
        links = shell.links
        e = shell.e.index_select(0, links.near)
        if self.compress_node is not None and self.compress_edge is not None:
            n, e = self.compress_node(n), self.compress_edge(e)
        elif self.config.a_compress_rate:
            n_read, e_read = self.config.compressed
            n, e = n[:, :n_read], e[:, :e_read]
        received = linear.part(1, n, bias=True).index_select(0, links.near_target) + linear.part(3, e)
        y = shell.ops.pair_rows(received, links.ij, linear.part(2, e), links.ik)
        return linear.add_part(0, shell.a, y)

    def _weights(self) -> list[Tensor]:
        """Return the parameters that have an influence."""
        used: list[nn.Module | None] = [self.node_self, self.node_sym, self.node_edge, self.node_update]
        if self.moves_edges:
            used += [self.edge_self, self.edge_update]
            if self.config.update_angle:
                used += [self.edge_angle_1, self.edge_angle_2, self.compress_node, self.compress_edge]
        if self.moves_angles:
            used += [self.angle_self, self.angle_update]
        return [weight for module in used if module is not None for weight in module.parameters()]


class DPA3(Backbone):
    """The DPA-3 backbone.

    Args:
        config: its shape.
    """

    largest_captured = 16_000
    excluded: Tensor

    def __init__(self, config: DPA3Config):
        super().__init__()
        c, self.config = config, config
        self.r_cut, self.row_width, self.max_number = c.e_rcut, c.n_dim, len(chemical_symbols) - 1
        self.act = activation(c.activation_function)
        self.type_embedding = TypeEmbedding(
            c.numbers, c.n_dim, electron_configurations=c.use_econf_tebd, bias=c.use_tebd_bias
        )
        if c.add_chg_spin_ebd:
            self.charge_range, self.spin_range = CHARGE_RANGE, SPIN_RANGE
            rows = [high - low + 1 for low, high in (CHARGE_RANGE, SPIN_RANGE)]
            self.charge_embedding, self.spin_embedding = (
                VectorEmbedding(torch.eye(n, dtype=torch.float64), c.n_dim) for n in rows
            )
            self.mix_charge_spin = dense(2 * c.n_dim, c.n_dim)
        types = range(len(c.type_map))
        pairs = {(a, b) for pair in c.exclude_types for a, b in (pair, pair[::-1])}
        excluded = [[(c.type_map[i], c.type_map[j]) in pairs for j in types] for i in types]
        self.register_buffer("excluded", torch.tensor(excluded), persistent=False)
        self.needs_statistics = c.fix_stat_std == 0
        self.environment = Environment(len(c.type_map), c.env_protection, c.fix_stat_std or 1.0)
        self.edge_embedding = dense(1, c.e_dim)
        self.angle_embedding = dense(1, c.a_dim, bias=False)
        self.blocks = nn.ModuleList(RepFlow(c, i) for i in range(c.nlayers))
        self.spares_are_free = c.smooth_edge_update  # else they make a difference
        self.norm = nn.Unflatten(1, (1, c.channels))

    def edge_basis(self, g: AtomGraph, n_owned: int, system_sum: SystemSum) -> DPA3Basis:
        """Return edges and angles with their first features."""
        ops = operations(self.kernels, self.config.activation_function, g.cell.device)
        with torch.autocast(g.cell.device.type, enabled=False):  # geometry is cheap and must stay exact
            vector, types = edge_vectors(g), self.type_embedding.types(g.numbers)
            links = g.links or self._links(g, vector.detach(), n_owned)
            vectors = vector.split([piece.n_edges for piece in links])
            shells = [self._shell(piece, ops, r, types) for piece, r in zip(links, vectors, strict=True)]
        return DPA3Basis(shells, recompute=len(shells) > 1)

    def links(
        self, g: AtomGraph, n_owned: int, skin: float = 0.0, room: Sequence[int] | None = None
    ) -> list[Links] | None:
        """Return which angles there are, and who is summed with whom; see `Backbone.links`.

        With room, for edges that form angles and for angles, only of graphs in one piece.
        """
        if not self.config.smooth_edge_update:  # then it makes a difference whether an edge is in angles
            return None
        pieces = self._links(g, edge_vectors(g).detach(), n_owned, skin, room)
        for p in pieces:
            for groups in (p.source, p.target, p.ij, p.ik):
                groups.make()
        return pieces

    def lengths(self, links: list[Links]) -> tuple[int, ...]:
        """Return how many edges form angles, and how many angles there are; see `Backbone.lengths`."""
        return len(links[0].near), len(links[0].ij.index)

    def needed(self, links: list[Links]) -> tuple[Tensor, ...]:
        """See `Backbone.needed`."""
        assert links[0].n_near is not None
        assert links[0].ij.count is not None
        return links[0].n_near, links[0].ij.count

    def embed(self, g: AtomGraph, basis: DPA3Basis) -> Tensor:
        """Return ``[n_all, n_dim]`` from the elements alone."""
        return self.act(self._elements(g))

    def after_block(self, i: int, h: Tensor, g: AtomGraph, system_sum: SystemSum) -> Tensor:
        """Append the embedding of the elements to the last features if the configuration says so."""
        if not self.config.concat_output_tebd or i + 1 < len(self.blocks):
            return h
        return torch.cat([h, self._elements(g)[: len(h)]], dim=1)

    def statistics(self, g: AtomGraph, n_owned: int) -> Tensor:
        """Return sums ``[T, 5]`` over the owned atoms of a graph with positions, see `Environment.sums`.

        As published, they are those of the polynomial switch, whichever switch the model has.
        """
        source, target = g.edge_index
        vector, types = edge_vectors(g).detach(), self.type_embedding.types(g.numbers)
        distance, counts, _ = self._counted(vector, source, target, n_owned, types)
        switch = torch.where(counts, poly_switch(distance, self.config.e_rcut_smth, self.r_cut), 0.0)
        raw = self.environment.raw(vector, distance, switch)
        return self.environment.sums(raw, types[target], types[:n_owned], self.config.e_sel)

    def set_statistics(self, sums: Tensor) -> None:
        """Set the deviations of the environment matrix from the sum of `statistics` over the training data.

        Raises:
            ValueError: the configuration fixes the deviations.
        """
        if not self.needs_statistics:
            raise ValueError(
                f"fix_stat_std={self.config.fix_stat_std} fixes the deviations; set it to 0 to use statistics"
            )
        self.environment.set_statistics(sums)

    def _elements(self, g: AtomGraph) -> Tensor:
        x = self.type_embedding(self.type_embedding.types(g.numbers))
        if not self.config.add_chg_spin_ebd:
            return x
        parts = [self.charge_embedding(g.charge - CHARGE_RANGE[0]), self.spin_embedding(g.spin)]
        system = self.act(self.mix_charge_spin(torch.cat(parts, dim=1)))  # [B, n_dim]
        return x + system.index_select(0, g.system)

    def _switch(self, distance: Tensor, r_smooth: float, r_cut: float) -> Tensor:
        if not self.config.use_exp_switch:
            return poly_switch(distance, r_smooth, r_cut)
        switch = exp_switch(distance, r_smooth, r_cut)
        taper = self.config.taper
        return switch * poly_switch(distance, r_cut - taper, r_cut) if taper else switch

    def _counted(
        self, vector: Tensor, source: Tensor, centre: Tensor, n_atoms: int, types: Tensor, first: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return lengths, which edges count and which of them form angles."""
        c, distance = self.config, torch.linalg.vector_norm(vector, dim=1)
        counts, near = distance < c.e_rcut, distance < c.a_rcut
        if not c.use_dynamic_sel:
            place = nearness(vector, centre, n_atoms)
            counts, near = counts & (place < c.e_sel), near & (place < c.a_sel)
        if c.exclude_types:
            seen = ~self.excluded[types[centre + first], types[source]]
            counts, near = counts & seen, near & seen
        return distance, counts, near

    def _links(
        self,
        g: AtomGraph,
        vector: Tensor,
        n_owned: int,
        skin: float | None = None,
        room: Sequence[int] | None = None,
    ) -> list[Links]:
        """Return edges and angles in pieces: those that count now, or with a skin all that may."""
        source, target = g.edge_index
        types = self.type_embedding.types(g.numbers)
        cuts = list(pairwise(cut_between_atoms(target, n_owned, self.edge_chunk or len(target))))
        return [
            self._links_of(
                first,
                end - first,
                source[start:stop],
                target[start:stop] - first,
                vector[start:stop],
                types,
                None if g.n_edges is None else (g.n_edges - start).clamp(0, stop - start),
                skin,
                room,
            )
            for (first, start), (end, stop) in cuts
        ]

    def _links_of(
        self,
        first: int,
        n_atoms: int,
        source: Tensor,
        target: Tensor,
        vector: Tensor,
        types: Tensor,
        count: Tensor | None,
        skin: float | None,
        room: Sequence[int] | None,
    ) -> Links:
        c, n_edges, kept = self.config, len(target), None
        if skin is None:
            _, counts, near = self._counted(vector, source, target, n_atoms, types, first)
            if vector.device.type in REMOVING_DEVICES and not counts.all():
                kept, count = counts.nonzero().squeeze(1), None
                source, target, near = (x.index_select(0, kept) for x in (source, target, near))
        else:
            near = torch.linalg.vector_norm(vector, dim=1) < c.a_rcut + skin
        if not c.update_angle:
            near = torch.zeros_like(near)
        by_target = Groups(target, n_atoms, count=count)
        if room is None:
            places, n_near = near.nonzero().squeeze(1), None
            near_target = target.index_select(0, places)
            pairs = angle_pairs(near_target, n_atoms)
        else:
            places, n_near = first_of(near, room[0])
            near_target = target.index_select(0, places)
            near_counts = F.pad(near.cumsum(0), (1, 0)).index_select(0, by_target.first).diff()
            pairs = angle_pairs(near_target, n_atoms, counts=near_counts, room=room[1])
        return Links(
            first=first,
            n_atoms=n_atoms,
            n_edges=n_edges,
            kept=kept,
            source=Groups(source, len(types), ascending=False, count=count),
            target=by_target,
            near=places,
            near_target=near_target,
            n_near=n_near,
            ij=Groups(pairs.ij, len(places), count=pairs.count),
            ik=Groups(pairs.ik, len(places), ascending=False, count=pairs.count, known_order=pairs.by_ik),
        )

    def _shell(self, links: Links, ops: Operations, vector: Tensor, types: Tensor) -> Shell:
        c, dtype = self.config, self.edge_embedding.weight.dtype
        source, target, near, first = links.source.index, links.target.index, links.near, links.first
        vector = vector if links.kept is None else vector.index_select(0, links.kept)
        distance, counts, in_angles = self._counted(vector, source, target, links.n_atoms, types, first)
        switch = torch.where(counts, self._switch(distance, c.e_rcut_smth, c.e_rcut), 0.0)
        environment = self.environment(vector, distance, switch, types[first : first + links.n_atoms][target])
        if c.edge_init_use_dist:
            e = self.edge_embedding(distance[:, None].to(dtype))
        else:
            e = ops.act(self.edge_embedding(environment[:, :1].to(dtype)))
        r = distance.index_select(0, near)
        direction = (vector.index_select(0, near) / (r + 1e-6)[:, None]).to(dtype)
        near_switch = torch.where(in_angles[near], self._switch(r, c.a_rcut_smth, c.a_rcut), 0.0)
        near_switch = (near_switch / c.usual_angles**0.25).to(dtype)
        cosine, weight = (
            (x.index_select(0, links.ij.index) * x.index_select(0, links.ik.index)).sum(1)
            for x in (direction, near_switch[:, None])
        )
        if links.ij.count is not None:
            there = torch.arange(len(weight), device=weight.device) < links.ij.count
            weight = torch.where(there, weight, 0.0)
        cosine = cosine[:, None] * ((1 - 1e-6) / sqrt(pi))
        return Shell(
            links=links,
            ops=ops,
            switch=(switch / c.usual_edges).to(dtype),
            pull=(switch[:, None] * environment[:, 1:] / sqrt(c.usual_edges)).to(dtype),
            weight=weight,
            e=e,
            a=self.angle_embedding(cosine) if c.update_angle else cosine,
        )


def dpa3_potential(config: DPA3Config) -> Potential:
    """Return a potential with fresh weights (float32, from torch's current random state)."""
    head = FittingNet(config.channels, config.fitting_net)
    return Potential(DPA3(config), {"energy": head}, elements=config.numbers)
