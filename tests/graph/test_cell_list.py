"""Cost of the cell list: counted, not timed."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch.utils._python_dispatch import TorchDispatchMode

from gnnmd.graph import AtomBatch, cell_list, neighbor_list


class Counter(TorchDispatchMode):
    """Counts the numbers that tensor operations write."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0
        self.largest = 0
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.written += tensor.numel()
                self.largest = max(self.largest, tensor.numel())
        self.operations += 1
        return out


def cost(batch: AtomBatch, r_cut: float) -> Counter:
    with Counter() as counter:
        neighbor_list(batch, r_cut, backend="torch")
    return counter


def silver(n: int) -> Atoms:
    atoms = bulk("Ag", cubic=True).repeat(n)
    atoms.rattle(0.05, seed=0)
    return atoms


def test_work_per_atom_does_not_grow_with_the_system():
    small, large = (cost(AtomBatch.from_ase(silver(n)), 4.0).written / (4 * n**3) for n in (5, 10))
    assert large < 1.15 * small


def test_work_per_system_does_not_grow_with_the_batch():
    one, many = (cost(AtomBatch.from_ase([silver(2)] * n), 6.0) for n in (1, 16))
    assert many.written < 16.5 * one.written
    assert many.operations <= one.operations + 2 * 24  # no loop over systems: only more chunks of candidates


@pytest.mark.parametrize("pbc", [True, False])
def test_vacuum_costs_no_memory(pbc):
    atoms = Atoms("H20", np.random.default_rng(0).random((20, 3)) * 3, cell=np.eye(3) * 5e7, pbc=pbc)
    atoms.positions[10:] += 4e7
    assert cost(AtomBatch.from_ase(atoms), 6.0).largest < 5000


def test_candidates_are_examined_in_chunks(monkeypatch):
    batch = AtomBatch.from_ase([silver(4), Atoms("H")])
    whole = neighbor_list(batch, 6.0, backend="torch")
    n_numbers = whole.shift.numel()
    assert cost(batch, 6.0).largest > 2 * n_numbers
    monkeypatch.setattr(cell_list, "CPU_CHUNK", 1000)
    parts = neighbor_list(batch, 6.0, backend="torch")
    assert torch.equal(whole.edge_index, parts.edge_index)
    assert torch.equal(whole.shift, parts.shift)
    assert cost(batch, 6.0).largest <= n_numbers  # nothing is larger than the result
