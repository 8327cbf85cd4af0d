"""What evaluating a potential takes in every process that does it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from gnnmd.graph import AtomBatch, NeighborList
from gnnmd.kernels.operations import chosen
from gnnmd.models.potential import Potential, Prediction
from gnnmd.parallel import Ranks
from gnnmd.predict.settings import InferenceSettings

_T = TypeVar("_T", AtomBatch, NeighborList)

#: Bytes of one call on a CPU. eSCN-MD with 64 channels takes 40 % longer per atom with four times as much.
_CPU_BUDGET = 2**28


@dataclass(frozen=True)
class RankPotential:
    """What one rank needs to evaluate a potential together with the others.

    Attributes:
        potential: a frozen copy, on ``device``.
        settings: how it is evaluated.
        ranks: who evaluates it.
        device: where.
    """

    potential: Potential
    settings: InferenceSettings
    ranks: Ranks
    device: torch.device


def frozen_copy(potential: Potential, device: torch.device, settings: InferenceSettings) -> Potential:
    """Return a copy of a potential for evaluation, on a device and in the arithmetic of the settings."""
    with torch.inference_mode(False):
        potential = copy.deepcopy(potential).to(device, settings.torch_dtype)
    potential.eval().requires_grad_(False)  # frozen weights: nothing of theirs is kept for backward
    chosen(settings.kernels, device)  # refuses what is not there
    potential.backbone.kernels = settings.kernels
    if settings.edge_chunk is not None:
        potential.backbone.edge_chunk = settings.edge_chunk
    if settings.compile:
        if not potential.backbone.compilable:
            raise ValueError(
                f"compile=True is not possible for {type(potential.backbone).__name__}: compiled, torch "
                f"{torch.__version__} computes wrong forces for it. Leave compile away"
            )
        potential.backbone.compile(dynamic=True)
    return potential


@contextmanager
def own_arithmetic(device: torch.device, tf32: bool) -> Iterator[None]:
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
def count_saved_bytes() -> Iterator[dict[int, int]]:
    """Count what autograd keeps for the backward pass, {address: bytes}: the bulk of the memory of a call."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved


def bytes_for_a_call(device: torch.device) -> float:
    """Return how many bytes one call may keep for its backward pass."""
    if device.type != "cuda":
        return _CPU_BUDGET
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + cached) / 2  # half: backward needs room too


def outside_inference_mode(data: _T) -> _T:
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


def on_cpu(prediction: Prediction) -> Prediction:
    """Return a prediction as float64 tensors on the CPU."""
    given: dict[str, Any] = {f.name: getattr(prediction, f.name) for f in fields(prediction)}
    moved: dict[str, Any] = {k: v if v is None else v.to("cpu", torch.float64) for k, v in given.items()}
    return Prediction(**moved)


def joined(parts: list[Prediction]) -> Prediction:
    """Concatenate the predictions of consecutive systems."""
    if len(parts) == 1:
        return parts[0]
    columns = {f.name: [getattr(p, f.name) for p in parts] for f in fields(Prediction)}
    together: dict[str, Any] = {k: None if v[0] is None else torch.cat(v) for k, v in columns.items()}
    return Prediction(**together)
