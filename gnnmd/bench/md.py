"""Time molecular dynamics of silver: constant energy with rebuilds and migration, and what a step takes.

``python -m gnnmd.bench.md --model uma_s --ranks 1 2 4 --atoms 1000 4000 16000`` prints one JSON line per
number of ranks and size (per rank with ``--weak``), milliseconds of the slowest rank:

    step: wall time of a step, everything included, over ``--steps`` steps after half as many that warm up.
    call: the potential alone, energy and forces, without the edges in the skin.
    evaluated: what a step takes of it in place of ``call`` and ``compact``, perhaps a replay.
    first: the same after a rebuild, with the capture.
    compact: leaving these out.
    rebuild: each time it happens; ``rebuilds`` and ``readings`` say how often that was.
    overhead: what a step takes beyond ``call``, in percent.
    syncs: how often a step made the host wait for the GPU, counted by torch.
    drift: change of the conserved energy over the timed steps, meV/atom.

``--ase`` adds ASE's VelocityVerlet with the calculator in the same process (one rank).
"""

import argparse
import time
import warnings
from dataclasses import replace
from typing import Any

import torch
from ase import units
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet

from gnnmd.bench.clock import Clock
from gnnmd.bench.records import describe, print_record, provenance, silver
from gnnmd.graph import AtomBatch
from gnnmd.interfaces.ase import GNNMDCalculator
from gnnmd.md.guards import Limits
from gnnmd.md.handles import start
from gnnmd.md.integrators import NVE, kinetic_energy
from gnnmd.md.setup import Setup
from gnnmd.md.simulation import initial_columns
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.dpa3_config import DPA3Config
from gnnmd.models.emt import emt
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.models.potential import Potential
from gnnmd.predict import InferenceSettings, PredictUnit
from gnnmd.predict.checkpoint import load_checkpoint
from gnnmd.predict.evaluation import RankPotential, own_arithmetic

TEMPERATURE, TIMESTEP = 300.0, 5.0  # K, fs


