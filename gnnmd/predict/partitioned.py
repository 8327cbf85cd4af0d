"""A potential that many ranks evaluate together, from one call to the next.

Every method is collective: all ranks call it, with the same arguments.
"""

import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from gnnmd.graph import AtomBatch, neighbor_list
from gnnmd.graph.boxed import check_boxes
from gnnmd.graph.geometry import complete_cell
from gnnmd.models.potential import Potential, Prediction
from gnnmd.parallel import Plan, Ranks, WorkerDied
from gnnmd.predict.batching import take_systems
from gnnmd.predict.evaluation import (
    RankPotential,
    bytes_for_a_call,
    check_systems,
    count_saved_bytes,
    frozen_copy,
    on_cpu,
    outside_inference_mode,
    own_arithmetic,
)
from gnnmd.predict.merging import MergedExperts
from gnnmd.predict.settings import InferenceSettings

#: What a prediction depends on, besides the names of the data sets.
INPUT = ("positions", "numbers", "system", "cell", "pbc", "charge", "spin")


class PartitionedPotential:
    """A frozen copy of a potential on every rank, and the plan of the systems it saw last.

    The plan is kept as long as its own contents (species, systems, charges, ...) are those of the next call
    and no edge can be missing from it, so results are always those of a new one.

    Args:
        potential: the model, with the same weights on every rank.
        settings: arithmetic, memory and outputs.
        ranks: who evaluates it.
    """

    def __init__(self, potential: Potential, settings: InferenceSettings, ranks: Ranks) -> None:
        self._ranks: Ranks | None = ranks
        self.settings = settings
        self.potential = frozen_copy(potential, ranks.device, settings)
        self._experts = MergedExperts(self.potential, settings)
        self._plan: Plan | None = None
        self._pbc: Tensor | None = None
        self._bytes_per_row = 0.0

    @property
    def ranks(self) -> Ranks:
        """Who evaluates it.

        Raises:
            WorkerDied: nobody any more.
        """
        if self._ranks is None:
            raise WorkerDied("the processes that shared the atoms have parted; make a new PredictUnit")
        return self._ranks

    @property
    def share(self) -> RankPotential:
        """What this rank needs to evaluate the potential in its own way (molecular dynamics)."""
        return RankPotential(self.potential, self.settings, self.ranks, self.ranks.device)

    def leave(self) -> None:
        """Let go of the other ranks.

        A process group must be gone before Python ends: its threads give tensors back, which then kills the
        process ("terminate called without an active exception").
        """
        self._ranks = self._plan = None

    def evaluate(self, batch: AtomBatch, skin: float = 0.0) -> tuple[Prediction, bool]:
        """Evaluate a batch in one call of the network.

        Args:
            batch: all atoms, the same on every rank.
            skin: how much farther than the cutoff edges are listed, so that the list survives motion,
                Angstrom.

        Returns:
            The prediction for all atoms in their order, on the CPU of every rank; and whether neighbours were
            searched.

        Raises:
            ValueError: systems that the model cannot describe, or that are not the same on every rank.
            RankFailure: a plan could not be built.
            MemoryError: this rank's memory is too small; the others are left waiting.
        """
        with own_arithmetic(self.ranks.device, self.settings.tf32):
            batch = outside_inference_mode(batch)
            self._check_same(batch, skin)
            check_systems(batch)
            check_boxes(batch)
            dataset = self.potential.dataset_index(batch).to(self.ranks.device)
            batch = batch.to(self.ranks.device)
            potential = self._experts.for_batch(batch)
            before = self._plan
            self._plan = None  # whatever fails, nothing of the last systems remains
            plan, positions = self._plan_for(batch, dataset, skin, before)
            prediction = on_cpu(_gathered(plan, self._forward(potential, plan, positions, batch.cell)))
            self._plan, self._pbc = plan, batch.pbc.clone()
            return prediction, plan is not before

    def rows(self, batch: AtomBatch) -> list[int]:
        """Return the number of edges and atoms of each system; each rank counts some of the systems.

        Raises:
            RankFailure: a system has no neighbour list.
        """
        self._check_same(batch)
        check_boxes(batch)
        rows = torch.zeros(batch.n_systems, dtype=torch.int64, device=self.ranks.device)
        with self.ranks.together("counting neighbours"):
            for b in range(self.ranks.rank, batch.n_systems, self.ranks.size):
                one = take_systems(batch, b, b + 1).to(self.ranks.device)
                edges = neighbor_list(one, self.potential.r_cut, backend=self.settings.neighbors)
                rows[b] = len(one.numbers) + len(edges.shift)
        return self.ranks.sum(rows).tolist()

    def row_limit(self) -> float:
        """Return how many edges and atoms may go into the next call; 0 means one system."""
        if self.settings.max_edges:
            return self.settings.max_edges
        per_row = torch.tensor(self._bytes_per_row, dtype=torch.float64, device=self.ranks.device)
        free = torch.full_like(per_row, bytes_for_a_call(self.ranks.device))
        per_row, free = self.ranks.max(per_row), self.ranks.min(free)
        return self.ranks.size * float(free / per_row) if per_row else 0.0

    def _check_same(self, batch: AtomBatch, skin: float = 0.0) -> None:
        """Refuse to mix systems: an SPMD script with unseeded random numbers would do so unnoticed."""
        digest = hashlib.sha1(repr((skin, batch.dataset)).encode())
        for name in INPUT:
            values = getattr(batch, name).detach().cpu().contiguous()
            digest.update(repr(values.shape).encode())
            digest.update(values.numpy().data)
        number = int.from_bytes(digest.digest()[:7], "big")
        ends = self.ranks.max(torch.tensor([number, -number], device=self.ranks.device))
        if int(ends.sum()):
            raise ValueError(
                "the ranks were not given the same systems: every process must make the same calls with the "
                "same atoms. Seed random numbers alike in all of them, and read input before one changes it"
            )

    def _plan_for(
        self, batch: AtomBatch, dataset: Tensor, skin: float, plan: Plan | None
    ) -> tuple[Plan, Tensor]:
        """Return a plan with every edge of the batch, and the positions of this rank's atoms in it."""
        if self.potential.backbone.max_neighbors is not None:
            plan, skin = None, 0.0  # the nearest of a list with a skin are found by searching
        if plan is not None and plan.skin == skin and self._describes(plan, batch, dataset):
            positions = _continued(plan, batch)
            if not plan.moved_too_far(positions, batch.cell):
                return plan, positions
            plan = plan.rebuild(batch.positions[plan.ids[: plan.gp.n_owned]], batch.cell)
        else:
            plan = self.potential.plan(batch, self.ranks, skin=skin, backend=self.settings.neighbors)
        return plan, plan.positions

    def _describes(self, plan: Plan, batch: AtomBatch, dataset: Tensor) -> bool:
        """Tell whether a plan is one of these systems, by what the plan itself holds."""
        g, ids = plan.graph, plan.ids[: plan.gp.n_owned]
        assert self._pbc is not None
        same = torch.equal(g.n_atoms, batch.n_atoms) and torch.equal(self._pbc, batch.pbc)
        same = same and torch.equal(g.dataset, dataset)
        same = same and torch.equal(g.charge, batch.charge) and torch.equal(g.spin, batch.spin)
        if not same:  # properties of systems: on every rank or on none
            return False
        mine = torch.equal(g.numbers[: len(ids)], batch.numbers[ids])
        mine = mine and torch.equal(g.system[: len(ids)], batch.system[ids])
        return bool(self.ranks.min(torch.tensor(int(mine), device=ids.device)))

    def _forward(self, potential: Potential, plan: Plan, positions: Tensor, cell: Tensor) -> Prediction:
        g = plan.within_cutoff(positions, cell)
        measure: AbstractContextManager[dict[int, int]]
        measure = nullcontext({}) if self._bytes_per_row else count_saved_bytes()
        try:
            with measure as saved:
                prediction = potential(
                    positions,
                    g,
                    plan.gp,
                    stress=self.settings.stress,
                    descriptors=self.settings.descriptors,
                )
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"rank {self.ranks.rank} of {self.ranks.size}, with {plan.gp.n_owned} atoms of its own, "
                f"{plan.gp.n_ghost} ghosts and {len(g.shift)} edges, ran out of the memory of "
                f"{self.ranks.device}. Use more workers, edge_chunk, or dtype='float32'"
            ) from error
        if saved and len(g.shift):  # a lone atom says nothing about edges
            self._bytes_per_row = sum(saved.values()) / (plan.gp.n_owned + len(g.shift))
        return prediction


