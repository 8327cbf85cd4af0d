"""Energy, forces and stress of atoms, from one potential on one device or on many."""

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from ase import Atoms

from gnnmd.graph import AtomBatch, NeighborList, VerletList, neighbor_list
from gnnmd.models.potential import Potential, Prediction
from gnnmd.parallel import GPContext, Ranks
from gnnmd.predict.batching import edges_per_system, next_stop, split_by_atoms, take_neighbors, take_systems
from gnnmd.predict.checkpoint import CheckpointInfo, load_checkpoint
from gnnmd.predict.evaluation import (
    RankPotential,
    bytes_for_a_call,
    check_systems,
    count_saved_bytes,
    frozen_copy,
    joined,
    on_cpu,
    outside_inference_mode,
    own_arithmetic,
)
from gnnmd.predict.merging import MergedExperts
from gnnmd.predict.partitioned import PartitionedPotential
from gnnmd.predict.settings import InferenceSettings
from gnnmd.predict.upstream import load_upstream
from gnnmd.predict.workers import WorkerPotential, evaluated_by, number_of_workers


class PredictUnit:
    """A frozen copy of a potential on a device, with the settings it is evaluated with.

    With ``workers=n`` every system is spread over n processes, one per GPU (or on the CPU), which are kept
    until `close`, the end of a ``with`` block or of the program. In a program that torchrun or srun runs n
    times, these n processes share the systems instead: all of them make the same calls and get the same
    results.

    Args:
        potential: the model; it is copied and stays as it was.
        device: where to compute; None takes a GPU if there is one.
        settings: arithmetic, memory and outputs.
        workers: number of processes; "auto": as many as torchrun or srun started, else one per visible GPU;
            None computes in this one.

    Attributes:
        potential: the copy that is evaluated (with experts to be merged, the one they are merged from); with
            workers, the copy of this process, on the CPU.
        device: where it is evaluated.
        settings: as given.
        info: what the checkpoint says about itself, if there was one.
        workers: how many there are; None if this process computes.

    Raises:
        ValueError: the device does not exist here, or there are not as many GPUs or processes as workers.
    """

    def __init__(
        self,
        potential: Potential,
        *,
        device: str | torch.device | None = None,
        settings: InferenceSettings | None = None,
        workers: int | Literal["auto"] | None = None,
    ) -> None:
        self.settings = settings or InferenceSettings()
        self.device = _existing_device(device)
        self.info: CheckpointInfo | None = None
        self.workers = number_of_workers(workers, self.device)
        self._together: PartitionedPotential | WorkerPotential | None = None
        self._bytes_per_row: float | None = None
        self._most_rows: float = self.settings.max_edges or float("inf")
        stack = ExitStack()
        self._close = weakref.finalize(self, stack.close)
        if self.workers is None:
            self.potential = frozen_copy(potential, self.device, self.settings)
            self._experts = MergedExperts(self.potential, self.settings)
            return
        if self.device.type == "cuda" and self.device.index is not None:
            raise ValueError(
                f"device={str(device)!r} is one GPU, but each worker takes its own: use device='cuda', and "
                "CUDA_VISIBLE_DEVICES to choose which"
            )
        self.potential = frozen_copy(potential, torch.device("cpu"), self.settings)
        self._together = stack.enter_context(
            evaluated_by(self.workers, self.potential, self.settings, self.device.type)
        )

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        settings: InferenceSettings | None = None,
        workers: int | Literal["auto"] | None = None,
    ) -> "PredictUnit":
        """Load a checkpoint file, or one that comes with the package by name ("silver")."""
        potential, info = load_checkpoint(path)
        unit = cls(potential, device=device, settings=settings, workers=workers)
        unit.info = info
        return unit

    @classmethod
    def from_upstream(
        cls,
        path: str | Path,
        *,
        task: str | None = None,
        head: str | None = None,
        device: str | torch.device | None = None,
        settings: InferenceSettings | None = None,
        workers: int | Literal["auto"] | None = None,
    ) -> "PredictUnit":
        """Load a checkpoint of fairchem-core (UMA, eSEN) or deepmd-kit (DPA-2, DPA-3); see `load_upstream`.

        Args:
            path: the file.
            task: which data set of a fairchem model, for instance "omat".
            head: which head of a deepmd-kit model.
            device: where to compute; None takes a GPU if there is one.
            settings: arithmetic, memory and outputs.
            workers: see `PredictUnit`.
        """
        potential, _ = load_upstream(path, task=task, head=head)
        return cls(potential, device=device, settings=settings, workers=workers)

    @property
    def r_cut(self) -> float:
        """Cutoff of the potential, Angstrom."""
        return self.potential.r_cut

    @property
    def first(self) -> bool:
        """Whether this process tells and writes: of several that torchrun or srun started, one does."""
        return self.callers.rank == 0

    @property
    def callers(self) -> Ranks:
        """The processes that make the same calls: those of torchrun or srun, else this one alone."""
        return self._together.ranks if isinstance(self._together, PartitionedPotential) else Ranks()

    def close(self) -> None:
        """End the workers; without any, nothing."""
        self._close()

    def __enter__(self) -> "PredictUnit":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def predict(
        self,
        atoms: Atoms | Sequence[Atoms] | AtomBatch,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Prediction:
        """Evaluate one or many systems, in their order, in as few calls of the network as memory allows.

        Charge, spin and dataset are read from ``atoms.info``.

        Args:
            atoms: one or several systems.
            progress: called with the number of systems done since the last call.

        Returns:
            Detached float64 CPU tensors: energy ``[B]``, forces ``[N, 3]``, stress ``[B, 3, 3]`` and node
            energies ``[N]``, in eV and Angstrom; atoms of all systems one after the other.

        Raises:
            ValueError: no systems, a system without atoms, positions that are not finite, or an element,
                charge or dataset that the model does not know.
            MemoryError: one system alone does not fit the memory.
            WorkerDied: a worker was killed, or the workers are closed.
            RankFailure: the workers could not divide a system among them.
        """
        if not isinstance(atoms, AtomBatch):
            images = [atoms] if isinstance(atoms, Atoms) else list(atoms)
            atoms = AtomBatch.from_ase([without_labels(image) for image in images])
        if not atoms.n_systems:
            raise ValueError("predict got an empty batch; pass at least one system")
        parts: list[Prediction] = []
        for block in split_by_atoms(atoms, self.settings.max_atoms):
            check_systems(block)
            together = self._together
            calls = self._calls(block.to(self.device)) if together is None else _shared_calls(block, together)
            for part in calls:
                parts.append(part)
                if progress:
                    progress(len(part.energy))
        return joined(parts)

    def evaluate(self, batch: AtomBatch, neighbors: NeighborList | None = None) -> Prediction:
        """Evaluate a batch in one call of the network, with a neighbour list that the caller may keep.

        Works inside the caller's ``torch.no_grad``, ``inference_mode`` or ``autocast``: forces are a
        derivative, so the call always computes with gradients, and in the arithmetic of the settings.

        Raises:
            ValueError: see `predict`; or a neighbour list for workers, who search for themselves.
        """
        if self._together is not None:
            if neighbors is not None:
                raise ValueError("workers search their neighbours themselves; leave neighbors away")
            return self._together.evaluate(batch)[0]
        with own_arithmetic(self.device, self.settings.tf32):
            batch = outside_inference_mode(batch).to(self.device)
            check_systems(batch)
            if neighbors is None:
                neighbors = self.neighbor_list(batch)
            potential = self._experts.for_batch(batch)
            g = potential.graph(batch, outside_inference_mode(neighbors))
            prediction = potential(
                batch.positions,
                g,
                GPContext.single(len(batch.numbers)),
                stress=self.settings.stress,
                descriptors=self.settings.descriptors,
            )
        return on_cpu(prediction)

    def on_ranks(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run ``function(share, *args)`` where the potential is evaluated: here or in every worker.

        Args:
            function: with workers, a function of an importable module; it gets a `RankPotential`.
            *args: sent to every worker.

        Returns:
            What it returns; with workers, what it returns on the first one.
        """
        if isinstance(self._together, WorkerPotential):
            return self._together.on_ranks(function, *args)
        if self._together is not None:
            return function(self._together.share, *args)
        return function(RankPotential(self.potential, self.settings, Ranks(), self.device), *args)

    def on_ranks_soon(self, function: Callable[..., Any], *args: Any) -> None:
        """Do so without an answer, with workers after the call that is under way; for finalizers."""
        if isinstance(self._together, WorkerPotential):
            self._together.on_ranks_soon(function, *args)
        else:
            self.on_ranks(function, *args)

    def neighbor_list(self, batch: AtomBatch) -> NeighborList:
        """Return the neighbour list of a batch within the potential's cutoff, on the unit's device."""
        limit = self.potential.backbone.max_neighbors
        return neighbor_list(
            batch.to(self.device), self.r_cut, backend=self.settings.neighbors, max_neighbors=limit
        )

    def _calls(self, batch: AtomBatch) -> Iterator[Prediction]:
        """Evaluate consecutive systems together as long as their rows (edges and atoms) fit the memory."""
        neighbors = self.neighbor_list(batch)
        edges = edges_per_system(batch, neighbors)
        rows = [e + n for e, n in zip(edges, batch.n_atoms.tolist(), strict=True)]
        start = 0
        while start < batch.n_systems:
            stop = next_stop(rows, start, self._row_limit())
            part = take_systems(batch, start, stop), take_neighbors(batch, neighbors, start, stop)
            prediction = self._evaluate_or_shrink(*part, sum(rows[start:stop]))
            if prediction is not None:
                yield prediction
                start = stop

    def _evaluate_or_shrink(
        self, batch: AtomBatch, neighbors: NeighborList, n_rows: int
    ) -> Prediction | None:
        """Evaluate; when memory runs out, halve the limit for all later calls and return None."""
        try:
            if self._bytes_per_row is not None:
                return self.evaluate(batch, neighbors)
            with count_saved_bytes() as saved:
                prediction = self.evaluate(batch, neighbors)
            if neighbors.shift.numel():  # a lone atom says nothing about edges
                self._bytes_per_row = max(sum(saved.values()) / n_rows, 1.0)
            return prediction
        except torch.OutOfMemoryError as error:
            if batch.n_systems == 1:
                raise MemoryError(
                    f"a system of {len(batch.numbers)} atoms and {len(neighbors.shift)} edges does not fit "
                    f"the memory of {self.device}. Set edge_chunk or dtype='float32', spread it over several "
                    "GPUs with workers=, or use a larger device"
                ) from error
        torch.cuda.empty_cache()
        self._most_rows = n_rows // 2
        warnings.warn(
            f"{self.device} ran out of memory with {n_rows} edges and atoms in one call; "
            f"going on with {n_rows // 2}",
            stacklevel=3,
        )
        return None

    def _row_limit(self) -> float:
        """Return how many edges and atoms may go into the next call; 0 means one system."""
        if self.settings.max_edges:
            return self._most_rows
        if self._bytes_per_row is None:
            return 0
        return min(self._most_rows, bytes_for_a_call(self.device) / self._bytes_per_row)


class Follower:
    """A unit that evaluates systems on their way: dynamics, relaxation.

    Neighbours are searched within ``r_cut + skin``, and again once an atom has moved by half the skin or
    anything but the positions has changed; results are always those of a new search. Workers keep the list of
    one system: followers that take turns search at every call.

    Args:
        unit: what evaluates.
        skin: Angstrom; larger means fewer searches and more pairs to look through at each call.

    Attributes:
        n_builds: searches so far.

    Raises:
        ValueError: a negative skin.
    """

    def __init__(self, unit: PredictUnit, skin: float) -> None:
        self._unit = unit
        self._verlet = VerletList(unit.r_cut, skin, backend=unit.settings.neighbors)
        self.n_builds = 0

    def evaluate(self, batch: AtomBatch) -> Prediction:
        """Evaluate a batch in one call of the network; see `PredictUnit.evaluate`."""
        unit, together = self._unit, self._unit._together
        if together is not None:
            prediction, searched = together.evaluate(batch, self._verlet.skin)
            self.n_builds += searched
            return prediction
        batch = batch.to(unit.device)
        check_systems(batch)
        if unit.potential.backbone.max_neighbors is not None:
            self.n_builds += 1  # the nearest of a list with a skin are found by searching
            return unit.evaluate(batch)
        prediction = unit.evaluate(batch, self._verlet.update(batch))
        self.n_builds = self._verlet.n_builds
        return prediction


def _shared_calls(batch: AtomBatch, together: PartitionedPotential | WorkerPotential) -> Iterator[Prediction]:
    """Evaluate consecutive systems together as long as they fit the memory of the ranks."""
    rows = together.rows(batch) if batch.n_systems > 1 else [0]
    start = 0
    while start < batch.n_systems:
        stop = next_stop(rows, start, together.row_limit() if batch.n_systems > 1 else 0)
        yield together.evaluate(take_systems(batch, start, stop))[0]
        start = stop


def without_labels(atoms: Atoms) -> Atoms:
    """Return what a potential reads of an Atoms object, without labels and results that could interfere."""
    info = {key: atoms.info[key] for key in ("charge", "spin", "dataset") if key in atoms.info}
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, info=info)


def _existing_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {str(device)!r} was asked for, but torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices. Use device='cpu', or install a CUDA build of torch "
            "and check CUDA_VISIBLE_DEVICES"
        )
    return device
