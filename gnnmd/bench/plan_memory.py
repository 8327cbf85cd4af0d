"""Measure plan building on CPU processes: memory of each rank, what it holds and receives, time.

``python -m gnnmd.bench.plan_memory --atoms 16384 --ranks 1 2 4 8`` prints one JSON line per size and number
of processes. The structure is a cube of fcc silver with displacements; every rank makes its own piece of it,
so N rows exist nowhere.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gnnmd.graph import AtomBatch
from gnnmd.parallel import Ranks, Workers, build_plan

LATTICE, SIGMA = 4.09, 0.12  # Angstrom


def main() -> None:
    """Build a plan for every size on every number of processes."""
    from gnnmd.bench.plan_memory import measure  # workers find it under this name; here it is in __main__

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--atoms", type=int, nargs="+", default=[16384], help="rounded to 4 n^3")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--r-cut", type=float, default=6.0, help="Angstrom (%(default)s)")
    parser.add_argument("--skin", type=float, default=0.0, help="Angstrom (%(default)s)")
    parser.add_argument("--partition", default="auto", help="%(default)s")
    args = parser.parse_args()
    # Freed blocks of more than a megabyte go back to the system at once: what is counted is in use.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**20))
    for n_atoms in args.atoms:
        n_cells = round((n_atoms / 4) ** (1 / 3))
        for n_ranks in args.ranks:
            with Workers(n_ranks) as workers:  # fresh processes: peaks do not carry over
                found = workers.call(measure, n_cells, args.r_cut, args.skin, args.partition)
            record = {"atoms": 4 * n_cells**3, "ranks": n_ranks, "r_cut": args.r_cut, "skin": args.skin}
            for key in found[0]:
                values = [of_rank[key] for of_rank in found]
                record[key] = sum(values) if key == "edges" else max(values)
            print(json.dumps(record), flush=True)


def piece_of_crystal(n_cells: int, ranks: Ranks) -> tuple[AtomBatch, Tensor]:
    """Return this rank's atoms of a cube of ``n_cells^3`` displaced fcc cells, and their global numbers."""
    total = n_cells**3
    cells = torch.arange(ranks.rank * total // ranks.size, (ranks.rank + 1) * total // ranks.size)
    corner = torch.stack((cells // n_cells**2, cells // n_cells % n_cells, cells % n_cells), 1)
    basis = torch.tensor([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]], dtype=torch.float64)
    perfect = LATTICE * (corner[:, None] + basis).view(-1, 3)
    random = torch.Generator().manual_seed(ranks.rank)
    n, first = len(perfect), 4 * (ranks.rank * total // ranks.size)
    batch = AtomBatch(
        positions=perfect + SIGMA * torch.randn(n, 3, dtype=torch.float64, generator=random),
        numbers=torch.full((n,), 47),
        system=torch.zeros(n, dtype=torch.int64),
        cell=n_cells * LATTICE * torch.eye(3, dtype=torch.float64)[None],
        pbc=torch.ones(1, 3, dtype=torch.bool),
        charge=torch.zeros(1, dtype=torch.int64),
        spin=torch.zeros(1, dtype=torch.int64),
        dataset=("",),
        energy=torch.full((1,), torch.nan, dtype=torch.float64),
        forces=torch.full((n, 3), torch.nan, dtype=torch.float64),
        stress=torch.full((1, 3, 3), torch.nan, dtype=torch.float64),
    )
    return batch, first + torch.arange(n)


def measure(ranks: Ranks, n_cells: int, r_cut: float, skin: float, partition: str) -> dict[str, float]:
    """Build and rebuild one plan; return what this rank held, received and took.

    ``position_rows`` is the largest number of rows of any float64 ``[n, 3]`` tensor that existed: the atoms
    whose positions a rank knew at once. Memory is resident memory beyond what the process had before it made
    its piece; ``plan_MB`` is what the plan keeps, ``peak_MB`` the most while it was built and built again.
    """
    with _Held():
        build_plan(*piece_of_crystal(4, ranks), r_cut, ranks)  # what loads on first use is not counted
    before = _memory("VmRSS")
    began = time.perf_counter()
    with _Held() as held:
        piece, ids = piece_of_crystal(n_cells, ranks)
        plan = build_plan(piece, ids, r_cut, ranks, skin=skin, partition=partition)
        built = time.perf_counter()
        resident = _memory("VmRSS")
        plan.rebuild(plan.positions, piece.cell)
        rebuilt = time.perf_counter()
    return {
        "owned": plan.gp.n_owned,
        "ghosts": plan.gp.n_ghost,
        "edges": plan.graph.edge_index.shape[1],
        "position_rows": held.position_rows,
        "received_MB": round(held.received / 1e6, 1),
        "before_MB": round(before),
        "plan_MB": round(resident - before),
        "peak_MB": round(_memory("VmHWM") - before),
        "build_s": round(built - began, 2),
        "rebuild_s": round(rebuilt - built, 2),
    }


class _Held(TorchDispatchMode):
    """Remembers how many positions this process held at once, and how many bytes others sent it.

    Attributes:
        position_rows: largest number of rows of a float64 ``[n, 3]`` tensor.
        received: bytes of all tensors that collectives filled.
    """

    position_rows = received = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.dtype == torch.float64 and x.dim() == 2 and x.shape[1] == 3:
                self.position_rows = max(self.position_rows, len(x))
        if function.namespace == "c10d":
            filled = args[0] if isinstance(args[0], list) else [args[0]]
            self.received += sum(x.nbytes for x in filled)
        return out


def _memory(name: str) -> float:
    """Return a number that Linux keeps about this process, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(f"/proc/self/status does not tell {name}: this benchmark needs Linux")


if __name__ == "__main__":
    main()
