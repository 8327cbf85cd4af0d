"""From atoms to energy, forces and stress, once for all models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
from ase.data import chemical_symbols
from torch import Tensor, nn

from gnnmd.graph.atoms import AtomBatch
from gnnmd.graph.geometry import strained, volume
from gnnmd.graph.graph import AtomGraph
from gnnmd.graph.neighbors import NeighborList, neighbor_list
from gnnmd.models.backbone import Backbone
from gnnmd.nn.float64 import Float64Buffers
from gnnmd.parallel import GPContext, Plan, Ranks, build_plan, share_of

#: Rows of `Potential.element_energies`: one per atomic number, row 0 unused.
N_ELEMENTS = 119


@dataclass(frozen=True)
class MergedFor:
    """The systems a mixture of experts was merged for; its weights are wrong for all others.

    Attributes:
        composition: "reduced" (counts up to a common factor), "exact" or "any".
        numbers: atomic numbers, ascending.
        counts: how often each occurs.
        charge: total charge.
        spin: spin multiplicity.
        dataset: name of the data set.
    """

    composition: str
    numbers: tuple[int, ...]
    counts: tuple[int, ...]
    charge: int
    spin: int
    dataset: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", tuple(self.numbers))
        object.__setattr__(self, "counts", tuple(self.counts))

    @classmethod
    def of(cls, batch: AtomBatch, b: int, dataset: str, composition: str) -> "MergedFor":
        """Describe system b of a batch."""
        numbers, counts = torch.unique(batch.numbers[batch.system == b], return_counts=True)
        if composition == "any":
            numbers = counts = numbers[:0]
        elif composition == "reduced":
            counts = counts // gcd(*counts.tolist())
        return cls(
            composition=composition,
            numbers=tuple(numbers.tolist()),
            counts=tuple(counts.tolist()),
            charge=int(batch.charge[b]),
            spin=int(batch.spin[b]),
            dataset=dataset,
        )


@dataclass(frozen=True)
class Prediction:
    """What a potential says about a batch of systems.

    Attributes:
        energy: ``[B]`` float64, eV.
        forces: ``[n_owned, 3]`` float64, eV/A.
        stress: ``[B, 3, 3]`` float64, eV/A^3, dE/dstrain / V (positive = tension); NaN for systems whose
            cell has no volume; None when it was not asked for or the model has none.
        node_energies: ``[n_owned]`` float64, eV, summing to the energy.
        descriptors: ``[n_owned, C]`` invariant node features, or None when they were not asked for.
    """

    energy: Tensor
    forces: Tensor
    stress: Tensor | None
    node_energies: Tensor
    descriptors: Tensor | None = None

    def detach(self) -> "Prediction":
        """Return the same numbers without their graph."""
        return Prediction(
            energy=self.energy.detach(),
            forces=self.forces.detach(),
            stress=None if self.stress is None else self.stress.detach(),
            node_energies=self.node_energies.detach(),
            descriptors=None if self.descriptors is None else self.descriptors.detach(),
        )


class Potential(Float64Buffers):
    """A backbone with heads.

    The head "energy" is always there. Forces are derivatives of the energy unless there is a head "forces";
    so is the stress, unless there is a head "stress" (and none of it if only the forces have a head).

    Args:
        backbone: the message-passing model.
        heads: by what they predict: "energy", "forces", "stress".
        datasets: names of the data sets (levels of theory) the model tells apart; () = it knows no such
            names.
        elements: atomic numbers it was trained on; () = all its tables hold.

    Attributes:
        element_energies: ``[119]`` float64, eV, added per atom.
        energy_scale: float64 scalar, eV; multiplies what the heads return.
        config: the `PotentialConfig` it was built from, if `build_potential` built it.
        merged_for: the systems its experts were merged for; it refuses others.
    """

    element_energies: Tensor
    energy_scale: Tensor

    def __init__(
        self,
        backbone: Backbone,
        heads: Mapping[str, nn.Module],
        *,
        datasets: Sequence[str] = (),
        elements: Sequence[int] = (),
    ):
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        self.datasets = tuple(datasets)
        self.elements = tuple(sorted(elements))
        self.config: Any = None
        self.merged_for: MergedFor | None = None
        self.register_buffer("element_energies", torch.zeros(N_ELEMENTS, dtype=torch.float64))
        self.register_buffer("energy_scale", torch.ones((), dtype=torch.float64))

    @property
    def r_cut(self) -> float:
        """Cutoff of the neighbour list, Angstrom."""
        return self.backbone.r_cut

    @property
    def has_stress(self) -> bool:
        """Whether it gives the stress of periodic systems."""
        return "forces" not in self.heads or "stress" in self.heads

    def graph(
        self, batch: AtomBatch, neighbors: NeighborList | None = None, *, backend: str = "auto"
    ) -> AtomGraph:
        """Return the graph of a batch on one rank, after checking that the model can describe it.

        Args:
            batch: one or many systems.
            neighbors: all edges within `r_cut`; built here if not given.
            backend: which neighbour-list backend builds it.

        Raises:
            ValueError: an element, charge, spin or data set the model does not know, or another cutoff.
        """
        dataset = self.dataset_index(batch)
        if neighbors is None:
            limit = self.backbone.max_neighbors
            neighbors = neighbor_list(batch, self.r_cut, backend=backend, max_neighbors=limit)
        elif neighbors.r_cut != self.r_cut:
            raise ValueError(
                f"the neighbour list was built with r_cut={neighbors.r_cut} A but the model needs "
                f"{self.r_cut} A; build it with potential.r_cut"
            )
        return AtomGraph(
            numbers=batch.numbers,
            system=batch.system,
            edge_index=neighbors.edge_index,
            shift=neighbors.shift,
            cell=batch.cell,
            n_atoms=batch.n_atoms,
            charge=batch.charge,
            spin=batch.spin,
            dataset=dataset,
        )

    def plan(
        self, batch: AtomBatch, ranks: Ranks, *, carried: tuple[Tensor, ...] = (), **options: Any
    ) -> Plan:
        """Divide a batch that every rank was given; the counterpart of `graph` for many ranks. Collective.

        Args:
            batch: one or many systems, on the device of the ranks.
            ranks: who shares it.
            carried: per-atom rows ``[N, ...]`` of the batch (labels) that travel with the atoms.
            **options: of `build_plan`: skin, partition, headroom, backend.

        Raises:
            ValueError: an element, charge, spin or data set the model does not know.
            RankFailure: the plan cannot be made.
        """
        dataset = self.dataset_index(batch)
        piece, ids = share_of(batch, ranks)
        return build_plan(
            piece,
            ids,
            self.r_cut,
            ranks,
            near=self.backbone.exchange_cut,
            max_neighbors=self.backbone.max_neighbors,
            dataset=dataset,
            carried=tuple(column[ids] for column in carried),
            **options,
        )

    def linked(self, pos: Tensor, g: AtomGraph, gp: GPContext, *, skin: float = 0.0) -> AtomGraph:
        """Return the graph with what the model can derive from its edges once for many calls. Collective.

        Args:
            pos: ``[n_owned, 3]`` float64 positions for which the neighbour list was made, Angstrom.
            g: the graph of this rank.
            gp: this rank's share of it.
            skin: the result is exact until two atoms have come closer to each other by more than this,
                Angstrom.
        """
        with torch.no_grad():
            placed = g.with_positions(gp.exchange(pos), g.cell)
            return replace(g, links=self.backbone.links(placed, gp.n_owned, skin))

    def dataset_index(self, batch: AtomBatch, *, whole: bool = True) -> Tensor:
        """Return ``[B]`` int64, the data set of every system as the model counts them.

        Checks first that the model can describe the batch, for callers that build its graph themselves.

        Args:
            batch: the systems.
            whole: with all their atoms; a piece of them does not tell which mixture of experts they need.

        Raises:
            ValueError: an element, charge, spin or data set the model does not know.
        """
        self._check(batch)
        if whole:
            self._check_mixture(batch)
        names = [self.dataset_name(name) for name in batch.dataset]
        indices = [self.datasets.index(name) if name else 0 for name in names]
        return torch.tensor(indices, dtype=torch.int64).to(batch.numbers.device)

    def forward(
        self, pos: Tensor, g: AtomGraph, gp: GPContext, *, stress: bool = True, descriptors: bool = False
    ) -> Prediction:
        """Return energy, forces and stress.

        In training mode everything can be differentiated by the parameters; else nothing is attached to a
        graph.

        Args:
            pos: ``[n_owned, 3]`` float64 positions of the owned atoms, Angstrom.
            g: the graph of this rank, without positions.
            gp: this rank's share of it; `GPContext.single(n_atoms)` on one rank.
            stress: whether to compute the stress.
            descriptors: whether to return the invariant node features.
        """
        system = g.system[: gp.n_owned]
        by_positions = "forces" not in self.heads
        by_strain = by_positions and stress and "stress" not in self.heads
        with torch.set_grad_enabled(by_positions or self.training):
            if by_positions and not pos.requires_grad:
                pos = pos.detach().requires_grad_()
            x, cell, strain = strained(pos, g.cell, system) if by_strain else (pos, g.cell, None)
            features = self.backbone(g.with_positions(gp.exchange(x), cell), gp)  # [n_owned, K, C]
            with torch.autocast(pos.device.type, enabled=False):  # sums and derivatives stay exact
                features = features.to(next(self.parameters()).dtype)
                out = {
                    name: self.energy_scale * head(features, g).to(torch.float64)
                    for name, head in self.heads.items()
                    if stress or name != "stress"
                }
                node_energies = out["energy"] + self.element_energies[g.numbers[: gp.n_owned]]
                local_energy = node_energies.new_zeros(g.n_systems).index_add(0, system, node_energies)
                if by_positions:
                    leaves = [pos] if strain is None else [pos, strain]
                    gradients = torch.autograd.grad(
                        local_energy.sum(), leaves, create_graph=self.training, materialize_grads=True
                    )
                    out["forces"] = -gradients[0]
            v = volume(g.cell)[:, None, None]  # [B, 1, 1]
            if by_strain:
                out["stress"] = gradients[1] / torch.where(v > 0, v, 1.0)
            if "stress" in out:
                out["stress"] = torch.where(v > 0, gp.sum_ranks(out["stress"]), torch.nan)
        prediction = Prediction(
            energy=gp.sum_ranks(local_energy),
            forces=out["forces"],
            stress=out.get("stress"),
            node_energies=node_energies,
            descriptors=features[:, 0] if descriptors else None,
        )
        return prediction if self.training else prediction.detach()

    def _check(self, batch: AtomBatch) -> None:
        """Refuse what the tables of the model cannot hold or what it was not trained on."""
        numbers = torch.unique(batch.numbers).tolist()
        beyond = [z for z in numbers if not 1 <= z <= self.backbone.max_number]
        if beyond:
            raise ValueError(
                f"atomic numbers {beyond} are outside 1..{self.backbone.max_number}, which the model holds"
            )
        unseen = [z for z in numbers if self.elements and z not in self.elements]
        if unseen:
            names, known = (", ".join(chemical_symbols[z] for z in zs) for zs in (unseen, self.elements))
            raise ValueError(
                f"the model was not trained on {names}; it knows {known}. Fine-tune it on data with these "
                "elements, or remove them"
            )
        for name, values, limits in [
            ("charge", batch.charge, self.backbone.charge_range),
            ("spin", batch.spin, self.backbone.spin_range),
        ]:
            wrong = [] if limits is None else [v for v in values.tolist() if not limits[0] <= v <= limits[1]]
            if wrong:
                raise ValueError(f"{name} {wrong} is outside {limits}, the range of the model's embedding")

    def _check_mixture(self, batch: AtomBatch) -> None:
        """Refuse systems for which the experts were not merged."""
        if self.merged_for is None:
            return
        for b, name in enumerate(batch.dataset):
            found = MergedFor.of(batch, b, self.dataset_name(name), self.merged_for.composition)
            if found != self.merged_for:
                raise ValueError(
                    f"the experts were merged for {self.merged_for}, but system {b} is {found}, which has "
                    "another mixture. Load the checkpoint from before merging; with InferenceSettings("
                    "merge_experts=True) it is merged for every system it meets"
                )

    def dataset_name(self, name: str) -> str:
        """Return the name under which the model knows a system's data set, "" if it makes no difference."""
        if name in self.datasets:
            return name
        if not self.datasets:
            return ""
        if not name and len(self.datasets) == 1:
            return self.datasets[0]
        given = f"dataset {name!r} is not known" if name else "no dataset is given"
        raise ValueError(
            f"{given}; the model knows {', '.join(self.datasets)}. Set atoms.info['dataset'] to one of these"
        )
