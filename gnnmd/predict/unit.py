"""Energy, forces and stress of atoms, from one potential on one device."""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from ase import Atoms
from torch import Tensor

from gnnmd.graph import AtomBatch, NeighborList, neighbor_list
from gnnmd.models.potential import Potential, Prediction
from gnnmd.parallel import GPContext
from gnnmd.predict.batching import edges_per_system, split_by_atoms, take_neighbors, take_systems
from gnnmd.predict.checkpoint import CheckpointInfo, load_checkpoint
from gnnmd.predict.settings import InferenceSettings

_T = TypeVar("_T", AtomBatch, NeighborList)

#: Bytes of one call on a CPU. eSCN-MD with 64 channels takes 40 % longer per atom with four times as much.
_CPU_BUDGET = 2**28


class PredictUnit:
    """A frozen copy of a potential on a device, with the settings it is evaluated with.

    Args:
        potential: the model; it is copied and stays as it was.
        device: where to compute; None takes a GPU if there is one.
        settings: arithmetic, memory and outputs.

    Attributes:
        potential: the copy that is evaluated.
        device: where it is.
        settings: as given.
        info: what the checkpoint says about itself, if there was one.

    Raises:
        ValueError: the device does not exist here.
    """

    def __init__(
        self,
        potential: Potential,
        *,
        device: str | torch.device | None = None,
        settings: InferenceSettings | None = None,
    ) -> None:
        self.settings = settings or InferenceSettings()
        self.device = _existing_device(device)
        self.info: CheckpointInfo | None = None
        with torch.inference_mode(False):
            self.potential = copy.deepcopy(potential).to(self.device, self.settings.torch_dtype)
        self.potential.eval().requires_grad_(False)  # frozen weights: nothing of theirs is kept for backward
        if self.settings.edge_chunk is not None:
            self.potential.backbone.edge_chunk = self.settings.edge_chunk
        if self.settings.compile:
            self.potential.backbone.compile(dynamic=True)
        self._bytes_per_row: float | None = None
        self._most_rows: float = self.settings.max_edges or float("inf")

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        settings: InferenceSettings | None = None,
    ) -> "PredictUnit":
        """Load a checkpoint file, or one that comes with the package by name ("silver")."""
        potential, info = load_checkpoint(path)
        unit = cls(potential, device=device, settings=settings)
        unit.info = info
        return unit

    @property
    def r_cut(self) -> float:
        """Cutoff of the potential, Angstrom."""
        return self.potential.r_cut

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
        """
        if not isinstance(atoms, AtomBatch):
            images = [atoms] if isinstance(atoms, Atoms) else list(atoms)
            atoms = AtomBatch.from_ase([without_labels(image) for image in images])
        if not atoms.n_systems:
            raise ValueError("predict got an empty batch; pass at least one system")
        parts: list[Prediction] = []
        for block in split_by_atoms(atoms, self.settings.max_atoms):
            for part in self._evaluate_in_calls(block.to(self.device)):
                parts.append(part)
                if progress:
                    progress(len(part.energy))
        return _joined(parts)

    def evaluate(self, batch: AtomBatch, neighbors: NeighborList | None = None) -> Prediction:
        """Evaluate a batch in one call of the network, with a neighbour list that the caller may keep.

        Works inside the caller's ``torch.no_grad``, ``inference_mode`` or ``autocast``: forces are a
        derivative, so the call always computes with gradients, and in the arithmetic of the settings.
        """
        with _own_arithmetic(self.device, self.settings.tf32):
            batch = _outside_inference_mode(batch).to(self.device)
            check_systems(batch)
            if neighbors is None:
                neighbors = self.neighbor_list(batch)
            g = self.potential.graph(batch, _outside_inference_mode(neighbors))
            prediction = self.potential(
                batch.positions,
                g,
                GPContext.single(len(batch.numbers)),
                stress=self.settings.stress,
                descriptors=self.settings.descriptors,
            )
        return _on_cpu(prediction)

    def neighbor_list(self, batch: AtomBatch) -> NeighborList:
        """Return the neighbour list of a batch within the potential's cutoff, on the unit's device."""
        limit = self.potential.backbone.max_neighbors
        return neighbor_list(
            batch.to(self.device), self.r_cut, backend=self.settings.neighbors, max_neighbors=limit
        )

    def _evaluate_in_calls(self, batch: AtomBatch) -> Iterator[Prediction]:
        """Evaluate consecutive systems together as long as their rows (edges and atoms) fit the memory."""
        check_systems(batch)
        neighbors = self.neighbor_list(batch)
        edges = edges_per_system(batch, neighbors)
        rows = [e + n for e, n in zip(edges, batch.n_atoms.tolist(), strict=True)]
        start = 0
        while start < batch.n_systems:
            stop, n_rows, limit = start + 1, rows[start], self._row_limit()
            while stop < batch.n_systems and n_rows + rows[stop] <= limit:
                n_rows += rows[stop]
                stop += 1
            part = take_systems(batch, start, stop), take_neighbors(batch, neighbors, start, stop)
            prediction = self._evaluate_or_shrink(*part, n_rows, single=stop == start + 1)
            if prediction is not None:
                yield prediction
                start = stop

    def _evaluate_or_shrink(
        self, batch: AtomBatch, neighbors: NeighborList, n_rows: int, *, single: bool
    ) -> Prediction | None:
        """Evaluate; when memory runs out, halve the limit for all later calls and return None."""
        try:
            if self._bytes_per_row is not None:
                return self.evaluate(batch, neighbors)
            with _count_saved_bytes() as saved:
                prediction = self.evaluate(batch, neighbors)
            if neighbors.shift.numel():  # a lone atom says nothing about edges
                self._bytes_per_row = max(sum(saved.values()) / n_rows, 1.0)
            return prediction
        except torch.OutOfMemoryError as error:
            if single:
                raise MemoryError(
                    f"a system of {len(batch.numbers)} atoms and {len(neighbors.shift)} edges does not fit "
                    f"the memory of {self.device}. Set edge_chunk or dtype='float32', or use a larger device"
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
        if self.device.type == "cuda":
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            budget = (torch.cuda.mem_get_info(self.device)[0] + cached) / 2  # half: backward needs room too
        else:
            budget = _CPU_BUDGET
        return min(self._most_rows, budget / self._bytes_per_row)


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


@contextmanager
def _own_arithmetic(device: torch.device, tf32: bool) -> Iterator[None]:
    """Compute with gradients and the unit's own rounding, whatever the caller has switched on."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def _count_saved_bytes() -> Iterator[dict[int, int]]:
    """Count what autograd keeps for the backward pass, {address: bytes}: the bulk of the memory of a call."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved


def _outside_inference_mode(data: _T) -> _T:
    """Clone tensors made in the caller's `torch.inference_mode`: autograd refuses to work on those."""
    values: dict[str, Any] = {f.name: getattr(data, f.name) for f in fields(data)}
    foreign = {k: v for k, v in values.items() if isinstance(v, Tensor) and v.is_inference()}
    clones: dict[str, Any] = {k: v.clone() for k, v in foreign.items()}
    return replace(data, **clones)


