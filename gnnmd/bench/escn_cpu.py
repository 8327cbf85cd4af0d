"""Time eSCN-MD on the CPU: energy and forces of rattled silver crystals, random weights.

``python -m gnnmd.bench.escn_cpu`` prints one JSON line per size. It is the counterpart of
``peers/fairchem_cpu.py`` (same structures, shape and protocol), which runs in an environment of its own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

LATTICE, RATTLE, JITTER = 4.09, 0.1, 0.01  # Angstrom; positions differ in every call


def main() -> None:
    """Run every size in a process of its own, so that the peak memory belongs to it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--atoms", type=int, nargs="+", default=[32, 108, 256], help="4 n^3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--channels", type=int, default=64, help="sphere, hidden and edge channels")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--iters", type=int, default=10)
    options = parser.parse_args()
    if len(options.atoms) == 1:
        print(json.dumps(measure(options.atoms[0], options)), flush=True)
        return
    rest = [f"--{name}={getattr(options, name)}" for name in ("threads", "channels", "layers", "iters")]
    for n_atoms in options.atoms:
        command = [sys.executable, "-m", "gnnmd.bench.escn_cpu", "--atoms", str(n_atoms), *rest]
        subprocess.run(command, check=True)


def measure(n_atoms: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the median time of a call (neighbour list, energy, forces), of the list alone, and memory."""
    import numpy as np
    import torch
    from ase.build import bulk

    from gnnmd.graph import AtomBatch
    from gnnmd.models.build import PotentialConfig, build_potential
    from gnnmd.models.escn_md import EscnMDConfig
    from gnnmd.predict import InferenceSettings, PredictUnit

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    c = options.channels
    shape = {"channels": c, "hidden_channels": c, "edge_channels": c, "num_layers": options.layers}
    potential = build_potential(PotentialConfig(EscnMDConfig(lmax=2, mmax=2, num_basis=64, **shape)))
    unit = PredictUnit(potential, device="cpu", settings=InferenceSettings(stress=False))
    atoms = bulk("Ag", "fcc", a=LATTICE, cubic=True).repeat(round((n_atoms / 4) ** (1 / 3)))
    start = atoms.positions + np.random.default_rng(17).normal(0.0, RATTLE, atoms.positions.shape)
    rng = np.random.default_rng(0)

    def timed(call: Callable[[], object]) -> float:
        times = []
        for i in range(3 + options.iters):
            atoms.positions = start + rng.normal(0.0, JITTER, start.shape)
            began = time.perf_counter()
            call()
            if i >= 3:
                times.append(1000 * (time.perf_counter() - began))
        return statistics.median(times)

    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    whole = timed(lambda: unit.predict(atoms))
    graph = timed(lambda: unit.potential.graph(AtomBatch.from_ase(atoms)))
    return {
        "atoms": len(atoms),
        "edges": unit.potential.graph(AtomBatch.from_ase(atoms)).edge_index.shape[1],
        "parameters": sum(p.numel() for p in potential.parameters()),
        "threads": options.threads,
        "ms_median": round(whole, 2),
        "graph_ms_median": round(graph, 2),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "base_rss_mib": round(base, 1),
    }


if __name__ == "__main__":
    main()
