"""Time DPA-3 (128/64/32, 6 and 4 Angstrom) on the CPU: energy and forces, float32, random weights.

``python -m gnnmd.bench.dpa_cpu`` prints one JSON line per size. It is the counterpart of
``peers/deepmd_cpu.py`` (same structures, shape and protocol), which runs in an environment of its own.
"""

import argparse
import json
import statistics

from gnnmd.bench.protocol import STRUCTURES, in_processes, jittered, milliseconds, rss_mib

#: What is timed by default; a number of atoms names its structure with a colon.
SIZES = ["silver:108", "silver:256", "water:192"]


def main() -> None:
    """Run every size in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--atoms", nargs="+", default=SIZES, help="silver:4 n^3 or water:3 n^3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--iters", type=int, default=10)
    options = parser.parse_args()
    if len(options.atoms) == 1:
        print(json.dumps(measure(options.atoms[0], options)), flush=True)
        return
    rest = [f"--{name}={getattr(options, name)}" for name in ("threads", "layers", "iters")]
    raise SystemExit(in_processes(["-m", "gnnmd.bench.dpa_cpu"], options.atoms, rest, options.threads))


def measure(size: str, options: argparse.Namespace) -> dict[str, float | str]:
    """Return the median time of a call (neighbour list, energy, forces), of the list alone, and memory."""
    import torch

    from gnnmd.graph import AtomBatch
    from gnnmd.models.dpa3 import dpa3_potential
    from gnnmd.models.dpa3_config import DPA3Config
    from gnnmd.predict import InferenceSettings, PredictUnit

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    name, _, n_atoms = size.partition(":")
    atoms = STRUCTURES[name](int(n_atoms))
    symbols = tuple(sorted(set(atoms.get_chemical_symbols())))
    potential = dpa3_potential(DPA3Config(type_map=symbols, nlayers=options.layers))
    unit = PredictUnit(potential, device="cpu", settings=InferenceSettings(stress=False))
    frames = jittered(atoms)
    base = rss_mib()
    whole = milliseconds(lambda _: unit.predict(next(frames)), 3, options.iters)
    peak = rss_mib()
    graph = milliseconds(lambda _: unit.potential.graph(AtomBatch.from_ase(next(frames))), 3, options.iters)
    return {
        "size": size,
        "edges": unit.potential.graph(AtomBatch.from_ase(atoms)).edge_index.shape[1],
        "parameters": sum(p.numel() for p in potential.parameters()),
        "threads": options.threads,
        "ms_median": round(statistics.median(whole), 2),
        "ms_min": round(min(whole), 2),
        "graph_ms_median": round(statistics.median(graph), 2),
        "peak_rss_mib": round(peak, 1),
        "base_rss_mib": round(base, 1),
    }


if __name__ == "__main__":
    main()