def main() -> None:
    """Run every number of ranks and every size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["uma_s", "dpa3", "silver", "emt"], default="uma_s")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--atoms", type=int, nargs="+", default=[1000, 4000, 16000])
    parser.add_argument("--weak", action="store_true", help="--atoms is per rank")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--skin", type=float, default=0.5, help="Angstrom; 0 finds one")
    parser.add_argument("--evaluation", default=None, help="compact, standing or captured")
    parser.add_argument("--headroom", type=float, default=0.0)
    parser.add_argument("--edge-chunk", type=int, default=None)
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ase", action="store_true")
    options = parser.parse_args()
    from gnnmd.bench.md import measure  # by its importable name, not as __main__'s

    settings = InferenceSettings(
        dtype=options.dtype, tf32=options.tf32, edge_chunk=options.edge_chunk, stress=False
    )
    for n in options.ranks:
        for atoms in options.atoms:
            wanted = atoms * n if options.weak else atoms
            potential = make_potential(options.model)
            try:
                with PredictUnit(
                    potential, device=options.device, settings=settings, workers=None if n == 1 else n
                ) as unit:
                    record = unit.on_ranks(measure, wanted, vars(options))
                    if options.ase and n == 1:
                        record |= with_ase(unit, wanted, options)
            except RuntimeError as error:  # out of memory, mostly: smaller sizes still count
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                record = {"ranks": n, "atoms": wanted, "error": reason}
            print_record({"model": options.model}, record, provenance())


def make_potential(name: str) -> Potential:
    """Return a potential with random weights in a published shape, the shipped one, or EMT."""
    torch.manual_seed(0)
    if name == "emt":
        return emt()
    if name == "silver":
        return load_checkpoint("silver")[0]
    if name == "dpa3":
        return build_potential(PotentialConfig(DPA3Config(type_map=("Ag",), nlayers=6)))
    config = EscnMDConfig(
        lmax=2, mmax=2, num_basis=64, channels=128, hidden_channels=128, edge_channels=128, num_layers=4
    )
    return build_potential(PotentialConfig(config))


def measure(share: RankPotential, n_atoms: int, options: dict[str, Any]) -> dict[str, Any]:
    """Return the record of one size; collective."""
    ranks, steps, on_gpu = share.ranks, options["steps"], share.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    atoms = silver(n_atoms, rattle=0.02)
    integrator = NVE(timestep=TIMESTEP)
    setup = Setup(
        integrator=integrator,
        reporters=(),
        skin=options["skin"] or None,
        seed=0,
        limits=Limits(),
        headroom=options["headroom"],
        evaluation=options["evaluation"],
    )
    columns = initial_columns(atoms, integrator, TEMPERATURE, 0)
    loop = start(share, setup, AtomBatch.from_ase(atoms), columns)
    engine, clock = loop.engine, Clock(ranks, share.device)
    warm_up = max(steps // 2, 32)
    loop.begin_run(warm_up + steps + 20)
    loop.advance(warm_up)
    energy = float(loop.state.energy + kinetic_energy(loop.state, engine))
    before = replace(engine.counters)
    clock.synchronize()
    begun = time.perf_counter()
    loop.advance(warm_up + steps)
    clock.synchronize()
    step = clock.maximum(1e3 * (time.perf_counter() - begun)) / steps
    drift = float(loop.state.energy + kinetic_energy(loop.state, engine)) - energy
    counters = engine.counters
    syncs = _count_syncs(lambda: loop.advance(warm_up + steps + 20)) / 20 if on_gpu else None
    s, plan, cell = loop.state, engine.plan, loop.state.cell[None]
    graph = plan.within_cutoff(s.positions, cell)

    def call() -> Any:
        with own_arithmetic(share.device, share.settings.tf32):
            return share.potential(s.positions, graph, plan.gp, stress=False)

    def recapture() -> None:
        engine.evaluation.begin_anew()
        engine.call(s, exact=False)

    alone = clock.median(call, 7)
    evaluated = clock.median(lambda: engine.call(s, exact=False), 7)
    counts = torch.tensor([plan.gp.n_owned, plan.gp.n_ghost, graph.edge_index.shape[1]], device=share.device)
    return {
        "ranks": ranks.size,
        "atoms": len(atoms),
        **describe(share.potential, share.device),
        "tf32": share.settings.tf32,
        "edge_chunk": options["edge_chunk"],
        "skin": plan.skin,
        "evaluation": engine.evaluation.how,
        **dict(zip(("max_owned", "max_ghosts", "max_edges"), ranks.max(counts).tolist(), strict=True)),
        "step": step,
        "katom_step_per_s": len(atoms) / step,
        "call": alone,
        "evaluated": evaluated,
        "first": clock.median(recapture, 3),
        "compact": clock.median(lambda: plan.within_cutoff(s.positions, cell), 5),
        "rebuild": clock.median(lambda: plan.rebuild(s.positions, cell), 3),
        "overhead": 100 * (step / alone - 1),
        "rebuilds": counters.rebuilds - before.rebuilds,
        "readings": counters.readings - before.readings,
        "steps": steps,
        "syncs": syncs,
        "drift": 1e3 * drift / len(atoms),
        "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20) if on_gpu else None,
    }


def with_ase(unit: PredictUnit, n_atoms: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the time of a step of ASE's VelocityVerlet with the calculator."""
    atoms = silver(n_atoms, rattle=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ASE renamed it
        MaxwellBoltzmannDistribution(atoms, temperature_K=TEMPERATURE)
    atoms.calc = GNNMDCalculator(unit, skin=options.skin or 0.5)
    dynamics = VelocityVerlet(atoms, TIMESTEP * units.fs)
    dynamics.run(10)
    begun = time.perf_counter()
    dynamics.run(options.steps)
    return {"ase_step": 1e3 * (time.perf_counter() - begun) / options.steps}


def _count_syncs(run: Any) -> int:
    """Return how often the host waited for the GPU during a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


if __name__ == "__main__":
    main()