def _continued(plan: Plan, batch: AtomBatch) -> Tensor:
    """Return positions ``[n_owned, 3]`` less the lattice vectors by which atoms jumped since the build.

    Wrapping atoms back into the cell is no motion, but it would change the shifts of their edges.
    """
    n = plan.gp.n_owned
    system, positions = plan.graph.system[:n], batch.positions[plan.ids[:n]]
    before, now = (complete_cell(cell, batch.pbc) for cell in (plan.graph.cell, batch.cell))
    was, fractional = (
        torch.einsum("na,nab->nb", x, torch.linalg.inv(cell)[system])
        for x, cell in ((plan.positions, before), (positions, now))
    )
    jumps = (fractional - was).round() * batch.pbc[system]
    return positions - torch.einsum("na,nab->nb", jumps, now[system])


def _gathered(plan: Plan, prediction: Prediction) -> Prediction:
    """Return the prediction for all atoms, in the order of the input, on every rank."""
    columns = [prediction.forces, prediction.node_energies[:, None]]
    if prediction.descriptors is not None:
        columns.append(prediction.descriptors.to(torch.float64))
    rows = plan.gather_owned(torch.cat(columns, 1))  # once for all: each gather sends the ids too
    return replace(
        prediction,
        forces=rows[:, :3],
        node_energies=rows[:, 3],
        descriptors=None if prediction.descriptors is None else rows[:, 4:],
    )
