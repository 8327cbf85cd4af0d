"""Time energy and forces of one silver crystal on several ranks, split into what they wait for.

``python -m gnnmd.bench.ranks --ranks 1 2 4 --atoms 4000 16384 62500`` prints one JSON line per number of
ranks, size and way to exchange: medians of the slowest rank, milliseconds. Random weights in the shape of
UMA-S (4 layers, lmax = mmax = 2, 128 channels).

When atoms have moved too far:
    partition: divide the atoms anew.
    graph: halo, neighbour list and send lists of given owners; a rebuild mostly does this alone.
At every step:
    moved_too_far: ask whether a rebuild is needed.
    within_cutoff: leave out the edges that are in the skin now.
    call: energy, forces and stress; the sum of the six below.
    interior: forward pass of the owned atoms over edges between them, without communication.
    boundary: what ghosts and edges from them add to it.
    pack: copies before and after the exchanges of the forward pass.
    communication: what these exchanges add besides.
    backward_communication: exchanges of the backward pass, with their copies.
    backward: the rest: backward pass, heads, sums.
"""

import argparse
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from gnnmd.bench.clock import Clock
from gnnmd.bench.records import describe, print_record, provenance, silver
from gnnmd.graph import AtomBatch
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.models.potential import Potential
from gnnmd.parallel import AllGatherContext, GPContext, Plan, Ranks, Workers

SKIN = 0.5  # Angstrom


def main() -> None:
    """Start the ranks, once per number of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--atoms", type=int, nargs="+", default=[4000, 16384, 62500], help="4 k^3")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--edge-chunk", type=int, default=None)
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--kernels", default="auto", help="torch or triton")
    parser.add_argument("--no-stress", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calls", type=int, default=10)
    options = parser.parse_args()
    from gnnmd.bench.ranks import measure  # by its importable name, not as __main__'s

    for n in options.ranks:
        for n_atoms in options.atoms:
            try:
                with Workers(n, options.device) as workers:  # new ones: memory starts at zero
                    records = workers.call(measure, n_atoms, vars(options))[0]
            except RuntimeError as error:  # out of memory, mostly: smaller sizes still count
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                records = [{"ranks": n, "atoms": n_atoms, "error": reason}]
            for record in records:
                print_record(record, provenance())


def measure(ranks: Ranks, n_atoms: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a record per way to exchange; collective."""
    if options["tf32"]:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    c, device = options["channels"], ranks.device
    shape = {"channels": c, "hidden_channels": c, "edge_channels": c, "num_layers": options["layers"]}
    torch.manual_seed(0)
    potential = build_potential(PotentialConfig(EscnMDConfig(lmax=2, mmax=2, num_basis=64, **shape)))
    potential = potential.to(device).eval().requires_grad_(False)
    potential.backbone.edge_chunk, potential.backbone.kernels = options["edge_chunk"], options["kernels"]
    batch = AtomBatch.from_ase(silver(n_atoms)).to(device)

    clock = Clock(ranks, device)
    plan = potential.plan(batch, ranks, skin=SKIN)
    build = clock.median(lambda: potential.plan(batch, ranks, skin=SKIN), 3)
    graph = clock.median(lambda: plan.rebuild(plan.positions, batch.cell), 5)
    common: dict[str, Any] = {
        "impl": "gnnmd eSCN-MD",
        "ranks": ranks.size,
        "atoms": len(batch.numbers),
        "layers": options["layers"],
        "channels": c,
        **describe(potential, device),
        **{name: options[name] for name in ("tf32", "edge_chunk", "kernels")},
        "stress": not options["no_stress"],
        "graph": graph,
        "partition": build - graph,
        "moved_too_far": clock.median(lambda: plan.moved_too_far(plan.positions, batch.cell), 5),
        "within_cutoff": clock.median(lambda: plan.within_cutoff(plan.positions, batch.cell), 5),
    }
    g = plan.within_cutoff(plan.positions, batch.cell)
    counts = torch.tensor([plan.gp.n_owned, plan.gp.n_ghost, g.edge_index.shape[1]], device=device)
    common |= dict(zip(("max_owned", "max_ghosts", "max_edges"), ranks.max(counts).tolist(), strict=True))
    common["edges"] = int(ranks.sum(counts)[2])
    exact = replace(plan, graph=g)
    kinds = ["all_to_all", "all_gather"] if ranks.size > 1 else ["one rank"]
    return [common | {"exchange": kind} | _times(potential, exact, kind, clock, options) for kind in kinds]