def check_systems(batch: AtomBatch) -> None:
    """Raise ValueError for an empty system, or positions or cells that are not finite."""
    empty = (batch.n_atoms == 0).nonzero()
    if len(empty):
        raise ValueError(f"system {int(empty[0])} has no atoms; leave it out")
    bad = (~batch.positions.isfinite()).any(1).nonzero()
    if len(bad):
        atom = int(bad[0])
        system = int(batch.system[atom])
        within = atom - int((batch.system < system).sum())
        raise ValueError(
            f"atom {within} of system {system} is at {batch.positions[atom].tolist()} ({len(bad)} atoms in "
            "all are not at a finite position); check where these positions come from"
        )
    bad = (~batch.cell.isfinite()).any(-1).any(-1).nonzero()
    if len(bad):
        raise ValueError(f"the cell of system {int(bad[0])} is not finite: {batch.cell[bad[0, 0]].tolist()}")


def _on_cpu(prediction: Prediction) -> Prediction:
    given: dict[str, Any] = {f.name: getattr(prediction, f.name) for f in fields(prediction)}
    moved: dict[str, Any] = {k: v if v is None else v.to("cpu", torch.float64) for k, v in given.items()}
    return Prediction(**moved)


def _joined(parts: list[Prediction]) -> Prediction:
    """Concatenate the predictions of consecutive systems."""
    if len(parts) == 1:
        return parts[0]
    columns = {f.name: [getattr(p, f.name) for p in parts] for f in fields(Prediction)}
    joined: dict[str, Any] = {k: None if v[0] is None else torch.cat(v) for k, v in columns.items()}
    return Prediction(**joined)
