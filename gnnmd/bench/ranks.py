"""Time energy and forces of one silver crystal on several ranks, split into what they wait for.

``python -m gnnmd.bench.ranks --ranks 1 2 4 --atoms 4000 16384 62500`` prints one JSON line per number of
ranks, size and way to exchange: medians over calls of the slowest rank, milliseconds. Random weights in the
shape of UMA-S (4 layers, lmax = mmax = 2, 128 channels).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ase.build import bulk

from gnnmd.graph import AtomBatch
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.models.potential import Potential
from gnnmd.parallel import AllGatherContext, Plan, Ranks, Workers

LATTICE, RATTLE = 4.09, 0.1  # Angstrom


def main() -> None:
    """Start the ranks, once per number of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--atoms", type=int, nargs="+", default=[4000, 16384, 62500], help="4 n^3")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--edge-chunk", type=int, default=None)
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calls", type=int, default=10)
    options = parser.parse_args()
    from gnnmd.bench.ranks import measure  # by its importable name, not as __main__'s

    for n in options.ranks:
        with Workers(n, options.device) as workers:
            for n_atoms in options.atoms:
                for record in workers.call(measure, n_atoms, vars(options))[0]:
                    print(json.dumps(record), flush=True)


def measure(ranks: Ranks, n_atoms: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a record per way to exchange; collective."""
    if options["tf32"]:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    c, device = options["channels"], ranks.device
    shape = {"channels": c, "hidden_channels": c, "edge_channels": c, "num_layers": options["layers"]}
    torch.manual_seed(0)
    potential = build_potential(PotentialConfig(EscnMDConfig(lmax=2, mmax=2, num_basis=64, **shape)))
    potential = potential.to(device).eval().requires_grad_(False)
    potential.backbone.edge_chunk = options["edge_chunk"]
    atoms = bulk("Ag", "fcc", a=LATTICE, cubic=True).repeat(round((n_atoms / 4) ** (1 / 3)))
    atoms.positions += np.random.default_rng(0).normal(0, RATTLE, atoms.positions.shape)
    batch = AtomBatch.from_ase(atoms).to(device)

    clock = _Clock(ranks)
    plan = potential.plan(batch, ranks, skin=0.5)
    common: dict[str, Any] = {
        "ranks": ranks.size,
        "atoms": len(atoms),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "tf32": options["tf32"],
        "edge_chunk": options["edge_chunk"],
        "build": clock.median(lambda: potential.plan(batch, ranks, skin=0.5), 3),
        "rebuild": clock.median(lambda: plan.rebuild(plan.positions, batch.cell), 5),
        "within_cutoff": clock.median(lambda: plan.within_cutoff(plan.positions, batch.cell), 5),
        "moved_too_far": clock.median(lambda: plan.moved_too_far(plan.positions, batch.cell), 5),
    }
    g = plan.within_cutoff(plan.positions, batch.cell)
    counts = torch.tensor([plan.gp.n_owned, plan.gp.n_ghost, g.edge_index.shape[1]], device=device)
    common |= dict(zip(("owned", "ghosts", "edges"), ranks.max(counts).tolist(), strict=True))
    exact = replace(plan, graph=g)
    kinds = ["all_to_all", "all_gather"] if ranks.size > 1 else ["one rank"]
    return [common | {"exchange": kind} | _times(potential, exact, kind, clock, options) for kind in kinds]


def _times(
    potential: Potential, plan: Plan, kind: str, clock: "_Clock", options: dict[str, Any]
) -> dict[str, Any]:
    gp = AllGatherContext.like(plan.gp) if kind == "all_gather" else plan.gp
    n, x = options["calls"], plan.positions
    on_gpu = x.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    call = clock.median(lambda: potential(x, plan.graph, gp), n)
    out: dict[str, Any] = {"call": call}
    if on_gpu:
        out["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    with torch.no_grad():
        g = plan.graph.with_positions(gp.exchange(x), plan.graph.cell)
        out["forward"] = clock.median(lambda: potential.backbone(g, gp), n)
        out["backward"] = round(call - out["forward"], 3)
        inner = g.edge_index[0] < gp.n_owned
        interior = replace(g, edge_index=g.edge_index[:, inner], shift=g.shift[inner])
        out["interior"] = clock.median(lambda: potential.backbone(interior, gp), n)
        out["boundary"] = round(out["forward"] - out["interior"], 3)
        if kind != "one rank":
            rows = torch.randn(gp.n_owned, 9, options["channels"], device=x.device)
            ghosts = torch.randn(gp.n_ghost, 9, options["channels"], device=x.device)
            send_idx = gp.send_idx
            assert send_idx is not None
            out |= {
                "exchange_rows": clock.median(lambda: gp.exchange(rows), n),
                "exchange_positions": clock.median(lambda: gp.exchange(x), n),
                "give_back_rows": clock.median(lambda: gp.give_back(ghosts).land(), n),
                "pack": clock.median(lambda: rows.index_select(0, send_idx), n),
                "unpack": clock.median(lambda: torch.cat((rows, ghosts)), n),
            }
    return out


class _Clock:
    """Medians of the slowest rank's time, milliseconds."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def median(self, call: Callable[[], object], n: int) -> float:
        """Time ``n`` calls after two that warm up; collective."""
        times = []
        for _ in range(n + 2):
            self._synchronize()
            start = time.perf_counter()
            call()
            if self._ranks.device.type == "cuda":
                torch.cuda.synchronize()
            taken = torch.tensor(1e3 * (time.perf_counter() - start), device=self._ranks.device)
            times.append(float(self._ranks.max(taken)))
        return round(statistics.median(times[2:]), 3)

    def _synchronize(self) -> None:
        self._ranks.sum(torch.zeros(1, device=self._ranks.device))
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
