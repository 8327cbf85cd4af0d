"""Time eSCN-MD on the CPU: energy and forces of rattled silver crystals, random weights.

``python -m gnnmd.bench.escn_cpu`` prints one JSON line per size. It is the counterpart of
``peers/fairchem_cpu.py`` (same structures, shape and protocol), which runs in an environment of its own.
"""

import argparse
import json
import statistics

from gnnmd.bench.protocol import in_processes, jittered, milliseconds, rss_mib, silver


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
    raise SystemExit(in_processes(["-m", "gnnmd.bench.escn_cpu"], options.atoms, rest, options.threads))


def measure(n_atoms: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the median time of a call (neighbour list, energy, forces), of the list alone, and memory."""
    import torch

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
    atoms = silver(n_atoms)
    frames, base = jittered(atoms), rss_mib()
    whole = milliseconds(lambda _: unit.predict(next(frames)), 3, options.iters)
    peak = rss_mib()
    graph = milliseconds(lambda _: unit.potential.graph(AtomBatch.from_ase(next(frames))), 3, options.iters)
    return {
        "atoms": len(atoms),
        "edges": unit.potential.graph(AtomBatch.from_ase(atoms)).edge_index.shape[1],
        "parameters": sum(p.numel() for p in potential.parameters()),
        "threads": options.threads,
        "ms_median": round(statistics.median(whole), 2),
        "graph_ms_median": round(statistics.median(graph), 2),
        "peak_rss_mib": round(peak, 1),
        "base_rss_mib": round(base, 1),
    }


if __name__ == "__main__":
    main()