@dataclass(frozen=True)
class _Silent(GPContext):
    """The same share of the graph, whose ghosts' features are already there: computation alone."""

    features: Tensor | None = None

    def exchange(self, owned: Tensor) -> Tensor:
        """Return the features."""
        assert self.features is not None
        return self.features


def _times(
    potential: Potential, plan: Plan, kind: str, clock: "Clock", options: dict[str, Any]
) -> dict[str, Any]:
    gp = plan.gp
    if kind == "all_gather":
        gp = AllGatherContext.like(gp)
    elif kind == "one rank":
        gp = GPContext.single(gp.n_owned)  # else it would send to itself
    n, x, backbone, stress = options["calls"], plan.positions, potential.backbone, not options["no_stress"]
    n_owned, on_gpu = gp.n_owned, x.device.type == "cuda"
    out: dict[str, Any] = {}
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    out["call"] = clock.median(lambda: potential(x, plan.graph, gp, stress=stress), n)
    if on_gpu:
        out["max_peak_mib"] = clock.maximum(torch.cuda.max_memory_allocated() / 2**20)
    with torch.no_grad():
        g = plan.graph.with_positions(gp.exchange(x), plan.graph.cell)
        assert g.positions is not None
        ghost_positions = g.positions[n_owned:]
        inner = g.edge_index[0] < n_owned
        interior = replace(
            g,
            numbers=g.numbers[:n_owned],
            system=g.system[:n_owned],
            positions=g.positions[:n_owned],
            edge_index=g.edge_index[:, inner],
            shift=g.shift[inner],
        )
        out["interior"] = clock.median(lambda: backbone(interior, GPContext.single(n_owned)), n)
        if kind == "one rank":
            parts = dict.fromkeys(("boundary", "pack", "communication", "backward_communication"), 0.0)
            return out | parts | {"backward": out["call"] - out["interior"]}
        features = torch.randn(n_owned + gp.n_ghost, 9, options["channels"], device=x.device)
        owned, ghosts = features.split((n_owned, gp.n_ghost))
        given = {f.name: getattr(gp, f.name) for f in fields(GPContext)}
        silent = _Silent(**given, features=features)
        computation = clock.median(lambda: backbone(g, silent), n)
        forward = clock.median(lambda: backbone(g, gp), n)
        pack = clock.median(lambda: _pack(gp, owned, ghosts), n)
        # how often: ghosts' positions once, their features between blocks; the same on the way back
        times = len(backbone.blocks) - 1
        exchange_positions = clock.median(lambda: gp.exchange(x), n)
        out["boundary"] = computation - out["interior"]
        out["pack"] = times * pack
        out["communication"] = exchange_positions + forward - computation - out["pack"]
        back = clock.median(lambda: gp.give_back(ghosts).land(), n)
        back_positions = clock.median(lambda: gp.give_back(ghost_positions).land(), n)
        out["backward_communication"] = times * back + back_positions
        out["backward"] = out["call"] - forward - exchange_positions - out["backward_communication"]
        out["one_exchange"] = clock.median(lambda: gp.exchange(owned), n)
    return out


def _pack(gp: GPContext, owned: Tensor, ghosts: Tensor) -> Tensor:
    """Copy what an exchange copies on this rank."""
    if isinstance(gp, AllGatherContext):
        assert gp.ghost_idx is not None
        mine = owned.new_zeros(gp.capacity, *owned.shape[1:])
        mine[: gp.n_owned] = owned
        ghosts = mine.index_select(0, gp.ghost_idx % gp.capacity)  # of this rank's rows instead of all ranks'
    elif gp.send_idx is not None:
        owned.index_select(0, gp.send_idx)
    return torch.cat((owned, ghosts))


if __name__ == "__main__":
    main()
